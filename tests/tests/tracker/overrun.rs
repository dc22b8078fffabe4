//! Rings that nobody harvests in time: a native guest leaves KVM_RUN when its ring is full and loses nothing; an
//! emulated one may run past the end of its ring, and then every cut must say that its dirty set is unknown.

use anyhow::{Context, ensure};
use colo_tests::dirtier::{Dirtier, Mode, Pattern};
use colo_tests::images::kvm_usable;
use colo_tests::seed::Seed;
use colo_tests::session::PATIENCE;
use colo_vmm::guest::{GuestEvent, TrackingLoss};
use colo_vmm::host::Virtualisation;
use colo_vmm::tracker::Cadence;
use colo_vmm::{
    BootFile, BootSource, DirtySet, GuestMemory, GuestSpec, KvmGuest, ProtectedGuest, Tracked, TrackerKind,
};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

use super::{Sum, Trial, alone};

/// Nobody harvests a ring before it is full, or before the cut.
const NEVER: Cadence = Cadence { period: None, quarter: false };

#[test]
fn a_full_ring_ends_the_run_of_a_native_guest_and_nothing_is_lost() {
    if !kvm_usable() {
        return;
    }
    let (_alone, mut seed) = (alone(), Seed::from_env(5));
    for (pattern, cpus) in [(Pattern::Seq, 1), (Pattern::Rand, 1), (Pattern::Seq, 2)] {
        let dirtier = Dirtier { cpus, ..Dirtier::new(Mode::User, pattern, 3000) };
        let sum = fill_rings(dirtier, &mut seed).unwrap();
        println!("{pattern:?} on {cpus} vCPUs, ring never harvested before it is full: {sum:?}");
    }
}

/// More pages than the rings hold are in each dirty set, so KVM must have left the guest to have them emptied.
fn fill_rings(dirtier: Dirtier, seed: &mut Seed) -> anyhow::Result<Sum> {
    let (entries, cpus) = (1024, u64::from(dirtier.cpus));
    let mut trial = Trial::boot(dirtier, TrackerKind::Ring { entries }, NEVER)?;
    while trial.sum.cuts < 50 {
        trial.next_number(seed)?;
        let before = trial.sum.reported;
        trial.run(8 * 3000, 0)?;
        let tracked = trial.cut()?;
        ensure!(tracked == Tracked::Complete, "a native guest outran its ring: {tracked:?}");
        let pages = trial.sum.reported - before;
        ensure!(pages > cpus * u64::from(entries), "{pages} pages fit the rings, so they were never full");
    }
    trial.end()
}

#[test]
fn an_overrun_ring_is_never_taken_for_a_complete_dirty_set() {
    if !kvm_usable() {
        return;
    }
    let (_alone, mut seed, mut lost) = (alone(), Seed::from_env(6), 0);
    for (entries, fill, overruns) in [(1024, false, 12), (1024, true, 12), (4096, false, 5), (4096, true, 12)]
    {
        // No page comes twice in a full ring, so what is overwritten is lost.
        let pages = u64::from(entries) * 3 / 2;
        let dirtier = Dirtier { fill, ..Dirtier::new(Mode::Kernel, Pattern::Seq, pages) };
        let (started, what) = (Instant::now(), format!("ring of {entries}, {dirtier}"));
        let Some(sum) = provoke(dirtier, entries, overruns, &mut seed).with_context(|| what.clone()).unwrap()
        else {
            println!("skipped: this host does not emulate guests, so no ring can be overrun");
            return;
        };
        println!("{what}: {sum:?} in {:.1?}", started.elapsed());
        lost += sum.lost;
    }
    assert!(lost > 0, "no page was ever lost, so these overruns prove nothing");
}

/// Fills a ring of 1024 almost up to KVM's limit, lets some batches of instructions pass, and then, in one batch,
/// writes over the ring's end and meets an instruction that kvm-pvm's emulator does not know. It would go on to say "x".
const OVERRUN_AND_FAIL: [u8; 39] = [
    0xbf, 0x00, 0x00, 0x20, 0x00, // 0: mov edi, 0x200000
    0x31, 0xc0, // 5: xor eax, eax
    0xfc, // 7: cld
    0xb9, 0x84, 0x03, 0x00, 0x00, // 8: mov ecx, 900
    0xf3, 0xab, // 13: rep stosd
    0xb9, 0xb8, 0x0b, 0x00, 0x00, // 15: mov ecx, 3000
    0xe2, 0xfe, // 20: loop 20
    0xb9, 0x96, 0x00, 0x00, 0x00, // 22: mov ecx, 150
    0xf3, 0xab, // 27: rep stosd
    0x9b, // 29: fwait
    0x66, 0xba, 0xf8, 0x03, // 30: mov dx, 0x3f8
    0xb0, 0x78, // 34: mov al, 'x'
    0xee, // 36: out dx, al
    0xeb, 0xfe, // 37: jmp 37
];
const PROGRAM: u64 = 0x10_0000;
const TURNS: u64 = PROGRAM + 16;
const FAILING: u64 = PROGRAM + 29;
const NOP: u8 = 0x90;

