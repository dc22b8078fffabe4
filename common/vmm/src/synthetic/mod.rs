//! A guest in software, behind the same trait as a KVM guest: seeded, deterministic and cheap to make, for the
//! simulations, and for the demo where there is no /dev/kvm.
//!
//! It has guest memory, vCPUs that take turns, and for each of them a dirty ring with the states, limits and
//! faults of KVM's. It runs a program that checks its own memory (see `program`), and it moves only in
//! [`SyntheticGuest::advance`]: nothing in here sleeps, reads a clock or draws from anything but its seeds.
//!
//! vCPUs take their turns in a fixed order. One that a full ring keeps out of the guest therefore holds up the
//! others too, as one does that holds a lock: when it waits is the host's doing, and what the guest says must
//! not depend on its host.

mod bus;
mod chain;
mod config;
mod disk;
mod pace;
mod paced;
mod pages;
mod program;
mod ring;
mod state;
#[cfg(test)]
mod tests;
mod tracker;

pub use config::{
    End, MAX_BLOCKS, MAX_STEP_ENTRIES, MAX_WORDS, MAX_WRITE_STEPS, MAX_WRITES, MIN_FRAME_BYTES, Program,
    SyntheticConfig, SyntheticError, Tracking,
};
pub use pace::Pace;
pub use paced::PacedGuest;
pub use state::SyntheticState;

use colo_common::PAGE_SIZE;
use colo_common::limits::{MAX_CONSOLE_INPUT, MAX_VCPUS};
use std::sync::Arc;
use std::time::Duration;

use crate::arch::x86_64::processor::{CpuMisfit, GuestCpu};
use crate::block_set::BlockSet;
use crate::devices::DiskTracking;
use crate::dirty_set::DirtySet;
use crate::disk::{Disk, DiskDelta};
use crate::egress::{Egress, Output, OutputPosition};
use crate::guest::{
    Cut, CutTiming, GuestError, GuestEvent, GuestFailure, Lifecycle, ProtectedGuest, Tracked, Wake,
};
use crate::memory::GuestMemory;
use crate::spec::GuestSpec;
use crate::state::{Body, MachineState, StateError};
use bus::CpuView;
use disk::{BlockDevice, Filling};
use program::Step;
use state::MAX_COUNT;
use tracker::Tracker;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Run {
    /// Neither booted nor restored.
    Built,
    Stopped,
    Running,
}

impl Run {
    fn name(self) -> &'static str {
        match self {
            Self::Built => "neither booted nor restored",
            Self::Stopped => "stopped",
            Self::Running => "running",
        }
    }
}

/// A software guest.
pub struct SyntheticGuest {
    spec: GuestSpec,
    /// Of the spec; its boot files may be large.
    digest: u64,
    memory: Arc<GuestMemory>,
    view: CpuView,
    tracker: Tracker,
    egress: Egress,
    disk: Option<BlockDevice>,
    /// Where the disk's host begins to draw from.
    host_seed: u64,
    state: SyntheticState,
    pending: Option<Lifecycle>,
    /// Offset of the next byte of console input.
    input_offset: u64,
    run: Run,
    /// Raised since the last cut, in order, and how many of them were told.
    raised: Vec<GuestEvent>,
    told: usize,
    wake: Option<Wake>,
}

impl SyntheticGuest {
    /// Makes a guest of `spec` that is not booted yet. Its boot source is part of what both nodes must agree
    /// on and is not run.
    ///
    /// # Errors
    /// A number of the configuration is out of its range, or the memory cannot be made.
    pub fn new(spec: GuestSpec, config: SyntheticConfig) -> Result<Self, SyntheticError> {
        let memory = Arc::new(GuestMemory::new(spec.memory_bytes)?);
        Self::with_memory(spec, config, memory)
    }

