//! The thread that reads the guest's memory and disk behind the running guest and sends them to a secondary.

mod compare;

use colo_common::{Block, Gfn};
use colo_proto::message::{SeedMode, SeedPart};
use colo_vmm::page_batch::is_zero;
use colo_vmm::{BlockSet, DirtySet, Disk, DiskWrite, GuestMemory, PageBatch, PagePool};
use crossbeam_channel::{Receiver, Sender};
use std::sync::Arc;

use super::Event;
use super::seeding::SeedEvent;
use crate::changes::{Changes, read_blocks};
use crate::link::{Answer, LinkHandle};
use crate::transfer::Transfer;

/// Pages copied and sent at once.
const CHUNK_PAGES: u64 = 256;
/// Pages between two reports of progress.
const REPORT_PAGES: u64 = 8192;

/// What is sent before the rounds of what changed meanwhile.
pub(super) struct First {
    /// As the secondary is told.
    pub(super) mode: SeedMode,
    /// Why that is more than what was written since; empty if it is not.
    pub(super) why: String,
    /// Pages changed since the point that the memory begins from, if it begins from one.
    pub(super) pages: Option<DirtySet>,
    /// The same of the disk.
    pub(super) blocks: Option<BlockSet>,
}

/// Where the secondary's disk may hold something else than the point that the seed begins from: whole extents, of which
/// the guest there has written some.
type Doubtful = BlockSet;

impl std::fmt::Display for First {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let part = |part, what, changed: Option<u64>| match part {
            SeedPart::All => format!("all {what}"),
            SeedPart::Differing => format!("the {what} that differ"),
            SeedPart::Since(point) => format!("{} {what} changed since {point}", changed.unwrap_or(0)),
        };
        let pages = part(self.mode.memory, "pages", self.pages.as_ref().map(DirtySet::len));
        let blocks = part(self.mode.disk, "blocks", self.blocks.as_ref().map(BlockSet::len));
        write!(f, "{pages}, {blocks}")
    }
}

/// Pages and blocks to send, as runs: the first and how many.
pub(super) struct Round {
    pages: Vec<(Gfn, u64)>,
    blocks: Vec<(Block, u64)>,
}

impl Round {
    /// Everything that has changed, which is none after that.
    pub(super) fn of(changes: &mut Changes) -> Self {
        let round = Self { pages: changes.pages.runs().collect(), blocks: changes.take_blocks() };
        changes.pages.clear();
        round
    }

    fn len(&self) -> u64 {
        sum(&self.pages) + sum(&self.blocks)
    }
}

fn sum<N>(runs: &[(N, u64)]) -> u64 {
    runs.iter().map(|(_, count)| count).sum()
}

/// What the thread is to do next.
pub(super) enum Order {
    /// What the secondary was asked for; the first pass goes by it.
    Answer(Answer),
    /// Send these.
    Round(Round),
}

/// The thread that reads the guest and sends it.
pub(super) struct Copier {
    number: u64,
    memory: Arc<GuestMemory>,
    disk: Option<Arc<dyn Disk>>,
    link: LinkHandle,
    inbox: Receiver<Order>,
    outbox: Sender<Event>,
    pool: PagePool,
    done: u64,
    total: u64,
}

/// Why a copier stops: the link or the node is gone, or something cannot be read.
struct Stopped(String);

impl Copier {
    /// A copier for the link with this number.
    pub(super) fn new(
        number: u64,
        (memory, disk): (Arc<GuestMemory>, Option<Arc<dyn Disk>>),
        link: LinkHandle,
        inbox: Receiver<Order>,
        outbox: Sender<Event>,
    ) -> Self {
        let pool = PagePool::default();
        Self { number, memory, disk, link, inbox, outbox, pool, done: 0, total: 0 }
    }

    /// Copies until the node drops the seed.
    pub(super) fn run(mut self, begin: Transfer, first: First) {
        if let Err(Stopped(reason)) = self.copy(begin, first) {
            self.tell(SeedEvent::Failed(reason));
        }
    }

    fn copy(&mut self, begin: Transfer, first: First) -> Result<(), Stopped> {
        self.send(begin)?;
        self.first(first)?;
        self.rest()?;
        while let Ok(order) = self.inbox.recv() {
            if let Order::Round(round) = order {
                self.round(&round)?;
                self.rest()?;
            }
        }
        Ok(())
    }

