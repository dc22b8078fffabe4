//! The mark: what makes a copy whole, and moves it from point to point.
//!
//! A mark of few pages is one synced batch. A larger one writes its pages to `pending` first, in bounded batches and
//! unsynced; the mark's batch then adopts them by saying so in `meta`. Until [`Store::fold`] has moved them, readers
//! look there first. Folding writes the same values however often it is begun, and forgets `pending` with its last
//! batch.

use colo_common::limits::MAX_MACHINE_STATE;
use colo_common::{Block, Gfn, History, Point, ReplicaId};
use colo_vmm::BlockSet;
use std::time::SystemTime;
use xxhash_rust::xxh3::xxh3_64;

use super::engine::{Batch, Change, Column, Durability};
use super::format::{
    EpochPart, EpochRecord, Kind, MetaCopy, MetaWhole, checksum, decode_pending_key, encode_block,
    encode_value, epoch_key, pending_key,
};
use super::{BlockRun, PageContent, Store, StoreError};

/// Bytes of one batch, beside a machine state: it is held in memory twice, and delays what waits for the next sync.
pub const MAX_BATCH: usize = 8 << 20;

/// A point of the guest but its pages.
#[derive(Clone, Copy, Debug)]
pub struct Mark<'a> {
    /// The point.
    pub point: Point,
    /// The history that ends with it.
    pub history: &'a History,
    /// The encoded machine state.
    pub state: &'a [u8],
    /// Blocks written since the mark before: ascending, each once, its newest version.
    pub blocks: &'a [BlockRun<'a>],
    /// The time, for the operator to see the copy's age.
    pub now: SystemTime,
}

/// The changes of one mark, on their way to a batch or to `pending`.
struct Delta {
    point: Point,
    changes: Vec<(Kind, u64, Vec<u8>)>,
    bytes: usize,
    spilled: bool,
}

impl Delta {
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

    /// What was collected, for the mark's batch.
    fn finish(mut self) -> (Batch, bool) {
        if self.spilled {
            return (self.spill(), true);
        }
        let mut batch = Batch::default();
        for (kind, number, value) in self.changes {
            batch.push(super::copy::stored_change(column_of(kind), number, value));
        }
        (batch, false)
    }
}

/// What a mark that moves a copy on has beside its batch.
struct Changed {
    /// Blocks of the disk in it.
    blocks: BlockSet,
    /// They and its pages are in `pending`.
    adopted: bool,
}

fn column_of(kind: Kind) -> Column {
    match kind {
        Kind::Page => Column::Pages,
        Kind::Block => Column::Disk,
    }
}

impl Store {
    /// Makes an inconsistent copy whole at the mark, and forgets the one kept aside. `replica` is its new id, to be
    /// stored under the policy `disk` only.
    ///
    /// # Errors
    /// The copy is not inconsistent, the mark is too large, or the device fails or is full.
    pub fn complete(&mut self, mark: Mark<'_>, replica: Option<ReplicaId>) -> Result<(), StoreError> {
        if self.meta.copy != MetaCopy::Inconsistent {
            return Err(self.out_of_place("complete a copy"));
        }
        check_size(&mark)?;
        self.write_blocks(mark.blocks.iter().copied())?;
        self.know_checksums()?;
        if let Some(disk) = &self.disk {
            // What the seed wrote into the file is synced, and stale entries are gone, before the copy is said to be whole.
            disk.settle().map_err(|source| self.disk_error(source))?;
        }
        self.commit_mark(Batch::default(), mark, replica, None)?;
        self.disk.iter().for_each(|disk| disk.keep_file(false));
        self.engine.drop_aside()
    }

    /// Moves a whole copy on to the mark, synced. `pages` are those of all points since the mark before, of each its
    /// newest version.
    ///
    /// # Errors
    /// The copy is not whole or not older, the mark is too large, or the device fails or is full. The store holds
    /// the point before or, after a failed write, perhaps the new one.
    pub fn persist<'a>(
        &mut self,
        pages: impl IntoIterator<Item = (Gfn, PageContent<'a>)>,
        mark: Mark<'_>,
    ) -> Result<(), StoreError> {
        let Some(whole) = self.whole() else { return Err(self.out_of_place("go on to a point")) };
        let (at, replica) = (whole.point, whole.replica);
        if at >= mark.point {
            return Err(StoreError::NotLater { dir: self.dir.clone(), at, offered: mark.point });
        }
        check_size(&mark)?;
        let disk = self.disk_for(mark.blocks)?;
        self.know_checksums()?;
        self.fold()?;
        let mut delta = Delta { point: mark.point, changes: Vec::new(), bytes: 0, spilled: false };
        for (gfn, content) in pages {
            if let Some(value) = self.remember(gfn, content) {
                self.add(&mut delta, Kind::Page, gfn.0, value)?;
            }
        }
        let mut touched = BlockSet::new(disk.as_ref().map_or(0, |disk| disk.blocks()));
        for entry in disk.iter().flat_map(|disk| mark.blocks.iter().flat_map(|run| disk.to_store(*run))) {
            let (block, page) = entry.map_err(|source| self.disk_error(source))?;
            touched.insert(block);
            self.add(&mut delta, Kind::Block, block.0, encode_block(block, page))?;
        }
        let (mut batch, adopted) = delta.finish();
        batch.push(Change::Delete(Column::Epochs, epoch_key(at, EpochPart::Record)));
        batch.push(Change::Delete(Column::Epochs, epoch_key(at, EpochPart::State)));
        self.commit_mark(batch, mark, replica, Some(Changed { blocks: touched, adopted }))
    }

