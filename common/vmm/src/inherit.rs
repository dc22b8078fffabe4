//! Files without a name that outlive this process image: what one leaves to the one that takes its place by `exec`.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::path::Path;

/// What the names of all of them begin with, as `/proc` shows them.
const PREFIX: &str = "/memfd:colo-";

/// An empty file without a name in any directory; `name` is for `/proc` and begins with `colo-`.
///
/// # Errors
/// The system has none to give.
pub fn nameless(name: &CStr) -> io::Result<File> {
    // SAFETY: `name` is a NUL-terminated string that outlives the call; the call has no other precondition.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just returned to us and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Has the file stay open over `exec`; answers its number there.
///
/// # Errors
/// The system refuses.
pub fn leave(file: &File) -> io::Result<RawFd> {
    set_flags(file.as_raw_fd(), 0)?;
    Ok(file.as_raw_fd())
}

/// Takes a file that was [left](leave). Once: its number is nobody else's.
///
/// # Errors
/// There is none with this number.
pub fn take(fd: RawFd) -> io::Result<File> {
    let link = std::fs::read_link(Path::new("/proc/self/fd").join(fd.to_string()))?;
    if !link.to_string_lossy().starts_with(PREFIX) {
        let text = format!("descriptor {fd} is {}, which no process of Colo left", link.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    set_flags(fd, libc::FD_CLOEXEC)?;
    // SAFETY: it is open, as the link shows, and what it names is of our own making and was left to this process image
    // alone: nobody else here owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn set_flags(fd: RawFd, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the request takes a number and touches no memory.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::{leave, nameless, take};
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsRawFd;

    #[test]
    fn what_was_left_is_taken_and_nothing_else_is() {
        let mut left = nameless(c"colo-test").unwrap();
        left.write_all(b"here").unwrap();
        let fd = leave(&left).unwrap();
        std::mem::forget(left);
        let mut taken = take(fd).unwrap();
        let mut found = String::new();
        taken.seek(SeekFrom::Start(0)).unwrap();
        taken.read_to_string(&mut found).unwrap();
        assert_eq!(found, "here");
        let other = tempfile::tempfile().unwrap();
        let error = take(other.as_raw_fd()).unwrap_err().to_string();
        assert!(error.contains("no process of Colo left"), "{error}");
        assert!(take(1_000_000).is_err());
    }
}
