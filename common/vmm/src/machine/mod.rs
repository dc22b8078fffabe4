//! [`KvmGuest`]: a guest on KVM, driven through [`ProtectedGuest`].

mod vm;

use colo_common::limits::MAX_VCPUS;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use crate::admission::{self, AdmissionError};
use crate::arch::x86_64::boot_regs;
use crate::arch::x86_64::chips::ChipState;
use crate::arch::x86_64::clock::ClockState;
use crate::arch::x86_64::cpuid::{CpuidError, CpuidTable};
use crate::arch::x86_64::vcpu_state::VcpuState;
use crate::boot;
use crate::devices::DeviceState;
use crate::dirty_set::DirtySet;
use crate::egress::{Egress, Output};
use crate::guest::{Cut, CutTiming, GuestError, GuestEvent, Lifecycle, ProtectedGuest, Tracked};
use crate::host::{Host, HostError, Virtualisation, remedy};
use crate::kick;
use crate::memory::{GuestMemory, MemoryError};
use crate::sigbus;
use crate::spec::{GuestSpec, SpecError};
use crate::state::{Body, MachineState, StateError, bounded};
use crate::tracker::Cadence;
use vm::{Surroundings, Vm, timed};

/// Why a guest could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The host's KVM.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The description.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The host's memory.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The CPU model.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// Memory of another size than the spec's: an own bug of the caller.
    #[error("the memory given has {found} bytes and the spec says {expected}")]
    OtherMemory {
        /// Bytes given.
        found: u64,
        /// Bytes wanted.
        expected: u64,
    },
    /// KVM refused a step.
    #[error("KVM refused to {what}: {source}{}", remedy(.source))]
    Kvm {
        /// The step.
        what: &'static str,
        /// What KVM said.
        source: io::Error,
    },
}

/// A KVM guest's machine at a cut.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KvmState {
    cpuid: CpuidTable,
    #[serde(deserialize_with = "bounded::<_, _, { MAX_VCPUS as usize }>")]
    vcpus: Vec<VcpuState>,
    chips: ChipState,
    clock: ClockState,
    devices: DeviceState,
}

impl KvmState {
    pub(crate) fn check_limits(&self, console_input: u64) -> Result<(), StateError> {
        let count = self.vcpus.len();
        if count == 0 || count > MAX_VCPUS as usize {
            return Err(StateError::Malformed(format!("{count} vCPUs")));
        }
        if self.devices.input_offset() != console_input {
            return Err(StateError::Malformed("two positions of console input".to_owned()));
        }
        self.cpuid.check_limits()?;
        self.vcpus.iter().try_for_each(VcpuState::check_limits)?;
        self.chips.check_limits()?;
        self.devices.check_limits()
    }

    /// vCPUs that were halted at the cut.
    pub fn halted(&self) -> usize {
        self.vcpus.iter().filter(|vcpu| vcpu.is_halted()).count()
    }

    /// vCPUs that had an interrupt requested or injected and not yet taken at the cut.
    pub fn interrupted(&self) -> usize {
        self.vcpus.iter().filter(|vcpu| vcpu.has_interrupt()).count()
    }

    /// vCPUs whose local timer was counting at the cut.
    pub fn timers_armed(&self) -> usize {
        self.vcpus.iter().filter(|vcpu| vcpu.has_armed_timer()).count()
    }

    fn tsc_offsets(&self) -> Vec<Option<u64>> {
        self.vcpus.iter().map(VcpuState::tsc_offset).collect()
    }
}

enum RunState {
    /// No image loaded and no state set.
    Built,
    Stopped {
        clock: ClockState,
        tsc_offsets: Vec<Option<u64>>,
    },
    Running,
    /// A step failed half-way; the guest can only be dropped.
    Failed,
}

impl RunState {
    fn name(&self) -> &'static str {
        match self {
            Self::Built => "neither booted nor restored",
            Self::Stopped { .. } => "stopped",
            Self::Running => "running",
            Self::Failed => "no longer usable after an earlier error: drop it and restore its last state",
        }
    }
}

