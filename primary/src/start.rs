//! What a primary's start may do: the part of the register's rule that decides before anything runs. Pure.
//!
//! ```text
//!   noted: starting (synced)     granted: Solo(this)     noted: active, not starting (synced)     first vCPU
//!   ------------|------------------------|----------------------------|---------------------------|------->
//!               +-- a crash in here: nothing ran, and the next start goes on as the same process -+
//! ```
//!
//! So a crash at any instant leaves a vm that can be started: what was allowed once needs no second word, and what ran
//! does. The next start takes the incarnation of the one that was cut off: what that one still has on its way to the
//! arbiter is then this one's own proposal, whichever of the two lands.

use colo_common::register::{Entry, Proposal, Value};
use colo_common::vmdir::Runner;
use colo_common::{Incarnation, NodeId, ProposalId, Term};

/// What the operator allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// `on_crash = boot`: boot from disk a guest that this node ran when it crashed.
    pub boot_after_crash: bool,
    /// Start a stopped vm again.
    pub start_again: bool,
}

/// Why nothing is started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotStarted {
    /// The register is gone, or is another one.
    #[error(
        "this node has seen {seen} of the vm and the arbiter has no register of it: is it the right arbiter? If its registers were lost, restore them; remove this node's directory only if the vm is to begin anew"
    )]
    RegisterGone {
        /// What this node has seen.
        seen: Term,
    },
    /// The vm is another's.
    #[error(
        "the register says: {0}. This node must not run it: start colo-secondary here, so that it follows"
    )]
    NotOurs(Entry),
    /// It was this node's, and this node has nothing to run it from.
    #[error(
        "the register says: {0}, and this node did not run the guest when it went down: start colo-secondary here if it holds a copy"
    )]
    NothingToRun(Entry),
    /// It crashed here, and is not to be booted by itself.
    #[error(
        "the register says: {0}, and the guest's memory was lost with the process that ran it: set on_crash = \"boot\" to boot the guest anew from its disk"
    )]
    Crashed(Entry),
    /// It was stopped.
    #[error("the register says: {0}. Start it again with --again")]
    Stopped(Entry),
}

/// The change of the register without which nothing may run.
///
/// # Errors
/// Nothing may be started here.
pub fn decide(
    me: &NodeId,
    incarnation: Incarnation,
    found: Option<&Entry>,
    known: Option<Runner>,
    allowed: Allowed,
) -> Result<Proposal, NotStarted> {
    let known = known.unwrap_or_default();
    let active = known.active.is_some();
    match found {
        None if known.seen > Term(0) => return Err(NotStarted::RegisterGone { seen: known.seen }),
        None => {}
        Some(entry) => match &entry.value {
            // A start that had its grant and was cut off before a vCPU ran.
            Value::Solo { node, incarnation } if node == me && known.starting == Some(*incarnation) => {}
            Value::Solo { node, .. } if node == me && !active => {
                return Err(NotStarted::NothingToRun(entry.clone()));
            }
            Value::Solo { node, .. } if node == me && !allowed.boot_after_crash => {
                return Err(NotStarted::Crashed(entry.clone()));
            }
            Value::Solo { node, .. } if node == me => {}
            Value::Stopped { node, .. } if node == me && active && allowed.start_again => {}
            Value::Stopped { node, .. } if node == me && active => {
                return Err(NotStarted::Stopped(entry.clone()));
            }
            _ => return Err(NotStarted::NotOurs(entry.clone())),
        },
    }
    let term = found.map_or(Term(0), |entry| entry.term);
    let value = Value::Solo { node: me.clone(), incarnation };
    Ok(Proposal { id: ProposalId::of(incarnation, term), expected: found.cloned(), value })
}

#[cfg(test)]
mod tests {
    use super::{Allowed, NotStarted, decide};
    use colo_common::register::{Entry, StopReason, Value};
    use colo_common::vmdir::Runner;
    use colo_common::{Incarnation, NodeId, ProposalId, ReplicaId, Term};

    const ME: Incarnation = Incarnation(9);
    const ALL: Allowed = Allowed { boot_after_crash: true, start_again: true };
    const NONE: Allowed = Allowed { boot_after_crash: false, start_again: false };

    fn node(name: &str) -> NodeId {
        name.parse().unwrap()
    }

    fn entry(value: Value) -> Entry {
        Entry { term: Term(5), proposal: ProposalId(1), value }
    }

