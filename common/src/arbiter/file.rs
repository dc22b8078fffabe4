//! The file arbiter: the registers of a cluster whose nodes all run on one host, each in a small text file.
//!
//! Beside `VM.register` lies `VM.lock`: a writer holds it exclusively over read, compare and replace, a reader shares
//! it; so reads and changes are linearizable between all processes of the host. A crash at any instant leaves the old
//! or the new entry. An entry is told to nobody before it would survive a loss of power, even if its writer died just
//! before it had made sure of that.
//!
//! It is **not** for directories that several hosts share: their locks, renames and syncs do not keep what is promised
//! here. Known network filesystems are refused. It does not outlive its host's disk either: a cluster needs etcd.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::{Arbiter, ArbiterError, text};
use crate::durable::{self, Lock};
use crate::ids::{ProposalId, VmId};
use crate::register::{Answer, Entry, Proposal};

/// How long a call waits for the lock. It is held for one small write; only a frozen process holds it longer.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of the list of mounts that are looked through at most.
const MAX_MOUNTS: u64 = 4 << 20;

/// Filesystems that several hosts can share.
const NETWORK_FILESYSTEMS: [&str; 13] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "ceph",
    "9p",
    "afs",
    "lustre",
    "gfs2",
    "ocfs2",
    "fuse.sshfs",
    "fuse.glusterfs",
];

/// Keeps registers in a directory.
#[derive(Debug)]
pub struct FileArbiter {
    directory: PathBuf,
    patience: Duration,
    /// Per vm the newest entry that is known to survive a loss of power.
    lasting: Mutex<BTreeMap<VmId, ProposalId>>,
}

impl FileArbiter {
    /// Keeps registers in `directory`, which must exist: one that is missing, as when its filesystem is not mounted,
    /// must never look like a register that nobody has created yet.
    ///
    /// # Errors
    /// The directory is missing, is none, or lies on a network filesystem.
    pub fn open(directory: &Path) -> Result<Self, ArbiterError> {
        let arbiter = Self {
            directory: directory.to_owned(),
            patience: LOCK_PATIENCE,
            lasting: Mutex::new(BTreeMap::new()),
        };
        let found = fs::metadata(directory).map_err(|e| arbiter.failed("look at", directory, &e))?;
        if !found.is_dir() {
            return Err(arbiter.unreachable("it is no directory; name one in [arbiter]".to_owned()));
        }
        if let Some(kind) = network_filesystem(found.dev()) {
            return Err(arbiter.unreachable(format!(
                "it lies on a filesystem of type {kind}, which several hosts can share; use a local directory for \
                 nodes on one host, or another kind of arbiter"
            )));
        }
        Ok(arbiter)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Does something while the register cannot change.
    pub(crate) fn with_entry<T>(
        &self,
        vm: &VmId,
        work: impl FnOnce(Option<&Entry>) -> T,
    ) -> Result<T, ArbiterError> {
        let _lock = self.lock(vm, Lock::Shared)?;
        Ok(work(self.load(vm)?.as_ref()))
    }

    /// Vms that have a register here, by name, `limit` at most.
    pub(crate) fn vms(&self, limit: usize) -> Result<Vec<VmId>, ArbiterError> {
        let failed = |e| self.failed("list", &self.directory, &e);
        let mut vms = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let vm = name.to_str().and_then(|name| name.strip_suffix(".register")?.parse().ok());
            vms.extend(vm);
        }
        vms.sort();
        vms.truncate(limit);
        Ok(vms)
    }

    fn file_of(&self, vm: &VmId) -> PathBuf {
        self.directory.join(format!("{vm}.register"))
    }

    fn lock(&self, vm: &VmId, how: Lock) -> Result<File, ArbiterError> {
        let path = self.directory.join(format!("{vm}.lock"));
        let locked = durable::lock(&path, how, self.patience).map_err(|e| self.failed("lock", &path, &e))?;
        locked.ok_or_else(|| {
            let (path, patience) = (path.display(), self.patience);
            self.unreachable(format!(
                "another process has held {path} for {patience:?}; find it with lsof or fuser, and end it if it is \
                 frozen"
            ))
        })
    }

