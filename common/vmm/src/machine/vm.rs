//! One KVM VM: descriptors, vCPU threads, chips and devices around memory that outlives it. A VM is built,
//! set to a state, run and stopped; when its tracker is of no more use, another is built in its place.

use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{BuildError, KvmState};
use crate::arch::x86_64::chips::{self, ChipState, Pit};
use crate::arch::x86_64::clock::{ClockState, host_tsc, probe_tsc_offset};
use crate::arch::x86_64::cpuid::CpuidTable;
use crate::arch::x86_64::msrs;
use crate::arch::x86_64::processor::{CpuMisfit, GuestCpu, HostCpu};
use crate::arch::x86_64::vcpu_state::{SaveAbility, VcpuState};
use crate::devices::{ConsoleInput, Devices, InterruptLines, Virtio};
use crate::dirty_set::DirtySet;
use crate::egress::Egress;
use crate::events::Events;
use crate::guest::{GuestError, Tracked};
use crate::host::Host;
use crate::ioctl;
use crate::kick;
use crate::memory::GuestMemory;
use crate::spec::GuestSpec;
use crate::state::StateError;
use crate::tracker::{Cadence, Tracker};
use crate::vcpu::{self, Settled, Shared, StartError, Vcpu};

/// How often a request that a signal interrupts is made again.
const INTERRUPTED_MOST: u32 = 100;

pub(super) struct Vm {
    /// Stopped and joined by `drop` before the rest goes.
    vcpus: Vec<Vcpu>,
    shared: Arc<Shared>,
    virtio: Arc<Virtio>,
    fd: Arc<VmFd>,
    ability: SaveAbility,
    /// What the guest has; a restored guest brings its own.
    cpu: GuestCpu,
    offers: HostCpu,
    /// Read once the VM is whole.
    power_on: Option<KvmState>,
}

/// What is shared with the VM that comes after this one.
pub(super) struct Surroundings<'a> {
    pub(super) host: &'a Host,
    pub(super) spec: &'a GuestSpec,
    pub(super) memory: &'a Arc<GuestMemory>,
    pub(super) egress: &'a Arc<Egress>,
    pub(super) events: &'a Arc<Events>,
    pub(super) settled: &'a Arc<Settled>,
    pub(super) input: &'a Arc<ConsoleInput>,
    pub(super) virtio: &'a Arc<Virtio>,
    pub(super) cadence: Cadence,
}

impl Surroundings<'_> {
    fn share(&self, tracker: Tracker, devices: Devices) -> Shared {
        let (egress, memory) = (Arc::clone(self.egress), Arc::clone(self.memory));
        let (events, settled) = (Arc::clone(self.events), Arc::clone(self.settled));
        Shared::new(tracker, devices, egress, memory, events, settled, self.cadence)
    }
}

