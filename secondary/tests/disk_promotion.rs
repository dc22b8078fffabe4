//! Promotions that bring more blocks than one batch takes: cut off, amid a sync of the image file, and with a guest that
//! writes while they are folded.

mod fault_disk;
mod store_script;

use colo_common::history::point;
use colo_common::{BLOCK_SIZE, Block, History, Term};
use colo_primary::node::status::Overlay;
use colo_secondary::disk::DiskImage;
use colo_secondary::store::{Base, BlockRun, Mark, MemoryDisk, Store, StoreError};
use colo_vmm::disk::Disk;
use fault_disk::FaultDisk;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use store_script::vm;

const BLOCKS: usize = 16;
/// So small that a few blocks go through `pending`.
const BATCH: usize = 3 * BLOCK_SIZE;
/// Marks for which a reader looks on: an instant in which it finds nothing is met within some hundred.
const ROUNDS: u64 = 5000;

struct Rig {
    medium: MemoryDisk,
    file: FaultDisk,
    store: Store,
    disk: Arc<DiskImage>,
}

impl Rig {
    /// A whole copy at 1.2, the last mark of which wrote `blocks`.
    fn new(first: u64, count: usize, fill: u8) -> Self {
        let (medium, file) = (MemoryDisk::new(), FaultDisk::new((BLOCKS * BLOCK_SIZE) as u64));
        let (store, disk) = open(&medium, &file);
        let mut rig = Self { medium, file, store, disk };
        rig.store.begin_copy(Base::Empty).unwrap();
        let mut history = History::default();
        let bytes = vec![fill; count * BLOCK_SIZE];
        for (epoch, blocks) in [(1, &[][..]), (2, &[BlockRun::data(Block(first), &bytes)][..])] {
            let at = point(1, epoch);
            history.extend(at);
            let mark =
                Mark { point: at, history: &history, state: b"state", blocks, now: SystemTime::UNIX_EPOCH };
            let done = if epoch == 1 { rig.store.complete(mark, None) } else { rig.store.persist([], mark) };
            done.unwrap();
        }
        rig
    }

    /// All that was not synced is lost, but the first `kept` of the store's writes.
    fn crash(&mut self, kept: u64) {
        self.medium.crash(kept);
        self.file.crash(&mut |_| 1);
        (self.store, self.disk) = open(&self.medium, &self.file);
    }
}

fn open(medium: &MemoryDisk, file: &FaultDisk) -> (Store, Arc<DiskImage>) {
    let mut store = Store::open_in_memory(medium, &vm()).unwrap();
    store.limit_batches(BATCH);
    let disk = store.attach_disk(Arc::new(file.open())).unwrap();
    (store, disk)
}

/// The guest runs here, with these blocks.
fn promote(store: &mut Store, first: u64, count: usize, fill: u8) -> Result<(), StoreError> {
    store.activate(Term(2), &[BlockRun::data(Block(first), &vec![fill; count * BLOCK_SIZE])])
}

fn content(disk: &DiskImage) -> Vec<u8> {
    let mut bytes = vec![0; BLOCKS * BLOCK_SIZE];
    disk.read(0, &mut bytes).unwrap();
    bytes.into_iter().step_by(BLOCK_SIZE).collect()
}

#[test]
fn one_that_was_cut_off_leaves_nothing_of_itself() {
    let (mark, first, again) = ([1; 6], [2; 8], [3; 5]);
    let (mut before, mut after) = (0, 0);
    for (writes, kept) in (0..6).flat_map(|writes| (0..8).map(move |kept| (writes, kept))) {
        let mut rig = Rig::new(0, mark.len(), 1);
        rig.medium.die_after(writes);
        let done = promote(&mut rig.store, 8, first.len(), 2);
        rig.crash(kept);
        let ran = rig.store.summary().active.is_some();
        assert!(ran || done.is_err());
        let wanted = [&mark[..], &[0; 2], if ran { &first } else { &[0; 8] }].concat();
        assert_eq!(content(&rig.disk), wanted, "{writes} {kept}");
        if ran {
            after += 1;
            continue;
        }
        before += 1;
        promote(&mut rig.store, 6, again.len(), 3).unwrap();
        let wanted = [&mark[..], &again, &[0; 5]].concat();
        assert_eq!(content(&rig.disk), wanted, "{writes} {kept}");
        while rig.disk.fold(2).unwrap() > 0 {}
        assert_eq!((rig.disk.overlay_blocks(), content(&rig.disk)), (0, wanted.clone()));
        rig.crash(0);
        assert_eq!(content(&rig.disk), wanted);
    }
    assert!(before > 10 && after > 5, "{before} {after}");
}

