//! Records in etcd while processes die, leases run out, and etcd is away, wiped or full of nonsense.

use colo_common::arbiter::etcd::EtcdArbiter;
use colo_common::config::ArbiterConfig;
use colo_common::membership::etcd::EtcdMembership;
use colo_common::membership::{ClaimAnswer, Membership, MembershipError};
use colo_tests::etcd::swallow::Swallower;
use colo_tests::etcd::{self, EtcdCluster};
use std::thread;
use std::time::{Duration, Instant};

use super::{claim, follower, names, node, run_on, spare};

/// Longer than a lease of two seconds lasts, on a host that others load as well.
const PATIENCE: Duration = Duration::from_secs(30);

fn config(cluster: &EtcdCluster) -> ArbiterConfig {
    ArbiterConfig { lease_s: Some(2), timeout_ms: Some(1000), ..cluster.config() }
}

fn until(what: &str, mut look: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !look() {
        assert!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
    started.elapsed()
}

#[test]
fn the_lease_of_a_dead_process_frees_its_name_and_the_claim_on_it() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start(directory.path()).unwrap();
    let config = config(&cluster);
    let members = EtcdMembership::open(&config).unwrap();
    let arbiter = EtcdArbiter::open(&config).unwrap();
    let entry = run_on(&arbiter, "web", "r", 1);
    let way = Swallower::open(cluster.address(0)).unwrap();
    let endpoint = format!("http://{}", way.address).parse().unwrap();
    let dying = ArbiterConfig { endpoints: Some(vec![endpoint]), ..config.clone() };
    let dying = EtcdMembership::open(&dying).unwrap();
    let registered = dying.register(spare("s", 7)).unwrap();
    assert_eq!(members.claim(&claim("web", &entry, "s", 7)).unwrap(), ClaimAnswer::Claimed);
    // It lives for longer than its lease.
    thread::sleep(Duration::from_secs(4));
    assert!(registered.is_registered() && members.claim_of(&node("s")).unwrap().is_some());
    let error = members.register(spare("s", 8)).err().unwrap();
    assert!(
        matches!(error, MembershipError::Taken { waited, .. } if waited >= Duration::from_secs(2)),
        "{error}"
    );
    // As a process dies: nothing is said, and nothing more is renewed.
    way.cut();
    let started = Instant::now();
    let again = members.register(spare("s", 8)).unwrap();
    println!("a name was free {:?} after its process had died", started.elapsed());
    assert_eq!(members.claim_of(&node("s")).unwrap(), None, "the claim was on the dead process");
    assert_eq!(members.nodes().unwrap(), [spare("s", 8)]);
    until("the dead one to count itself out", || !registered.is_registered());
    drop((again, registered));
}

#[test]
fn a_process_is_registered_again_after_an_outage_and_after_etcd_lost_everything() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = EtcdCluster::start(directory.path()).unwrap();
    let members = EtcdMembership::open(&config(&cluster)).unwrap();
    let registered = members.register(spare("s", 7)).unwrap();
    (0..2).for_each(|n| cluster.freeze(n).unwrap());
    until("the lease to be over, as the process counts", || !registered.is_registered());
    let error = registered.update(follower("s", 7, "web")).unwrap_err();
    assert!(matches!(error, MembershipError::Unreachable { .. }), "{error}");
    (0..2).for_each(|n| cluster.thaw(n).unwrap());
    until("the change to be made up for", || registered.is_registered());
    assert_eq!(names(&members), ["s/web"]);

    cluster.wipe_all().unwrap();
    until("the record to come back", || members.nodes().is_ok_and(|all| all == [follower("s", 7, "web")]));
    until("the process to know", || registered.is_registered());
    // Somebody removes the key by hand.
    cluster.calls().delete(&cluster.target(0).unwrap(), "/colo/nodes/s/web").unwrap();
    until("the record to come back", || names(&members) == ["s/web"]);
    for n in 0..3 {
        cluster.kill(n).unwrap();
        thread::sleep(Duration::from_millis(300));
        cluster.restart(n).unwrap();
        cluster.until_healthy().unwrap();
        assert_eq!(names(&members), ["s/web"], "one member costs nobody the lease");
        until("the process to know", || registered.is_registered());
    }
    drop(registered);
    assert_eq!(members.nodes().unwrap(), []);
}

