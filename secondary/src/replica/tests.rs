//! The follower, transition by transition.

use colo_common::history::point;
use colo_common::register::{Answer, Entry, Proposal, StopReason, Value};
use colo_common::{Incarnation, NodeId, Point, ProposalId, ReplicaId, Term};
use colo_primary::replicator::Ack;

use super::{AckPolicy, Action, Copy, NotMine, Refusal, Replica, Rules, Start, Stored};

const ME: Incarnation = Incarnation(7);
const DEAD: Incarnation = Incarnation(6);
const COPY: ReplicaId = ReplicaId(1 << 64);

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

fn entry(term: u64, value: Value) -> Entry {
    Entry { term: Term(term), proposal: ProposalId(u128::from(term)), value }
}

fn solo(term: u64, name: &str, process: Incarnation) -> Entry {
    entry(term, Value::Solo { node: node(name), incarnation: process })
}

fn paired(term: u64, replica: ReplicaId) -> Entry {
    entry(term, Value::Paired { primary: node("a"), secondary: node("b"), replica })
}

fn stopped(term: u64, name: &str) -> Entry {
    entry(term, Value::Stopped { node: node(name), reason: StopReason::Operator })
}

fn restarted(policy: AckPolicy, boot: bool, stored: Stored) -> Replica {
    Replica::new(node("b"), ME, Rules { policy, boot_after_crash: boot }, stored)
}

fn ack(term: u64, at: Point) -> Action {
    Action::Ack(Ack { point: at, replica: COPY, term: Term(term) })
}

fn proposal(actions: &[Action]) -> Proposal {
    match actions {
        [Action::Propose(proposal)] => proposal.clone(),
        other => panic!("not one proposal: {other:?}"),
    }
}

/// Seeded by `a` in term 1; J is 1.1.
fn seeded(policy: AckPolicy) -> (Replica, Vec<Action>) {
    let mut replica = restarted(policy, true, Stored::default());
    replica.accept_seed(&node("a"), Term(1)).unwrap();
    assert_eq!(replica.staged(point(1, 1)), Err(Refusal::OutOfPlace(point(1, 1))));
    let actions = replica.whole(point(1, 1), COPY).unwrap();
    (replica, actions)
}

/// Follows as Paired in term 2.
fn follower(policy: AckPolicy) -> Replica {
    let (mut replica, _) = seeded(policy);
    if policy == AckPolicy::Disk {
        replica.persisted(COPY, point(1, 1));
        replica.id_stored(COPY);
    }
    assert_eq!(replica.hear_term(Term(2)), Ok(vec![ack(2, point(1, 1))]));
    replica
}

#[test]
fn memory_acks_what_is_staged() {
    let (mut replica, actions) = seeded(AckPolicy::Memory);
    assert_eq!(actions, vec![ack(1, point(1, 1))], "no id in the store");
    assert_eq!(replica.staged(point(1, 2)), Ok(vec![ack(1, point(1, 2))]));
    assert_eq!(replica.staged(point(1, 2)), Err(Refusal::OutOfPlace(point(1, 2))));
    assert_eq!(replica.persisted(COPY, point(1, 2)), vec![]);
    assert_eq!(replica.acked(), Some(point(1, 2)));
    replica.link_lost();
    assert_eq!(replica.ackable(), None);
}

#[test]
fn disk_acks_what_is_synced_with_its_id() {
    let (mut replica, actions) = seeded(AckPolicy::Disk);
    assert_eq!(actions, vec![Action::StoreId(COPY)]);
    assert_eq!(
        replica.copy(),
        &Copy::Whole { replica: COPY, staged: point(1, 1), persisted: None, named: false }
    );
    let (mut id_first, mut mark_first) = (replica.clone(), replica.clone());
    assert_eq!(id_first.id_stored(COPY), vec![], "nothing is persisted");
    assert_eq!(id_first.persisted(COPY, point(1, 1)), vec![ack(1, point(1, 1))]);
    assert_eq!(mark_first.persisted(COPY, point(1, 1)), vec![], "a restart could not show the id");
    assert_eq!(mark_first.id_stored(COPY), vec![ack(1, point(1, 1))]);
    assert_eq!(replica.persisted(ReplicaId(9), point(1, 1)), vec![], "of a copy before this one");
    assert_eq!(replica.id_stored(ReplicaId(9)), vec![]);
    assert_eq!(mark_first.staged(point(1, 2)), Ok(vec![ack(1, point(1, 1))]), "the old point again");
}

