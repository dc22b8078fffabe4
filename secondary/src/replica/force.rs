//! Running the guest by the operator's word alone, where nobody may by himself: both nodes were down, or the one that ran
//! it is gone for good. What was let out after the point that this node has is lost by that. What makes it safe beyond
//! that loss is the operator's second word, that no other node runs the guest: it counts for one node and one term of the
//! register, since a node that was started again has raised the term.

use colo_common::register::{Entry, Value};
use colo_common::{NodeId, Term};
use std::collections::BTreeMap;

use super::{Action, Copy, Kind, NotMine, Replica};

/// Confirmations that are kept, far more than a vm has nodes; the oldest by name goes first.
const MAX_CONFIRMED: usize = 64;

/// Nodes of which the operator has said that they do not run the guest, each with the term of the register in which.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fences(BTreeMap<NodeId, Term>);

impl Fences {
    /// The operator says so of `node`, in `term`.
    pub fn confirm(&mut self, node: NodeId, term: Term) {
        if self.0.len() >= MAX_CONFIRMED {
            self.0.pop_first();
        }
        self.0.insert(node, term);
    }

    /// Whether `node` cannot run the guest by any entry of `term`.
    pub fn hold(&self, node: &NodeId, term: Term) -> bool {
        self.0.get(node) == Some(&term)
    }
}

/// The nodes that may run the guest by this entry, beside `me`.
pub fn others<'a>(entry: &'a Entry, me: &NodeId) -> Vec<&'a NodeId> {
    let named = match &entry.value {
        Value::Solo { node, .. } => vec![node],
        Value::Paired { primary, secondary, .. } => vec![primary, secondary],
        Value::Stopped { .. } => Vec::new(),
    };
    named.into_iter().filter(|node| *node != me).collect()
}

impl Replica {
    /// The operator has this node run the guest from the newest whole point that it has, whatever the register says, or
    /// from its disk if it ran the guest itself. The register was just read.
    ///
    /// # Errors
    /// A node that may run the guest is not fenced in this very term, this node follows one that lives, or it has
    /// nothing to run the guest from: a copy that is in the middle of a seed cannot be promoted, by force either.
    pub fn promote_by_force(
        &mut self,
        found: Option<&Entry>,
        fences: &Fences,
    ) -> Result<Vec<Action>, NotMine> {
        let entry = found.ok_or(NotMine::Absent)?;
        if self.pending.is_some() {
            return Err(NotMine::Proposing);
        }
        if let Some(runner) = self.source() {
            return Err(NotMine::Followed(runner.clone()));
        }
        let unfenced = |node: &&NodeId| !fences.hold(node, entry.term) && !self.mutation.force_unfenced;
        if let Some(node) = others(entry, &self.me).into_iter().find(unfenced) {
            return Err(NotMine::NotFenced { node: node.clone(), term: entry.term });
        }
        let kind = match self.copy {
            Copy::Whole { staged: point, .. } | Copy::Stale { point } => Kind::Promote(point),
            Copy::Nothing if self.active => Kind::Boot,
            Copy::Nothing | Copy::Inconsistent => return Err(NotMine::NoCopy),
        };
        self.fence = self.fence.max(entry.term);
        Ok(vec![self.propose(kind, entry)])
    }
}

#[cfg(test)]
mod tests {
    use super::{Fences, MAX_CONFIRMED, others};
    use crate::replica::{AckPolicy, Action, NotMine, Replica, Rules, Start, Stored};
    use colo_common::history::point;
    use colo_common::register::{Answer, Entry, StopReason, Value};
    use colo_common::{Incarnation, NodeId, ProposalId, ReplicaId, Term};

    const ME: Incarnation = Incarnation(7);

    fn node(name: &str) -> NodeId {
        name.parse().unwrap()
    }

    fn entry(term: u64, value: Value) -> Entry {
        Entry { term: Term(term), proposal: ProposalId(u128::from(term)), value }
    }

    fn paired(term: u64) -> Entry {
        let (primary, secondary) = (node("a"), node("b"));
        entry(term, Value::Paired { primary, secondary, replica: ReplicaId(3) })
    }

    fn solo(term: u64, name: &str) -> Entry {
        entry(term, Value::Solo { node: node(name), incarnation: Incarnation(1) })
    }

