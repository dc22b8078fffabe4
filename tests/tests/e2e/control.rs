//! What the control planes of real nodes say, field by field and call by call.

use anyhow::{Context, ensure};
use colo_proto::v1::{AckPolicy, Role, StatusReply};
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::seed::Seed;

use super::{check, check_goes_on, pair, stays, synthetic};

fn status(cluster: &Cluster, node: &str) -> anyhow::Result<StatusReply> {
    cluster.status(node).with_context(|| format!("{node} does not answer"))
}

/// Waits until a node's account is so.
fn until(
    cluster: &Cluster,
    node: &str,
    what: &str,
    so: impl Fn(&StatusReply) -> bool,
) -> anyhow::Result<StatusReply> {
    cluster.until(&format!("{node}: {what}"), || Ok(cluster.status(node).filter(&so)))
}

/// Waits until a node is healthy and protected, or neither.
fn until_health(cluster: &Cluster, node: &str, good: bool) -> anyhow::Result<Vec<String>> {
    cluster.until(&format!("{node} to be healthy: {good}"), || {
        let health = cluster.admin(node)?.health()?;
        Ok((health.healthy == good && health.protected == good).then_some(health.problems))
    })
}

#[test]
fn both_nodes_of_a_pair_tell_everything() {
    let mut seed = Seed::from_env(3401);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        let known = |status: &StatusReply| {
            let points = status.points.unwrap_or_default();
            let linked = status.link.as_ref().is_some_and(|link| link.rtt_us > 0);
            points.applied.is_some() && points.persisted.is_some() && linked
        };
        let a = until(cluster, "a", "to know what the secondary has", known)?;
        let same = a.register.clone();
        let b = until(cluster, "b", "to know the register", |b| known(b) && b.register == same)?;
        for (status, peer, running) in [(&a, "b", true), (&b, "a", false)] {
            let link = status.link.as_ref().context("no link")?;
            ensure!(link.connected && link.peer == peer && link.address.contains(':'), "{link:?}");
            ensure!(link.silent_ms < 5_000 && link.since_ms > 0, "{link:?}");
            ensure!(status.register_age_ms.is_some_and(|age| age < 5_000), "{:?}", status.register_age_ms);
            ensure!(status.epoch_age_ms.is_some_and(|age| age < 5_000), "{:?}", status.epoch_age_ms);
            let guest = status.guest.as_ref().context("no guest")?;
            ensure!(guest.running == running && guest.populated_bytes > 0, "{guest:?}");
            ensure!(guest.populated_bytes <= guest.memory_bytes, "{guest:?}");
            let counters = status.counters.context("no counters")?;
            ensure!(counters.epochs > 0 && counters.pages > 0 && counters.wire_bytes > 0, "{counters:?}");
            ensure!(
                (counters.full_resyncs, counters.resyncs, counters.link_losses) == (1, 0, 0),
                "{counters:?}"
            );
        }
        let (at_a, at_b) = (a.points.unwrap_or_default(), b.points.unwrap_or_default());
        ensure!(at_a.tip.is_some() && at_a.acked.is_some() && at_a.released.is_some(), "{at_a:?}");
        ensure!(at_b.tip.is_none() && at_b.released.is_none() && at_b.stale.is_none(), "{at_b:?}");
        ensure!(at_b.staged.is_some() && at_b.acked.is_some(), "{at_b:?}");
        ensure!((a.ack_policy(), b.ack_policy()) == (AckPolicy::Unspecified, AckPolicy::Memory));
        ensure!(a.replica == b.replica && !a.replica.is_empty());
        for node in ["a", "b"] {
            until_health(cluster, node, true)?;
        }
        check_goes_on(cluster)
    })
    .unwrap();
}

