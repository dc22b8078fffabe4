//! The log's file: two slots that are written in turn, so that a crash leaves the old claim or the new one.

use colo_common::durable;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::claim::{BadSlot, Claim, FORMAT, most_slot_bytes};

/// Why there is no intent log.
#[derive(Debug, thiserror::Error)]
pub enum IntentError {
    /// The system refuses.
    #[error("cannot {what} the disk's intent log {}: {source}; check the path, its permissions and the room there", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It holds no claim.
    #[error(
        "the disk's intent log {} is damaged: {what}; remove it, then the whole disk is compared by digests",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How.
        what: &'static str,
    },
    /// It was written by another version of Colo.
    #[error(
        "the disk's intent log {} has format {version} and this Colo knows {FORMAT}: use the version that wrote it, or remove it, then the whole disk is compared by digests",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// It is about something else.
    #[error(
        "the disk's intent log {} is of vm {found_vm} with a disk of {found_bytes} bytes, and this is vm {vm} with {bytes}: name the right file",
        path.display()
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// What it is of.
        found_vm: String,
        /// The disk's size in it.
        found_bytes: u64,
        /// What was expected.
        vm: String,
        /// The size of the disk.
        bytes: u64,
    },
}

/// What keeps the slots.
pub(super) trait Medium: Send + Sync {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
}

impl Medium for File {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// The slots of an open log.
pub(super) struct Slots {
    medium: Box<dyn Medium>,
    /// Of the next write. Each try has one of its own, also after one that failed.
    sequence: u64,
    /// Where the next write goes: not where the newest claim is that is known to be safe.
    next: u64,
}

impl Slots {
    pub(super) fn new(medium: Box<dyn Medium>, newest: u64, in_slot: u64) -> Self {
        Self { medium, sequence: newest + 1, next: 1 - in_slot }
    }

    /// Writes a claim and makes it safe. After an error nobody knows whether a crash would leave this claim or the one
    /// before; never anything else.
    pub(super) fn write(&mut self, claim: &Claim) -> io::Result<()> {
        let slot = claim.encode(self.sequence);
        self.sequence += 1;
        self.medium.write(self.next * slot.len() as u64, &slot)?;
        self.medium.sync()?;
        self.next = 1 - self.next;
        Ok(())
    }
}

/// Both slots of a new log.
pub(super) fn fresh(claim: &Claim) -> Vec<u8> {
    [claim.encode(0), claim.encode(1)].concat()
}

/// The newest claim in a file's bytes, with its sequence and slot.
pub(super) fn newest(bytes: &[u8]) -> Result<(Claim, u64, u64), BadSlot> {
    let (first, second) = bytes.split_at(bytes.len() / 2);
    match (Claim::decode(first), Claim::decode(second)) {
        (Ok((a, one)), Ok((b, two))) => {
            if one.vm != two.vm || one.extents.disk_bytes() != two.extents.disk_bytes() {
                return Err(BadSlot::Nonsense("its two slots are of different disks"));
            }
            Ok(if a > b { (one, a, 0) } else { (two, b, 1) })
        }
        // A whole slot that is not understood may be the newer one.
        (Err(bad), _) | (_, Err(bad)) if bad != BadSlot::Torn => Err(bad),
        (Ok((a, one)), Err(_)) => Ok((one, a, 0)),
        (Err(_), Ok((b, two))) => Ok((two, b, 1)),
        (Err(bad), Err(_)) => Err(bad),
    }
}

/// Reads a log; nothing if there is none.
pub(super) fn read(path: &Path) -> Result<Option<(Claim, u64, u64)>, IntentError> {
    let failed = |source| IntentError::File { what: "read", path: path.to_owned(), source };
    let Some(bytes) = durable::read(path, 2 * most_slot_bytes() as u64).map_err(failed)? else {
        return Ok(None);
    };
    let damaged = |what| IntentError::Damaged { path: path.to_owned(), what };
    match newest(&bytes) {
        Ok(found) => Ok(Some(found)),
        Err(BadSlot::Torn) => Err(damaged("neither of its slots is whole")),
        Err(BadSlot::Nonsense(what)) => Err(damaged(what)),
        Err(BadSlot::Version(version)) => Err(IntentError::Version { path: path.to_owned(), version }),
    }
}

/// Replaces whatever there is by a log with this claim.
pub(super) fn create(path: &Path, claim: &Claim) -> Result<Slots, IntentError> {
    let failed = |source| IntentError::File { what: "make", path: path.to_owned(), source };
    durable::replace(path, &fresh(claim)).map_err(failed)?;
    open(path, 1, 1)
}

/// Opens a log to go on with it.
pub(super) fn open(path: &Path, newest: u64, in_slot: u64) -> Result<Slots, IntentError> {
    let failed = |source| IntentError::File { what: "open", path: path.to_owned(), source };
    let file = OpenOptions::new().write(true).open(path).map_err(failed)?;
    Ok(Slots::new(Box::new(file), newest, in_slot))
}

/// Removes a log for good, if there is one.
pub(super) fn remove(path: &Path) -> Result<(), IntentError> {
    let removed = match std::fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| durable::sync_parent(path)),
    };
    removed.map_err(|source| IntentError::File { what: "remove", path: path.to_owned(), source })
}
