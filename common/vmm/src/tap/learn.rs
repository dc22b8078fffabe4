//! Which IPv4 addresses a guest has, learned from what it sends.

use colo_common::Mac;
use std::net::Ipv4Addr;

use super::HEADER;

/// Addresses that are remembered: a guest with more is announced by its newest, and by its card's address anyway.
pub const MAX_ADDRESSES: usize = 4;

/// Is shown the frames that a guest sends, whatever is in them.
#[derive(Clone, Debug)]
pub struct Learner {
    mac: Mac,
    /// Newest first, those that the guest says are its own (ARP) before those that it only sends from: a guest that
    /// forwards for others must not be announced by their addresses while its own are known.
    known: Vec<Known>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    address: Ipv4Addr,
    by_arp: bool,
}

impl Learner {
    /// Knows nothing of the guest with this card yet.
    pub fn new(mac: Mac) -> Self {
        Self { mac, known: Vec::with_capacity(MAX_ADDRESSES + 1) }
    }

    /// The addresses, newest first.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.known.iter().map(|known| known.address)
    }

    /// Looks at a frame that the guest sends, with its header. Other cards' frames and those of VLANs, where an
    /// announcement without the tag would be wrong, teach nothing.
    pub fn observe(&mut self, frame: &[u8]) {
        if let Some(learned) = source(self.mac, frame) {
            self.learn(learned);
        }
    }

    /// Remembers an address that was learned elsewhere: by the node that ran the guest before.
    pub fn learn_address(&mut self, address: Ipv4Addr) {
        if is_somebody_s(address) {
            self.learn(Known { address, by_arp: true });
        }
    }

    fn learn(&mut self, learned: Known) {
        let before = self.known.iter().position(|known| known.address == learned.address);
        let before = before.map(|at| self.known.remove(at));
        let by_arp = learned.by_arp || before.is_some_and(|known| known.by_arp);
        let at = if by_arp { 0 } else { self.known.iter().take_while(|known| known.by_arp).count() };
        self.known.insert(at, Known { by_arp, ..learned });
        self.known.truncate(MAX_ADDRESSES);
    }
}

/// By which address of its own the card sends this.
fn source(mac: Mac, frame: &[u8]) -> Option<Known> {
    let frame = frame.get(HEADER..)?;
    let (head, body) = frame.split_at_checked(14)?;
    if head[6..12] != mac.bytes() {
        return None;
    }
    let (address, by_arp) = match [head[12], head[13]] {
        [0x08, 0x06] => (arp_sender(mac, body)?, true),
        [0x08, 0x00] => (ipv4_source(body)?, false),
        _ => return None,
    };
    is_somebody_s(address).then_some(Known { address, by_arp })
}

/// Only of ARP for IPv4 over Ethernet. A probe for an address that is not taken yet has no sender.
fn arp_sender(mac: Mac, body: &[u8]) -> Option<Ipv4Addr> {
    let own = body.get(..6)? == [0, 1, 8, 0, 6, 4] && *body.get(8..14)? == mac.bytes();
    if own { address(body.get(14..18)?) } else { None }
}

fn ipv4_source(body: &[u8]) -> Option<Ipv4Addr> {
    let whole = body.len() >= 20 && body[0] >> 4 == 4 && body[0] & 0xf >= 5;
    if whole { address(&body[12..16]) } else { None }
}

fn address(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}

/// Whether one host can have this address on a network.
fn is_somebody_s(address: Ipv4Addr) -> bool {
    let [first, ..] = address.octets();
    // 0/8 is "this network", 127/8 the host itself, and from 224/4 on are groups, the reserved and the broadcast.
    (1..224).contains(&first) && first != 127
}

#[cfg(test)]
mod tests {
    use super::super::announce::{arp_reply, arp_request, rarp_request};
    use super::{Learner, MAX_ADDRESSES};
    use colo_common::Mac;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn mac() -> Mac {
        "02:00:00:12:34:56".parse().unwrap()
    }

