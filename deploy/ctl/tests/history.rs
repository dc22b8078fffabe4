//! `coloctl audit` and `coloctl events`, against fake nodes.

mod fake;

use colo_proto::v1::{AuditEntry, AuditKind, Event, EventKind, Role};
use fake::run::run;
use fake::{Fake, paired, solo, status};
use serde_json::Value;
use tonic::Status;

fn pair() -> (Fake, Fake, Vec<String>) {
    let a = Fake::start(status("a", Role::Paired, paired("a", "b", 2)));
    let b = Fake::start(status("b", Role::Following, paired("a", "b", 2)));
    let nodes = vec![a.address.to_string(), b.address.to_string()];
    (a, b, nodes)
}

fn entry(node: &str, at_ms: u64, kind: AuditKind, what: &str) -> AuditEntry {
    AuditEntry {
        sequence: at_ms,
        at_ms,
        node: node.to_owned(),
        term: 2,
        register: Some(solo(node, 2)),
        kind: kind.into(),
        what: what.to_owned(),
        ..AuditEntry::default()
    }
}

#[test]
fn audit_lists_the_entries_of_all_nodes_in_order() {
    let (a, b, nodes) = pair();
    let mut command = entry("a", 3_000, AuditKind::Command, "stop the vm\x1b[2J");
    command.who = "eve".to_owned();
    command.reason = "maintenance".to_owned();
    a.state().audit = vec![entry("a", 1_000, AuditKind::Role, "alone after starting"), command];
    b.state().audit = vec![entry("b", 2_000, AuditKind::RegisterSeen, "solo on a in term 2")];
    let (code, out, err) = run(&nodes, "audit");
    assert_eq!((code, err.as_str()), (0, ""));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(
        lines,
        [
            "1970-01-01T00:00:01.000Z  a  term 2  role              alone after starting",
            "1970-01-01T00:00:02.000Z  b  term 2  register-seen     solo on a in term 2",
            "1970-01-01T00:00:03.000Z  a  term 2  command           stop the vm?[2J; by eve; reason maintenance",
        ]
    );
    let (code, out, _) = run(&nodes, "audit --vm demo --last 5 --follow --json");
    assert_eq!((code, out.lines().count()), (0, 3));
    let found: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told = found.iter().find(|line| line["kind"] == "command").unwrap();
    assert_eq!((&told["who"], &told["reason"]), (&"eve".into(), &"maintenance".into()));
    assert_eq!((&told["sequence"], &told["register"]["value"]), (&3_000.into(), &"solo".into()));
    assert_eq!(a.state().asked, ["audit None false", "audit Some(Last(5)) true"]);
}

#[test]
fn nodes_that_are_not_there_or_of_another_vm_are_told() {
    let (a, b, nodes) = pair();
    a.state().audit = vec![entry("a", 1_000, AuditKind::Role, "alone after starting")];
    drop(b);
    let (code, out, err) = run(&nodes, "audit");
    assert_eq!((code, out.lines().count()), (0, 1));
    assert!(err.contains(&nodes[1]), "{err}");
    for line in ["audit --vm mail", "events --vm mail"] {
        let (code, _, err) = run(&nodes, line);
        assert_eq!(code, 2, "{line}");
        assert!(err.contains("is of the vm mail"), "{line}: {err}");
    }
    a.state().refusal = Some(Status::failed_precondition("this node keeps no audit trail"));
    let (code, _, err) = run(&nodes, "audit");
    assert_eq!(code, 1);
    assert!(err.contains("keeps no audit trail"), "{err}");
    drop(a);
    for line in ["audit", "events"] {
        assert_eq!(run(&nodes, line).0, 3, "{line}");
    }
}

#[test]
fn events_are_shown_as_they_come() {
    let (a, _b, nodes) = pair();
    let event = Event {
        at_ms: 5_000,
        kind: EventKind::LinkDown.into(),
        what: "to b".to_owned(),
        role: Role::Paired.into(),
        term: 2,
        missed: 3,
        ..Event::default()
    };
    a.state().events = vec![event; 4];
    let (code, out, err) = run(&nodes, "events --count 2");
    assert_eq!((code, out.lines().count()), (0, 2));
    assert!(out.starts_with("1970-01-01T00:00:05.000Z  a  link-down   to b\n"), "{out}");
    assert!(err.contains("3 events of a are not shown"), "{err}");
    let (_, out, _) = run(&nodes, "events --json --count 1");
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&told["kind"], &told["node"], &told["missed"]),
        (&"link-down".into(), &"a".into(), &3.into())
    );
    assert_eq!((&told["role"], &told["audit"]), (&"paired".into(), &Value::Null));
}
