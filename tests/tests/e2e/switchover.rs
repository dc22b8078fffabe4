//! Planned moves: both nodes live, nothing is lost, the roles are exchanged, and the vm is protected again at once.

use anyhow::{Context, ensure};
use colo_proto::v1::Role;
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::seed::Seed;
use std::time::Duration;

use super::{check_goes_on, kill_runner, pair, pause, synthetic};

/// Copies that the node took part in: in full, by digests, of what was changed.
fn copies(cluster: &Cluster, node: &str) -> anyhow::Result<(u64, u64, u64)> {
    let counters = cluster.status(node).and_then(|status| status.counters).context("no counters")?;
    Ok((counters.full_resyncs, counters.resyncs, counters.rejoins))
}

/// Moves the guest from `from` to `to`, and waits until `from` protects it there.
#[expect(clippy::print_stderr, reason = "how it went")]
fn switch(cluster: &mut Cluster, from: &str, to: &str) -> anyhow::Result<()> {
    let before = copies(cluster, to)?;
    let reply = cluster.switch_over(from).context("the switchover")?;
    ensure!(reply.register.is_some(), "{reply:?}");
    cluster.until_paired(to)?;
    let gap = cluster.status(to).and_then(|status| status.promotion).context("no promotion")?;
    let (register, total) = (reply.elapsed_ms, gap.total_us);
    eprintln!("{from} -> {to}: the register after {register} ms, promoted in {total} us");
    ensure!(
        cluster.status(from).map(|status| status.role()) == Some(Role::Following),
        "{from} does not follow"
    );
    let (full, by_digests, rejoins) = copies(cluster, to)?;
    let wanted = (before.0, before.1, before.2 + 1);
    ensure!(
        (full, by_digests, rejoins) == wanted,
        "copies in full, by digests, of what was changed: {wanted:?} wanted"
    );
    check_goes_on(cluster)
}

#[test]
fn there_and_back_and_the_last_one_dies() {
    let mut seed = Seed::from_env(5101);
    let mut options = synthetic(&mut seed);
    options.standby = true;
    scenario(options, |cluster| {
        pair(cluster)?;
        for _ in 0..3 {
            pause(&mut seed, Duration::from_millis(300));
            switch(cluster, "a", "b")?;
            pause(&mut seed, Duration::from_millis(300));
            switch(cluster, "b", "a")?;
        }
        kill_runner(cluster, "a", "b").map(drop)
    })
    .unwrap();
}
