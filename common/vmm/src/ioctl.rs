//! The KVM requests that kvm-ioctls does not wrap, each as one small safe function.

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_sregs2,
};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn checked(ret: libc::c_int) -> io::Result<u32> {
    u32::try_from(ret).map_err(|_| io::Error::last_os_error())
}

/// Makes KVM take back every harvested entry of every ring and protect its page again; returns how many.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> io::Result<u32> {
    // SAFETY: the request takes no argument, and the descriptor is a VM's.
    checked(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })
}

/// Reads and clears a slot's dirty bitmap and protects its pages again.
///
/// # Panics
/// `bitmap` has not one bit for each of the slot's `frames`: KVM would write past it.
pub(crate) fn read_dirty_log(vm: &VmFd, slot: u32, frames: u64, bitmap: &mut [u64]) -> io::Result<()> {
    assert!(bitmap.len() as u64 * 64 >= frames, "a bitmap of {} words for {frames} frames", bitmap.len());
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
    };
    // SAFETY: KVM writes one bit per frame of the slot, rounded up to 64, and the assertion above made sure
    // that `bitmap` has room for them; it lives through the call.
    checked(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) }).map(drop)
}

/// Special registers with the PDPTRs that a PAE guest has cached.
pub(crate) fn sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the request writes one `kvm_sregs2`, and `sregs` is one.
    checked(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) }).map(|_| sregs)
}

/// Sets what [`sregs2`] read.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the request reads one `kvm_sregs2`, and `sregs` is one.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) }).map(drop)
}

/// Offset of the guest's TSC from the host's, in cycles.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0_u64;
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: for this attribute KVM writes one u64 at `addr`, which is `offset`, alive through the call.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(offset)
}

/// Sets the offset of the guest's TSC. Some hosts answer well and ignore it: read it back.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> io::Result<()> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: for this attribute KVM reads one u64 at `addr`, which is `offset`, alive through the call.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) }).map(drop)
}

fn tsc_attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: offset as u64,
    }
}