    /// Moves what a large mark left in `pending` to where it belongs. [`persist`](Self::persist) does it too; done
    /// before, in an idle moment, it does not delay the next mark.
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
        self.write(&batch, Durability::Unsynced)?;
        self.meta = meta;
        self.disk.iter().for_each(|disk| disk.moved());
        Ok(())
    }

    /// The point whose mark is in `pending` in part.
    pub(super) fn adopted(&self) -> Option<Point> {
        self.whole().filter(|whole| whole.adopted).map(|whole| whole.point)
    }

    /// Copies what is in `pending` to where it belongs: from this kind on, pages before blocks.
    pub(super) fn move_pending(&mut self, point: Point, from: Kind) -> Result<(), StoreError> {
        let mut from = Some(pending_key(point, from, 0).to_vec());
        while let Some(key) = from {
            let (batch, blocks, next) = self.fold_batch(&key)?;
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
    fn fold_batch(&self, from: &[u8]) -> Result<(Batch, BlockSet, Option<Vec<u8>>), StoreError> {
        let known = self.disk.as_ref().map_or(0, |disk| disk.blocks());
        let (mut batch, mut blocks) = (Batch::default(), BlockSet::new(known));
        for entry in self.engine.scan(Column::Pending, from) {
            let (key, value) = entry?;
            if batch.bytes() >= self.max_batch {
                return Ok((batch, blocks, Some(key.into_vec())));
            }
            let (_, kind, number) =
                decode_pending_key(&key).ok_or_else(|| self.damaged("a key of its pending writes"))?;
            if kind == Kind::Block && number < known {
                blocks.insert(Block(number));
            }
            batch.push(super::copy::stored_change(column_of(kind), number, value.into_vec()));
        }
        Ok((batch, blocks, None))
    }

    fn add(&mut self, delta: &mut Delta, kind: Kind, number: u64, value: Vec<u8>) -> Result<(), StoreError> {
        delta.push(kind, number, value);
        if delta.bytes >= self.max_batch {
            self.write(&delta.spill(), Durability::Unsynced)?;
        }
        Ok(())
    }

    /// The stored form of a page, empty for zeroes; nothing if it was zero and stays so. Its checksum is remembered.
    pub(super) fn remember(&mut self, gfn: Gfn, content: PageContent<'_>) -> Option<Vec<u8>> {
        let sums = self.checksums.as_mut().expect("they are read before pages are written");
        match content {
            PageContent::Bytes(page) if page.iter().any(|&byte| byte != 0) => {
                let sum = checksum(gfn.0, page);
                sums.set(gfn, sum);
                Some(encode_value(sum, page))
            }
            _ => {
                let was_zero = sums.of(gfn) == 0;
                sums.set(gfn, 0);
                (!was_zero).then(Vec::new)
            }
        }
    }

    fn commit_mark(
        &mut self,
        mut batch: Batch,
        mark: Mark<'_>,
        replica: Option<ReplicaId>,
        changed: Option<Changed>,
    ) -> Result<(), StoreError> {
        let sums = self.checksums.as_ref().expect("they are read before a mark is written");
        assert_eq!(mark.history.tip(), Some(mark.point), "a mark is the tip of its history");
        let now = mark.now.duration_since(SystemTime::UNIX_EPOCH);
        let record = EpochRecord {
            pages: sums.pages(),
            digest: sums.digest(),
            state_bytes: mark.state.len() as u64,
            state_checksum: xxh3_64(mark.state),
            unix_ms: now.map_or(0, |since| since.as_millis() as u64),
        };
        batch.push(Change::Put(Column::Epochs, epoch_key(mark.point, EpochPart::Record), record.encode()));
        batch.push(Change::Put(Column::Epochs, epoch_key(mark.point, EpochPart::State), mark.state.to_vec()));
        let mut meta = self.meta.clone();
        meta.previous = None;
        let history = mark.history.points().to_vec();
        let adopted = changed.as_ref().is_some_and(|changed| changed.adopted);
        meta.copy = MetaCopy::Whole(MetaWhole { point: mark.point, replica, adopted, history });
        match self.disk.clone().zip(changed) {
            Some((disk, changed)) if adopted => {
                disk.adopt(mark.point, changed.blocks, || self.commit(batch, meta))?;
            }
            Some((disk, changed)) => disk.commit(&changed.blocks, || self.commit(batch, meta))?,
            None => self.commit(batch, meta)?,
        }
        self.record = Some(record);
        Ok(())
    }
}

fn check_size(mark: &Mark<'_>) -> Result<(), StoreError> {
    let bytes = mark.state.len();
    if bytes > MAX_MACHINE_STATE { Err(StoreError::TooLarge { bytes }) } else { Ok(()) }
}
