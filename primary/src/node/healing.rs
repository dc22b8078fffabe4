//! Getting protected again without an operator: says whether somebody is wanted, and takes whom the
//! [worker](crate::heal_worker) names.

use colo_common::NodeId;
use colo_common::membership::{NodeRecord, NodeRole};
use colo_common::register::Value;
use std::time::{Duration, Instant};

use super::{Linking, Node, NodeError};
use crate::heal_worker::{Advice, HealWorker};
use crate::replicator::Phase;

/// How long a spare that was claimed may be out of reach: it begins to follow first.
const REACH: Duration = Duration::from_secs(5);

/// How long the node that moved its guest here has to follow, before another one is looked for: it has the guest's memory.
pub(super) const RETURN: Duration = Duration::from_secs(3);

/// Where it stands.
pub(super) struct Healing {
    worker: Option<HealWorker>,
    /// The vm was protected before: somebody is missing.
    lacks: bool,
    /// What the worker was told last.
    wanted: bool,
    /// The secondary is to be replaced as soon as that can be done.
    replace: bool,
    /// Who protects the vm, as the worker was told.
    protected_by: Option<NodeId>,
    /// Who was named, and when.
    candidate: Option<(NodeRecord, Instant)>,
    /// Until when the node that the guest came from is waited for.
    returns: Option<Instant>,
}

impl Healing {
    /// Of a vm that `was_protected` before, or not; the node that it came from `returns` by then.
    pub(super) fn new(was_protected: bool, returns: Option<Instant>) -> Self {
        Self {
            worker: None,
            lacks: was_protected,
            wanted: false,
            replace: false,
            protected_by: None,
            candidate: None,
            returns,
        }
    }
}

impl Node {
    /// Has somebody be looked for in the cluster whenever the vm has lost its protection.
    #[must_use]
    pub fn healed_by(mut self, worker: HealWorker) -> Self {
        self.healing.lacks |= self.settings.secondary.is_some();
        self.healing.worker = Some(worker);
        self
    }

    /// Whether the vm is to be protected and is not, nor on the way there.
    fn lacks_secondary(&mut self) -> bool {
        let paused = self.pause_wanted || self.paused_secondary.is_some();
        let ending = self.stopping || self.parked || self.failure.is_some();
        let alone = matches!(self.replicator.phase(), Phase::Alone) && !self.replicator.is_proposing();
        self.healing.returns.take_if(|until| Instant::now() > *until);
        let looks = self.settings.reprotect && self.healing.lacks && self.healing.returns.is_none();
        looks && alone && self.peer.is_none() && !paused && !ending
    }

    pub(super) fn say_whether_wanted(&mut self) {
        if matches!(self.replicator.phase(), Phase::Paired { .. }) {
            (self.healing.lacks, self.healing.candidate) = (true, None);
        }
        self.say_who_protects();
        let wanted = self.lacks_secondary();
        // While a copy is on its way, whoever was named still is.
        let seeding =
            !wanted && self.peer.is_some() && matches!(self.replicator.phase(), Phase::Seeding { .. });
        self.healing.worker.iter().for_each(|worker| worker.copies(seeding));
        if wanted == self.healing.wanted || seeding {
            return;
        }
        self.healing.wanted = wanted;
        self.board.change(|status| status.nobody = None);
        if let Some(worker) = &self.healing.worker {
            worker.want(wanted.then(|| self.replicator.register().clone()));
        }
    }

    fn say_who_protects(&mut self) {
        let by = match &self.replicator.register().value {
            Value::Paired { secondary, .. } if self.settings.reprotect => Some(secondary),
            _ => None,
        };
        if self.healing.protected_by.as_ref() == by {
            return;
        }
        self.healing.protected_by = by.cloned();
        if let Some(worker) = &self.healing.worker {
            worker.protected_by(by.cloned());
        }
    }

    pub(super) fn on_advice(&mut self, advice: Advice) {
        match advice {
            Advice::Take(record) => self.on_candidate(*record),
            Advice::Replace => self.healing.replace = true,
            Advice::Nobody { why, news } => self.on_nobody(why, news),
        }
    }

    /// It stands in the account until somebody is found, or nobody is wanted any more.
    fn on_nobody(&mut self, why: String, news: bool) {
        if !self.lacks_secondary() {
            return;
        }
        self.board.change(|status| status.nobody = Some(why.clone()));
        if news {
            self.board.error(why);
        }
    }

    /// The secondary's node is being emptied: the vm goes on alone for as long as another one takes to be whole.
    pub(super) fn let_go_if_replaced(&mut self) -> Result<(), NodeError> {
        let busy = self.replicator.is_proposing() || self.switching.is_some() || self.stopping;
        if !self.healing.replace || busy {
            return Ok(());
        }
        self.healing.replace = false;
        if !matches!(self.replicator.phase(), Phase::Paired { .. }) {
            return Ok(());
        }
        self.secondary = None;
        let actions = self.replicator.go_solo();
        self.act(actions)
    }

    fn on_candidate(&mut self, record: NodeRecord) {
        if !self.lacks_secondary() {
            return;
        }
        self.board.change(|status| status.nobody = None);
        let address = record.address.to_string();
        self.healing.candidate = Some((record, Instant::now()));
        if self.secondary.as_ref() != Some(&address) {
            self.secondary = Some(address);
            if !matches!(self.linking, Linking::Connecting { asked: Some(_), .. }) {
                self.linking = Linking::Idle;
            }
        }
    }

    /// No link came of it: it `refused` with these words, or is out of reach.
    pub(super) fn candidate_failed(&mut self, refused: Option<&str>) {
        let gone = |(record, at): &mut (NodeRecord, Instant)| {
            refused.is_some() || record.role != NodeRole::Spare || at.elapsed() > REACH
        };
        let Some((record, _)) = self.healing.candidate.take_if(gone) else { return };
        let Some(worker) = &self.healing.worker else { return };
        match refused {
            Some(why) => worker.refused(record.node, why.to_owned()),
            None => worker.failed(record.node, record.incarnation),
        }
    }
}
