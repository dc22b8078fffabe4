//! A set of blocks of the guest's disk that costs what is in it: a [`DirtySet`] that counts blocks.

use colo_common::{Block, Gfn};

use crate::dirty_set::DirtySet;

/// Blocks; ordered, without duplicates.
#[derive(Clone)]
pub struct BlockSet(DirtySet);

impl BlockSet {
    /// An empty set for blocks below number `blocks`.
    pub fn new(blocks: u64) -> Self {
        Self(DirtySet::new(blocks))
    }

    /// The same numbers as frames, for what keeps either.
    pub(crate) fn as_dirty_set(&self) -> &DirtySet {
        &self.0
    }

    /// The frames of a set, as blocks.
    pub(crate) fn from_dirty_set(set: DirtySet) -> Self {
        Self(set)
    }

    /// The exclusive upper bound of the blocks that it can hold.
    pub fn blocks(&self) -> u64 {
        self.0.frames()
    }

    /// Number of blocks in the set.
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a block; tells whether it is new.
    ///
    /// # Panics
    /// `block` is not below [`blocks`](Self::blocks): whoever takes numbers from outside checks them first.
    pub fn insert(&mut self, block: Block) -> bool {
        self.0.insert(Gfn(block.0))
    }

    /// Adds `count` blocks from `first` on.
    ///
    /// # Panics
    /// As [`insert`](Self::insert).
    pub fn insert_range(&mut self, first: Block, count: u64) {
        self.0.insert_range(Gfn(first.0), count);
    }

    /// Takes a block out; tells whether it was in.
    pub fn remove(&mut self, block: Block) -> bool {
        self.0.remove(Gfn(block.0))
    }

    /// Whether the block is in the set.
    pub fn contains(&self, block: Block) -> bool {
        self.0.contains(Gfn(block.0))
    }

    /// The first block of the set from `from` on.
    pub fn next(&self, from: Block) -> Option<Block> {
        self.0.next(Gfn(from.0)).map(|gfn| Block(gfn.0))
    }

    /// Adds everything that `other` holds.
    ///
    /// # Panics
    /// `other` holds a block that this set cannot.
    pub fn union_with(&mut self, other: &Self) {
        self.0.union_with(&other.0);
    }

    /// Removes every block.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The blocks in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Block> + '_ {
        self.0.iter().map(|gfn| Block(gfn.0))
    }

    /// Maximal runs of neighbouring blocks, ascending: (first block, number of blocks).
    pub fn runs(&self) -> impl Iterator<Item = (Block, u64)> + '_ {
        self.0.runs().map(|(first, count)| (Block(first.0), count))
    }
}

impl std::fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockSet({} of {} blocks)", self.len(), self.blocks())
    }
}

#[cfg(test)]
mod tests {
    use super::BlockSet;
    use colo_common::Block;
    use colo_common::limits::MAX_DISK_BYTES;

    #[test]
    fn the_last_block_of_the_largest_disk_has_its_place() {
        let blocks = MAX_DISK_BYTES / 4096;
        let mut set = BlockSet::new(blocks);
        assert!(set.insert(Block(blocks - 1)) && !set.insert(Block(blocks - 1)));
        set.insert_range(Block(5), 3);
        assert_eq!(set.runs().collect::<Vec<_>>(), [(Block(5), 3), (Block(blocks - 1), 1)]);
        assert_eq!([0, 6, 8].map(|from| set.next(Block(from)).unwrap().0), [5, 6, blocks - 1]);
        assert!(set.remove(Block(6)) && !set.contains(Block(6)));
        let mut all = BlockSet::new(blocks);
        all.union_with(&set);
        assert_eq!(all.iter().map(|block| block.0).collect::<Vec<_>>(), [5, 7, blocks - 1]);
        all.clear();
        assert!(all.is_empty() && all.next(Block(0)).is_none() && set.len() == 3);
    }
}
