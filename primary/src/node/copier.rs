//! The thread that reads guest memory behind the running guest and sends it to a secondary.

use colo_common::{Gfn, PAGE_SIZE, Point};
use colo_proto::message::{DigestRange, DigestRequest, PageDigest, RangeDigests, SeedMode};
use colo_vmm::page_batch::is_zero;
use colo_vmm::{DirtySet, GuestMemory, PageBatch, PagePool};
use crossbeam_channel::{Receiver, Sender};
use std::sync::Arc;

use super::Event;
use super::seeding::SeedEvent;
use crate::link::LinkHandle;
use crate::transfer::Transfer;

/// Pages copied and sent at once.
const CHUNK_PAGES: u64 = 256;
/// Frames whose digests are asked for at once: 256 MiB, for which the answer has at most 1 MiB.
const DIGEST_WINDOW: u64 = 1 << 16;
/// Pages between two reports of progress.
const REPORT_PAGES: u64 = 8192;

/// What is sent before the rounds of dirty pages.
pub(super) enum First {
    /// All populated memory.
    Populated,
    /// What differs, by digests that the secondary is asked for.
    Differing,
    /// What was written since this point: (first frame, frames).
    Since(Point, Vec<(Gfn, u64)>),
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
            Self::Since(point, runs) => {
                let pages: u64 = runs.iter().map(|(_, frames)| frames).sum();
                write!(f, "{pages} pages that were written since {point} are sent")
            }
        }
    }
}

/// What the thread is to do next.
pub(super) enum Order {
    /// Digests of what the secondary has; the first pass goes by them.
    Digests(RangeDigests),
    /// Send these frames.
    Round(Vec<(Gfn, u64)>),
}

/// The thread that reads guest memory and sends it.
pub(super) struct Copier {
    number: u64,
    memory: Arc<GuestMemory>,
    link: LinkHandle,
    inbox: Receiver<Order>,
    outbox: Sender<Event>,
    pool: PagePool,
    done: u64,
    total: u64,
}

/// Why a copier stops: the link or the node is gone, or memory cannot be read.
struct Stopped(String);

impl Copier {
    /// A copier for the link with this number.
    pub(super) fn new(
        number: u64,
        memory: Arc<GuestMemory>,
        link: LinkHandle,
        inbox: Receiver<Order>,
        outbox: Sender<Event>,
    ) -> Self {
        Self { number, memory, link, inbox, outbox, pool: PagePool::default(), done: 0, total: 0 }
    }

    /// Copies until the node drops the seed.
    pub(super) fn run(mut self, begin: Transfer, first: First) {
        if let Err(Stopped(reason)) = self.copy(begin, first) {
            self.tell(SeedEvent::Failed(reason));
        }
    }

    fn copy(&mut self, begin: Transfer, first: First) -> Result<(), Stopped> {
        self.send(begin)?;
        let (runs, compared) = match first {
            First::Since(_, runs) => (runs, false),
            First::Populated => (self.populated()?, false),
            First::Differing => (self.populated()?, true),
        };
        self.total = runs.iter().map(|&(_, frames)| frames).sum();
        if compared { self.by_digests(&runs) } else { self.frames(&runs) }?;
        // J must not wait behind what is only queued.
        self.link.drain().map_err(Stopped)?;
        self.tell(SeedEvent::Idle);
        while let Ok(order) = self.inbox.recv() {
            if let Order::Round(runs) = order {
                self.total += runs.iter().map(|&(_, frames)| frames).sum::<u64>();
                self.frames(&runs)?;
                self.link.drain().map_err(Stopped)?;
                self.tell(SeedEvent::Idle);
            }
        }
        Ok(())
    }

    fn populated(&self) -> Result<Vec<(Gfn, u64)>, Stopped> {
        self.memory.populated().map_err(|e| Stopped(e.to_string()))
    }

