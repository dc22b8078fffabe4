//! `make demo`: boots the Linux guest, cuts and saves it every 25 ms, and every second tears the whole VM down
//! and carries on in a fresh one, from memory rebuilt out of dirty sets alone. The guest's console goes on
//! without a seam; a broken promise ends the demo with an error.

use anyhow::{Context, bail, ensure};
use clap::Parser;
use colo_primary::epoch::{DEFAULT_INTERVAL, Pacer};
use colo_tests::chain::Checker;
use colo_tests::images::{Images, Kernel};
use colo_tests::measure::quantile_ms;
use colo_tests::rig::{Rig, contains};
use colo_tests::seed::Seed;
use colo_vmm::guest::{GuestEvent, Lifecycle};
use colo_vmm::{GuestSpec, ProtectedGuest, TrackerKind};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Time between two teardowns of the VM.
const LIFE: Duration = Duration::from_secs(1);
/// Longest time that a boot may take; emulated kernels on a busy host are slow.
const BOOT_LIMIT: Duration = Duration::from_secs(300);

#[derive(Parser)]
#[command(about = "Boots a Linux guest and carries it from one VM to the next")]
struct Args {
    /// How often the whole is repeated.
    #[arg(long, default_value_t = 1)]
    runs: u32,
    /// Seed of the workload and of the instants at which VMs are torn down.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds that the workload runs after boot, in each run.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Where the summary is written.
    #[arg(long, default_value = "target/demo/summary.json")]
    summary: PathBuf,
}

#[derive(Default, Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

#[derive(Default, Serialize)]
struct Summary {
    guest: String,
    hypervisor: String,
    tracker: String,
    runs: u32,
    seed: u64,
    boot_ms: f64,
    cuts: u64,
    dirty_pages: u64,
    pause_ms: Quantiles,
    restores: u64,
    restore_ms: Quantiles,
    lines: u64,
    console_bytes: u64,
    chain_ok: bool,
    images_equal: u64,
    ring_overruns: u64,
    tsc_moves: bool,
}

/// What is measured over all runs.
#[derive(Default)]
struct Figures {
    boots: Vec<Duration>,
    pauses: Vec<Duration>,
    restores: Vec<Duration>,
}

