//! The thread that takes out of the log what has been acked.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::logged::LoggedDisk;

/// From one round to the next: a round that takes something out syncs the image, which guests' requests may feel.
pub const CLEAN_EVERY: Duration = Duration::from_secs(1);
/// After a failure, which may be for good.
const AFTER_FAILURE: Duration = Duration::from_secs(30);

/// A handle on the thread; it ends with it.
#[derive(Debug)]
pub struct Cleaner {
    /// Dropped to end it.
    end: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Cleaner {
    /// Starts it.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(disk: Arc<LoggedDisk>, every: Duration) -> io::Result<Self> {
        let (end, ended) = sync_channel::<()>(0);
        let builder = std::thread::Builder::new().name("intent".to_owned());
        let thread = builder.spawn(move || {
            let (mut pause, mut failed) = (every, false);
            while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let begun = Instant::now();
                match disk.clean() {
                    // A slow sync takes no more than half of the device's time.
                    Ok(_) => (pause, failed) = (every.max(begun.elapsed()), false),
                    Err(error) => {
                        if !failed {
                            tracing::warn!("the disk's intent log keeps what it names: {error}");
                        }
                        (pause, failed) = (AFTER_FAILURE, true);
                    }
                }
            }
        })?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that cleans the disk's intent log has panicked");
        }
    }
}
