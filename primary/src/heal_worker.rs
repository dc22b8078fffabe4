//! The thread that finds somebody to protect a vm: lists the nodes, chooses, claims a spare. Whatever the membership
//! takes, the node does not wait for it. Where nobody can be had, it tells why.

use colo_common::membership::{Claim, ClaimAnswer, Membership, NodeRecord};
use colo_common::register::Entry;
use colo_common::telemetry::in_node;
use colo_common::{Incarnation, NodeId, VmId};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::heal::{Candidate, Healer, Needs};

/// Between two looks at who is there.
const LOOK: Duration = Duration::from_millis(250);
/// How long a node has to become a secondary before another one is looked for: a claimed spare begins to follow first.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether the node that protects the vm is being emptied.
const WATCH: Duration = Duration::from_secs(1);
/// The same for a node that follows the vm already. The one that was lost a moment ago is the first to be asked, since it
/// lacks least, and may be frozen or cut off.
const RETURN: Duration = Duration::from_secs(3);
/// How long nobody can be had before that is told: records of nodes that change their parts come and go.
const QUIET: Duration = Duration::from_secs(2);
/// While nobody is wanted.
const IDLE: Duration = Duration::from_secs(3600);

/// What the node is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advice {
    /// This node is to protect the vm.
    Take(Box<NodeRecord>),
    /// The node that protects the vm is being emptied, and another one is there to replace it.
    Replace,
    /// Nobody can be had, and why.
    Nobody {
        /// In one line.
        why: String,
        /// It is more than other numbers for what was told before.
        news: bool,
    },
}

/// What the node says to it.
enum Order {
    /// The vm is without protection, by this entry of the register; or not any more.
    Wanted(Option<Entry>),
    /// This node protects the vm; or none does.
    Protected(Option<NodeId>),
    /// That process does not follow.
    Failed(NodeId, Incarnation),
    /// That node says no, in these words.
    Refused(NodeId, String),
}

/// A handle on the thread; it ends with it.
#[derive(Clone, Debug)]
pub struct HealWorker {
    orders: Sender<Order>,
    copying: Arc<AtomicBool>,
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
        let copying = Arc::<AtomicBool>::default();
        let worker = Worker {
            membership,
            patient,
            healer: Healer::default(),
            wanted: None,
            protected_by: None,
            told: None,
            silent: false,
            lonely: None,
            passed: Vec::new(),
            began: Instant::now(),
            copying: Arc::clone(&copying),
        };
        std::thread::Builder::new().name(name).spawn(in_node(move || worker.run(&inbox, &tell)))?;
        Ok(Self { orders, copying })
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

    /// That node says no, and why.
    pub fn refused(&self, node: NodeId, why: String) {
        drop(self.orders.send(Order::Refused(node, why)));
    }

