//! A guest of 1 TiB with few pages in use, from end to end of it, costs this process no more memory than a small
//! one. The guest writes below 3 GiB, which is as far as dirty.elf maps memory without pages of 1 GiB; what lies
//! above is written by this process, as by a device.

use anyhow::ensure;
use colo_common::{Gfn, PAGE_SIZE};
use colo_tests::dirtier::{Dirtier, Mode, Pattern};
use colo_tests::images::{Images, kvm_usable};
use colo_tests::measure::resident_bytes;
use colo_tests::rig::Rig;
use colo_tests::seed::Seed;
use colo_vmm::memory::MemoryLayout;
use colo_vmm::tracker::Cadence;
use colo_vmm::{Tracked, TrackerKind};
use std::time::{Duration, Instant};

use super::alone;

const SMALL: u64 = 1 << 30;
const LARGE: u64 = 1 << 40;
/// Pages that the guest writes.
const PAGES: u64 = 2000;
/// Pages that a device writes.
const DEVICE_PAGES: u64 = 1000;
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
#[expect(clippy::print_stderr, reason = "how hard the test was")]
fn resident(tracker: TrackerKind, memory_bytes: u64, seed: &mut Seed) -> anyhow::Result<u64> {
    let reach = memory_bytes.min(3 << 30) - (32 << 20);
    let (stride, seed) = ((reach / PAGES) & !(PAGE_SIZE as u64 - 1), seed.next_u64() >> 1);
    let dirtier = Dirtier { stride, seed, ..Dirtier::new(Mode::User, Pattern::Rand, PAGES) };
    let started = Instant::now();
    let mut rig = dirtier.boot(dirtier.spec(&Images::find()?, memory_bytes, tracker)?, Cadence::default())?;
    let (booted, mut pages, mut pause) = (started.elapsed(), 0, Duration::ZERO);
    for number in 1..=CUTS {
        Dirtier::set_number(&rig, number)?;
        dirtier.run_writes(&mut rig, PAGES)?;
        ensure!(rig.collect()? == Tracked::Complete, "writes were lost");
        write_as_device(&rig, number as u8)?;
        dirtier.run_writes(&mut rig, PAGES)?;
        let taken = rig.cut()?;
        ensure!(taken.cut.tracked == Tracked::Complete, "writes were lost");
        pages += taken.pages;
        pause = pause.max(taken.pause);
    }
    rig.check_image()?;
    ensure!(pages > CUTS * (DEVICE_PAGES + PAGES / 2), "only {pages} pages in {CUTS} dirty sets");
    let bytes = resident_bytes();
    eprintln!(
        "{tracker:?}, {} GiB: {} MiB resident, {} pages an epoch, longest pause {pause:.1?}, boot {booted:.1?}",
        memory_bytes >> 30,
        bytes >> 20,
        pages / CUTS
    );
    Ok(bytes)
}

/// Fills pages all over the upper half of memory, where no code of the guest lies.
fn write_as_device(rig: &Rig, value: u8) -> anyhow::Result<()> {
    let memory = rig.guest_memory();
    let half = memory.layout().bytes() / PAGE_SIZE as u64 / 2;
    for n in 0..DEVICE_PAGES {
        memory.write_page(nth_frame(memory.layout(), half + n * half / DEVICE_PAGES), &[value; PAGE_SIZE])?;
    }
    Ok(())
}

/// The frame that comes `n`th in RAM, whose addresses leave a hole.
fn nth_frame(layout: &MemoryLayout, mut n: u64) -> Gfn {
    for slot in layout.slots() {
        if n < slot.frames {
            return Gfn(slot.first.0 + n);
        }
        n -= slot.frames;
    }
    panic!("RAM has no such frame");
}
