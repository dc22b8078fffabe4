//! ACPI: a Linux that knows no other way finds its two CPUs, the console, the virtio windows and the power
//! button by our tables, takes the button's interrupt, and powers off through S5. One boot, driven by a shell on
//! the console, which so is tested for input as well.

use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::session::Session;
use colo_vmm::guest::Lifecycle;
use colo_vmm::{BootSource, GuestSpec, ProtectedGuest};

/// A shell on the console of the ACPI kernel, which says what it finds as it boots.
fn shell(images: &Images) -> GuestSpec {
    let mut spec = images.busybox(Kernel::Acpi, 2, "sh").unwrap();
    let BootSource::Kernel { command_line, .. } = &mut spec.boot else { unreachable!() };
    *command_line = command_line.replace(" quiet", "");
    spec
}

/// What `command` prints, with the echo of its typing before it.
fn run(session: &mut Session, command: &str) -> String {
    // The echo has the sum, only the shell has its result.
    session.type_in(&format!("{command}; echo end-$((40+2))\n")).unwrap();
    session.until("end-42").unwrap()
}

#[track_caller]
fn check_said(said: &str, texts: &[&str]) {
    for text in texts {
        assert!(said.contains(text), "no {text:?} in\n{said}");
    }
}

fn check_boot(said: &str) {
    check_said(
        said,
        &[
            "ACPI: RSDP 0x00000000000E0000",
            "ACPI: APIC 0x",
            "Using ACPI (MADT) for SMP configuration information",
            "IOAPIC[0]: apic_id 2, version 17, address 0xfec00000, GSI 0-23",
            "2 CPUs",
            // Named by the PNP bus, not by the driver's own list of usual ports.
            "00:00: ttyS0 at I/O 0x3f8 (irq = 4, base_baud = 115200) is a 16550A",
        ],
    );
    for text in ["ACPI Error", "ACPI BIOS Error", "ACPI Warning", "ACPI Exception", "MultiProcessor Spec"] {
        assert!(!said.contains(text), "{text:?} in\n{said}");
    }
}

/// Times that the SCI was taken, on both CPUs.
fn sci_count(session: &mut Session) -> u64 {
    let said = run(session, "grep -w acpi /proc/interrupts");
    let line = said.lines().find(|line| line.trim_start().starts_with("9:"));
    let line = line.unwrap_or_else(|| panic!("the SCI is not on interrupt 9:\n{said}"));
    line.split_whitespace().skip(1).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

/// The button raises the SCI, and the kernel takes it; returns the new count.
fn wait_for_sci(session: &mut Session, before: u64, press: u32) -> u64 {
    for _ in 0..10 {
        let count = sci_count(session);
        if count > before {
            return count;
        }
    }
    panic!("press {press} raised no interrupt:\n{}", session.text());
}

/// The button driver tells a press and a release of KEY_POWER, each followed by a report: four events of 24 bytes
/// (time, type, code, value).
fn check_key_events(session: &mut Session) {
    let said = run(session, "for n in 1 2 3 4; do dd bs=24 count=1 <&3 2>/dev/null | hexdump -C; done");
    check_said(&said, &["00000010  01 00 74 00 01 00 00 00", "00000010  01 00 74 00 00 00 00 00"]);
}

#[test]
fn linux_finds_its_machine_by_acpi_and_powers_off() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let mut session = Session::start(shell(&images)).unwrap();
    let booted = session.until("# ").unwrap();
    check_boot(&booted);
    let cpus = run(&mut session, "grep -c ^processor /proc/cpuinfo");
    check_said(&cpus, &["\n2\r\n"]);
    let windows = ["d0000000-d0000fff : LNRO0005:00", "d0001000-d0001fff : LNRO0005:01"];
    check_said(&run(&mut session, "cat /proc/iomem"), &windows);

    // Open from now on, so that no press can fall between two readers.
    run(&mut session, "exec 3</dev/input/event0");
    let mut count = sci_count(&mut session);
    for press in 1..=2 {
        session.guest().power_button();
        count = wait_for_sci(&mut session, count, press);
        check_key_events(&mut session);
    }
    // An emulating host may deliver a level once more that was lowered in its handler; never for ever.
    let steady = (0..5).any(|_| sci_count(&mut session) == sci_count(&mut session));
    assert!(steady, "the line stays raised: {}", session.text());

    session.type_in("poweroff -f\n").unwrap();
    assert_eq!(session.end().unwrap(), Lifecycle::Shutdown, "{}", session.text());
}