#[test]
fn both_nodes_report_every_epoch() {
    let mut seed = Seed::from_env(3402);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        for report in cluster.admin("a")?.watch(20)? {
            let pause = report.pause.as_ref().context("no pause")?;
            ensure!(report.role() == Role::Paired && report.wire_bytes > 0 && report.console_offset > 0);
            ensure!(pause.total_us > 0 && report.ack_us.is_some() && report.stage_us.is_none(), "{report:?}");
        }
        let reports = cluster.admin("b")?.watch(20)?;
        for report in &reports {
            ensure!(report.role() == Role::Following && report.wire_bytes > 0 && report.console_offset > 0);
            ensure!(report.stage_us.is_some() && report.apply_us.is_some(), "{report:?}");
            ensure!(report.pause.is_none() && report.ack_us.is_none(), "{report:?}");
        }
        ensure!(reports.iter().any(|report| report.pages > 0), "no epoch had a page");
        let epochs: Vec<u64> = reports.iter().filter_map(|report| Some(report.point?.epoch)).collect();
        ensure!(epochs.windows(2).all(|two| two[0] + 1 == two[1]), "{epochs:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_copy_is_made_in_full_where_that_is_asked_for() {
    let mut seed = Seed::from_env(3403);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        let copies = |cluster: &Cluster, node| {
            let counters = status(cluster, node)?.counters.unwrap_or_default();
            anyhow::Ok((counters.full_resyncs, counters.resyncs, counters.rejoins))
        };
        cluster.admin("a")?.pause_replication()?;
        cluster.protect_in_full("a", "b")?;
        ensure!(
            copies(cluster, "a")? == (2, 0, 0) && copies(cluster, "b")? == (2, 0, 0),
            "{:?}",
            copies(cluster, "b")?
        );
        check_goes_on(cluster)?;
        cluster.admin("a")?.pause_replication()?;
        cluster.admin("a")?.resume_replication()?;
        cluster.until_paired("a")?;
        ensure!(
            copies(cluster, "a")? == (2, 0, 1) && copies(cluster, "b")? == (2, 0, 1),
            "{:?}",
            copies(cluster, "b")?
        );
        // Ended on purpose, at both.
        let losses = status(cluster, "a")?.counters.unwrap_or_default().link_losses;
        ensure!(losses == 0, "{losses} links were lost");
        cluster.kill("a")?;
        cluster.until_solo("b")?;
        let told = status(cluster, "b")?;
        let points = told.points.unwrap_or_default();
        ensure!(points.staged.is_none() && told.ack_policy() == AckPolicy::Unspecified, "{told:?}");
        check_goes_on(cluster)
    })
    .unwrap();
}

#[test]
fn the_policy_in_effect_is_told() {
    let mut seed = Seed::from_env(3404);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        for policy in [AckPolicy::Disk, AckPolicy::Memory] {
            let told = cluster.admin("b")?.set_policy(policy)?;
            ensure!(told.pending || told.policy() == policy, "{told:?}");
            until(cluster, "b", "to change the policy", |b| {
                b.ack_policy() == policy && !b.ack_policy_pending
            })?;
            check_goes_on(cluster)?;
        }
        let refused = cluster.admin("a")?.set_policy(AckPolicy::Disk);
        ensure!(refused.is_err(), "a runner has no policy of acks");
        Ok(())
    })
    .unwrap();
}

/// The arbiter is out of reach when the copy is whole: output is held, both nodes say so, and a pause that is asked for
/// then takes effect after the answer.
#[test]
fn a_pause_while_the_register_is_asked_takes_effect_after_the_answer() {
    let mut seed = Seed::from_env(3405);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        cluster.admin("a")?.pause_replication()?;
        let (here, gone) = (cluster.directory().join("arbiter"), cluster.directory().join("away"));
        std::fs::rename(&here, &gone)?;
        cluster.admin("a")?.resume_replication()?;
        let held = until(cluster, "a", "to wait for the arbiter", |a| {
            a.role() == Role::Pairing && a.holding.contains("silent")
        })?;
        ensure!(held.register_age_ms > Some(0), "{held:?}");
        let problems = until_health(cluster, "a", false)?;
        ensure!(problems[0].contains("the arbiter has not answered"), "{problems:?}");
        let admin = cluster.admin("a")?.clone();
        let paused = std::thread::spawn(move || admin.pause_replication());
        std::thread::sleep(std::time::Duration::from_millis(300));
        ensure!(status(cluster, "a")?.role() == Role::Pairing, "it waits");
        std::fs::rename(&gone, &here)?;
        paused.join().expect("the caller")?;
        cluster.until_solo("a")?;
        let a = status(cluster, "a")?;
        ensure!((a.role(), a.link.is_none(), a.holding.as_str()) == (Role::Alone, true, ""), "{a:?}");
        stays(cluster, "b")?;
        check_goes_on(cluster)
    })
    .unwrap();
}

