//! Tells which pages a synthetic guest wrote, by rings or by a bitmap, with KVM's rules and KVM's faults.
//!
//! A page is protected or logged. The first write to a protected page logs it, in the ring of the vCPU that
//! wrote; later writes, by any vCPU, do not (some do, when so configured). A reset protects the harvested pages
//! again. Harvest and reset are always one step here, so the bytes of every page of the open set may be read.

use colo_common::Gfn;

use super::chain::mix;
use super::config::Tracking;
use super::ring::Ring;
use crate::dirty_set::DirtySet;
use crate::guest::{Tracked, TrackingLoss};
use crate::memory::MemoryLayout;
use crate::spec::TrackerKind;

/// The rings or the bitmap of one guest.
pub(super) struct Tracker {
    layout: MemoryLayout,
    config: Tracking,
    on: bool,
    log: Log,
    /// Harvested and reset, not yet taken by the epoch loop.
    open: DirtySet,
    loss: Option<TrackingLoss>,
    /// State of the generator that faults come from.
    faults: u64,
}

enum Log {
    Rings {
        rings: Vec<VcpuRing>,
        entries: u32,
        /// Bit per frame: not protected. Allocated zeroed, so untouched parts cost nothing.
        logged: Vec<u64>,
    },
    /// Set bits are the pages that are not protected.
    Bitmap(DirtySet),
}

struct VcpuRing {
    ring: Ring,
    /// The ring was found full, and what follows from that was decided.
    stopped: bool,
    /// Writes that the vCPU still makes without a look at the soft limit.
    runaway: u32,
}

impl Tracker {
    pub(super) fn new(
        layout: &MemoryLayout,
        kind: TrackerKind,
        vcpus: u32,
        config: &Tracking,
    ) -> Result<Self, String> {
        let frames = layout.frame_limit();
        let log = match kind {
            TrackerKind::Ring { entries } => {
                let entries = config.ring_entries.unwrap_or(entries);
                config.check(entries)?;
                let rings = (0..vcpus).map(|_| VcpuRing::new(entries, config.reserved)).collect();
                Log::Rings { rings, entries, logged: vec![0; frames.div_ceil(64) as usize] }
            }
            TrackerKind::Bitmap => Log::Bitmap(DirtySet::new(frames)),
        };
        let (config, open) = (config.clone(), DirtySet::new(frames));
        Ok(Self { layout: layout.clone(), faults: config.seed, config, on: false, log, open, loss: None })
    }

    /// Begins with every page protected.
    pub(super) fn start(&mut self) {
        if !self.on {
            self.renew();
            self.on = true;
        }
    }

    /// Stops and forgets.
    pub(super) fn stop(&mut self) {
        self.on = false;
        self.renew();
    }

    pub(super) fn loss(&self) -> Option<TrackingLoss> {
        self.loss
    }

    /// Whether a full ring keeps `vcpu` out of the guest. Where it does not, the ring holds all entries of the
    /// coming step, but for the fault that runs on. `next` is a frame that the step is going to write.
    pub(super) fn keeps_out(&mut self, vcpu: u32, next: Gfn) -> bool {
        let full =
            |tracker: &mut Self| tracker.ring_mut(vcpu).is_some_and(|r| r.runaway == 0 && r.ring.is_full());
        if !self.on || !full(self) {
            return false;
        }
        if self.decide_runaway(vcpu) {
            return false;
        }
        if self.config.quarter {
            self.harvest(vcpu);
        }
        let out = full(self);
        if out && self.ring_mut(vcpu).is_some_and(|r| !std::mem::replace(&mut r.stopped, true)) {
            // KVM logs before it writes: the last entry may be of a write that was not made.
            self.push(vcpu, next);
        }
        out
    }

