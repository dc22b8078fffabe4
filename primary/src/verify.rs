//! Compares a copy with the guest while both go on, without a pause for it: what to look at next, what of it counts at
//! which point, what is tried again. Pure; whoever owns the guest feeds it, and [`look`] is done on a thread of its own.
//!
//! ```text
//!   epochs     ..... f ......|...... E ......|         pages are read somewhere in here
//!   reading          [----------------]                and only those are compared that no epoch from f to E wrote
//!   the list                          E: Verify        they hold at E what they held when they were read
//!   the copy                 applies E, compares, applies E+1
//! ```
//!
//! A page that was written is looked at again after all others, a few times; one that is written whenever it is looked at
//! is counted as not compared. Of the disk, what is under way at E counts as written: its bytes may be in the file, and
//! are in no epoch yet.

mod look;
#[cfg(test)]
mod tests;

use colo_common::{Gfn, PAGE_SIZE, Point};
use colo_proto::message::{
    MAX_DIFFERING_NAMED, MAX_VERIFY_DIGESTS, MAX_VERIFY_RANGES, Verified, Verify, VerifyPart, VerifyRange,
};
use colo_vmm::DirtySet;
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

pub use look::{DiskSource, MemorySource, Source, compare, look};

/// What is read in a second where nobody says how much: some hundredths of a core on both nodes.
pub const DEFAULT_RATE_MIB: u32 = 64;
/// More than any host reads.
const MAX_RATE_MIB: u32 = 1 << 20;
/// Parts of a second's reading that are read at one go: few pages are written while a part is.
const PARTS: u64 = 20;
/// The least that is read at one go.
const MIN_LOOK: u64 = 64;
/// How often what was written meanwhile is looked at again.
const RETRIES: u32 = 4;
/// Runs that are looked at at one go where only some are wanted.
const MAX_SPANS: usize = MAX_VERIFY_RANGES / 8;
/// Pages or blocks in them: more than an order has read. They are found by the thread that cuts.
const MAX_SPANNED: u64 = 1 << 16;

/// What is to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Frames of the memory's address map, if the memory is.
    pub frames: Option<u64>,
    /// Blocks of the disk, if the disk is.
    pub blocks: Option<u64>,
    /// MiB that are read in a second; 0 stands for [`DEFAULT_RATE_MIB`].
    pub rate_mib: u32,
}

/// What is to be looked at next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Memory or disk.
    pub part: VerifyPart,
    /// Where: the first and how many, ascending.
    pub spans: Vec<(u64, u64)>,
    /// How many pages or blocks are read at most.
    pub most: u64,
}

/// What was found so far of a memory or a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Which.
    pub part: VerifyPart,
    /// All frames or blocks.
    pub total: u64,
    /// Looked at in the first pass.
    pub looked_at: u64,
    /// Compared.
    pub compared: u64,
    /// Those of them that hold bytes.
    pub with_bytes: u64,
    /// Written whenever they were looked at; known at the end.
    pub not_compared: u64,
    /// Different in the copy.
    pub differing: u64,
    /// The first of those.
    pub places: Vec<u64>,
}

/// What was written since a point: runs of frames and of blocks, and blocks that a request is about to change.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written<'a> {
    /// Frames.
    pub pages: &'a [(Gfn, u64)],
    /// Blocks.
    pub blocks: &'a [Range<u64>],
    /// Blocks under way.
    pub under_way: &'a [Range<u64>],
}

/// An answer that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the secondary compared {found} pages or blocks at {point}, where {asked} were told")]
pub struct WrongAnswer {
    point: Point,
    found: u64,
    asked: u64,
}

/// The passes over a memory or a disk.
struct Pass {
    tally: Tally,
    /// Where the pass is.
    at: u64,
    /// What it is about; all in the first.
    only: Option<DirtySet>,
    /// What was written meanwhile.
    again: DirtySet,
    retries: u32,
}

/// What the list is made of that is looked at.
enum State {
    Idle,
    /// It is being read; what was written meanwhile.
    Reading {
        written: DirtySet,
        began: Duration,
    },
    /// It is read, and waits for the next epoch.
    Read {
        written: DirtySet,
        list: Verify,
    },
    /// It is sent.
    Asked {
        point: Point,
        told: u64,
        with_bytes: u64,
    },
}

/// A comparison.
pub struct Verification {
    rate: u64,
    /// Not before this is anything looked at.
    next: Duration,
    passes: VecDeque<Pass>,
    over: Vec<Tally>,
    state: State,
}

