//! Who may talk to whom: mutually authenticated TLS 1.3 between nodes (QUIC) and for the control plane (gRPC).
//!
//! A cluster has one certificate authority of its own. A certificate's role is in it as a DNS name: nodes carry
//! [`NODE_NAME`], operators [`OPERATOR_NAME`], nobody both. A client takes only a server that is a node. On QUIC a
//! server takes only clients that are nodes; the control plane takes both and asks [`peer_role`] what a caller may do.
//! Nothing is resumed and nothing is sent before the handshake is over (no 0-RTT): every connection shows its
//! certificate anew.
//!
//! The files of a directory, all PEM: `ca.pem`; `node.pem` and `node.key` on each node; `operator.pem` and
//! `operator.key` where `coloctl` runs. A certificate's file may hold intermediate ones after it.

mod dev;
mod files;
mod verify;

use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use dev::{DevCerts, development_directory};

/// DNS name in the certificate of every node; what a client verifies a server as.
pub const NODE_NAME: &str = "node.colo.internal";

/// DNS name in the certificate of every operator.
pub const OPERATOR_NAME: &str = "operator.colo.internal";

/// DNS name in certificates that were made for development and are taken on loopback alone.
pub const DEVELOPMENT_NAME: &str = "development.colo.internal";

/// What is spoken on a QUIC connection between nodes.
pub const ALPN: &[u8] = b"colo/1";

/// What a certificate allows its owner to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// A node: takes part in replication and may be connected to.
    Node,
    /// An operator: may call the control plane.
    Operator,
}

impl Role {
    /// The DNS name that stands for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => NODE_NAME,
            Self::Operator => OPERATOR_NAME,
        }
    }

    /// How its files are called.
    fn stem(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.stem())
    }
}

/// Why there is no identity, or a peer has none.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file or directory cannot be used.
    #[error("cannot {what} {}: {source}; {remedy}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What helps.
        remedy: &'static str,
    },
    /// A file does not hold what its name says.
    #[error("{} is of no use: {reason}; {remedy}", path.display())]
    Content {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What helps.
        remedy: &'static str,
    },
    /// A certificate with no role, or with two.
    #[error(
        "the peer's certificate has no role: {0}; issue it with the DNS name {NODE_NAME} or {OPERATOR_NAME}"
    )]
    NoRole(String),
    /// An operator cannot be connected to.
    #[error("a server needs a node's certificate and this is an operator's: use node.pem and node.key")]
    NotANode,
    /// No place for development certificates.
    #[error(
        "there is no place for development certificates: set HOME or COLO_DEV_TLS, or name a directory in [tls]"
    )]
    NoPlace,
    /// Making development certificates.
    #[error(
        "development certificates cannot be made: {0}; name a directory with certificates of your own in [tls]"
    )]
    Making(#[from] rcgen::Error),
    /// rustls refuses what was checked before.
    #[error("TLS cannot be set up: {0}; check the certificates in [tls]")]
    Setup(#[from] rustls::Error),
}

/// PEM texts, as tonic's `ServerTlsConfig` and `ClientTlsConfig` take them.
#[derive(Clone)]
pub struct Pem {
    /// The certificate authority.
    pub ca: String,
    /// The certificate, and intermediate ones after it.
    pub certificate: String,
    /// The private key. Never to be logged.
    pub key: String,
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pem (not shown)")
    }
}

/// PEM texts of a client of another service, such as etcd.
#[derive(Clone)]
pub struct ServicePem {
    /// The authority that issued the service's certificates.
    pub ca: String,
    /// This client's certificate and its private key, if it shows one. Never to be logged.
    pub own: Option<(String, String)>,
}

impl ServicePem {
    /// Reads the authority of a service, and the certificate and key of this client.
    ///
    /// # Errors
    /// A file is missing or wrong, the key is another one's, or the certificate is not valid now.
    pub fn load(ca: &Path, own: Option<(&Path, &Path)>) -> Result<Self, TlsError> {
        files::load_service(ca, own)
    }
}

