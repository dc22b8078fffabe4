//! Membership in etcd: records under leases, claims beside them.
//!
//! Each record hangs on a lease of its own, which a [task](keeper) renews; a claim hangs on the lease of the record that
//! it is about. So both end when the process does, `lease_s` later at the latest.

mod keeper;
mod list;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc as std_mpsc};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

use super::judge::{Sight, Verdict, judge};
use super::{
    Claim, ClaimAnswer, Complaints, Membership, MembershipError, NodeRecord, Registration, SPARE, record,
};
use crate::arbiter::ArbiterError;
use crate::arbiter::etcd::{entry_in, key_of};
use crate::config::ArbiterConfig;
use crate::etcd::{Etcd, EtcdError, Found, Session, Txn};
use crate::ids::{NodeId, VmId};
use crate::register::Entry;
use keeper::{Keeper, Order};

/// Orders that may wait for a keeper: its owner gives one at a time, and a last one.
const MAX_ORDERS: usize = 4;

/// How long the end of a dead process' lease is waited for beyond a lease: etcd looks for those that are over every half
/// second, and a new leader prolongs all.
const LEASE_SLACK: Duration = Duration::from_secs(3);

/// Before a claim that was overtaken is judged again.
const AGAIN: Duration = Duration::from_millis(20);

/// Keeps records in etcd.
#[derive(Clone, Debug)]
pub struct EtcdMembership {
    etcd: Arc<Etcd>,
    complaints: Arc<Complaints>,
}

impl EtcdMembership {
    /// Keeps records in the cluster that `config` names. Nothing is connected before the first call.
    ///
    /// # Errors
    /// A certificate cannot be used.
    pub fn open(config: &ArbiterConfig) -> Result<Self, EtcdError> {
        Ok(Self::of(Arc::new(Etcd::open(config)?)))
    }

    /// Keeps records by a client that is there.
    pub fn of(etcd: Arc<Etcd>) -> Self {
        Self { etcd, complaints: Arc::default() }
    }

    fn place(&self, key: &str) -> String {
        format!("the key {key} {}", self.etcd.place())
    }

    /// What a key that should be a record holds; what holds none is told once and counts as nothing.
    fn record_in(&self, node: &NodeId, slot: &str, found: Option<&Found>) -> Option<NodeRecord> {
        let found = found?;
        let read = record::read(node, slot, &found.value);
        read.inspect_err(|reason| {
            self.complaints.tell(&self.place(&String::from_utf8_lossy(&found.key)), reason);
        })
        .ok()
    }

    fn claim_in(&self, node: &NodeId, found: Option<&Found>) -> Result<Option<Claim>, MembershipError> {
        let Some(found) = found else { return Ok(None) };
        let damaged =
            |reason| MembershipError::Damaged { place: self.place(&claim_key(&self.etcd, node)), reason };
        record::read_claim(node, &found.value).map(Some).map_err(damaged)
    }