    /// Between two steps: what a vCPU's own thread does on its timer, and above a quarter.
    pub(super) fn after_step(&mut self, vcpu: u32, time: u64) {
        if !self.on {
            return;
        }
        let quarter = self.config.quarter;
        if self.ring_mut(vcpu).is_some_and(|r| quarter && r.runaway == 0 && r.ring.used() > r.ring.len() / 4)
        {
            self.harvest(vcpu);
        }
        if self.config.harvest_every > 0 && time.is_multiple_of(self.config.harvest_every) {
            // A vCPU that runs away does not come out for a timer either.
            (0..self.rings()).for_each(|vcpu| {
                if self.ring_mut(vcpu).is_some_and(|r| r.runaway == 0) {
                    self.harvest(vcpu);
                }
            });
        }
    }

    /// Before every store of a vCPU.
    pub(super) fn log(&mut self, vcpu: u32, gfn: Gfn) {
        if !self.on {
            return;
        }
        let repeat = self.config.duplicate_per_mille > 0 && self.roll(self.config.duplicate_per_mille);
        match &mut self.log {
            Log::Bitmap(bits) => {
                bits.insert(gfn);
            }
            Log::Rings { rings, logged, .. } => {
                let runaway = &mut rings[vcpu as usize].runaway;
                let (at, bit) = ((gfn.0 / 64) as usize, 1 << (gfn.0 % 64));
                let forced = *runaway > 0 || repeat;
                *runaway = runaway.saturating_sub(1);
                if forced || logged[at] & bit == 0 {
                    self.push(vcpu, gfn);
                }
            }
        }
    }

    /// Harvests everything and moves it into `dirty`.
    pub(super) fn take(&mut self, dirty: &mut DirtySet) -> Tracked {
        (0..self.rings()).for_each(|vcpu| self.harvest(vcpu));
        if let Log::Bitmap(bits) = &mut self.log {
            dirty.union_with(bits);
            bits.clear();
        }
        dirty.union_with(&self.open);
        self.open.clear();
        self.loss.map_or(Tracked::Complete, Tracked::Unknown)
    }

    /// The same with the guest stopped; after a loss it begins anew, with every page protected.
    pub(super) fn close(&mut self, dirty: &mut DirtySet) -> Tracked {
        let tracked = self.take(dirty);
        if self.loss.is_some() {
            self.renew();
        }
        tracked
    }

    fn renew(&mut self) {
        match &mut self.log {
            Log::Bitmap(bits) => bits.clear(),
            Log::Rings { rings, entries, logged } => {
                rings.iter_mut().for_each(|ring| *ring = VcpuRing::new(*entries, self.config.reserved));
                *logged = vec![0; logged.len()];
            }
        }
        self.open.clear();
        self.loss = None;
    }

    /// Harvest and reset of one ring, with the rules that tell an overrun.
    fn harvest(&mut self, vcpu: u32) {
        let Log::Rings { rings, entries, logged } = &mut self.log else { return };
        let VcpuRing { ring, stopped, .. } = &mut rings[vcpu as usize];
        let (full, open, layout) = (ring.is_full(), &mut self.open, &self.layout);
        let frame =
            |slot, offset| layout.frame_of(slot, offset).expect("only frames of the layout are logged");
        let taken = ring.harvest(|slot, offset| {
            open.insert(frame(slot, offset));
        });
        let reset = ring.reset(|slot, offset| {
            let gfn = frame(slot, offset).0;
            logged[(gfn / 64) as usize] &= !(1 << (gfn % 64));
        });
        assert_eq!(taken, reset, "harvest and reset are one step, so they see the same entries");
        *stopped &= taken == 0;
        if taken == *entries || (full && taken == 0) {
            self.loss.get_or_insert(TrackingLoss::RingOverrun { vcpu });
        }
    }

    fn push(&mut self, vcpu: u32, gfn: Gfn) {
        let Log::Rings { rings, logged, .. } = &mut self.log else { return };
        let mut slots = self.layout.slots().iter();
        let slot =
            slots.find(|s| (s.first.0..s.first.0 + s.frames).contains(&gfn.0)).expect("the frame is RAM");
        rings[vcpu as usize].ring.push(slot.id, gfn.0 - slot.first.0);
        logged[(gfn.0 / 64) as usize] |= 1 << (gfn.0 % 64);
    }

