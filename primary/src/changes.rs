//! What a guest changed since the last point that was sent: pages of its memory, blocks of its disk, and the disk's
//! writes with their bytes. The open epoch holds one, and so does every epoch in flight, so that nothing is lost if it
//! fails.

use bytes::Bytes;
use colo_common::{BLOCK_SIZE, Block};
use colo_proto::pages::RUN_LEN;
use colo_vmm::block_runs::{BlockRun, NewestBlocks};
use colo_vmm::{BlockSet, DirtySet, Disk, DiskContent, DiskDelta, DiskWrite};
use std::io;

use crate::epoch::page_bytes;
use crate::replicator::Carried;

/// Blocks read from the disk at once.
const READ_BLOCKS: u64 = 64;

/// Changes since a point.
#[derive(Clone, Debug)]
pub struct Changes {
    /// Pages; the guest's memory has their bytes.
    pub pages: DirtySet,
    /// Blocks; the disk has their bytes.
    blocks: BlockSet,
    /// What blocks were made, after that. None of it is older than its block's place in `blocks`.
    writes: NewestBlocks<Bytes>,
}

impl Changes {
    /// None, of a guest with frames below `frames` and so many blocks.
    pub fn none(frames: u64, blocks: u64) -> Self {
        let (pages, blocks) = (DirtySet::new(frames), BlockSet::new(blocks));
        Self { pages, blocks, writes: NewestBlocks::default() }
    }

    /// None of the same guest.
    pub fn fresh(&self) -> Self {
        Self::none(self.pages.frames(), self.blocks.blocks())
    }

    /// Takes blocks of which only the disk knows what they hold.
    pub fn add_blocks(&mut self, blocks: &BlockSet) {
        for (first, count) in blocks.runs() {
            self.writes.remove(first, count);
        }
        self.blocks.union_with(blocks);
    }

    /// Takes what a cut brought of the disk.
    pub fn add_disk(&mut self, delta: DiskDelta) {
        self.add_blocks(&delta.blocks);
        self.writes.extend(delta.writes.into_iter().map(BlockRun::from));
    }

    /// Lets go of the writes' bytes: from now on the disk has them. That blocks were made zero stays known, which costs
    /// little and may be about very many.
    pub fn forget_bytes(&mut self) {
        let writes = std::mem::take(&mut self.writes);
        for run in writes.into_runs() {
            match run.bytes() {
                Some(_) => self.blocks.insert_range(run.first(), run.count()),
                None => self.writes.insert(run),
            }
        }
    }

    /// All blocks that changed, as runs, which are none after that.
    pub fn take_blocks(&mut self) -> Vec<(Block, u64)> {
        for run in std::mem::take(&mut self.writes).into_runs() {
            self.blocks.insert_range(run.first(), run.count());
        }
        let runs = self.blocks.runs().collect();
        self.blocks.clear();
        runs
    }

    /// All blocks that changed, as runs; one may be in two of them.
    pub fn block_runs(&self) -> impl Iterator<Item = (Block, u64)> + '_ {
        self.blocks.runs().chain(self.writes.runs().map(|run| (run.first(), run.count())))
    }

    /// Pages and blocks whose bytes an epoch has to carry.
    pub fn count(&self) -> u64 {
        let written = self.writes.runs().filter(|run| run.bytes().is_some()).map(BlockRun::count);
        self.pages.len() + self.blocks.len() + written.sum::<u64>()
    }

    /// Bytes that they take in an epoch, at most: with a run for each page and block at worst.
    pub fn bytes(&self) -> u64 {
        let zeroes = self.writes.runs().filter(|run| run.bytes().is_none()).count();
        page_bytes(self.count()) + (zeroes * RUN_LEN) as u64
    }

    /// The disk's part of an epoch: what the blocks hold now, then the writes. What is under way meanwhile may show in
    /// blocks already; it is in the machine's state too, and done again by whoever runs on from there. The writes stay
    /// here, for an epoch that may fail.
    ///
    /// # Errors
    /// The disk cannot be read.
    pub fn disk_part(&self, disk: Option<&dyn Disk>) -> io::Result<Vec<DiskWrite>> {
        let mut part = Vec::new();
        for (first, count) in self.blocks.runs() {
            let disk = disk.ok_or_else(|| io::Error::other("there is no disk"))?;
            read_blocks(disk, first, count, |write| part.push(write))?;
        }
        part.extend(self.writes.runs().cloned().map(DiskWrite::from));
        Ok(part)
    }
}

impl Carried for Changes {
    fn merge(&mut self, newer: Self) {
        self.pages.union_with(&newer.pages);
        self.add_blocks(&newer.blocks);
        self.writes.extend(newer.writes.into_runs());
    }

    fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.blocks.is_empty() && self.writes.runs().next().is_none()
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

#[cfg(test)]
mod tests {
    use super::Changes;
    use crate::replicator::Carried;
    use bytes::Bytes;
    use colo_common::{BLOCK_SIZE, Block};
    use colo_vmm::disk::FileDisk;
    use colo_vmm::{BlockSet, Disk, DiskContent, DiskDelta, DiskWrite};
    use proptest::prelude::{Just, ProptestConfig, Strategy, prop_assert, prop_oneof, proptest};
    use std::collections::VecDeque;

    fn bytes(first: u64, value: u8, blocks: usize) -> DiskWrite {
        let content = DiskContent::Bytes(Bytes::from(vec![value; blocks * BLOCK_SIZE]));
        DiskWrite { first: Block(first), content }
    }

    fn zeroes(first: u64, count: u64) -> DiskWrite {
        DiskWrite { first: Block(first), content: DiskContent::Zeroes(count) }
    }

