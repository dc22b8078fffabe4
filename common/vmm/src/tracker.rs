//! What the vCPUs wrote: the dirty rings or the dirty bitmap of a VM, behind one interface.
//!
//! Rings are harvested by each vCPU's own thread while the guest runs, at least every 4 ms and whenever a
//! quarter is used, and all of them by the checkpoint thread at the cut. Harvest and KVM_RESET_DIRTY_RINGS are
//! one step under one lock, so the number that KVM reports is the number that was just taken, and the bytes of
//! every page in the open set may be read: a write after that is logged again.

use colo_common::Gfn;
use colo_common::limits::MAX_SLOT_BYTES;
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::dirty_ring::{DirtyRing, ENTRY_BYTES};
use crate::dirty_set::DirtySet;
use crate::guest::{Tracked, TrackingLoss};
use crate::ioctl;
use crate::kick;
use crate::memory::MemoryLayout;
use crate::spec::TrackerKind;

/// How often KVM_RESET_DIRTY_RINGS may do nothing; each time takes a stop of this process just before it.
const RESETS_IN_VAIN: u32 = 1000;

/// When vCPU threads harvest their rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cadence {
    /// Longest time between two harvests; nothing means never, which only a test of overruns wants.
    pub period: Option<Duration>,
    /// Whether a ring is harvested before every entry that finds more than a quarter used.
    pub quarter: bool,
}

impl Default for Cadence {
    /// At 4 ms, a vCPU that an instruction emulator runs fills a quarter of the largest ring at most.
    fn default() -> Self {
        Self { period: Some(Duration::from_millis(4)), quarter: true }
    }
}

/// The rings or the bitmap of one VM.
pub(crate) struct Tracker {
    vm: Arc<VmFd>,
    layout: MemoryLayout,
    kind: TrackerKind,
    /// Whether KVM logs; without it there is no bitmap to read.
    logging: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    /// By vCPU; empty with the bitmap.
    rings: Vec<DirtyRing>,
    /// Harvested and reset, not yet taken by the epoch loop.
    open: DirtySet,
    loss: Option<TrackingLoss>,
    bitmap: Vec<u64>,
}

impl Tracker {
    /// Prepares a VM that has no vCPU yet.
    pub(crate) fn new(vm: Arc<VmFd>, layout: &MemoryLayout, kind: TrackerKind) -> io::Result<Self> {
        let mut words = 0;
        match kind {
            TrackerKind::Ring { entries } => enable_rings(&vm, entries)?,
            TrackerKind::Bitmap => {
                let largest = layout.slots().iter().map(|slot| slot.frames).max().unwrap_or(0);
                assert!(largest * colo_common::PAGE_SIZE as u64 <= MAX_SLOT_BYTES);
                words = largest.div_ceil(64) as usize;
            }
        }
        let open = DirtySet::new(layout.frame_limit());
        let inner = Inner { rings: Vec::new(), open, loss: None, bitmap: vec![0; words] };
        let (layout, logging) = (layout.clone(), AtomicBool::new(false));
        Ok(Self { vm, layout, kind, logging, inner: Mutex::new(inner) })
    }

    /// Maps the ring of the next vCPU; vCPUs come in the order of their numbers.
    pub(crate) fn attach(&self, vcpu: &VcpuFd) -> io::Result<()> {
        if let TrackerKind::Ring { entries } = self.kind {
            let ring = DirtyRing::map(vcpu, entries)?;
            self.inner().rings.push(ring);
        }
        Ok(())
    }

    /// KVM's logging was turned on or off. What it has logged until now is to be taken before it goes off.
    pub(crate) fn set_logging(&self, on: bool) {
        self.logging.store(on, Ordering::SeqCst);
    }

    fn reads_bitmap(&self) -> bool {
        !self.has_rings() && self.logging.load(Ordering::SeqCst)
    }

    /// Whether vCPU threads have rings to harvest.
    pub(crate) fn has_rings(&self) -> bool {
        matches!(self.kind, TrackerKind::Ring { .. })
    }

    /// Harvests and resets one vCPU's ring, on that vCPU's thread. Returns how many entries it held.
    pub(crate) fn harvest(&self, vcpu: u32) -> io::Result<u32> {
        self.harvest_locked(&mut self.inner(), vcpu)
    }

    /// Before KVM_RUN: harvests if the ring is above a quarter.
    pub(crate) fn before_entry(&self, vcpu: u32) -> io::Result<()> {
        let mut inner = self.inner();
        if inner.rings[vcpu as usize].above_quarter() {
            self.harvest_locked(&mut inner, vcpu)?;
        }
        Ok(())
    }

