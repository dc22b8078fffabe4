//! Multiboot-1 (GNU Multiboot specification 0.6.96): kernels that say in their first 8 KiB how they want to be
//! loaded. ELF images, 32-bit or 64-bit, go by their segments; others by the addresses in their header.
//!
//! The information structure, its lists and its strings lie together at [`MULTIBOOT_INFO`], modules
//! page-aligned behind the kernel and never below 1 MiB.

use super::elf::{self, Image, Segment};
use super::{BootError, Entry, MACHINE_TABLES, Target, u32_at};
use crate::arch::x86_64::layout::{COMMAND_LINE, EBDA_START, HIMEM_START, MULTIBOOT_INFO};
use crate::spec::BootFile;
use colo_common::PAGE_SIZE;

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What the kernel finds in EAX.
const BOOT_MAGIC: u32 = 0x2bad_b002;
/// The header lies wholly inside so many bytes of the file.
const SEARCH_BYTES: usize = 8192;

const PAGE_ALIGN: u32 = 1 << 0;
const MEMORY_INFO: u32 = 1 << 1;
/// Features that a loader must know to load the kernel; the upper half may be ignored.
const REQUIRED: u32 = 0xffff;
const ADDRESS_FIELDS: u32 = 1 << 16;

/// Bytes of the information structure, with the video fields that stay zero.
const INFO_BYTES: usize = 116;
const INFO_LIMIT: usize = (COMMAND_LINE - MULTIBOOT_INFO) as usize;
/// Fields that are given: memory sizes, command line, modules, memory map, name of the boot loader.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

const INFO_TABLE: (u64, u64, &str) = (MULTIBOOT_INFO, COMMAND_LINE, "the multiboot information");

/// Where a header is and what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    offset: usize,
    flags: u32,
}

/// Looks for a header: magic number, flags and checksum, aligned to 4 bytes, early in the file.
pub(super) fn find_header(bytes: &[u8]) -> Option<Header> {
    let start = &bytes[..bytes.len().min(SEARCH_BYTES)];
    (0..start.len()).step_by(4).find_map(|offset| {
        let (magic, flags) = (u32_at(start, offset)?, u32_at(start, offset + 4)?);
        let sum = magic.wrapping_add(flags).wrapping_add(u32_at(start, offset + 8)?);
        (magic == HEADER_MAGIC && sum == 0).then_some(Header { offset, flags })
    })
}

/// Loads the kernel and its modules.
///
/// # Errors
/// The kernel is damaged or demands what is not offered, or it or a module does not fit.
pub(super) fn load(
    target: &Target<'_>,
    file: &BootFile,
    modules: &[BootFile],
    command_line: &str,
) -> Result<Entry, BootError> {
    let header = find_header(&file.bytes).ok_or_else(|| BootError::NotAKernel { path: file.path.clone() })?;
    let flags = header.flags & REQUIRED & !(PAGE_ALIGN | MEMORY_INFO);
    if flags != 0 {
        return Err(BootError::MultibootFeatures { path: file.path.clone(), flags });
    }
    let image = if header.flags & ADDRESS_FIELDS != 0 {
        image_by_addresses(file, header)?
    } else {
        elf::parse(file)?
    };
    let entry = image.physical_entry().and_then(|entry| u32::try_from(entry).ok());
    let eip = entry.ok_or_else(|| malformed(file, "its entry is outside what it loads"))?;
    let [bios, ebda, acpi] = MACHINE_TABLES;
    for segment in &image.segments {
        target.check_place(file, segment.address, segment.memory_bytes, &[bios, INFO_TABLE, ebda, acpi])?;
    }
    for segment in &image.segments {
        segment.write(target, &file.bytes)?;
    }
    let placed = load_modules(target, image.end(), modules)?;
    let info = information(target, command_line, modules, &placed)?;
    target.write("the multiboot information", &info, MULTIBOOT_INFO)?;
    Ok(Entry::Protected32 { eip, eax: BOOT_MAGIC, ebx: MULTIBOOT_INFO as u32 })
}

fn malformed(file: &BootFile, what: &'static str) -> BootError {
    BootError::Malformed { path: file.path.clone(), what }
}

