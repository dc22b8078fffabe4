//! Getting protected again without an operator, simulated: `primary::node::healing` and `heal_worker`, function by
//! function. Their thread is a look now and then.

use colo_common::membership::{Claim, ClaimAnswer, Membership, NodeRecord, NodeRole};
use colo_common::register::{Entry, Value};
use colo_common::{Incarnation, NodeId};
use colo_primary::heal::{Candidate, Healer, Needs};
use colo_primary::replicator::Phase;

use crate::common::{Common, index, name};
use crate::plan::{FRAMES, HASTE, Time};
use crate::runner::{Linking, Runner};
use crate::switching::clock;

/// As in `heal_worker`.
const LOOK: Time = 250 / HASTE;
const WATCH: Time = 1_000 / HASTE;
const PATIENCE: Time = 10_000 / HASTE;
/// As in `node::healing`.
const REACH: Time = 5_000 / HASTE;
/// As in both.
pub(crate) const RETURN: Time = 3_000 / HASTE;
/// What guests of a simulation run on, and what their nodes speak.
pub(crate) const HYPERVISOR: &str = "synthetic";
pub(crate) const PROTOCOL: u32 = 3;

/// `healing::Healing`.
pub(crate) struct Healing {
    worker: Worker,
    lacks: bool,
    wanted: bool,
    replace: bool,
    protected_by: Option<NodeId>,
    candidate: Option<(NodeRecord, Time)>,
    returns: Option<Time>,
}

/// `heal_worker::Worker`.
struct Worker {
    healer: Healer,
    wanted: Option<Entry>,
    protected_by: Option<NodeId>,
    told: Option<(Candidate, Time)>,
    /// A copy is on its way.
    copying: bool,
    next_look: Time,
}

/// `heal_worker::Advice`.
enum Advice {
    Take(Box<NodeRecord>),
    Replace,
}

impl Healing {
    pub(crate) fn new(lacks: bool, returns: Option<Time>, common: &Common) -> Self {
        let worker = Worker {
            healer: Healer::default(),
            wanted: None,
            protected_by: None,
            told: None,
            copying: false,
            next_look: common.now,
        };
        Self { worker, lacks, wanted: false, replace: false, protected_by: None, candidate: None, returns }
    }
}

impl Runner {
    /// `Node::lacks_secondary`.
    fn lacks_secondary(&mut self, now: Time) -> bool {
        let paused = self.paused_secondary.is_some();
        let ending = self.stopping || self.parked || self.failed;
        let alone = matches!(self.replicator.phase(), Phase::Alone) && !self.replicator.is_proposing();
        let Some(healing) = &mut self.healing else { return false };
        healing.returns.take_if(|until| now > *until);
        let looks = healing.lacks && healing.returns.is_none();
        looks && alone && self.peer.is_none() && !paused && !ending
    }

    /// `Node::say_whether_wanted`.
    pub(crate) fn say_whether_wanted(&mut self, common: &mut Common) {
        let phase = self.replicator.phase().clone();
        if let (Some(healing), Phase::Paired { .. }) = (&mut self.healing, &phase) {
            healing.lacks = true;
            if let Some((record, _)) = healing.candidate.take() {
                let by_spare = record.role == NodeRole::Spare;
                common.count(if by_spare { "healed by a spare" } else { "healed by a node that came back" });
            }
        }
        self.say_who_protects(common.now);
        let wanted = self.lacks_secondary(common.now);
        let seeding = !wanted && self.peer.is_some() && matches!(phase, Phase::Seeding { .. });
        let register = self.replicator.register().clone();
        let Some(healing) = &mut self.healing else { return };
        healing.worker.copying = seeding;
        if wanted == healing.wanted || seeding {
            return;
        }
        healing.wanted = wanted;
        if !wanted {
            healing.worker.healer.healed();
            healing.worker.told = None;
        }
        healing.worker.wanted = wanted.then_some(register).filter(|_| !common.mutations.nobody_heals);
        healing.worker.next_look = common.now;
    }

    /// `Node::say_who_protects`.
    fn say_who_protects(&mut self, now: Time) {
        let by = match &self.replicator.register().value {
            Value::Paired { secondary, .. } => Some(secondary),
            _ => None,
        };
        let Some(healing) = &mut self.healing else { return };
        if healing.protected_by.as_ref() != by {
            healing.protected_by = by.cloned();
            healing.worker.protected_by = by.cloned();
            healing.worker.next_look = now;
        }
    }

    /// `Node::let_go_if_replaced`.
    pub(crate) fn let_go_if_replaced(&mut self, common: &mut Common) {
        let busy = self.replicator.is_proposing() || self.switching.is_some() || self.stopping;
        let Some(healing) = &mut self.healing else { return };
        if !healing.replace || busy {
            return;
        }
        healing.replace = false;
        if !matches!(self.replicator.phase(), Phase::Paired { .. }) {
            return;
        }
        common.count("secondaries replaced");
        common.note(self.x, || "lets its secondary go, whose node is emptied".to_owned());
        self.secondary = None;
        let actions = self.replicator.go_solo();
        self.act(actions, common);
    }

