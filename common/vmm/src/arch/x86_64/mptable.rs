//! The MP table (Intel MultiProcessor Specification 1.4): tells kernels without ACPI which processors there
//! are and how interrupts are wired; and the few words of BIOS data by which they find their way to it.
//!
//! The floating pointer is at the start of the EBDA, the first place that kernels scan. The configuration
//! table would outgrow the EBDA's 1 KiB at 37 vCPUs, so it lies in the ROM area, whatever the guest's size.
//!
//! Wiring is what KVM sets up by default, and [`super::acpi`] says the same: interrupt `n` is pin `n` of the
//! I/O APIC, the timer included (pin 0, not pin 2 as on most PCs). All pins are edge-triggered and active
//! high here, as ISA interrupts are: the console and the virtio slots pulse their lines.

use colo_common::limits::MAX_VCPUS;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{COM1_PORT, EBDA_START, HIMEM_START, IOAPIC_BASE, IOAPIC_PINS, LAPIC_BASE, MP_TABLE};
use crate::memory::GuestRam;

/// The BIOS data area: 256 bytes in which the BIOS of a PC notes what it found.
pub const BIOS_DATA: u64 = 0x400;
const BIOS_DATA_BYTES: usize = 256;

/// The configuration table; in the upper half of the ROM area, above the ACPI tables.
pub const CONFIG_TABLE: u64 = 0xf_0000;

const HEADER_BYTES: usize = 44;
const PROCESSOR_BYTES: usize = 20;
const ENTRY_BYTES: usize = 8;
/// Entries besides processors: bus, I/O APIC, its pins, two local interrupts.
const OTHER_ENTRIES: usize = 2 + IOAPIC_PINS as usize + 2;

/// Version 1.4 of the specification, in its own coding.
const SPEC_REVISION: u8 = 4;
/// Versions that KVM's local APIC and I/O APIC report.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// A processor of family 6 with FPU and APIC; kernels ask CPUID for more.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 1 << 9 | 1;

const ISA_BUS: u8 = 0;
/// Destination: all local APICs.
const ALL_LAPICS: u8 = 0xff;

/// Type of an interrupt entry.
#[derive(Clone, Copy)]
enum Interrupt {
    Vectored = 0,
    Nmi = 1,
    ExtInt = 3,
}

/// Writes the tables for `vcpus` processors whose APIC ids are 0 to `vcpus - 1`; the first one boots.
///
/// # Errors
/// There is no RAM where the tables belong.
///
/// # Panics
/// More vCPUs than a validated spec can have.
pub fn write(ram: &GuestRam, vcpus: u32) -> Result<(), GuestMemoryError> {
    assert!(vcpus <= MAX_VCPUS, "{vcpus} vCPUs passed the validation of the spec");
    ram.write_slice(&bios_data(), GuestAddress(BIOS_DATA))?;
    ram.write_slice(&floating_pointer(), GuestAddress(MP_TABLE))?;
    ram.write_slice(&config_table(vcpus as u8), GuestAddress(CONFIG_TABLE))
}

fn bios_data() -> [u8; BIOS_DATA_BYTES] {
    let mut area = [0; BIOS_DATA_BYTES];
    let mut put = |at: u64, value: u16| {
        let at = (at - BIOS_DATA) as usize;
        area[at..at + 2].copy_from_slice(&value.to_le_bytes());
    };
    put(0x400, COM1_PORT);
    put(0x40e, (EBDA_START >> 4) as u16); // segment of the EBDA
    put(0x413, (EBDA_START >> 10) as u16); // KiB of base memory
    area
}

fn floating_pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend((CONFIG_TABLE as u32).to_le_bytes());
    // Length in units of 16 bytes, revision, checksum, then five feature bytes: a configuration table is
    // present, and the PIC is connected by virtual wire.
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes
}

