//! `coloctl drain`: empties a node, and waits until that is done.

use colo_proto::v1::register_entry::Value;
use colo_proto::v1::{ClusterNode, DrainRequest, ListClusterReply, NodeRole, RegisterEntry};
use serde::Serialize;
use std::time::{Duration, Instant};

use crate::args::Drain;
use crate::cluster::{list, role};
use crate::connect::{COMMAND_LIMIT, Nodes};
use crate::error::CtlError;
use crate::format::clean;
use crate::output::{print, print_json};

/// Between two looks at what the node still does.
const LOOK: Duration = Duration::from_millis(500);

/// How long it must do nothing: longer than a guest that was moved away waits for it to follow.
const STAYS: Duration = Duration::from_secs(4);
/// Between two times that a runner is told again.
const AGAIN: Duration = Duration::from_secs(5);

/// What a process of the node did, and what came of it.
#[derive(Serialize)]
struct Line {
    /// For which vm; none of a spare.
    vm: Option<String>,
    address: String,
    role: &'static str,
    drains: bool,
}

/// Says it to every process of the node.
pub(crate) async fn run(nodes: &Nodes, options: &Drain) -> Result<(), CtlError> {
    let (name, json) = (options.name.to_string(), options.shape.json);
    let mine = of(nodes, &name).await?;
    if mine.is_empty() {
        return Err(CtlError::Refused(format!("the cluster lists no process of {name}")));
    }
    for process in &mine {
        say(nodes, process, options).await?;
        let line = Line {
            vm: Some(process.vm.clone()).filter(|vm| !vm.is_empty()),
            address: process.address.clone(),
            role: role(process),
            drains: !options.end,
        };
        if json {
            print_json(&line)?;
        } else {
            print(&line.words(&name, options.end))?;
        }
    }
    if options.end { Ok(()) } else { until_empty(nodes, options, &name).await }
}

impl Line {
    fn words(&self, name: &str, end: bool) -> String {
        let Self { address, role, .. } = self;
        match (&self.vm, end) {
            (Some(vm), false) => format!("{name} is to leave {} ({role}, at {address})\n", clean(vm)),
            (Some(vm), true) => format!("{name} is there for {} again\n", clean(vm)),
            (None, false) => format!("{name} is not to be claimed any more ({role}, at {address})\n"),
            (None, true) => format!("{name} can be claimed again ({role}, at {address})\n"),
        }
    }
}

async fn say(nodes: &Nodes, process: &ClusterNode, options: &Drain) -> Result<(), CtlError> {
    let address = process.address.parse().map_err(|e| CtlError::Usage(format!("{}: {e}", process.node)))?;
    let node = nodes.connect(&address).await?;
    let mut client = node.client.clone();
    let request = DrainRequest { drain: !options.end, reason: options.reason.clone() };
    node.answer(COMMAND_LIMIT, client.drain(request)).await.map(drop)
}

async fn until_empty(nodes: &Nodes, options: &Drain, name: &str) -> Result<(), CtlError> {
    let (started, mut asked, mut empty_since) = (Instant::now(), Instant::now(), None);
    loop {
        let ListClusterReply { vms, nodes: processes } = list(nodes).await?;
        let busy = |process: &&ClusterNode| {
            process.node == name && matches!(process.role(), NodeRole::Runner | NodeRole::Follower)
        };
        let named = vms.iter().find(|vm| vm.register.as_ref().is_some_and(|entry| names(entry, name)));
        let process = processes.iter().find(busy);
        if process.is_none() && named.is_none() {
            if empty_since.get_or_insert_with(Instant::now).elapsed() >= STAYS {
                return if options.shape.json {
                    Ok(())
                } else {
                    print(&format!("{name} is empty: its processes can be ended\n"))
                };
            }
            tokio::time::sleep(LOOK).await;
            continue;
        }
        empty_since = None;
        if started.elapsed() >= Duration::from_secs(options.wait) {
            let does = match process.map(ClusterNode::role) {
                Some(NodeRole::Runner) => {
                    "still runs it: it is protected by nobody that it could be moved to"
                }
                Some(_) => "still follows it: no other node is there that could",
                None => "may run it by the register: bring it back, or promote another one by force",
            };
            let vm = process.map(|process| &process.vm).or(named.map(|vm| &vm.vm)).map_or("", String::as_str);
            return Err(CtlError::Refused(format!(
                "{name} is not empty after {} s: for {}, it {does}; the drain stands until `coloctl drain --end {name}`",
                options.wait,
                clean(vm)
            )));
        }
        // A runner that had nobody to move to may have somebody now.
        if let Some(process) = process.filter(|process| process.role() == NodeRole::Runner)
            && asked.elapsed() >= AGAIN
        {
            asked = Instant::now();
            drop(say(nodes, process, options).await);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether the register gives the node a part in the vm.
fn names(entry: &RegisterEntry, node: &str) -> bool {
    match &entry.value {
        Some(Value::Solo(solo)) => solo.node == node,
        Some(Value::Paired(paired)) => paired.primary == node || paired.secondary == node,
        Some(Value::Stopped(_)) | None => false,
    }
}

async fn of(nodes: &Nodes, name: &str) -> Result<Vec<ClusterNode>, CtlError> {
    let mut listed = list(nodes).await?.nodes;
    listed.retain(|process| process.node == name);
    Ok(listed)
}
