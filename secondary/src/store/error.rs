//! Why the store cannot do what it is asked. Every message names the directory and what an operator can do.

use colo_common::limits::MAX_MACHINE_STATE;
use colo_common::{Block, Gfn, Point, VmId};
use colo_vmm::disk::DiskError;
use std::io;
use std::path::PathBuf;

use super::format::FORMAT_VERSION;

/// Why the store refuses or fails.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("the store in {} is in use by another process: stop that one, or give this one another directory", dir.display())]
    Locked {
        /// Where the store is.
        dir: PathBuf,
    },
    /// Written by another version of the format.
    #[error(
        "the store in {} has format version {found}, this build reads version {FORMAT_VERSION}: run the version that wrote it, or move the directory away to have this node seeded anew",
        dir.display()
    )]
    OtherVersion {
        /// Where the store is.
        dir: PathBuf,
        /// The version found.
        found: u32,
    },
    /// It is of another vm.
    #[error("the store in {} is of vm {found}, not of {wanted}: give each vm a directory of its own", dir.display())]
    OtherVm {
        /// Where the store is.
        dir: PathBuf,
        /// The vm that it is of.
        found: VmId,
        /// The vm that was asked for.
        wanted: VmId,
    },
    /// There are files that no store has, and no store.
    #[error("{} is not empty and holds no store of Colo: give the store a directory of its own", dir.display())]
    NotAStore {
        /// The directory.
        dir: PathBuf,
    },
    /// What it holds makes no sense.
    #[error("the store in {} is damaged ({what}): move the directory away to have this node seeded anew", dir.display())]
    Damaged {
        /// Where the store is.
        dir: PathBuf,
        /// What does not hold.
        what: String,
    },
    /// One page is not what was written.
    #[error("the store in {} is damaged: {gfn} is not what was written; have this node resynced, and check its disk", dir.display())]
    DamagedPage {
        /// Where the store is.
        dir: PathBuf,
        /// The page.
        gfn: Gfn,
    },
    /// One block of the disk is not what was written.
    #[error("the store in {} is damaged: {block} of the guest's disk is not what was written; have this node resynced, and check its disk", dir.display())]
    DamagedBlock {
        /// Where the store is.
        dir: PathBuf,
        /// The block.
        block: Block,
    },
    /// The image file behind the guest's disk cannot be used.
    #[error(transparent)]
    Image(#[from] DiskError),
    /// The image file behind the guest's disk fails.
    #[error(
        "the image file behind the store in {} fails: {source}; check its device and the space on it, then start again",
        dir.display()
    )]
    Disk {
        /// Where the store is.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Blocks came and there is no disk, or they are beyond its end.
    #[error("the store in {} has no place for {block}: the guest's disk has {blocks} blocks", dir.display())]
    NoSuchBlock {
        /// Where the store is.
        dir: PathBuf,
        /// The first that there is no place for.
        block: Block,
        /// Blocks of the disk; 0 without one.
        blocks: u64,
    },
    /// What it holds is of another disk.
    #[error(
        "the store in {} holds a copy with a disk of {held} bytes, and the guest's disk has {offered}: move the directory away to have this node seeded anew",
        dir.display()
    )]
    OtherDisk {
        /// Where the store is.
        dir: PathBuf,
        /// Bytes of its disk; 0 without one.
        held: u64,
        /// Bytes of the disk that was offered.
        offered: u64,
    },
    /// Pages are whole each, but not the image of the point.
    #[error(
        "the store in {} is damaged: its {found} pages are not the {expected} of point {point}; have this node resynced, and check its disk",
        dir.display()
    )]
    DamagedImage {
        /// Where the store is.
        dir: PathBuf,
        /// The point that the store is said to hold.
        point: Point,
        /// Pages that the point has.
        expected: u64,
        /// Pages found.
        found: u64,
    },
    /// The disk is full.
    #[error(
        "no space left on the device of the store in {}: free some or give the store a larger one, then start again; what was acked is safe",
        dir.display()
    )]
    NoSpace {
        /// Where the store is.
        dir: PathBuf,
    },
    /// The system refuses something.
    #[error("the store in {} cannot {what}: {source}", dir.display())]
    Io {
        /// Where the store is.
        dir: PathBuf,
        /// What was to be done.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// RocksDB refuses something.
    #[error("the store in {} fails: {reason}; check the device and the permissions of the directory", dir.display())]
    Engine {
        /// Where the store is.
        dir: PathBuf,
        /// What RocksDB said.
        reason: String,
    },
    /// A write failed before, so what is in memory is no longer known to be what is on disk.
    #[error("the store in {} had a failed write: open it again", dir.display())]
    Broken {
        /// Where the store is.
        dir: PathBuf,
    },
    /// Asked for what the copy's state does not allow.
    #[error("the store in {} cannot {wanted}: its copy is {copy}", dir.display())]
    OutOfPlace {
        /// Where the store is.
        dir: PathBuf,
        /// What was asked for.
        wanted: &'static str,
        /// What there is.
        copy: String,
    },
    /// A mark that does not go on.
    #[error("the store in {} is at point {at} and cannot go on to {offered}", dir.display())]
    NotLater {
        /// Where the store is.
        dir: PathBuf,
        /// Where it is.
        at: Point,
        /// What was offered.
        offered: Point,
    },
    /// A machine state of a size that none has.
    #[error("{bytes} bytes are more than the store takes: {MAX_MACHINE_STATE} of machine state")]
    TooLarge {
        /// The size.
        bytes: usize,
    },
}
