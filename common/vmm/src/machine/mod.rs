//! [`KvmGuest`]: a guest on KVM, driven through [`ProtectedGuest`].

mod vm;

use colo_common::bounded::list;
use colo_common::limits::MAX_VCPUS;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::admission::{self, AdmissionError};
use crate::arch::x86_64::boot_regs;
use crate::arch::x86_64::chips::{self, ChipState, Pit};
use crate::arch::x86_64::clock::ClockState;
use crate::arch::x86_64::cpuid::{CpuidError, CpuidTable};
use crate::arch::x86_64::processor::{CpuMisfit, GuestCpu};
use crate::arch::x86_64::vcpu_state::VcpuState;
use crate::block_set::BlockSet;
use crate::boot;
use crate::devices::{Backends, ConsoleInput, DeviceState, DiskTracking, Virtio};
use crate::dirty_set::DirtySet;
use crate::egress::{Egress, Output, OutputPosition};
use crate::events::Events;
use crate::guest::{
    Cut, CutTiming, GuestError, GuestEvent, GuestFailure, Lifecycle, ProtectedGuest, Tracked, Wake,
};
use crate::host::{Host, HostError, Virtualisation, remedy};
use crate::kick;
use crate::memory::{GuestMemory, MemoryError};
use crate::sigbus;
use crate::spec::{GuestSpec, SpecError};
use crate::state::{Body, MachineState, StateError};
use crate::tracker::Cadence;
use crate::vcpu::Settled;
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
    /// A device of the spec without its part of the host: an own bug of the caller.
    #[error("the guest's {0} has nothing of the host behind it")]
    NoBackend(&'static str),
    /// A disk of another size than the spec's: an own bug of the caller.
    #[error("the disk given has {found} bytes and the spec says {expected}")]
    OtherDisk {
        /// Bytes given.
        found: u64,
        /// Bytes wanted.
        expected: u64,
    },
    /// A vCPU's thread cannot have the timer by which it harvests its dirty ring.
    #[error(
        "no timer for the thread of vCPU {vcpu}: {source}; raise the limit on pending signals (ulimit -i)"
    )]
    Timer {
        /// The vCPU.
        vcpu: u32,
        /// What the system said.
        source: io::Error,
    },
}

/// Longest stop after which the interval timer just runs on.
const SHORT_STOP: Duration = Duration::from_millis(100);

/// A KVM guest's machine at a cut.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KvmState {
    cpuid: CpuidTable,
    #[serde(deserialize_with = "list::<_, _, { MAX_VCPUS as usize }>")]
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

    /// The guest's processor. All its vCPUs carry their TSC in one way.
    pub(crate) fn cpu(&self) -> Result<GuestCpu, StateError> {
        let tsc_moves = self.vcpus.first().is_some_and(|vcpu| vcpu.tsc_offset().is_some());
        if self.vcpus.iter().any(|vcpu| vcpu.tsc_offset().is_some() != tsc_moves) {
            return Err(StateError::Malformed("vCPUs whose TSC is carried in two ways".to_owned()));
        }
        Ok(GuestCpu { cpuid: self.cpuid.clone(), tsc_khz: self.clock.tsc_khz, tsc_moves })
    }

    fn tsc_offsets(&self) -> Vec<Option<u64>> {
        self.vcpus.iter().map(VcpuState::tsc_offset).collect()
    }
}

/// Accesses of a guest to its devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accesses {
    /// To ports.
    pub ports: u64,
    /// To memory that is no RAM.
    pub mmio: u64,
}

/// What runs on in KVM while the guest stands still, as it was when the guest stopped.
struct Stop {
    clock: ClockState,
    tsc_offsets: Vec<Option<u64>>,
    pit: Pit,
    since: Instant,
}

impl Stop {
    /// Now, in this state.
    fn at(state: &KvmState) -> Self {
        let (clock, tsc_offsets, pit) = (state.clock, state.tsc_offsets(), state.chips.pit());
        Self { clock, tsc_offsets, pit, since: Instant::now() }
    }

    /// Puts guest time as it was at the stop into a state of the same machine.
    fn keep_time(&self, state: &mut KvmState) {
        state.clock = self.clock;
        for (vcpu, offset) in state.vcpus.iter_mut().zip(&self.tsc_offsets) {
            vcpu.set_tsc_offset(*offset);
        }
    }
}

/// What holds a guest, and outlives a VM that is built anew.
#[derive(Default)]
struct Holds {
    pending: Option<Lifecycle>,
    failure: Option<GuestFailure>,
}

enum RunState {
    /// No image loaded and no state set.
    Built,
    Stopped(Stop),
    Running,
    /// A step failed half-way; the guest can only be dropped.
    Failed,
}

