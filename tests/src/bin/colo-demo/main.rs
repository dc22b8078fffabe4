//! `make demo`: boots the Linux guest, cuts and saves it every 25 ms, and every second tears the whole VM down
//! and carries on in a fresh one, from memory rebuilt out of dirty sets alone; should a cut have lost track of
//! writes, all memory was copied anew, and the demo says so. The guest's console goes on without a seam; a broken
//! promise ends the demo with an error. Where KVM cannot be used, the synthetic guest takes its place, and the demo
//! says so first.

mod linux;
mod report;
mod synthetic;

use anyhow::ensure;
use clap::Parser;
use colo_tests::seed::Seed;
use colo_vmm::host::Host;
use report::{Figures, Summary, say};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Time between two teardowns of the VM.
const LIFE: Duration = Duration::from_secs(1);

#[derive(Parser)]
#[command(about = "Boots a guest and carries it from one VM to the next")]
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
    ensure!(args.runs > 0, "--runs 0 shows nothing: give it at least 1");
    let mut seed = Seed::new(args.seed);
    let (mut summary, mut figures) = (Summary::new(args.runs, args.seed), Figures::default());
    let time = Duration::from_secs(args.seconds);
    let unusable = Host::open().err();
    if let Some(why) = &unusable {
        say(&format!("no KVM guest here, the synthetic guest takes its place: {why}"));
    }
    for run in 1..=args.runs {
        say(&format!("run {run} of {}", args.runs));
        match unusable {
            None => linux::run(time, &mut seed, &mut summary, &mut figures)?,
            Some(_) => synthetic::run(time, &mut seed, &mut summary, &mut figures)?,
        }
    }
    summary.finish(&mut figures, &args.summary)
}
