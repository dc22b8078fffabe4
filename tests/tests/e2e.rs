//! Real nodes on loopback that are killed, frozen and cut off at seeded instants. After each: exactly one node goes on,
//! and what was let out, by whichever node, is one console without a gap, equal where two nodes said it, with an
//! unbroken hash chain.
//!
//! Most scenarios run the synthetic guest, whose nodes are up in half a second; `linux` runs the real one.

#[path = "e2e/both.rs"]
mod both;
#[path = "e2e/chaos.rs"]
mod chaos;
#[path = "e2e/control.rs"]
mod control;
#[path = "e2e/detector.rs"]
mod detector;
#[path = "e2e/disks.rs"]
mod disks;
#[path = "e2e/etcd.rs"]
mod etcd;
#[path = "e2e/faults.rs"]
mod faults;
#[path = "e2e/flood.rs"]
mod flood;
#[path = "e2e/heals.rs"]
mod heals;
#[path = "e2e/history.rs"]
mod history;
#[path = "e2e/kills.rs"]
mod kills;
#[path = "e2e/linux.rs"]
mod linux;
#[path = "e2e/network.rs"]
mod network;
#[path = "e2e/operator.rs"]
mod operator;
#[path = "e2e/orders.rs"]
mod orders;
#[path = "e2e/rejoins.rs"]
mod rejoins;
#[path = "e2e/returns.rs"]
mod returns;
#[path = "e2e/service.rs"]
mod service;
#[path = "e2e/starts.rs"]
mod starts;
#[path = "e2e/switchover.rs"]
mod switchover;
#[path = "e2e/telling.rs"]
mod telling;
#[path = "e2e/verifying.rs"]
mod verifying;

use anyhow::{Context, bail, ensure};
use colo_common::register::{StopReason, Value};
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::cluster::{Cluster, is_solo_of, runs};
use colo_tests::seed::Seed;
use std::time::{Duration, Instant};

/// Bytes of console that show that a guest goes on.
const SOME: u64 = 2000;
/// Longer than any node of these scenarios waits before it acts by itself.
const LONG: Duration = Duration::from_millis(1500);
/// The status of a node whose vm is another's now.
const SUPERSEDED: i32 = colo_primary::primary::SUPERSEDED as i32;

fn synthetic(seed: &mut Seed) -> Options {
    Options::new(Guest::synthetic(seed.below(1_000_000)))
}

/// A protected pair: the guest runs on `a`, and `b` follows.
fn pair(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.start_secondary("b")?;
    cluster.start_primary("a", Some("b"))?;
    cluster.until_paired("a")?;
    cluster.until_released(SOME)
}

/// All that was ever said is one history.
fn check(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.ledger().check_chain(cluster.options.guest.seed)?;
    Ok(())
}

/// The guest goes on, and all that was ever said is one history.
fn check_goes_on(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.until_released(SOME)?;
    check(cluster)
}

/// Kills the node that runs the guest. Whether `follower` must take it over, the register says; it does, or nobody runs
/// the guest any more. All that the dead node had let out stays true.
fn kill_runner(cluster: &mut Cluster, runner: &str, follower: &str) -> anyhow::Result<bool> {
    cluster.kill(runner)?;
    let entry = cluster.register()?.context("no register")?;
    if is_solo_of(&entry, runner) {
        stays(cluster, follower)?;
        check(cluster)?;
        return Ok(false);
    }
    cluster.until_solo(follower)?;
    check_goes_on(cluster)?;
    Ok(true)
}

/// The register does not change any more, and this node does not run the guest.
fn stays(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let before = cluster.register()?;
    let started = Instant::now();
    while started.elapsed() < LONG {
        let role = cluster.status(node).with_context(|| format!("{node} does not answer"))?.role();
        ensure!(!runs(role), "{node} runs a guest that is not its own");
        std::thread::sleep(Duration::from_millis(20));
    }
    let after = cluster.register()?;
    ensure!(before == after, "the register was {before:?} and is {after:?}");
    Ok(())
}

/// The register says that the vm is stopped, and nothing else.
fn check_stopped(cluster: &Cluster, wanted: StopReason) -> anyhow::Result<()> {
    match cluster.register()?.context("no register")?.value {
        Value::Stopped { reason, .. } if reason == wanted => Ok(()),
        other => bail!("the register says {other}, not stopped by {wanted:?}"),
    }
}

fn pause(seed: &mut Seed, most: Duration) {
    let most = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
    std::thread::sleep(Duration::from_micros(seed.below(most.max(1))));
}
