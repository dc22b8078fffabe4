//! A node that follows: its memory and disk, and what it knows of them.

use colo_common::history::point;
use colo_common::{Block, Gfn, History, Point};
use colo_proto::message::SeedMode;
use colo_proto::pages::{Content, Run};
use colo_secondary::rejoin::{Divergence, Rejoin};
use colo_secondary::replica::Copy;
use colo_secondary::staging::{Measures, StagedBlocks, StagedEpoch, StagedPart};
use colo_vmm::synthetic::{SyntheticConfig, SyntheticGuest};
use colo_vmm::{BlockSet, BootFile, BootSource, DirtySet, GuestSpec, MachineState, ProtectedGuest};

/// Pages of a memory, and blocks of a disk.
pub(crate) const SIZE: u64 = 48;
/// Blocks that an intent log names together.
pub(crate) const EXTENT: u64 = 8;

/// A memory and a disk: a number stands for what a page or block holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) memory: Vec<u8>,
    pub(crate) disk: Vec<u8>,
}

impl Guest {
    pub(crate) fn zero() -> Self {
        Self { memory: vec![0; SIZE as usize], disk: vec![0; SIZE as usize] }
    }
}

/// What of a runner's disk is safe: it holds a point, but for some extents.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) point: Point,
    pub(crate) extents: BlockSet,
}

/// A whole copy in a store.
#[derive(Clone)]
pub(crate) struct Stored {
    point: Point,
    content: Guest,
    history: History,
}

/// A node that follows.
pub(crate) struct Follower {
    pub(crate) content: Guest,
    pub(crate) copy: Copy,
    pub(crate) history: History,
    pub(crate) rejoin: Rejoin,
    pub(crate) stored: Option<Stored>,
    claim: Option<Claim>,
}

impl Follower {
    /// A process that finds this disk, and perhaps the log of a runner on it.
    pub(crate) fn new(disk: Vec<u8>, claim: Option<Claim>) -> Self {
        let mut rejoin = Rejoin::new(SIZE, SIZE);
        if let Some(Claim { point, extents }) = claim.clone() {
            rejoin.leave_disk(point, extents);
        }
        let content = Guest { disk, ..Guest::zero() };
        let (copy, history) = (Copy::Nothing, History::default());
        Self { content, copy, history, rejoin, stored: None, claim }
    }

    /// The process dies and comes again.
    pub(crate) fn restart(&mut self) {
        let disk = std::mem::take(&mut self.content.disk);
        let memory = std::mem::take(&mut self.content.memory);
        let copy = std::mem::replace(&mut self.copy, Copy::Nothing);
        let mut new = Self::new(disk, self.claim.take());
        match self.stored.take() {
            Some(stored) => {
                new.content = stored.content.clone();
                new.copy = Copy::Stale { point: stored.point };
                new.history = stored.history.clone();
                new.rejoin.hold(stored.point);
                new.stored = Some(stored);
            }
            // What came of a seed is stored, as a base for digests.
            None if matches!(copy, Copy::Inconsistent) => {
                (new.content.memory, new.copy) = (memory, Copy::Inconsistent);
            }
            None => {}
        }
        *self = new;
    }

    pub(crate) fn begin(&mut self, mode: SeedMode) -> Result<Divergence, String> {
        let diverged = self.rejoin.begin(&self.copy, mode)?;
        (self.claim, self.stored, self.copy) = (None, None, Copy::Inconsistent);
        Ok(diverged)
    }

    pub(crate) fn take_page(&mut self, page: u64, value: u8) {
        self.content.memory[page as usize] = value;
        self.rejoin.take_pages(&pages(&[page]));
    }

    pub(crate) fn take_block(&mut self, block: u64, value: u8) {
        self.content.disk[block as usize] = value;
        self.rejoin.take_blocks(&blocks(&[block]));
    }

    /// An epoch: pages and blocks with what they hold.
    pub(crate) fn stage(&mut self, epoch: &mut StagedEpoch, from: &Guest, changed: (&[u64], &[u64])) {
        for &page in changed.0 {
            self.content.memory[page as usize] = from.memory[page as usize];
        }
        for &block in changed.1 {
            self.content.disk[block as usize] = from.disk[block as usize];
        }
        (epoch.parts, epoch.blocks) = (vec![pages(changed.0)], vec![blocks(changed.1)]);
        self.rejoin.stage(epoch);
        self.copy = Copy::Stale { point: epoch.point };
        self.history = epoch.history.clone();
    }

    pub(crate) fn store(&mut self) {
        if let Some(point) = self.copy.point() {
            let (content, history) = (self.content.clone(), self.history.clone());
            self.stored = Some(Stored { point, content, history });
        }
    }
}

fn pages(pages: &[u64]) -> StagedPart {
    StagedPart { zeros: pages.iter().map(|&page| (Gfn(page), 1)).collect(), pages: None }
}

fn blocks(blocks: &[u64]) -> StagedBlocks {
    let zero = |&first| Run { first: Block(first), count: 1, content: Content::Zero };
    StagedBlocks::new(blocks.iter().map(zero).collect(), Default::default())
}

/// An epoch without anything in it.
pub(crate) fn empty_epoch() -> StagedEpoch {
    let state = machine();
    StagedEpoch {
        point: point(1, 1),
        base: None,
        history: History::default(),
        parts: Vec::new(),
        blocks: Vec::new(),
        output: Default::default(),
        released: state.output,
        state,
        promotions: 0,
        bytes: 0,
        measures: Measures::default(),
    }
}

fn machine() -> MachineState {
    let image = BootFile { path: "image".into(), bytes: vec![0x90].into() };
    let spec = GuestSpec::new("web", 4 << 20, BootSource::Flat { image, address: 1 << 16 });
    let mut guest = SyntheticGuest::new(spec, SyntheticConfig::default()).expect("a small guest");
    guest.boot().expect("it boots");
    guest.resume().expect("it runs");
    guest.cut(&mut DirtySet::new(SIZE << 10)).expect("it stops").state
}
