//! What the world outside has seen, and what must hold of it: one history. Every stretch in which one guest runs on one
//! node is a *stint*; it forks off the one before at the point that it was promoted from. A byte or frame belongs to
//! the stint that made it, and no two stints may ever let out the same one differently or as their own.
//!
//! A guest that an operator has run by force begins a *life* of its own, with what was out at its point. What was out or
//! acked after that is given up, and nothing else: of the life before, nothing more may go out than that.

use colo_common::{Point, Term};
use colo_primary::release::Sink;
use colo_vmm::egress::{Output, OutputItem, OutputPosition};
use colo_vmm::state::MachineState;
use colo_vmm::synthetic::SyntheticGuest;
use colo_vmm::{GuestMemory, ProtectedGuest};
use std::collections::BTreeMap;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// A guest at a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instant {
    pub(crate) memory: u128,
    pub(crate) machine: u128,
    /// What the disk holds once what is under way has ended.
    pub(crate) disk: Option<u128>,
    pub(crate) output: OutputPosition,
    pub(crate) stint: usize,
}

#[derive(Debug)]
struct Stint {
    node: usize,
    life: usize,
    /// The stint before, and where its output ends.
    parent: Option<(usize, OutputPosition)>,
}

/// From one power-on, or promotion by force, to the loss of all that was in memory.
#[derive(Debug, Default)]
struct Life {
    console: Vec<(u8, usize)>,
    frames: Vec<(u64, usize)>,
    /// It was given up: what is acked may still go out, as from a slow network.
    until: Option<OutputPosition>,
}

/// How a stint begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begins {
    pub(crate) node: usize,
    /// Of the register's entry by which it runs.
    pub(crate) term: Term,
    /// By an operator's word alone.
    pub(crate) forced: bool,
}

/// The world outside, and the simulation's own account of what each point is.
#[derive(Debug, Default)]
pub(crate) struct Outside {
    lives: Vec<Life>,
    stints: Vec<Stint>,
    cuts: BTreeMap<Point, Instant>,
    /// The newest point that a runner knows to be acked, while it was protected.
    acked: Option<Point>,
    /// Output up to the newest point of this life that was acked, whoever has heard of it.
    said: OutputPosition,
    /// Acked output was given up when the last stint began.
    gave_up: bool,
    /// The term of the last stint's entry.
    begun: Term,
    /// The node that was about to run the guest, and may have written so.
    activating: Option<usize>,
    pub(crate) broken: Option<String>,
}

