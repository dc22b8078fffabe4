//! Which blocks have an entry in the overlay, and what it is worth. The sets are apart from each other, but for
//! blocks with an entry in `pending` and an older one beside it.

use colo_common::{Block, Point};
use colo_vmm::BlockSet;
use std::io;
use std::ops::Range;

use super::Entries;

/// See the module.
#[derive(Debug)]
pub(super) struct State {
    /// Their entries count.
    pub(super) present: BlockSet,
    /// The file holds the same or something newer, not synced yet.
    pub(super) superseded: BlockSet,
    /// The same, and the file is being synced: their entries are removed after that.
    pub(super) syncing: BlockSet,
    /// Blocks whose newest content is in `pending` under this point, until it is moved or folded; an entry of the
    /// overlay that they have beside it is older, and goes with it.
    pub(super) adopted: Option<(Point, BlockSet)>,
    /// How many of those are present too.
    both: u64,
    /// The file must stay as it is, for the copy that is kept aside.
    pub(super) aside: bool,
    /// The guest runs here: it writes to the file.
    pub(super) active: bool,
    /// Bytes that a seed has written to the file since the last sync of it began.
    pub(super) seeded: u64,
    /// Where folding goes on.
    pub(super) cursor: Block,
}

impl State {
    pub(super) fn new(entries: Entries) -> Self {
        let Entries { present, adopted, aside, active } = entries;
        let none = || BlockSet::new(present.blocks());
        let (superseded, syncing) = (none(), none());
        let both = adopted.iter().map(|(_, blocks)| common(&present, blocks)).sum();
        Self { superseded, syncing, present, adopted, both, aside, active, seeded: 0, cursor: Block(0) }
    }

    /// Whether the overlay has something that counts of any of these blocks.
    pub(super) fn has_newer(&self, blocks: Range<Block>) -> bool {
        let within = |set: &BlockSet| set.next(blocks.start).is_some_and(|found| found < blocks.end);
        within(&self.present) || self.adopted.as_ref().is_some_and(|(_, set)| within(set))
    }

    /// The next block with any entry.
    pub(super) fn next_entry(&self, from: Block) -> Option<Block> {
        self.sets().filter_map(|set| set.next(from)).min()
    }

    /// The end of the blocks with entries that begin with this one.
    pub(super) fn end_of_entries(&self, first: Block) -> Block {
        let mut end = Block(first.0 + 1);
        while self.sets().any(|set| set.contains(end)) {
            end.0 += 1;
        }
        end
    }

    fn sets(&self) -> impl Iterator<Item = &BlockSet> {
        let adopted = self.adopted.as_ref().map(|(_, set)| set);
        [&self.present, &self.superseded, &self.syncing].into_iter().chain(adopted)
    }

    /// The next block whose entry counts.
    pub(super) fn next_counting(&self, from: Block) -> Option<Block> {
        let adopted = self.adopted.as_ref().and_then(|(_, set)| set.next(from));
        self.present.next(from).into_iter().chain(adopted).min()
    }

    /// Blocks whose entry counts: they are still to go into the file. Walks through no set: it is asked after every change.
    pub(super) fn to_fold(&self) -> u64 {
        let adopted = self.adopted.as_ref().map_or(0, |(_, blocks)| blocks.len());
        self.present.len() + adopted - self.both
    }

    /// Nothing in `pending` counts any more.
    pub(super) fn moved(&mut self) {
        (self.adopted, self.both) = (None, 0);
    }

    /// These have new entries in `pending`.
    pub(super) fn adopt(&mut self, point: Point, blocks: BlockSet) {
        self.forget(&blocks);
        self.both = common(&self.present, &blocks);
        self.adopted = Some((point, blocks));
    }

    /// These have new entries.
    pub(super) fn renew(&mut self, blocks: &BlockSet) {
        self.forget(blocks);
        if let Some((_, adopted)) = &self.adopted {
            let new = |block: &Block| adopted.contains(*block) && !self.present.contains(*block);
            self.both += blocks.iter().filter(new).count() as u64;
        }
        self.present.union_with(blocks);
    }

    /// Whatever entries these had, nobody removes them for what the file holds now.
    fn forget(&mut self, blocks: &BlockSet) {
        for block in blocks.iter() {
            self.superseded.remove(block);
            self.syncing.remove(block);
        }
    }

    /// The file has what counts of these; where they had entries, those are of no more use.
    pub(super) fn supersede(&mut self, blocks: Range<Block>) {
        let mut at = blocks.start;
        while let Some(block) = self.next_counting(at).filter(|block| *block < blocks.end) {
            let present = self.present.remove(block);
            let adopted = self.adopted.as_mut().is_some_and(|(_, adopted)| adopted.remove(block));
            self.both -= u64::from(present && adopted);
            self.superseded.insert(block);
            at = Block(block.0 + 1);
        }
    }

    /// What is superseded now is so in the file before it is synced.
    pub(super) fn begin_sync(&mut self) {
        self.seeded = 0;
        if self.syncing.is_empty() {
            std::mem::swap(&mut self.superseded, &mut self.syncing);
        } else {
            // Left over by a removal that failed.
            self.syncing.union_with(&self.superseded);
            self.superseded.clear();
        }
    }

    /// The file holds nobody knows what of the blocks written since the last sync. While following, their entries have
    /// the same; what a running guest wrote is in the file alone.
    pub(super) fn sync_failed(&mut self) {
        if !self.active {
            self.present.union_with(&self.syncing);
            self.present.union_with(&self.superseded);
            self.syncing.clear();
            self.superseded.clear();
        }
    }

    /// # Errors
    /// The guest does not run here.
    pub(super) fn check_runs(&self) -> io::Result<()> {
        if self.active {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the disk is a copy until this node runs the guest",
        ))
    }
}

/// Blocks that both have; costs what the second has.
fn common(one: &BlockSet, other: &BlockSet) -> u64 {
    other.iter().filter(|block| one.contains(*block)).count() as u64
}
