//! What a read and a change cost, with all members and with one that is frozen: printed, and bounded only loosely.

use colo_common::arbiter::Arbiter;
use colo_tests::etcd::{self, EtcdCluster};
use std::time::{Duration, Instant};

use super::{client, proposal, vm};

const CALLS: u128 = 300;

#[test]
fn what_calls_cost() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = EtcdCluster::start(directory.path()).unwrap();
    let arbiter = client(&cluster);
    arbiter.propose(&vm(), &proposal(1, None)).unwrap();
    measure(&arbiter, "all members");
    let leader = cluster.leader().unwrap();
    let follower = (leader + 1) % 3;
    cluster.freeze(follower).unwrap();
    measure(&arbiter, "a follower frozen");
    cluster.thaw(follower).unwrap();
    cluster.until_healthy().unwrap();
    let leader = cluster.leader().unwrap();
    cluster.freeze(leader).unwrap();
    measure(&arbiter, "the leader frozen, its election included");
}

#[expect(clippy::print_stdout, reason = "figures are what this is for")]
fn measure(arbiter: &dyn Arbiter, how: &str) {
    let (mut reads, mut changes) = (Vec::new(), Vec::new());
    for process in 2..2 + CALLS {
        let started = Instant::now();
        let Ok(found) = arbiter.read(&vm()) else { continue };
        reads.push(started.elapsed());
        let started = Instant::now();
        if arbiter.propose(&vm(), &proposal(process, found)).is_ok() {
            changes.push(started.elapsed());
        }
    }
    for (what, mut times) in [("read", reads), ("propose", changes)] {
        times.sort();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        println!(
            "{how}: {what}: p50 {:?}, p99 {:?}, longest {:?}, {} of {CALLS} answered",
            at(50),
            at(99),
            at(100),
            times.len()
        );
        assert!(at(50) < Duration::from_millis(500), "{how}");
    }
}
