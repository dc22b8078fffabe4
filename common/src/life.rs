//! Where a guest's offsets begin: those of console output, of frames and of console input.
//!
//! A guest that is started anew has other output than the one before it, so it must not say it at the same offsets:
//! a reader that goes on from its offset would miss it, or take it for what it knows. So each start has a room of
//! [`LIFE`] offsets of its own, by its term, and offsets grow over the whole life of the vm with nothing to be
//! remembered. A reset of the guest and a promotion are no start: offsets go on.

use crate::ids::Term;

/// Offsets that one start has for itself: a terabyte of console.
pub const LIFE: u64 = 1 << 40;

/// Starts with offsets of their own. The wire and the machine state take offsets up to 2^62; the last room is what
/// is left of that. Terms beyond (two million changes of the register) share it.
const MAX_LIVES: u64 = 1 << 21;

/// The first offset of a guest that is started from its boot files in `term`; 0 for the first term of a vm.
pub fn first_offset(term: Term) -> u64 {
    term.0.saturating_sub(1).min(MAX_LIVES) * LIFE
}

/// Whether two offsets are of the same start.
pub fn is_same(one: u64, other: u64) -> bool {
    one / LIFE == other / LIFE
}

#[cfg(test)]
mod tests {
    use super::{LIFE, first_offset, is_same};
    use crate::ids::Term;

    #[test]
    fn every_start_has_offsets_of_its_own() {
        assert_eq!((first_offset(Term(0)), first_offset(Term(1))), (0, 0));
        assert_eq!((first_offset(Term(2)), first_offset(Term(7))), (LIFE, 6 * LIFE));
        assert!(is_same(5, LIFE - 1) && !is_same(LIFE - 1, LIFE) && is_same(3 * LIFE, 3 * LIFE + 9));
    }

    #[test]
    fn no_term_is_beyond_what_the_wire_takes() {
        assert_eq!(first_offset(Term(u64::MAX)), 1 << 61);
    }
}