    /// A frame that is equal is passed over: it would be dirty if it were written after it was looked at.
    fn by_digests(&mut self, populated: &[(Gfn, u64)]) -> Result<(), Stopped> {
        let limit = self.memory.layout().frame_limit();
        let mut at = 0;
        while at < limit {
            let window = DIGEST_WINDOW.min(limit - at);
            self.link.request_digests(DigestRequest { first: Gfn(at), count: window }).map_err(Stopped)?;
            let end = at + window;
            while at < end {
                let digests = match self.inbox.recv() {
                    Ok(Order::Digests(digests)) => digests,
                    Ok(Order::Round(_)) => continue,
                    Err(_) => return Err(Stopped("the seed was given up".to_owned())),
                };
                if digests.first.0 != at || digests.end().0 > end || digests.end().0 == at {
                    return Err(Stopped(format!("digests from {} where {at:#x} was next", digests.first)));
                }
                at = digests.end().0;
                self.compare(digests, populated)?;
            }
        }
        Ok(())
    }

    /// Sends what differs from what the secondary has.
    fn compare(&mut self, digests: RangeDigests, populated: &[(Gfn, u64)]) -> Result<(), Stopped> {
        let mut first = digests.first.0;
        for range in digests.ranges {
            let frames = range.count();
            match range {
                DigestRange::Zero { .. } => self.frames(&overlap(populated, first, frames))?,
                DigestRange::Each(theirs) => {
                    let mut differing = DirtySet::new(self.memory.layout().frame_limit());
                    for (gfn, theirs) in (first..).map(Gfn).zip(theirs) {
                        let mut page = [0; PAGE_SIZE];
                        self.memory.read_page(gfn, &mut page).map_err(|e| Stopped(e.to_string()))?;
                        if PageDigest::of(&page) != theirs {
                            differing.insert(gfn);
                        }
                    }
                    self.done += frames - differing.len();
                    self.frames(&differing.runs().collect::<Vec<_>>())?;
                }
            }
            first += frames;
        }
        Ok(())
    }

    fn frames(&mut self, runs: &[(Gfn, u64)]) -> Result<(), Stopped> {
        for &(first, frames) in runs {
            for offset in (0..frames).step_by(CHUNK_PAGES as usize) {
                let count = CHUNK_PAGES.min(frames - offset);
                self.chunk(Gfn(first.0 + offset), count)?;
                self.done += count;
                if self.done % REPORT_PAGES < count {
                    self.tell(SeedEvent::Progress { done: self.done, total: self.total.max(self.done) });
                }
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

    fn send(&self, transfer: Transfer) -> Result<(), Stopped> {
        self.link.send_waiting(transfer).map_err(Stopped)
    }

    fn tell(&self, event: SeedEvent) {
        drop(self.outbox.send(Event::Seed(self.number, event)));
    }
}

/// The parts of `runs` (ascending) that lie in `frames` frames from `first` on.
fn overlap(runs: &[(Gfn, u64)], first: u64, frames: u64) -> Vec<(Gfn, u64)> {
    let end = first + frames;
    let at = runs.partition_point(|&(start, count)| start.0 + count <= first);
    let parts = runs[at..].iter().take_while(|(start, _)| start.0 < end);
    parts
        .map(|&(start, count)| {
            let (from, to) = (start.0.max(first), end.min(start.0 + count));
            (Gfn(from), to - from)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::overlap;
    use colo_common::Gfn;

    #[test]
    fn runs_are_cut_to_a_range() {
        let runs = [(Gfn(2), 3), (Gfn(10), 10)];
        assert_eq!(overlap(&runs, 0, 100), runs);
        assert_eq!(overlap(&runs, 3, 9), [(Gfn(3), 2), (Gfn(10), 2)]);
        assert_eq!(overlap(&runs, 5, 5), []);
        assert_eq!(overlap(&runs, 15, 1), [(Gfn(15), 1)]);
        assert_eq!(overlap(&runs, 20, 9), []);
    }
}
