//! How entries leave the overlay: copied into the image file, and removed once that is synced.

use colo_common::Block;
use colo_vmm::page_batch::is_zero;
use std::io;
use std::sync::PoisonError;

use super::Core;
use crate::store::engine::{Batch, Change, Column, Durability};
use crate::store::format::number_key;

/// Entries removed from the overlay at once: what a mark has to wait for meanwhile.
const MAX_REMOVED: usize = 1024;

impl Core {
    /// Copies entries into the file, and removes them once it is synced.
    pub(super) fn fold(&self, most: usize) -> io::Result<u64> {
        let mut copied = 0;
        while copied < most as u64 {
            let mut state = self.lock();
            if state.aside || state.adopted.is_some() {
                break;
            }
            self.check_unbroken()?;
            let Some(block) = state.present.next(state.cursor) else {
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
        if copied > 0 || !self.lock().superseded.is_empty() {
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
        Ok(())
    }

    /// Removes some of the entries that were superseded before the sync and were not renewed; whether there are more.
    fn remove_synced(&self) -> io::Result<bool> {
        let mut state = self.lock();
        let blocks: Vec<Block> = state.syncing.iter().take(MAX_REMOVED).collect();
        let mut batch = Batch::default();
        for block in &blocks {
            batch.push(Change::Delete(Column::Disk, number_key(block.0).to_vec()));
        }
        let more = state.syncing.len() > blocks.len() as u64;
        if batch.is_empty() {
            return Ok(false);
        }
        // While following, an entry that comes back after a crash is what the file holds. Under a guest that runs, it
        // would hide what that wrote; the last of them is synced, and all before it with it.
        let durability = if state.active && !more { Durability::Synced } else { Durability::Unsynced };
        if let Err(error) = self.engine.write(&batch, durability) {
            self.fail(&error);
            return Err(io::Error::other(error));
        }
        for block in blocks {
            state.syncing.remove(block);
        }
        Ok(more)
    }
}
