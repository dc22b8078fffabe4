//! The guest's disk in the store: the overlay in the column `disk`, over an image file that is opened here.

use colo_common::{BLOCK_SIZE, Block};
use colo_vmm::BlockSet;
use colo_vmm::disk::{Disk, FileDisk};
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::engine::{Batch, Change, Column, Durability};
use super::format::{Kind, MetaCopy, decode_block, decode_number, decode_pending_key, encode_block};
use super::{BlockRun, Store, StoreError};
use crate::disk::{DiskImage, Entries};

impl Store {
    /// Bytes of the disk that what is stored has; none without one.
    pub fn disk_bytes(&self) -> Option<u64> {
        self.meta.disk
    }

    /// Opens the image file of the guest's disk. It is made, empty, if it is not there and nothing is stored that would
    /// need it: no whole copy, and no guest that ran here.
    ///
    /// # Errors
    /// It is missing, locked, or of another size; what is stored is of another disk; an entry of the overlay is
    /// damaged; or the device fails.
    pub fn open_disk(&mut self, path: &Path, bytes: u64) -> Result<Arc<DiskImage>, StoreError> {
        // One that is open already has its file locked.
        self.disk = None;
        self.check_disk(bytes)?;
        let base = FileDisk::open_sized(path, bytes, !self.holds_disk())?;
        self.attach_disk(Arc::new(base))
    }

    /// Takes a disk whose image is open already.
    ///
    /// # Errors
    /// As [`open_disk`](Self::open_disk).
    pub fn attach_disk(&mut self, base: Arc<dyn Disk>) -> Result<Arc<DiskImage>, StoreError> {
        let bytes = base.bytes();
        self.check_disk(bytes)?;
        if self.meta.disk != Some(bytes) {
            let mut meta = self.meta.clone();
            meta.disk = Some(bytes);
            let mut batch = Batch::default();
            batch.push(Change::Clear(Column::Disk));
            self.commit(batch, meta)?;
        }
        let entries = self.read_entries(bytes / BLOCK_SIZE as u64)?;
        let disk = Arc::new(DiskImage::new(base, Arc::clone(&self.engine), entries));
        self.disk = Some(Arc::clone(&disk));
        Ok(disk)
    }

    /// The guest's disk, once it was opened.
    pub fn disk(&self) -> Option<&Arc<DiskImage>> {
        self.disk.as_ref()
    }

    /// Writes blocks into an inconsistent copy: into the image file, or into the overlay while a copy that is kept aside
    /// needs the file as it is. Not synced: [`complete`](Self::complete) is.
    ///
    /// # Errors
    /// The copy is whole or none, a block is not the guest's, or the device fails or is full.
    pub fn write_blocks<'a>(
        &mut self,
        runs: impl IntoIterator<Item = BlockRun<'a>>,
    ) -> Result<(), StoreError> {
        self.check_inconsistent("take blocks")?;
        for run in runs {
            let disk = self.disk_for(&[run])?.ok_or_else(|| self.no_such_block(run.first()))?;
            if disk.takes_seed() {
                disk.seed(run).map_err(|source| self.disk_error(source))?;
            } else {
                self.write_entries(&disk, run)?;
            }
        }
        Ok(())
    }

    fn write_entries(&mut self, disk: &DiskImage, run: BlockRun<'_>) -> Result<(), StoreError> {
        let (mut batch, mut touched) = (Batch::default(), BlockSet::new(disk.blocks()));
        for entry in disk.to_store(run) {
            let (block, page) = entry.map_err(|source| self.disk_error(source))?;
            touched.insert(block);
            batch.push(super::copy::stored_change(Column::Disk, block.0, encode_block(block, page)));
            if batch.bytes() >= self.max_batch {
                let batch = std::mem::take(&mut batch);
                disk.commit(&touched, || self.write(&batch, Durability::Unsynced))?;
                touched.clear();
            }
        }
        if batch.is_empty() {
            return Ok(());
        }
        disk.commit(&touched, || self.write(&batch, Durability::Unsynced))
    }

    /// The disk that these runs are of; none if there are none and the guest has no disk.
    pub(super) fn disk_for(&self, runs: &[BlockRun<'_>]) -> Result<Option<Arc<DiskImage>>, StoreError> {
        let blocks = self.disk.as_ref().map_or(0, |disk| disk.blocks());
        match runs.iter().find(|run| run.end().0 > blocks) {
            Some(run) => Err(self.no_such_block(run.first().max(Block(blocks)))),
            None => Ok(self.disk.clone()),
        }
    }

    pub(crate) fn disk_error(&self, source: io::Error) -> StoreError {
        StoreError::Disk { dir: self.dir.clone(), source }
    }

    fn no_such_block(&self, block: Block) -> StoreError {
        let blocks = self.disk.as_ref().map_or(0, |disk| disk.blocks());
        StoreError::NoSuchBlock { dir: self.dir.clone(), block, blocks }
    }

    /// Whether the image file has content that nobody else may have.
    fn holds_disk(&self) -> bool {
        matches!(self.meta.copy, MetaCopy::Whole(_)) || self.meta.active.is_some()
    }

    fn check_disk(&self, offered: u64) -> Result<(), StoreError> {
        let held = self.meta.disk;
        if self.holds_disk() && held != Some(offered) {
            return Err(StoreError::OtherDisk { dir: self.dir.clone(), held: held.unwrap_or(0), offered });
        }
        Ok(())
    }

    /// Reads the whole overlay once. What is damaged of it ends this, unless the copy is only a base for a new one.
    fn read_entries(&mut self, blocks: u64) -> Result<Entries, StoreError> {
        let (mut present, mut damaged) = (BlockSet::new(blocks), Batch::default());
        for entry in self.engine.scan(Column::Disk, &[]) {
            let (key, value) = entry?;
            let block = decode_number(&key).map(Block).filter(|block| block.0 < blocks);
            match block.filter(|block| decode_block(*block, &value).is_some()) {
                Some(block) => drop(present.insert(block)),
                None if self.holds_disk() => return Err(self.damaged_block(block)),
                None => damaged.push(Change::Delete(Column::Disk, key.into_vec())),
            }
        }
        if !damaged.is_empty() {
            self.write(&damaged, Durability::Unsynced)?;
        }
        let mut adopted = None;
        for entry in self.adopted_from(Kind::Block, 0) {
            let (key, value) = entry?;
            let found = decode_pending_key(&key).map(|(point, _, number)| (point, Block(number)));
            let (point, block) =
                found.filter(|(_, block)| block.0 < blocks).ok_or_else(|| self.damaged_block(None))?;
            decode_block(block, &value).ok_or_else(|| self.damaged_block(Some(block)))?;
            adopted.get_or_insert_with(|| (point, BlockSet::new(blocks))).1.insert(block);
        }
        let (aside, active) = (self.meta.previous.is_some(), self.meta.active.is_some());
        Ok(Entries { present, adopted, aside, active })
    }

    fn damaged_block(&self, block: Option<Block>) -> StoreError {
        match block {
            Some(block) => StoreError::DamagedBlock { dir: self.dir.clone(), block },
            None => self.damaged("a key of its disk"),
        }
    }
}