/// What the address fields describe: one run of bytes, with zeroes after it.
fn image_by_addresses(file: &BootFile, header: Header) -> Result<Image, BootError> {
    let truncated = |what| move || BootError::Truncated { path: file.path.clone(), what };
    let field = |number: usize| {
        let value = u32_at(&file.bytes, header.offset + 12 + 4 * number).map(u64::from);
        value.ok_or_else(truncated("its multiboot header"))
    };
    let (header_address, start, load_end, zero_end, entry) =
        (field(0)?, field(1)?, field(2)?, field(3)?, field(4)?);
    // The header's own place in file and memory tells which byte of the file goes to `start`.
    let before = header_address.checked_sub(start).and_then(|bytes| usize::try_from(bytes).ok());
    let offset = before.and_then(|bytes| header.offset.checked_sub(bytes));
    let offset = offset.ok_or_else(|| malformed(file, "its multiboot header lies before what it loads"))?;
    let file_bytes = match load_end {
        0 => file.bytes.len() - offset,
        end => end.checked_sub(start).and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0),
    };
    if file_bytes == 0 {
        return Err(malformed(file, "its load addresses leave nothing to load"));
    }
    if file_bytes > file.bytes.len() - offset {
        return Err(truncated("what its multiboot header loads")());
    }
    let memory_bytes = match zero_end {
        0 => file_bytes as u64,
        end => end.saturating_sub(start),
    };
    if memory_bytes < file_bytes as u64 {
        return Err(malformed(file, "its zeroed memory ends before what it loads"));
    }
    let segment = Segment { address: start, virtual_address: start, offset, file_bytes, memory_bytes };
    Ok(Image { entry, segments: vec![segment] })
}

/// Start and end of a module in guest memory.
type Placed = (u64, u64);

fn load_modules(
    target: &Target<'_>,
    kernel_end: u64,
    modules: &[BootFile],
) -> Result<Vec<Placed>, BootError> {
    let (mut placed, mut free) = (Vec::new(), kernel_end.max(HIMEM_START));
    for module in modules {
        let (start, bytes) = (free.next_multiple_of(PAGE_SIZE as u64), module.bytes.len() as u64);
        let room = target.low_end().saturating_sub(start);
        if bytes > room {
            let (path, memory) = (module.path.clone(), target.layout.bytes());
            return Err(BootError::ModuleTooLarge { path, bytes, room, memory });
        }
        target.write("a module", &module.bytes, start)?;
        free = start + bytes;
        placed.push((start, free));
    }
    Ok(placed)
}

/// The information structure with everything that it points to, as it lies in memory.
fn information(
    target: &Target<'_>,
    command_line: &str,
    modules: &[BootFile],
    placed: &[Placed],
) -> Result<Vec<u8>, BootError> {
    let mut info = vec![0; INFO_BYTES];
    let map = append(&mut info, &memory_map(target));
    let map_bytes = info.len() as u32 - (map - MULTIBOOT_INFO as u32);
    let loader = append_string(&mut info, "colo");
    let line = append_string(&mut info, command_line);
    let mut list = Vec::new();
    for (module, (start, end)) in modules.iter().zip(placed) {
        // The name alone: what lies around it differs from node to node.
        let name = module.path.file_name().unwrap_or_default().to_string_lossy();
        let name = append_string(&mut info, &name);
        list.extend([*start as u32, *end as u32, name, 0].map(u32::to_le_bytes).as_flattened());
    }
    let list = append(&mut info, &list);
    let mut put = |at: usize, value: u32| info[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0, INFO_FLAGS);
    put(4, (EBDA_START >> 10) as u32); // KiB from 0
    put(8, (target.low_end().saturating_sub(HIMEM_START) >> 10) as u32); // KiB from 1 MiB
    put(16, line);
    put(20, placed.len() as u32);
    put(24, list);
    put(44, map_bytes);
    put(48, map);
    put(64, loader);
    if info.len() > INFO_LIMIT {
        let (modules, bytes) = (modules.len(), info.len());
        return Err(BootError::MultibootInfo { modules, bytes, limit: INFO_LIMIT });
    }
    Ok(info)
}

