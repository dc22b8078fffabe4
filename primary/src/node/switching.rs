//! The node's part in a [switchover](crate::switchover): stops the guest, tells the secondary, and runs on if that does
//! not take it.

use std::time::{Duration, Instant};

use super::operator::{CommandError, Reply, answer};
use super::{Node, NodeError};
use crate::replicator::Phase;
use crate::switchover::{Step, Switchover, View};

/// How often the register is read once the secondary was told: so much is added to the time until this node is of use
/// again, not to the guest's.
const READ_INTERVAL: Duration = Duration::from_millis(10);

/// A switchover that goes on.
pub(super) struct Switching {
    plan: Switchover,
    answered: bool,
    next_read: Instant,
    /// Nobody, if a signal asked.
    reply: Option<Reply>,
}

impl Switching {
    /// The register has answered.
    pub(super) fn hear(&mut self) {
        self.answered = true;
    }

    /// Whether the guest is to stand from its next cut on.
    pub(super) fn holds_guest(&self) -> bool {
        self.plan.holds_guest()
    }

    /// Whether the secondary was told to take over.
    pub(super) fn has_yielded(&self) -> bool {
        self.plan.has_yielded()
    }
}

impl Node {
    pub(super) fn begin_switchover(&mut self, reply: Option<Reply>, now: Instant) {
        if self.switching.is_some() {
            return answer(reply, Err(CommandError::NotNow("a switchover is under way".to_owned())));
        }
        tracing::info!(vm = %self.vm, "a switchover is asked for");
        self.end_verification("the guest is being moved to the secondary");
        self.arbiter.read();
        let plan = Switchover::new(self.since_began(now));
        self.switching = Some(Switching { plan, answered: false, next_read: now, reply });
    }

    fn since_began(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    pub(super) fn go_on_switching(&mut self, now: Instant) -> Result<(), NodeError> {
        let elapsed = self.since_began(now);
        let Some(switching) = &mut self.switching else { return Ok(()) };
        let view = View {
            phase: self.replicator.phase(),
            linked: self.replicator.is_linked() && self.peer.is_some(),
            proposing: self.replicator.is_proposing(),
            answered: switching.answered,
            rests: self.resting.is_some() && self.standing.is_none(),
            acked: self.replicator.in_flight() == 0
                && self.replicator.acked() == self.replicator.history().tip(),
            ending: self.stopping || self.failure.is_some(),
        };
        match switching.plan.step(view, elapsed) {
            Step::Wait => {}
            Step::Yield => {
                tracing::info!(vm = %self.vm, "the secondary has everything and is told to run the guest");
                self.let_out();
                self.peer.iter().for_each(|peer| peer.link.send_yield(false));
            }
            Step::Fence => {
                tracing::warn!(vm = %self.vm, "the secondary does not take the guest over: asking to run alone");
                let actions = self.replicator.go_solo();
                self.act(actions)?;
            }
            Step::GiveUp(why) => {
                tracing::warn!(vm = %self.vm, "the switchover is given up: {why}");
                self.board.error(format!("the switchover was given up: {why}"));
                self.end_switchover(Err(CommandError::Aborted(why.to_string())));
                return self.run_on();
            }
            Step::Moved => {
                tracing::info!(vm = %self.vm, "the guest has moved: {}", self.replicator.register());
                self.end_switchover(Ok(()));
            }
        }
        self.look_whether_taken(now);
        Ok(())
    }

    fn look_whether_taken(&mut self, now: Instant) {
        let Some(switching) = &mut self.switching else { return };
        if switching.plan.has_yielded() && now >= switching.next_read {
            switching.next_read = now + READ_INTERVAL;
            self.arbiter.read();
        }
    }

    fn end_switchover(&mut self, with: Result<(), CommandError>) {
        if let Some(switching) = self.switching.take() {
            // What the caller looks at next must be told.
            self.tell();
            answer(switching.reply, with);
        }
    }

    /// The guest goes on, if it stood for the switchover alone.
    fn run_on(&mut self) -> Result<(), NodeError> {
        let free = !self.parked && !self.stopping && self.failure.is_none();
        let runs_here = !matches!(self.replicator.phase(), Phase::Lost { .. } | Phase::Over);
        let resting = self.resting.take_if(|cut| free && runs_here && cut.state.pending.is_none());
        resting.map_or(Ok(()), |_| Ok(self.guest.resume()?))
    }
}
