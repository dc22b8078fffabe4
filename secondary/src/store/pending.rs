//! What is too large for one batch. It is written to `pending` first, in bounded batches and unsynced; the synced batch of
//! the mark or promotion that it belongs to then adopts it, by what that says in `meta`. Readers look there first.
//!
//! What a mark left there, [`Store::fold`] moves. It writes the same values however often it is begun, and forgets
//! `pending` with its last batch. What a promotion left there goes into the image file, as the rest of the overlay does.

use colo_common::{Block, Point};
use colo_vmm::BlockSet;
use std::sync::Arc;

use super::engine::{Batch, Change, Column, Durability};
use super::format::{Kind, Meta, MetaCopy, decode_pending_key, encode_block, pending_key, promotion_point};
use super::read::Entries;
use super::{BlockRun, Store, StoreError};
use crate::disk::DiskImage;

/// The changes of one synced step, on their way to its batch or to `pending`.
pub(super) struct Delta {
    point: Point,
    changes: Vec<(Kind, u64, Vec<u8>)>,
    bytes: usize,
    spilled: bool,
}

impl Delta {
    /// Nothing yet; what is too much goes under this point.
    pub(super) fn new(point: Point) -> Self {
        Self { point, changes: Vec::new(), bytes: 0, spilled: false }
    }

    fn push(&mut self, kind: Kind, number: u64, value: Vec<u8>) {
        self.bytes += size_of::<(Kind, u64, Vec<u8>)>() + value.len();
        self.changes.push((kind, number, value));
    }

    /// What was collected, as entries of `pending`.
    fn spill(&mut self) -> Batch {
        let mut batch = Batch::default();
        for (kind, number, value) in self.changes.drain(..) {
            let key = pending_key(self.point, kind, number).to_vec();
            batch.push(Change::Put(Column::Pending, key, value));
        }
        self.bytes = 0;
        self.spilled = true;
        batch
    }

    /// What was collected, for the step's batch; and the point under which the step adopts what is in `pending`.
    pub(super) fn finish(mut self) -> (Batch, Option<Point>) {
        if self.spilled {
            return (self.spill(), Some(self.point));
        }
        let mut batch = Batch::default();
        for (kind, number, value) in self.changes {
            batch.push(super::copy::stored_change(column_of(kind), number, value));
        }
        (batch, None)
    }
}

/// What a step has beside its batch.
pub(super) struct Changed {
    /// Blocks of the disk in it.
    pub(super) blocks: BlockSet,
    /// They and its pages are in `pending` under this point.
    pub(super) adopted: Option<Point>,
}

fn column_of(kind: Kind) -> Column {
    match kind {
        Kind::Page => Column::Pages,
        Kind::Block => Column::Disk,
    }
}

impl Store {
    /// Moves what a large mark left in `pending` to where it belongs. [`persist`](Self::persist) does it too; done
    /// before, in an idle moment, it does not delay the next mark. Not for a disk that a guest writes to.
    ///
    /// # Errors
    /// The device fails or is full; nothing is lost then.
    pub fn fold(&mut self) -> Result<(), StoreError> {
        let Some(point) = self.adopted() else { return Ok(()) };
        self.move_pending(point, Kind::Page)?;
        let mut meta = self.meta.clone();
        if let MetaCopy::Whole(whole) = &mut meta.copy {
            whole.adopted = false;
        }
        let mut batch = super::meta_batch(&meta);
        batch.push(Change::Clear(Column::Pending));
        // Not synced: if it is lost, the same is folded again.
        match self.disk.clone() {
            Some(disk) => disk.moved(|| self.write(&batch, Durability::Unsynced))?,
            None => self.write(&batch, Durability::Unsynced)?,
        }
        self.meta = meta;
        Ok(())
    }

    /// The point under which entries of `pending` count, if there are any: of a mark, or of the promotion after which this
    /// node runs the guest.
    pub(super) fn adopted(&self) -> Option<Point> {
        match (&self.meta.copy, self.meta.active) {
            (MetaCopy::Whole(whole), _) => whole.adopted.then_some(whole.point),
            (MetaCopy::None, Some(term)) => Some(promotion_point(term)),
            _ => None,
        }
    }

    /// Copies what is in `pending` under a point to where it belongs: from this kind on, pages before blocks.
    pub(super) fn move_pending(&mut self, point: Point, from: Kind) -> Result<(), StoreError> {
        let mut from = Some(pending_key(point, from, 0).to_vec());
        while let Some(key) = from {
            let (batch, blocks, next) = self.fold_batch(point, &key)?;
            match self.disk.clone().filter(|_| !blocks.is_empty()) {
                Some(disk) => disk.commit(&blocks, || self.write(&batch, Durability::Unsynced))?,
                None if batch.is_empty() => {}
                None => self.write(&batch, Durability::Unsynced)?,
            }
            from = next;
        }
        Ok(())
    }