    fn add(changes: &mut Changes, writes: &[DiskWrite]) {
        changes.add_disk(DiskDelta { writes: writes.to_vec(), blocks: BlockSet::new(0) });
    }

    fn set(blocks: u64, runs: &[(u64, u64)]) -> BlockSet {
        let mut set = BlockSet::new(blocks);
        runs.iter().for_each(|&(first, count)| set.insert_range(Block(first), count));
        set
    }

    #[test]
    fn blocks_are_read_from_the_disk_and_zeroes_told_as_such() {
        let place = tempfile::tempdir().unwrap();
        let disk = FileDisk::open_sized(&place.path().join("disk"), 1 << 20, true).unwrap();
        disk.write(Block(3).offset(), &[1; 2 * BLOCK_SIZE]).unwrap();
        let mut open = Changes::none(16, 256);
        open.add_blocks(&set(256, &[(3, 2), (100, 70)]));
        let part = open.disk_part(Some(&disk)).unwrap();
        assert_eq!(part, [bytes(3, 1, 2), zeroes(100, 64), zeroes(164, 6)]);
        assert!(open.disk_part(None).is_err());
    }

    #[test]
    fn what_was_made_zero_costs_nothing_however_much_it_is() {
        let mut open = Changes::none(16, 1 << 32);
        add(&mut open, &[zeroes(0, 1 << 31), bytes(7, 1, 1)]);
        open.forget_bytes();
        assert_eq!((open.count(), open.blocks.len()), (1, 1));
        assert!(open.bytes() < 2 * BLOCK_SIZE as u64 && !open.is_empty());
        let mut failed = open;
        let mut newer = Changes::none(16, 1 << 32);
        add(&mut newer, &[zeroes(1 << 31, 9)]);
        failed.merge(newer);
        assert_eq!(failed.count(), 1);
        assert_eq!(failed.take_blocks(), [(Block(0), (1 << 31) + 9)]);
        assert!(failed.is_empty());
    }

    /// What happens to a disk of 32 blocks between a runner and its copy.
    #[derive(Clone, Debug)]
    enum Step {
        /// A write with its bytes, of this value; zeroes if it is 0.
        Write(u64, u64, u8),
        /// A write of which only the disk knows.
        Blind(u64, u64, u8),
        /// From now on only the disk knows.
        Forget,
        Cut,
        Ack,
        /// All that is in flight fails.
        Fail,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let place = || (0..28_u64, 1..5_u64, 0..4_u8);
        let step = prop_oneof![
            4 => place().prop_map(|(first, count, value)| Step::Write(first, count, value)),
            2 => place().prop_map(|(first, count, value)| Step::Blind(first, count, value)),
            1 => Just(Step::Forget),
            3 => Just(Step::Cut),
            2 => Just(Step::Ack),
            1 => Just(Step::Fail),
        ];
        proptest::collection::vec(step, 0..60)
    }

    /// A runner's disk, what is in flight, and the copy.
    struct Pair {
        disk: FileDisk,
        open: Changes,
        sent: VecDeque<(Changes, Vec<DiskWrite>)>,
        copy: Vec<u8>,
    }

    impl Pair {
        fn step(&mut self, step: &Step) {
            match *step {
                Step::Write(first, count, value) => {
                    self.disk
                        .write(Block(first).offset(), &vec![value; count as usize * BLOCK_SIZE])
                        .unwrap();
                    let write =
                        if value == 0 { zeroes(first, count) } else { bytes(first, value, count as usize) };
                    add(&mut self.open, &[write]);
                }
                Step::Blind(first, count, value) => {
                    self.disk
                        .write(Block(first).offset(), &vec![value; count as usize * BLOCK_SIZE])
                        .unwrap();
                    self.open.add_blocks(&set(32, &[(first, count)]));
                }
                Step::Forget => self.open.forget_bytes(),
                Step::Cut => {
                    let part = self.open.disk_part(Some(&self.disk)).unwrap();
                    let fresh = self.open.fresh();
                    self.sent.push_back((std::mem::replace(&mut self.open, fresh), part));
                }
                Step::Ack => {
                    for write in self.sent.pop_front().map(|(_, part)| part).unwrap_or_default() {
                        let blocks = write.blocks();
                        let here = blocks.start.offset() as usize..blocks.end.offset() as usize;
                        match write.content {
                            DiskContent::Bytes(bytes) => self.copy[here].copy_from_slice(&bytes),
                            DiskContent::Zeroes(_) => self.copy[here].fill(0),
                        }
                    }
                }
                Step::Fail => {
                    let mut all = self.open.fresh();
                    self.sent.drain(..).for_each(|(carried, _)| all.merge(carried));
                    let newer = std::mem::replace(&mut self.open, all);
                    self.open.merge(newer);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn whatever_fails_the_copy_gets_what_the_disk_has(steps in steps()) {
            let place = tempfile::tempdir().unwrap();
            let disk = FileDisk::open_sized(&place.path().join("disk"), 32 * BLOCK_SIZE as u64, true).unwrap();
            let (open, copy) = (Changes::none(16, 32), vec![0; 32 * BLOCK_SIZE]);
            let mut pair = Pair { disk, open, sent: VecDeque::new(), copy };
            steps.iter().for_each(|step| pair.step(step));
            pair.step(&Step::Cut);
            while !pair.sent.is_empty() {
                pair.step(&Step::Ack);
            }
            let mut found = vec![0; 32 * BLOCK_SIZE];
            pair.disk.read(0, &mut found).unwrap();
            prop_assert!(found == pair.copy);
        }
    }
}
