//! The etcd arbiter: the registers of a cluster on several hosts, one key each, `PREFIXvms/VM/register`, with the text
//! that the file arbiter's files have.
//!
//! A change is a transaction on the exact revision that was judged, so whatever comes late, twice or out of order finds
//! that another revision is there. What a key holds that is no register is never overwritten.

use std::sync::Arc;

use super::{Arbiter, ArbiterError, text};
use crate::config::ArbiterConfig;
use crate::etcd::{Etcd, EtcdError, Found, Session, Txn};
use crate::ids::VmId;
use crate::register::{Answer, Entry, Proposal};

/// Keeps registers in etcd.
#[derive(Clone, Debug)]
pub struct EtcdArbiter {
    etcd: Arc<Etcd>,
}

/// What a call within etcd came to, before it is told.
type Judged = Result<Answer, String>;

impl EtcdArbiter {
    /// Keeps registers in the cluster that `config` names. Nothing is connected before the first call.
    ///
    /// # Errors
    /// A certificate cannot be used.
    pub fn open(config: &ArbiterConfig) -> Result<Self, EtcdError> {
        Ok(Self::of(Arc::new(Etcd::open(config)?)))
    }

    /// Keeps registers by a client that is there.
    pub fn of(etcd: Arc<Etcd>) -> Self {
        Self { etcd }
    }

    fn silent(&self, error: &EtcdError) -> ArbiterError {
        ArbiterError::Unreachable { place: self.etcd.place(), reason: error.to_string() }
    }

    fn damaged(&self, vm: &VmId, reason: String) -> ArbiterError {
        let place = format!("the key {} {}", key_of(&self.etcd, vm), self.etcd.place());
        ArbiterError::Damaged { vm: vm.clone(), place, reason }
    }
}

/// Where a vm's register is.
pub(crate) fn key_of(etcd: &Etcd, vm: &VmId) -> String {
    etcd.key(&format!("vms/{vm}/register"))
}

/// The entry that a key holds, or what is wrong with it.
pub(crate) fn entry_in(vm: &VmId, found: &Found) -> Result<Entry, String> {
    if found.value.len() as u64 > text::MAX_FILE {
        return Err(format!("it has more than {} bytes", text::MAX_FILE));
    }
    text::read(vm, &found.value)
}

impl Arbiter for EtcdArbiter {
    fn read(&self, vm: &VmId) -> Result<Option<Entry>, ArbiterError> {
        let key = key_of(&self.etcd, vm);
        let found = self.etcd.call(|session| async move { session.get(&key).await });
        let found: Option<Found> = found.map_err(|e: EtcdError| self.silent(&e))?;
        found.map(|found| entry_in(vm, &found).map_err(|reason| self.damaged(vm, reason))).transpose()
    }

    fn propose(&self, vm: &VmId, proposal: &Proposal) -> Result<Answer, ArbiterError> {
        let (key, of, wanted) = (key_of(&self.etcd, vm), vm.clone(), proposal.clone());
        let judged = self.etcd.call(|session| async move { propose(&session, &key, &of, &wanted).await });
        judged.map_err(|e: EtcdError| self.silent(&e))?.map_err(|reason| self.damaged(vm, reason))
    }
}

/// Judges and changes until one revision was the same in both; the session's bound ends it.
async fn propose(session: &Session, key: &str, vm: &VmId, proposal: &Proposal) -> Result<Judged, EtcdError> {
    let mut found = session.get(key).await?;
    loop {
        let entry = match found.as_ref().map(|found| entry_in(vm, found)).transpose() {
            Ok(entry) => entry,
            Err(reason) => return Ok(Err(reason)),
        };
        let answer = proposal.judge(entry.as_ref());
        let Answer::Applied(new) = &answer else { return Ok(Ok(answer)) };
        if entry.as_ref() == Some(new) {
            return Ok(Ok(answer));
        }
        let change = Txn::default().unchanged(key, found.as_ref());
        let change = change.put(key, text::write(vm, new).into_bytes(), 0).or_read(key);
        match session.txn(change).await? {
            Ok(()) => return Ok(Ok(answer)),
            // Somebody was faster, or this very change, sent twice, was.
            Err(mut now) => found = now.pop().flatten(),
        }
    }
}
