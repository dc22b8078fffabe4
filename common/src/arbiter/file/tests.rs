//! The file arbiter under races, kills and damage.

use super::{FileArbiter, network_mount};
use crate::arbiter::{Arbiter, ArbiterError};
use crate::ids::{Incarnation, ProposalId, Term, VmId};
use crate::register::{Answer, Entry, Proposal, Value};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What tells a child of these tests which directory to write to.
const CHILD_DIRECTORY: &str = "COLO_TEST_ARBITER_DIRECTORY";

fn vm() -> VmId {
    "web".parse().unwrap()
}

fn proposal(process: u128, expected: Option<Entry>) -> Proposal {
    let incarnation = Incarnation(process);
    let term = expected.as_ref().map_or(Term(0), |entry| entry.term);
    let value = Value::Solo { node: "a".parse().unwrap(), incarnation };
    Proposal { id: ProposalId::of(incarnation, term), expected, value }
}

/// Changes the register `wins` times, as process `process`.
fn compete(arbiter: &FileArbiter, process: u128, wins: usize) -> Vec<Entry> {
    let mut won = Vec::new();
    while won.len() < wins {
        let found = arbiter.read(&vm()).unwrap();
        match arbiter.propose(&vm(), &proposal(process, found)).unwrap() {
            Answer::Applied(entry) => won.push(entry),
            Answer::Refused(_) => {}
        }
    }
    won
}

fn child(directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "arbiter::file::tests::child_that_writes", "--nocapture"])
        .env(CHILD_DIRECTORY, directory)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// No test by itself: a process of the tests below, writing for ever.
#[test]
fn child_that_writes() {
    let Some(directory) = std::env::var_os(CHILD_DIRECTORY) else { return };
    let arbiter = FileArbiter::open(Path::new(&directory)).unwrap();
    loop {
        compete(&arbiter, u128::from(std::process::id()), 1);
    }
}

/// Waits until a child has replaced the file, without a look at the lock, which the child holds most of the time.
fn wait_for_change(path: &Path, before: &[u8]) {
    let give_up = Instant::now() + Duration::from_secs(60);
    while fs::read(path).unwrap() == before {
        assert!(Instant::now() < give_up, "nothing was written in a minute");
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn a_register_is_created_changed_found_again_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let arbiter = FileArbiter::open(directory.path()).unwrap();
    assert_eq!(arbiter.read(&vm()).unwrap(), None);
    let create = proposal(1, None);
    assert_eq!(arbiter.propose(&vm(), &create).unwrap(), Answer::Applied(create.entry()));
    assert_eq!(arbiter.propose(&vm(), &create).unwrap(), Answer::Applied(create.entry()), "repeated");
    let change = proposal(2, Some(create.entry()));
    assert_eq!(arbiter.propose(&vm(), &change).unwrap(), Answer::Applied(change.entry()));
    assert_eq!(arbiter.propose(&vm(), &create).unwrap(), Answer::Refused(Some(change.entry())));
    let again = FileArbiter::open(directory.path()).unwrap();
    assert_eq!(again.read(&vm()).unwrap(), Some(change.entry()));
    assert_eq!(again.read(&"other".parse().unwrap()).unwrap(), None);
}

#[test]
fn threads_and_processes_race_and_every_term_has_one_winner() {
    const WINS: usize = 25;
    let directory = tempfile::tempdir().unwrap();
    let mut children = [child(directory.path()), child(directory.path())];
    let threads: Vec<_> = (0..6_u128)
        .map(|n| {
            let arbiter = FileArbiter::open(directory.path()).unwrap();
            thread::spawn(move || compete(&arbiter, n, WINS))
        })
        .collect();
    let mut won: Vec<Entry> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    won.sort_by_key(|entry| entry.term);
    assert_eq!(won.len(), 6 * WINS);
    assert!(won.windows(2).all(|pair| pair[0].term < pair[1].term), "two winners of one term");
    let last = FileArbiter::open(directory.path()).unwrap().read(&vm()).unwrap().unwrap();
    assert!(last.term >= won.last().unwrap().term);
}

#[test]
fn a_kill_at_any_instant_leaves_the_old_or_the_new_entry() {
    const KILLS: u32 = 300;
    let directory = tempfile::tempdir().unwrap();
    let arbiter = FileArbiter::open(directory.path()).unwrap();
    arbiter.propose(&vm(), &proposal(1, None)).unwrap();
    let path = directory.path().join("web.register");
    let (mut newest, mut torn) = (Term(1), 0);
    for round in 0..KILLS {
        let mut writer = child(directory.path());
        wait_for_change(&path, &fs::read(&path).unwrap());
        // Spread over the parts of a write: lock, temporary file, two syncs, rename.
        thread::sleep(Duration::from_micros(u64::from(round * 37 % 1500)));
        writer.kill().unwrap();
        writer.wait().unwrap();
        torn += u32::from(directory.path().join("web.register.new").exists());
        let left = arbiter.read(&vm()).unwrap().expect("an entry is never lost");
        assert!(left.term > newest, "{left} after {newest}");
        newest = left.term;
    }
    assert!(torn > 0, "of {KILLS} kills none fell into a write");
}

#[test]
fn damage_is_never_taken_for_an_entry_or_for_none() {
    let directory = tempfile::tempdir().unwrap();
    let arbiter = FileArbiter::open(directory.path()).unwrap();
    let first = proposal(1, None);
    arbiter.propose(&vm(), &first).unwrap();
    let path = directory.path().join("web.register");
    let good = fs::read(&path).unwrap();
    let check = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        for error in
            [arbiter.read(&vm()).unwrap_err(), arbiter.propose(&vm(), &proposal(2, None)).unwrap_err()]
        {
            let text = error.to_string();
            assert!(matches!(error, ArbiterError::Damaged { .. }), "{text}");
            assert!(text.contains("web.register") && text.contains("restore it from a backup"), "{text}");
        }
        assert_eq!(fs::read(&path).unwrap(), bytes, "what is damaged is left for a person to look at");
    };
    for bit in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        check(&bytes);
    }
    (0..good.len()).for_each(|len| check(&good[..len]));
    check(&[b'#'; 5000]);
    fs::write(&path, good).unwrap();
    assert_eq!(arbiter.read(&vm()).unwrap(), Some(first.entry()));
}