impl Verification {
    /// One that begins.
    pub fn new(wanted: Wanted) -> Self {
        let rate_mib =
            if wanted.rate_mib == 0 { DEFAULT_RATE_MIB } else { wanted.rate_mib.min(MAX_RATE_MIB) };
        let parts = [(VerifyPart::Memory, wanted.frames), (VerifyPart::Disk, wanted.blocks)];
        let passes = parts.into_iter().filter_map(|(part, total)| Some(Pass::new(part, total?)));
        Self {
            rate: u64::from(rate_mib) << 20,
            next: Duration::ZERO,
            passes: passes.collect(),
            over: Vec::new(),
            state: State::Idle,
        }
    }

    /// Whether all is done.
    pub fn is_over(&self) -> bool {
        self.passes.is_empty()
    }

    /// What was found so far.
    pub fn tallies(&self) -> Vec<Tally> {
        self.over.iter().chain(self.passes.iter().map(|pass| &pass.tally)).cloned().collect()
    }

    /// Whether something differs.
    pub fn differs(&self) -> bool {
        self.over.iter().chain(self.passes.iter().map(|pass| &pass.tally)).any(|tally| tally.differing > 0)
    }

    /// What is to be looked at now. From here on the epochs' writes are told by [`cut`](Self::cut).
    pub fn order(&mut self, now: Duration) -> Option<Order> {
        if !matches!(self.state, State::Idle) || now < self.next {
            return None;
        }
        while let Some(pass) = self.passes.front_mut() {
            let spans = pass.spans();
            if !spans.is_empty() {
                let (part, limit) = (pass.tally.part, pass.tally.total);
                self.state = State::Reading { written: DirtySet::new(limit), began: now };
                let most = (self.rate / PAGE_SIZE as u64 / PARTS).clamp(MIN_LOOK, MAX_VERIFY_DIGESTS as u64);
                return Some(Order { part, spans, most });
            }
            if !pass.try_again() {
                let done = self.passes.pop_front();
                self.over.extend(done.map(|pass| pass.tally));
            }
        }
        None
    }

    /// What was ordered is read.
    ///
    /// # Panics
    /// Nothing was ordered, or something else: an own bug.
    pub fn read(&mut self, list: Verify) {
        let State::Reading { written, began } = std::mem::replace(&mut self.state, State::Idle) else {
            panic!("a list that nobody ordered");
        };
        let pass = self.passes.front().expect("something is looked at");
        let within = list.first >= pass.at && list.end() <= pass.tally.total && list.end() > list.first;
        assert!(list.part == pass.tally.part && within, "a list of something else");
        let bytes = digests(&list) * PAGE_SIZE as u64;
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate);
        self.next = began + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.state = State::Read { written, list };
    }

    /// The epoch of `point` was cut, is on its way, and has all that was written since the one before. What is answered is
    /// to be sent right behind it.
    pub fn cut(&mut self, point: Point, changes: Written<'_>) -> Option<Verify> {
        let pass = self.passes.front_mut()?;
        let (part, total) = (pass.tally.part, pass.tally.total);
        match &mut self.state {
            State::Idle | State::Asked { .. } => return None,
            State::Reading { written, .. } => {
                changes.mark(part, total, written);
                return None;
            }
            State::Read { written, .. } => {
                changes.mark(part, total, written);
                if part == VerifyPart::Disk {
                    mark(changes.under_way.iter().map(|run| (run.start, run.end)), total, written);
                }
            }
        }
        let State::Read { written, list } = std::mem::replace(&mut self.state, State::Idle) else {
            return None;
        };
        let list = pass.leave_out(&list, &written);
        let told = list.told();
        if told == 0 {
            return None;
        }
        self.state = State::Asked { point, told, with_bytes: digests(&list) };
        Some(list)
    }

    /// The secondary has compared. An answer to something that was given up is passed over.
    ///
    /// # Errors
    /// It is not about what was asked; drop the link.
    pub fn answer(&mut self, answer: &Verified) -> Result<(), WrongAnswer> {
        let (State::Asked { point, told, with_bytes }, Some(pass)) = (&self.state, self.passes.front_mut())
        else {
            return Ok(());
        };
        if answer.point != *point {
            return Ok(());
        }
        if answer.compared != *told || answer.part != pass.tally.part {
            return Err(WrongAnswer { point: *point, found: answer.compared, asked: *told });
        }
        let tally = &mut pass.tally;
        tally.compared += answer.compared;
        tally.with_bytes += with_bytes;
        tally.differing += answer.differing;
        let room = MAX_DIFFERING_NAMED.saturating_sub(tally.places.len());
        tally.places.extend(answer.places.iter().take(room));
        self.state = State::Idle;
        Ok(())
    }
}