    fn fenced(name: &str, term: u64) -> Fences {
        let mut fences = Fences::default();
        fences.confirm(node(name), Term(term));
        fences
    }

    fn replica(stored: Stored) -> Replica {
        let rules = Rules { policy: AckPolicy::Memory, boot_after_crash: false };
        Replica::new(node("b"), ME, rules, stored)
    }

    fn stale() -> Replica {
        replica(Stored { active: false, whole: Some((point(1, 9), None)) })
    }

    fn begun(replica: &mut Replica, found: &Entry, fences: &Fences) -> Start {
        let actions = replica.promote_by_force(Some(found), fences).unwrap();
        let [Action::Propose(proposal)] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!(proposal.expected.as_ref(), Some(found));
        assert_eq!(replica.check_runner(found.term), Err(crate::replica::Refusal::Promoting));
        let answered = replica.answer(proposal.id, Answer::Applied(proposal.entry()));
        let [Action::Run(start, _)] = &answered[..] else { panic!("{answered:?}") };
        *start
    }

    #[test]
    fn a_copy_that_nobody_vouches_for_runs_by_two_words_of_the_operator() {
        let found = paired(4);
        assert_eq!(stale().promote(Some(&found)), Err(NotMine::NoCopy), "not by one");
        let unfenced = NotMine::NotFenced { node: node("a"), term: Term(4) };
        for fences in [Fences::default(), fenced("b", 4), fenced("a", 3), fenced("a", 5)] {
            assert_eq!(stale().promote_by_force(Some(&found), &fences), Err(unfenced.clone()));
        }
        assert_eq!(begun(&mut stale(), &found, &fenced("a", 4)), Start::Promote(point(1, 9)));
        assert_eq!(begun(&mut stale(), &solo(6, "a"), &fenced("a", 6)), Start::Promote(point(1, 9)));
        // Nobody runs it.
        let stopped = entry(6, Value::Stopped { node: node("a"), reason: StopReason::Operator });
        assert_eq!(begun(&mut stale(), &stopped, &Fences::default()), Start::Promote(point(1, 9)));
        // A dead process of this very node: its directory is locked.
        assert_eq!(begun(&mut stale(), &solo(6, "b"), &Fences::default()), Start::Promote(point(1, 9)));
    }

    #[test]
    fn a_node_that_ran_the_guest_boots_it() {
        let mut active = replica(Stored { active: true, whole: None });
        let found =
            entry(4, Value::Paired { primary: node("b"), secondary: node("a"), replica: ReplicaId(3) });
        assert_eq!(begun(&mut active, &found, &fenced("a", 4)), Start::Boot);
    }

    #[test]
    fn nothing_else_runs_by_force() {
        let fences = fenced("a", 4);
        let mut empty = replica(Stored::default());
        assert_eq!(empty.promote_by_force(Some(&paired(4)), &fences), Err(NotMine::NoCopy));
        assert_eq!(stale().promote_by_force(None, &fences), Err(NotMine::Absent));
        let mut seeded = stale();
        seeded.accept_seed(&node("a"), Term(4)).unwrap();
        let followed = Err(NotMine::Followed(node("a")));
        assert_eq!(seeded.promote_by_force(Some(&solo(4, "a")), &fences), followed);
        seeded.link_lost();
        assert_eq!(seeded.promote_by_force(Some(&solo(4, "a")), &fences), Err(NotMine::NoCopy));
        let mut twice = stale();
        twice.promote_by_force(Some(&paired(4)), &fences).unwrap();
        assert_eq!(twice.promote_by_force(Some(&paired(4)), &fences), Err(NotMine::Proposing));
    }

    #[test]
    fn whoever_may_run_it_is_fenced_and_confirmations_are_bounded() {
        assert_eq!(others(&paired(1), &node("c")), [&node("a"), &node("b")]);
        assert_eq!(others(&paired(1), &node("a")), [&node("b")]);
        let mut fences = Fences::default();
        (0..2 * MAX_CONFIRMED).for_each(|n| fences.confirm(node(&format!("n{n:03}")), Term(1)));
        assert!(fences.0.len() <= MAX_CONFIRMED);
        assert!(fences.hold(&node(&format!("n{:03}", 2 * MAX_CONFIRMED - 1)), Term(1)));
    }
}
