//! How a guest's life changes: every way to end or to reset it, seen as an event, held in the state of the cut
//! that follows, and carried out in place while protection goes on. And guests that cannot run on, or never
//! leave the processor by themselves, which can be cut all the same.

use colo_common::{Gfn, Term};
use colo_tests::chain::Checker;
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::rig::{Rig, Taken};
use colo_tests::session::{PATIENCE, Session};
use colo_vmm::egress::OutputPosition;
use colo_vmm::guest::{GuestEvent, GuestFailure, Lifecycle, ResetCause};
use colo_vmm::host::{Host, Virtualisation};
use colo_vmm::{BootFile, BootSource, DirtySet, GuestError, GuestSpec, KvmGuest, ProtectedGuest};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

const EPOCH: Duration = Duration::from_millis(25);
/// Where lifecycle.elf counts its boots.
const BOOTS: u64 = 0x30_0000;

fn payload(line: &str) -> GuestSpec {
    Images::find().unwrap().bare("lifecycle.elf", 1, 16 << 20, line).unwrap()
}

/// Runs, with a cut at the end of every epoch, until the guest asks for a change of its life.
fn until_asked(rig: &mut Rig, epoch: Duration) -> Lifecycle {
    let started = Instant::now();
    loop {
        if let Some(GuestEvent::Lifecycle(lifecycle)) = rig.run(epoch).unwrap() {
            return lifecycle;
        }
        rig.cut().unwrap();
        assert!(started.elapsed() < PATIENCE, "no end in {PATIENCE:?}; console:\n{}", rig.tail());
    }
}

/// The cut after a request: the request is in the state, output positions are those of the bytes, and the image
/// is the guest's memory.
fn cut_asked(rig: &mut Rig, lifecycle: Lifecycle) -> Taken {
    let taken = rig.cut().unwrap();
    assert_eq!(taken.cut.state.pending, Some(lifecycle));
    assert_eq!(taken.cut.state.output.console, rig.console().len() as u64);
    rig.check_image().unwrap();
    taken
}

/// The cut state's guest, carried on in a new VM, asks for the same again, and does nothing else in between.
fn replace_and_ask_again(rig: &mut Rig, taken: &Taken, lifecycle: Lifecycle) -> Taken {
    let said = rig.console().len();
    rig.replace(&taken.cut.state).unwrap();
    assert_eq!(until_asked(rig, EPOCH), lifecycle);
    let taken = cut_asked(rig, lifecycle);
    assert_eq!(rig.console().len(), said, "it ran on after its request: {}", rig.tail());
    taken
}

fn boots(rig: &mut Rig) -> u64 {
    let mut page = [0; colo_common::PAGE_SIZE];
    rig.guest().memory().read_page(Gfn(BOOTS / 4096), &mut page).unwrap();
    u64::from_le_bytes(page[..8].try_into().unwrap())
}

fn check_reset(end: &str, cause: ResetCause) {
    let mut rig = Rig::boot(payload(&format!("end={end} times=3"))).unwrap();
    let mut expected = String::new();
    for boot in 1..=3 {
        expected += &format!("lifecycle boot={boot}\n");
        let lifecycle = until_asked(&mut rig, EPOCH);
        assert_eq!(lifecycle, Lifecycle::Reset(cause), "{}", rig.tail());
        let taken = cut_asked(&mut rig, lifecycle);
        if boot == 2 {
            replace_and_ask_again(&mut rig, &taken, lifecycle);
        }
        assert_eq!(String::from_utf8_lossy(rig.console()), expected);
        assert_eq!(boots(&mut rig), boot, "memory was not kept over the resets");
        rig.guest().reset().unwrap();
    }
    assert_eq!(until_asked(&mut rig, EPOCH), Lifecycle::DebugExit(0), "{}", rig.tail());
    cut_asked(&mut rig, Lifecycle::DebugExit(0));
    assert_eq!(String::from_utf8_lossy(rig.console()), expected + "lifecycle boot=4\nlifecycle settled\n");
}

#[test]
fn the_keyboard_controller_resets_in_place() {
    if kvm_usable() {
        check_reset("i8042", ResetCause::Keyboard);
    }
}

#[test]
fn the_reset_port_resets_in_place() {
    if kvm_usable() {
        check_reset("cf9", ResetCause::Port);
    }
}

#[test]
fn a_triple_fault_resets_in_place() {
    if kvm_usable() {
        check_reset("triple", ResetCause::TripleFault);
    }
}

