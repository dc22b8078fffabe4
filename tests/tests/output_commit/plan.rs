//! What an interleaving is made of: what happens in it, which rule is left out, and how often what happened.

use std::collections::BTreeMap;

/// One thing that happens.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// The guest writes so many words to its console.
    Say(u8),
    /// The guest sends a frame.
    Send,
    /// The guest is cut.
    Cut,
    /// So many frames arrive at the follower.
    Deliver(u8),
    /// So many acks arrive at the runner.
    Hear(u8),
    /// The follower's store does its next job.
    Persist,
    /// A runner that wants a link gets it, if the other node follows.
    Connect,
    /// The link is lost, with all that is on it.
    Disconnect,
    /// The arbiter takes a node's proposal; the answer may be lost, and is asked for again.
    Arbiter { node: usize, answered: bool },
    /// The runner asks to run alone.
    GoSolo(usize),
    /// The follower asks to run the guest.
    Promote(usize),
    /// The end of a process.
    Crash(usize),
    /// A process starts on a node without one.
    Start(usize),
    /// A node reads the register.
    Observe(usize),
    /// Everything that waits gets through.
    Settle,
}

/// A rule left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mutations {
    /// While protected, output goes out without waiting for the ack.
    pub(crate) release_before_ack: bool,
    /// A secondary that is linked anew is told the output of its next epoch alone.
    pub(crate) output_not_told_again: bool,
    /// Frames and console bytes of an epoch change places.
    pub(crate) order_swapped: bool,
    /// Output of an epoch that failed goes with it.
    pub(crate) failed_output_dropped: bool,
    /// A follower keeps no output of what it acked.
    pub(crate) held_output_dropped: bool,
    /// A follower holds what it is told again a second time.
    pub(crate) held_output_not_cut_off: bool,
}

/// How often what happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts(BTreeMap<&'static str, u64>);

impl Counts {
    pub(crate) fn add(&mut self, what: &'static str) {
        self.add_many(what, 1);
    }

    pub(crate) fn add_many(&mut self, what: &'static str, times: u64) {
        *self.0.entry(what).or_default() += times;
    }

    pub(crate) fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (&&'static str, &u64)> {
        self.0.iter()
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        other.0.iter().for_each(|(what, times)| self.add_many(what, *times));
    }
}
