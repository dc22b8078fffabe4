//! ACPI tables: what a stock kernel reads to find processors, interrupts, the console, the virtio windows,
//! and how to power off and reset.
//!
//! RSDP -> XSDT -> FADT (-> FACS, DSDT) and MADT, one after the other from [`ACPI_TABLES`] on, where kernels
//! scan for the RSDP.
//!
//! - Fixed hardware, no hardware-reduced mode: PM1a event and control blocks, the power button in the event
//!   block, no SMI command port, so that ACPI mode is always on. No PM timer and no RTC.
//! - Interrupts are wired as KVM does it by default, and as [`super::mptable`] says: interrupt `n` is pin `n`
//!   of the I/O APIC. So there is one override only: the SCI is level-triggered, active high. The timer has
//!   none (PCs have it on pin 2; with KVM's default routing that pin is never raised).
//! - virtio windows are edge-triggered: our devices pulse the line at each event and hold nothing, which is
//!   also what the command-line form (`virtio_mmio.device=`) means to Linux.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{
    ACPI_TABLES, COM1_IRQ, COM1_PORT, IOAPIC_BASE, LAPIC_BASE, MAX_VIRTIO_SLOTS, PM1_CONTROL_PORT,
    PM1_EVENT_PORT, RESET_PORT, RESET_VALUE, SCI_IRQ, SLEEP_TYPE_S5, VIRTIO_BASE, VIRTIO_IRQ_BASE,
    VIRTIO_WINDOW,
};
use super::mptable::CONFIG_TABLE;
use crate::memory::GuestRam;
use colo_common::limits::MAX_VCPUS;

const OEM_ID: [u8; 6] = *b"COLO  ";
const OEM_TABLE_ID: [u8; 8] = *b"COLOVM  ";
const OEM_REVISION: u32 = 1;

/// Bytes of the header that all tables but RSDP and FACS begin with.
const HEADER_BYTES: u32 = 36;
/// The FACS wants 64 bytes of alignment; all tables get it.
const ALIGNMENT: usize = 64;

/// Writes all tables for `vcpus` processors and `virtio_slots` virtio-mmio windows.
///
/// # Errors
/// There is no RAM where the tables belong.
///
/// # Panics
/// More vCPUs or slots than a validated spec can have.
pub fn write(ram: &GuestRam, vcpus: u32, virtio_slots: u32) -> Result<(), GuestMemoryError> {
    assert!(vcpus <= MAX_VCPUS && virtio_slots <= MAX_VIRTIO_SLOTS, "the spec was not validated");
    let tables = tables(vcpus as u8, virtio_slots);
    assert!(ACPI_TABLES + tables.len() as u64 <= CONFIG_TABLE, "ACPI tables reach into the MP table");
    ram.write_slice(&tables, GuestAddress(ACPI_TABLES))
}

