//! One vCPU's whole state: saved and restored in the order that KVM demands.
//!
//! MP_STATE is read first because reading it can change the others; VCPU_EVENTS last, because what is pending
//! must not change after it. On restore SREGS comes before the LAPIC (it carries the APIC base), the LAPIC and
//! the TSC before the deadline MSR, REGS before VCPU_EVENTS (it clears pending exceptions), MP_STATE last.

use colo_common::bounded::list;
use colo_common::limits::{MAX_MSRS, MAX_XSAVE};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_SREGS2_FLAGS_PDPTRS_VALID, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_regs, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::io;

use crate::arch::x86_64::msrs::{self, MsrValue, TSC, TSC_DEADLINE};
use crate::ioctl;
use crate::state::StateError;

/// First of the local APIC's eight interrupt request registers.
const APIC_IRR: usize = 0x200;
/// Timer entry of the local vector table, its mode field, and the deadline mode in it.
const APIC_TIMER: usize = 0x320;
const APIC_TIMER_MASKED: u32 = 1 << 16;
const APIC_TIMER_MODE: u32 = 3 << 17;
const APIC_TIMER_DEADLINE: u32 = 2 << 17;
/// What is left of the local APIC's timer.
const APIC_CURRENT_COUNT: usize = 0x390;

/// Bytes that KVM_GET_XSAVE transfers.
const XSAVE_BYTES: usize = size_of::<kvm_xsave>();

/// What this VM's KVM can save; asked once.
#[derive(Clone, Debug)]
pub(crate) struct SaveAbility {
    /// MSRs to save, in the order in which they are restored.
    pub(crate) msrs: Vec<u32>,
    /// Bytes of the XSAVE area by KVM_GET_XSAVE2, if it is there.
    pub(crate) xsave2: Option<usize>,
    /// Whether PDPTRs can be saved.
    pub(crate) sregs2: bool,
    /// Whether the guest's TSC can be moved. Where it cannot, the guest sees the host's.
    pub(crate) tsc_offset: bool,
}

/// One vCPU at a cut.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// PDPTRs as the processor holds them, for a guest in PAE mode.
    pdptrs: Option<[u64; 4]>,
    #[serde(deserialize_with = "list::<_, _, { MAX_XSAVE / 4 }>")]
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    #[serde(deserialize_with = "list::<_, _, MAX_MSRS>")]
    msrs: Vec<MsrValue>,
    events: kvm_vcpu_events,
    /// Guest TSC less host TSC, where it can be moved.
    tsc_offset: Option<u64>,
}

impl VcpuState {
    /// Reads the state of a vCPU that is in user space with nothing half done.
    pub(crate) fn save(vcpu: &VcpuFd, ability: &SaveAbility) -> io::Result<Self> {
        let mp_state = vcpu.get_mp_state()?;
        let regs = vcpu.get_regs()?;
        let sregs = vcpu.get_sregs()?;
        let pdptrs = if ability.sregs2 { pdptrs(vcpu)? } else { None };
        let xsave = save_xsave(vcpu, ability.xsave2)?;
        let xcrs = vcpu.get_xcrs()?;
        let debugregs = vcpu.get_debug_regs()?;
        let lapic = vcpu.get_lapic()?;
        let mut msrs = msrs::read(vcpu, &ability.msrs)?;
        if msrs.len() != ability.msrs.len() {
            let refused = ability.msrs[msrs.len()];
            return Err(io::Error::other(format!("MSR {refused:#x} could be read before and cannot now")));
        }
        // A deadline that passed between the reads of the APIC and of the MSRs is in neither: it is set to the
        // present, so that the timer fires once more rather than never.
        if apic_register(&lapic, APIC_TIMER) & (APIC_TIMER_MODE | APIC_TIMER_MASKED) == APIC_TIMER_DEADLINE
            && let Some(deadline) = msrs.iter_mut().find(|msr| msr.index == TSC_DEADLINE && msr.value == 0)
        {
            deadline.value = msrs::read(vcpu, &[TSC])?.first().map_or(1, |tsc| tsc.value);
        }
        let tsc_offset = if ability.tsc_offset { Some(ioctl::tsc_offset(vcpu)?) } else { None };
        let events = vcpu.get_vcpu_events()?;
        Ok(Self { mp_state, regs, sregs, pdptrs, xsave, xcrs, debugregs, lapic, msrs, events, tsc_offset })
    }