fn config_table(vcpus: u8) -> Vec<u8> {
    let ioapic = vcpus; // the first id that no processor has
    let mut entries = Vec::new();
    for id in 0..vcpus {
        push_processor(&mut entries, id);
    }
    entries.extend([1, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([2, ioapic, IOAPIC_VERSION, 1]);
    entries.extend((IOAPIC_BASE as u32).to_le_bytes());
    for pin in 0..IOAPIC_PINS as u8 {
        push_interrupt(&mut entries, 3, Interrupt::Vectored, pin, (ioapic, pin));
    }
    push_interrupt(&mut entries, 4, Interrupt::ExtInt, 0, (ALL_LAPICS, 0));
    push_interrupt(&mut entries, 4, Interrupt::Nmi, 0, (ALL_LAPICS, 1));

    let mut table = b"PCMP".to_vec();
    table.extend(((HEADER_BYTES + entries.len()) as u16).to_le_bytes());
    table.extend([SPEC_REVISION, 0]);
    table.extend(b"COLO    ");
    table.extend(b"COLO VM     ");
    table.extend([0; 6]); // no OEM table
    table.extend((u16::from(vcpus) + OTHER_ENTRIES as u16).to_le_bytes());
    table.extend((LAPIC_BASE as u32).to_le_bytes());
    table.extend([0; 4]); // no extended table
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

fn push_processor(entries: &mut Vec<u8>, id: u8) {
    const ENABLED: u8 = 1;
    const BOOTS: u8 = 2;
    let flags = if id == 0 { ENABLED | BOOTS } else { ENABLED };
    entries.extend([0, id, LAPIC_VERSION, flags]);
    entries.extend(CPU_SIGNATURE.to_le_bytes());
    entries.extend(CPU_FEATURES.to_le_bytes());
    entries.extend([0; 8]);
}

/// An interrupt of the ISA bus, with polarity and trigger as that bus has them, to a pin of an (I/O or
/// local) APIC.
fn push_interrupt(entries: &mut Vec<u8>, entry: u8, interrupt: Interrupt, irq: u8, (apic, pin): (u8, u8)) {
    entries.extend([entry, interrupt as u8, 0, 0, ISA_BUS, irq, apic, pin]);
}

/// The byte that makes all bytes sum up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

const TABLE_BYTES_MAX: usize =
    HEADER_BYTES + MAX_VCPUS as usize * PROCESSOR_BYTES + OTHER_ENTRIES * ENTRY_BYTES;
const _: () = assert!(CONFIG_TABLE + TABLE_BYTES_MAX as u64 <= HIMEM_START);
const _: () = assert!(MAX_VCPUS < ALL_LAPICS as u32);

#[cfg(test)]
mod tests {
    use super::{
        BIOS_DATA, CONFIG_TABLE, ENTRY_BYTES, HEADER_BYTES, OTHER_ENTRIES, PROCESSOR_BYTES, TABLE_BYTES_MAX,
        checksum, config_table, write,
    };
    use crate::arch::x86_64::layout::{IOAPIC_BASE, IOAPIC_PINS, MP_TABLE};
    use crate::memory::GuestMemory;
    use colo_common::limits::{MAX_VCPUS, MIN_GUEST_MEMORY};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn tables_are_found_and_sum_up_to_zero() {
        let memory = GuestMemory::new(MIN_GUEST_MEMORY).unwrap();
        write(memory.ram(), MAX_VCPUS).unwrap();
        let ebda: u16 = memory.ram().read_obj(GuestAddress(BIOS_DATA + 0xe)).unwrap();
        assert_eq!(u64::from(ebda) << 4, MP_TABLE);
        let mut pointer = [0; 16];
        memory.ram().read_slice(&mut pointer, GuestAddress(MP_TABLE)).unwrap();
        assert_eq!(&pointer[..4], b"_MP_");
        assert_eq!(u64::from(u32::from_le_bytes(pointer[4..8].try_into().unwrap())), CONFIG_TABLE);
        assert_eq!(checksum(&pointer), 0);
        let mut table = vec![0; TABLE_BYTES_MAX];
        memory.ram().read_slice(&mut table, GuestAddress(CONFIG_TABLE)).unwrap();
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(checksum(&table), 0);
    }

    #[test]
    fn entries_are_counted_and_the_first_processor_boots() {
        for vcpus in [1, 2, 64] {
            let table = config_table(vcpus);
            let len = usize::from(u16::from_le_bytes([table[4], table[5]]));
            let count = usize::from(u16::from_le_bytes([table[34], table[35]]));
            let cpus = usize::from(vcpus);
            assert_eq!(len, table.len());
            assert_eq!(len, HEADER_BYTES + cpus * PROCESSOR_BYTES + OTHER_ENTRIES * ENTRY_BYTES);
            assert_eq!(count, cpus + OTHER_ENTRIES);
            let (cpu_entries, rest) = table[HEADER_BYTES..].split_at(cpus * PROCESSOR_BYTES);
            for (id, cpu) in cpu_entries.chunks(PROCESSOR_BYTES).enumerate() {
                assert_eq!(cpu[..4], [0, id as u8, 0x14, if id == 0 { 3 } else { 1 }]);
            }
            assert_eq!(rest[8..12], [2, vcpus, 0x11, 1]);
            assert_eq!(rest[12..16], (IOAPIC_BASE as u32).to_le_bytes());
        }
    }

    #[test]
    fn every_pin_has_the_interrupt_of_its_number() {
        let table = config_table(2);
        let pins = &table[HEADER_BYTES + 2 * PROCESSOR_BYTES + 2 * ENTRY_BYTES..];
        for pin in 0..IOAPIC_PINS as usize {
            assert_eq!(pins[pin * 8..][..8], [3, 0, 0, 0, 0, pin as u8, 2, pin as u8]);
        }
        assert_eq!(pins[IOAPIC_PINS as usize * 8..], [4, 3, 0, 0, 0, 0, 255, 0, 4, 1, 0, 0, 0, 0, 255, 1]);
    }
}
