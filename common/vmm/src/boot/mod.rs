//! Loads what a guest boots into its memory and says how its first vCPU enters it.
//!
//! Used at power-on and again at every reset, over the memory that the last run left behind: whatever a
//! kernel expects to find is written anew, zeroes included. Images come from files, so nothing in them is
//! believed: a hostile image gives a [`BootError`], and work is bounded by the guest's memory.
//!
//! Which kernel it is shows in its content: `linux` takes bzImage and ELF vmlinux, `multiboot` takes
//! multiboot-1 with an ELF or an address header; flat images are named as such by the spec.

mod elf;
mod flat;
mod linux;
mod multiboot;
#[cfg(test)]
mod testing;

use std::fmt::Write as _;
use std::path::PathBuf;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::arch::x86_64::layout::{
    ACPI_TABLES, BASE_MEMORY_END, BOOT_GDT, EBDA_START, HIMEM_START, MULTIBOOT_INFO, VIRTIO_BASE,
    VIRTIO_IRQ_BASE, VIRTIO_WINDOW,
};
use crate::arch::x86_64::mptable::BIOS_DATA;
use crate::arch::x86_64::{acpi, boot_regs, mptable};
use crate::memory::{GuestRam, MemoryLayout};
use crate::spec::{BootFile, BootSource, GuestSpec};

/// Why a guest cannot boot what it was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Content of no supported kind.
    #[error(
        "{} is not a kernel that can be booted: give a 64-bit x86 Linux (bzImage or ELF vmlinux) or a \
         multiboot-1 image, or name it as a flat image",
        path.display()
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// The image promises more bytes than the file has.
    #[error("{} ends within {what}: the file was cut short, fetch or build it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What is incomplete.
        what: &'static str,
    },
    /// Headers that contradict themselves.
    #[error("{} is damaged: {what}; fetch or build it again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A bzImage that can only be entered in 16-bit or 32-bit mode.
    #[error(
        "the bzImage {} has no 64-bit entry point (XLF_KERNEL_64): use a 64-bit kernel, 3.8 or later",
        path.display()
    )]
    NoEntry64 {
        /// The file.
        path: PathBuf,
    },
    /// A multiboot header that demands what Colo does not give.
    #[error(
        "{} requires multiboot features {flags:#x} (bit 2 is a video mode); only page alignment (bit 0) and \
         memory information (bit 1) are offered: build it without them",
        path.display()
    )]
    MultibootFeatures {
        /// The file.
        path: PathBuf,
        /// The required features that are not offered.
        flags: u32,
    },
    /// The kernel's place is not inside low RAM.
    #[error(
        "the kernel {} needs guest memory from {start:#x} to {end:#x}, and the guest's low memory ends at \
         {ram_end:#x}: raise the guest's memory or use a smaller kernel",
        path.display()
    )]
    KernelDoesNotFit {
        /// The file.
        path: PathBuf,
        /// First guest-physical address that it needs.
        start: u64,
        /// First address after it.
        end: u64,
        /// End of the RAM below the device hole, in bytes.
        ram_end: u64,
    },
    /// The image would lie over what Colo itself writes for the guest.
    #[error(
        "{} would be loaded at {start:#x}..{end:#x}, over {what}: link it to another address, best at 1 MiB \
         or above",
        path.display()
    )]
    Overlap {
        /// The file.
        path: PathBuf,
        /// First guest-physical address of the part in question.
        start: u64,
        /// First address after it.
        end: u64,
        /// What is there.
        what: &'static str,
    },
    /// No room between the kernel and the end of low memory.
    #[error(
        "the initramfs has {bytes} bytes, and the kernel leaves {room} bytes of the guest's {memory} bytes of \
         memory for it: raise the guest's memory or use a smaller initramfs"
    )]
    InitramfsTooLarge {
        /// Bytes of the initramfs.
        bytes: u64,
        /// Bytes that it may have.
        room: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
    /// No room for a multiboot module.
    #[error(
        "the module {} has {bytes} bytes, and {room} bytes of the guest's {memory} bytes of memory are left \
         for it: raise the guest's memory or use a smaller module",
        path.display()
    )]
    ModuleTooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes of the module.
        bytes: u64,
        /// Bytes that it may have.
        room: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
    /// Multiboot's strings and lists have a fixed place.
    #[error(
        "the multiboot information (command line, names of {modules} modules) takes {bytes} bytes of at most \
         {limit}: give fewer modules"
    )]
    MultibootInfo {
        /// Number of modules.
        modules: usize,
        /// Bytes of the information.
        bytes: usize,
        /// Bytes that it may have.
        limit: usize,
    },
    /// The kernel states the longest command line that it takes.
    #[error(
        "the command line has {len} bytes, and the kernel {} takes {limit}: shorten it",
        path.display()
    )]
    CommandLine {
        /// The kernel.
        path: PathBuf,
        /// Bytes of the command line.
        len: usize,
        /// Bytes that the kernel takes.
        limit: usize,
    },
    /// A flat image must lie in RAM below 4 GiB.
    #[error(
        "the flat image {} of {bytes} bytes at {address:#x} is not inside the guest's low memory, which ends \
         at {ram_end:#x}: choose another address or raise the guest's memory",
        path.display()
    )]
    FlatOutsideRam {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// Guest-physical address asked for.
        address: u64,
        /// End of the RAM below the device hole, in bytes.
        ram_end: u64,
    },
    /// linux-loader refused a kernel.
    #[error("cannot load the kernel {}: {source}; fetch or build it again", path.display())]
    Loader {
        /// The kernel.
        path: PathBuf,
        /// What the loader said.
        source: linux_loader::loader::Error,
    },
    /// Guest memory refused a write that was checked before: it is smaller than its layout says.
    #[error("cannot write {what} into guest memory: {source}; give the guest at least 1 MiB of memory")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// What the memory said.
        source: GuestMemoryError,
    },
}

