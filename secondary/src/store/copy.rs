//! A copy's beginning and end: a seed or resync starts and fills it, a promotion takes it away.

use colo_common::{Gfn, Term};

use super::engine::{Batch, Change, Column, Durability};
use super::format::{Kind, MetaCopy, number_key, promotion_point};
use super::pending::Delta;
use super::{BlockRun, PageContent, Store, StoreError};

/// What a new copy starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// No pages: each that is not written is zero. The disk stays: it is compared by digests.
    Empty,
    /// What is stored.
    Stored,
}

impl Store {
    /// A seed or resync starts. With one synced write the copy is inconsistent, and `active` and the replica id are
    /// gone. A whole copy is kept aside until the new one is whole, if there is room; it cannot be promoted. The image
    /// file of the disk stays as it is then, for both are over it.
    ///
    /// # Errors
    /// The device fails or is full.
    pub fn begin_copy(&mut self, base: Base) -> Result<(), StoreError> {
        // Nobody adopts anything while a copy is inconsistent.
        self.fold()?;
        let mut meta = self.meta.clone();
        if let Some(point) = self.whole().map(|whole| whole.point) {
            self.keep_file(true);
            meta.previous = self.engine.keep_aside()?.then_some(point);
        } else if meta.previous.is_some() && !self.engine.has_room() {
            meta.previous = None;
        }
        let mut batch = Batch::default();
        batch.push(Change::Clear(Column::Epochs));
        if base == Base::Empty {
            batch.push(Change::Clear(Column::Pages));
        }
        meta.active = None;
        meta.copy = MetaCopy::Inconsistent;
        self.commit(batch, meta)?;
        self.disk.iter().for_each(|disk| disk.follow());
        self.keep_file(self.meta.previous.is_some());
        self.record = None;
        if base == Base::Empty {
            self.checksums = Some(Default::default());
        }
        if self.meta.previous.is_none() { self.engine.drop_aside() } else { Ok(()) }
    }

    /// Writes pages into an inconsistent copy. Not synced: [`complete`](Self::complete) is.
    ///
    /// # Errors
    /// The copy is whole or none, or the device fails or is full.
    pub fn write_pages<'a>(
        &mut self,
        pages: impl IntoIterator<Item = (Gfn, PageContent<'a>)>,
    ) -> Result<(), StoreError> {
        self.check_inconsistent("take pages")?;
        self.know_checksums()?;
        let mut batch = Batch::default();
        for (gfn, content) in pages {
            self.push_page(&mut batch, gfn, content);
            if batch.bytes() >= self.max_batch {
                self.write(&std::mem::take(&mut batch), Durability::Unsynced)?;
            }
        }
        if batch.is_empty() { Ok(()) } else { self.write(&batch, Durability::Unsynced) }
    }

    /// This node runs the guest from `term` on: one synced write with the `blocks` that the point it runs from has
    /// beyond what is stored (the disk moves on from there) and the end of the stored memory and its replica id. Do it
    /// before a vCPU runs. The copy is whole, or there is none; under the policy `memory` it may be far behind the staged
    /// point.
    /// [`reclaim`](Self::reclaim) gives the room back later. The blocks come ascending and each once; what is too much
    /// for one batch of them is in `pending` until it is folded into the image file.
    ///
    /// # Errors
    /// The copy is inconsistent, a block is not the guest's, or the device fails or is full.
    pub fn activate(&mut self, term: Term, blocks: &[BlockRun<'_>]) -> Result<(), StoreError> {
        if self.meta.copy == MetaCopy::Inconsistent {
            // A disk of two points: that of a seed, and the one before it.
            return Err(self.out_of_place("let the guest run here"));
        }
        let disk = self.disk_for(blocks)?;
        if let Some(point) = self.adopted() {
            // Blocks that a mark left in `pending` are part of the disk; its pages are of no more use.
            self.move_pending(point, Kind::Block)?;
        }
        let mut delta = Delta::new(promotion_point(term));
        let blocks = self.add_blocks(&mut delta, disk.as_deref(), blocks)?;
        let (mut batch, adopted) = delta.finish();
        batch.push(Change::Clear(Column::Pages));
        batch.push(Change::Clear(Column::Epochs));
        if adopted.is_none() {
            // Else what a mark left there goes with the last of the blocks.
            batch.push(Change::Clear(Column::Pending));
        }
        let mut meta = self.meta.clone();
        meta.term = meta.term.max(Some(term));
        meta.active = Some(term);
        meta.copy = MetaCopy::None;
        meta.previous = None;
        match disk {
            Some(disk) => disk.run(adopted, blocks, || self.commit(batch, meta))?,
            None => self.commit(batch, meta)?,
        }
        self.record = None;
        self.checksums = Some(Default::default());
        Ok(())
    }

    fn keep_file(&self, keep: bool) {
        self.disk.iter().for_each(|disk| disk.keep_file(keep));
    }

    /// Gives the room of pages that a promotion dropped back to the device, and does nothing while there are any. May
    /// take long.
    ///
    /// # Errors
    /// The device fails.
    pub fn reclaim(&mut self) -> Result<(), StoreError> {
        if self.meta.copy != MetaCopy::None {
            return Ok(());
        }
        self.engine.drop_aside()?;
        self.engine.reclaim(Column::Pages)?;
        self.engine.reclaim(Column::Pending)
    }

    /// The change of a page, with its checksum remembered.
    pub(super) fn push_page(&mut self, batch: &mut Batch, gfn: Gfn, content: PageContent<'_>) {
        if let Some(value) = self.remember(gfn, content) {
            batch.push(stored_change(Column::Pages, gfn.0, value));
        }
    }

    pub(super) fn check_inconsistent(&self, wanted: &'static str) -> Result<(), StoreError> {
        if self.meta.copy == MetaCopy::Inconsistent { Ok(()) } else { Err(self.out_of_place(wanted)) }
    }
}

/// What a value does to its column; an empty one is a delete.
pub(super) fn stored_change(column: Column, number: u64, value: Vec<u8>) -> Change {
    let key = number_key(number).to_vec();
    if value.is_empty() { Change::Delete(column, key) } else { Change::Put(column, key, value) }
}
