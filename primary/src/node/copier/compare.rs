//! The first pass where histories do not tell what differs: the secondary says by digests what it has, of memory where
//! its copy is a base, of the disk always. So a seed that broke off goes on where it was, and an empty disk costs
//! nothing.

use colo_common::limits::MAX_DIGESTS_ASKED;
use colo_common::{BLOCK_SIZE, Block, Gfn, PAGE_SIZE};
use colo_proto::message::{DigestRange, DigestRequest, PageDigest, RangeDigests};
use colo_proto::pages::Place;
use colo_vmm::{BlockSet, DirtySet, Disk};

use super::{Copier, Order, Stopped};
use crate::link::{Answer, Ask};

/// Runs that are closer to each other are asked for as one: a MiB of digests costs less than a round trip.
const JOINED_GAP: u64 = 256;

/// Blocks that may hold something.
pub(super) fn data_blocks(disk: &dyn Disk) -> Result<u64, Stopped> {
    let (mut count, mut at) = (0, Block(0));
    while let Some(run) = disk.next_data(at).map_err(|e| unreadable(&e))? {
        count += run.end.0 - run.start.0;
        at = run.end;
    }
    Ok(count)
}

fn unreadable(error: &std::io::Error) -> Stopped {
    Stopped(format!("the guest's disk cannot be read: {error}"))
}

impl Copier {
    /// A frame that is equal is passed over: it would be dirty if it were written after it was looked at.
    pub(super) fn memory_by_digests(&mut self, populated: &[(Gfn, u64)]) -> Result<(), Stopped> {
        let limit = self.memory.layout().frame_limit();
        let ask = |first, count| Ask::Pages(DigestRequest { first: Gfn(first), count });
        let pages = |digests| match digests {
            Answer::Pages(digests) => Some(digests),
            _ => None,
        };
        self.by_digests(&[(0, limit)], ask, pages, |this, digests| this.compare_pages(digests, populated))
    }

    /// The same of the disk.
    pub(super) fn disk_by_digests(&mut self, disk: &dyn Disk) -> Result<(), Stopped> {
        self.blocks_by_digests(disk, &[(0, disk.bytes() / BLOCK_SIZE as u64)], |_| true)
    }

    /// The same of some blocks of the disk. Neighbours are looked at together with what lies between them.
    pub(super) fn doubtful_by_digests(
        &mut self,
        disk: &dyn Disk,
        doubtful: &BlockSet,
    ) -> Result<(), Stopped> {
        let runs = joined(doubtful.runs().map(|(first, count)| (first.0, count)));
        self.blocks_by_digests(disk, &runs, |block| doubtful.contains(block))
    }

    fn blocks_by_digests(
        &mut self,
        disk: &dyn Disk,
        runs: &[(u64, u64)],
        counts: impl Fn(Block) -> bool,
    ) -> Result<(), Stopped> {
        let ask = |first, count| Ask::Blocks(DigestRequest { first: Block(first), count });
        let blocks = |digests| match digests {
            Answer::Blocks(digests) => Some(digests),
            _ => None,
        };
        self.by_digests(runs, ask, blocks, |this, digests| this.compare_blocks(digests, disk, &counts))
    }

    /// Asks for digests of these runs, window by window, and compares what comes.
    fn by_digests<N: Place>(
        &mut self,
        runs: &[(u64, u64)],
        ask: impl Fn(u64, u64) -> Ask,
        wanted: impl Fn(Answer) -> Option<RangeDigests<N>>,
        mut compare: impl FnMut(&mut Self, RangeDigests<N>) -> Result<(), Stopped>,
    ) -> Result<(), Stopped> {
        for (first, window) in windows(runs) {
            self.link.request_digests(ask(first, window)).map_err(Stopped)?;
            let (mut at, end) = (first, first + window);
            while at < end {
                let digests = match self.inbox.recv() {
                    Ok(Order::Answer(answer)) => answer,
                    // Nobody was told that this pass has ended: what it would send is taken out of the open set, and lost.
                    Ok(Order::Round(_)) => return Err(Stopped("a round came before its time".to_owned())),
                    Err(_) => return Err(Stopped("the seed was given up".to_owned())),
                };
                let digests =
                    wanted(digests).ok_or_else(|| Stopped("digests of something else".to_owned()))?;
                let to = digests.end().number();
                if digests.first.number() != at || to > end || to == at {
                    return Err(Stopped(format!("digests from {} where {at:#x} was next", digests.first)));
                }
                at = to;
                compare(self, digests)?;
            }
        }
        Ok(())
    }

