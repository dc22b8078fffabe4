//! x
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::session::Session;
use colo_vmm::guest::Lifecycle;
use colo_vmm::{BootSource, ProtectedGuest};
#[test]
fn explore() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    let mut spec = images.busybox(Kernel::Acpi, 2, "sh").unwrap();
    let BootSource::Kernel { command_line, .. } = &mut spec.boot else { unreachable!() };
    *command_line = command_line.replace(" quiet", "");
    let t = std::time::Instant::now();
    let mut session = Session::start(spec).unwrap();
    session.until("# ").unwrap();
    println!("{:?}\n{}", t.elapsed(), session.text());
    for c in [
        "cat /proc/cpuinfo /proc/iomem",
        "cat /proc/interrupts",
        "ls -l /dev/input /sys",
        "cat /proc/bus/input/devices",
        "dd if=/dev/input/event0 bs=24 count=1 2>/dev/null | hexdump -C & ",
    ] {
        session.type_in(&format!("{c}; echo done-$((1+1))\n")).unwrap();
        println!("{:?} {}", t.elapsed(), session.until("done-2").unwrap());
    }
    session.guest().power_button();
    for c in ["sleep 1; cat /proc/interrupts"] {
        session.type_in(&format!("{c}; echo done-$((1+1))\n")).unwrap();
        println!("{:?} {}", t.elapsed(), session.until("done-2").unwrap());
    }
    session.type_in("poweroff -f\n").unwrap();
    assert_eq!(session.end().unwrap(), Lifecycle::Shutdown);
    println!("{:?} {}", t.elapsed(), session.text());
}
