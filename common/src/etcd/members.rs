//! The members that the configuration names, each with a connection of its own, so that one that is frozen holds up
//! nothing but itself.

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::error::EtcdError;
use crate::config::ArbiterConfig;
use crate::tls::ServicePem;

/// A silent connection is asked for a sign of life this often while a call waits on it. etcd ends connections that ask
/// more than every five seconds.
const PING: Duration = Duration::from_secs(10);

/// How long that sign may take.
const PING_PATIENCE: Duration = Duration::from_secs(3);

/// All members, and which to ask first.
#[derive(Debug)]
pub(super) struct Members {
    list: Vec<Member>,
    has_tls: bool,
    /// The one that answered last.
    preferred: AtomicUsize,
    /// Id of the cluster that most of them are of; 0 until that is known. A member that was taken out of the cluster and
    /// has made one of its own must not be believed.
    cluster: AtomicU64,
}

#[derive(Debug)]
struct Member {
    name: String,
    endpoint: Endpoint,
    channel: Mutex<Channel>,
}

impl Members {
    /// To be called in the runtime that the connections are to belong to.
    pub(super) fn of(config: &ArbiterConfig) -> Result<Self, EtcdError> {
        config.check().map_err(|problem| EtcdError::Setup(problem.to_string()))?;
        let tls = match &config.ca {
            Some(ca) => {
                Some(tls(&ServicePem::load(ca, config.certificate.as_deref().zip(config.key.as_deref()))?))
            }
            None => None,
        };
        let mut list = Vec::new();
        for name in config.endpoints.iter().flatten().map(ToString::to_string) {
            let wrong = |e: tonic::transport::Error| EtcdError::Setup(format!("{name}: {e}"));
            let mut endpoint = Endpoint::from_shared(name.clone())
                .map_err(wrong)?
                .connect_timeout(config.timeout())
                .http2_keep_alive_interval(PING)
                .keep_alive_timeout(PING_PATIENCE);
            if let Some(tls) = &tls {
                endpoint = endpoint.tls_config(tls.clone()).map_err(wrong)?;
            }
            let channel = Mutex::new(endpoint.connect_lazy());
            list.push(Member { name, endpoint, channel });
        }
        Ok(Self { list, has_tls: tls.is_some(), preferred: AtomicUsize::new(0), cluster: AtomicU64::new(0) })
    }

    pub(super) fn has_tls(&self) -> bool {
        self.has_tls
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn preferred(&self) -> usize {
        self.preferred.load(Ordering::Relaxed)
    }

    pub(super) fn prefer(&self, member: usize) {
        self.preferred.store(member, Ordering::Relaxed);
    }

    pub(super) fn name(&self, member: usize) -> &str {
        &self.list[member].name
    }

    pub(super) fn channel(&self, member: usize) -> Channel {
        self.list[member].channel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The next call connects anew: a connection that a broken path has left behind may stay silent for minutes after
    /// the path is whole again.
    pub(super) fn reconnect(&self, member: usize) {
        let Member { endpoint, channel, .. } = &self.list[member];
        *channel.lock().unwrap_or_else(PoisonError::into_inner) = endpoint.connect_lazy();
    }

    pub(super) fn is_recognised(&self) -> bool {
        self.cluster.load(Ordering::Relaxed) != 0
    }

    /// Only answers of this cluster count from now on.
    pub(super) fn recognise(&self, cluster: u64) {
        self.is_ours(cluster);
    }

    /// Whether an answer with this cluster id is one of the cluster that all others came from.
    pub(super) fn is_ours(&self, cluster: u64) -> bool {
        let known = self.cluster.compare_exchange(0, cluster, Ordering::Relaxed, Ordering::Relaxed);
        known.map_or_else(|known| known == cluster, |_| true)
    }
}

fn tls(pem: &ServicePem) -> ClientTlsConfig {
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&pem.ca));
    match &pem.own {
        Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key)),
        None => config,
    }
}

impl fmt::Display for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, member) in self.list.iter().enumerate() {
            write!(f, "{}{}", if n == 0 { "" } else { ", " }, member.name)?;
        }
        Ok(())
    }
}
