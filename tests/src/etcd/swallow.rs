//! A way to a TCP server that can lose the answers: what a client says gets there, and what the server says does not.

use anyhow::Context;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Bytes that are passed on at a time.
const CHUNK: usize = 16 << 10;

/// The way. Its threads end with the process.
#[derive(Debug)]
pub struct Swallower {
    /// Where clients connect to.
    pub address: SocketAddr,
    swallowing: Arc<AtomicBool>,
}

impl Swallower {
    /// A way to `server`.
    ///
    /// # Errors
    /// No port can be had.
    pub fn open(server: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port")?;
        let address = listener.local_addr()?;
        let swallowing = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&swallowing);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A server that is gone closes the connection, as it would by itself.
                let _ = pass(client, server, &flag);
            }
        });
        Ok(Self { address, swallowing })
    }

    /// From now on answers are lost, or come again. A connection that has lost some is closed then.
    pub fn swallow(&self, on: bool) {
        self.swallowing.store(on, Ordering::SeqCst);
    }
}

fn pass(client: TcpStream, server: SocketAddr, swallowing: &Arc<AtomicBool>) -> std::io::Result<()> {
    let server = TcpStream::connect(server)?;
    let (to_server, from_server) = (server.try_clone()?, server);
    let (from_client, to_client) = (client.try_clone()?, client);
    let flag = Arc::clone(swallowing);
    thread::spawn(move || copy(from_client, to_server, || true));
    thread::spawn(move || copy(from_server, to_client, || !flag.load(Ordering::SeqCst)));
    Ok(())
}

/// Passes on what `takes` says yes to. After bytes that were lost nothing makes sense: the next that would pass ends it.
fn copy(mut from: TcpStream, mut to: TcpStream, takes: impl Fn() -> bool) {
    let (mut buffer, mut lost) = ([0; CHUNK], false);
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        match takes() {
            false => lost = true,
            true if lost || to.write_all(&buffer[..len]).is_err() => break,
            true => {}
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
