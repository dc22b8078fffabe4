//! A guest of 1 TiB whose few pages lie all over it costs this process no more memory than a small one.

use colo_tests::dirtier::{Dirtier, Mode, Pattern};
use colo_tests::images::{Images, kvm_usable};
use colo_tests::measure::resident_bytes;
use colo_tests::seed::Seed;
use colo_vmm::tracker::Cadence;
use colo_vmm::{Tracked, TrackerKind};
use std::time::Instant;

use super::alone;

const SMALL: u64 = 1 << 30;
const LARGE: u64 = 1 << 40;
const PAGES: u64 = 3000;
const CUTS: u64 = 10;
/// What the larger guest may cost on top: tables that are touched all over, and noise.
const BOUND: u64 = 64 << 20;

#[test]
fn resident_memory_follows_the_pages_in_use_and_not_the_guests_size() {
    if !kvm_usable() {
        return;
    }
    let (_alone, mut seed) = (alone(), Seed::from_env(7));
    for tracker in [TrackerKind::default(), TrackerKind::Bitmap] {
        // Once unmeasured: what the process allocates once and for all belongs to neither.
        resident(tracker, SMALL, &mut seed).unwrap();
        let small = resident(tracker, SMALL, &mut seed).unwrap();
        let large = resident(tracker, LARGE, &mut seed).unwrap();
        assert!(large <= small + BOUND, "{tracker:?}: {small} bytes resident at 1 GiB, {large} at 1 TiB");
    }
}

/// Resident memory with a guest, its image, and a dirty set from end to end of it.
fn resident(tracker: TrackerKind, memory_bytes: u64, seed: &mut Seed) -> anyhow::Result<u64> {
    let (base, stride) = if memory_bytes == LARGE { (4 << 30, 340 << 20) } else { (16 << 20, 340 << 10) };
    let seed = seed.next_u64() >> 1;
    let dirtier = Dirtier { base, stride, seed, ..Dirtier::new(Mode::User, Pattern::Rand, PAGES) };
    let started = Instant::now();
    let mut rig = dirtier.boot(dirtier.spec(&Images::find()?, memory_bytes, tracker)?, Cadence::default())?;
    let booted = started.elapsed();
    let (mut pages, mut pause) = (0, std::time::Duration::ZERO);
    for number in 1..=CUTS {
        Dirtier::set_number(&rig, number)?;
        dirtier.run_writes(&mut rig, PAGES)?;
        anyhow::ensure!(rig.collect()? == Tracked::Complete, "writes were lost");
        dirtier.run_writes(&mut rig, PAGES)?;
        let taken = rig.cut()?;
        anyhow::ensure!(taken.cut.tracked == Tracked::Complete, "writes were lost");
        pages += taken.pages;
        pause = pause.max(taken.pause);
    }
    rig.check_image()?;
    anyhow::ensure!(pages > CUTS * PAGES / 2, "only {pages} pages in {CUTS} dirty sets");
    let bytes = resident_bytes();
    println!(
        "{tracker:?}, {} GiB: {} MiB resident, {} pages an epoch, longest pause {pause:.1?}, boot {booted:.1?}",
        memory_bytes >> 30,
        bytes >> 20,
        pages / CUTS
    );
    Ok(bytes)
}