#[test]
fn it_is_silent_for_good_once_it_has_proposed() {
    let mut replica = follower(AckPolicy::Memory);
    let promote = proposal(&replica.promote(Some(&paired(2, COPY))).unwrap());
    assert_eq!(promote.value, Value::Solo { node: node("b"), incarnation: ME });
    assert_eq!(replica.staged(point(2, 2)), Ok(vec![]), "staged, not acked");
    assert_eq!(replica.promote(Some(&paired(2, COPY))), Err(NotMine::Proposing));
    assert_eq!(replica.accept_link(&node("a"), Term(2), COPY), Err(Refusal::Promoting));
    assert_eq!(replica.accept_seed(&node("a"), Term(3)), Err(Refusal::Promoting));
    let mut refused = replica.clone();
    let run = Action::Run(Start::Promote(point(2, 2)), promote.entry());
    assert_eq!(replica.answer(promote.id, Answer::Applied(promote.entry())), vec![run]);
    let won = solo(3, "a", Incarnation(1));
    assert_eq!(refused.answer(promote.id, Answer::Refused(Some(won))), vec![]);
    let late = refused.accept_link(&node("a"), Term(2), COPY);
    assert!(matches!(late, Err(Refusal::Fenced { .. })), "{late:?}");
    assert_eq!(refused.accept_seed(&node("a"), Term(3)), Ok(()));
    assert!(
        matches!(refused.promote(Some(&paired(2, COPY))), Err(NotMine::NoCopy)),
        "in the middle of a seed"
    );
}

#[test]
fn only_the_named_replica_promotes() {
    let mut replica = follower(AckPolicy::Memory);
    let other = ReplicaId(5);
    let named = NotMine::OtherReplica { named: other, held: COPY };
    assert_eq!(replica.promote(Some(&paired(2, other))), Err(named));
    assert_eq!(replica.promote(None), Err(NotMine::Absent));
    for entry in [solo(2, "a", Incarnation(1)), stopped(3, "a"), solo(3, "b", ME)] {
        assert_eq!(replica.promote(Some(&entry)), Err(NotMine::Register(entry.clone())));
    }
    assert_eq!(replica.fence(), Term(3));
    assert!(replica.hear_term(Term(2)).is_err(), "a runner of a term that is over");
}

#[test]
fn a_start_does_what_the_register_and_the_store_allow() {
    let whole = |named| Stored { active: false, whole: Some((point(1, 4), named)) };
    let active = Stored { active: true, whole: None };
    let dead = solo(3, "b", DEAD);
    for found in [None, Some(paired(2, COPY)), Some(solo(3, "a", DEAD)), Some(stopped(3, "b"))] {
        let mut replica = restarted(AckPolicy::Disk, true, active.clone());
        assert_eq!(replica.observe(found.as_ref()), vec![], "{found:?}");
    }
    let mut replica = restarted(AckPolicy::Disk, true, active.clone());
    let boot = proposal(&replica.observe(Some(&dead)));
    assert_eq!(boot.expected, Some(dead.clone()));
    assert_eq!(replica.observe(Some(&dead)), vec![], "one proposal at a time");
    let run = Action::Run(Start::Boot, boot.entry());
    assert_eq!(replica.answer(boot.id, Answer::Applied(boot.entry())), vec![run]);
    assert_eq!(
        restarted(AckPolicy::Disk, false, active).observe(Some(&dead)),
        vec![],
        "on_crash is not boot"
    );

    let mut replica = restarted(AckPolicy::Disk, true, whole(Some(COPY)));
    let promote = proposal(&replica.observe(Some(&dead)));
    let run = Action::Run(Start::Promote(point(1, 4)), promote.entry());
    assert_eq!(replica.answer(promote.id, Answer::Applied(promote.entry())), vec![run]);
    let mut stale = restarted(AckPolicy::Memory, true, whole(None));
    assert_eq!(stale.copy(), &Copy::Stale { point: point(1, 4) });
    assert_eq!(stale.observe(Some(&dead)), vec![], "nothing to run from");
    assert_eq!(stale.promote(Some(&paired(2, COPY))), Err(NotMine::NoCopy));
    let link = stale.accept_link(&node("a"), Term(3), COPY);
    assert_eq!(link, Err(Refusal::NotThisReplica { wanted: COPY }));
}

