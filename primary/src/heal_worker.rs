//! The thread that finds somebody to protect a vm: lists the nodes, chooses, claims a spare. Whatever the membership
//! takes, the node does not wait for it.

use colo_common::membership::{Claim, ClaimAnswer, Membership, NodeRecord};
use colo_common::register::Entry;
use colo_common::telemetry::in_node;
use colo_common::{Incarnation, NodeId, VmId};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::heal::{Candidate, Healer, Needs};

/// Between two looks at who is there.
const LOOK: Duration = Duration::from_millis(250);
/// How long a node has to become a secondary before another one is looked for: a claimed spare begins to follow first.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether the node that protects the vm is being emptied.
const WATCH: Duration = Duration::from_secs(1);
/// While nobody is wanted.
const IDLE: Duration = Duration::from_secs(3600);

/// What the node is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advice {
    /// This node is to protect the vm.
    Take(NodeRecord),
    /// The node that protects the vm is being emptied, and another one is there to replace it.
    Replace,
}

/// What the node says to it.
enum Order {
    /// The vm is without protection, by this entry of the register; or not any more.
    Wanted(Option<Entry>),
    /// This node protects the vm; or none does.
    Protected(Option<NodeId>),
    /// That process does not follow.
    Failed(NodeId, Incarnation),
}

/// A handle on the thread; it ends with it.
#[derive(Clone, Debug)]
pub struct HealWorker {
    orders: Sender<Order>,
}

/// Whose vm it is and what it needs.
pub struct Patient {
    /// The vm.
    pub vm: VmId,
    /// The node that runs it.
    pub node: NodeId,
    /// The process that does.
    pub incarnation: Incarnation,
    /// What a node must have for the guest.
    pub needs: Needs,
}

impl HealWorker {
    /// Starts the thread. `tell` is called from it.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(
        membership: Arc<dyn Membership>,
        patient: Patient,
        tell: impl Fn(Advice) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (orders, inbox) = crossbeam_channel::unbounded();
        let name = format!("heal-{}", patient.vm);
        let worker = Worker {
            membership,
            patient,
            healer: Healer::default(),
            wanted: None,
            protected_by: None,
            told: None,
            silent: false,
            began: Instant::now(),
        };
        std::thread::Builder::new().name(name).spawn(in_node(move || worker.run(&inbox, &tell)))?;
        Ok(Self { orders })
    }

    /// Says whether somebody is wanted, and by which entry of the register the vm runs.
    pub fn want(&self, entry: Option<Entry>) {
        // It ends only with its handle.
        drop(self.orders.send(Order::Wanted(entry)));
    }

    /// Says who protects the vm.
    pub fn protected_by(&self, node: Option<NodeId>) {
        drop(self.orders.send(Order::Protected(node)));
    }

    /// That process does not follow.
    pub fn failed(&self, node: NodeId, process: Incarnation) {
        drop(self.orders.send(Order::Failed(node, process)));
    }
}

struct Worker {
    membership: Arc<dyn Membership>,
    patient: Patient,
    healer: Healer,
    wanted: Option<Entry>,
    /// Who protects the vm.
    protected_by: Option<NodeId>,
    /// Who was named last, and when.
    told: Option<(Candidate, Instant)>,
    /// The membership does not answer, which was logged.
    silent: bool,
    began: Instant,
}