    /// The fault: a vCPU, at a full ring, may run on. Decided once for each time that the ring fills.
    fn decide_runaway(&mut self, vcpu: u32) -> bool {
        let fresh = self.ring_mut(vcpu).is_some_and(|r| !r.stopped);
        if !fresh || self.loss.is_some() || !self.roll(self.config.overrun_per_mille) {
            return false;
        }
        if let Some(r) = self.ring_mut(vcpu) {
            r.runaway = 2 * r.ring.len();
        }
        true
    }

    fn roll(&mut self, per_mille: u32) -> bool {
        self.faults = mix(self.faults, 0x6661_756c_7473);
        self.faults % 1000 < u64::from(per_mille)
    }

    fn rings(&self) -> u32 {
        match &self.log {
            Log::Rings { rings, .. } => rings.len() as u32,
            Log::Bitmap(_) => 0,
        }
    }

    fn ring_mut(&mut self, vcpu: u32) -> Option<&mut VcpuRing> {
        match &mut self.log {
            Log::Rings { rings, .. } => rings.get_mut(vcpu as usize),
            Log::Bitmap(_) => None,
        }
    }
}

impl VcpuRing {
    fn new(entries: u32, reserved: u32) -> Self {
        Self { ring: Ring::new(entries, reserved), stopped: false, runaway: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::Tracker;
    use crate::dirty_set::DirtySet;
    use crate::guest::{Tracked, TrackingLoss};
    use crate::memory::MemoryLayout;
    use crate::spec::TrackerKind;
    use crate::synthetic::Tracking;
    use colo_common::Gfn;

    fn tracker(overrun_per_mille: u32) -> (Tracker, DirtySet) {
        let layout = MemoryLayout::new(4 << 20);
        let config = Tracking {
            ring_entries: Some(128),
            harvest_every: 0,
            quarter: false,
            overrun_per_mille,
            ..Tracking::default()
        };
        let mut tracker = Tracker::new(&layout, TrackerKind::default(), 2, &config).unwrap();
        tracker.start();
        (tracker, DirtySet::new(layout.frame_limit()))
    }

    #[test]
    fn each_vcpu_fills_a_ring_of_its_own() {
        let (mut tracker, mut dirty) = tracker(0);
        (0..64).for_each(|n| tracker.log(1, Gfn(n)));
        // Logged already, by whichever vCPU: not logged again.
        (0..64).for_each(|n| tracker.log(0, Gfn(n)));
        assert!(!tracker.keeps_out(0, Gfn(900)) && tracker.keeps_out(1, Gfn(900)));
        assert!(tracker.keeps_out(1, Gfn(901)));
        assert_eq!(tracker.take(&mut dirty), Tracked::Complete);
        // The write that was logged and then held back is in the set, once.
        assert!(dirty.len() == 65 && dirty.contains(Gfn(900)));
        assert!(!tracker.keeps_out(1, Gfn(900)));
    }

    #[test]
    fn a_runaway_logs_every_write_and_its_loss_names_its_vcpu() {
        let (mut tracker, mut dirty) = tracker(1000);
        (0..64).for_each(|n| tracker.log(1, Gfn(n)));
        assert!(!tracker.keeps_out(1, Gfn(0)));
        (0..64).for_each(|_| tracker.log(1, Gfn(500)));
        // The ring has 128 entries: this one goes over the first.
        tracker.log(1, Gfn(501));
        assert_eq!(tracker.close(&mut dirty), Tracked::Unknown(TrackingLoss::RingOverrun { vcpu: 1 }));
        assert!(!dirty.contains(Gfn(0)) && dirty.contains(Gfn(501)));
        dirty.clear();
        tracker.log(0, Gfn(0));
        assert_eq!(tracker.close(&mut dirty), Tracked::Complete);
        assert!(dirty.iter().eq([Gfn(0)]));
    }
}