impl Vm {
    /// A VM in the state of power-on, all vCPUs parked, no image loaded, nothing tracked.
    pub(super) fn build(around: &Surroundings<'_>) -> Result<Self, BuildError> {
        let step = |what| move |e: io::Error| BuildError::Kvm { what, source: e };
        let Surroundings { host, spec, memory, .. } = around;
        let fd = uninterrupted(|| host.kvm().create_vm()).map_err(step("create a VM"))?;
        let fd = Arc::new(fd);
        chips::create(&fd).map_err(step("create the interrupt chips"))?;
        set_slots(&fd, memory, 0).map_err(step("map guest memory"))?;
        let tracker = Tracker::new(Arc::clone(&fd), memory.layout(), spec.tracker);
        let tracker = tracker.map_err(step("enable dirty rings"))?;
        let vcpu_fds = create_vcpus(&fd, &tracker, spec).map_err(step("create a vCPU"))?;
        let tsc_offset = host.has_vcpu_attributes() && probe_tsc_offset(&vcpu_fds[0]);
        let cpuid = CpuidTable::resolve(host.kvm(), spec.cpu_model, host.virtualisation(), tsc_offset)?;
        let supported = CpuidTable::supported(host.kvm())?;
        let frames = memory.layout().frame_limit();
        cpuid.check_reaches(frames)?;
        for (id, vcpu) in (0..).zip(&vcpu_fds) {
            set_cpuid(vcpu, &cpuid, id, spec.vcpus).map_err(step("set the CPUID"))?;
            enforce_pv_features(host, vcpu).map_err(step("hold the guest to its CPUID"))?;
        }
        let msrs = msrs::saved_list(host.kvm(), &vcpu_fds[0]).map_err(step("list the MSRs"))?;
        let xsave2 = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let xsave2 = (host.has_xsave2() && xsave2 >= 4096).then_some(xsave2);
        let ability = SaveAbility { msrs, xsave2, sregs2: host.has_sregs2(), tsc_offset };
        let tsc_khz = vcpu_fds[0].get_tsc_khz().map_err(|e| step("tell the TSC's rate")(e.into()))?;
        let offers = HostCpu { supported, tsc_khz, tsc_moves: tsc_offset, frames };
        let cpu = GuestCpu { cpuid, tsc_khz, tsc_moves: tsc_offset };
        let lines: Arc<dyn InterruptLines> = fd.clone();
        let devices = Devices::new(&lines, around.egress, around.input, around.virtio, spec);
        let shared = Arc::new(around.share(tracker, devices));
        // Threads that were started end with it, whatever fails from here on.
        let (vcpus, virtio) = (Vec::new(), Arc::clone(around.virtio));
        let mut vm = Self { vcpus, shared, virtio, fd, ability, cpu, offers, power_on: None };
        for (vcpu, fd) in (0..).zip(vcpu_fds) {
            let started = Vcpu::spawn(vcpu, &spec.name, fd, &vm.shared).map_err(|e| match e {
                StartError::Thread(source) => BuildError::Kvm { what: "start a vCPU's thread", source },
                StartError::Timer(source) => BuildError::Timer { vcpu, source },
            });
            vm.vcpus.push(started?);
        }
        vm.power_on = Some(vm.read().map_err(step("read the power-on state"))?);
        Ok(vm)
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The state of power-on.
    pub(super) fn power_on(&self) -> KvmState {
        let power_on = self.power_on.clone().expect("read when the VM was built");
        let clock = ClockState { tsc_khz: self.cpu.tsc_khz, ..power_on.clock };
        // What virtio devices did outlives a VM.
        let devices = power_on.devices.with_virtio(self.virtio.power_on());
        KvmState { cpuid: self.cpu.cpuid.clone(), clock, devices, ..power_on }
    }

    /// The processor that the guest has. A TSC that does not move is the host's.
    pub(super) fn cpu(&self) -> &GuestCpu {
        &self.cpu
    }

    /// Refuses a guest with a processor that this VM cannot give it: the same answer as that of [`Self::restore`].
    pub(super) fn check_cpu(&self, cpu: &GuestCpu) -> Result<(), CpuMisfit> {
        self.offers.check(cpu)
    }

    /// Turns logging of guest writes on or off for all memory. vCPUs are stopped.
    pub(super) fn set_logging(&self, on: bool) -> Result<(), GuestError> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let set = set_slots(&self.fd, &self.shared.memory, flags);
        set.map_err(kvm("change the logging of guest memory"))?;
        self.shared.tracker.set_logging(on);
        Ok(())
    }

    /// Stops the vCPUs, then what is done beside them.
    pub(super) fn pause(&self) -> Result<(), GuestError> {
        let limit = "it did not leave the guest within 30 s, or its thread ended";
        vcpu::pause_all(&self.shared.gate, &self.vcpus)
            .map_err(|vcpu| GuestError::Vcpu { vcpu, reason: limit.to_owned() })?;
        self.virtio.pause();
        Ok(())
    }

    pub(super) fn run(&self) {
        self.virtio.resume();
        self.shared.gate.open();
    }

    /// The machine; vCPUs are stopped.
    pub(super) fn save(&self) -> Result<KvmState, GuestError> {
        self.read().map_err(kvm("save the machine"))
    }

