//! A pseudo-terminal for the console: programs that expect a terminal open the link.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// Opens a pty in raw mode and links its other side to `link`, which may be left from before.
///
/// # Errors
/// No pty can be had, or the link cannot be made.
pub fn open(link: &Path) -> io::Result<File> {
    // SAFETY: the call has no precondition.
    let fd = unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and has no other owner.
    let master = unsafe { OwnedFd::from_raw_fd(fd) };
    let fd = master.as_raw_fd();
    // SAFETY: the descriptor is that of an open pty.
    checked(unsafe { libc::grantpt(fd) })?;
    // SAFETY: as above.
    checked(unsafe { libc::unlockpt(fd) })?;
    let mut name = [0; 128];
    // SAFETY: the buffer is as long as it is said to be.
    checked(unsafe { libc::ptsname_r(fd, name.as_mut_ptr(), name.len()) })?;
    // SAFETY: the call above has left a string with its NUL in the buffer, which lives on.
    let slave = unsafe { CStr::from_ptr(name.as_ptr()) };
    // SAFETY: all-zero bytes are a valid `termios`.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and `settings` is a live `termios`.
    checked(unsafe { libc::tcgetattr(fd, &raw mut settings) })?;
    // SAFETY: `settings` is a live `termios`.
    unsafe { libc::cfmakeraw(&raw mut settings) };
    // SAFETY: as for `tcgetattr`.
    checked(unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const settings) })?;
    if link.is_symlink() {
        std::fs::remove_file(link)?;
    }
    std::os::unix::fs::symlink(slave.to_string_lossy().as_ref(), link)?;
    Ok(File::from(master))
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
