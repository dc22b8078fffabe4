//! The thread that serves virtio devices when something comes from outside: a frame, a disk request that has ended, room
//! after a cut.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Windows;
use super::net::RECEIVE;
use crate::spec::virtio::NET_SLOT;
use crate::tap::Tap;
use colo_common::telemetry::in_node;

/// What woke the thread.
const BELL: u64 = 0;
const FRAME: u64 = 1;

#[derive(Default)]
struct State {
    runs: bool,
    quit: bool,
}

/// Open while the guest runs. A round of work is done with it held, so whoever closes it waits for the round's end.
#[derive(Default)]
struct Gate {
    /// Somebody waits to close it: no round begins before that is done, however much there is to do.
    closing: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// Waits until work may be done; nothing if the thread is to end.
    fn enter(&self) -> Option<MutexGuard<'_, State>> {
        let waits = |state: &mut State| !state.quit && (!state.runs || self.closing.load(Ordering::SeqCst));
        let state = self.changed.wait_while(self.state(), waits).unwrap_or_else(PoisonError::into_inner);
        (!state.quit).then_some(state)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        self.closing.store(true, Ordering::SeqCst);
        let mut state = self.state();
        change(&mut state);
        self.closing.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread is woken by.
pub(super) fn bell() -> io::Result<Arc<EventFd>> {
    EventFd::new(EFD_NONBLOCK).map(Arc::new)
}

/// Wakes it.
pub(super) fn ring(bell: &EventFd) {
    // A bell that was rung 2^64 times and not heard is still rung.
    let _ = bell.write(1);
}

pub(super) struct Worker {
    bell: Arc<EventFd>,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread, with its gate closed.
    pub(super) fn start(
        name: &str,
        bell: Arc<EventFd>,
        tap: Option<Arc<Tap>>,
        windows: Arc<Windows>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let add =
            |fd: RawFd, what, events| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, what));
        add(bell.as_raw_fd(), BELL, EventSet::IN)?;
        if let Some(tap) = &tap {
            // Told once for what comes; a card without room for it is served again when it has some.
            add(tap.as_raw_fd(), FRAME, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        }
        let gate = Arc::new(Gate::default());
        let (work_bell, work_gate) = (Arc::clone(&bell), Arc::clone(&gate));
        let builder = std::thread::Builder::new().name(format!("virtio-{name}"));
        let thread = builder.spawn(in_node(move || {
            // Kept for as long as it is polled.
            let _tap = tap;
            work(&epoll, &work_bell, &work_gate, &windows);
        }))?;
        Ok(Self { bell, gate, thread: Some(thread) })
    }

    pub(super) fn wake(&self) {
        ring(&self.bell);
    }

    pub(super) fn pause(&self) {
        self.gate.set(|state| state.runs = false);
    }

    pub(super) fn resume(&self) {
        self.gate.set(|state| state.runs = true);
        self.wake();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.gate.set(|state| state.quit = true);
        self.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the virtio devices had panicked");
        }
    }
}

fn work(epoll: &Epoll, bell: &EventFd, gate: &Gate, windows: &Windows) {
    let mut events = [EpollEvent::default(); 2];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => {
                tracing::error!("the virtio devices cannot wait for their work: {e}");
                return;
            }
        };
        let rung = events[..count].iter().any(|event| event.data() == BELL);
        if rung {
            // Before the work: what comes after this rings again.
            let _ = bell.read();
        }
        let Some(_round) = gate.enter() else { return };
        let more = if rung { windows.serve_all() } else { windows.serve(NET_SLOT as usize, RECEIVE) };
        if more {
            ring(bell);
        }
    }
}
