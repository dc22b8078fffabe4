//! The image: a guest's memory as of exactly one point, changed only by whole epochs.

use colo_common::Point;
use colo_vmm::memory::{GuestMemory, MemoryError};
use std::sync::Arc;

use crate::staging::{StagedEpoch, StagedPart};

/// Guest memory at one point.
#[derive(Debug)]
pub struct Image {
    memory: Arc<GuestMemory>,
    /// Nothing while a seed or resync writes into the memory.
    point: Option<Point>,
}

/// Why an epoch cannot be applied; the image is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The epoch does not follow the image's.
    #[error("the image is at {at:?}, so {offered} with base {base:?} cannot be applied")]
    OutOfOrder {
        /// Where the image is.
        at: Option<Point>,
        /// What was offered.
        offered: Point,
        /// What that follows.
        base: Option<Point>,
    },
    /// It cannot be read, to be compared.
    #[error("the image cannot be read: {0}")]
    Unreadable(#[source] std::io::Error),
    /// A page that the guest does not have.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl Image {
    /// Takes memory that holds the whole content of `point`, or that a seed is about to fill.
    pub fn new(memory: Arc<GuestMemory>, point: Option<Point>) -> Self {
        Self { memory, point }
    }

    /// The point that it holds.
    pub fn point(&self) -> Option<Point> {
        self.point
    }

    /// Its memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Goes on to the epoch's point. Every frame is checked before the first byte is written.
    ///
    /// # Errors
    /// The epoch does not follow, or a frame is not guest memory; nothing was changed then.
    pub fn apply(&mut self, epoch: &StagedEpoch) -> Result<(), ApplyError> {
        if epoch.base != self.point {
            let (at, offered, base) = (self.point, epoch.point, epoch.base);
            return Err(ApplyError::OutOfOrder { at, offered, base });
        }
        for (first, count) in epoch.parts.iter().flat_map(|part| part.runs()) {
            for gfn in [first, colo_common::Gfn(first.0.saturating_add(count - 1))] {
                self.memory.check_frame(gfn)?;
            }
        }
        // From here on, nothing but the host running out of memory stops it, and that ends the process.
        self.point = None;
        for part in &epoch.parts {
            part.write_to(&self.memory)?;
        }
        self.point = Some(epoch.point);
        Ok(())
    }

    /// A seed or resync begins: the memory holds no point from now on.
    ///
    /// # Errors
    /// The host does not take memory back.
    pub fn begin_seed(&mut self, keep: bool) -> Result<(), MemoryError> {
        self.point = None;
        if keep { Ok(()) } else { self.memory.discard_all() }
    }

    /// Writes a part of a seed.
    ///
    /// # Errors
    /// A frame is not guest memory.
    ///
    /// # Panics
    /// No seed is going on: an own bug.
    pub fn write_seed(&mut self, part: &StagedPart) -> Result<(), MemoryError> {
        assert!(self.point.is_none(), "pages of a seed for an image at {:?}", self.point);
        part.write_to(&self.memory)
    }

    /// Gives the memory away, as to a guest that runs on from it.
    pub fn into_memory(self) -> Arc<GuestMemory> {
        self.memory
    }
}
