//! The etcd arbiter while members die, freeze, are wiped, added and removed, and while answers are lost.

use colo_common::arbiter::etcd::EtcdArbiter;
use colo_common::arbiter::{Arbiter, ArbiterError};
use colo_common::config::ArbiterConfig;
use colo_common::register::Answer;
use colo_primary::arbiter_worker::{ArbiterWorker, Found};
use colo_tests::etcd::swallow::Swallower;
use colo_tests::etcd::{self, EtcdCluster};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::history::History;
use super::{client, proposal, vm};

/// What a call may take beyond its bound on a loaded host.
const SLACK: Duration = Duration::from_millis(1500);
/// Until a cluster that is whole again must answer.
const RECOVERY: Duration = Duration::from_secs(20);

/// Proposes until told to end; every proposal is repeated until it is answered. Says how many calls were not.
fn keep_proposing(arbiter: &dyn Arbiter, process: u128, history: &History, end: &AtomicBool) -> u32 {
    let mut silent = 0;
    'next: while !end.load(Ordering::Relaxed) {
        let Ok(found) = arbiter.read(&vm()) else {
            silent += 1;
            continue;
        };
        let wanted = proposal(process, found);
        while !end.load(Ordering::Relaxed) {
            match arbiter.propose(&vm(), &wanted) {
                Ok(answer) => {
                    history.told(&wanted, &answer);
                    continue 'next;
                }
                Err(ArbiterError::Unreachable { .. }) => silent += 1,
                Err(e) => panic!("{e}"),
            }
        }
    }
    silent
}

/// The first answer of a cluster that is whole again.
fn recovers(arbiter: &dyn Arbiter) {
    let started = Instant::now();
    while let Err(e) = arbiter.read(&vm()) {
        assert!(started.elapsed() < RECOVERY, "{e}");
    }
}

#[test]
fn terms_stay_one_chain_while_leaders_die_and_freeze() {
    if !etcd::usable() {
        return;
    }
    const ROUNDS: u32 = 3;
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = EtcdCluster::start(directory.path()).unwrap();
    let (history, end) = (History::default(), AtomicBool::new(false));
    let config = cluster.config();
    let silent: u32 = thread::scope(|scope| {
        let proposers: Vec<_> = (1..=4)
            .map(|process| {
                let (history, end, config) = (&history, &end, &config);
                scope.spawn(move || {
                    let arbiter = EtcdArbiter::open(config).unwrap();
                    keep_proposing(&arbiter, process, history, end)
                })
            })
            .collect();
        for _ in 0..ROUNDS {
            let leader = cluster.leader().unwrap();
            cluster.kill(leader).unwrap();
            thread::sleep(Duration::from_millis(1200));
            cluster.restart(leader).unwrap();
            cluster.until_healthy().unwrap();
            let leader = cluster.leader().unwrap();
            cluster.freeze(leader).unwrap();
            thread::sleep(Duration::from_millis(1200));
            cluster.thaw(leader).unwrap();
            cluster.until_healthy().unwrap();
        }
        thread::sleep(Duration::from_millis(300));
        end.store(true, Ordering::Relaxed);
        proposers.into_iter().map(|proposer| proposer.join().unwrap()).sum()
    });
    let arbiter = client(&cluster);
    recovers(&arbiter);
    let acked = history.check(&arbiter.read(&vm()).unwrap().unwrap());
    println!("{acked} changes were granted over {} faults, {silent} calls had no answer", 2 * ROUNDS);
    assert!(acked > 30, "{acked} changes were granted");
}

#[test]
fn one_frozen_or_dead_member_costs_no_call_its_answer() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = EtcdCluster::start(directory.path()).unwrap();
    // What is shown is that calls are answered, not how fast a loaded host's disk is.
    let config = ArbiterConfig { timeout_ms: Some(5000), ..cluster.config() };
    let arbiter = EtcdArbiter::open(&config).unwrap();
    let mut last = None;
    let leader = cluster.leader().unwrap();
    for member in (0..3).filter(|n| *n != leader) {
        for kill in [false, true] {
            if kill {
                cluster.kill(member).unwrap();
            } else {
                cluster.freeze(member).unwrap();
            }
            for process in 1..=20 {
                let started = Instant::now();
                let next = proposal(process, last);
                assert_eq!(arbiter.propose(&vm(), &next).unwrap(), Answer::Applied(next.entry()));
                assert!(started.elapsed() < 2 * SLACK, "{:?}", started.elapsed());
                last = Some(next.entry());
            }
            if kill {
                cluster.restart(member).unwrap();
            } else {
                cluster.thaw(member).unwrap();
            }
            cluster.until_healthy().unwrap();
        }
    }
}

#[test]
fn without_a_majority_calls_end_in_time_and_come_back() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = EtcdCluster::start(directory.path()).unwrap();
    let bound = Duration::from_secs(1);
    let config = ArbiterConfig { timeout_ms: Some(1000), ..cluster.config() };
    let arbiter = EtcdArbiter::open(&config).unwrap();
    let first = proposal(1, None);
    arbiter.propose(&vm(), &first).unwrap();
    for frozen in [[0, 1], [1, 2]] {
        frozen.iter().for_each(|n| cluster.freeze(*n).unwrap());
        for _ in 0..3 {
            let started = Instant::now();
            let error = arbiter.read(&vm()).unwrap_err();
            let took = started.elapsed();
            assert!(took >= bound && took < bound + SLACK, "{took:?}");
            let text = error.to_string();
            assert!(matches!(error, ArbiterError::Unreachable { .. }), "{text}");
            assert!(text.contains("within 1s") && text.contains("most of etcd's members"), "{text}");
            let change = proposal(2, Some(first.entry()));
            assert!(matches!(arbiter.propose(&vm(), &change), Err(ArbiterError::Unreachable { .. })));
        }
        frozen.iter().for_each(|n| cluster.thaw(*n).unwrap());
        recovers(&arbiter);
    }
    let change = proposal(2, Some(first.entry()));
    assert_eq!(arbiter.propose(&vm(), &change).unwrap(), Answer::Applied(change.entry()));
    (0..3).for_each(|n| cluster.kill(n).unwrap());
    let text = arbiter.read(&vm()).unwrap_err().to_string();
    assert!(text.contains("refused"), "{text}");
    (0..3).for_each(|n| cluster.restart(n).unwrap());
    recovers(&arbiter);
    assert_eq!(arbiter.read(&vm()).unwrap(), Some(change.entry()));
}

