//! The disk's image file, its overlay in the store, and the one lock over what of them counts.

use colo_common::{BLOCK_SIZE, Block};
use colo_vmm::disk::Disk;
use colo_vmm::memory::Page;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::Entries;
use super::state::State;
use crate::store::StoreError;
use crate::store::engine::{Column, PageStore};
use crate::store::format::{Kind, decode_block, number_key, pending_key};

/// The copy of the disk.
pub(super) struct Core {
    pub(super) base: Arc<dyn Disk>,
    pub(super) engine: Arc<dyn PageStore>,
    pub(super) blocks: u64,
    pub(super) state: Mutex<State>,
    /// Blocks that are still to go into the file, as the state's last holder left them: told to whoever cannot wait for
    /// the lock.
    pub(super) to_fold: AtomicU64,
    /// Held by whoever syncs the file and removes what that made superfluous: one at a time, so that nobody's flush
    /// returns before entries are gone that another has begun to remove.
    pub(super) settling: Mutex<()>,
    /// Why nobody knows any more what is safe, or what is missing: a sync of the file has failed, a write of the store,
    /// a part of a seed, or what a mark reads. Set under the lock of the state. After it no entry is removed, nothing is
    /// taken, and no flush succeeds.
    pub(super) failure: OnceLock<String>,
}

/// The state, locked.
pub(super) struct Held<'a> {
    state: MutexGuard<'a, State>,
    to_fold: &'a AtomicU64,
}

impl Deref for Held<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.to_fold.store(self.state.to_fold(), Ordering::Relaxed);
    }
}

impl Core {
    /// Takes an image file and what `entries` say of the overlay in `engine`.
    pub(super) fn new(base: Arc<dyn Disk>, engine: Arc<dyn PageStore>, entries: Entries) -> Self {
        let blocks = base.bytes() / BLOCK_SIZE as u64;
        let state = State::new(entries);
        Self {
            base,
            engine,
            blocks,
            to_fold: AtomicU64::new(state.to_fold()),
            state: Mutex::new(state),
            settling: Mutex::new(()),
            failure: OnceLock::new(),
        }
    }

    /// The state is whole between any two calls, also of a thread that panicked.
    pub(super) fn lock(&self) -> Held<'_> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Held { state, to_fold: &self.to_fold }
    }

    /// For whoever holds the lock.
    pub(super) fn fail(&self, why: &dyn std::fmt::Display) {
        // The first reason stands: what comes after it follows from it.
        drop(self.failure.set(why.to_string()));
    }

    /// # Errors
    /// Something failed before.
    pub(super) fn check_unbroken(&self) -> io::Result<()> {
        match self.failure.get() {
            Some(why) => Err(io::Error::other(format!("it has failed before: {why}"))),
            None => Ok(()),
        }
    }

    /// A write of the store's that changes entries. While it is under way nobody removes or reads any.
    pub(super) fn write(
        &self,
        write: impl FnOnce() -> Result<(), StoreError>,
        then: impl FnOnce(&mut State),
    ) -> Result<(), StoreError> {
        let mut state = self.lock();
        match write() {
            Ok(()) => {
                then(&mut state);
                Ok(())
            }
            Err(error) => {
                // Nobody knows which entries there are now.
                self.fail(&error);
                Err(error)
            }
        }
    }

    /// What the overlay has of a block that counts; none if the file's content does.
    pub(super) fn entry(&self, state: &State, block: Block) -> io::Result<Option<Box<Page>>> {
        let value = match &state.adopted {
            Some((point, blocks)) if blocks.contains(block) => {
                self.engine.get(Column::Pending, &pending_key(*point, Kind::Block, block.0))
            }
            _ if state.present.contains(block) => self.engine.get(Column::Disk, &number_key(block.0)),
            _ => return Ok(None),
        };
        let value = value.map_err(io::Error::other)?;
        let content = value.as_deref().and_then(|value| decode_block(block, value));
        let damaged =
            || io::Error::new(io::ErrorKind::InvalidData, format!("the store's entry of {block} is damaged"));
        Ok(Some(Box::new(content.ok_or_else(damaged)?.copied().unwrap_or([0; BLOCK_SIZE]))))
    }

    /// Makes blocks of the file zero where they are not.
    pub(super) fn zero_base(&self, blocks: Range<Block>) -> io::Result<()> {
        let mut at = blocks.start;
        while at < blocks.end
            && let Some(found) = self.base.next_data(at)?.filter(|found| found.start < blocks.end)
        {
            let end = found.end.min(blocks.end);
            self.base.zero(found.start..end, true)?;
            at = end;
        }
        Ok(())
    }
}
