//! State: a guest that is cut at random instants and carried into a new VM each time ends as if nothing had
//! happened. The computing payload checks registers, FPU, timers and accesses itself; Linux' console carries a
//! hash chain, a clock that must not step back on any CPU, and a check of the memory it has written.

use colo_tests::chain::Checker;
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::rig::{Rig, contains};
use colo_tests::seed::Seed;
use colo_vmm::guest::{GuestEvent, Lifecycle};
use colo_vmm::state::Body;
use colo_vmm::{DirtySet, GuestSpec, KvmGuest, ProtectedGuest, Tracked, TrackerKind};
use std::time::{Duration, Instant};

/// No guest here needs longer, even on a busy host.
const LIMIT: Duration = Duration::from_secs(280);

/// In which states the cuts of a run found the guest.
#[derive(Debug, Default)]
struct Seen {
    cuts: u64,
    moves: u64,
    halted: usize,
    interrupted: usize,
    timers: usize,
    settled: u64,
}

/// Cuts at random instants until the guest ends itself; every `every`-th cut moves it to a new VM.
fn until_exit(rig: &mut Rig, seed: &mut Seed, longest: Duration, every: u64) -> (u32, Seen) {
    let (mut seen, started) = (Seen::default(), Instant::now());
    loop {
        assert!(started.elapsed() < LIMIT, "still running after {seen:?}; console ends:\n{}", rig.tail());
        let event = rig.run(Duration::from_nanos(seed.below(longest.as_nanos() as u64))).unwrap();
        let taken = rig.cut().unwrap();
        let Body::Kvm(kvm) = &taken.cut.state.body else { panic!("a KVM guest saves a KVM state") };
        seen.cuts += 1;
        seen.halted += kvm.halted();
        seen.interrupted += kvm.interrupted();
        seen.timers += kvm.timers_armed();
        if let Some(GuestEvent::Lifecycle(Lifecycle::DebugExit(code))) = event {
            assert_eq!(taken.cut.state.pending, Some(Lifecycle::DebugExit(code)));
            seen.settled += rig.guest().accesses_settled();
            return (code, seen);
        }
        assert_eq!(event, None, "console ends:\n{}", rig.tail());
        if seen.cuts.is_multiple_of(every) {
            seen.settled += rig.guest().accesses_settled();
            seen.moves += 1;
            rig.replace(&taken.cut.state).unwrap();
        }
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
    let (code, seen) = until_exit(&mut rig, &mut seed, Duration::from_millis(8), 1);
    eprintln!("{vcpus} vCPUs, {tracker:?}: {seen:?}");
    let result = format!("compute result={expected}\n");
    assert!(contains(rig.console(), result.as_bytes()) && code == 0, "exit {code}, console:\n{}", rig.tail());
    assert!(seen.moves >= 100, "too few cuts to mean much: {seen:?}");
    // Half-done accesses are met once in twenty cuts or so; the bitmap's shorter run may miss them.
    let met = seen.halted > 0 && seen.timers > 0 && (seen.settled > 0 || tracker == TrackerKind::Bitmap);
    assert!(met, "states that no cut met: {seen:?}");
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
    let (code, seen) = until_exit(&mut rig, &mut seed, Duration::from_millis(40), 2);
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
    assert!(seen.moves >= 50, "too few cuts to mean much: {seen:?}");
}

#[test]
fn linux_is_carried_from_vm_to_vm_without_a_seam() {
    linux(Kernel::Up, 1, "pages=256 touch=32 pattern=rand delay_us=20000 sleep=1", 150);
}

#[test]
fn linux_on_two_vcpus_is_carried_from_vm_to_vm_without_a_seam() {
    linux(Kernel::Smp, 2, "pages=256 touch=32 pattern=rand delay_us=10000", 60);
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
