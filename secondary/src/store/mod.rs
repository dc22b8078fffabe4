//! The store: one copy of a guest on disk, always at exactly one point. The last step of the way of a page
//! (staging -> persist -> store).
//!
//! ```text
//!          begin_copy               complete               persist
//!   None --------------> Inconsistent --------> Whole(point) ------> Whole(later point)
//!    |  ^                     ^                   |  |
//!    |  |                     +---- begin_copy ---+  |
//!    +--+- activate ---------------------------------+
//!         (active)
//! ```
//!
//! Every arrow is one synced batch of the [`PageStore`] below, so a crash at any instant leaves one end of it or the
//! other. What is too large for a batch is written before it to where no reader looks: into the pages of an
//! inconsistent copy, or to `pending`, which the batch of the mark or promotion adopts.
//!
//! All calls block; they are for the persist thread. A write that fails breaks the store for this process
//! ([`StoreError::Broken`]), since it is then open whether the write is found at the next opening.

mod blocks;
mod checksums;
mod copy;
pub mod engine;
mod error;
pub(crate) mod format;
mod home;
mod mark;
mod memory;
mod pending;
mod read;
mod rocks;
mod scrub;
mod summary;

pub use copy::Base;
pub use engine::PageStore;
pub use error::StoreError;
pub use format::FORMAT_VERSION;
pub use mark::{MAX_BATCH, Mark};
pub use memory::MemoryDisk;
pub use scrub::{MAX_LISTED, Scrub};
pub use summary::{StoredCopy, Summary, WholeCopy};

use colo_common::{ReplicaId, Term, VmId};
use colo_vmm::memory::Page;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Blocks of a part that came.
pub type BlockRun<'a> = colo_vmm::block_runs::BlockRun<&'a [u8]>;
/// The newest of several.
pub type NewestBlocks<'a> = colo_vmm::block_runs::NewestBlocks<&'a [u8]>;

use checksums::Checksums;
use engine::{Batch, Change, Column, Durability};
use format::{EpochPart, EpochRecord, FrameError, META_KEY, Meta, MetaCopy, MetaWhole, epoch_key};
use home::Home;
use rocks::Rocks;

use crate::disk::DiskImage;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent<'a> {
    /// Zeroes.
    Zero,
    /// These bytes; they may be zeroes too.
    Bytes(&'a Page),
}

/// The copy of one vm on this node's disk.
pub struct Store {
    engine: Arc<dyn PageStore>,
    dir: PathBuf,
    meta: Meta,
    /// The guest's disk, once it was opened.
    disk: Option<Arc<DiskImage>>,
    /// Of the persisted point; none without a whole copy.
    record: Option<EpochRecord>,
    /// Of the pages that are stored; none until they were read once.
    checksums: Option<Checksums>,
    max_batch: usize,
    broken: bool,
}

impl Store {
    /// Opens the store of `vm` in `dir`, or makes an empty one.
    ///
    /// # Errors
    /// It is of another vm or version, in use by another process, damaged, or the device is full.
    pub fn open(dir: &Path, vm: &VmId) -> Result<Self, StoreError> {
        let home = Home::lock(dir)?;
        let made = home.check_marker(vm)?;
        let rocks = Rocks::open(home, !made)?;
        if !made {
            // A crash may have come between the first write and the marker, or somebody took the marker away.
            write_first_meta(&rocks, vm)?;
        }
        let meta = read_meta(&rocks, dir, vm)?;
        if !made {
            rocks.home().write_marker(vm)?;
        }
        Self::start(Arc::new(rocks), dir.to_owned(), meta)
    }

