//! A dirty ring in software, both halves of it: the one that KVM has in the kernel (push, reset) and the one
//! of the collector (harvest). Entries have KVM's layout and its states.
//!
//! ```text
//!          push             harvest             reset: the page is protected again
//!   00 -----------> 01 ----------------> 1X ---------> 00
//!   free          dirty              harvested
//! ```
//!
//! The push side never looks before it writes: past the end of the ring it overwrites, as KVM does when a vCPU
//! does not stop at the soft limit.

/// An entry: flags in the low and the slot in the high half of the first word, then the offset in pages.
/// Plain words, so that a new ring is zeroed memory that costs nothing until used.
type Entry = [u64; 2];

const DIRTY: u64 = 1;
const HARVESTED: u64 = 2;
const FLAGS: u64 = 0xffff_ffff;

/// One vCPU's ring.
pub(super) struct Ring {
    entries: Vec<Entry>,
    soft_limit: u32,
    /// Free-running: the next entry to push, to reset and to fetch. The first two are the kernel's.
    push: u32,
    reset: u32,
    fetch: u32,
}

impl Ring {
    /// A ring of `entries`, a power of two, whose soft limit leaves `reserved` of them.
    pub(super) fn new(entries: u32, reserved: u32) -> Self {
        assert!(entries.is_power_of_two() && reserved < entries, "checked with the configuration");
        let soft_limit = entries - reserved;
        Self { entries: vec![[0; 2]; entries as usize], soft_limit, push: 0, reset: 0, fetch: 0 }
    }

    pub(super) fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    /// Entries that were pushed and not reset, by the kernel's count.
    pub(super) fn used(&self) -> u32 {
        self.push.wrapping_sub(self.reset)
    }

    /// Whether the vCPU has to leave the guest.
    pub(super) fn is_full(&self) -> bool {
        self.used() >= self.soft_limit
    }

    /// Logs a page, over whatever is there.
    pub(super) fn push(&mut self, slot: u32, offset: u64) {
        let at = self.place(self.push);
        self.entries[at] = [u64::from(slot) << 32 | DIRTY, offset];
        self.push = self.push.wrapping_add(1);
    }

    /// Takes the dirty entries in order, up to the first that is not; returns how many.
    pub(super) fn harvest(&mut self, mut sink: impl FnMut(u32, u64)) -> u32 {
        let mut taken = 0;
        while taken < self.len() {
            let at = self.place(self.fetch);
            let [head, offset] = self.entries[at];
            if head & (DIRTY | HARVESTED) != DIRTY {
                break;
            }
            sink((head >> 32) as u32, offset);
            self.entries[at][0] = head & !FLAGS | HARVESTED;
            self.fetch = self.fetch.wrapping_add(1);
            taken += 1;
        }
        taken
    }

    /// Frees the harvested entries in order and hands each to `protect`; returns how many.
    pub(super) fn reset(&mut self, mut protect: impl FnMut(u32, u64)) -> u32 {
        let mut freed = 0;
        while freed < self.len() {
            let at = self.place(self.reset);
            let [head, offset] = self.entries[at];
            if head & HARVESTED == 0 {
                break;
            }
            protect((head >> 32) as u32, offset);
            self.entries[at][0] = head & !FLAGS;
            self.reset = self.reset.wrapping_add(1);
            freed += 1;
        }
        freed
    }

    fn place(&self, index: u32) -> usize {
        (index & (self.len() - 1)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::Ring;

    fn harvest(ring: &mut Ring) -> Vec<u64> {
        let mut got = Vec::new();
        let count = ring.harvest(|slot, offset| got.push(offset + u64::from(slot) * 1000));
        assert_eq!(count as usize, got.len());
        got
    }

    #[test]
    fn entries_go_round_in_order_and_parts_may_be_harvested() {
        let mut ring = Ring::new(8, 2);
        // The indices are free-running: they pass their own end too.
        (ring.push, ring.reset, ring.fetch) = (u32::MAX - 2, u32::MAX - 2, u32::MAX - 2);
        let (mut next, mut got) = (0, Vec::new());
        for turn in 0..50 {
            for _ in 0..turn % 6 {
                ring.push(1, next);
                next += 1;
            }
            got.extend(harvest(&mut ring));
            if turn % 3 != 0 {
                ring.reset(|_, _| ());
            }
            if ring.is_full() {
                ring.reset(|_, _| ());
            }
        }
        assert_eq!(got, (0..next).map(|n| 1000 + n).collect::<Vec<_>>());
    }

    #[test]
    fn the_soft_limit_counts_until_the_reset_and_not_until_the_harvest() {
        let mut ring = Ring::new(8, 2);
        (0..6).for_each(|n| ring.push(0, n));
        assert!(ring.is_full());
        assert_eq!(harvest(&mut ring).len(), 6);
        assert!(ring.is_full());
        let mut protected = Vec::new();
        assert_eq!(ring.reset(|_, offset| protected.push(offset)), 6);
        assert_eq!(protected, [0, 1, 2, 3, 4, 5]);
        assert!(!ring.is_full());
    }

    #[test]
    fn an_overrun_loses_entries_shows_as_a_full_harvest_and_leaves_the_ring_out_of_step() {
        let mut ring = Ring::new(8, 2);
        (0..11).for_each(|n| ring.push(0, n));
        assert_eq!(harvest(&mut ring), [8, 9, 10, 3, 4, 5, 6, 7]);
        assert_eq!(ring.reset(|_, _| ()), 8);
        // What host.md saw: the kernel counts entries that the collector never finds.
        assert_eq!(ring.used(), 3);
        ring.push(0, 99);
        assert!(harvest(&mut ring).is_empty());
    }
}
