// SPDX-License-Identifier: Apache-2.0
//! The system calls of the workload: the C library's functions that a static Rust program is linked with anyway,
//! declared here so that the workload needs no crate. All unsafe code but the working set's is in this file.

use std::arch::asm;
use std::ffi::{CStr, c_char, c_int, c_short, c_ulong, c_void};
use std::io;

mod c {
    use super::{c_char, c_int, c_short, c_ulong, c_void};

    #[repr(C)]
    pub(super) struct Timespec {
        pub(super) seconds: i64,
        pub(super) nanoseconds: i64,
    }

    #[repr(C)]
    pub(super) struct Pollfd {
        pub(super) fd: c_int,
        pub(super) events: c_short,
        pub(super) revents: c_short,
    }

    /// glibc's struct termios on x86-64: four flag words, then fields that are only carried from get to set.
    #[repr(C)]
    pub(super) struct Termios {
        pub(super) flags: [u32; 4],
        pub(super) rest: [u8; 44],
    }

    unsafe extern "C" {
        pub(super) fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int;
        pub(super) fn clock_nanosleep(
            clock: c_int,
            flags: c_int,
            time: *const Timespec,
            left: *mut Timespec,
        ) -> c_int;
        pub(super) fn ioperm(from: c_ulong, count: c_ulong, on: c_int) -> c_int;
        pub(super) fn mmap(
            at: *mut c_void,
            bytes: usize,
            protection: c_int,
            flags: c_int,
            fd: c_int,
            offset: i64,
        ) -> *mut c_void;
        pub(super) fn mount(
            source: *const c_char,
            target: *const c_char,
            kind: *const c_char,
            flags: c_ulong,
            data: *const c_void,
        ) -> c_int;
        pub(super) fn poll(fds: *mut Pollfd, count: c_ulong, timeout_ms: c_int) -> c_int;
        pub(super) fn read(fd: c_int, bytes: *mut c_void, count: usize) -> isize;
        pub(super) fn reboot(command: c_int) -> c_int;
        pub(super) fn sched_getcpu() -> c_int;
        pub(super) fn sched_setaffinity(pid: c_int, bytes: usize, mask: *const u64) -> c_int;
        pub(super) fn syscall(number: i64, ...) -> i64;
        pub(super) fn tcdrain(fd: c_int) -> c_int;
        pub(super) fn tcgetattr(fd: c_int, termios: *mut Termios) -> c_int;
        pub(super) fn tcsetattr(fd: c_int, when: c_int, termios: *const Termios) -> c_int;
        pub(super) fn write(fd: c_int, bytes: *const c_void, count: usize) -> isize;
    }
}

const CLOCK_MONOTONIC: c_int = 1;

fn checked(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// CLOCK_MONOTONIC as this CPU tells it, through the vDSO where it serves.
pub(crate) fn monotonic_ns() -> u64 {
    let mut time = c::Timespec { seconds: 0, nanoseconds: 0 };
    // SAFETY: the pointer is to a live timespec.
    let result = unsafe { c::clock_gettime(CLOCK_MONOTONIC, &raw mut time) };
    assert_eq!(result, 0, "CLOCK_MONOTONIC exists");
    time.seconds as u64 * 1_000_000_000 + time.nanoseconds as u64
}

/// Sleeps until the monotonic clock reads `at_ns`: the CPU is free to halt.
pub(crate) fn sleep_until(at_ns: u64) {
    const TIMER_ABSTIME: c_int = 1;
    let time =
        c::Timespec { seconds: (at_ns / 1_000_000_000) as i64, nanoseconds: (at_ns % 1_000_000_000) as i64 };
    // SAFETY: the time is live, and an absolute sleep writes no remainder.
    unsafe { c::clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &raw const time, std::ptr::null_mut()) };
}

/// One write per line: a system call costs more than all else in a step where kernel mode is emulated.
pub(crate) fn write_all(fd: c_int, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the pointer and the length are of one live slice.
        let written = unsafe { c::write(fd, bytes.as_ptr().cast(), bytes.len()) };
        // A console that cannot be written leaves nowhere to say so.
        let Ok(written) = usize::try_from(written) else { return };
        bytes = &bytes[written..];
    }
}

