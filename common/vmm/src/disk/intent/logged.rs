//! A disk that writes nothing which its intent log does not name.

use colo_common::{BLOCK_SIZE, Block};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::log::IntentLog;
use crate::disk::{Disk, check_range};

/// The runner's image with the log before it: what its guest's device is given.
pub struct LoggedDisk {
    image: Arc<dyn Disk>,
    log: IntentLog,
    /// One sync at a time: of two at once the system tells one alone that data is lost.
    syncing: Mutex<()>,
    /// A sync has failed: nobody knows what of the image is safe.
    lost: AtomicBool,
}

impl LoggedDisk {
    /// Puts a log before an image.
    ///
    /// # Panics
    /// It is another disk's log.
    pub fn new(image: Arc<dyn Disk>, log: IntentLog) -> Self {
        assert_eq!(image.bytes(), log.disk_bytes(), "the log is of another disk");
        Self { image, log, syncing: Mutex::default(), lost: AtomicBool::new(false) }
    }

    /// Its log, to be told of cuts and acks.
    pub fn log(&self) -> &IntentLog {
        &self.log
    }

    /// A round of the cleaner: what has been acked and not been used for a while leaves the log. How many extents have.
    ///
    /// # Errors
    /// The image cannot be synced or could not be before, or the log cannot be written. The log names more than it has
    /// to, and nothing is lost.
    pub fn clean(&self) -> io::Result<u64> {
        self.clean_if(false)
    }

    /// The same, of all that has been acked: so that this image is the disk at that point.
    ///
    /// # Errors
    /// As [`clean`](Self::clean).
    pub fn clean_all(&self) -> io::Result<u64> {
        self.clean_if(true)
    }

    fn clean_if(&self, all: bool) -> io::Result<u64> {
        let cleaning = self.log.begin_cleaning(all);
        if cleaning.is_empty() {
            return self.log.advance(&cleaning).map(|()| 0);
        }
        self.sync()?;
        if self.has_lost() {
            return Err(io::Error::other("a sync of the disk's image has failed before"));
        }
        self.log.finish_cleaning(&cleaning)
    }

    /// Whether a sync has failed.
    pub(super) fn has_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let synced = self.image.flush();
        if let Err(error) = &synced
            && !self.lost.swap(true, Ordering::SeqCst)
        {
            tracing::error!(
                "the disk's image cannot be synced: {error}; from now on its intent log names all that is written"
            );
        }
        synced
    }

    fn change(&self, blocks: Range<Block>, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // For whoever is no device: a change of its own, recorded at its end.
        self.log.change_begins(&blocks);
        let changed = self.log.before_write(&blocks).and_then(|()| change());
        self.log.change_recorded(&blocks);
        changed
    }
}

impl Disk for LoggedDisk {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        check_range(self.image.bytes(), offset, bytes.len() as u64)?;
        let end = (offset + bytes.len() as u64).div_ceil(BLOCK_SIZE as u64);
        self.change(Block::containing(offset)..Block(end), || self.image.write(offset, bytes))
    }

    fn zero(&self, blocks: Range<Block>, unmap: bool) -> io::Result<()> {
        if blocks.start > blocks.end || blocks.end.0 > self.image.bytes() / BLOCK_SIZE as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the range is not within the disk"));
        }
        self.change(blocks.clone(), || self.image.zero(blocks, unmap))
    }

    fn flush(&self) -> io::Result<()> {
        self.sync()
    }

    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>> {
        self.image.next_data(from)
    }

    fn change_begins(&self, blocks: Range<Block>) {
        self.log.change_begins(&blocks);
        self.image.change_begins(blocks);
    }

    fn change_recorded(&self, blocks: Range<Block>) {
        self.log.change_recorded(&blocks);
        self.image.change_recorded(blocks);
    }
}

impl std::fmt::Debug for LoggedDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LoggedDisk({:?})", self.log)
    }
}
