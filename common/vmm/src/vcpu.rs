//! A vCPU's thread.
//!
//! ```text
//!             gate: run                     gate: pause
//!   parked ---------------> running ------------------------> settling ---> parked
//!      |                      ^  |  lifecycle, failure, full output
//!      | gate: quit           |  v
//!      v                      +- waiting (for the cut)
//!    ended
//! ```
//!
//! Settling completes a half-done port or MMIO access: KVM_RUN with `immediate_exit` until it comes back with
//! nothing to do, handling what it yields. Only then is the vCPU's state whole. A parked thread has given up
//! the lock on its [`VcpuFd`], so the checkpoint thread saves and restores through it.

use kvm_ioctls::VcpuFd;
use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::Killable;

use crate::devices::Devices;
use crate::egress::Egress;
use crate::events::Events;
use crate::guest::{GuestEvent, GuestFailure, Lifecycle, ResetCause, TrackingLoss};
use crate::kick::{self, Registration, Ticker};
use crate::memory::GuestMemory;
use crate::tracker::{Cadence, Tracker};
use crate::vcpu_exit::{self, Exit};
use colo_common::telemetry::in_node;

/// How often a vCPU that has not stopped is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(100);
/// Kicks after which the node gives up on a vCPU: 30 s. Kicks are counted and not time, since a stop of the whole
/// process (SIGSTOP, a frozen cgroup) is not the vCPU's doing.
const STOP_KICKS: u32 = 300;
/// The same for the end of a thread, which mostly is there at once.
const END_AGAIN: Duration = Duration::from_micros(100);
const END_KICKS: u32 = 300_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pause,
    Run,
    Quit,
}

/// Starts and stops all vCPU threads of one VM.
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// Mirrors `mode == Run`, for a look without the lock before every entry.
    open: AtomicBool,
}

struct GateState {
    mode: Mode,
    running: u32,
}

impl Gate {
    pub(crate) fn new() -> Self {
        let state = Mutex::new(GateState { mode: Mode::Pause, running: 0 });
        Self { state, changed: Condvar::new(), open: AtomicBool::new(false) }
    }

    pub(crate) fn open(&self) {
        self.set(Mode::Run);
    }

    /// Wakes whoever waits for a change, as after output was taken.
    pub(crate) fn notify(&self) {
        drop(self.state());
        self.changed.notify_all();
    }

    fn set(&self, mode: Mode) {
        let mut state = self.state();
        state.mode = mode;
        self.open.store(mode == Mode::Run, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// Parked until there is something to do; false when the thread shall end.
    fn leave_parking(&self) -> bool {
        let mut state = self.state();
        while state.mode == Mode::Pause {
            state = self.wait(state);
        }
        if state.mode == Mode::Run {
            state.running += 1;
        }
        state.mode == Mode::Run
    }

    fn park(&self) {
        self.state().running -= 1;
        self.changed.notify_all();
    }

    /// Blocks a running vCPU until the gate closes or `ready` holds.
    fn wait_for_cut(&self, ready: impl Fn() -> bool) {
        let mut state = self.state();
        while state.mode == Mode::Run && !ready() {
            state = self.wait(state);
        }
    }

    /// Whether all are parked within `limit`.
    fn all_parked(&self, limit: Duration) -> bool {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.state(), limit, |state| state.running > 0)
            .unwrap_or_else(PoisonError::into_inner);
        state.running == 0
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, GateState>) -> MutexGuard<'a, GateState> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the vCPU threads of one VM share.
pub(crate) struct Shared {
    pub(crate) gate: Gate,
    pub(crate) tracker: Tracker,
    pub(crate) devices: Devices,
    pub(crate) egress: Arc<Egress>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) events: Arc<Events>,
    pub(crate) settled: Arc<Settled>,
    pub(crate) cadence: Cadence,
    /// Why the guest cannot run on. While set, no vCPU enters.
    failure: Mutex<Option<GuestFailure>>,
    /// What the guest asked for and nobody carried out yet. While set, no vCPU enters.
    pending: Mutex<Option<Lifecycle>>,
}

impl Shared {
    pub(crate) fn new(
        tracker: Tracker,
        devices: Devices,
        egress: Arc<Egress>,
        memory: Arc<GuestMemory>,
        events: Arc<Events>,
        settled: Arc<Settled>,
        cadence: Cadence,
    ) -> Self {
        let (gate, failure, pending) = (Gate::new(), Mutex::new(None), Mutex::new(None));
        Self { gate, tracker, devices, egress, memory, events, settled, cadence, failure, pending }
    }

