//! A way to a TCP server that can lose the answers, or all: what a client says gets there and what the server says does
//! not, or nothing gets anywhere.

use anyhow::Context;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Bytes that are passed on at a time.
const CHUNK: usize = 16 << 10;

/// The way. Its threads end with the process.
#[derive(Debug)]
pub struct Swallower {
    /// Where clients connect to.
    pub address: SocketAddr,
    gates: Arc<Gates>,
}

/// What is lost.
#[derive(Debug, Default)]
struct Gates {
    answers: AtomicBool,
    questions: AtomicBool,
    /// A question that has this in it is the last that is answered.
    mark: Mutex<Option<&'static [u8]>>,
}

impl Swallower {
    /// A way to `server`.
    ///
    /// # Errors
    /// No port can be had.
    pub fn open(server: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port")?;
        let address = listener.local_addr()?;
        let gates = Arc::new(Gates::default());
        let of_way = Arc::clone(&gates);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A server that is gone closes the connection, as it would by itself.
                let _ = pass(client, server, &of_way);
            }
        });
        Ok(Self { address, gates })
    }

    /// From the first question that has `mark` in it on, answers are lost.
    ///
    /// # Panics
    /// A thread of the way has panicked.
    pub fn swallow_after(&self, mark: &'static [u8]) {
        *self.gates.mark.lock().expect("no thread has panicked") = Some(mark);
    }

    /// Answers come again. A connection that has lost some is closed then.
    ///
    /// # Panics
    /// A thread of the way has panicked.
    pub fn heal(&self) {
        *self.gates.mark.lock().expect("no thread has panicked") = None;
        self.gates.answers.store(false, Ordering::SeqCst);
    }

    /// From now on nothing gets through, either way.
    pub fn cut(&self) {
        self.gates.questions.store(true, Ordering::SeqCst);
        self.gates.answers.store(true, Ordering::SeqCst);
    }
}

impl Gates {
    fn lets_ask(&self, bytes: &[u8]) -> bool {
        let mark = *self.mark.lock().expect("no thread has panicked");
        if mark.is_some_and(|mark| bytes.windows(mark.len()).any(|part| part == mark)) {
            self.answers.store(true, Ordering::SeqCst);
        }
        !self.questions.load(Ordering::SeqCst)
    }
}

fn pass(client: TcpStream, server: SocketAddr, gates: &Arc<Gates>) -> std::io::Result<()> {
    let server = TcpStream::connect(server)?;
    let (to_server, from_server) = (server.try_clone()?, server);
    let (from_client, to_client) = (client.try_clone()?, client);
    let (there, back) = (Arc::clone(gates), Arc::clone(gates));
    thread::spawn(move || copy(from_client, to_server, |bytes| there.lets_ask(bytes)));
    thread::spawn(move || copy(from_server, to_client, |_| !back.answers.load(Ordering::SeqCst)));
    Ok(())
}

/// Passes on what `takes` says yes to. After bytes that were lost nothing makes sense: the next that would pass ends it.
fn copy(mut from: TcpStream, mut to: TcpStream, takes: impl Fn(&[u8]) -> bool) {
    let (mut buffer, mut lost) = ([0; CHUNK], false);
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        match takes(&buffer[..len]) {
            false => lost = true,
            true if lost || to.write_all(&buffer[..len]).is_err() => break,
            true => {}
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
