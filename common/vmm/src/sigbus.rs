//! SIGBUS on guest memory: the host has promised memory (the mapping is not reserved) and cannot give it.
//!
//! Nothing can be repaired then: an instruction of the guest, or a copy of one of its pages, is half done. So
//! the handler says in one line what happened and ends the process with [`EXIT_STATUS`]; the other node takes
//! over from the last acked point. A SIGBUS anywhere else keeps its usual action.
//!
//! The handler may run in the middle of anything, so it allocates nothing and takes no lock: ranges are in a
//! table of atomics, the line is put together on the stack, and `write` and `_exit` are all that it calls.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Exit status of a node that lost its guest's memory. Apart from 0..=3 of ordinary ends, 101 of a panic and
/// 128 and above of signals, so that whoever started the node can tell.
pub const EXIT_STATUS: i32 = 86;

/// Mappings registered at the same time. A node has one guest of one or two mappings; simulations run
/// hundreds of guests in one process.
const MAX_RANGES: usize = 1024;

/// Bytes of the handler's line: the text below with two addresses of 16 digits.
const LINE_BYTES: usize = 320;

/// A registered range. `len` is written last and cleared first: while it is not zero, `start` is right.
struct Range {
    /// First byte; 0 is a free place in the table.
    start: AtomicUsize,
    /// Bytes; 0 means that the range does not count (yet).
    len: AtomicUsize,
}

static RANGES: [Range; MAX_RANGES] =
    [const { Range { start: AtomicUsize::new(0), len: AtomicUsize::new(0) } }; MAX_RANGES];

/// Whether the handler is in place; held while it is put there.
static INSTALLED: Mutex<bool> = Mutex::new(false);

/// Keeps an address range registered as guest memory; drop it before the range is unmapped.
#[derive(Debug)]
#[must_use = "the range is registered for as long as the guard lives"]
pub struct Guard {
    /// Place in the table; nothing if the table was full.
    place: Option<usize>,
}

impl Guard {
    /// Registers `len` bytes at the address `start` of this process. When the table is full, the range stays
    /// unknown: a SIGBUS in it then has its usual action, which ends the process too, with less to read.
    pub fn new(start: usize, len: usize) -> Self {
        if start == 0 || len == 0 {
            return Self { place: None };
        }
        let free = |range: &Range| {
            range.start.compare_exchange(0, start, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        };
        let place = RANGES.iter().position(free);
        match place {
            Some(place) => RANGES[place].len.store(len, Ordering::Release),
            None => {
                tracing::warn!("more than {MAX_RANGES} guest memory mappings: SIGBUS will not be explained");
            }
        }
        Self { place }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            RANGES[place].len.store(0, Ordering::Relaxed);
            // Release, so that the next owner of the place sees no length of ours.
            RANGES[place].start.store(0, Ordering::Release);
        }
    }
}

/// Puts the handler in place for the whole process; once is enough, further calls do nothing.
///
/// # Errors
/// The system refuses the handler.
pub fn install() -> io::Result<()> {
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*installed {
        set_action(on_sigbus as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK)?;
        *installed = true;
    }
    Ok(())
}

