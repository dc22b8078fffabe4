//! The guest's disk over failovers: a guest that checks every block that it reads, whose lines on the console are known
//! beforehand, and when it has ended, one disk on both nodes.

use anyhow::{Context, ensure};
use colo_common::register::StopReason;
use colo_tests::cluster::Cluster;
use colo_tests::cluster::config::Options;
use colo_tests::disk_plan::{Content, Plan};
use colo_tests::seed::Seed;
use std::time::Duration;

use super::service::{END, boot, has_ended, images, in_lab};
use super::{check_stopped, pause};

/// Blocks that the guest works on: 4 MiB, so that most are written several times.
const BLOCKS: usize = 1024;
/// Steps between two faults at least.
const SOME: usize = 5;
/// A fault comes so much later at most.
const INSTANT: Duration = Duration::from_millis(1500);
/// What every line of the guest's begins with.
const LINE: &str = "colo-disk ";
/// What a step that went wrong says.
const ERROR: &str = "colo-error";

/// What the guest works on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Files of its ext4.
    Files,
    /// The disk itself.
    Raw,
}

/// An exercise of so many steps.
pub(super) struct Exercise {
    pub(super) mode: Mode,
    pub(super) seed: u64,
    pub(super) steps: usize,
}

impl Exercise {
    pub(super) fn arguments(&self) -> String {
        let mode = if self.mode == Mode::Files { "blk" } else { "raw" };
        format!("mode={mode} steps={} blocks={BLOCKS} seed={} {END}", self.steps, self.seed)
    }

    /// The lines that it must say.
    fn lines(&self) -> Vec<String> {
        // A hole in a file reads as zero; what a discarded block of a disk reads as is open.
        let content = if self.mode == Mode::Files { Content::Zero } else { Content::Open };
        let mut plan = Plan::new(self.seed, BLOCKS, content, Some(content));
        let mut lines: Vec<String> = Vec::new();
        for _ in 0..self.steps {
            let step = plan.next_step();
            lines.push(plan.done(&step));
        }
        lines.push(plan.last_line());
        lines
    }
}

/// Lines of the exercise that are out.
fn said(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let ledger = cluster.ledger();
    let text = String::from_utf8_lossy(ledger.bytes());
    // The last one may not be whole yet.
    let (whole, _) = text.rsplit_once('\n').unwrap_or_default();
    ensure!(!whole.contains(ERROR), "the guest found something wrong: {text}");
    Ok(whole.lines().map(str::trim_end).filter(|line| line.starts_with(LINE)).map(str::to_owned).collect())
}

pub(super) fn until_steps(cluster: &Cluster, more: usize) -> anyhow::Result<()> {
    let wanted = said(cluster)?.len() + more;
    cluster.until(&format!("{more} more steps"), || Ok((said(cluster)?.len() >= wanted).then_some(())))
}

/// Some more steps, to an instant at which the guest is still at work.
pub(super) fn at_work(cluster: &Cluster, exercise: &Exercise, seed: &mut Seed) -> anyhow::Result<()> {
    until_steps(cluster, SOME)?;
    pause(seed, INSTANT);
    let steps = said(cluster)?.len();
    ensure!(steps < exercise.steps, "the exercise is over before the faults are: give it more steps");
    tell(steps, exercise.steps);
    Ok(())
}

#[expect(clippy::print_stderr, reason = "how far the exercise was")]
fn tell(steps: usize, all: usize) {
    eprintln!("a fault after {steps} of {all} steps");
}

/// Kills the runner; the other takes over.
fn fail_over(cluster: &mut Cluster, from: &str, to: &str) -> anyhow::Result<()> {
    cluster.kill(from)?;
    cluster.until_solo(to)?;
    until_steps(cluster, SOME)
}

/// A node that ran the guest comes back with the image file that it had, and follows.
pub(super) fn come_back(cluster: &mut Cluster, runner: &str, node: &str) -> anyhow::Result<()> {
    cluster.start_secondary(node)?;
    cluster.protect(runner, node)
}

/// Every line is out, each once, in order.
pub(super) fn check_lines(cluster: &Cluster, exercise: &Exercise) -> anyhow::Result<()> {
    cluster.ledger().check_history()?;
    let (said, wanted) = (said(cluster)?, exercise.lines());
    let differs = (0..said.len().max(wanted.len())).find(|&at| said.get(at) != wanted.get(at));
    let Some(at) = differs else { return Ok(()) };
    anyhow::bail!("line {at} is {:?} and not {:?}", said.get(at), wanted.get(at))
}