    fn first(&mut self, mut first: First) -> Result<(), Stopped> {
        let mut doubtful = Doubtful::new(first.blocks.as_ref().map_or(0, BlockSet::blocks));
        if first.mode.asks_diverged() {
            self.add_diverged(&mut first, &mut doubtful)?;
        }
        let populated = match first.pages {
            Some(_) => Vec::new(),
            None => self.memory.populated().map_err(|e| Stopped(e.to_string()))?,
        };
        let disk = self.disk.clone();
        let changed = first.pages.as_ref().map_or(sum(&populated), DirtySet::len);
        self.total = changed
            + match (&first.blocks, disk.as_deref()) {
                (Some(blocks), _) => blocks.len() + doubtful.len(),
                (None, disk) => disk.map_or(Ok(0), compare::data_blocks)?,
            };
        match (first.mode.memory, first.pages) {
            (_, Some(pages)) => self.frames(&pages.runs().collect::<Vec<_>>()),
            (SeedPart::All, None) => self.frames(&populated),
            (_, None) => self.memory_by_digests(&populated),
        }?;
        match (disk, first.blocks) {
            (None, _) => Ok(()),
            (Some(disk), Some(blocks)) => {
                blocks.runs().try_for_each(|(first, count)| self.blocks(&*disk, first, count))?;
                self.doubtful_by_digests(&*disk, &doubtful)
            }
            (Some(disk), None) => self.disk_by_digests(&*disk),
        }
    }

    /// Pages that the secondary may hold otherwise than at the point that this seed begins from are sent too. Of blocks
    /// it knows only extents: those that were changed here are sent, and the others are `doubtful`.
    fn add_diverged(&self, first: &mut First, doubtful: &mut Doubtful) -> Result<(), Stopped> {
        loop {
            let part = match self.inbox.recv() {
                Ok(Order::Answer(Answer::Diverged(part))) => part,
                Ok(_) => return Err(Stopped("something else than where the copy diverged".to_owned())),
                Err(_) => return Err(Stopped("the seed was given up".to_owned())),
            };
            let beyond = || Stopped("the copy diverged where the guest has nothing".to_owned());
            if let Some(pages) = &mut first.pages {
                let frames = pages.frames();
                for &(gfn, count) in &part.pages {
                    gfn.0.checked_add(count).filter(|&end| end <= frames).ok_or_else(beyond)?;
                    pages.insert_range(gfn, count);
                }
            }
            if let Some(blocks) = &first.blocks {
                let most = blocks.blocks();
                for &(block, count) in &part.blocks {
                    block.0.checked_add(count).filter(|&end| end <= most).ok_or_else(beyond)?;
                    doubtful.insert_range(block, count);
                }
            }
            if part.last {
                break;
            }
        }
        // What was changed here is sent, even if the copy happens to hold the same: else it would not know that it was.
        for block in first.blocks.iter().flat_map(BlockSet::iter) {
            doubtful.remove(block);
        }
        Ok(())
    }

    /// J must not wait behind what is only queued.
    fn rest(&self) -> Result<(), Stopped> {
        self.link.drain().map_err(Stopped)?;
        self.tell(SeedEvent::Idle);
        Ok(())
    }

    fn round(&mut self, round: &Round) -> Result<(), Stopped> {
        self.total += round.len();
        self.frames(&round.pages)?;
        let Some(disk) = self.disk.clone() else { return Ok(()) };
        for &(first, count) in &round.blocks {
            self.blocks(&*disk, first, count)?;
        }
        Ok(())
    }

    fn frames(&mut self, runs: &[(Gfn, u64)]) -> Result<(), Stopped> {
        for &(first, frames) in runs {
            for offset in (0..frames).step_by(CHUNK_PAGES as usize) {
                let count = CHUNK_PAGES.min(frames - offset);
                self.chunk(Gfn(first.0 + offset), count)?;
                self.count(count);
            }
        }
        Ok(())
    }

    fn chunk(&mut self, first: Gfn, count: u64) -> Result<(), Stopped> {
        let batch = PageBatch::copy(&self.memory, vec![(first, count)], &self.pool);
        let batch = batch.map_err(|e| Stopped(e.to_string()))?;
        if batch.iter().all(|(_, page)| is_zero(page)) {
            return self.send(Transfer::SeedZeros(vec![(first, count)]));
        }
        self.send(Transfer::SeedPages(batch))
    }

    /// A run of blocks as they are now.
    fn blocks(&mut self, disk: &dyn Disk, first: Block, count: u64) -> Result<(), Stopped> {
        let (mut sent, mut done) = (Ok(()), 0);
        let read = read_blocks(disk, first, count, |write: DiskWrite| {
            done += write.blocks().end.0 - write.blocks().start.0;
            if sent.is_ok() {
                sent = self.send(Transfer::SeedBlocks(vec![write]));
            }
        });
        read.map_err(|e| Stopped(format!("the guest's disk cannot be read: {e}")))?;
        self.count(done);
        sent
    }

    fn count(&mut self, count: u64) {
        self.done += count;
        if self.done % REPORT_PAGES < count {
            self.tell(SeedEvent::Progress { done: self.done, total: self.total.max(self.done) });
        }
    }

    fn send(&self, transfer: Transfer) -> Result<(), Stopped> {
        self.link.send_waiting(transfer).map_err(Stopped)
    }

    fn tell(&self, event: SeedEvent) {
        drop(self.outbox.send(Event::Seed(self.number, event)));
    }
}