/// The VM is built anew because of the loss, and the guest failed all the same.
#[test]
fn a_failure_stands_when_the_same_cut_finds_a_loss() {
    if !kvm_usable() {
        return;
    }
    let _alone = alone();
    let image = BootFile { path: "overrun".into(), bytes: OVERRUN_AND_FAIL.into() };
    let spec = GuestSpec::new("overrun", 4 << 20, BootSource::Flat { image, address: PROGRAM });
    let spec = GuestSpec { tracker: TrackerKind::Ring { entries: 1024 }, ..spec };
    let memory = Arc::new(GuestMemory::new(spec.memory_bytes).unwrap());
    let mut guest = KvmGuest::with_memory(spec, memory, NEVER).unwrap();
    if guest.virtualisation() != Virtualisation::Software {
        println!("skipped: this host does not emulate guests, so no ring can be overrun");
        return;
    }
    guest.boot().unwrap();
    guest.protect().unwrap();
    let mut dirty = DirtySet::new(guest.memory().layout().frame_limit());
    for attempt in 0..20_u32 {
        // A batch that ends while the last words are written has the loss told first: then with other turns.
        guest.memory().ram().write_obj(3000 + 37 * attempt, GuestAddress(TURNS)).unwrap();
        guest.resume().unwrap();
        let event = guest.next_event(PATIENCE).unwrap();
        let cut = guest.cut(&mut dirty).unwrap();
        let (GuestEvent::Failed(failure), Tracked::Unknown(_)) = (event, cut.tracked) else {
            guest.reset().unwrap();
            continue;
        };
        println!("attempt {attempt}: {failure}; {:?}", cut.tracked);
        assert_eq!(cut.failed.as_ref(), Some(&failure));
        // If it ran on, it would get by now.
        guest.memory().ram().write_obj(NOP, GuestAddress(FAILING)).unwrap();
        guest.resume().unwrap();
        assert_eq!(guest.next_event(Duration::ZERO), Some(GuestEvent::Failed(failure.clone())));
        std::thread::sleep(Duration::from_millis(100));
        let cut = guest.cut(&mut dirty).unwrap();
        assert_eq!((cut.failed, cut.output.console()), (Some(failure), Vec::new()));
        return;
    }
    panic!("no cut met a failed guest with a ring that was overrun");
}

/// Overruns, each with a short epoch of the VM that was built anew after it. Nothing on a host without them.
fn provoke(dirtier: Dirtier, entries: u32, overruns: u32, seed: &mut Seed) -> anyhow::Result<Option<Sum>> {
    let mut trial = Trial::boot(dirtier, TrackerKind::Ring { entries }, NEVER)?;
    if trial.rig.guest().virtualisation() != Virtualisation::Software {
        return Ok(None);
    }
    let expected = TrackingLoss::RingOverrun { vcpu: 0 };
    let (mut told, mut complete_after) = (0, 0);
    while told < overruns {
        ensure!(trial.sum.cuts < 1000, "after 1000 cuts only {told} overruns");
        trial.next_number(seed)?;
        // Entries are at least as many as writes, so the ring is filled several times over.
        trial.run(u64::from(4 * entries), 0)?;
        let event = trial.event.clone();
        let tracked = trial.cut()?;
        // Without it, the cut itself found an overrun, or there was none.
        if let Some(GuestEvent::TrackingLost(loss)) = event {
            ensure!(
                (loss, tracked) == (expected, Tracked::Unknown(expected)),
                "told {loss:?}, then {tracked:?}"
            );
            told += 1;
            complete_after += u64::from(short_epoch(&mut trial)? == Tracked::Complete);
        }
        trial.rig.check_image()?;
    }
    ensure!(trial.rig.losses >= trial.sum.unknown, "an unknown dirty set was not counted");
    ensure!(complete_after > 0, "no epoch after an overrun was complete");
    trial.end().map(Some)
}

/// The first epoch of a VM that was built anew: too short, on a machine that is not loaded, for another overrun.
fn short_epoch(trial: &mut Trial) -> anyhow::Result<Tracked> {
    if trial.dirtier.fill {
        // Progress is told every 64 pages, which fill any ring.
        trial.rig.run(Duration::from_micros(20))?;
    } else {
        trial.run(1, 0)?;
    }
    let tracked = trial.cut()?;
    trial.rig.check_image()?;
    Ok(tracked)
}
