//! The log that a runner's disk has before it: `primary::runner_disk`, over a claim in memory that outlives processes. It
//! never gets smaller; what the true one does to get smaller is tested beside it.

use colo_common::{Block, Point};
use colo_vmm::{BlockSet, Disk};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::plan::{BLOCKS, EXTENT};

/// The log's file. Clones are the same file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Intent(Arc<Mutex<Option<Claim>>>);

/// The disk holds a point, but for some extents.
#[derive(Clone, Debug)]
struct Claim {
    point: Point,
    extents: BlockSet,
}

impl Intent {
    /// `RunnerDisk::begin`.
    pub(crate) fn begin(&self, image: &dyn Disk, point: Point) -> Result<(), String> {
        image.flush().map_err(|e| e.to_string())?;
        *self.file() = Some(Claim { point, extents: BlockSet::new(BLOCKS) });
        Ok(())
    }

    /// `RunnerDisk::acked`: what is not named was never written.
    pub(crate) fn acked(&self, point: Point) {
        self.file().iter_mut().for_each(|claim| claim.point = claim.point.max(point));
    }

    /// `RunnerDisk::claimed`.
    pub(crate) fn claimed(&self) -> Option<(Point, BlockSet)> {
        self.file().clone().map(|claim| (claim.point, claim.extents))
    }

    /// `RunnerDisk::forget`.
    pub(crate) fn forget(&self) {
        *self.file() = None;
    }

    fn name(&self, blocks: Range<u64>) -> io::Result<()> {
        let mut file = self.file();
        let claim = file.as_mut().ok_or_else(|| io::Error::other("a guest that does not run writes"))?;
        let (first, end) = (blocks.start / EXTENT * EXTENT, blocks.end.next_multiple_of(EXTENT));
        claim.extents.insert_range(Block(first), end.min(BLOCKS) - first);
        Ok(())
    }

    fn file(&self) -> MutexGuard<'_, Option<Claim>> {
        self.0.lock().expect("nothing in here panics half-way")
    }
}

/// `RunnerDisk`: the image, and the log before it.
pub(crate) struct LoggedDisk {
    pub(crate) image: Arc<dyn Disk>,
    pub(crate) intent: Intent,
}

impl Disk for LoggedDisk {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = Block::containing(offset + bytes.len() as u64 - 1).0 + 1;
        self.intent.name(Block::containing(offset).0..end)?;
        self.image.write(offset, bytes)
    }

    fn zero(&self, blocks: Range<Block>, unmap: bool) -> io::Result<()> {
        self.intent.name(blocks.start.0..blocks.end.0)?;
        self.image.zero(blocks, unmap)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>> {
        self.image.next_data(from)
    }
}
