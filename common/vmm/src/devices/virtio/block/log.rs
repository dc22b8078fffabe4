//! What the guest wrote to its disk since the last cut: the disk's counterpart of the dirty set.

use colo_common::limits::MAX_EPOCH_DISK;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block_set::BlockSet;
use crate::disk::{DiskContent, DiskWrite};

/// What a block of zeroes weighs: about what it costs the other node to remember.
const ZERO_WEIGHT: usize = 32;

/// How the writes to a disk are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskTracking {
    /// Not at all.
    #[default]
    Off,
    /// Which blocks: their content is read when they are sent.
    Blocks,
    /// With their bytes, for the epoch.
    Bytes,
}

struct Open {
    tracking: DiskTracking,
    writes: Vec<DiskWrite>,
    weight: usize,
    blocks: BlockSet,
}

impl Open {
    fn insert(&mut self, write: &DiskWrite) {
        let blocks = write.blocks();
        self.blocks.insert_range(blocks.start, blocks.end.0 - blocks.start.0);
    }
}

/// The open epoch's disk writes.
pub(crate) struct DiskLog {
    open: Mutex<Open>,
}

impl DiskLog {
    /// For a disk of so many blocks.
    pub(crate) fn new(blocks: u64) -> Self {
        let (tracking, writes, weight) = (DiskTracking::Off, Vec::new(), 0);
        Self { open: Mutex::new(Open { tracking, writes, weight, blocks: BlockSet::new(blocks) }) }
    }

    /// Changes how writes are kept. What is kept already stays, as far as the new way can say it: going from bytes to
    /// blocks loses nothing, and turning it off forgets everything.
    pub(crate) fn track(&self, tracking: DiskTracking) {
        let mut open = self.open();
        open.tracking = tracking;
        match tracking {
            DiskTracking::Off => {
                open.writes.clear();
                open.blocks.clear();
                open.weight = 0;
            }
            DiskTracking::Blocks => {
                let writes = std::mem::take(&mut open.writes);
                writes.iter().for_each(|write| open.insert(write));
                open.weight = 0;
            }
            DiskTracking::Bytes => {}
        }
    }

    pub(crate) fn record(&self, write: DiskWrite) {
        let mut open = self.open();
        match open.tracking {
            DiskTracking::Off => {}
            DiskTracking::Blocks => open.insert(&write),
            DiskTracking::Bytes => {
                open.weight += weight(&write);
                open.writes.push(write);
            }
        }
    }

    /// Takes what was kept since the last time.
    pub(crate) fn take(&self) -> (Vec<DiskWrite>, BlockSet) {
        let mut open = self.open();
        open.weight = 0;
        let fresh = BlockSet::new(open.blocks.blocks());
        (std::mem::take(&mut open.writes), std::mem::replace(&mut open.blocks, fresh))
    }

    /// Adds the blocks that are kept without their bytes to `blocks`, and forgets them.
    pub(crate) fn collect(&self, blocks: &mut BlockSet) {
        let mut open = self.open();
        blocks.union_with(&open.blocks);
        open.blocks.clear();
    }

    /// Whether the guest has to wait for the cut before it writes more.
    pub(super) fn is_full(&self) -> bool {
        self.weight() >= MAX_EPOCH_DISK
    }

    pub(super) fn weight(&self) -> usize {
        self.open().weight
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // Nothing in here panics half-way.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a write counts for against [`MAX_EPOCH_DISK`], in bytes.
fn weight(write: &DiskWrite) -> usize {
    match &write.content {
        DiskContent::Bytes(bytes) => bytes.len(),
        DiskContent::Zeroes(blocks) => {
            usize::try_from(*blocks).unwrap_or(usize::MAX).saturating_mul(ZERO_WEIGHT)
        }
    }
}
