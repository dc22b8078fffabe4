// SPDX-License-Identifier: Apache-2.0
//! A guest that floods: one thread writes a file round and round past the page cache, another sends UDP broadcasts, both
//! as fast as they can. Each second a line says how far they are.

use crate::args::Args;
use crate::calls;
use crate::chain::mix;
use crate::disk::{Buffer, STEP_BYTES_MAX};
use crate::during;
use crate::orders::{Order, Orders};
use crate::plan::BLOCK_BYTES;
use crate::say;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const LINE_MS: i32 = 1000;
/// The discard service: nobody answers.
const PORT: u16 = 9;
/// A full queue may refuse instead of making the sender wait.
const FULL_PAUSE: Duration = Duration::from_millis(1);

#[derive(Default)]
struct Flood {
    stop: AtomicBool,
    writes: AtomicU64,
    frames: AtomicU64,
    /// What ended a thread before its time.
    failure: Mutex<Option<String>>,
}

/// Floods for that many seconds, or until an order comes.
pub(crate) fn run(
    args: &Args,
    directory: &str,
    address: Option<Ipv4Addr>,
    orders: &mut Orders,
) -> Result<Order, String> {
    let flood = Flood::default();
    let path = format!("{directory}/colo-flood");
    let source = match (args.net, address) {
        (true, None) => return Err("flood: no address to send from: give ip=, or net=0".to_owned()),
        (true, source) => source,
        (false, _) => None,
    };
    thread::scope(|scope| {
        if args.disk {
            scope.spawn(|| flood.keep("disk", write(&flood, &path, args)));
        }
        if let Some(source) = source {
            let flood = &flood;
            scope.spawn(move || flood.keep("net", send(flood, source, args.frame)));
        }
        let result = watch(&flood, args.steps, orders);
        flood.stop.store(true, Ordering::Relaxed);
        result
    })
}

/// A line each second.
fn watch(flood: &Flood, steps: u64, orders: &mut Orders) -> Result<Order, String> {
    let last = if steps == 0 { u64::MAX } else { steps };
    for number in 1..=last {
        let order = orders.take(LINE_MS);
        if let Some(failure) = flood.failure.lock().unwrap().take() {
            return Err(failure);
        }
        let written = flood.writes.load(Ordering::Relaxed) * STEP_BYTES_MAX as u64;
        let frames = flood.frames.load(Ordering::Relaxed);
        say(&format!("colo-disk {number:08} ok flood written={written} frames={frames}"));
        if let Some(order) = order {
            return Ok(order);
        }
    }
    Ok(Order::End)
}

impl Flood {
    fn keep(&self, what: &str, result: io::Result<()>) {
        if let Err(what) = result.map_err(during(&format!("flood {what}"))) {
            *self.failure.lock().unwrap() = Some(what);
        }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

fn write(flood: &Flood, path: &str, args: &Args) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).custom_flags(calls::O_DIRECT).open(path)?;
    let mut buffer = Buffer::new();
    let buffer = buffer.bytes(STEP_BYTES_MAX);
    let pieces = (args.blocks * BLOCK_BYTES as u64).div_ceil(STEP_BYTES_MAX as u64);
    for number in 0.. {
        if !flood.goes_on() {
            break;
        }
        // All new, so that nobody between here and the other node can make less of it.
        for (bytes, at) in buffer.as_chunks_mut().0.iter_mut().zip(0..) {
            *bytes = mix(mix(args.seed, number), at).to_le_bytes();
        }
        file.write_all_at(buffer, number % pieces * STEP_BYTES_MAX as u64)?;
        flood.writes.store(number + 1, Ordering::Relaxed);
    }
    file.sync_all()
}

fn send(flood: &Flood, source: Ipv4Addr, bytes: usize) -> io::Result<()> {
    let socket = UdpSocket::bind((source, 0))?;
    socket.set_broadcast(true)?;
    let mut frame = vec![0; bytes];
    let mut number = 0u64;
    while flood.goes_on() {
        let stamp = number.to_le_bytes();
        let stamped = stamp.len().min(bytes);
        frame[..stamped].copy_from_slice(&stamp[..stamped]);
        match socket.send_to(&frame, (Ipv4Addr::BROADCAST, PORT)) {
            Ok(_) => number += 1,
            Err(error) if is_full(&error) => thread::sleep(FULL_PAUSE),
            Err(error) => return Err(error),
        }
        flood.frames.store(number, Ordering::Relaxed);
    }
    Ok(())
}

fn is_full(error: &io::Error) -> bool {
    const ENOBUFS: i32 = 105;
    error.kind() == ErrorKind::WouldBlock || error.raw_os_error() == Some(ENOBUFS)
}
