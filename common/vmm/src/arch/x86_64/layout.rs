//! The machine's address map: where RAM, tables, device windows and ports are, and which interrupt each
//! device has. Both nodes build the same map from the same spec; a change here is a change of the spec.

/// First byte above low RAM: the device hole, up to [`HIGH_RAM_START`].
pub const HOLE_START: u64 = 0xC000_0000;
/// First byte of the RAM that does not fit below the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// GDT of the direct 64-bit and 32-bit boot, guest-physical.
pub const BOOT_GDT: u64 = 0x500;
/// Linux' zero page (`boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack pointer at the kernel's entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// First of the page tables of the 64-bit entry (PML4, PDPT, four page directories).
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Multiboot information structure, its memory map and its strings.
pub const MULTIBOOT_INFO: u64 = 0x10000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x20000;
/// First byte that base memory does not offer: the extended BIOS data area, where the MP table is.
pub const EBDA_START: u64 = 0x9fc00;
/// MP floating pointer and configuration table.
pub const MP_TABLE: u64 = EBDA_START;
/// End of base memory; ROMs and tables follow up to [`HIMEM_START`].
pub const BASE_MEMORY_END: u64 = 0xa0000;
/// ACPI root pointer, followed by all ACPI tables; inside the area that kernels scan.
pub const ACPI_TABLES: u64 = 0xe0000;
/// First byte above the 1 MiB of the original PC: where kernels are loaded.
pub const HIMEM_START: u64 = 0x10_0000;

/// Local APIC window.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// I/O APIC window.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Three pages that KVM needs for real mode on Intel.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page that KVM needs for the identity map on Intel.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// First virtio-mmio window; slot `n` is at `VIRTIO_BASE + n * VIRTIO_WINDOW`.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Bytes of one virtio-mmio window.
pub const VIRTIO_WINDOW: u64 = 0x1000;
/// Interrupt of slot 0; slot `n` has `VIRTIO_IRQ_BASE + n`, on the I/O APIC alone.
pub const VIRTIO_IRQ_BASE: u32 = 16;
/// Slots that fit on the I/O APIC's remaining pins.
pub const MAX_VIRTIO_SLOTS: u32 = 8;

/// First port of the 16550 console (COM1).
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt of the console.
pub const COM1_IRQ: u32 = 4;
/// Keyboard controller: status and command; a command of [`I8042_RESET`] resets the machine.
pub const I8042_PORT: u16 = 0x64;
/// The command that pulses the reset line.
pub const I8042_RESET: u8 = 0xfe;
/// Reset control register; ACPI's reset register too.
pub const RESET_PORT: u16 = 0xcf9;
/// The value that ACPI tells kernels to write into the reset register.
pub const RESET_VALUE: u8 = 6;
/// isa-debug-exit: a byte written here ends a test guest with that code.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// ACPI PM1a event block: status and enable, 16 bits each.
pub const PM1_EVENT_PORT: u16 = 0x600;
/// ACPI PM1a control block, 16 bits.
pub const PM1_CONTROL_PORT: u16 = 0x604;
/// Value of the sleep type field that means S5 (power off).
pub const SLEEP_TYPE_S5: u8 = 5;
/// ACPI's interrupt (level, active high).
pub const SCI_IRQ: u32 = 9;

/// Pins of the I/O APIC.
pub const IOAPIC_PINS: u32 = 24;

const _: () = assert!(VIRTIO_IRQ_BASE + MAX_VIRTIO_SLOTS <= IOAPIC_PINS);
const _: () = assert!(VIRTIO_BASE >= HOLE_START);