/// The memory map: each entry begins with the number of bytes that follow in it.
fn memory_map(target: &Target<'_>) -> Vec<u8> {
    const FOLLOWING: u32 = 20;
    let mut map = Vec::new();
    for entry in target.memory_map() {
        map.extend(FOLLOWING.to_le_bytes());
        map.extend(entry.start.to_le_bytes());
        map.extend(entry.len.to_le_bytes());
        map.extend(if entry.usable { MAP_RAM } else { MAP_RESERVED }.to_le_bytes());
    }
    map
}

/// Puts bytes behind the structure, aligned to 4; returns their guest-physical address.
fn append(info: &mut Vec<u8>, bytes: &[u8]) -> u32 {
    info.resize(info.len().next_multiple_of(4), 0);
    let address = MULTIBOOT_INFO as u32 + info.len() as u32;
    info.extend(bytes);
    address
}

fn append_string(info: &mut Vec<u8>, text: &str) -> u32 {
    let address = append(info, text.as_bytes());
    info.push(0);
    address
}

#[cfg(test)]
mod tests {
    use super::{BOOT_MAGIC, MULTIBOOT_INFO};
    use crate::boot::testing::{Elf, boot, kernel, kludge, memory, multiboot_header, write_u32};
    use crate::boot::{BootError, Entry};
    use crate::memory::GuestMemory;
    use vm_memory::{Bytes, GuestAddress};

    fn word(memory: &GuestMemory, address: u32) -> u32 {
        memory.ram().read_obj(GuestAddress(address.into())).unwrap()
    }

    fn string(memory: &GuestMemory, address: u32) -> String {
        let byte = |at: u32| memory.ram().read_obj::<u8>(GuestAddress(at.into())).unwrap();
        (address..).map(byte).take_while(|&b| b != 0).map(char::from).collect()
    }

    fn entered_at(eip: u32) -> Entry {
        Entry::Protected32 { eip, eax: BOOT_MAGIC, ebx: MULTIBOOT_INFO as u32 }
    }

    #[test]
    fn an_elf_kernel_finds_memory_modules_and_command_line() {
        let memory = memory(4096);
        memory.ram().write_slice(&[0xff; 0x3000], GuestAddress(0x10_0000)).unwrap();
        let modules: [&[u8]; 2] = [&[7; 4097], b"last"];
        let entry = boot(&memory, kernel(Elf::multiboot().build(), &modules)).unwrap();
        assert_eq!(entry, entered_at(0x10_000c));
        assert_eq!(word(&memory, 0x10_0000), 0x1bad_b002);
        assert_eq!(word(&memory, 0x10_2ffc), 0, "bss");
        let info = |offset: u32| word(&memory, MULTIBOOT_INFO as u32 + offset);
        assert_eq!(info(0), 0b10_0100_1101);
        assert_eq!((info(4), info(8)), (639, (3 << 20) - 1024), "KiB of memory");
        assert_eq!(string(&memory, info(16)), "console=ttyS0");
        assert_eq!(string(&memory, info(64)), "colo");
        assert_eq!(info(20), 2);
        let module = |number: u32, field: u32| word(&memory, info(24) + number * 16 + field * 4);
        assert_eq!((module(0, 0), module(0, 1)), (0x10_3000, 0x10_4001));
        assert_eq!((module(1, 0), module(1, 1)), (0x10_5000, 0x10_5004));
        assert_eq!(string(&memory, module(1, 2)), "mod1");
        assert_eq!(word(&memory, module(1, 0)), u32::from_le_bytes(*b"last"));
        assert_eq!(info(44), 5 * 24);
        let last = info(48) + 4 * 24;
        assert_eq!((word(&memory, last), word(&memory, last + 8)), (20, 1), "above 4 GiB");
        assert_eq!((word(&memory, last + 12), word(&memory, last + 20)), (1 << 30, 1));
    }

