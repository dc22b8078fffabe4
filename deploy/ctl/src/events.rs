//! `coloctl events`: what happens at the nodes from now on.

use colo_common::stamp::utc;
use colo_proto::v1::{Event, EventKind, EventsRequest};
use serde::Serialize;

use crate::args::Events;
use crate::audit;
use crate::connect::{Node, Nodes};
use crate::error::CtlError;
use crate::format::clean;
use crate::output::{note, print, print_json};
use crate::status_json::{Register, register};
use crate::streams::{merged, sources};
use crate::words;

/// Shows events until enough are shown, or no node is left.
pub(crate) async fn run(nodes: &Nodes, options: &Events) -> Result<(), CtlError> {
    let found = sources(nodes, options.vm.as_ref()).await?;
    let listen = |mut node: Node| async move { node.client.events(EventsRequest {}).await };
    let mut stream = merged(found, listen).await;
    let (mut shown, mut lost) = (0, None::<CtlError>);
    while let Some((node, said)) = stream.recv().await {
        match said {
            Ok(event) => {
                show(&clean(&node), &event, options.shape.json)?;
                shown += 1;
            }
            Err(e) => {
                if let Some(before) = lost.replace(e) {
                    note(&before.to_string());
                }
            }
        }
        if options.count.is_some_and(|count| shown >= count) {
            return Ok(());
        }
    }
    // Whoever wanted more than the nodes lived to tell is told so.
    lost.map_or(Ok(()), Err)
}

fn show(node: &str, event: &Event, json: bool) -> Result<(), CtlError> {
    if json {
        return print_json(&Line::new(node, event));
    }
    if event.missed > 0 {
        note(&format!("{} events of {node} are not shown, since this was slow to read", event.missed));
    }
    print(&row(node, event))
}

fn row(node: &str, event: &Event) -> String {
    let (when, kind, what) = (utc(event.at_ms), kind(event.kind), clean(&event.what));
    format!("{when}  {node}  {kind:<10}  {what}\n")
}

/// What an event is about, in one word.
fn kind(kind: i32) -> &'static str {
    match EventKind::try_from(kind) {
        Ok(EventKind::Role) => "role",
        Ok(EventKind::Register) => "register",
        Ok(EventKind::AckPolicy) => "ack-policy",
        Ok(EventKind::LinkUp) => "link-up",
        Ok(EventKind::LinkDown) => "link-down",
        Ok(EventKind::Suspicion) => "suspicion",
        Ok(EventKind::Seed) => "seed",
        Ok(EventKind::Promoted) => "promoted",
        Ok(EventKind::Error) => "error",
        Ok(EventKind::Audit) => "audit",
        Ok(EventKind::Verified) => "verified",
        Ok(EventKind::Unspecified) | Err(_) => "unknown",
    }
}

/// An event, for scripts. Keys are stable.
#[derive(Serialize)]
struct Line {
    node: String,
    at_ms: u64,
    at: String,
    kind: &'static str,
    what: String,
    role: &'static str,
    term: u64,
    missed: u64,
    register: Option<Register>,
    audit: Option<audit::Line>,
}

impl Line {
    fn new(node: &str, event: &Event) -> Self {
        Self {
            node: node.to_owned(),
            at_ms: event.at_ms,
            at: utc(event.at_ms),
            kind: kind(event.kind),
            what: clean(&event.what),
            role: words::role(event.role),
            term: event.term,
            missed: event.missed,
            register: register(event.register.as_ref()),
            audit: event.audit.as_ref().map(audit::Line::from),
        }
    }
}