impl Pass {
    fn new(part: VerifyPart, total: u64) -> Self {
        let (looked_at, compared, with_bytes, not_compared, differing) = (0, 0, 0, 0, 0);
        let places = Vec::new();
        let tally = Tally { part, total, looked_at, compared, with_bytes, not_compared, differing, places };
        Self { tally, at: 0, only: None, again: DirtySet::new(total), retries: 0 }
    }

    /// What is left of it, or the next part of that.
    fn spans(&self) -> Vec<(u64, u64)> {
        let total = self.tally.total;
        let Some(only) = &self.only else {
            return if self.at < total { vec![(self.at, total - self.at)] } else { Vec::new() };
        };
        let (mut spans, mut at, mut room) = (Vec::new(), self.at, MAX_SPANNED);
        while spans.len() < MAX_SPANS
            && room > 0
            && let Some(first) = only.next(Gfn(at))
        {
            at = first.0 + 1;
            while at - first.0 < room && only.contains(Gfn(at)) {
                at += 1;
            }
            room -= at - first.0;
            spans.push((first.0, at - first.0));
        }
        spans
    }

    /// What was written meanwhile is looked at again; false if that is enough.
    fn try_again(&mut self) -> bool {
        if self.again.is_empty() || self.retries == RETRIES {
            self.tally.not_compared = self.again.len();
            return false;
        }
        let fresh = DirtySet::new(self.tally.total);
        self.only = Some(std::mem::replace(&mut self.again, fresh));
        (self.at, self.retries) = (0, self.retries + 1);
        true
    }

    /// The list without what was written, which is looked at again. One of too many ranges ends sooner.
    fn leave_out(&mut self, list: &Verify, written: &DirtySet) -> Verify {
        let mut short = Shortened { ranges: Vec::new(), at: list.first };
        for range in &list.ranges {
            if !short.take(range, written, &mut self.again) {
                break;
            }
        }
        self.at = short.at;
        if self.only.is_none() {
            self.tally.looked_at = self.at;
        }
        Verify { part: list.part, first: list.first, ranges: short.ranges }
    }
}

/// A list of which something is left out.
struct Shortened {
    ranges: Vec<VerifyRange>,
    at: u64,
}

impl Shortened {
    /// Takes a range; false once there is no room for more.
    fn take(&mut self, range: &VerifyRange, written: &DirtySet, again: &mut DirtySet) -> bool {
        let (first, end) = (self.at, self.at + range.count());
        if let VerifyRange::Skip(count) = range {
            return self.push(VerifyRange::Skip(*count));
        }
        while self.at < end {
            let next = written.next(Gfn(self.at)).map_or(end, |gfn| gfn.0.min(end));
            if next > self.at {
                let part = match range {
                    VerifyRange::Each(digests) => {
                        let part = (self.at - first) as usize..(next - first) as usize;
                        VerifyRange::Each(digests[part].to_vec())
                    }
                    _ => VerifyRange::Zero(next - self.at),
                };
                if !self.push(part) {
                    return false;
                }
                continue;
            }
            let at = self.at;
            let run = (at..end).take_while(|&at| written.contains(Gfn(at))).count() as u64;
            if !self.push(VerifyRange::Skip(run)) {
                return false;
            }
            again.insert_range(Gfn(at), run);
        }
        true
    }

    fn push(&mut self, range: VerifyRange) -> bool {
        let count = range.count();
        let is_full = self.ranges.len() == MAX_VERIFY_RANGES;
        match (self.ranges.last_mut(), range) {
            (Some(VerifyRange::Skip(before)), VerifyRange::Skip(more))
            | (Some(VerifyRange::Zero(before)), VerifyRange::Zero(more)) => *before += more,
            (_, _) if is_full => return false,
            (_, range) => self.ranges.push(range),
        }
        self.at += count;
        true
    }
}

impl Written<'_> {
    fn mark(&self, part: VerifyPart, total: u64, written: &mut DirtySet) {
        match part {
            VerifyPart::Memory => {
                mark(self.pages.iter().map(|&(gfn, count)| (gfn.0, gfn.0 + count)), total, written);
            }
            VerifyPart::Disk => {
                mark(self.blocks.iter().map(|run| (run.start, run.end)), total, written);
            }
        }
    }
}

fn mark(runs: impl Iterator<Item = (u64, u64)>, total: u64, written: &mut DirtySet) {
    for (first, end) in runs {
        let end = end.min(total);
        if first < end {
            written.insert_range(Gfn(first), end - first);
        }
    }
}

fn digests(list: &Verify) -> u64 {
    let each = list.ranges.iter().filter(|range| matches!(range, VerifyRange::Each(_)));
    each.map(VerifyRange::count).sum()
}