    /// After a ring-full exit: harvests. A full ring without an entry for us has been overrun.
    pub(crate) fn ring_full(&self, vcpu: u32) -> io::Result<()> {
        let mut inner = self.inner();
        if self.harvest_locked(&mut inner, vcpu)? == 0 {
            inner.loss.get_or_insert(TrackingLoss::RingOverrun { vcpu });
        }
        Ok(())
    }

    /// What was lost since the tracker was made, if anything.
    pub(crate) fn loss(&self) -> Option<TrackingLoss> {
        self.inner().loss
    }

    /// Moves what is known to be dirty into `dirty`; vCPUs may run.
    pub(crate) fn collect(&self, dirty: &mut DirtySet) -> io::Result<Tracked> {
        let mut inner = self.inner();
        if self.reads_bitmap() {
            self.read_bitmap(&mut inner)?;
        }
        Ok(take(&mut inner, dirty))
    }

    /// Moves everything written so far into `dirty`; no vCPU may be in KVM_RUN.
    pub(crate) fn close(&self, dirty: &mut DirtySet) -> io::Result<Tracked> {
        let mut inner = self.inner();
        for vcpu in 0..inner.rings.len() as u32 {
            self.harvest_locked(&mut inner, vcpu)?;
        }
        if self.reads_bitmap() {
            self.read_bitmap(&mut inner)?;
        }
        Ok(take(&mut inner, dirty))
    }

    fn harvest_locked(&self, inner: &mut Inner, vcpu: u32) -> io::Result<u32> {
        // After an overrun our index and KVM's are apart; the VM is built anew at the next cut.
        if inner.loss.is_some() {
            return Ok(0);
        }
        let Inner { rings, open, loss, .. } = inner;
        let ring = &mut rings[vcpu as usize];
        let taken = ring.harvest(|slot, offset| match self.layout.frame_of(slot, offset) {
            Some(gfn) => drop(open.insert(gfn)),
            // Slots never change under a tracker, so this entry was not written as KVM writes them.
            None => *loss = Some(TrackingLoss::BadEntry { vcpu }),
        });
        if taken == ring.len() {
            *loss = Some(TrackingLoss::RingOverrun { vcpu });
        }
        // Entries that are harvested and not reset would be counted to the next harvest.
        let reset = self.reset(taken);
        if !matches!(reset, Ok(true)) {
            loss.get_or_insert(TrackingLoss::ResetCutShort { vcpu });
        }
        reset.map(|_| taken)
    }

    /// All that was taken must be reset before bytes are read. Returns whether KVM has protected every page of it.
    ///
    /// Since Linux 6.17 this request ends early when a signal is pending, and it does so between freeing entries
    /// and protecting their pages: the last pages of those that it counts stay writable and are never logged
    /// again, even if it counts them all. So signals are held back; a stop of the process cannot be, and is told.
    fn reset(&self, taken: u32) -> io::Result<bool> {
        let (mut whole, mut reset, mut in_vain) = (true, 0, 0);
        while reset < taken && in_vain < RESETS_IN_VAIN {
            let (answer, stopped) = kick::without_signals(|| ioctl::reset_dirty_rings(&self.vm));
            match answer {
                // Nothing was freed, so nothing was left half done.
                Ok(0) => in_vain += 1,
                Ok(count) => {
                    reset += count;
                    whole &= count == taken && !stopped;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => in_vain += 1,
                Err(e) => return Err(e),
            }
        }
        assert_eq!(reset, taken, "KVM reset another number of ring entries than were harvested");
        Ok(whole)
    }

    fn read_bitmap(&self, inner: &mut Inner) -> io::Result<()> {
        for slot in self.layout.slots() {
            let words = slot.frames.div_ceil(64) as usize;
            ioctl::read_dirty_log(&self.vm, slot.id, slot.frames, &mut inner.bitmap[..words])?;
            for (word, bits) in inner.bitmap[..words].iter().enumerate() {
                inner.open.insert_word(Gfn(slot.first.0 + word as u64 * 64), *bits);
            }
        }
        Ok(())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Whoever panicked did so on an assertion; the set is never half changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take(inner: &mut Inner, dirty: &mut DirtySet) -> Tracked {
    dirty.union_with(&inner.open);
    inner.open.clear();
    inner.loss.map_or(Tracked::Complete, Tracked::Unknown)
}

fn enable_rings(vm: &VmFd, entries: u32) -> io::Result<()> {
    let acquire_release = vm.check_extension_raw(u64::from(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)) > 0;
    let cap = if acquire_release { KVM_CAP_DIRTY_LOG_RING_ACQ_REL } else { KVM_CAP_DIRTY_LOG_RING };
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args[0] = u64::from(entries) * u64::from(ENTRY_BYTES);
    vm.enable_cap(&request).map_err(Into::into)
}
