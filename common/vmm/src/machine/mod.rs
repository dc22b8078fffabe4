//! [`KvmGuest`]: a guest on KVM, driven through [`ProtectedGuest`].

mod vm;

use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use crate::admission::{self, AdmissionError};
use crate::arch::x86_64::boot_regs;
use crate::arch::x86_64::chips::ChipState;
use crate::arch::x86_64::clock::ClockState;
use crate::arch::x86_64::cpuid::CpuidError;
use crate::arch::x86_64::vcpu_state::VcpuState;
use crate::boot;
use crate::devices::DeviceState;
use crate::dirty_set::DirtySet;
use crate::egress::{Egress, Output};
use crate::guest::{Cut, CutTiming, GuestError, GuestEvent, ProtectedGuest, Tracked};
use crate::host::{Host, HostError, Virtualisation};
use crate::memory::{GuestMemory, MemoryError};
use crate::sigbus;
use crate::spec::{GuestSpec, SpecError};
use crate::state::{Body, MachineState, StateError};
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
    #[error("KVM refused to {what}: {source}")]
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
    vcpus: Vec<VcpuState>,
    chips: ChipState,
    clock: ClockState,
    devices: DeviceState,
}

impl KvmState {
    pub(crate) fn check_limits(&self) -> Result<(), StateError> {
        let count = self.vcpus.len();
        if count == 0 || count > colo_common::limits::MAX_VCPUS as usize {
            return Err(StateError::Malformed(format!("{count} vCPUs")));
        }
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
}

impl RunState {
    fn name(&self) -> &'static str {
        match self {
            Self::Built => "neither booted nor restored",
            Self::Stopped { .. } => "stopped",
            Self::Running => "running",
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
        sigbus::install().map_err(|source| BuildError::Kvm { what: "handle SIGBUS", source })?;
        let (events_in, events) = mpsc::channel();
        let egress = Arc::new(Egress::default());
        let (state, protected) = (RunState::Built, false);
        let mut guest =
            Self { vm: None, state, protected, egress, events, events_in, memory, host, spec, cadence };
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
        self.vm().tsc_moves()
    }