impl Worker {
    fn run(mut self, inbox: &Receiver<Order>, tell: &impl Fn(Advice)) {
        loop {
            let wait = match (&self.wanted, &self.protected_by) {
                (Some(_), _) => LOOK,
                (None, Some(_)) => WATCH,
                (None, None) => IDLE,
            };
            match inbox.recv_timeout(wait) {
                Ok(order) => self.take(order),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while let Ok(order) = inbox.try_recv() {
                self.take(order);
            }
            if let Some(entry) = self.wanted.clone() {
                self.look(&entry, tell);
            } else if let Some(node) = self.protected_by.clone()
                && self.is_replaceable(&node)
            {
                tracing::info!(vm = %self.patient.vm, "{node} is being emptied: another node is to protect the vm");
                tell(Advice::Replace);
                self.protected_by = None;
            }
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Wanted(entry) => {
                if entry.is_none() {
                    self.healer.healed();
                    self.told = None;
                }
                self.wanted = entry;
            }
            Order::Protected(node) => self.protected_by = node,
            Order::Failed(node, process) => {
                self.healer.failed(node, process, self.began.elapsed());
                self.told = None;
            }
        }
    }

    /// Names the best there is, unless one that was named still has its time.
    fn look(&mut self, entry: &Entry, tell: &impl Fn(Advice)) {
        if let Some((candidate, at)) = &self.told {
            if at.elapsed() < PATIENCE {
                return;
            }
            let NodeRecord { node, incarnation, .. } = &candidate.record;
            self.healer.failed(node.clone(), *incarnation, self.began.elapsed());
            self.told = None;
        }
        let nodes = match self.membership.nodes() {
            Ok(nodes) => nodes,
            Err(e) => return self.complain(&e.to_string()),
        };
        self.silent = false;
        let Patient { vm, node, needs, .. } = &self.patient;
        let Some(candidate) = self.healer.choose(&nodes, node, vm, needs, self.began.elapsed()) else {
            return;
        };
        if candidate.spare && !self.claim(entry, &candidate.record) {
            return;
        }
        let NodeRecord { node, address, .. } = &candidate.record;
        let what = if candidate.spare { "a spare" } else { "a node of this vm" };
        tracing::info!(vm = %self.patient.vm, "{node} at {address}, {what}, is to protect the vm");
        tell(Advice::Take(candidate.record.clone()));
        self.told = Some((candidate, Instant::now()));
    }

    /// Whether the node that protects the vm is being emptied, and another one could.
    fn is_replaceable(&mut self, by: &NodeId) -> bool {
        let nodes = match self.membership.nodes() {
            Ok(nodes) => nodes,
            Err(e) => {
                self.complain(&e.to_string());
                return false;
            }
        };
        self.silent = false;
        let Patient { vm, node, needs, .. } = &self.patient;
        let empties =
            |record: &NodeRecord| record.node == *by && record.vm.as_ref() == Some(vm) && record.draining;
        let others: Vec<NodeRecord> = nodes.iter().filter(|record| record.node != *by).cloned().collect();
        nodes.iter().any(empties)
            && self.healer.choose(&others, node, vm, needs, self.began.elapsed()).is_some()
    }

    fn claim(&mut self, entry: &Entry, spare: &NodeRecord) -> bool {
        let claim = Claim {
            vm: self.patient.vm.clone(),
            expected: entry.clone(),
            by: self.patient.node.clone(),
            incarnation: self.patient.incarnation,
            node: spare.node.clone(),
            node_incarnation: spare.incarnation,
        };
        match self.membership.claim(&claim) {
            Ok(ClaimAnswer::Claimed) => true,
            Ok(ClaimAnswer::Refused(why)) => {
                tracing::info!(vm = %self.patient.vm, "the spare {} is not to be had: {why}", spare.node);
                self.healer.failed(spare.node.clone(), spare.incarnation, self.began.elapsed());
                false
            }
            Err(e) => {
                self.complain(&e.to_string());
                false
            }
        }
    }

    fn complain(&mut self, why: &str) {
        if !std::mem::replace(&mut self.silent, true) {
            tracing::warn!(vm = %self.patient.vm, "nobody can be found to protect the vm: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Advice, HealWorker, Patient};
    use crate::heal::Needs;
    use colo_common::Incarnation;
    use colo_common::ProposalId;
    use colo_common::arbiter::Arbiter;
    use colo_common::arbiter::file::FileArbiter;
    use colo_common::membership::file::FileMembership;
    use colo_common::membership::{Membership, NodeRecord, NodeRole};
    use colo_common::register::{Proposal, Value};
    use std::sync::Arc;
    use std::time::Duration;

    fn spare(node: &str) -> NodeRecord {
        NodeRecord {
            node: node.parse().unwrap(),
            incarnation: Incarnation(5),
            address: "127.0.0.1:7701".parse().unwrap(),
            role: NodeRole::Spare,
            vm: None,
            version: String::new(),
            protocol: 3,
            cpu: String::new(),
            hypervisor: "kvm".to_owned(),
            memory_free: 1 << 30,
            disk_free: 1 << 30,
            copy: None,
            draining: false,
        }
    }

    #[test]
    fn a_spare_is_claimed_and_another_one_if_it_fails() {
        let place = tempfile::tempdir().unwrap();
        let membership: Arc<dyn Membership> = Arc::new(FileMembership::open(place.path()).unwrap());
        let registered = ["s", "t"].map(|node| membership.register(spare(node)).unwrap());
        let value = Value::Solo { node: "a".parse().unwrap(), incarnation: Incarnation(1) };
        let proposal = Proposal { id: ProposalId(1), expected: None, value };
        let vm = "web".parse().unwrap();
        FileArbiter::open(place.path()).unwrap().propose(&vm, &proposal).unwrap();
        let (tell, told) = crossbeam_channel::unbounded();
        let needs = Needs { memory: 1 << 20, hypervisor: "kvm".to_owned(), protocol: 3 };
        let patient = Patient { vm, node: "a".parse().unwrap(), incarnation: Incarnation(1), needs };
        let worker = HealWorker::start(Arc::clone(&membership), patient, move |advice| {
            drop(tell.send(advice));
        })
        .unwrap();
        let next = || match told.recv_timeout(Duration::from_secs(10)).unwrap() {
            Advice::Take(record) => record,
            Advice::Replace => panic!("nobody protects the vm"),
        };
        assert!(told.recv_timeout(Duration::from_millis(20)).is_err(), "nobody is wanted");
        worker.want(Some(proposal.entry()));
        let first = next();
        let claim = membership.claim_of(&first.node).unwrap().unwrap();
        assert_eq!((claim.vm.as_str(), claim.expected), ("web", proposal.entry()));
        worker.failed(first.node.clone(), first.incarnation);
        let second = next();
        assert_ne!(second.node, first.node);
        worker.want(None);
        worker.protected_by(Some(second.node.clone()));
        assert!(told.recv_timeout(Duration::from_millis(1500)).is_err(), "it is not being emptied");
        let free = membership.register(spare("u")).unwrap();
        let vm = Some("web".parse().unwrap());
        let emptied = NodeRecord { draining: true, vm, role: NodeRole::Follower, ..second.clone() };
        registered[usize::from(second.node.as_str() == "t")].update(emptied).unwrap();
        assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(Advice::Replace));
        drop(free);
    }
}
