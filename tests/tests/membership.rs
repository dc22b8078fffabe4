//! Membership: the same rules for every kind, and etcd's under faults of a real cluster.

#[path = "membership/conformance.rs"]
mod conformance;
#[path = "membership/file.rs"]
mod file;
#[path = "membership/leases.rs"]
mod leases;
#[path = "membership/scripted.rs"]
mod scripted;

use colo_common::arbiter::Arbiter;
use colo_common::membership::{Claim, Membership, NodeRecord, NodeRole};
use colo_common::register::{Answer, Entry, Proposal, Value};
use colo_common::{Incarnation, NodeId, ProposalId, Term, VmId};

fn vm(name: &str) -> VmId {
    name.parse().unwrap()
}

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

/// A process that is bound to no vm.
fn spare(name: &str, process: u128) -> NodeRecord {
    NodeRecord {
        node: node(name),
        incarnation: Incarnation(process),
        address: format!("{name}.example:7701").parse().unwrap(),
        role: NodeRole::Spare,
        vm: None,
        version: "0.1.0".to_owned(),
        protocol: 2,
        cpu: "A CPU @ 3.00 GHz".to_owned(),
        hypervisor: "kvm".to_owned(),
        memory_free: 8 << 30,
        disk_free: 64 << 30,
        copy: None,
        draining: false,
    }
}

/// The same process, bound to a vm.
fn follower(name: &str, process: u128, of: &str) -> NodeRecord {
    NodeRecord { role: NodeRole::Follower, vm: Some(vm(of)), ..spare(name, process) }
}

/// Moves a vm's register on: `process` of node `by` runs it from now on.
fn run_on(arbiter: &dyn Arbiter, of: &str, by: &str, process: u128) -> Entry {
    let expected = arbiter.read(&vm(of)).unwrap();
    let term = expected.as_ref().map_or(Term(0), |entry| entry.term);
    let value = Value::Solo { node: node(by), incarnation: Incarnation(process) };
    let proposal = Proposal { id: ProposalId::of(Incarnation(process), term), expected, value };
    match arbiter.propose(&vm(of), &proposal).unwrap() {
        Answer::Applied(entry) => entry,
        Answer::Refused(found) => panic!("refused: {found:?}"),
    }
}

/// A claim by whoever runs `of` by `entry` on process `process` of `name`.
fn claim(of: &str, entry: &Entry, name: &str, process: u128) -> Claim {
    let Value::Solo { node: by, incarnation } = entry.value.clone() else { panic!("{entry} is not solo") };
    Claim {
        vm: vm(of),
        expected: entry.clone(),
        by,
        incarnation,
        node: node(name),
        node_incarnation: Incarnation(process),
    }
}

/// The records, as names and vms.
fn names(membership: &dyn Membership) -> Vec<String> {
    let name = |record: NodeRecord| match &record.vm {
        Some(vm) => format!("{}/{vm}", record.node),
        None => record.node.to_string(),
    };
    membership.nodes().unwrap().into_iter().map(name).collect()
}