    /// Sends what differs from what the secondary has.
    fn compare_pages(&mut self, digests: RangeDigests, populated: &[(Gfn, u64)]) -> Result<(), Stopped> {
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

    /// The same of the blocks that count.
    fn compare_blocks(
        &mut self,
        digests: RangeDigests<Block>,
        disk: &dyn Disk,
        counts: impl Fn(Block) -> bool,
    ) -> Result<(), Stopped> {
        let mut first = digests.first.0;
        for range in digests.ranges {
            let end = first + range.count();
            let mut differing = BlockSet::new(end);
            match range {
                DigestRange::Zero { .. } => {
                    let mut at = Block(first);
                    while let Some(run) = disk.next_data(at).map_err(|e| unreadable(&e))?
                        && run.start.0 < end
                    {
                        at = run.end.min(Block(end));
                        (run.start.0..at.0).map(Block).filter(|block| counts(*block)).for_each(|block| {
                            differing.insert(block);
                        });
                    }
                }
                DigestRange::Each(theirs) => {
                    let pairs = (first..).map(Block).zip(theirs);
                    for (block, theirs) in pairs.filter(|(block, _)| counts(*block)) {
                        let mut bytes = [0; BLOCK_SIZE];
                        disk.read(block.offset(), &mut bytes).map_err(|e| unreadable(&e))?;
                        if PageDigest::of(&bytes) != theirs {
                            differing.insert(block);
                        }
                    }
                    self.done += end - first - differing.len();
                }
            }
            for (first, count) in differing.runs().collect::<Vec<_>>() {
                self.blocks(disk, first, count)?;
            }
            first = end;
        }
        Ok(())
    }
}

/// Runs (ascending) that are close to each other as one.
fn joined(runs: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (first, count) in runs {
        match joined.last_mut().filter(|(start, before)| first - (*start + *before) <= JOINED_GAP) {
            Some((start, before)) => *before = first + count - *start,
            None => joined.push((first, count)),
        }
    }
    joined
}

/// Runs in pieces that one question may be about.
fn windows(runs: &[(u64, u64)]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let window = MAX_DIGESTS_ASKED;
    runs.iter().flat_map(move |&(first, count)| {
        (0..count).step_by(window as usize).map(move |at| (first + at, window.min(count - at)))
    })
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
    use super::{Copier, JOINED_GAP, Order, Stopped, joined, overlap, windows};
    use crate::changes::Changes;
    use crate::link::LinkHandle;
    use crate::node::copier::Round;
    use colo_common::Gfn;
    use colo_common::limits::MAX_DIGESTS_ASKED;
    use colo_vmm::GuestMemory;
    use std::sync::Arc;

    #[test]
    fn runs_are_cut_to_a_range() {
        let runs = [(Gfn(2), 3), (Gfn(10), 10)];
        assert_eq!(overlap(&runs, 0, 100), runs);
        assert_eq!(overlap(&runs, 3, 9), [(Gfn(3), 2), (Gfn(10), 2)]);
        assert_eq!(overlap(&runs, 5, 5), []);
        assert_eq!(overlap(&runs, 15, 1), [(Gfn(15), 1)]);
        assert_eq!(overlap(&runs, 20, 9), []);
    }

    #[test]
    fn close_runs_are_asked_for_at_once_and_long_ones_in_pieces() {
        let far = 7 + JOINED_GAP + 1;
        let runs = [(0, 2), (4, 3), (far, 1), (far + 1 + JOINED_GAP, 5)];
        assert_eq!(joined(runs.into_iter()), [(0, 7), (far, JOINED_GAP + 6)]);
        let pieces: Vec<_> = windows(&[(3, 1), (9, MAX_DIGESTS_ASKED + 1)]).collect();
        assert_eq!(pieces, [(3, 1), (9, MAX_DIGESTS_ASKED), (9 + MAX_DIGESTS_ASKED, 1)]);
        assert_eq!(windows(&[]).count(), 0);
    }

    #[test]
    fn a_round_before_the_first_pass_has_ended_is_not_lost_silently() {
        let memory = Arc::new(GuestMemory::new(4 << 20).unwrap());
        let mut changes = Changes::none(memory.layout().frame_limit(), 0);
        changes.pages.insert(Gfn(3));
        let (link, _end) = LinkHandle::new();
        let (orders, inbox) = crossbeam_channel::bounded(1);
        let (outbox, _told) = crossbeam_channel::bounded(1);
        orders.send(Order::Round(Round::of(&mut changes))).unwrap();
        drop(orders);
        let mut copier = Copier::new(1, (memory, None), link, inbox, outbox);
        let Err(Stopped(why)) = copier.memory_by_digests(&[]) else { panic!("the round is lost") };
        assert!(why.contains("a round came before its time"), "{why}");
    }
}
