//! Guest time: stops at the cut, runs on from there.
//!
//! kvmclock is read at the cut and set before the guest runs. The TSC goes on through each vCPU's offset, all
//! from one reading of the host's counter, so that vCPUs cannot drift apart. Some hosts take an offset and
//! ignore it; [`probe_tsc_offset`] reads one back to know. There the guest sees the host's TSC, and kvmclock,
//! which KVM computes for the guest from it, carries guest time alone.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use std::arch::x86_64::_rdtsc;
use std::io;

use crate::ioctl;

/// Guest time at a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// kvmclock, in nanoseconds.
    pub kvmclock_ns: u64,
    /// The host's TSC at the cut; offsets of the vCPUs are from it.
    pub host_tsc: u64,
    /// Rate of the guest's TSC.
    pub tsc_khz: u32,
}

impl ClockState {
    /// Reads guest time; all vCPUs are stopped.
    pub(crate) fn save(vm: &VmFd, tsc_khz: u32) -> io::Result<Self> {
        let clock = vm.get_clock()?;
        // Where KVM says which TSC the clock was read at, both stop at one instant.
        let host_tsc = if clock.flags & KVM_CLOCK_HOST_TSC != 0 { clock.host_tsc } else { host_tsc() };
        Ok(Self { kvmclock_ns: clock.clock, host_tsc, tsc_khz })
    }

    /// Sets kvmclock, right before the guest runs, to the saved time and what has passed since the host's TSC
    /// was `started`, from where the guest's TSC goes on.
    pub(crate) fn start(&self, vm: &VmFd, started: u64) -> io::Result<()> {
        let cycles = u128::from(host_tsc().saturating_sub(started));
        let passed = u64::try_from(cycles * 1_000_000 / u128::from(self.tsc_khz.max(1))).unwrap_or(0);
        let clock = self.kvmclock_ns.saturating_add(passed);
        Ok(vm.set_clock(&kvm_clock_data { clock, ..Default::default() })?)
    }

    /// What to add to the saved TSC offsets so that the guest's TSC goes on at the host's TSC `now`.
    pub(crate) fn tsc_shift(&self, now: u64) -> u64 {
        self.host_tsc.wrapping_sub(now)
    }
}

/// The host's time-stamp counter.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets user mode use it.
    unsafe { _rdtsc() }
}

/// Whether an offset that is set is there when it is read back. Leaves it as it was.
pub(crate) fn probe_tsc_offset(vcpu: &VcpuFd) -> bool {
    const STEP: u64 = 1 << 32;
    let probe = || -> io::Result<bool> {
        let before = ioctl::tsc_offset(vcpu)?;
        ioctl::set_tsc_offset(vcpu, before.wrapping_sub(STEP))?;
        let taken = ioctl::tsc_offset(vcpu)? == before.wrapping_sub(STEP);
        ioctl::set_tsc_offset(vcpu, before)?;
        Ok(taken)
    };
    probe().unwrap_or(false)
}