/// How the first vCPU enters. All other vCPUs wait for their start-up interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit Linux boot protocol: long mode, the first 4 GiB mapped to themselves.
    Linux64 {
        /// Guest-physical address of the first instruction.
        rip: u64,
        /// Guest-physical address of `boot_params`.
        zero_page: u64,
    },
    /// Flat 32-bit protected mode without paging: multiboot and flat images.
    Protected32 {
        /// Guest-physical address of the first instruction.
        eip: u32,
        /// Multiboot's magic number, or 0.
        eax: u32,
        /// Guest-physical address of the multiboot information, or 0.
        ebx: u32,
    },
}

/// Writes everything that a power-on needs into guest memory: the image and what goes with it, the GDT, the
/// MP table and the ACPI tables. May be repeated over a used memory, for a reset.
///
/// # Errors
/// The image is of no supported kind, damaged, or does not fit the guest's memory; memory may then hold a
/// part of it.
pub fn load(ram: &GuestRam, layout: &MemoryLayout, spec: &GuestSpec) -> Result<Entry, BootError> {
    write_machine_tables(ram, spec)?;
    let target = Target { ram, layout };
    match &spec.boot {
        BootSource::Flat { image, address } => flat::load(&target, image, *address),
        BootSource::Kernel { kernel, modules, command_line } => match kind_of(&kernel.bytes) {
            Some(Kind::BzImage) => {
                linux::load_bzimage(&target, kernel, modules, &linux_line(spec, command_line))
            }
            Some(Kind::Multiboot) => multiboot::load(&target, kernel, modules, command_line),
            Some(Kind::Vmlinux) => {
                linux::load_vmlinux(&target, kernel, modules, &linux_line(spec, command_line))
            }
            None => Err(BootError::NotAKernel { path: kernel.path.clone() }),
        },
    }
}

/// The command line of a Linux. Parameters of its own come first: after a `--` they would be init's.
fn linux_line(spec: &GuestSpec, command_line: &str) -> String {
    if !spec.virtio.on_command_line {
        return command_line.to_owned();
    }
    virtio_mmio_parameters(spec.virtio.occupied()) + command_line
}