    /// One batch of `pending` from a key on, the blocks in it, and the key to go on from.
    fn fold_batch(
        &self,
        point: Point,
        from: &[u8],
    ) -> Result<(Batch, BlockSet, Option<Vec<u8>>), StoreError> {
        let known = self.disk.as_ref().map_or(0, |disk| disk.blocks());
        let (mut batch, mut blocks) = (Batch::default(), BlockSet::new(known));
        for entry in self.engine.scan(Column::Pending, from) {
            let (key, value) = entry?;
            let (at, kind, number) =
                decode_pending_key(&key).ok_or_else(|| self.damaged("a key of its pending writes"))?;
            if at != point {
                break;
            }
            if batch.bytes() >= self.max_batch {
                return Ok((batch, blocks, Some(key.into_vec())));
            }
            if kind == Kind::Block && number < known {
                blocks.insert(Block(number));
            }
            batch.push(super::copy::stored_change(column_of(kind), number, value.into_vec()));
        }
        Ok((batch, blocks, None))
    }

    /// Adds a change to those of a step; what is too much goes to `pending`.
    pub(super) fn add(
        &mut self,
        delta: &mut Delta,
        kind: Kind,
        number: u64,
        value: Vec<u8>,
    ) -> Result<(), StoreError> {
        delta.push(kind, number, value);
        if delta.bytes >= self.max_batch {
            self.write(&delta.spill(), Durability::Unsynced)?;
        }
        Ok(())
    }

    /// Adds blocks of the disk; answers which.
    pub(super) fn add_blocks(
        &mut self,
        delta: &mut Delta,
        disk: Option<&DiskImage>,
        runs: &[BlockRun<'_>],
    ) -> Result<BlockSet, StoreError> {
        let mut blocks = BlockSet::new(disk.map_or(0, DiskImage::blocks));
        for entry in disk.iter().flat_map(|disk| runs.iter().flat_map(|run| disk.to_store(*run))) {
            let (block, page) = entry.map_err(|source| self.disk_error(source))?;
            blocks.insert(block);
            self.add(delta, Kind::Block, block.0, encode_block(block, page))?;
        }
        Ok(blocks)
    }

    /// One arrow of the store's diagram, with the blocks that it brings.
    pub(super) fn commit_with(
        &mut self,
        batch: Batch,
        meta: Meta,
        changed: Option<Changed>,
    ) -> Result<(), StoreError> {
        match self.disk.clone().zip(changed) {
            Some((disk, Changed { blocks, adopted: Some(point) })) => {
                disk.adopt(point, blocks, || self.commit(batch, meta))
            }
            Some((disk, Changed { blocks, .. })) => disk.commit(&blocks, || self.commit(batch, meta)),
            None => self.commit(batch, meta),
        }
    }

    /// Entries of the adopted `pending` of one kind, from a number on; none if nothing is adopted.
    pub(super) fn adopted_from(&self, kind: Kind, number: u64) -> Entries<'_> {
        let Some(point) = self.adopted() else { return Box::new(std::iter::empty()) };
        let from = pending_key(point, kind, number);
        let of_kind =
            move |key: &[u8]| decode_pending_key(key).is_some_and(|(at, of, _)| (at, of) == (point, kind));
        let entries = self.engine.scan(Column::Pending, &from);
        Box::new(entries.take_while(move |entry| entry.as_ref().map_or(true, |(key, _)| of_kind(key))))
    }

    /// After a start: what is in `pending` and was not adopted, and a previous copy that no new one follows.
    pub(super) fn drop_leftovers(&mut self) -> Result<(), StoreError> {
        let is_any = |mut entries: Entries<'_>| entries.next().transpose().map(|first| first.is_some());
        let mut adopted = None;
        for kind in [Kind::Page, Kind::Block] {
            if is_any(self.adopted_from(kind, 0))? {
                adopted = self.adopted();
            }
        }
        match adopted {
            Some(point) => self.drop_after(point)?,
            None if is_any(self.engine.scan(Column::Pending, &[]))? => {
                let mut batch = Batch::default();
                batch.push(Change::Clear(Column::Pending));
                self.write(&batch, Durability::Unsynced)?;
            }
            None => {}
        }
        if self.meta.previous.is_none() { self.engine.drop_aside() } else { Ok(()) }
    }

    /// What a promotion wrote to `pending` that was cut off before it adopted it: after what is adopted there.
    fn drop_after(&mut self, point: Point) -> Result<(), StoreError> {
        let engine = Arc::clone(&self.engine);
        let mut batch = Batch::default();
        for entry in engine.scan(Column::Pending, &pending_key(point, Kind::Block, u64::MAX)) {
            let (key, _) = entry?;
            if decode_pending_key(&key).is_some_and(|(at, ..)| at == point) {
                continue;
            }
            batch.push(Change::Delete(Column::Pending, key.into_vec()));
            if batch.bytes() >= self.max_batch {
                self.write(&std::mem::take(&mut batch), Durability::Unsynced)?;
            }
        }
        if batch.is_empty() { Ok(()) } else { self.write(&batch, Durability::Unsynced) }
    }
}
