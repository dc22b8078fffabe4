// SPDX-License-Identifier: Apache-2.0
//! The system calls of the service's init that the workload does not need: file systems, processes, the disk and the
//! network's interfaces. All unsafe code of the service is here and in the workload's sys.rs.

use std::ffi::{CString, c_char, c_int, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

mod c {
    use super::{c_char, c_int, c_ulong, c_void};

    unsafe extern "C" {
        pub(super) fn chroot(path: *const c_char) -> c_int;
        pub(super) fn fallocate(fd: c_int, mode: c_int, offset: i64, bytes: i64) -> c_int;
        pub(super) fn fchdir(fd: c_int) -> c_int;
        pub(super) fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
        pub(super) fn kill(pid: c_int, signal: c_int) -> c_int;
        pub(super) fn mount(
            source: *const c_char,
            target: *const c_char,
            kind: *const c_char,
            flags: c_ulong,
            data: *const c_void,
        ) -> c_int;
        pub(super) fn posix_fadvise(fd: c_int, offset: i64, bytes: i64, advice: c_int) -> c_int;
        pub(super) fn umount2(target: *const c_char, flags: c_int) -> c_int;
        pub(super) fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    }
}

/// Opens past the page cache: buffers, offsets and lengths are whole blocks.
pub(crate) const O_DIRECT: i32 = 0o40000;

fn checked(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Mounts an ext4 file system, without writing times of reading to it.
pub(crate) fn mount_disk(device: &str, target: &str) -> io::Result<()> {
    const NOATIME: c_ulong = 0x400;
    let (device, target) = (c_string(device)?, c_string(target)?);
    // SAFETY: all strings end with NUL and live through the call; no data is given.
    checked(unsafe {
        c::mount(device.as_ptr(), target.as_ptr(), c"ext4".as_ptr(), NOATIME, std::ptr::null())
    })
}

/// Mounts another view of a directory that is there.
pub(crate) fn mount_bind(from: &str, to: &str) -> io::Result<()> {
    const BIND: c_ulong = 0x1000;
    let (from, to) = (c_string(from)?, c_string(to)?);
    // SAFETY: as above.
    checked(unsafe { c::mount(from.as_ptr(), to.as_ptr(), c"".as_ptr(), BIND, std::ptr::null()) })
}

/// Unmounts what nobody uses any more: all that was written is on the disk then.
pub(crate) fn unmount(target: &str) -> io::Result<()> {
    let target = c_string(target)?;
    // SAFETY: the string ends with NUL and lives through the call.
    checked(unsafe { c::umount2(target.as_ptr(), 0) })
}

/// Makes a directory the root of this process and of those that it starts.
pub(crate) fn change_root(path: &str) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: the string ends with NUL and lives through the call.
    checked(unsafe { c::chroot(path.as_ptr()) })?;
    std::env::set_current_dir("/")
}

/// Goes back to a root that was kept open.
pub(crate) fn return_to_root(root: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    checked(unsafe { c::fchdir(root.as_raw_fd()) })?;
    // SAFETY: the string ends with NUL.
    checked(unsafe { c::chroot(c".".as_ptr()) })
}

/// A signal to one process.
pub(crate) fn signal(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: takes no pointer. Zero and negative numbers, which mean groups, are no process's.
    checked(unsafe { c::kill(pid.cast_signed().max(1), signal) })
}

/// One process that has ended since, whoever started it: orphans come to the first process.
pub(crate) fn reap() -> Option<(u32, ExitStatus)> {
    const WNOHANG: c_int = 1;
    let mut status = 0;
    // SAFETY: the pointer is to a live integer.
    let pid = unsafe { c::waitpid(-1, &raw mut status, WNOHANG) };
    (pid > 0).then(|| (pid.unsigned_abs(), ExitStatus::from_raw(status)))
}

/// Drops what the page cache holds of a file, so that the next read asks the disk.
pub(crate) fn forget_pages(file: &File) -> io::Result<()> {
    const DONTNEED: c_int = 4;
    // SAFETY: takes no pointer.
    let error = unsafe { c::posix_fadvise(file.as_raw_fd(), 0, 0, DONTNEED) };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// Gives a range of a file back; it reads as zero.
pub(crate) fn punch_hole(file: &File, bytes: &Range<u64>) -> io::Result<()> {
    const PUNCH_HOLE_KEEP_SIZE: c_int = 2 | 1;
    allocate(file, PUNCH_HOLE_KEEP_SIZE, bytes)
}

/// Makes a range of a file zero without giving it back.
pub(crate) fn zero_range(file: &File, bytes: &Range<u64>) -> io::Result<()> {
    const ZERO_RANGE_KEEP_SIZE: c_int = 0x10 | 1;
    allocate(file, ZERO_RANGE_KEEP_SIZE, bytes)
}

fn allocate(file: &File, mode: c_int, bytes: &Range<u64>) -> io::Result<()> {
    let (start, length) = (bytes.start.cast_signed(), (bytes.end - bytes.start).cast_signed());
    // SAFETY: takes no pointer.
    checked(unsafe { c::fallocate(file.as_raw_fd(), mode, start, length) })
}

/// Bytes of a disk.
pub(crate) fn disk_bytes(disk: &File) -> io::Result<u64> {
    const BLKGETSIZE64: c_ulong = 0x8008_1272;
    let mut bytes = 0u64;
    // SAFETY: the request writes one u64, which lives through the call.
    checked(unsafe { c::ioctl(disk.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) })?;
    Ok(bytes)
}

/// Tells a disk that a range holds nothing; what it reads as is open.
pub(crate) fn disk_discard(disk: &File, bytes: &Range<u64>) -> io::Result<()> {
    const BLKDISCARD: c_ulong = 0x1277;
    disk_range(disk, BLKDISCARD, bytes)
}

/// Makes a range of a disk zero.
pub(crate) fn disk_zero(disk: &File, bytes: &Range<u64>) -> io::Result<()> {
    const BLKZEROOUT: c_ulong = 0x127f;
    disk_range(disk, BLKZEROOUT, bytes)
}

fn disk_range(disk: &File, request: c_ulong, bytes: &Range<u64>) -> io::Result<()> {
    let range = [bytes.start, bytes.end - bytes.start];
    // SAFETY: both requests read two u64, which live through the call.
    checked(unsafe { c::ioctl(disk.as_raw_fd(), request, range.as_ptr()) })
}

/// A request about the network's interfaces, whose structure the caller lays out: none is longer than `rtentry`.
pub(crate) fn net_request(
    socket: &std::net::UdpSocket,
    request: u32,
    record: &mut [u8; 120],
) -> io::Result<()> {
    // SAFETY: the kernel reads and writes an ifreq (40 bytes) or reads an rtentry (120 bytes, its device name NULL),
    // within the live array.
    checked(unsafe { c::ioctl(socket.as_raw_fd(), c_ulong::from(request), record.as_mut_ptr()) })
}
