//! What a frame can carry and how long each kind may be; and the tag that ties a frame to a vm.

use colo_common::VmId;
use std::fmt;
use xxhash_rust::xxh3::xxh3_64;

use super::MAX_BODY;
use crate::message::{
    MAX_CONTROL_BODY, MAX_DIGEST_BODY, MAX_DIVERGED_BODY, MAX_HISTORY_BODY, MAX_VERIFY_BODY,
};
use crate::pages::MAX_TABLE;
use crate::version::{FIRST_VERSION, PROTOCOL_VERSION};

/// A vm's name in eight bytes: a frame that strayed to another vm's process is found at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VmTag(pub u64);

impl VmTag {
    /// The tag of this vm.
    pub fn of(vm: &VmId) -> Self {
        Self(xxh3_64(vm.as_str().as_bytes()))
    }
}

impl fmt::Display for VmTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vm {:016x}", self.0)
    }
}

/// What a frame carries. Numbers are never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A copy begins.
    SeedBegin = 1,
    /// Pages: a run table and the bytes of its data runs.
    Pages = 2,
    /// An epoch begins.
    EpochBegin = 3,
    /// A part of the encoded machine state, as it is.
    State = 4,
    /// A part of the epoch's output.
    Output = 5,
    /// An epoch is complete.
    EpochEnd = 6,
    /// Blocks of the disk: a run table and the bytes of its data runs.
    Blocks = 7,
    /// What pages or blocks hold at the epoch just sent, to be compared.
    Verify = 8,
    /// The first word of whoever connects.
    Hello = 16,
    /// The answer of a secondary that takes the link.
    Welcome = 17,
    /// The answer of one that does not.
    Refused = 18,
    /// A point is safe.
    Ack = 19,
    /// How far the secondary is.
    Progress = 20,
    /// The register's term is another.
    TermChanged = 21,
    /// Asks for digests of pages.
    DigestRequest = 22,
    /// Digests of pages.
    RangeDigests = 23,
    /// The primary's guest does not run any more: take over.
    Yield = 24,
    /// The link ends on purpose.
    Goodbye = 25,
    /// Asks for digests of blocks of the disk.
    BlockDigestRequest = 26,
    /// Digests of blocks of the disk.
    BlockDigests = 27,
    /// Where a copy that came back may hold something else.
    Diverged = 28,
    /// Whether they are the same in the copy.
    Verified = 29,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 22] = [
        Self::SeedBegin,
        Self::Pages,
        Self::EpochBegin,
        Self::State,
        Self::Output,
        Self::EpochEnd,
        Self::Blocks,
        Self::Verify,
        Self::Hello,
        Self::Welcome,
        Self::Refused,
        Self::Ack,
        Self::Progress,
        Self::TermChanged,
        Self::DigestRequest,
        Self::RangeDigests,
        Self::Yield,
        Self::Goodbye,
        Self::BlockDigestRequest,
        Self::BlockDigests,
        Self::Diverged,
        Self::Verified,
    ];

    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&kind| kind as u8 == byte)
    }

    /// Whether it belongs to a transfer; all others belong to the control stream.
    pub const fn is_transfer(self) -> bool {
        (self as u8) < Self::Hello as u8
    }

    /// The version that a header of it names: what two nodes of any versions part by stays as it was in the first.
    pub const fn version(self) -> u16 {
        match self {
            Self::Hello | Self::Refused => FIRST_VERSION,
            _ => PROTOCOL_VERSION,
        }
    }

    /// Bytes of the table at most.
    pub const fn max_table(self) -> usize {
        match self {
            Self::Pages | Self::Blocks => MAX_TABLE,
            _ => 0,
        }
    }

    /// Bytes of the body at most.
    pub const fn max_body(self) -> usize {
        match self {
            Self::Pages | Self::Blocks | Self::State | Self::Output => MAX_BODY,
            Self::SeedBegin | Self::EpochBegin | Self::Welcome => MAX_HISTORY_BODY,
            Self::Diverged => MAX_DIVERGED_BODY,
            Self::Verify => MAX_VERIFY_BODY,
            Self::RangeDigests | Self::BlockDigests => MAX_DIGEST_BODY,
            _ => MAX_CONTROL_BODY,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
