//! Connections to control planes. All limits of time are here: a node that is frozen must not freeze its operator.

use colo_common::config::Endpoint as Address;
use colo_common::tls::{Identity, NODE_NAME, Role};
use colo_proto::v1::admin_client::AdminClient;
use std::path::Path;
use std::time::Duration;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Response, Status};

use crate::error::{CtlError, root_cause};

/// How long a connection may take to come about.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long a question may take that a node answers from what it knows.
pub(crate) const QUESTION_LIMIT: Duration = Duration::from_secs(3);
/// How long a command may take that changes something: nodes give themselves 30 s, and answer then.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(40);
/// A long call is over when its node has been silent for these two together, as when its host is frozen.
const PING_INTERVAL: Duration = Duration::from_secs(1);
const PING_LIMIT: Duration = Duration::from_secs(2);

/// The nodes that the operator named, and how to speak to them.
#[derive(Clone)]
pub(crate) struct Nodes {
    addresses: Vec<Address>,
    tls: Option<ClientTlsConfig>,
}

/// A node that can be called.
#[derive(Clone)]
pub(crate) struct Node {
    /// Its control plane.
    pub(crate) address: Address,
    /// The way to call it.
    pub(crate) client: AdminClient<Channel>,
}

impl Nodes {
    /// The nodes at these addresses; with an operator's certificate if there is a directory with one.
    pub(crate) fn new(addresses: Vec<Address>, directory: Option<&Path>) -> Result<Self, CtlError> {
        let identity = directory.map(|directory| Identity::load(directory, Role::Operator)).transpose()?;
        let tls = identity.map(|identity| {
            let pem = identity.pem();
            ClientTlsConfig::new()
                .ca_certificate(Certificate::from_pem(&pem.ca))
                .identity(tonic::transport::Identity::from_pem(&pem.certificate, &pem.key))
                .domain_name(NODE_NAME)
        });
        Ok(Self { addresses, tls })
    }

    /// Where they are.
    pub(crate) fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Whether certificates are used.
    pub(crate) fn is_secured(&self) -> bool {
        self.tls.is_some()
    }

    /// Connects to the node at `address`.
    pub(crate) async fn connect(&self, address: &Address) -> Result<Node, CtlError> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let bad = |e: tonic::transport::Error| CtlError::Usage(format!("{address}: {}", root_cause(&e)));
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(bad)?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_LIMIT);
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.clone()).map_err(|e| CtlError::TlsSetup(root_cause(&e)))?;
        }
        // The handshake of TLS is not in the limit of the connection.
        let reason = match tokio::time::timeout(CONNECT_LIMIT, endpoint.connect()).await {
            Ok(Ok(channel)) => {
                return Ok(Node { address: address.clone(), client: AdminClient::new(channel) });
            }
            Ok(Err(e)) => root_cause(&e),
            Err(_) => format!("nothing is heard within {} s", CONNECT_LIMIT.as_secs()),
        };
        Err(CtlError::NoAnswer { address: address.clone(), reason, tls: self.is_secured() })
    }
}

impl Node {
    /// Waits for the answer to a call.
    pub(crate) async fn answer<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CtlError> {
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(self.error(&status)),
            Err(_) => Err(CtlError::Silent { address: self.address.clone(), limit }),
        }
    }

    /// What a status means that this node sent, or that stands for a broken connection.
    pub(crate) fn error(&self, status: &Status) -> CtlError {
        CtlError::from_status(&self.address, status)
    }
}
