//! Small files that survive a crash, and locks between processes: what the file arbiter, the vm's directory, the
//! development certificates and the disk's intent log have in common.
//!
//! A file is replaced by a temporary file beside it, fsync, rename, fsync of the directory; so a crash at any instant
//! leaves the old or the new content. A sealed text ends with a line that holds its checksum.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64;

/// How long a waiter sleeps between two tries of a lock: locks are held for one small write.
const LOCK_PAUSE: Duration = Duration::from_millis(1);

/// How the temporary file beside `x` is called: `x.new`.
const TEMPORARY: &str = "new";

/// Who may hold a lock at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// All who only read.
    Shared,
    /// One alone.
    Exclusive,
}

/// Replaces `path` by `bytes` for good; only its owner may read it. The caller holds a lock that keeps other writers
/// of the same file away. On an error it holds the old or the new content, and nobody knows which.
///
/// # Errors
/// The system refuses.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = beside(path, TEMPORARY);
    let mut file = match create_new(&temporary) {
        // Left over by a crash.
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            fs::remove_file(&temporary)?;
            create_new(&temporary)?
        }
        created => created?,
    };
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_parent(path)
}

fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// `path` with `.suffix` at its end.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// Makes the names in the directory of `path` last.
///
/// # Errors
/// The system refuses.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}

/// Makes the names in `directory` last.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Creates `directory`, and those above it, for their owner alone; one that exists stays as it is.
pub(crate) fn create_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    sync_parent(directory)
}

/// Reads a file of at most `limit` bytes, and nothing if there is none.
///
/// # Errors
/// It cannot be read, or has more.
pub fn read(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    // One byte past the limit tells "too large" without trusting the file's length.
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let reason = format!("it has more than {limit} bytes");
        return Err(io::Error::new(ErrorKind::FileTooLarge, reason));
    }
    Ok(Some(bytes))
}

/// Locks the file at `path`, which is created if need be, until the answer is dropped; nothing if others hold it for
/// all of `patience`. The lock dies with its process.
pub(crate) fn lock(path: &Path, how: Lock, patience: Duration) -> io::Result<Option<File>> {
    let give_up = Instant::now() + patience;
    loop {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let tried = match how {
            Lock::Shared => file.try_lock_shared(),
            Lock::Exclusive => file.try_lock(),
        };
        match tried {
            // Somebody may have removed the file meanwhile: then others lock another one of the same name.
            Ok(()) if is_still(&file, path)? => return Ok(Some(file)),
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if Instant::now() >= give_up => return Ok(None),
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_PAUSE),
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Interrupted => {}
            Err(TryLockError::Error(e)) => return Err(e),
        }
    }
}

/// Whether `path` still names this file.
pub(crate) fn is_still(file: &File, path: &Path) -> io::Result<bool> {
    let opened = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (opened.dev(), opened.ino())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// `body`, whose lines all end, with the line that holds its checksum.
pub(crate) fn seal(body: &str) -> String {
    format!("{body}{}", checksum_line(body))
}

/// The body of a sealed text.
pub(crate) fn unseal(bytes: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not text".to_owned())?;
    let unsealed = || "its last line is no checksum: it was cut off or edited".to_owned();
    let end = text.strip_suffix('\n').ok_or_else(unsealed)?;
    let start = end.rfind('\n').map_or(0, |newline| newline + 1);
    let (body, line) = text.split_at(start);
    if !line.starts_with("checksum = ") {
        return Err(unsealed());
    }
    // As text, so that no other spelling of the same number is taken.
    if line != checksum_line(body) {
        return Err("its checksum does not match: it was edited, or the disk has lost bits".to_owned());
    }
    Ok(body)
}

fn checksum_line(body: &str) -> String {
    format!("checksum = \"{:016x}\"\n", xxh3_64(body.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::{Lock, beside, lock, read, replace, seal, unseal};
    use proptest::prelude::{any, proptest};
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    #[test]
    fn a_file_is_replaced_whatever_a_crash_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        fs::write(beside(&path, "new"), "half of someth").unwrap();
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(read(&path, 3).unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!beside(&path, "new").exists());
        assert!(read(&path, 2).unwrap_err().to_string().contains("more than 2 bytes"));
        assert_eq!(read(&beside(&path, "other"), 2).unwrap(), None);
    }

    #[test]
    fn a_lock_keeps_others_out_even_if_its_file_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let short = Duration::from_millis(5);
        let first = lock(&path, Lock::Shared, short).unwrap().unwrap();
        let second = lock(&path, Lock::Shared, short).unwrap().unwrap();
        assert!(lock(&path, Lock::Exclusive, short).unwrap().is_none());
        drop((first, second));
        let held = lock(&path, Lock::Exclusive, short).unwrap().unwrap();
        assert!(lock(&path, Lock::Shared, short).unwrap().is_none());
        // Whoever had the removed file open would not notice; whoever locks by name gets the new one.
        fs::remove_file(&path).unwrap();
        assert!(lock(&path, Lock::Exclusive, short).unwrap().is_some());
        drop(held);
    }

    proptest! {
        #[test]
        fn any_bytes_are_unsealed_or_refused(bytes in any::<Vec<u8>>()) {
            let _ = unseal(&bytes);
        }

        #[test]
        fn a_flipped_bit_breaks_the_seal(lines in "[a-z\n]{0,60}", at in any::<usize>()) {
            let body = format!("{lines}\n");
            let sealed = seal(&body);
            assert_eq!(unseal(sealed.as_bytes()).unwrap(), body);
            let mut bytes = sealed.into_bytes();
            let bit = at % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(unseal(&bytes).is_err());
        }
    }
}
