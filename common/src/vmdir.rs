//! A vm's directory on a node: held by one process at a time, and laid out the same on every node.
//!
//! ```text
//! DIRECTORY/lock          held for the life of the process
//!           store/        the copy of the guest (RocksDB), on nodes that follow or followed
//!           boot/         kernel and initramfs as the runner sent them
//!           runner.toml   terms, on a node that runs the guest without a store; a start that is under way
//! ```

use serde::Deserialize;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use crate::durable::{self, Lock};
use crate::ids::{Incarnation, Term, VmId};

/// How long a start waits for the lock: a process that is being ended gives it up in that time.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Bytes of `runner.toml` at most: it has some 200.
const MAX_RUNNER: u64 = 4096;

/// Bytes of the lock file that are read for a message: a process id.
const MAX_LOCK: u64 = 32;

/// Version of `runner.toml`; another one is refused.
const FORMAT: u32 = 1;

/// Largest term that is taken: TOML's numbers end at 2^63, and terms count failovers.
const MAX_TERM: u64 = 1 << 62;

/// Why a vm's directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VmDirError {
    /// Another process has it.
    #[error(
        "the vm's directory {} is in use by another process{}: end that one, or give this one a directory of its own",
        path.display(), holder.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Who says to have it.
        holder: Option<u32>,
    },
    /// The system refuses.
    #[error("cannot {what} {}: {source}; {remedy}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// Which file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What helps.
        remedy: &'static str,
    },
    /// `runner.toml` is not what was written.
    #[error(
        "{} is damaged: {reason}; restore it from a backup, or, if the register does not name this node, remove the \
         vm's directory and let this node be seeded anew",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The directory is of another vm.
    #[error("the directory {} holds vm {found}, not {wanted}: give each vm a directory of its own", path.display())]
    OtherVm {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        found: VmId,
        /// Whose it should be.
        wanted: VmId,
    },
}

/// What a node must know after a crash, beside what a store says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Runner {
    /// The newest term that this node has seen of the vm. Whoever has seen one never creates the register.
    pub seen: Term,
    /// The term in which this node ran the guest, unless a copy has replaced what it has since.
    pub active: Option<Term>,
    /// The process that is about to ask for the register, to start the guest from its boot files. Written before it
    /// asks, gone before the first vCPU runs: while it is here, nothing ran under this incarnation.
    pub starting: Option<Incarnation>,
}