    fn ran(active: bool) -> Option<Runner> {
        Some(Runner { seen: Term(5), active: active.then_some(Term(4)), starting: None })
    }

    fn noted(runner: Option<Runner>, process: Incarnation) -> Option<Runner> {
        Some(Runner { starting: Some(process), ..runner.unwrap_or_default() })
    }

    fn solo(name: &str, incarnation: Incarnation) -> Entry {
        entry(Value::Solo { node: node(name), incarnation })
    }

    fn start(found: Option<&Entry>, known: Option<Runner>, allowed: Allowed) -> Result<Term, NotStarted> {
        decide(&node("a"), ME, found, known, allowed).map(|proposal| {
            assert!(proposal.value.is_solo_of(&node("a"), ME));
            assert_eq!(proposal.expected.as_ref(), found);
            proposal.entry().term
        })
    }

    #[test]
    fn a_new_vm_is_created_only_where_none_was_ever_seen() {
        assert_eq!(start(None, None, NONE), Ok(Term(1)));
        assert_eq!(start(None, ran(true), ALL), Err(NotStarted::RegisterGone { seen: Term(5) }));
    }

    #[test]
    fn a_crashed_guest_is_booted_only_by_who_ran_it_and_only_if_allowed() {
        let (ours, theirs) = (solo("a", Incarnation(1)), solo("b", Incarnation(1)));
        assert_eq!(start(Some(&ours), ran(true), ALL), Ok(Term(6)));
        assert!(matches!(start(Some(&ours), ran(true), NONE), Err(NotStarted::Crashed(_))));
        assert!(matches!(start(Some(&ours), ran(false), ALL), Err(NotStarted::NothingToRun(_))));
        assert!(matches!(start(Some(&ours), None, ALL), Err(NotStarted::NothingToRun(_))));
        assert!(matches!(start(Some(&theirs), ran(true), ALL), Err(NotStarted::NotOurs(_))));
    }

    /// Nothing ran under the incarnation that is noted: neither the creation of a vm, nor a boot after a crash, nor a
    /// start after a stop, each granted once, is in need of another word.
    #[test]
    fn a_start_that_was_cut_off_before_its_guest_ran_is_gone_on_with() {
        assert_eq!(start(None, noted(None, ME), NONE), Ok(Term(1)));
        let granted = solo("a", ME);
        for known in [None, ran(true), ran(false)] {
            assert_eq!(start(Some(&granted), noted(known, ME), NONE), Ok(Term(6)));
        }
        let other = solo("a", Incarnation(1));
        assert!(matches!(start(Some(&other), noted(ran(true), ME), NONE), Err(NotStarted::Crashed(_))));
        assert!(matches!(start(Some(&other), noted(None, ME), ALL), Err(NotStarted::NothingToRun(_))));
        let theirs = solo("b", ME);
        assert!(matches!(start(Some(&theirs), noted(ran(true), ME), ALL), Err(NotStarted::NotOurs(_))));
        // The word to start it again was not granted then: it counts for that start alone.
        let stopped = entry(Value::Stopped { node: node("a"), reason: StopReason::Operator });
        assert!(matches!(start(Some(&stopped), noted(ran(true), ME), NONE), Err(NotStarted::Stopped(_))));
        assert_eq!(start(None, noted(ran(true), ME), NONE), Err(NotStarted::RegisterGone { seen: Term(5) }));
    }

    #[test]
    fn a_protected_vm_is_never_booted_and_a_stopped_one_on_the_operators_word() {
        let (primary, secondary) = (node("a"), node("b"));
        let paired = entry(Value::Paired { primary, secondary, replica: ReplicaId(1) });
        assert!(matches!(start(Some(&paired), ran(true), ALL), Err(NotStarted::NotOurs(_))));
        let stopped = |name| entry(Value::Stopped { node: node(name), reason: StopReason::Operator });
        let (ours, theirs) = (stopped("a"), stopped("b"));
        assert_eq!(start(Some(&ours), ran(true), ALL), Ok(Term(6)));
        assert!(matches!(start(Some(&ours), ran(true), NONE), Err(NotStarted::Stopped(_))));
        assert!(matches!(start(Some(&ours), ran(false), ALL), Err(NotStarted::NotOurs(_))));
        assert!(matches!(start(Some(&theirs), ran(true), ALL), Err(NotStarted::NotOurs(_))));
    }
}