/// A guest on KVM.
pub struct KvmGuest {
    /// Replaced as a whole when its dirty rings are of no more use; nothing only between the two.
    vm: Option<Vm>,
    state: RunState,
    protected: bool,
    egress: Arc<Egress>,
    events: Receiver<GuestEvent>,
    events_in: Sender<GuestEvent>,
    memory: Arc<GuestMemory>,
    host: Host,
    spec: GuestSpec,
    /// Of the spec: its boot images may be large.
    digest: u64,
    cadence: Cadence,
}

impl KvmGuest {
    /// A guest with memory of its own; [`boot`](ProtectedGuest::boot) or restore it.
    ///
    /// # Errors
    /// The host, its memory or the spec does not allow it.
    pub fn new(spec: GuestSpec) -> Result<Self, BuildError> {
        spec.validate()?;
        admission::check(&spec)?;
        let memory = Arc::new(GuestMemory::new(spec.memory_bytes)?);
        Self::with_memory(spec, memory, Cadence::default())
    }

    /// A guest around memory that already holds something, such as an image; `cadence` other than the
    /// default is for tests.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_memory(
        spec: GuestSpec,
        memory: Arc<GuestMemory>,
        cadence: Cadence,
    ) -> Result<Self, BuildError> {
        spec.validate()?;
        let (found, expected) = (memory.layout().bytes(), spec.memory_bytes);
        if found != expected {
            return Err(BuildError::OtherMemory { found, expected });
        }
        let host = Host::open()?;
        host.check_tracker(spec.tracker)?;
        host.check_vcpus(spec.vcpus)?;
        kick::install();
        sigbus::install().map_err(|source| BuildError::Kvm { what: "handle SIGBUS", source })?;
        let (events_in, events) = mpsc::channel();
        let egress = Arc::new(Egress::default());
        let (state, protected, digest) = (RunState::Built, false, spec.digest());
        let mut guest = Self {
            vm: None,
            state,
            protected,
            egress,
            events,
            events_in,
            memory,
            host,
            spec,
            digest,
            cadence,
        };
        guest.vm = Some(guest.build_vm()?);
        Ok(guest)
    }

    /// How this host runs guests.
    pub fn virtualisation(&self) -> Virtualisation {
        self.host.virtualisation()
    }

    /// Whether the guest's TSC stops at a cut and moves with the guest; some hosts cannot do that, and there
    /// kvmclock alone carries guest time.
    pub fn tsc_moves(&self) -> bool {
        self.vm.as_ref().is_some_and(Vm::tsc_moves)
    }

    /// Port and MMIO accesses that cuts of this VM found half done, and completed before saving.
    pub fn accesses_settled(&self) -> u64 {
        self.vm.as_ref().map_or(0, |vm| vm.shared().settled.load(Ordering::Relaxed))
    }

    fn build_vm(&self) -> Result<Vm, BuildError> {
        Vm::build(&Surroundings {
            host: &self.host,
            spec: &self.spec,
            memory: &self.memory,
            egress: &self.egress,
            events: &self.events_in,
            cadence: self.cadence,
        })
    }

    /// The VM; gone only after a rebuild that failed.
    fn vm(&self, wanted: &'static str) -> Result<&Vm, GuestError> {
        let state = RunState::Failed.name();
        self.vm.as_ref().ok_or(GuestError::WrongState { wanted, state })
    }

    fn expect_stopped(&self, wanted: &'static str) -> Result<(), GuestError> {
        match self.state {
            RunState::Running | RunState::Failed => Err(self.wrong_state(wanted)),
            RunState::Built | RunState::Stopped { .. } => Ok(()),
        }
    }

    fn wrong_state(&self, wanted: &'static str) -> GuestError {
        GuestError::WrongState { wanted, state: self.state.name() }
    }

    /// A step that failed may have done a half of what it should: the guest is of no more use.
    fn or_failed<T>(&mut self, done: Result<T, GuestError>) -> Result<T, GuestError> {
        if done.is_err() {
            self.state = RunState::Failed;
        }
        done
    }

    /// Sets the machine and what goes with it.
    fn set_machine(&mut self, state: &KvmState, pending: Option<Lifecycle>) -> Result<(), GuestError> {
        let wanted = RunState::Failed.name();
        let vm = self.vm.as_mut().ok_or(GuestError::WrongState { wanted: "restore", state: wanted })?;
        let restored = vm.restore(state).map_err(GuestError::from);
        vm.shared().clear_failure();
        vm.shared().set_pending(pending);
        self.or_failed(restored)?;
        self.state = RunState::Stopped { clock: state.clock, tsc_offsets: state.tsc_offsets() };
        Ok(())
    }

    /// Loads the boot images; the state of power-on with their entry.
    fn power_on(&self) -> Result<KvmState, GuestError> {
        let mut state = self.vm("boot")?.power_on();
        let entry = boot::load(self.memory.ram(), self.memory.layout(), &self.spec)?;
        state.vcpus[0].set_entry(|sregs, regs| boot_regs::apply(&entry, sregs, regs));
        Ok(state)
    }

    /// After an overrun our index into the rings and KVM's are apart, so the VM is built anew around the same
    /// memory and goes on from the state that was just saved.
    fn rebuild(&mut self, state: &KvmState) -> Result<(), GuestError> {
        let pending = self.vm("rebuild")?.shared().pending();
        self.vm = None;
        let built = self.build_vm().map_err(|e| GuestError::Kvm {
            what: "build the VM anew after its dirty rings were overrun",
            source: io::Error::other(e),
        })?;
        built.set_logging(self.protected)?;
        self.vm = Some(built);
        self.set_machine(state, pending)
    }

    fn cut_running(&mut self, dirty: &mut DirtySet) -> Result<Cut, GuestError> {
        let vm = self.vm("cut")?;
        let (paused, stop) = timed(|| vm.pause());
        paused?;
        let (saved, save) = timed(|| vm.save());
        let kvm = saved?;
        // Saving can write guest memory, so the dirty set is closed after it.
        let (closed, harvest) = timed(|| vm.close_dirty(dirty));
        let tracked = closed?;
        let (failed, pending) = (vm.shared().failure(), vm.shared().pending());
        // What was raised until now is in the cut.
        while self.events.try_recv().is_ok() {}
        self.state = RunState::Stopped { clock: kvm.clock, tsc_offsets: kvm.tsc_offsets() };
        if let Tracked::Unknown(loss) = tracked {
            tracing::error!("guest {}: {loss}; the epoch fails and the VM is built anew", self.spec.name);
            self.rebuild(&kvm)?;
        }
        let state = MachineState {
            spec: self.digest,
            output: self.egress.position(),
            console_input: kvm.devices.input_offset(),
            pending,
            body: Body::Kvm(Box::new(kvm)),
        };
        let output = self.egress.take();
        Ok(Cut { state, tracked, output, failed, timing: CutTiming { stop, save, harvest } })
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        let mut forgotten = DirtySet::new(self.memory.layout().frame_limit());
        let tracked = self.vm("unprotect")?.close_dirty(&mut forgotten)?;
        self.vm("unprotect")?.set_logging(false)?;
        self.protected = false;
        self.memory.track_writes(false);
        if tracked != Tracked::Complete {
            let state = self.vm("unprotect")?.save()?;
            self.rebuild(&state)?;
            // A new VM's clock begins at zero.
            self.vm("unprotect")?.start_clock(&state.clock, &state.tsc_offsets())?;
        }
        Ok(())
    }

    /// Changes something that needs stopped vCPUs, whether the guest runs or not. Guest time goes on.
    fn while_paused(
        &mut self,
        wanted: &'static str,
        change: impl FnOnce(&mut Self) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        let running = match self.state {
            RunState::Failed => return Err(self.wrong_state(wanted)),
            RunState::Running => true,
            RunState::Built | RunState::Stopped { .. } => false,
        };
        if running {
            let paused = self.vm(wanted)?.pause();
            self.or_failed(paused)?;
        }
        let changed = change(self);
        self.or_failed(changed)?;
        if running {
            self.vm(wanted)?.run();
            self.state = RunState::Running;
        }
        Ok(())
    }
}

