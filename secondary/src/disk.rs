//! The secondary's copy of the guest's disk: an image file, and over it the overlay in the store's column `disk`, which has
//! what is newer. Together they are the disk at the stored mark; after a promotion they are the guest's disk itself.
//!
//! ```text
//!   following:  mark --> overlay --folding--> image file       read: overlay, else file
//!   seeding:    into the file, unless the copy that is kept aside needs it as it is; then into the overlay
//!   running:    guest --> file (what the overlay had of it is superseded)
//! ```
//!
//! A block has an entry in the overlay or not. An entry is *present* if it counts, and *superseded* if the file holds
//! the same or something newer that is not synced yet. So at any instant of a crash, file and overlay as they are then
//! hold the disk: an entry goes only after the file was synced, and only if no mark has renewed it meanwhile.
//!
//! Three threads and more use it at once: persist, `fold`, and once the guest runs here those of its device. All state is
//! under one lock; the medium is waited for under it only where a block's place changes.

mod content;
mod fold;
mod state;

pub use content::{block_digests, content_digest, export};

use colo_common::{BLOCK_SIZE, Block, Point};
use colo_vmm::disk::Disk;
use colo_vmm::memory::Page;
use colo_vmm::{BlockSet, page_batch::is_zero};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::store::engine::{Batch, Change, Column, Durability, PageStore};
use crate::store::format::{Kind, decode_block, number_key, pending_key};
use crate::store::{BlockRun, StoreError};
use fold::Folding;
use state::State;

/// Entries removed from the overlay at once: what a mark has to wait for meanwhile.
const MAX_REMOVED: usize = 1024;

/// The copy of the disk, with the thread that folds its overlay.
pub struct DiskImage {
    core: Arc<Core>,
    folding: OnceLock<Folding>,
}

/// The copy of the disk.
struct Core {
    base: Arc<dyn Disk>,
    engine: Arc<dyn PageStore>,
    blocks: u64,
    state: Mutex<State>,
    /// Held by whoever syncs the file and removes what that made superfluous: one at a time, so that nobody's flush
    /// returns before entries are gone that another has begun to remove.
    settling: Mutex<()>,
}

/// A part of a block that is read or written.
struct Piece {
    block: Block,
    /// Within the block.
    within: Range<usize>,
    /// Within the caller's bytes.
    bytes: Range<usize>,
}

impl DiskImage {
    /// Takes an image file and what `state` says of the overlay in `engine`.
    pub(crate) fn new(base: Arc<dyn Disk>, engine: Arc<dyn PageStore>, entries: Entries) -> Self {
        let blocks = base.bytes() / BLOCK_SIZE as u64;
        let state = Mutex::new(State::new(entries));
        let core = Core { base, engine, blocks, state, settling: Mutex::new(()) };
        Self { core: Arc::new(core), folding: OnceLock::new() }
    }

    /// Number of its blocks.
    pub fn blocks(&self) -> u64 {
        self.core.blocks
    }

    /// Blocks that the overlay has.
    pub fn overlay_blocks(&self) -> u64 {
        let state = self.core.lock();
        state.present.len() + state.superseded.len() + state.syncing.len()
    }

