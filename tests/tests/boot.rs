//! Every kind of image boots on this host's KVM: Linux as vmlinux and bzImage, with one CPU and with two, a
//! multiboot kernel with and without address fields, modules, and a flat image. The guests themselves say what
//! they were given: command line, initramfs, modules, memory map, CPUs.

use colo_tests::chain::Checker;
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::session::Session;
use colo_vmm::guest::Lifecycle;
use colo_vmm::{BootFile, BootSource, GuestSpec, ProtectedGuest};
use std::path::PathBuf;

const MIB: u64 = 1 << 20;
/// RAM that does not fit below the device hole lies above 4 GiB.
const DEVICE_HOLE: u64 = 3 << 30;
const HIGH_RAM: u64 = 1 << 32;

/// Runs the workload to its end and checks every line of it.
fn check_workload(spec: GuestSpec, lines: u64, code: u32) -> Session {
    let mut session = Session::start(spec).unwrap();
    assert_eq!(session.end().unwrap(), Lifecycle::DebugExit(code), "{}", session.text());
    let mut checker = Checker::from_start(1);
    checker.feed(session.console());
    checker.verdict().unwrap_or_else(|fault| panic!("{fault}; console:\n{}", session.text()));
    assert_eq!((checker.counts().lines, checker.is_done()), (lines, true), "{}", session.text());
    session
}

/// The initramfs ran, and with the arguments of the command line: it ends with the code that they ask for.
#[test]
fn vmlinux_boots_with_initramfs_and_command_line() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let spec = images.linux(Kernel::Up, 1, "lines=20 pages=64 end=exit:17").unwrap();
    check_workload(spec, 20, 17);
}

#[test]
fn bzimage_boots() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let spec = images.linux(Kernel::BzImage, 1, "lines=5 end=exit:18").unwrap();
    check_workload(spec, 5, 18);
}

/// Two CPUs by the MP table, or by ACPI where the kernel knows no MP table. Memory on both sides of 4 GiB, with
/// most of that below it withheld, since a kernel initialises a struct for every page; bounce buffers, which
/// a kernel clears as soon as there is memory above 4 GiB, are left out for the same reason.
#[test]
fn linux_finds_two_cpus_and_memory_above_4_gib() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let mut spec = images.linux(Kernel::Smp, 2, "threads=2 lines=10 end=exit:19").unwrap();
    spec.memory_bytes = DEVICE_HOLE + 16 * MIB;
    let BootSource::Kernel { command_line, .. } = &mut spec.boot else { unreachable!() };
    *command_line = command_line.replace("quiet", "swiotlb=noforce memmap=2944M$96M");
    let mut session = check_workload(spec, 10, 19);
    let said = session.text();
    for text in [
        "BIOS-e820: [mem 0x0000000000100000-0x00000000bfffffff] usable",
        "BIOS-e820: [mem 0x0000000100000000-0x0000000100ffffff] usable",
        "2 CPUs",
        "cpu=0 m=",
        "cpu=1 m=",
    ] {
        assert!(said.contains(text), "no {text:?} in\n{said}");
    }
    if images.kind == "small" {
        assert!(said.contains("Intel MultiProcessor Specification"), "no MP table in\n{said}");
    }
    let populated = session.guest().memory().populated().unwrap();
    assert!(populated.iter().any(|(first, _)| first.address() >= HIGH_RAM), "nothing was written there");
}

/// The byte at each place of a test module, as dirty.elf computes it.
fn module(name: &str, len: u32) -> BootFile {
    let mut x = len;
    let next = |_| {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 24) as u8
    };
    BootFile { path: PathBuf::from(name), bytes: (0..len).map(next).collect() }
}

fn add_modules(spec: &mut GuestSpec, files: &[BootFile]) {
    let BootSource::Kernel { modules, .. } = &mut spec.boot else { unreachable!() };
    modules.extend_from_slice(files);
}

