//! Loaded with LD_PRELOAD into a process, writes down everything that it does to the files below one directory: data,
//! names, and what it syncs. From that a test rebuilds what a power cut at any instant may leave.
//!
//! `COLO_POWERCUT_ROOT` names the directory, `COLO_POWERCUT_LOG` the file to write to. Without them it changes nothing.
//! A record is [`HEADER`] bytes (kind u8, descriptor i32, offset u64, lengths of two byte strings u32 each, little
//! endian) and the two strings. A lock makes the call and its record one step, so that the order of the records is
//! the order of what happened.
//!
//! Every function here stands for the one of the same name in libc and does the same by a direct system call. It
//! keeps libc's contract: pointers and lengths are the caller's responsibility.
#![expect(
    clippy::missing_safety_doc,
    reason = "the contracts are those of libc's functions of the same names"
)]

mod calls;

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

pub use calls::*;

/// Bytes before a record's strings.
pub const HEADER: usize = 21;

/// Descriptors that are followed; the process under test has far fewer files open.
const MAX_FDS: usize = 4096;

/// What a record tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// (descriptor, flags; path)
    Open = 1,
    /// (descriptor)
    Close,
    /// (descriptor, offset; data)
    Write,
    /// (descriptor, length)
    Truncate,
    /// (descriptor): fsync or fdatasync
    Sync,
    /// (from, to)
    Rename,
    /// (path)
    Unlink,
    /// (from, to)
    Link,
    /// (path)
    Mkdir,
    /// (path)
    Rmdir,
    /// (descriptor, offset; length as 8 bytes): a hole is made
    Punch,
}

struct Recorder {
    root: Vec<u8>,
    log: i32,
    lock: Mutex<()>,
    followed: [AtomicBool; MAX_FDS],
}

static RECORDER: OnceLock<Option<Recorder>> = OnceLock::new();

fn recorder() -> Option<&'static Recorder> {
    RECORDER.get_or_init(Recorder::from_environment).as_ref()
}

impl Recorder {
    fn from_environment() -> Option<Self> {
        let (root, log) = (variable(c"COLO_POWERCUT_ROOT")?, variable(c"COLO_POWERCUT_LOG")?);
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
        // SAFETY: `log` is a NUL-terminated string that lives as long as the environment.
        let log = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, log.as_ptr(), flags, 0o600) };
        assert!(log >= 0, "the log of the power cut test cannot be opened");
        Some(Self {
            root: root.to_bytes().to_vec(),
            log: log as i32,
            lock: Mutex::new(()),
            followed: [const { AtomicBool::new(false) }; MAX_FDS],
        })
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_below(&self, path: &[u8]) -> bool {
        path.starts_with(&self.root)
    }

    fn follows(&self, fd: i32) -> bool {
        usize::try_from(fd)
            .ok()
            .and_then(|fd| self.followed.get(fd))
            .is_some_and(|on| on.load(Ordering::Relaxed))
    }

    fn follow(&self, fd: i32, on: bool) {
        let slot = usize::try_from(fd).ok().and_then(|fd| self.followed.get(fd));
        slot.expect("more files are open than this test follows").store(on, Ordering::Relaxed);
    }

    fn record(&self, kind: Kind, fd: i32, offset: u64, first: &[u8], second: &[u8]) {
        let mut bytes = Vec::with_capacity(HEADER + first.len() + second.len());
        bytes.push(kind as u8);
        bytes.extend_from_slice(&fd.to_le_bytes());
        bytes.extend_from_slice(&offset.to_le_bytes());
        for part in [first, second] {
            bytes
                .extend_from_slice(&u32::try_from(part.len()).expect("writes are below 4 GiB").to_le_bytes());
        }
        bytes.extend_from_slice(first);
        bytes.extend_from_slice(second);
        // SAFETY: the pointer and the length are of one live vector.
        let written = unsafe { libc::syscall(libc::SYS_write, self.log, bytes.as_ptr(), bytes.len()) };
        assert_eq!(written, bytes.len() as i64, "the log of the power cut test cannot be written");
    }
}

fn variable(name: &CStr) -> Option<&'static CStr> {
    // SAFETY: `name` is NUL-terminated; the process under test does not change its environment.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: a value of the environment is NUL-terminated and stays where it is.
    Some(unsafe { CStr::from_ptr(value) })
}

/// The full path of `path` as seen from the directory `dir`.
fn resolve(dir: i32, path: &CStr) -> Vec<u8> {
    let bytes = path.to_bytes();
    if bytes.first() == Some(&b'/') {
        return bytes.to_vec();
    }
    let base = match dir {
        libc::AT_FDCWD => std::env::current_dir(),
        fd => std::fs::read_link(format!("/proc/self/fd/{fd}")),
    };
    base.map_or_else(
        |_| bytes.to_vec(),
        |base| base.join(OsStr::from_bytes(bytes)).into_os_string().into_encoded_bytes(),
    )
}