    /// One look and one try. Nothing if something has changed in between.
    async fn try_claim(
        self,
        session: Session,
        claim: &Claim,
        keys: &ClaimKeys,
    ) -> Result<Option<ClaimAnswer>, MembershipError> {
        let ClaimKeys { register, spare, bound, claim: own } = keys;
        let mut found = session.get_all(&[register, spare, bound, own]).await?.into_iter();
        let mut next = || found.next().flatten();
        let (in_register, in_spare, in_bound, in_claim) = (next(), next(), next(), next());
        let entry = in_register.as_ref().map(|found| entry_in(&claim.vm, found)).transpose();
        let entry = entry.map_err(|reason| {
            MembershipError::Register(ArbiterError::Damaged {
                vm: claim.vm.clone(),
                place: self.place(register),
                reason,
            })
        })?;
        let at_spare = self.record_in(&claim.node, SPARE, in_spare.as_ref());
        let at_bound = self.record_in(&claim.node, claim.vm.as_str(), in_bound.as_ref());
        let existing = self.claim_in(&claim.node, in_claim.as_ref())?;
        let sight = Sight {
            register: entry.as_ref(),
            spare: at_spare.as_ref(),
            bound: at_bound.as_ref(),
            claim: existing.as_ref(),
        };
        let (key, at) = match judge(claim, &sight) {
            Verdict::Already => return Ok(Some(ClaimAnswer::Claimed)),
            Verdict::Refused(why) => return Ok(Some(ClaimAnswer::Refused(why))),
            Verdict::WithSpare => (spare, in_spare),
            Verdict::WithBound => (bound, in_bound),
        };
        let txn = Txn::default().unchanged(register, in_register.as_ref()).unchanged(key, at.as_ref());
        let lease = at.map_or(0, |record| record.lease);
        let txn = txn.unchanged(own, in_claim.as_ref()).put(own, record::write_claim(claim), lease);
        match session.txn(txn).await {
            Ok(Ok(())) => Ok(Some(ClaimAnswer::Claimed)),
            Ok(Err(_)) => Ok(None),
            // The record's lease ends at this very moment.
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Where everything is that a claim looks at.
#[derive(Clone, Debug)]
struct ClaimKeys {
    register: String,
    spare: String,
    bound: String,
    claim: String,
}

fn record_key(etcd: &Etcd, node: &NodeId, slot: &str) -> String {
    etcd.key(&format!("nodes/{node}/{slot}"))
}

fn claim_key(etcd: &Etcd, node: &NodeId) -> String {
    etcd.key(&format!("claims/{node}"))
}

impl Membership for EtcdMembership {
    fn register(&self, record: NodeRecord) -> Result<Box<dyn Registration>, MembershipError> {
        let patience = self.etcd.lease() + LEASE_SLACK;
        let shown = Arc::new(Shown::default());
        let mut keeper = Keeper::new(&self.etcd, record, Arc::clone(&shown));
        let bound = patience + self.etcd.timeout();
        let keeper = self.etcd.call_within(bound, |_| async move {
            keeper.begin(patience).await?;
            Ok::<_, MembershipError>(keeper)
        })?;
        let (orders, to_do) = mpsc::channel(MAX_ORDERS);
        self.etcd.spawn(keeper.keep(to_do));
        Ok(Box::new(EtcdRegistration { etcd: Arc::clone(&self.etcd), shown, orders }))
    }

    fn nodes(&self) -> Result<Vec<NodeRecord>, MembershipError> {
        self.list_nodes()
    }

    fn vms(&self) -> Result<Vec<(VmId, Entry)>, MembershipError> {
        self.list_vms()
    }

    fn claim(&self, claim: &Claim) -> Result<ClaimAnswer, MembershipError> {
        let keys = ClaimKeys {
            register: key_of(&self.etcd, &claim.vm),
            spare: record_key(&self.etcd, &claim.node, SPARE),
            bound: record_key(&self.etcd, &claim.node, claim.vm.as_str()),
            claim: claim_key(&self.etcd, &claim.node),
        };
        let (this, claim) = (self.clone(), claim.clone());
        self.etcd.call(|session| async move {
            loop {
                if let Some(answer) = this.clone().try_claim(session.clone(), &claim, &keys).await? {
                    return Ok(answer);
                }
                tokio::time::sleep(AGAIN).await;
            }
        })
    }

    fn claim_of(&self, node: &NodeId) -> Result<Option<Claim>, MembershipError> {
        let key = claim_key(&self.etcd, node);
        let found = self.etcd.call(|session| async move { session.get(&key).await })?;
        self.claim_in(node, found.as_ref())
    }

    fn release(&self, claim: &Claim) -> Result<(), MembershipError> {
        let key = claim_key(&self.etcd, &claim.node);
        let (this, claim) = (self.clone(), claim.clone());
        self.etcd.call(|session| async move {
            loop {
                let found = session.get(&key).await?;
                if this.claim_in(&claim.node, found.as_ref())?.as_ref() != Some(&claim) {
                    return Ok(());
                }
                let gone = Txn::default().unchanged(&key, found.as_ref()).delete(&key);
                if session.txn(gone).await?.is_ok() {
                    return Ok(());
                }
            }
        })
    }
}

/// What a keeper shows of itself.
#[derive(Debug, Default)]
struct Shown {
    /// The record is there until then at least, unless etcd has lost it.
    until: Mutex<Option<Instant>>,
    /// Told once, until it is registered again.
    told: AtomicBool,
}

impl Shown {
    fn set(&self, until: Option<Instant>) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = until;
        if until.is_some() && self.told.swap(false, Ordering::Relaxed) {
            tracing::info!("this node is registered again");
        }
    }

    fn is_now(&self) -> bool {
        self.until.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| Instant::now() < until)
    }
}

/// A record that is kept.
#[derive(Debug)]
struct EtcdRegistration {
    etcd: Arc<Etcd>,
    shown: Arc<Shown>,
    orders: mpsc::Sender<Order>,
}

impl EtcdRegistration {
    /// Gives an order and waits until it is done. The keeper may be in the middle of a renewal, which is two calls.
    fn order(
        &self,
        make: impl FnOnce(std_mpsc::SyncSender<Result<(), MembershipError>>) -> Order,
    ) -> Result<(), MembershipError> {
        let silent = |reason: &str| MembershipError::Unreachable {
            place: self.etcd.place(),
            reason: format!("{reason}; it is done as soon as etcd answers"),
        };
        let (reply, done) = std_mpsc::sync_channel(1);
        self.orders.try_send(make(reply)).map_err(|_| silent("other changes of this record wait"))?;
        done.recv_timeout(self.etcd.timeout() * 3)
            .unwrap_or_else(|_| Err(silent("the change of this record waits")))
    }
}

impl Registration for EtcdRegistration {
    fn update(&self, record: NodeRecord) -> Result<(), MembershipError> {
        self.order(|reply| Order::Update(Box::new(record), reply))
    }

    fn is_registered(&self) -> bool {
        self.shown.is_now()
    }
}

impl Drop for EtcdRegistration {
    fn drop(&mut self) {
        // Without an answer the lease ends by itself.
        let _ = self.order(Order::Leave);
    }
}
