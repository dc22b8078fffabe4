//! How entries leave the overlay: copied into the image file, and removed once that is synced.

use colo_common::Block;
use colo_vmm::page_batch::is_zero;
use std::io;
use std::sync::PoisonError;

use super::Core;
use crate::store::engine::{Batch, Change, Column, Durability};
use crate::store::format::{Kind, number_key, pending_key};

/// Entries removed from the overlay at once: what a mark has to wait for meanwhile.
const MAX_REMOVED: usize = 1024;

impl Core {
    /// Copies entries into the file, and removes them once it is synced.
    pub(super) fn fold(&self, most: usize) -> io::Result<u64> {
        let mut copied = 0;
        while copied < most as u64 {
            let mut state = self.lock();
            // Of a copy, they are moved with the pages of their mark.
            if state.aside || (state.adopted.is_some() && !state.active) {
                break;
            }
            self.check_unbroken()?;
            let Some(block) = state.next_counting(state.cursor) else {
                // Blocks that are written again and again are folded once a round.
                state.cursor = Block(0);
                break;
            };
            let page = self.entry(&state, block)?;
            match page.filter(|page| !is_zero(page)) {
                Some(page) => self.base.write(block.offset(), &page[..])?,
                None => self.base.zero(block..Block(block.0 + 1), true)?,
            }
            state.supersede(block..Block(block.0 + 1));
            state.cursor = Block(block.0 + 1);
            copied += 1;
        }
        let due = {
            let state = self.lock();
            copied > 0 || state.seeded > 0 || !state.superseded.is_empty()
        };
        if due {
            self.settle()?;
        }
        Ok(copied)
    }

    pub(super) fn settle(&self) -> io::Result<()> {
        let _alone = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut state = self.lock();
            self.check_unbroken()?;
            state.begin_sync();
        }
        if let Err(error) = self.base.flush() {
            let mut state = self.lock();
            state.sync_failed();
            self.fail(&format_args!("a sync of the image file failed: {error}"));
            return Err(error);
        }
        while self.remove_synced()? {}
        self.forget_pending()
    }

    /// Once nothing of what a promotion left in `pending` counts, what a mark left there goes with it.
    fn forget_pending(&self) -> io::Result<()> {
        let mut state = self.lock();
        let over = state.adopted.as_ref().is_some_and(|(_, left)| left.is_empty());
        if !state.active || !over || !state.superseded.is_empty() || !state.syncing.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::default();
        batch.push(Change::Clear(Column::Pending));
        // If it is lost, the next start does it.
        self.remove(&batch, Durability::Unsynced)?;
        state.moved();
        Ok(())
    }

    fn remove(&self, batch: &Batch, durability: Durability) -> io::Result<()> {
        self.engine.write(batch, durability).map_err(|error| {
            self.fail(&error);
            io::Error::other(error)
        })
    }

    /// Removes some of the entries that were superseded before the sync and were not renewed; whether there are more.
    fn remove_synced(&self) -> io::Result<bool> {
        let mut state = self.lock();
        let blocks: Vec<Block> = state.syncing.iter().take(MAX_REMOVED).collect();
        let mut batch = Batch::default();
        for block in &blocks {
            batch.push(Change::Delete(Column::Disk, number_key(block.0).to_vec()));
            if let Some((point, left)) = state.adopted.as_ref().filter(|_| state.active) {
                assert!(!left.contains(*block), "{block} is in the file, and its entry counts");
                let key = pending_key(*point, Kind::Block, block.0).to_vec();
                batch.push(Change::Delete(Column::Pending, key));
            }
        }
        let more = state.syncing.len() > blocks.len() as u64;
        if batch.is_empty() {
            return Ok(false);
        }
        // While following, an entry that comes back after a crash is what the file holds. Under a guest that runs, it
        // would hide what that wrote; the last of them is synced, and all before it with it.
        let durability = if state.active && !more { Durability::Synced } else { Durability::Unsynced };
        self.remove(&batch, durability)?;
        for block in blocks {
            state.syncing.remove(block);
        }
        Ok(more)
    }
}
