//! Reads an identity from its files, and checks at start what would else fail at the first connection.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{
    DEVELOPMENT_NAME, Identity, Pem, Role, ServicePem, TlsError, check_chain, peer_role, provider, verify,
};
use crate::durable;

/// Bytes of a PEM file at most: a certificate has some 2 KiB.
const MAX_PEM_FILE: u64 = 256 << 10;

/// Certificates in one file at most: an authority that is being replaced has two, a chain seldom four.
const MAX_CERTIFICATES: usize = 16;

/// What helps where a node's own file is missing.
const OWN_MISSING: &str = "put it there, or leave [tls] out to use development certificates on loopback";

/// What helps where a service's is.
const SERVICE_MISSING: &str = "put it there, or correct its path";

pub(super) fn ca_path(directory: &Path) -> PathBuf {
    directory.join("ca.pem")
}

pub(super) fn certificate_path(directory: &Path, role: Role) -> PathBuf {
    directory.join(format!("{}.pem", role.stem()))
}

pub(super) fn key_path(directory: &Path, role: Role) -> PathBuf {
    directory.join(format!("{}.key", role.stem()))
}

/// The identity of `role` in `directory`, whether it is for development or not.
pub(super) fn load(directory: &Path, role: Role) -> Result<Identity, TlsError> {
    let (ca_path, certificate_path) = (ca_path(directory), certificate_path(directory, role));
    let key_path = key_path(directory, role);
    let read = |path: &Path| text(path, OWN_MISSING);
    let pem = Pem { ca: read(&ca_path)?, certificate: read(&certificate_path)?, key: read(&key_path)? };
    let roots = Arc::new(authority(&ca_path, &pem.ca)?);
    let chain = certificates(&certificate_path, &pem.certificate)?;
    let key = private_key(&key_path, &pem.key)?;
    check_key(&key_path, &certificate_path, &chain, &key)?;
    check_role(&certificate_path, &chain[0], role)?;
    check_chain(&roots, &chain, role).map_err(|e| refused(&certificate_path, &ca_path, &e))?;
    let development = verify::carries(&chain[0], DEVELOPMENT_NAME)?;
    Ok(Identity { role, development, pem, chain, key, roots })
}

/// The texts of a client of another service, such as etcd, whose authority is not Colo's: checked as far as that can be
/// done here. Whether the service takes the certificate, only it knows.
pub(super) fn load_service(ca: &Path, own: Option<(&Path, &Path)>) -> Result<ServicePem, TlsError> {
    let ca_text = text(ca, SERVICE_MISSING)?;
    let roots = Arc::new(authority(ca, &ca_text)?);
    let Some((certificate_path, key_path)) = own else { return Ok(ServicePem { ca: ca_text, own: None }) };
    let (certificate, key_text) =
        (text(certificate_path, SERVICE_MISSING)?, text(key_path, SERVICE_MISSING)?);
    let chain = certificates(certificate_path, &certificate)?;
    let key = private_key(key_path, &key_text)?;
    check_key(key_path, certificate_path, &chain, &key)?;
    check_age(&roots, certificate_path, ca, &chain)?;
    Ok(ServicePem { ca: ca_text, own: Some((certificate, key_text)) })
}

/// A certificate that has expired is told at once. Clients may be of another authority than servers, so nothing is said
/// of the issuer; age is checked before that.
fn check_age(
    roots: &Arc<RootCertStore>,
    path: &Path,
    ca: &Path,
    chain: &[CertificateDer<'static>],
) -> Result<(), TlsError> {
    use CertificateError as Bad;
    let now = rustls::pki_types::UnixTime::now();
    let checked = verify::client_verifier(roots)?.verify_client_cert(&chain[0], &chain[1..], now);
    match checked {
        Err(rustls::Error::InvalidCertificate(
            Bad::Expired | Bad::ExpiredContext { .. } | Bad::NotValidYet | Bad::NotValidYetContext { .. },
        )) => Err(refused(path, ca, &checked.expect_err("it was an error"))),
        _ => Ok(()),
    }
}

fn private_key(path: &Path, pem: &str) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|e| {
        let remedy = "it must hold one private key in PEM (PKCS#8, SEC1 or PKCS#1), not encrypted";
        content(path, format!("{e}"), remedy)
    })
}

