//! What a simulated process says of itself to the cluster: `primary::presence`, and the lease that its record lives by.

use colo_common::Incarnation;
use colo_common::membership::{Membership, NodeRecord, NodeRole, Registration};
use colo_secondary::node::offered;
use colo_secondary::replica::Copy;

use crate::common::{Common, name};
use crate::healing::{HYPERVISOR, PROTOCOL};
use crate::plan::{HASTE, Time};
use crate::world::Role;

/// As in `presence`.
const RETRY: Time = 2_000 / HASTE;
/// How long a record outlives its process: the lease of the default configuration.
pub(crate) const LEASE: Time = 5_000 / HASTE;

/// `presence::Worker`, with the registration of its process.
pub(crate) struct Presence {
    pub(crate) process: Incarnation,
    record: NodeRecord,
    registered: Option<Box<dyn Registration>>,
    /// The node was being emptied when it was registered as a spare.
    pub(crate) drained_spare: bool,
    told: Option<NodeRecord>,
    next: Time,
    /// When its lease was renewed last.
    renewed: Time,
}

impl Presence {
    /// Of a process that has said nothing yet.
    pub(crate) fn new(x: usize, process: Incarnation, draining: bool, now: Time) -> Self {
        let record = NodeRecord {
            node: name(x),
            incarnation: process,
            address: format!("{}:7701", name(x)).parse().expect("an address"),
            role: NodeRole::Spare,
            vm: None,
            version: String::new(),
            protocol: PROTOCOL,
            cpu: String::new(),
            hypervisor: HYPERVISOR.to_owned(),
            memory_free: 1 << 30,
            disk_free: 1 << 30,
            copy: None,
            draining,
        };
        Self { process, record, registered: None, drained_spare: false, told: None, next: now, renewed: now }
    }

    /// `Membership::register` of a spare; whether it is one now.
    pub(crate) fn register(&mut self, x: usize, common: &Common) -> bool {
        let record = self.record.clone();
        self.drained_spare = record.draining;
        let registered = common.ask_membership(x, |membership| membership.register(record));
        self.registered = registered.ok();
        self.registered.is_some()
    }

    /// A turn of `Worker::run`, of a process that is bound to a vm.
    pub(crate) fn tell(&mut self, x: usize, role: &Role, draining: bool, common: &Common) {
        self.record.draining = draining;
        self.record.vm = Some(common.vm().clone());
        (self.record.role, self.record.copy) = account(role);
        if common.now < self.next || self.told.as_ref() == Some(&self.record) {
            return;
        }
        let record = self.record.clone();
        let said = common.ask_membership(x, |membership| match &self.registered {
            Some(registered) => registered.update(record).map(|()| None),
            None => membership.register(record).map(Some),
        });
        match said {
            Ok(new) => {
                self.registered = new.or(self.registered.take());
                self.told = Some(self.record.clone());
            }
            Err(_) => self.next = common.now + RETRY,
        }
    }

    /// Its lease is renewed, as long as the process can; whether it has run out.
    pub(crate) fn renew(&mut self, renews: bool, now: Time) -> bool {
        if renews {
            self.renewed = now;
        }
        let over = now - self.renewed > LEASE;
        if over {
            // What could not be kept is written again, as soon as that can be done.
            (self.told, self.renewed) = (None, now);
        }
        over
    }

    /// A spare whose record has run out writes it again.
    pub(crate) fn write_again(&mut self, x: usize, common: &Common) {
        let lost = self.registered.as_ref().is_some_and(|registered| !registered.is_registered());
        if lost && let Some(registered) = &self.registered {
            let record = self.record.clone();
            // Tried again at the next look.
            drop(common.ask_membership(x, |_| registered.update(record)));
        }
    }
}

/// `presence::fill`.
fn account(role: &Role) -> (NodeRole, Option<colo_common::Point>) {
    match role {
        Role::Runner(runner) if runner.status.role.runs() => (NodeRole::Runner, None),
        Role::Follower(follower) => {
            let holds = matches!(follower.replica.copy(), Copy::Whole { .. } | Copy::Inconsistent);
            if holds && follower.link.is_some() {
                return (NodeRole::Follower, None);
            }
            let (_, staged, stale) = offered(follower.replica.copy());
            (NodeRole::Waiting, staged.or(stale))
        }
        _ => (NodeRole::Waiting, None),
    }
}