    /// As [`new`](Self::new), around memory that already holds something, such as an image.
    ///
    /// # Errors
    /// As [`new`](Self::new), or the memory is of another size.
    pub fn with_memory(
        spec: GuestSpec,
        config: SyntheticConfig,
        memory: Arc<GuestMemory>,
    ) -> Result<Self, SyntheticError> {
        let SyntheticConfig { program, tracking } = config;
        if !(1..=MAX_VCPUS).contains(&spec.vcpus) || !spec.memory_bytes.is_multiple_of(PAGE_SIZE as u64) {
            let (vcpus, bytes) = (spec.vcpus, spec.memory_bytes);
            return Err(SyntheticError::Config(format!("{vcpus} vCPUs and {bytes} bytes of memory")));
        }
        program.check(spec.vcpus, spec.memory_bytes / PAGE_SIZE as u64).map_err(SyntheticError::Config)?;
        let (found, expected) = (memory.layout().bytes(), spec.memory_bytes);
        if found != expected {
            return Err(SyntheticError::Config(format!("{found} bytes of memory for a guest of {expected}")));
        }
        let tracker = Tracker::new(memory.layout(), spec.tracker, spec.vcpus, &tracking);
        Ok(Self {
            digest: spec.digest(),
            view: CpuView::new(&memory)?,
            tracker: tracker.map_err(SyntheticError::Config)?,
            egress: Egress::default(),
            disk: None,
            host_seed: tracking.seed,
            state: SyntheticState::power_on(&program, spec.vcpus, 1),
            pending: None,
            input_offset: 0,
            run: Run::Built,
            raised: Vec::new(),
            told: 0,
            wake: None,
            spec,
            memory,
        })
    }

    /// Gives the guest its disk, before it boots or is restored.
    ///
    /// # Errors
    /// The disk is smaller than what the program works on.
    pub fn with_disk(mut self, disk: Arc<dyn Disk>) -> Result<Self, SyntheticError> {
        let (blocks, needed) = (disk.bytes() / PAGE_SIZE as u64, self.state.program.blocks);
        if blocks < u64::from(needed) {
            return Err(SyntheticError::Config(format!("a disk of {blocks} blocks for a guest of {needed}")));
        }
        self.disk = Some(BlockDevice::new(disk, self.host_seed));
        Ok(self)
    }

    /// Lets the guest take up to `steps` steps and returns how many it took: fewer when something asks for a
    /// cut or a full ring waits for a collect, none unless it runs.
    pub fn advance(&mut self, steps: u64) -> u64 {
        let taken = (0..steps).find(|_| !self.step()).unwrap_or(steps);
        self.raise();
        taken
    }

    /// Steps since power-on or reset.
    pub fn time(&self) -> u64 {
        self.state.time
    }

    /// Guest time since power-on or reset.
    pub fn clock(&self) -> Duration {
        Duration::from_nanos(self.state.time.saturating_mul(self.state.program.step_ns))
    }

    /// Takes one step, unless the guest has to wait.
    fn step(&mut self) -> bool {
        if self.run != Run::Running || self.has_to_wait() {
            return false;
        }
        let vcpu = self.state.turn();
        if self.tracker.keeps_out(vcpu, self.view.frame(program::ALWAYS_WRITTEN)) {
            return false;
        }
        let Self { state, view, tracker, egress, disk, .. } = self;
        match (Step { state, view, tracker, egress, disk: disk.as_mut() }).run() {
            Ok(ask) => self.pending = ask,
            Err(wrong) => {
                self.state.failed = Some(wrong);
                self.egress.push_console(format!("colo-error {wrong}\n").as_bytes());
            }
        }
        self.tracker.after_step(vcpu, self.state.time);
        true
    }

    /// Whether there is no next step before a cut.
    fn has_to_wait(&self) -> bool {
        self.pending.is_some() || self.state.failed.is_some() || self.egress.is_full()
    }

    fn failure(&self) -> Option<GuestFailure> {
        let wrong = self.state.failed?;
        Some(GuestFailure::Run { vcpu: wrong.vcpu, what: format!("it found {wrong}") })
    }