impl Outside {
    /// A rule is broken; the first counts.
    pub(crate) fn broken(&mut self, what: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some(what());
        }
    }

    /// Bytes and frames that are out, over all lives.
    pub(crate) fn released(&self) -> (u64, u64) {
        let sum = |of: fn(&Life) -> usize| self.lives.iter().map(of).sum::<usize>() as u64;
        (sum(|life| life.console.len()), sum(|life| life.frames.len()))
    }

    /// A node is about to write that it runs the guest.
    pub(crate) fn activating(&mut self, node: usize) {
        self.activating = Some(node);
    }

    /// A runner that is protected takes an ack: whoever is promoted from now on has that point.
    pub(crate) fn acked(&mut self, point: Option<Point>) {
        self.acked = self.acked.max(point);
    }

    /// A follower acks a point.
    pub(crate) fn said(&mut self, point: Point) {
        let Some(cut) = self.cuts.get(&point) else { return };
        if self.stints[cut.stint].life + 1 == self.lives.len() {
            self.said.console = self.said.console.max(cut.output.console);
            self.said.frames = self.said.frames.max(cut.output.frames);
        }
    }

    /// The term of the register by which the guest began to run last.
    pub(crate) fn begun(&self) -> Term {
        self.begun
    }

    /// Whether the last beginning gave up what was out or acked.
    pub(crate) fn gave_up(&self) -> bool {
        self.gave_up
    }

    /// Nothing more goes out of the life that there is than what is out or acked.
    fn close_life(&mut self) {
        if let Some(Life { console, frames, until }) = self.lives.last_mut() {
            *until = Some(OutputPosition {
                console: self.said.console.max(console.len() as u64),
                frames: self.said.frames.max(frames.len() as u64),
            });
        }
    }

    /// A guest begins from nothing. Only the node that ran it last may do that, or one that is forced to.
    pub(crate) fn boot(&mut self, Begins { node, term, forced }: Begins) -> usize {
        (self.begun, self.gave_up) = (term, forced);
        if forced {
            self.close_life();
        }
        let activated = self.activating.take() == Some(node);
        if let Some(last) = self.stints.last().filter(|last| last.node != node && !activated && !forced) {
            let ran = last.node;
            self.broken(|| format!("node {node} boots a guest that ran last on node {ran}"));
        }
        (self.acked, self.said) = (None, OutputPosition::default());
        self.lives.push(Life::default());
        self.stints.push(Stint { node, life: self.lives.len() - 1, parent: None });
        self.stints.len() - 1
    }

    /// A node runs on from `point`, with this memory and machine.
    pub(crate) fn promote(
        &mut self,
        begins: Begins,
        point: Point,
        guest: &SyntheticGuest,
        state: &MachineState,
    ) -> usize {
        let (number, node) = (self.stints.len(), begins.node);
        (self.activating, self.gave_up) = (None, false);
        let Some(&cut) = self.cuts.get(&point) else {
            self.broken(|| format!("node {node} promotes {point}, which was never cut"));
            return self.boot(begins);
        };
        self.begun = begins.term;
        self.check_guest("what is promoted", point, guest);
        if machine(state) != cut.machine {
            self.broken(|| format!("node {node} promotes {point} with the machine of another"));
        }
        if begins.forced {
            return self.go_back(node, point, cut);
        }
        if let Some(acked) = self.acked.filter(|acked| *acked > point) {
            self.broken(|| format!("node {node} promotes {point}, and {acked} was acked"));
        }
        let life = self.stints[cut.stint].life;
        if life + 1 != self.lives.len() {
            self.broken(|| format!("node {node} promotes {point} of a guest that has begun anew since"));
        }
        self.stints.push(Stint { node, life, parent: Some((cut.stint, cut.output)) });
        self.check_lacks("promotes", point, life, number);
        number
    }

    /// An operator has the guest run from a point by force: what is out after it, or acked, is given up.
    fn go_back(&mut self, node: usize, point: Point, cut: Instant) -> usize {
        self.close_life();
        let (number, old) = (self.stints.len(), self.stints[cut.stint].life);
        let life = self.lives.len();
        self.stints.push(Stint { node, life, parent: Some((cut.stint, cut.output)) });
        let Life { console, frames, .. } = &self.lives[old];
        let lines = console.iter().take(cut.output.console as usize).enumerate();
        let lines = lines
            .take_while(|(at, (_, made))| self.owner(number, |out| out.console, *at as u64) == *made)
            .map(|(_, byte)| *byte)
            .collect::<Vec<_>>();
        let sent = frames.iter().take(cut.output.frames as usize).enumerate();
        let sent = sent
            .take_while(|(at, (_, made))| self.owner(number, |out| out.frames, *at as u64) == *made)
            .map(|(_, frame)| *frame)
            .collect::<Vec<_>>();
        self.gave_up = old + 1 != life
            || lines.len() < console.len()
            || sent.len() < frames.len()
            || self.acked.is_some_and(|acked| acked > point);
        self.lives.push(Life { console: lines, frames: sent, until: None });
        (self.acked, self.said) = (None, OutputPosition::default());
        number
    }

    /// Whoever holds `point` for good must have all that is out.
    fn check_lacks(&mut self, does: &str, point: Point, life: usize, stint: usize) {
        let Life { console, frames, .. } = &self.lives[life];
        let parent = self.stints[stint].parent.map_or(OutputPosition::default(), |(_, at)| at);
        let foreign =
            |(at, made): (usize, usize)| self.owner(stint, |position| position.console, at as u64) != made;
        let (lines, sent) = (console.len() as u64, frames.len() as u64);
        let other =
            console.iter().map(|(_, made)| *made).enumerate().take(parent.console as usize).any(foreign);
        if lines > parent.console || sent > parent.frames || other {
            let has = (parent.console, parent.frames);
            self.broken(|| {
                format!("somebody {does} {point} with output up to {has:?}, and ({lines}, {sent}) is out")
            });
        }
    }

    /// A store that can show the replica id which the register names.
    pub(crate) fn check_stored(&mut self, point: Point) {
        let Some(&cut) = self.cuts.get(&point) else {
            return self.broken(|| format!("a store holds {point}, which was never cut"));
        };
        let life = self.stints[cut.stint].life;
        let Life { console, frames, .. } = &self.lives[life];
        let (lines, sent) = (console.len() as u64, frames.len() as u64);
        if lines > cut.output.console || sent > cut.output.frames || life + 1 != self.lives.len() {
            let has = cut.output;
            self.broken(|| {
                format!(
                    "the store vouches for {point} with output up to {has:?}, and ({lines}, {sent}) is out"
                )
            });
        }
    }

    /// The guest of a stint is cut at `point`.
    pub(crate) fn cut(&mut self, stint: usize, point: Point, guest: &SyntheticGuest, state: &MachineState) {
        let (memory, disk, output) = (digest(guest.memory()), guest.disk_digest(), state.output);
        let instant = Instant { memory, machine: machine(state), disk, output, stint };
        if self.cuts.insert(point, instant).is_some_and(|before| before != instant) {
            self.broken(|| format!("{point} names two states"));
        }
    }

    /// An image, or a restored guest, is said to be at `point`.
    pub(crate) fn check_memory(&mut self, what: &str, point: Point, memory: &GuestMemory) {
        let expected = self.cuts.get(&point).map(|cut| cut.memory);
        if expected != Some(digest(memory)) {
            self.broken(|| format!("{what} is said to be at {point} and is not what was cut there"));
        }
    }

    /// A restored guest is said to be at `point`, with its memory and disk.
    pub(crate) fn check_guest(&mut self, what: &str, point: Point, guest: &SyntheticGuest) {
        self.check_memory(what, point, guest.memory());
        self.check_disk(what, point, guest);
    }

    /// The same of its disk alone.
    pub(crate) fn check_disk(&mut self, what: &str, point: Point, guest: &SyntheticGuest) {
        let expected = self.cuts.get(&point).map(|cut| cut.disk);
        if expected != Some(guest.disk_digest()) {
            self.broken(|| {
                format!("the disk of {what} is said to be at {point} and is not what was cut there")
            });
        }
    }

    /// Everything before `position` is said to be out, in the history that ends with `point`.
    pub(crate) fn check_out(&mut self, point: Point, position: OutputPosition) {
        let Some(cut) = self.cuts.get(&point) else { return };
        let life = &self.lives[self.stints[cut.stint].life];
        let (lines, sent) = (life.console.len() as u64, life.frames.len() as u64);
        if position.console > lines || position.frames > sent {
            self.broken(|| format!("{position:?} is said to be out, and ({lines}, {sent}) is"));
        }
    }

    /// The stint in which a stint's byte or frame was made.
    fn owner(&self, mut stint: usize, count: fn(OutputPosition) -> u64, at: u64) -> usize {
        while let Some((parent, until)) = self.stints[stint].parent.filter(|(_, until)| at < count(*until)) {
            debug_assert!(at < count(until));
            stint = parent;
        }
        stint
    }

    fn let_out(&mut self, stint: usize, output: &Output) {
        let OutputPosition { mut console, mut frames } = output.start;
        for item in &output.items {
            match item {
                OutputItem::Console(bytes) => {
                    for &byte in bytes {
                        self.byte(stint, console, byte);
                        console += 1;
                    }
                }
                OutputItem::Frame { bytes, .. } => {
                    self.frame(stint, frames, xxh3_64(bytes));
                    frames += 1;
                }
            }
        }
    }

    fn byte(&mut self, stint: usize, at: u64, byte: u8) {
        let made = (byte, self.owner(stint, |position| position.console, at));
        let Life { console: known, until, .. } = &mut self.lives[self.stints[stint].life];
        match known.get(at as usize).copied() {
            None if until.is_some_and(|until| at >= until.console) => {
                self.broken(|| format!("console byte {at} is of stint {stint}, which was given up"));
            }
            None if at == known.len() as u64 => known.push(made),
            None => {
                let end = known.len();
                self.broken(|| format!("console bytes {end} to {at} are missing"));
            }
            Some(before) if before != made => {
                self.broken(|| format!("console byte {at} is {before:?} and {made:?} (byte, stint)"));
            }
            Some(_) => {}
        }
    }

    fn frame(&mut self, stint: usize, at: u64, hash: u64) {
        let made = (hash, self.owner(stint, |position| position.frames, at));
        let Life { frames: known, until, .. } = &mut self.lives[self.stints[stint].life];
        match known.get(at as usize).copied() {
            None if until.is_some_and(|until| at >= until.frames) => {
                self.broken(|| format!("frame {at} is of stint {stint}, which was given up"));
            }
            None if at == known.len() as u64 => known.push(made),
            None => {
                let end = known.len();
                self.broken(|| format!("frames {end} to {at} are missing"));
            }
            Some(before) if before != made => {
                self.broken(|| format!("frame {at} is of stints {} and {}, or differs", before.1, made.1));
            }
            Some(_) => {}
        }
    }
}

/// Takes what a stint lets out.
pub(crate) struct Outlet<'a>(pub(crate) &'a mut Outside, pub(crate) usize);

impl Sink for Outlet<'_> {
    fn let_out(&mut self, output: Output) {
        self.0.let_out(self.1, &output);
    }
}

/// Takes what a follower hears to be out.
pub(crate) struct Known;

impl Sink for Known {
    fn let_out(&mut self, _output: Output) {}
}

fn machine(state: &MachineState) -> u128 {
    xxh3_128(&state.encode())
}

fn digest(memory: &GuestMemory) -> u128 {
    memory.digest().expect("guest memory can be read")
}
