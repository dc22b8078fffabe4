//! Every command but the console, against fake nodes.

mod fake;

use colo_proto::v1::protect_progress::Phase;
use colo_proto::v1::{
    self, Disk, EpochReport, HealthReply, Link, Network, Pause, Point, Points, ProtectProgress, Role,
    VerifiedPart, VerifyProgress,
};
use fake::run::run;
use fake::{Fake, paired, solo, status, stopped};
use serde_json::Value;
use tonic::Status;

fn pair() -> (Fake, Fake, Vec<String>) {
    let a = Fake::start(status("a", Role::Paired, paired("a", "b", 2)));
    let b = Fake::start(status("b", Role::Following, paired("a", "b", 2)));
    let nodes = vec![a.address.to_string(), b.address.to_string()];
    (a, b, nodes)
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).expect(line)
}

#[test]
fn status_shows_both_nodes_side_by_side() {
    let (a, b, nodes) = pair();
    let point = |epoch| Some(Point { term: 2, epoch });
    a.state().status.points = Some(Points { tip: point(9), acked: point(7), ..Default::default() });
    a.state().status.link =
        Some(Link { peer: "b".into(), connected: true, in_flight: 2, ..Default::default() });
    b.state().status.points = Some(Points { staged: point(8), ..Default::default() });
    b.state().status.last_error = "disk full\x1b[2J".to_owned();
    b.state().status.last_error_age_ms = 61_000;
    b.state().status.disk = Some(Disk {
        path: "/web.img".into(),
        bytes: 1 << 20,
        overlay_bytes: Some(4096),
        failure: "a sync failed".into(),
        ..Default::default()
    });
    let (code, out, err) = run(&nodes, "status");
    assert_eq!((code, err.as_str()), (0, ""));
    let line = |name: &str| {
        let line = out.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("{name} in {out}"))
            .split_whitespace()
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert!(out.starts_with(&format!("demo runs on a ({}), protected\n", nodes[0])), "{out}");
    assert_eq!(line("role"), "paired following");
    assert_eq!(line("register"), ["on a, protected by b in term 2"; 2].join(" "));
    assert_eq!((line("tip").as_str(), line("staged").as_str()), ("2.9", "2.8"));
    assert_eq!(line("lag"), "2 epochs, 2 in flight");
    assert_eq!(line("disk"), "1.0 MiB, /web.img, 4.0 KiB to fold, FAILED");
    let below = "\nb: the guest's disk has failed: a sync failed\nb, 61 s ago: disk full?[2J\n";
    assert!(out.ends_with(below), "{out}");
}

#[test]
fn status_as_json_has_stable_keys() {
    let (a, b, nodes) = pair();
    drop(b);
    a.state().status.disk =
        Some(Disk { path: "/web.img".into(), bytes: 1 << 20, failure: "gone".into(), ..Default::default() });
    a.state().status.network =
        Some(Network { tap: "colo-a".into(), carrier: true, frames_held: 3, ..Default::default() });
    let (code, out, _) = run(&nodes, "status --json");
    assert_eq!((code, out.lines().count()), (0, 1));
    let answer = json(&out);
    assert_eq!((answer["runner"].as_str(), answer["protected"].as_bool()), (Some("a"), Some(true)));
    let status = &answer["nodes"][0]["status"];
    assert_eq!(status["role"], "paired");
    assert_eq!(status["register"]["value"], "paired");
    assert_eq!(status["register"]["replica"], format!("{:032x}", 0xabc));
    assert_eq!(status["points"]["tip"], Value::Null);
    assert_eq!(status["counters"]["ring_overruns"], 0);
    assert_eq!((&status["disk"]["path"], &status["disk"]["failure"]), (&"/web.img".into(), &"gone".into()));
    assert_eq!(
        (&status["disk"]["bytes"], &status["disk"]["overlay_bytes"]),
        (&(1 << 20).into(), &Value::Null)
    );
    assert_eq!((&status["network"]["tap"], &status["network"]["carrier"]), (&"colo-a".into(), &true.into()));
    assert_eq!(
        (&status["network"]["frames_held"], &status["network"]["frames_lost"]),
        (&3.into(), &0.into())
    );
    assert_eq!(answer["nodes"][1]["answers"], false);
    let error = answer["nodes"][1]["error"].as_str().unwrap();
    assert!(error.starts_with(&format!("no node answers at {}: ", nodes[1])), "{error}");
    drop(a);
    assert_eq!(run(&nodes, "status --json").0, 3);
}

