//! A TAP interface: the host's side of a guest's network card.
//!
//! Frames go both ways with a virtio-net header of [`HEADER`] bytes in front, little endian, and nothing blocks. An
//! interface that was opened has its carrier off until [`Tap::set_carrier`]: so a node that follows can hold it ready,
//! and bridges send nothing to it.

pub mod announce;
mod error;
pub mod learn;
mod sys;
mod traffic;

pub use error::TapError;
pub use traffic::Traffic;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};

use traffic::Counts;

/// Bytes of the virtio-net header in front of every frame: the one with the number of buffers, as of virtio 1.
pub const HEADER: usize = 12;
/// Bytes of an interface's name at most: the kernel's limit, without the end.
const MAX_NAME: usize = libc::IFNAMSIZ - 1;
/// Where interfaces are asked for.
const DEVICE: &str = "/dev/net/tun";

/// What the guest's side can take, in frames that the host sends to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksum is not made yet.
    pub csum: bool,
    /// IPv4 TCP segments longer than a frame; only together with `csum`.
    pub tso4: bool,
    /// IPv6 TCP segments longer than a frame; only together with `csum`.
    pub tso6: bool,
    /// Such segments with ECN; only together with one of the two.
    pub ecn: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Self = Self { csum: true, tso4: true, tso6: true, ecn: true };

    /// As the kernel wants them; it refuses one without those that it needs, so such a one is left out.
    fn bits(self) -> libc::c_uint {
        let bit = |set: bool, bit| if set { bit } else { 0 };
        let long = self.csum && (self.tso4 || self.tso6);
        bit(self.csum, libc::TUN_F_CSUM)
            | bit(self.csum && self.tso4, libc::TUN_F_TSO4)
            | bit(self.csum && self.tso6, libc::TUN_F_TSO6)
            | bit(long && self.ecn, libc::TUN_F_TSO_ECN)
    }
}

/// What became of a frame that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The host has it.
    Taken,
    /// The interface is down: the frame is lost, as on a cable that is not plugged in.
    Down,
    /// No room now: the same frame may be tried again.
    Full,
    /// It is none that the host takes, by its length or by what its header says of it; no other try helps.
    Refused,
}

/// A TAP interface that this process holds, alone.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    kind: Kind,
    /// As it was switched last.
    carrier: AtomicBool,
    counts: Counts,
}

#[derive(Debug)]
enum Kind {
    Interface { offloads: bool },
    Socket,
}

impl Tap {
    /// Attaches to the interface of this name, or makes one for as long as this value lives if there is none, and sees
    /// to it that it is up. Its carrier is off and its offloads too.
    ///
    /// # Errors
    /// The host has no TAP interfaces, this process may not, somebody else has it, or it is another kind of interface.
    pub fn open(name: &str) -> Result<Self, TapError> {
        check_name(name)?;
        let file = open_device()?;
        let lacks = |what| move |source| TapError::Kernel { what, source };
        let has = sys::features(&file).map_err(lacks("tell its features (TUNGETFEATURES)"))?;
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // Where it is known it leaves no instant in which a follower's interface looks plugged in.
        let flags = wanted | (has & libc::IFF_NO_CARRIER);
        sys::attach(&file, name, flags).map_err(|source| TapError::attach(name, source))?;
        sys::set_header(&file, HEADER).map_err(lacks("take headers of 12 bytes (TUNSETVNETHDRSZ)"))?;
        sys::set_little_endian(&file).map_err(lacks("take little-endian headers (TUNSETVNETLE)"))?;
        sys::set_carrier(&file, false).map_err(lacks("switch a carrier (TUNSETCARRIER)"))?;
        let offloads = sys::set_offloads(&file, Offloads::ALL.bits()).is_ok();
        sys::set_offloads(&file, 0).map_err(lacks("switch offloads off (TUNSETOFFLOAD)"))?;
        sys::bring_up(name).map_err(|source| TapError::up(name, source))?;
        Ok(Self::new(file, name, Kind::Interface { offloads }))
    }

    /// For tests: one end of a pair of datagram sockets in an interface's place. It has all offloads, and switching
    /// them or the carrier does nothing.
    ///
    /// # Errors
    /// The system refuses.
    pub fn from_socket(socket: OwnedFd) -> io::Result<Self> {
        let socket = UnixDatagram::from(socket);
        socket.set_nonblocking(true)?;
        let file = File::from(OwnedFd::from(socket));
        Ok(Self::new(file, "socket", Kind::Socket))
    }