/// Kernel parameters that tell a Linux without ACPI where the virtio-mmio windows are, each with a space after it.
fn virtio_mmio_parameters(slots: impl Iterator<Item = u32>) -> String {
    let mut text = String::new();
    for slot in slots {
        let address = VIRTIO_BASE + u64::from(slot) * VIRTIO_WINDOW;
        let (kib, irq) = (VIRTIO_WINDOW >> 10, VIRTIO_IRQ_BASE + slot);
        write!(text, "virtio_mmio.device={kib}K@{address:#x}:{irq} ").expect("a String takes everything");
    }
    text
}

fn write_machine_tables(ram: &GuestRam, spec: &GuestSpec) -> Result<(), BootError> {
    let failed = |what| move |source| BootError::Write { what, source };
    boot_regs::write_gdt(ram).map_err(failed("the boot GDT"))?;
    mptable::write(ram, spec.vcpus).map_err(failed("the MP table"))?;
    acpi::write(ram, spec.vcpus, spec.slots()).map_err(failed("the ACPI tables"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    BzImage,
    Multiboot,
    Vmlinux,
}

/// Tells the kind by content. A multiboot header wins over the ELF header around it.
fn kind_of(bytes: &[u8]) -> Option<Kind> {
    if linux::is_bzimage(bytes) {
        Some(Kind::BzImage)
    } else if multiboot::find_header(bytes).is_some() {
        Some(Kind::Multiboot)
    } else if elf::is_x86_64(bytes) {
        Some(Kind::Vmlinux)
    } else {
        None
    }
}

/// What Colo writes below 1 MiB for every guest; images stay clear of it.
const MACHINE_TABLES: [(u64, u64, &str); 3] = [
    (BIOS_DATA, BOOT_GDT + boot_regs::GDT_BYTES, "the BIOS data area and the boot GDT"),
    (EBDA_START, BASE_MEMORY_END, "the extended BIOS data area with the MP table"),
    (ACPI_TABLES, HIMEM_START, "the ACPI tables"),
];

/// One range of the memory map that a kernel is told: guest-physical start and length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MapEntry {
    start: u64,
    len: u64,
    /// RAM for the kernel to use; reserved otherwise.
    usable: bool,
}

/// The guest's memory and the checks that every loader makes before it writes there.
struct Target<'a> {
    ram: &'a GuestRam,
    layout: &'a MemoryLayout,
}

impl Target<'_> {
    /// First byte after the RAM below the device hole: all that images may use.
    fn low_end(&self) -> u64 {
        self.layout.ranges().next().map_or(0, |(start, len)| start + len)
    }

    /// The memory map, ascending. The area of ROMs between base memory and 1 MiB is RAM to KVM but not to
    /// the guest, as on a PC.
    fn memory_map(&self) -> Vec<MapEntry> {
        let range = |start, end, usable| MapEntry { start, len: end - start, usable };
        let mut map = vec![
            range(0, EBDA_START, true),
            range(EBDA_START, BASE_MEMORY_END, false),
            range(ACPI_TABLES, HIMEM_START, false),
        ];
        for (start, len) in self.layout.ranges() {
            let (start, end) = (start.max(HIMEM_START), start + len);
            if start < end {
                map.push(range(start, end, true));
            }
        }
        map
    }

    /// Refuses a part of an image that is not inside low RAM or lies over a table of `tables`.
    fn check_place(
        &self,
        image: &BootFile,
        start: u64,
        bytes: u64,
        tables: &[(u64, u64, &'static str)],
    ) -> Result<(), BootError> {
        let (path, end) = (image.path.clone(), start.saturating_add(bytes));
        if end > self.low_end() {
            return Err(BootError::KernelDoesNotFit { path, start, end, ram_end: self.low_end() });
        }
        match tables.iter().find(|(from, to, _)| start < *to && *from < end) {
            Some(&(_, _, what)) => Err(BootError::Overlap { path, start, end, what }),
            None => Ok(()),
        }
    }

    fn write(&self, what: &'static str, bytes: &[u8], address: u64) -> Result<(), BootError> {
        let written = self.ram.write_slice(bytes, GuestAddress(address));
        written.map_err(|source| BootError::Write { what, source })
    }

    /// Writes zeroes: memory may hold what the run before a reset left there.
    fn zero(&self, address: u64, bytes: u64) -> Result<(), BootError> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        for offset in (0..bytes).step_by(ZEROES.len()) {
            let len = (bytes - offset).min(ZEROES.len() as u64) as usize;
            self.write("zeroes", &ZEROES[..len], address + offset)?;
        }
        Ok(())
    }
}

