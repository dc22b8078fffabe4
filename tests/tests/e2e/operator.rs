//! What operators ask for.

use anyhow::ensure;
use colo_common::register::StopReason;
use colo_tests::cluster::scenario;
use colo_tests::seed::Seed;
use std::time::Duration;

use super::{check, check_goes_on, check_stopped, kill_runner, pair, pause, stays, synthetic};

#[test]
fn a_manual_failover() {
    let mut seed = Seed::from_env(3301);
    let mut options = synthetic(&mut seed);
    options.failover = "manual";
    scenario(options, |cluster| {
        pair(cluster)?;
        cluster.kill("a")?;
        stays(cluster, "b")?;
        cluster.admin("b")?.promote()?;
        cluster.until_solo("b")?;
        check_goes_on(cluster)
    })
    .unwrap();
}

#[test]
fn replication_is_paused_and_resumed() {
    let mut seed = Seed::from_env(3302);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        for _ in 0..3 {
            pause(&mut seed, Duration::from_millis(200));
            cluster.admin("a")?.pause_replication()?;
            cluster.until_solo("a")?;
            stays(cluster, "b")?;
            check_goes_on(cluster)?;
            cluster.admin("a")?.resume_replication()?;
            cluster.until_paired("a")?;
            check_goes_on(cluster)?;
        }
        kill_runner(cluster, "a", "b")?;
        Ok(())
    })
    .unwrap();
}

/// Nobody takes over a vm that was stopped, and the node that followed ends with it.
#[test]
fn the_vm_is_stopped() {
    let mut seed = Seed::from_env(3303);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        cluster.admin("a")?.stop()?;
        check_stopped(cluster, StopReason::Operator)?;
        for node in ["a", "b"] {
            let status = cluster.ended(node)?;
            ensure!(status.success(), "{node} ended with {status}");
        }
        check(cluster)
    })
    .unwrap();
}

/// A signal to end is the operator's word, too.
#[test]
fn the_process_is_asked_to_end() {
    let mut seed = Seed::from_env(3304);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        cluster.signal("a", libc::SIGTERM)?;
        let status = cluster.ended("a")?;
        ensure!(status.success(), "it ended with {status}");
        check_stopped(cluster, StopReason::Operator)?;
        check(cluster)
    })
    .unwrap();
}
