//! Lists the audit trail of a node that does not run.

use anyhow::Context;
use colo_common::Incarnation;
use colo_common::stamp::utc;
use colo_common::vmdir::VmDirectory;
use colo_proto::v1::AuditEntry;
use std::io::Write;
use std::process::ExitCode;

use super::Trail;

/// Entries read at once.
const CHUNK: usize = 1024;

/// Prints the newest `last` entries of the trail in a vm's directory, or all; one line each, oldest first.
///
/// # Errors
/// There is none, it is damaged, or standard output cannot be written.
pub fn print(directory: &VmDirectory, last: Option<u64>) -> anyhow::Result<ExitCode> {
    let trail = Trail::open_to_read(&directory.audit())?;
    let (first, next) = trail.range();
    let mut from = last.map_or(first, |last| next.saturating_sub(last).max(first));
    let mut out = std::io::stdout().lock();
    while from < next {
        let entries = trail.read(from, CHUNK)?;
        for entry in &entries {
            writeln!(out, "{}", line(entry)).context("cannot write to standard output; is its disk full?")?;
        }
        from = entries.last().map_or(next, |entry| entry.sequence + 1);
    }
    Ok(ExitCode::SUCCESS)
}

/// An entry in one line, as plain as it was noted: what came from outside cannot forge a line.
fn line(entry: &AuditEntry) -> String {
    let process =
        <[u8; 16]>::try_from(entry.incarnation.as_slice()).map(u128::from_be_bytes).map(Incarnation);
    let process = process.map_or_else(|_| "-".to_owned(), |process| format!("{:032x}", process.0));
    let kind = entry.kind().as_str_name().trim_start_matches("AUDIT_KIND_").to_lowercase();
    let mut line = format!(
        "{} {} node={} process={process} term={} {kind}: {}",
        entry.sequence,
        utc(entry.at_ms),
        entry.node,
        entry.term,
        entry.what
    );
    for (name, text) in [("by", &entry.who), ("reason", &entry.reason)] {
        if !text.is_empty() {
            line.push_str(&format!("; {name} {text}"));
        }
    }
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::line;
    use colo_proto::v1::{AuditEntry, AuditKind};

    #[test]
    fn a_line_is_one_line() {
        let entry = AuditEntry {
            sequence: 4,
            at_ms: 1000,
            node: "a".to_owned(),
            term: 3,
            kind: AuditKind::Command.into(),
            what: "stop\nthe vm".to_owned(),
            who: "eve".to_owned(),
            ..AuditEntry::default()
        };
        assert_eq!(
            line(&entry),
            "4 1970-01-01T00:00:01.000Z node=a process=- term=3 command: stop the vm; by eve"
        );
    }
}
