//! One run with Linux on KVM.

use anyhow::{anyhow, bail, ensure};
use colo_primary::epoch::{DEFAULT_INTERVAL, Pacer};
use colo_tests::chain::Checker;
use colo_tests::images::{Images, Kernel};
use colo_tests::rig::{Rig, contains};
use colo_tests::seed::Seed;
use colo_vmm::guest::GuestEvent;
use colo_vmm::{GuestSpec, TrackerKind};
use std::time::{Duration, Instant};

use crate::LIFE;
use crate::report::{Figures, Shown, Summary, say};

/// Longest time that a boot may take; emulated kernels on a busy host are slow.
const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// Boots, and moves the guest to a fresh VM every second for `time`.
pub(crate) fn run(
    time: Duration,
    seed: &mut Seed,
    summary: &mut Summary,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let images = Images::find()?;
    let chain_seed = seed.below(1_000_000);
    let line = format!("seed={chain_seed} lines=0 pages=512 touch=64 pattern=rand delay_us=20000");
    let spec = images.linux(Kernel::Up, 1, &line)?;
    summary.guest = format!("linux {} ({} kernel)", images.release, images.kind);
    say(&format!("booting {}", summary.guest));
    colo_vmm::admission::check(&spec)?;
    let mut rig = Rig::boot(spec.clone())?;
    describe(&mut rig, &spec, summary);
    let (mut checker, mut shown) = (Checker::from_start(chain_seed), Shown::default());
    let started = Instant::now();
    let mut pacer = Pacer::new(DEFAULT_INTERVAL, started);
    // Both are known once the guest works.
    let (mut end, mut next_move) = (None, None);
    while end.is_none_or(|end| Instant::now() < end) {
        let event = rig.run(pacer.wait(Instant::now()))?;
        let cut_at = Instant::now();
        let taken = rig.cut()?;
        pacer.cut(cut_at);
        (summary.cuts, summary.dirty_pages) = (summary.cuts + 1, summary.dirty_pages + taken.pages);
        let fresh = taken.cut.output.console();
        checker.feed(&fresh);
        shown.show(&fresh);
        checker.verdict().map_err(|fault| anyhow!("the console's chain is broken: {fault:?}"))?;
        if let Some(GuestEvent::Lifecycle(asked)) = event {
            bail!("the workload runs for ever, and yet the guest asked for {asked:?}");
        }
        if end.is_none() && contains(&fresh, b"colo 00000001 ") {
            (end, next_move) = (Some(cut_at + time), Some(cut_at + LIFE));
            figures.boots.push(cut_at - started);
            let seconds = (cut_at - started).as_secs_f64();
            say(&format!(
                "the guest works after {seconds:.1} s; from now on it moves to a fresh VM every second"
            ));
        }
        if next_move.is_some_and(|at| cut_at >= at) {
            figures.restores.push(rig.replace(&taken.cut.state)?);
            // A little jitter, so that moves meet the guest at any instant of its work.
            next_move = Some(cut_at + LIFE + Duration::from_micros(seed.below(20_000)));
            rig.resume()?;
            figures.standstills.push(cut_at.elapsed());
            figures.tell(summary.cuts, checker.counts().lines);
        } else {
            rig.resume()?;
            figures.pauses.push(cut_at.elapsed());
        }
        let booting = started.elapsed() < BOOT_LIMIT;
        ensure!(end.is_some() || booting, "no boot in {BOOT_LIMIT:?}; the console ends:\n{}", rig.tail());
    }
    summary.lines += checker.counts().lines;
    summary.console_bytes += rig.console().len() as u64;
    summary.ring_overruns += rig.losses;
    Ok(())
}

fn describe(rig: &mut Rig, spec: &GuestSpec, summary: &mut Summary) {
    summary.tracker = match spec.tracker {
        TrackerKind::Ring { entries } => format!("ring ({entries} entries)"),
        TrackerKind::Bitmap => "bitmap".to_owned(),
    };
    summary.hypervisor = rig.guest().virtualisation().to_string();
    summary.tsc_moves = rig.guest().tsc_moves();
}