impl RunState {
    fn name(&self) -> &'static str {
        match self {
            Self::Built => "neither booted nor restored",
            Self::Stopped(_) => "stopped",
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
    /// After the VM, whose threads call it.
    virtio: Arc<Virtio>,
    input: Arc<ConsoleInput>,
    egress: Arc<Egress>,
    events: Arc<Events>,
    settled: Arc<Settled>,
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
        Self::on(spec, memory, &Backends::default(), cadence)
    }

    /// A guest around memory, with devices on these parts of the host.
    ///
    /// # Errors
    /// As [`new`](Self::new), or a device has nothing behind it.
    pub fn on(
        spec: GuestSpec,
        memory: Arc<GuestMemory>,
        backends: &Backends,
        cadence: Cadence,
    ) -> Result<Self, BuildError> {
        spec.validate()?;
        check_backends(&spec, backends)?;
        let (found, expected) = (memory.layout().bytes(), spec.memory_bytes);
        if found != expected {
            return Err(BuildError::OtherMemory { found, expected });
        }
        let host = Host::open()?;
        host.check_tracker(spec.tracker)?;
        host.check_vcpus(spec.vcpus)?;
        kick::install();
        sigbus::install().map_err(|source| BuildError::Kvm { what: "handle SIGBUS", source })?;
        let (events, settled) = (Arc::default(), Arc::default());
        let (egress, input) = (Arc::new(Egress::default()), Arc::new(ConsoleInput::default()));
        let typed = spec.virtio.console_input.then(|| Arc::clone(&input));
        let virtio = Virtio::new(&spec, backends, &memory, (&egress, &events), typed);
        let virtio = virtio.map_err(|source| BuildError::Kvm { what: "start the virtio devices", source })?;
        let (state, protected, digest) = (RunState::Built, false, spec.digest());
        let mut guest = Self {
            vm: None,
            state,
            protected,
            virtio: Arc::new(virtio),
            input,
            egress,
            events,
            settled,
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
        self.vm.as_ref().is_some_and(|vm| vm.cpu().tsc_moves)
    }

    /// Port and MMIO accesses that stops of this guest found half done, and completed.
    pub fn accesses_settled(&self) -> Accesses {
        let Settled { ports, mmio } = &*self.settled;
        Accesses { ports: ports.load(Ordering::Relaxed), mmio: mmio.load(Ordering::Relaxed) }
    }

    fn build_vm(&self) -> Result<Vm, BuildError> {
        Vm::build(&Surroundings {
            host: &self.host,
            spec: &self.spec,
            memory: &self.memory,
            egress: &self.egress,
            events: &self.events,
            settled: &self.settled,
            input: &self.input,
            virtio: &self.virtio,
            cadence: self.cadence,
        })
    }

    /// The VM; gone only after a rebuild that failed.
    fn vm(&self, wanted: &'static str) -> Result<&Vm, GuestError> {
        let state = RunState::Failed.name();
        self.vm.as_ref().ok_or(GuestError::WrongState { wanted, state })
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
    fn set_machine(&mut self, state: &KvmState, holds: Holds) -> Result<(), GuestError> {
        let restored = self.virtio.restore(state.devices.virtio()).map_err(GuestError::from);
        self.or_failed(restored)?;
        self.set_vm(state, holds)
    }

    /// The same without the virtio devices.
    fn set_vm(&mut self, state: &KvmState, holds: Holds) -> Result<(), GuestError> {
        let wanted = RunState::Failed.name();
        let vm = self.vm.as_mut().ok_or(GuestError::WrongState { wanted: "restore", state: wanted })?;
        let restored = vm.restore(state).map_err(GuestError::from);
        vm.shared().set_failure(holds.failure);
        vm.shared().set_pending(holds.pending);
        self.or_failed(restored)?;
        self.state = RunState::Stopped(Stop::at(state));
        Ok(())
    }

    /// Loads the boot images; the state of power-on with their entry, and with the console input that waits.
    fn power_on(&self) -> Result<KvmState, GuestError> {
        let vm = self.vm("boot")?;
        let mut state = vm.power_on();
        let entry = boot::load(self.memory.ram(), self.memory.layout(), &self.spec)?;
        state.vcpus[0].set_entry(|sregs, regs| boot_regs::apply(&entry, sregs, regs));
        state.devices = state.devices.after_reset(&vm.shared().devices.save());
        Ok(state)
    }

    /// After an overrun our index into the rings and KVM's are apart, so the VM is built anew around the same
    /// memory and goes on from the state that was just saved, held by what held it.
    fn rebuild(&mut self, state: &KvmState) -> Result<(), GuestError> {
        let shared = self.vm("rebuild")?.shared();
        let holds = Holds { pending: shared.pending(), failure: shared.failure() };
        self.vm = None;
        let built = self.build_vm().map_err(|e| GuestError::Kvm {
            what: "build the VM anew after its dirty rings were overrun",
            source: io::Error::other(e),
        })?;
        built.set_logging(self.protected)?;
        self.vm = Some(built);
        // The virtio devices were stopped before and are as they were.
        self.set_vm(state, holds)
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
        self.events.clear();
        self.state = RunState::Stopped(Stop::at(&kvm));
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
        let (output, disk) = (self.egress.take(), self.virtio.take_disk());
        Ok(Cut { state, tracked, output, disk, failed, timing: CutTiming { stop, save, harvest } })
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        let mut forgotten = DirtySet::new(self.memory.layout().frame_limit());
        let tracked = self.vm("unprotect")?.close_dirty(&mut forgotten)?;
        self.vm("unprotect")?.set_logging(false)?;
        self.protected = false;
        self.memory.track_writes(false);
        if tracked != Tracked::Complete {
            let mut state = self.vm("unprotect")?.save()?;
            if let RunState::Stopped(stop) = &self.state {
                // KVM's clock and timer have run on since.
                stop.keep_time(&mut state);
                state.chips.set_pit(stop.pit);
            }
            self.rebuild(&state)?;
            self.events.withdraw(|event| matches!(event, GuestEvent::TrackingLost(_)));
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
            RunState::Built | RunState::Stopped(_) => false,
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

    fn cpu(&self) -> Option<GuestCpu> {
        self.vm.as_ref().map(|vm| vm.cpu().clone())
    }

    fn check_cpu(&self, cpu: Option<&GuestCpu>) -> Result<(), CpuMisfit> {
        let cpu = cpu.ok_or(CpuMisfit::Kind { found: "synthetic", expected: "kvm" })?;
        self.vm.as_ref().ok_or(CpuMisfit::NoVm)?.check_cpu(cpu)
    }

    fn boot(&mut self) -> Result<(), GuestError> {
        if !matches!(self.state, RunState::Built) {
            return Err(self.wrong_state("boot"));
        }
        let state = self.power_on()?;
        self.set_machine(&state, Holds::default())
    }

    fn count_from(&mut self, start: OutputPosition) -> Result<(), GuestError> {
        let silent = self.egress.position() == OutputPosition::default() && self.console_input_offset() == 0;
        if !matches!(self.state, RunState::Stopped(_)) || !silent {
            return Err(self.wrong_state("set the first offsets of"));
        }
        self.egress.restore(start);
        self.vm("set the first offsets of")?.shared().devices.count_input_from(start.console);
        Ok(())
    }

    fn restore(&mut self, state: &MachineState) -> Result<(), GuestError> {
        if matches!(self.state, RunState::Running | RunState::Failed) {
            return Err(self.wrong_state("restore"));
        }
        state.check_spec(self.digest)?;
        let Body::Kvm(kvm) = &state.body else {
            return Err(StateError::OtherKind { found: "synthetic", expected: "kvm" }.into());
        };
        self.set_machine(kvm, Holds { pending: state.pending, failure: None })?;
        self.egress.restore(state.output);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), GuestError> {
        let RunState::Stopped(stop) = &self.state else {
            return Err(self.wrong_state("reset"));
        };
        let mut state = self.power_on()?;
        stop.keep_time(&mut state);
        self.set_machine(&state, Holds::default())
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
        let RunState::Stopped(stop) = &self.state else {
            return Err(self.wrong_state("resume"));
        };
        let vm = self.vm("resume")?;
        vm.shared().tell_again();
        // After a short stop its ticks are few, and setting it would begin its period anew at every cut.
        if stop.since.elapsed() > SHORT_STOP && chips::is_periodic(&stop.pit) {
            vm.set_pit(&stop.pit)?;
        }
        vm.start_clock(&stop.clock, &stop.tsc_offsets)?;
        vm.run();
        self.state = RunState::Running;
        Ok(())
    }

    fn next_event(&mut self, timeout: Duration) -> Option<GuestEvent> {
        self.events.next(timeout)
    }

    fn on_event(&mut self, wake: Wake) {
        self.events.on_event(wake);
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
        // First, so that a vCPU that fills it again right after is not overheard.
        self.events.withdraw(|event| *event == GuestEvent::OutputFull);
        let output = self.egress.take();
        if let Some(vm) = &self.vm {
            vm.shared().gate.notify();
        }
        self.virtio.wake();
        output
    }

    fn track_disk(&mut self, tracking: DiskTracking) {
        self.virtio.track_disk(tracking);
    }

    fn collect_blocks(&mut self) -> (BlockSet, usize) {
        self.virtio.collect_blocks()
    }
}

/// Whether each device of the host's has its part of it.
fn check_backends(spec: &GuestSpec, backends: &Backends) -> Result<(), BuildError> {
    match (&spec.virtio.disk, &backends.disk) {
        (Some(_), None) => Err(BuildError::NoBackend("disk")),
        (Some(disk), Some(backend)) if disk.bytes != backend.bytes() => {
            Err(BuildError::OtherDisk { found: backend.bytes(), expected: disk.bytes })
        }
        _ if spec.virtio.net.is_some() && backends.tap.is_none() => {
            Err(BuildError::NoBackend("network card"))
        }
        _ => Ok(()),
    }
}
