//! Linux by its 64-bit boot protocol: bzImage and uncompressed vmlinux, with an initramfs and a command line.
//!
//! Places, in the RAM below 4 GiB, which the page tables of the entry map to itself: zero page, command line
//! and page tables below 1 MiB, a vmlinux where its segments say, a bzImage at 1 MiB, the initramfs as high as
//! it goes. Written after Documentation/arch/x86/boot.rst.

use linux_loader::bootparam::{XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use std::io::Cursor;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryError};

use super::{BootError, Entry, Target, elf, u16_at, u32_at};
use crate::arch::x86_64::layout::{
    ACPI_TABLES, BOOT_PAGE_TABLES, COMMAND_LINE, HIMEM_START, MULTIBOOT_INFO, ZERO_PAGE,
};
use crate::spec::BootFile;
use colo_common::PAGE_SIZE;
use colo_common::limits::MAX_COMMAND_LINE;

/// Offsets of fields in a bzImage, before its header can be taken as a whole.
const SETUP_HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_LENGTH: usize = 0x201;
const HEADER_MAGIC: usize = 0x202;

const BOOT_FLAG_VALUE: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC_VALUE: u32 = 0x5372_6448;
/// The protocol of 2012 that brought the 64-bit entry and its flag.
const VERSION_ENTRY_64: u16 = 0x020c;
/// The 64-bit entry, from the start of a bzImage's protected-mode part.
const ENTRY_64: u64 = 0x200;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// Alignment that x86-64 kernels are built with.
const DEFAULT_ALIGNMENT: u32 = 0x100_0000;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// A kernel in guest memory.
struct Kernel {
    /// Guest-physical address of its first instruction.
    entry: u64,
    /// First byte that it does not use for itself until it knows its memory.
    end: u64,
    /// Last byte that an initramfs may use.
    initramfs_last: u64,
    header: setup_header,
}

/// Whether this is a bzImage: boot flag and header magic, as every Linux boot loader looks for them.
pub(super) fn is_bzimage(bytes: &[u8]) -> bool {
    u16_at(bytes, BOOT_FLAG) == Some(BOOT_FLAG_VALUE)
        && u32_at(bytes, HEADER_MAGIC) == Some(HEADER_MAGIC_VALUE)
}

/// Loads an uncompressed kernel.
///
/// # Errors
/// The kernel is damaged, or it or its initramfs does not fit.
pub(super) fn load_vmlinux(
    target: &Target<'_>,
    file: &BootFile,
    initramfs: &[BootFile],
    command_line: &str,
) -> Result<Entry, BootError> {
    let image = elf::parse(file)?;
    for segment in &image.segments {
        check_place(target, file, segment.address, segment.memory_bytes)?;
    }
    if !image.contains(image.entry) {
        return Err(BootError::Malformed {
            path: file.path.clone(),
            what: "its entry is in none of its segments",
        });
    }
    // With an offset, even of 0, the loader leaves ELF notes alone: nothing here needs them.
    Elf::load(target.ram, Some(GuestAddress(0)), &mut Cursor::new(&file.bytes), None)
        .map_err(|source| BootError::Loader { path: file.path.clone(), source })?;
    for segment in &image.segments {
        segment.write_zeroes(target)?;
    }
    let header = setup_header {
        boot_flag: BOOT_FLAG_VALUE,
        header: HEADER_MAGIC_VALUE,
        version: VERSION_ENTRY_64,
        kernel_alignment: DEFAULT_ALIGNMENT,
        ..Default::default()
    };
    let kernel = Kernel { entry: image.entry, end: image.end(), initramfs_last: u64::MAX, header };
    finish(target, kernel, initramfs, command_line)
}

