//! [`MachineState`]: everything of a guest but its memory, and its encoding.
//!
//! Encoded form, little endian: magic (8 bytes), version (u32), body length (u32), XXH3-64 over the 16 bytes
//! before it and the body (u64), body (postcard). Decoding checks, in this order, length, magic, version, declared
//! length against [`MAX_MACHINE_STATE`], checksum, and then every count inside against its limit.
//!
//! Versions: 1, the first; 2, with virtio devices, and a disk of the guest in software.

use colo_common::limits::MAX_MACHINE_STATE;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::arch::x86_64::processor::GuestCpu;
use crate::egress::OutputPosition;
use crate::guest::Lifecycle;
use crate::machine::KvmState;
use crate::synthetic::SyntheticState;

/// Version that this build writes and reads.
pub const STATE_VERSION: u32 = 2;

const MAGIC: [u8; 8] = *b"COLOSTAT";
const HEADER: usize = 24;
/// Far beyond what a guest can say in its life, and far from where counting overflows.
const MAX_POSITION: u64 = 1 << 62;

/// Why saved bytes are not a state that can be taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Fewer bytes than the header, or than it announces.
    #[error("the machine state is cut short: {found} bytes of {expected}; fetch it again")]
    Truncated {
        /// Bytes there.
        found: usize,
        /// Bytes announced.
        expected: usize,
    },
    /// More bytes than the header announces.
    #[error("{0} bytes follow the machine state; it was not stored or sent by Colo as it is")]
    Trailing(usize),
    /// Not a machine state at all.
    #[error("these bytes are not a Colo machine state; were they stored by something else?")]
    Magic,
    /// Written by another version.
    #[error(
        "the machine state has version {found}, this build reads version {STATE_VERSION}: run the same version on both nodes"
    )]
    Version {
        /// Version in the header.
        found: u32,
    },
    /// Longer than any state can be.
    #[error("the machine state announces {0} bytes, more than {MAX_MACHINE_STATE}")]
    TooLarge(usize),
    /// Bytes changed since it was written.
    #[error("the machine state's checksum does not match: it was damaged on the way or in the store")]
    Checksum,
    /// The checksum matches but the content makes no sense.
    #[error("the machine state is malformed: {0}")]
    Malformed(String),
    /// Of another guest, or of the same under another spec.
    #[error(
        "the machine state belongs to a guest with another spec ({found:016x}, this one has {expected:016x}): memory, vCPUs, CPU model and boot images must be the same"
    )]
    OtherSpec {
        /// Digest in the state.
        found: u64,
        /// Digest of the guest it was offered to.
        expected: u64,
    },
    /// A synthetic guest's state offered to a KVM guest or the reverse.
    #[error("the machine state is of a {found} guest, this one is {expected}")]
    OtherKind {
        /// Kind in the state.
        found: &'static str,
        /// Kind of the guest it was offered to.
        expected: &'static str,
    },
    /// Of a guest with another processor than was agreed on.
    #[error(
        "the machine state has another processor than the nodes agreed on; start the node that runs the guest again, with the same version of Colo on both"
    )]
    OtherCpu,
    /// KVM did not take a part of it.
    #[error("KVM does not take the saved {part}: {reason}")]
    Refused {
        /// Which part.
        part: String,
        /// What KVM said.
        reason: String,
    },
}

/// A guest's machine at one instant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Digest of the spec it belongs to.
    pub spec: u64,
    /// Output made up to this instant.
    pub output: OutputPosition,
    /// Console input taken up to this instant, in bytes.
    pub console_input: u64,
    /// What the guest asked for, not yet in effect.
    pub pending: Option<Lifecycle>,
    /// The machine itself.
    pub body: Body,
}

/// The machine, by kind of guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Body {
    /// A KVM guest.
    Kvm(Box<KvmState>),
    /// A synthetic guest.
    Synthetic(Box<SyntheticState>),
}

impl MachineState {
    /// The bytes to send and store.
    ///
    /// # Panics
    /// The state is larger than [`MAX_MACHINE_STATE`], which the limits on its parts rule out.
    pub fn encode(&self) -> Vec<u8> {
        let bytes = postcard::to_extend(self, vec![0; HEADER]).expect("a state has only plain data in it");
        seal(bytes)
    }

    /// Reads encoded bytes, which may come from a peer or a disk.
    ///
    /// # Errors
    /// The first thing that is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let truncated = |expected| StateError::Truncated { found: bytes.len(), expected };
        let (header, body) = bytes.split_at_checked(HEADER).ok_or(truncated(HEADER))?;
        if header[..8] != MAGIC {
            return Err(StateError::Magic);
        }
        let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        if field(8) != STATE_VERSION {
            return Err(StateError::Version { found: field(8) });
        }
        let len = field(12) as usize;
        if len > MAX_MACHINE_STATE {
            return Err(StateError::TooLarge(len));
        }
        if body.len() < len {
            return Err(truncated(HEADER + len));
        }
        if body.len() > len {
            return Err(StateError::Trailing(body.len() - len));
        }
        if header[16..HEADER] != checksum(bytes).to_le_bytes() {
            return Err(StateError::Checksum);
        }
        let malformed = |e: postcard::Error| StateError::Malformed(e.to_string());
        let (state, rest) = postcard::take_from_bytes::<Self>(body).map_err(malformed)?;
        if !rest.is_empty() {
            return Err(StateError::Malformed(format!("{} bytes left over", rest.len())));
        }
        // Structures of KVM are taken at any length and filled up; only what this encodes to is taken.
        if state.encode()[HEADER..] != *body {
            return Err(StateError::Malformed("it is not what any Colo writes".to_owned()));
        }
        let positions = [state.output.console, state.output.frames, state.console_input];
        if let Some(position) = positions.into_iter().find(|&position| position > MAX_POSITION) {
            return Err(StateError::Malformed(format!("a console or frame position of {position}")));
        }
        match &state.body {
            Body::Kvm(kvm) => kvm.check_limits(state.console_input)?,
            Body::Synthetic(synthetic) => synthetic.check_limits()?,
        }
        Ok(state)
    }

    /// Refuses a state that belongs to another spec.
    ///
    /// # Errors
    /// The digests differ.
    pub fn check_spec(&self, expected: u64) -> Result<(), StateError> {
        let found = self.spec;
        if found == expected { Ok(()) } else { Err(StateError::OtherSpec { found, expected }) }
    }

    /// Refuses a state whose guest has not the processor that was agreed on; none is a guest in software.
    ///
    /// # Errors
    /// It has another, or is of the other kind.
    pub fn check_cpu(&self, agreed: Option<&GuestCpu>) -> Result<(), StateError> {
        let (kvm, synthetic) = ("kvm", "synthetic");
        match (&self.body, agreed) {
            (Body::Synthetic(_), None) => Ok(()),
            (Body::Synthetic(_), Some(_)) => Err(StateError::OtherKind { found: synthetic, expected: kvm }),
            (Body::Kvm(_), None) => Err(StateError::OtherKind { found: kvm, expected: synthetic }),
            (Body::Kvm(kvm), Some(agreed)) if kvm.cpu()? == *agreed => Ok(()),
            (Body::Kvm(_), Some(_)) => Err(StateError::OtherCpu),
        }
    }
}

