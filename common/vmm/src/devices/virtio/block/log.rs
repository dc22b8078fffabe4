//! What the guest wrote to its disk since the last cut: the disk's counterpart of the dirty set.

use colo_common::Block;
use std::ops::Range;
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
    Bytes {
        /// Bytes from which on the guest has to wait for the cut before it writes more.
        most: usize,
    },
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
            DiskTracking::Bytes { .. } => {}
        }
    }

    pub(crate) fn record(&self, write: DiskWrite) {
        let mut open = self.open();
        match open.tracking {
            DiskTracking::Off => {}
            DiskTracking::Blocks => open.insert(&write),
            DiskTracking::Bytes { .. } => {
                open.weight += weight(&write);
                open.writes.push(write);
            }
        }
    }

    /// Nobody knows what these blocks hold now: the disk will be asked. What was kept of them is no longer the newest.
    pub(super) fn record_unknown(&self, unknown: Range<Block>) {
        let mut open = self.open();
        if unknown.is_empty() || open.tracking == DiskTracking::Off {
            return;
        }
        let overlaps = |write: &DiskWrite| {
            let blocks = write.blocks();
            blocks.start < unknown.end && unknown.start < blocks.end
        };
        let (old, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut open.writes).into_iter().partition(overlaps);
        old.iter().for_each(|write| open.insert(write));
        open.writes = kept;
        open.blocks.insert_range(unknown.start, unknown.end.0 - unknown.start.0);
    }

    /// Takes what was kept since the last time.
    pub(crate) fn take(&self) -> (Vec<DiskWrite>, BlockSet) {
        let mut open = self.open();
        open.weight = 0;
        let fresh = BlockSet::new(open.blocks.blocks());
        (std::mem::take(&mut open.writes), std::mem::replace(&mut open.blocks, fresh))
    }

    /// Takes the blocks that are kept without their bytes, unless writes are kept beside them: which of the two is newer
    /// shows only in both together. Tells what the writes weigh.
    pub(crate) fn collect(&self) -> (BlockSet, usize) {
        let mut open = self.open();
        let fresh = BlockSet::new(open.blocks.blocks());
        let blocks = if open.writes.is_empty() { std::mem::replace(&mut open.blocks, fresh) } else { fresh };
        (blocks, open.weight)
    }

    /// Whether the guest has to wait for the cut before it writes more.
    pub(super) fn is_full(&self) -> bool {
        let open = self.open();
        matches!(open.tracking, DiskTracking::Bytes { most } if open.weight >= most)
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // Nothing in here panics half-way.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a write counts for, in bytes.
fn weight(write: &DiskWrite) -> usize {
    match &write.content {
        DiskContent::Bytes(bytes) => bytes.len(),
        DiskContent::Zeroes(blocks) => zero_weight(*blocks),
    }
}

/// What so many blocks of zeroes count for, in bytes.
pub(super) fn zero_weight(blocks: u64) -> usize {
    usize::try_from(blocks).unwrap_or(usize::MAX).saturating_mul(ZERO_WEIGHT)
}
