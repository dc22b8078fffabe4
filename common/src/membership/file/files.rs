//! The files of the records, and which of them count.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::{Claim, Complaints, MAX_NODES, MembershipError, NodeRecord, record};
use super::LOCK_PATIENCE;
use crate::durable::{self, Lock};
use crate::ids::NodeId;

/// How the files end.
const RECORD: &str = "record";
const ALIVE: &str = "alive";
/// The claim on a node. No slot is called so.
const CLAIM: &str = "@claim";

/// The directory. All but [`lock`](Files::lock) is for whoever holds that.
#[derive(Debug)]
pub(super) struct Files {
    nodes: PathBuf,
    complaints: Complaints,
}

impl Files {
    pub(super) fn of(directory: &Path) -> Self {
        Self { nodes: directory.join("nodes"), complaints: Complaints::default() }
    }

    pub(super) fn complain(&self, place: &str, reason: &str) {
        self.complaints.tell(place, reason);
    }

    fn directory_of(&self, node: &NodeId) -> PathBuf {
        self.nodes.join(node.as_str())
    }

    fn slot_path(&self, node: &NodeId, slot: &str, end: &str) -> PathBuf {
        self.directory_of(node).join(format!("{slot}.{end}"))
    }

    pub(super) fn record_path(&self, node: &NodeId, slot: &str) -> PathBuf {
        self.slot_path(node, slot, RECORD)
    }

    pub(super) fn claim_path(&self, node: &NodeId) -> PathBuf {
        self.directory_of(node).join(CLAIM)
    }

    /// The lock of everything.
    pub(super) fn lock(&self) -> Result<File, MembershipError> {
        // The registers' directory must be there already: one that is missing is not mounted.
        if let Err(e) = fs::create_dir(&self.nodes)
            && e.kind() != ErrorKind::AlreadyExists
        {
            return Err(self.failed("create", &self.nodes, &e));
        }
        let path = self.nodes.join(".lock");
        let locked = durable::lock(&path, Lock::Exclusive, LOCK_PATIENCE);
        locked.map_err(|e| self.failed("lock", &path, &e))?.ok_or_else(|| {
            self.unreachable(format!(
                "another process has held {} for {LOCK_PATIENCE:?}; find it with lsof or fuser, and end it if it is \
                 frozen",
                path.display()
            ))
        })
    }

    /// Takes the lock of a slot, if no other process that lives has it.
    pub(super) fn come_alive(&self, record: &NodeRecord) -> Result<File, MembershipError> {
        let (node, slot) = (&record.node, record.slot());
        let directory = self.directory_of(node);
        durable::create_directory(&directory).map_err(|e| self.failed("create", &directory, &e))?;
        let path = self.slot_path(node, slot, ALIVE);
        let locked = durable::lock(&path, Lock::Exclusive, Duration::ZERO);
        let locked = locked.map_err(|e| self.failed("lock", &path, &e))?;
        locked.ok_or_else(|| {
            let other = self.load(node, slot).ok().flatten();
            MembershipError::Taken {
                name: format!("{node}/{slot}"),
                address: other.map_or_else(|| "an unknown address".to_owned(), |o| o.address.to_string()),
                waited: Duration::ZERO,
            }
        })
    }

    /// Whether this is the lock of the slot.
    pub(super) fn is_alive_by(&self, alive: &File, node: &NodeId, slot: &str) -> bool {
        durable::is_still(alive, &self.slot_path(node, slot, ALIVE)).unwrap_or(false)
    }

    /// The record in a slot, if its process lives. What is left of one that died is removed.
    pub(super) fn living(&self, node: &NodeId, slot: &str) -> Result<Option<NodeRecord>, MembershipError> {
        let path = self.slot_path(node, slot, ALIVE);
        let lives = path.exists() && {
            let locked = durable::lock(&path, Lock::Exclusive, Duration::ZERO);
            locked.map_err(|e| self.failed("lock", &path, &e))?.is_none()
        };
        if lives {
            return self.load(node, slot);
        }
        self.forget(node, slot)?;
        Ok(None)
    }