/// Sets what SIGBUS does. Async-signal-safe.
fn set_action(handler: libc::sighandler_t, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: sigaction is plain data, for which all zeroes are a value: no flags and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` outlives the call, and the old action is not asked for. The handler is SIG_DFL or
    // `on_sigbus`, which has the signature that SA_SIGINFO asks for and calls only async-signal-safe functions.
    let done = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo that is valid until the handler returns.
    let info = unsafe { &*info };
    // Codes above zero are the kernel's and name an address; others come from kill and its like.
    let fault = info.si_code > 0;
    if fault {
        // SAFETY: the kernel fills in the address for every SIGBUS that it raises itself.
        let address = unsafe { info.si_addr() } as usize;
        if let Some(offset) = offset_in_guest(address) {
            stop(address, offset, info.si_code);
        }
    }
    // On return the faulting access is made again and meets the default action. A signal that somebody sent
    // would not come again by itself.
    let restored = set_action(libc::SIG_DFL, 0);
    if restored.is_err() || !fault {
        // SAFETY: no precondition; the signal is blocked here and arrives when the handler returns.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}

/// How far into a registered range `address` lies.
fn offset_in_guest(address: usize) -> Option<usize> {
    RANGES.iter().find_map(|range| {
        let len = range.len.load(Ordering::Acquire);
        let offset = address.wrapping_sub(range.start.load(Ordering::Relaxed));
        (offset < len).then_some(offset)
    })
}

/// Says what happened and ends the process.
fn stop(address: usize, offset: usize, code: libc::c_int) -> ! {
    let mut line = Line { bytes: [0; LINE_BYTES], used: 0 };
    line.text(b"colo: the host could not provide guest memory (SIGBUS at address ");
    line.hex(address);
    line.text(b", offset ");
    line.hex(offset);
    line.text(b" of a guest memory mapping): ");
    line.text(if matches!(code, libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO) {
        b"the host's memory has a hardware error"
    } else {
        b"out of memory or a memory limit"
    });
    line.text(b"; stopping this node so that the other one takes over\n");
    let text = &line.bytes[..line.used];
    // SAFETY: the buffer is valid for `text.len()` bytes, and write is async-signal-safe. Should it fail or be
    // cut short, nothing better is left to be done.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
    // SAFETY: no precondition. Unlike `exit` it runs no handlers, which may need what is broken.
    unsafe { libc::_exit(EXIT_STATUS) }
}

/// Text on the stack; what does not fit is left out.
struct Line {
    bytes: [u8; LINE_BYTES],
    used: usize,
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for &byte in text {
            if let Some(place) = self.bytes.get_mut(self.used) {
                *place = byte;
                self.used += 1;
            }
        }
    }

    fn hex(&mut self, number: usize) {
        self.text(b"0x");
        let digits = (usize::BITS - number.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            self.text(&[b"0123456789abcdef"[(number >> (4 * digit)) & 0xf]]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{EXIT_STATUS, Guard, LINE_BYTES, Line, install, offset_in_guest};
    use std::fs::File;
    use std::os::fd::FromRawFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    const ROLE: &str = "COLO_TEST_SIGBUS";
    const BYTES: usize = 1 << 16;

    /// Runs the test `name` again in a process of its own, where it is [`child`].
    fn run(name: &str, role: &str) -> Output {
        let module = module_path!().split_once("::").map_or("", |(_, rest)| rest);
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", &format!("{module}::{name}")])
            .env(ROLE, role)
            .output()
            .unwrap()
    }

    fn child(role: &str) {
        // SAFETY: the name ends in a NUL and outlives the call.
        let fd = unsafe { libc::memfd_create(c"colo-test".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the descriptor was just made and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(BYTES as u64).unwrap();
        let handle = file.try_clone().unwrap();
        let region = MmapRegion::<()>::from_file(FileOffset::new(handle, 0), BYTES).unwrap();
        install().unwrap();
        install().unwrap();
        let guard = Guard::new(region.as_ptr() as usize, BYTES);
        match role {
            "registered" => (),
            "dropped" => drop(guard),
            "sent" => {
                // SAFETY: no precondition.
                unsafe { libc::raise(libc::SIGBUS) };
            }
            other => panic!("no role {other}"),
        }
        file.set_len(0).unwrap();
        let touched = region.get_slice(0, BYTES).unwrap().read_obj::<u8>(0x3456);
        panic!("the access succeeded: {touched:?}");
    }

    #[test]
    fn a_fault_in_guest_memory_ends_the_process_with_a_line_and_its_own_status() {
        if let Ok(role) = std::env::var(ROLE) {
            return child(&role);
        }
        let name = "a_fault_in_guest_memory_ends_the_process_with_a_line_and_its_own_status";
        let output = run(name, "registered");
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(EXIT_STATUS), "{said}");
        let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("colo: ")).collect();
        assert_eq!(lines.len(), 1, "{said}");
        assert!(lines[0].starts_with("colo: the host could not provide guest memory (SIGBUS at address 0x"));
        assert!(
            lines[0].contains(", offset 0x3456 of a guest memory mapping): out of memory or a memory limit;")
        );
        assert!(lines[0].ends_with("stopping this node so that the other one takes over"));
    }

    #[test]
    fn any_other_sigbus_acts_as_usual() {
        if let Ok(role) = std::env::var(ROLE) {
            return child(&role);
        }
        for role in ["dropped", "sent"] {
            let output = run("any_other_sigbus_acts_as_usual", role);
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{role}: {said}");
            assert!(!said.contains("could not provide guest memory"), "{role}: {said}");
        }
    }

    #[test]
    fn ranges_count_from_new_to_drop() {
        // Addresses of the kernel's half, which no mapping of another test can have.
        let at = usize::MAX - 0x10_0000;
        let (low, high) = (Guard::new(at, 0x1000), Guard::new(at + 0x1000, 0x1000));
        assert_eq!(offset_in_guest(at), Some(0));
        assert_eq!(offset_in_guest(at + 0x1fff), Some(0xfff));
        assert_eq!(offset_in_guest(at + 0x2000), None);
        drop(low);
        assert_eq!(offset_in_guest(at + 1), None);
        assert_eq!(offset_in_guest(at + 0x1001), Some(1));
        drop(high);
        assert_eq!(offset_in_guest(at + 0x1001), None);
        assert!(Guard::new(0, 5).place.is_none() && Guard::new(5, 0).place.is_none());
    }

    #[test]
    fn the_line_holds_the_widest_addresses() {
        let mut line = Line { bytes: [0; LINE_BYTES], used: 0 };
        line.hex(usize::MAX);
        line.hex(0);
        line.hex(0x10);
        assert_eq!(&line.bytes[..line.used], b"0xffffffffffffffff0x00x10");
        (0..LINE_BYTES).for_each(|_| line.text(b"x"));
        assert_eq!(line.used, LINE_BYTES);
    }
}
