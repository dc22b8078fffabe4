//! A disk's image file in memory. Of what was not synced a crash keeps some, in any order, and tears some.

use colo_common::{BLOCK_SIZE, Block};
use colo_tests::seed::Seed;
use colo_vmm::Disk;
use colo_vmm::memory::Page;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::plan::BLOCKS;

/// Bytes that a device writes as one.
const SECTOR: usize = 512;

/// The file: outlives the process that is simulated. Clones are the same file.
#[derive(Clone, Debug, Default)]
pub(crate) struct ImageFile(Arc<Mutex<Content>>);

#[derive(Debug, Default)]
struct Content {
    /// What a crash leaves for certain.
    synced: BTreeMap<u64, Box<Page>>,
    /// What was written after that, in order.
    unsynced: Vec<(u64, Box<Page>)>,
    /// Both together: what is read.
    now: BTreeMap<u64, Box<Page>>,
    /// Nothing is ever synced.
    lies: bool,
}

impl ImageFile {
    /// From now on it says that it is synced and is not.
    pub(crate) fn lie(&self) {
        self.content().lies = true;
    }

    /// The machine crashes.
    pub(crate) fn crash(&self, seed: u64) {
        let (mut seed, mut content) = (Seed::new(seed), self.content());
        for (block, page) in std::mem::take(&mut content.unsynced) {
            let kept = match seed.below(4) {
                0 => 0,
                1 => seed.below((BLOCK_SIZE / SECTOR) as u64) as usize * SECTOR,
                _ => BLOCK_SIZE,
            };
            if kept > 0 {
                let old = content.synced.entry(block).or_insert_with(zeroes);
                old[..kept].copy_from_slice(&page[..kept]);
            }
        }
        content.now = content.synced.clone();
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.0.lock().expect("nothing in here panics half-way")
    }
}

impl Content {
    fn write(&mut self, block: u64, change: impl FnOnce(&mut Page)) {
        let page = self.now.entry(block).or_insert_with(zeroes);
        change(page);
        self.unsynced.push((block, page.clone()));
    }
}

fn zeroes() -> Box<Page> {
    Box::new([0; BLOCK_SIZE])
}

/// The blocks of a range of bytes: of each its number, the part of it, and the part of the range.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    assert!(offset + len as u64 <= BLOCKS * BLOCK_SIZE as u64, "the range is within the disk");
    let mut at = 0;
    std::iter::from_fn(move || {
        let place = offset + at as u64;
        let start = (place % BLOCK_SIZE as u64) as usize;
        let bytes = (BLOCK_SIZE - start).min(len - at);
        at += bytes;
        (bytes > 0).then(|| (place / BLOCK_SIZE as u64, start..start + bytes, at - bytes..at))
    })
}

impl Disk for ImageFile {
    fn bytes(&self) -> u64 {
        BLOCKS * BLOCK_SIZE as u64
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let content = self.content();
        for (block, within, range) in pieces(offset, bytes.len()) {
            match content.now.get(&block) {
                Some(page) => bytes[range].copy_from_slice(&page[within]),
                None => bytes[range].fill(0),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut content = self.content();
        for (block, within, range) in pieces(offset, bytes.len()) {
            content.write(block, |page| page[within].copy_from_slice(&bytes[range]));
        }
        Ok(())
    }

    fn zero(&self, blocks: Range<Block>, _unmap: bool) -> io::Result<()> {
        let mut content = self.content();
        (blocks.start.0..blocks.end.0).for_each(|block| content.write(block, |page| page.fill(0)));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut content = self.content();
        if content.lies {
            return Ok(());
        }
        let unsynced = std::mem::take(&mut content.unsynced);
        content.synced.extend(unsynced);
        Ok(())
    }

    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>> {
        let first = self.content().now.range(from.0..).next().map(|(block, _)| *block);
        Ok(first.map(|block| Block(block)..Block(block + 1)))
    }
}
