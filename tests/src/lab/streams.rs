//! What a guest said over TCP, byte by byte, whichever node let it out: two nodes may say the same twice, as TCP does
//! itself, and never two things at one place.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use super::capture::Frame;

/// Bytes that are remembered at most: minutes of a service's answers.
const MAX_BYTES: usize = 16 << 20;
const IPV4: u16 = 0x0800;
const TCP: u8 = 6;
/// Bytes of an Ethernet header, and the least of the two that follow.
const ETHERNET: usize = 14;
const IP_MIN: usize = 20;
const TCP_MIN: usize = 20;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;

/// One direction of a connection: the guest's port, and whom it talks to.
type Flow = (u16, Ipv4Addr, u16);

/// Everything that was said.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    /// Byte and node by connection and sequence number.
    said: HashMap<(Flow, u32), (u8, String)>,
    /// Connections that the guest refused or broke off.
    pub resets: u64,
    /// Places at which two frames said different things, and the first of them in words.
    pub conflicts: (u64, Option<String>),
    /// Bytes that there was no room for.
    pub forgotten: u64,
}

/// What of a frame matters here.
struct Segment<'a> {
    flow: Flow,
    flags: u8,
    /// Of the first byte of the payload.
    sequence: u32,
    /// As much of it as was captured.
    payload: &'a [u8],
}

impl Streams {
    /// A node let this frame of the guest's out.
    pub fn take(&mut self, node: &str, frame: &Frame) {
        let Some(segment) = Segment::of(frame) else { return };
        self.resets += u64::from(segment.flags & RST != 0);
        for (n, &byte) in (0_u32..).zip(segment.payload) {
            let at = (segment.flow, segment.sequence.wrapping_add(n));
            match self.said.get(&at) {
                Some((known, by)) if *known != byte => {
                    let (port, to, at) = (segment.flow.0, segment.flow.1, at.1);
                    self.conflicts.0 += 1;
                    self.conflicts.1.get_or_insert_with(|| {
                        format!("from port {port} to {to} at {at}: {known:#x} by {by}, {byte:#x} by {node}")
                    });
                }
                Some(_) => {}
                None if self.said.len() >= MAX_BYTES => self.forgotten += 1,
                None => drop(self.said.insert(at, (byte, node.to_owned()))),
            }
        }
    }

    /// Bytes that are remembered.
    pub fn bytes(&self) -> usize {
        self.said.len()
    }
}

impl<'a> Segment<'a> {
    fn of(frame: &'a Frame) -> Option<Self> {
        let ip = frame.bytes.get(ETHERNET..)?;
        let (&first, &protocol) = (ip.first()?, ip.get(9)?);
        let header = usize::from(first & 0xf) * 4;
        if frame.ethertype()? != IPV4 || first >> 4 != 4 || protocol != TCP || header < IP_MIN {
            return None;
        }
        // A short frame is filled up behind the packet.
        let len = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
        let to: [u8; 4] = ip.get(16..20)?.try_into().ok()?;
        let tcp = ip.get(header..len.min(ip.len()))?;
        let number = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let offset = usize::from(tcp.get(12)? >> 4) * 4;
        let flags = *tcp.get(13)?;
        let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
        Some(Self {
            flow: (number(0)?, to.into(), number(2)?),
            flags,
            // A SYN takes a number of its own.
            sequence: sequence.wrapping_add(u32::from(flags & SYN != 0)),
            payload: tcp.get(offset.max(TCP_MIN)..)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Frame, Streams};
    use std::time::Instant;

    /// A frame of the guest's with this payload, and bytes after it that are no part of it.
    fn frame(sequence: u32, flags: u8, payload: &[u8]) -> Frame {
        let mut bytes = vec![0xff; 12];
        bytes.extend([0x08, 0x00, 0x45, 0]);
        bytes.extend((40 + payload.len() as u16).to_be_bytes());
        bytes.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 77, 0, 2, 10, 77, 0, 1]);
        bytes.extend([0x18, 0xeb, 0x9c, 0x40]);
        bytes.extend(sequence.to_be_bytes());
        bytes.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        bytes.extend([0; 6]);
        Frame { at: Instant::now(), outgoing: false, len: bytes.len(), bytes }
    }

    #[test]
    fn what_is_said_twice_must_be_the_same() {
        let mut streams = Streams::default();
        streams.take("a", &frame(u32::MAX - 1, 0x10, b"+OK\r\n"));
        streams.take("b", &frame(1, 0x10, b"\r\n:7\r\n"));
        assert_eq!((streams.conflicts.0, streams.bytes()), (0, 9));
        streams.take("b", &frame(3, 0x10, b":8\r\n"));
        assert_eq!(streams.conflicts.0, 1);
        let told = streams.conflicts.1.clone().unwrap();
        assert!(told.contains("port 6379 to 10.77.0.1 at 4: 0x37 by b, 0x38 by b"), "{told}");
    }

    #[test]
    fn a_connection_that_is_broken_off_is_seen() {
        let mut streams = Streams::default();
        streams.take("a", &frame(9, 0x12, b""));
        streams.take("a", &frame(10, 0x14, b""));
        assert_eq!((streams.resets, streams.bytes()), (1, 0));
    }

    #[test]
    fn frames_of_any_kind_are_borne() {
        let whole = frame(5, 0x10, b"hello").bytes;
        for cut in 0..whole.len() {
            for change in 0..=255 {
                let mut bytes = whole[..cut].to_vec();
                bytes.iter_mut().skip(14).step_by(7).for_each(|byte| *byte ^= change);
                Streams::default().take("a", &Frame { at: Instant::now(), outgoing: false, len: cut, bytes });
            }
        }
    }
}