#[test]
fn a_node_that_is_not_there_is_named_with_the_remedy() {
    let (a, b, nodes) = pair();
    drop((a, b));
    let (code, out, err) = run(&nodes[..1], "promote");
    assert_eq!((code, out.as_str()), (3, ""));
    let wanted =
        format!("coloctl: no node answers at {}: Connection refused (os error 111); start it", nodes[0]);
    assert!(err.starts_with(&wanted), "{err}");
    let (code, _, err) = run(&nodes, "pause");
    assert_eq!(code, 3);
    assert!(err.contains(&nodes[0]) && err.contains(&nodes[1]) && err.contains("check --node"), "{err}");
}

#[test]
fn a_comparison_says_what_it_found() {
    let (a, _b, nodes) = pair();
    let part = |compared, differing, places: &[u64]| VerifiedPart {
        total: 100,
        looked_at: compared,
        compared,
        with_bytes: compared / 2,
        not_compared: 100 - compared,
        differing,
        places: places.to_vec(),
    };
    let step = |done, memory, disk| VerifyProgress {
        done,
        memory: Some(memory),
        disk,
        elapsed_ms: 1200,
        point: Some(Point { term: 2, epoch: 44 }),
    };
    let half = step(false, part(50, 0, &[]), Some(part(0, 0, &[])));
    let equal = step(true, part(98, 0, &[]), Some(part(100, 0, &[])));
    a.state().comparison = vec![Ok(half.clone()), Ok(equal)];
    let (code, out, err) = run(&nodes, "verify");
    assert_eq!((code, err.as_str()), (0, "compared 50% of 100 pages, 0% of 100 blocks  1.2 s\n"));
    let wanted = "verified 98 pages, 100 blocks (99 with bytes) in 1.2 s; not compared 2; differing 0\n";
    assert!(out.starts_with(wanted), "{out}");
    a.state().comparison = vec![Ok(step(true, part(90, 1, &[0x1f]), None))];
    let (code, out, _) = run(&nodes, "verify --memory --rate 8");
    assert!(code == 1 && out.contains("differing 1\n") && out.contains("differing pages: 0x1f\n"), "{out}");
    let (code, out, _) = run(&nodes, "verify --disk --json");
    let line = json(&out);
    assert_eq!((code, &line["memory"]["places"][0], &line["point"]), (1, &0x1f.into(), &"2.44".into()));
    assert_eq!(a.state().asked, ["verify false false 0", "verify true false 8", "verify false true 0"]);
    let why = "the copy was compared in part: the link to the secondary has ended";
    a.state().comparison = vec![Ok(half), Err(Status::aborted(why))];
    let (code, out, err) = run(&nodes, "verify");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.ends_with(&format!("coloctl: {why}\n")), "{err}");
    a.state().comparison.truncate(1);
    let (code, _, err) = run(&nodes, "verify");
    assert!(code == 1 && err.contains("before all was compared"), "{err}");
}

#[test]
fn commands_go_to_the_node_that_they_are_meant_for() {
    let (a, b, nodes) = pair();
    for line in ["pause", "resume --json", "stop --vm --grace 2"] {
        assert_eq!(run(&nodes, line).0, 0, "{line}");
    }
    let (_, out, _) = run(&nodes, "switchover");
    assert!(out.starts_with("the guest has moved: ") && out.ends_with(", after 48 ms\n"), "{out}");
    assert_eq!(a.state().asked, ["pause", "resume", "stop 1 2000", "switchover"]);
    let (_, out, _) = run(&nodes, "promote");
    assert!(out.starts_with(&format!("the guest runs at {}: ", nodes[1])), "{out}");
    assert!(out.ends_with(", from point 2.44, after 26 ms\n"), "{out}");
    let (_, out, _) = run(&nodes, "policy disk");
    assert_eq!(out, "an acknowledgement means disk; the change waits until it is safe\n");
    let (_, out, _) = run(&nodes, "failover manual");
    assert!(out.contains("when an operator says so, until its process ends"), "{out}");
    assert_eq!(b.state().asked, ["promote false", "policy 2", "failover 2"]);
    assert_eq!(run(&nodes[1..], "stop --this-node").0, 0);
    assert_eq!(b.state().asked[3], "stop 2 0");
    let (code, _, err) = run(&nodes, "stop --this-node");
    assert_eq!(code, 2);
    assert!(err.contains("needs exactly one --node"), "{err}");
    assert_eq!(run(&nodes, "stop").0, 2);
}

