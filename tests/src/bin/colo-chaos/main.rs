//! `make chaos`: three nodes and a real etcd on hosts of their own, one protected guest with a service, clients outside;
//! nodes, members of etcd and the networks between them fail at random instants, alone and in pairs. A table says what was
//! expected of each fault and what was seen; a broken promise ends the run with an error.

use anyhow::ensure;
use clap::Parser;
use colo_common::config::LogConfig;
use colo_tests::chaos::plan::{Expected, Fault, by_name, plan};
use colo_tests::chaos::report::Report;
use colo_tests::chaos::step::Scene;
use colo_tests::images::{Images, kvm_usable};
use colo_tests::seed::Seed;
use colo_tests::{etcd, lab};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[derive(Parser)]
#[command(
    about = "Lets nodes, etcd and networks fail under a protected guest, and judges what its clients saw"
)]
struct Args {
    /// Faults: 28 are each one alone, 10 more each pair of parties.
    #[arg(long, default_value_t = 38)]
    runs: usize,
    /// Seed of their order and their instants.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds that a fault lasts longer than is needed, at most.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Only faults of these names, in this order, such as "kill primary + freeze etcd-majority".
    #[arg(long)]
    fault: Vec<String>,
    /// Where the summary is written; the table is beside it.
    #[arg(long, default_value = "target/chaos/summary.json")]
    summary: PathBuf,
}

fn main() -> ExitCode {
    colo_common::telemetry::init(&LogConfig::default());
    if !(kvm_usable() && lab::usable() && etcd::usable()) {
        return ExitCode::SUCCESS;
    }
    match chaos(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn chaos(args: &Args) -> anyhow::Result<()> {
    ensure!(args.runs > 0, "--runs 0 shows nothing: give it at least 1");
    let images = Images::find()?;
    let mut seed = Seed::new(args.seed);
    let faults = faults(args, &mut seed)?;
    let mut run = Run { images, seed, hold: Duration::from_secs(args.seconds), scene: None, worlds: 0 };
    let (mut report, started) = (Report::default(), Instant::now());
    for (n, fault) in faults.iter().enumerate() {
        say(&format!("{:>5.0} s  {} of {}: {fault}", started.elapsed().as_secs_f64(), n + 1, faults.len()));
        run.play(fault, &mut report)?;
    }
    run.end(&mut report);
    let table = report.table();
    say(&table);
    report.write(args.seed, &args.summary)?;
    std::fs::write(args.summary.with_file_name("table.md"), table)?;
    report.verdict()
}

fn faults(args: &Args, seed: &mut Seed) -> anyhow::Result<Vec<Fault>> {
    if args.fault.is_empty() {
        return Ok(plan(seed, args.runs));
    }
    let named = |name: &String| by_name(name).ok_or_else(|| anyhow::anyhow!("there is no fault {name:?}"));
    args.fault.iter().map(named).collect()
}

/// Worlds one after another: a new one where the last one has ended.
struct Run {
    images: Images,
    seed: Seed,
    hold: Duration,
    scene: Option<Scene>,
    worlds: u32,
}

impl Run {
    fn play(&mut self, fault: &Fault, report: &mut Report) -> anyhow::Result<()> {
        let mut scene = match self.scene.take() {
            Some(scene) => scene,
            None => {
                self.worlds += 1;
                say(&format!(
                    "world {} is built: six hosts, three nodes, etcd, a guest that boots",
                    self.worlds
                ));
                Scene::begin(&self.images, Seed::new(self.seed.next_u64()), self.hold)?
            }
        };
        let is_last = fault.expected() == Expected::Nobody;
        let seen = if is_last {
            scene.play_last(fault)
        } else {
            scene.play(fault).inspect(|_| self.scene = Some(scene))
        };
        match seen {
            Ok(seen) => {
                let good = if seen.is_expected { "as expected" } else { "NOT as expected" };
                let gap = seen.gap.map_or(0, |gap| gap.as_millis());
                say(&format!(
                    "         {}, {good}; no answer for {gap} ms, unprotected for {} ms",
                    seen.outcome,
                    seen.unprotected.as_millis()
                ));
                seen.violations.iter().for_each(|broken| say(&format!("         BROKEN: {broken}")));
                report.add(seen);
            }
            Err(e) => {
                say(&format!("         BROKEN: {e:#}"));
                report.fail(&fault.to_string(), &e);
            }
        }
        Ok(())
    }

    fn end(&mut self, report: &mut Report) {
        if let Some(Err(e)) = self.scene.take().map(Scene::end) {
            say(&format!("         BROKEN at the end: {e:#}"));
            report.fail("the end of a world", &e);
        }
    }
}

/// A line on standard output; a reader that has gone away is no reason to end.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}
