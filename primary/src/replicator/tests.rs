//! The runner, transition by transition.

use colo_common::history::point;
use colo_common::register::{Answer, Entry, Proposal, StopReason, Value};
use colo_common::{History, Incarnation, NodeId, Point, ProposalId, ReplicaId, Term};

use super::{Ack, Action, Carried, End, Entitled, Offer, PeerError, Phase, Replicator, Request};

const ME: Incarnation = Incarnation(7);
const COPY: ReplicaId = ReplicaId(1 << 64);

/// The pages of an epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Pages(Vec<u32>);

impl Carried for Pages {
    fn merge(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

type Actions = Vec<Action<Pages>>;

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

fn solo(name: &str, process: Incarnation) -> Value {
    Value::Solo { node: node(name), incarnation: process }
}

fn entry(term: u64, value: Value) -> Entry {
    Entry { term: Term(term), proposal: ProposalId(u128::from(term)), value }
}

fn alone() -> Replicator<Pages> {
    Replicator::new(node("a"), ME, entry(1, solo("a", ME)), History::default())
}

fn ack(term: u64, at: Point) -> Ack {
    Ack { point: at, replica: COPY, term: Term(term) }
}

fn proposal(actions: &Actions) -> Proposal {
    let mut found = actions.iter().filter_map(|action| match action {
        Action::Propose(proposal) => Some(proposal.clone()),
        _ => None,
    });
    let proposal = found.next().unwrap_or_else(|| panic!("no proposal in {actions:?}"));
    assert_eq!(found.next(), None, "two proposals at a time");
    proposal
}

/// Its proposal is applied.
fn grant(replicator: &mut Replicator<Pages>, proposal: &Proposal) -> Actions {
    replicator.answer(proposal.id, Answer::Applied(proposal.entry()))
}

fn joining() -> Replicator<Pages> {
    let mut replicator = alone();
    replicator.seed(node("b")).unwrap();
    assert_eq!(replicator.entitled(), Entitled::All, "while seeding output goes out");
    let (join, ship, actions) = replicator.cut(Pages(vec![1]), None, true);
    assert_eq!((join, ship, actions), (point(1, 1), true, vec![]));
    replicator
}

fn pairing() -> (Replicator<Pages>, Proposal) {
    let mut replicator = joining();
    let actions = replicator.ack(ack(1, point(1, 1))).unwrap();
    let proposal = proposal(&actions);
    (replicator, proposal)
}

fn paired() -> Replicator<Pages> {
    let (mut replicator, proposal) = pairing();
    assert_eq!(grant(&mut replicator, &proposal), vec![]);
    replicator
}

fn offer(replica: ReplicaId, staged: Point) -> Offer {
    Offer { replica: Some(replica), staged: Some(staged), ..Offer::default() }
}

#[test]
fn output_is_held_from_the_cut_of_j_until_the_register_has_answered() {
    let mut replicator = joining();
    assert_eq!(replicator.entitled(), Entitled::UpTo(point(1, 1).epoch));
    replicator.cut(Pages(vec![2]), None, false);
    assert_eq!(replicator.entitled(), Entitled::UpTo(point(1, 1).epoch));
    let pair = proposal(&replicator.ack(ack(1, point(1, 2))).unwrap());
    let value = Value::Paired { primary: node("a"), secondary: node("b"), replica: COPY };
    assert_eq!((&pair.value, pair.expected.clone().unwrap().term), (&value, Term(1)));
    assert_eq!(replicator.ack(ack(1, point(1, 2))), Ok(vec![]), "an ack of the seed is none of the pair");
    assert_eq!(replicator.entitled(), Entitled::UpTo(point(1, 1).epoch));
    grant(&mut replicator, &pair);
    assert_eq!(replicator.entitled(), Entitled::Nothing, "acks of the term before do not count");
    assert_eq!(replicator.ack(ack(1, point(1, 2))), Ok(vec![]));
    assert_eq!(replicator.entitled(), Entitled::Nothing);
    assert_eq!(replicator.ack(ack(2, point(1, 2))), Ok(vec![]));
    assert_eq!(replicator.entitled(), Entitled::UpTo(point(1, 2).epoch));
    assert_eq!(replicator.next_point(), point(2, 3));
}

#[test]
fn a_join_that_loses_its_link_is_void() {
    let mut replicator = joining();
    assert_eq!(replicator.link_lost(), vec![Action::MergeBack(Pages(vec![1]))]);
    assert_eq!((replicator.phase(), replicator.entitled()), (&Phase::Alone, Entitled::All));
    assert_eq!(replicator.ack(ack(1, point(1, 1))), Ok(vec![]), "its late ack proposes nothing");
    replicator.seed(node("b")).unwrap();
    replicator.cut(Pages(vec![2]), None, true);
    assert_eq!(replicator.ack(ack(1, point(1, 1))), Ok(vec![]), "nor for the next J");
    assert_eq!(replicator.go_solo(), vec![Action::MergeBack(Pages(vec![2])), Action::Detach]);
    assert_eq!(replicator.entitled(), Entitled::All);
}

#[test]
fn the_link_may_be_lost_while_paired_is_proposed() {
    let (mut replicator, pair) = pairing();
    replicator.cut(Pages(vec![2]), None, false);
    assert_eq!(replicator.link_lost(), vec![Action::MergeBack(Pages(vec![2]))]);
    assert_eq!(replicator.entitled(), Entitled::UpTo(point(1, 1).epoch), "still held: it may be granted");
    let offer = offer(COPY, point(1, 1));
    assert!(matches!(replicator.relink(&node("b"), &offer), Err(PeerError::NotNow(_))));
    grant(&mut replicator, &pair);
    assert_eq!(replicator.relink(&node("b"), &offer), Ok(point(1, 1)));
}

#[test]
fn what_failed_is_carried_by_the_next_epoch() {
    let mut replicator = paired();
    for page in [10, 11, 12] {
        assert!(replicator.cut(Pages(vec![page]), None, false).1);
    }
    replicator.ack(ack(2, point(2, 2))).unwrap();
    assert_eq!(replicator.in_flight(), 2);
    assert_eq!(replicator.link_lost(), vec![Action::MergeBack(Pages(vec![11, 12]))]);
    let (_, ship, actions) = replicator.cut(Pages(vec![13]), None, false);
    assert_eq!((ship, actions), (false, vec![Action::MergeBack(Pages(vec![13]))]), "nobody can have got it");
    assert_eq!(replicator.in_flight(), 0);
    let (mut seeding, _) = (alone(), ());
    seeding.seed(node("b")).unwrap();
    let (_, ship, actions) = seeding.cut(Pages(vec![1]), None, false);
    assert_eq!((ship, actions), (false, vec![Action::MergeBack(Pages(vec![1]))]), "J carries it");
}

#[test]
fn peers_that_cannot_be_are_refused() {
    let mut replicator = paired();
    let unknown = ack(2, point(2, 9));
    assert_eq!(replicator.ack(unknown), Err(PeerError::UnknownPoint(point(2, 9))));
    let other = Ack { replica: ReplicaId(5), ..ack(2, point(1, 1)) };
    assert!(matches!(replicator.ack(other), Err(PeerError::OtherReplica { .. })));
    replicator.link_lost();
    let stranger = offer(COPY, point(1, 1));
    assert!(matches!(replicator.relink(&node("c"), &stranger), Err(PeerError::OtherReplica { .. })));
    let diverged = offer(COPY, point(1, 4));
    assert_eq!(replicator.relink(&node("b"), &diverged), Err(PeerError::UnknownPoint(point(1, 4))));
    assert!(matches!(replicator.seed(node("c")), Err(PeerError::NotNow(_))));
}

#[test]
fn alone_again_only_when_it_is_granted() {
    let mut replicator = paired();
    replicator.cut(Pages(vec![1]), None, false);
    replicator.link_lost();
    let alone = proposal(&replicator.go_solo());
    assert_eq!(replicator.go_solo(), vec![], "one at a time");
    assert_eq!(replicator.entitled(), Entitled::Nothing);
    assert_eq!(replicator.observe(alone.expected.clone()), vec![], "the old value proves nothing");
    assert!(replicator.is_proposing());
    assert_eq!(replicator.answer(ProposalId(99), Answer::Refused(None)), vec![], "not the one that is asked");
    assert_eq!(grant(&mut replicator, &alone), vec![Action::Detach]);
    assert_eq!((replicator.phase(), replicator.entitled()), (&Phase::Alone, Entitled::All));
}

#[test]
fn what_a_copy_lacks_is_told_or_kept() {
    let mut replicator = paired();
    replicator.cut(Pages(vec![1]), None, false);
    let covered = replicator.ack(ack(2, point(2, 2))).unwrap();
    assert_eq!(covered, vec![Action::Covered(point(2, 2), Pages(vec![1]))]);
    replicator.cut(Pages(vec![2]), None, false);
    let alone = proposal(&replicator.go_solo());
    let granted = grant(&mut replicator, &alone);
    assert_eq!(granted, vec![Action::MergeBack(Pages(vec![2])), Action::Detach], "it may not have had that");
    replicator.seed(node("b")).unwrap();
    replicator.cut(Pages(vec![3]), None, true);
    assert_eq!(
        replicator.link_lost(),
        vec![Action::MergeBack(Pages(vec![3]))],
        "J is void, what it carried is not"
    );
}

#[test]
fn a_runner_that_lost_its_vm_knows_where_it_parted() {
    let mut replicator = paired();
    replicator.cut(Pages(vec![1]), None, false);
    replicator.ack(ack(2, point(2, 2))).unwrap();
    replicator.cut(Pages(vec![2]), None, false);
    assert_eq!(replicator.parted(), None);
    let alone = proposal(&replicator.go_solo());
    let actions = replicator.answer(alone.id, Answer::Refused(Some(entry(3, solo("b", Incarnation(8))))));
    assert_eq!(actions, vec![Action::Park, Action::Detach, Action::MergeBack(Pages(vec![2]))]);
    assert_eq!(replicator.parted(), Some(point(2, 2)));
    assert_eq!(replicator.observe(Some(entry(4, solo("a", ME)))), vec![Action::Unpark]);
}

#[test]
fn a_refused_runner_parks_and_takes_back_only_what_nobody_ran() {
    let mut replicator = paired();
    let alone = proposal(&replicator.go_solo());
    let lost = entry(3, solo("b", Incarnation(8)));
    let actions = replicator.answer(alone.id, Answer::Refused(Some(lost.clone())));
    assert_eq!(actions, vec![Action::Park, Action::Detach]);
    assert_eq!((replicator.phase(), replicator.entitled()), (&Phase::Lost { to: lost }, Entitled::Nothing));
    let mut late = replicator.clone();
    let back = entry(4, solo("a", ME));
    assert_eq!(replicator.observe(Some(back.clone())), vec![Action::Unpark]);
    assert_eq!((replicator.register(), replicator.entitled()), (&back, Entitled::All));
    let ran = entry(5, solo("a", ME));
    let over = vec![Action::End(End::Superseded(Some(ran.clone())))];
    assert_eq!(late.observe(Some(ran)), over, "others had it in between");
}

#[test]
fn an_own_paired_that_was_overtaken_counts_as_run() {
    let (mut replicator, pair) = pairing();
    let overtaken = replicator.clone();
    let promoted = entry(3, solo("b", Incarnation(8)));
    replicator.answer(pair.id, Answer::Refused(Some(promoted.clone())));
    assert_eq!(replicator.phase(), &Phase::Lost { to: promoted });
    let mut replicator = overtaken;
    let far = entry(4, solo("b", Incarnation(9)));
    let actions = replicator.answer(pair.id, Answer::Refused(Some(far.clone())));
    assert_eq!(actions.last(), Some(&Action::End(End::Superseded(Some(far)))));
    assert_eq!(replicator.phase(), &Phase::Over);
    let mut replicator = paired();
    let stopped = entry(3, Value::Stopped { node: node("a"), reason: StopReason::Operator });
    let actions = replicator.observe(Some(stopped.clone()));
    assert_eq!(actions.last(), Some(&Action::End(End::Superseded(Some(stopped)))));
}

#[test]
fn a_stop_waits_for_the_answer_and_ends_a_seed() {
    let (mut replicator, pair) = pairing();
    assert_eq!(replicator.stop(StopReason::Operator), vec![]);
    let stop = proposal(&grant(&mut replicator, &pair));
    assert_eq!(stop.expected.as_ref().map(|entry| entry.term), Some(Term(2)));
    let end = vec![Action::Detach, Action::End(End::Stopped(StopReason::Operator))];
    assert_eq!(grant(&mut replicator, &stop), end);
    assert_eq!(replicator.entitled(), Entitled::Nothing);
    let mut replicator = joining();
    let actions = replicator.stop(StopReason::Operator);
    assert_eq!(actions[..2], [Action::MergeBack(Pages(vec![1])), Action::Detach]);
    proposal(&actions);
    assert_eq!(replicator.ack(ack(1, point(1, 1))), Ok(vec![]), "J is void: one proposal at a time");
    assert!(matches!(replicator.seed(node("b")), Err(PeerError::NotNow(_))));
}

#[test]
fn a_stop_that_was_refused_stands_when_the_guest_is_handed_back() {
    let mut replicator = paired();
    let stop = proposal(&replicator.stop(StopReason::Operator));
    replicator.answer(stop.id, Answer::Refused(Some(entry(3, solo("b", Incarnation(8))))));
    let actions = replicator.observe(Some(entry(4, solo("a", ME))));
    assert_eq!(actions.len(), 1, "it does not run: {actions:?}");
    assert!(matches!(proposal(&actions).value, Value::Stopped { .. }));
}

#[test]
fn what_the_guest_asks_for_waits_until_its_epoch_is_out() {
    let mut replicator = paired();
    let (last, _, actions) = replicator.cut(Pages::default(), Some(Request::End), false);
    assert_eq!(actions, vec![]);
    let alone = proposal(&replicator.go_solo());
    assert_eq!(replicator.ack(ack(2, last)), Ok(vec![]), "another proposal is out");
    let stop = proposal(&grant(&mut replicator, &alone));
    assert!(matches!(stop.value, Value::Stopped { reason: StopReason::PowerOff, .. }));
    let mut replicator = paired();
    let (last, ..) = replicator.cut(Pages::default(), Some(Request::Reset), false);
    assert_eq!(replicator.ack(ack(2, last)), Ok(vec![Action::ResetGuest]));
    let mut replicator = alone_cut(Request::Reset);
    let actions = replicator.link_lost();
    assert_eq!(actions.last(), Some(&Action::ResetGuest), "held by J, which is void");
}

/// A runner in Joining whose guest asked for something after J.
fn alone_cut(request: Request) -> Replicator<Pages> {
    let mut replicator = joining();
    assert_eq!(replicator.cut(Pages::default(), Some(request), false).2, vec![]);
    replicator
}
