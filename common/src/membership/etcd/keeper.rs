//! The task that keeps one record in etcd: renews its lease, writes what has changed, and registers anew when an outage
//! was longer than the lease, or when etcd has lost its data. Whatever fails is tried again at the next beat.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Receiver;
use tokio::time::{sleep, sleep_until};

use super::super::{MembershipError, NodeRecord, record};
use super::Shown;
use crate::etcd::{Etcd, Found, Session, Sessions, Txn};

/// Renewals in the time of one lease: two of them may be lost.
const BEATS: u32 = 3;

/// Between two looks at the record of a process that may have died.
const LOOK: Duration = Duration::from_millis(200);

/// Tries within one call when its lease ends under it.
const TRIES: u32 = 3;

/// What the owner of a record wants.
#[derive(Debug)]
pub(super) enum Order {
    /// Say something else.
    Update(Box<NodeRecord>, SyncSender<Result<(), MembershipError>>),
    /// Leave.
    Leave(SyncSender<Result<(), MembershipError>>),
}

/// Keeps one record.
#[derive(Debug)]
pub(super) struct Keeper {
    sessions: Sessions,
    place: String,
    /// What the names of all records begin with.
    nodes: String,
    lasts: Duration,
    record: NodeRecord,
    shown: Arc<Shown>,
    /// The lease that is ours, if etcd has not said otherwise.
    lease: Option<i64>,
    /// When its time began at the latest, as this process counts.
    renewed: Instant,
    /// Where the record was written last.
    key: Option<String>,
}

impl Keeper {
    pub(super) fn new(etcd: &Etcd, record: NodeRecord, shown: Arc<Shown>) -> Self {
        Self {
            sessions: etcd.sessions(),
            place: etcd.place(),
            nodes: etcd.key("nodes/"),
            lasts: etcd.lease(),
            record,
            shown,
            lease: None,
            renewed: Instant::now(),
            key: None,
        }
    }

    /// Registers; waits for the end of another process of this name for as long as its lease can last.
    pub(super) async fn begin(&mut self, patience: Duration) -> Result<(), MembershipError> {
        let begun = Instant::now();
        loop {
            match self.settle().await {
                Err(MembershipError::Taken { name, address, .. }) if begun.elapsed() + LOOK >= patience => {
                    return Err(MembershipError::Taken { name, address, waited: patience });
                }
                Err(MembershipError::Taken { .. }) => sleep(LOOK).await,
                settled => return settled,
            }
        }
    }

    /// Keeps the record until it is told to leave, or its owner is gone.
    pub(super) async fn keep(mut self, mut orders: Receiver<Order>) {
        let beat = self.lasts / BEATS;
        let mut next = tokio::time::Instant::now() + beat;
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Update(record, reply)) => {
                        self.record = *record;
                        let _ = reply.try_send(self.settle().await);
                    }
                    Some(Order::Leave(reply)) => {
                        let _ = reply.try_send(self.leave().await);
                        return;
                    }
                    None => {
                        let _ = self.leave().await;
                        return;
                    }
                },
                () = sleep_until(next) => {
                    if let Err(e) = self.tend().await
                        && !self.shown.is_now()
                        && !self.shown.told.swap(true, Ordering::Relaxed)
                    {
                        tracing::warn!("this node is not registered: {e}");
                    }
                    next = tokio::time::Instant::now() + beat;
                }
            }
        }
    }

    /// One beat.
    async fn tend(&mut self) -> Result<(), MembershipError> {
        if let Some(lease) = self.lease {
            let begun = Instant::now();
            if self.sessions.start().renew(lease).await? {
                self.renewed = begun;
            } else {
                self.lose();
            }
        }
        self.settle().await
    }

    fn lose(&mut self) {
        self.lease = None;
        self.shown.set(None);
    }

    /// Sees to it that the record is there as it should be, and nowhere else.
    async fn settle(&mut self) -> Result<(), MembershipError> {
        let session = self.sessions.start();
        let key = format!("{}{}/{}", self.nodes, self.record.node, self.record.slot());
        for _ in 0..TRIES {
            if self.write(&session, &key).await? {
                self.shown.set(Some(self.renewed + self.lasts));
                return Ok(());
            }
        }
        Err(MembershipError::Unreachable {
            place: self.place.clone(),
            reason: format!("{key} changes faster than it can be written"),
        })
    }

    /// One try; says whether it is written. A record that is there must be this process' own.
    async fn write(&mut self, session: &Session, key: &str) -> Result<bool, MembershipError> {
        let old = self.key.clone().filter(|old| old != key);
        let keys: Vec<&str> = std::iter::once(key).chain(old.as_deref()).collect();
        let mut found = session.get_all(&keys).await?.into_iter();
        let (here, before) = (found.next().flatten(), found.next().flatten());
        self.check_own(key, here.as_ref())?;
        let lease = match self.lease {
            Some(lease) => lease,
            None => {
                let lease = draw_lease();
                self.renewed = Instant::now();
                session.grant(lease, self.lasts).await?;
                *self.lease.insert(lease)
            }
        };
        let text = record::write(&self.record);
        let is_right = here.as_ref().is_some_and(|here| here.value == text && here.lease == lease);
        let mut txn = Txn::default().unchanged(key, here.as_ref()).put(key, text, lease);
        if let (Some(old), Some(_)) = (&old, &before) {
            txn = txn.unchanged(old, before.as_ref()).delete(old);
        } else if is_right {
            self.key = Some(key.to_owned());
            return Ok(true);
        }
        match session.txn(txn).await {
            Ok(Ok(())) => {
                self.key = Some(key.to_owned());
                Ok(true)
            }
            Ok(Err(_)) => Ok(false),
            Err(e) if e.is_not_found() => {
                self.lose();
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn check_own(&self, key: &str, here: Option<&Found>) -> Result<(), MembershipError> {
        let Some(here) = here else { return Ok(()) };
        match record::read(&self.record.node, self.record.slot(), &here.value) {
            Ok(other) if other.incarnation == self.record.incarnation => Ok(()),
            Ok(other) => Err(MembershipError::Taken {
                name: format!("{}/{}", other.node, other.slot()),
                address: other.address.to_string(),
                waited: Duration::ZERO,
            }),
            Err(reason) => {
                Err(MembershipError::Damaged { place: format!("the key {key} {}", self.place), reason })
            }
        }
    }

    /// The record and the claim on it end with the lease.
    async fn leave(&mut self) -> Result<(), MembershipError> {
        self.shown.set(None);
        match self.lease.take() {
            Some(lease) => Ok(self.sessions.start().revoke(lease).await?),
            None => Ok(()),
        }
    }
}

/// A lease's name: any number above 0. It is drawn here so that a grant that was sent twice makes one lease.
fn draw_lease() -> i64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("the system gives random numbers");
    (i64::from_le_bytes(bytes) & i64::MAX).max(1)
}
