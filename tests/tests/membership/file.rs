//! Records in files while processes die.

use colo_common::arbiter::file::FileArbiter;
use colo_common::membership::file::FileMembership;
use colo_common::membership::{ClaimAnswer, ClaimRefusal, Membership, MembershipError};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{claim, names, node, run_on, spare};

/// What tells a child of these tests which directory to register in.
const CHILD_DIRECTORY: &str = "COLO_TEST_MEMBERSHIP_DIRECTORY";

/// No test by itself: a process of the tests below, registered for ever.
#[test]
fn child_that_is_registered() {
    let Some(directory) = std::env::var_os(CHILD_DIRECTORY) else { return };
    let members = FileMembership::open(Path::new(&directory)).unwrap();
    let _registered = members.register(spare("s", 7)).unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn child(directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "file::child_that_is_registered", "--nocapture"])
        .env(CHILD_DIRECTORY, directory)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_killed_process_is_gone_at_once_with_the_claim_on_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let members = FileMembership::open(path).unwrap();
    let arbiter = FileArbiter::open(path).unwrap();
    let entry = run_on(&arbiter, "web", "r", 1);
    for _ in 0..5 {
        let mut process = child(path);
        let started = Instant::now();
        while members.nodes().unwrap() != [spare("s", 7)] {
            assert!(started.elapsed() < Duration::from_secs(30), "no child came");
        }
        assert_eq!(members.claim(&claim("web", &entry, "s", 7)).unwrap(), ClaimAnswer::Claimed);
        assert!(matches!(members.register(spare("s", 8)), Err(MembershipError::Taken { .. })));
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(members.claim_of(&node("s")).unwrap(), None);
        let gone = members.claim(&claim("web", &entry, "s", 7)).unwrap();
        assert_eq!(gone, ClaimAnswer::Refused(ClaimRefusal::Gone));
        assert_eq!(members.nodes().unwrap(), []);
    }
}

#[test]
fn nonsense_is_left_out_and_a_lost_directory_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("arbiter");
    assert!(FileMembership::open(&path).unwrap_err().to_string().contains("create the directory"));
    std::fs::create_dir(&path).unwrap();
    let members = FileMembership::open(&path).unwrap();
    let registered = members.register(spare("s", 7)).unwrap();
    let record = path.join("nodes/s/@spare.record");
    std::fs::write(path.join("nodes/notes"), "an operator's").unwrap();
    std::fs::create_dir(path.join("nodes/.x")).unwrap();
    std::fs::write(path.join("db.register"), "nonsense").unwrap();
    assert_eq!((names(&members), members.vms().unwrap()), (vec!["s".to_owned()], Vec::new()));
    let good = std::fs::read(&record).unwrap();
    for bytes in [b"{}".as_slice(), b"", &[0xff; 99]] {
        std::fs::write(&record, bytes).unwrap();
        assert_eq!(members.nodes().unwrap(), []);
    }
    std::fs::write(&record, good).unwrap();
    std::fs::write(path.join("nodes/s/@claim"), "nonsense").unwrap();
    let error = members.claim_of(&node("s")).unwrap_err();
    assert!(matches!(error, MembershipError::Damaged { .. }), "{error}");
    // Somebody clears the directory: the next update puts things right.
    std::fs::remove_dir_all(path.join("nodes")).unwrap();
    assert!(!registered.is_registered());
    registered.update(spare("s", 7)).unwrap();
    assert!(registered.is_registered() && members.nodes().unwrap() == [spare("s", 7)]);
    std::fs::remove_dir_all(&path).unwrap();
    let error = members.nodes().unwrap_err().to_string();
    assert!(error.contains("is the filesystem of arbiter.directory mounted?"), "{error}");
}
