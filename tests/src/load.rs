//! Other work on every core, so that nothing is shown right on an idle machine only.

use anyhow::Context;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
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
        Self::threads(1)
    }

    /// So many spinning threads per core.
    pub fn threads(per_core: usize) -> Self {
        let cores = per_core * std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
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

/// Keeps a disk busy until dropped: writes and syncs, over and over.
pub struct BusyDisk {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl BusyDisk {
    /// By a file of this path.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn at(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let bytes = vec![0x5a; 4 << 20];
            while !stopped.load(Ordering::Relaxed) {
                for part in 0..16 {
                    file.write_all_at(&bytes, part * bytes.len() as u64)?;
                }
                file.sync_all()?;
            }
            Ok(())
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for BusyDisk {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Ok(Err(e))) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the busy disk was not: {e}");
        }
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
