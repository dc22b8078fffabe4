//! A vm that loses its protection gets it again without an operator: by a spare, by a node that comes back, by whoever is
//! there; and hosts that come back offer themselves.

use colo_proto::v1::Role;
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::etcd::{EtcdCluster, usable};
use colo_tests::seed::Seed;
use std::time::{Duration, Instant};

use super::{check_goes_on, kill_runner, pair, pause, synthetic};

/// Longer than a dead node's record is kept in etcd by the clusters of these tests.
const LEASE: Duration = Duration::from_secs(6);

/// Waits until `runner` is protected without anybody's word, by the one who is wanted.
#[expect(clippy::print_stderr, reason = "how it went")]
fn healed(cluster: &Cluster, runner: &str, wanted: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    cluster.until(&format!("{runner} to be protected by {wanted}"), || {
        let paired = cluster.status(runner).filter(|status| status.role() == Role::Paired);
        Ok(paired.and_then(|status| status.link).filter(|link| link.peer == wanted).map(drop))
    })?;
    eprintln!("{runner} is protected by {wanted} after {} ms", began.elapsed().as_millis());
    check_goes_on(cluster)
}

fn offers_itself(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    cluster.until(&format!("{node} to offer itself"), || {
        Ok(cluster.status(node).filter(|status| status.role() == Role::Waiting).map(drop))
    })
}

/// Two failovers and the loss of a secondary, with one node more than a pair at any time.
fn story(cluster: &mut Cluster, seed: &mut Seed) -> anyhow::Result<()> {
    pair(cluster)?;
    cluster.start_spare("s")?;
    pause(seed, Duration::from_millis(500));
    kill_runner(cluster, "a", "b")?;
    healed(cluster, "b", "s")?;
    // The command that started the guest once; its vm is another's now.
    cluster.start_primary("a", Some("b"))?;
    offers_itself(cluster, "a")?;
    kill_runner(cluster, "b", "s")?;
    healed(cluster, "s", "a")?;
    cluster.start_secondary("b")?;
    offers_itself(cluster, "b")?;
    cluster.kill("a")?;
    healed(cluster, "s", "b")?;
    kill_runner(cluster, "s", "b").map(drop)
}

#[test]
fn by_a_spare_and_by_those_who_come_back() {
    let mut seed = Seed::from_env(5201);
    let mut options = synthetic(&mut seed);
    options.standby = true;
    scenario(options, |cluster| story(cluster, &mut seed)).unwrap();
}

#[test]
fn the_same_with_etcd() {
    if !usable() {
        return;
    }
    let mut seed = Seed::from_env(5202);
    let place = tempfile::tempdir().unwrap();
    let etcd = EtcdCluster::start(place.path()).unwrap();
    let mut options = synthetic(&mut seed);
    options.standby = true;
    options.arbiter = Some(etcd.config());
    scenario(options, |cluster| {
        story(cluster, &mut seed)?;
        // Nobody is left but b; the records of the others end with their leases.
        std::thread::sleep(LEASE);
        check_goes_on(cluster)
    })
    .unwrap();
}
