//! State: a guest that is cut at random instants and carried into a new VM each time ends as if nothing had
//! happened. The computing payload checks registers, FPU, timers and accesses itself; Linux' console carries a
//! hash chain, a clock that must not step back on any CPU, and a check of the memory it has written.

use colo_tests::chain::Checker;
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::rig::{Rig, contains};
use colo_tests::seed::Seed;
use colo_vmm::guest::{GuestEvent, Lifecycle};
use colo_vmm::machine::Accesses;
use colo_vmm::state::Body;
use colo_vmm::{BootFile, BootSource, DirtySet, GuestSpec, KvmGuest, ProtectedGuest, Tracked, TrackerKind};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// No guest here needs longer, even on a busy host.
const LIMIT: Duration = Duration::from_secs(280);

/// Moves after which cuts become rare.
const ENOUGH: u64 = 500;

/// In which states the cuts of a run found the guest.
#[derive(Debug, Default)]
struct Seen {
    cuts: u64,
    moves: u64,
    halted: usize,
    interrupted: usize,
    timers: usize,
    ports_settled: u64,
    mmio_settled: u64,
}

impl Seen {
    /// Of the guest that is about to go.
    fn settled(&mut self, guest: &KvmGuest) {
        let Accesses { ports, mmio } = guest.accesses_settled();
        self.ports_settled += ports;
        self.mmio_settled += mmio;
    }
}

/// Cuts at random instants until the guest ends itself; every cut moves it to a new VM.
fn until_exit(rig: &mut Rig, seed: &mut Seed, longest: Duration) -> (u32, Seen) {
    let (mut seen, started) = (Seen::default(), Instant::now());
    loop {
        assert!(started.elapsed() < LIMIT, "still running after {seen:?}; console ends:\n{}", rig.tail());
        // A busy host lets a guest do little between two cuts; it has been cut enough by then.
        let longest = if seen.moves < ENOUGH { longest } else { 10 * longest };
        let event = rig.run(Duration::from_nanos(seed.below(longest.as_nanos() as u64))).unwrap();
        let taken = rig.cut().unwrap();
        let Body::Kvm(kvm) = &taken.cut.state.body else { panic!("a KVM guest saves a KVM state") };
        seen.cuts += 1;
        seen.halted += kvm.halted();
        seen.interrupted += kvm.interrupted();
        seen.timers += kvm.timers_armed();
        if let Some(GuestEvent::Lifecycle(Lifecycle::DebugExit(code))) = event {
            assert_eq!(taken.cut.state.pending, Some(Lifecycle::DebugExit(code)));
            seen.settled(rig.guest());
            return (code, seen);
        }
        assert_eq!(event, None, "console ends:\n{}", rig.tail());
        seen.settled(rig.guest());
        seen.moves += 1;
        rig.replace(&taken.cut.state).unwrap();
    }
}

#[expect(clippy::print_stderr, reason = "how hard the test was")]
fn compute(vcpus: u32, rounds: u32, payload_seed: u32, tracker: TrackerKind, expected: &str) {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(u64::from(vcpus) * 1000 + u64::from(rounds));
    let line = format!("rounds={rounds} seed={payload_seed} cpus={vcpus} io=1");
    let spec = Images::find().unwrap().bare("compute.elf", vcpus, 32 << 20, &line).unwrap();
    let mut rig = Rig::boot(GuestSpec { tracker, ..spec }).unwrap();
    let (code, seen) = until_exit(&mut rig, &mut seed, Duration::from_millis(4));
    eprintln!("{vcpus} vCPUs, {tracker:?}: {seen:?}");
    let result = format!("compute result={expected}\n");
    assert!(contains(rig.console(), result.as_bytes()) && code == 0, "exit {code}, console:\n{}", rig.tail());
    assert!(seen.moves >= 200, "too few cuts to mean much: {seen:?}");
    // With io=1 the guest accesses ports and a virtio window in each round; a cut in ten or so meets one half done.
    let met = seen.halted > 0 && seen.timers > 0 && seen.interrupted > 0;
    assert!(met && seen.ports_settled > 0 && seen.mmio_settled > 0, "states that no cut met: {seen:?}");
}

// The expected results are those of deploy/guest/payloads/reference.py.

#[test]
fn a_computation_survives_cuts_at_any_instant() {
    compute(1, 256, 42, TrackerKind::default(), "e7f926ca364062e0");
}

#[test]
fn a_computation_on_two_vcpus_survives_cuts_at_any_instant() {
    compute(2, 128, 7, TrackerKind::default(), "90fc5694baeec749");
}

#[test]
fn a_computation_survives_cuts_with_the_bitmap() {
    compute(1, 128, 1, TrackerKind::Bitmap, "7f82a8d4e8176638");
}