    /// Port and MMIO accesses that cuts of this VM found half done, and completed before saving.
    pub fn accesses_settled(&self) -> u64 {
        self.vm().shared().settled.load(std::sync::atomic::Ordering::Relaxed)
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

    fn vm(&self) -> &Vm {
        self.vm.as_ref().expect("a guest whose VM could not be built anew has failed and was dropped")
    }

    fn expect_stopped(&self, wanted: &'static str) -> Result<(), GuestError> {
        match self.state {
            RunState::Running => Err(GuestError::WrongState { wanted, state: self.state.name() }),
            RunState::Built | RunState::Stopped { .. } => Ok(()),
        }
    }

    /// Loads the boot images and sets vCPUs and chips as after power-on; `keep` are devices and time that go on.
    fn power_on(&mut self, keep: Option<KvmState>) -> Result<(), GuestError> {
        let entry = boot::load(self.memory.ram(), self.memory.layout(), &self.spec)?;
        let mut state = self.vm().power_on();
        state.vcpus[0].set_entry(|sregs, regs| boot_regs::apply(&entry, sregs, regs));
        if let Some(before) = keep {
            state.clock = before.clock;
            state.devices = state.devices.after_reset(&before.devices);
            for (vcpu, before) in state.vcpus.iter_mut().zip(&before.vcpus) {
                vcpu.set_tsc_offset(before.tsc_offset());
            }
        }
        self.vm().shared().set_pending(None);
        self.vm().restore(&state)?;
        self.state = RunState::Stopped { clock: state.clock, tsc_offsets: state.tsc_offsets() };
        Ok(())
    }

    /// After an overrun our index into the rings and KVM's are apart, so the VM is built anew around the same
    /// memory and goes on from the state that was just saved.
    fn rebuild(&mut self, state: &KvmState) -> Result<(), GuestError> {
        let pending = self.vm().shared().pending();
        self.vm = None;
        let built = self.build_vm().map_err(|e| GuestError::Kvm {
            what: "build the VM anew after its dirty rings were overrun",
            source: io::Error::other(e),
        })?;
        built.set_logging(self.protected)?;
        built.restore(state)?;
        built.shared().set_pending(pending);
        self.vm = Some(built);
        Ok(())
    }

    fn machine_state(&self, kvm: KvmState) -> MachineState {
        MachineState {
            spec: self.spec.digest(),
            output: self.egress.position(),
            console_input: kvm.devices.input_offset(),
            pending: self.vm().shared().pending(),
            body: Body::Kvm(Box::new(kvm)),
        }
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
        self.power_on(None)
    }

    fn restore(&mut self, state: &MachineState) -> Result<(), GuestError> {
        self.expect_stopped("restore")?;
        state.check_spec(self.spec.digest())?;
        let Body::Kvm(kvm) = &state.body else {
            return Err(StateError::OtherKind { found: "synthetic", expected: "kvm" }.into());
        };
        self.vm().restore(kvm)?;
        self.egress.restore(state.output);
        self.vm().shared().set_pending(state.pending);
        self.state = RunState::Stopped { clock: kvm.clock, tsc_offsets: kvm.tsc_offsets() };
        Ok(())
    }

    fn reset(&mut self) -> Result<(), GuestError> {
        let RunState::Stopped { clock, .. } = self.state else {
            return Err(GuestError::WrongState { wanted: "reset", state: self.state.name() });
        };
        let mut before = self.vm().save()?;
        before.clock = clock;
        self.power_on(Some(before))
    }

    fn protect(&mut self) -> Result<(), GuestError> {
        self.while_paused(|guest| {
            guest.memory.track_writes(true);
            guest.vm().set_logging(true)?;
            guest.protected = true;
            Ok(())
        })
    }

    fn unprotect(&mut self) -> Result<(), GuestError> {
        self.while_paused(|guest| {
            guest.vm().set_logging(false)?;
            guest.protected = false;
            let mut forgotten = DirtySet::new(guest.memory.layout().frame_limit());
            let tracked = guest.vm().close_dirty(&mut forgotten)?;
            guest.memory.track_writes(false);
            if tracked != Tracked::Complete {
                let state = guest.vm().save()?;
                guest.rebuild(&state)?;
            }
            Ok(())
        })
    }

    fn collect(&mut self, dirty: &mut DirtySet) -> Result<Tracked, GuestError> {
        self.vm().collect_dirty(dirty)
    }

    fn cut(&mut self, dirty: &mut DirtySet) -> Result<Cut, GuestError> {
        if !matches!(self.state, RunState::Running) {
            return Err(GuestError::WrongState { wanted: "cut", state: self.state.name() });
        }
        let (paused, stop) = timed(|| self.vm().pause());
        paused?;
        let (saved, save) = timed(|| self.vm().save());
        let kvm = saved?;
        // Saving can write guest memory, so the dirty set is closed after it.
        let (closed, harvest) = timed(|| self.vm().close_dirty(dirty));
        let tracked = closed?;
        // What was raised until now is in the state.
        while self.events.try_recv().is_ok() {}
        self.state = RunState::Stopped { clock: kvm.clock, tsc_offsets: kvm.tsc_offsets() };
        if let Tracked::Unknown(loss) = tracked {
            tracing::error!(
                guest = self.spec.name,
                "{loss}: this epoch's dirty set is unknown, building the VM anew"
            );
            self.rebuild(&kvm)?;
        }
        let state = self.machine_state(kvm);
        let output = self.egress.take();
        Ok(Cut { state, tracked, output, timing: CutTiming { stop, save, harvest } })
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        let RunState::Stopped { clock, tsc_offsets } = &self.state else {
            return Err(GuestError::WrongState { wanted: "resume", state: self.state.name() });
        };
        if let Some(lifecycle) = self.vm().shared().pending() {
            self.vm().shared().tell(GuestEvent::Lifecycle(lifecycle));
        }
        self.vm().start_clock(clock, tsc_offsets)?;
        self.vm().run();
        self.state = RunState::Running;
        Ok(())
    }

    fn next_event(&mut self, timeout: Duration) -> Option<GuestEvent> {
        self.events.recv_timeout(timeout).ok()
    }

    fn console_input(&mut self, bytes: &[u8]) -> usize {
        self.vm().shared().devices.input(bytes).unwrap_or_else(|e| {
            tracing::error!(guest = self.spec.name, "console input cannot raise its interrupt: {e}");
            0
        })
    }

    fn console_input_offset(&self) -> u64 {
        self.vm().shared().devices.input_offset()
    }

    fn power_button(&mut self) {
        if let Err(e) = self.vm().shared().devices.power_button() {
            tracing::error!(guest = self.spec.name, "the power button cannot raise its interrupt: {e}");
        }
    }

    fn drain_output(&mut self) -> Output {
        let output = self.egress.take();
        self.vm().shared().gate.notify();
        output
    }
}

impl KvmGuest {
    /// Changes something that needs stopped vCPUs, whether the guest runs or not. Guest time goes on.
    fn while_paused(
        &mut self,
        f: impl FnOnce(&mut Self) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        let running = matches!(self.state, RunState::Running);
        if running {
            self.vm().pause()?;
        }
        let done = f(self);
        if running && self.vm.is_some() {
            self.vm().run();
        }
        done
    }
}
