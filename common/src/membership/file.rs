//! Membership of the processes of one host, beside the registers of the file arbiter:
//!
//! ```text
//!   DIRECTORY/nodes/.lock             held by whoever reads or changes anything below
//!   DIRECTORY/nodes/NODE/SLOT.alive   locked by the process for as long as it lives
//!   DIRECTORY/nodes/NODE/SLOT.record  what it says of itself
//!   DIRECTORY/nodes/NODE/@claim       the claim on it
//! ```
//!
//! A lock dies with its process, so a record whose lock can be had is dead: it is removed by whoever finds it, and the
//! claim on it with it. Locks are taken in one order: `.lock`, then that of a register. As with the registers, all of
//! this is for processes of one host only.

mod files;

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::judge::{Sight, Verdict, judge};
use super::{
    Claim, ClaimAnswer, MAX_VMS, Membership, MembershipError, NodeRecord, Registration, SPARE, record,
};
use crate::arbiter::file::FileArbiter;
use crate::arbiter::{Arbiter, ArbiterError};
use crate::ids::{NodeId, VmId};
use crate::register::Entry;
use files::Files;

/// How long a call waits for the lock of everything. It is held for a few small writes; only a frozen process holds it
/// longer.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Keeps records in the directory of the registers.
#[derive(Clone, Debug)]
pub struct FileMembership {
    files: Arc<Files>,
    arbiter: Arc<FileArbiter>,
}

impl FileMembership {
    /// Keeps records in `directory`, which is that of the registers and must exist.
    ///
    /// # Errors
    /// As [`FileArbiter::open`].
    pub fn open(directory: &Path) -> Result<Self, ArbiterError> {
        let arbiter = Arc::new(FileArbiter::open(directory)?);
        Ok(Self { files: Arc::new(Files::of(directory)), arbiter })
    }
}

impl Membership for FileMembership {
    fn register(&self, record: NodeRecord) -> Result<Box<dyn Registration>, MembershipError> {
        let held = Held { alive: None, record };
        let registration = FileRegistration { files: Arc::clone(&self.files), held: Mutex::new(held) };
        registration.settle(None)?;
        Ok(Box::new(registration))
    }

    fn nodes(&self) -> Result<Vec<NodeRecord>, MembershipError> {
        let _lock = self.files.lock()?;
        self.files.all()
    }

    fn vms(&self) -> Result<Vec<(VmId, Entry)>, MembershipError> {
        let mut registers = Vec::new();
        for vm in self.arbiter.vms(MAX_VMS)? {
            match self.arbiter.read(&vm) {
                Ok(entry) => registers.extend(entry.map(|entry| (vm, entry))),
                Err(ArbiterError::Damaged { place, reason, .. }) => self.files.complain(&place, &reason),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(registers)
    }

    fn claim(&self, claim: &Claim) -> Result<ClaimAnswer, MembershipError> {
        let _lock = self.files.lock()?;
        let spare = self.files.living(&claim.node, SPARE)?;
        let bound = self.files.living(&claim.node, claim.vm.as_str())?;
        let existing = self.files.claim(&claim.node)?;
        self.arbiter.with_entry(&claim.vm, |register| {
            let sight =
                Sight { register, spare: spare.as_ref(), bound: bound.as_ref(), claim: existing.as_ref() };
            match judge(claim, &sight) {
                Verdict::Already => Ok(ClaimAnswer::Claimed),
                Verdict::Refused(why) => Ok(ClaimAnswer::Refused(why)),
                Verdict::WithSpare | Verdict::WithBound => {
                    self.files.write(&self.files.claim_path(&claim.node), &record::write_claim(claim))?;
                    Ok(ClaimAnswer::Claimed)
                }
            }
        })?
    }

    fn claim_of(&self, node: &NodeId) -> Result<Option<Claim>, MembershipError> {
        let _lock = self.files.lock()?;
        self.files.claim(node)
    }

    fn release(&self, claim: &Claim) -> Result<(), MembershipError> {
        let _lock = self.files.lock()?;
        if self.files.claim(&claim.node)?.as_ref() == Some(claim) {
            self.files.remove(&self.files.claim_path(&claim.node))?;
        }
        Ok(())
    }
}

/// A record whose lock this process holds.
#[derive(Debug)]
struct FileRegistration {
    files: Arc<Files>,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    /// The lock, while it is had.
    alive: Option<File>,
    record: NodeRecord,
}

impl FileRegistration {
    /// Sees to it that the record, or the one that is to replace it, is there as it should be, and nowhere else.
    fn settle(&self, new: Option<NodeRecord>) -> Result<(), MembershipError> {
        let files = &self.files;
        let _lock = files.lock()?;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let new = new.unwrap_or_else(|| held.record.clone());
        let moves = (&new.node, new.slot()) != (&held.record.node, held.record.slot());
        let alive = if moves || !held.has_lock(files) { Some(files.come_alive(&new)?) } else { None };
        files.write(&files.record_path(&new.node, new.slot()), &record::write(&new))?;
        if moves && held.has_lock(files) {
            files.forget(&held.record.node, held.record.slot())?;
        }
        if alive.is_some() {
            held.alive = alive;
        }
        held.record = new;
        Ok(())
    }
}

impl Held {
    /// Whether this process still has the lock; somebody may have removed its file.
    fn has_lock(&self, files: &Files) -> bool {
        let (node, slot) = (&self.record.node, self.record.slot());
        self.alive.as_ref().is_some_and(|alive| files.is_alive_by(alive, node, slot))
    }

    fn is_there(&self, files: &Files) -> bool {
        self.has_lock(files) && files.record_path(&self.record.node, self.record.slot()).exists()
    }
}

impl Registration for FileRegistration {
    fn update(&self, record: NodeRecord) -> Result<(), MembershipError> {
        self.settle(Some(record))
    }

    fn is_registered(&self) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).is_there(&self.files)
    }
}

impl Drop for FileRegistration {
    fn drop(&mut self) {
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Without this the next one who looks finds it dead.
        if held.has_lock(&self.files)
            && let Ok(_lock) = self.files.lock()
        {
            held.alive = None;
            let _ = self.files.living(&held.record.node, held.record.slot());
            let _ = self.files.claim(&held.record.node);
        }
    }
}
