//! Other work on every core, so that nothing is shown right on an idle machine only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Keeps every core busy until dropped.
pub struct Busy {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    /// One spinning thread per core.
    pub fn every_core() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let stop = Arc::new(AtomicBool::new(false));
        let spin = |stop: Arc<AtomicBool>| {
            std::thread::spawn(move || {
                let mut value = 1_u64;
                while !stop.load(Ordering::Relaxed) {
                    (0..10_000)
                        .for_each(|n| value = std::hint::black_box(value.wrapping_mul(31).wrapping_add(n)));
                }
            })
        };
        Self { threads: (0..cores).map(|_| spin(Arc::clone(&stop))).collect(), stop }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a busy thread had panicked");
            }
        }
    }
}
