//! When to cut, and what becomes of a guest that was cut: pure decisions, time is an argument.

use colo_common::PAGE_SIZE;
use colo_common::limits::MAX_HELD_OUTPUT;
use colo_proto::pages::RUN_LEN;
use std::time::{Duration, Instant};

use crate::replicator::Phase;

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

/// Whether so many dirty pages fill half of an epoch of at most `limit` bytes: the guest goes on writing until it is
/// stopped.
pub fn is_full(pages: u64, limit: u64) -> bool {
    pages * PAGE_SIZE as u64 >= limit / 2
}

/// Whether so many dirty pages make an epoch of at most `limit` bytes: with a run for each page at worst, and an eighth
/// left for what the secondary counts beside pages.
pub fn fits(pages: u64, limit: u64) -> bool {
    pages * (PAGE_SIZE + RUN_LEN) as u64 <= limit - limit / 8
}

/// Whether an epoch more may be in flight, with so many bytes of output held and epochs of at most `limit` bytes: all
/// that is held must fit one of them, for a secondary that comes back.
pub fn has_room(in_flight: usize, window: usize, held: usize, limit: u64) -> bool {
    in_flight < window && (held as u64) < (limit / 2).min(MAX_HELD_OUTPUT as u64)
}

/// What becomes of a guest that was cut and stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It stands until something changes.
    Wait,
    /// Nobody has to hold this epoch: the guest goes on.
    Number,
    /// This is J, or the rest before it.
    Complete,
    /// The epoch is sent and the guest goes on.
    Ship,
    /// No epoch can be made of it: this node asks to run alone.
    GiveUp,
}

/// How a seed stands that goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeedState {
    /// Everything ordered so far is sent.
    pub is_idle: bool,
    /// The guest stands still until the rest of its dirty pages is sent.
    pub waits_for_rest: bool,
}

/// The turn of a guest that stands. `sound`: its dirty set is known and makes one epoch; `room`: the link is up and an
/// epoch more may be in flight.
pub fn turn(phase: &Phase, sound: bool, room: bool, seed: SeedState) -> Turn {
    match phase {
        Phase::Lost { .. } | Phase::Over => Turn::Wait,
        Phase::Alone => Turn::Number,
        Phase::Seeding { .. } if seed.is_idle => Turn::Complete,
        Phase::Seeding { .. } if seed.waits_for_rest => Turn::Wait,
        Phase::Seeding { .. } => Turn::Number,
        _ if !sound => Turn::GiveUp,
        _ if room => Turn::Ship,
        _ => Turn::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::{Pacer, SeedState, Turn, fits, has_room, is_full, turn};
    use crate::replicator::Phase;
    use colo_common::ReplicaId;
    use std::time::{Duration, Instant};

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_epoch_is_cut_well_before_it_is_too_large() {
        let limit = 64 * 4096;
        assert!(!is_full(31, limit) && is_full(32, limit));
        assert!(fits(55, limit) && !fits(56, limit));
    }

    #[test]
    fn a_guest_waits_for_acks_and_for_output_to_go_out() {
        assert!(has_room(7, 8, 0, 1 << 28) && !has_room(8, 8, 0, 1 << 28));
        assert!(has_room(0, 8, (16 << 20) - 1, 1 << 28) && !has_room(0, 8, 16 << 20, 1 << 28));
        assert!(!has_room(0, 8, 8 << 20, 16 << 20), "it could not be told again in one epoch");
    }

    #[test]
    fn a_guest_stands_only_where_it_must() {
        let peer = || "b".parse().unwrap();
        let (alone, seeding) = (Phase::Alone, Phase::Seeding { peer: peer() });
        let paired = Phase::Paired { peer: peer(), replica: ReplicaId(1) };
        let seed = |is_idle, waits_for_rest| SeedState { is_idle, waits_for_rest };
        assert_eq!(turn(&alone, false, false, SeedState::default()), Turn::Number);
        assert_eq!(turn(&seeding, true, true, seed(true, true)), Turn::Complete);
        assert_eq!(turn(&seeding, true, true, seed(false, true)), Turn::Wait);
        assert_eq!(turn(&seeding, false, true, seed(false, false)), Turn::Number);
        assert_eq!(turn(&paired, true, true, SeedState::default()), Turn::Ship);
        assert_eq!(turn(&paired, true, false, SeedState::default()), Turn::Wait);
        assert_eq!(turn(&paired, false, false, SeedState::default()), Turn::GiveUp);
        assert_eq!(turn(&Phase::Over, true, true, SeedState::default()), Turn::Wait);
    }

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
