//! `coloctl vms|nodes`: what there is in the cluster, as any of its nodes lists it.

use colo_proto::v1::{ClusterNode, ClusterVm, ListClusterReply, ListClusterRequest, NodeRole};
use serde::Serialize;

use crate::connect::{COMMAND_LIMIT, Nodes};
use crate::error::CtlError;
use crate::format::{bytes, clean};
use crate::output::{print, print_json};
use crate::status_json::{Point, Register, register};
use crate::words;

/// Lists the vms with their registers.
pub(crate) async fn vms(nodes: &Nodes, json: bool) -> Result<(), CtlError> {
    #[derive(Serialize)]
    struct Line {
        vm: String,
        register: Option<Register>,
    }
    let ListClusterReply { vms, .. } = list(nodes).await?;
    if json {
        let line = |vm: ClusterVm| Line { register: register(vm.register.as_ref()), vm: vm.vm };
        return vms.into_iter().map(line).try_for_each(|line| print_json(&line));
    }
    let row = |vm: &ClusterVm| vec![clean(&vm.vm), words::register(vm.register.as_ref())];
    print(&table(&["vm", "register"], vms.iter().map(row).collect()))
}

/// Lists the processes that say that they live.
pub(crate) async fn nodes(nodes: &Nodes, json: bool) -> Result<(), CtlError> {
    #[derive(Serialize)]
    struct Line {
        node: String,
        address: String,
        role: &'static str,
        vm: Option<String>,
        version: String,
        protocol: u32,
        cpu: String,
        hypervisor: String,
        memory_free_bytes: u64,
        disk_free_bytes: u64,
        copy: Option<Point>,
        draining: bool,
    }
    let ListClusterReply { nodes, .. } = list(nodes).await?;
    if json {
        return nodes.into_iter().try_for_each(|node| {
            let role = role(&node);
            print_json(&Line {
                role,
                vm: Some(node.vm).filter(|vm| !vm.is_empty()),
                node: node.node,
                address: node.address,
                version: node.version,
                protocol: node.protocol,
                cpu: node.cpu,
                hypervisor: node.hypervisor,
                memory_free_bytes: node.memory_free_bytes,
                disk_free_bytes: node.disk_free_bytes,
                copy: node.copy.map(Point::from),
                draining: node.draining,
            })
        });
    }
    let row = |node: &ClusterNode| {
        vec![
            clean(&node.node),
            clean(&node.vm),
            format!("{}{}", role(node), if node.draining { ", draining" } else { "" }),
            clean(&node.address),
            words::point(node.copy),
            bytes(node.memory_free_bytes),
            bytes(node.disk_free_bytes),
            clean(&node.version),
        ]
    };
    let head = ["node", "vm", "role", "address", "copy", "memory free", "disk free", "version"];
    print(&table(&head, nodes.iter().map(row).collect()))
}

/// The first node that answers is asked: all list the same.
pub(crate) async fn list(nodes: &Nodes) -> Result<ListClusterReply, CtlError> {
    let mut failed = None;
    for address in nodes.addresses() {
        let answer = async {
            let node = nodes.connect(address).await?;
            let mut client = node.client.clone();
            node.answer(COMMAND_LIMIT, client.list_cluster(ListClusterRequest {})).await
        };
        match answer.await {
            Ok(reply) => return Ok(reply),
            Err(e) => failed = failed.or(Some(e)),
        }
    }
    Err(failed.unwrap_or_else(|| CtlError::Usage("no node is named".to_owned())))
}

pub(crate) fn role(node: &ClusterNode) -> &'static str {
    match node.role() {
        NodeRole::Unspecified => "?",
        NodeRole::Spare => "spare",
        NodeRole::Follower => "follower",
        NodeRole::Runner => "runner",
        NodeRole::Waiting => "waiting",
    }
}

/// Columns as wide as their longest cell.
fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::table;

    #[test]
    fn columns_stand_below_their_heads() {
        let rows = vec![vec!["a".to_owned(), "longer".to_owned()], vec!["bcd".to_owned(), String::new()]];
        assert_eq!(table(&["x", "y"], rows), "x    y\na    longer\nbcd\n");
    }
}
