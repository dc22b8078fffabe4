//! The node that runs the guest: `primary::node` as far as it knows what was changed.

use colo_common::{Block, Epoch, Gfn, History, Point, Term};
use colo_primary::last_changed::LastChanged;
use colo_primary::rejoin::plan;
use colo_primary::replicator::Offer;
use colo_proto::message::{SeedMode, SeedPart};
use colo_secondary::replica::Copy;
use colo_tests::seed::Seed;
use colo_vmm::{BlockSet, DirtySet};
use std::collections::VecDeque;

use crate::copy::{Claim, EXTENT, Follower, Guest, SIZE};

/// What was changed.
#[derive(Clone)]
pub(crate) struct Set {
    pub(crate) pages: DirtySet,
    pub(crate) blocks: BlockSet,
}

impl Set {
    pub(crate) fn new() -> Self {
        Self { pages: DirtySet::new(SIZE), blocks: BlockSet::new(SIZE) }
    }

    pub(crate) fn lists(&self) -> (Vec<u64>, Vec<u64>) {
        (self.pages.iter().map(|gfn| gfn.0).collect(), self.blocks.iter().map(|block| block.0).collect())
    }

    fn merge(&mut self, other: &Self) {
        self.pages.union_with(&other.pages);
        self.blocks.union_with(&other.blocks);
    }
}

/// A copy that is under way: what is still to be sent of it.
pub(crate) struct Seeding {
    pub(crate) to: usize,
    pub(crate) pages: Vec<u64>,
    pub(crate) blocks: Vec<u64>,
    /// Looked at when their turn comes, and sent if they differ.
    pub(crate) compared: (Vec<u64>, Vec<u64>),
}

/// The node that runs the guest.
pub(crate) struct Runner {
    pub(crate) guest: Guest,
    pub(crate) table: LastChanged,
    pub(crate) open: Set,
    /// Cut, and not acked.
    pub(crate) flight: VecDeque<(Point, Set)>,
    pub(crate) history: History,
    pub(crate) term: u64,
    pub(crate) epoch: u64,
    pub(crate) acked: Option<Point>,
    pub(crate) log: Claim,
    /// Who follows, and what was staged there.
    pub(crate) paired: Option<usize>,
    pub(crate) seeding: Option<Seeding>,
}

impl Runner {
    pub(crate) fn new(guest: Guest, table: LastChanged, history: History, from: Point, term: u64) -> Self {
        Self {
            guest,
            table,
            open: Set::new(),
            flight: VecDeque::new(),
            history,
            term,
            epoch: from.epoch.0,
            acked: None,
            log: Claim { point: from, extents: BlockSet::new(SIZE) },
            paired: None,
            seeding: None,
        }
    }

    pub(crate) fn next(&self) -> Epoch {
        Epoch(self.epoch + 1)
    }

    pub(crate) fn write(&mut self, seed: &mut Seed) {
        // Few values: some pages become what they were, or what the other node made of them.
        let (at, value) = (seed.below(SIZE), seed.below(3) as u8 + 1);
        if seed.below(2) == 0 {
            self.guest.memory[at as usize] = value;
            self.open.pages.insert(Gfn(at));
        } else {
            self.log.extents.insert_range(Block(at / EXTENT * EXTENT), EXTENT);
            self.guest.disk[at as usize] = value;
            self.open.blocks.insert(Block(at));
        }
    }

    /// The open set becomes an epoch.
    pub(crate) fn cut(&mut self) -> (Point, Set) {
        self.epoch += 1;
        let point = Point { term: Term(self.term), epoch: Epoch(self.epoch) };
        self.history.extend(point);
        let set = std::mem::replace(&mut self.open, Set::new());
        self.flight.push_back((point, set.clone()));
        (point, set)
    }

    /// The oldest in flight is acked.
    pub(crate) fn ack(&mut self) {
        let Some((point, set)) = self.flight.pop_front() else { return };
        self.mark(&set, point.epoch);
        self.acked = Some(point);
        self.log.point = self.log.point.max(point);
    }

    pub(crate) fn mark(&mut self, set: &Set, epoch: Epoch) {
        let known = self.table.known();
        if known.memory.is_some_and(|from| from < epoch) {
            self.table.pages.mark(&set.pages, epoch);
        }
        if known.disk.is_some_and(|from| from < epoch) {
            self.table.blocks.mark(&set.blocks, epoch);
        }
    }

    /// Nobody follows any more: what failed is merged back.
    pub(crate) fn alone(&mut self) {
        for (_, set) in std::mem::take(&mut self.flight) {
            self.open.merge(&set);
        }
        (self.paired, self.seeding) = (None, None);
        self.term += 1;
    }

    /// `Node::first_pass` and what the copier makes of it. Answers how the copy is made.
    pub(crate) fn seed(&mut self, to: usize, follower: &mut Follower) -> Result<SeedMode, String> {
        if self.table.known().memory.is_none() {
            self.open = Set::new();
            self.table.begin(self.next());
        }
        let open = std::mem::replace(&mut self.open, Set::new());
        self.mark(&open, self.next());
        if self.table.known().disk.is_none() {
            self.table.blocks.begin(self.next());
        }
        let staged = match follower.copy {
            Copy::Inconsistent => Some(Point::default()),
            _ => follower.copy.point(),
        };
        let (bases, history) = (follower.rejoin.bases(&follower.copy), follower.history.clone());
        let offer = Offer { replica: None, staged, bases, history };
        let mode = plan(&self.history, self.table.known(), &offer, false).mode;
        let diverged = follower.begin(mode)?;
        let mut seeding = Seeding { to, pages: Vec::new(), blocks: Vec::new(), compared: Default::default() };
        match mode.memory {
            SeedPart::Since(point) => {
                let mut pages = self.table.pages_since(point.epoch).ok_or("planned, and not known")?;
                pages.union_with(&diverged.pages);
                seeding.pages = pages.iter().map(|gfn| gfn.0).collect();
            }
            SeedPart::All => seeding.pages = (0..SIZE).collect(),
            SeedPart::Differing => seeding.compared.0 = (0..SIZE).collect(),
        }
        match mode.disk {
            SeedPart::Since(point) => {
                let blocks = self.table.blocks_since(point.epoch).ok_or("planned, and not known")?;
                let only_there = diverged.blocks.iter().filter(|block| !blocks.contains(*block));
                seeding.compared.1 = only_there.map(|block| block.0).collect();
                seeding.blocks = blocks.iter().map(|block| block.0).collect();
            }
            SeedPart::All | SeedPart::Differing => seeding.compared.1 = (0..SIZE).collect(),
        }
        self.seeding = Some(seeding);
        Ok(mode)
    }

    /// Another node has the vm, and this process follows by `exec`: `Node::remains`.
    pub(crate) fn hand_over(mut self) -> Follower {
        self.alone();
        let mut follower = Follower::new(self.guest.disk, Some(self.log));
        (follower.content.memory, follower.copy) = (self.guest.memory, Copy::Inconsistent);
        follower.history = self.history;
        if let Some(base) = self.acked
            && let Some(mut changed) = self.table.pages_since(base.epoch)
        {
            changed.union_with(&self.open.pages);
            follower.rejoin.leave_memory(base, changed);
        }
        follower
    }

    /// It died: the disk and its log are left.
    pub(crate) fn die(self) -> Follower {
        Follower::new(self.guest.disk, Some(self.log))
    }
}