impl ProtectedGuest for KvmGuest {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn boot(&mut self) -> Result<(), GuestError> {
        self.expect_stopped("boot")?;
        let state = self.power_on()?;
        self.set_machine(&state, None)
    }

    fn restore(&mut self, state: &MachineState) -> Result<(), GuestError> {
        self.expect_stopped("restore")?;
        state.check_spec(self.digest)?;
        let Body::Kvm(kvm) = &state.body else {
            return Err(StateError::OtherKind { found: "synthetic", expected: "kvm" }.into());
        };
        self.set_machine(kvm, state.pending)?;
        self.egress.restore(state.output);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), GuestError> {
        let RunState::Stopped { clock, tsc_offsets } = &self.state else {
            return Err(self.wrong_state("reset"));
        };
        let (clock, tsc_offsets) = (*clock, tsc_offsets.clone());
        let mut state = self.power_on()?;
        // Time goes on, and so does what lies outside the machine.
        state.clock = clock;
        for (vcpu, offset) in state.vcpus.iter_mut().zip(tsc_offsets) {
            vcpu.set_tsc_offset(offset);
        }
        state.devices = state.devices.after_reset(&self.vm("reset")?.shared().devices.save());
        self.set_machine(&state, None)
    }

    fn protect(&mut self) -> Result<(), GuestError> {
        self.while_paused("protect", |guest| {
            guest.memory.track_writes(true);
            guest.vm("protect")?.set_logging(true)?;
            guest.protected = true;
            Ok(())
        })
    }

