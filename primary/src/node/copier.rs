//! The thread that reads the guest's memory and disk behind the running guest and sends them to a secondary.

mod compare;

use colo_common::{Block, Gfn, Point};
use colo_proto::message::SeedMode;
use colo_vmm::page_batch::is_zero;
use colo_vmm::{Disk, DiskWrite, GuestMemory, PageBatch, PagePool};
use crossbeam_channel::{Receiver, Sender};
use std::sync::Arc;

use super::Event;
use super::seeding::SeedEvent;
use crate::changes::{Changes, read_blocks};
use crate::link::{Digests, LinkHandle};
use crate::transfer::Transfer;

/// Pages copied and sent at once.
const CHUNK_PAGES: u64 = 256;
/// Pages between two reports of progress.
const REPORT_PAGES: u64 = 8192;

/// What is sent before the rounds of what changed meanwhile.
pub(super) enum First {
    /// All populated memory, and the blocks that differ.
    Populated,
    /// What differs, by digests that the secondary is asked for.
    Differing,
    /// What was written since this point.
    Since(Point, Round),
}

impl First {
    /// As the secondary is told.
    pub(super) fn mode(&self) -> SeedMode {
        match self {
            Self::Populated => SeedMode::Full,
            Self::Differing => SeedMode::Resync,
            Self::Since(point, _) => SeedMode::Since(*point),
        }
    }
}

impl std::fmt::Display for First {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Populated => f.write_str("all populated memory is sent"),
            Self::Differing => f.write_str("what differs is sent"),
            Self::Since(point, round) => {
                let (pages, blocks) = (sum(&round.pages), sum(&round.blocks));
                write!(f, "{pages} pages and {blocks} blocks that were written since {point} are sent")
            }
        }
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
    /// Digests of what the secondary has; the first pass goes by them.
    Digests(Digests),
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
        match first {
            First::Since(_, round) => self.round(&round)?,
            First::Populated => self.everything(false)?,
            First::Differing => self.everything(true)?,
        }
        self.rest()?;
        while let Ok(order) = self.inbox.recv() {
            if let Order::Round(round) = order {
                self.round(&round)?;
                self.rest()?;
            }
        }
        Ok(())
    }

    /// J must not wait behind what is only queued.
    fn rest(&self) -> Result<(), Stopped> {
        self.link.drain().map_err(Stopped)?;
        self.tell(SeedEvent::Idle);
        Ok(())
    }

    fn everything(&mut self, compared: bool) -> Result<(), Stopped> {
        let populated = self.memory.populated().map_err(|e| Stopped(e.to_string()))?;
        let disk = self.disk.clone();
        self.total = sum(&populated) + disk.as_deref().map_or(Ok(0), compare::data_blocks)?;
        if compared { self.memory_by_digests(&populated) } else { self.frames(&populated) }?;
        disk.map_or(Ok(()), |disk| self.disk_by_digests(&*disk))
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
