//! A checkpoint: the guest stands still, its machine is saved, its dirty set closed and its dirty pages copied. The
//! second step of the way of a page, and the only one that the guest waits for:
//!
//! 1. [`cut`](ProtectedGuest::cut): stop, save, harvest;
//! 2. [`copy_out`]: copy what the open dirty set names;
//! 3. [`resume`](ProtectedGuest::resume): nothing is sent before.
//!
//! Between 1 and 3 the guest may have to stand: while too many epochs are on their way, or no secondary is there to
//! take one. Pages are copied last for that reason: what failed meanwhile is in the open set too.

use colo_common::Gfn;
use colo_vmm::guest::CutTiming;
use colo_vmm::memory::MemoryError;
use colo_vmm::{Cut, DirtySet, GuestMemory, PageBatch, PagePool};
use std::time::{Duration, Instant};

/// A guest that was cut and stands still.
#[derive(Debug)]
pub struct Standing {
    /// The machine, its output, and whether the dirty set is whole.
    pub cut: Cut,
    /// When it was cut.
    pub since: Instant,
}

/// How long the guest stood still, part by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// Stopping, saving, harvesting.
    pub cut: CutTiming,
    /// Copying the dirty pages.
    pub copy: Duration,
    /// From the first kick to the resume, with what it stood for lack of room.
    pub pause: Duration,
}

/// Copies the pages of the open set out of a guest that stands still, or runs: a page that is written meanwhile is
/// reported again.
///
/// # Errors
/// The set names a page that the guest does not have: an own bug.
pub fn copy_out(
    memory: &GuestMemory,
    dirty: &DirtySet,
    pool: &PagePool,
) -> Result<(PageBatch, Duration), MemoryError> {
    let started = Instant::now();
    let runs: Vec<(Gfn, u64)> = dirty.runs().collect();
    let pages = PageBatch::copy(memory, runs, pool)?;
    Ok((pages, started.elapsed()))
}
