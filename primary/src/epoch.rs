//! When to cut, and what becomes of a guest that was cut: pure decisions, time is an argument.

use colo_common::limits::{MAX_DISK_REQUEST, MAX_EPOCH_DISK, MAX_HELD_OUTPUT, MIN_EPOCH_MIB};
use colo_common::{BLOCK_SIZE, PAGE_SIZE};
use colo_proto::message::ITEM_COST;
use colo_proto::pages::RUN_LEN;
use std::time::{Duration, Instant};

use crate::release::Size;
use crate::replicator::Phase;

/// Time between two cuts unless something asks for an earlier one.
pub const DEFAULT_INTERVAL: Duration = Duration::from_millis(25);

/// Between a cut and an early one, as often as the guest stood still for the cut before: so haste costs it a fifth of its
/// time at most.
const HASTE_FACTOR: u32 = 4;
/// Between a cut and an early one at least: for what the guest says in one breath.
const HASTE_LEAST: Duration = Duration::from_millis(1);

/// Paces cuts at a fixed interval, and sooner when somebody outside waits for what the guest has said.
///
/// The next cut is counted from when the last one was due, so a late cut does not shift all that follow; but
/// a loop that fell behind by more than one interval does not catch up with a burst of cuts.
#[derive(Clone, Copy, Debug)]
pub struct Pacer {
    interval: Duration,
    due: Instant,
    /// The last cut, and how long the guest stood still for it.
    last: Instant,
    pause: Duration,
    /// Somebody waits.
    hurried: bool,
}

impl Pacer {
    /// The first cut is due one `interval` after `now`.
    pub fn new(interval: Duration, now: Instant) -> Self {
        Self { interval, due: now + interval, last: now, pause: Duration::ZERO, hurried: false }
    }

    /// How long to wait at `now`; zero when a cut is due.
    pub fn wait(&self, now: Instant) -> Duration {
        let early = self.last + (self.pause * HASTE_FACTOR).max(HASTE_LEAST);
        let due = if self.hurried { self.due.min(early) } else { self.due };
        due.saturating_duration_since(now)
    }

    /// Somebody waits for what the guest has said since the last cut.
    pub fn hurry(&mut self) {
        self.hurried = true;
    }

    /// The guest stood still for so long at the last cut.
    pub fn paused(&mut self, pause: Duration) {
        self.pause = pause;
    }

    /// A cut was made, whether it was due or asked for early.
    pub fn cut(&mut self, now: Instant) {
        let next = self.due + self.interval;
        self.due = if now < self.due || next < now { now + self.interval } else { next };
        (self.last, self.hurried) = (now, false);
    }
}

/// Bytes of an epoch that so many pages, or blocks of a disk, take: with a run for each at worst.
pub const fn page_bytes(pages: u64) -> u64 {
    pages * (PAGE_SIZE + RUN_LEN) as u64
}

/// Whether so many bytes of pages and blocks fill half of an epoch of at most `limit` bytes: the guest goes on writing
/// until it is stopped.
pub fn is_full(bytes: u64, limit: u64) -> bool {
    bytes >= limit / 2
}

/// Whether so many bytes of pages and blocks make an epoch of at most `limit` bytes: with an eighth left for what the
/// secondary counts beside them.
pub fn fits(bytes: u64, limit: u64) -> bool {
    bytes <= limit - limit / 8
}

/// Bytes of disk writes that may be collected for an epoch of at most `limit` bytes. As much may be under way, and end
/// before the cut that half an epoch of pages has already asked for; and of both together one request more, since one is
/// taken as long as there is room.
pub fn disk_share(limit: u64) -> usize {
    usize::try_from(limit / 8).unwrap_or(usize::MAX).min(MAX_EPOCH_DISK)
}

const _: () = {
    let least = (MIN_EPOCH_MIB as u64) << 20;
    let writes = 2 * (least / 8) + (MAX_DISK_REQUEST + BLOCK_SIZE) as u64;
    let all = least / 2 + page_bytes(writes.div_ceil(BLOCK_SIZE as u64));
    assert!(all <= least - least / 8 - least / 32, "the smallest epoch has room for what a disk brings");
};

/// Whether an epoch more may be in flight, with so much output held and epochs of at most `limit` bytes: what is held,
/// and one epoch's more, should fit one of them, for a secondary that comes back. With nothing in flight there is nothing
/// to wait for.
pub fn has_room(in_flight: usize, window: usize, held: Size, limit: u64) -> bool {
    let (bytes, items) = ((limit / 2).min(MAX_HELD_OUTPUT as u64), limit / 64 / ITEM_COST);
    in_flight == 0 || (in_flight < window && (held.bytes as u64) < bytes && (held.items as u64) < items)
}

/// Whether so much output can be told in one epoch to a secondary that takes `limit` bytes. What its items count for
/// is in the share that [`fits`] leaves.
pub fn can_tell(output: Size, limit: u64) -> bool {
    output.bytes as u64 <= limit && output.items as u64 * ITEM_COST <= limit / 16
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

/// What is known of a guest that stands, and of its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stand {
    /// Its dirty set is known and makes one epoch, with what has to be told.
    pub is_sound: bool,
    /// The link is up and an epoch more may be in flight.
    pub has_room: bool,
    /// This node may ask to run alone: the secondary is there and gets a new copy, or the operator does not hold.
    pub may_leave: bool,
    /// The seed.
    pub seed: SeedState,
}

