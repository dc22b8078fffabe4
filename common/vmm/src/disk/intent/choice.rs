//! What leaves the log in a round of the cleaner, of all that could.

use colo_common::Point;

/// Extents that may stay in the log without being in use every moment: what a copy that comes back has to compare at
/// least, 512 MiB, some seconds of reading.
const ACTIVE: u64 = 512;
/// Rounds of the cleaner without use after which an extent leaves.
const KEEP_ROUNDS: u32 = 60;
/// The same while there are more than [`ACTIVE`]. Never at once: what is used every few seconds would be written to the
/// log as often.
const BUSY_ROUNDS: u32 = 5;
const _: () = assert!(BUSY_ROUNDS < KEEP_ROUNDS / 2);

/// Extents that may leave the log once the image was synced, and the acked point that they are within.
#[derive(Debug)]
pub struct Cleaning {
    pub(super) point: Point,
    pub(super) extents: Vec<u64>,
}

impl Cleaning {
    /// Whether nothing may leave: then there is no need to sync anything.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }
}

/// Of what could leave, what does: all that was not used for long, once something was not used for very long, so that the
/// log is written for many at once; and the oldest, while there are too many.
pub(super) fn choose(aged: &mut Vec<(u32, u64)>, named: u64) {
    aged.sort_unstable_by_key(|(age, _)| std::cmp::Reverse(*age));
    let excess = named.saturating_sub(ACTIVE) as usize;
    let oldest = aged.first().map_or(0, |(age, _)| *age);
    let mut at = 0;
    aged.retain(|(age, _)| {
        let too_many = at < excess && *age >= BUSY_ROUNDS;
        at += 1;
        too_many || (oldest >= KEEP_ROUNDS && *age >= KEEP_ROUNDS / 2)
    });
}
