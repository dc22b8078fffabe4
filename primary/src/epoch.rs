//! When to cut: pure decisions, time is an argument.

use std::time::{Duration, Instant};

/// Time between two cuts unless something asks for an earlier one.
pub const DEFAULT_INTERVAL: Duration = Duration::from_millis(25);

/// Paces cuts at a fixed interval.
///
/// The next cut is counted from when the last one was due, so a late cut does not shift all that follow; but
/// a loop that fell behind by more than one interval does not catch up with a burst of cuts.
#[derive(Clone, Copy, Debug)]
pub struct Pacer {
    interval: Duration,
    due: Instant,
}

impl Pacer {
    /// The first cut is due one `interval` after `now`.
    pub fn new(interval: Duration, now: Instant) -> Self {
        Self { interval, due: now + interval }
    }

    /// How long to wait at `now`; zero when a cut is due.
    pub fn wait(&self, now: Instant) -> Duration {
        self.due.saturating_duration_since(now)
    }

    /// A cut was made, whether it was due or asked for early.
    pub fn cut(&mut self, now: Instant) {
        let next = self.due + self.interval;
        self.due = if now < self.due || next < now { now + self.interval } else { next };
    }
}

#[cfg(test)]
mod tests {
    use super::Pacer;
    use std::time::{Duration, Instant};

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn cuts_keep_their_rhythm_and_never_come_in_bursts() {
        let start = Instant::now();
        let mut pacer = Pacer::new(25 * MS, start);
        assert_eq!(pacer.wait(start), 25 * MS);
        pacer.cut(start + 27 * MS);
        assert_eq!(pacer.wait(start + 27 * MS), 23 * MS, "counted from when it was due");
        pacer.cut(start + 200 * MS);
        assert_eq!(pacer.wait(start + 200 * MS), 25 * MS, "no burst after a stall");
        pacer.cut(start + 210 * MS);
        assert_eq!(pacer.wait(start + 210 * MS), 25 * MS, "an early cut begins a whole interval");
    }
}
