//! The threads that read and write the disk, so that nothing of a guest waits for it: neither a vCPU nor a cut.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::request::{Done, Request};
use crate::disk::Disk;
use colo_common::telemetry::in_node;

/// Requests at a time: one may wait for the medium while another one is served from the host's memory.
const THREADS: usize = 2;

/// A request that has ended.
pub(super) struct Ended {
    pub(super) number: u64,
    pub(super) done: Done,
    /// Filled in by whoever kept it.
    pub(super) request: Option<Request>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<(u64, Request)>,
    ended: VecDeque<Ended>,
    /// Taken by a thread and not ended.
    busy: usize,
    quit: bool,
}

struct Shared {
    disk: Arc<dyn Disk>,
    state: Mutex<State>,
    changed: Condvar,
    /// Told of every end.
    wake: Box<dyn Fn() + Send + Sync>,
}

/// The threads of one disk; they end with it, after what they were given.
pub(crate) struct IoThreads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl IoThreads {
    /// Starts them; `wake` is called whenever a request has ended.
    pub(crate) fn start(
        name: &str,
        disk: Arc<dyn Disk>,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let (state, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { disk, state, changed, wake: Box::new(wake) });
        let mut all = Self { shared, threads: Vec::new() };
        for number in 0..THREADS {
            let shared = Arc::clone(&all.shared);
            let builder = std::thread::Builder::new().name(format!("disk{number}-{name}"));
            all.threads.push(builder.spawn(in_node(move || shared.work()))?);
        }
        Ok(all)
    }

    /// Has a request done. Whoever calls has not started another one that conflicts with it.
    pub(super) fn start_request(&self, number: u64, request: &Request) {
        self.shared.disk.change_begins(request.changed());
        self.shared.state().jobs.push_back((number, request.clone()));
        self.shared.changed.notify_one();
    }

    /// What a request that has ended did is in the log.
    pub(super) fn recorded(&self, request: &Request) {
        self.shared.disk.change_recorded(request.changed());
    }

    /// The next that has ended.
    pub(super) fn ended(&self) -> Option<Ended> {
        self.shared.state().ended.pop_front()
    }

    /// Waits until all that was started has ended.
    pub(super) fn drain(&self) {
        let mut state = self.shared.state();
        while state.busy > 0 || !state.jobs.is_empty() {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some((number, request)) = state.jobs.pop_front() {
                state.busy += 1;
                drop(state);
                let done = request.run(&*self.disk);
                state = self.state();
                state.busy -= 1;
                state.ended.push_back(Ended { number, done, request: None });
                self.changed.notify_all();
                drop(state);
                (self.wake)();
                state = self.state();
            } else if state.quit {
                return;
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        self.shared.state().quit = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the disk had panicked");
            }
        }
    }
}