    /// The entry in the file; the caller holds the lock.
    fn load(&self, vm: &VmId) -> Result<Option<Entry>, ArbiterError> {
        let path = self.file_of(vm);
        let damaged =
            |reason| ArbiterError::Damaged { vm: vm.clone(), place: path.display().to_string(), reason };
        let bytes = match durable::read(&path, text::MAX_FILE) {
            Err(e) if e.kind() == ErrorKind::FileTooLarge => return Err(damaged(e.to_string())),
            read => read.map_err(|e| self.failed("read", &path, &e))?,
        };
        let Some(bytes) = bytes else { return Ok(None) };
        let entry = text::read(vm, &bytes).map_err(damaged)?;
        self.make_last(vm, &entry)?;
        Ok(Some(entry))
    }

    /// The entry's writer may have died between the rename and the sync of the directory.
    fn make_last(&self, vm: &VmId, entry: &Entry) -> Result<(), ArbiterError> {
        let mut lasting = self.lasting.lock().unwrap_or_else(PoisonError::into_inner);
        if lasting.get(vm) != Some(&entry.proposal) {
            durable::sync_directory(&self.directory).map_err(|e| self.failed("sync", &self.directory, &e))?;
            lasting.insert(vm.clone(), entry.proposal);
        }
        Ok(())
    }

    fn store(&self, vm: &VmId, entry: &Entry) -> Result<(), ArbiterError> {
        let path = self.file_of(vm);
        durable::replace(&path, text::write(vm, entry).as_bytes())
            .map_err(|e| self.failed("write", &path, &e))?;
        let mut lasting = self.lasting.lock().unwrap_or_else(PoisonError::into_inner);
        lasting.insert(vm.clone(), entry.proposal);
        Ok(())
    }

    fn failed(&self, what: &str, path: &Path, error: &io::Error) -> ArbiterError {
        let path = path.display();
        let remedy = match error.kind() {
            ErrorKind::NotFound => {
                "create the directory, or mount its filesystem; all nodes of a vm must name the same one"
            }
            ErrorKind::PermissionDenied => {
                "all nodes of a vm must run as the user who owns it and may write to it"
            }
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space there",
            ErrorKind::ReadOnlyFilesystem => "it must be on a filesystem that can be written",
            _ => "check the filesystem that it lies on",
        };
        self.unreachable(format!("cannot {what} {path}: {error}; {remedy}"))
    }

    fn unreachable(&self, reason: String) -> ArbiterError {
        ArbiterError::Unreachable { place: format!("in directory {}", self.directory.display()), reason }
    }
}

impl Arbiter for FileArbiter {
    fn read(&self, vm: &VmId) -> Result<Option<Entry>, ArbiterError> {
        let _lock = self.lock(vm, Lock::Shared)?;
        self.load(vm)
    }

    fn propose(&self, vm: &VmId, proposal: &Proposal) -> Result<Answer, ArbiterError> {
        let _lock = self.lock(vm, Lock::Exclusive)?;
        let found = self.load(vm)?;
        let answer = proposal.judge(found.as_ref());
        match &answer {
            Answer::Applied(entry) if found.as_ref() != Some(entry) => self.store(vm, entry)?,
            _ => {}
        }
        Ok(answer)
    }
}

/// The type of the filesystem with this device number, if hosts can share it. Where the list of mounts does not tell,
/// the operator's word counts.
fn network_filesystem(device: u64) -> Option<String> {
    let mounts = durable::read(Path::new("/proc/self/mountinfo"), MAX_MOUNTS).ok()??;
    network_mount(&String::from_utf8_lossy(&mounts), device)
}

fn network_mount(mounts: &str, device: u64) -> Option<String> {
    // How Linux packs a device number into st_dev.
    let major = ((device >> 8) & 0xfff) | ((device >> 32) & !0xfff);
    let minor = (device & 0xff) | ((device >> 12) & !0xff);
    let number = format!("{major}:{minor}");
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some(&number))?;
    let (_, tail) = line.split_once(" - ")?;
    let kind = tail.split(' ').next()?;
    NETWORK_FILESYSTEMS.contains(&kind).then(|| kind.to_owned())
}

#[cfg(test)]
mod tests;