fn content(path: &Path, reason: String, remedy: &'static str) -> TlsError {
    TlsError::Content { path: path.to_owned(), reason, remedy }
}

fn text(path: &Path, missing: &'static str) -> Result<String, TlsError> {
    let failed = |source: io::Error| {
        let remedy = match source.kind() {
            ErrorKind::NotFound => missing,
            ErrorKind::PermissionDenied => "let the user that Colo runs as read it",
            ErrorKind::FileTooLarge => "is it the right file?",
            _ => "check the path",
        };
        TlsError::File { what: "read", path: path.to_owned(), source, remedy }
    };
    let bytes = durable::read(path, MAX_PEM_FILE)
        .and_then(|found| found.ok_or_else(|| ErrorKind::NotFound.into()))
        .map_err(failed)?;
    String::from_utf8(bytes)
        .map_err(|_| content(path, "it is not text".to_owned(), "it must be in PEM, not in DER"))
}

fn certificates(path: &Path, pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    const REMEDY: &str = "it must hold certificates in PEM";
    let mut found = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        found.push(certificate.map_err(|e| content(path, e.to_string(), REMEDY))?);
        if found.len() > MAX_CERTIFICATES {
            return Err(content(path, format!("it has more than {MAX_CERTIFICATES} certificates"), REMEDY));
        }
    }
    if found.is_empty() {
        return Err(content(path, "there is no certificate in it".to_owned(), REMEDY));
    }
    Ok(found)
}

fn authority(path: &Path, pem: &str) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(|e| {
            content(path, e.to_string(), "it must hold the certificate of the authority, in PEM")
        })?;
    }
    Ok(roots)
}

fn check_key(
    key_path: &Path,
    certificate_path: &Path,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<(), TlsError> {
    CertifiedKey::from_der(chain.to_vec(), key.clone_key(), &provider()).map(|_| ()).map_err(|e| match e {
        rustls::Error::InconsistentKeys(_) => {
            let reason = format!("it is not the key of {}", certificate_path.display());
            content(key_path, reason, "put the two files there that were issued together")
        }
        rustls::Error::InvalidCertificate(_) => {
            content(certificate_path, e.to_string(), "issue the certificate anew")
        }
        e => content(key_path, e.to_string(), "use an ECDSA P-256 or P-384, Ed25519 or RSA key"),
    })
}

fn check_role(path: &Path, certificate: &CertificateDer<'_>, role: Role) -> Result<(), TlsError> {
    let wrong = |reason| {
        let remedy = match role {
            Role::Node => "issue it with the DNS name node.colo.internal alone",
            Role::Operator => "issue it with the DNS name operator.colo.internal alone",
        };
        content(path, reason, remedy)
    };
    match peer_role(certificate) {
        Ok(found) if found == role => Ok(()),
        Ok(found) => Err(wrong(format!("it is of the role {found}, and {role} is wanted"))),
        Err(TlsError::NoRole(reason)) => Err(wrong(reason)),
        Err(e) => Err(e),
    }
}

/// What a peer would say of the certificate.
fn refused(path: &Path, ca: &Path, error: &rustls::Error) -> TlsError {
    use CertificateError as Bad;
    let rustls::Error::InvalidCertificate(why) = error else {
        return content(path, error.to_string(), "issue it anew");
    };
    match why {
        Bad::Expired | Bad::ExpiredContext { .. } => {
            content(path, "it has expired".to_owned(), "issue a new one, and check this host's clock")
        }
        Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
            content(path, "it is not valid yet".to_owned(), "check this host's clock")
        }
        Bad::UnknownIssuer | Bad::BadSignature => content(
            path,
            format!("it was not issued by the authority in {}", ca.display()),
            "all nodes and operators need certificates of one authority",
        ),
        Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => content(
            path,
            "its key usage does not allow it".to_owned(),
            "nodes need server and client authentication, operators client authentication",
        ),
        why => content(path, format!("{why:?}"), "issue it anew"),
    }
}
