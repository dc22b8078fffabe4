//! The register of a vm: the one value that decides who runs it and whose acks count.
//!
//! ```text
//!   (absent) --create--> Solo(n) --J acked--> Paired(p, s, replica)
//!                        ^  ^  |                 |   |
//!                        |  |  +---- stop        |   +-- secondary lost, pause: Solo(p)
//!                        |  |        |           +------ promote: Solo(s)
//!                        |  +--------|------- boot or resume by the same node, hand-back
//!                        +-- start --Stopped(n) <------- power-off, stop
//! ```
//!
//! It is changed only by compare-and-set on its exact previous entry. Every change raises the term and carries a
//! proposal id, by which a proposer whose answer was lost finds its own change again.

use serde::{Deserialize, Serialize};
use std::fmt;

use crate::ids::{Incarnation, NodeId, ProposalId, ReplicaId, Term};

/// Who runs the vm.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Value {
    /// One process runs it alone; all its output may go out.
    Solo {
        /// Its node.
        node: NodeId,
        /// The very process.
        incarnation: Incarnation,
    },
    /// It is protected: output goes out when this replica has acked it.
    Paired {
        /// The node that runs it.
        primary: NodeId,
        /// The node that follows.
        secondary: NodeId,
        /// The copy whose acks count, and that may be promoted.
        replica: ReplicaId,
    },
    /// Nobody runs it, and nobody may but by the operator's word.
    Stopped {
        /// The node that ran it last.
        node: NodeId,
        /// Why.
        reason: StopReason,
    },
}

/// Why a vm was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// The guest powered itself off, or ended itself.
    PowerOff,
    /// The operator stopped it.
    Operator,
    /// The guest failed on every node that ran it, as often as is allowed in a row.
    Failed,
}

/// A value of the register with its place in the order of all values.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// One more than that of the entry before; the first is 1.
    pub term: Term,
    /// The proposal that made it.
    pub proposal: ProposalId,
    /// The value.
    pub value: Value,
}

/// A change that somebody wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Proposal {
    /// Its name; the same for every repetition.
    pub id: ProposalId,
    /// The entry that it replaces; none if it creates the register.
    pub expected: Option<Entry>,
    /// The new value.
    pub value: Value,
}

impl Proposal {
    /// The entry that it makes if it is applied.
    pub fn entry(&self) -> Entry {
        let term = self.expected.as_ref().map_or(Term(0), |entry| entry.term).next();
        Entry { term, proposal: self.id, value: self.value.clone() }
    }

    /// What an arbiter that holds `found` answers: the rule of compare-and-set in one place. `Applied` on an entry
    /// that is not `found` means that it must be written first.
    pub fn judge(&self, found: Option<&Entry>) -> Answer {
        match found {
            Some(entry) if entry.proposal == self.id => Answer::Applied(entry.clone()),
            found if found == self.expected.as_ref() => Answer::Applied(self.entry()),
            found => Answer::Refused(found.cloned()),
        }
    }
}

/// What the arbiter says to a proposal. No answer at all means that the outcome is unknown.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The register holds the proposal's own entry.
    Applied(Entry),
    /// The register holds something else. The proposal may have been applied and overtaken.
    Refused(Option<Entry>),
}

impl Value {
    /// The node that runs the vm, or ran it last.
    pub fn runner(&self) -> &NodeId {
        match self {
            Self::Solo { node, .. } | Self::Stopped { node, .. } => node,
            Self::Paired { primary, .. } => primary,
        }
    }

    /// Whether exactly this process holds the vm alone.
    pub fn is_solo_of(&self, me: &NodeId, process: Incarnation) -> bool {
        matches!(self, Self::Solo { node, incarnation } if node == me && *incarnation == process)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Solo { node, .. } => write!(f, "solo on {node}"),
            Self::Paired { primary, secondary, .. } => write!(f, "on {primary}, protected by {secondary}"),
            Self::Stopped { node, reason } => write!(f, "stopped ({reason}), ran last on {node}"),
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "powered off",
            Self::Operator => "by the operator",
            Self::Failed => "the guest failed",
        })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.value, self.term)
    }
}

#[cfg(test)]
mod tests {
    use super::{Answer, Proposal, Value};
    use crate::ids::{Incarnation, ProposalId, Term};

    fn solo(id: u128, expected: Option<super::Entry>) -> Proposal {
        let value = Value::Solo { node: "a".parse().unwrap(), incarnation: Incarnation(id) };
        Proposal { id: ProposalId(id), expected, value }
    }

    #[test]
    fn a_proposal_is_judged_by_the_exact_entry_before_it() {
        let create = solo(1, None);
        let first = create.entry();
        assert_eq!(first.term, Term(1));
        assert_eq!(create.judge(None), Answer::Applied(first.clone()));
        assert_eq!(create.judge(Some(&first)), Answer::Applied(first.clone()), "found again");
        let second = solo(2, Some(first.clone()));
        assert_eq!(second.judge(Some(&first)), Answer::Applied(second.entry()));
        assert_eq!(second.entry().term, Term(2));
        assert_eq!(second.judge(None), Answer::Refused(None));
        let late = solo(3, Some(first.clone()));
        assert_eq!(late.judge(Some(&second.entry())), Answer::Refused(Some(second.entry())));
        assert_eq!(create.judge(Some(&second.entry())), Answer::Refused(Some(second.entry())), "overtaken");
    }
}
