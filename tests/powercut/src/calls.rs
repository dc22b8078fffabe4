//! The functions of libc that stand here in its place.

use libc::{c_char, c_int, c_uint, c_void, iovec, mode_t, off_t, size_t, ssize_t};
use std::ffi::CStr;

use super::{Kind, Recorder, recorder, resolve};

/// Does a system call, and if it succeeds and is of interest, writes it down in the same step.
macro_rules! step {
    ($recorder:ident: $($call:expr),+ ; $done:ident => $record:expr) => {{
        let guard = recorder().map(|recorder| (recorder, recorder.lock()));
        // SAFETY: the arguments are the caller's, who keeps to the contract of the function in libc.
        let $done = unsafe { libc::syscall($($call),+) };
        if let Some(($recorder, _guard)) = &guard && $done >= 0 {
            $record;
        }
        $done
    }};
}

/// The path at a pointer of a caller.
///
/// # Safety
/// The pointer is to a NUL-terminated string.
unsafe fn path_at(dir: c_int, path: *const c_char) -> Vec<u8> {
    // SAFETY: the caller's pointer is to a NUL-terminated string.
    resolve(dir, unsafe { CStr::from_ptr(path) })
}

fn opened(recorder: &Recorder, fd: i32, flags: c_int, path: &[u8]) {
    if recorder.is_below(path) {
        recorder.follow(fd, true);
        recorder.record(Kind::Open, fd, flags as u64, path, &[]);
    }
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: as libc's openat demands.
    let name = unsafe { path_at(dir, path) };
    step!(r: libc::SYS_openat, dir, path, flags, mode; fd => opened(r, fd as i32, flags, &name)) as c_int
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { openat(dir, path, flags, mode) }
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { openat(libc::AT_FDCWD, path, flags, mode) }
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { openat(libc::AT_FDCWD, path, flags, mode) }
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    let closed = |recorder: &Recorder| {
        if recorder.follows(fd) {
            recorder.follow(fd, false);
            recorder.record(Kind::Close, fd, 0, &[], &[]);
        }
    };
    step!(r: libc::SYS_close, fd; _done => closed(r)) as c_int
}

/// Writes down what was written: `done` bytes of `parts` that end at `end`.
///
/// # Safety
/// The parts are readable.
unsafe fn wrote(recorder: &Recorder, fd: c_int, end: u64, done: usize, parts: &[iovec]) {
    let (mut offset, mut left) = (end - done as u64, done);
    for part in parts {
        let bytes = part.iov_len.min(left);
        // SAFETY: the system has just read these bytes, so they are readable.
        let data = unsafe { std::slice::from_raw_parts(part.iov_base.cast::<u8>(), bytes) };
        recorder.record(Kind::Write, fd, offset, data, &[]);
        offset += bytes as u64;
        left -= bytes;
    }
}

