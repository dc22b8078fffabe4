//! What a guest changed since the last point that was sent: pages of its memory, blocks of its disk, and the disk's
//! writes with their bytes. The open epoch holds one, and so does every epoch in flight, so that nothing is lost if it
//! fails.

use bytes::Bytes;
use colo_common::{BLOCK_SIZE, Block, PAGE_SIZE};
use colo_vmm::{BlockSet, DirtySet, Disk, DiskContent, DiskDelta, DiskWrite};
use std::io;

use crate::replicator::Carried;

/// Blocks read from the disk at once.
const READ_BLOCKS: u64 = 64;

/// Changes since a point.
#[derive(Clone, Debug)]
pub struct Changes {
    /// Pages; the guest's memory has their bytes.
    pub pages: DirtySet,
    /// Blocks; the disk has their bytes.
    pub blocks: BlockSet,
    /// Writes to the disk after those, in order, with their bytes.
    writes: Vec<DiskWrite>,
    /// Blocks of the writes, as often as they come.
    written: u64,
}

impl Changes {
    /// None, of a guest with frames below `frames` and so many blocks.
    pub fn none(frames: u64, blocks: u64) -> Self {
        let (pages, blocks) = (DirtySet::new(frames), BlockSet::new(blocks));
        Self { pages, blocks, writes: Vec::new(), written: 0 }
    }

    /// None of the same guest.
    pub fn fresh(&self) -> Self {
        Self::none(self.pages.frames(), self.blocks.blocks())
    }

    /// Takes what a cut brought of the disk.
    pub fn add_disk(&mut self, delta: DiskDelta) {
        self.blocks.union_with(&delta.blocks);
        self.written += delta.writes.iter().map(blocks_of).sum::<u64>();
        self.writes.extend(delta.writes);
    }

    /// Lets go of the writes' bytes: from now on the disk has them.
    pub fn forget_bytes(&mut self) {
        for write in self.writes.drain(..) {
            self.blocks.insert_range(write.first, blocks_of(&write));
        }
        self.written = 0;
    }

    /// Pages and blocks in all, at most.
    pub fn count(&self) -> u64 {
        self.pages.len() + self.blocks.len() + self.written
    }

    /// Bytes that they take in an epoch, at most.
    pub fn bytes(&self) -> u64 {
        self.count() * PAGE_SIZE as u64
    }

    /// The disk's part of an epoch: what the blocks hold now, then the writes. What is under way meanwhile may show in
    /// blocks already; it is in the machine's state too, and done again by whoever runs on from there.
    ///
    /// # Errors
    /// The disk cannot be read.
    pub fn disk_part(&mut self, disk: Option<&dyn Disk>) -> io::Result<Vec<DiskWrite>> {
        let mut part = Vec::new();
        for (first, count) in self.blocks.runs() {
            let disk = disk.ok_or_else(|| io::Error::other("there is no disk"))?;
            read_blocks(disk, first, count, |write| part.push(write))?;
        }
        part.extend(self.writes.iter().cloned());
        self.forget_bytes();
        Ok(part)
    }
}

impl Carried for Changes {
    fn merge(&mut self, mut other: Self) {
        other.forget_bytes();
        self.pages.union_with(&other.pages);
        self.blocks.union_with(&other.blocks);
    }

    fn is_empty(&self) -> bool {
        self.count() == 0
    }
}

/// Reads a run of blocks, in pieces; blocks of zeroes become such.
///
/// # Errors
/// The disk cannot be read.
pub fn read_blocks(
    disk: &dyn Disk,
    first: Block,
    count: u64,
    mut each: impl FnMut(DiskWrite),
) -> io::Result<()> {
    for at in (0..count).step_by(READ_BLOCKS as usize) {
        let (from, blocks) = (Block(first.0 + at), READ_BLOCKS.min(count - at));
        let mut bytes = vec![0; blocks as usize * BLOCK_SIZE];
        disk.read(from.offset(), &mut bytes)?;
        let content = if bytes.iter().all(|&byte| byte == 0) {
            DiskContent::Zeroes(blocks)
        } else {
            DiskContent::Bytes(Bytes::from(bytes))
        };
        each(DiskWrite { first: from, content });
    }
    Ok(())
}

fn blocks_of(write: &DiskWrite) -> u64 {
    let blocks = write.blocks();
    blocks.end.0 - blocks.start.0
}

#[cfg(test)]
mod tests {
    use super::Changes;
    use crate::replicator::Carried;
    use bytes::Bytes;
    use colo_common::{BLOCK_SIZE, Block, Gfn};
    use colo_vmm::disk::FileDisk;
    use colo_vmm::{Disk, DiskContent, DiskDelta, DiskWrite};

    fn bytes(first: u64, value: u8, blocks: usize) -> DiskWrite {
        let content = DiskContent::Bytes(Bytes::from(vec![value; blocks * BLOCK_SIZE]));
        DiskWrite { first: Block(first), content }
    }

    #[test]
    fn an_epoch_that_fails_is_sent_again_from_the_disk() {
        let place = tempfile::tempdir().unwrap();
        let disk = FileDisk::open_sized(&place.path().join("disk"), 1 << 20, true).unwrap();
        let mut open = Changes::none(16, 256);
        let mut delta = DiskDelta::none();
        delta.writes = vec![bytes(3, 1, 2), bytes(4, 2, 1)];
        open.add_disk(delta);
        assert_eq!(open.count(), 3);
        let fresh = open.fresh();
        let mut sent = std::mem::replace(&mut open, fresh);
        assert_eq!(
            sent.disk_part(None).unwrap(),
            [bytes(3, 1, 2), bytes(4, 2, 1)],
            "no disk is read for them"
        );
        disk.write(Block(3).offset(), &[1; BLOCK_SIZE]).unwrap();
        disk.write(Block(4).offset(), &[7; BLOCK_SIZE]).unwrap();
        open.pages.insert(Gfn(1));
        open.merge(sent);
        assert!(!open.is_empty() && open.blocks.len() == 2 && open.count() == 3);
        let mut both = vec![1; BLOCK_SIZE];
        both.resize(2 * BLOCK_SIZE, 7);
        let again = DiskWrite { first: Block(3), content: DiskContent::Bytes(both.into()) };
        assert_eq!(open.disk_part(Some(&disk)).unwrap(), [again], "what the disk holds now");
        open.blocks.clear();
        open.blocks.insert_range(Block(100), 70);
        let zeroes = |first, count| DiskWrite { first: Block(first), content: DiskContent::Zeroes(count) };
        assert_eq!(open.disk_part(Some(&disk)).unwrap(), [zeroes(100, 64), zeroes(164, 6)]);
        assert!(open.disk_part(None).is_err());
    }
}