    /// Says whether a copy is on its way to whoever was named: that takes the time it takes, and nobody else is looked for.
    pub fn copies(&self, now: bool) {
        self.copying.store(now, Ordering::Relaxed);
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
    /// Since when nobody can be had, and what was said of it.
    lonely: Option<(Instant, String)>,
    /// Who was passed over and for what, as it was logged last.
    passed: Vec<(NodeId, &'static str)>,
    began: Instant,
    /// A copy is on its way.
    copying: Arc<AtomicBool>,
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
                    (self.told, self.lonely) = (None, None);
                    self.passed.clear();
                }
                self.wanted = entry;
            }
            Order::Protected(node) => self.protected_by = node,
            Order::Failed(node, process) => {
                self.healer.failed(node, process, self.began.elapsed());
                self.told = None;
            }
            Order::Refused(node, why) => {
                self.healer.refused(node, &why, self.began.elapsed());
                self.told = None;
            }
        }
    }

    /// Names the best there is, unless one that was named still has its time.
    fn look(&mut self, entry: &Entry, tell: &impl Fn(Advice)) {
        if let Some((candidate, at)) = &mut self.told {
            if self.copying.load(Ordering::Relaxed) {
                *at = Instant::now();
            }
            if at.elapsed() < if candidate.spare { PATIENCE } else { RETURN } {
                return;
            }
            let NodeRecord { node, incarnation, .. } = &candidate.record;
            self.healer.failed(node.clone(), *incarnation, self.began.elapsed());
            self.told = None;
        }
        let nodes = match self.membership.nodes() {
            Ok(nodes) => nodes,
            Err(e) => {
                self.complain(&e.to_string());
                return self.say_nobody(format!("nobody can be found to protect it: {e}"), true, tell);
            }
        };
        self.silent = false;
        let Patient { vm, node, needs, .. } = &self.patient;
        let Some(candidate) = self.healer.choose(&nodes, node, vm, needs, self.began.elapsed()) else {
            return self.pass_over(&nodes, tell);
        };
        self.lonely = None;
        if candidate.spare && !self.claim(entry, &candidate.record) {
            return;
        }
        let NodeRecord { node, address, .. } = &candidate.record;
        let what = if candidate.spare { "a spare" } else { "a node of this vm" };
        tracing::info!(vm = %self.patient.vm, "{node} at {address}, {what}, is to protect the vm");
        tell(Advice::Take(Box::new(candidate.record.clone())));
        self.told = Some((candidate, Instant::now()));
    }

    /// Tells why nobody can be had: each time that something else stands in the way.
    fn pass_over(&mut self, nodes: &[NodeRecord], tell: &impl Fn(Advice)) {
        let Patient { vm, node, needs, .. } = &self.patient;
        let passed = self.healer.passed_over(nodes, node, vm, needs, self.began.elapsed());
        let (since, _) = self.lonely.get_or_insert_with(|| (Instant::now(), String::new()));
        if since.elapsed() < QUIET {
            return;
        }
        let kinds = passed.kinds();
        let news = self.passed.is_empty() || self.passed != kinds;
        if news {
            tracing::warn!(vm = %self.patient.vm, "{passed}");
            self.passed = kinds;
        }
        self.say_nobody(passed.to_string(), news, tell);
    }

    fn say_nobody(&mut self, why: String, news: bool, tell: &impl Fn(Advice)) {
        let (_, said) = self.lonely.get_or_insert_with(|| (Instant::now(), String::new()));
        if *said != why {
            said.clone_from(&why);
            tell(Advice::Nobody { why, news });
        }
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
    use super::{Advice, HealWorker, LOOK, PATIENCE, Patient, RETURN};
    use crate::heal::Needs;
    use colo_common::Incarnation;
    use colo_common::ProposalId;
    use colo_common::VmId;
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
        let needs = Needs { memory: 1 << 20, disk: 0, hypervisor: "kvm".to_owned(), protocol: 3 };
        let patient = Patient { vm, node: "a".parse().unwrap(), incarnation: Incarnation(1), needs };
        let worker = HealWorker::start(Arc::clone(&membership), patient, move |advice| {
            drop(tell.send(advice));
        })
        .unwrap();
        let next = || match told.recv_timeout(Duration::from_secs(10)).unwrap() {
            Advice::Take(record) => *record,
            other => panic!("nobody protects the vm: {other:?}"),
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

    #[test]
    fn a_copy_takes_its_time_and_a_node_that_does_not_come_back_is_replaced_soon() {
        let place = tempfile::tempdir().unwrap();
        let membership: Arc<dyn Membership> = Arc::new(FileMembership::open(place.path()).unwrap());
        let vm: VmId = "web".parse().unwrap();
        let lost = NodeRecord { role: NodeRole::Waiting, vm: Some(vm.clone()), ..spare("b") };
        let _registered = [lost, spare("s")].map(|record| membership.register(record).unwrap());
        let value = Value::Solo { node: "a".parse().unwrap(), incarnation: Incarnation(1) };
        let proposal = Proposal { id: ProposalId(1), expected: None, value };
        FileArbiter::open(place.path()).unwrap().propose(&vm, &proposal).unwrap();
        let (tell, told) = crossbeam_channel::unbounded();
        let needs = Needs { memory: 1 << 20, disk: 0, hypervisor: "kvm".to_owned(), protocol: 3 };
        let patient = Patient { vm, node: "a".parse().unwrap(), incarnation: Incarnation(1), needs };
        let worker = HealWorker::start(membership, patient, move |named| drop(tell.send(named))).unwrap();
        worker.want(Some(proposal.entry()));
        told.recv_timeout(PATIENCE).unwrap();
        worker.copies(true);
        assert!(told.recv_timeout(RETURN + LOOK * 2).is_err(), "another node is named during a copy");
        worker.copies(false);
        assert!(told.recv_timeout(RETURN / 2).is_err(), "the node that was named has its time again");
        told.recv_timeout(RETURN).unwrap();
    }
}