fn process(node: &str, role: v1::NodeRole, address: &str) -> v1::ClusterNode {
    let (node, vm, address) = (node.to_owned(), "demo".to_owned(), address.to_owned());
    v1::ClusterNode { node, vm, address, role: role.into(), ..v1::ClusterNode::default() }
}

#[test]
fn a_node_is_fenced_and_the_one_that_follows_is_told() {
    let (a, b, nodes) = pair();
    for fake in [&a, &b] {
        fake.state().nodes = vec![process("a", v1::NodeRole::Runner, &nodes[0])];
    }
    let (code, out, err) = run(&nodes, "fence a --reason fans");
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.starts_with(&format!("a has stopped, and the node at {} knows", nodes[1])), "{out}");
    assert_eq!(a.state().asked, ["cluster", "fence fans"]);
    assert_eq!(b.state().asked, ["confirm a fans"]);
    let (code, _, err) = run(&nodes, "fence c --reason fans");
    assert_eq!(code, 1);
    assert!(err.contains("confirm-fenced c") && err.contains("lists no process of c; --at says"), "{err}");
    assert_eq!(run(&nodes, "confirm-fenced a --reason off").0, 0);
    assert_eq!(run(&nodes, "promote --force --reason lost").0, 0);
    assert_eq!(b.state().asked[1..], ["confirm a off", "promote true lost"]);
    assert_eq!(run(&nodes, "fence a --reason x --at 127.0.0.1:1").0, 3);
}

#[test]
fn a_node_is_drained_when_it_does_nothing_any_more() {
    let (a, _b, nodes) = pair();
    a.state().nodes = vec![process("a", v1::NodeRole::Runner, &nodes[0])];
    let (code, out, err) = run(&nodes, "drain a --reason new_fans");
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert_eq!(
        out,
        format!("a is to leave demo (runner, at {})\na is empty: its processes can be ended\n", nodes[0])
    );
    let (_, out, _) = run(&nodes, "drain a --end");
    assert_eq!(out, "a is there for demo again\n");
    // A spare is asked as any other process is.
    a.state().nodes = vec![process("z", v1::NodeRole::Spare, &nodes[0])];
    a.state().nodes[0].vm = String::new();
    a.state().asked.clear();
    let (code, out, err) = run(&nodes, "drain z");
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let first = format!("z is not to be claimed any more (spare, at {})\n", nodes[0]);
    assert_eq!(out, first + "z is empty: its processes can be ended\n");
    let (_, out, _) = run(&nodes, "drain z --end --json");
    assert!(out.starts_with("{\"vm\":null,") && out.contains("\"drains\":false"), "{out}");
    let commands: Vec<String> =
        a.state().asked.iter().filter(|what| what.starts_with("drain")).cloned().collect();
    assert_eq!(commands, ["drain true", "drain false"]);
    let (_, out, _) = run(&nodes, "drain z --end");
    assert_eq!(out, format!("z can be claimed again (spare, at {})\n", nodes[0]));
    let (code, _, err) = run(&nodes, "drain y");
    assert_eq!(code, 1);
    assert!(err.contains("no process of y"), "{err}");
    a.state().nodes = vec![process("a", v1::NodeRole::Follower, &nodes[0])];
    a.state().asked.clear();
    let (code, _, err) = run(&nodes, "drain a --wait 0");
    assert_eq!(code, 1);
    assert!(err.contains("still follows it") && err.contains("drain --end a"), "{err}");
}

