//! Getting protected again without an operator, simulated: `primary::node::healing` and `heal_worker`, function by
//! function. Their thread is a look now and then.

use colo_common::Incarnation;
use colo_common::membership::{Claim, ClaimAnswer, Membership, NodeRecord, NodeRole};
use colo_common::register::Entry;
use colo_primary::heal::{Candidate, Healer, Needs};
use colo_primary::replicator::Phase;

use crate::common::{Common, index, name};
use crate::plan::{FRAMES, HASTE, Time};
use crate::runner::{Linking, Runner};
use crate::switching::clock;

/// As in `heal_worker`.
const LOOK: Time = 250 / HASTE;
const PATIENCE: Time = 10_000 / HASTE;
/// As in `node::healing`.
const REACH: Time = 5_000 / HASTE;
pub(crate) const RETURN: Time = 3_000 / HASTE;
/// What guests of a simulation run on, and what their nodes speak.
pub(crate) const HYPERVISOR: &str = "synthetic";
pub(crate) const PROTOCOL: u32 = 3;

/// `healing::Healing`.
pub(crate) struct Healing {
    worker: Worker,
    lacks: bool,
    wanted: bool,
    candidate: Option<(NodeRecord, Time)>,
    returns: Option<Time>,
}

/// `heal_worker::Worker`.
struct Worker {
    healer: Healer,
    wanted: Option<Entry>,
    told: Option<(Candidate, Time)>,
    next_look: Time,
}

impl Healing {
    pub(crate) fn new(lacks: bool, returns: Option<Time>, common: &Common) -> Self {
        let worker = Worker { healer: Healer::default(), wanted: None, told: None, next_look: common.now };
        Self { worker, lacks, wanted: false, candidate: None, returns }
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
        let wanted = self.lacks_secondary(common.now);
        let seeding = !wanted && self.peer.is_some() && matches!(phase, Phase::Seeding { .. });
        let register = self.replicator.register().clone();
        let Some(healing) = &mut self.healing else { return };
        if wanted == healing.wanted || seeding {
            return;
        }
        healing.wanted = wanted;
        if !wanted {
            healing.worker.healer.healed();
            healing.worker.told = None;
        }
        healing.worker.wanted = wanted.then_some(register).filter(|_| !common.mutations.nobody_heals);
    }

    /// `Worker::run`, as often as it looks, and `Node::on_candidate`.
    pub(crate) fn look_for_candidates(&mut self, common: &mut Common) {
        let (x, process) = (self.x, self.incarnation);
        let Some(healing) = &mut self.healing else { return };
        if common.now < healing.worker.next_look {
            return;
        }
        healing.worker.next_look = common.now + LOOK;
        let Some(record) = healing.worker.look(x, process, common) else { return };
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
    /// `Worker::look`.
    fn look(&mut self, x: usize, process: Incarnation, common: &mut Common) -> Option<NodeRecord> {
        let entry = self.wanted.clone()?;
        let now = clock(common.now);
        if let Some((candidate, at)) = &self.told {
            if common.now - at < PATIENCE || common.mutations.endless_patience {
                return None;
            }
            let NodeRecord { node, incarnation, .. } = &candidate.record;
            self.healer.failed(node.clone(), *incarnation, now);
            self.told = None;
        }
        let nodes = common.ask_membership(x, |membership| membership.nodes()).ok()?;
        let hypervisor = HYPERVISOR.to_owned();
        let needs = Needs { memory: FRAMES * 4096, disk: 0, hypervisor, protocol: PROTOCOL };
        let candidate = self.healer.choose(&nodes, &name(x), common.vm(), &needs, now)?;
        if candidate.spare && !self.claim(&entry, &candidate.record, (x, process), common) {
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
