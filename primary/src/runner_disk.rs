//! The disk of a guest that may run here: the image, and before it the intent log once the guest does. A guest that only
//! waits writes nothing, so there is no log of it, and the one of a life before stays as it is: it tells what of the image
//! differs from what another node has.

use colo_common::{Block, Epoch, Point, VmId};
use colo_vmm::disk::intent::{CLEAN_EVERY, Claim, Cleaner, IntentError, IntentLog, LoggedDisk};
use colo_vmm::{BlockSet, Disk};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// What stands behind the guest's disk on this node.
pub struct RunnerDisk {
    image: Arc<dyn Disk>,
    path: PathBuf,
    running: OnceLock<Running>,
    /// What requests are about to change, or have changed in no epoch yet. As many as the device's queue has.
    under_way: Mutex<Vec<Range<Block>>>,
}

struct Running {
    disk: Arc<LoggedDisk>,
    _cleaner: Cleaner,
}

/// Why a guest's disk cannot be run on.
#[derive(Debug, thiserror::Error)]
pub enum RunnerDiskError {
    /// The log.
    #[error(transparent)]
    Intent(#[from] IntentError),
    /// The image, before the log says that it is safe.
    #[error("the guest's disk cannot be made safe: {0}; check the device that it is on")]
    Sync(#[source] io::Error),
    /// Its thread.
    #[error("no thread can be had: {0}; raise the limit on processes (ulimit -u)")]
    Thread(#[source] io::Error),
}

impl RunnerDisk {
    /// An image whose log is at `path` while the guest runs.
    pub fn new(image: Arc<dyn Disk>, path: PathBuf) -> Self {
        Self { image, path, running: OnceLock::new(), under_way: Mutex::default() }
    }

    /// The guest is about to run here, from `point`, which the image holds.
    ///
    /// # Errors
    /// The log cannot be made, or the image not be synced.
    ///
    /// # Panics
    /// It runs already: an own bug.
    pub fn begin(&self, vm: &VmId, point: Point) -> Result<(), RunnerDiskError> {
        self.image.flush().map_err(RunnerDiskError::Sync)?;
        let log = IntentLog::create(&self.path, self.image.bytes(), vm, point)?;
        let disk = Arc::new(LoggedDisk::new(Arc::clone(&self.image), log));
        let cleaner = Cleaner::start(Arc::clone(&disk), CLEAN_EVERY).map_err(RunnerDiskError::Thread)?;
        let begun = self.running.set(Running { disk, _cleaner: cleaner });
        assert!(begun.is_ok(), "the guest's disk is run on twice");
        Ok(())
    }

    /// What the guest writes from now on is of this epoch, or of a later one: said before the cut that begins it.
    pub fn open(&self, epoch: Epoch) {
        self.logged().iter().for_each(|disk| disk.log().set_open_epoch(epoch));
    }

    /// Blocks whose bytes on the image may be of a request that is in no epoch yet. While the guest stands after a cut, it
    /// is what that cut's epoch lacks.
    pub fn under_way(&self) -> Vec<Range<Block>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The secondary has acked this point.
    pub fn acked(&self, point: Point) {
        self.logged().iter().for_each(|disk| disk.log().acked(point));
    }

    /// The guest has stopped for good: the newest point that the image holds, and where it may hold something else.
    pub fn remains(&self) -> Option<(Point, BlockSet)> {
        let (point, extents) = self.logged()?.log().remains();
        Some((point, extents.blocks()))
    }

    /// What the log of a life before claims.
    ///
    /// # Errors
    /// It cannot be read, or is damaged: digests tell, then.
    pub fn claimed(path: &Path) -> Result<Option<Claim>, IntentError> {
        IntentLog::read(path)
    }

    /// The image becomes something that the log of a life before knows nothing of.
    ///
    /// # Errors
    /// The system refuses.
    pub fn forget(path: &Path) -> Result<(), IntentError> {
        IntentLog::remove(path)
    }

    fn logged(&self) -> Option<&Arc<LoggedDisk>> {
        self.running.get().map(|running| &running.disk)
    }

    fn writable(&self) -> io::Result<&Arc<LoggedDisk>> {
        self.logged().ok_or_else(|| io::Error::other("a guest that does not run writes to its disk"))
    }
}

impl Disk for RunnerDisk {
    fn bytes(&self) -> u64 {
        self.image.bytes()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.image.read(offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.writable()?.write(offset, bytes)
    }

    fn zero(&self, blocks: Range<Block>, unmap: bool) -> io::Result<()> {
        self.writable()?.zero(blocks, unmap)
    }

    fn flush(&self) -> io::Result<()> {
        self.logged().map_or_else(|| self.image.flush(), |disk| disk.flush())
    }

    fn next_data(&self, from: Block) -> io::Result<Option<Range<Block>>> {
        self.image.next_data(from)
    }

    fn change_begins(&self, blocks: Range<Block>) {
        self.logged().iter().for_each(|disk| disk.change_begins(blocks.clone()));
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).push(blocks);
    }

    fn change_recorded(&self, blocks: Range<Block>) {
        self.logged().iter().for_each(|disk| disk.change_recorded(blocks.clone()));
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = under_way.iter().position(|begun| *begun == blocks) {
            under_way.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::RunnerDisk;
    use colo_common::history::point;
    use colo_common::{BLOCK_SIZE, Block, Epoch};
    use colo_vmm::Disk;
    use colo_vmm::disk::FileDisk;
    use std::sync::Arc;

    #[test]
    fn a_guest_that_waits_leaves_the_log_of_the_life_before() {
        let place = tempfile::tempdir().unwrap();
        let (image, path) = (place.path().join("image"), place.path().join("intent"));
        let open = || Arc::new(FileDisk::open_sized(&image, 4 << 20, true).unwrap());
        let vm = "web".parse().unwrap();
        let life = RunnerDisk::new(open(), path.clone());
        assert!(life.write(0, &[1; BLOCK_SIZE]).is_err(), "it does not run");
        life.begin(&vm, point(1, 4)).unwrap();
        life.write(0, &[1; BLOCK_SIZE]).unwrap();
        life.open(Epoch(6));
        life.acked(point(1, 5));
        life.write(2 << 20, &[2; BLOCK_SIZE]).unwrap();
        let (at, but_for) = life.remains().unwrap();
        assert_eq!(
            (at, but_for.contains(Block(0)), but_for.contains(Block(512))),
            (point(1, 5), false, true)
        );
        drop(life);
        let waits = RunnerDisk::new(open(), path.clone());
        let (one, other) = (Block(1)..Block(3), Block(7)..Block(8));
        [&one, &other, &one].into_iter().for_each(|blocks| waits.change_begins(blocks.clone()));
        waits.change_recorded(one.clone());
        assert_eq!(waits.under_way().len(), 2);
        waits.change_recorded(one);
        assert_eq!(waits.under_way(), [other]);
        waits.open(Epoch(9));
        waits.acked(point(1, 8));
        assert!(waits.remains().is_none());
        let claim = RunnerDisk::claimed(&path).unwrap().unwrap();
        // Named when 1.5 was acked: what it does not name is as in that too.
        assert_eq!((claim.point, claim.extents.len()), (point(1, 5), 2));
    }
}
