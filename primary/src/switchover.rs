//! A planned move of the guest to its secondary: the order of things, without input or output; time is an argument.
//!
//! ```text
//!            register answers        rests, all of it acked           register names the secondary
//!   Asking -------------------> Stopping -------------------> Yielded -----------------------------> moved
//!     | no answer                  | link lost, no ack           | too long: Solo is proposed
//!     v                            v                             v granted
//!   refused: the guest never    given up: the guest runs      given up: the guest runs on without protection,
//!   stopped                     on, protected                 until the secondary is linked again
//! ```
//!
//! The point of no return is the secondary's proposal. Before [`Step::Yield`] nobody has been told of anything, so giving
//! up costs the time that the guest stood. After it only the register can tell whether the secondary has taken the guest,
//! so this node asks it for `Solo`: granted, it fences the secondary's proposal. Nothing here is needed for safety: a
//! yield is a suspicion that the runner itself raises, and rule 4 decides as ever.

use std::time::Duration;

use crate::replicator::Phase;

/// How long the register may take to answer before the guest is stopped: with an arbiter that is away, nothing can move.
const READ_LIMIT: Duration = Duration::from_secs(3);
/// How long the guest may stand until all of it is acked.
const STOP_LIMIT: Duration = Duration::from_secs(3);
/// How long the secondary may take to have the register.
const YIELD_LIMIT: Duration = Duration::from_secs(3);

/// Why a switchover was given up. The guest runs on where it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Abort {
    /// The register was not read in time.
    #[error("the arbiter does not answer, and without it no node can take the guest: the guest runs on here")]
    Arbiter,
    /// The link was lost before the secondary had everything.
    #[error("the link to the secondary has ended before it had everything: the guest runs on here")]
    Link,
    /// The secondary did not ack in time.
    #[error("the secondary did not ack the last epoch within {} s: the guest runs on here", STOP_LIMIT.as_secs())]
    Ack,
    /// It did not take over.
    #[error(
        "the secondary did not take the guest over within {} s: the guest runs on here, and is protected again once the secondary is linked; look at its status for the reason",
        YIELD_LIMIT.as_secs()
    )]
    NotTaken,
    /// The vm ends, or its guest has failed.
    #[error("the vm is being stopped, or its guest has failed")]
    Ending,
    /// The register or protection has changed under it.
    #[error("the vm is not protected any more: look at its status")]
    Unprotected,
}

/// What the node sees.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Where the protection stands.
    pub phase: &'a Phase,
    /// Epochs can be sent.
    pub linked: bool,
    /// A proposal has no answer yet.
    pub proposing: bool,
    /// The register has answered since the switchover was asked for.
    pub answered: bool,
    /// The guest stands after a cut that was sent.
    pub rests: bool,
    /// Everything that was cut is acked.
    pub acked: bool,
    /// The vm is to stop, or its guest has failed.
    pub ending: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing but what goes on.
    Wait,
    /// Tell the secondary to take over.
    Yield,
    /// Propose to run alone.
    Fence,
    /// Let the guest run on here, if it stands for this.
    GiveUp(Abort),
    /// The secondary has the guest.
    Moved,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Asking,
    Stopping,
    Yielded,
}

/// A switchover that goes on.
#[derive(Clone, Copy, Debug)]
pub struct Switchover {
    stage: Stage,
    /// When this stage began, by whatever clock.
    since: Duration,
}

impl Switchover {
    /// One that is asked for at `now`. The register is to be read.
    pub fn new(now: Duration) -> Self {
        Self { stage: Stage::Asking, since: now }
    }

    /// Whether the guest is to stand from its next cut on.
    pub fn holds_guest(&self) -> bool {
        self.stage != Stage::Asking
    }

    /// Whether the secondary was told: the register is to be read again and again.
    pub fn has_yielded(&self) -> bool {
        self.stage == Stage::Yielded
    }

