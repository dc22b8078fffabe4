//! A follower without a runner and without its thread: what one thing that it is told makes of it.

use super::leaving::CLAIM_LIMIT;
use super::{Event, Follower, Outcome, Parts, Settings, Tray};
use crate::agreement::PairRequest;
use crate::persist::Persister;
use crate::receiver::Budget;
use crate::replica::{AckPolicy, Replica, Rules, Start, Stored};
use crate::store::{MemoryDisk, Store};
use colo_common::arbiter::file::FileArbiter;
use colo_common::history::point;
use colo_common::register::{Entry, Value};
use colo_common::vmdir::{Runner, VmDirectory};
use colo_common::{BLOCK_SIZE, History, Incarnation, NodeId, ProposalId, ReplicaId, Term, VmId};
use colo_primary::arbiter_worker::ArbiterWorker;
use colo_primary::console::Console;
use colo_primary::guest_files::boot_file_path;
use colo_primary::node::status::Board;
use colo_proto::message::Base;
use colo_vmm::disk::intent::IntentLog;
use colo_vmm::spec::DiskSpec;
use colo_vmm::synthetic::SyntheticConfig;
use colo_vmm::wire_spec::FileDigest;
use colo_vmm::{BootFile, BootSource, GuestKind, GuestSpec, WireSpec};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Of this process.
const ME: Incarnation = Incarnation(1);
const DISK_BYTES: u64 = 16 * BLOCK_SIZE as u64;

fn vm() -> VmId {
    "web".parse().unwrap()
}

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

/// One that holds nothing.
fn follower(place: &Path) -> Follower {
    let vm = vm();
    let (outbox, inbox) = crossbeam_channel::unbounded::<Event>();
    let tray = Tray::new(outbox.clone());
    let (tell, store) = (tray.clone(), Store::open_in_memory(&MemoryDisk::new(), &vm).unwrap());
    let persister = Persister::start(store, move |persisted| tell.persisted(persisted)).unwrap();
    let arbiter = Arc::new(FileArbiter::open(place).unwrap());
    let rules = Rules { policy: AckPolicy::Memory, boot_after_crash: false };
    let parts = Parts {
        vm: vm.clone(),
        me: node("b"),
        incarnation: ME,
        replica: Replica::new(node("b"), ME, rules, Stored { active: false, whole: None }),
        again: false,
        history: History::default(),
        persister,
        tap: None,
        console: Console::default(),
        budget: Budget::new(1 << 20),
        arbiter: ArbiterWorker::start(arbiter, vm.clone(), |_| {}).unwrap(),
        tray,
        directory: Arc::new(VmDirectory::open(&place.join("vm"), &vm).unwrap()),
        board: Board::default(),
    };
    let settings = Settings {
        auto_failover: true,
        promote_delay: Duration::ZERO,
        startup_grace: Duration::ZERO,
        max_epoch_bytes: 1 << 20,
        window: 8,
        quic_port: 1,
        boot_directory: place.to_owned(),
        intent: place.join("disk.intent"),
        claimed: false,
        spare: false,
        disk: Some(place.join("disk.img")),
    };
    Follower::new(parts, settings, (outbox, inbox))
}

/// A runner's word about a guest with a disk that boots from this byte.
fn request(boots: u8) -> PairRequest {
    let image = BootFile { path: "image".into(), bytes: vec![boots].into() };
    let mut spec = GuestSpec::new("web", 4 << 20, BootSource::Flat { image, address: 1 << 16 });
    spec.virtio.disk = Some(DiskSpec { bytes: DISK_BYTES, read_only: false, serial: String::new() });
    PairRequest {
        node: node("a"),
        incarnation: Incarnation(2),
        digest: spec.digest(),
        spec: WireSpec::new(&spec, GuestKind::Synthetic(SyntheticConfig::default())),
        cpu: None,
        host: String::new(),
        address: None,
    }
}

fn bring(place: &Path, boots: u8) {
    let file = FileDigest::of(&BootFile { path: "image".into(), bytes: vec![boots].into() });
    fs::write(boot_file_path(place, file.digest), [boots]).unwrap();
}

#[test]
fn another_guest_may_have_the_disk_of_one_that_never_came() {
    let place = tempfile::tempdir().unwrap();
    let mut follower = follower(place.path());
    bring(place.path(), 1);
    assert!(follower.pair(&request(1)).unwrap().missing.is_empty());
    // As a control plane that is in the middle of an answer.
    let seen = follower.board.status();
    assert!(seen.devices.disk.is_some() && seen.guest.is_some());
    assert_eq!(follower.pair(&request(2)).unwrap().missing.len(), 1);
    let now = follower.board.status();
    assert!(now.devices.disk.is_none() && now.guest.is_none(), "nothing waits here");
    bring(place.path(), 2);
    assert!(follower.pair(&request(2)).unwrap().missing.is_empty());
    let disk = follower.board.status().devices.disk.expect("the other guest has one");
    assert_eq!(disk.overlay.map(|overlay| overlay.bytes_to_fold()), Some(0));
    assert_eq!(disk.bytes, DISK_BYTES);
}

