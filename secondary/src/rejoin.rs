//! What this node knows of where its copy differs from points of the vm, so that a new copy is made of what differs: what
//! was changed in the epochs that it took, and what a guest that it ran itself left behind. Pure.
//!
//! ```text
//!   whole, stale          a base: exactly its point, and back to where the table of what was changed begins
//!   ran the guest itself  a base: a point that another had, but for what was changed since
//!   a seed broke off      the base that the seed began from, but for what came of it
//! ```

use colo_common::{Block, Epoch, Gfn, Point};
use colo_primary::last_changed::LastChanged;
use colo_proto::message::{Base, Bases, SeedMode, SeedPart};
use colo_vmm::{BlockSet, DirtySet};

use crate::replica::Copy;
use crate::staging::{StagedBlocks, StagedEpoch, StagedPart};

/// A memory or disk that holds a point, but for some of it.
#[derive(Clone, Debug)]
struct Left<S> {
    point: Point,
    but_for: S,
}

/// A seed that goes on.
#[derive(Debug)]
struct Seed {
    mode: SeedMode,
    /// What came.
    pages: DirtySet,
    blocks: BlockSet,
}

/// Where a copy may hold something else than the points that a seed begins from.
#[derive(Clone, Debug)]
pub struct Divergence {
    /// Pages.
    pub pages: DirtySet,
    /// Blocks.
    pub blocks: BlockSet,
}

/// What is known of a copy's differences.
pub struct Rejoin {
    frames: u64,
    blocks: u64,
    last_changed: LastChanged,
    left_memory: Option<Left<DirtySet>>,
    left_disk: Option<Left<BlockSet>>,
    seed: Option<Seed>,
}

impl Rejoin {
    /// Of a guest with frames below `frames` and so many blocks, of which nothing is known.
    pub fn new(frames: u64, blocks: u64) -> Self {
        let last_changed = LastChanged::none(frames, blocks);
        Self { frames, blocks, last_changed, left_memory: None, left_disk: None, seed: None }
    }

    /// The copy is exactly at `point`: what is changed after it will be known.
    pub fn hold(&mut self, point: Point) {
        self.last_changed.begin(point.epoch);
    }

    /// The guest begins anew: nothing is as it was at any point.
    pub fn forget(&mut self) {
        (self.left_memory, self.left_disk) = (None, None);
        self.last_changed.forget();
    }

    /// The memory holds `point`, but for `changed`.
    pub fn leave_memory(&mut self, point: Point, changed: DirtySet) {
        self.left_memory = Some(Left { point, but_for: changed });
    }

    /// The disk holds `point`, but for `changed`.
    pub fn leave_disk(&mut self, point: Point, changed: BlockSet) {
        self.left_disk = Some(Left { point, but_for: changed });
    }

    /// What the copy can be gone on with from.
    pub fn bases(&self, copy: &Copy) -> Bases {
        let known = self.last_changed.known();
        let held = |point: Point, known: Option<Epoch>| Base {
            point,
            from: known.map_or(point.epoch, |known| known.min(point.epoch)),
        };
        match copy.point() {
            Some(point) => Bases {
                memory: Some(held(point, known.memory)),
                disk: Some(held(point, known.disk)).filter(|_| self.blocks > 0),
            },
            None => Bases {
                memory: self.left_memory.as_ref().map(|left| Base::at(left.point)),
                disk: self.left_disk.as_ref().map(|left| Base::at(left.point)),
            },
        }
    }

    /// A seed begins, of a copy that is this until now. Answers where it diverged from what the seed begins from.
    ///
    /// # Errors
    /// This copy is no base for it.
    pub fn begin(&mut self, copy: &Copy, mode: SeedMode) -> Result<Divergence, String> {
        let bases = self.bases(copy);
        let pages = match mode.memory {
            SeedPart::Since(point) => {
                check(bases.memory, point, "memory")?;
                let left = self.left_memory.as_ref().filter(|_| copy.point().is_none());
                let beyond = bases.memory.filter(|base| base.point != point);
                match (left, beyond) {
                    (Some(left), _) => left.but_for.clone(),
                    (None, Some(_)) => {
                        self.last_changed.pages_since(point.epoch).ok_or("it is not known any more")?
                    }
                    (None, None) => DirtySet::new(self.frames),
                }
            }
            SeedPart::All | SeedPart::Differing => DirtySet::new(self.frames),
        };
        let blocks = match mode.disk {
            SeedPart::Since(point) => {
                check(bases.disk, point, "disk")?;
                let left = self.left_disk.as_ref().filter(|_| copy.point().is_none());
                let beyond = bases.disk.filter(|base| base.point != point);
                match (left, beyond) {
                    (Some(left), _) => left.but_for.clone(),
                    (None, Some(_)) => {
                        self.last_changed.blocks_since(point.epoch).ok_or("it is not known any more")?
                    }
                    (None, None) => BlockSet::new(self.blocks),
                }
            }
            SeedPart::All | SeedPart::Differing => BlockSet::new(self.blocks),
        };
        // From here on the copy is neither whole nor what it was.
        self.left_memory = since(mode.memory).map(|point| Left { point, but_for: pages.clone() });
        self.left_disk = since(mode.disk).map(|point| Left { point, but_for: blocks.clone() });
        let (came_pages, came_blocks) = (DirtySet::new(self.frames), BlockSet::new(self.blocks));
        self.seed = Some(Seed { mode, pages: came_pages, blocks: came_blocks });
        Ok(Divergence { pages, blocks })
    }

