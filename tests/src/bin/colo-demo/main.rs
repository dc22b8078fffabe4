//! `make demo`: a secondary and a primary as processes of their own, a Linux guest that is protected while it works, and
//! the primary killed at a random instant. The guest goes on at the secondary; what both nodes let out is put together
//! by offset and must be one console, without a gap, equal where both said it, its hash chain unbroken.
//!
//! Then the same with a real service: Redis on a disk of the guest, a client outside on a network, and its one connection
//! outlives the service's host. A broken promise ends the demo with an error. Where KVM cannot be used, the synthetic
//! guest takes Linux's place, and the demo says so first; the second scene is left out there, and where no network can be
//! made.

mod network;
mod report;
mod run;
mod watch;

use anyhow::{Context, ensure};
use clap::Parser;
use colo_common::config::LogConfig;
use colo_tests::cluster::config::Guest;
use colo_tests::images::{Images, Kernel};
use colo_tests::lab;
use colo_tests::seed::Seed;
use colo_vmm::host::Host;
use report::{Figures, say};
use run::Scene;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Parser)]
#[command(about = "Kills the host of a guest and shows that the guest goes on")]
struct Args {
    /// How often the whole is repeated.
    #[arg(long, default_value_t = 1)]
    runs: u32,
    /// Seed of the workload and of the instants at which the primary is killed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds that the guest works under protection before the kill, at most.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Where the summary is written.
    #[arg(long, default_value = "target/demo/summary.json")]
    summary: PathBuf,
}

fn main() -> ExitCode {
    colo_common::telemetry::init(&LogConfig::default());
    match demo(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &Args) -> anyhow::Result<()> {
    ensure!(args.runs > 0, "--runs 0 shows nothing: give it at least 1");
    ensure!(args.seconds > 0, "--seconds 0 shows nothing: give it at least 1");
    let mut seed = Seed::new(args.seed);
    let (images, hypervisor) = match Host::open() {
        Ok(host) => (Some(Images::find()?), host.virtualisation().to_string()),
        Err(why) => {
            say(&format!("no KVM guest here, the synthetic guest takes its place: {why}"));
            (None, "none".to_owned())
        }
    };
    let mut figures = Figures::new(args.seed, hypervisor);
    let mut played = Ok(());
    for run in 1..=args.runs {
        say(&format!("run {run} of {}", args.runs));
        let guest = guest(images.as_ref(), seed.below(1_000_000))?;
        // The last part of a second is random too, so that the kill meets any step of an epoch.
        let until_kill = Duration::from_micros(1_000_000 + seed.below(args.seconds * 1_000_000));
        played = run::play(&Scene { guest, until_kill }, &mut figures).with_context(|| format!("run {run}"));
        if let (Ok(()), Some(images)) = (&played, images.as_ref().filter(|_| lab::usable())) {
            let until_kill = Duration::from_micros(1_000_000 + seed.below(args.seconds * 1_000_000));
            let clients = figures.clients.get_or_insert_default();
            played =
                network::play(images, until_kill, clients).with_context(|| format!("run {run}, the service"));
        }
        if played.is_err() {
            figures.fail();
            break;
        }
    }
    let kept = figures.finish(&args.summary);
    played.and(kept)
}

fn guest(images: Option<&Images>, seed: u64) -> anyhow::Result<Guest> {
    match images {
        Some(images) => {
            Guest::linux(images, Kernel::Up, seed, "lines=0 pages=512 touch=64 pattern=rand delay_us=20000")
        }
        None => Ok(Guest::synthetic(seed)),
    }
}
