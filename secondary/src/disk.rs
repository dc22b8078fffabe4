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
mod core;
mod fold;
mod guest;
mod settling;
mod state;

pub use content::{block_digests, content_digest, export};

use colo_common::{BLOCK_SIZE, Block, Point};
use colo_primary::node::status::Overlay;
use colo_vmm::BlockSet;
use colo_vmm::disk::Disk;
use colo_vmm::memory::Page;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use self::core::Core;
use self::state::State;
use crate::store::engine::PageStore;
use crate::store::{BlockRun, StoreError};
use fold::Folding;

/// Bytes of a seed after which the image file is synced behind it: the sync that makes the copy whole, for which a promotion
/// right after it waits, has no more to do than the last of them.
const SYNC_EVERY: u64 = 32 << 20;
/// Bytes of a seed that may be written and not synced: a device slower than the link slows the seed.
const MAX_UNSYNCED: u64 = 4 * SYNC_EVERY;

/// The copy of the disk, with the thread that folds its overlay.
pub struct DiskImage {
    core: Arc<Core>,
    folding: OnceLock<Folding>,
}

impl DiskImage {
    /// Takes an image file and what `entries` say of the overlay in `engine`.
    pub(crate) fn new(base: Arc<dyn Disk>, engine: Arc<dyn PageStore>, entries: Entries) -> Self {
        let core = Arc::new(Core::new(base, engine, entries));
        Self { core, folding: OnceLock::new() }
    }

    /// Number of its blocks.
    pub fn blocks(&self) -> u64 {
        self.core.blocks
    }

    /// Blocks of which the overlay has what counts: they are still to go into the image file. Never waits.
    pub fn overlay_blocks(&self) -> u64 {
        self.core.to_fold.load(Ordering::Relaxed)
    }

    /// Why it is of no more use to this process, once it is not. Never waits.
    pub fn failure(&self) -> Option<&str> {
        self.core.failure.get().map(String::as_str)
    }

    /// # Errors
    /// It is of no more use.
    pub(crate) fn check(&self) -> io::Result<()> {
        self.core.check_unbroken()
    }

    /// Starts the thread that folds the overlay into the image file, and syncs that behind a seed, for as long as this lives.
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
                    Err(error) => return (from < end).then(|| Err(self.broken_by(error))),
                }
            }
            let block = here.start;
            here.start = Block(block.0 + 1);
            Some(Ok((block, None)))
        }))
    }

    /// A mark lacks what could not be read for it, and no later one brings it.
    fn broken_by(&self, error: io::Error) -> io::Error {
        let _state = self.core.lock();
        self.core.fail(&format_args!("the image file could not be read for a mark: {error}"));
        error
    }

    /// Writes to the store what gives these blocks entries, or newer ones.
    pub(crate) fn commit(
        &self,
        touched: &BlockSet,
        write: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.core.write(write, |state| state.renew(touched))
    }

    /// The same where the entries are in `pending` under this point, until they are [`moved`](Self::moved).
    pub(crate) fn adopt(
        &self,
        point: Point,
        touched: BlockSet,
        write: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.core.write(write, |state| state.adopt(point, touched))
    }

    /// All entries of `pending` were moved to where they belong: this write removes them there, and at no instant between
    /// is a block looked for where it is not.
    pub(crate) fn moved(&self, write: impl FnOnce() -> Result<(), StoreError>) -> Result<(), StoreError> {
        self.core.write(write, State::moved)
    }

    /// A copy that needs the image file as it is is kept aside, or not any more.
    pub(crate) fn keep_file(&self, keep: bool) {
        self.core.lock().aside = keep;
    }

    /// Whether the image file may be written by a seed.
    pub(crate) fn takes_seed(&self) -> bool {
        !self.core.lock().aside
    }

    /// With this write the guest runs on this disk, and these blocks have new entries: in `pending` under the point, until
    /// they are folded into the image file, or else in the overlay. What was in `pending` before was moved. All at one
    /// instant: an entry that `fold` removes after it must not come back in a crash.
    pub(crate) fn run(
        &self,
        adopted: Option<Point>,
        touched: BlockSet,
        write: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.core.write(write, |state| {
            match adopted {
                Some(point) => state.adopt(point, touched),
                None => {
                    state.moved();
                    state.renew(&touched);
                }
            }
            (state.active, state.aside) = (true, false);
        })
    }

    /// A seed begins: what the guest did here is over.
    pub(crate) fn follow(&self) {
        self.core.lock().active = false;
    }

    /// Writes a part of a seed into the image file itself. Waits for the device only where that is far behind. After one
    /// that failed nothing is taken any more: the copy lacks it.
    pub(crate) fn seed(&self, run: BlockRun<'_>) -> io::Result<()> {
        let mut state = self.core.lock();
        self.core.check_unbroken()?;
        let written = match run.bytes() {
            Some(bytes) => self.core.base.write(run.first().offset(), bytes),
            None => self.core.zero_base(run.first()..run.end()),
        };
        if let Err(error) = written {
            self.core.fail(&format_args!("a part of a copy could not be written to the image file: {error}"));
            return Err(error);
        }
        state.supersede(run.first()..run.end());
        state.seeded += run.bytes().map_or(0, |bytes| bytes.len() as u64);
        let unsynced = state.seeded;
        drop(state);
        if unsynced >= SYNC_EVERY {
            self.folding.get().iter().for_each(|folding| folding.wake());
        }
        if unsynced >= MAX_UNSYNCED { self.core.settle() } else { Ok(()) }
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

impl Overlay for DiskImage {
    fn bytes_to_fold(&self) -> u64 {
        self.overlay_blocks() * BLOCK_SIZE as u64
    }

    fn failure(&self) -> Option<String> {
        self.failure().map(str::to_owned)
    }
}

impl std::fmt::Debug for DiskImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DiskImage({} blocks, {:?}, {:?})", self.core.blocks, self.core.failure, *self.core.lock())
    }
}