#[test]
fn a_change_whose_answer_was_lost_is_found_applied() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start(directory.path()).unwrap();
    let way = Swallower::open(cluster.address(0)).unwrap();
    let endpoint = format!("http://{}", way.address).parse().unwrap();
    let config = ArbiterConfig { timeout_ms: Some(1000), ..ArbiterConfig::in_etcd(vec![endpoint]) };
    let arbiter = EtcdArbiter::open(&config).unwrap();
    let (target, key) = (cluster.target(1).unwrap(), "/colo/vms/web/register");
    let mut last = None;
    for process in 1..=5 {
        let next = proposal(process, last);
        // What the change carries, and the reads before it do not.
        way.swallow_after(b"proposal = ");
        let lost = arbiter.propose(&vm(), &next);
        assert!(matches!(lost, Err(ArbiterError::Unreachable { .. })), "{lost:?}");
        let pair = cluster.calls().get(&target, key).unwrap().unwrap();
        assert_eq!(u128::try_from(pair.version).unwrap(), process, "it was done");
        way.heal();
        let answer = arbiter.propose(&vm(), &next).unwrap();
        assert_eq!(answer, Answer::Applied(next.entry()));
        assert_eq!(arbiter.propose(&vm(), &next).unwrap(), answer);
        last = Some(next.entry());
    }
    let pair = cluster.calls().get(&target, key).unwrap().unwrap();
    assert_eq!(pair.version, 5, "each was written once");
}

#[test]
fn compaction_after_every_change_harms_nothing() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start(directory.path()).unwrap();
    let (arbiter, target) = (client(&cluster), cluster.target(0).unwrap());
    let mut last = None;
    for process in 1..=30 {
        cluster.calls().compact(&target).unwrap();
        let next = proposal(process, last);
        assert_eq!(arbiter.propose(&vm(), &next).unwrap(), Answer::Applied(next.entry()));
        cluster.calls().compact(&target).unwrap();
        assert_eq!(arbiter.read(&vm()).unwrap(), Some(next.entry()));
        last = Some(next.entry());
    }
}

#[test]
fn members_come_and_go_and_a_stale_one_is_not_believed() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = EtcdCluster::start(directory.path()).unwrap();
    let arbiter = client(&cluster);
    let first = proposal(1, None);
    arbiter.propose(&vm(), &first).unwrap();
    let new = cluster.add().unwrap();
    let second = proposal(2, Some(first.entry()));
    assert_eq!(arbiter.propose(&vm(), &second).unwrap(), Answer::Applied(second.entry()));
    cluster.remove(0).unwrap();
    cluster.until_healthy().unwrap();
    // The list that this client has names one that is gone, and lacks one that is new.
    let third = proposal(3, Some(second.entry()));
    assert_eq!(arbiter.propose(&vm(), &third).unwrap(), Answer::Applied(third.entry()));
    // The old member's host makes a cluster of its own at the old address.
    cluster.wipe(0).unwrap();
    cluster.launch_alone(0).unwrap();
    for _ in 0..20 {
        assert_eq!(arbiter.read(&vm()).unwrap(), Some(third.entry()));
    }
    // Also by a process that has just started, whose list begins with it.
    let fresh = client(&cluster);
    assert_eq!(fresh.read(&vm()).unwrap(), Some(third.entry()));
    cluster.kill(1).unwrap();
    let even =
        ArbiterConfig { endpoints: Some(vec![cluster.endpoint(0), cluster.endpoint(2)]), ..cluster.config() };
    let text = EtcdArbiter::open(&even).unwrap().read(&vm()).unwrap_err().to_string();
    assert!(text.contains("are of different clusters"), "{text}");
    cluster.kill(2).unwrap();
    let text = arbiter.read(&vm()).unwrap_err().to_string();
    assert!(text.contains("another cluster"), "{text}");
    assert!(new == 3 && cluster.running().eq([0, 3]));
}

#[test]
fn a_cluster_that_has_forgotten_everything_is_no_answer() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = EtcdCluster::start(directory.path()).unwrap();
    let arbiter: Arc<dyn Arbiter> = Arc::new(client(&cluster));
    let (tell, told) = std::sync::mpsc::channel();
    let worker = ArbiterWorker::start(Arc::clone(&arbiter), vm(), move |found| drop(tell.send(found)));
    let worker = worker.unwrap();
    let next = || told.recv_timeout(RECOVERY).unwrap();
    let first = proposal(1, None);
    worker.propose(first.clone());
    assert!(matches!(next(), Found::Answer(_, Answer::Applied(_))));
    cluster.wipe_all().unwrap();
    worker.propose(proposal(2, Some(first.entry())));
    let gone =
        |found: &Found| matches!(found, Found::Silent(why) if why.contains("no register of web any more"));
    let mut all = std::iter::repeat_with(next).inspect(|found| assert!(matches!(found, Found::Silent(_))));
    assert!(all.by_ref().take(50).any(|found| gone(&found)));
    assert_eq!(cluster.calls().all(&cluster.target(0).unwrap()).unwrap(), [], "nothing was created");
}
