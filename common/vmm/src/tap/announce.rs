//! What a node says that takes over the guest's address, so that bridges and switches learn on which port it is now,
//! and neighbours learn nothing wrong: frames as the guest would send them, and when they are sent.

use colo_common::Mac;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::HEADER;

/// Bytes of the shortest Ethernet frame, without its checksum.
const SHORTEST: usize = 60;
/// The waits between announcements after the first: switches may be slow to see a port come up, and a frame may be
/// lost. All in all 1.5 s, after which the guest has spoken itself or nobody misses it.
const WAITS_MS: [u64; 5] = [50, 100, 200, 400, 800];

/// An announcement with an empty header in front.
pub type Frame = [u8; HEADER + SHORTEST];

/// The kinds of frames, by protocol and operation.
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const RARP_REQUEST: u16 = 3;

/// Asks for one's own address, in RARP: every switch learns the port, and no neighbour's table is touched. For a guest
/// whose addresses are not known.
pub fn rarp_request(mac: Mac) -> Frame {
    let none = Ipv4Addr::UNSPECIFIED;
    frame(mac, RARP, RARP_REQUEST, none, mac.bytes(), none)
}

/// An ARP announcement as in RFC 5227: a request that asks for the address by which it is sent.
pub fn arp_request(mac: Mac, address: Ipv4Addr) -> Frame {
    frame(mac, ARP, ARP_REQUEST, address, [0; 6], address)
}

/// The same as a reply that nobody asked for, for those who update their tables by replies alone.
pub fn arp_reply(mac: Mac, address: Ipv4Addr) -> Frame {
    frame(mac, ARP, ARP_REPLY, address, mac.bytes(), address)
}

/// All of one announcement: the RARP request, and both forms of ARP for each address that is known.
pub fn announcement(mac: Mac, addresses: impl IntoIterator<Item = Ipv4Addr>) -> Vec<Frame> {
    let known =
        addresses.into_iter().flat_map(|address| [arp_request(mac, address), arp_reply(mac, address)]);
    std::iter::once(rarp_request(mac)).chain(known).collect()
}

fn frame(mac: Mac, protocol: u16, op: u16, from: Ipv4Addr, to_mac: [u8; 6], to: Ipv4Addr) -> Frame {
    let mut frame = [0; HEADER + SHORTEST];
    let mut at = HEADER;
    let mut put = |bytes: &[u8]| {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&[0xff; 6]);
    put(&mac.bytes());
    put(&protocol.to_be_bytes());
    // Ethernet and IPv4, with the lengths of their addresses.
    put(&[0, 1, 8, 0, 6, 4]);
    put(&op.to_be_bytes());
    put(&mac.bytes());
    put(&from.octets());
    put(&to_mac);
    put(&to.octets());
    frame
}

/// When announcements are due: at once, then with a growing wait. It has no clock of its own.
#[derive(Clone, Debug)]
pub struct Schedule {
    next: Option<Instant>,
    waits: std::slice::Iter<'static, u64>,
}

impl Schedule {
    /// Begins now.
    pub fn new(now: Instant) -> Self {
        Self { next: Some(now), waits: WAITS_MS.iter() }
    }

    /// When to ask again; nothing if all are done.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Whether one is to be sent now. Who comes late sends one, not all that were missed, and the waits count from
    /// there.
    pub fn due(&mut self, now: Instant) -> bool {
        let due = self.next.is_some_and(|next| next <= now);
        if due {
            self.next = self.waits.next().map(|wait| now + Duration::from_millis(*wait));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::{Schedule, announcement, arp_reply, arp_request, rarp_request};
    use std::net::Ipv4Addr;
    use std::time::{Duration, Instant};

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    fn bytes(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    #[test]
    fn frames_are_those_of_the_standards() {
        let mac = "02:00:00:12:34:56".parse().unwrap();
        let whole = |body: &str| {
            let mut frame = vec![0; 12];
            frame.extend(bytes("ffffffffffff 020000123456"));
            frame.extend(bytes(body));
            frame.resize(72, 0);
            frame
        };
        let rarp = "8035 0001 0800 06 04 0003 020000123456 00000000 020000123456 00000000";
        assert_eq!(rarp_request(mac).to_vec(), whole(rarp));
        let request = "0806 0001 0800 06 04 0001 020000123456 0a4d0002 000000000000 0a4d0002";
        assert_eq!(arp_request(mac, ADDRESS).to_vec(), whole(request));
        let reply = "0806 0001 0800 06 04 0002 020000123456 0a4d0002 020000123456 0a4d0002";
        assert_eq!(arp_reply(mac, ADDRESS).to_vec(), whole(reply));
        assert_eq!(announcement(mac, None), [rarp_request(mac)]);
        let all = announcement(mac, [ADDRESS]);
        assert_eq!(all, [rarp_request(mac), arp_request(mac, ADDRESS), arp_reply(mac, ADDRESS)]);
    }

    #[test]
    fn announcements_come_at_once_and_then_ever_later() {
        let start = Instant::now();
        let mut schedule = Schedule::new(start);
        let mut sent = Vec::new();
        while let Some(next) = schedule.next() {
            assert!(!schedule.due(next - Duration::from_nanos(1)));
            assert!(schedule.due(next) && !schedule.due(next));
            sent.push((next - start).as_millis());
        }
        assert_eq!(sent, [0, 50, 150, 350, 750, 1550]);
        assert!(!schedule.due(start + Duration::from_secs(3600)));
    }

    #[test]
    fn who_comes_late_sends_one() {
        let start = Instant::now();
        let late = start + Duration::from_secs(60);
        let mut schedule = Schedule::new(start);
        assert!(schedule.due(late) && !schedule.due(late));
        assert_eq!(schedule.next(), Some(late + Duration::from_millis(50)));
    }
}