/// The little-endian number at `offset`; nothing if the bytes end before it does.
fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let field = bytes.get(offset..offset.checked_add(2)?)?;
    field.try_into().ok().map(u16::from_le_bytes)
}

/// As [`u16_at`].
fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..offset.checked_add(4)?)?;
    field.try_into().ok().map(u32::from_le_bytes)
}

/// As [`u16_at`].
fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let field = bytes.get(offset..offset.checked_add(8)?)?;
    field.try_into().ok().map(u64::from_le_bytes)
}

const _: () = assert!(BIOS_DATA < BOOT_GDT && BOOT_GDT + boot_regs::GDT_BYTES <= MULTIBOOT_INFO);

#[cfg(test)]
mod tests {
    use super::testing::{Elf, MULTIBOOT_HEADER, boot, file, kernel, memory, write_u32};
    use super::{BootError, Entry, Kind, kind_of, virtio_mmio_parameters};
    use crate::spec::{BootSource, GuestSpec};
    use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
    use proptest::prop_assert;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn the_kind_is_told_by_content() {
        let plain = Elf::linux().build();
        assert_eq!(kind_of(&plain), Some(Kind::Vmlinux));
        assert_eq!(kind_of(&Elf::multiboot().build()), Some(Kind::Multiboot));
        let mut bzimage = vec![0; 0x400];
        bzimage[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kind_of(&bzimage), Some(Kind::BzImage));
        for other in [&b""[..], b"#!/bin/sh\n", &plain[..10], &[0; 16384]] {
            assert_eq!(kind_of(other), None);
        }
        let mut late = vec![0; 8184];
        late.extend(MULTIBOOT_HEADER);
        assert_eq!(kind_of(&late), None, "the header ends after the first 8 KiB");
        assert_eq!(kind_of(&late[4..]), Some(Kind::Multiboot));
        assert_eq!(kind_of(&late[2..]), None, "not aligned");
    }

    #[test]
    fn something_else_is_refused_by_name() {
        let error = boot(&memory(16), kernel(b"not a kernel".to_vec(), &[])).unwrap_err();
        assert!(matches!(error, BootError::NotAKernel { .. }));
        assert!(error.to_string().starts_with("/boot/image is not a kernel that can be booted: give"));
    }

    #[test]
    fn parameters_name_window_and_interrupt() {
        assert_eq!(virtio_mmio_parameters([].into_iter()), "");
        assert_eq!(
            virtio_mmio_parameters([0, 2].into_iter()),
            "virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0002000:18 "
        );
    }

