//! The directory of a store: `lock` (held by one process), `vm` (what the store is, readable without RocksDB),
//! `current` (RocksDB) and, while a new copy grows, `previous` (the last whole one).
//!
//! `vm` is written after the store is made and before anything is in it. With it, a store whose RocksDB lost its
//! files is damaged; without it, it would look like one that was never used, and its node could begin a second
//! history.

use colo_common::VmId;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use super::error::StoreError;
use super::format::FORMAT_VERSION;

const LOCK: &str = "lock";
const MARKER: &str = "vm";
const MARKER_NEW: &str = "vm.new";
const CURRENT: &str = "current";
const PREVIOUS: &str = "previous";
/// The name under which RocksDB makes a checkpoint before it renames it.
const PREVIOUS_NEW: &str = "previous.tmp";
const MAGIC: &str = "colo-store";
/// The marker is one line: magic, version and a name of at most 64 bytes.
const MAX_MARKER: u64 = 256;

/// The directory, locked as long as this lives.
#[derive(Debug)]
pub(super) struct Home {
    dir: PathBuf,
    _lock: File,
}

impl Home {
    /// Makes the directory if there is none, and locks it.
    pub(super) fn lock(dir: &Path) -> Result<Self, StoreError> {
        let failed = |what| move |source| io_error(dir, what, source);
        fs::create_dir_all(dir).map_err(failed("make its directory"))?;
        let mut names = fs::read_dir(dir).map_err(failed("read its directory"))?;
        let ours = [LOCK, MARKER, MARKER_NEW, CURRENT, PREVIOUS, PREVIOUS_NEW];
        let stranger = |name: io::Result<fs::DirEntry>| {
            name.is_ok_and(|entry| !ours.iter().any(|our| entry.file_name() == *our))
        };
        if !dir.join(LOCK).exists() && names.any(stranger) {
            return Err(StoreError::NotAStore { dir: dir.to_owned() });
        }
        let lock = File::options().create(true).truncate(false).write(true).open(dir.join(LOCK));
        let lock = lock.map_err(failed("open its lock"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { dir: dir.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(StoreError::Locked { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => Err(io_error(dir, "take its lock", source)),
        }
    }

    /// The directory itself.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where RocksDB is.
    pub(super) fn current(&self) -> PathBuf {
        self.dir.join(CURRENT)
    }

    /// Where the last whole copy is kept.
    pub(super) fn previous(&self) -> PathBuf {
        self.dir.join(PREVIOUS)
    }

    /// Whether the store was made before; refuses one that is not `vm`'s or of another version.
    pub(super) fn check_marker(&self, vm: &VmId) -> Result<bool, StoreError> {
        let mut line = String::new();
        match File::open(self.dir.join(MARKER)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(io_error(&self.dir, "read its file vm", source)),
            Ok(file) => {
                if let Err(source) = file.take(MAX_MARKER).read_to_string(&mut line)
                    && source.kind() != ErrorKind::InvalidData
                {
                    return Err(io_error(&self.dir, "read its file vm", source));
                }
            }
        }
        let dir = self.dir.clone();
        let Some((found, of)) = parse_marker(&line) else {
            return Err(StoreError::Damaged { dir, what: "its file vm".to_owned() });
        };
        if found != FORMAT_VERSION {
            return Err(StoreError::OtherVersion { dir, found });
        }
        match of.parse::<VmId>() {
            Ok(found) if found == *vm => Ok(true),
            Ok(found) => Err(StoreError::OtherVm { dir, found, wanted: vm.clone() }),
            Err(_) => Err(StoreError::Damaged { dir, what: "its file vm".to_owned() }),
        }
    }

    /// Says that the store is made.
    pub(super) fn write_marker(&self, vm: &VmId) -> Result<(), StoreError> {
        let write = || {
            let mut file = File::create(self.dir.join(MARKER_NEW))?;
            writeln!(file, "{MAGIC} {FORMAT_VERSION} {vm}")?;
            file.sync_all()?;
            fs::rename(self.dir.join(MARKER_NEW), self.dir.join(MARKER))?;
            sync_dir(&self.dir)?;
            // The directory itself may be new.
            self.dir.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(Ok(()), sync_dir)
        };
        write().map_err(|source| io_error(&self.dir, "write its file vm", source))
    }

    /// Removes what was kept aside, and what an interrupted checkpoint left.
    pub(super) fn drop_aside(&self) -> Result<(), StoreError> {
        for name in [PREVIOUS, PREVIOUS_NEW] {
            match fs::remove_dir_all(self.dir.join(name)) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                removed => {
                    removed.map_err(|source| io_error(&self.dir, "remove its previous copy", source))?;
                }
            }
        }
        Ok(())
    }
}

/// An error of the system, with lack of space told apart.
pub(super) fn io_error(dir: &Path, what: &'static str, source: io::Error) -> StoreError {
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StoreError::NoSpace { dir: dir.to_owned() },
        _ => StoreError::Io { dir: dir.to_owned(), what, source },
    }
}

fn parse_marker(line: &str) -> Option<(u32, &str)> {
    let mut words = line.strip_suffix('\n')?.split(' ');
    let (magic, version, vm) = (words.next()?, words.next()?, words.next()?);
    if magic != MAGIC || words.next().is_some() {
        return None;
    }
    Some((version.parse().ok()?, vm))
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::{Home, parse_marker};
    use crate::store::StoreError;
    use std::fs;

    #[test]
    fn a_marker_is_one_exact_line() {
        assert_eq!(parse_marker("colo-store 1 web-1\n"), Some((1, "web-1")));
        for bad in [
            "",
            "colo-store 1 web-1",
            "colo-store 1 a b\n",
            "colo 1 a\n",
            "colo-store x a\n",
            "colo-store 1\n",
        ] {
            assert_eq!(parse_marker(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_directory_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letters.txt"), "dear").unwrap();
        assert!(matches!(Home::lock(dir.path()), Err(StoreError::NotAStore { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn two_at_once_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = Home::lock(dir.path()).unwrap();
        assert!(matches!(Home::lock(dir.path()), Err(StoreError::Locked { .. })));
        drop(first);
        Home::lock(dir.path()).unwrap();
    }
}
