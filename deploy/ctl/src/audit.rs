//! `coloctl audit`: who changed what, of all nodes of a vm, in the order of their clocks.

use colo_common::stamp::utc;
use colo_proto::v1::{AuditEntry, AuditKind, ListAuditRequest, list_audit_request::Start};
use serde::Serialize;

use crate::args::Audit;
use crate::connect::{Node, Nodes};
use crate::error::CtlError;
use crate::format::clean;
use crate::output::{note, print, print_json};
use crate::status_json::{Register, register};
use crate::streams::{merged, sources};
use crate::words;

/// Entries that are put into order; more are shown as they come, node by node. A trail has 100000 at most.
const SORTED: usize = 1_000_000;

/// Lists the trails, and goes on if that is wanted.
pub(crate) async fn run(nodes: &Nodes, options: &Audit) -> Result<(), CtlError> {
    let json = options.shape.json;
    let ask = |follow| ListAuditRequest { start: options.last.map(Start::Last), follow };
    let found = sources(nodes, options.vm.as_ref()).await?;
    let list = |mut node: Node| async move { node.client.list_audit(ask(options.follow)).await };
    let mut stream = merged(found, list).await;
    let (mut entries, mut shown, mut failed) = (Vec::new(), false, None::<CtlError>);
    while let Some((_, said)) = stream.recv().await {
        match said {
            Ok(entry) if options.follow || entries.len() >= SORTED => {
                shown = true;
                show(&entry, json)?;
            }
            Ok(entry) => entries.push(entry),
            Err(e) => {
                if let Some(before) = failed.replace(e) {
                    note(&before.to_string());
                }
            }
        }
    }
    // Each node's own order stays; between nodes the clocks decide.
    entries.sort_by_key(|entry| entry.at_ms);
    let newest = options.last.and_then(|last| usize::try_from(last).ok()).unwrap_or(usize::MAX);
    entries.drain(..entries.len().saturating_sub(newest));
    entries.iter().try_for_each(|entry| show(entry, json))?;
    match failed {
        Some(e) if !shown && entries.is_empty() => Err(e),
        Some(e) => {
            note(&e.to_string());
            Ok(())
        }
        None => Ok(()),
    }
}

fn show(entry: &AuditEntry, json: bool) -> Result<(), CtlError> {
    if json { print_json(&Line::from(entry)) } else { print(&row(entry)) }
}

/// An entry for people.
pub(crate) fn row(entry: &AuditEntry) -> String {
    let mut row = format!(
        "{}  {}  term {}  {:<16}  {}",
        utc(entry.at_ms),
        clean(&entry.node),
        entry.term,
        kind(entry.kind),
        clean(&entry.what)
    );
    for (name, text) in [("by", &entry.who), ("reason", &entry.reason)] {
        if !text.is_empty() {
            row.push_str(&format!("; {name} {}", clean(text)));
        }
    }
    row + "\n"
}

/// What an entry is about, in one word.
fn kind(kind: i32) -> &'static str {
    match AuditKind::try_from(kind) {
        Ok(AuditKind::Gap) => "gap",
        Ok(AuditKind::RegisterChanged) => "register-changed",
        Ok(AuditKind::RegisterSeen) => "register-seen",
        Ok(AuditKind::Role) => "role",
        Ok(AuditKind::AckPolicy) => "ack-policy",
        Ok(AuditKind::FailoverPolicy) => "failover-policy",
        Ok(AuditKind::Command) => "command",
        Ok(AuditKind::Verified) => "verified",
        Ok(AuditKind::Unspecified) | Err(_) => "unknown",
    }
}

/// An entry, for scripts. Keys are stable.
#[derive(Serialize)]
pub(crate) struct Line {
    sequence: u64,
    at_ms: u64,
    at: String,
    node: String,
    incarnation: String,
    term: u64,
    register: Option<Register>,
    kind: &'static str,
    what: String,
    who: Option<String>,
    reason: Option<String>,
    missed: u64,
}

impl From<&AuditEntry> for Line {
    fn from(entry: &AuditEntry) -> Self {
        let some = |text: &String| Some(clean(text)).filter(|text| !text.is_empty());
        Self {
            sequence: entry.sequence,
            at_ms: entry.at_ms,
            at: utc(entry.at_ms),
            node: clean(&entry.node),
            incarnation: words::id(&entry.incarnation),
            term: entry.term,
            register: register(entry.register.as_ref()),
            kind: kind(entry.kind),
            what: clean(&entry.what),
            who: some(&entry.who),
            reason: some(&entry.reason),
            missed: entry.missed,
        }
    }
}
