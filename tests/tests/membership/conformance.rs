//! What every kind of membership keeps.

use colo_common::arbiter::Arbiter;
use colo_common::arbiter::etcd::EtcdArbiter;
use colo_common::arbiter::file::FileArbiter;
use colo_common::arbiter::scripted::ScriptedArbiter;
use colo_common::membership::etcd::EtcdMembership;
use colo_common::membership::file::FileMembership;
use colo_common::membership::scripted::ScriptedMembership;
use colo_common::membership::{
    Claim, ClaimAnswer, ClaimRefusal, Membership, MembershipError, NodeRecord, NodeRole,
};
use colo_common::register::Entry;
use colo_common::{Incarnation, Point};
use colo_tests::etcd::{self, EtcdCluster};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use super::{claim, follower, names, node, run_on, spare, vm};

/// Membership with its arbiter, as one more process has them.
type Pair = (Arc<dyn Membership>, Arc<dyn Arbiter>);
type Open<'a> = &'a dyn Fn() -> Pair;

fn all(open: Open<'_>) {
    processes_come_change_and_go(open);
    a_name_is_one_process(open);
    claims_follow_the_register_and_the_record(open);
    a_spare_that_is_bound_keeps_its_claim(open);
    registers_are_listed(open);
    racers_win_each_spare_once(open);
}

#[test]
fn files_conform() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    all(&|| (Arc::new(FileMembership::open(path).unwrap()), Arc::new(FileArbiter::open(path).unwrap())));
}

#[test]
fn the_script_conforms() {
    let arbiter = Arc::new(ScriptedArbiter::new());
    let membership = ScriptedMembership::new(Arc::clone(&arbiter));
    all(&|| (Arc::new(membership.clone()), Arc::<ScriptedArbiter>::clone(&arbiter)));
}

#[test]
fn etcd_conforms() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start(directory.path()).unwrap();
    let mut config = cluster.config();
    config.lease_s = Some(2);
    all(&|| {
        (Arc::new(EtcdMembership::open(&config).unwrap()), Arc::new(EtcdArbiter::open(&config).unwrap()))
    });
}

fn processes_come_change_and_go(open: Open<'_>) {
    let ((one, _), (other, _)) = (open(), open());
    assert_eq!(other.nodes().unwrap(), []);
    let mut record = spare("a", 1);
    let registered = one.register(record.clone()).unwrap();
    assert!(registered.is_registered());
    assert_eq!(other.nodes().unwrap(), [record.clone()]);
    record.memory_free = 5;
    record.copy = Some(Point::default());
    registered.update(record.clone()).unwrap();
    assert_eq!(other.nodes().unwrap(), [record.clone()]);
    // Two processes of one host, and another host.
    let bound = one.register(follower("a", 2, "web")).unwrap();
    let more = other.register(spare("b", 3)).unwrap();
    assert_eq!(names(&*one), ["a", "a/web", "b"]);
    drop(registered);
    assert_eq!(names(&*one), ["a/web", "b"]);
    bound.update(NodeRecord { role: NodeRole::Runner, ..follower("a", 2, "db") }).unwrap();
    assert_eq!(names(&*other), ["a/db", "b"]);
    drop((bound, more));
    assert_eq!(one.nodes().unwrap(), []);
}

fn a_name_is_one_process(open: Open<'_>) {
    let ((one, _), (other, _)) = (open(), open());
    let registered = one.register(spare("a", 1)).unwrap();
    let taken = |result: Result<(), MembershipError>| {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, MembershipError::Taken { .. }), "{text}");
        assert!(text.contains("a/@spare") && text.contains("a.example:7701"), "{text}");
    };
    taken(other.register(spare("a", 2)).map(drop));
    assert_eq!(other.nodes().unwrap(), [spare("a", 1)], "no change of state");
    // A process that is bound to a vm may not become what another one is.
    let bound = other.register(follower("a", 2, "web")).unwrap();
    taken(bound.update(spare("a", 2)));
    assert_eq!(names(&*one), ["a", "a/web"]);
    drop(registered);
    bound.update(spare("a", 2)).unwrap();
    assert_eq!(one.nodes().unwrap(), [spare("a", 2)]);
}

