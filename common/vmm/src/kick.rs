//! Gets a vCPU thread out of KVM_RUN: by a signal from the checkpoint thread, and by a timer of its own.
//!
//! The handler sets `immediate_exit` in the thread's `kvm_run`. So a signal that arrives just before KVM_RUN
//! makes that KVM_RUN return at once, and no kick is ever lost between a check and the entry.

use std::cell::Cell;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// Offset from SIGRTMIN of the signal that both kicks and ticks use.
const SIGNAL_OFFSET: libc::c_int = 0;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// The signal's number.
pub(crate) fn signal() -> libc::c_int {
    SIGRTMIN() + SIGNAL_OFFSET
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|cell| {
        let flag = cell.get();
        if !flag.is_null() {
            // SAFETY: a non-null pointer is the flag of a live `kvm_run` mapping: `Registration` sets it on
            // this same thread and clears it before the mapping goes.
            unsafe { (*flag).store(1, Ordering::SeqCst) };
        }
    });
}

/// Installs the handler, once per process, before the first thread that may be kicked.
pub(crate) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        register_signal_handler(signal(), on_signal).expect("SIGRTMIN can be handled");
    });
}

/// While alive, signals to this thread set the flag of its vCPU.
pub(crate) struct Registration {
    _not_send: std::marker::PhantomData<*const ()>,
}

impl Registration {
    /// Registers `immediate_exit` for the calling thread.
    ///
    /// # Safety
    /// The flag must stay valid until the registration is dropped.
    pub(crate) unsafe fn new(immediate_exit: *const AtomicU8) -> Self {
        install();
        IMMEDIATE_EXIT.with(|cell| cell.set(immediate_exit));
        Self { _not_send: std::marker::PhantomData }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null()));
    }
}

/// Runs `f` with every signal of the calling thread held back until after it. Stops cannot be held back (SIGSTOP,
/// a debugger, a frozen cgroup): also tells whether the thread may have been stopped.
pub(crate) fn without_signals<T>(f: impl FnOnce() -> T) -> (T, bool) {
    // SAFETY: all-zero bytes are a valid `sigset_t`.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: `all` is a live signal set.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: both pointers are to live signal sets.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    assert_eq!(blocked, 0, "a thread can block its own signals");
    let switches = voluntary_switches();
    let result = f();
    let stopped = voluntary_switches() != switches;
    // SAFETY: `before` is the live set that the call above has filled in; nothing is asked back.
    let restored = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
    assert_eq!(restored, 0, "a thread can have its own signals back");
    (result, stopped)
}

/// How often the calling thread gave up its core by itself: to wait for something, or because it was stopped.
fn voluntary_switches() -> libc::c_long {
    // SAFETY: all-zero bytes are a valid `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live `rusage`.
    let ret = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    assert_eq!(ret, 0, "a thread can ask for its own usage");
    usage.ru_nvcsw
}

/// A timer that signals the thread it was made on.
pub(crate) struct Ticker {
    timer: libc::timer_t,
    period: Duration,
}

impl Ticker {
    /// A stopped timer for the calling thread.
    pub(crate) fn new(period: Duration) -> std::io::Result<Self> {
        install();
        // SAFETY: all-zero bytes are a valid `sigevent`.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        // SAFETY: the call has no precondition.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: both pointers are to live values of the right types.
        let ret = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        if ret != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { timer, period })
    }

    /// Ticks from now on.
    pub(crate) fn start(&self) {
        self.set(self.period);
    }

    /// Ticks no more.
    pub(crate) fn stop(&self) {
        self.set(Duration::ZERO);
    }

    fn set(&self, period: Duration) {
        let time = libc::timespec {
            tv_sec: period.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(period.subsec_nanos()),
        };
        let setting = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: the timer is ours until drop, and `setting` lives through the call.
        let ret = unsafe { libc::timer_settime(self.timer, 0, &raw const setting, ptr::null_mut()) };
        assert_eq!(ret, 0, "setting our own timer failed: {}", std::io::Error::last_os_error());
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        // SAFETY: the timer was made by `new` and is deleted once.
        unsafe { libc::timer_delete(self.timer) };
    }
}
