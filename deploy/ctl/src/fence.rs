//! `coloctl fence|confirm-fenced`: what must be sure before a guest runs by force.

use colo_common::NodeId;
use colo_common::config::Endpoint;
use colo_proto::v1::{ConfirmFencedRequest, FenceRequest, NodeRole, RegisterEntry, StatusRequest};
use serde::Serialize;
use std::time::{Duration, Instant};

use crate::args::{ConfirmFenced, Fence};
use crate::cluster::list;
use crate::connect::{COMMAND_LIMIT, Node, Nodes, QUESTION_LIMIT};
use crate::error::CtlError;
use crate::locate::{Wanted, pick};
use crate::output::{note, print, print_json};
use crate::status_json::{Register, register};
use crate::words;

/// How long a node that has stopped may still seem to live, and between two tries.
const LINK_ENDS: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(250);

#[derive(Serialize)]
struct Fenced {
    node: String,
    /// Where it is known that it is fenced.
    confirmed_at: Option<String>,
    /// Why nowhere.
    not_confirmed: Option<String>,
    register: Option<Register>,
}

/// Stops a node, and says so to the one that follows, if there is one.
pub(crate) async fn fence(nodes: &Nodes, options: &Fence) -> Result<(), CtlError> {
    let name = options.name.to_string();
    let by_hand = || {
        format!(
            "{name} is not fenced: make sure that its host is off, and say so with `coloctl confirm-fenced {name}`"
        )
    };
    let stopped = async {
        let address = match &options.at {
            Some(address) => address.clone(),
            None => listed(nodes, &options.name).await?,
        };
        let node = nodes.connect(&address).await?;
        let mut client = node.client.clone();
        node.answer(
            COMMAND_LIMIT,
            client.fence(FenceRequest { reason: options.reason.clone(), node: name.clone() }),
        )
        .await
    };
    let reply = stopped.await.inspect_err(|_| note(&by_hand()))?;
    if reply.node != name {
        let text = format!("the node that was stopped is {}, not {name}: it listens there", reply.node);
        return Err(CtlError::Refused(text));
    }
    let told = pass_on(nodes, options).await;
    if options.shape.json {
        let entry = told.as_ref().map_or(reply.register.as_ref(), |(_, entry)| Some(entry));
        return print_json(&Fenced {
            node: name,
            confirmed_at: told.as_ref().ok().map(|(address, _)| address.to_string()),
            not_confirmed: told.as_ref().err().map(ToString::to_string),
            register: register(entry),
        });
    }
    match told {
        Ok((address, _)) => print(&format!(
            "{name} has stopped, and the node at {address} knows: `coloctl promote --force` has it run the guest\n"
        )),
        Err(why) => print(&format!("{name} has stopped; it was not confirmed to another node: {why}\n")),
    }
}

/// Tells the node that follows. It may take the one that has stopped for alive until their link has ended.
async fn pass_on(nodes: &Nodes, options: &Fence) -> Result<(Endpoint, RegisterEntry), CtlError> {
    let started = Instant::now();
    loop {
        let told = async {
            let survivor = pick(nodes, Wanted::Follower).await?;
            let entry = tell(&survivor, &options.name, &options.reason).await?;
            Ok((survivor.address, entry))
        };
        match told.await {
            Err(_) if started.elapsed() < LINK_ENDS => tokio::time::sleep(AGAIN).await,
            told => return told,
        }
    }
}

/// Passes the operator's word on.
pub(crate) async fn confirm(nodes: &Nodes, options: &ConfirmFenced) -> Result<(), CtlError> {
    let node = pick(nodes, Wanted::Follower).await?;
    let entry = tell(&node, &options.name, &options.reason).await?;
    let name = options.name.to_string();
    if options.shape.json {
        return print_json(&Fenced {
            node: name,
            confirmed_at: Some(node.address.to_string()),
            not_confirmed: None,
            register: register(Some(&entry)),
        });
    }
    print(&format!("{name} is taken for fenced while the register says: {}\n", words::register(Some(&entry))))
}

async fn tell(node: &Node, name: &NodeId, reason: &str) -> Result<RegisterEntry, CtlError> {
    let request = ConfirmFencedRequest { node: name.to_string(), reason: reason.to_owned() };
    let mut client = node.client.clone();
    let reply = node.answer(COMMAND_LIMIT, client.confirm_fenced(request)).await?;
    Ok(reply.register.unwrap_or_default())
}

/// Where the node with this name listens: the one that runs the vm of the nodes that were named, if it has several.
async fn listed(nodes: &Nodes, name: &NodeId) -> Result<Endpoint, CtlError> {
    let vm = of_vm(nodes).await;
    let mut found: Vec<_> = list(nodes).await?.nodes;
    let wanted = name.to_string();
    found.retain(|node| node.node == wanted && node.role() != NodeRole::Spare);
    found.retain(|node| vm.as_ref().is_none_or(|vm| node.vm == *vm));
    match &found[..] {
        [one] => one.address.parse().map_err(|e| CtlError::Usage(format!("{wanted}: {e}"))),
        [] => Err(CtlError::Refused(format!(
            "the cluster lists no process of {wanted}; --at says where it listens"
        ))),
        _ => {
            Err(CtlError::Usage(format!("the cluster lists several processes of {wanted}; --at says which")))
        }
    }
}

/// The vm of the first node that answers and has one.
async fn of_vm(nodes: &Nodes) -> Option<String> {
    for address in nodes.addresses() {
        if let Ok(node) = nodes.connect(address).await {
            let mut client = node.client.clone();
            let status = node.answer(QUESTION_LIMIT, client.status(StatusRequest {})).await;
            if let Ok(status) = status
                && !status.vm.is_empty()
            {
                return Some(status.vm);
            }
        }
    }
    None
}
