//! What operators say where nodes cannot or shall not decide: a guest is run by force, a node is fenced, failovers wait for
//! a word, a node is emptied.

use anyhow::{Context, ensure};
use colo_proto::v1::{FailoverPolicy, Role};
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::seed::Seed;
use std::time::Duration;

use super::{SUPERSEDED, check_goes_on, pair, pause, stays, synthetic};

/// What a call was refused with.
fn refused<T: std::fmt::Debug>(call: anyhow::Result<T>, word: &str) -> anyhow::Result<()> {
    let why = call.err().with_context(|| format!("not refused ({word})"))?.to_string();
    ensure!(why.contains(word), "refused with {why}, not with {word}");
    Ok(())
}

/// Both nodes died under `memory`: nobody may run the guest, and the secondary has a point in its store.
fn stranded(cluster: &mut Cluster, seed: &mut Seed) -> anyhow::Result<()> {
    pair(cluster)?;
    cluster.until("b to store a point", || {
        let marks = cluster.status("b").and_then(|status| status.points);
        Ok(marks.and_then(|marks| marks.persisted).map(drop))
    })?;
    pause(seed, Duration::from_millis(300));
    cluster.kill("b")?;
    cluster.kill("a")?;
    cluster.start_secondary("b")?;
    cluster.until("b to say that nobody may run the guest", || {
        let health = cluster.admin("b").and_then(|admin| admin.health());
        let told = health.ok().filter(|health| !health.healthy);
        Ok(told.filter(|health| health.problems.concat().contains("once a is fenced")).map(drop))
    })?;
    stays(cluster, "b")
}

#[test]
fn a_guest_that_nobody_may_run_runs_by_force() {
    let mut seed = Seed::from_env(5401);
    scenario(synthetic(&mut seed), |cluster| {
        // The register must still be Paired when both are dead.
        cluster.options.promote_delay_ms = 2000;
        cluster.options.on_secondary_loss = "hold";
        stranded(cluster, &mut seed)?;
        let admin = cluster.admin("b")?;
        refused(admin.promote(), "no whole copy of the guest [NO_COPY]")?;
        refused(admin.promote_by_force(" "), "for the audit trail [BAD_REQUEST]")?;
        refused(admin.promote_by_force("a and b lost power"), "does not count) [NOT_FENCED]")?;
        refused(admin.confirm_fenced("c", "there is none"), "no other node")?;
        let stale = cluster.status("b").and_then(|status| status.points).and_then(|points| points.stale);
        let confirmed = admin.confirm_fenced("a", "its host is off")?.register.context("no register")?;
        let promoted = admin.promote_by_force("a and b lost power")?;
        let entry = promoted.register.context("no register")?;
        ensure!(entry.term == confirmed.term + 1, "{entry:?} after {confirmed:?}");
        ensure!(promoted.point == stale, "it runs from {:?}, not from {stale:?}", promoted.point);
        cluster.until_solo("b")?;
        cluster.until_released(super::SOME)?;
        // The one that was fenced finds the register another's, and follows.
        cluster.start_secondary("a")?;
        cluster.until_paired("b")
    })
    .unwrap();
}

#[test]
fn a_fenced_runner_stops_at_once_and_its_secondary_goes_on() {
    let mut seed = Seed::from_env(5402);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        let admin = cluster.admin("b")?;
        refused(admin.confirm_fenced("a", "it was not"), "lives")?;
        refused(admin.promote_by_force("I want to"), "lives")?;
        admin.set_failover(FailoverPolicy::Manual)?;
        ensure!(cluster.admin("a")?.fence("its fans have failed")?.node == "a");
        let status = cluster.ended("a")?;
        ensure!(status.code() == Some(SUPERSEDED), "it ended with {status}");
        // By the policy that it was told.
        stays(cluster, "b")?;
        let admin = cluster.admin("b")?;
        admin.confirm_fenced("a", "it was fenced")?;
        admin.set_failover(FailoverPolicy::Auto)?;
        cluster.until_solo("b")?;
        check_goes_on(cluster)
    })
    .unwrap();
}