fn main() -> ExitCode {
    colo_common::telemetry::init();
    match demo(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &Args) -> anyhow::Result<()> {
    let images = Images::find()?;
    let mut seed = Seed::new(args.seed);
    let (mut summary, mut figures) = (Summary::default(), Figures::default());
    (summary.runs, summary.seed, summary.chain_ok) = (args.runs, args.seed, true);
    for run in 1..=args.runs {
        say(&format!("run {run} of {}: booting Linux {}", args.runs, images.release));
        let workload_seed = seed.below(1_000_000);
        let line = format!("seed={workload_seed} lines=0 pages=512 touch=64 pattern=rand delay_us=20000");
        let spec = images.linux(Kernel::Up, 1, &line)?;
        one_run(args, spec, workload_seed, &mut seed, &mut summary, &mut figures)?;
    }
    summary.guest = format!("linux {} ({} kernel)", images.release, images.kind);
    finish(args, summary, &mut figures)
}

fn one_run(
    args: &Args,
    spec: GuestSpec,
    workload_seed: u64,
    seed: &mut Seed,
    summary: &mut Summary,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    summary.tracker = match spec.tracker {
        TrackerKind::Ring { entries } => format!("ring ({entries} entries)"),
        TrackerKind::Bitmap => "bitmap".to_owned(),
    };
    let mut rig = Rig::boot(spec)?;
    summary.hypervisor = rig.guest().virtualisation().to_string();
    summary.tsc_moves = rig.guest().tsc_moves();
    let (mut checker, mut shown) = (Checker::from_start(workload_seed), Shown::default());
    let started = Instant::now();
    let mut pacer = Pacer::new(DEFAULT_INTERVAL, started);
    let (mut working_since, mut next_teardown, mut told) = (None, None, started);
    loop {
        let event = rig.run(pacer.wait(Instant::now()))?;
        let cut_at = Instant::now();
        let taken = rig.cut()?;
        pacer.cut(cut_at);
        (summary.cuts, summary.dirty_pages) = (summary.cuts + 1, summary.dirty_pages + taken.pages);
        let fresh = taken.cut.output.console();
        checker.feed(&fresh);
        shown.show(&fresh);
        checker.verdict().map_err(|e| anyhow::anyhow!("the console's chain is broken: {e:?}"))?;
        obey(event)?;
        if working_since.is_none() && contains(rig.console(), b"colo 00000001 ") {
            working_since = Some(cut_at);
            next_teardown = Some(cut_at + LIFE);
            figures.boots.push(cut_at - started);
            say(&format!(
                "the guest works after {:.1} s; from now on it moves to a fresh VM every second",
                (cut_at - started).as_secs_f64()
            ));
        }
        if next_teardown.is_some_and(|at| cut_at >= at) {
            let restore = rig.replace(&taken.cut.state)?;
            figures.restores.push(restore);
            (summary.restores, summary.images_equal) = (summary.restores + 1, summary.images_equal + 1);
            // A little jitter, so that teardowns meet the guest at any instant of its work.
            next_teardown = Some(cut_at + LIFE + Duration::from_micros(seed.below(20_000)));
            told = tell(told, &mut rig, checker.counts().lines, figures, restore)?;
            rig.resume()?;
        } else {
            rig.resume()?;
            figures.pauses.push(cut_at.elapsed());
        }
        if working_since.is_some_and(|since| since.elapsed() >= Duration::from_secs(args.seconds)) {
            break;
        }
        ensure!(
            working_since.is_some() || started.elapsed() < BOOT_LIMIT,
            "no boot in {BOOT_LIMIT:?}:\n{}",
            rig.tail()
        );
    }
    summary.lines += checker.counts().lines;
    summary.console_bytes += rig.console().len() as u64;
    summary.ring_overruns += rig.losses;
    Ok(())
}

/// The workload runs for ever, so nothing may end it.
fn obey(event: Option<GuestEvent>) -> anyhow::Result<()> {
    match event {
        Some(GuestEvent::Lifecycle(Lifecycle::Reset(cause))) => bail!("the guest reset itself ({cause:?})"),
        Some(GuestEvent::Lifecycle(other)) => bail!("the guest ended: {other:?}"),
        _ => Ok(()),
    }
}

fn tell(
    last: Instant,
    rig: &mut Rig,
    lines: u64,
    figures: &mut Figures,
    restore: Duration,
) -> anyhow::Result<Instant> {
    let now = Instant::now();
    say(&format!(
        "{:>5} cuts, {lines:>5} lines, pause p50 {:.2} ms p99 {:.2} ms; memory equal, new VM in {:.1} ms, {} pages populated ({:.1} s)",
        figures.pauses.len(),
        quantile_ms(&mut figures.pauses, 0.5),
        quantile_ms(&mut figures.pauses, 0.99),
        restore.as_secs_f64() * 1e3,
        rig.guest().memory().populated()?.iter().map(|(_, frames)| frames).sum::<u64>(),
        (now - last).as_secs_f64(),
    ));
    Ok(now)
}

fn finish(args: &Args, mut summary: Summary, figures: &mut Figures) -> anyhow::Result<()> {
    let quantiles = |samples: &mut Vec<Duration>| Quantiles {
        p50: quantile_ms(samples, 0.5),
        p99: quantile_ms(samples, 0.99),
    };
    summary.boot_ms = quantile_ms(&mut figures.boots, 0.5);
    summary.pause_ms = quantiles(&mut figures.pauses);
    summary.restore_ms = quantiles(&mut figures.restores);
    let text = serde_json::to_string_pretty(&summary)?;
    write_summary(&args.summary, &text)?;
    say(&format!("summary, also in {}:", args.summary.display()));
    text.lines().for_each(say);
    ensure!(summary.restores > 0, "the guest never moved: give it more --seconds");
    say("every cut restored to the same guest: chain unbroken, memory equal");
    Ok(())
}

fn write_summary(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    std::fs::write(path, format!("{text}\n")).with_context(|| format!("cannot write {}", path.display()))
}

/// The guest's console, line by line, apart from what the demo says.
#[derive(Default)]
struct Shown {
    partial: Vec<u8>,
    lines: u64,
}

impl Shown {
    /// All lines of the boot, then every tenth of the workload: enough to watch.
    #[expect(clippy::print_stdout, reason = "the demo shows the guest's console")]
    fn show(&mut self, bytes: &[u8]) {
        self.partial.extend(bytes);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            let text = String::from_utf8_lossy(&line);
            self.lines += u64::from(text.starts_with("colo "));
            if !text.starts_with("colo ") || self.lines % 10 == 1 {
                println!("guest | {}", text.trim_end());
            }
        }
    }
}

#[expect(clippy::print_stdout, reason = "the demo speaks to whoever started it")]
fn say(text: &str) {
    println!("demo  | {text}");
}
