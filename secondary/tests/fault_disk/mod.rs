//! A disk in memory that forgets in a crash what was not flushed: any part of it, sector by sector, in any order. And one
//! that fails when it is told to.
#![allow(dead_code, reason = "each test uses a part of it")]

use colo_common::{BLOCK_SIZE, Block};
use colo_vmm::disk::Disk;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes that a device writes as a whole.
pub(crate) const SECTOR: usize = 512;

type Sector = [u8; SECTOR];

/// The medium: outlives the process that is simulated. Clones are the same medium.
#[derive(Clone, Debug)]
pub(crate) struct FaultDisk(Arc<Mutex<Medium>>);

#[derive(Debug)]
struct Medium {
    bytes: u64,
    /// What a crash leaves for certain; what is not there is a hole.
    flushed: BTreeMap<u64, Sector>,
    /// Sectors written since, none for a hole, in order.
    written: Vec<(u64, Option<Sector>)>,
    now: BTreeMap<u64, Sector>,
    life: u64,
    fails: Option<Failing>,
    /// Done in the middle of the next flush.
    between: Option<Between>,
}

struct Between(Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Between {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Between")
    }
}

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failing {
    Flushes,
    Writes,
    /// Looks for where there is data.
    Looks,
}

/// A process' hold on it.
pub(crate) struct OpenDisk {
    disk: FaultDisk,
    life: u64,
}

impl FaultDisk {
    pub(crate) fn new(bytes: u64) -> Self {
        let (flushed, written, now) = (BTreeMap::new(), Vec::new(), BTreeMap::new());
        Self(Arc::new(Mutex::new(Medium {
            bytes,
            flushed,
            written,
            now,
            life: 0,
            fails: None,
            between: None,
        })))
    }

    pub(crate) fn open(&self) -> OpenDisk {
        OpenDisk { disk: self.clone(), life: self.medium().life }
    }

    /// Loses any part of what was not flushed; whoever had it open can do nothing more.
    pub(crate) fn crash(&self, below: &mut impl FnMut(u64) -> u64) {
        let mut medium = self.medium();
        let keep = below(4);
        for (at, sector) in std::mem::take(&mut medium.written) {
            if keep == 0 || (keep != 1 && below(2) == 0) {
                set(&mut medium.flushed, at, sector);
            }
        }
        medium.now = medium.flushed.clone();
        medium.life += 1;
        medium.fails = None;
    }

    pub(crate) fn fail(&self, what: Option<Failing>) {
        self.medium().fails = what;
    }

    /// Has something done in the middle of the next flush, with nothing locked.
    pub(crate) fn in_flush(&self, between: impl FnOnce() + Send + 'static) {
        self.medium().between = Some(Between(Box::new(between)));
    }

    fn medium(&self) -> MutexGuard<'_, Medium> {
        self.0.lock().unwrap()
    }
}

fn set(sectors: &mut BTreeMap<u64, Sector>, at: u64, sector: Option<Sector>) {
    match sector {
        Some(sector) => drop(sectors.insert(at, sector)),
        None => drop(sectors.remove(&at)),
    }
}

impl OpenDisk {
    fn alive(&self) -> io::Result<MutexGuard<'_, Medium>> {
        let medium = self.disk.medium();
        if medium.life == self.life { Ok(medium) } else { Err(io::Error::other("the process is dead")) }
    }

    fn write_sectors(&self, sectors: impl Iterator<Item = (u64, Option<Sector>)>) -> io::Result<()> {
        let mut medium = self.alive()?;
        if medium.fails == Some(Failing::Writes) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        for (at, sector) in sectors {
            assert!((at + 1) * SECTOR as u64 <= medium.bytes);
            medium.written.push((at, sector));
            set(&mut medium.now, at, sector);
        }
        Ok(())
    }
}

impl Disk for OpenDisk {
    fn bytes(&self) -> u64 {
        self.disk.medium().bytes
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let medium = self.alive()?;
        assert!(offset.is_multiple_of(SECTOR as u64) && bytes.len().is_multiple_of(SECTOR));
        for (at, into) in (offset / SECTOR as u64..).zip(bytes.as_chunks_mut::<SECTOR>().0) {
            *into = medium.now.get(&at).copied().unwrap_or([0; SECTOR]);
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(SECTOR as u64) && bytes.len().is_multiple_of(SECTOR));
        let sectors = bytes.as_chunks::<SECTOR>().0.iter().map(|sector| Some(*sector));
        self.write_sectors((offset / SECTOR as u64..).zip(sectors))
    }

    fn zero(&self, blocks: Range<Block>, _unmap: bool) -> io::Result<()> {
        let (first, end) = (blocks.start.offset() / SECTOR as u64, blocks.end.offset() / SECTOR as u64);
        self.write_sectors((first..end).map(|at| (at, None)))
    }

    fn flush(&self) -> io::Result<()> {
        let between = self.alive()?.between.take();
        between.into_iter().for_each(|between| between.0());
        let mut medium = self.alive()?;
        if medium.fails == Some(Failing::Flushes) {
            return Err(io::Error::other("the device is gone"));
        }
        for (at, sector) in std::mem::take(&mut medium.written) {
            set(&mut medium.flushed, at, sector);
        }
        Ok(())
    }

    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>> {
        let medium = self.alive()?;
        if medium.fails == Some(Failing::Looks) {
            return Err(io::Error::other("the device is gone"));
        }
        let per_block = (BLOCK_SIZE / SECTOR) as u64;
        let first = medium.now.range(from.0 * per_block..).next();
        Ok(first.map(|(at, _)| Block(at / per_block)..Block(at / per_block + 1)))
    }
}