#[test]
fn a_late_request_of_the_dead_process_is_obeyed() {
    let mut replica =
        restarted(AckPolicy::Disk, true, Stored { active: false, whole: Some((point(1, 4), Some(COPY))) });
    assert_eq!(replica.observe(Some(&paired(2, COPY))), vec![]);
    let promote = proposal(&replica.promote(Some(&paired(2, COPY))).unwrap());
    let dead = solo(3, "b", DEAD);
    let again = proposal(&replica.answer(promote.id, Answer::Refused(Some(dead.clone()))));
    assert_eq!((again.expected, again.id != promote.id), (Some(dead), true));
}

#[test]
fn a_stopped_vm_is_started_by_the_node_that_ran_it() {
    let active = Stored { active: true, whole: None };
    let mut replica = restarted(AckPolicy::Memory, true, active);
    let others = stopped(4, "a");
    assert_eq!(replica.start_again(Some(&others)), Err(NotMine::Register(others)));
    assert_eq!(replica.start_again(None), Err(NotMine::Absent));
    let start = proposal(&replica.start_again(Some(&stopped(4, "b"))).unwrap());
    let run = Action::Run(Start::Boot, start.entry());
    assert_eq!(replica.answer(start.id, Answer::Applied(start.entry())), vec![run]);
    let mut never_ran = restarted(AckPolicy::Memory, true, Stored::default());
    assert!(never_ran.start_again(Some(&stopped(4, "b"))).is_err());
}

/// It was granted, and cut off before anything ran: that word stands. One that was refused does not.
#[test]
fn a_start_again_that_was_cut_off_goes_on_and_a_refused_one_does_not() {
    let ran = || restarted(AckPolicy::Memory, false, Stored { active: true, whole: None });
    let granted = solo(5, "b", ME);
    let mut replica = ran();
    assert_eq!(replica.observe(Some(&granted)), vec![], "nobody told it to");
    replica.go_on_starting(true);
    assert_eq!(replica.observe(Some(&stopped(4, "b"))), vec![], "not granted: the word was for that start");
    let boot = proposal(&replica.observe(Some(&granted)));
    assert_eq!(boot.expected, Some(granted.clone()));
    let run = Action::Run(Start::Boot, boot.entry());
    assert_eq!(replica.answer(boot.id, Answer::Applied(boot.entry())), vec![run]);

    let mut replica = ran();
    let start = proposal(&replica.start_again(Some(&stopped(4, "b"))).unwrap());
    assert_eq!(replica.answer(start.id, Answer::Refused(Some(solo(5, "b", DEAD)))), vec![]);
    assert_eq!(replica.observe(Some(&granted)), vec![], "the word is used up");
    let mut seeded = ran();
    seeded.go_on_starting(true);
    seeded.accept_seed(&node("a"), Term(5)).unwrap();
    assert_eq!(seeded.observe(Some(&granted)), vec![], "what it would start is replaced");
}

#[test]
fn the_register_is_handed_back_by_who_has_nothing_to_run_from() {
    let dead = solo(3, "b", DEAD);
    let give = |replica: &mut Replica, term| replica.hand_back(Some(&dead), &node("a"), ME, Term(term));
    let mut replica = restarted(AckPolicy::Memory, true, Stored::default());
    assert!(give(&mut replica, 2).is_err(), "it lost an older term");
    let back = proposal(&give(&mut replica, 3).unwrap());
    assert_eq!(back.value, Value::Solo { node: node("a"), incarnation: ME });
    assert_eq!(replica.answer(back.id, Answer::Applied(back.entry())), vec![]);
    assert_eq!(replica.fence(), Term(4));
    let ran = Stored { active: true, whole: None };
    assert!(give(&mut restarted(AckPolicy::Memory, false, ran), 3).is_err());
    let whole = Stored { active: false, whole: Some((point(1, 1), Some(COPY))) };
    assert!(give(&mut restarted(AckPolicy::Disk, false, whole), 3).is_err());
}