pub(super) fn until_done(cluster: &Cluster, exercise: &Exercise) -> anyhow::Result<()> {
    // Every step may take long on a busy host; that none comes for a minute it may not.
    while said(cluster)?.len() <= exercise.steps {
        until_steps(cluster, 1)?;
    }
    Ok(())
}

/// To the other node and back again to the first, whose image file was left behind; then both die, and the store of the
/// one that followed has it all.
#[test]
fn files_outlive_their_hosts() {
    let Some(images) = images() else { return };
    let mut seed = Seed::from_env(4101);
    let exercise = Exercise { mode: Mode::Files, seed: seed.below(1_000_000), steps: 200 };
    let options = Options { ack: "disk", ..Options::service(&images, &exercise.arguments()).unwrap() };
    in_lab(&["a", "b"], options, |_, cluster| {
        boot(cluster, "a", "colo-disk 00000001 ok")?;
        come_back(cluster, "a", "b")?;
        at_work(cluster, &exercise, &mut seed)?;
        fail_over(cluster, "a", "b").context("the first failover")?;
        cluster.check_files("a")?;
        come_back(cluster, "b", "a")?;
        at_work(cluster, &exercise, &mut seed)?;
        fail_over(cluster, "b", "a").context("the failover back")?;
        cluster.check_files("b")?;
        come_back(cluster, "a", "b")?;
        at_work(cluster, &exercise, &mut seed)?;
        ["a", "b"].into_iter().try_for_each(|node| cluster.kill(node).map(drop))?;
        ["a", "b"].into_iter().try_for_each(|node| cluster.check_files(node))?;
        cluster.start_secondary("b")?;
        cluster.until_solo("b")?;
        come_back(cluster, "b", "a")?;
        until_done(cluster, &exercise)?;
        has_ended(cluster, "b", "a")?;
        ["a", "b"].into_iter().try_for_each(|node| cluster.check_files(node))?;
        check_lines(cluster, &exercise)
    });
}

/// Reads, writes, discards and zeroes past every cache of the guest's.
#[test]
fn a_raw_disk_outlives_its_hosts() {
    let Some(images) = images() else { return };
    let mut seed = Seed::from_env(4102);
    let exercise = Exercise { mode: Mode::Raw, seed: seed.below(1_000_000), steps: 600 };
    let options = Options::service(&images, &exercise.arguments()).unwrap();
    in_lab(&["a", "b"], options, |_, cluster| {
        boot(cluster, "a", "colo-disk 00000001 ok")?;
        come_back(cluster, "a", "b")?;
        at_work(cluster, &exercise, &mut seed)?;
        fail_over(cluster, "a", "b").context("the first failover")?;
        come_back(cluster, "b", "a")?;
        at_work(cluster, &exercise, &mut seed)?;
        fail_over(cluster, "b", "a").context("the failover back")?;
        come_back(cluster, "a", "b")?;
        until_done(cluster, &exercise)?;
        has_ended(cluster, "a", "b")?;
        check_lines(cluster, &exercise)
    });
}

/// Stopped by the operator in the middle of its work, which is a loss of power to the guest: the disk of either node is
/// whole, and every line that is out is right.
#[test]
fn files_outlive_a_stop_at_work() {
    let Some(images) = images() else { return };
    let mut seed = Seed::from_env(4103);
    let exercise = Exercise { mode: Mode::Files, seed: seed.below(1_000_000), steps: 200 };
    let options = Options::service(&images, &exercise.arguments()).unwrap();
    in_lab(&["a", "b"], options, |_, cluster| {
        boot(cluster, "a", "colo-disk 00000001 ok")?;
        come_back(cluster, "a", "b")?;
        at_work(cluster, &exercise, &mut seed)?;
        cluster.admin("a")?.stop()?;
        for node in ["a", "b"] {
            let status = cluster.ended(node)?;
            ensure!(status.success(), "{node} ended with {status}");
        }
        check_stopped(cluster, StopReason::Operator)?;
        ["a", "b"].into_iter().try_for_each(|node| cluster.check_files(node))?;
        let said = said(cluster)?;
        ensure!(exercise.lines().starts_with(&said), "not what it must say: {said:?}");
        Ok(())
    });
}
