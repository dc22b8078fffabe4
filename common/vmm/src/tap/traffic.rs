//! What has passed a TAP since it was opened.

use std::sync::atomic::{AtomicU64, Ordering};

/// Frames, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// The host took them.
    pub sent: u64,
    /// They were read.
    pub received: u64,
    /// The host did not take them.
    pub lost: u64,
    /// Bytes of those that were sent, without their headers of virtio.
    pub sent_bytes: u64,
    /// The same of those that were read.
    pub received_bytes: u64,
}

/// The same while it is counted, by several threads.
#[derive(Debug, Default)]
pub(super) struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
    lost: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

impl Counts {
    pub(super) fn traffic(&self) -> Traffic {
        // Each is right for itself, and no more is asked of them.
        let now = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Traffic {
            sent: now(&self.sent),
            received: now(&self.received),
            lost: now(&self.lost),
            sent_bytes: now(&self.sent_bytes),
            received_bytes: now(&self.received_bytes),
        }
    }

    /// The host took a frame of so many bytes.
    pub(super) fn sent(&self, bytes: usize) {
        count(&self.sent, 1);
        count(&self.sent_bytes, bytes as u64);
    }

    /// A frame of so many bytes was read.
    pub(super) fn received(&self, bytes: usize) {
        count(&self.received, 1);
        count(&self.received_bytes, bytes as u64);
    }

    /// The host did not take a frame.
    pub(super) fn lost(&self) {
        count(&self.lost, 1);
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}