/// Loads a compressed kernel, which unpacks itself.
///
/// # Errors
/// The kernel is damaged or has no 64-bit entry, or it, its command line or its initramfs does not fit.
pub(super) fn load_bzimage(
    target: &Target<'_>,
    file: &BootFile,
    initramfs: &[BootFile],
    command_line: &str,
) -> Result<Entry, BootError> {
    let path = || file.path.clone();
    let header = bzimage_header(file)?;
    if header.version < VERSION_ENTRY_64 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::NoEntry64 { path: path() });
    }
    let limit = header.cmdline_size as usize;
    if command_line.len() > limit {
        return Err(BootError::CommandLine { path: path(), len: command_line.len(), limit });
    }
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup_bytes = (setup_sectors + 1) * 512;
    let image_bytes = (file.bytes.len() as u64).saturating_sub(setup_bytes);
    if image_bytes <= ENTRY_64 {
        return Err(BootError::Truncated { path: path(), what: "its setup code" });
    }
    // Counted in 16 bytes. More may follow (a signature); with less it would unpack what is not there.
    if image_bytes < u64::from(header.syssize) * 16 {
        return Err(BootError::Truncated { path: path(), what: "its compressed kernel" });
    }
    check_place(target, file, HIMEM_START, image_bytes)?;
    // Where it unpacks and runs until it knows its memory.
    let (start, bytes) = (run_address(&header), u64::from(header.init_size));
    check_place(target, file, start, bytes)?;

    BzImage::load(
        target.ram,
        Some(GuestAddress(HIMEM_START)),
        &mut Cursor::new(&file.bytes),
        Some(GuestAddress(HIMEM_START)),
    )
    .map_err(|source| BootError::Loader { path: path(), source })?;
    let kernel = Kernel {
        entry: HIMEM_START + ENTRY_64,
        end: (HIMEM_START + image_bytes).max(start + bytes),
        initramfs_last: header.initrd_addr_max.into(),
        header: setup_header { code32_start: HIMEM_START as u32, ..header },
    };
    finish(target, kernel, initramfs, command_line)
}

/// Kernels use no memory below 1 MiB until they run, and all low memory may be given to them.
fn check_place(target: &Target<'_>, file: &BootFile, start: u64, bytes: u64) -> Result<(), BootError> {
    target.check_place(file, start, bytes, &[(0, HIMEM_START, "the tables below 1 MiB")])
}

/// The setup header; what this kernel's header does not have yet is zero.
fn bzimage_header(file: &BootFile) -> Result<setup_header, BootError> {
    let truncated = || BootError::Truncated { path: file.path.clone(), what: "its setup header" };
    let field =
        file.bytes.get(SETUP_HEADER..SETUP_HEADER + size_of::<setup_header>()).ok_or_else(truncated)?;
    let mut header = setup_header::default();
    // The byte before the magic is the distance from the magic to the header's end.
    let len = HEADER_MAGIC + usize::from(file.bytes[HEADER_LENGTH]) - SETUP_HEADER;
    let len = len.min(field.len());
    header.as_mut_slice()[..len].copy_from_slice(&field[..len]);
    Ok(header)
}

/// Where a bzImage that was loaded at 1 MiB unpacks itself to.
fn run_address(header: &setup_header) -> u64 {
    let preferred = header.pref_address;
    if header.relocatable_kernel == 0 {
        return preferred;
    }
    let alignment = u64::from(header.kernel_alignment).max(1);
    preferred.max(HIMEM_START.next_multiple_of(alignment))
}

/// All that does not depend on the kind of image: initramfs, command line, zero page, page tables.
fn finish(
    target: &Target<'_>,
    kernel: Kernel,
    initramfs: &[BootFile],
    command_line: &str,
) -> Result<Entry, BootError> {
    let (ramdisk, ramdisk_bytes) = load_initramfs(target, &kernel, initramfs)?;
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    target.write("the command line", &line, COMMAND_LINE)?;
    target.write("the page tables", &identity_map(), BOOT_PAGE_TABLES)?;

    // Both fit into 32 bits, since low RAM does; the upper halves are told all the same.
    let mut params = boot_params {
        acpi_rsdp_addr: ACPI_TABLES,
        ext_ramdisk_image: (ramdisk >> 32) as u32,
        ext_ramdisk_size: (ramdisk_bytes >> 32) as u32,
        ..Default::default()
    };
    params.hdr = setup_header {
        type_of_loader: LOADER_UNDEFINED,
        cmd_line_ptr: COMMAND_LINE as u32,
        ramdisk_image: ramdisk as u32,
        ramdisk_size: ramdisk_bytes as u32,
        ..kernel.header
    };
    if params.hdr.cmdline_size == 0 {
        params.hdr.cmdline_size = MAX_COMMAND_LINE as u32 - 1;
    }
    let map = target.memory_map();
    params.e820_entries = map.len() as u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        let r#type = if entry.usable { E820_RAM } else { E820_RESERVED };
        *slot = boot_e820_entry { addr: entry.start, size: entry.len, r#type };
    }
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, target.ram).map_err(|_| BootError::Write {
        what: "the zero page",
        source: GuestMemoryError::InvalidGuestAddress(GuestAddress(ZERO_PAGE)),
    })?;
    Ok(Entry::Linux64 { rip: kernel.entry, zero_page: ZERO_PAGE })
}

