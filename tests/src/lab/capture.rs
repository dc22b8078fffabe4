//! Records what passes at an interface, for tests of who sent what, and when.

use anyhow::Context;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Frames that are kept at most: with [`MAX_BYTES`] each, 64 MiB.
const MAX_FRAMES: usize = 1 << 18;
/// Bytes that are kept of the start of a frame: all headers.
const MAX_BYTES: usize = 256;
/// Milliseconds until a capture that is to end notices.
const POLL_MS: i64 = 20;
/// Bytes that wait in the kernel while the thread has no processor.
const BUFFER: libc::c_int = 16 << 20;

/// Two of linux/if_packet.h that libc leaves out.
const PACKET_OUTGOING: u8 = 4;
const PACKET_STATISTICS: libc::c_int = 6;

/// A frame that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// When this process saw it.
    pub at: Instant,
    /// Whether the host sent it out here: to the guest, where this is a TAP. Else it came in.
    pub outgoing: bool,
    /// Its length.
    pub len: usize,
    /// Its start.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// The card that sent it.
    pub fn source(&self) -> Option<[u8; 6]> {
        self.bytes.get(6..12)?.try_into().ok()
    }

    /// Its protocol.
    pub fn ethertype(&self) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes.get(12..14)?.try_into().ok()?))
    }
}

#[derive(Debug, Default)]
struct Seen {
    frames: Vec<Frame>,
    missed: u64,
}

/// Records until it is stopped or dropped.
#[derive(Debug)]
pub struct Capture {
    seen: Arc<Mutex<Seen>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    /// Records at this interface of the calling thread's namespace from now on.
    ///
    /// # Errors
    /// There is none, or this process may not.
    pub fn start(interface: &str) -> anyhow::Result<Self> {
        let socket = open(interface).with_context(|| format!("cannot listen at {interface}"))?;
        let (seen, ending) = (Arc::<Mutex<Seen>>::default(), Arc::new(AtomicBool::new(false)));
        let (into, end) = (Arc::clone(&seen), Arc::clone(&ending));
        let thread = std::thread::Builder::new().name(format!("capture {interface}")).spawn(move || {
            while !end.load(Ordering::SeqCst) {
                record(&socket, &into);
            }
            // What waits in the kernel passed before the end.
            while record(&socket, &into) {}
            lock(&into).missed += missed(&socket);
        });
        Ok(Self { seen, ending, thread: Some(thread.context("a thread")?) })
    }

    /// What has passed until now.
    pub fn frames(&self) -> Vec<Frame> {
        lock(&self.seen).frames.clone()
    }

    /// What has passed since the last call, and how many more frames there were: those that wait in the kernel are not
    /// in it yet.
    pub fn take(&self) -> (Vec<Frame>, u64) {
        let seen = std::mem::take(&mut *lock(&self.seen));
        (seen.frames, seen.missed)
    }

    /// Ends it: all frames, and how many more there were.
    pub fn stop(mut self) -> (Vec<Frame>, u64) {
        self.end();
        let seen = std::mem::take(&mut *lock(&self.seen));
        (seen.frames, seen.missed)
    }

    fn end(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("a capture had panicked");
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the next frame; whether there was one in time.
fn record(socket: &OwnedFd, into: &Mutex<Seen>) -> bool {
    let Ok(frame) = receive(socket) else { return false };
    let mut seen = lock(into);
    if seen.frames.len() < MAX_FRAMES {
        seen.frames.push(frame);
    } else {
        seen.missed += 1;
    }
    true
}

fn open(interface: &str) -> io::Result<OwnedFd> {
    let name = CString::new(interface)?;
    // SAFETY: `name` ends with a zero and lives through the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let index = if index == 0 { Err(io::Error::last_os_error()) } else { Ok(index as libc::c_int) }?;
    // Of no protocol until it is bound: else it would take other interfaces' frames in between.
    // SAFETY: no memory of ours is touched.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    checked(socket as isize)?;
    // SAFETY: the descriptor was just made and is nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    set(&socket, libc::SO_RCVBUFFORCE, &BUFFER)?;
    set(&socket, libc::SO_RCVTIMEO, &libc::timeval { tv_sec: 0, tv_usec: POLL_MS * 1000 })?;
    let mut address = no_address();
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is a link-layer address of this length, and lives through the call.
    checked(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } as isize)?;
    Ok(socket)
}

fn receive(socket: &OwnedFd) -> io::Result<Frame> {
    let mut bytes = vec![0_u8; MAX_BYTES];
    let mut address = no_address();
    let mut len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: `bytes` and `address` have the lengths that are given and live through the call.
    let received = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
            libc::MSG_TRUNC,
            (&raw mut address).cast(),
            &raw mut len,
        )
    };
    let at = Instant::now();
    // With MSG_TRUNC it is the length of the whole frame.
    let len = checked(received)?;
    bytes.truncate(len);
    Ok(Frame { at, outgoing: address.sll_pkttype == PACKET_OUTGOING, len, bytes })
}

/// Frames that found no room in the kernel.
fn missed(socket: &OwnedFd) -> u64 {
    // tp_packets and tp_drops.
    let mut statistics = [0_u32; 2];
    let mut len = size_of_val(&statistics) as libc::socklen_t;
    let to = statistics.as_mut_ptr().cast();
    // SAFETY: the option writes two numbers of 32 bits, for which there is room; both places live through the call.
    let got = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_PACKET, PACKET_STATISTICS, to, &raw mut len)
    };
    // A capture that cannot say whether it is whole is not.
    if got == 0 { u64::from(statistics[1]) } else { 1 }
}

fn set<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    let from = (&raw const *value).cast();
    // SAFETY: the option reads `value`, a plain structure of this length, which lives through the call.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, from, len) };
    checked(done as isize).map(drop)
}

fn no_address() -> libc::sockaddr_ll {
    // SAFETY: a plain C structure of numbers, for which zeroes are a value.
    unsafe { std::mem::zeroed() }
}

fn checked(ret: isize) -> io::Result<usize> {
    usize::try_from(ret).map_err(|_| io::Error::last_os_error())
}