/// A promotion that a crash cut off has made a log, and the disk is not what it says.
#[test]
fn an_intent_log_counts_only_where_the_guest_has_run() {
    let place = tempfile::tempdir().unwrap();
    let log = IntentLog::create(&place.path().join("disk.intent"), DISK_BYTES, &vm(), point(2, 9)).unwrap();
    drop(log);
    bring(place.path(), 1);
    for (has_run, base) in [(false, None), (true, Some(Base::at(point(2, 9))))] {
        let mut follower = follower(place.path());
        let active = has_run.then_some(Term(2));
        let known = Runner { seen: Term(2), active, ..Runner::default() };
        follower.directory.set_runner(known).unwrap();
        follower.pair(&request(1)).unwrap();
        let bases = follower.warm.as_ref().unwrap().rejoin.bases(follower.replica.copy());
        assert_eq!(bases.disk, base, "has run: {has_run}");
    }
}

#[test]
fn nothing_runs_over_a_store_that_failed_while_the_register_was_asked() {
    let place = tempfile::tempdir().unwrap();
    let mut follower = follower(place.path());
    bring(place.path(), 1);
    follower.pair(&request(1)).unwrap();
    follower.store_failed = Some("no space".to_owned());
    let value = Value::Solo { node: node("b"), incarnation: ME };
    follower.take_over(Start::Boot, Entry { term: Term(2), proposal: ProposalId(1), value });
    match follower.end.take() {
        Some(Outcome::Failed(why)) => assert!(why.contains("its store has failed: no space"), "{why}"),
        _ => panic!("it did not fail"),
    }
}

#[test]
fn a_spare_leaves_a_vm_that_others_protect_and_no_other_one() {
    let place = tempfile::tempdir().unwrap();
    let mut follower = follower(place.path());
    let paired = |secondary: &str| {
        let (primary, secondary) = (node("a"), node(secondary));
        let value = Value::Paired { primary, secondary, replica: ReplicaId(7) };
        Entry { term: Term(2), proposal: ProposalId(1), value }
    };
    let alone = Value::Solo { node: node("a"), incarnation: ME };
    let begin = Instant::now();
    let mut leaves = |spare: bool, found: &Entry| {
        follower.settings.spare = spare;
        follower.needless_since = None;
        for now in [begin, begin + 2 * CLAIM_LIMIT] {
            assert!(follower.end.is_none(), "it leaves at once");
            follower.look_whether_needed(Some(found), now);
        }
        matches!(follower.end.take(), Some(Outcome::Unfollowed))
    };
    assert!(leaves(true, &paired("c")), "others protect it");
    assert!(!leaves(false, &paired("c")), "the configuration binds it");
    assert!(!leaves(true, &paired("b")), "it is the secondary");
    assert!(!leaves(true, &Entry { value: alone, ..paired("c") }), "the runner looks for somebody");
}

/// What it read before it was taken back says nothing of the vm that it protects since: a copy that is thrown away when its
/// runner dies is the guest.
#[test]
fn a_spare_that_was_taken_back_stays() {
    let place = tempfile::tempdir().unwrap();
    let mut follower = follower(place.path());
    follower.settings.spare = true;
    let paired = |secondary: &str| {
        let (primary, secondary) = (node("a"), node(secondary));
        let value = Value::Paired { primary, secondary, replica: ReplicaId(7) };
        Entry { term: Term(2), proposal: ProposalId(1), value }
    };
    let begin = Instant::now();
    follower.look_whether_needed(Some(&paired("c")), begin);
    // The register is not read while its runner is there, which dies a long time after.
    follower.settle(begin + 3 * CLAIM_LIMIT);
    assert!(follower.end.is_none(), "it left by what it had read before");
    follower.look_whether_needed(Some(&paired("b")), begin + 3 * CLAIM_LIMIT);
    follower.look_whether_needed(Some(&paired("c")), begin + 4 * CLAIM_LIMIT);
    assert!(follower.end.is_none(), "it has only just become needless");
    follower.look_whether_needed(Some(&paired("c")), begin + 6 * CLAIM_LIMIT);
    assert!(matches!(follower.end.take(), Some(Outcome::Unfollowed)));
}

#[test]
fn a_spare_that_cannot_have_the_guest_that_claimed_it_lets_go_soon() {
    let place = tempfile::tempdir().unwrap();
    let mut follower = follower(place.path());
    follower.settings.claimed = true;
    let refused = Instant::now();
    follower.misfit = Some(refused);
    follower.leave_if_unfollowed(refused);
    assert!(follower.end.is_none(), "its words are lost");
    follower.followed = true;
    follower.leave_if_unfollowed(refused + CLAIM_LIMIT / 2);
    assert!(follower.end.is_none(), "it follows");
    follower.followed = false;
    follower.leave_if_unfollowed(refused + CLAIM_LIMIT / 2);
    assert!(matches!(follower.end.take(), Some(Outcome::Unfollowed)));
}