/// Fills in the header before a body.
fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len() - HEADER;
    assert!(body <= MAX_MACHINE_STATE, "a machine state of {body} bytes");
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&STATE_VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(body as u32).to_le_bytes());
    let sum = checksum(&bytes);
    bytes[16..HEADER].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&bytes[..16]);
    hasher.update(&bytes[HEADER..]);
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::{HEADER, MAX_MACHINE_STATE, MachineState, STATE_VERSION, StateError, seal};
    use crate::DirtySet;
    use crate::arch::x86_64::cpuid::{CpuidTable, ENTRY_BYTES};
    use crate::arch::x86_64::processor::GuestCpu;
    use crate::guest::ProtectedGuest;
    use crate::spec::{BootFile, BootSource, GuestSpec};
    use crate::synthetic::{SyntheticConfig, SyntheticGuest};
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    fn saved() -> Vec<u8> {
        let image = BootFile { path: "none".into(), bytes: Vec::new().into() };
        let spec = GuestSpec::new("test", 4 << 20, BootSource::Flat { image, address: 1 << 20 });
        let mut guest = SyntheticGuest::new(spec, SyntheticConfig::default()).unwrap();
        guest.boot().unwrap();
        guest.resume().unwrap();
        guest.advance(100);
        let mut dirty = DirtySet::new(guest.memory().layout().frame_limit());
        guest.cut(&mut dirty).unwrap().state.encode()
    }

    fn sealed(body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(body);
        seal(bytes)
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let bytes = saved();
        assert_eq!(MachineState::decode(&bytes).unwrap().encode(), bytes);
    }

    #[test]
    fn a_guest_in_software_has_no_processor() {
        let state = MachineState::decode(&saved()).unwrap();
        state.check_cpu(None).unwrap();
        let cpuid = CpuidTable::decode(&[0; ENTRY_BYTES]).unwrap();
        let error = state.check_cpu(Some(&GuestCpu { cpuid, tsc_khz: 1, tsc_moves: false })).unwrap_err();
        assert_eq!(error, StateError::OtherKind { found: "synthetic", expected: "kvm" });
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = saved();
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(MachineState::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_truncation_says_how_much_is_missing() {
        let good = saved();
        for len in 0..good.len() {
            let error = MachineState::decode(&good[..len]).unwrap_err();
            assert!(matches!(error, StateError::Truncated { found, .. } if found == len), "{len}: {error}");
        }
        let mut long = good.clone();
        long.push(0);
        assert_eq!(MachineState::decode(&long).unwrap_err(), StateError::Trailing(1));
    }

    #[test]
    fn another_version_is_named_before_anything_else_is_believed() {
        let mut bytes = saved();
        bytes[8..12].copy_from_slice(&(STATE_VERSION + 1).to_le_bytes());
        let error = MachineState::decode(&bytes).unwrap_err();
        assert_eq!(error, StateError::Version { found: STATE_VERSION + 1 });
        bytes = saved();
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(MachineState::decode(&bytes).unwrap_err(), StateError::TooLarge(u32::MAX as usize));
        assert!(u32::MAX as usize > MAX_MACHINE_STATE);
    }

    #[test]
    fn lists_end_at_their_limit_whatever_they_announce() {
        // Five fields, a KVM body, and a table of a million CPUID entries of no bytes each, with a right checksum.
        let mut body = vec![0; 6];
        body.extend([0xc0, 0x84, 0x3d]);
        body.resize(body.len() + 1_000_000, 0);
        let error = MachineState::decode(&sealed(&body)).unwrap_err();
        assert!(matches!(error, StateError::Malformed(_)), "{error}");
    }

    proptest! {
        #[test]
        fn no_body_with_a_right_checksum_panics(body in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(state) = MachineState::decode(&sealed(&body)) {
                prop_assert_eq!(&state.encode()[HEADER..], body.as_slice());
            }
        }

        #[test]
        fn a_changed_body_with_a_right_checksum_is_refused_or_taken_as_it_is(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut body = saved()[HEADER..].to_vec();
            for (at, value) in changes {
                let at = at.index(body.len());
                body[at] = value;
            }
            if let Ok(state) = MachineState::decode(&sealed(&body)) {
                prop_assert!(state.encode()[HEADER..] == body);
            }
        }
    }
}