impl fmt::Debug for ServicePem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServicePem (not shown)")
    }
}

/// A certificate with its key and the authority that all peers must be of; checked when it was loaded.
#[derive(Debug)]
pub struct Identity {
    role: Role,
    development: bool,
    pem: Pem,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

impl Identity {
    /// Loads the identity of `role` from a directory of certificates (see the [module](self)).
    ///
    /// # Errors
    /// A file is missing or wrong, the key is another one's, the certificate is not of this authority, not of this
    /// role, not valid now, or made for development.
    pub fn load(directory: &Path, role: Role) -> Result<Self, TlsError> {
        let identity = files::load(directory, role)?;
        if identity.development {
            return Err(TlsError::Content {
                path: files::certificate_path(directory, role),
                reason: "it was made for development and is good for loopback only".to_owned(),
                remedy: "issue certificates of your own, or leave [tls] out",
            });
        }
        Ok(identity)
    }

    /// What it is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Whether it was made for development: peers off loopback must not be talked to.
    pub fn is_development(&self) -> bool {
        self.development
    }

    /// Its texts, for tonic.
    pub fn pem(&self) -> &Pem {
        &self.pem
    }
}

/// The identity that a node or `coloctl` starts with: of the directory that `[tls]` names, or for development.
///
/// # Errors
/// As [`Identity::load`] and [`DevCerts::ensure`].
pub fn identity(directory: Option<&Path>, role: Role) -> Result<Identity, TlsError> {
    match directory {
        Some(directory) => Identity::load(directory, role),
        None => DevCerts::ensure(&development_directory()?)?.identity(role),
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// How a node takes QUIC connections: from nodes of the same authority only.
///
/// # Errors
/// The identity is an operator's.
pub fn server_config(identity: &Identity) -> Result<Arc<ServerConfig>, TlsError> {
    if identity.role != Role::Node {
        return Err(TlsError::NotANode);
    }
    let clients = verify::NodesOnly::new(verify::client_verifier(&identity.roots)?);
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(clients))
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    // A resumed connection would not show its certificate.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// How a node or an operator connects by QUIC; the server is to be verified as [`NODE_NAME`].
///
/// # Errors
/// rustls refuses the identity.
pub fn client_config(identity: &Identity) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(identity.roots.clone())
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

/// The role in a peer's certificate, in DER. That the certificate is of the right authority was checked by the
/// handshake that it comes from.
///
/// # Errors
/// It is no certificate, or has no role or both.
pub fn peer_role(certificate: &CertificateDer<'_>) -> Result<Role, TlsError> {
    match (verify::carries(certificate, NODE_NAME)?, verify::carries(certificate, OPERATOR_NAME)?) {
        (true, false) => Ok(Role::Node),
        (false, true) => Ok(Role::Operator),
        (true, true) => Err(TlsError::NoRole("it is good for both names".to_owned())),
        (false, false) => Err(TlsError::NoRole("it is good for neither name".to_owned())),
    }
}

/// Whose a certificate is: its common name. Nothing if it has none that can be shown; nobody is let in or kept out by it.
pub fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    verify::common_name(certificate)
}

/// The name that a server is verified as.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from(NODE_NAME).expect("the name is a DNS name")
}

/// Checks that a peer of the same authority would take this chain now.
fn check_chain(
    roots: &Arc<RootCertStore>,
    chain: &[CertificateDer<'static>],
    role: Role,
) -> Result<(), rustls::Error> {
    let (leaf, between) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
    let now = rustls::pki_types::UnixTime::now();
    let invalid = |e: TlsError| rustls::Error::General(e.to_string());
    verify::client_verifier(roots).map_err(invalid)?.verify_client_cert(leaf, between, now)?;
    if role == Role::Node {
        let servers = verify::server_verifier(roots).map_err(invalid)?;
        servers.verify_server_cert(leaf, between, &server_name(), &[], now)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
