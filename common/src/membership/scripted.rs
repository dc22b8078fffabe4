//! Scripted membership: in memory, for tests and simulation, with the faults that a real one has. Deterministic: the same
//! script, seed and order of calls give the same answers.
//!
//! Leases end when they are [told to](ScriptedMembership::expire), and never by themselves. A process that dies without a
//! word is one whose registration is dropped during an outage, or when the next fate is [`Fate::Lost`]: its record stays
//! until it expires. A simulation that carries requests itself uses [`apply_claim`](ScriptedMembership::apply_claim) and
//! its like at the instants at which they arrive.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::judge::{Sight, Verdict, judge};
use super::{Claim, ClaimAnswer, Membership, MembershipError, NodeRecord, Registration, SPARE};
use crate::arbiter::fates::Fates;
use crate::arbiter::scripted::{Fate, Faults, ScriptedArbiter};
use crate::ids::{Incarnation, NodeId, VmId};
use crate::register::Entry;

/// Membership whose faults are told to it.
#[derive(Clone, Debug)]
pub struct ScriptedMembership {
    inner: Arc<Mutex<Inner>>,
}

/// Node and slot.
type Key = (NodeId, String);

#[derive(Debug)]
struct Inner {
    arbiter: Arc<ScriptedArbiter>,
    records: BTreeMap<Key, NodeRecord>,
    claims: BTreeMap<NodeId, Claim>,
    fates: Fates,
    late: VecDeque<Change>,
}

/// What may be late.
#[derive(Clone, Debug)]
enum Change {
    /// Something else is said, and no more in the old slot.
    Put(Box<NodeRecord>, Option<Key>),
    Leave(Key, Incarnation),
    Claim(Claim),
    Release(Claim),
}

/// What a change came to.
type Done = Result<ClaimAnswer, MembershipError>;

fn key_of(record: &NodeRecord) -> Key {
    (record.node.clone(), record.slot().to_owned())
}

impl ScriptedMembership {
    /// One that answers everything, beside these registers.
    pub fn new(arbiter: Arc<ScriptedArbiter>) -> Self {
        Self::seeded(arbiter, 0, Faults::default())
    }