#[test]
fn to_disk_once_the_store_has_every_ack() {
    let mut replica = follower(AckPolicy::Memory);
    replica.staged(point(2, 2)).unwrap();
    assert_eq!(replica.change_policy(AckPolicy::Disk), vec![]);
    assert_eq!(replica.persisted(COPY, point(1, 1)), vec![], "2.2 is acked and not stored");
    assert_eq!(replica.policy(), AckPolicy::Memory);
    assert_eq!(replica.persisted(COPY, point(2, 2)), vec![Action::StoreId(COPY)]);
    assert_eq!(replica.staged(point(2, 3)), Ok(vec![]), "the id must not speak for what the store lacks");
    assert_eq!(replica.id_stored(COPY), vec![ack(2, point(2, 2))]);
    assert_eq!(replica.persisted(COPY, point(2, 3)), vec![ack(2, point(2, 3))]);
    assert_eq!(replica.policy(), AckPolicy::Disk);
}

#[test]
fn to_memory_once_the_id_is_erased() {
    let mut replica = follower(AckPolicy::Disk);
    assert_eq!(replica.change_policy(AckPolicy::Memory), vec![Action::EraseId(COPY)]);
    assert_eq!(replica.staged(point(2, 2)), Ok(vec![ack(2, point(1, 1))]), "the synced one still");
    let mut back = replica.clone();
    assert_eq!(replica.id_erased(COPY), vec![ack(2, point(2, 2))]);
    assert_eq!(replica.policy(), AckPolicy::Memory);

    assert_eq!(back.change_policy(AckPolicy::Disk), vec![], "the erasure cannot be called back");
    assert_eq!(back.persisted(COPY, point(2, 2)), vec![], "no ack without the id");
    assert_eq!(back.id_erased(ReplicaId(9)), vec![], "of a copy before this one");
    assert_eq!(back.id_erased(COPY), vec![Action::StoreId(COPY)]);
    assert_eq!(back.id_stored(COPY), vec![ack(2, point(2, 2))]);
}

#[test]
fn a_stored_id_is_erased_before_the_first_ack_from_memory() {
    let stored = Stored { active: false, whole: Some((point(1, 4), Some(COPY))) };
    let mut replica = restarted(AckPolicy::Memory, true, stored);
    assert_eq!(replica.policy(), AckPolicy::Disk);
    let linked = replica.accept_link(&node("a"), Term(2), COPY);
    assert_eq!(linked, Ok(vec![ack(2, point(1, 4)), Action::EraseId(COPY)]));
    assert_eq!(replica.staged(point(2, 5)), Ok(vec![ack(2, point(1, 4))]));
    assert_eq!(replica.id_erased(COPY), vec![ack(2, point(2, 5))]);
}

#[test]
fn a_seed_ends_what_the_copy_was() {
    let mut replica = follower(AckPolicy::Disk);
    replica.change_policy(AckPolicy::Memory);
    assert_eq!(replica.accept_seed(&node("a"), Term(3)), Ok(()));
    assert_eq!((replica.copy(), replica.acked()), (&Copy::Inconsistent, None));
    assert_eq!(replica.id_erased(COPY), vec![]);
    assert_eq!(replica.policy(), AckPolicy::Memory, "the wish stands");
    let again = ReplicaId(2 << 64);
    let first = Action::Ack(Ack { point: point(3, 9), replica: again, term: Term(3) });
    assert_eq!(replica.whole(point(3, 9), again), Ok(vec![first]));
    assert!(replica.whole(point(3, 9), again).is_err(), "whole already");
    let mut ran = restarted(AckPolicy::Memory, true, Stored { active: true, whole: None });
    ran.accept_seed(&node("a"), Term(3)).unwrap();
    assert!(!ran.is_active());
}
