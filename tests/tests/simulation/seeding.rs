//! The copy of everything that a secondary lacks: `primary::node::seeding` and `copier`, function by function. Their
//! thread is a list of work that is done a bit at a time, between the guest's steps.

use colo_common::{BLOCK_SIZE, Block, Epoch, Gfn, PAGE_SIZE, Point};
use colo_primary::changes::{Changes, read_blocks};
use colo_primary::rejoin::plan;
use colo_primary::replicator::{Offer, Phase};
use colo_proto::message::{
    BlockDigests, DigestRange, DigestRequest, Diverged, PageDigest, RangeDigests, SeedMode, SeedPart,
};
use colo_vmm::page_batch::is_zero;
use colo_vmm::{BlockSet, DirtySet, Disk, PageBatch, ProtectedGuest};
use std::collections::VecDeque;

use crate::common::Common;
use crate::net::{Msg, Way};
use crate::plan::{BLOCKS, CHUNK_PAGES, DIGEST_WINDOW, FRAMES, KEEP_LIMIT, MAX_ROUNDS};
use crate::runner::Runner;

/// Chunks on their way before the copying thread waits.
const MAX_CHUNKS: usize = 8;

/// `seeding::SeedJob` and `copier::Copier`.
pub(crate) struct SeedJob {
    busy: bool,
    rounds: u32,
    pub(crate) waits_for_rest: bool,
    chunks: VecDeque<Chunk>,
    digests: VecDeque<RangeDigests>,
    block_digests: VecDeque<BlockDigests>,
    diverged: VecDeque<Diverged>,
    /// The secondary has not said all of where its copy diverged.
    asks_diverged: bool,
    /// What was changed since the points that the seed begins from.
    since: (Option<DirtySet>, Option<BlockSet>),
    /// The first pass of a resync: frames looked at, and those whose digests were asked for.
    pass: Option<(u64, u64)>,
    /// The same of blocks, after that: of a full seed too.
    block_pass: Option<Pass>,
    /// Blocks that only the copy may have changed since the point that the disk begins from.
    doubtful: BlockSet,
    populated: Vec<(Gfn, u64)>,
}

/// What is sent at once: pages, or blocks.
enum Chunk {
    Pages(Gfn, u64),
    Blocks(Block, u64),
}

impl Runner {
    pub(crate) fn begin_seed(&mut self, link: u64, offer: &Offer, common: &mut Common) {
        self.track_disk(common);
        let (mode, pages, blocks) = self.first_pass(offer, common);
        common.count(match mode.memory {
            SeedPart::All => "seeds",
            SeedPart::Differing => "resyncs",
            SeedPart::Since(_) => "resyncs of what was written",
        });
        if matches!(mode.disk, SeedPart::Since(_)) {
            common.count("disks sent what was written");
        }
        let history = self.replicator.history().points().to_vec();
        let Some(peer) = &mut self.peer else { return };
        let begin = peer.encoder.seed(mode, history);
        common.send(link, Way::Transfers, Msg::Frame(Box::new(begin)));
        let populated = self.guest.memory().populated().expect("guest memory can be read");
        let mut seed = SeedJob {
            busy: true,
            rounds: 0,
            waits_for_rest: false,
            chunks: VecDeque::new(),
            digests: VecDeque::new(),
            block_digests: VecDeque::new(),
            diverged: VecDeque::new(),
            asks_diverged: mode.asks_diverged(),
            since: (pages, blocks),
            pass: (mode.memory == SeedPart::Differing).then_some((0, 0)),
            block_pass: (mode.disk == SeedPart::Differing).then(|| Pass::of(vec![(0, BLOCKS)])),
            doubtful: BlockSet::new(BLOCKS),
            populated,
        };
        if mode.memory == SeedPart::All {
            let all = seed.populated.clone();
            seed.frames(&all);
        }
        self.seed = Some(seed);
    }

