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
}

/// The same while it is counted, by several threads.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) lost: AtomicU64,
}

impl Counts {
    pub(super) fn traffic(&self) -> Traffic {
        // Each is right for itself, and no more is asked of them.
        let now = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Traffic { sent: now(&self.sent), received: now(&self.received), lost: now(&self.lost) }
    }
}

/// One more.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
