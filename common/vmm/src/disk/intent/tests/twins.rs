//! The image and the log's file in memory: what was not synced may be lost in a crash, any part of it.

use colo_common::{BLOCK_SIZE, Block};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::disk::Disk;
use crate::disk::intent::LoggedDisk;
use crate::disk::intent::claim::Claim;
use crate::disk::intent::file::{self, newest};

/// Bytes that are written as a whole: fewer than devices do, so that a slot of a small disk may tear.
const SECTOR: usize = 64;

/// By block, the number in its first bytes; none for zeroes.
pub(super) type Content = BTreeMap<u64, u64>;

/// A number below, from whatever source.
pub(super) type Below<'a> = &'a mut dyn FnMut(u64) -> u64;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// The image; clones are the same.
#[derive(Clone)]
pub(super) struct Image(Arc<Mutex<Bytes>>);

struct Bytes {
    len: u64,
    synced: Content,
    /// Since, in order.
    written: Vec<(u64, u64)>,
    now: Content,
    fail_sync: bool,
    /// Asked at every write: which blocks may be written.
    allowed: Option<Box<dyn Fn(Range<u64>) -> bool + Send>>,
}

impl Image {
    pub(super) fn new(len: u64) -> Self {
        let (synced, written, now) = (Content::new(), Vec::new(), Content::new());
        Self(Arc::new(Mutex::new(Bytes { len, synced, written, now, fail_sync: false, allowed: None })))
    }

    /// A process is killed, or the power goes: any part of what was not synced is lost.
    pub(super) fn crash(&self, below: Below<'_>) {
        let mut bytes = lock(&self.0);
        let keep = below(4);
        for (block, tag) in std::mem::take(&mut bytes.written) {
            if keep == 0 || (keep != 1 && below(2) == 0) {
                set(&mut bytes.synced, block, tag);
            }
        }
        bytes.now = bytes.synced.clone();
        bytes.fail_sync = false;
    }

    /// The next sync fails, and what it was for is not tried again.
    pub(super) fn fail_sync(&self) {
        lock(&self.0).fail_sync = true;
    }

    pub(super) fn allow(&self, allowed: impl Fn(Range<u64>) -> bool + Send + 'static) {
        lock(&self.0).allowed = Some(Box::new(allowed));
    }

    pub(super) fn content(&self) -> Content {
        lock(&self.0).now.clone()
    }

    /// Writes one block through the log.
    pub(super) fn tag(&self, disk: &LoggedDisk, block: u64, tag: u64) {
        disk.write(Block(block).offset(), &page(tag)).unwrap();
    }
}

pub(super) fn page(tag: u64) -> Vec<u8> {
    let mut page = vec![0; BLOCK_SIZE];
    page[..8].copy_from_slice(&tag.to_le_bytes());
    page
}

pub(super) fn set(content: &mut Content, block: u64, tag: u64) {
    match tag {
        0 => drop(content.remove(&block)),
        tag => drop(content.insert(block, tag)),
    }
}

impl Bytes {
    fn write(&mut self, blocks: impl Iterator<Item = (u64, u64)> + Clone) {
        let first = blocks.clone().next().map_or(0, |(block, _)| block);
        let range = first..first + blocks.clone().count() as u64;
        assert!(
            self.allowed.as_ref().is_none_or(|allowed| allowed(range)),
            "the log does not name block {first}"
        );
        for (block, tag) in blocks {
            self.written.push((block, tag));
            set(&mut self.now, block, tag);
        }
    }
}

impl Disk for Image {
    fn bytes(&self) -> u64 {
        lock(&self.0).len
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let tags = bytes.as_chunks::<BLOCK_SIZE>().0.iter();
        let tags = tags.map(|page| u64::from_le_bytes(page[..8].try_into().unwrap()));
        lock(&self.0).write((offset / BLOCK_SIZE as u64..).zip(tags));
        Ok(())
    }

    fn zero(&self, blocks: Range<Block>, _: bool) -> io::Result<()> {
        lock(&self.0).write((blocks.start.0..blocks.end.0).map(|block| (block, 0)));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut bytes = lock(&self.0);
        // As Linux does it: what could not be written back counts as clean from then on.
        let written = std::mem::take(&mut bytes.written);
        if std::mem::take(&mut bytes.fail_sync) {
            return Err(io::Error::other("the device has lost a write"));
        }
        written.into_iter().for_each(|(block, tag)| set(&mut bytes.synced, block, tag));
        Ok(())
    }

    fn next_data(&self, _: Block) -> io::Result<Option<Range<Block>>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The log's file; clones are the same.
#[derive(Clone, Default)]
pub(super) struct Medium(Arc<Mutex<Sectors>>);

#[derive(Default)]
struct Sectors {
    synced: Vec<u8>,
    written: Vec<(usize, [u8; SECTOR])>,
    /// Syncs do nothing.
    lies: bool,
    /// Calls until one fails.
    fail_in: Option<u64>,
}

impl Medium {
    /// A new file.
    pub(super) fn make(&self, claim: &Claim) {
        lock(&self.0).synced = file::fresh(claim);
    }

    pub(super) fn lie(&self) {
        lock(&self.0).lies = true;
    }

    /// The call after so many fails; a write has gone some of its way then.
    pub(super) fn fail_in(&self, calls: Option<u64>) {
        lock(&self.0).fail_in = calls;
    }

    /// What a crash leaves for certain, if nothing is under way.
    pub(super) fn certain(&self) -> Claim {
        newest(&lock(&self.0).synced).unwrap().0
    }

    /// What a crash leaves: the claim, with its sequence and slot; nothing if no slot is whole.
    pub(super) fn crash(&self, below: Below<'_>) -> Option<(Claim, u64, u64)> {
        let mut sectors = lock(&self.0);
        let keep = below(4);
        for (at, sector) in std::mem::take(&mut sectors.written) {
            if keep == 0 || (keep != 1 && below(2) == 0) {
                sectors.synced[at..at + SECTOR].copy_from_slice(&sector);
            }
        }
        sectors.fail_in = None;
        newest(&sectors.synced).ok()
    }
}

impl Sectors {
    fn call(&mut self) -> io::Result<()> {
        match &mut self.fail_in {
            Some(0) => {
                self.fail_in = None;
                Err(io::ErrorKind::StorageFull.into())
            }
            Some(calls) => {
                *calls -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl file::Medium for Medium {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut sectors = lock(&self.0);
        let called = sectors.call();
        let whole = bytes.as_chunks::<SECTOR>().0;
        let done = if called.is_ok() { whole.len() } else { whole.len() / 2 };
        for (at, sector) in (offset as usize..).step_by(SECTOR).zip(&whole[..done]) {
            sectors.written.push((at, *sector));
        }
        called
    }

    fn sync(&self) -> io::Result<()> {
        let mut sectors = lock(&self.0);
        sectors.call()?;
        if !sectors.lies {
            for (at, sector) in std::mem::take(&mut sectors.written) {
                sectors.synced[at..at + SECTOR].copy_from_slice(&sector);
            }
        }
        Ok(())
    }
}
