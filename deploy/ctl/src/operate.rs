//! `coloctl switchover|promote|stop|policy|failover`: single calls that change something.

use colo_proto::v1::stop_request::Scope;
use colo_proto::v1::{
    AckPolicy, FailoverPolicy, PromoteRequest, SetAckPolicyRequest, SetFailoverRequest, StopRequest,
    SwitchoverRequest,
};
use serde::Serialize;
use std::time::Duration;

use crate::args::{Ack, Failover, Policy, Promote, Stop, Who};
use crate::connect::{COMMAND_LIMIT, Nodes};
use crate::error::CtlError;
use crate::format::millis;
use crate::locate::{Wanted, pick};
use crate::output::{print, print_json};
use crate::status_json::{Point, Register, register};
use crate::words;

/// Moves the guest to its secondary.
pub(crate) async fn switchover(nodes: &Nodes, json: bool) -> Result<(), CtlError> {
    #[derive(Serialize)]
    struct Moved {
        register: Option<Register>,
        elapsed_ms: u64,
    }
    let node = pick(nodes, Wanted::Runner).await?;
    let mut client = node.client.clone();
    let reply = node.answer(COMMAND_LIMIT, client.switchover(SwitchoverRequest {})).await?;
    if json {
        let register = register(reply.register.as_ref());
        return print_json(&Moved { register, elapsed_ms: reply.elapsed_ms });
    }
    let (register, elapsed) = (words::register(reply.register.as_ref()), millis(reply.elapsed_ms));
    print(&format!("the guest has moved: {register}, after {elapsed}\n"))
}

/// Makes the secondary run the guest.
pub(crate) async fn promote(nodes: &Nodes, options: &Promote) -> Result<(), CtlError> {
    #[derive(Serialize)]
    struct Promoted {
        register: Option<Register>,
        point: Option<Point>,
        elapsed_ms: u64,
    }
    let node = pick(nodes, Wanted::Follower).await?;
    let mut client = node.client.clone();
    let reason = options.reason.clone().unwrap_or_default();
    let request = PromoteRequest { force: options.force, reason };
    let reply = node.answer(COMMAND_LIMIT, client.promote(request)).await?;
    if options.shape.json {
        let register = register(reply.register.as_ref());
        let (point, elapsed_ms) = (reply.point.map(Point::from), reply.elapsed_ms);
        return print_json(&Promoted { register, point, elapsed_ms });
    }
    let from = Some(words::point(reply.point)).filter(|point| !point.is_empty());
    print(&format!(
        "the guest runs at {}: {}{}, after {}\n",
        node.address,
        words::register(reply.register.as_ref()),
        from.map(|point| format!(", from point {point}")).unwrap_or_default(),
        millis(reply.elapsed_ms)
    ))
}

/// Stops the vm, or a node's part in it.
pub(crate) async fn stop(nodes: &Nodes, options: &Stop) -> Result<(), CtlError> {
    #[derive(Serialize)]
    struct Stopped {
        register: Option<Register>,
    }
    let node = match nodes.addresses() {
        [only] => nodes.connect(only).await?,
        _ if options.this_node => {
            let text = "stop --this-node needs exactly one --node, the one that shall end";
            return Err(CtlError::Usage(text.to_owned()));
        }
        _ => pick(nodes, Wanted::Runner).await?,
    };
    let grace = Duration::from_secs(if options.vm { options.grace } else { 0 });
    let request = StopRequest {
        scope: if options.vm { Scope::Vm } else { Scope::Node }.into(),
        grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
    };
    let mut client = node.client.clone();
    let reply = node.answer(grace + COMMAND_LIMIT, client.stop(request)).await?;
    if options.shape.json {
        return print_json(&Stopped { register: register(reply.register.as_ref()) });
    }
    let register = words::register(reply.register.as_ref());
    if options.vm {
        // The register's words begin with "stopped".
        print(&format!("the vm is {}\n", if register.is_empty() { "stopped" } else { &register }))
    } else {
        // A spare has none.
        let says = if register.is_empty() { register } else { format!("; the register says: {register}") };
        print(&format!("the node at {} ends{says}\n", node.address))
    }
}

/// Says what an ack means.
pub(crate) async fn policy(nodes: &Nodes, options: &Policy) -> Result<(), CtlError> {
    #[derive(Serialize)]
    struct Set {
        policy: &'static str,
        pending: bool,
    }
    let node = pick(nodes, Wanted::Follower).await?;
    let policy = match options.policy {
        Ack::Memory => AckPolicy::Memory,
        Ack::Disk => AckPolicy::Disk,
    };
    let mut client = node.client.clone();
    let request = SetAckPolicyRequest { policy: policy.into() };
    let reply = node.answer(COMMAND_LIMIT, client.set_ack_policy(request)).await?;
    let now = words::policy(reply.policy);
    if options.shape.json {
        return print_json(&Set { policy: now, pending: reply.pending });
    }
    let wait = if reply.pending { "; the change waits until it is safe" } else { "" };
    print(&format!("an acknowledgement means {now}{wait}\n"))
}

/// Says who decides on a failover.
pub(crate) async fn failover(nodes: &Nodes, options: &Failover) -> Result<(), CtlError> {
    #[derive(Serialize)]
    struct Set {
        failover: &'static str,
    }
    let node = pick(nodes, Wanted::Follower).await?;
    let (policy, failover, words) = match options.policy {
        Who::Auto => (FailoverPolicy::Auto, "auto", "takes over by itself when the runner dies"),
        Who::Manual => (FailoverPolicy::Manual, "manual", "takes over when an operator says so"),
    };
    let mut client = node.client.clone();
    let request = SetFailoverRequest { policy: policy.into() };
    node.answer(COMMAND_LIMIT, client.set_failover(request)).await?;
    if options.shape.json {
        return print_json(&Set { failover });
    }
    print(&format!("the node at {} {words}, until its process ends\n", node.address))
}