    /// Raises what asks for a cut of a running guest, each thing once between two cuts.
    fn raise(&mut self) {
        if self.run != Run::Running {
            return;
        }
        let before = self.raised.len();
        let failed = self.failure().map(GuestEvent::Failed);
        let lifecycle = self.pending.map(GuestEvent::Lifecycle);
        let lost = self.tracker.loss().map(GuestEvent::TrackingLost);
        let full = self.egress.is_full().then_some(GuestEvent::OutputFull);
        for event in [failed, lifecycle, lost, full].into_iter().flatten() {
            if !self.raised.contains(&event) {
                self.raised.push(event);
            }
        }
        if self.raised.len() > before {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(wake) = &self.wake {
            wake();
        }
    }

    fn wrong_state(&self, wanted: &'static str) -> GuestError {
        GuestError::WrongState { wanted, state: self.run.name() }
    }

    /// Sets the machine as after power-on; the host's half of console input stays.
    fn power_on(&mut self, boots: u64) {
        self.end_writes();
        let input = std::mem::take(&mut self.state.input);
        let fresh = SyntheticState::power_on(&self.state.program, self.spec.vcpus, boots);
        self.state = SyntheticState { input, ..fresh };
        self.view.set_spread(self.state.program.spread);
        program::load(&self.state, &self.view);
        self.pending = None;
        self.run = Run::Stopped;
    }

    /// Digest of what its disk holds once all that is under way has ended, so of what a state and a disk are together;
    /// none without a disk.
    pub fn disk_digest(&self) -> Option<u128> {
        let Program { blocks, .. } = *self.state.program;
        self.disk.as_ref().map(|disk| disk.digest(&self.state.requests, self.filling(), blocks))
    }

    fn filling(&self) -> Filling {
        let Program { seed, words, .. } = *self.state.program;
        Filling { seed, words }
    }

    /// What is under way ends, and is in the log: it may be on the disk already.
    fn end_writes(&mut self) {
        let filling = self.filling();
        if let Some(disk) = &mut self.disk {
            disk.drain(&mut self.state.requests, filling);
        }
    }

    /// The guest's program needs a disk as large as it says.
    fn check_disk(&self, program: &Program) -> Result<(), StateError> {
        let (blocks, needed) = (self.disk.as_ref().map_or(0, BlockDevice::blocks), u64::from(program.blocks));
        if blocks < needed {
            return Err(StateError::Malformed(format!("a guest of {needed} blocks with a disk of {blocks}")));
        }
        Ok(())
    }

    /// The state of another guest may be of any size and say anything.
    fn check_state<'s>(&self, state: &'s MachineState) -> Result<&'s SyntheticState, StateError> {
        state.check_spec(self.digest)?;
        let Body::Synthetic(synthetic) = &state.body else {
            return Err(StateError::OtherKind { found: "KVM", expected: "synthetic" });
        };
        let frames = self.spec.memory_bytes / PAGE_SIZE as u64;
        synthetic.check_for(u64::from(self.spec.vcpus), frames).map_err(StateError::Malformed)?;
        self.check_disk(&synthetic.program)?;
        let counts = [state.output.console, state.output.frames, state.console_input];
        if counts.iter().any(|&count| count > MAX_COUNT) {
            return Err(StateError::Malformed("an output position that no guest reaches".to_owned()));
        }
        Ok(synthetic)
    }
}

impl ProtectedGuest for SyntheticGuest {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn cpu(&self) -> Option<GuestCpu> {
        None
    }

    fn check_cpu(&self, cpu: Option<&GuestCpu>) -> Result<(), CpuMisfit> {
        match cpu {
            None => Ok(()),
            Some(_) => Err(CpuMisfit::Kind { found: "kvm", expected: "synthetic" }),
        }
    }

    fn boot(&mut self) -> Result<(), GuestError> {
        if self.run != Run::Built {
            return Err(self.wrong_state("boot"));
        }
        self.check_disk(&self.state.program)?;
        self.power_on(1);
        Ok(())
    }

    fn count_from(&mut self, start: OutputPosition) -> Result<(), GuestError> {
        let silent = self.egress.position() == OutputPosition::default() && self.input_offset == 0;
        if self.run != Run::Stopped || !silent {
            return Err(self.wrong_state("set the first offsets of"));
        }
        self.egress.restore(start);
        self.input_offset = start.console;
        Ok(())
    }

