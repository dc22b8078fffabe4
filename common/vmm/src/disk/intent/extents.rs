//! A set of a disk's extents, as the bits that the log's file has.

use colo_common::{BLOCK_SIZE, Block};
use std::ops::Range;

use super::{EXTENT_BLOCKS, EXTENT_BYTES};
use crate::block_set::BlockSet;

/// Extents of a disk.
#[derive(Clone, PartialEq, Eq)]
pub struct Extents {
    disk_bytes: u64,
    words: Vec<u64>,
}

impl Extents {
    /// None, of a disk of so many bytes.
    pub fn none(disk_bytes: u64) -> Self {
        Self { disk_bytes, words: vec![0; words_of(disk_bytes)] }
    }

    /// As its words; nothing if they name what the disk does not have.
    pub(super) fn from_words(disk_bytes: u64, words: Vec<u64>) -> Option<Self> {
        let count = count_of(disk_bytes);
        let beyond = words.last().is_some_and(|last| !count.is_multiple_of(64) && last >> (count % 64) != 0);
        (words.len() == words_of(disk_bytes) && !beyond).then_some(Self { disk_bytes, words })
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Bytes of the disk.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// How many they are.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether a block is in one of them.
    pub fn contains(&self, block: Block) -> bool {
        self.has(block.0 / EXTENT_BLOCKS)
    }

    pub(super) fn has(&self, extent: u64) -> bool {
        self.words.get((extent / 64) as usize).is_some_and(|word| word >> (extent % 64) & 1 == 1)
    }

    pub(super) fn insert(&mut self, extent: u64) {
        self.words[(extent / 64) as usize] |= 1 << (extent % 64);
    }

    pub(super) fn remove(&mut self, extent: u64) {
        self.words[(extent / 64) as usize] &= !(1 << (extent % 64));
    }

    /// Their numbers, ascending.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u64> + '_ {
        (0..).zip(&self.words).filter(|(_, word)| **word != 0).flat_map(|(at, word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| at * 64 + bit)
        })
    }

    /// Their blocks, ascending, as runs that are apart from each other.
    pub fn runs(&self) -> impl Iterator<Item = Range<Block>> + '_ {
        let end_of_disk = self.disk_bytes / BLOCK_SIZE as u64;
        let mut numbers = self.numbers().peekable();
        std::iter::from_fn(move || {
            let first = numbers.next()?;
            let mut end = first + 1;
            while numbers.next_if_eq(&end).is_some() {
                end += 1;
            }
            Some(Block(first * EXTENT_BLOCKS)..Block((end * EXTENT_BLOCKS).min(end_of_disk)))
        })
    }

    /// Their blocks as a set.
    pub fn blocks(&self) -> BlockSet {
        let mut set = BlockSet::new(self.disk_bytes / BLOCK_SIZE as u64);
        for run in self.runs() {
            set.insert_range(run.start, run.end.0 - run.start.0);
        }
        set
    }
}

impl std::fmt::Debug for Extents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} extents", self.len(), count_of(self.disk_bytes))
    }
}

/// Extents of a disk.
pub(super) fn count_of(disk_bytes: u64) -> u64 {
    disk_bytes.div_ceil(EXTENT_BYTES)
}

/// Words of their bits.
pub(super) fn words_of(disk_bytes: u64) -> usize {
    count_of(disk_bytes).div_ceil(64) as usize
}

/// The extents that blocks are in.
pub(super) fn extents_of(blocks: &Range<Block>) -> Range<u64> {
    if blocks.is_empty() {
        return 0..0;
    }
    blocks.start.0 / EXTENT_BLOCKS..blocks.end.0.div_ceil(EXTENT_BLOCKS)
}