    /// The same on a medium in memory.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_in_memory(disk: &MemoryDisk, vm: &VmId) -> Result<Self, StoreError> {
        let memory = disk.open();
        write_first_meta(&memory, vm)?;
        let (dir, meta) = (memory::no_dir(), read_meta(&memory, &memory::no_dir(), vm)?);
        Self::start(Arc::new(memory), dir, meta)
    }

    /// Takes what a crash may have left, and removes what belongs to no point.
    fn start(engine: Arc<dyn PageStore>, dir: PathBuf, meta: Meta) -> Result<Self, StoreError> {
        let record = match &meta.copy {
            MetaCopy::Whole(whole) => {
                let bytes = engine.get(Column::Epochs, &epoch_key(whole.point, EpochPart::Record))?;
                let record = bytes.and_then(|bytes| EpochRecord::decode(&bytes).ok());
                let damaged =
                    || StoreError::Damaged { dir: dir.clone(), what: "the record of its point".to_owned() };
                Some(record.ok_or_else(damaged)?)
            }
            _ => None,
        };
        let mut store = Self {
            engine,
            dir,
            meta,
            disk: None,
            record,
            checksums: None,
            max_batch: MAX_BATCH,
            broken: false,
        };
        store.drop_leftovers()?;
        Ok(store)
    }

    /// Lowers the bound of one batch, so that a test of what is beyond it need not write much.
    ///
    /// # Panics
    /// It is no lower than [`MAX_BATCH`].
    pub fn limit_batches(&mut self, bytes: usize) {
        assert!(bytes <= MAX_BATCH, "batches are bounded by {MAX_BATCH} bytes");
        self.max_batch = bytes;
    }

    /// Remembers that the register has reached `term`; an older one changes nothing.
    ///
    /// # Errors
    /// The write fails.
    pub fn see_term(&mut self, term: Term) -> Result<(), StoreError> {
        if self.meta.term >= Some(term) {
            return Ok(());
        }
        self.change_meta(|meta| meta.term = Some(term))
    }

    /// Remembers the digest of the guest's spec: a copy is of it from its seed on, and of no other.
    ///
    /// # Errors
    /// The write fails.
    pub fn see_spec(&mut self, digest: u64) -> Result<(), StoreError> {
        if self.meta.spec == Some(digest) {
            return Ok(());
        }
        self.change_meta(|meta| meta.spec = Some(digest))
    }

    /// Stores the id of the whole copy: from here on this node may be promoted after a restart.
    ///
    /// # Errors
    /// There is no whole copy, or the write fails.
    pub fn store_replica_id(&mut self, id: ReplicaId) -> Result<(), StoreError> {
        let mut meta = self.meta.clone();
        let MetaCopy::Whole(whole) = &mut meta.copy else { return Err(self.out_of_place("name a replica")) };
        whole.replica = Some(id);
        self.commit(Batch::default(), meta)
    }

    /// Forgets the replica id, if there is one.
    ///
    /// # Errors
    /// The write fails.
    pub fn erase_replica_id(&mut self) -> Result<(), StoreError> {
        match &self.meta.copy {
            MetaCopy::Whole(whole) if whole.replica.is_some() => self.change_meta(|meta| {
                if let MetaCopy::Whole(whole) = &mut meta.copy {
                    whole.replica = None;
                }
            }),
            _ => Ok(()),
        }
    }

    fn change_meta(&mut self, change: impl FnOnce(&mut Meta)) -> Result<(), StoreError> {
        let mut meta = self.meta.clone();
        change(&mut meta);
        self.commit(Batch::default(), meta)
    }

    /// One arrow of the diagram: `batch` and the new meta, synced.
    fn commit(&mut self, mut batch: Batch, meta: Meta) -> Result<(), StoreError> {
        batch.push(Change::Put(Column::Meta, META_KEY.to_vec(), meta.encode()));
        self.write(&batch, Durability::Synced)?;
        self.meta = meta;
        Ok(())
    }

    fn write(&mut self, batch: &Batch, durability: Durability) -> Result<(), StoreError> {
        if self.broken {
            return Err(StoreError::Broken { dir: self.dir.clone() });
        }
        if let Some(disk) = &self.disk {
            // Nothing is promised any more over a file of which nobody knows what it holds.
            disk.check().map_err(|source| self.disk_error(source))?;
        }
        let written = self.engine.write(batch, durability);
        self.broken = written.is_err();
        written
    }

    fn whole(&self) -> Option<&MetaWhole> {
        match &self.meta.copy {
            MetaCopy::Whole(whole) => Some(whole),
            _ => None,
        }
    }

    fn out_of_place(&self, wanted: &'static str) -> StoreError {
        let copy = match &self.meta.copy {
            MetaCopy::None => "none".to_owned(),
            MetaCopy::Inconsistent => "not whole".to_owned(),
            MetaCopy::Whole(whole) => format!("whole at {}", whole.point),
        };
        StoreError::OutOfPlace { dir: self.dir.clone(), wanted, copy }
    }

    fn damaged(&self, what: &str) -> StoreError {
        StoreError::Damaged { dir: self.dir.clone(), what: what.to_owned() }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({} in {})", self.meta.vm, self.dir.display())
    }
}

fn write_first_meta(engine: &dyn PageStore, vm: &VmId) -> Result<(), StoreError> {
    match engine.get(Column::Meta, META_KEY)? {
        Some(_) => Ok(()),
        None => engine.write(&meta_batch(&Meta::new(vm.clone())), Durability::Synced),
    }
}

/// What the store says of itself, if it is of this version and vm.
fn read_meta(engine: &dyn PageStore, dir: &Path, vm: &VmId) -> Result<Meta, StoreError> {
    let dir = dir.to_owned();
    let Some(bytes) = engine.get(Column::Meta, META_KEY)? else {
        return Err(StoreError::Damaged { dir, what: "its meta record is gone".to_owned() });
    };
    match Meta::decode(&bytes) {
        Ok(meta) if meta.vm == *vm => Ok(meta),
        Ok(meta) => Err(StoreError::OtherVm { dir, found: meta.vm, wanted: vm.clone() }),
        Err(FrameError::Version(found)) => Err(StoreError::OtherVersion { dir, found }),
        Err(FrameError::Malformed(what)) => Err(StoreError::Damaged { dir, what: what.to_owned() }),
    }
}

fn meta_batch(meta: &Meta) -> Batch {
    let mut batch = Batch::default();
    batch.push(Change::Put(Column::Meta, META_KEY.to_vec(), meta.encode()));
    batch
}
