//! Slow is not dead: real nodes on a host whose cores and disk are busy, and on a path that loses and delays, suspect
//! nobody; and a node that is dead is seen in well under a second. With the heartbeats of the default configuration.
//!
//! `COLO_LOADED` is the number of seconds of each load.

use anyhow::{Context, ensure};
use colo_tests::cluster::config::Options;
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::load::{Busy, BusyDisk};
use colo_tests::seed::Seed;
use std::time::{Duration, Instant};

use super::{SOME, check, check_goes_on, pair, synthetic};

/// Seconds of load, if nothing else is said.
const LOADED: u64 = 20;
/// Deaths of each kind that are measured.
const DEATHS: usize = 4;
/// How often a node is asked while a death is measured.
const POLL: Duration = Duration::from_millis(5);
/// Longer than a death may go unseen on any path: on a host that others keep busy the wait is longer too, and asking
/// takes its time. What it is on a calm host is printed.
const SEEN: Duration = Duration::from_millis(4 * 500 + 1500);

fn loaded() -> Duration {
    let seconds = std::env::var("COLO_LOADED").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(LOADED))
}

/// As a configuration has it that says nothing.
fn defaults(seed: &mut Seed) -> Options {
    let mut options = synthetic(seed);
    (options.heartbeat_ms, options.suspect_after_ms, options.promote_delay_ms) = (50, 500, 250);
    options
}

/// Looks on for a while: the pair stays one, its link stands, and the guest says something. Answers the longest silence
/// that either node would have waited for.
fn stays_paired(cluster: &Cluster, time: Duration) -> anyhow::Result<Duration> {
    let (before, started) = (cluster.register()?, Instant::now());
    let mut patience = 0;
    while started.elapsed() < time {
        for node in ["a", "b"] {
            let status = cluster.status(node).with_context(|| format!("{node} does not answer"))?;
            let losses = status.counters.context("no counters")?.link_losses;
            ensure!(losses == 0, "{node} took its peer for dead: {}", status.last_error);
            patience = patience.max(status.link.map_or(0, |link| link.suspect_after_ms));
        }
        let after = cluster.register()?;
        ensure!(before == after, "the register was {before:?} and is {after:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    cluster.until_released(SOME)?;
    check(cluster)?;
    Ok(Duration::from_millis(patience))
}

#[test]
fn a_busy_host_is_no_dead_one() {
    let mut seed = Seed::from_env(3601);
    scenario(defaults(&mut seed), |cluster| {
        pair(cluster)?;
        let disk = cluster.directory().join("busy");
        let (cores, writer) = (Busy::threads(2), BusyDisk::at(&disk)?);
        let patience = stays_paired(cluster, loaded())?;
        drop((cores, writer));
        println!("{:?} of busy cores and disk: nobody suspected; patience up to {patience:?}", loaded());
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_bad_path_is_no_death() {
    let mut seed = Seed::from_env(3602);
    for (loss, jitter) in [(50, Duration::ZERO), (200, Duration::ZERO), (50, Duration::from_millis(100))] {
        let mut options = defaults(&mut seed);
        options.links = true;
        scenario(options, |cluster| {
            pair(cluster)?;
            cluster.link("b")?.weather(loss, jitter);
            let patience = stays_paired(cluster, loaded() / 2)?;
            println!(
                "{loss} of 1000 lost, up to {jitter:?} late: nobody suspected; patience up to {patience:?}"
            );
            Ok(())
        })
        .unwrap();
    }
}

/// How long the follower took the runner for alive after `death`.
fn seen(cluster: &Cluster, death: Instant) -> anyhow::Result<Duration> {
    loop {
        let status = cluster.status("b").context("b does not answer")?;
        if status.link.as_ref().is_none_or(|link| !link.connected) {
            return Ok(death.elapsed());
        }
        ensure!(death.elapsed() < SEEN, "a dead runner is not seen: {status:?}");
        std::thread::sleep(POLL);
    }
}

#[test]
fn a_death_is_seen_soon() {
    let mut seed = Seed::from_env(3603);
    for (what, signal) in [("killed", libc::SIGKILL), ("stopped", libc::SIGSTOP)] {
        let mut times = Vec::new();
        for _ in 0..DEATHS {
            scenario(defaults(&mut seed), |cluster| {
                pair(cluster)?;
                // A path is known after some heartbeats.
                std::thread::sleep(Duration::from_millis(2000 + seed.below(50)));
                let death = Instant::now();
                if signal == libc::SIGKILL {
                    cluster.kill("a")?;
                } else {
                    cluster.signal("a", signal)?;
                }
                times.push(seen(cluster, death)?);
                cluster.until_solo("b")?;
                let mut running = cluster.status("b").context("b does not answer")?;
                let promotion = running.promotion.take().context("no promotion")?;
                println!(
                    "{what}: seen after {:?}, then {} us to the first vCPU",
                    times.last(),
                    promotion.total_us
                );
                check_goes_on(cluster)
            })
            .unwrap();
        }
        times.sort_unstable();
        println!("{what}: seen after {:?} to {:?}", times[0], times[times.len() - 1]);
    }
}