#[test]
fn a_block_counts_once_until_it_is_in_the_file() {
    let told = |disk: &DiskImage| disk.bytes_to_fold() / BLOCK_SIZE as u64;
    let mut rig = Rig::new(0, 2, 1);
    assert_eq!(told(&rig.disk), 2);
    // Through `pending`: two of them have an older entry beside it, also after a restart.
    promote(&mut rig.store, 0, 8, 2).unwrap();
    assert_eq!(told(&rig.disk), 8);
    rig.crash(0);
    assert_eq!(told(&rig.disk), 8);
    let disk = Arc::clone(&rig.disk);
    rig.file.in_flush(move || assert_eq!(told(&disk), 5, "three are in the file, if not synced"));
    assert_eq!(rig.disk.fold(3).unwrap(), 3);
    rig.disk.write(Block(4).offset(), &[9; BLOCK_SIZE]).unwrap();
    assert_eq!(told(&rig.disk), 4);
    while rig.disk.fold(2).unwrap() > 0 {}
    assert_eq!(told(&rig.disk), 0);
}

#[test]
fn one_that_comes_amid_a_sync_of_the_file_keeps_its_blocks() {
    let mut rig = Rig::new(5, 1, 1);
    let store = Arc::new(Mutex::new(std::mem::replace(&mut rig.store, open_nothing())));
    let promoting = Arc::clone(&store);
    rig.file.in_flush(move || promote(&mut promoting.lock().unwrap(), 2, 8, 2).unwrap());
    assert_eq!(rig.disk.fold(100).unwrap(), 1);
    let wanted = [&[0; 2][..], &[2; 8], &[0; 6]].concat();
    assert_eq!(content(&rig.disk), wanted);
    rig.crash(0);
    assert_eq!(content(&rig.disk), wanted);
    while rig.disk.fold(3).unwrap() > 0 {}
    rig.crash(0);
    assert_eq!((rig.disk.overlay_blocks(), content(&rig.disk)), (0, wanted));
}

/// In the place of a store that is used elsewhere.
fn open_nothing() -> Store {
    Store::open_in_memory(&MemoryDisk::new(), &vm()).unwrap()
}

#[test]
fn what_the_guest_writes_while_the_last_block_is_folded_does_not_lose_the_block() {
    for kept in 0..4 {
        let mut rig = Rig::new(0, 1, 1);
        promote(&mut rig.store, 0, 8, 2).unwrap();
        let disk = Arc::clone(&rig.disk);
        rig.file.in_flush(move || disk.write(Block(7).offset(), &[9; BLOCK_SIZE]).unwrap());
        assert_eq!(rig.disk.fold(7).unwrap(), 7);
        assert_eq!(content(&rig.disk)[..9], [2, 2, 2, 2, 2, 2, 2, 9, 0]);
        // Nobody flushed what the guest wrote.
        rig.crash(kept);
        assert_eq!(content(&rig.disk)[..9], [2, 2, 2, 2, 2, 2, 2, 2, 0]);
        rig.disk.write(Block(7).offset(), &[9; BLOCK_SIZE]).unwrap();
        rig.disk.flush().unwrap();
        rig.crash(kept);
        assert_eq!(content(&rig.disk)[..9], [2, 2, 2, 2, 2, 2, 2, 9, 0]);
    }
}

/// What a mark or a promotion left in `pending` is read all the while that it is moved.
#[test]
fn a_block_is_read_at_every_instant_of_its_way() {
    let mut rig = Rig::new(0, 1, 1);
    let (disk, stop) = (Arc::clone(&rig.disk), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut page = [0; BLOCK_SIZE];
            while !stop.load(Ordering::Relaxed) {
                disk.read(Block(7).offset(), &mut page)?;
            }
            Ok::<(), std::io::Error>(())
        });
        let (mut history, bytes) = (History::default(), vec![2; 8 * BLOCK_SIZE]);
        for epoch in 3..ROUNDS {
            let at = point(1, epoch);
            history.extend(at);
            let (blocks, now) = (&[BlockRun::data(Block(0), &bytes)][..], SystemTime::UNIX_EPOCH);
            rig.store
                .persist([], Mark { point: at, history: &history, state: b"state", blocks, now })
                .unwrap();
            if epoch % 2 == 0 {
                rig.store.fold().unwrap();
            } else {
                rig.store.activate(Term(2), &[]).unwrap();
                rig.store.begin_copy(Base::Stored).unwrap();
                let mark = Mark { point: at, history: &history, state: b"state", blocks: &[], now };
                rig.store.complete(mark, None).unwrap();
            }
            if reader.is_finished() {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap().unwrap();
    });
}