    /// Starts the thread that folds the overlay into the image file, for as long as this lives.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start_folding(&self) -> io::Result<()> {
        if self.folding.get().is_none() {
            let core = Arc::clone(&self.core);
            drop(self.folding.set(Folding::start(move |most| core.fold(most))?));
        }
        Ok(())
    }

    /// Folds at most so many blocks into the image file; answers how many. What [`start_folding`](Self::start_folding)
    /// does again and again.
    ///
    /// # Errors
    /// The file or the store fails, or an entry is damaged. Nothing is lost.
    pub fn fold(&self, most: usize) -> io::Result<u64> {
        self.core.fold(most)
    }

    /// What a run becomes in the store: each block with its bytes, none for zeroes. A block that is zero already, in the
    /// file and without an entry, is left out: a guest may discard its whole disk at once. For the thread of the marks,
    /// which alone makes entries.
    pub(crate) fn to_store<'a>(
        &'a self,
        run: BlockRun<'a>,
    ) -> Box<dyn Iterator<Item = io::Result<(Block, Option<&'a Page>)>> + 'a> {
        if run.bytes().is_some() {
            return Box::new(run.each().map(|(block, page)| Ok((block, Some(page)))));
        }
        let (mut here, end) = (run.first()..run.first(), run.end());
        Box::new(std::iter::from_fn(move || {
            if here.start == here.end {
                // After an error nothing more is asked for.
                let from = std::mem::replace(&mut here, end..end).end;
                match self.next_data(from) {
                    Ok(Some(found)) if found.start < end => here = found.start..found.end.min(end),
                    Ok(_) => return None,
                    Err(error) => return (from < end).then_some(Err(error)),
                }
            }
            let block = here.start;
            here.start = Block(block.0 + 1);
            Some(Ok((block, None)))
        }))
    }

    /// Writes to the store what gives these blocks entries, or newer ones.
    pub(crate) fn commit(
        &self,
        touched: &BlockSet,
        write: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.core.write(write, |state| state.renew(touched))
    }

    /// The same where the entries are in `pending` under this point, until [`moved`](Self::moved).
    pub(crate) fn adopt(
        &self,
        point: Point,
        touched: BlockSet,
        write: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.core.write(write, |state| state.adopted = Some((point, touched)))
    }

    /// All entries of `pending` were moved to where they belong.
    pub(crate) fn moved(&self) {
        self.core.lock().adopted = None;
    }

    /// A copy that needs the image file as it is is kept aside, or not any more.
    pub(crate) fn keep_file(&self, keep: bool) {
        self.core.lock().aside = keep;
    }

    /// Whether the image file may be written by a seed.
    pub(crate) fn takes_seed(&self) -> bool {
        !self.core.lock().aside
    }

    /// The guest runs on this disk from now on, and folding may go on under it.
    pub(crate) fn run(&self) {
        let mut state = self.core.lock();
        (state.active, state.aside) = (true, false);
    }

    /// A seed begins: what the guest did here is over.
    pub(crate) fn follow(&self) {
        self.core.lock().active = false;
    }

    /// Writes a part of a seed into the image file itself.
    pub(crate) fn seed(&self, run: BlockRun<'_>) -> io::Result<()> {
        let mut state = self.core.lock();
        match run.bytes() {
            Some(bytes) => self.core.base.write(run.first().offset(), bytes)?,
            None => self.core.zero_base(run.first()..run.end())?,
        }
        state.supersede(run.first()..run.end());
        Ok(())
    }

    /// Syncs the image file and removes the entries that it made superfluous.
    pub(crate) fn settle(&self) -> io::Result<()> {
        self.core.settle()
    }
}

/// What the overlay holds when it is opened.
#[derive(Debug)]
pub(crate) struct Entries {
    /// Blocks with an entry.
    pub(crate) present: BlockSet,
    /// Blocks with a newer one in `pending`, under this point.
    pub(crate) adopted: Option<(Point, BlockSet)>,
    /// A copy is kept aside.
    pub(crate) aside: bool,
    /// This node runs the guest, or did.
    pub(crate) active: bool,
}