    fn restore(&mut self, state: &MachineState) -> Result<(), GuestError> {
        if self.run == Run::Running {
            return Err(self.wrong_state("restore"));
        }
        let restored = self.check_state(state)?.clone();
        let (filling, old) = (self.filling(), std::mem::replace(&mut self.state, restored));
        if let Some(disk) = &mut self.disk {
            disk.take_over(&old.requests, filling, self.state.requests.len());
        }
        self.view.set_spread(self.state.program.spread);
        self.egress.restore(state.output);
        self.input_offset = state.console_input;
        self.pending = state.pending;
        self.run = Run::Stopped;
        Ok(())
    }

    fn reset(&mut self) -> Result<(), GuestError> {
        if self.run != Run::Stopped {
            return Err(self.wrong_state("reset"));
        }
        self.power_on(self.state.boots + 1);
        Ok(())
    }

    fn protect(&mut self) -> Result<(), GuestError> {
        self.memory.track_writes(true);
        self.tracker.start();
        Ok(())
    }

    fn unprotect(&mut self) -> Result<(), GuestError> {
        self.memory.track_writes(false);
        self.tracker.stop();
        Ok(())
    }

    fn collect(&mut self, dirty: &mut DirtySet) -> Result<Tracked, GuestError> {
        self.memory.take_writes(dirty);
        let tracked = self.tracker.take(dirty);
        // It may have found a loss.
        self.raise();
        Ok(tracked)
    }

    /// Takes no time: all of [`CutTiming`] is zero.
    fn cut(&mut self, dirty: &mut DirtySet) -> Result<Cut, GuestError> {
        if self.run != Run::Running {
            return Err(self.wrong_state("cut"));
        }
        self.run = Run::Stopped;
        let state = MachineState {
            spec: self.digest,
            output: self.egress.position(),
            console_input: self.input_offset,
            pending: self.pending,
            body: Body::Synthetic(Box::new(self.state.clone())),
        };
        self.raised.clear();
        self.told = 0;
        self.memory.take_writes(dirty);
        let tracked = self.tracker.close(dirty);
        let (failed, output) = (self.failure(), self.egress.take());
        let disk = self.disk.as_ref().map_or_else(DiskDelta::none, BlockDevice::take);
        Ok(Cut { state, tracked, output, disk, failed, timing: CutTiming::default() })
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        if self.run != Run::Stopped {
            return Err(self.wrong_state("resume"));
        }
        self.run = Run::Running;
        // What stands from before the cut.
        self.raise();
        Ok(())
    }

    /// Never waits: the guest does not move by itself, so nothing would come.
    fn next_event(&mut self, _timeout: Duration) -> Option<GuestEvent> {
        self.raise();
        let event = self.raised.get(self.told)?.clone();
        self.told += 1;
        Some(event)
    }

    fn on_event(&mut self, wake: Wake) {
        self.wake = Some(wake);
        if self.told < self.raised.len() {
            self.wake();
        }
    }

    fn console_input(&mut self, bytes: &[u8]) -> usize {
        let waiting = self.state.input.len() + self.state.unread as usize;
        let taken = bytes.len().min(MAX_CONSOLE_INPUT.saturating_sub(waiting));
        self.state.input.extend_from_slice(&bytes[..taken]);
        self.input_offset += taken as u64;
        taken
    }

    fn console_input_offset(&self) -> u64 {
        self.input_offset
    }

    fn power_button(&mut self) {
        self.state.power_button = true;
    }

    fn drain_output(&mut self) -> Output {
        // There is room again: should it fill once more, that is news.
        if let Some(at) = self.raised.iter().position(|event| *event == GuestEvent::OutputFull) {
            self.raised.remove(at);
            self.told -= usize::from(at < self.told);
        }
        self.egress.take()
    }

    fn track_disk(&mut self, tracking: DiskTracking) {
        self.disk.iter().for_each(|disk| disk.track(tracking));
    }

    fn collect_blocks(&mut self) -> (BlockSet, usize) {
        self.disk.as_ref().map_or_else(|| (BlockSet::new(0), 0), BlockDevice::collect)
    }
}