    #[test]
    fn loading_again_over_a_used_memory_gives_the_same_memory() {
        let linux = [(0x7000, 0x1000), (0x9000, 0x6000), (0x2_0000, 14), (0xff_f000, 24)];
        let multiboot = [(0x1_0000, 0x100), (0x10_3000, 5), (0x10_4000, 13), (0x10_0000, 0x3000)];
        for (image, own) in [(Elf::linux().build(), linux), (Elf::multiboot().build(), multiboot)] {
            let source = kernel(image, &[b"first", b"second module"]);
            let (fresh, used) = (memory(16), memory(16));
            let entry = boot(&fresh, source.clone()).unwrap();
            for (first, frames) in fresh.populated().unwrap() {
                let garbage = vec![0xa5; frames as usize * 4096];
                used.ram().write_slice(&garbage, GuestAddress(first.address())).unwrap();
            }
            assert_eq!(boot(&used, source).unwrap(), entry);
            let tables =
                [(0x400, 0x120), (0x9_fc00, 16), (0xe_0000, 0x100), (0xf_0000, 300), (0x10_0000, 0x3000)];
            for (start, len) in own.into_iter().chain(tables) {
                let (mut a, mut b) = (vec![0; len], vec![0; len]);
                fresh.ram().read_slice(&mut a, GuestAddress(start)).unwrap();
                used.ram().read_slice(&mut b, GuestAddress(start)).unwrap();
                let differ = (0..len).find(|&i| a[i] != b[i]);
                assert_eq!(differ, None, "from {start:#x}");
            }
        }
    }

    #[test]
    fn flat_images_are_entered_where_they_lie() {
        let memory = memory(16);
        let flat = |bytes: &[u8], address| BootSource::Flat { image: file(bytes.to_vec()), address };
        let entry = boot(&memory, flat(&[0xf4, 0xeb, 0xfd], 0x7c00)).unwrap();
        assert_eq!(entry, Entry::Protected32 { eip: 0x7c00, eax: 0, ebx: 0 });
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x7c00)).unwrap(), 0xf4);
        boot(&memory, flat(&[0; 4096], (16 << 20) - 4096)).unwrap();
        for (bytes, address) in
            [(4097, (16 << 20) - 4096), (1, 1 << 32), (1, u64::MAX), (4096, u64::from(u32::MAX))]
        {
            let error = boot(&memory, flat(&vec![0; bytes], address)).unwrap_err();
            assert!(matches!(error, BootError::FlatOutsideRam { .. }), "{error}");
        }
        let empty = boot(&memory, flat(&[], 0x7c00)).unwrap_err();
        assert!(matches!(empty, BootError::Truncated { .. }));
        for address in [0, 0x500, 0x9_f000, 0xe_0000, 0xf_ffff] {
            let error = boot(&memory, flat(&[0; 4096], address)).unwrap_err();
            assert!(matches!(error, BootError::Overlap { .. }), "{error}");
        }
    }

    #[test]
    fn the_spec_of_a_small_guest_boots() {
        let memory = memory(1);
        let source = BootSource::Flat { image: file(vec![0xf4]), address: 0x8000 };
        let spec = GuestSpec::new("small", memory.layout().bytes(), source.clone());
        spec.validate().unwrap();
        boot(&memory, source).unwrap();
    }

    /// A valid image, some of its bytes changed, and perhaps cut short.
    fn mutated() -> impl Strategy<Value = Vec<u8>> {
        let kinds = prop_oneof![
            Just(Elf::linux().build()),
            Just(Elf::multiboot().build()),
            Just(Elf { wide: true, ..Elf::multiboot() }.build()),
            Just(super::testing::kludge()),
            Just(super::testing::bzimage()),
        ];
        let edge = prop_oneof![
            any::<u32>(),
            Just(0),
            Just(u32::MAX),
            Just(0x7fff_ffff),
            Just(0x1000),
            Just(16 << 20)
        ];
        let changes = proptest::collection::vec((0_usize..0x300, edge), 0..6);
        (kinds, changes, 0_usize..40_000).prop_map(|(mut image, changes, len)| {
            for (at, value) in changes {
                if at + 4 <= image.len() {
                    write_u32(&mut image, at, value);
                }
            }
            image.truncate(len.max(4));
            image
        })
    }

    proptest! {
        #[test]
        fn hostile_images_never_panic(image in mutated()) {
            let memory = memory(16);
            if let Ok(Entry::Linux64 { rip, .. }) = boot(&memory, kernel(image, &[b"module"])) {
                prop_assert!(rip < 16 << 20);
            }
        }

        #[test]
        fn random_bytes_never_panic(image in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let memory = memory(1);
            prop_assert!(boot(&memory, kernel(image, &[])).is_err());
        }
    }
}
