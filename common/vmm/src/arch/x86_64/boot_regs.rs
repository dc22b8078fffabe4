//! Registers with which the first vCPU enters a loaded image, and the GDT that they point to.
//!
//! Values: Linux' boot protocol (64-bit entry: CS 0x10 and DS 0x18 flat, RSI to `boot_params`, interrupts
//! off) and multiboot 0.6.96 section 3.2 (flat 32-bit segments, no paging, magic in EAX, information in EBX).

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK};
use crate::boot::Entry;
use crate::memory::GuestRam;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set; interrupts are off.
const RFLAGS_FIXED: u64 = 1 << 1;

/// Selectors of the GDT below.
const CODE32: u16 = 0x08;
const CODE64: u16 = 0x10;
const DATA: u16 = 0x18;

/// Null, 32-bit code, 64-bit code, data; all from 0 to 4 GiB, accessed, present, ring 0.
const GDT: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Bytes of the GDT at [`BOOT_GDT`].
pub const GDT_BYTES: u64 = size_of_val(&GDT) as u64;

/// Writes the GDT that [`apply`] points to; kernels may load segments from it before they have their own.
///
/// # Errors
/// There is no RAM at [`BOOT_GDT`].
pub fn write_gdt(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let bytes: Vec<u8> = GDT.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    ram.write_slice(&bytes, GuestAddress(BOOT_GDT))
}

/// Sets the registers for `entry`. Everything but the APIC base is set, so the vCPU may have run before.
pub fn apply(entry: &Entry, sregs: &mut kvm_sregs, regs: &mut kvm_regs) {
    let (code, efer) = match entry {
        Entry::Linux64 { .. } => (segment(CODE64), EFER_LME | EFER_LMA),
        Entry::Protected32 { .. } => (segment(CODE32), 0),
    };
    let data = segment(DATA);
    *sregs = kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        // A processor needs both of these to be valid, used or not; their values after power-on.
        tr: system_segment(11),
        ldt: system_segment(2),
        gdt: kvm_dtable { base: BOOT_GDT, limit: (GDT_BYTES - 1) as u16, ..Default::default() },
        // Empty: an exception before the kernel has its own table is a triple fault, not a wild jump.
        idt: kvm_dtable::default(),
        cr0: CR0_PE | CR0_ET,
        efer,
        apic_base: sregs.apic_base,
        ..Default::default()
    };
    *regs = kvm_regs { rflags: RFLAGS_FIXED, rsp: BOOT_STACK, ..Default::default() };
    match *entry {
        Entry::Linux64 { rip, zero_page } => {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = BOOT_PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            (regs.rip, regs.rsi) = (rip, zero_page);
        }
        Entry::Protected32 { eip, eax, ebx } => {
            (regs.rip, regs.rax, regs.rbx) = (eip.into(), eax.into(), ebx.into());
        }
    }
}

/// The segment register that loading `selector` from the GDT would give.
fn segment(selector: u16) -> kvm_segment {
    let descriptor = GDT[usize::from(selector / 8)];
    let bits = |shift: u32, mask: u64| (descriptor >> shift & mask) as u8;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: bits(40, 15),
        s: bits(44, 1),
        dpl: bits(45, 3),
        present: bits(47, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}

fn system_segment(type_: u8) -> kvm_segment {
    kvm_segment { limit: 0xffff, type_, present: 1, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::{CODE32, CODE64, DATA, apply, segment};
    use crate::arch::x86_64::layout::{BOOT_GDT, BOOT_PAGE_TABLES};
    use crate::boot::Entry;
    use kvm_bindings::{kvm_regs, kvm_sregs};

    #[test]
    fn segments_are_flat_and_of_the_right_width() {
        let (code32, code64, data) = (segment(CODE32), segment(CODE64), segment(DATA));
        for segment in [code32, code64, data] {
            assert_eq!((segment.base, segment.limit, segment.g), (0, u32::MAX, 1));
            assert_eq!((segment.s, segment.present, segment.dpl), (1, 1, 0));
        }
        assert_eq!((code32.type_, code32.db, code32.l), (11, 1, 0));
        assert_eq!((code64.type_, code64.db, code64.l), (11, 0, 1));
        assert_eq!((data.type_, data.db, data.l), (3, 1, 0));
    }

    #[test]
    fn linux_is_entered_in_long_mode() {
        let (mut sregs, mut regs) = (kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() }, used());
        apply(&Entry::Linux64 { rip: 0x100_0000, zero_page: 0x7000 }, &mut sregs, &mut regs);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4), (0x8000_0011, BOOT_PAGE_TABLES, 0x20));
        assert_eq!((sregs.efer, sregs.apic_base), (0x500, 0xfee0_0900));
        assert_eq!((sregs.gdt.base, sregs.gdt.limit), (BOOT_GDT, 31));
        assert_eq!((regs.rip, regs.rsi, regs.rflags, regs.rbx), (0x100_0000, 0x7000, 2, 0));
    }

    #[test]
    fn multiboot_is_entered_without_paging() {
        let (mut sregs, mut regs) = (kvm_sregs { cr3: 1, cr4: 1, efer: 1, ..Default::default() }, used());
        apply(&Entry::Protected32 { eip: 0x10_000c, eax: 0x2bad_b002, ebx: 0x1_0000 }, &mut sregs, &mut regs);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
        assert_eq!((sregs.cs.selector, sregs.ss.selector), (CODE32, DATA));
        assert_eq!((regs.rip, regs.rax, regs.rbx, regs.rcx), (0x10_000c, 0x2bad_b002, 0x1_0000, 0));
    }

    fn used() -> kvm_regs {
        kvm_regs { rax: 1, rbx: 2, rcx: 3, rsi: 4, rip: 5, rflags: 0x246, ..Default::default() }
    }
}
