//! The names that travel through every crate: pages, epochs, terms, points and vms, each a type of its own
//! so that two numbers can never be swapped.

use serde::{Deserialize, Serialize};
use std::fmt;

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
