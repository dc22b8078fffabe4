//! The register in a real etcd, one of whose members fails as well.

use colo_tests::cluster::scenario;
use colo_tests::etcd::{self, EtcdCluster};
use colo_tests::seed::Seed;
use std::time::Duration;

use super::{kill_runner, pair, pause, synthetic};

/// The primary dies, and with it, or before it, each member of etcd in turn.
#[test]
fn a_failover_with_one_member_less() {
    if !etcd::usable() {
        return;
    }
    let mut seed = Seed::from_env(4001);
    for member in 0..3 {
        let directory = tempfile::tempdir().unwrap();
        let mut etcd = EtcdCluster::start_with_tls(directory.path()).unwrap();
        let mut options = synthetic(&mut seed);
        options.arbiter = Some(etcd.config());
        scenario(options, |cluster| {
            pair(cluster)?;
            pause(&mut seed, Duration::from_millis(100));
            if member == 0 {
                etcd.kill(member)?;
            } else {
                etcd.freeze(member)?;
            }
            kill_runner(cluster, "a", "b")?;
            Ok(())
        })
        .unwrap();
    }
}