    fn first_pass(
        &mut self,
        offer: &Offer,
        common: &mut Common,
    ) -> (SeedMode, Option<DirtySet>, Option<BlockSet>) {
        self.kept_since = None;
        let tracked = self.last_changed.known().memory.is_some();
        if tracked {
            self.collect(common);
        }
        if !tracked || self.unknown {
            self.track_anew(common);
        }
        self.account_open();
        if self.last_changed.known().disk.is_none() {
            self.last_changed.blocks.begin(self.replicator.next_point().epoch);
        }
        let known = self.last_changed.known();
        let mut mode = plan(self.replicator.history(), known, offer, false).mode;
        if common.mutations.runner.resync_any_copy
            && let Some(base) = offer.bases.memory
        {
            mode.memory = SeedPart::Since(base.point);
        }
        let reach = |point: Point, known: Option<Epoch>| point.epoch.max(known.unwrap_or_default());
        let pages = match mode.memory {
            SeedPart::Since(point) => self.last_changed.pages_since(reach(point, known.memory)),
            _ => None,
        };
        let blocks = match mode.disk {
            SeedPart::Since(point) => self.last_changed.blocks_since(reach(point, known.disk)),
            _ => None,
        };
        (mode, pages, blocks)
    }

    fn track_anew(&mut self, common: &mut Common) {
        let tracked = self.guest.unprotect().and_then(|()| self.guest.protect());
        if let Err(e) = tracked {
            common.outside.broken(|| format!("the guest cannot be protected: {e}"));
        }
        self.dirty = self.dirty.fresh();
        self.unknown = false;
        self.last_changed.begin(self.replicator.next_point().epoch);
    }

    fn account_open(&mut self) {
        let fresh = self.dirty.fresh();
        let changes = std::mem::replace(&mut self.dirty, fresh);
        self.last_changed.mark(&changes, self.replicator.next_point().epoch);
    }

    fn order_round(&mut self) {
        let Some(seed) = &mut self.seed else { return };
        self.last_changed.mark(&self.dirty, self.replicator.next_point().epoch);
        seed.order(&mut self.dirty);
    }

    pub(crate) fn keep_or_forget(&mut self, common: &mut Common) {
        if !matches!(self.replicator.phase(), Phase::Alone) || self.peer.is_some() {
            return;
        }
        if self.last_changed.known().memory.is_some() && !self.unknown {
            self.kept_since.get_or_insert(common.now);
            return;
        }
        self.forget_copy(common);
    }

    pub(crate) fn forget_if_late(&mut self, common: &mut Common) {
        let Some(since) = self.kept_since.filter(|_| self.peer.is_none()) else { return };
        self.collect(common);
        if self.unknown || self.dirty.pages.len() > FRAMES * 3 / 4 || common.now - since > KEEP_LIMIT {
            common.count("copies forgotten");
            self.forget_copy(common);
        }
    }

    fn forget_copy(&mut self, common: &mut Common) {
        self.kept_since = None;
        self.last_changed.forget();
        if let Err(e) = self.guest.unprotect() {
            common.outside.broken(|| format!("the guest's tracking does not stop: {e}"));
        }
        self.track_disk(common);
        self.dirty = self.dirty.fresh();
        self.unknown = false;
    }

    /// The thread's share of a tick: `Copier::copy`.
    pub(crate) fn copy(&mut self, common: &mut Common) {
        for _ in 0..3 {
            let (Some(seed), Some(peer)) = (&mut self.seed, &self.peer) else { return };
            if !seed.busy {
                return;
            }
            if common.net.waiting(peer.link, Way::Transfers) > MAX_CHUNKS {
                return;
            }
            if seed.asks_diverged {
                if !seed.add_diverged() {
                    return;
                }
                continue;
            }
            if let Some(chunk) = seed.chunks.pop_front() {
                self.send_chunk(chunk, common);
                continue;
            }
            let (link, memory, disk) = (peer.link, self.guest.memory(), self.disk.disk());
            let asked = match (seed.pass, &seed.block_pass) {
                (Some(_), _) => seed.compare_memory(memory),
                (None, Some(_)) => seed.compare_disk(&*disk, common),
                (None, None) => {
                    seed.busy = false;
                    return self.next_round(common);
                }
            };
            match asked {
                Turn::Ask(question) => common.send(link, Way::Say, question),
                Turn::Wait => return,
                Turn::Done => {}
            }
        }
    }

    /// `Copier::chunk` and `Copier::blocks`.
    fn send_chunk(&mut self, chunk: Chunk, common: &mut Common) {
        let Some(peer) = &mut self.peer else { return };
        let mut frames = Vec::new();
        match chunk {
            Chunk::Pages(first, count) => {
                let batch = PageBatch::copy(self.guest.memory(), vec![(first, count)], &common.pool);
                let batch = batch.expect("frames of the guest");
                if batch.iter().all(|(_, page)| is_zero(page)) {
                    peer.encoder.zeros(&[(first, count)], |frame| frames.push(frame));
                } else {
                    peer.encoder.pages(batch, |frame| frames.push(frame));
                }
            }
            Chunk::Blocks(first, count) => {
                common.counts.add("blocks seeded", count);
                let mut writes = Vec::new();
                let read = read_blocks(&*self.disk.disk(), first, count, |write| writes.push(write));
                read.expect("blocks of the disk");
                peer.encoder.blocks(&writes, |frame| frames.push(frame));
            }
        }
        for frame in frames {
            common.send(peer.link, Way::Transfers, Msg::Frame(Box::new(frame)));
        }
    }