    /// One with faults drawn from `seed`.
    ///
    /// # Panics
    /// The faults are more than 1000 of 1000.
    pub fn seeded(arbiter: Arc<ScriptedArbiter>, seed: u64, faults: Faults) -> Self {
        let inner = Inner {
            arbiter,
            records: BTreeMap::new(),
            claims: BTreeMap::new(),
            fates: Fates::seeded(seed, faults),
            late: VecDeque::new(),
        };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    /// The next calls meet these fates, in this order; after them the seed decides again.
    pub fn script(&self, fates: impl IntoIterator<Item = Fate>) {
        self.lock().fates.script(fates);
    }

    /// From now on nothing is answered and nothing done, until it is told to end. The script waits meanwhile.
    pub fn set_outage(&self, outage: bool) {
        self.lock().fates.set_outage(outage);
    }

    /// The leases of all processes of a node run out: their records and the claim on them are gone. Says how many
    /// records there were. A process that lives is registered again by its next update.
    pub fn expire(&self, node: &NodeId) -> usize {
        let mut inner = self.lock();
        let before = inner.records.len();
        inner.records.retain(|(of, _), _| of != node);
        inner.end_claims();
        before - inner.records.len()
    }

    /// The lease of this process alone runs out.
    pub fn expire_process(&self, process: Incarnation) {
        let mut inner = self.lock();
        inner.records.retain(|_, record| record.incarnation != process);
        inner.end_claims();
    }

    /// Everything that is late arrives, in the order in which it was sent; the answers are lost. Says how many.
    pub fn deliver_late(&self) -> usize {
        self.lock().deliver_late()
    }

    /// A record arrives now, past script, seed and outage.
    ///
    /// # Errors
    /// Another process has the name.
    pub fn apply_record(&self, record: &NodeRecord) -> Result<(), MembershipError> {
        self.lock().apply(&Change::Put(Box::new(record.clone()), None)).map(drop)
    }

    /// A claim arrives now, past script, seed and outage.
    pub fn apply_claim(&self, claim: &Claim) -> ClaimAnswer {
        self.lock().claim(claim)
    }

    /// A release arrives now, past script, seed and outage.
    pub fn apply_release(&self, claim: &Claim) {
        self.lock().release(claim);
    }

    /// All records now, past script, seed and outage.
    pub fn peek_nodes(&self) -> Vec<NodeRecord> {
        self.lock().records.values().cloned().collect()
    }

    /// All claims now, past script, seed and outage.
    pub fn peek_claims(&self) -> Vec<Claim> {
        self.lock().claims.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change meets its fate.
    fn change(&self, change: Change) -> Done {
        let mut inner = self.lock();
        let fate = inner.fates.next();
        match fate {
            Fate::Answered => inner.apply(&change),
            Fate::Overtaken => {
                let done = inner.apply(&change);
                inner.deliver_late();
                done
            }
            Fate::Unanswered => {
                let _ = inner.apply(&change);
                Err(no_answer(fate))
            }
            Fate::Late => {
                inner.late.push_back(change);
                Err(no_answer(fate))
            }
            Fate::Lost => Err(no_answer(fate)),
        }
    }

    /// A look meets its fate.
    fn look<T>(&self, look: impl FnOnce(&Inner) -> T) -> Result<T, MembershipError> {
        let mut inner = self.lock();
        let seen = look(&inner);
        match inner.fates.next() {
            Fate::Answered => Ok(seen),
            Fate::Overtaken => {
                inner.deliver_late();
                Ok(seen)
            }
            fate => Err(no_answer(fate)),
        }
    }
}

fn no_answer(fate: Fate) -> MembershipError {
    MembershipError::Unreachable { place: "of the script".to_owned(), reason: format!("{fate:?}") }
}

impl Inner {
    fn apply(&mut self, change: &Change) -> Done {
        match change {
            Change::Put(record, old) => self.put(record, old.as_ref())?,
            Change::Leave(key, process) => {
                if self.records.get(key).is_some_and(|record| record.incarnation == *process) {
                    self.records.remove(key);
                }
                self.end_claims();
            }
            Change::Claim(claim) => return Ok(self.claim(claim)),
            Change::Release(claim) => self.release(claim),
        }
        Ok(ClaimAnswer::Claimed)
    }

    fn put(&mut self, record: &NodeRecord, old: Option<&Key>) -> Result<(), MembershipError> {
        let key = key_of(record);
        if let Some(other) = self.records.get(&key).filter(|other| other.incarnation != record.incarnation) {
            return Err(MembershipError::Taken {
                name: format!("{}/{}", key.0, key.1),
                address: other.address.to_string(),
                waited: Duration::ZERO,
            });
        }
        if let Some(old) = old
            && self.records.get(old).is_some_and(|other| other.incarnation == record.incarnation)
        {
            self.records.remove(old);
        }
        self.records.insert(key, record.clone());
        Ok(())
    }

    fn claim(&mut self, claim: &Claim) -> ClaimAnswer {
        let register = self.arbiter.peek(&claim.vm);
        let record = |slot: &str| self.records.get(&(claim.node.clone(), slot.to_owned()));
        let sight = Sight {
            register: register.as_ref(),
            spare: record(SPARE),
            bound: record(claim.vm.as_str()),
            claim: self.claims.get(&claim.node),
        };
        match judge(claim, &sight) {
            Verdict::Already => ClaimAnswer::Claimed,
            Verdict::Refused(why) => ClaimAnswer::Refused(why),
            Verdict::WithSpare | Verdict::WithBound => {
                self.claims.insert(claim.node.clone(), claim.clone());
                ClaimAnswer::Claimed
            }
        }
    }

    fn release(&mut self, claim: &Claim) {
        if self.claims.get(&claim.node) == Some(claim) {
            self.claims.remove(&claim.node);
        }
    }

    /// Claims on processes that are not registered are gone.
    fn end_claims(&mut self) {
        let Self { records, claims, .. } = self;
        claims.retain(|node, claim| {
            records.values().any(|r| r.node == *node && r.incarnation == claim.node_incarnation)
        });
    }

    fn deliver_late(&mut self) -> usize {
        let late = std::mem::take(&mut self.late);
        for change in &late {
            let _ = self.apply(change);
        }
        late.len()
    }
}

impl Membership for ScriptedMembership {
    fn register(&self, record: NodeRecord) -> Result<Box<dyn Registration>, MembershipError> {
        self.change(Change::Put(Box::new(record.clone()), None))?;
        Ok(Box::new(ScriptedRegistration { of: self.clone(), record: Mutex::new(record) }))
    }

    fn nodes(&self) -> Result<Vec<NodeRecord>, MembershipError> {
        self.look(|inner| inner.records.values().cloned().collect())
    }

    fn vms(&self) -> Result<Vec<(VmId, Entry)>, MembershipError> {
        self.look(|inner| inner.arbiter.peek_all())
    }

    fn claim(&self, claim: &Claim) -> Result<ClaimAnswer, MembershipError> {
        self.change(Change::Claim(claim.clone()))
    }

    fn claim_of(&self, node: &NodeId) -> Result<Option<Claim>, MembershipError> {
        self.look(|inner| inner.claims.get(node).cloned())
    }

    fn release(&self, claim: &Claim) -> Result<(), MembershipError> {
        self.change(Change::Release(claim.clone())).map(drop)
    }
}

/// A record in memory.
#[derive(Debug)]
struct ScriptedRegistration {
    of: ScriptedMembership,
    /// As it was said last.
    record: Mutex<NodeRecord>,
}

impl ScriptedRegistration {
    fn record(&self) -> MutexGuard<'_, NodeRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registration for ScriptedRegistration {
    fn update(&self, record: NodeRecord) -> Result<(), MembershipError> {
        let mut said = self.record();
        let old = key_of(&said);
        let old = (old != key_of(&record)).then_some(old);
        let changed = self.of.change(Change::Put(Box::new(record.clone()), old));
        // An answer that was lost leaves two slots possible: the old one stays known until the new one is certain.
        if changed.is_ok() {
            *said = record;
        }
        changed.map(drop)
    }

    fn is_registered(&self) -> bool {
        let said = self.record();
        let inner = self.of.lock();
        inner.records.get(&key_of(&said)).is_some_and(|record| record.incarnation == said.incarnation)
    }
}

impl Drop for ScriptedRegistration {
    fn drop(&mut self) {
        let (key, process) = {
            let said = self.record();
            (key_of(&said), said.incarnation)
        };
        let _ = self.of.change(Change::Leave(key, process));
    }
}
