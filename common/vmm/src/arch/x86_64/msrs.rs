//! Model-specific registers: which are saved, and how a refused one is met.

use colo_common::limits::MAX_MSRS;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::state::StateError;

/// Time-stamp counter: carried by the clock, not by value.
pub(crate) const TSC: u32 = 0x10;
/// Deadline of the local APIC's timer, in guest TSC cycles.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that a guest's correctness rests on: refused means failed. The rest is warned about.
const ESSENTIAL: [(u32, &str); 17] = [
    (0x1b, "APIC_BASE"),
    (0x174, "SYSENTER_CS"),
    (0x175, "SYSENTER_ESP"),
    (0x176, "SYSENTER_EIP"),
    (0x277, "PAT"),
    (0xc000_0080, "EFER"),
    (0xc000_0081, "STAR"),
    (0xc000_0082, "LSTAR"),
    (0xc000_0083, "CSTAR"),
    (0xc000_0084, "FMASK"),
    (0xc000_0102, "KERNEL_GS_BASE"),
    (0xc000_0103, "TSC_AUX"),
    (0x11, "KVM_WALL_CLOCK"),
    (0x12, "KVM_SYSTEM_TIME"),
    (0x4b56_4d00, "KVM_WALL_CLOCK_NEW"),
    (0x4b56_4d01, "KVM_SYSTEM_TIME_NEW"),
    (TSC_DEADLINE, "TSC_DEADLINE"),
];

/// One MSR's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrValue {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// Memory-type registers: guest state that KVM keeps but does not list.
fn memory_types() -> impl Iterator<Item = u32> {
    (0x200..=0x20f).chain([0x250, 0x258, 0x259]).chain(0x268..=0x26f).chain([0x2ff])
}

/// The MSRs that carry guest state on this host and can be read on `probe`.
pub(crate) fn saved_list(kvm: &Kvm, probe: &VcpuFd) -> std::io::Result<Vec<u32>> {
    let list = kvm.get_msr_index_list()?;
    let mut readable = Vec::new();
    for index in list.as_slice().iter().copied().chain(memory_types()) {
        let known = index == TSC || readable.contains(&index);
        if !known && read(probe, &[index])?.len() == 1 {
            readable.push(index);
        }
    }
    if readable.len() > MAX_MSRS {
        let what = format!("{} of them carry state, and Colo saves at most {MAX_MSRS}", readable.len());
        return Err(std::io::Error::other(what));
    }
    // Deadline after the counter and the APIC it depends on.
    readable.sort_by_key(|&index| index == TSC_DEADLINE);
    Ok(readable)
}

/// Reads the listed MSRs; stops where KVM refuses one.
pub(crate) fn read(vcpu: &VcpuFd, list: &[u32]) -> std::io::Result<Vec<MsrValue>> {
    let entries: Vec<_> = list.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|e| std::io::Error::other(format!("{e:?}")))?;
    let count = vcpu.get_msrs(&mut msrs)?;
    let read = msrs.as_slice().iter().take(count);
    Ok(read.map(|msr| MsrValue { index: msr.index, value: msr.data }).collect())
}

/// Writes the values in order. A short count names the one that was refused: an essential one fails, any
/// other is passed over (some hosts list MSRs that they do not let anybody write).
pub(crate) fn write(vcpu: &VcpuFd, values: &[MsrValue]) -> Result<(), StateError> {
    let refused =
        |index: u32, reason: String| StateError::Refused { part: format!("MSR {index:#x}"), reason };
    let mut rest = values;
    while let Some(first) = rest.first() {
        let entry =
            |msr: &MsrValue| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() };
        let entries: Vec<_> = rest.iter().map(entry).collect();
        let msrs = Msrs::from_entries(&entries).map_err(|e| refused(first.index, format!("{e:?}")))?;
        let written = vcpu.set_msrs(&msrs).map_err(|e| refused(first.index, e.to_string()))?;
        let Some(stopped) = rest.get(written) else { break };
        if let Some((_, name)) = ESSENTIAL.iter().find(|(index, _)| *index == stopped.index) {
            return Err(refused(stopped.index, format!("{name} = {:#x} was refused", stopped.value)));
        }
        tracing::warn!("KVM does not take MSR {:#x} = {:#x} back", stopped.index, stopped.value);
        rest = &rest[written + 1..];
    }
    Ok(())
}
