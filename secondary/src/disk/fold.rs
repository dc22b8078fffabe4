//! The thread that folds a disk's overlay into its image file, in rounds with pauses between them: it takes no more than
//! half of a device's time, and a block that is written again and again is folded once a second. While a copy is made, its
//! rounds sync what came.

use colo_common::telemetry::in_node;
use crossbeam_channel::{RecvTimeoutError, Sender};
use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Blocks of one round, 16 MiB: between two syncs of the file.
const ROUND: usize = 4096;
/// Pause after a round that left nothing to fold.
const IDLE: Duration = Duration::from_secs(1);
/// The shortest pause, and the one after a failure: a full device may be given room.
const BREATH: Duration = Duration::from_millis(2);
const AFTER_FAILURE: Duration = Duration::from_secs(30);

/// A handle on the thread; it ends with it.
pub(super) struct Folding {
    /// Wakes it; dropped to end it.
    wake: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Folding {
    /// Starts a thread that calls `round` with the blocks that it may fold.
    pub(super) fn start(round: impl Fn(usize) -> io::Result<u64> + Send + 'static) -> io::Result<Self> {
        let (wake, woken) = crossbeam_channel::bounded::<()>(1);
        let builder = std::thread::Builder::new().name("fold".to_owned());
        let thread = builder.spawn(in_node(move || {
            let (mut pause, mut failed) = (IDLE, false);
            while woken.recv_timeout(pause) != Err(RecvTimeoutError::Disconnected) {
                let began = Instant::now();
                pause = match round(ROUND) {
                    Ok(folded) if folded as usize == ROUND => began.elapsed().max(BREATH),
                    Ok(_) => IDLE,
                    Err(error) => {
                        if !failed {
                            tracing::error!(
                                "the guest's disk is not folded into its image file: {error}; what was acked is in the store"
                            );
                        }
                        AFTER_FAILURE
                    }
                };
                failed = pause == AFTER_FAILURE;
            }
        }))?;
        Ok(Self { wake: Some(wake), thread: Some(thread) })
    }

    /// Has the next round begin now.
    pub(super) fn wake(&self) {
        // One that is waiting to be woken already will be.
        if let Some(wake) = &self.wake {
            let _ = wake.try_send(());
        }
    }
}

impl Drop for Folding {
    fn drop(&mut self) {
        drop(self.wake.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that folds the guest's disk has panicked");
        }
    }
}