#[test]
fn the_cluster_is_listed_by_whichever_node_answers() {
    let (a, b, nodes) = pair();
    drop(a);
    let (code, out, _) = run(&nodes, "nodes");
    assert_eq!(code, 0);
    assert!(out.lines().nth(1).is_some_and(|line| line.starts_with("s ") && line.contains("spare")), "{out}");
    let (_, out, _) = run(&nodes, "vms --json");
    assert!(out.starts_with("{\"vm\":\"web\""), "{out}");
    assert_eq!(b.state().asked, ["cluster", "cluster"]);
}

#[test]
fn a_spare_is_shown_beside_a_vm_and_alone() {
    let (a, b, mut nodes) = pair();
    let spare =
        v1::StatusReply { node: "s".to_owned(), role: Role::Spare.into(), ..v1::StatusReply::default() };
    let s = Fake::start(spare);
    let health = |protected, spare| HealthReply { healthy: true, protected, spare, ..HealthReply::default() };
    (a.state().health, b.state().health) = (health(true, false), health(true, false));
    s.state().health = health(false, true);
    nodes.push(s.address.to_string());
    let (code, out, _) = run(&nodes, "status");
    assert_eq!(code, 0);
    assert!(out.contains("runs on a") && out.contains("for any vm that needs it"), "{out}");
    // It has no say in what is of the vm.
    assert_eq!(run(&nodes, "switchover").0, 0);
    let (code, out, _) = run(&nodes, "health --protected");
    assert_eq!(code, 0, "{out}");
    assert!(out.ends_with(&format!("{}: healthy, a spare for any vm that needs it\n", s.address)), "{out}");
    let alone = [s.address.to_string()];
    assert_eq!(run(&alone, "health").0, 0);
    assert_eq!(run(&alone, "health --protected").0, 4, "nothing is protected by it");
    let (_, out, _) = run(&alone, "health --json");
    assert!(out.contains("\"spare\":true") && out.contains("\"protected\":false"), "{out}");
    let (_, out, _) = run(&alone, "status");
    assert!(out.starts_with("these nodes are spares"), "{out}");
    let (_, out, _) = run(&alone, "status --json");
    assert!(out.contains("\"role\":\"spare\"") && out.contains("\"vm\":\"\""), "{out}");
    let (_, out, _) = run(&alone, "stop --this-node");
    assert_eq!(out, format!("the node at {} ends\n", s.address));
}

#[test]
fn a_command_does_not_choose_a_vm() {
    let (a, b, nodes) = pair();
    b.state().status.vm = "mail".to_owned();
    for line in ["pause", "resume", "stop --vm", "promote", "policy disk", "protect 127.0.0.1:7702"] {
        let (code, out, err) = run(&nodes, line);
        assert_eq!((code, out.as_str()), (1, ""), "{line}");
        assert!(err.contains("of several vms: a at ") && err.contains(" of mail; name"), "{line}: {err}");
    }
    assert!(a.state().asked.is_empty() && b.state().asked.is_empty());
}

#[test]
fn refusals_are_passed_on_as_they_are() {
    let (a, _b, nodes) = pair();
    a.state().refusal =
        Some(Status::failed_precondition("the vm is protected already: pause replication first"));
    let (code, out, err) = run(&nodes, "protect 127.0.0.1:7702");
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(err, "coloctl: the vm is protected already: pause replication first\n");
    // One node alone is named: it answers for itself.
    assert_eq!(run(&nodes[..1], "promote").0, 1);
    assert_eq!(a.state().asked, ["protect 127.0.0.1:7702", "promote false"]);
    assert_eq!(run(&nodes, "protect 127.0.0.1:7702 --full").0, 1);
    assert_eq!(a.state().asked[2], "protect 127.0.0.1:7702 in full");
    a.state().status = status("a", Role::Stopped, stopped("a", 3));
    let (code, _, err) = run(&nodes, "resume");
    assert_eq!(code, 1);
    let wanted = format!("none of these nodes runs the guest: a at {} is stopped, b at", nodes[0]);
    assert!(err.contains(&wanted), "{err}");
}

