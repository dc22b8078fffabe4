//! What the etcd arbiter refuses: keys that hold no register, and members that it cannot trust.

use colo_common::arbiter::etcd::EtcdArbiter;
use colo_common::arbiter::{Arbiter, ArbiterError};
use colo_common::config::ArbiterConfig;
use colo_tests::etcd::authority::{Authority, LONG_AGO, NOW};
use colo_tests::etcd::{self, EtcdCluster};
use std::path::Path;

use super::{client, proposal, vm};

#[test]
fn a_key_that_holds_no_register_is_told_and_left_alone() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start(directory.path()).unwrap();
    let (arbiter, target) = (client(&cluster), cluster.target(0).unwrap());
    let (key, first) = ("/colo/vms/web/register", proposal(1, None));
    let calls = cluster.calls();
    arbiter.propose(&"db".parse().unwrap(), &first).unwrap();
    let of_db = calls.get(&target, "/colo/vms/db/register").unwrap().unwrap().value;
    let long = vec![b'#'; 1 << 20];
    let values: [(&[u8], &str); 5] = [
        (b"", "its last line is no checksum"),
        (b"nonsense\n", "its last line is no checksum"),
        (&[0xff; 40], "it is not text"),
        (&long, "more than 4096 bytes"),
        (&of_db, "it is the register of db"),
    ];
    for (value, wanted) in values {
        calls.put(&target, key, value).unwrap();
        let errors = [arbiter.read(&vm()).unwrap_err(), arbiter.propose(&vm(), &first).unwrap_err()];
        for error in errors {
            let text = error.to_string();
            assert!(matches!(error, ArbiterError::Damaged { .. }), "{text}");
            assert!(text.contains(wanted) && text.contains(key), "{text}");
            assert!(text.contains("restore it from a backup"), "{text}");
        }
        assert_eq!(calls.get(&target, key).unwrap().unwrap().value, value, "left for a person to look at");
    }
    calls.delete(&target, key).unwrap();
    arbiter.propose(&vm(), &first).unwrap();
}

/// A client with these certificates; `ca` is whose members it trusts.
fn with(cluster: &EtcdCluster, ca: &Path, own: Option<&Path>) -> ArbiterConfig {
    let end = |path: &Path, end: &str| Some(path.with_extension(end));
    let (certificate, key) = own.map_or((None, None), |own| (end(own, "pem"), end(own, "key")));
    ArbiterConfig { ca: end(ca, "ca"), certificate, key, timeout_ms: Some(1000), ..cluster.config() }
}

#[test]
fn certificates_of_others_and_of_the_past_are_told() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let cluster = EtcdCluster::start_with_tls(directory.path()).unwrap();
    let at = |name: &str| directory.path().join(name);
    let names = ["client".to_owned()];
    Authority::new("foreign authority").unwrap().write(&at("foreign"), &names, NOW).unwrap();
    cluster.authority().unwrap().write(&at("old"), &names, LONG_AGO).unwrap();
    let client = at("client");

    let told = |config: &ArbiterConfig| match EtcdArbiter::open(config) {
        Err(e) => e.to_string(),
        Ok(arbiter) => arbiter.propose(&vm(), &proposal(1, None)).unwrap_err().to_string(),
    };
    for (config, wanted) in [
        (with(&cluster, &at("foreign"), Some(&client)), ["UnknownIssuer", "arbiter.ca"]),
        (with(&cluster, &client, Some(&at("foreign"))), ["certificate", "arbiter.certificate"]),
        (with(&cluster, &client, None), ["certificate", "arbiter.certificate"]),
        (with(&cluster, &client, Some(&at("old"))), ["it has expired", "old.pem"]),
    ] {
        let text = told(&config);
        println!("{text}");
        assert!(wanted.iter().all(|part| text.contains(part)), "{text}");
    }
    let mut crossed = with(&cluster, &client, Some(&client));
    crossed.key = Some(at("foreign.key"));
    assert!(told(&crossed).contains("it is not the key of"));
    crossed.key = Some(at("missing.key"));
    assert!(told(&crossed).contains("put it there"));
    let all = cluster.calls().all(&cluster.target(0).unwrap()).unwrap();
    assert_eq!(all, [], "no change of state");
}

#[test]
fn a_member_whose_certificate_has_expired_is_not_talked_to() {
    if !etcd::usable() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut cluster = EtcdCluster::start_with_tls(directory.path()).unwrap();
    let arbiter = client(&cluster);
    let first = proposal(1, None);
    arbiter.propose(&vm(), &first).unwrap();
    let names = ["127.0.0.1".to_owned()];
    cluster.authority().unwrap().write(&directory.path().join("member"), &names, LONG_AGO).unwrap();
    // etcd reads its files at each handshake.
    cluster.kill(0).unwrap();
    cluster.restart(0).unwrap();
    let one = ArbiterConfig {
        endpoints: Some(vec![cluster.endpoint(0)]),
        timeout_ms: Some(1000),
        ..cluster.config()
    };
    let text = EtcdArbiter::open(&one).unwrap().read(&vm()).unwrap_err().to_string();
    assert!(text.contains("xpired") && text.contains("the clocks"), "{text}");
}
