//! Planned moves: both nodes live, nothing is lost, the roles are exchanged, and the vm is protected again at once.

use anyhow::{Context, ensure};
use colo_common::register::StopReason;
use colo_proto::v1::Role;
use colo_tests::cluster::{Cluster, is_solo_of, runs, scenario};
use colo_tests::seed::Seed;
use std::time::{Duration, Instant};

use super::returns::{check_rejoined, copies};
use super::{LONG, SOME, check, check_goes_on, check_stopped, kill_runner, pair, pause, synthetic};

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
    check_rejoined(cluster, to, before)?;
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

/// A guest that was to move and did not runs on, protected.
fn stays_protected(cluster: &mut Cluster, seed: &mut Seed) -> anyhow::Result<()> {
    cluster.until_paired("a")?;
    check_goes_on(cluster)?;
    pause(seed, Duration::from_millis(200));
    kill_runner(cluster, "a", "b").map(drop)
}

#[test]
fn a_signal_moves_the_guest_and_ends_the_process() {
    let mut seed = Seed::from_env(5102);
    let mut options = synthetic(&mut seed);
    (options.standby, options.on_stop) = (true, "switchover");
    scenario(options, |cluster| {
        pair(cluster)?;
        pause(&mut seed, Duration::from_millis(200));
        cluster.signal("a", libc::SIGTERM)?;
        let status = cluster.ended("a")?;
        ensure!(status.code() == Some(0), "it ended with {status}");
        cluster.until_solo("b")?;
        check_goes_on(cluster)
    })
    .unwrap();
}

#[test]
fn a_signal_with_nobody_to_move_to_stops_the_vm_the_second_time() {
    let mut seed = Seed::from_env(5103);
    let mut options = synthetic(&mut seed);
    options.on_stop = "switchover";
    scenario(options, |cluster| {
        cluster.start_primary("a", None)?;
        cluster.until_released(SOME)?;
        cluster.signal("a", libc::SIGTERM)?;
        cluster.until("the first signal to be refused", || {
            let log = cluster.log("a");
            Ok(log.contains("another signal to end stops the vm").then_some(()))
        })?;
        check_goes_on(cluster)?;
        cluster.signal("a", libc::SIGTERM)?;
        let status = cluster.ended("a")?;
        ensure!(status.success(), "it ended with {status}");
        check_stopped(cluster, StopReason::Operator)
    })
    .unwrap();
}

#[test]
fn without_the_arbiter_nothing_moves() {
    let mut seed = Seed::from_env(5104);
    let mut options = synthetic(&mut seed);
    options.standby = true;
    scenario(options, |cluster| {
        pair(cluster)?;
        let (there, away) = (cluster.directory().join("arbiter"), cluster.directory().join("arbiter.away"));
        std::fs::rename(&there, &away)?;
        let asked = cluster.switch_over("a");
        std::fs::rename(&away, &there)?;
        let why = format!("{:#}", asked.err().context("the guest moved without the arbiter")?);
        ensure!(why.contains("arbiter"), "{why}");
        stays_protected(cluster, &mut seed)
    })
    .unwrap();
}

#[test]
fn to_a_secondary_that_stands_still_nothing_moves() {
    let mut seed = Seed::from_env(5105);
    let mut options = synthetic(&mut seed);
    options.standby = true;
    scenario(options, |cluster| {
        pair(cluster)?;
        cluster.signal("b", libc::SIGSTOP)?;
        let why = cluster.switch_over("a").err().context("the guest moved to a node that stands still")?;
        ensure!(format!("{why:#}").contains("the guest runs on here"), "{why:#}");
        check_goes_on(cluster)?;
        cluster.signal("b", libc::SIGCONT)?;
        stays_protected(cluster, &mut seed)
    })
    .unwrap();
}

/// Moves of which one of the nodes does not see the end.
const DEATHS: usize = 20;
/// A switchover with nothing wrong takes less.
const MOVE: Duration = Duration::from_millis(60);

/// Whoever dies, and whenever: the other one runs the guest if the register lets it, and nothing that was let out is lost.
#[test]
fn a_death_in_mid_move() {
    let mut seed = Seed::from_env(5106);
    let mut moved = 0;
    for _ in 0..DEATHS {
        let mut options = synthetic(&mut seed);
        options.standby = true;
        scenario(options, |cluster| {
            pair(cluster)?;
            moved += u32::from(die_in_mid_move(cluster, &mut seed)?);
            Ok(())
        })
        .unwrap();
    }
    tell(moved);
}

#[expect(clippy::print_stderr, reason = "how far the moves were")]
fn tell(moved: u32) {
    eprintln!("{moved} of {DEATHS} guests had moved, or were taken over");
}

/// The register stays as it is, and this node does not run the guest; it may become a follower meanwhile.
fn nobody_runs(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let (before, started) = (cluster.register()?, Instant::now());
    while started.elapsed() < LONG {
        let role = cluster.status(node).map(|status| status.role());
        ensure!(!role.is_some_and(runs), "{node} runs a guest that is not its own");
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(cluster.register()? == before, "the register was {before:?}");
    Ok(())
}

/// Whether the guest runs on `b` in the end.
fn die_in_mid_move(cluster: &mut Cluster, seed: &mut Seed) -> anyhow::Result<bool> {
    let (asked, killed) = (cluster.admin("a")?.clone(), if seed.below(2) == 0 { "a" } else { "b" });
    // A reply may never come.
    let asking = std::thread::spawn(move || drop(asked.switchover()));
    pause(seed, MOVE);
    cluster.kill(killed)?;
    let other = if killed == "a" { "b" } else { "a" };
    let on = cluster.until("somebody who may run the guest", || {
        Ok(match cluster.register()?.context("no register")? {
            entry if is_solo_of(&entry, other) => Some(other),
            entry if is_solo_of(&entry, killed) => Some(killed),
            _ => None,
        })
    })?;
    asking.join().ok().context("the one who asked has panicked")?;
    if on == killed {
        // It had the guest for itself when it died: nobody may run what nobody else is sure to hold.
        nobody_runs(cluster, other)?;
        check(cluster)?;
        return Ok(on == "b");
    }
    cluster.until_solo(other)?;
    check_goes_on(cluster)?;
    Ok(on == "b")
}