/// The turn of a guest that stands.
pub fn turn(phase: &Phase, stand: Stand) -> Turn {
    let Stand { is_sound, has_room, may_leave, seed } = stand;
    match phase {
        Phase::Lost { .. } | Phase::Over => Turn::Wait,
        Phase::Alone => Turn::Number,
        Phase::Seeding { .. } if seed.is_idle => Turn::Complete,
        Phase::Seeding { .. } if seed.waits_for_rest => Turn::Wait,
        Phase::Seeding { .. } => Turn::Number,
        _ if !is_sound && may_leave => Turn::GiveUp,
        _ if is_sound && has_room => Turn::Ship,
        _ => Turn::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::{Pacer, SeedState, Stand, Turn, can_tell, fits, has_room, is_full, page_bytes, turn};
    use crate::release::Size;
    use crate::replicator::Phase;
    use colo_common::ReplicaId;
    use colo_common::limits::{MAX_EPOCH_CONSOLE, MAX_EPOCH_FRAME_BYTES, MAX_EPOCH_FRAMES, MAX_FRAME};
    use std::time::{Duration, Instant};

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_epoch_is_cut_well_before_it_is_too_large() {
        let limit = 64 * 4096;
        assert!(!is_full(page_bytes(31), limit) && is_full(page_bytes(32), limit));
        assert!(fits(page_bytes(55), limit) && !fits(page_bytes(56), limit));
    }

    #[test]
    fn a_guest_waits_for_acks_and_for_output_to_go_out() {
        let (nothing, held) = (Size::default(), |bytes| Size { bytes, items: 1 });
        assert!(has_room(7, 8, nothing, 1 << 28) && !has_room(8, 8, nothing, 1 << 28));
        assert!(has_room(1, 8, held((16 << 20) - 1), 1 << 28) && !has_room(1, 8, held(16 << 20), 1 << 28));
        assert!(!has_room(1, 8, held(8 << 20), 16 << 20), "it could not be told again in one epoch");
        assert!(has_room(0, 8, held(64 << 20), 16 << 20), "no ack would ever come");
        assert!(!has_room(1, 8, Size { bytes: 0, items: 4096 }, 16 << 20), "nor so many frames");
    }

    #[test]
    fn what_is_held_and_one_epoch_more_can_be_told_again_to_the_smallest_secondary() {
        let limit = 16 << 20;
        let most = Size { bytes: limit as usize / 2 - 1, items: 4095 };
        assert!(has_room(1, 8, most, limit));
        // Console bytes between any two frames.
        let items = most.items + 2 * MAX_EPOCH_FRAMES + 1;
        let bytes = most.bytes + MAX_EPOCH_FRAME_BYTES + MAX_FRAME + MAX_EPOCH_CONSOLE;
        assert!(can_tell(Size { bytes, items }, limit));
    }

    #[test]
    fn output_that_no_epoch_can_tell_is_known() {
        let limit = 16 << 20;
        assert!(can_tell(Size { bytes: 16 << 20, items: 16384 }, limit));
        assert!(!can_tell(Size { bytes: (16 << 20) + 1, items: 1 }, limit));
        assert!(!can_tell(Size { bytes: 0, items: 16385 }, limit));
    }

    #[test]
    fn a_guest_stands_only_where_it_must() {
        let peer = || "b".parse().unwrap();
        let (alone, seeding) = (Phase::Alone, Phase::Seeding { peer: peer() });
        let paired = Phase::Paired { peer: peer(), replica: ReplicaId(1) };
        let stand = |is_sound, has_room| {
            let seed = SeedState::default();
            Stand { is_sound, has_room, may_leave: true, seed }
        };
        let seeds = |is_sound, is_idle, waits_for_rest| {
            let seed = SeedState { is_idle, waits_for_rest };
            turn(&seeding, Stand { seed, ..stand(is_sound, true) })
        };
        assert_eq!(turn(&alone, stand(false, false)), Turn::Number);
        assert_eq!(seeds(true, true, true), Turn::Complete);
        assert_eq!(seeds(true, false, true), Turn::Wait);
        assert_eq!(seeds(false, false, false), Turn::Number);
        assert_eq!(turn(&paired, stand(true, true)), Turn::Ship);
        assert_eq!(turn(&paired, stand(true, false)), Turn::Wait);
        assert_eq!(turn(&paired, stand(false, false)), Turn::GiveUp);
        let held = Stand { may_leave: false, ..stand(false, false) };
        assert_eq!(turn(&paired, held), Turn::Wait, "the operator holds, and nobody is there");
        assert_eq!(turn(&Phase::Over, stand(true, true)), Turn::Wait);
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

    #[test]
    fn what_somebody_waits_for_is_cut_soon_and_never_for_a_fifth_of_the_time() {
        let start = Instant::now();
        let mut pacer = Pacer::new(25 * MS, start);
        pacer.hurry();
        assert_eq!(pacer.wait(start), MS);
        pacer.cut(start + MS);
        pacer.paused(2 * MS);
        assert_eq!(pacer.wait(start + 3 * MS), 23 * MS, "nobody waits");
        pacer.hurry();
        assert_eq!(pacer.wait(start + 3 * MS), 6 * MS);
        pacer.cut(start + 9 * MS);
        pacer.paused(100 * MS);
        pacer.hurry();
        assert_eq!(pacer.wait(start + 9 * MS), 25 * MS, "never later than without haste");
    }
}
