//! Why bytes are not a frame: what was found, what was expected, what to do.

use super::{Kind, MAGIC, VmTag};
use crate::version::PROTOCOL_VERSION;

/// Why bytes are not a frame that can be taken. The link that it came by is not to be trusted any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not a frame.
    #[error("a frame begins with {found:02x?}, not with {MAGIC:02x?}: is the peer a Colo node?")]
    Magic {
        /// The first bytes.
        found: [u8; 4],
    },
    /// The header changed on the way.
    #[error(
        "a frame's header is damaged: its checksum is {found:016x}, its bytes give {expected:016x}; connect again"
    )]
    HeaderChecksum {
        /// Checksum in the header.
        found: u64,
        /// Checksum of what came.
        expected: u64,
    },
    /// Of another version.
    #[error(
        "a frame has version {found}, this build speaks version {expected}: run the same version of Colo on both nodes"
    )]
    Version {
        /// Version in the header.
        found: u16,
        /// The version of frames of its kind.
        expected: u16,
    },
    /// Something that has no meaning yet.
    #[error(
        "a frame has flags {flags:#04x} and {reserved:#x} in the reserved field, and version {PROTOCOL_VERSION} has 0 in both"
    )]
    Reserved {
        /// The flags.
        flags: u8,
        /// The reserved field.
        reserved: u32,
    },
    /// No such kind.
    #[error("a frame has kind {found}, which version {PROTOCOL_VERSION} does not have")]
    Kind {
        /// The kind's number.
        found: u8,
    },
    /// Longer than any such frame.
    #[error("a frame of kind {kind} announces a {part} of {found} bytes, more than {limit}")]
    TooLong {
        /// Its kind.
        kind: Kind,
        /// Table or body.
        part: &'static str,
        /// Bytes announced.
        found: u32,
        /// Bytes allowed.
        limit: usize,
    },
    /// Of another vm.
    #[error("a frame of {found} came to the process of {expected}: check which address belongs to which vm")]
    OtherVm {
        /// Tag in the header.
        found: VmTag,
        /// Tag of this vm.
        expected: VmTag,
    },
    /// Table and body are not as long as announced.
    #[error("frame {index} ({kind}) announces {announced:?} bytes of table and body, and {found:?} came")]
    Lengths {
        /// Its kind.
        kind: Kind,
        /// Its index.
        index: u32,
        /// What the header says: table, body.
        announced: (u32, u32),
        /// What came.
        found: (usize, usize),
    },
    /// Table or body changed on the way.
    #[error(
        "frame {index} ({kind}) is damaged: its header says checksum {expected:016x}, its bytes give {found:016x}; connect again"
    )]
    BodyChecksum {
        /// Its kind.
        kind: Kind,
        /// Its index.
        index: u32,
        /// Checksum of what came.
        found: u64,
        /// Checksum in the header.
        expected: u64,
    },
}
