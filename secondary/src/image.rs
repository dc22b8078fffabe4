//! The image: a guest's memory as of exactly one epoch, changed only by whole dirty sets.

use colo_common::{Epoch, Gfn};
use colo_vmm::memory::{GuestMemory, MemoryError, Page};
use std::sync::Arc;

/// Guest memory at one epoch.
#[derive(Debug)]
pub struct Image {
    memory: Arc<GuestMemory>,
    epoch: Epoch,
}

/// Pages of one epoch, in any order, each frame once.
pub type Pages = Vec<(Gfn, Box<Page>)>;

/// Why an epoch cannot be applied; the image is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The epoch does not follow the image's.
    #[error("the image is at {at}, so {offered} cannot be applied")]
    OutOfOrder {
        /// Where the image is.
        at: Epoch,
        /// What was offered.
        offered: Epoch,
    },
    /// A page that the guest does not have.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl Image {
    /// Takes memory that holds the whole content of `epoch`.
    pub fn new(memory: Arc<GuestMemory>, epoch: Epoch) -> Self {
        Self { memory, epoch }
    }

    /// The epoch that it holds.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Its memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Goes on to `epoch`. Every frame is checked before the first byte is written.
    ///
    /// # Errors
    /// The epoch is not the next one, or a frame is not guest memory; nothing was changed then.
    pub fn apply(&mut self, epoch: Epoch, pages: &Pages) -> Result<(), ApplyError> {
        if epoch != self.epoch.next() {
            return Err(ApplyError::OutOfOrder { at: self.epoch, offered: epoch });
        }
        for (gfn, _) in pages {
            self.memory.check_frame(*gfn)?;
        }
        for (gfn, page) in pages {
            self.memory.write_page(*gfn, page)?;
        }
        self.epoch = epoch;
        Ok(())
    }

    /// Gives the memory away, as to a guest that runs on from it.
    pub fn into_memory(self) -> Arc<GuestMemory> {
        self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::{ApplyError, Image};
    use colo_common::{Epoch, Gfn, PAGE_SIZE};
    use colo_vmm::memory::GuestMemory;
    use std::sync::Arc;

    #[test]
    fn an_epoch_is_applied_whole_and_in_order_or_not_at_all() {
        let mut image = Image::new(Arc::new(GuestMemory::new(1 << 20).unwrap()), Epoch(4));
        let page = || Box::new([7; PAGE_SIZE]);
        let empty = image.memory().digest().unwrap();
        let skipped = image.apply(Epoch(6), &vec![(Gfn(1), page())]);
        assert!(matches!(skipped, Err(ApplyError::OutOfOrder { .. })));
        let beyond = image.apply(Epoch(5), &vec![(Gfn(1), page()), (Gfn(1 << 20), page())]);
        assert!(matches!(beyond, Err(ApplyError::Memory(_))));
        assert_eq!((image.epoch(), image.memory().digest().unwrap()), (Epoch(4), empty));
        image.apply(Epoch(5), &vec![(Gfn(1), page())]).unwrap();
        assert_eq!(image.epoch(), Epoch(5));
        assert_ne!(image.memory().digest().unwrap(), empty);
    }
}