fn claims_follow_the_register_and_the_record(open: Open<'_>) {
    let ((members, arbiter), (other, _)) = (open(), open());
    let first = run_on(&*arbiter, "claims", "r", 1);
    let wanted = claim("claims", &first, "s", 7);
    let refused = |wanted: &Claim| match members.claim(wanted).unwrap() {
        ClaimAnswer::Refused(why) => why,
        ClaimAnswer::Claimed => panic!("granted: {wanted}"),
    };
    assert_eq!(refused(&wanted), ClaimRefusal::Gone);
    let registered = other.register(spare("s", 7)).unwrap();
    assert_eq!(refused(&claim("claims", &first, "s", 8)), ClaimRefusal::Gone, "another process");
    assert_eq!(members.claim_of(&node("s")).unwrap(), None);
    registered.update(NodeRecord { draining: true, ..spare("s", 7) }).unwrap();
    assert_eq!(refused(&wanted), ClaimRefusal::Draining);
    registered.update(spare("s", 7)).unwrap();
    for _ in 0..2 {
        assert_eq!(members.claim(&wanted).unwrap(), ClaimAnswer::Claimed, "and found again");
    }
    assert_eq!(other.claim_of(&node("s")).unwrap(), Some(wanted.clone()));
    // Another vm, and another runner by the same entry, which cannot be.
    let rival = claim("claims-2", &run_on(&*arbiter, "claims-2", "q", 2), "s", 7);
    assert_eq!(refused(&rival), ClaimRefusal::ClaimedBy(Box::new(wanted.clone())));
    let twin = Claim { incarnation: Incarnation(99), ..wanted.clone() };
    assert_eq!(refused(&twin), ClaimRefusal::ClaimedBy(Box::new(wanted.clone())));
    members.release(&rival).unwrap();
    members.release(&twin).unwrap();
    assert_eq!(other.claim_of(&node("s")).unwrap(), Some(wanted.clone()), "not theirs to give up");
    // The register moves on: the old term claims nothing, the new one takes over.
    let second = run_on(&*arbiter, "claims", "q", 3);
    assert_eq!(refused(&wanted), ClaimRefusal::RegisterMoved(Some(second.clone())));
    let later = claim("claims", &second, "s", 7);
    assert_eq!(members.claim(&later).unwrap(), ClaimAnswer::Claimed);
    members.release(&wanted).unwrap();
    assert_eq!(other.claim_of(&node("s")).unwrap(), Some(later.clone()));
    other.release(&later).unwrap();
    assert_eq!(members.claim_of(&node("s")).unwrap(), None);
    assert_eq!(members.claim(&rival).unwrap(), ClaimAnswer::Claimed, "free for others");
    // The claim ends with the process that it is on.
    drop(registered);
    assert_eq!(members.claim_of(&node("s")).unwrap(), None);
    let again = other.register(spare("s", 8)).unwrap();
    assert_eq!(refused(&rival), ClaimRefusal::Gone);
    assert_eq!(members.claim(&claim("claims", &second, "s", 8)).unwrap(), ClaimAnswer::Claimed);
    drop(again);
}

fn a_spare_that_is_bound_keeps_its_claim(open: Open<'_>) {
    let ((members, arbiter), (other, _)) = (open(), open());
    let first = run_on(&*arbiter, "bound", "r", 1);
    let wanted = claim("bound", &first, "s", 7);
    let registered = other.register(spare("s", 7)).unwrap();
    assert_eq!(members.claim(&wanted).unwrap(), ClaimAnswer::Claimed);
    registered.update(follower("s", 7, "bound")).unwrap();
    assert_eq!(members.claim_of(&node("s")).unwrap(), Some(wanted.clone()));
    assert_eq!(members.claim(&wanted).unwrap(), ClaimAnswer::Claimed, "the answer was lost");
    let second = run_on(&*arbiter, "bound", "r", 2);
    let later = claim("bound", &second, "s", 7);
    assert_eq!(members.claim(&later).unwrap(), ClaimAnswer::Claimed, "in a later term too");
    let rival = claim("bound-2", &run_on(&*arbiter, "bound-2", "q", 3), "s", 7);
    assert_eq!(members.claim(&rival).unwrap(), ClaimAnswer::Refused(ClaimRefusal::Gone));
    members.release(&later).unwrap();
    assert_eq!(members.claim(&later).unwrap(), ClaimAnswer::Refused(ClaimRefusal::Busy(vm("bound"))));
    drop(registered);
    assert_eq!(members.claim_of(&node("s")).unwrap(), None);
}

fn registers_are_listed(open: Open<'_>) {
    let (members, arbiter) = open();
    let entry = run_on(&*arbiter, "aaa", "r", 1);
    let all = members.vms().unwrap();
    assert_eq!(all.first(), Some(&(vm("aaa"), entry)));
    assert!(all.is_sorted_by_key(|(vm, _)| vm.clone()) && all.len() > 4, "{all:?}");
}

fn racers_win_each_spare_once(open: Open<'_>) {
    const RACERS: u128 = 6;
    const SPARES: u128 = 5;
    let (members, arbiter) = open();
    let vms: Vec<(String, Entry)> = (0..RACERS)
        .map(|n| (format!("race-{n}"), run_on(&*arbiter, &format!("race-{n}"), &format!("r{n}"), 100 + n)))
        .collect();
    let names: Vec<String> = (0..SPARES).map(|n| format!("spare-{n}")).collect();
    let registered: Vec<_> =
        names.iter().zip(1..).map(|(name, n)| members.register(spare(name, n)).unwrap()).collect();
    let (granted, refused) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
    thread::scope(|scope| {
        for (name, entry) in &vms {
            let ((members, _), names, granted, refused) = (open(), &names, &granted, &refused);
            scope.spawn(move || {
                for (spare, process) in names.iter().zip(1..) {
                    let wanted = claim(name, entry, spare, process);
                    match members.claim(&wanted).unwrap() {
                        ClaimAnswer::Claimed => granted.lock().unwrap().push(wanted),
                        ClaimAnswer::Refused(ClaimRefusal::ClaimedBy(_)) => {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        ClaimAnswer::Refused(why) => panic!("{why}"),
                    }
                }
            });
        }
    });
    let granted = granted.into_inner().unwrap();
    assert_eq!(granted.len(), names.len(), "one winner of each");
    assert_eq!(refused.into_inner(), (RACERS * SPARES) as usize - names.len());
    for name in &names {
        let kept = members.claim_of(&node(name)).unwrap().unwrap();
        assert!(granted.contains(&kept), "the winner was told so");
    }
    drop(registered);
    assert_eq!(members.nodes().unwrap(), []);
}