    #[test]
    fn a_kernel_that_is_linked_high_is_entered_low() {
        let mut elf = Elf::multiboot();
        (elf.parts[0].virtual_address, elf.entry) = (0xc010_0000, 0xc010_000c);
        assert_eq!(boot(&memory(16), kernel(elf.build(), &[])).unwrap(), entered_at(0x10_000c));
        let wide = Elf { wide: true, ..elf };
        assert_eq!(boot(&memory(16), kernel(wide.build(), &[])).unwrap(), entered_at(0x10_000c));
        let stray = Elf { entry: 0x20_0000, ..wide };
        assert!(matches!(boot(&memory(16), kernel(stray.build(), &[])), Err(BootError::Malformed { .. })));
    }

    #[test]
    fn address_fields_win_over_everything() {
        let memory = memory(16);
        memory.ram().write_slice(&[0xff; 0x2000], GuestAddress(0x10_0000)).unwrap();
        // The header is at 64 in the file and at 0x100010 in memory, so byte 48 goes to 1 MiB.
        assert_eq!(boot(&memory, kernel(kludge(), &[])).unwrap(), entered_at(0x10_0030));
        assert_eq!(word(&memory, 0x10_0000), 0xeeee_eeee);
        assert_eq!(word(&memory, 0x10_0010), 0x1bad_b002);
        assert_eq!((word(&memory, 0x10_00fc), word(&memory, 0x10_0100)), (0x9090_9090, 0));
        assert_eq!(word(&memory, 0x10_1ffc), 0);
        let field = |number: usize, value: u32| {
            let mut image = kludge();
            write_u32(&mut image, 64 + 12 + 4 * number, value);
            boot(&memory, kernel(image, &[]))
        };
        field(2, 0).unwrap(); // load up to the end of the file
        field(3, 0).unwrap(); // no bss
        assert!(matches!(field(0, 0xf_ffff), Err(BootError::Malformed { .. })), "header before load");
        assert!(matches!(field(0, 0x10_0041), Err(BootError::Malformed { .. })), "load before file");
        assert!(matches!(field(2, 0x10_0000), Err(BootError::Malformed { .. })), "nothing to load");
        assert!(matches!(field(2, 0x10_01d1), Err(BootError::Truncated { .. })));
        assert!(matches!(field(3, 0x10_00ff), Err(BootError::Malformed { .. })), "bss before load end");
        assert!(matches!(field(3, u32::MAX), Err(BootError::KernelDoesNotFit { .. })));
        assert!(matches!(field(4, 0x10_2000), Err(BootError::Malformed { .. })), "entry behind bss");
    }

    #[test]
    fn features_are_offered_or_refused() {
        let with = |flags| {
            let mut elf = Elf::multiboot();
            elf.parts[0].bytes[..12].copy_from_slice(&multiboot_header(flags));
            boot(&memory(16), kernel(elf.build(), &[]))
        };
        with(0b11).unwrap();
        with(1 << 17).unwrap();
        for flag in 2..16 {
            let error = with(1 << flag | 1).unwrap_err();
            assert!(matches!(error, BootError::MultibootFeatures { flags, .. } if flags == 1 << flag));
        }
    }

    #[test]
    fn modules_and_their_names_are_bounded() {
        let memory = memory(2);
        let room = (2 << 20) - 0x10_3000;
        boot(&memory, kernel(Elf::multiboot().build(), &[&vec![1; room]])).unwrap();
        for modules in [&[&vec![1; room + 1][..]][..], &[&vec![1; room], b"x"]] {
            let error = boot(&memory, kernel(Elf::multiboot().build(), modules)).unwrap_err();
            assert!(matches!(error, BootError::ModuleTooLarge { .. }), "{error}");
        }
        let many: Vec<&[u8]> = vec![b""; 4000];
        let error = boot(&memory, kernel(Elf::multiboot().build(), &many)).unwrap_err();
        assert!(matches!(error, BootError::MultibootInfo { modules: 4000, .. }), "{error}");
    }

    #[test]
    fn kernels_stay_off_the_tables() {
        for address in [0x400, 0xf_f000, 0x1_f000, 0x9_f800] {
            let mut elf = Elf::multiboot();
            (elf.parts[0].address, elf.parts[0].virtual_address, elf.entry) = (address, address, address);
            let error = boot(&memory(16), kernel(elf.build(), &[])).unwrap_err();
            assert!(matches!(error, BootError::Overlap { .. }), "{error}");
        }
    }
}