impl Disk for DiskImage {
    fn bytes(&self) -> u64 {
        self.core.base.bytes()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let core = &*self.core;
        let pieces = core.pieces(offset, bytes.len())?;
        let state = core.lock();
        if !state.has_newer(blocks_of(offset, bytes.len() as u64)) {
            // No block gets an entry while it is read: marks are of a guest that runs elsewhere.
            drop(state);
            return core.base.read(offset, bytes);
        }
        for Piece { block, within, bytes: range } in pieces {
            let into = &mut bytes[range];
            match core.entry(&state, block)? {
                Some(page) => into.copy_from_slice(&page[within]),
                None => core.base.read(block.offset() + within.start as u64, into)?,
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let core = &*self.core;
        let pieces = core.pieces(offset, bytes.len())?;
        let mut state = core.lock();
        state.check_runs()?;
        if !state.has_newer(blocks_of(offset, bytes.len() as u64)) {
            drop(state);
            return core.base.write(offset, bytes);
        }
        for Piece { block, within, bytes: range } in pieces {
            let part = &bytes[range];
            match core.entry(&state, block)? {
                Some(mut page) => {
                    page[within].copy_from_slice(part);
                    core.base.write(block.offset(), &page[..])?;
                    state.supersede(block..Block(block.0 + 1));
                }
                None => core.base.write(block.offset() + within.start as u64, part)?,
            }
        }
        Ok(())
    }

    fn zero(&self, blocks: Range<Block>, unmap: bool) -> io::Result<()> {
        let core = &*self.core;
        if blocks.start > blocks.end || blocks.end.0 > core.blocks {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the range is not within the disk"));
        }
        let mut state = core.lock();
        state.check_runs()?;
        if !state.has_newer(blocks.clone()) {
            drop(state);
            return core.base.zero(blocks, unmap);
        }
        core.base.zero(blocks.clone(), unmap)?;
        state.supersede(blocks);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.core.settle()
    }

    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>> {
        let state = self.core.lock();
        let file = self.core.base.next_data(from)?;
        let Some(first) = state.next_entry(from) else { return Ok(file) };
        match file {
            Some(file) if file.start <= first => Ok(Some(file)),
            _ => Ok(Some(first..state.end_of_entries(first))),
        }
    }
}

impl Core {
    /// The state is whole between any two calls, also of a thread that panicked.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write of the store's that changes entries. While it is under way nobody removes or reads any.
    fn write(
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
                state.broken = true;
                Err(error)
            }
        }
    }

    /// What the overlay has of a block that counts; none if the file's content does.
    fn entry(&self, state: &State, block: Block) -> io::Result<Option<Box<Page>>> {
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
            || io::Error::new(ErrorKind::InvalidData, format!("the store's entry of {block} is damaged"));
        Ok(Some(Box::new(content.ok_or_else(damaged)?.copied().unwrap_or([0; BLOCK_SIZE]))))
    }

    /// Copies entries into the file, and removes them once it is synced.
    fn fold(&self, most: usize) -> io::Result<u64> {
        let mut copied = 0;
        while copied < most as u64 {
            let mut state = self.lock();
            if state.aside || state.adopted.is_some() {
                break;
            }
            state.check_unbroken()?;
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

    fn settle(&self) -> io::Result<()> {
        let _alone = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut state = self.lock();
            state.check_unbroken()?;
            state.begin_sync();
        }
        if let Err(error) = self.base.flush() {
            self.lock().sync_failed();
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
            state.broken = true;
            return Err(io::Error::other(error));
        }
        for block in blocks {
            state.syncing.remove(block);
        }
        Ok(more)
    }

    /// Makes blocks of the file zero where they are not.
    fn zero_base(&self, blocks: Range<Block>) -> io::Result<()> {
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

    fn pieces(&self, offset: u64, len: usize) -> io::Result<impl Iterator<Item = Piece> + use<>> {
        check_range(self.base.bytes(), offset, len as u64)?;
        let mut at = 0;
        Ok(std::iter::from_fn(move || {
            if at == len {
                return None;
            }
            let place = offset + at as u64;
            let start = (place % BLOCK_SIZE as u64) as usize;
            let bytes = (BLOCK_SIZE - start).min(len - at);
            let piece = Piece {
                block: Block::containing(place),
                within: start..start + bytes,
                bytes: at..at + bytes,
            };
            at += bytes;
            Some(piece)
        }))
    }
}

impl std::fmt::Debug for DiskImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DiskImage({} blocks, {:?})", self.core.blocks, self.core.lock())
    }
}

/// Blocks that these bytes are in.
fn blocks_of(offset: u64, len: u64) -> Range<Block> {
    Block::containing(offset)..Block((offset + len).div_ceil(BLOCK_SIZE as u64))
}

/// Whether a range is within a disk of `size` bytes.
fn check_range(size: u64, offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(ErrorKind::InvalidInput, "the range is not within the disk")),
    }
}
