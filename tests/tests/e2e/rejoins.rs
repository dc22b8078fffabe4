//! Copies that come back: what they are sent, and that they are whole.

use anyhow::{Context, ensure};
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::seed::Seed;
use std::time::Duration;

use super::{check_goes_on, kill_runner, pair, pause, synthetic};

/// Copies that the runner began: in full, by digests, and of what was missed.
fn copies(cluster: &Cluster) -> anyhow::Result<(u64, u64, u64)> {
    let status = cluster.status("a").context("the primary does not answer")?;
    let counters = status.counters.context("no counters")?;
    Ok((counters.full_resyncs, counters.resyncs, counters.rejoins))
}

/// Waits for protection, and outlives the runner by the copy that came back.
fn protected_again(cluster: &mut Cluster, seed: &mut Seed, wanted: (u64, u64, u64)) -> anyhow::Result<()> {
    cluster.until_paired("a")?;
    let found = copies(cluster)?;
    ensure!(found == wanted, "(in full, by digests, of what was missed) is {found:?} and not {wanted:?}");
    check_goes_on(cluster)?;
    pause(seed, Duration::from_millis(200));
    kill_runner(cluster, "a", "b")?;
    Ok(())
}

#[test]
fn after_a_pause_of_replication() {
    let mut seed = Seed::from_env(3501);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        for _ in 0..2 {
            cluster.admin("a")?.pause_replication()?;
            cluster.until_solo("a")?;
            check_goes_on(cluster)?;
            cluster.admin("a")?.resume_replication()?;
            cluster.until_paired("a")?;
        }
        protected_again(cluster, &mut seed, (1, 0, 2))
    })
    .unwrap();
}

#[test]
fn after_it_stood_still() {
    let mut seed = Seed::from_env(3502);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        cluster.signal("b", libc::SIGSTOP)?;
        cluster.until_solo("a")?;
        check_goes_on(cluster)?;
        cluster.signal("b", libc::SIGCONT)?;
        protected_again(cluster, &mut seed, (1, 0, 1))
    })
    .unwrap();
}

/// Under `disk` the store has all that was acked; under `memory` it may have less, and everything is compared.
#[test]
fn after_a_restart() {
    let mut seed = Seed::from_env(3503);
    for (policy, wanted) in [("disk", (1, 0, 1)), ("memory", (1, 1, 0))] {
        let mut options = synthetic(&mut seed);
        options.ack = policy;
        scenario(options, |cluster| {
            pair(cluster)?;
            cluster.kill("b")?;
            cluster.until_solo("a")?;
            check_goes_on(cluster)?;
            cluster.start_secondary("b")?;
            let begun = cluster.until_paired("a").and_then(|_| copies(cluster))?;
            // What a killed process had stored may well be all that it had acked.
            let lucky = (policy == "memory" && begun == (1, 0, 1)).then_some(begun);
            protected_again(cluster, &mut seed, lucky.unwrap_or(wanted))
        })
        .unwrap();
    }
}
