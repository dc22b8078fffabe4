//! A planned move, and what a runner that lost its vm leaves: `primary::node::switching` and `Node::remains`.

use colo_common::{History, Point};
use colo_primary::replicator::Phase;
use colo_primary::switchover::{Step, Switchover, View};
use colo_vmm::{DirtySet, GuestMemory, ProtectedGuest};
use std::sync::Arc;
use std::time::Duration;

use crate::common::Common;
use crate::net::{Msg, Way};
use crate::plan::{HASTE, Time};
use crate::runner::Runner;

/// `switching::Switching`.
pub(crate) struct Switching {
    plan: Switchover,
    pub(crate) answered: bool,
}

/// `handover::Handover`.
pub(crate) struct Left {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) base: Option<Point>,
    pub(crate) changed: DirtySet,
    pub(crate) history: History,
}

pub(crate) fn clock(now: Time) -> Duration {
    Duration::from_millis(now * HASTE)
}

impl Runner {
    /// `Node::begin_switchover`, as `judge` allows it.
    pub(crate) fn begin_switchover(&mut self, common: &mut Common) {
        let paired = matches!(self.replicator.phase(), Phase::Paired { .. });
        if !paired || self.replicator.is_proposing() || self.switching.is_some() {
            return;
        }
        if self.stopping || self.failed {
            return;
        }
        common.count("switchovers begun");
        common.note(self.x, || "is to move its guest".to_owned());
        self.arbiter.read();
        self.switching = Some(Switching { plan: Switchover::new(clock(common.now)), answered: false });
    }

    pub(crate) fn holds_guest(&self) -> bool {
        self.switching.as_ref().is_some_and(|switching| switching.plan.holds_guest())
    }

    pub(crate) fn has_yielded(&self) -> bool {
        self.switching.as_ref().is_some_and(|switching| switching.plan.has_yielded())
    }

    pub(crate) fn go_on_switching(&mut self, common: &mut Common) {
        let Some(switching) = &mut self.switching else { return };
        let view = View {
            phase: self.replicator.phase(),
            linked: self.replicator.is_linked() && self.peer.is_some(),
            proposing: self.replicator.is_proposing(),
            answered: switching.answered,
            rests: self.resting.is_some() && self.standing.is_none(),
            acked: self.replicator.in_flight() == 0
                && self.replicator.acked() == self.replicator.history().tip(),
            ending: self.stopping || self.failed,
        };
        match switching.plan.step(view, clock(common.now)) {
            Step::Wait => {}
            Step::Yield => {
                common.note(self.x, || "yields".to_owned());
                if let Some(peer) = &self.peer {
                    common.send(peer.link, Way::Say, Msg::Yield(false));
                }
            }
            Step::Fence => {
                common.count("switchovers fenced");
                let actions = self.replicator.go_solo();
                self.act(actions, common);
            }
            Step::GiveUp(why) => {
                common.count("switchovers given up");
                common.note(self.x, || why.to_string());
                self.switching = None;
                self.run_on(common);
            }
            Step::Moved => {
                common.count("switchovers");
                self.switching = None;
            }
        }
        if self.has_yielded() {
            self.arbiter.read();
        }
    }

    fn run_on(&mut self, common: &mut Common) {
        let free = !self.parked && !self.stopping && !self.failed;
        let runs_here = !matches!(self.replicator.phase(), Phase::Lost { .. } | Phase::Over);
        if self.resting.take_if(|cut| free && runs_here && cut.state.pending.is_none()).is_some() {
            self.resume(common);
        }
    }

    /// `Node::remains`. A new process image tracks nothing.
    pub(crate) fn remains(mut self) -> Left {
        self.guest.unprotect().expect("a guest that nobody follows");
        let parted = self.replicator.parted().filter(|_| !self.unknown);
        let known = parted.and_then(|base| Some((base, self.last_changed.pages_since(base.epoch)?)));
        let mut changed = self.dirty.pages;
        known.iter().for_each(|(_, before)| changed.union_with(before));
        Left {
            memory: Arc::clone(self.guest.memory()),
            base: known.map(|(base, _)| base),
            changed,
            history: self.replicator.history().clone(),
        }
    }
}
