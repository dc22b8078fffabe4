//! The disk behind a guest's virtio-blk: what keeps its bytes ([`Disk`]), and blocks on their way to a secondary.
//!
//! Everything counts in blocks of [`BLOCK_SIZE`] bytes, also where a guest wrote less: a block is in one epoch as a
//! whole or not at all.

mod file;
pub mod intent;

pub use file::{DiskError, FileDisk};

use crate::block_set::BlockSet;
use bytes::Bytes;
use colo_common::{BLOCK_SIZE, Block};
use std::io;
use std::ops::Range;

/// Keeps the bytes of a guest's disk. Called by several threads at once; nobody has two calls under way for one block
/// of which one changes it.
pub trait Disk: Send + Sync {
    /// Its size in bytes, whole blocks.
    fn bytes(&self) -> u64;

    /// Reads from `offset` on.
    ///
    /// # Errors
    /// The medium fails, or the range is not within the disk.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes from `offset` on. Safe from a power cut after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// As [`read`](Self::read), or the medium is full.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes a range of whole blocks zero. With `unmap` their room is given back where that can be done.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn zero(&self, blocks: Range<Block>, unmap: bool) -> io::Result<()>;

    /// Makes everything safe that was written before.
    ///
    /// # Errors
    /// The medium fails; what was not safe before may be lost.
    fn flush(&self) -> io::Result<()>;

    /// The first run of blocks from `from` on that may hold something; all others are zero. Nothing if there is none.
    ///
    /// # Errors
    /// The medium fails.
    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>>;

    /// A device begins a request that changes these blocks, in any number of calls and from any thread. Never
    /// waits.
    fn change_begins(&self, _blocks: Range<Block>) {}

    /// What that request did is in the open epoch now, or it did nothing: once for each that began, with the same blocks.
    /// Its bytes may have been on the disk since epochs before. Never waits.
    fn change_recorded(&self, _blocks: Range<Block>) {}
}

/// Whether a range is within a disk of `size` bytes.
///
/// # Errors
/// It is not.
pub fn check_range(size: u64, offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "the range is not within the disk")),
    }
}

/// Whole blocks that a guest has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskWrite {
    /// The first of them.
    pub first: Block,
    /// What they hold now.
    pub content: DiskContent,
}

/// What blocks hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskContent {
    /// These bytes, whole blocks.
    Bytes(Bytes),
    /// Zeroes, in so many blocks.
    Zeroes(u64),
}

impl DiskWrite {
    /// The blocks.
    pub fn blocks(&self) -> Range<Block> {
        let count = match &self.content {
            DiskContent::Bytes(bytes) => (bytes.len() / BLOCK_SIZE) as u64,
            DiskContent::Zeroes(count) => *count,
        };
        self.first..Block(self.first.0 + count)
    }
}

/// What a guest wrote to its disk between two cuts: whole blocks with their bytes, or only which ones.
#[derive(Clone, Debug)]
pub struct DiskDelta {
    /// In the order in which the writes ended; where a block comes twice, the later one counts.
    pub writes: Vec<DiskWrite>,
    /// Blocks that hold something else too; the disk knows what.
    pub blocks: BlockSet,
}

impl DiskDelta {
    /// Of a guest that wrote nothing, or has no disk.
    pub fn none() -> Self {
        Self { writes: Vec::new(), blocks: BlockSet::new(0) }
    }
}
