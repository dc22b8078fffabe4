//! Handshakes in memory, and every refusal of an identity.

use super::{
    ALPN, Identity, NODE_NAME, OPERATOR_NAME, Role, TlsError, client_config, files, peer_role, provider,
    server_config, server_name,
};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

/// An authority as an operator would run one.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn issue(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// A directory with a node and an operator.
    fn directory(&self) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ca.pem"), &self.pem).unwrap();
        for role in [Role::Node, Role::Operator] {
            put(directory.path(), role, &self.issue(&[role.name()], |_| {}));
        }
        directory
    }

    fn identity(&self, role: Role) -> Identity {
        Identity::load(self.directory().path(), role).unwrap()
    }
}

fn put(directory: &Path, role: Role, (certificate, key): &(String, String)) {
    fs::write(files::certificate_path(directory, role), certificate).unwrap();
    fs::write(files::key_path(directory, role), key).unwrap();
}

/// What each side says in the end.
type Ends = Result<(ClientConnection, ServerConnection), (Side, rustls::Error)>;

#[derive(Debug, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

fn carry(from: &mut Connection, to: &mut Connection) -> Result<bool, rustls::Error> {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        to.read_tls(&mut rest).unwrap();
        to.process_new_packets()?;
    }
    Ok(!bytes.is_empty())
}

fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Ends {
    let mut client: Connection = ClientConnection::new(client, server_name()).unwrap().into();
    let mut server: Connection = ServerConnection::new(server).unwrap().into();
    loop {
        let there = carry(&mut client, &mut server).map_err(|e| (Side::Server, e))?;
        let back = carry(&mut server, &mut client).map_err(|e| (Side::Client, e))?;
        if !there && !back {
            break;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    match (client, server) {
        (Connection::Client(client), Connection::Server(server)) => Ok((client, server)),
        _ => unreachable!("they are what they were made as"),
    }
}

#[test]
fn two_nodes_shake_hands_and_know_each_other() {
    let authority = Authority::new();
    let (one, two) = (authority.identity(Role::Node), authority.identity(Role::Node));
    let ends = handshake(client_config(&one).unwrap(), server_config(&two).unwrap());
    let (client, server) = ends.unwrap();
    assert_eq!(peer_role(&client.peer_certificates().unwrap()[0]).unwrap(), Role::Node);
    assert_eq!(peer_role(&server.peer_certificates().unwrap()[0]).unwrap(), Role::Node);
    for (protocol, version) in [
        (client.alpn_protocol(), client.protocol_version()),
        (server.alpn_protocol(), server.protocol_version()),
    ] {
        assert_eq!(protocol, Some(ALPN));
        assert_eq!(version, Some(rustls::ProtocolVersion::TLSv1_3));
    }
    let again = handshake(client_config(&one).unwrap(), server_config(&two).unwrap()).unwrap();
    assert_eq!(again.0.handshake_kind(), Some(rustls::HandshakeKind::Full), "nothing is resumed");
}

#[test]
fn a_foreign_authority_is_refused_by_both_sides() {
    let (ours, theirs) = (Authority::new().identity(Role::Node), Authority::new().identity(Role::Node));
    let ends = handshake(client_config(&theirs).unwrap(), server_config(&ours).unwrap());
    let (side, error) = ends.unwrap_err();
    assert_eq!(side, Side::Client);
    assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{error}");

    // A client that knows our authority but is of another one.
    let mut roots = rustls::RootCertStore::empty();
    for certificate in ours.roots.roots.iter().cloned() {
        roots.roots.push(certificate);
    }
    let liar = Identity { roots: Arc::new(roots), ..theirs };
    let ends = handshake(client_config(&liar).unwrap(), server_config(&ours).unwrap());
    let (side, error) = ends.unwrap_err();
    assert_eq!(side, Side::Server);
    assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{error}");
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let node = Authority::new().identity(Role::Node);
    let mut nameless = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(node.roots.clone())
        .with_no_client_auth();
    nameless.alpn_protocols = vec![ALPN.to_vec()];
    let (side, error) = handshake(Arc::new(nameless), server_config(&node).unwrap()).unwrap_err();
    assert_eq!((side, error), (Side::Server, rustls::Error::NoCertificatesPresented));
}

#[test]
fn an_operator_is_no_node_on_either_side() {
    let authority = Authority::new();
    let (node, operator) = (authority.identity(Role::Node), authority.identity(Role::Operator));
    let (side, _) = handshake(client_config(&operator).unwrap(), server_config(&node).unwrap()).unwrap_err();
    assert_eq!(side, Side::Server);
    assert!(matches!(server_config(&operator), Err(TlsError::NotANode)));
    // One that pretends to be a server all the same.
    let pretender = Identity { role: Role::Node, ..operator };
    let (side, error) =
        handshake(client_config(&node).unwrap(), server_config(&pretender).unwrap()).unwrap_err();
    assert_eq!(side, Side::Client);
    assert!(error.to_string().contains("node.colo.internal"), "{error}");
}

#[test]
fn another_protocol_is_refused() {
    let node = Authority::new().identity(Role::Node);
    let mut other = client_config(&node).unwrap().as_ref().clone();
    other.alpn_protocols = vec![b"h3".to_vec()];
    let (side, error) = handshake(Arc::new(other), server_config(&node).unwrap()).unwrap_err();
    assert_eq!((side, error), (Side::Server, rustls::Error::NoApplicationProtocol));
}

#[test]
fn roles_are_told_by_one_name_only() {
    let authority = Authority::new();
    let role = |names: &[&str]| {
        let (pem, _) = authority.issue(names, |_| {});
        let der: CertificateDer<'static> =
            rustls::pki_types::pem::PemObject::from_pem_slice(pem.as_bytes()).unwrap();
        peer_role(&der)
    };
    assert_eq!(role(&[NODE_NAME, "host-1.example"]).unwrap(), Role::Node);
    assert_eq!(role(&[OPERATOR_NAME]).unwrap(), Role::Operator);
    for (names, reason) in [
        (&[NODE_NAME, OPERATOR_NAME][..], "both names"),
        (&["*.colo.internal"], "both names"),
        (&["host-1.example"], "neither name"),
        (&[], "neither name"),
    ] {
        let error = role(names).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains("issue it with"), "{error}");
    }
    let error = peer_role(&CertificateDer::from(vec![1, 2, 3])).unwrap_err().to_string();
    assert!(error.contains("cannot be read"), "{error}");
}

/// What loading says after `change` to a good directory.
fn refusal(change: impl FnOnce(&Authority, &Path)) -> String {
    let authority = Authority::new();
    let directory = authority.directory();
    Identity::load(directory.path(), Role::Node).unwrap();
    change(&authority, directory.path());
    Identity::load(directory.path(), Role::Node).unwrap_err().to_string()
}

#[test]
fn every_wrong_file_is_named_with_a_remedy() {
    let check = |change: &dyn Fn(&Authority, &Path), wanted: &[&str]| {
        let error = refusal(change);
        assert!(wanted.iter().all(|part| error.contains(part)), "{error} lacks one of {wanted:?}");
    };
    for name in ["ca.pem", "node.pem", "node.key"] {
        check(&|_, dir| fs::remove_file(dir.join(name)).unwrap(), &[name, "put it there"]);
        check(&|_, dir| fs::write(dir.join(name), "hello\n").unwrap(), &[name, "PEM"]);
        check(&|_, dir| fs::write(dir.join(name), [0xff; 9]).unwrap(), &[name, "not in DER"]);
        check(
            &|_, dir| fs::write(dir.join(name), [b'a'; 300 << 10]).unwrap(),
            &[name, "is it the right file?"],
        );
    }
    let operator = |name| {
        move |_: &Authority, dir: &Path| {
            fs::copy(dir.join(format!("operator.{name}")), dir.join(format!("node.{name}"))).unwrap();
        }
    };
    check(&operator("key"), &["node.key", "is not the key of", "node.pem", "issued together"]);
    check(&operator("pem"), &["node.key", "is not the key of", "node.pem"]);
    check(
        &|_, dir| fs::write(dir.join("ca.pem"), Authority::new().pem).unwrap(),
        &["node.pem", "not issued by the authority in", "ca.pem", "of one authority"],
    );
    let issued = |names: &'static [&'static str], change: fn(&mut CertificateParams)| {
        move |authority: &Authority, dir: &Path| put(dir, Role::Node, &authority.issue(names, change))
    };
    check(&issued(&[OPERATOR_NAME], |_| {}), &["node.pem", "role operator, and node is wanted"]);
    check(&issued(&["a.example"], |_| {}), &["node.pem", "neither name", "node.colo.internal alone"]);
    check(
        &issued(&[NODE_NAME], |params| params.not_after = date_time_ymd(2021, 1, 1)),
        &["node.pem", "has expired", "check this host's clock"],
    );
    check(
        &issued(&[NODE_NAME], |params| params.not_before = date_time_ymd(2200, 1, 1)),
        &["node.pem", "not valid yet", "check this host's clock"],
    );
    check(
        &issued(&[NODE_NAME], |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        }),
        &["node.pem", "key usage", "server and client authentication"],
    );
}

#[test]
fn secrets_are_not_shown() {
    let identity = Authority::new().identity(Role::Node);
    let shown = format!("{identity:?}");
    assert!(!shown.contains("PRIVATE KEY") && shown.contains("not shown"), "{shown}");
    assert!(identity.pem().key.contains("PRIVATE KEY"));
}

#[test]
fn a_certificate_is_called_by_its_common_name() {
    use rcgen::{DistinguishedName, DnType};
    use rustls::pki_types::pem::PemObject;
    let authority = Authority::new();
    let called = |name: Option<&str>| {
        let (pem, _) = authority.issue(&[OPERATOR_NAME], |params| {
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::OrganizationName, "Acme");
            name.into_iter().for_each(|name| params.distinguished_name.push(DnType::CommonName, name));
        });
        super::common_name(&CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
    };
    assert_eq!(called(Some("eve")).as_deref(), Some("eve"));
    assert_eq!(called(Some("Eve \u{e4}\n\u{1b}[2J")).as_deref(), Some("Eve \u{e4}[2J"));
    assert_eq!(called(None), None);
    assert_eq!(super::common_name(&CertificateDer::from(vec![0x30, 3, 6, 3, 85])), None);
}