    fn next_round(&mut self, common: &mut Common) {
        if self.standing.is_some() || self.parked {
            return;
        }
        self.collect(common);
        let (dirty, limit) = (self.dirty.count(), common.plan.join_pages);
        let Some(seed) = &mut self.seed else { return };
        if dirty > limit && seed.rounds < MAX_ROUNDS {
            seed.rounds += 1;
            self.order_round();
        }
    }

    pub(crate) fn seed_is_ready(&mut self, common: &mut Common) -> bool {
        if self.unknown && matches!(self.replicator.phase(), Phase::Seeding { .. }) {
            self.lose_link(common);
            return false;
        }
        self.seed.as_ref().is_some_and(|seed| !seed.busy)
    }

    pub(crate) fn send_rest_or_join(&mut self, common: &mut Common) {
        let too_much = !self.fits_epoch(common);
        if let Some(seed) = self.seed.as_mut().filter(|_| too_much) {
            common.count("rests");
            seed.waits_for_rest = true;
            self.order_round();
            return;
        }
        self.seed = None;
        self.ship(true, common);
    }
}

/// A pass over blocks by digests: runs that are left, the next of them asked for up to `asked` and compared up to `at`.
struct Pass {
    runs: VecDeque<(u64, u64)>,
    at: u64,
    asked: u64,
}

impl Pass {
    fn of(runs: Vec<(u64, u64)>) -> Self {
        let at = runs.first().map_or(0, |(first, _)| *first);
        Self { runs: runs.into(), at, asked: at }
    }
}

/// What a step of a first pass comes to.
enum Turn {
    /// The secondary is to be asked.
    Ask(Msg),
    /// For its answer.
    Wait,
    /// With this step.
    Done,
}

impl SeedJob {
    pub(crate) fn take_digests(&mut self, digests: RangeDigests) {
        self.digests.push_back(digests);
    }

    pub(crate) fn take_block_digests(&mut self, digests: BlockDigests) {
        self.block_digests.push_back(digests);
    }

    pub(crate) fn take_diverged(&mut self, diverged: Diverged) {
        self.diverged.push_back(diverged);
    }

    /// `Copier::add_diverged`; whether there was something.
    fn add_diverged(&mut self) -> bool {
        let Some(part) = self.diverged.pop_front() else { return false };
        if let (Some(pages), _) = &mut self.since {
            part.pages.iter().for_each(|&(first, count)| pages.insert_range(first, count));
        }
        if self.since.1.is_some() {
            part.blocks.iter().for_each(|&(first, count)| self.doubtful.insert_range(first, count));
        }
        if part.last {
            self.asks_diverged = false;
            let (pages, blocks) = (self.since.0.take(), self.since.1.take());
            if let Some(pages) = pages {
                self.frames(&pages.runs().collect::<Vec<_>>());
            }
            if let Some(blocks) = blocks {
                blocks.runs().for_each(|(first, count)| self.blocks(first, count));
                for block in blocks.iter() {
                    self.doubtful.remove(block);
                }
                let runs = self.doubtful.runs().map(|(first, count)| (first.0, count));
                self.block_pass = Some(Pass::of(runs.collect()));
            }
        }
        true
    }

    fn order(&mut self, dirty: &mut Changes) {
        let runs: Vec<_> = dirty.pages.runs().collect();
        let blocks = dirty.take_blocks();
        *dirty = dirty.fresh();
        self.busy = true;
        self.frames(&runs);
        blocks.into_iter().for_each(|(first, count)| self.blocks(first, count));
    }

    fn frames(&mut self, runs: &[(Gfn, u64)]) {
        for &(first, frames) in runs {
            for offset in (0..frames).step_by(CHUNK_PAGES as usize) {
                let count = CHUNK_PAGES.min(frames - offset);
                self.chunks.push_back(Chunk::Pages(Gfn(first.0 + offset), count));
            }
        }
    }

