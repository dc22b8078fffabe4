//! The operator's side of a console: keys and screen, each on a thread of its own, since either may block for ever.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use vmm_sys_util::terminal::Terminal;

use crate::error::CtlError;
use crate::output;

/// Typed at the terminal, leaves: Ctrl-] as in telnet.
const ESCAPE: u8 = 0x1d;
/// Chunks that may wait, either way: a little, so that nothing stands still for a moment's work.
const MAX_WAITING: usize = 16;
/// Bytes read at once.
const MAX_CHUNK: usize = 1024;
/// How long the last bytes may take to be shown when the operator leaves.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// The terminal in raw mode until this is dropped; nothing if standard input is none.
pub(super) struct RawMode(bool);

impl RawMode {
    /// Switches it on.
    pub(super) fn enter() -> Self {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Self(false);
        }
        if let Err(e) = stdin.lock().set_raw_mode() {
            output::note(&format!("the terminal stays in line mode: {e}"));
            return Self(false);
        }
        Self(true)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The keyboard reads from a descriptor of its own, so nobody holds this lock.
        if self.0
            && let Err(e) = io::stdin().lock().set_canon_mode()
        {
            output::note(&format!("the terminal cannot be set back to line mode: {e}; run `stty sane`"));
        }
    }
}

/// What comes from standard input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// Bytes to type.
    Bytes(Vec<u8>),
    /// The operator leaves.
    Leave,
}

/// Reads standard input until it ends. The thread ends with the process.
pub(super) fn keyboard() -> Result<mpsc::Receiver<Key>, CtlError> {
    let stdin = io::stdin();
    let terminal = stdin.is_terminal();
    let mut input = File::from(stdin.as_fd().try_clone_to_owned().map_err(CtlError::Runtime)?);
    let (tell, keys) = mpsc::channel(MAX_WAITING);
    let read = move || {
        let mut buffer = [0; MAX_CHUNK];
        loop {
            let count = match input.read(&mut buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => return,
                Ok(count) => count,
            };
            for key in split(&buffer[..count], terminal) {
                if tell.blocking_send(key).is_err() {
                    return;
                }
            }
        }
    };
    thread::Builder::new().name("keyboard".to_owned()).spawn(read).map_err(CtlError::Runtime)?;
    Ok(keys)
}

/// Only who sits at a terminal can leave by a key: what comes from a pipe is data.
fn split(bytes: &[u8], terminal: bool) -> Vec<Key> {
    let typed = bytes.split(|&byte| terminal && byte == ESCAPE).next().unwrap_or_default();
    let mut keys = Vec::new();
    if !typed.is_empty() {
        keys.push(Key::Bytes(typed.to_vec()));
    }
    if typed.len() < bytes.len() {
        keys.push(Key::Leave);
    }
    keys
}

/// Writes to standard output.
pub(super) struct Screen {
    chunks: mpsc::Sender<Vec<u8>>,
    /// Nothing once it was told.
    ended: Option<oneshot::Receiver<io::Error>>,
}

impl Screen {
    /// Starts its thread.
    pub(super) fn start() -> Result<Self, CtlError> {
        let (chunks, mut waiting) = mpsc::channel::<Vec<u8>>(MAX_WAITING);
        let (tell, ended) = oneshot::channel();
        let write = move || {
            let mut out = io::stdout().lock();
            while let Some(chunk) = waiting.blocking_recv() {
                if let Err(e) = out.write_all(&chunk).and_then(|()| out.flush()) {
                    drop(tell.send(e));
                    return;
                }
            }
        };
        thread::Builder::new().name("screen".to_owned()).spawn(write).map_err(CtlError::Runtime)?;
        Ok(Self { chunks, ended: Some(ended) })
    }

    /// Whether something can be shown without waiting.
    pub(super) fn has_room(&self) -> bool {
        self.chunks.capacity() > 0
    }

    /// Shows bytes; there must be room.
    pub(super) fn show(&self, bytes: Vec<u8>) {
        // If the thread has ended, `failed` tells why.
        drop(self.chunks.try_send(bytes));
    }

    /// Waits until there is room.
    pub(super) fn room(&self) -> impl Future<Output = ()> + use<> {
        let chunks = self.chunks.clone();
        async move {
            if chunks.reserve().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits until nothing can be shown any more. Cancel-safe.
    pub(super) async fn failed(&mut self) -> CtlError {
        let gone = || CtlError::Output(io::Error::other("its thread has ended"));
        let Some(ended) = &mut self.ended else { return gone() };
        let told = ended.await;
        self.ended = None;
        told.map_or_else(|_| gone(), output::failed)
    }

    /// Lets the last bytes out, unless nobody takes them.
    pub(super) async fn close(self) -> Result<(), CtlError> {
        drop(self.chunks);
        let Some(ended) = self.ended else { return Ok(()) };
        match tokio::time::timeout(LAST_BYTES, ended).await {
            Ok(Ok(e)) => Err(output::failed(e)),
            // The thread has written everything, or hangs in it.
            Ok(Err(_)) | Err(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Key, split};

    #[test]
    fn the_escape_counts_at_a_terminal_only() {
        let bytes = |bytes: &[u8]| Key::Bytes(bytes.to_vec());
        assert_eq!(split(b"ab\x1dcd", true), [bytes(b"ab"), Key::Leave]);
        assert_eq!(split(b"\x1d", true), [Key::Leave]);
        assert_eq!(split(b"ab\x1dcd", false), [bytes(b"ab\x1dcd")]);
        assert_eq!(split(b"", true), []);
    }
}
