//! Both nodes die.

use anyhow::ensure;
use colo_common::register::Value;
use colo_tests::cluster::scenario;
use colo_tests::seed::Seed;
use std::time::Duration;

use super::{SUPERSEDED, check, check_goes_on, pair, pause, stays, synthetic};

/// Under `disk` the secondary alone is enough: it runs on from its store, and nothing that was ever let out is lost.
#[test]
fn cold_start_from_the_store() {
    let mut seed = Seed::from_env(3101);
    for _ in 0..4 {
        let mut options = synthetic(&mut seed);
        options.ack = "disk";
        // Longer than it takes to kill the second one, on a loaded machine too.
        options.promote_delay_ms = 2000;
        scenario(options, |cluster| {
            pair(cluster)?;
            pause(&mut seed, Duration::from_millis(300));
            let (first, second) = if seed.below(2) == 0 { ("a", "b") } else { ("b", "a") };
            cluster.kill(first)?;
            pause(&mut seed, Duration::from_millis(100));
            cluster.kill(second)?;
            let entry = cluster.register()?;
            let paired = entry.as_ref().is_some_and(|entry| matches!(entry.value, Value::Paired { .. }));
            ensure!(paired, "a node acted sooner than it was told to: {entry:?}");
            cluster.start_secondary("b")?;
            cluster.until_solo("b")?;
            check_goes_on(cluster)
        })
        .unwrap();
    }
}

/// Under `memory` nobody can know what was let out: nobody runs.
#[test]
fn nobody_runs_what_nobody_holds() {
    let mut seed = Seed::from_env(3102);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        cluster.kill("b")?;
        cluster.kill("a")?;
        cluster.start_secondary("b")?;
        cluster.until("b to answer", || Ok(cluster.status("b").map(drop)))?;
        // Longer than its grace for a runner that comes back.
        for _ in 0..3 {
            stays(cluster, "b")?;
        }
        cluster.start_primary("a", Some("b"))?;
        let status = cluster.ended("a")?;
        ensure!(
            !status.success() && status.code() != Some(SUPERSEDED),
            "a protected vm was booted: {status}"
        );
        let log = cluster.process("a")?.log();
        ensure!(log.contains("start colo-secondary here"), "no remedy:\n{log}");
        check(cluster)
    })
    .unwrap();
}
