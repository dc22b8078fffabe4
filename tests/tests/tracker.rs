//! Proves the trackers right on this host's KVM, by the idea of the kernel's own dirty_log_test: the guest writes
//! the number of the epoch to pages, and at each cut every page must hold what was read of it when it was last
//! reported. Cores are kept busy meanwhile, since a late harvest is what loses writes.

#[path = "tracker/held.rs"]
mod held;
#[path = "tracker/overrun.rs"]
mod overrun;
#[path = "tracker/sparse.rs"]
mod sparse;

use anyhow::{Context, ensure};
use colo_common::limits::MAX_RING_ENTRIES;
use colo_tests::dirtier::{Dirtier, Mode, Pattern};
use colo_tests::images::{Images, kvm_usable};
use colo_tests::load::Busy;
use colo_tests::rig::Rig;
use colo_tests::seed::Seed;
use colo_vmm::guest::GuestEvent;
use colo_vmm::tracker::Cadence;
use colo_vmm::{Tracked, TrackerKind};
use held::{Held, Shown};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

const MEMORY: u64 = 64 << 20;
const PAGES: u64 = 2048;
const ITERATIONS: u64 = 30;

/// Guests share few cores, and one test measures this process: one test at a time, however they are started.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A guest and what is known of its pages.
struct Trial {
    dirtier: Dirtier,
    rig: Rig,
    held: Held,
    /// What the guest was told to write last.
    number: u64,
    /// Whether it was told so while it ran, since the last cut.
    told_late: bool,
    /// What asked for the cut that comes next.
    event: Option<GuestEvent>,
    sum: Sum,
}

/// What a trial's cuts showed.
#[derive(Debug, Default)]
struct Sum {
    cuts: u64,
    reported: u64,
    early: u64,
    most_early: u64,
    collects: u64,
    unknown: u64,
    /// Pages whose writes were lost in cuts that said so.
    lost: u64,
}

impl Trial {
    fn boot(dirtier: Dirtier, tracker: TrackerKind, cadence: Cadence) -> anyhow::Result<Self> {
        let spec = dirtier.spec(&Images::find()?, MEMORY, tracker)?;
        let rig = dirtier.boot(spec, cadence)?;
        let held = Held::new(&rig, &dirtier)?;
        Ok(Self { dirtier, rig, held, number: 0, told_late: false, event: None, sum: Sum::default() })
    }

    /// Has the guest write the next number, at once or after it has run on with the last one.
    fn next_number(&mut self, seed: &mut Seed) -> anyhow::Result<()> {
        self.number += 1;
        self.told_late = seed.below(2) == 0;
        if self.told_late {
            self.run(64, 0)?;
        }
        Dirtier::set_number(&self.rig, self.number)
    }

    /// Runs for `writes`, taking what is known to be dirty `collects` times meanwhile, or until something asks
    /// for a cut.
    fn run(&mut self, writes: u64, collects: u64) -> anyhow::Result<()> {
        for n in 0..=collects {
            if self.event.is_some() {
                break;
            }
            self.event = self.dirtier.run_writes(&mut self.rig, writes / (collects + 1))?;
            if n < collects && self.rig.collect()? == Tracked::Complete {
                self.sum.collects += 1;
                self.held.take_reported(&self.rig)?;
            }
        }
        Ok(())
    }

    /// Cuts, and fails on any write that was lost without a word.
    fn cut(&mut self) -> anyhow::Result<Tracked> {
        let taken = self.rig.cut()?;
        let event = self.event.take();
        ensure!(matches!(event, None | Some(GuestEvent::TrackingLost(_))), "the guest asked for {event:?}");
        self.held.take_reported(&self.rig)?;
        let oldest = self.number - u64::from(self.told_late);
        let Shown { lost, reported, early } = self.held.close(&self.rig, oldest..=self.number)?;
        let sum = &mut self.sum;
        sum.cuts += 1;
        match taken.cut.tracked {
            Tracked::Complete => {
                ensure!(lost.is_empty(), "cut {} lost writes silently: {lost:?}", sum.cuts);
                // Of each vCPU: a number that it had loaded before the last cut, and a write that is yet to come.
                ensure!(
                    early <= 2 * u64::from(self.dirtier.cpus),
                    "{early} pages were reported without a write"
                );
                sum.reported += reported;
                sum.early += early;
                sum.most_early = sum.most_early.max(early);
            }
            Tracked::Unknown(_) => {
                sum.unknown += 1;
                sum.lost += lost.len() as u64;
            }
        }
        if sum.cuts.is_multiple_of(5) {
            self.rig.check_image()?;
        }
        Ok(taken.cut.tracked)
    }

    fn end(self) -> anyhow::Result<Sum> {
        self.rig.check_image()?;
        Ok(self.sum)
    }
}

