//! The real guest: Linux on KVM, whose every step checks its memory.

use anyhow::{Context, anyhow, ensure};
use colo_common::register::StopReason;
use colo_tests::chain::Checker;
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::images::{Images, Kernel, kvm_usable};
use colo_tests::seed::Seed;
use std::time::Duration;

use super::{check, check_goes_on, check_stopped, kill_runner, pause};

/// Kills of a run, of whichever node, beside those of the other tests.
const KILLS: u32 = 12;
/// What the guest says first of its workload.
const FIRST_LINE: &str = "colo 00000001 ";
/// And last.
const DONE: &str = "colo-done";

fn linux(seed: &mut Seed, kernel: Kernel, workload: &str) -> Options {
    let images = Images::find().unwrap();
    let line = format!("pages=128 touch=16 pattern=rand delay_us=5000 sleep=1 {workload}");
    Options::new(Guest::linux(&images, kernel, seed.below(1_000_000), &line).unwrap())
}

/// A guest that works, on `a`, and `b` is there.
fn boot(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.start_secondary("b")?;
    cluster.start_primary("a", None)?;
    cluster.until_said(FIRST_LINE)
}

/// One guest that is killed under again and again; in between, the node that follows it is killed too.
#[test]
fn a_guest_that_outlives_many_hosts() {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(3401);
    scenario(linux(&mut seed, Kernel::Up, "lines=0"), |cluster| {
        boot(cluster)?;
        cluster.protect("a", "b")?;
        let (mut runner, mut follower) = ("a", "b");
        for _ in 0..KILLS {
            check_goes_on(cluster)?;
            pause(&mut seed, Duration::from_millis(400));
            if seed.below(3) == 0 {
                cluster.kill(follower)?;
                cluster.until_solo(runner)?;
                check_goes_on(cluster)?;
                cluster.start_secondary(follower)?;
            } else {
                ensure!(kill_runner(cluster, runner, follower)?, "a protected guest died with its host");
                cluster.start_secondary(runner)?;
                (runner, follower) = (follower, runner);
            }
            cluster.protect(runner, follower)?;
        }
        check_goes_on(cluster)?;
        // While seeding, nobody holds what it would take: the guest ends with its host, and nothing is made up.
        cluster.admin(runner)?.pause_replication()?;
        cluster.until_solo(runner)?;
        cluster.admin(runner)?.resume_replication()?;
        pause(&mut seed, Duration::from_millis(200));
        kill_runner(cluster, runner, follower)?;
        Ok(())
    })
    .unwrap();
}

/// Both hosts die under `disk`, and the guest runs on from RocksDB.
#[test]
fn a_guest_that_outlives_both_hosts() {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(3402);
    let mut options = linux(&mut seed, Kernel::Up, "lines=0");
    options.ack = "disk";
    scenario(options, |cluster| {
        boot(cluster)?;
        cluster.protect("a", "b")?;
        check_goes_on(cluster)?;
        pause(&mut seed, Duration::from_millis(500));
        cluster.kill("a")?;
        pause(&mut seed, Duration::from_millis(50));
        cluster.kill("b")?;
        cluster.start_secondary("b")?;
        cluster.until_solo("b")?;
        check_goes_on(cluster)
    })
    .unwrap();
}

/// The guest powers itself off, by ACPI: its last words are out, the vm is stopped, and both nodes end.
#[test]
fn a_guest_that_powers_off() {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(3403);
    scenario(linux(&mut seed, Kernel::Acpi, "lines=200 end=poweroff"), |cluster| {
        boot(cluster)?;
        cluster.protect("a", "b")?;
        for node in ["a", "b"] {
            let status = cluster.ended(node)?;
            ensure!(status.success(), "{node} ended with {status}");
        }
        check_stopped(cluster, StopReason::PowerOff)?;
        let counts = cluster.ledger().check_chain(cluster.options.guest.seed)?;
        ensure!(counts.lines == 200, "only {} lines are out", counts.lines);
        Ok(())
    })
    .unwrap();
}

/// The guest resets itself under protection, and the host dies while it boots again.
#[test]
fn a_guest_that_resets_itself() {
    if !kvm_usable() {
        return;
    }
    let mut seed = Seed::from_env(3404);
    scenario(linux(&mut seed, Kernel::Up, "lines=200 end=reset"), |cluster| {
        boot(cluster)?;
        cluster.protect("a", "b")?;
        cluster.until_said(DONE)?;
        check(cluster)?;
        let first = cluster.ledger().whole();
        pause(&mut seed, Duration::from_secs(4));
        kill_runner_in_boot(cluster)?;
        cluster.until("the guest to work again", || {
            let ledger = cluster.ledger();
            let again = second_life(&ledger.bytes()[usize::try_from(first)?..], FIRST_LINE);
            Ok(again.map(drop))
        })?;
        std::thread::sleep(Duration::from_millis(500));
        let ledger = cluster.ledger().clone();
        ledger.check_history()?;
        let again = second_life(&ledger.bytes()[usize::try_from(first)?..], FIRST_LINE);
        let mut checker = Checker::from_start(cluster.options.guest.seed);
        checker.feed(again.context("the guest does not work again")?);
        checker.verdict().map_err(|fault| anyhow!("the second life's chain is broken: {fault}"))
    })
    .unwrap();
}

/// The guest says little while it boots, so only the register is waited for.
fn kill_runner_in_boot(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.kill("a")?;
    cluster.until_solo("b")
}

/// From the first of these words on.
fn second_life<'a>(console: &'a [u8], word: &str) -> Option<&'a [u8]> {
    colo_tests::session::find(console, word.as_bytes()).map(|at| &console[at..])
}