#[test]
fn protect_shows_progress_and_ends_with_the_register() {
    let a = Fake::start(status("a", Role::Alone, solo("a", 1)));
    let nodes = [a.address.to_string()];
    let step = |phase: Phase, done: u64| ProtectProgress {
        phase: phase.into(),
        bytes_done: done,
        bytes_total: 4096,
        elapsed_ms: done,
        secondary: "b".to_owned(),
        register: (phase == Phase::Paired).then(|| paired("a", "b", 2)),
    };
    let steps = [step(Phase::Memory, 0), step(Phase::Memory, 2048), step(Phase::Paired, 4096)];
    a.state().steps = steps.into_iter().map(Ok).collect();
    let (code, out, err) = run(&nodes, "protect 127.0.0.1:7701");
    assert_eq!(code, 0);
    assert_eq!(out, "protected by b after 4.1 s: on a, protected by b in term 2\n");
    assert!(err.starts_with("memory      0% of 4.0 KiB"), "{err}");
    let (_, out, _) = run(&nodes, "protect 127.0.0.1:7701 --json");
    let phases: Vec<Value> = out.lines().map(|line| json(line)["phase"].clone()).collect();
    assert_eq!(phases, ["memory", "memory", "paired"]);
    a.state().steps =
        vec![Ok(step(Phase::Pairing, 0)), Err(Status::aborted("no protection by b: too small"))];
    let (code, _, err) = run(&nodes, "protect 127.0.0.1:7701");
    assert_eq!(code, 1);
    assert!(err.ends_with("\ncoloctl: no protection by b: too small\n"), "{err}");
    a.state().steps.truncate(1);
    let (code, _, err) = run(&nodes, "protect 127.0.0.1:7701");
    assert_eq!(code, 1);
    assert!(err.contains("it ended the call before the vm was protected; look at"), "{err}");
}

#[test]
fn watch_has_a_line_for_each_epoch() {
    let (a, _b, nodes) = pair();
    let report = |epoch| EpochReport {
        point: Some(Point { term: 2, epoch }),
        pages: 64,
        pause: Some(Pause { total_us: 640, ..Default::default() }),
        ack_us: Some(2_310),
        ..Default::default()
    };
    a.state().reports = (1..=30).map(report).collect();
    let (code, out, _) = run(&nodes, "watch --count 25");
    assert_eq!((code, out.lines().count()), (0, 27), "two heads");
    assert_eq!(out.lines().filter(|line| line.contains("harvest")).count(), 2);
    let (code, out, _) = run(&nodes, "watch --count 2 --json");
    assert_eq!((code, out.lines().count()), (0, 2));
    let line = json(out.lines().nth(1).unwrap());
    let (code, out, err) = run(&nodes, "watch --count 45");
    assert_eq!((code, out.lines().count()), (0, 48), "it goes on after the connection has ended");
    assert_eq!(err.matches("watching").count(), 2, "{err}");
    assert_eq!((&line["point"]["epoch"], &line["pause_us"]["total"]), (&Value::from(2), &Value::from(640)));
}

#[test]
fn health_is_told_by_the_exit_status() {
    let (a, b, nodes) = pair();
    let good = HealthReply { healthy: true, protected: true, ..Default::default() };
    a.state().health = good.clone();
    b.state().health = good.clone();
    assert_eq!(run(&nodes, "health --protected").0, 0);
    b.state().health = HealthReply { protected: false, ..good };
    assert_eq!(run(&nodes, "health").0, 0);
    let (code, out, _) = run(&nodes, "health --protected --json");
    assert_eq!((code, &json(&out)["protected"]), (4, &Value::from(false)));
    b.state().health = HealthReply { problems: vec!["the store is full".to_owned()], ..Default::default() };
    let (code, out, _) = run(&nodes, "health");
    assert_eq!(code, 4);
    assert!(out.ends_with(": NOT HEALTHY, not protected\n  the store is full\n"), "{out}");
    drop(b);
    assert_eq!(run(&nodes, "health").0, 4);
    drop(a);
    assert_eq!(run(&nodes, "health").0, 3);
}

#[test]
fn the_demo_is_made_by_the_tree() {
    let (code, out, _) = run(&[], "demo");
    assert_eq!(code, 0);
    assert!(out.contains("make demo"));
}