/// Reads what is there; 0 is the end.
pub(crate) fn read(fd: c_int, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are of one live slice.
    let count = unsafe { c::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Which of the descriptors have something to read, after waiting for the first up to `timeout_ms`.
pub(crate) fn readable(fds: [c_int; 2], timeout_ms: c_int) -> [bool; 2] {
    const POLLIN: c_short = 1;
    let mut polls = fds.map(|fd| c::Pollfd { fd, events: POLLIN, revents: 0 });
    // SAFETY: the count is that of the live array.
    let count = unsafe { c::poll(polls.as_mut_ptr(), polls.len() as c_ulong, timeout_ms) };
    polls.map(|poll| count > 0 && poll.revents != 0)
}

/// Input is not echoed by the terminal: its echo would come in the middle of lines.
pub(crate) fn echo_off(fd: c_int) {
    const ECHO: u32 = 0o10;
    let mut termios = c::Termios { flags: [0; 4], rest: [0; 44] };
    // SAFETY: the structure has the size and layout of glibc's; a descriptor that is no terminal is an error.
    if unsafe { c::tcgetattr(fd, &raw mut termios) } == 0 {
        termios.flags[3] &= !ECHO;
        // SAFETY: as above, and the call only reads it.
        unsafe { c::tcsetattr(fd, 0, &raw const termios) };
    }
}

/// Waits until the terminal has sent all that was written.
pub(crate) fn drain(fd: c_int) {
    // SAFETY: takes no pointer; a descriptor that is no terminal is an error without effect.
    unsafe { c::tcdrain(fd) };
}

/// Pins the calling thread. An error if there is no such CPU.
pub(crate) fn pin_to(cpu: usize) -> io::Result<()> {
    let mut mask = [0u64; 16];
    *mask.get_mut(cpu / 64).ok_or(io::ErrorKind::InvalidInput)? |= 1 << (cpu % 64);
    // SAFETY: the size is that of the live mask.
    checked(unsafe { c::sched_setaffinity(0, size_of_val(&mask), mask.as_ptr()) })
}

/// The CPU that runs this thread now.
pub(crate) fn current_cpu() -> u32 {
    // SAFETY: takes nothing.
    unsafe { c::sched_getcpu() }.unsigned_abs()
}

/// Zeroed memory that costs nothing until it is touched. Never given back.
pub(crate) fn map_zeroed(bytes: usize) -> io::Result<*mut u8> {
    const READ_WRITE: c_int = 3;
    const PRIVATE_ANONYMOUS_NORESERVE: c_int = 0x2 | 0x20 | 0x4000;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice replaces nothing.
    let at = unsafe { c::mmap(std::ptr::null_mut(), bytes, READ_WRITE, PRIVATE_ANONYMOUS_NORESERVE, -1, 0) };
    if at.addr() == usize::MAX { Err(io::Error::last_os_error()) } else { Ok(at.cast()) }
}

/// Mounts a file system that has no device.
pub(crate) fn mount(kind: &CStr, target: &CStr) -> io::Result<()> {
    // SAFETY: all strings end with NUL and live through the call; these file systems take no data.
    checked(unsafe { c::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) })
}

/// Loads a kernel module from an open file, without parameters.
pub(crate) fn load_module(file: &std::fs::File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    const FINIT_MODULE: i64 = 313;
    // SAFETY: an open descriptor, an empty parameter string that ends with NUL, no flags.
    let result = unsafe { c::syscall(FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0 as c_int) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How a machine stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Reset,
    PowerOff,
    Halt,
}

/// Stops the machine. Returns only if the kernel does not let us.
pub(crate) fn stop(how: Stop) {
    let command: u32 = match how {
        Stop::Reset => 0x0123_4567,
        Stop::PowerOff => 0x4321_fedc,
        Stop::Halt => 0xcdef_0123,
    };
    // SAFETY: takes no pointer.
    unsafe { c::reboot(command.cast_signed()) };
}

/// Writes a byte to an I/O port from user mode.
pub(crate) fn port_write(port: u16, value: u8) -> io::Result<()> {
    // SAFETY: takes no pointer; it only lets this process use the port.
    checked(unsafe { c::ioperm(port.into(), 1, 1) })?;
    // SAFETY: the port was granted above, and an output to it touches no memory of ours.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
    Ok(())
}

const FUTEX: i64 = 202;
const FUTEX_WAIT_PRIVATE: c_int = 128;
const FUTEX_WAKE_PRIVATE: c_int = 129;

/// Sleeps while the word still holds `seen`; may also wake for nothing.
pub(crate) fn futex_wait(word: &std::sync::atomic::AtomicU32, seen: u32) {
    // SAFETY: the word lives through the call, and no timeout is given.
    unsafe { c::syscall(FUTEX, word.as_ptr(), FUTEX_WAIT_PRIVATE, seen, std::ptr::null::<c_void>()) };
}

/// Wakes all that sleep on the word.
pub(crate) fn futex_wake_all(word: &std::sync::atomic::AtomicU32) {
    // SAFETY: the word is only an address here.
    unsafe { c::syscall(FUTEX, word.as_ptr(), FUTEX_WAKE_PRIVATE, c_int::MAX) };
}
