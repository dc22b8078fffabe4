//! A synthetic guest that runs by the clock, on a thread of its own, as a KVM guest does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Pace, SyntheticConfig, SyntheticError, SyntheticGuest};
use crate::arch::x86_64::processor::{CpuMisfit, GuestCpu};
use crate::block_set::BlockSet;
use crate::devices::DiskTracking;
use crate::dirty_set::DirtySet;
use crate::egress::{Output, OutputPosition};
use crate::guest::{Cut, GuestError, GuestEvent, ProtectedGuest, Tracked, Wake};
use crate::memory::GuestMemory;
use crate::spec::GuestSpec;
use crate::state::MachineState;

/// How often the guest is let go on.
const TICK: Duration = Duration::from_millis(1);
/// Steps made up for at most after the guest could not run.
const MOST_STEPS: u64 = 400;

struct Shared {
    guest: Mutex<SyntheticGuest>,
    moved: Condvar,
    quit: AtomicBool,
}

impl Shared {
    fn guest(&self) -> MutexGuard<'_, SyntheticGuest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A synthetic guest in real time.
pub struct PacedGuest {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    spec: GuestSpec,
    memory: Arc<GuestMemory>,
}

impl PacedGuest {
    /// Makes a guest around `memory`, not booted yet.
    ///
    /// # Errors
    /// As [`SyntheticGuest::with_memory`], or no thread can be had.
    pub fn new(
        spec: GuestSpec,
        config: SyntheticConfig,
        memory: Arc<GuestMemory>,
    ) -> Result<Self, SyntheticError> {
        let step = Duration::from_nanos(config.program.step_ns);
        let guest = SyntheticGuest::with_memory(spec.clone(), config, Arc::clone(&memory))?;
        let shared = Arc::new(Shared {
            guest: Mutex::new(guest),
            moved: Condvar::new(),
            quit: AtomicBool::new(false),
        });
        let runner = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name(format!("synthetic-{}", spec.name));
        let thread = builder.spawn(move || run(&runner, step));
        let thread = thread.map_err(|e| SyntheticError::Config(format!("no thread for the guest: {e}")))?;
        Ok(Self { shared, thread: Some(thread), spec, memory })
    }
}

fn run(shared: &Shared, step: Duration) {
    let (started, mut pace) = (Instant::now(), Pace::new(step, MOST_STEPS));
    while !shared.quit.load(Ordering::Relaxed) {
        let due = pace.due(started.elapsed());
        shared.guest().advance(due);
        shared.moved.notify_all();
        std::thread::sleep(TICK);
    }
}

impl Drop for PacedGuest {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the synthetic guest's thread had panicked");
        }
    }
}

impl ProtectedGuest for PacedGuest {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    fn cpu(&self) -> Option<GuestCpu> {
        self.shared.guest().cpu()
    }

    fn check_cpu(&self, cpu: Option<&GuestCpu>) -> Result<(), CpuMisfit> {
        self.shared.guest().check_cpu(cpu)
    }

    fn boot(&mut self) -> Result<(), GuestError> {
        self.shared.guest().boot()
    }

    fn count_from(&mut self, start: OutputPosition) -> Result<(), GuestError> {
        self.shared.guest().count_from(start)
    }

    fn restore(&mut self, state: &MachineState) -> Result<(), GuestError> {
        self.shared.guest().restore(state)
    }

    fn reset(&mut self) -> Result<(), GuestError> {
        self.shared.guest().reset()
    }

    fn protect(&mut self) -> Result<(), GuestError> {
        self.shared.guest().protect()
    }

    fn unprotect(&mut self) -> Result<(), GuestError> {
        self.shared.guest().unprotect()
    }

    fn collect(&mut self, dirty: &mut DirtySet) -> Result<Tracked, GuestError> {
        self.shared.guest().collect(dirty)
    }

    fn cut(&mut self, dirty: &mut DirtySet) -> Result<Cut, GuestError> {
        self.shared.guest().cut(dirty)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.shared.guest().resume()
    }

    fn next_event(&mut self, timeout: Duration) -> Option<GuestEvent> {
        let until = Instant::now() + timeout;
        let mut guest = self.shared.guest();
        loop {
            if let Some(event) = guest.next_event(Duration::ZERO) {
                return Some(event);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.shared.moved.wait_timeout(guest, left);
            guest = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn console_input(&mut self, bytes: &[u8]) -> usize {
        self.shared.guest().console_input(bytes)
    }

    fn console_input_offset(&self) -> u64 {
        self.shared.guest().console_input_offset()
    }

    fn on_event(&mut self, wake: Wake) {
        self.shared.guest().on_event(wake);
    }

    fn power_button(&mut self) {
        self.shared.guest().power_button();
    }

    fn drain_output(&mut self) -> Output {
        self.shared.guest().drain_output()
    }

    fn track_disk(&mut self, tracking: DiskTracking) {
        self.shared.guest().track_disk(tracking);
    }

    fn collect_blocks(&mut self) -> (BlockSet, usize) {
        self.shared.guest().collect_blocks()
    }
}