/// A vm's directory, which is this process' own until it is dropped.
#[derive(Debug)]
pub struct VmDirectory {
    path: PathBuf,
    vm: VmId,
    lock: File,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lines {
    format: u32,
    vm: VmId,
    seen: u64,
    active: Option<u64>,
    starting: Option<String>,
    place: Option<String>,
}

impl VmDirectory {
    /// Takes the directory for `vm`; creates it, for its owner alone, if it is not there.
    ///
    /// # Errors
    /// Another process has it, it is of another vm, or it cannot be created.
    pub fn open(path: &Path, vm: &VmId) -> Result<Self, VmDirError> {
        durable::create_directory(path).map_err(|e| failed("create", path, e))?;
        let lock_path = path.join("lock");
        let lock = durable::lock(&lock_path, Lock::Exclusive, LOCK_PATIENCE)
            .map_err(|e| failed("lock", &lock_path, e))?;
        let Some(mut lock) = lock else {
            return Err(VmDirError::InUse { path: path.to_owned(), holder: holder(&lock_path) });
        };
        // For the message of whoever comes next.
        let id = format!("{}\n", std::process::id());
        lock.set_len(0)
            .and_then(|()| lock.write_all(id.as_bytes()))
            .map_err(|e| failed("write", &lock_path, e))?;
        let directory = Self { path: path.to_owned(), vm: vm.clone(), lock };
        directory.runner()?;
        Ok(directory)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whose it is.
    pub fn vm(&self) -> &VmId {
        &self.vm
    }

    /// Where the store is.
    pub fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    /// Where the intent log of the guest's disk is, of a node that runs the guest or did.
    pub fn intent(&self) -> PathBuf {
        self.path.join("disk.intent")
    }

    /// Where boot files are kept as the runner sent them.
    pub fn boot(&self) -> PathBuf {
        self.path.join("boot")
    }

    /// Where the audit trail is.
    pub fn audit(&self) -> PathBuf {
        self.path.join("audit")
    }

    /// What tells this directory from a copy of it: the lock file's number and birth. Nothing where the filesystem does
    /// not say: then no start is noted, and one that is cut off between its grant and its first vCPU needs the operator.
    fn place(&self) -> Option<String> {
        let file = self.lock.metadata().ok()?;
        let born = file.created().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(format!("{}-{}", file.ino(), born.as_nanos()))
    }

    fn runner_path(&self) -> PathBuf {
        self.path.join("runner.toml")
    }

    /// What the node knew when it last said so; nothing if it never ran or saw the vm without a store.
    ///
    /// # Errors
    /// The file is damaged, of another vm, or cannot be read.
    pub fn runner(&self) -> Result<Option<Runner>, VmDirError> {
        let path = self.runner_path();
        let damaged = |reason| VmDirError::Damaged { path: path.clone(), reason };
        let bytes = match durable::read(&path, MAX_RUNNER) {
            Err(e) if e.kind() == ErrorKind::FileTooLarge => return Err(damaged(e.to_string())),
            read => read.map_err(|e| failed("read", &path, e))?,
        };
        let Some(bytes) = bytes else { return Ok(None) };
        let body = durable::unseal(&bytes).map_err(damaged)?;
        let lines: Lines = toml::from_str(body).map_err(|e| damaged(e.message().to_owned()))?;
        if lines.format != FORMAT {
            return Err(damaged(format!("its format is {} and this Colo reads {FORMAT}", lines.format)));
        }
        if lines.vm != self.vm {
            let (path, wanted) = (self.path.clone(), self.vm.clone());
            return Err(VmDirError::OtherVm { path, found: lines.vm, wanted });
        }
        if lines.seen > MAX_TERM || lines.active.is_some_and(|active| active > lines.seen) {
            return Err(damaged("its terms are out of range".to_owned()));
        }
        // A copy of the directory, or one restored, must not pass for the process that noted it.
        let noted = lines.starting.filter(|_| lines.place == self.place());
        let starting = noted.map(|text| incarnation(&text)).transpose().map_err(damaged)?;
        Ok(Some(Runner { seen: Term(lines.seen), active: lines.active.map(Term), starting }))
    }

    /// Keeps `runner` through any crash from here on.
    ///
    /// # Errors
    /// It cannot be written; what is kept then is the old or the new.
    ///
    /// # Panics
    /// The newest term goes back, or is not the newest: an own bug.
    pub fn set_runner(&self, runner: Runner) -> Result<(), VmDirError> {
        let before = self.runner()?.map_or(Term(0), |runner| runner.seen);
        assert!(before <= runner.seen && runner.seen.0 <= MAX_TERM, "{} after {before}", runner.seen);
        assert!(runner.active <= Some(runner.seen), "{runner:?}");
        let active = runner.active.map(|term| format!("active = {}\n", term.0)).unwrap_or_default();
        let starting = runner.starting.zip(self.place());
        let starting = starting
            .map(|(process, place)| format!("starting = \"{:032x}\"\nplace = \"{place}\"\n", process.0));
        let starting = starting.unwrap_or_default();
        let text = format!(
            "# What this node knows of the vm, kept by Colo. Do not edit it.\n\
             format = {FORMAT}\nvm = \"{}\"\nseen = {}\n{active}{starting}",
            self.vm, runner.seen.0
        );
        let path = self.runner_path();
        durable::replace(&path, durable::seal(&text).as_bytes()).map_err(|e| failed("write", &path, e))
    }
}

/// An incarnation as it is kept: 32 hexadecimal digits.
fn incarnation(text: &str) -> Result<Incarnation, String> {
    let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let parsed = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
    parsed.map(Incarnation).ok_or_else(|| "the process that was starting is no process".to_owned())
}

fn holder(lock: &Path) -> Option<u32> {
    let bytes = durable::read(lock, MAX_LOCK).ok()??;
    std::str::from_utf8(&bytes).ok()?.trim().parse().ok()
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> VmDirError {
    let remedy = match source.kind() {
        ErrorKind::PermissionDenied => "let the user that Colo runs as own it",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space there",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "name a directory, not a file",
        ErrorKind::ReadOnlyFilesystem => "it must be on a filesystem that can be written",
        _ => "check `directory` in the configuration",
    };
    VmDirError::File { what, path: path.to_owned(), source, remedy }
}

#[cfg(test)]
mod tests {
    use super::{Runner, VmDirError, VmDirectory};
    use crate::ids::{Incarnation, Term, VmId};
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::thread;
    use std::time::Duration;

    /// What tells a child of these tests which directory to write to.
    const CHILD_DIRECTORY: &str = "COLO_TEST_VM_DIRECTORY";

    fn vm() -> VmId {
        "web".parse().unwrap()
    }

    fn open(path: &Path) -> VmDirectory {
        VmDirectory::open(path, &vm()).unwrap()
    }

    #[test]
    fn it_is_made_for_its_owner_and_laid_out() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("vms/web");
        let directory = open(&path);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(directory.store(), path.join("store"));
        assert_eq!(directory.boot(), path.join("boot"));
        assert_eq!(directory.audit(), path.join("audit"));
        assert_eq!((directory.path(), directory.vm()), (path.as_path(), &vm()));
    }

    #[test]
    fn one_process_has_it() {
        let place = tempfile::tempdir().unwrap();
        let directory = open(place.path());
        let error = VmDirectory::open(place.path(), &vm()).unwrap_err().to_string();
        let (path, id) = (place.path().display().to_string(), std::process::id().to_string());
        assert!(error.contains(&path) && error.contains("in use by another process"), "{error}");
        assert!(error.contains(&id) && error.contains("end that one"), "{error}");
        drop(directory);
        open(place.path());
    }

    #[test]
    fn a_copy_of_the_directory_does_not_go_on_with_a_start() {
        let (place, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let directory = open(place.path());
        directory.set_runner(Runner { seen: Term(4), active: None, starting: Some(Incarnation(7)) }).unwrap();
        for file in ["lock", "runner.toml"] {
            fs::copy(place.path().join(file), other.path().join(file)).unwrap();
        }
        let copied = open(other.path()).runner().unwrap().unwrap();
        assert_eq!(copied, Runner { seen: Term(4), active: None, starting: None });
        drop(directory);
        assert_eq!(open(place.path()).runner().unwrap().unwrap().starting, Some(Incarnation(7)));
    }

    #[test]
    fn terms_are_kept_and_never_go_back() {
        let place = tempfile::tempdir().unwrap();
        let directory = open(place.path());
        assert_eq!(directory.runner().unwrap(), None);
        let first = Runner { seen: Term(3), active: Some(Term(2)), starting: Some(Incarnation(0xbeef)) };
        directory.set_runner(first).unwrap();
        drop(directory);
        let directory = open(place.path());
        assert_eq!(directory.runner().unwrap(), Some(first));
        let second = Runner { seen: Term(3), ..Runner::default() };
        directory.set_runner(second).unwrap();
        assert_eq!(directory.runner().unwrap(), Some(second));
        let back = Runner { seen: Term(2), ..Runner::default() };
        let set = std::panic::AssertUnwindSafe(|| directory.set_runner(back));
        assert!(std::panic::catch_unwind(set).is_err());
        assert_eq!(directory.runner().unwrap(), Some(second));
    }

    #[test]
    fn a_crash_in_the_middle_leaves_the_old_or_the_new() {
        let place = tempfile::tempdir().unwrap();
        let directory = open(place.path());
        let old = Runner { seen: Term(3), active: Some(Term(3)), starting: None };
        directory.set_runner(old).unwrap();
        fs::write(place.path().join("runner.toml.new"), "format = 1\nvm = \"we").unwrap();
        drop(directory);
        let directory = open(place.path());
        assert_eq!(directory.runner().unwrap(), Some(old));
        let new = Runner { seen: Term(4), ..Runner::default() };
        directory.set_runner(new).unwrap();
        assert_eq!(directory.runner().unwrap(), Some(new));
    }

    /// No test by itself: a process of the test below, writing for ever.
    #[test]
    fn child_that_writes() {
        let Some(path) = std::env::var_os(CHILD_DIRECTORY) else { return };
        let directory = open(Path::new(&path));
        loop {
            let seen = directory.runner().unwrap().map_or(Term(0), |runner| runner.seen).next();
            directory.set_runner(Runner { seen, active: Some(seen), starting: None }).unwrap();
        }
    }

    #[test]
    fn a_kill_at_any_instant_loses_no_term() {
        let place = tempfile::tempdir().unwrap();
        let mut newest = Term(0);
        for round in 0..100_u64 {
            let mut writer = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "vmdir::tests::child_that_writes", "--nocapture"])
                .env(CHILD_DIRECTORY, place.path())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            thread::sleep(Duration::from_micros(4000 + round * 97 % 3000));
            writer.kill().unwrap();
            writer.wait().unwrap();
            let found = open(place.path()).runner().unwrap().map_or(Term(0), |runner| runner.seen);
            assert!(found >= newest, "{found} after {newest}");
            newest = found;
        }
        assert!(newest > Term(0), "no child ever wrote");
    }

    #[test]
    fn damage_and_another_vm_are_told() {
        let place = tempfile::tempdir().unwrap();
        let directory = open(place.path());
        directory.set_runner(Runner { seen: Term(9), starting: Some(Incarnation(7)), active: None }).unwrap();
        let path = place.path().join("runner.toml");
        let good = fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, bytes).unwrap();
            assert!(matches!(directory.runner(), Err(VmDirError::Damaged { .. })));
        }
        fs::write(&path, [b'a'; 5000]).unwrap();
        drop(directory);
        let error = VmDirectory::open(place.path(), &vm()).unwrap_err().to_string();
        assert!(error.contains("runner.toml is damaged") && error.contains("restore it"), "{error}");
        fs::write(&path, good).unwrap();
        let other: VmId = "db".parse().unwrap();
        let error = VmDirectory::open(place.path(), &other).unwrap_err().to_string();
        assert!(error.contains("holds vm web, not db"), "{error}");
    }

    #[test]
    fn a_place_that_cannot_be_is_named() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("below")] {
            let error = VmDirectory::open(&path, &vm()).unwrap_err().to_string();
            assert!(error.contains("file") && error.contains("name a directory, not a file"), "{error}");
        }
    }
}
