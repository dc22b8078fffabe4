//! Runs of a disk's blocks with what they hold, and which of several versions is the newest: without ever counting block
//! by block what a guest has made zero, which may be its whole disk at once.

use bytes::Bytes;
use colo_common::{BLOCK_SIZE, Block};
use std::collections::BTreeMap;
use std::ops::Range;

use crate::disk::{DiskContent, DiskWrite};
use crate::memory::Page;

/// Bytes of which a part can be had without a copy.
pub trait Part: AsRef<[u8]> + Clone {
    /// The part.
    fn part(&self, range: Range<usize>) -> Self;
}

impl Part for &[u8] {
    fn part(&self, range: Range<usize>) -> Self {
        &self[range]
    }
}

impl Part for Bytes {
    fn part(&self, range: Range<usize>) -> Self {
        self.slice(range)
    }
}

/// Blocks that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun<B> {
    first: Block,
    count: u64,
    /// What they hold; nothing for zeroes.
    bytes: Option<B>,
}

impl<B: Part> BlockRun<B> {
    /// Blocks with these bytes.
    ///
    /// # Panics
    /// They are not whole blocks.
    pub fn data(first: Block, bytes: B) -> Self {
        let len = bytes.as_ref().len();
        assert!(len.is_multiple_of(BLOCK_SIZE), "{len} bytes are not whole blocks");
        Self { first, count: (len / BLOCK_SIZE) as u64, bytes: Some(bytes) }
    }

    /// So many blocks of zeroes.
    pub fn zeros(first: Block, count: u64) -> Self {
        Self { first, count, bytes: None }
    }

    /// The first of them.
    pub fn first(&self) -> Block {
        self.first
    }

    /// The one after the last.
    pub fn end(&self) -> Block {
        Block(self.first.0 + self.count)
    }

    /// How many they are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their bytes; nothing if they are zero.
    pub fn bytes(&self) -> Option<B> {
        self.bytes.clone()
    }

    /// The part from one block to before another.
    fn part(&self, from: u64, to: u64) -> Self {
        let at = |block: u64| (block - self.first.0) as usize * BLOCK_SIZE;
        let bytes = self.bytes.as_ref().map(|bytes| bytes.part(at(from)..at(to)));
        Self { first: Block(from), count: to - from, bytes }
    }
}

impl<'a> BlockRun<&'a [u8]> {
    /// Each block with its bytes; none for zeroes, which are not to be counted one by one.
    pub fn each(&self) -> impl Iterator<Item = (Block, &'a Page)> + use<'a> {
        let pages = self.bytes.map_or(&[] as &[Page], |bytes| bytes.as_chunks().0);
        (self.first.0..).map(Block).zip(pages)
    }
}

impl From<DiskWrite> for BlockRun<Bytes> {
    fn from(write: DiskWrite) -> Self {
        match write.content {
            DiskContent::Bytes(bytes) => Self::data(write.first, bytes),
            DiskContent::Zeroes(count) => Self::zeros(write.first, count),
        }
    }
}

impl<'a> From<&'a DiskWrite> for BlockRun<&'a [u8]> {
    fn from(write: &'a DiskWrite) -> Self {
        match &write.content {
            DiskContent::Bytes(bytes) => Self::data(write.first, bytes),
            DiskContent::Zeroes(count) => Self::zeros(write.first, *count),
        }
    }
}

impl From<BlockRun<Bytes>> for DiskWrite {
    fn from(run: BlockRun<Bytes>) -> Self {
        let content = run.bytes.map_or(DiskContent::Zeroes(run.count), DiskContent::Bytes);
        Self { first: run.first, content }
    }
}

/// The newest version of blocks of which several may come.
#[derive(Clone, Debug)]
pub struct NewestBlocks<B> {
    /// By first block, apart from each other.
    runs: BTreeMap<u64, BlockRun<B>>,
}

impl<B> Default for NewestBlocks<B> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<B: Part> NewestBlocks<B> {
    /// Takes a run that is newer than all before.
    pub fn insert(&mut self, run: BlockRun<B>) {
        if run.count > 0 {
            self.remove(run.first, run.count);
            self.runs.insert(run.first.0, run);
        }
    }

    /// Forgets what it has of so many blocks.
    pub fn remove(&mut self, first: Block, count: u64) {
        let (from, to) = (first.0, first.0 + count);
        if let Some((_, before)) = self.runs.range(..from).next_back()
            && before.end().0 > from
        {
            let before = before.clone();
            self.keep(&before, before.first.0, from);
            self.keep(&before, to, before.end().0);
        }
        while let Some((&first, covered)) = self.runs.range(from..to).next() {
            let covered = covered.clone();
            self.runs.remove(&first);
            self.keep(&covered, to, covered.end().0);
        }
    }

    /// What there is, ascending.
    pub fn runs(&self) -> impl Iterator<Item = &BlockRun<B>> {
        self.runs.values()
    }

    /// What is left, ascending.
    pub fn into_runs(self) -> Vec<BlockRun<B>> {
        self.runs.into_values().collect()
    }

    fn keep(&mut self, run: &BlockRun<B>, from: u64, to: u64) {
        if from < to {
            self.runs.insert(from, run.part(from, to));
        }
    }
}

impl<B: Part> Extend<BlockRun<B>> for NewestBlocks<B> {
    fn extend<T: IntoIterator<Item = BlockRun<B>>>(&mut self, runs: T) {
        runs.into_iter().for_each(|run| self.insert(run));
    }
}

#[cfg(test)]
mod tests {
    use super::{BlockRun, NewestBlocks};
    use colo_common::{BLOCK_SIZE, Block};
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn the_newest_version_of_each_block_is_left(
            steps in proptest::collection::vec((0..40_u64, 1..12_u64, any::<bool>()), 0..24),
        ) {
            let bytes: Vec<Vec<u8>> = (0..steps.len()).map(|n| vec![n as u8 + 1; 12 * BLOCK_SIZE]).collect();
            let (mut newest, mut model) = (NewestBlocks::default(), BTreeMap::new());
            for (at, &(first, count, is_data)) in steps.iter().enumerate() {
                newest.insert(if is_data {
                    BlockRun::data(Block(first), &bytes[at][..count as usize * BLOCK_SIZE])
                } else {
                    BlockRun::zeros(Block(first), count)
                });
                model.extend((first..first + count).map(|block| (block, if is_data { at as u8 + 1 } else { 0 })));
            }
            let (mut found, mut end) = (BTreeMap::new(), 0);
            for run in newest.into_runs() {
                prop_assert!(run.first().0 >= end && run.count() > 0);
                end = run.end().0;
                match run.bytes() {
                    Some(_) => found.extend(run.each().map(|(block, page)| (block.0, page[9]))),
                    None => found.extend((run.first().0..end).map(|block| (block, 0))),
                }
            }
            prop_assert_eq!(found, model);
        }
    }

    #[test]
    fn a_whole_disk_of_zeroes_is_one_run() {
        let page = [7; BLOCK_SIZE];
        let mut newest = NewestBlocks::default();
        newest.extend([BlockRun::zeros(Block(0), 1 << 32), BlockRun::data(Block(9), &page[..])]);
        let runs: Vec<_> = newest.into_runs().iter().map(|run| (run.first().0, run.count())).collect();
        assert_eq!(runs, [(0, 9), (9, 1), (10, (1 << 32) - 10)]);
    }
}