    /// `Worker::run`, as often as it looks, and `Node::on_advice`.
    pub(crate) fn look_for_candidates(&mut self, common: &mut Common) {
        let (x, process) = (self.x, self.incarnation);
        let Some(healing) = &mut self.healing else { return };
        if common.now < healing.worker.next_look {
            return;
        }
        let wait = if healing.worker.wanted.is_some() { LOOK } else { WATCH };
        healing.worker.next_look = common.now + wait;
        let record = match healing.worker.turn(x, process, common) {
            None => return,
            Some(Advice::Replace) => {
                healing.replace = true;
                return;
            }
            Some(Advice::Take(record)) => *record,
        };
        if !self.lacks_secondary(common.now) {
            return;
        }
        common.note(x, || format!("is to be protected by {}, {}", record.node, record.role));
        let to = index(&record.node);
        self.healing.iter_mut().for_each(|healing| healing.candidate = Some((record.clone(), common.now)));
        if self.secondary != Some(to) {
            self.secondary = Some(to);
            self.linking = Linking::Idle;
        }
    }

    /// `Node::candidate_failed`.
    pub(crate) fn candidate_failed(&mut self, refused: bool, common: &mut Common) {
        let now = common.now;
        let gone = |(record, at): &mut (NodeRecord, Time)| {
            refused || record.role != NodeRole::Spare || now - *at > REACH
        };
        let Some(healing) = &mut self.healing else { return };
        let Some((record, _)) = healing.candidate.take_if(gone) else { return };
        common.count("candidates that failed");
        healing.worker.next_look = now;
        let healer = &mut healing.worker.healer;
        if refused {
            healer.refused(record.node, "", clock(now));
        } else {
            healer.failed(record.node, record.incarnation, clock(now));
        }
        healing.worker.told = None;
    }
}

impl Worker {
    /// A turn of `Worker::run`.
    fn turn(&mut self, x: usize, process: Incarnation, common: &mut Common) -> Option<Advice> {
        if let Some(entry) = self.wanted.clone() {
            return self.look(&entry, x, process, common).map(|record| Advice::Take(Box::new(record)));
        }
        let by = self.protected_by.clone()?;
        if !self.is_replaceable(&by, x, common) {
            return None;
        }
        self.protected_by = None;
        Some(Advice::Replace)
    }

    /// `Worker::is_replaceable`.
    fn is_replaceable(&self, by: &NodeId, x: usize, common: &Common) -> bool {
        let Ok(nodes) = common.ask_membership(x, |membership| membership.nodes()) else { return false };
        let empties = |record: &NodeRecord| {
            record.node == *by && record.vm.as_ref() == Some(common.vm()) && record.draining
        };
        let others: Vec<NodeRecord> = nodes.iter().filter(|record| record.node != *by).cloned().collect();
        nodes.iter().any(empties)
            && self.healer.choose(&others, &name(x), common.vm(), &needs(), clock(common.now)).is_some()
    }

    /// `Worker::look`.
    fn look(
        &mut self,
        entry: &Entry,
        x: usize,
        process: Incarnation,
        common: &mut Common,
    ) -> Option<NodeRecord> {
        let now = clock(common.now);
        if let Some((candidate, at)) = &mut self.told {
            if self.copying {
                *at = common.now;
            }
            let limit = if candidate.spare { PATIENCE } else { RETURN };
            if common.now - *at < limit || common.mutations.endless_patience {
                return None;
            }
            let NodeRecord { node, incarnation, .. } = &candidate.record;
            self.healer.failed(node.clone(), *incarnation, now);
            self.told = None;
        }
        let nodes = common.ask_membership(x, |membership| membership.nodes()).ok()?;
        let candidate = self.healer.choose(&nodes, &name(x), common.vm(), &needs(), now)?;
        if candidate.spare && !self.claim(entry, &candidate.record, (x, process), common) {
            return None;
        }
        self.told = Some((candidate.clone(), common.now));
        Some(candidate.record)
    }

    /// `Worker::claim`.
    fn claim(
        &mut self,
        entry: &Entry,
        spare: &NodeRecord,
        (x, process): (usize, Incarnation),
        common: &mut Common,
    ) -> bool {
        let claim = Claim {
            vm: common.vm().clone(),
            expected: entry.clone(),
            by: name(x),
            incarnation: process,
            node: spare.node.clone(),
            node_incarnation: spare.incarnation,
        };
        match common.ask_membership(x, |membership| membership.claim(&claim)) {
            Ok(ClaimAnswer::Claimed) => {
                common.count("spares claimed");
                common.claimed.push(claim);
                true
            }
            Ok(ClaimAnswer::Refused(why)) => {
                common.count("claims refused");
                common.note(x, || format!("does not get {}: {why}", spare.node));
                self.healer.failed(spare.node.clone(), spare.incarnation, clock(common.now));
                false
            }
            Err(_) => {
                common.count("claims without an answer");
                false
            }
        }
    }
}

/// What the guest of a simulation needs.
fn needs() -> Needs {
    Needs { memory: FRAMES * 4096, disk: 0, hypervisor: HYPERVISOR.to_owned(), protocol: PROTOCOL }
}
