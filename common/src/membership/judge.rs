//! The rule of claims in one place: what every kind of membership answers to one, whatever it keeps things in.

use super::{Claim, ClaimRefusal, NodeRecord, NodeRole};
use crate::register::Entry;

/// What was found in one instant.
#[derive(Debug, Default)]
pub(super) struct Sight<'a> {
    /// The register of the claim's vm.
    pub(super) register: Option<&'a Entry>,
    /// The record of the node's spare.
    pub(super) spare: Option<&'a NodeRecord>,
    /// The record of the node's process that is bound to the claim's vm.
    pub(super) bound: Option<&'a NodeRecord>,
    /// The claim on the node.
    pub(super) claim: Option<&'a Claim>,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was granted before.
    Already,
    /// Write it, to end with the record of the spare.
    WithSpare,
    /// Write it, to end with the record of the bound process.
    WithBound,
    /// Change nothing.
    Refused(ClaimRefusal),
}

/// Judges a claim.
pub(super) fn judge(claim: &Claim, sight: &Sight<'_>) -> Verdict {
    if sight.register != Some(&claim.expected) {
        return Verdict::Refused(ClaimRefusal::RegisterMoved(sight.register.cloned()));
    }
    let is_it = |record: &&NodeRecord| record.incarnation == claim.node_incarnation;
    let (spare, bound) = (sight.spare.filter(is_it), sight.bound.filter(is_it));
    if spare.is_none() && bound.is_none() {
        return Verdict::Refused(ClaimRefusal::Gone);
    }
    let write = if spare.is_some() { Verdict::WithSpare } else { Verdict::WithBound };
    // One on a process that has died counts for nothing.
    match sight.claim.filter(|other| other.node_incarnation == claim.node_incarnation) {
        Some(other) if other == claim => return Verdict::Already,
        // That register has moved on to the claimant's entry, so nobody needs the older claim any more.
        Some(other)
            if other.vm == claim.vm
                && (other.incarnation == claim.incarnation || other.term() < claim.term()) =>
        {
            return write;
        }
        Some(other) => return Verdict::Refused(ClaimRefusal::ClaimedBy(Box::new(other.clone()))),
        None => {}
    }
    match spare {
        Some(spare) if spare.draining => Verdict::Refused(ClaimRefusal::Draining),
        Some(spare) if spare.role == NodeRole::Spare => write,
        _ => Verdict::Refused(ClaimRefusal::Busy(claim.vm.clone())),
    }
}