    fn new(file: File, name: &str, kind: Kind) -> Self {
        Self { file, name: name.to_owned(), kind, carrier: AtomicBool::new(false), counts: Counts::default() }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether checksums and segmentation can be left to the host, all of them.
    pub fn offers_offloads(&self) -> bool {
        match self.kind {
            Kind::Interface { offloads } => offloads,
            Kind::Socket => true,
        }
    }

    /// Says which frames the guest's side can take from now on. One that stands on another that is not there (see
    /// [`Offloads`]) is left out.
    ///
    /// # Errors
    /// The kernel has not all of them, which [`offers_offloads`](Self::offers_offloads) tells before.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        match self.kind {
            Kind::Interface { .. } => sys::set_offloads(&self.file, offloads.bits()),
            Kind::Socket => Ok(()),
        }
    }

    /// Plugs the cable in, or pulls it: without a carrier, a bridge forgets who is behind the interface and sends
    /// nothing to it.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn set_carrier(&self, on: bool) -> io::Result<()> {
        match self.kind {
            Kind::Interface { .. } => sys::set_carrier(&self.file, on)?,
            Kind::Socket => {}
        }
        self.carrier.store(on, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the cable is plugged in.
    pub fn has_carrier(&self) -> bool {
        self.carrier.load(Ordering::Relaxed)
    }

    /// What has passed since it was opened.
    pub fn traffic(&self) -> Traffic {
        self.counts.traffic()
    }

    /// Reads the next frame with its header; nothing if there is none now. What `frame` has no room for is cut off: it
    /// wants [`MAX_FRAME`](colo_common::limits::MAX_FRAME) bytes.
    ///
    /// # Errors
    /// The descriptor is broken: the interface was removed, for instance. No other try helps.
    pub fn read_frame(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&self.file).read(frame) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // No interface gives these, but whoever has the other socket may.
                Ok(len) if len < HEADER => {}
                done => {
                    done.iter().for_each(|len| self.counts.received(len - HEADER));
                    return done.map(Some);
                }
            }
        }
    }

    /// Writes one frame with its header.
    ///
    /// # Errors
    /// The descriptor is broken, as in [`read_frame`](Self::read_frame).
    pub fn write_frame(&self, frame: &[u8]) -> io::Result<Written> {
        let written = self.try_to_write(frame);
        let taken = matches!(written, Ok(Written::Taken));
        if taken {
            self.counts.sent(frame.len().saturating_sub(HEADER));
        } else {
            self.counts.lost();
        }
        written
    }

    fn try_to_write(&self, frame: &[u8]) -> io::Result<Written> {
        loop {
            let Err(e) = (&self.file).write(frame) else { return Ok(Written::Taken) };
            return match e.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EIO) => Ok(Written::Down),
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => Ok(Written::Full),
                Some(libc::EINVAL | libc::EMSGSIZE) => Ok(Written::Refused),
                _ => Err(e),
            };
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The kernel would fill in a '%', cut what is too long, and answer the rest with the one error that it has for much.
fn check_name(name: &str) -> Result<(), TapError> {
    let fits = (1..=MAX_NAME).contains(&name.len()) && name != "." && name != "..";
    let plain = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%' && b != b':');
    if fits && plain { Ok(()) } else { Err(TapError::Name { name: name.chars().take(64).collect() }) }
}

fn open_device() -> Result<File, TapError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    options.open(DEVICE).map_err(TapError::device)
}

#[cfg(test)]
mod tests {
    use super::{HEADER, Offloads, Tap, TapError, Traffic, Written};
    use std::os::unix::net::UnixDatagram;

    fn pair() -> (Tap, UnixDatagram) {
        let (near, far) = UnixDatagram::pair().unwrap();
        (Tap::from_socket(near.into()).unwrap(), far)
    }

    #[test]
    fn a_name_that_no_interface_can_have_is_refused() {
        for name in ["", "sixteen-letters-", "with space", "a/b", "tap%d", "eth0:1", ".", "..", "t\u{e4}p"] {
            let error = Tap::open(name).unwrap_err();
            assert!(matches!(error, TapError::Name { .. }), "{name:?}: {error}");
            assert!(error.to_string().contains("15 characters"), "{error}");
        }
    }

    #[test]
    fn frames_go_both_ways_and_nothing_blocks() {
        let (tap, far) = pair();
        let mut frame = [0; 256];
        assert_eq!(tap.read_frame(&mut frame).unwrap(), None);
        far.send(&[7; HEADER - 1]).unwrap();
        far.send(&[]).unwrap();
        far.send(&[8; 60]).unwrap();
        assert_eq!(tap.read_frame(&mut frame).unwrap(), Some(60), "what is no frame is passed over");
        assert_eq!(tap.read_frame(&mut frame).unwrap(), None);
        assert_eq!(tap.write_frame(&[9; 72]).unwrap(), Written::Taken);
        assert_eq!((far.recv(&mut frame).unwrap(), frame[71]), (72, 9));
        let (sent_bytes, received_bytes) = (72 - HEADER as u64, 60 - HEADER as u64);
        assert_eq!(tap.traffic(), Traffic { sent: 1, received: 1, lost: 0, sent_bytes, received_bytes });
    }

    #[test]
    fn a_full_queue_is_no_broken_descriptor() {
        let (tap, far) = pair();
        let full = (0..100_000).map(|_| tap.write_frame(&[1; 1000]).unwrap()).find(|w| *w != Written::Taken);
        assert_eq!(full, Some(Written::Full));
        far.recv(&mut [0; 1000]).unwrap();
        drop(far);
        assert!(tap.write_frame(&[1; 1000]).is_err());
        assert_eq!(tap.traffic().lost, 2, "the one that had no room, and the last");
    }

    #[test]
    fn an_offload_without_what_it_stands_on_is_left_out() {
        let none = Offloads::default();
        assert_eq!(Offloads::ALL.bits(), 0xf);
        assert_eq!(none.bits(), 0);
        assert_eq!(Offloads { csum: false, ..Offloads::ALL }.bits(), 0);
        assert_eq!(Offloads { csum: true, ecn: true, ..none }.bits(), libc::TUN_F_CSUM);
        let long = libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        assert_eq!(Offloads { csum: true, tso6: true, ecn: true, ..none }.bits(), long);
    }
}
