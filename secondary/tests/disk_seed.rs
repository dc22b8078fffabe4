//! The image file is synced while a seed comes, so that the copy is whole soon after its last block.

mod store_script;

use colo_common::{BLOCK_SIZE, Block};
use colo_secondary::disk::DiskImage;
use colo_secondary::store::{Base, BlockRun, MemoryDisk, Store};
use colo_vmm::disk::Disk;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use store_script::vm;

const MIB: u64 = 1 << 20;

/// A disk that forgets what it is given and counts what was not flushed.
#[derive(Default)]
struct Counting {
    unsynced: AtomicU64,
    most: AtomicU64,
}

impl Disk for Counting {
    fn bytes(&self) -> u64 {
        1 << 30
    }

    fn read(&self, _offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn write(&self, _offset: u64, bytes: &[u8]) -> io::Result<()> {
        let now = self.unsynced.fetch_add(bytes.len() as u64, Ordering::SeqCst) + bytes.len() as u64;
        self.most.fetch_max(now, Ordering::SeqCst);
        Ok(())
    }

    fn zero(&self, _blocks: Range<Block>, _unmap: bool) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.unsynced.store(0, Ordering::SeqCst);
        Ok(())
    }

    fn next_data(&self, _from: Block) -> io::Result<Option<Range<Block>>> {
        Ok(None)
    }
}

/// A store into which a seed is going, over a disk that counts.
fn seeding() -> (Store, Arc<DiskImage>, Arc<Counting>) {
    let counting = Arc::new(Counting::default());
    let mut store = Store::open_in_memory(&MemoryDisk::new(), &vm()).unwrap();
    let disk = store.attach_disk(Arc::clone(&counting) as Arc<dyn Disk>).unwrap();
    store.begin_copy(Base::Empty).unwrap();
    (store, disk, counting)
}

fn seed(store: &mut Store, mib: u64) {
    let bytes = vec![7; MIB as usize];
    for at in 0..mib {
        store.write_blocks([BlockRun::data(Block(at * (MIB / BLOCK_SIZE as u64)), &bytes)]).unwrap();
    }
}

#[test]
fn what_comes_is_synced_behind_it() {
    let (mut store, disk, counting) = seeding();
    disk.start_folding().unwrap();
    seed(&mut store, 40);
    let began = Instant::now();
    while counting.unsynced.load(Ordering::SeqCst) > 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "nobody syncs it");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn no_more_than_a_bound_waits_for_a_sync() {
    let (mut store, _disk, counting) = seeding();
    seed(&mut store, 600);
    assert_eq!(counting.most.load(Ordering::SeqCst), 128 * MIB);
}
