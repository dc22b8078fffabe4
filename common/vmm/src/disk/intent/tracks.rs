//! What is known of each extent while a runner lives: who writes into it, up to which epoch, and when last.

use colo_common::Epoch;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::extents::count_of;

/// Extents of a chunk: 1 GiB of disk in 16 KiB, made on first use.
const CHUNK: u64 = 1024;

/// One extent.
#[derive(Default)]
struct Track {
    /// Requests that have begun and are not recorded.
    under_way: AtomicU32,
    /// The round of the cleaner in which it was used last.
    used: AtomicU32,
    /// The newest epoch that something in it was recorded in.
    newest: AtomicU64,
}

/// All of a disk's.
pub(super) struct Tracks {
    chunks: Vec<OnceLock<Box<[Track]>>>,
}

impl Tracks {
    pub(super) fn new(disk_bytes: u64) -> Self {
        let chunks = count_of(disk_bytes).div_ceil(CHUNK);
        Self { chunks: (0..chunks).map(|_| OnceLock::new()).collect() }
    }

    fn of(&self, extent: u64) -> &Track {
        let made = || (0..CHUNK).map(|_| Track::default()).collect();
        &self.chunks[(extent / CHUNK) as usize].get_or_init(made)[(extent % CHUNK) as usize]
    }

    /// A request into them begins.
    pub(super) fn begin(&self, extents: Range<u64>, round: u32) {
        for extent in extents {
            let track = self.of(extent);
            // Before anybody asks whether the extent is named: see `IntentLog::forget`.
            track.under_way.fetch_add(1, Ordering::SeqCst);
            track.used.store(round, Ordering::Relaxed);
        }
    }

    /// It is in `epoch`.
    ///
    /// # Panics
    /// None had begun.
    pub(super) fn end(&self, extents: Range<u64>, epoch: Epoch) {
        for extent in extents {
            let track = self.of(extent);
            track.newest.fetch_max(epoch.0, Ordering::SeqCst);
            let before = track.under_way.fetch_sub(1, Ordering::SeqCst);
            assert!(before > 0, "a change of extent {extent} ends that never began");
        }
    }

    /// Used in this round, by nobody yet.
    pub(super) fn touch(&self, extent: u64, round: u32) {
        self.of(extent).used.store(round, Ordering::Relaxed);
    }

    /// Nobody writes into it, and nothing in it is newer than this.
    pub(super) fn is_within(&self, extent: u64, acked: Epoch) -> bool {
        let track = self.of(extent);
        // In this order: a request that ends in between has left its epoch.
        track.under_way.load(Ordering::SeqCst) == 0 && track.newest.load(Ordering::SeqCst) <= acked.0
    }

    /// Rounds since it was used.
    pub(super) fn age(&self, extent: u64, round: u32) -> u32 {
        round.wrapping_sub(self.of(extent).used.load(Ordering::Relaxed))
    }
}
