//! Runs of a disk's blocks with what they hold, and which of several versions is the newest: without ever counting block
//! by block what a guest has made zero, which may be its whole disk at once.

use colo_common::{BLOCK_SIZE, Block};
use colo_vmm::memory::Page;
use std::collections::BTreeMap;

/// Blocks that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun<'a> {
    first: Block,
    count: u64,
    /// What they hold; nothing for zeroes.
    bytes: Option<&'a [u8]>,
}

impl<'a> BlockRun<'a> {
    /// Blocks with these bytes.
    ///
    /// # Panics
    /// They are not whole blocks.
    pub fn data(first: Block, bytes: &'a [u8]) -> Self {
        assert!(bytes.len().is_multiple_of(BLOCK_SIZE), "{} bytes are not whole blocks", bytes.len());
        Self { first, count: (bytes.len() / BLOCK_SIZE) as u64, bytes: Some(bytes) }
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
    pub fn bytes(&self) -> Option<&'a [u8]> {
        self.bytes
    }

    /// Each block with its bytes; none for zeroes, which are not to be counted one by one.
    pub fn each(&self) -> impl Iterator<Item = (Block, &'a Page)> + use<'a> {
        let pages = self.bytes.map_or(&[] as &[Page], |bytes| bytes.as_chunks().0);
        (self.first.0..).map(Block).zip(pages)
    }

    /// The part from one block to before another.
    fn part(&self, from: u64, to: u64) -> Self {
        let at = |block: u64| (block - self.first.0) as usize * BLOCK_SIZE;
        let bytes = self.bytes.map(|bytes| &bytes[at(from)..at(to)]);
        Self { first: Block(from), count: to - from, bytes }
    }
}

/// The newest version of blocks of which several may come.
#[derive(Debug, Default)]
pub struct NewestBlocks<'a> {
    /// By first block, apart from each other.
    runs: BTreeMap<u64, BlockRun<'a>>,
}

impl<'a> NewestBlocks<'a> {
    /// Takes a run that is newer than all before.
    pub fn insert(&mut self, run: BlockRun<'a>) {
        let (from, to) = (run.first.0, run.end().0);
        if from == to {
            return;
        }
        if let Some((_, before)) = self.runs.range(..from).next_back()
            && before.end().0 > from
        {
            let before = *before;
            self.keep(before, before.first.0, from);
            self.keep(before, to, before.end().0);
        }
        while let Some((&first, &covered)) = self.runs.range(from..to).next() {
            self.runs.remove(&first);
            self.keep(covered, to, covered.end().0);
        }
        self.runs.insert(from, run);
    }

    /// What is left, ascending.
    pub fn into_runs(self) -> Vec<BlockRun<'a>> {
        self.runs.into_values().collect()
    }

    fn keep(&mut self, run: BlockRun<'a>, from: u64, to: u64) {
        if from < to {
            self.runs.insert(from, run.part(from, to));
        }
    }
}

impl<'a> Extend<BlockRun<'a>> for NewestBlocks<'a> {
    fn extend<T: IntoIterator<Item = BlockRun<'a>>>(&mut self, runs: T) {
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
        let mut newest = NewestBlocks::default();
        let page = [7; BLOCK_SIZE];
        newest.extend([BlockRun::zeros(Block(0), 1 << 32), BlockRun::data(Block(9), &page)]);
        let runs: Vec<_> = newest.into_runs().iter().map(|run| (run.first().0, run.count())).collect();
        assert_eq!(runs, [(0, 9), (9, 1), (10, (1 << 32) - 10)]);
    }
}
