//! One vCPU's dirty ring, as KVM shares it: the second step of the way of a page.
//!
//! Entry states (flags): 00 free -> 01 dirty (KVM) -> 1X harvested (we) -> 00 (KVM, at KVM_RESET_DIRTY_RINGS).
//! We make one transition only, strictly in order from the fetch index, a free-running counter. Flags are
//! loaded with acquire before slot and offset are read, and stored with release after.
//!
//! Overrun: KVM's limit is soft, and a host that emulates the guest may log a batch past it and overwrite what
//! we have not read. Then all entries are dirty, so a harvest that returns as many entries as the ring has
//! means that the dirty set is unknown; and the kernel's index is then past ours by an unknown amount, so the
//! ring is of no more use until the VM is built anew.

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Bytes of one entry.
pub(crate) const ENTRY_BYTES: u32 = size_of::<kvm_dirty_gfn>() as u32;

const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;

/// `kvm_dirty_gfn` with the sharing made explicit: KVM writes it while we read.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

const _: () = assert!(size_of::<Entry>() == size_of::<kvm_dirty_gfn>());
const _: () = assert!(align_of::<Entry>() == align_of::<kvm_dirty_gfn>());

enum Entries {
    Mapped {
        start: *const Entry,
        count: u32,
    },
    #[cfg(test)]
    Owned(Box<[Entry]>),
}

// SAFETY: the mapping is shared memory that is only accessed through atomics; the pointer is owned.
unsafe impl Send for Entries {}

impl std::ops::Deref for Entries {
    type Target = [Entry];

    fn deref(&self) -> &[Entry] {
        match self {
            // SAFETY: the mapping has `count` entries, page-aligned, and lives until drop; all access to
            // them is atomic, here and in the kernel.
            Self::Mapped { start, count } => unsafe { std::slice::from_raw_parts(*start, *count as usize) },
            #[cfg(test)]
            Self::Owned(entries) => entries,
        }
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        match self {
            Self::Mapped { start, count } => {
                let bytes = *count as usize * size_of::<Entry>();
                // SAFETY: exactly the mapping that `DirtyRing::map` made, unmapped once.
                let ret = unsafe { libc::munmap(start.cast_mut().cast(), bytes) };
                assert_eq!(ret, 0, "unmapping our own ring failed");
            }
            #[cfg(test)]
            Self::Owned(_) => {}
        }
    }
}

/// A vCPU's ring and how far it was read.
pub(crate) struct DirtyRing {
    entries: Entries,
    fetch: u32,
}

impl DirtyRing {
    /// Maps the ring of `vcpu`, which has `count` entries.
    pub(crate) fn map(vcpu: &VcpuFd, count: u32) -> io::Result<Self> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * colo_common::PAGE_SIZE as i64;
        let bytes = count as usize * size_of::<Entry>();
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, vcpu.as_raw_fd());
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing of ours.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { entries: Entries::Mapped { start: start.cast_const().cast(), count }, fetch: 0 })
    }

    /// Takes every dirty entry in order and hands (slot, offset) to `sink`; returns how many.
    /// The vCPU must not be in KVM_RUN.
    pub(crate) fn harvest(&mut self, mut sink: impl FnMut(u32, u64)) -> u32 {
        let mut taken = 0;
        while taken < self.len() {
            let entry = &self.entries[(self.fetch & (self.len() - 1)) as usize];
            // A harvested entry that KVM has not reset yet stops us as well: we have been round the ring.
            if entry.flags.load(Ordering::Acquire) & (DIRTY | HARVESTED) != DIRTY {
                break;
            }
            sink(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
            entry.flags.store(HARVESTED, Ordering::Release);
            self.fetch = self.fetch.wrapping_add(1);
            taken += 1;
        }
        taken
    }

    /// Whether more than a quarter of the ring waits: entries are used in order, so one look tells.
    pub(crate) fn above_quarter(&self) -> bool {
        let at = self.fetch.wrapping_add(self.len() / 4) & (self.len() - 1);
        self.entries[at as usize].flags.load(Ordering::Acquire) & (DIRTY | HARVESTED) == DIRTY
    }

    /// Entries of the ring.
    pub(crate) fn len(&self) -> u32 {
        self.entries.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::{DIRTY, DirtyRing, Entries, Entry, HARVESTED};
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    /// The kernel's half of the protocol.
    struct Kernel {
        dirty: u32,
        reset: u32,
    }

    fn ring(count: u32) -> (DirtyRing, Kernel) {
        let entry =
            |_| Entry { flags: AtomicU32::new(0), slot: AtomicU32::new(0), offset: AtomicU64::new(0) };
        let entries = Entries::Owned((0..count).map(entry).collect());
        (DirtyRing { entries, fetch: 0 }, Kernel { dirty: 0, reset: 0 })
    }

    impl Kernel {
        fn push(&mut self, ring: &DirtyRing, offset: u64) {
            let entry = &ring.entries[(self.dirty % ring.len()) as usize];
            entry.offset.store(offset, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
            self.dirty = self.dirty.wrapping_add(1);
        }

        fn reset(&mut self, ring: &DirtyRing) -> u32 {
            let before = self.reset;
            loop {
                let entry = &ring.entries[(self.reset % ring.len()) as usize];
                if entry.flags.load(Ordering::Acquire) & HARVESTED == 0 {
                    return self.reset.wrapping_sub(before);
                }
                entry.flags.store(0, Ordering::Release);
                self.reset = self.reset.wrapping_add(1);
            }
        }
    }

    fn harvest(ring: &mut DirtyRing) -> Vec<u64> {
        let mut got = Vec::new();
        ring.harvest(|_, offset| got.push(offset));
        got
    }

    #[test]
    fn entries_come_once_and_in_order_over_many_turns() {
        let (mut ring, mut kernel) = ring(8);
        let (mut next, mut seen) = (0, Vec::new());
        for turn in 0..100 {
            for _ in 0..turn % 8 {
                kernel.push(&ring, next);
                next += 1;
            }
            let got = harvest(&mut ring);
            assert_eq!(kernel.reset(&ring), got.len() as u32);
            seen.extend(got);
        }
        assert_eq!(seen, (0..next).collect::<Vec<_>>());
    }

    #[test]
    fn harvested_entries_wait_for_their_reset() {
        let (mut ring, mut kernel) = ring(4);
        (0..4).for_each(|n| kernel.push(&ring, n));
        assert_eq!(harvest(&mut ring).len(), 4);
        assert!(harvest(&mut ring).is_empty());
        assert_eq!(kernel.reset(&ring), 4);
        kernel.push(&ring, 9);
        assert_eq!(harvest(&mut ring), [9]);
    }

    #[test]
    fn any_overrun_shows_as_a_completely_dirty_ring() {
        for past in 0..20 {
            let (mut ring, mut kernel) = ring(8);
            (0..3).for_each(|n| kernel.push(&ring, n));
            assert_eq!(harvest(&mut ring).len(), 3);
            kernel.reset(&ring);
            (0..8 + past).for_each(|n| kernel.push(&ring, n));
            assert_eq!(harvest(&mut ring).len() as u32, ring.len());
        }
    }

    #[test]
    fn above_a_quarter_is_seen_from_one_entry() {
        let (mut ring, mut kernel) = ring(16);
        (0..4).for_each(|n| kernel.push(&ring, n));
        assert!(!ring.above_quarter());
        kernel.push(&ring, 4);
        assert!(ring.above_quarter());
        harvest(&mut ring);
        assert!(!ring.above_quarter());
    }
}
