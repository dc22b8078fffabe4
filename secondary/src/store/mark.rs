//! The mark: what makes a copy whole, and moves it from point to point.
//!
//! A mark of few pages is one synced batch. A larger one writes them to `pending` first, which its batch adopts.

use colo_common::limits::MAX_MACHINE_STATE;
use colo_common::{Gfn, History, Point, ReplicaId};
use std::time::SystemTime;
use xxhash_rust::xxh3::xxh3_64;

use super::engine::{Batch, Change, Column};
use super::format::{EpochPart, EpochRecord, Kind, MetaCopy, MetaWhole, checksum, encode_value, epoch_key};
use super::pending::{Changed, Delta};
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
        let mut delta = Delta::new(mark.point);
        for (gfn, content) in pages {
            if let Some(value) = self.remember(gfn, content) {
                self.add(&mut delta, Kind::Page, gfn.0, value)?;
            }
        }
        let blocks = self.add_blocks(&mut delta, disk.as_deref(), mark.blocks)?;
        let (mut batch, adopted) = delta.finish();
        batch.push(Change::Delete(Column::Epochs, epoch_key(at, EpochPart::Record)));
        batch.push(Change::Delete(Column::Epochs, epoch_key(at, EpochPart::State)));
        self.commit_mark(batch, mark, replica, Some(Changed { blocks, adopted }))
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
        let adopted = changed.as_ref().is_some_and(|changed| changed.adopted.is_some());
        meta.copy = MetaCopy::Whole(MetaWhole { point: mark.point, replica, adopted, history });
        self.commit_with(batch, meta, changed)?;
        self.record = Some(record);
        Ok(())
    }
}

fn check_size(mark: &Mark<'_>) -> Result<(), StoreError> {
    let bytes = mark.state.len();
    if bytes > MAX_MACHINE_STATE { Err(StoreError::TooLarge { bytes }) } else { Ok(()) }
}