/// All tables as they lie in memory from [`ACPI_TABLES`] on.
fn tables(vcpus: u8, virtio_slots: u32) -> Vec<u8> {
    // The RSDP comes first, and names an address that is known last.
    let mut area = vec![0; Rsdp::len()];
    let facs = append(&mut area, &FACS::new());
    let dsdt = append(&mut area, &dsdt(virtio_slots));
    let fadt = append(&mut area, &fadt(facs, dsdt));
    let madt = append(&mut area, &madt(vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt.into());
    xsdt.add_entry(madt.into());
    let xsdt = append(&mut area, &xsdt);
    area[..Rsdp::len()].copy_from_slice(&encode(&Rsdp::new(OEM_ID, xsdt.into())));
    area
}

/// Puts a table behind the others; returns its guest-physical address.
fn append(area: &mut Vec<u8>, table: &dyn Aml) -> u32 {
    area.resize(area.len().next_multiple_of(ALIGNMENT), 0);
    let address = ACPI_TABLES as u32 + area.len() as u32;
    table.to_aml_bytes(area);
    address
}

fn encode(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(facs: u32, dsdt: u32) -> impl Aml {
    const LEGACY_DEVICES: u16 = 1 << 0; // the console's UART
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_RTC: u16 = 1 << 5;
    let port = |bits, access, port: u16| GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton) // says that there is no fixed sleep button
        .flag(Flags::FixRtc) // says that there is no RTC wake-up in the fixed registers
        .flag(Flags::ResetRegSup);
    // Both address fields: old kernels know the 32-bit one only.
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.sci_int = (SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(32, AccessSize::WordAccess, PM1_EVENT_PORT);
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(16, AccessSize::WordAccess, PM1_CONTROL_PORT);
    // Latencies above 100 and 1000 microseconds say that there is no C2 and no C3.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = port(8, AccessSize::ByteAccess, RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// The interrupt wiring. `acpi_tables` has no x86 overrides and no flags for it, so its table is put together
/// by hand here.
fn madt(vcpus: u8) -> Sdt {
    const REVISION: u8 = 5;
    const PCAT_COMPAT: u32 = 1; // there are 8259 PICs too
    const ALL_PROCESSORS: u8 = 0xff;
    const ACTIVE_HIGH: u16 = 0b01;
    const EDGE: u16 = 0b01 << 2;
    const LEVEL: u16 = 0b11 << 2;
    let mut body = Vec::new();
    body.dword(LAPIC_BASE as u32);
    body.dword(PCAT_COMPAT);
    for id in 0..vcpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(vcpus, IOAPIC_BASE as u32, 0).to_aml_bytes(&mut body);
    // Interrupt source override: type, length, bus (ISA), source, global interrupt, flags.
    body.vec(&[2, 10, 0, SCI_IRQ as u8]);
    body.dword(SCI_IRQ);
    body.word(ACTIVE_HIGH | LEVEL);
    // Local APIC NMI: type, length, processors, flags, LINT.
    body.vec(&[4, 6, ALL_PROCESSORS]);
    body.word(ACTIVE_HIGH | EDGE);
    body.byte(1);
    table(*b"APIC", REVISION, &body)
}

/// The devices that no bus tells, and the sleep state that is power-off.
fn dsdt(virtio_slots: u32) -> Sdt {
    const REVISION: u8 = 2; // integers have 64 bits
    let mut devices = com1();
    for slot in 0..virtio_slots {
        devices.extend(virtio_window(slot));
    }
    let mut body = Scope::raw("_SB_".into(), devices);
    // Sleep type for PM1a and, unused here, for PM1b; two reserved values.
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &0_u8, &0_u8, &0_u8]);
    body.extend(encode(&Name::new("_S5_".into(), &s5)));
    table(*b"DSDT", REVISION, &body)
}

fn com1() -> Vec<u8> {
    let (ports, interrupt) = (IO::new(COM1_PORT, COM1_PORT, 1, 8), edge_interrupt(COM1_IRQ));
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    encode(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

fn virtio_window(slot: u32) -> Vec<u8> {
    let address = VIRTIO_BASE as u32 + slot * VIRTIO_WINDOW as u32;
    let memory = Memory32Fixed::new(true, address, VIRTIO_WINDOW as u32);
    let interrupt = edge_interrupt(VIRTIO_IRQ_BASE + slot);
    let resources = ResourceTemplate::new(vec![&memory, &interrupt]);
    encode(&Device::new(
        format!("VIO{slot}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"), // virtio-mmio
            &Name::new("_UID".into(), &slot),
            &Name::new("_CCA".into(), &1_u8), // its memory accesses are coherent
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

/// Edge-triggered, active high, not shared.
fn edge_interrupt(number: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, number)
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, HEADER_BYTES, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table
}

const _: () = assert!(CONFIG_TABLE > ACPI_TABLES && MAX_VIRTIO_SLOTS <= 10, "slot names have one digit");

#[cfg(test)]
mod tests {
    use super::{tables, write};
    use crate::arch::x86_64::layout::{ACPI_TABLES, MAX_VIRTIO_SLOTS};
    use crate::memory::GuestMemory;
    use colo_common::limits::{MAX_VCPUS, MIN_GUEST_MEMORY};
    use vm_memory::{Bytes, GuestAddress};

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at a guest-physical address; its checksum is right.
    fn table_at<'a>(area: &'a [u8], address: u64, signature: &[u8]) -> &'a [u8] {
        let bytes = &area[usize::try_from(address - ACPI_TABLES).unwrap()..];
        assert_eq!(&bytes[..4], signature);
        let bytes = &bytes[..u32_at(bytes, 4) as usize];
        if signature != b"FACS" {
            assert_eq!(sum(bytes), 0, "{}", String::from_utf8_lossy(signature));
        }
        bytes
    }

    /// FADT and MADT, found as a kernel finds them.
    fn walk(area: &[u8]) -> (&[u8], &[u8]) {
        assert_eq!(&area[..8], b"RSD PTR ");
        assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
        let xsdt = table_at(area, u64_at(area, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        (table_at(area, u64_at(xsdt, 36), b"FACP"), table_at(area, u64_at(xsdt, 44), b"APIC"))
    }

    #[test]
    fn every_table_is_reachable_and_sums_up_to_zero() {
        for (vcpus, slots) in [(1, 0), (2, 2), (MAX_VCPUS as u8, MAX_VIRTIO_SLOTS)] {
            let area = tables(vcpus, slots);
            let (fadt, madt) = walk(&area);
            let facs = table_at(&area, u32_at(fadt, 36).into(), b"FACS");
            assert_eq!((facs.len(), u32_at(fadt, 36) % 64), (64, 0));
            let dsdt = table_at(&area, u32_at(fadt, 40).into(), b"DSDT");
            assert_eq!(u64_at(fadt, 140), u64::from(u32_at(fadt, 40)));
            assert_eq!(dsdt.windows(8).filter(|w| w == b"LNRO0005").count(), slots as usize);
            assert_eq!(madt.len(), 44 + 8 * usize::from(vcpus) + 12 + 10 + 6);
        }
    }

    #[test]
    fn fixed_hardware_is_where_the_devices_are() {
        let area = tables(1, 2);
        let (fadt, _) = walk(&area);
        assert_eq!((fadt[46], u32_at(fadt, 48)), (9, 0), "SCI, SMI command port");
        assert_eq!((u32_at(fadt, 56), fadt[88]), (0x600, 4), "PM1a event");
        assert_eq!((u32_at(fadt, 64), fadt[89]), (0x604, 2), "PM1a control");
        assert_eq!((u32_at(fadt, 76), fadt[91]), (0, 0), "PM timer");
        let flags = u32_at(fadt, 112);
        assert_eq!(flags & (1 << 10), 1 << 10, "reset register");
        assert_eq!(flags & (1 << 4 | 1 << 20), 0, "power button is fixed, hardware is not reduced");
        assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0xcf9, 6), "reset register");
    }

    #[test]
    fn madt_has_every_processor_and_one_override() {
        let area = tables(3, 2);
        let (_, madt) = walk(&area);
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
        for (id, cpu) in (0..).zip(madt[44..68].chunks(8)) {
            assert_eq!(cpu, [0, 8, id, id, 1, 0, 0, 0]);
        }
        assert_eq!(madt[68..80], [1, 12, 3, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        assert_eq!(madt[80..90], [2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]);
        assert_eq!(madt[90..], [4, 6, 255, 5, 0, 1]);
    }

    #[test]
    fn tables_fit_the_smallest_and_the_largest_guest() {
        let memory = GuestMemory::new(MIN_GUEST_MEMORY).unwrap();
        write(memory.ram(), MAX_VCPUS, MAX_VIRTIO_SLOTS).unwrap();
        write(memory.ram(), 1, 0).unwrap();
        let signature: [u8; 8] = memory.ram().read_obj(GuestAddress(ACPI_TABLES)).unwrap();
        assert_eq!(&signature, b"RSD PTR ");
    }
}