#[test]
fn a_name_that_was_taken_during_an_outage_is_not_taken_back() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start(directory.path()).unwrap();
    let members = EtcdMembership::open(&config(&cluster)).unwrap();
    let first = members.register(spare("s", 7)).unwrap();
    let calls = cluster.calls();
    let target = cluster.target(0).unwrap();
    let text = calls.get(&target, "/colo/nodes/s/@spare").unwrap().unwrap().value;
    let other = String::from_utf8(text).unwrap().replace(&format!("{:032x}", 7), &format!("{:032x}", 8));
    calls.put(&target, "/colo/nodes/s/@spare", other.as_bytes()).unwrap();
    until("the first one to know", || !first.is_registered());
    assert_eq!(members.nodes().unwrap(), [spare("s", 8)]);
    let error = first.update(spare("s", 7)).unwrap_err();
    assert!(matches!(error, MembershipError::Taken { .. }), "{error}");
    drop(first);
    assert_eq!(members.nodes().unwrap(), [spare("s", 8)], "it leaves only what is its own");
}

#[test]
fn nonsense_is_left_out_and_left_alone() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start(directory.path()).unwrap();
    let config = config(&cluster);
    let members = EtcdMembership::open(&config).unwrap();
    let arbiter = EtcdArbiter::open(&config).unwrap();
    let entry = run_on(&arbiter, "web", "r", 1);
    let registered = members.register(spare("s", 7)).unwrap();
    let (calls, target) = (cluster.calls(), cluster.target(0).unwrap());
    let record = calls.get(&target, "/colo/nodes/s/@spare").unwrap().unwrap().value;
    let register = calls.get(&target, "/colo/vms/web/register").unwrap().unwrap().value;
    let large = vec![b'x'; 1 << 20];
    let nonsense: [(&str, &[u8]); 10] = [
        ("/colo/nodes/a", b"no slot"),
        ("/colo/nodes/a/@spare", b"{}"),
        ("/colo/nodes/b/@spare", &record),
        ("/colo/nodes/../x", b""),
        ("/colo/nodes/l1/@spare", &large),
        ("/colo/nodes/l2/@spare", &large),
        ("/colo/nodes/l3/@spare", &large),
        ("/colo/nodes/l4/@spare", &large),
        ("/colo/vms/db/register", &register),
        ("/colo/vms/x/notes", b"an operator's"),
    ];
    for (key, value) in nonsense {
        calls.put(&target, key, value).unwrap();
    }
    assert_eq!(members.nodes().unwrap(), [spare("s", 7)]);
    assert_eq!(members.vms().unwrap(), [("web".parse().unwrap(), entry.clone())]);
    let error = members.register(spare("a", 1)).err().unwrap();
    assert!(matches!(error, MembershipError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("/colo/nodes/a/@spare"), "{error}");
    calls.put(&target, "/colo/claims/s", b"mine").unwrap();
    let wanted = claim("web", &entry, "s", 7);
    for error in [
        members.claim(&wanted).err().unwrap(),
        members.claim_of(&node("s")).err().unwrap(),
        members.release(&wanted).err().unwrap(),
    ] {
        assert!(error.to_string().contains("/colo/claims/s"), "{error}");
    }
    let damaged = claim("db", &entry, "s", 7);
    let error = members.claim(&damaged).unwrap_err().to_string();
    assert!(error.contains("it is the register of web") || error.contains("/colo/claims/s"), "{error}");
    let left = calls.all(&target).unwrap();
    for (key, value) in nonsense.iter().copied().chain([("/colo/claims/s", b"mine".as_slice())]) {
        assert!(left.iter().any(|pair| pair.key == key && pair.value == value), "{key} was touched");
    }
    drop(registered);
}
