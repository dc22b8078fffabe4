//! Every kind of image boots on this host's KVM: Linux as vmlinux and bzImage, with one CPU and with two, a
//! multiboot kernel with and without address fields, modules, and a flat image. The guests themselves say what
//! they were given: command line, initramfs, modules, memory map, CPUs.

use colo_tests::chain::Checker;
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::session::Session;
use colo_vmm::guest::Lifecycle;
use colo_vmm::{BootFile, BootSource, GuestSpec, ProtectedGuest};
use std::path::PathBuf;

const HIGH_RAM: u64 = 1 << 32;
const MIB: u64 = 1 << 20;

/// Runs the workload to its end and checks every line of it.
fn check_workload(spec: GuestSpec, lines: u64, code: u32) -> String {
    let mut session = Session::start(spec).unwrap();
    assert_eq!(session.end().unwrap(), Lifecycle::DebugExit(code), "{}", session.text());
    let mut checker = Checker::from_start(1);
    checker.feed(session.console());
    checker.verdict().unwrap_or_else(|fault| panic!("{fault}; console:\n{}", session.text()));
    assert_eq!((checker.counts().lines, checker.is_done()), (lines, true), "{}", session.text());
    session.text()
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

/// Two CPUs by the MP table, or by ACPI where the kernel knows no MP table; memory on both sides of 4 GiB,
/// most of that below it withheld by the command line, since a kernel initialises a struct for every page.
#[test]
fn linux_finds_two_cpus_and_memory_above_4_gib() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let mut spec = images.linux(Kernel::Smp, 2, "threads=2 lines=20 end=exit:19").unwrap();
    spec.memory_bytes = (3 << 30) + 64 * MIB;
    let BootSource::Kernel { command_line, .. } = &mut spec.boot else { unreachable!() };
    *command_line = command_line.replace("quiet", "memmap=2900M$128M");
    let said = check_workload(spec, 20, 19);
    for text in [
        "BIOS-e820: [mem 0x0000000000100000-0x00000000bfffffff] usable",
        "BIOS-e820: [mem 0x0000000100000000-0x0000000103ffffff] usable",
        "2 CPUs",
        "cpu=0 m=",
        "cpu=1 m=",
    ] {
        assert!(said.contains(text), "no {text:?} in\n{said}");
    }
    if images.kind == "small" {
        assert!(said.contains("Intel MultiProcessor Specification"), "no MP table in\n{said}");
    }
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

/// The payload believes the memory map alone: it refuses pages that no entry covers.
#[test]
fn multiboot_tells_of_memory_above_4_gib_and_the_guest_writes_there() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let line = |base: u64| format!("pages=8 writes=8 rep=1 base={base}");
    let memory = (3 << 30) + 64 * MIB;
    let last = HIGH_RAM + 64 * MIB - 8 * 4096;
    for (base, covered) in [(HIGH_RAM, true), (last, true), (last + 4096, false), (HIGH_RAM - 4096, false)] {
        let spec = images.bare("dirty.elf", 1, memory, &line(base)).unwrap();
        let mut session = Session::start(spec).unwrap();
        if covered {
            // Told to write the iteration number, which nobody has raised from 0.
            session.until("dirty done\n").unwrap();
            let populated = session.guest().memory().populated().unwrap();
            let first = colo_common::Gfn(base / 4096);
            assert!(populated.iter().any(|&(at, n)| at <= first && first.0 + 8 <= at.0 + n), "{populated:?}");
        } else {
            session.until("payload-error arg=pages,base,stride\n").unwrap();
        }
    }
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