#[test]
fn a_drained_node_is_left_by_its_guest_and_replaced_as_a_secondary() {
    let mut seed = Seed::from_env(5403);
    let mut options = synthetic(&mut seed);
    options.standby = true;
    scenario(options, |cluster| {
        pair(cluster)?;
        cluster.start_spare("s")?;
        cluster.drain("a")?;
        cluster.until("b to run the guest, protected by s", || {
            let status = cluster.status("b").filter(|status| status.role() == Role::Paired);
            Ok(status.and_then(|status| status.link).filter(|link| link.peer == "s").map(drop))
        })?;
        cluster.until("a to be left", || {
            Ok(cluster.status("a").filter(|status| status.role() == Role::Waiting).map(drop))
        })?;
        check_goes_on(cluster)?;
        // It is chosen again once it may be.
        cluster.kill("s")?;
        cluster.until_solo("b")?;
        stays(cluster, "a")?;
        cluster.admin("a")?.drain(false)?;
        cluster.until_paired("b")?;
        check_goes_on(cluster)
    })
    .unwrap();
}

/// Waits until `runner` is protected by the one who is wanted.
fn protected_by(cluster: &Cluster, runner: &str, wanted: &str) -> anyhow::Result<()> {
    cluster.until(&format!("{runner} to be protected by {wanted}"), || {
        let paired = cluster.status(runner).filter(|status| status.role() == Role::Paired);
        Ok(paired.and_then(|status| status.link).filter(|link| link.peer == wanted).map(drop))
    })
}

#[test]
fn a_drained_spare_is_replaced_and_not_claimed_until_that_is_ended() {
    let mut seed = Seed::from_env(5404);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        cluster.start_spare("s")?;
        cluster.until_role("s", Role::Spare)?;
        let spare = cluster.admin("s")?;
        let health = spare.health()?;
        ensure!(health.healthy && health.spare && health.problems.is_empty(), "{health:?}");
        refused(spare.promote(), "bound to no vm")?;
        refused(spare.switchover(), "[UNBOUND]")?;
        cluster.kill("b")?;
        protected_by(cluster, "a", "s")?;
        // Bound to a vm, it is emptied, replaced, and a spare again.
        cluster.drain("s")?;
        cluster.start_spare("t")?;
        protected_by(cluster, "a", "t")?;
        cluster.until_role("s", Role::Spare)?;
        // That holds over the ends of its processes.
        cluster.kill("s")?;
        cluster.start_spare("s")?;
        cluster.until_role("s", Role::Spare)?;
        let told = cluster.admin("s")?.health()?;
        ensure!(told.healthy && told.problems.concat().contains("coloctl drain --end s"), "{told:?}");
        cluster.kill("t")?;
        cluster.until("a to say why nobody can protect it", || {
            let problems = cluster.admin("a")?.health()?.problems.concat();
            Ok(problems.contains("nobody can protect it: s is being emptied").then_some(()))
        })?;
        ensure!(cluster.status("s").is_some_and(|status| status.role() == Role::Spare), "s was claimed");
        cluster.admin("s")?.drain(false)?;
        protected_by(cluster, "a", "s")?;
        let told = cluster.admin("a")?.health()?;
        ensure!(told.protected && !told.problems.concat().contains("nobody can"), "{told:?}");
        check_goes_on(cluster)
    })
    .unwrap();
}

#[test]
fn a_spare_is_emptied_and_ended_before_any_vm_has_it() {
    let mut seed = Seed::from_env(5405);
    scenario(synthetic(&mut seed), |cluster| {
        cluster.start_spare("s")?;
        cluster.until_role("s", Role::Spare)?;
        cluster.drain("s")?;
        pair(cluster)?;
        cluster.kill("b")?;
        cluster.until_solo("a")?;
        stays(cluster, "s")?;
        cluster.admin("s")?.stop_node()?;
        let status = cluster.ended("s")?;
        ensure!(status.success(), "it ended with {status}");
        cluster.until("a to say that nobody is there", || {
            let problems = cluster.admin("a")?.health()?.problems.concat();
            Ok(problems.contains("nobody can protect it: no other node is there").then_some(()))
        })?;
        check_goes_on(cluster)
    })
    .unwrap();
}