#[test]
fn a_missing_or_closed_directory_names_path_and_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let error = FileArbiter::open(&missing).unwrap_err().to_string();
    assert!(error.contains("missing") && error.contains("create the directory"), "{error}");
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(FileArbiter::open(&file).unwrap_err().to_string().contains("it is no directory"));

    // It goes away while the node runs.
    let going = directory.path().join("going");
    fs::create_dir(&going).unwrap();
    let arbiter = FileArbiter::open(&going).unwrap();
    fs::remove_dir(&going).unwrap();
    let error = arbiter.read(&vm()).unwrap_err().to_string();
    assert!(error.contains("web.lock") && error.contains("create the directory"), "{error}");

    let closed = directory.path().join("closed");
    fs::create_dir(&closed).unwrap();
    let arbiter = FileArbiter::open(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
    // Root passes any permission; then there is no error to look at.
    if let Err(error) = arbiter.propose(&vm(), &proposal(1, None)) {
        let error = error.to_string();
        assert!(
            error.contains("closed") && error.contains("all nodes of a vm must run as the user"),
            "{error}"
        );
    }
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    let error = arbiter.failed("lock", &closed, &denied).to_string();
    assert!(error.contains("must run as the user who owns it"), "{error}");
}

#[test]
fn a_lock_that_is_never_given_up_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let mut arbiter = FileArbiter::open(directory.path()).unwrap();
    arbiter.patience = Duration::from_millis(20);
    let held = arbiter.lock(&vm(), crate::durable::Lock::Exclusive).unwrap();
    let error = arbiter.read(&vm()).unwrap_err().to_string();
    assert!(error.contains("another process has held") && error.contains("web.lock"), "{error}");
    drop(held);
    arbiter.read(&vm()).unwrap();
}

#[test]
fn network_filesystems_are_told_by_their_device() {
    let mounts = "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
         98 22 0:45 / /mnt/a rw shared:2 - nfs4 host:/a rw\n\
         99 22 0:300 / /mnt/b rw - tmpfs none rw\n";
    assert_eq!(network_mount(mounts, 45).as_deref(), Some("nfs4"));
    assert_eq!(network_mount(mounts, (259 << 8) | 2), None);
    assert_eq!(network_mount(mounts, (300 & 0xff) | ((300 & !0xff) << 12)), None);
    assert_eq!(network_mount(mounts, 77), None);
    assert_eq!(network_mount("", 45), None);
}