/// Writes the archives one after the other, as the initramfs format allows (each from a multiple of 4, zeroes
/// between them). Returns start and bytes, both 0 without one.
fn load_initramfs(
    target: &Target<'_>,
    kernel: &Kernel,
    archives: &[BootFile],
) -> Result<(u64, u64), BootError> {
    const PAGE: u64 = PAGE_SIZE as u64;
    let padded = |file: &BootFile| (file.bytes.len() as u64).next_multiple_of(4);
    let bytes: u64 = archives.iter().map(padded).sum();
    if bytes == 0 {
        return Ok((0, 0));
    }
    let top = target.low_end().min(kernel.initramfs_last.saturating_add(1)) / PAGE * PAGE;
    let room = top.saturating_sub(kernel.end.next_multiple_of(PAGE));
    if bytes > room {
        return Err(BootError::InitramfsTooLarge { bytes, room, memory: target.layout.bytes() });
    }
    let start = (top - bytes) / PAGE * PAGE;
    let mut at = start;
    for file in archives {
        target.write("the initramfs", &file.bytes, at)?;
        let end = at + file.bytes.len() as u64;
        at += padded(file);
        target.zero(end, at - end)?;
    }
    Ok((start, bytes))
}

/// PML4, PDPT and four page directories that map the first 4 GiB to themselves by 2 MiB pages.
fn identity_map() -> Vec<u8> {
    const TABLE: u64 = PAGE_SIZE as u64;
    const DIRECTORIES: u64 = 4;
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let pdpt = BOOT_PAGE_TABLES + TABLE;
    let directories = pdpt + TABLE;
    let mut tables = vec![0; 2 * PAGE_SIZE];
    tables[..8].copy_from_slice(&(pdpt | PRESENT_WRITABLE).to_le_bytes());
    for (number, entry) in (0..DIRECTORIES).zip(tables[PAGE_SIZE..].chunks_mut(8)) {
        entry.copy_from_slice(&((directories + number * TABLE) | PRESENT_WRITABLE).to_le_bytes());
    }
    for page in 0..DIRECTORIES * 512 {
        tables.extend((page << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes());
    }
    tables
}

const _: () = assert!(BOOT_PAGE_TABLES + 6 * PAGE_SIZE as u64 <= MULTIBOOT_INFO);
const _: () = assert!(ZERO_PAGE + size_of::<boot_params>() as u64 <= BOOT_PAGE_TABLES);

#[cfg(test)]
mod tests {
    use super::{HIMEM_START, ZERO_PAGE, boot_params, identity_map};
    use crate::arch::x86_64::layout::{ACPI_TABLES, BOOT_PAGE_TABLES, COMMAND_LINE};
    use crate::boot::testing::{Elf, boot, bzimage, file, kernel, memory, write_u32};
    use crate::boot::{BootError, Entry};
    use crate::memory::GuestMemory;
    use crate::spec::BootSource;
    use vm_memory::{Bytes, GuestAddress};

    fn zero_page(memory: &GuestMemory) -> boot_params {
        memory.ram().read_obj(GuestAddress(ZERO_PAGE)).unwrap()
    }

    fn bytes(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.ram().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn vmlinux_and_what_it_is_told() {
        let memory = memory(16);
        memory.ram().write_slice(&[0xff; 0x3000], GuestAddress(HIMEM_START)).unwrap();
        let entry = boot(&memory, kernel(Elf::linux().build(), &[&[1; 5000], &[2; 4]])).unwrap();
        assert_eq!(entry, Entry::Linux64 { rip: HIMEM_START, zero_page: ZERO_PAGE });
        assert_eq!(bytes(&memory, 0x10_1000, 0x800), [0xda; 0x800]);
        assert_eq!(bytes(&memory, 0x10_1800, 0x1800), [0; 0x1800], "bss");
        assert_eq!(bytes(&memory, COMMAND_LINE, 14), b"console=ttyS0\0");
        let params = zero_page(&memory);
        let header = params.hdr;
        let (image, size) = (header.ramdisk_image, header.ramdisk_size);
        assert_eq!((image, size), ((16 << 20) - 8192, 5004));
        assert_eq!(bytes(&memory, image.into(), 5004), [vec![1; 5000], vec![2; 4]].concat());
        assert_eq!((header.type_of_loader, { header.cmd_line_ptr }), (0xff, COMMAND_LINE as u32));
        assert_eq!({ params.acpi_rsdp_addr }, ACPI_TABLES);
    }

    #[test]
    fn the_map_leaves_out_tables_and_the_device_hole() {
        let memory = memory(4096);
        boot(&memory, kernel(Elf::linux().build(), &[b"cpio"])).unwrap();
        let params = zero_page(&memory);
        let table = params.e820_table;
        let entry = |n: usize| ({ table[n].addr }, { table[n].size }, { table[n].r#type });
        assert_eq!(params.e820_entries, 5);
        assert_eq!(entry(0), (0, 0x9_fc00, 1));
        assert_eq!(entry(1), (0x9_fc00, 0x400, 2));
        assert_eq!(entry(2), (0xe_0000, 0x2_0000, 2));
        assert_eq!(entry(3), (1 << 20, 0xbff0_0000, 1));
        assert_eq!(entry(4), (1 << 32, 1 << 30, 1));
        assert_eq!({ params.hdr.ramdisk_image }, 0xbfff_f000, "as high as low RAM goes");
    }

    #[test]
    fn an_initramfs_that_does_not_fit_names_both_sizes() {
        let memory = memory(2);
        // The kernel ends at 0x103000, so 0xfd000 bytes are left.
        boot(&memory, kernel(Elf::linux().build(), &[&vec![1; 0xf_d000]])).unwrap();
        let error = boot(&memory, kernel(Elf::linux().build(), &[&vec![1; 0xf_d001]])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the initramfs has 1036292 bytes, and the kernel leaves 1036288 bytes of the guest's 2097152 bytes \
             of memory for it: raise the guest's memory or use a smaller initramfs"
        );
    }

    #[test]
    fn a_kernel_outside_ram_or_over_the_tables_is_refused() {
        let place = |address| {
            let mut elf = Elf::linux();
            elf.parts.truncate(1);
            (elf.parts[0].address, elf.entry) = (address, address);
            boot(&memory(16), kernel(elf.build(), &[]))
        };
        place(0xff_f000).unwrap();
        for address in [0xff_f001, 1 << 40, u64::MAX - 0x1000] {
            assert!(matches!(place(address), Err(BootError::KernelDoesNotFit { .. })));
        }
        assert!(matches!(place(u64::MAX - 0xfff), Err(BootError::Malformed { .. })));
        for address in [0, 0x7000, 0xf_ffff] {
            assert!(matches!(place(address), Err(BootError::Overlap { .. })));
        }
        let stray = Elf { entry: 0x20_0000, ..Elf::linux() };
        assert!(matches!(boot(&memory(16), kernel(stray.build(), &[])), Err(BootError::Malformed { .. })));
    }

    #[test]
    fn bzimage_is_entered_behind_its_first_sector() {
        let memory = memory(16);
        let entry = boot(&memory, kernel(bzimage(), &[b"cpio"])).unwrap();
        assert_eq!(entry, Entry::Linux64 { rip: 0x10_0200, zero_page: ZERO_PAGE });
        assert_eq!(bytes(&memory, HIMEM_START, 0x3000), [0xcc; 0x3000]);
        let header = zero_page(&memory).hdr;
        assert_eq!(({ header.version }, { header.init_size }), (0x20f, 0x30_0000));
        assert_eq!({ header.kernel_info_offset }, 0, "code behind the header is not header");
        assert_eq!({ header.ramdisk_image }, 0x7f_f000, "initrd_addr_max");
        assert_eq!(({ header.ramdisk_size }, { header.cmdline_size }), (4, 255));
    }

    #[test]
    fn bzimage_keeps_the_initramfs_off_the_memory_it_unpacks_to() {
        // Unpacks to 2..5 MiB; initrd_addr_max leaves 3 MiB.
        let room = 3 << 20;
        boot(&memory(16), kernel(bzimage(), &[&vec![1; room]])).unwrap();
        let error = boot(&memory(16), kernel(bzimage(), &[&vec![1; room + 1]])).unwrap_err();
        assert!(matches!(error, BootError::InitramfsTooLarge { room: 0x30_0000, .. }), "{error}");
        let error = boot(&memory(4), kernel(bzimage(), &[])).unwrap_err();
        assert!(matches!(error, BootError::KernelDoesNotFit { end: 0x50_0000, .. }), "{error}");
    }

    #[test]
    fn bzimages_of_other_kinds_are_refused() {
        let with = |at: usize, value: u8| {
            let mut image = bzimage();
            image[at] = value;
            boot(&memory(16), kernel(image, &[]))
        };
        assert!(matches!(with(0x236, 0), Err(BootError::NoEntry64 { .. })), "32-bit");
        assert!(matches!(with(0x206, 0x0b), Err(BootError::NoEntry64 { .. })), "old protocol");
        assert!(matches!(with(0x211, 0), Err(BootError::Loader { .. })), "zImage");
        assert!(matches!(with(0x1f1, 255), Err(BootError::Truncated { .. })));
        // 0x3000 bytes are there.
        assert!(matches!(with(0x1f5, 3), Ok(Entry::Linux64 { .. })));
        assert!(matches!(with(0x1f5, 4), Err(BootError::Truncated { what: "its compressed kernel", .. })));
        let mut image = bzimage();
        write_u32(&mut image, 0x238, 12);
        assert!(matches!(
            boot(&memory(16), kernel(image, &[])),
            Err(BootError::CommandLine { len: 13, limit: 12, .. })
        ));
        let cut = bzimage()[..0x210].to_vec();
        assert!(matches!(boot(&memory(16), kernel(cut, &[])), Err(BootError::Truncated { .. })));
    }

    #[test]
    fn a_command_line_reaches_the_guest_as_it_is() {
        let (memory, line) = (memory(16), "  init=/ä\t-- a \"b c\"  ");
        let source = BootSource::Kernel {
            kernel: file(Elf::linux().build()),
            modules: Vec::new(),
            command_line: line.to_owned(),
        };
        boot(&memory, source).unwrap();
        assert_eq!(bytes(&memory, COMMAND_LINE, line.len() + 1), [line.as_bytes(), &[0]].concat());
        assert_eq!({ zero_page(&memory).hdr.ramdisk_image }, 0);
    }

    #[test]
    fn page_tables_map_every_address_below_4_gib_to_itself() {
        let tables = identity_map();
        let entry = |address: u64, index: u64| {
            let at = usize::try_from(address - BOOT_PAGE_TABLES + index * 8).unwrap();
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        for address in [0, 0x1f_ffff, 0x20_0000, 0x4000_0000, 0xffff_ffff_u64] {
            let pdpt = entry(BOOT_PAGE_TABLES, 0) & !0xfff;
            let directory = entry(pdpt, address >> 30) & !0xfff;
            let page = entry(directory, address >> 21 & 511);
            assert_eq!(page & 0x83, 0x83);
            assert_eq!((page & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
        assert_eq!(tables.len(), 6 * 4096);
    }
}
