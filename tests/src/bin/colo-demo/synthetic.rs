//! One run with the synthetic guest, for hosts without KVM: the same cuts and moves, in software.

use anyhow::{anyhow, bail, ensure};
use colo_common::PAGE_SIZE;
use colo_primary::epoch::{DEFAULT_INTERVAL, Pacer};
use colo_tests::chain::Checker;
use colo_tests::seed::Seed;
use colo_vmm::memory::GuestMemory;
use colo_vmm::synthetic::{Pace, Program, SyntheticConfig, SyntheticGuest};
use colo_vmm::{BootFile, BootSource, DirtySet, GuestSpec, MachineState, ProtectedGuest, Tracked};
use std::time::{Duration, Instant};

use crate::LIFE;
use crate::report::{Figures, Shown, Summary, say};

/// Runs the guest, and moves it to a fresh one every second for `time`.
pub(crate) fn run(
    time: Duration,
    seed: &mut Seed,
    summary: &mut Summary,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let image = BootFile { path: "synthetic".into(), bytes: Vec::new().into() };
    let spec = GuestSpec::new("synthetic", 16 << 20, BootSource::Flat { image, address: 1 << 20 });
    let program =
        Program { seed: seed.below(1_000_000), line_every: 400, frame_every: 0, ..Program::default() };
    let chain_seed = program.seed;
    let config = SyntheticConfig { program, ..SyntheticConfig::default() };
    (summary.guest, summary.hypervisor) = ("synthetic".to_owned(), "none".to_owned());
    summary.tracker = "ring (software)".to_owned();
    say("running the synthetic guest");
    let mut guest = SyntheticGuest::new(spec.clone(), config.clone())?;
    guest.boot()?;
    guest.protect()?;
    let mut image = GuestMemory::new(spec.memory_bytes)?;
    copy_everything(guest.memory(), &image)?;
    let mut dirty = DirtySet::new(image.layout().frame_limit());
    let (mut checker, mut shown) = (Checker::from_start(chain_seed), Shown::default());
    let started = Instant::now();
    let (mut pacer, mut pace) =
        (Pacer::new(DEFAULT_INTERVAL, started), Pace::new(Duration::from_micros(100), 400));
    let mut next_move = started + LIFE;
    guest.resume()?;
    while started.elapsed() < time {
        std::thread::sleep(pacer.wait(Instant::now()));
        guest.advance(pace.due(started.elapsed()));
        let cut_at = Instant::now();
        let cut = guest.cut(&mut dirty)?;
        pacer.cut(cut_at);
        summary.cuts += 1;
        summary.dirty_pages += dirty.len();
        if cut.tracked != Tracked::Complete {
            bail!("the synthetic guest lost writes without being told to");
        }
        copy(dirty.iter(), guest.memory(), &image)?;
        dirty.clear();
        let fresh = cut.output.console();
        summary.console_bytes += fresh.len() as u64;
        checker.feed(&fresh);
        shown.show(&fresh);
        checker.verdict().map_err(|fault| anyhow!("the console's chain is broken: {fault:?}"))?;
        if cut_at < next_move {
            guest.resume()?;
            figures.pauses.push(cut_at.elapsed());
        } else {
            next_move = cut_at + LIFE;
            ensure!(image.digest()? == guest.memory().digest()?, "the image differs from the guest's memory");
            let bytes = cut.state.encode();
            drop(guest);
            let began = Instant::now();
            guest = SyntheticGuest::new(spec.clone(), config.clone())?;
            copy_everything(&image, guest.memory())?;
            guest.protect()?;
            guest.restore(&MachineState::decode(&bytes)?)?;
            figures.restores.push(began.elapsed());
            image = GuestMemory::new(spec.memory_bytes)?;
            copy_everything(guest.memory(), &image)?;
            guest.resume()?;
            figures.standstills.push(cut_at.elapsed());
            figures.tell(summary.cuts, checker.counts().lines);
        }
    }
    summary.lines += checker.counts().lines;
    Ok(())
}

fn copy_everything(from: &GuestMemory, to: &GuestMemory) -> anyhow::Result<()> {
    for (first, frames) in from.populated()? {
        copy((first.0..first.0 + frames).map(colo_common::Gfn), from, to)?;
    }
    Ok(())
}

fn copy(
    frames: impl Iterator<Item = colo_common::Gfn>,
    from: &GuestMemory,
    to: &GuestMemory,
) -> anyhow::Result<()> {
    let mut page = [0; PAGE_SIZE];
    for gfn in frames {
        from.read_page(gfn, &mut page)?;
        to.write_page(gfn, &page)?;
    }
    Ok(())
}
