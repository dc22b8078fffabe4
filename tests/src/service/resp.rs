//! RESP2, as much of it as the clients here need: one request, one reply.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Bytes of a line at most: a status, an error, a number.
const MAX_LINE: u64 = 64 << 10;
/// Bytes of a value at most; those of these clients are far smaller.
const MAX_BULK: usize = 1 << 20;
/// Values in one reply at most, and so keys in one request.
const MAX_VALUES: usize = 1024;

/// What the service answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reply {
    /// Such as `OK`.
    Status(String),
    /// It refuses.
    Error(String),
    /// A number.
    Integer(i64),
    /// A value, or that there is none.
    Bulk(Option<Vec<u8>>),
    /// Several of these.
    Array(Vec<Reply>),
}

/// Why there is no reply. What the request did nobody knows.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// None in time.
    #[error("no reply in time")]
    Timeout,
    /// The connection is no more.
    #[error("the connection was lost: {0}")]
    Lost(#[source] io::Error),
    /// It is no RESP, or more than these clients take.
    #[error("not a reply that is understood: {0}")]
    Malformed(String),
}

/// A connection to a service.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Waits `patience` at most for any part of a reply.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(stream: TcpStream, patience: Duration) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Sends a request and waits for its reply. After an error the connection is of no more use: the reply may still
    /// come.
    ///
    /// # Errors
    /// There is none.
    pub fn call(&mut self, request: &[&[u8]]) -> Result<Reply, CallError> {
        self.stream.get_mut().write_all(&encode(request)).map_err(lost)?;
        read_reply(&mut self.stream, true)
    }
}

/// A request on the wire.
pub fn encode(request: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", request.len()).into_bytes();
    for word in request {
        bytes.extend(format!("${}\r\n", word.len()).bytes());
        bytes.extend(*word);
        bytes.extend(b"\r\n");
    }
    bytes
}

fn lost(e: io::Error) -> CallError {
    match e.raw_os_error() {
        // Our own patience. The kernel's, ETIMEDOUT, is the end of a connection.
        Some(libc::EAGAIN) => CallError::Timeout,
        _ => CallError::Lost(e),
    }
}

/// Reads a reply; an array only where `arrays`, so that none is in another.
pub(super) fn read_reply(from: &mut impl BufRead, arrays: bool) -> Result<Reply, CallError> {
    let line = read_line(from)?;
    let malformed = || CallError::Malformed(format!("{:?}", line.chars().take(80).collect::<String>()));
    let kind = *line.as_bytes().first().ok_or_else(malformed)?;
    // After a first byte that is ASCII comes a character.
    let rest = line.get(1..).ok_or_else(malformed)?;
    let number = || rest.parse::<i64>().map_err(|_| malformed());
    // -1 stands for "there is none".
    let count = |most: usize| match number()? {
        -1 => Ok(None),
        n => usize::try_from(n).ok().filter(|n| *n <= most).map(Some).ok_or_else(malformed),
    };
    match kind {
        b'+' => Ok(Reply::Status(rest.to_owned())),
        b'-' => Ok(Reply::Error(rest.to_owned())),
        b':' => Ok(Reply::Integer(number()?)),
        b'$' => Ok(Reply::Bulk(count(MAX_BULK)?.map(|len| read_bulk(from, len)).transpose()?)),
        b'*' if arrays => {
            let count = count(MAX_VALUES)?.ok_or_else(malformed)?;
            (0..count).map(|_| read_reply(from, false)).collect::<Result<_, _>>().map(Reply::Array)
        }
        _ => Err(malformed()),
    }
}

fn read_line(from: &mut impl BufRead) -> Result<String, CallError> {
    let mut line = Vec::new();
    from.take(MAX_LINE).read_until(b'\n', &mut line).map_err(lost)?;
    if line.is_empty() {
        return Err(CallError::Lost(io::ErrorKind::UnexpectedEof.into()));
    }
    match line.strip_suffix(b"\r\n") {
        Some(line) => Ok(String::from_utf8_lossy(line).into_owned()),
        None => Err(CallError::Malformed(format!("a line of {} bytes without an end", line.len()))),
    }
}

fn read_bulk(from: &mut impl BufRead, len: usize) -> Result<Vec<u8>, CallError> {
    let mut bytes = vec![0; len + 2];
    from.read_exact(&mut bytes).map_err(lost)?;
    match bytes.strip_suffix(b"\r\n") {
        Some(value) => Ok(value.to_vec()),
        None => Err(CallError::Malformed("a value that does not end where it said".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::{CallError, MAX_LINE, Reply, encode, read_reply};
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Reply, CallError> {
        read_reply(&mut &bytes[..], true)
    }

    #[test]
    fn replies_of_each_kind_are_read() {
        let bulk = |text: &str| Reply::Bulk(Some(text.as_bytes().to_vec()));
        for (bytes, reply) in [
            ("+OK\r\n", Reply::Status("OK".to_owned())),
            ("-ERR no\r\n", Reply::Error("ERR no".to_owned())),
            (":-12\r\n", Reply::Integer(-12)),
            ("$4\r\na\r\nb\r\n", bulk("a\r\nb")),
            ("$-1\r\n", Reply::Bulk(None)),
            ("*2\r\n$1\r\nx\r\n$-1\r\n", Reply::Array(vec![bulk("x"), Reply::Bulk(None)])),
        ] {
            assert_eq!(read(bytes.as_bytes()).unwrap(), reply, "{bytes:?}");
        }
        assert_eq!(encode(&[b"SET", b"k", b"v\r\n"]), b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\nv\r\n\r\n");
    }

    #[test]
    fn what_is_no_reply_is_refused_without_room_made_for_it() {
        let endless = vec![b'+'; MAX_LINE as usize * 2];
        for bytes in [
            &b"OK\r\n"[..],
            b"\r\n",
            b"+OK\n",
            b":x\r\n",
            b"$-2\r\n",
            b"$99999999999\r\n",
            b"$1\r\nabc",
            b"*99999999\r\n",
            b"*-1\r\n",
            b"*1\r\n*1\r\n:1\r\n",
            "\u{e4}\r\n".as_bytes(),
            &endless,
        ] {
            assert!(matches!(read(bytes), Err(CallError::Malformed(_))), "{bytes:?}");
        }
        for bytes in [&b""[..], b"$5\r\nab", b"*2\r\n:1\r\n"] {
            assert!(matches!(read(bytes), Err(CallError::Lost(_))), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn bytes_of_any_kind_are_borne(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }

        #[test]
        fn replies_that_were_cut_short_are_none(cut in 0_usize..30) {
            let whole = b"*3\r\n$5\r\nabcde\r\n$-1\r\n:1234\r\n";
            prop_assert!(read(&whole[..cut.min(whole.len() - 1)]).is_err());
        }
    }
}