    pub(crate) fn failure(&self) -> Option<GuestFailure> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The machine was set to a state: nothing failed in it, unless it goes on from one in which something did.
    pub(crate) fn set_failure(&self, failure: Option<GuestFailure>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }

    /// The first failure stands.
    fn fail(&self, failure: GuestFailure) {
        if stand(&self.failure, &failure) {
            tracing::error!("{failure}");
            self.events.raise(GuestEvent::Failed(failure));
        }
    }

    /// Whether vCPUs stay out of the guest until somebody has seen to it.
    fn is_held(&self) -> bool {
        self.pending().is_some() || self.failure().is_some()
    }

    /// Says again what holds the guest, for an epoch loop that resumes it all the same.
    pub(crate) fn tell_again(&self) {
        let events = [self.pending().map(GuestEvent::Lifecycle), self.failure().map(GuestEvent::Failed)];
        events.into_iter().flatten().for_each(|event| self.events.raise(event));
    }

    pub(crate) fn pending(&self) -> Option<Lifecycle> {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_pending(&self, pending: Option<Lifecycle>) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = pending;
    }

    /// The first request stands until the epoch loop has carried it out.
    fn ask(&self, lifecycle: Lifecycle) {
        if stand(&self.pending, &lifecycle) {
            self.events.raise(GuestEvent::Lifecycle(lifecycle));
        }
    }
}

/// Puts `value` into an empty place; whether it was empty. The lock is given up before anybody is told.
fn stand<T: Clone>(place: &Mutex<Option<T>>, value: &T) -> bool {
    let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
    let empty = place.is_none();
    if empty {
        *place = Some(value.clone());
    }
    empty
}

/// How a guest reaches a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Port,
    Mmio,
}

/// Accesses that stops of a guest found half done, and completed.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    pub(crate) ports: AtomicU64,
    pub(crate) mmio: AtomicU64,
}

