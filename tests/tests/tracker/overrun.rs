//! Rings that nobody harvests in time: a native guest leaves KVM_RUN when its ring is full and loses nothing; an
//! emulated one may run past the end of its ring, and then every cut must say that its dirty set is unknown.

use anyhow::{Context, ensure};
use colo_tests::dirtier::{Dirtier, Mode, Pattern};
use colo_tests::images::kvm_usable;
use colo_tests::seed::Seed;
use colo_vmm::guest::{GuestEvent, TrackingLoss};
use colo_vmm::host::Virtualisation;
use colo_vmm::tracker::Cadence;
use colo_vmm::{Tracked, TrackerKind};
use std::time::{Duration, Instant};

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