#[expect(clippy::print_stderr, reason = "how hard the test was")]
fn linux(kernel: Kernel, vcpus: u32, workload: &str, lines: u64) {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(77 + u64::from(vcpus));
    let line = format!("seed=5 lines={lines} end=exit:0 threads={vcpus} {workload}");
    let spec = Images::find().unwrap().linux(kernel, vcpus, &line).unwrap();
    let mut rig = Rig::boot(spec).unwrap();
    rig.run_until("colo 00000001 ", 0, LIMIT).unwrap();
    let (code, seen) = until_exit(&mut rig, &mut seed, Duration::from_millis(40));
    eprintln!("{vcpus} vCPUs: {seen:?}, {} bytes of console", rig.console().len());
    let mut checker = Checker::from_start(5);
    checker.feed(rig.console());
    checker.verdict().unwrap_or_else(|e| panic!("{e:?}; console:\n{}", rig.tail()));
    assert_eq!(
        (code, checker.counts().lines, checker.is_done()),
        (0, lines, true),
        "console:\n{}",
        rig.tail()
    );
    assert!(seen.moves >= 100, "too few cuts to mean much: {seen:?}");
    assert!(seen.interrupted > 0 && seen.timers > 0, "states that no cut met: {seen:?}");
}

#[test]
fn linux_is_carried_from_vm_to_vm_without_a_seam() {
    linux(Kernel::Up, 1, "pages=256 touch=32 pattern=rand delay_us=20000 sleep=1", 150);
}

#[test]
fn linux_on_two_vcpus_is_carried_from_vm_to_vm_without_a_seam() {
    linux(Kernel::Smp, 2, "pages=256 touch=32 pattern=rand delay_us=10000", 80);
}

/// Counts the ticks of a 100 Hz timer, by polling the interrupt controller.
const TICKS: [u8; 50] = [
    0xb0, 0x11, 0xe6, 0x20, // 0: the controller from its beginning: ICW1
    0xb0, 0x20, 0xe6, 0x21, // 4: ICW2
    0xb0, 0x04, 0xe6, 0x21, // 8: ICW3
    0xb0, 0x01, 0xe6, 0x21, // 12: ICW4
    0xb0, 0xfe, 0xe6, 0x21, // 16: all masked but the timer
    0xb0, 0x34, 0xe6, 0x43, // 20: the timer as rate generator
    0xb0, 0x9c, 0xe6, 0x40, // 24: 11932 cycles: 10 ms
    0xb0, 0x2e, 0xe6, 0x40, // 28
    0xb0, 0x0c, 0xe6, 0x20, // 32: mov al, 0xc; out 0x20, al: poll
    0xe4, 0x20, // 36: in al, 0x20: takes an interrupt if there is one
    0xa8, 0x07, // 38: test al, 7: number 0, whichever way a kernel says that it is one
    0x75, 0xf6, // 40: jnz 32
    0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // 42: inc dword [0x200000]
    0xeb, 0xee, // 48: jmp 32
];
const TICK: Duration = Duration::from_millis(10);

/// KVM counts the ticks that a stopped guest does not take; a guest that is resumed must not get all of them.
#[test]
fn a_long_stop_brings_no_flood_of_ticks() {
    if !kvm_usable() {
        return;
    }
    let image = BootFile { path: "ticks".into(), bytes: TICKS.into() };
    let spec = GuestSpec::new("ticks", 4 << 20, BootSource::Flat { image, address: 0x10_0000 });
    let mut rig = Rig::boot(spec).unwrap();
    let ticks = |rig: &Rig| rig.guest_memory().ram().read_obj::<u32>(GuestAddress(0x20_0000)).unwrap();
    let mut before = 0;
    for stop in [Duration::ZERO, 300 * TICK, Duration::from_millis(150)] {
        std::thread::sleep(stop);
        let started = Instant::now();
        assert_eq!(rig.run(80 * TICK).unwrap(), None);
        rig.cut().unwrap();
        let (most, came) = (started.elapsed().as_millis() / TICK.as_millis(), ticks(&rig) - before);
        eprintln!("after a stop of {stop:?}: {came} ticks in {most} periods");
        before += came;
        assert!(came >= 20, "after {stop:?}: only {came} ticks, it shows nothing");
        assert!(u128::from(came) <= most + 10, "after {stop:?}: {came} ticks in {most} periods");
    }
}

/// Tracking goes on and off, of a running guest and of a stopped one, and a guest that is not tracked is cut like
/// any other.
#[test]
fn protection_is_put_on_and_taken_off() {
    if !kvm_usable() {
        return;
    }
    let images = Images::find().unwrap();
    for tracker in [TrackerKind::default(), TrackerKind::Bitmap] {
        let spec = images.bare("dirty.elf", 1, 32 << 20, "pages=64 mode=user").unwrap();
        let mut guest = KvmGuest::new(GuestSpec { tracker, ..spec }).unwrap();
        guest.boot().unwrap();
        let mut dirty = DirtySet::new(guest.memory().layout().frame_limit());
        for protected in [false, true, false, true] {
            for stopped in [false, true] {
                if !stopped {
                    guest.resume().unwrap();
                }
                if protected {
                    guest.protect().unwrap();
                } else {
                    guest.unprotect().unwrap();
                }
                if stopped {
                    guest.resume().unwrap();
                }
                assert_eq!(guest.next_event(Duration::from_millis(100)), None);
                let tracked = guest.collect(&mut dirty).unwrap();
                let cut = guest.cut(&mut dirty).unwrap();
                assert_eq!((tracked, cut.tracked, cut.failed), (Tracked::Complete, Tracked::Complete, None));
                assert_eq!(dirty.is_empty(), !protected, "{tracker:?}, stopped {stopped}: {dirty:?}");
                dirty.clear();
            }
        }
    }
}
