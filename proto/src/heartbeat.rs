//! The heartbeat: a datagram of its own beside the streams, so that bulk data cannot starve it.
//!
//! 48 bytes, little endian: magic `COLH` (4 bytes), version (u16), lateness in milliseconds (u16), vm tag, term, sequence
//! number, time of sending in microseconds (u64 each), XXH3-64 over the 40 bytes before. Up to version 2 the lateness was
//! reserved and 0.

use colo_common::Term;
use xxhash_rust::xxh3::xxh3_64;

use crate::frame::VmTag;
use crate::version::{PROTOCOL_VERSION, Versions};

/// Bytes of an encoded heartbeat; fits any datagram.
pub const HEARTBEAT_LEN: usize = 48;

const MAGIC: [u8; 4] = *b"COLH";
const SEAL_AT: usize = HEARTBEAT_LEN - 8;

/// A sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Of which vm.
    pub vm: VmTag,
    /// The newest term that the sender knows.
    pub term: Term,
    /// Counts the sender's heartbeats on this connection: datagrams may be lost, doubled or overtaken.
    pub sequence: u64,
    /// When it was sent, in microseconds of the sender's monotonic clock. Only differences of it mean anything.
    pub sent_us: u64,
    /// How late the sender's own ticks ran lately, at worst, in milliseconds: its host is busy, and silence for such a
    /// time means nothing.
    pub late_ms: u16,
}

/// Why a datagram is not a heartbeat. One of them is dropped and counted; it does not end the link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeartbeatError {
    /// Of another length.
    #[error("a datagram has {0} bytes, a heartbeat has {HEARTBEAT_LEN}")]
    Length(usize),
    /// Not a heartbeat.
    #[error("a datagram begins with {0:02x?}, a heartbeat with {MAGIC:02x?}")]
    Magic([u8; 4]),
    /// Changed on the way.
    #[error("a heartbeat is damaged: its checksum is {found:016x}, its bytes give {expected:016x}")]
    Checksum {
        /// Checksum in it.
        found: u64,
        /// Checksum of what came.
        expected: u64,
    },
    /// Of another version.
    #[error(
        "a heartbeat has version {found}, this build speaks {}: run the same version of Colo on both nodes",
        Versions::OURS
    )]
    Version {
        /// Version in it.
        found: u16,
    },
}

impl Heartbeat {
    /// The datagram to send.
    pub fn encode(&self) -> [u8; HEARTBEAT_LEN] {
        let mut bytes = [0; HEARTBEAT_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.late_ms.to_le_bytes());
        for (at, value) in [(8, self.vm.0), (16, self.term.0), (24, self.sequence), (32, self.sent_us)] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let seal = xxh3_64(&bytes[..SEAL_AT]);
        bytes[SEAL_AT..].copy_from_slice(&seal.to_le_bytes());
        bytes
    }

    /// Reads a datagram that came from a peer.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeartbeatError> {
        let bytes: &[u8; HEARTBEAT_LEN] =
            bytes.try_into().map_err(|_| HeartbeatError::Length(bytes.len()))?;
        let magic: [u8; 4] = bytes[..4].try_into().expect("four bytes");
        if magic != MAGIC {
            return Err(HeartbeatError::Magic(magic));
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        let (found, expected) = (word(SEAL_AT), xxh3_64(&bytes[..SEAL_AT]));
        if found != expected {
            return Err(HeartbeatError::Checksum { found, expected });
        }
        if !Versions::OURS.contains(half(4)) {
            return Err(HeartbeatError::Version { found: half(4) });
        }
        let (vm, term) = (VmTag(word(8)), Term(word(16)));
        Ok(Self { vm, term, sequence: word(24), sent_us: word(32), late_ms: half(6) })
    }
}

#[cfg(test)]
mod tests {
    use super::{HEARTBEAT_LEN, Heartbeat, HeartbeatError, SEAL_AT};
    use crate::frame::VmTag;
    use colo_common::Term;
    use proptest::prelude::{any, prop_assert_eq, proptest};
    use xxhash_rust::xxh3::xxh3_64;

    fn sealed(change: impl FnOnce(&mut [u8; HEARTBEAT_LEN])) -> [u8; HEARTBEAT_LEN] {
        let mut bytes =
            Heartbeat { vm: VmTag(1), term: Term(2), sequence: 3, sent_us: 4, late_ms: 5 }.encode();
        change(&mut bytes);
        let seal = xxh3_64(&bytes[..SEAL_AT]);
        bytes[SEAL_AT..].copy_from_slice(&seal.to_le_bytes());
        bytes
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = sealed(|_| {});
        assert_eq!(Heartbeat::decode(&good[..47]), Err(HeartbeatError::Length(47)));
        assert_eq!(Heartbeat::decode(&sealed(|b| b[3] = b'F')), Err(HeartbeatError::Magic(*b"COLF")));
        for version in [1, 2] {
            let found = u16::from(version);
            assert_eq!(
                Heartbeat::decode(&sealed(|b| b[4] = version)),
                Err(HeartbeatError::Version { found })
            );
        }
        for bit in 0..HEARTBEAT_LEN * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Heartbeat::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(vm: u64, term: u64, sequence: u64, sent_us in any::<u64>(), late_ms: u16) {
            let beat = Heartbeat { vm: VmTag(vm), term: Term(term), sequence, sent_us, late_ms };
            prop_assert_eq!(Heartbeat::decode(&beat.encode()), Ok(beat));
        }
    }
}