impl Settled {
    fn count(&self, access: Access) {
        let counter = match access {
            Access::Port => &self.ports,
            Access::Mmio => &self.mmio,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Why a vCPU's thread is not there.
#[derive(Debug)]
pub(crate) enum StartError {
    Thread(io::Error),
    /// Without its timer it would harvest its ring too late.
    Timer(io::Error),
}

/// A vCPU and its thread, as the checkpoint thread holds it.
pub(crate) struct Vcpu {
    id: u32,
    fd: Arc<Mutex<VcpuFd>>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread of a new vCPU, and waits until it has what it needs and is parked.
    pub(crate) fn spawn(id: u32, name: &str, fd: VcpuFd, shared: &Arc<Shared>) -> Result<Self, StartError> {
        let fd = Arc::new(Mutex::new(fd));
        let half_done = Cell::new(None);
        let worker = Worker { id, fd: Arc::clone(&fd), shared: Arc::clone(shared), half_done };
        let (started, start) = mpsc::sync_channel(1);
        let builder = std::thread::Builder::new().name(format!("vcpu{id}-{name}"));
        let thread = builder.spawn(in_node(move || worker.main(&started))).map_err(StartError::Thread)?;
        let ended = || Err(StartError::Thread(io::Error::other("it ended before it began")));
        match start.recv() {
            Ok(made) => made.map_err(StartError::Timer)?,
            Err(mpsc::RecvError) => return ended(),
        }
        Ok(Self { id, fd, thread: Some(thread) })
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// The vCPU's descriptor; free while its thread is parked.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn kick(&self) {
        self.thread.iter().for_each(kick_thread);
    }
}

fn kick_thread(thread: &JoinHandle<()>) {
    if !thread.is_finished()
        && let Err(e) = thread.kill(kick::signal())
    {
        tracing::debug!("a vCPU's thread that ends was kicked: {e}");
    }
}

/// Stops all vCPUs and waits until each is parked; names one that does not stop.
pub(crate) fn pause_all(gate: &Gate, vcpus: &[Vcpu]) -> Result<(), u32> {
    gate.set(Mode::Pause);
    let mut busy = 0;
    for _ in 0..STOP_KICKS {
        vcpus.iter().for_each(Vcpu::kick);
        let parked = gate.all_parked(KICK_AGAIN);
        // A thread that ended counts as parked nowhere else, and its vCPU has not run.
        if let Some(ended) = vcpus.iter().find(|vcpu| vcpu.has_ended()) {
            return Err(ended.id);
        }
        if parked {
            return Ok(());
        }
        busy = vcpus.iter().find(|vcpu| vcpu.fd.try_lock().is_err()).map_or(0, Vcpu::id);
        tracing::warn!(vcpu = busy, "a vCPU does not leave the guest; kicking it again");
    }
    Err(busy)
}

/// Ends all threads, and joins them. One that does not leave the guest is left behind.
pub(crate) fn end_all(gate: &Gate, vcpus: &mut [Vcpu]) {
    gate.set(Mode::Quit);
    let threads = vcpus.iter_mut().filter_map(|vcpu| vcpu.thread.take()).collect();
    end_threads(threads, END_KICKS);
}

/// A thread that is left behind owns all that it can reach, its vCPU and by [`Shared`] the VM, its rings and guest
/// memory; so whenever it comes out, it finds them there, and then the closed gate. Returns how many were left.
fn end_threads(threads: Vec<JoinHandle<()>>, kicks: u32) -> usize {
    for _ in 0..kicks {
        threads.iter().for_each(kick_thread);
        if threads.iter().all(JoinHandle::is_finished) {
            break;
        }
        std::thread::sleep(END_AGAIN);
    }
    let (ended, left): (Vec<_>, Vec<_>) = threads.into_iter().partition(JoinHandle::is_finished);
    for thread in ended {
        let name = thread.thread().name().unwrap_or_default().to_owned();
        if thread.join().is_err() {
            tracing::error!("the thread {name} had panicked");
        }
    }
    for thread in &left {
        let name = thread.thread().name().unwrap_or_default();
        tracing::error!(
            "the thread {name} does not leave the guest; it keeps the guest's memory until this process ends: \
             restart the process"
        );
    }
    left.len()
}

/// What to do after an exit.
enum Next {
    Enter,
    /// Came back without an answer to give: the tick, a kick, or nothing left to settle.
    Interrupted,
    /// Nothing before the cut.
    Wait,
    /// Nothing before the output was taken.
    WaitForOutput,
}

/// The thread's side.
struct Worker {
    id: u32,
    fd: Arc<Mutex<VcpuFd>>,
    shared: Arc<Shared>,
    /// The access that the last KVM_RUN came back with, which the next one completes.
    half_done: Cell<Option<Access>>,
}

impl Worker {
    fn main(self, started: &SyncSender<io::Result<()>>) {
        let immediate_exit = {
            let mut fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
            std::ptr::from_mut(&mut fd.get_kvm_run().immediate_exit).cast::<AtomicU8>().cast_const()
        };
        // SAFETY: the flag lies in the vCPU's `kvm_run` mapping, which `self.fd` keeps until after the
        // registration is dropped: locals are dropped before `self`.
        let _registration = unsafe { Registration::new(immediate_exit) };
        let period = self.shared.cadence.period.filter(|_| self.shared.tracker.has_rings());
        let ticker = period.map(Ticker::new).transpose();
        let (ticker, made) = ticker.map_or_else(|e| (None, Err(e)), |ticker| (ticker, Ok(())));
        let usable = made.is_ok();
        if started.send(made).is_err() || !usable {
            return;
        }
        let _watch = Watch { shared: &self.shared, vcpu: self.id };
        while self.shared.gate.leave_parking() {
            let mut fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
            ticker.iter().for_each(Ticker::start);
            self.run(&mut fd);
            ticker.iter().for_each(Ticker::stop);
            self.settle(&mut fd);
            drop(fd);
            self.shared.gate.park();
        }
    }

    /// Runs the guest until the gate closes.
    fn run(&self, fd: &mut VcpuFd) {
        let shared = &*self.shared;
        while shared.gate.is_open() {
            if shared.is_held() {
                shared.gate.wait_for_cut(|| false);
                continue;
            }
            if let Some(loss) = self.before_entry() {
                shared.events.raise(GuestEvent::TrackingLost(loss));
                shared.gate.wait_for_cut(|| false);
                continue;
            }
            match self.enter(fd) {
                Next::Enter => {}
                Next::Interrupted => self.tick(fd),
                Next::Wait => shared.gate.wait_for_cut(|| false),
                Next::WaitForOutput => {
                    shared.events.raise(GuestEvent::OutputFull);
                    shared.gate.wait_for_cut(|| !shared.egress.is_full());
                }
            }
        }
    }

    /// Completes what KVM has half done. Each KVM_RUN with `immediate_exit` makes one step of it.
    fn settle(&self, fd: &mut VcpuFd) {
        loop {
            if let Some(access) = self.half_done.get() {
                self.shared.settled.count(access);
            }
            fd.set_kvm_immediate_exit(1);
            match self.enter(fd) {
                Next::Enter | Next::WaitForOutput => {}
                Next::Interrupted | Next::Wait => break,
            }
        }
        fd.set_kvm_immediate_exit(0);
    }

    fn before_entry(&self) -> Option<TrackingLoss> {
        let tracker = &self.shared.tracker;
        if !tracker.has_rings() {
            return None;
        }
        if self.shared.cadence.quarter {
            self.checked(tracker.before_entry(self.id));
        }
        tracker.loss()
    }

    /// The flag is cleared first: a signal that comes after that is seen by the next KVM_RUN.
    fn tick(&self, fd: &mut VcpuFd) {
        fd.set_kvm_immediate_exit(0);
        if self.shared.tracker.has_rings() && self.shared.cadence.period.is_some() {
            self.checked(self.shared.tracker.harvest(self.id).map(drop));
        }
    }

    /// One KVM_RUN and the answer to what it asks.
    fn enter(&self, fd: &mut VcpuFd) -> Next {
        let devices = &self.shared.devices;
        let exit = vcpu_exit::run(fd);
        self.half_done.set(match exit {
            Exit::PortIn { .. } | Exit::PortOut { .. } => Some(Access::Port),
            Exit::MmioRead { .. } | Exit::MmioWrite { .. } => Some(Access::Mmio),
            _ => None,
        });
        let failure = match exit {
            Exit::Interrupted => return Next::Interrupted,
            Exit::PortIn { port, size, data } => {
                for access in data.chunks_mut(size) {
                    self.checked(devices.port_read(port, access));
                }
                return Next::Enter;
            }
            Exit::PortOut { port, size, data } => return self.port_out(port, size, data),
            Exit::MmioRead { address, data } => {
                devices.mmio_read(address, data);
                return Next::Enter;
            }
            Exit::MmioWrite { address, data } => {
                devices.mmio_write(address, data);
                return Next::Enter;
            }
            Exit::RingFull => {
                self.checked(self.shared.tracker.ring_full(self.id));
                return Next::Enter;
            }
            Exit::Shutdown => {
                self.shared.ask(Lifecycle::Reset(ResetCause::TripleFault));
                return Next::Wait;
            }
            Exit::Internal { suberror, instruction } => {
                let (rip, instruction) = self.faulting(fd, instruction);
                GuestFailure::Internal { vcpu: self.id, suberror, rip, instruction }
            }
            Exit::FailEntry(reason) => GuestFailure::Entry { vcpu: self.id, reason },
            Exit::Other(what) => GuestFailure::Run { vcpu: self.id, what },
        };
        self.shared.fail(failure);
        Next::Wait
    }

    fn port_out(&self, port: u16, size: usize, data: &[u8]) -> Next {
        for access in data.chunks(size) {
            match self.shared.devices.port_write(port, access) {
                // The pending request keeps every vCPU from entering; this one completes its OUT first.
                Ok(Some(lifecycle)) => self.shared.ask(lifecycle),
                other => self.checked(other.map(drop)),
            }
        }
        if self.shared.egress.is_full() { Next::WaitForOutput } else { Next::Enter }
    }

    /// Where the vCPU stands, and the code there if KVM did not say.
    fn faulting(&self, fd: &VcpuFd, mut instruction: Vec<u8>) -> (u64, Vec<u8>) {
        let rip = fd.get_regs().map_or(0, |regs| regs.rip);
        if instruction.is_empty()
            && let Ok(at) = fd.translate_gva(rip)
            && at.valid != 0
        {
            instruction.resize(15, 0);
            let read =
                self.shared.memory.ram().read_slice(&mut instruction, GuestAddress(at.physical_address));
            if read.is_err() {
                instruction.clear();
            }
        }
        (rip, instruction)
    }

    /// KVM refusing what it has always taken ends the guest here, with its words.
    fn checked(&self, result: io::Result<()>) {
        if let Err(e) = result {
            self.shared.fail(GuestFailure::Run { vcpu: self.id, what: e.to_string() });
        }
    }
}

/// Tells when a vCPU's thread ends by a panic: an own bug, which must not look like a guest that is silent.
struct Watch<'a> {
    shared: &'a Shared,
    vcpu: u32,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let what = "its thread has panicked".to_owned();
            self.shared.fail(GuestFailure::Run { vcpu: self.vcpu, what });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::end_threads;
    use crate::kick;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_thread_that_does_not_end_is_left_behind_and_others_are_joined() {
        kick::install();
        let (release, released) = mpsc::channel::<()>();
        let stuck = std::thread::spawn(move || {
            assert!(released.recv_timeout(Duration::from_secs(60)).is_err(), "nobody sends");
        });
        let free = std::thread::spawn(|| {});
        assert_eq!(end_threads(vec![stuck, free], 2000), 1);
        assert_eq!(end_threads(vec![std::thread::spawn(|| {})], 300_000), 0);
        drop(release);
    }
}
