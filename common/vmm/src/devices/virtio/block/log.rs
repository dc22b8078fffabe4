//! What the guest wrote to its disk since the last cut: the disk's counterpart of the dirty set.

use bytes::Bytes;
use colo_common::Block;
use colo_common::limits::MAX_EPOCH_DISK;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block_runs::{BlockRun, NewestBlocks};
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
    /// Of each block the newest. None is older than its block's place in `blocks`.
    writes: NewestBlocks<Bytes>,
    weight: usize,
    blocks: BlockSet,
}

impl Open {
    fn take_writes(&mut self) -> Vec<BlockRun<Bytes>> {
        self.weight = 0;
        std::mem::take(&mut self.writes).into_runs()
    }
}

/// The open epoch's disk writes.
pub(crate) struct DiskLog {
    open: Mutex<Open>,
}

impl DiskLog {
    /// For a disk of so many blocks.
    pub(crate) fn new(blocks: u64) -> Self {
        let (tracking, writes, weight) = (DiskTracking::Off, NewestBlocks::default(), 0);
        Self { open: Mutex::new(Open { tracking, writes, weight, blocks: BlockSet::new(blocks) }) }
    }

    /// Changes how writes are kept. What is kept already stays, as far as the new way can say it: going from bytes to
    /// blocks loses nothing, and turning it off forgets everything.
    pub(crate) fn track(&self, tracking: DiskTracking) {
        let mut open = self.open();
        open.tracking = tracking;
        match tracking {
            DiskTracking::Off => {
                open.take_writes();
                open.blocks.clear();
            }
            DiskTracking::Blocks => {
                for run in open.take_writes() {
                    open.blocks.insert_range(run.first(), run.count());
                }
            }
            DiskTracking::Bytes { .. } => {}
        }
    }

    pub(crate) fn record(&self, write: DiskWrite) {
        let mut open = self.open();
        match open.tracking {
            DiskTracking::Off => {}
            DiskTracking::Blocks => {
                let blocks = write.blocks();
                open.blocks.insert_range(blocks.start, blocks.end.0 - blocks.start.0);
            }
            DiskTracking::Bytes { .. } => {
                open.weight += weight(&write);
                open.writes.insert(BlockRun::from(write));
            }
        }
    }

    /// Nobody knows what these blocks hold now: the disk will be asked. What was kept of them is no longer the newest.
    pub(super) fn record_unknown(&self, unknown: Range<Block>) {
        let mut open = self.open();
        if unknown.is_empty() || open.tracking == DiskTracking::Off {
            return;
        }
        let count = unknown.end.0 - unknown.start.0;
        open.writes.remove(unknown.start, count);
        open.blocks.insert_range(unknown.start, count);
    }

    /// Takes what was kept since the last time.
    pub(crate) fn take(&self) -> (Vec<DiskWrite>, BlockSet) {
        let mut open = self.open();
        let fresh = BlockSet::new(open.blocks.blocks());
        let writes = open.take_writes().into_iter().map(DiskWrite::from).collect();
        (writes, std::mem::replace(&mut open.blocks, fresh))
    }

    /// Takes the blocks that are kept without their bytes; tells what the writes weigh that are kept with them, for the
    /// cut. Those are newer, where they are of the same block.
    pub(crate) fn collect(&self) -> (BlockSet, usize) {
        let mut open = self.open();
        let fresh = BlockSet::new(open.blocks.blocks());
        (std::mem::replace(&mut open.blocks, fresh), open.weight)
    }

    /// Whether the guest has to wait for the cut before it writes more.
    pub(super) fn is_full(&self) -> bool {
        let open = self.open();
        matches!(open.tracking, DiskTracking::Bytes { most } if open.weight >= most)
    }

    /// Bytes from which on nothing more is begun before something has ended: all of it may end before the next cut.
    pub(super) fn most_under_way(&self) -> usize {
        match self.open().tracking {
            DiskTracking::Bytes { most } => most.min(MAX_EPOCH_DISK),
            DiskTracking::Off | DiskTracking::Blocks => MAX_EPOCH_DISK,
        }
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
        DiskContent::Zeroes(blocks) => {
            usize::try_from(*blocks).unwrap_or(usize::MAX).saturating_mul(ZERO_WEIGHT)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{DiskLog, DiskTracking};
    use crate::block_set::BlockSet;
    use crate::disk::{DiskContent, DiskWrite};
    use colo_common::{BLOCK_SIZE, Block};
    use proptest::prelude::{Just, Strategy, prop_assert_eq, prop_oneof, proptest};

    const BLOCKS: u64 = 16;

    #[derive(Clone, Debug)]
    enum Step {
        /// Blocks get this value; zeroes if it is 0.
        Write(u64, u64, u8),
        /// Blocks get this value, and nobody is told which.
        Fail(u64, u64, u8),
        Collect,
        Track(DiskTracking),
        Cut,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let place = || (0..BLOCKS - 3, 1..4_u64, 0..9_u8);
        let tracking = prop_oneof![Just(DiskTracking::Blocks), Just(DiskTracking::Bytes { most: 1 << 20 })];
        let step = prop_oneof![
            6 => place().prop_map(|(first, count, value)| Step::Write(first, count, value)),
            2 => place().prop_map(|(first, count, value)| Step::Fail(first, count, value)),
            1 => Just(Step::Collect),
            1 => tracking.prop_map(Step::Track),
            2 => Just(Step::Cut),
        ];
        proptest::collection::vec(step, 0..60)
    }

    fn copy(blocks: &BlockSet, disk: &[u8], copy: &mut [u8]) {
        blocks.iter().for_each(|block| copy[block.0 as usize] = disk[block.0 as usize]);
    }

    proptest! {
        #[test]
        fn every_cut_tells_what_the_disk_has(steps in steps()) {
            let log = DiskLog::new(BLOCKS);
            log.track(DiskTracking::Bytes { most: 1 << 20 });
            let (mut disk, mut there) = ([0; BLOCKS as usize], [0; BLOCKS as usize]);
            let mut known = BlockSet::new(BLOCKS);
            for step in steps.into_iter().chain([Step::Cut]) {
                match step {
                    Step::Write(first, count, value) => {
                        disk[first as usize..(first + count) as usize].fill(value);
                        let content = match value {
                            0 => DiskContent::Zeroes(count),
                            _ => DiskContent::Bytes(vec![value; count as usize * BLOCK_SIZE].into()),
                        };
                        log.record(DiskWrite { first: Block(first), content });
                    }
                    Step::Fail(first, count, value) => {
                        disk[first as usize..(first + count) as usize].fill(value);
                        log.record_unknown(Block(first)..Block(first + count));
                    }
                    Step::Collect => known.union_with(&log.collect().0),
                    Step::Track(tracking) => log.track(tracking),
                    Step::Cut => {
                        let (writes, blocks) = log.take();
                        known.union_with(&blocks);
                        copy(&known, &disk, &mut there);
                        known.clear();
                        for write in writes {
                            let here = write.blocks().start.0 as usize..write.blocks().end.0 as usize;
                            there[here].fill(match &write.content {
                                DiskContent::Bytes(bytes) => bytes[0],
                                DiskContent::Zeroes(_) => 0,
                            });
                        }
                        prop_assert_eq!(disk, there);
                    }
                }
            }
        }
    }
}