    /// Guest time first, it stops here; devices last, they do not run without vCPUs.
    fn read(&self) -> io::Result<KvmState> {
        let clock = ClockState::save(&self.fd, self.cpu.tsc_khz)?;
        let save = |vcpu: &Vcpu| VcpuState::save(&vcpu.fd(), &self.ability);
        let vcpus = self.vcpus.iter().map(save).collect::<io::Result<_>>()?;
        let chips = ChipState::save(&self.fd)?;
        let cpuid = self.cpu.cpuid.clone();
        Ok(KvmState { cpuid, vcpus, chips, clock, devices: self.shared.devices.save() })
    }

    /// Closes the dirty set; vCPUs are stopped and saved.
    pub(super) fn close_dirty(&self, dirty: &mut DirtySet) -> Result<Tracked, GuestError> {
        let tracked = self.shared.tracker.close(dirty).map_err(kvm("hand over the dirty pages"))?;
        self.shared.memory.take_writes(dirty);
        Ok(tracked)
    }

    /// Hands over what is known to be dirty while vCPUs run.
    pub(super) fn collect_dirty(&self, dirty: &mut DirtySet) -> Result<Tracked, GuestError> {
        let tracked = self.shared.tracker.collect(dirty).map_err(kvm("hand over the dirty pages"))?;
        self.shared.memory.take_writes(dirty);
        Ok(tracked)
    }

    /// Sets the machine but its virtio devices; vCPUs are stopped. Devices come first, since what they raise while they are set is
    /// overwritten by the chips' own state, and the clock right before the guest runs.
    pub(super) fn restore(&mut self, state: &KvmState) -> Result<(), StateError> {
        if state.vcpus.len() != self.vcpus.len() {
            return Err(StateError::Malformed(format!(
                "{} vCPUs of {}",
                state.vcpus.len(),
                self.vcpus.len()
            )));
        }
        let cpu = state.cpu()?;
        self.check_cpu(&cpu)?;
        self.adopt(cpu)?;
        self.shared.devices.restore(&state.devices)?;
        let shift = state.clock.tsc_shift(host_tsc());
        for (vcpu, saved) in self.vcpus.iter().zip(&state.vcpus) {
            saved.restore(&vcpu.fd(), &self.ability, shift)?;
        }
        state.chips.restore(&self.fd)?;
        let refused =
            |e: io::Error| StateError::Refused { part: "devices".to_owned(), reason: e.to_string() };
        self.shared.devices.restore_levels().map_err(refused)?;
        for vcpu in &self.vcpus {
            // Tells the guest's watchdog that it was stopped; a guest without kvmclock refuses, and need not know.
            if let Err(e) = vcpu.fd().kvmclock_ctrl() {
                tracing::trace!("KVMCLOCK_CTRL: {e}");
            }
        }
        Ok(())
    }

    /// A guest keeps the processor that it was started with, wherever it runs on.
    fn adopt(&mut self, cpu: GuestCpu) -> Result<(), StateError> {
        let count = self.vcpus.len() as u32;
        for vcpu in self.vcpus.iter().filter(|_| cpu.cpuid != self.cpu.cpuid) {
            set_cpuid(&vcpu.fd(), &cpu.cpuid, vcpu.id(), count).map_err(|e| StateError::Refused {
                part: "CPU model".to_owned(),
                reason: format!("{e}; choose a lower CPU model"),
            })?;
        }
        self.cpu = cpu;
        Ok(())
    }

    /// Sets the interval timer back to where it was.
    pub(super) fn set_pit(&self, pit: &Pit) -> Result<(), GuestError> {
        self.fd.set_pit2(pit).map_err(|e| kvm("set the interval timer")(e.into()))
    }