    fn blocks(&mut self, first: Block, blocks: u64) {
        for offset in (0..blocks).step_by(CHUNK_PAGES as usize) {
            let count = CHUNK_PAGES.min(blocks - offset);
            self.chunks.push_back(Chunk::Blocks(Block(first.0 + offset), count));
        }
    }

    /// A step of `Copier::memory_by_digests`.
    fn compare_memory(&mut self, memory: &colo_vmm::GuestMemory) -> Turn {
        let (at, asked) = self.pass.unwrap_or_default();
        if at == FRAMES {
            self.pass = None;
        } else if at == asked {
            let count = DIGEST_WINDOW.min(FRAMES - at);
            self.pass = Some((at, at + count));
            return Turn::Ask(Msg::DigestRequest(DigestRequest { first: Gfn(at), count }));
        } else if let Some(digests) = self.digests.pop_front() {
            assert_eq!(digests.first.0, at, "digests come in order");
            self.pass = Some((digests.end().0, asked));
            self.compare(digests, memory);
        } else {
            return Turn::Wait;
        }
        Turn::Done
    }

    /// A step of `Copier::disk_by_digests`, or of `doubtful_by_digests`.
    fn compare_disk(&mut self, disk: &dyn Disk, common: &mut Common) -> Turn {
        let Some(pass) = &mut self.block_pass else { return Turn::Done };
        let Some(&(first, count)) = pass.runs.front() else {
            self.block_pass = None;
            return Turn::Done;
        };
        let end = first + count;
        if pass.at == end {
            pass.runs.pop_front();
            pass.at = pass.runs.front().map_or(end, |(first, _)| *first);
            pass.asked = pass.at;
        } else if pass.at == pass.asked {
            let count = DIGEST_WINDOW.min(end - pass.at);
            pass.asked = pass.at + count;
            return Turn::Ask(Msg::BlockDigestRequest(DigestRequest { first: Block(pass.at), count }));
        } else if let Some(digests) = self.block_digests.pop_front() {
            assert_eq!(digests.first.0, pass.at, "digests come in order");
            pass.at = digests.end().0;
            common
                .counts
                .add("doubtful blocks", if self.doubtful.is_empty() { 0 } else { pass.at - digests.first.0 });
            self.compare_blocks(digests, disk);
        } else {
            return Turn::Wait;
        }
        Turn::Done
    }

    /// `Copier::compare_blocks`: sends what differs from what the secondary has.
    fn compare_blocks(&mut self, digests: BlockDigests, disk: &dyn Disk) {
        let mut first = digests.first.0;
        for range in digests.ranges {
            let end = first + range.count();
            match range {
                DigestRange::Zero { .. } => {
                    let mut at = Block(first);
                    while let Some(run) = disk.next_data(at).expect("the disk can be read")
                        && run.start.0 < end
                    {
                        at = run.end.min(Block(end));
                        self.blocks(run.start, at.0 - run.start.0);
                    }
                }
                DigestRange::Each(theirs) => {
                    let mut differing = BlockSet::new(BLOCKS);
                    for (block, theirs) in (first..).map(Block).zip(theirs) {
                        let mut bytes = [0; BLOCK_SIZE];
                        disk.read(block.offset(), &mut bytes).expect("a block of the disk");
                        if PageDigest::of(&bytes) != theirs {
                            differing.insert(block);
                        }
                    }
                    differing.runs().for_each(|(first, count)| self.blocks(first, count));
                }
            }
            first = end;
        }
    }

    /// Sends what differs from what the secondary has.
    fn compare(&mut self, digests: RangeDigests, memory: &colo_vmm::GuestMemory) {
        let mut first = digests.first.0;
        for range in digests.ranges {
            let frames = range.count();
            let mut differing = DirtySet::new(FRAMES);
            match range {
                DigestRange::Zero { .. } => {
                    let populated = self.populated.iter().flat_map(|&(at, count)| at.0..at.0 + count);
                    let inside = populated.filter(|gfn| (first..first + frames).contains(gfn));
                    inside.for_each(|gfn| {
                        differing.insert(Gfn(gfn));
                    });
                }
                DigestRange::Each(theirs) => {
                    for (gfn, theirs) in (first..).map(Gfn).zip(theirs) {
                        let mut page = [0; PAGE_SIZE];
                        memory.read_page(gfn, &mut page).expect("a frame of the guest");
                        if PageDigest::of(&page) != theirs {
                            differing.insert(gfn);
                        }
                    }
                }
            }
            let runs: Vec<_> = differing.runs().collect();
            self.frames(&runs);
            first += frames;
        }
    }
}
