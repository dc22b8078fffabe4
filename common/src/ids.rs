//! The names that travel through every crate: pages, epochs, terms, points and vms, each a type of its own
//! so that two numbers can never be swapped.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Size of a guest page in bytes; dirty tracking, the wire and the store all count in it.
pub const PAGE_SIZE: usize = 4096;

/// Guest frame number: a guest-physical address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The frame that holds the guest-physical `address`, in bytes.
    pub const fn containing(address: u64) -> Self {
        Self(address / PAGE_SIZE as u64)
    }

    /// Guest-physical address, in bytes, of the frame's first byte.
    pub const fn address(self) -> u64 {
        self.0 * PAGE_SIZE as u64
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

/// Size of a block of the guest's disk in bytes: what the epochs and the store count disk writes in.
pub const BLOCK_SIZE: usize = PAGE_SIZE;

/// Number of a block of the guest's disk: an offset divided by [`BLOCK_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Block(pub u64);

impl Block {
    /// The block that holds the byte at `offset` of the disk.
    pub const fn containing(offset: u64) -> Self {
        Self(offset / BLOCK_SIZE as u64)
    }

    /// Offset of the block's first byte.
    pub const fn offset(self) -> u64 {
        self.0 * BLOCK_SIZE as u64
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {:#x}", self.0)
    }
}

/// Raised by every change of the arbiter's register; fences everything older.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Term(pub u64);

/// Counts the cuts of a vm; names a state only together with its term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// (term, epoch): what frames, acks, store keys and resume offers carry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Point {
    /// Term in which the epoch was cut.
    pub term: Term,
    /// Epoch within the vm.
    pub epoch: Epoch,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term.0, self.epoch.0)
    }
}

/// Longest name of a vm or a node, in bytes.
pub const MAX_NAME: usize = 64;

/// A name that is none: it would not fit a path, a label or a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name: use 1 to {MAX_NAME} letters, digits, '-', '_' or '.', the first a letter or a digit"
)]
pub struct BadName(pub String);

fn check_name(name: &str) -> Result<Arc<str>, BadName> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if first && rest && name.len() <= MAX_NAME { Ok(name.into()) } else { Err(BadName(name.to_owned())) }
}

/// A name of a kind of its own.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as it was given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadName;

            fn from_str(name: &str) -> Result<Self, BadName> {
                check_name(name).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadName;

            fn try_from(name: String) -> Result<Self, BadName> {
                name.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// One protected guest, by the operator's name for it.
    VmId
}
name! {
    /// One host that can run or follow a vm, by the operator's name for it.
    NodeId
}

/// A number drawn at random, so that no two are ever the same.
macro_rules! drawn {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u128);

        impl $name {
            /// A new one.
            ///
            /// # Panics
            /// The system has no random numbers to give, as before its start is over.
            pub fn draw() -> Self {
                let mut bytes = [0; 16];
                getrandom::fill(&mut bytes).expect("the system gives random numbers");
                Self(u128::from_le_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // Half of it tells them apart in a log.
                write!(f, "{:016x}", (self.0 >> 64) as u64)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

drawn! {
    /// Drawn anew when a copy became whole by seed or resync; names a copy that holds every point it acked.
    ReplicaId
}
drawn! {
    /// Names one proposal to the register, however often it is sent.
    ProposalId
}
drawn! {
    /// One process of a node, from its start to its end. A start that was cut off before its guest ran is gone on with
    /// under the same one.
    Incarnation
}

impl ProposalId {
    /// The one proposal that a process can make to replace the entry of `expected` (term 0: to create the register).
    /// It has one outstanding at a time and repeats that until it is applied or refused, when the term is over; so
    /// this is as unique as the random incarnation, and the same however often it is worked out.
    pub fn of(incarnation: Incarnation, expected: Term) -> Self {
        let mut bytes = [0; 24];
        bytes[..16].copy_from_slice(&incarnation.0.to_le_bytes());
        bytes[16..].copy_from_slice(&expected.0.to_le_bytes());
        Self(xxhash_rust::xxh3::xxh3_128(&bytes))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "term {}", self.0)
    }
}

impl Term {
    /// The term after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::{NodeId, VmId};

    #[test]
    fn names_fit_a_path_and_a_label() {
        for good in ["a", "web-1", "db.example", "0_x", &"x".repeat(64)] {
            assert_eq!(good.parse::<VmId>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "é", "a\n", &"x".repeat(65)] {
            let error = bad.parse::<NodeId>().unwrap_err().to_string();
            assert!(error.contains("is no name: use 1 to 64"), "{error}");
        }
    }
}