    fn unprotect(&mut self) -> Result<(), GuestError> {
        self.while_paused("unprotect", Self::stop_tracking)
    }

    fn collect(&mut self, dirty: &mut DirtySet) -> Result<Tracked, GuestError> {
        self.vm("collect from")?.collect_dirty(dirty)
    }

    fn cut(&mut self, dirty: &mut DirtySet) -> Result<Cut, GuestError> {
        if !matches!(self.state, RunState::Running) {
            return Err(self.wrong_state("cut"));
        }
        let cut = self.cut_running(dirty);
        self.or_failed(cut)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        let RunState::Stopped { clock, tsc_offsets } = &self.state else {
            return Err(self.wrong_state("resume"));
        };
        let vm = self.vm("resume")?;
        vm.shared().tell_again();
        vm.start_clock(clock, tsc_offsets)?;
        vm.run();
        self.state = RunState::Running;
        Ok(())
    }

    fn next_event(&mut self, timeout: Duration) -> Option<GuestEvent> {
        self.events.recv_timeout(timeout).ok()
    }

    fn console_input(&mut self, bytes: &[u8]) -> usize {
        let Some(vm) = &self.vm else { return 0 };
        vm.shared().devices.input(bytes).unwrap_or_else(|e| {
            tracing::error!("guest {}: console input cannot raise its interrupt: {e}", self.spec.name);
            0
        })
    }

    fn console_input_offset(&self) -> u64 {
        self.vm.as_ref().map_or(0, |vm| vm.shared().devices.input_offset())
    }

    fn power_button(&mut self) {
        let Some(vm) = &self.vm else { return };
        if let Err(e) = vm.shared().devices.power_button() {
            tracing::error!("guest {}: the power button cannot raise its interrupt: {e}", self.spec.name);
        }
    }

    fn drain_output(&mut self) -> Output {
        let output = self.egress.take();
        if let Some(vm) = &self.vm {
            vm.shared().gate.notify();
        }
        output
    }
}