/// One trial with the usual cadence: random amounts of writing, with collects while the guest runs.
#[expect(clippy::print_stderr, reason = "how hard the test was")]
fn try_out(dirtier: Dirtier, tracker: TrackerKind, seed: &mut Seed) -> anyhow::Result<Sum> {
    let (started, what) = (Instant::now(), format!("{tracker:?} {dirtier}"));
    let mut trial =
        Trial::boot(Dirtier { seed: seed.next_u64() >> 1, ..dirtier }, tracker, Cadence::default())?;
    let booted = started.elapsed();
    // A fill logs a page 512 times where the guest is emulated, and tells its progress every 64 pages.
    let most = if trial.dirtier.fill { 128 } else { PAGES };
    for _ in 0..ITERATIONS {
        trial.next_number(seed)?;
        let (writes, collects) = (64 + seed.below(most), seed.below(4));
        let tracked = trial.run(writes, collects).and_then(|()| trial.cut()).with_context(|| what.clone())?;
        ensure!(
            tracked == Tracked::Complete || trial.sum.unknown > 0,
            "{what}: an unknown dirty set was not counted"
        );
    }
    ensure!(trial.rig.losses == 0 || !never_unknown(tracker), "{what}: {} overruns", trial.rig.losses);
    let sum = trial.end().with_context(|| what.clone())?;
    eprintln!("{what}: {sum:?}, boot {booted:.1?}, all {:.1?}", started.elapsed());
    Ok(sum)
}

/// Rings of these sizes, and the bitmap.
fn trackers(rings: &[u32]) -> Vec<TrackerKind> {
    let rings = rings.iter().map(|&entries| TrackerKind::Ring { entries });
    rings.chain([TrackerKind::Bitmap]).collect()
}

/// Whether a tracker must never lose sight of a guest's writes, whatever the guest does.
fn never_unknown(tracker: TrackerKind) -> bool {
    matches!(tracker, TrackerKind::Ring { entries: MAX_RING_ENTRIES } | TrackerKind::Bitmap)
}

#[test]
fn kernel_writes_are_reported_or_known_to_be_lost() {
    if !kvm_usable() {
        return;
    }
    let (_alone, mut seed, _busy) = (alone(), Seed::from_env(1), Busy::every_core());
    for tracker in trackers(&[MAX_RING_ENTRIES, 16_384, 4096]) {
        for pattern in [Pattern::Seq, Pattern::Rand] {
            try_out(Dirtier::new(Mode::Kernel, pattern, PAGES), tracker, &mut seed).unwrap();
        }
    }
}

/// Native writes cannot outrun a ring: KVM leaves the guest when it is full, before the next one.
#[test]
fn user_writes_are_always_reported() {
    if !kvm_usable() {
        return;
    }
    let (_alone, mut seed, _busy) = (alone(), Seed::from_env(2), Busy::every_core());
    for tracker in trackers(&[MAX_RING_ENTRIES, 16_384, 4096, 1024]) {
        for pattern in [Pattern::Seq, Pattern::Rand] {
            let sum = try_out(Dirtier::new(Mode::User, pattern, PAGES), tracker, &mut seed).unwrap();
            assert_eq!(sum.unknown, 0, "{tracker:?} {pattern:?}: {sum:?}");
        }
    }
}

#[test]
fn writes_of_two_vcpus_to_the_same_pages_are_reported() {
    if !kvm_usable() {
        return;
    }
    let (_alone, mut seed, _busy) = (alone(), Seed::from_env(3), Busy::every_core());
    for tracker in trackers(&[MAX_RING_ENTRIES, 4096]) {
        for (mode, pattern) in
            [(Mode::Kernel, Pattern::Rand), (Mode::User, Pattern::Seq), (Mode::User, Pattern::Rand)]
        {
            let two = Dirtier { cpus: 2, ..Dirtier::new(mode, pattern, PAGES) };
            let sum = try_out(two, tracker, &mut seed).unwrap();
            assert!(
                sum.unknown == 0 || !never_unknown(tracker) && mode == Mode::Kernel,
                "{tracker:?} {mode:?}: {sum:?}"
            );
        }
    }
}

/// `rep stosq` is what fills a ring fastest where kernel code is emulated: an entry for each of a page's 512 words.
#[test]
fn whole_pages_written_at_once_are_reported() {
    if !kvm_usable() {
        return;
    }
    let (_alone, mut seed) = (alone(), Seed::from_env(4));
    for tracker in trackers(&[MAX_RING_ENTRIES]) {
        for mode in [Mode::Kernel, Mode::User] {
            for busy in [true, false] {
                let _busy = busy.then(Busy::every_core);
                let fill = Dirtier { fill: true, ..Dirtier::new(mode, Pattern::Seq, 256) };
                let sum = try_out(fill, tracker, &mut seed).unwrap();
                assert_eq!(sum.unknown, 0, "{tracker:?} {mode:?} busy={busy}: {sum:?}");
            }
        }
    }
}