#[test]
fn ends_are_in_the_state_and_are_asked_for_again() {
    if !kvm_usable() {
        return;
    }
    for (end, lifecycle) in [
        ("debug:0x12345678", Lifecycle::DebugExit(0x1234_5678)),
        ("debug:0", Lifecycle::DebugExit(0)),
        ("acpi-s5", Lifecycle::Shutdown),
    ] {
        let mut rig = Rig::boot(payload(&format!("end={end}"))).unwrap();
        assert_eq!(until_asked(&mut rig, EPOCH), lifecycle, "{}", rig.tail());
        let mut taken = cut_asked(&mut rig, lifecycle);
        for _ in 0..2 {
            taken = replace_and_ask_again(&mut rig, &taken, lifecycle);
        }
        assert_eq!(rig.console(), b"lifecycle boot=1\n");
    }
}

/// An owner with several sources sleeps until it is woken and then asks without waiting; a resume wakes it again
/// for what stands. And a guest that lives is reset, not booted.
#[test]
fn an_owner_is_woken_for_what_the_guest_asks() {
    if !kvm_usable() {
        return;
    }
    let mut guest = KvmGuest::new(payload("end=i8042")).unwrap();
    let (wakes, woken) = mpsc::channel();
    guest.on_event(Arc::new(move || wakes.send(()).unwrap()));
    assert!(matches!(guest.reset(), Err(GuestError::WrongState { wanted: "reset", .. })));
    guest.boot().unwrap();
    assert!(matches!(guest.boot(), Err(GuestError::WrongState { wanted: "boot", state: "stopped" })));
    let start = OutputPosition::at_start(Term(2));
    guest.count_from(start).unwrap();
    assert!(matches!(guest.count_from(start), Err(GuestError::WrongState { state: "stopped", .. })));
    assert_eq!((guest.console_input(b"x"), guest.console_input_offset()), (1, start.console + 1));
    let mut unused = DirtySet::new(guest.memory().layout().frame_limit());
    let asked = GuestEvent::Lifecycle(Lifecycle::Reset(ResetCause::Keyboard));
    for _ in 0..3 {
        guest.resume().unwrap();
        woken.recv_timeout(PATIENCE).unwrap();
        assert_eq!(guest.next_event(Duration::ZERO), Some(asked.clone()));
        assert_eq!(guest.next_event(Duration::ZERO), None);
        let cut = guest.cut(&mut unused).unwrap();
        assert!(
            cut.output.start.console >= start.console && cut.state.console_input == start.console + 1,
            "{:?}",
            cut.output
        );
    }
    assert!(woken.try_recv().is_err(), "woken for nothing");
    guest.reset().unwrap();
    guest.resume().unwrap();
    woken.recv_timeout(PATIENCE).unwrap();
    assert_eq!(guest.next_event(Duration::ZERO), Some(GuestEvent::Lifecycle(Lifecycle::DebugExit(0))));
}

/// kvmclock is offered; steal time and async page faults are not, and a guest that turns them on all the same faults
/// as on a host without them (here, without a table of interrupts, for the third time).
#[test]
fn what_cpuid_does_not_offer_cannot_be_turned_on() {
    if !kvm_usable() {
        return;
    }
    if !Host::open().unwrap().enforces_pv_features() {
        println!("skipped: this host's KVM cannot hold a guest to its CPUID");
        return;
    }
    let (kvmclock, async_page_faults, steal_time) = (1, 2, 3);
    let fault = Lifecycle::Reset(ResetCause::TripleFault);
    for (msr, end) in [(kvmclock, Lifecycle::DebugExit(0)), (async_page_faults, fault), (steal_time, fault)] {
        let code: [u8; 20] = [
            0xb9, msr, 0x4d, 0x56, 0x4b, // mov ecx, 0x4b564d00 + msr
            0xb8, 0x01, 0x00, 0x20, 0x00, // mov eax, 0x200001
            0x31, 0xd2, // xor edx, edx
            0x0f, 0x30, // wrmsr
            0x31, 0xc0, // xor eax, eax
            0xe7, 0xf4, // out 0xf4, eax
            0xeb, 0xfe, // jmp to itself
        ];
        let image = BootFile { path: "wrmsr".into(), bytes: code.into() };
        let spec = GuestSpec::new("wrmsr", 4 << 20, BootSource::Flat { image, address: 0x10_0000 });
        assert_eq!(Session::start(spec).unwrap().end().unwrap(), end, "MSR {msr}");
    }
}