/// Another directory is mounted where the registers were: nobody takes that for an answer.
#[test]
fn an_arbiter_that_has_lost_the_register_ends_no_guest() {
    let mut seed = Seed::from_env(3408);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        let (here, gone) = (cluster.directory().join("arbiter"), cluster.directory().join("away"));
        std::fs::rename(&here, &gone)?;
        std::fs::create_dir(&here)?;
        let problems = cluster.until("a to miss the register", || {
            let health = cluster.admin("a")?.health()?;
            Ok((!health.healthy).then_some(health.problems))
        })?;
        ensure!(problems[0].contains("no register of"), "{problems:?}");
        cluster.kill("b")?;
        until(cluster, "a", "to be held", |a| a.holding.contains("silent"))?;
        std::thread::sleep(std::time::Duration::from_secs(2));
        ensure!(status(cluster, "a")?.role() == Role::Paired, "it waits");
        std::fs::remove_dir_all(&here)?;
        std::fs::rename(&gone, &here)?;
        cluster.until_solo("a")?;
        check_goes_on(cluster)
    })
    .unwrap();
}

#[test]
fn a_pair_without_a_link_is_not_healthy() {
    let mut seed = Seed::from_env(3406);
    let mut options = synthetic(&mut seed);
    (options.links, options.on_secondary_loss, options.failover) = (true, "hold", "manual");
    scenario(options, |cluster| {
        pair(cluster)?;
        for node in ["a", "b"] {
            until_health(cluster, node, true)?;
        }
        cluster.link("b")?.cut();
        for node in ["a", "b"] {
            let problems = until_health(cluster, node, false)?;
            ensure!(problems[0].contains("no link to"), "{node}: {problems:?}");
        }
        let a = status(cluster, "a")?;
        let link = a.link.context("it is missed")?;
        ensure!(!link.connected && a.holding.contains("away"), "{link:?} {:?}", a.holding);
        cluster.link("b")?.heal();
        for node in ["a", "b"] {
            until_health(cluster, node, true)?;
        }
        check_goes_on(cluster)
    })
    .unwrap();
}

#[test]
fn all_that_two_consoles_type_at_once_arrives() {
    let mut seed = Seed::from_env(3407);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        const PARTS: usize = 40;
        let parts = |byte: u8| (0..PARTS).map(|at| vec![byte; 1 + at % 7]).collect::<Vec<_>>();
        let all: u64 = 2 * parts(0).iter().map(|part| part.len() as u64).sum::<u64>();
        let before = status(cluster, "a")?.console.unwrap_or_default().input;
        let typing = [b'x', b'y'].map(|byte| {
            let admin = cluster.admin("a")?.clone();
            anyhow::Ok(std::thread::spawn(move || admin.type_in(parts(byte))))
        });
        let mut ends = Vec::new();
        for typing in typing {
            let taken = typing?.join().expect("the caller")?;
            ensure!(taken.windows(2).all(|two| two[0].offset < two[1].offset), "{taken:?}");
            ends.extend(taken.into_iter().map(|taken| taken.offset));
        }
        ends.sort_unstable();
        ensure!(ends.windows(2).all(|two| two[0] < two[1]), "two parts at one place: {ends:?}");
        ensure!(ends.last() == Some(&(before + all)), "{ends:?}, {all} bytes from {before} on");
        until(cluster, "a", "to have taken all", |a| {
            a.console.is_some_and(|console| console.input == before + all)
        })?;
        check(cluster)
    })
    .unwrap();
}