/// Where the next byte of a file goes.
fn position(fd: c_int) -> u64 {
    // SAFETY: the call takes no pointer.
    unsafe { libc::syscall(libc::SYS_lseek, fd, 0, libc::SEEK_CUR) as u64 }
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, data: *const c_void, len: size_t) -> ssize_t {
    let part = iovec { iov_base: data.cast_mut(), iov_len: len };
    let note = |recorder: &Recorder, done| {
        if recorder.follows(fd) {
            // SAFETY: the caller's buffer.
            unsafe { wrote(recorder, fd, position(fd), done, &[part]) }
        }
    };
    step!(r: libc::SYS_write, fd, data, len; done => note(r, done as usize)) as ssize_t
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t {
    let note = |recorder: &Recorder, done| {
        if recorder.follows(fd) {
            // SAFETY: the system has just read this array.
            let parts = unsafe { std::slice::from_raw_parts(parts, count as usize) };
            // SAFETY: and the buffers that it names.
            unsafe { wrote(recorder, fd, position(fd), done, parts) }
        }
    };
    step!(r: libc::SYS_writev, fd, parts, count; done => note(r, done as usize)) as ssize_t
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite(fd: c_int, data: *const c_void, len: size_t, offset: off_t) -> ssize_t {
    let part = iovec { iov_base: data.cast_mut(), iov_len: len };
    let note = |recorder: &Recorder, done: usize| {
        if recorder.follows(fd) {
            // SAFETY: the caller's buffer.
            unsafe { wrote(recorder, fd, offset as u64 + done as u64, done, &[part]) }
        }
    };
    step!(r: libc::SYS_pwrite64, fd, data, len, offset; done => note(r, done as usize)) as ssize_t
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(fd: c_int, data: *const c_void, len: size_t, offset: off_t) -> ssize_t {
    // SAFETY: the same contract.
    unsafe { pwrite(fd, data, len, offset) }
}

fn with_fd(recorder: &Recorder, kind: Kind, fd: c_int, value: u64) {
    if recorder.follows(fd) {
        recorder.record(kind, fd, value, &[], &[]);
    }
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    step!(r: libc::SYS_fsync, fd; _done => with_fd(r, Kind::Sync, fd, 0)) as c_int
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    step!(r: libc::SYS_fdatasync, fd; _done => with_fd(r, Kind::Sync, fd, 0)) as c_int
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, len: off_t) -> c_int {
    step!(r: libc::SYS_ftruncate, fd, len; _done => with_fd(r, Kind::Truncate, fd, len as u64)) as c_int
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, len: off_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { ftruncate(fd, len) }
}

/// See libc. Only holes are followed; room that is made beforehand has no content.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
    let punched = |recorder: &Recorder| {
        if recorder.follows(fd) && mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            recorder.record(Kind::Punch, fd, offset as u64, &len.to_le_bytes(), &[]);
        }
    };
    // RocksDB takes the value, our own code errno: libc's wrapper sets it, and so does syscall(2)'s.
    step!(r: libc::SYS_fallocate, fd, mode, offset, len; _done => punched(r)) as c_int
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
    // SAFETY: the same contract.
    unsafe { fallocate(fd, mode, offset, len) }
}

fn with_paths(recorder: &Recorder, kind: Kind, from: &[u8], to: &[u8]) {
    if recorder.is_below(from) || recorder.is_below(to) {
        recorder.record(kind, -1, 0, from, to);
    }
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: as libc's rename demands.
    let old = unsafe { path_at(libc::AT_FDCWD, from) };
    // SAFETY: as libc's rename demands.
    let new = unsafe { path_at(libc::AT_FDCWD, to) };
    step!(r: libc::SYS_rename, from, to; _done => with_paths(r, Kind::Rename, &old, &new)) as c_int
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn link(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: as libc's link demands.
    let old = unsafe { path_at(libc::AT_FDCWD, from) };
    // SAFETY: as libc's link demands.
    let new = unsafe { path_at(libc::AT_FDCWD, to) };
    step!(r: libc::SYS_link, from, to; _done => with_paths(r, Kind::Link, &old, &new)) as c_int
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlinkat(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: as libc's unlinkat demands.
    let name = unsafe { path_at(dir, path) };
    let kind = if flags & libc::AT_REMOVEDIR != 0 { Kind::Rmdir } else { Kind::Unlink };
    step!(r: libc::SYS_unlinkat, dir, path, flags; _done => with_paths(r, kind, &name, &[])) as c_int
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    // SAFETY: the same contract.
    unsafe { unlinkat(libc::AT_FDCWD, path, 0) }
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rmdir(path: *const c_char) -> c_int {
    // SAFETY: the same contract.
    unsafe { unlinkat(libc::AT_FDCWD, path, libc::AT_REMOVEDIR) }
}

/// See libc.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mkdir(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: as libc's mkdir demands.
    let name = unsafe { path_at(libc::AT_FDCWD, path) };
    step!(r: libc::SYS_mkdir, path, mode as c_uint; _done => with_paths(r, Kind::Mkdir, &name, &[])) as c_int
}
