//! The network between the nodes fails, or a node stands still for a while: both live, and one goes on.

use anyhow::{Context, ensure};
use colo_common::register::Value;
use colo_proto::v1::Role;
use colo_tests::cluster::link::Link;
use colo_tests::cluster::{Cluster, is_solo_of, runs, scenario};
use colo_tests::seed::Seed;
use std::time::Duration;

use super::{LONG, SUPERSEDED, check, check_goes_on, pair, pause, synthetic};

/// The node that has the register alone, once one has.
fn winner(cluster: &Cluster) -> anyhow::Result<&'static str> {
    cluster.until("one node to have the register alone", || {
        let Some(entry) = cluster.register()? else { return Ok(None) };
        Ok(["a", "b"].into_iter().find(|node| is_solo_of(&entry, node)))
    })
}

fn cut_by(how: impl Fn(&Link), mut seed: Seed, rounds: u32) -> anyhow::Result<(u32, u32)> {
    let (mut by_primary, mut by_secondary) = (0, 0);
    for _ in 0..rounds {
        let mut options = synthetic(&mut seed);
        options.links = true;
        // Either may be the first to ask.
        options.promote_delay_ms = seed.below(200) as u32;
        scenario(options, |cluster| {
            pair(cluster)?;
            pause(&mut seed, Duration::from_millis(200));
            how(cluster.link("b")?);
            let winner = winner(cluster)?;
            cluster.until_solo(winner)?;
            check_goes_on(cluster)?;
            let loser = if winner == "a" { "b" } else { "a" };
            cluster.until(&format!("{loser} to give in"), || {
                Ok((!cluster.status(loser).is_some_and(|status| runs(status.role()))).then_some(()))
            })?;
            std::thread::sleep(LONG / 3);
            cluster.link("b")?.heal();
            if winner == "a" {
                by_primary += 1;
                cluster.until_paired("a")?;
            } else {
                by_secondary += 1;
                // It learns that the other runs the guest, and its own copy of it is of no more use.
                let status = cluster.ended("a")?;
                ensure!(status.code() == Some(SUPERSEDED), "the old runner ended with {status}");
            }
            check_goes_on(cluster)
        })?;
    }
    Ok((by_primary, by_secondary))
}

#[expect(clippy::print_stderr, reason = "how the cuts went")]
fn tell(what: &str, (by_primary, by_secondary): (u32, u32)) {
    eprintln!("{what}: the primary went on {by_primary} times, the secondary {by_secondary} times");
}

#[test]
fn the_link_is_cut() {
    tell("cut", cut_by(Link::cut, Seed::from_env(3201), 4).unwrap());
}

#[test]
fn only_epochs_get_through() {
    tell("half cut", cut_by(Link::cut_acks, Seed::from_env(3202), 3).unwrap());
}

#[test]
fn only_acks_get_through() {
    tell("half cut", cut_by(Link::cut_epochs, Seed::from_env(3203), 3).unwrap());
}

/// Nobody may act by himself: the output is held until the link is back, and then the same copy goes on.
#[test]
fn a_cut_that_is_waited_for() {
    let mut seed = Seed::from_env(3204);
    for _ in 0..2 {
        let mut options = synthetic(&mut seed);
        (options.links, options.failover, options.on_secondary_loss) = (true, "manual", "hold");
        scenario(options, |cluster| {
            pair(cluster)?;
            pause(&mut seed, Duration::from_millis(200));
            let paired = cluster.register()?;
            cluster.link("b")?.cut();
            std::thread::sleep(Duration::from_millis(700));
            let held = cluster.ledger().whole();
            std::thread::sleep(LONG);
            let whole = cluster.ledger().whole();
            ensure!(whole == held, "{} bytes got out while nobody held them", whole - held);
            cluster.link("b")?.heal();
            check_goes_on(cluster)?;
            ensure!(cluster.register()? == paired, "the register was changed");
            cluster.kill("a")?;
            cluster.admin("b")?.promote()?;
            check_goes_on(cluster)
        })
        .unwrap();
    }
}

/// A node that stands still is taken for dead. When it goes on, it has lost, and lets nothing out.
#[test]
fn a_primary_that_stands_still() {
    let mut seed = Seed::from_env(3205);
    for _ in 0..4 {
        scenario(synthetic(&mut seed), |cluster| {
            pair(cluster)?;
            pause(&mut seed, Duration::from_millis(200));
            cluster.signal("a", libc::SIGSTOP)?;
            cluster.until_solo("b")?;
            check_goes_on(cluster)?;
            cluster.signal("a", libc::SIGCONT)?;
            let status = cluster.ended("a")?;
            ensure!(status.code() == Some(SUPERSEDED), "the old runner ended with {status}");
            check_goes_on(cluster)
        })
        .unwrap();
    }
}

/// One that stands still for less time than it takes to be suspected, or is suspected and comes back in time, or too
/// late: whatever happens, there is one history.
#[test]
fn a_primary_that_stands_still_for_a_moment() {
    let mut seed = Seed::from_env(3206);
    for _ in 0..4 {
        scenario(synthetic(&mut seed), |cluster| {
            pair(cluster)?;
            let suspicion = u64::from(cluster.options.suspect_after_ms + cluster.options.promote_delay_ms);
            cluster.signal("a", libc::SIGSTOP)?;
            pause(&mut seed, Duration::from_millis(suspicion * 2));
            cluster.signal("a", libc::SIGCONT)?;
            std::thread::sleep(LONG);
            check_goes_on(cluster)?;
            let entry = cluster.register()?.context("no register")?;
            let runner = match &entry.value {
                Value::Paired { primary, .. } => primary.to_string(),
                Value::Solo { node, .. } => node.to_string(),
                Value::Stopped { .. } => anyhow::bail!("the vm is stopped"),
            };
            let role = cluster.status(&runner).context("the runner does not answer")?.role();
            ensure!(runs(role), "{runner} is {role:?}; the register says {entry}");
            check(cluster)
        })
        .unwrap();
    }
}

/// The secondary stands still: the runner goes on alone; when the other goes on, it is seeded anew.
#[test]
fn a_secondary_that_stands_still() {
    let mut seed = Seed::from_env(3207);
    for _ in 0..2 {
        scenario(synthetic(&mut seed), |cluster| {
            pair(cluster)?;
            pause(&mut seed, Duration::from_millis(200));
            cluster.signal("b", libc::SIGSTOP)?;
            cluster.until_solo("a")?;
            check_goes_on(cluster)?;
            cluster.signal("b", libc::SIGCONT)?;
            cluster.until_paired("a")?;
            cluster.until_role("b", Role::Following)?;
            check_goes_on(cluster)?;
            cluster.kill("a")?;
            cluster.until_solo("b")?;
            check_goes_on(cluster)
        })
        .unwrap();
    }
}