#[test]
fn multiboot_without_address_fields_gets_its_modules() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let line = "module=1 pages=4 writes=16";
    let mut spec = images.bare("dirty.elf", 1, 64 * MIB, line).unwrap();
    add_modules(&mut spec, &[module("one", 1), module("two", 70_001), module("three", 4096)]);
    let mut session = Session::start(spec).unwrap();
    session.until("module ok\n").unwrap();
    session.until("dirty done\n").unwrap();

    let mut spec = images.bare("dirty.elf", 1, 64 * MIB, line).unwrap();
    let mut damaged = module("damaged", 5000);
    let mut bytes = damaged.bytes.to_vec();
    bytes[4321] ^= 1;
    damaged.bytes = bytes.into();
    add_modules(&mut spec, &[module("good", 10), damaged]);
    Session::start(spec).unwrap().until("module bad\n").unwrap();
}

/// A multiboot kernel with address fields that writes the memory map it was given to the console, as it is:
/// a 32-bit program entered behind its header, with EBX at the multiboot information.
fn map_printer() -> BootFile {
    const ADDRESS: u32 = 0x10_0000;
    const HEADER: u32 = 32;
    const CODE: [u8; 21] = [
        0x8b, 0x73, 0x30, // mov esi, [ebx + 48]: address of the map
        0x8b, 0x4b, 0x2c, // mov ecx, [ebx + 44]: its length
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xfc, // cld
        0xf3, 0x6e, // rep outsb
        0x66, 0xba, 0xf4, 0x00, // mov dx, 0xf4
        0xb0, 0x2a, // mov al, 42
        0xee, // out dx, al
        0xf4, // hlt
    ];
    let (magic, flags) = (0x1bad_b002_u32, 1 << 16);
    let sum = 0_u32.wrapping_sub(magic).wrapping_sub(flags);
    let end = ADDRESS + HEADER + CODE.len() as u32;
    let header = [magic, flags, sum, ADDRESS, ADDRESS, end, end, ADDRESS + HEADER];
    let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).chain(CODE).collect();
    BootFile { path: PathBuf::from("map-printer"), bytes: bytes.into() }
}

#[test]
fn multiboot_tells_of_memory_on_both_sides_of_4_gib() {
    if !kvm_usable() {
        return;
    }
    let command_line = String::new();
    let boot = BootSource::Kernel { kernel: map_printer(), modules: Vec::new(), command_line };
    let mut session = Session::start(GuestSpec::new("map", DEVICE_HOLE + 16 * MIB, boot)).unwrap();
    assert_eq!(session.end().unwrap(), Lifecycle::DebugExit(42));
    // Each entry: bytes that follow (4), start (8), length (8), kind (4); 1 is RAM.
    let (entries, rest) = session.console().as_chunks::<24>();
    assert!(rest.is_empty() && entries.iter().all(|e| e[..4] == [20, 0, 0, 0]), "{entries:?}");
    let field = |e: &[u8; 24], at: usize| u64::from_le_bytes(e[at..at + 8].try_into().unwrap());
    let ram: Vec<_> = entries.iter().filter(|e| e[20] == 1).map(|e| (field(e, 4), field(e, 12))).collect();
    assert_eq!(ram, [(0, 0x9_fc00), (MIB, DEVICE_HOLE - MIB), (HIGH_RAM, 16 * MIB)]);
}

#[test]
fn multiboot_with_address_fields_gets_what_a_loader_gives() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let mut spec = images.bare("kludge.bin", 1, 48 * MIB, "one=1 two").unwrap();
    add_modules(&mut spec, &[module("m", 3), module("n", 5000)]);
    let mut session = Session::start(spec).unwrap();
    // Kibibytes above 1 MiB.
    session.until("kludge ok mem=48128 cmdline=one=1 two mods=2\n").unwrap();
    assert_eq!(session.end().unwrap(), Lifecycle::DebugExit(0));
}

#[test]
fn a_flat_image_is_entered_at_its_first_byte() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let image = BootFile::kernel(&images.payload("flat.bin").unwrap()).unwrap();
    let spec = GuestSpec::new("flat", 2 * MIB, BootSource::Flat { image, address: MIB });
    let mut session = Session::start(spec).unwrap();
    session.until("flat ok\n").unwrap();
    assert_eq!(session.end().unwrap(), Lifecycle::DebugExit(0));
}
