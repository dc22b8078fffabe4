//! One node dies, in any phase of protection.

use anyhow::Context;
use colo_proto::v1::Role;
use colo_tests::cluster::{Cluster, is_solo_of, scenario};
use colo_tests::seed::Seed;
use std::time::Duration;

use super::{check_goes_on, kill_runner, pair, pause, synthetic};

/// From a primary that answers to one that is paired it takes less.
const JOINING: Duration = Duration::from_millis(200);

/// Epochs come so fast that a kill finds some in flight, some staged, some acked and not let out.
#[test]
fn the_primary_in_mid_epoch() {
    let mut seed = Seed::from_env(3001);
    for _ in 0..12 {
        let mut options = synthetic(&mut seed);
        options.interval_ms = 1 + seed.below(8) as u32;
        scenario(options, |cluster| {
            pair(cluster)?;
            pause(&mut seed, Duration::from_millis(100));
            kill_runner(cluster, "a", "b")?;
            Ok(())
        })
        .unwrap();
    }
}

/// While seeding, at J, and around the register's change to `Paired`: before it nobody takes over.
#[test]
fn the_primary_before_and_while_it_pairs() {
    let mut seed = Seed::from_env(3002);
    let mut taken_over = 0;
    for round in 0..12 {
        scenario(synthetic(&mut seed), |cluster| {
            cluster.start_secondary("b")?;
            cluster.until_role("b", Role::Waiting)?;
            cluster.start_primary("a", Some("b"))?;
            // Its control plane answers before that, and a disk that others sync may be slow.
            cluster.until("the register to name it", || cluster.register())?;
            cluster.until("the primary to answer", || Ok(cluster.status("a").map(drop)))?;
            if round % 3 == 0 {
                // Close to the change of the register.
                until_past(cluster, Role::Seeding)?;
                pause(&mut seed, JOINING / 10);
            } else {
                pause(&mut seed, JOINING);
            }
            taken_over += u32::from(kill_runner(cluster, "a", "b")?);
            Ok(())
        })
        .unwrap();
    }
    eprintln!("{taken_over} of 12 were protected when they were killed");
}

/// The runner is past this role on its way to protection.
fn until_past(cluster: &Cluster, role: Role) -> anyhow::Result<()> {
    cluster.until("the copy to be whole", || {
        let now = cluster.status("a").context("the primary does not answer")?.role();
        Ok((now as i32 > role as i32).then_some(()))
    })
}

/// The guest goes on alone, is protected again once the secondary is back, and then outlives its host.
#[test]
fn the_secondary() {
    let mut seed = Seed::from_env(3003);
    for _ in 0..4 {
        scenario(synthetic(&mut seed), |cluster| {
            pair(cluster)?;
            pause(&mut seed, Duration::from_millis(200));
            cluster.kill("b")?;
            if seed.below(2) == 0 {
                cluster.until_solo("a")?;
            }
            check_goes_on(cluster)?;
            cluster.start_secondary("b")?;
            let solo = |entry| is_solo_of(&entry, "a");
            cluster.until("the loss to be noticed", || {
                Ok(cluster.register()?.is_some_and(solo).then_some(()))
            })?;
            cluster.until_paired("a")?;
            check_goes_on(cluster)?;
            pause(&mut seed, Duration::from_millis(200));
            kill_runner(cluster, "a", "b")?;
            Ok(())
        })
        .unwrap();
    }
}

/// From host to host, each time to one that was killed before.
#[test]
fn one_runner_after_the_other() {
    let mut seed = Seed::from_env(3004);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        let (mut runner, mut follower) = ("a", "b");
        for _ in 0..6 {
            pause(&mut seed, Duration::from_millis(300));
            kill_runner(cluster, runner, follower)?;
            cluster.start_secondary(runner)?;
            cluster.protect(follower, runner)?;
            (runner, follower) = (follower, runner);
            check_goes_on(cluster)?;
        }
        Ok(())
    })
    .unwrap();
}
