//! The process that writes an audit trail is killed at random instants: what it had said to be written is there, in
//! order and without a gap, and the next one goes on with it.

use colo_common::Incarnation;
use colo_primary::audit::{Audit, Trail};
use colo_proto::v1::{AuditEntry, AuditKind};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const KILLS: u64 = 60;
const DIR: &str = "COLO_TEST_AUDIT_DIR";

/// Not a test by itself: the process that is killed.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    // The test harness has begun a line.
    println!();
    let told = |entry: &AuditEntry| println!("wrote {}", entry.sequence);
    let audit = Audit::open(Path::new(&dir), "a".parse().unwrap(), Incarnation(1), told);
    for n in 0.. {
        let kind = AuditKind::Command.into();
        audit.note(AuditEntry { kind, what: format!("command {n}"), ..AuditEntry::default() });
        if n % 7 == 0 {
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}

/// Lets the writer write and kills it; answers the newest entry that it said to be written.
fn run_and_kill(dir: &Path, lines: u64, wait: Duration) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer", "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut wrote = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut number = |line: String| line.strip_prefix("wrote ").and_then(|text| text.parse::<u64>().ok());
    let mut newest = wrote.by_ref().filter_map(&mut number).take(1 + lines as usize).last().unwrap_or(0);
    std::thread::sleep(wait);
    child.kill().unwrap();
    child.wait().unwrap();
    // What it had said before it died.
    newest = wrote.filter_map(number).last().unwrap_or(newest);
    newest
}

#[test]
fn a_kill_at_any_instant_loses_nothing_that_was_written() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("audit");
    let mut before = 0;
    for kill in 0..KILLS {
        let newest = run_and_kill(&dir, kill * 37 % 50, Duration::from_micros(kill * 977 % 4000));
        // Reads and checks everything, also that no sequence is missing.
        let trail = Trail::open(&dir).unwrap();
        let (first, next) = trail.range();
        assert!(next > newest && next > before, "{newest} was written, and {next} comes next");
        let all = trail.read(first, usize::MAX).unwrap();
        assert_eq!(all.len() as u64, next - first);
        let commands = all.iter().all(|entry| match entry.kind() {
            AuditKind::Command => entry.what.starts_with("command "),
            kind => kind == AuditKind::Gap,
        });
        assert!(commands);
        before = next;
    }
    println!("{KILLS} kills, {before} entries");
}