    /// The claim on a node, if the process that it is about lives. Another one is removed.
    pub(super) fn claim(&self, node: &NodeId) -> Result<Option<Claim>, MembershipError> {
        let path = self.claim_path(node);
        let Some(bytes) = self.read(&path)? else { return Ok(None) };
        let claim = record::read_claim(node, &bytes)
            .map_err(|reason| MembershipError::Damaged { place: path.display().to_string(), reason })?;
        if self.of_node(node)?.iter().any(|record| record.incarnation == claim.node_incarnation) {
            return Ok(Some(claim));
        }
        self.remove(&path)?;
        Ok(None)
    }

    /// Records of all processes that live, by name.
    pub(super) fn all(&self) -> Result<Vec<NodeRecord>, MembershipError> {
        let mut all = Vec::new();
        for name in self.names(&self.nodes)? {
            if let Ok(node) = name.parse() {
                all.extend(self.of_node(&node)?);
            }
        }
        all.truncate(MAX_NODES);
        Ok(all)
    }

    fn of_node(&self, node: &NodeId) -> Result<Vec<NodeRecord>, MembershipError> {
        let mut records = Vec::new();
        for name in self.names(&self.directory_of(node))? {
            if let Some(slot) = name.strip_suffix(".record") {
                records.extend(self.living(node, slot)?);
            }
        }
        Ok(records)
    }

    /// Sorted names in a directory, as many as may be records; none if it is not there.
    fn names(&self, directory: &Path) -> Result<Vec<String>, MembershipError> {
        let listed = match fs::read_dir(directory) {
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            listed => listed.map_err(|e| self.failed("list", directory, &e))?,
        };
        // Each record has a lock beside it, and each node a claim.
        let limit = 3 * MAX_NODES;
        let names = listed.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.take(limit).collect();
        names.sort();
        Ok(names)
    }

    /// What a slot's file says; what is no record is told once and counts as nothing.
    fn load(&self, node: &NodeId, slot: &str) -> Result<Option<NodeRecord>, MembershipError> {
        let path = self.record_path(node, slot);
        let Some(bytes) = self.read(&path)? else { return Ok(None) };
        let read = record::read(node, slot, &bytes);
        Ok(read.inspect_err(|reason| self.complain(&path.display().to_string(), reason)).ok())
    }

    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>, MembershipError> {
        match durable::read(path, record::MAX_TEXT) {
            Err(e) if e.kind() == ErrorKind::FileTooLarge => {
                Err(MembershipError::Damaged { place: path.display().to_string(), reason: e.to_string() })
            }
            read => read.map_err(|e| self.failed("read", path, &e)),
        }
    }

    pub(super) fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), MembershipError> {
        durable::replace(path, bytes).map_err(|e| self.failed("write", path, &e))
    }

    pub(super) fn remove(&self, path: &Path) -> Result<(), MembershipError> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(self.failed("remove", path, &e)),
            _ => Ok(()),
        }
    }

    /// Removes a slot's record and its lock.
    pub(super) fn forget(&self, node: &NodeId, slot: &str) -> Result<(), MembershipError> {
        self.remove(&self.record_path(node, slot))?;
        self.remove(&self.slot_path(node, slot, ALIVE))
    }

    fn failed(&self, what: &str, path: &Path, error: &io::Error) -> MembershipError {
        let remedy = match error.kind() {
            ErrorKind::NotFound => "is the filesystem of arbiter.directory mounted?",
            ErrorKind::PermissionDenied => "all nodes of the host must run as the user who owns it",
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space there",
            _ => "check the filesystem that it lies on",
        };
        self.unreachable(format!("cannot {what} {}: {error}; {remedy}", path.display()))
    }

    fn unreachable(&self, reason: String) -> MembershipError {
        MembershipError::Unreachable { place: format!("in directory {}", self.nodes.display()), reason }
    }
}