/// Another sleep type than S5's asks for nothing.
#[test]
fn another_sleep_state_is_no_shutdown() {
    if !kvm_usable() {
        return;
    }
    let mut session = Session::start(payload("end=acpi-s5 sleep=1")).unwrap();
    session.until("lifecycle survived end=acpi-s5\n").unwrap();
}

/// kvm-pvm's emulator knows no FWAIT: KVM gives the guest up, and the failure says where and at what.
#[test]
fn an_instruction_that_kvm_cannot_run_is_named() {
    if !kvm_usable() {
        return;
    }
    let mut session = Session::start(payload("end=badop")).unwrap();
    if session.guest().virtualisation() != Virtualisation::Software {
        println!("skipped: the processor itself runs guest kernel mode here, and it has FWAIT");
        return;
    }
    let failure = session.failure().unwrap();
    let GuestFailure::Internal { vcpu: 0, suberror: 1, rip, ref instruction } = failure else {
        panic!("{failure}")
    };
    assert_eq!(session.console(), b"lifecycle boot=1\n");
    let mut page = [0; colo_common::PAGE_SIZE];
    session.guest().memory().read_page(Gfn(rip / 4096), &mut page).unwrap();
    let there = &page[(rip % 4096) as usize..][..instruction.len()];
    assert_eq!((instruction[0], &instruction[..]), (0x9b, there), "{failure}");
    let text = failure.to_string();
    assert!(text.contains(&format!("RIP {rip:#x}, instruction bytes 9b ")), "{text}");

    // A guest that cannot run on has a state to look at, and fails at the same place when it is tried again.
    let guest = session.guest();
    let cut = guest.cut(&mut DirtySet::new(guest.memory().layout().frame_limit())).unwrap();
    assert_eq!(cut.state.pending, None);
    guest.resume().unwrap();
    let again = guest.next_event(PATIENCE);
    assert_eq!(again, Some(GuestEvent::Failed(failure)));
}

/// Neither a vCPU that sleeps with its interrupts off nor one that spins comes out of KVM_RUN by itself.
#[test]
fn guests_that_never_exit_can_be_cut_and_carried_on() {
    if !kvm_usable() {
        return;
    }
    for end in ["hlt", "spin"] {
        let mut rig = Rig::boot(payload(&format!("end={end}"))).unwrap();
        rig.run_until("lifecycle boot=1\n", 0, PATIENCE).unwrap();
        for _ in 0..3 {
            assert_eq!(rig.run(Duration::from_millis(100)).unwrap(), None);
            let taken = rig.cut().unwrap();
            assert_eq!(taken.cut.state.pending, None);
            rig.replace(&taken.cut.state).unwrap();
        }
        assert_eq!(rig.run(EPOCH).unwrap(), None);
        rig.cut().unwrap();
        rig.check_image().unwrap();
        assert_eq!(rig.console(), b"lifecycle boot=1\n");
    }
}

/// Two CPUs, of which the second has to wait for its start again, and a kernel that finds the memory of the run
/// before. The first reset is carried out by another VM than the one that it was asked of.
#[test]
fn linux_resets_in_place_and_boots_again() {
    if !kvm_usable() {
        return;
    }
    let epoch = 4 * EPOCH;
    let images = Images::find().unwrap();
    let line = "threads=2 pages=32 touch=8 lines=5 end=reset";
    let mut rig = Rig::boot(images.linux(Kernel::Smp, 2, line).unwrap()).unwrap();
    let mut from = 0;
    for boot in 1..=2 {
        let lifecycle = until_asked(&mut rig, epoch);
        assert!(matches!(lifecycle, Lifecycle::Reset(_)), "{lifecycle:?}: {}", rig.tail());
        let taken = cut_asked(&mut rig, lifecycle);
        let mut checker = Checker::from_start(1);
        checker.feed(&rig.console()[from..]);
        checker.verdict().unwrap_or_else(|fault| panic!("boot {boot}: {fault}\n{}", rig.tail()));
        assert_eq!((checker.counts().lines, checker.is_done()), (5, true), "boot {boot}: {}", rig.tail());
        from = rig.console().len();
        if boot == 1 {
            replace_and_ask_again(&mut rig, &taken, lifecycle);
        }
        rig.guest().reset().unwrap();
    }
}
