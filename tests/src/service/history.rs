//! What clients asked of a service and what it answered, each with its times.

use std::time::{Duration, Instant};

use super::resp::Reply;

/// What is done to a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Reads it.
    Get,
    /// Writes it.
    Set(Vec<u8>),
    /// Adds one to the number that it holds.
    Incr,
    /// Adds bytes to its end.
    Append(Vec<u8>),
}

/// One request, and its reply if there was one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Whose it was. A client whose request got no reply goes on as another one.
    pub client: u32,
    /// Upon what.
    pub key: String,
    /// What.
    pub op: Op,
    /// Just before it was sent, since the history's start.
    pub sent: Duration,
    /// The reply, and when it was whole. Without one nobody knows whether the operation happened, or will.
    pub reply: Option<(Duration, Reply)>,
}

impl Operation {
    /// How long the reply took.
    pub fn latency(&self) -> Option<Duration> {
        self.reply.as_ref().map(|(at, _)| at.saturating_sub(self.sent))
    }

    /// Whether nobody can tell afterwards what was there before.
    pub(super) fn hides(&self) -> bool {
        matches!(self.op, Op::Set(_))
    }
}

/// Everything that some clients did.
#[derive(Clone, Debug)]
pub struct History {
    /// What times count from.
    pub start: Instant,
    /// When it ended.
    pub end: Duration,
    /// The operations, those of each client in order.
    pub operations: Vec<Operation>,
    /// Connections that were lost.
    pub resets: u64,
    /// Requests that got no reply in time, whose connections were given up.
    pub timeouts: u64,
    /// Requests that the service refused, and how it did so first.
    pub refused: (u64, Option<String>),
}

impl History {
    /// Nothing has happened.
    pub fn new(start: Instant) -> Self {
        let (end, operations) = (start.elapsed(), Vec::new());
        Self { start, end, operations, resets: 0, timeouts: 0, refused: (0, None) }
    }

    /// Adds what others did meanwhile.
    ///
    /// # Panics
    /// Their times count from another instant.
    pub fn merge(&mut self, other: Self) {
        assert_eq!(self.start, other.start, "histories with times that cannot be compared");
        self.end = self.end.max(other.end);
        self.operations.extend(other.operations);
        self.resets += other.resets;
        self.timeouts += other.timeouts;
        self.refused.0 += other.refused.0;
        self.refused.1 = self.refused.1.take().or(other.refused.1);
    }

    /// An instant as this history counts.
    pub fn at(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.start)
    }

    /// When replies came, in order.
    pub fn replies(&self) -> Vec<Duration> {
        let mut times: Vec<_> =
            self.operations.iter().filter_map(|o| o.reply.as_ref()).map(|(at, _)| *at).collect();
        times.sort_unstable();
        times
    }

    /// Operations that were answered, and not by an error.
    pub fn acknowledged(&self) -> impl Iterator<Item = &Operation> {
        self.operations.iter().filter(|o| matches!(&o.reply, Some((_, reply)) if !is_error(reply)))
    }
}

pub(super) fn is_error(reply: &Reply) -> bool {
    matches!(reply, Reply::Error(_))
}
