//! The arbiters: the same rules for all of them, and etcd's under faults of a real cluster.

#[path = "arbiter/conformance.rs"]
mod conformance;
#[path = "arbiter/faults.rs"]
mod faults;
#[path = "arbiter/history.rs"]
mod history;
#[path = "arbiter/latency.rs"]
mod latency;
#[path = "arbiter/refusals.rs"]
mod refusals;

use colo_common::arbiter::etcd::EtcdArbiter;
use colo_common::register::{Entry, Proposal, Value};
use colo_common::{Incarnation, ProposalId, Term, VmId};
use colo_tests::etcd::EtcdCluster;

fn vm() -> VmId {
    "web".parse().unwrap()
}

/// What process `process` wants once the register holds `expected`.
fn proposal(process: u128, expected: Option<Entry>) -> Proposal {
    let incarnation = Incarnation(process);
    let term = expected.as_ref().map_or(Term(0), |entry| entry.term);
    let value = Value::Solo { node: "a".parse().unwrap(), incarnation };
    Proposal { id: ProposalId::of(incarnation, term), expected, value }
}

fn client(cluster: &EtcdCluster) -> EtcdArbiter {
    EtcdArbiter::open(&cluster.config()).unwrap()
}