    /// Lets guest time go on from `clock`, on every vCPU from one reading of the host's counter.
    pub(super) fn start_clock(&self, clock: &ClockState, offsets: &[Option<u64>]) -> Result<(), GuestError> {
        let now = host_tsc();
        let shift = clock.tsc_shift(now);
        for (vcpu, offset) in self.vcpus.iter().zip(offsets) {
            if let Some(offset) = offset.filter(|_| self.ability.tsc_offset) {
                let set = ioctl::set_tsc_offset(&vcpu.fd(), offset.wrapping_add(shift));
                set.map_err(kvm("set the TSC offset"))?;
            }
        }
        clock.start(&self.fd, now).map_err(kvm("set the guest's clock"))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        vcpu::end_all(&self.shared.gate, &mut self.vcpus);
    }
}

/// Runs one phase of a cut and says how long it took.
pub(super) fn timed<T>(phase: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    (phase(), started.elapsed())
}

/// Names what KVM refused.
pub(super) fn kvm(what: &'static str) -> impl Fn(io::Error) -> GuestError {
    move |source| GuestError::Kvm { what, source }
}

fn set_slots(fd: &VmFd, memory: &GuestMemory, flags: u32) -> io::Result<()> {
    for slot in memory.layout().slots() {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags,
            guest_phys_addr: slot.first.address(),
            memory_size: slot.frames * colo_common::PAGE_SIZE as u64,
            userspace_addr: memory.host_address(slot),
        };
        // SAFETY: the range is a part of the guest's mapping, and slots do not overlap. Each vCPU's thread keeps the
        // mapping alive through `Shared::memory` for as long as it may enter the guest. The descriptor may outlive
        // it; KVM itself then touches none of it, and forgets what it knows of a range that is unmapped.
        unsafe { fd.set_user_memory_region(region) }?;
    }
    Ok(())
}

fn set_cpuid(vcpu: &VcpuFd, table: &CpuidTable, id: u32, count: u32) -> io::Result<()> {
    Ok(vcpu.set_cpuid2(&table.for_vcpu(id, count)?)?)
}

/// Has KVM refuse a guest the paravirtual features that its CPUID does not offer. It would let the guest have those
/// that we mask, steal time and async page faults, if only it asked.
fn enforce_pv_features(host: &Host, vcpu: &VcpuFd) -> io::Result<()> {
    if !host.enforces_pv_features() {
        return Ok(());
    }
    let mut request = kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..Default::default() };
    request.args[0] = 1;
    Ok(vcpu.enable_cap(&request)?)
}

/// A request that a pending signal interrupts (KVM registers with the memory of this process when it makes a VM), made
/// again until it is answered.
fn uninterrupted<T>(mut request: impl FnMut() -> Result<T, kvm_ioctls::Error>) -> io::Result<T> {
    for _ in 0..INTERRUPTED_MOST {
        match kick::without_signals(&mut request).0 {
            Err(e) if e.errno() == libc::EINTR => {}
            answer => return answer.map_err(Into::into),
        }
    }
    Ok(request()?)
}

fn create_vcpus(fd: &VmFd, tracker: &Tracker, spec: &GuestSpec) -> io::Result<Vec<VcpuFd>> {
    let mut vcpus = Vec::new();
    for id in 0..spec.vcpus {
        let vcpu = fd.create_vcpu(u64::from(id))?;
        tracker.attach(&vcpu)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

#[cfg(test)]
mod tests {
    use super::{INTERRUPTED_MOST, uninterrupted};

    #[test]
    fn an_interrupted_request_is_made_again_and_any_other_failure_is_told() {
        let failing = |errno, times: u32| {
            let mut calls = 0;
            let answer = uninterrupted(|| {
                calls += 1;
                if calls > times { Ok(calls) } else { Err(kvm_ioctls::Error::new(errno)) }
            });
            answer.map_err(|e| e.raw_os_error())
        };
        assert_eq!(failing(libc::EINTR, 3), Ok(4));
        assert_eq!(failing(libc::EINTR, u32::MAX), Err(Some(libc::EINTR)));
        assert_eq!(failing(libc::EINTR, INTERRUPTED_MOST), Ok(INTERRUPTED_MOST + 1));
        assert_eq!(failing(libc::ENOMEM, 1), Err(Some(libc::ENOMEM)));
    }
}