    /// Sets a vCPU of the same CPUID that is not in KVM_RUN. `tsc_shift` is added to the saved TSC offset:
    /// the host cycles that the guest must not see.
    pub(crate) fn restore(
        &self,
        vcpu: &VcpuFd,
        ability: &SaveAbility,
        tsc_shift: u64,
    ) -> Result<(), StateError> {
        vcpu.set_sregs(&self.sregs).map_err(refused("special registers"))?;
        if let Some(pdptrs) = self.pdptrs
            && ability.sregs2
        {
            ioctl::set_sregs2(vcpu, &self.sregs2(pdptrs)).map_err(refused("page-directory pointers"))?;
        }
        vcpu.set_regs(&self.regs).map_err(refused("registers"))?;
        restore_xsave(vcpu, &self.xsave, ability.xsave2)?;
        vcpu.set_xcrs(&self.xcrs).map_err(refused("extended control registers"))?;
        vcpu.set_debug_regs(&self.debugregs).map_err(refused("debug registers"))?;
        if let Some(offset) = self.tsc_offset
            && ability.tsc_offset
        {
            let offset = offset.wrapping_add(tsc_shift);
            ioctl::set_tsc_offset(vcpu, offset).map_err(refused("TSC offset"))?;
        }
        vcpu.set_lapic(&self.lapic).map_err(refused("local APIC"))?;
        msrs::write(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(refused("events"))?;
        vcpu.set_mp_state(self.mp_state).map_err(refused("run state"))?;
        Ok(())
    }

    pub(crate) fn is_halted(&self) -> bool {
        self.mp_state.mp_state == KVM_MP_STATE_HALTED
    }

    pub(crate) fn has_interrupt(&self) -> bool {
        let requested = (0..8).any(|n| apic_register(&self.lapic, APIC_IRR + n * 0x10) != 0);
        requested || self.events.interrupt.injected != 0
    }

    pub(crate) fn has_armed_timer(&self) -> bool {
        apic_register(&self.lapic, APIC_CURRENT_COUNT) != 0
    }

    /// Guest TSC less host TSC at the cut, where it can be moved.
    pub(crate) fn tsc_offset(&self) -> Option<u64> {
        self.tsc_offset
    }

    /// Lets the TSC of a reset vCPU go on.
    pub(crate) fn set_tsc_offset(&mut self, offset: Option<u64>) {
        self.tsc_offset = offset;
    }

    /// Puts other registers in: how a boot image's entry gets into the power-on state.
    pub(crate) fn set_entry(&mut self, enter: impl FnOnce(&mut kvm_sregs, &mut kvm_regs)) {
        enter(&mut self.sregs, &mut self.regs);
    }

    pub(crate) fn check_limits(&self) -> Result<(), StateError> {
        let bytes = self.xsave.len() * 4;
        if !(XSAVE_BYTES..=MAX_XSAVE).contains(&bytes) {
            return Err(StateError::Malformed(format!("an XSAVE area of {bytes} bytes")));
        }
        if self.msrs.len() > MAX_MSRS {
            return Err(StateError::Malformed(format!("{} MSRs", self.msrs.len())));
        }
        Ok(())
    }

    fn sregs2(&self, pdptrs: [u64; 4]) -> kvm_sregs2 {
        let s = &self.sregs;
        kvm_sregs2 {
            cs: s.cs,
            ds: s.ds,
            es: s.es,
            fs: s.fs,
            gs: s.gs,
            ss: s.ss,
            tr: s.tr,
            ldt: s.ldt,
            gdt: s.gdt,
            idt: s.idt,
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
            flags: u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID),
            pdptrs,
        }
    }
}

fn apic_register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    let bytes: Vec<u8> = lapic.regs[offset..offset + 4].iter().map(|byte| byte.cast_unsigned()).collect();
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

fn refused<E: Display>(part: &'static str) -> impl Fn(E) -> StateError {
    move |e| StateError::Refused { part: part.to_owned(), reason: e.to_string() }
}

fn pdptrs(vcpu: &VcpuFd) -> io::Result<Option<[u64; 4]>> {
    let sregs = ioctl::sregs2(vcpu)?;
    Ok((sregs.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0).then_some(sregs.pdptrs))
}

fn save_xsave(vcpu: &VcpuFd, xsave2: Option<usize>) -> io::Result<Vec<u32>> {
    let Some(bytes) = xsave2 else { return Ok(vcpu.get_xsave()?.region.to_vec()) };
    let mut area = empty_xsave(bytes).map_err(io::Error::other)?;
    // SAFETY: the area has the size that KVM reported for this VM, and no other feature is enabled later.
    unsafe { vcpu.get_xsave2(&mut area) }?;
    let mut words = area.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(area.as_slice());
    Ok(words)
}

fn restore_xsave(vcpu: &VcpuFd, words: &[u32], xsave2: Option<usize>) -> Result<(), StateError> {
    let (region, extra) = words.split_at(XSAVE_BYTES / 4);
    let bytes = xsave2.unwrap_or(XSAVE_BYTES);
    if extra.iter().skip((bytes - XSAVE_BYTES) / 4).any(|&word| word != 0) {
        let reason = format!("{} bytes in use, this host has {bytes}", words.len() * 4);
        return Err(refused("XSAVE area")(reason));
    }
    let mut area = empty_xsave(bytes).map_err(refused("XSAVE area"))?;
    // SAFETY: only the region's words are changed, not the length of what follows it.
    unsafe { area.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
    let room = area.as_mut_slice();
    let count = room.len().min(extra.len());
    room[..count].copy_from_slice(&extra[..count]);
    if xsave2.is_some() {
        // SAFETY: the area has the size that KVM reported for this VM.
        unsafe { vcpu.set_xsave2(&area) }.map_err(refused("XSAVE area"))
    } else {
        // SAFETY: without KVM_CAP_XSAVE2 KVM reads exactly the 4096 bytes that `kvm_xsave` has.
        unsafe { vcpu.set_xsave(&area.as_fam_struct_ref().xsave) }.map_err(refused("XSAVE area"))
    }
}

fn empty_xsave(bytes: usize) -> Result<Xsave, String> {
    Xsave::new(bytes.saturating_sub(XSAVE_BYTES).div_ceil(4)).map_err(|e| format!("{e:?}"))
}
