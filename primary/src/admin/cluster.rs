//! What there is beyond this node: the nodes and vms of the cluster, as the membership lists them.

use colo_common::VmId;
use colo_common::membership::{Membership, NodeRecord, NodeRole};
use colo_common::register::Entry;
use colo_proto::convert::id_bytes;
use colo_proto::v1::{self, ClusterNode, ClusterVm, ListClusterReply};
use std::sync::Arc;
use tonic::Status;

use super::Plane;
use super::reason::Reason;

impl Plane {
    /// Everything that is listed now.
    pub(super) async fn list_cluster(&self) -> Result<ListClusterReply, Status> {
        let none = || Reason::Unavailable.status("this node starts: try again");
        let membership = Arc::clone(self.membership().ok_or_else(none)?);
        let listed = tokio::task::spawn_blocking(move || list(&*membership)).await;
        listed.map_err(|e| Reason::Internal.status(e.to_string()))?
    }
}

fn list(membership: &dyn Membership) -> Result<ListClusterReply, Status> {
    let silent = |e: colo_common::membership::MembershipError| Reason::Unavailable.status(e.to_string());
    let vms = membership.vms().map_err(silent)?.iter().map(vm).collect();
    let nodes = membership.nodes().map_err(silent)?.iter().map(node).collect();
    Ok(ListClusterReply { vms, nodes })
}

fn vm((vm, entry): &(VmId, Entry)) -> ClusterVm {
    ClusterVm { vm: vm.to_string(), register: Some(entry.into()) }
}

fn node(record: &NodeRecord) -> ClusterNode {
    ClusterNode {
        node: record.node.to_string(),
        incarnation: id_bytes(record.incarnation.0),
        address: record.address.to_string(),
        role: match record.role {
            NodeRole::Spare => v1::NodeRole::Spare,
            NodeRole::Follower => v1::NodeRole::Follower,
            NodeRole::Runner => v1::NodeRole::Runner,
            NodeRole::Waiting => v1::NodeRole::Waiting,
        }
        .into(),
        vm: record.vm.as_ref().map(ToString::to_string).unwrap_or_default(),
        version: record.version.clone(),
        protocol: record.protocol,
        cpu: record.cpu.clone(),
        hypervisor: record.hypervisor.clone(),
        memory_free_bytes: record.memory_free,
        disk_free_bytes: record.disk_free,
        copy: record.copy.map(Into::into),
        draining: record.draining,
    }
}
