//! An image file that fails while this node follows: no mark after it, no promotion, and the node is told.

mod epochs;
mod fault_disk;
mod store_script;

use colo_common::history::point;
use colo_common::{BLOCK_SIZE, Block, History, Term};
use colo_primary::node::status::Overlay;
use colo_secondary::disk::DiskImage;
use colo_secondary::persist::{Job, Persisted, Persister};
use colo_secondary::store::{Base, BlockRun, Mark, MemoryDisk, Store, StoredCopy};
use colo_vmm::disk::Disk;
use crossbeam_channel::Receiver;
use epochs::{data, machine, staged};
use fault_disk::{Failing, FaultDisk};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use store_script::vm;

const BLOCKS: u64 = 16;

/// A store over a file that can fail.
struct Rig {
    medium: MemoryDisk,
    file: FaultDisk,
    store: Store,
    disk: Arc<DiskImage>,
}

impl Rig {
    fn new() -> Self {
        let (medium, file) = (MemoryDisk::new(), FaultDisk::new(BLOCKS * BLOCK_SIZE as u64));
        let mut store = Store::open_in_memory(&medium, &vm()).unwrap();
        let disk = store.attach_disk(Arc::new(file.open())).unwrap();
        Self { medium, file, store, disk }
    }
}

/// Folds while the file cannot be synced.
fn fail_sync(file: &FaultDisk, disk: &DiskImage) {
    file.fail(Some(Failing::Flushes));
    disk.fold(100).unwrap_err();
    file.fail(None);
}

fn content(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0; BLOCKS as usize * BLOCK_SIZE];
    disk.read(0, &mut bytes).unwrap();
    bytes.into_iter().step_by(BLOCK_SIZE).collect()
}

#[test]
fn a_store_whose_file_failed_takes_no_mark_and_lets_nothing_run() {
    let Rig { medium, file, mut store, disk } = Rig::new();
    store.begin_copy(Base::Empty).unwrap();
    let (one, two) = ([1; BLOCK_SIZE], [2; BLOCK_SIZE]);
    store.write_blocks([BlockRun::data(Block(1), &one)]).unwrap();
    let mut history = History::default();
    let mut step = |store: &mut Store, epoch: u64, run: BlockRun<'_>| {
        history.extend(point(1, epoch));
        let (point, now) = (point(1, epoch), SystemTime::UNIX_EPOCH);
        let mark = Mark { point, history: &history, state: b"state", blocks: &[run], now };
        if epoch == 1 { store.complete(mark, None) } else { store.persist([], mark) }
    };
    step(&mut store, 1, BlockRun::data(Block(2), &two)).unwrap();
    step(&mut store, 2, BlockRun::data(Block(3), &two)).unwrap();
    assert_eq!(disk.failure(), None);
    fail_sync(&file, &disk);
    assert!(disk.failure().unwrap().contains("the device is gone"), "{disk:?}");
    let overlay: &dyn Overlay = disk.as_ref();
    assert!(overlay.failure().is_some_and(|why| why.contains("the device is gone")));
    assert_eq!(overlay.bytes_to_fold(), BLOCK_SIZE as u64, "block 3, which the mark has brought");
    let told = [
        step(&mut store, 3, BlockRun::data(Block(4), &one)).unwrap_err().to_string(),
        store.activate(Term(2), &[]).unwrap_err().to_string(),
        store.begin_copy(Base::Stored).unwrap_err().to_string(),
    ];
    for why in told {
        assert!(why.contains("the image file behind the store"), "{why}");
        assert!(why.contains("failed before") && why.contains("the device is gone"), "{why}");
    }
    let summary = store.summary();
    assert_eq!(summary.active, None);
    assert!(matches!(summary.copy, StoredCopy::Whole(whole) if whole.point == point(1, 2)));
    drop((store, disk));
    // The process ends, and the machine with it: nothing was lost.
    medium.crash(0);
    file.crash(&mut |_| 1);
    let mut store = Store::open_in_memory(&medium, &vm()).unwrap();
    let disk = store.attach_disk(Arc::new(file.open())).unwrap();
    assert_eq!(content(disk.as_ref())[..5], [0, 1, 2, 2, 0]);
    store.activate(Term(2), &[]).unwrap();
}

fn next(told: &Receiver<Persisted>) -> Persisted {
    told.recv_timeout(Duration::from_secs(60)).unwrap()
}

#[test]
fn the_node_is_told_and_no_point_is_claimed_after_it() {
    let Rig { file, store, disk, .. } = Rig::new();
    let (tell, told) = crossbeam_channel::unbounded();
    let persister = Persister::start(store, move |persisted| drop(tell.send(persisted))).unwrap();
    let state = machine().0;
    persister.order(Job::Begin(Base::Empty));
    persister.order(Job::Complete(staged(&state, 1, vec![data(1, 1)], 1)));
    persister.order(Job::Epoch(staged(&state, 2, vec![data(2, 1)], 2)));
    for epoch in 1..=2 {
        assert!(matches!(next(&told), Persisted::Point(_, at) if at == point(1, epoch)));
    }
    fail_sync(&file, &disk);
    persister.order(Job::Epoch(staged(&state, 3, vec![], 3)));
    let Persisted::Failed(why) = next(&told) else { panic!("no failure is told") };
    assert!(why.contains("the device is gone"), "{why}");
    let (done, wait) = crossbeam_channel::bounded(1);
    persister.order(Job::Activate(Term(2), done));
    let why = wait.recv().unwrap().unwrap_err();
    assert!(why.contains("the device is gone"), "{why}");
    assert_eq!(persister.finish().unwrap().summary().active, None);
    assert!(told.try_recv().is_err(), "said once");
}