    /// Pages of the seed came.
    pub fn take_pages(&mut self, part: &StagedPart) {
        if let Some(seed) = &mut self.seed {
            part.runs().for_each(|(first, count)| seed.pages.insert_range(first, count));
        }
    }

    /// Blocks of the seed came.
    pub fn take_blocks(&mut self, part: &StagedBlocks) {
        if let Some(seed) = &mut self.seed {
            block_runs(part).for_each(|(first, count)| seed.blocks.insert_range(first, count));
        }
    }

    /// The seed broke off: what came of it is of another point.
    pub fn break_off(&mut self) {
        let Some(seed) = self.seed.take() else { return };
        if let Some(left) = &mut self.left_memory {
            left.but_for.union_with(&seed.pages);
        }
        if let Some(left) = &mut self.left_disk {
            left.but_for.union_with(&seed.blocks);
        }
    }

    /// An epoch is staged: one that makes the copy whole, or follows.
    pub fn stage(&mut self, epoch: &StagedEpoch) {
        let at = epoch.point.epoch;
        match self.seed.take() {
            Some(seed) if epoch.base.is_none() => self.complete(&seed, at),
            seed => self.seed = seed,
        }
        let known = self.last_changed.known();
        // A table that begins with this very epoch has nothing to know of it.
        if known.memory.is_some_and(|from| from < at) {
            let runs = epoch.parts.iter().flat_map(StagedPart::runs);
            runs.for_each(|(first, count)| self.last_changed.pages.mark_run(first, count, at));
        }
        if known.disk.is_some_and(|from| from < at) {
            let runs = epoch.blocks.iter().flat_map(block_runs);
            runs.for_each(|(first, count)| self.last_changed.blocks.mark_run(first, count, at));
        }
    }

    /// The copy is whole at the epoch `at`.
    fn complete(&mut self, seed: &Seed, at: Epoch) {
        (self.left_memory, self.left_disk) = (None, None);
        let known = self.last_changed.known();
        match since(seed.mode.memory) {
            // All that was changed since that point came with the seed.
            Some(point) => {
                if known.memory.is_none_or(|from| from > point.epoch) {
                    self.last_changed.pages.begin(point.epoch);
                }
                self.last_changed.pages.mark(&seed.pages, at);
            }
            None => self.last_changed.pages.begin(at),
        }
        match since(seed.mode.disk) {
            Some(point) => {
                if known.disk.is_none_or(|from| from > point.epoch) {
                    self.last_changed.blocks.begin(point.epoch);
                }
                self.last_changed.blocks.mark(&seed.blocks, at);
            }
            None => self.last_changed.blocks.begin(at),
        }
    }

    /// What was changed when, for whoever runs the guest from here on.
    pub fn into_last_changed(self) -> LastChanged {
        self.last_changed
    }
}

fn since(part: SeedPart) -> Option<Point> {
    match part {
        SeedPart::Since(point) => Some(point),
        SeedPart::All | SeedPart::Differing => None,
    }
}

fn check(base: Option<Base>, point: Point, what: &str) -> Result<(), String> {
    match base {
        Some(base) if point <= base.point && point.epoch >= base.from => Ok(()),
        Some(base) => Err(format!(
            "what was changed since {point} is of no use here: this {what} holds {}, and goes back to epoch {}",
            base.point, base.from.0
        )),
        None => Err(format!("what was changed since {point} is of no use here: this {what} holds no point")),
    }
}

fn block_runs(part: &StagedBlocks) -> impl Iterator<Item = (Block, u64)> + '_ {
    part.runs().map(|run| (run.first(), run.count()))
}

/// Runs of a divergence, as a peer is told.
impl Divergence {
    /// Of pages.
    pub fn page_runs(&self) -> Vec<(Gfn, u64)> {
        self.pages.runs().collect()
    }

    /// Of blocks.
    pub fn block_runs(&self) -> Vec<(Block, u64)> {
        self.blocks.runs().collect()
    }
}
