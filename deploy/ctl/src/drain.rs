//! `coloctl drain`: empties a node, and waits until that is done.

use colo_proto::v1::{ClusterNode, DrainRequest, NodeRole};
use serde::Serialize;
use std::time::{Duration, Instant};

use crate::args::Drain;
use crate::cluster::{list, role};
use crate::connect::{COMMAND_LIMIT, Nodes};
use crate::error::CtlError;
use crate::output::{note, print, print_json};

/// Between two looks at what the node still does.
const LOOK: Duration = Duration::from_millis(500);

/// What a process of the node did for a vm, and what came of it.
#[derive(Serialize)]
struct Line {
    vm: String,
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
        if process.role() == NodeRole::Spare {
            if !options.end {
                note(&format!("the spare at {} can be claimed until its process is ended", process.address));
            }
            continue;
        }
        say(nodes, process, options).await?;
        let line = Line {
            vm: process.vm.clone(),
            address: process.address.clone(),
            role: role(process),
            drains: !options.end,
        };
        if json {
            print_json(&line)?;
        } else if options.end {
            print(&format!("{name} is there for {} again\n", line.vm))?;
        } else {
            print(&format!("{name} is to leave {} ({}, at {})\n", line.vm, line.role, line.address))?;
        }
    }
    if options.end { Ok(()) } else { until_empty(nodes, options, &name).await }
}

async fn say(nodes: &Nodes, process: &ClusterNode, options: &Drain) -> Result<(), CtlError> {
    let address = process.address.parse().map_err(|e| CtlError::Usage(format!("{}: {e}", process.node)))?;
    let node = nodes.connect(&address).await?;
    let mut client = node.client.clone();
    let request = DrainRequest { drain: !options.end, reason: options.reason.clone() };
    node.answer(COMMAND_LIMIT, client.drain(request)).await.map(drop)
}

async fn until_empty(nodes: &Nodes, options: &Drain, name: &str) -> Result<(), CtlError> {
    let started = Instant::now();
    loop {
        let busy = |process: &ClusterNode| matches!(process.role(), NodeRole::Runner | NodeRole::Follower);
        let mine = of(nodes, name).await?;
        let Some(process) = mine.iter().find(|process| busy(process)) else {
            return if options.shape.json {
                Ok(())
            } else {
                print(&format!("{name} is empty: its processes can be ended\n"))
            };
        };
        if started.elapsed() >= Duration::from_secs(options.wait) {
            let does = if process.role() == NodeRole::Runner {
                "still runs it: it is protected by nobody that it could be moved to"
            } else {
                "still follows it: no other node is there that could"
            };
            return Err(CtlError::Refused(format!(
                "{name} is not empty after {} s: for {}, it {does}; the drain stands until `coloctl drain --end {name}`",
                options.wait, process.vm
            )));
        }
        // A runner that had nobody to move to may have somebody now.
        if process.role() == NodeRole::Runner {
            drop(say(nodes, process, options).await);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn of(nodes: &Nodes, name: &str) -> Result<Vec<ClusterNode>, CtlError> {
    let mut listed = list(nodes).await?.nodes;
    listed.retain(|process| process.node == name);
    Ok(listed)
}
