//! Certificates: an operator's is taken, and what is wrong is said.

mod fake;

use colo_common::tls::{NODE_NAME, OPERATOR_NAME};
use colo_proto::v1::Role;
use fake::run::run;
use fake::{Fake, solo, status};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::fs;
use tempfile::TempDir;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

/// A directory for an operator, and what a node of the same authority needs.
fn authority() -> (TempDir, ServerTlsConfig) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let issue = |name: &str| {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
    };
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = issue(OPERATOR_NAME);
    for (name, text) in [("ca.pem", &ca), ("operator.pem", &certificate), ("operator.key", &key)] {
        fs::write(directory.path().join(name), text).unwrap();
    }
    let (certificate, key) = issue(NODE_NAME);
    let server = ServerTlsConfig::new()
        .identity(Identity::from_pem(certificate, key))
        .client_ca_root(Certificate::from_pem(ca));
    (directory, server)
}

#[test]
fn an_operators_certificate_opens_the_control_plane() {
    let (directory, server) = authority();
    let (other, _) = authority();
    let node = Fake::secured(status("a", Role::Alone, solo("a", 1)), Some(server));
    let nodes = [node.address.to_string()];
    let with = |directory: &TempDir| run(&nodes, &format!("status --tls {}", directory.path().display()));
    let (code, out, err) = with(&directory);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("solo on a in term 1"), "{out}");
    let (code, _, err) = run(&nodes, "status");
    assert_eq!(code, 3);
    assert!(err.contains("a node with certificates needs --tls"), "{err}");
    let (code, _, err) = with(&other);
    assert_eq!(code, 3);
    assert!(err.contains("certificates of the same authority"), "{err}");
    fs::remove_file(directory.path().join("operator.key")).unwrap();
    let (code, _, err) = with(&directory);
    assert_eq!(code, 1);
    assert!(err.contains("operator.key"), "{err}");
}
