//! The world outside: what it has seen, and what must hold of that.

use colo_common::{Point, ReplicaId};
use colo_primary::release::{Sink, end_of};
use colo_vmm::egress::{Output, OutputItem, OutputPosition};
use std::collections::{BTreeMap, HashMap};

use crate::plan::Counts;

/// Bytes of one word of console output, and of each of the three numbers of a frame.
pub(crate) const WORD: usize = 8;

/// What is out, and what is known of every point.
#[derive(Debug, Default)]
pub(crate) struct World {
    console: Vec<u8>,
    frames: Vec<Vec<u8>>,
    /// Where the output of each point ends.
    ends: BTreeMap<Point, OutputPosition>,
    /// The newest point that each copy has acked.
    acked: HashMap<ReplicaId, Point>,
    /// Pieces of output are numbered, so that no two are the same.
    stamp: u64,
    pub(crate) counts: Counts,
    broken: Option<String>,
}

impl World {
    /// A number that nothing said before.
    pub(crate) fn stamp(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    /// A rule is broken; the first counts.
    pub(crate) fn broken(&mut self, what: impl FnOnce() -> String) {
        self.broken.get_or_insert_with(what);
    }

    /// The first rule that was broken.
    pub(crate) fn verdict(&self) -> Result<(), String> {
        self.broken.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn cut(&mut self, point: Point, end: OutputPosition) {
        if self.ends.insert(point, end).is_some_and(|before| before != end) {
            self.broken(|| format!("{point} names two cuts"));
        }
    }

    /// A copy gives its word.
    pub(crate) fn acked(&mut self, replica: ReplicaId, point: Point) {
        self.counts.add("epochs acked");
        let newest = self.acked.entry(replica).or_insert(point);
        *newest = point.max(*newest);
    }

    /// A protected runner has let out everything before `released`.
    pub(crate) fn check_acked(&mut self, replica: ReplicaId, released: OutputPosition) {
        let held = self.acked.get(&replica).and_then(|point| self.ends.get(point)).copied();
        if !held.is_some_and(|held| released.console <= held.console && released.frames <= held.frames) {
            self.broken(|| format!("{released:?} is out, and the copy has acked up to {held:?}"));
        }
    }

    /// A node is about to run on from `position`: everything that is out must be before it.
    pub(crate) fn check_lacks(&mut self, point: Point, position: OutputPosition) {
        let (console, frames) = (self.console.len() as u64, self.frames.len() as u64);
        if console > position.console || frames > position.frames {
            self.broken(|| {
                format!("{point} has output up to {position:?}, and ({console}, {frames}) is out")
            });
        }
    }

    /// Everything before `position` is said to be out.
    pub(crate) fn check_out(&mut self, position: OutputPosition) {
        let (console, frames) = (self.console.len() as u64, self.frames.len() as u64);
        if console < position.console || frames < position.frames {
            self.broken(|| format!("{position:?} is said to be out, and ({console}, {frames}) is"));
        }
    }

    fn take(&mut self, output: &Output) {
        let mut at = output.start;
        for item in &output.items {
            match item {
                OutputItem::Console(bytes) => self.take_console(at, bytes),
                OutputItem::Frame { bytes, .. } => self.take_frame(at, bytes),
            }
            at = end_of(&Output { start: at, items: vec![item.clone()] });
        }
    }

    fn take_console(&mut self, at: OutputPosition, bytes: &[u8]) {
        self.counts.add_many("bytes let out", bytes.len() as u64);
        let (at, known) = (at.console as usize, self.console.len());
        if at > known {
            return self.broken(|| format!("console bytes {known} to {at} are missing"));
        }
        let both = (known - at).min(bytes.len());
        if self.console[at..at + both] != bytes[..both] {
            self.broken(|| format!("console bytes from {at} on were others before"));
        }
        self.counts.add_many("let out again", u64::from(both > 0));
        self.console.extend(&bytes[both..]);
    }

    fn take_frame(&mut self, at: OutputPosition, bytes: &[u8]) {
        self.counts.add("frames let out");
        let word = |n: usize| {
            let word = bytes[n * WORD..(n + 1) * WORD].try_into().expect("a word");
            u64::from_le_bytes(word)
        };
        let made = OutputPosition { console: word(1), frames: word(2) };
        if made != at {
            self.broken(|| format!("a frame was made at {made:?} and is let out at {at:?}"));
        }
        let (place, known) = (at.frames as usize, self.frames.len());
        match self.frames.get(place) {
            None if place == known => self.frames.push(bytes.to_vec()),
            None => self.broken(|| format!("frames {known} to {place} are missing")),
            Some(before) if before != bytes => self.broken(|| format!("frame {place} was another before")),
            Some(_) => self.counts.add("let out again"),
        }
    }
}

/// Where one run of the guest on one node lets its output out.
pub(crate) struct Outlet<'a> {
    pub(crate) world: &'a mut World,
    /// Where the next of it must begin.
    pub(crate) next: &'a mut OutputPosition,
}

impl Sink for Outlet<'_> {
    fn let_out(&mut self, output: Output) {
        if output.start != *self.next {
            let (start, next) = (output.start, *self.next);
            self.world.broken(|| format!("output from {start:?} on is let out where {next:?} was next"));
        }
        *self.next = end_of(&output);
        self.world.take(&output);
    }
}

/// Takes what a follower hears to be out.
pub(crate) struct Known;

impl Sink for Known {
    fn let_out(&mut self, _output: Output) {}
}
