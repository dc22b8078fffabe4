//! When each page and block of a guest was changed last: what a copy that comes back lacks. Both nodes keep it, so that
//! whoever runs the guest next knows it.

use colo_common::Epoch;
use colo_vmm::{BlockSet, DirtySet, LastDirty, LastDirtyBlocks};

use crate::changes::Changes;

/// The tables of a guest's memory and disk.
pub struct LastChanged {
    /// Of the memory.
    pub pages: LastDirty,
    /// Of the disk.
    pub blocks: LastDirtyBlocks,
}

/// From which epoch on each table knows everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The memory's.
    pub memory: Option<Epoch>,
    /// The disk's.
    pub disk: Option<Epoch>,
}

impl LastChanged {
    /// Tables that know nothing, of a guest with frames below `frames` and so many blocks.
    pub fn none(frames: u64, blocks: u64) -> Self {
        Self { pages: LastDirty::new(frames), blocks: LastDirtyBlocks::new(blocks) }
    }

    /// From now on both know everything after `epoch`.
    pub fn begin(&mut self, epoch: Epoch) {
        self.pages.begin(epoch);
        self.blocks.begin(epoch);
    }

    /// Something changed that they were not told of.
    pub fn forget(&mut self) {
        self.pages.forget();
        self.blocks.forget();
    }

    /// How far back they go.
    pub fn known(&self) -> Known {
        Known { memory: self.pages.known_from(), disk: self.blocks.known_from() }
    }

    /// These were changed in `epoch`. A table that begins with that epoch has nothing to know of it.
    pub fn mark(&mut self, changes: &Changes, epoch: Epoch) {
        let Known { memory, disk } = self.known();
        if memory.is_some_and(|from| from < epoch) {
            self.pages.mark(&changes.pages, epoch);
        }
        if disk.is_some_and(|from| from < epoch) {
            changes.block_runs().for_each(|(first, count)| self.blocks.mark_run(first, count, epoch));
        }
    }

    /// Pages changed after `epoch`; nothing if that is not known.
    pub fn pages_since(&self, epoch: Epoch) -> Option<DirtySet> {
        self.pages.since(epoch)
    }

    /// Blocks changed after `epoch`; nothing if that is not known.
    pub fn blocks_since(&self, epoch: Epoch) -> Option<BlockSet> {
        self.blocks.since(epoch)
    }
}
