//! The questions that Colo asks: read a key or a range, a transaction, leases.

use std::time::Duration;
use tonic::Request;
use tonic::transport::Channel;

use super::ask::with_leader;
use super::wire::compare::{CompareResult, CompareTarget, TargetUnion};
use super::wire::kv_client::KvClient;
use super::wire::lease_client::LeaseClient;
use super::wire::request_op::Request as Op;
use super::wire::response_op::Response;
use super::{EtcdError, Session, wire};

/// Bytes of one answer at most: a page of the largest keys that Colo writes, several times over.
const MAX_ANSWER: usize = 4 << 20;

/// A key as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Vec<u8>,
    /// Raised by every change; names this value of the key.
    pub(crate) revision: i64,
    /// The lease that it ends with; 0: none.
    pub(crate) lease: i64,
}

impl From<wire::KeyValue> for Found {
    fn from(pair: wire::KeyValue) -> Self {
        let wire::KeyValue { key, value, mod_revision, lease, .. } = pair;
        Self { key, value, revision: mod_revision, lease }
    }
}

/// Conditions, what is done if all hold, and the keys that are read, in the same instant, if one does not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Txn(wire::TxnRequest);

impl Txn {
    /// Only if `key` is still exactly as it was found.
    pub(crate) fn unchanged(mut self, key: &str, found: Option<&Found>) -> Self {
        match found {
            None => self.compare(key, CompareTarget::Version, TargetUnion::Version(0)),
            Some(found) => {
                self.compare(key, CompareTarget::Mod, TargetUnion::ModRevision(found.revision));
                // A cluster that was wiped counts its revisions anew.
                self.compare(key, CompareTarget::Value, TargetUnion::Value(found.value.clone()));
            }
        }
        self
    }

    fn compare(&mut self, key: &str, target: CompareTarget, union: TargetUnion) {
        self.0.compare.push(wire::Compare {
            result: CompareResult::Equal.into(),
            target: target.into(),
            key: key.into(),
            target_union: Some(union),
        });
    }

    /// Then writes `key`, to end with `lease` unless that is 0.
    pub(crate) fn put(mut self, key: &str, value: Vec<u8>, lease: i64) -> Self {
        let put = wire::PutRequest { key: key.into(), value, lease };
        self.0.success.push(wire::RequestOp { request: Some(Op::RequestPut(put)) });
        self
    }

    /// Then removes `key`.
    pub(crate) fn delete(mut self, key: &str) -> Self {
        let delete = wire::DeleteRangeRequest { key: key.into(), range_end: Vec::new() };
        self.0.success.push(wire::RequestOp { request: Some(Op::RequestDeleteRange(delete)) });
        self
    }

    /// Else reads `key`.
    pub(crate) fn or_read(mut self, key: &str) -> Self {
        self.0.failure.push(read(key));
        self
    }
}

fn read(key: &str) -> wire::RequestOp {
    let range = wire::RangeRequest { key: key.into(), ..Default::default() };
    wire::RequestOp { request: Some(Op::RequestRange(range)) }
}

/// Where the keys that begin with `prefix` end: the prefix with its last byte raised. Prefixes end with '/'.
pub(crate) fn range_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

fn kv(channel: Channel) -> KvClient<Channel> {
    KvClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

/// A message that the member gives up on when its sender does.
fn bounded<T>(message: T, left: Duration) -> Request<T> {
    let mut request = with_leader(message);
    request.set_timeout(left);
    request
}

impl Session {
    /// The key now: a value that was current between call and return.
    pub(crate) async fn get(&self, key: &str) -> Result<Option<Found>, EtcdError> {
        let request = wire::RangeRequest { key: key.into(), ..Default::default() };
        let (mut found, _) = self.range(request).await?;
        Ok(found.pop())
    }

    /// Keys of a range, and whether there are more.
    pub(crate) async fn range(&self, request: wire::RangeRequest) -> Result<(Vec<Found>, bool), EtcdError> {
        let answer = self.ask(move |channel, left| {
            let request = bounded(request.clone(), left);
            async move { Ok(kv(channel).range(request).await?.into_inner()) }
        });
        let answer: wire::RangeResponse = answer.await?;
        Ok((answer.kvs.into_iter().map(Found::from).collect(), answer.more))
    }

    /// Several keys in the same instant.
    pub(crate) async fn get_all(&self, keys: &[&str]) -> Result<Vec<Option<Found>>, EtcdError> {
        let request =
            wire::TxnRequest { success: keys.iter().map(|key| read(key)).collect(), ..Default::default() };
        let (_, found) = self.submit(request, keys.len()).await?;
        Ok(found)
    }

    /// Whether the transaction was done; if not, the keys that it reads instead.
    pub(crate) async fn txn(&self, txn: Txn) -> Result<Result<(), Vec<Option<Found>>>, EtcdError> {
        let reads = txn.0.failure.len();
        let (done, found) = self.submit(txn.0, reads).await?;
        Ok(if done { Ok(()) } else { Err(found) })
    }

    async fn submit(
        &self,
        request: wire::TxnRequest,
        reads: usize,
    ) -> Result<(bool, Vec<Option<Found>>), EtcdError> {
        let answer = self.ask(move |channel, left| {
            let request = bounded(request.clone(), left);
            async move { Ok(kv(channel).txn(request).await?.into_inner()) }
        });
        let answer: wire::TxnResponse = answer.await?;
        let found: Vec<_> = answer
            .responses
            .into_iter()
            .filter_map(|one| match one.response {
                Some(Response::ResponseRange(range)) => Some(range.kvs.into_iter().next().map(Found::from)),
                _ => None,
            })
            .collect();
        // A transaction that only reads counts as done.
        if !answer.succeeded && found.len() != reads {
            return Err(EtcdError::Answer("a transaction without what it read"));
        }
        Ok((answer.succeeded, found))
    }

    /// Makes the lease `id`, which may be there already.
    pub(crate) async fn grant(&self, id: i64, lasts: Duration) -> Result<(), EtcdError> {
        let ttl = i64::try_from(lasts.as_secs()).unwrap_or(i64::MAX);
        let answer = self.ask(move |channel, left| {
            let request = bounded(wire::LeaseGrantRequest { ttl, id }, left);
            async move { Ok(LeaseClient::new(channel).lease_grant(request).await?.into_inner()) }
        });
        match answer.await {
            Err(e) if !e.is_there_already() => Err(e),
            _ => Ok(()),
        }
    }

    /// Begins the lease's time anew; says whether it is still there.
    pub(crate) async fn renew(&self, id: i64) -> Result<bool, EtcdError> {
        let answer = self.ask(move |channel, left| {
            let once = tokio_stream::once(wire::LeaseKeepAliveRequest { id });
            let request = bounded(once, left);
            async move {
                let mut answers = LeaseClient::new(channel).lease_keep_alive(request).await?.into_inner();
                let first = answers.message().await?;
                first.ok_or_else(|| tonic::Status::unavailable("it ended the renewal"))
            }
        });
        Ok(answer.await?.ttl > 0)
    }

    /// Ends the lease and everything that is to end with it.
    pub(crate) async fn revoke(&self, id: i64) -> Result<(), EtcdError> {
        let answer = self.ask(move |channel, left| {
            let request = bounded(wire::LeaseRevokeRequest { id }, left);
            async move { Ok(LeaseClient::new(channel).lease_revoke(request).await?.into_inner()) }
        });
        match answer.await {
            Err(e) if !e.is_not_found() => Err(e),
            _ => Ok(()),
        }
    }
}