    /// What follows from what the node sees.
    pub fn step(&mut self, view: View<'_>, now: Duration) -> Step {
        let late = |limit| now.saturating_sub(self.since) > limit;
        if view.ending {
            return Step::GiveUp(Abort::Ending);
        }
        match (self.stage, view.phase) {
            (Stage::Yielded, Phase::Lost { .. } | Phase::Over) => Step::Moved,
            (Stage::Yielded, Phase::Alone) => Step::GiveUp(Abort::NotTaken),
            (Stage::Yielded, _) if late(YIELD_LIMIT) && !view.proposing => Step::Fence,
            (Stage::Yielded, _) => Step::Wait,
            (_, Phase::Paired { .. }) if view.proposing => Step::GiveUp(Abort::Unprotected),
            (_, Phase::Paired { .. }) if !view.linked => Step::GiveUp(Abort::Link),
            (Stage::Asking, Phase::Paired { .. }) if view.answered => {
                (self.stage, self.since) = (Stage::Stopping, now);
                Step::Wait
            }
            (Stage::Asking, Phase::Paired { .. }) if late(READ_LIMIT) => Step::GiveUp(Abort::Arbiter),
            (Stage::Asking, Phase::Paired { .. }) => Step::Wait,
            (Stage::Stopping, Phase::Paired { .. }) if view.rests && view.acked => {
                (self.stage, self.since) = (Stage::Yielded, now);
                Step::Yield
            }
            (Stage::Stopping, Phase::Paired { .. }) if late(STOP_LIMIT) => Step::GiveUp(Abort::Ack),
            (Stage::Stopping, Phase::Paired { .. }) => Step::Wait,
            _ => Step::GiveUp(Abort::Unprotected),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Abort, READ_LIMIT, STOP_LIMIT, Step, Switchover, View, YIELD_LIMIT};
    use crate::replicator::Phase;
    use colo_common::ReplicaId;
    use colo_common::register::{Entry, Value};
    use colo_common::{Incarnation, ProposalId, Term};
    use std::time::Duration;

    const MOMENT: Duration = Duration::from_millis(1);

    fn paired() -> Phase {
        Phase::Paired { peer: "b".parse().unwrap(), replica: ReplicaId(1) }
    }

    fn lost() -> Phase {
        let value = Value::Solo { node: "b".parse().unwrap(), incarnation: Incarnation(2) };
        Phase::Lost { to: Entry { term: Term(3), proposal: ProposalId(1), value } }
    }

    fn quiet(phase: &Phase) -> View<'_> {
        View {
            phase,
            linked: true,
            proposing: false,
            answered: true,
            rests: false,
            acked: false,
            ending: false,
        }
    }

    fn stopping(phase: &Phase) -> Switchover {
        let mut plan = Switchover::new(Duration::ZERO);
        assert!(!plan.holds_guest());
        assert_eq!(plan.step(quiet(phase), MOMENT), Step::Wait);
        assert!(plan.holds_guest() && !plan.has_yielded());
        plan
    }

    fn yielded(phase: &Phase) -> Switchover {
        let mut plan = stopping(phase);
        assert_eq!(
            plan.step(View { acked: true, ..quiet(phase) }, MOMENT),
            Step::Wait,
            "the guest still runs"
        );
        assert_eq!(
            plan.step(View { rests: true, ..quiet(phase) }, MOMENT),
            Step::Wait,
            "nobody has all of it"
        );
        assert_eq!(plan.step(View { rests: true, acked: true, ..quiet(phase) }, MOMENT), Step::Yield);
        assert!(plan.has_yielded());
        plan
    }

    #[test]
    fn the_guest_stops_is_acked_and_goes() {
        let (paired, lost) = (paired(), lost());
        let mut plan = yielded(&paired);
        // The link ends when the secondary takes over: no sign of anything.
        assert_eq!(plan.step(View { linked: false, ..quiet(&paired) }, MOMENT), Step::Wait);
        assert_eq!(plan.step(quiet(&lost), MOMENT * 2), Step::Moved);
    }

    #[test]
    fn before_the_yield_it_is_given_up_and_the_vm_stays_protected() {
        let paired = paired();
        let mut plan = Switchover::new(Duration::ZERO);
        let silent = View { answered: false, ..quiet(&paired) };
        assert_eq!(plan.step(silent, READ_LIMIT), Step::Wait);
        assert_eq!(plan.step(silent, READ_LIMIT + MOMENT), Step::GiveUp(Abort::Arbiter));
        assert!(!plan.holds_guest());
        let away = View { linked: false, ..quiet(&paired) };
        assert_eq!(stopping(&paired).step(away, MOMENT), Step::GiveUp(Abort::Link));
        let late = STOP_LIMIT + MOMENT * 2;
        assert_eq!(stopping(&paired).step(quiet(&paired), late), Step::GiveUp(Abort::Ack));
        let ending = View { ending: true, ..quiet(&paired) };
        assert_eq!(stopping(&paired).step(ending, MOMENT), Step::GiveUp(Abort::Ending));
        assert_eq!(stopping(&paired).step(quiet(&Phase::Alone), MOMENT), Step::GiveUp(Abort::Unprotected));
    }

    #[test]
    fn after_the_yield_only_the_register_lets_the_guest_run_on_here() {
        let paired = paired();
        let mut plan = yielded(&paired);
        let late = YIELD_LIMIT + MOMENT * 2;
        assert_eq!(plan.step(quiet(&paired), YIELD_LIMIT), Step::Wait);
        assert_eq!(plan.step(quiet(&paired), late), Step::Fence);
        let asked = View { proposing: true, ..quiet(&paired) };
        assert_eq!(plan.step(asked, late * 100), Step::Wait, "however long the arbiter takes");
        assert_eq!(plan.clone().step(quiet(&lost()), late), Step::Moved, "the secondary was quicker");
        assert_eq!(plan.step(quiet(&Phase::Alone), late), Step::GiveUp(Abort::NotTaken));
    }
}
