//! An image file that fails while this node follows: no mark after it, no promotion, and the node is told.

mod epochs;
mod fault_disk;
mod store_script;

use colo_common::history::point;
use colo_common::{BLOCK_SIZE, Block, History, Term};
use colo_primary::node::status::Overlay;
use colo_secondary::disk::DiskImage;
use colo_secondary::persist::{Job, Persisted, Persister};
use colo_secondary::staging::StagedBlocks;
use colo_secondary::store::{Base, BlockRun, Mark, MemoryDisk, Store, StoreError, StoredCopy};
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

/// Marks of one term, each with a run of blocks; the first makes the copy whole.
fn steps() -> impl FnMut(&mut Store, u64, BlockRun<'_>) -> Result<(), StoreError> {
    let mut history = History::default();
    move |store, epoch, run| {
        history.extend(point(1, epoch));
        let (point, now) = (point(1, epoch), SystemTime::UNIX_EPOCH);
        let mark = Mark { point, history: &history, state: b"state", blocks: &[run], now };
        if epoch == 1 { store.complete(mark, None) } else { store.persist([], mark) }
    }
}

#[test]
fn a_store_whose_file_failed_takes_no_mark_and_lets_nothing_run() {
    let Rig { medium, file, mut store, disk } = Rig::new();
    store.begin_copy(Base::Empty).unwrap();
    let (one, two) = ([1; BLOCK_SIZE], [2; BLOCK_SIZE]);
    store.write_blocks([BlockRun::data(Block(1), &one)]).unwrap();
    let mut step = steps();
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

#[test]
fn a_copy_that_lacks_a_block_is_never_whole_and_nothing_runs_from_it() {
    let one = [1; BLOCK_SIZE];
    for run in [BlockRun::data(Block(1), &one), BlockRun::zeros(Block(4), 1)] {
        let Rig { medium, file, mut store, disk } = Rig::new();
        store.begin_copy(Base::Empty).unwrap();
        store.write_blocks([BlockRun::data(Block(4), &one)]).unwrap();
        file.fail(Some(Failing::Writes));
        store.write_blocks([run]).unwrap_err();
        file.fail(None);
        let why = disk.failure().expect("it is remembered");
        assert!(why.contains("a part of a copy could not be written"), "{why}");
        let mut history = History::default();
        history.extend(point(1, 1));
        let now = SystemTime::UNIX_EPOCH;
        let mark = Mark { point: point(1, 1), history: &history, state: b"state", blocks: &[], now };
        for why in [
            store.write_blocks([run]).unwrap_err(),
            store.complete(mark, None).unwrap_err(),
            store.begin_copy(Base::Stored).unwrap_err(),
        ] {
            assert!(why.to_string().contains("failed before"), "{why}");
        }
        let why = store.activate(Term(2), &[]).unwrap_err().to_string();
        assert!(why.contains("let the guest run here") && why.contains("not whole"), "{why}");
        drop((store, disk));
        // A restart finds it so, and begins anew.
        let mut store = Store::open_in_memory(&medium, &vm()).unwrap();
        let disk = store.attach_disk(Arc::new(file.open())).unwrap();
        assert_eq!(store.summary().copy, StoredCopy::Inconsistent);
        store.begin_copy(Base::Stored).unwrap();
        store.write_blocks([BlockRun::data(Block(1), &one), BlockRun::zeros(Block(4), 1)]).unwrap();
        store.complete(mark, None).unwrap();
        assert_eq!(content(disk.as_ref())[..5], [0, 1, 0, 0, 0]);
    }
}

#[test]
fn no_mark_follows_one_whose_blocks_could_not_be_read() {
    let Rig { file, mut store, disk, .. } = Rig::new();
    store.begin_copy(Base::Empty).unwrap();
    let one = [1; BLOCK_SIZE];
    store.write_blocks([BlockRun::data(Block(1), &one)]).unwrap();
    let mut step = steps();
    step(&mut store, 1, BlockRun::data(Block(2), &one)).unwrap();
    file.fail(Some(Failing::Looks));
    step(&mut store, 2, BlockRun::zeros(Block(1), 1)).unwrap_err();
    file.fail(None);
    let why = step(&mut store, 3, BlockRun::data(Block(3), &one)).unwrap_err().to_string();
    assert!(why.contains("could not be read for a mark"), "{why}");
    let why = store.activate(Term(2), &[]).unwrap_err().to_string();
    assert!(why.contains("failed before"), "{why}");
    assert!(matches!(store.summary().copy, StoredCopy::Whole(whole) if whole.point == point(1, 1)));
    assert_eq!(content(disk.as_ref())[..4], [0, 1, 1, 0]);
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
        assert!(matches!(next(&told), Persisted::Point(_, at, _) if at == point(1, epoch)));
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

/// Also of a job that leaves the store itself as it was.
#[test]
fn after_a_job_that_failed_no_other_is_done() {
    for (run, failing) in [(data(1, 1), Some(Failing::Writes)), (data(BLOCKS, 1), None)] {
        let Rig { file, store, .. } = Rig::new();
        let (tell, told) = crossbeam_channel::unbounded();
        let persister = Persister::start(store, move |persisted| drop(tell.send(persisted))).unwrap();
        let state = machine().0;
        persister.order(Job::Begin(Base::Empty));
        let (done, wait) = crossbeam_channel::bounded(1);
        persister.order(Job::Flush(done));
        wait.recv().unwrap();
        file.fail(failing);
        persister.order(Job::SeedBlocks(StagedBlocks::new(vec![run], vec![1; BLOCK_SIZE].into()), None));
        let Persisted::Failed(_) = next(&told) else { panic!("no failure is told") };
        file.fail(None);
        persister.order(Job::Complete(staged(&state, 1, vec![data(2, 1)], 1)));
        persister.order(Job::Epoch(staged(&state, 2, vec![data(3, 1)], 2)));
        let (done, wait) = crossbeam_channel::bounded(1);
        persister.order(Job::Activate(Term(2), done));
        let why = wait.recv().unwrap().unwrap_err();
        assert!(why.contains("failed before"), "{why}");
        let (reply, answer) = crossbeam_channel::bounded(1);
        persister.order(Job::OpenDisk("disk.img".into(), BLOCK_SIZE as u64, reply));
        assert!(answer.recv().unwrap().is_err_and(|why| why.contains("failed before")));
        let (done, wait) = crossbeam_channel::bounded(1);
        persister.order(Job::Flush(done));
        wait.recv().unwrap();
        let summary = persister.finish().unwrap().summary();
        assert_eq!((summary.active, summary.copy), (None, StoredCopy::Inconsistent));
        assert!(told.try_recv().is_err(), "said once, and no point is claimed");
    }
}
