//! Calls to single members of etcd, past Colo's own client: what an operator does with etcdctl, and what a test must be
//! sure of.

use anyhow::Context;
use colo_common::config::ArbiterConfig;
use colo_common::etcd::wire;
use colo_common::tls::ServicePem;
use std::future::Future;
use std::time::Duration;
use tokio::runtime::Runtime;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use wire::cluster_client::ClusterClient;
use wire::kv_client::KvClient;
use wire::maintenance_client::MaintenanceClient;

/// How long one call may take; a member that is not asked here is healthy.
const PATIENCE: Duration = Duration::from_secs(3);

/// Bytes of an answer at most: tests put large nonsense there.
const MAX_ANSWER: usize = 64 << 20;

/// Makes calls; blocks.
#[derive(Debug)]
pub struct Calls {
    runtime: Runtime,
}

/// A member, as it is connected to.
#[derive(Clone, Debug)]
pub struct Target(Endpoint);

impl Target {
    /// The member at `url`, with the certificates that `config` names.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn new(url: &str, config: &ArbiterConfig) -> anyhow::Result<Self> {
        let mut endpoint = Endpoint::from_shared(url.to_owned())?.timeout(PATIENCE).connect_timeout(PATIENCE);
        if let Some(ca) = &config.ca {
            let pem = ServicePem::load(ca, config.certificate.as_deref().zip(config.key.as_deref()))?;
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&pem.ca));
            if let Some((certificate, key)) = &pem.own {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            endpoint = endpoint.tls_config(tls)?;
        }
        Ok(Self(endpoint))
    }
}

/// What a member says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its id.
    pub member: u64,
    /// The leader's, as it knows; 0 if it knows none.
    pub leader: u64,
}

/// A key as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// How often it was written since it was made.
    pub version: i64,
    /// The lease that it ends with, or 0.
    pub lease: i64,
}

impl Calls {
    /// Ready to call.
    ///
    /// # Errors
    /// The host has no thread for it.
    pub fn new() -> anyhow::Result<Self> {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        Ok(Self { runtime: builder.enable_all().build()? })
    }

    fn call<T, F>(&self, target: &Target, call: impl FnOnce(Channel) -> F) -> anyhow::Result<T>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        self.runtime.block_on(async {
            let channel = tokio::time::timeout(PATIENCE, target.0.connect()).await.context("silent")??;
            let answer = tokio::time::timeout(PATIENCE, call(channel)).await.context("silent")??;
            Ok(answer.into_inner())
        })
    }

    /// Writes a key.
    ///
    /// # Errors
    /// No answer.
    pub fn put(&self, target: &Target, key: &str, value: &[u8]) -> anyhow::Result<()> {
        let request = wire::PutRequest { key: key.into(), value: value.into(), lease: 0 };
        self.call(target, |c| async move { kv(c).put(request).await }).map(drop)
    }

    /// Removes a key.
    ///
    /// # Errors
    /// No answer.
    pub fn delete(&self, target: &Target, key: &str) -> anyhow::Result<()> {
        let request = wire::DeleteRangeRequest { key: key.into(), range_end: Vec::new() };
        self.call(target, |c| async move { kv(c).delete_range(request).await }).map(drop)
    }

    /// Reads a key, linearizably.
    ///
    /// # Errors
    /// No answer.
    pub fn get(&self, target: &Target, key: &str) -> anyhow::Result<Option<Pair>> {
        let request = wire::RangeRequest { key: key.into(), ..Default::default() };
        let answer = self.call(target, |c| async move { kv(c).range(request).await })?;
        Ok(answer.kvs.into_iter().next().map(pair))
    }

    /// Reads every key.
    ///
    /// # Errors
    /// No answer.
    pub fn all(&self, target: &Target) -> anyhow::Result<Vec<Pair>> {
        let request = wire::RangeRequest { key: vec![0], range_end: vec![0], ..Default::default() };
        let answer = self.call(target, |c| async move { kv(c).range(request).await })?;
        Ok(answer.kvs.into_iter().map(pair).collect())
    }

    /// Forgets all revisions but the newest.
    ///
    /// # Errors
    /// No answer.
    pub fn compact(&self, target: &Target) -> anyhow::Result<()> {
        let request = wire::RangeRequest { key: b"/".to_vec(), ..Default::default() };
        let answer = self.call(target, |c| async move { kv(c).range(request).await })?;
        let revision = answer.header.context("no header")?.revision;
        let request = wire::CompactionRequest { revision, physical: false };
        let done = self.call(target, |c| async move { kv(c).compact(request).await });
        // Nothing was written since the last time.
        done.map(drop).or_else(|e| if e.to_string().contains("compacted") { Ok(()) } else { Err(e) })
    }

    /// What a member says of itself.
    ///
    /// # Errors
    /// No answer.
    pub fn status(&self, target: &Target) -> anyhow::Result<Status> {
        let request = wire::StatusRequest {};
        let answer = self.call(target, |c| async move { MaintenanceClient::new(c).status(request).await })?;
        Ok(Status { member: answer.header.context("no header")?.member_id, leader: answer.leader })
    }

    pub(super) fn member_add(&self, target: &Target, peer: &str) -> anyhow::Result<()> {
        let request = wire::MemberAddRequest { peer_urls: vec![peer.to_owned()] };
        self.call(target, |c| async move { ClusterClient::new(c).member_add(request).await }).map(drop)
    }

    pub(super) fn member_remove(&self, target: &Target, id: u64) -> anyhow::Result<()> {
        let request = wire::MemberRemoveRequest { id };
        self.call(target, |c| async move { ClusterClient::new(c).member_remove(request).await }).map(drop)
    }
}

fn kv(channel: Channel) -> KvClient<Channel> {
    KvClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

fn pair(found: wire::KeyValue) -> Pair {
    let wire::KeyValue { key, value, version, lease, .. } = found;
    Pair { key: String::from_utf8_lossy(&key).into_owned(), value, version, lease }
}