    fn own(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, last)
    }

    fn ipv4(mac: Mac, source: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([[0xff; 6], mac.bytes()].concat());
        frame.extend([8, 0, 0x45]);
        frame.extend([0; 11]);
        frame.extend(source.octets());
        frame.extend([10, 77, 0, 1]);
        frame
    }

    fn known(learner: &Learner) -> Vec<Ipv4Addr> {
        learner.addresses().collect()
    }

    #[test]
    fn addresses_are_learned_from_arp_and_ipv4() {
        let mut learner = Learner::new(mac());
        learner.observe(&rarp_request(mac()));
        assert!(known(&learner).is_empty());
        learner.observe(&ipv4(mac(), own(2)));
        learner.observe(&ipv4(mac(), own(3)));
        assert_eq!(known(&learner), [own(3), own(2)]);
        learner.observe(&arp_request(mac(), own(2)));
        learner.observe(&arp_reply(mac(), own(4)));
        assert_eq!(known(&learner), [own(4), own(2), own(3)]);
        learner.observe(&ipv4(mac(), own(2)));
        assert_eq!(known(&learner), [own(2), own(4), own(3)], "newest first, and once each");
        learner.learn_address(own(9));
        learner.learn_address(Ipv4Addr::BROADCAST);
        assert_eq!(known(&learner), [own(9), own(2), own(4), own(3)]);
    }

    #[test]
    fn what_is_not_the_guest_s_is_not_learned() {
        let mut learner = Learner::new(mac());
        let other = "02:00:00:12:34:57".parse().unwrap();
        learner.observe(&ipv4(other, own(2)));
        learner.observe(&arp_request(other, own(2)));
        for nobody in ["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1"] {
            learner.observe(&ipv4(mac(), nobody.parse().unwrap()));
            learner.observe(&arp_request(mac(), nobody.parse().unwrap()));
        }
        // An ARP frame from this card about another card.
        let mut forged = arp_request(mac(), own(2));
        forged[12 + 14 + 8] ^= 4;
        learner.observe(&forged);
        // The same bytes in a VLAN, of IPv6, and cut short.
        let tagged = [&ipv4(mac(), own(2))[..24], &[0x81, 0, 0, 5], &ipv4(mac(), own(2))[24..]].concat();
        learner.observe(&tagged);
        let whole = ipv4(mac(), own(2));
        (0..whole.len() - 4).for_each(|len| learner.observe(&whole[..len]));
        assert!(known(&learner).is_empty());
    }

    #[test]
    fn a_guest_that_forwards_is_announced_by_its_own_addresses() {
        let mut learner = Learner::new(mac());
        (1..=3).for_each(|last| learner.observe(&arp_request(mac(), own(last))));
        (0..100).for_each(|n| learner.observe(&ipv4(mac(), Ipv4Addr::new(192, 0, 2, n))));
        assert_eq!(known(&learner), [own(3), own(2), own(1), Ipv4Addr::new(192, 0, 2, 99)]);
    }

    proptest! {
        #[test]
        fn frames_of_any_bytes_are_borne(frames in proptest::collection::vec(any_frame(), 0..64)) {
            let mut learner = Learner::new(mac());
            for frame in &frames {
                learner.observe(frame);
                let known = known(&learner);
                prop_assert!(known.len() <= MAX_ADDRESSES);
                prop_assert!(known.iter().all(|a| !a.is_unspecified() && !a.is_multicast() && !a.is_broadcast()));
                let different: std::collections::BTreeSet<_> = known.iter().collect();
                prop_assert_eq!(different.len(), known.len());
            }
        }
    }

    /// Bytes of any kind, and such as begin like the guest's frames.
    fn any_frame() -> impl Strategy<Value = Vec<u8>> {
        let tail = proptest::collection::vec(any::<u8>(), 0..64);
        let kind = prop_oneof![Just([8, 0]), Just([8, 6]), any::<[u8; 2]>()];
        let start = prop_oneof![Just(vec![]), Just(vec![0x45]), Just(vec![0, 1, 8, 0, 6, 4])];
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..96),
            (kind, start, tail).prop_map(|(kind, start, tail)| {
                [&[0; 18], &mac().bytes()[..], &kind, &start, &tail].concat()
            }),
        ]
    }
}
