//! Blocks of the disk on their way through the secondary: from frames to a staged epoch, from there to the store, and into
//! the one batch of a promotion.

mod epochs;

use bytes::Bytes;
use colo_common::history::point;
use colo_common::{BLOCK_SIZE, Block, History, Point, Term};
use colo_proto::frame::{Frame, Kind, VmTag};
use colo_proto::message::{
    BlockDigestRequest, DigestRange, EpochBegin, EpochEnd, PageDigest, Position, SeedBegin, SeedMode,
    TransferDigest, Verify, VerifyPart, VerifyRange,
};
use colo_proto::pages::{Run, RunTable};
use colo_secondary::persist::{Job, Persisted, Persister};
use colo_secondary::staging::{StagedBlocks, Staging, StagingError, Step};
use colo_secondary::store::{Base, MemoryDisk, Store, StoredCopy};
use colo_vmm::disk::Disk;
use colo_vmm::{GuestMemory, MachineState};
use crossbeam_channel::Receiver;
use epochs::{data, machine, staged, zero};
use std::sync::Arc;

const VM: VmTag = VmTag(1);
const LIMIT: u64 = 1 << 20;
const DISK_BLOCKS: u64 = 1000;

/// A transfer being cut into frames.
struct Sender {
    staging: Staging,
    memory: GuestMemory,
    digest: TransferDigest,
    at: Point,
    state: MachineState,
}

impl Sender {
    fn new(disk_blocks: u64) -> Self {
        let (state, spec) = machine();
        let memory = GuestMemory::new(4 << 20).unwrap();
        let staging = Staging::new(memory.layout().frame_limit(), LIMIT, spec).with_disk(disk_blocks);
        Self { staging, memory, digest: TransferDigest::new(), at: point(1, 5), state }
    }

    fn frame(&mut self, kind: Kind, table: Bytes, body: Bytes) -> Result<Step, StagingError> {
        let frame = Frame::new(kind, VM, self.at, self.digest.frames(), table, body);
        self.digest.add(frame.header());
        self.staging.frame(&frame, &self.memory)
    }

    fn message<M: colo_proto::message::Message>(&mut self, message: &M) -> Result<Step, StagingError> {
        let frame = Frame::transfer(VM, self.at, self.digest.frames(), message);
        self.digest.add(frame.header());
        self.staging.frame(&frame, &self.memory)
    }

    fn blocks(&mut self, runs: &[Run<Block>], fill: u8) -> Result<Step, StagingError> {
        let body = vec![fill; RunTable::data(runs) as usize * BLOCK_SIZE];
        self.frame(Kind::Blocks, RunTable::encode(runs).into(), body.into())
    }

    fn begin(&mut self, base: Option<Point>) {
        let mut history = History::default();
        history.extend(self.at);
        let start = self.state.output;
        let start = Position { console: start.console, frames: start.frames };
        let begin = EpochBegin {
            base,
            history,
            output_start: start,
            released: start,
            console_input: 0,
            promotions: 0,
        };
        assert!(matches!(self.message(&begin), Ok(Step::More)));
    }

    fn end(&mut self, data_blocks: u64, zero_blocks: u64) -> Result<Step, StagingError> {
        let state = Bytes::from(self.state.encode());
        self.frame(Kind::State, Bytes::new(), state.clone()).unwrap();
        let end = EpochEnd {
            frames: self.digest.frames(),
            data_pages: 0,
            zero_pages: 0,
            data_blocks,
            zero_blocks,
            state_bytes: state.len() as u64,
            output_bytes: 0,
            digest: self.digest.finish(),
        };
        let frame = Frame::transfer(VM, self.at, self.digest.frames(), &end);
        self.digest = TransferDigest::new();
        self.staging.frame(&frame, &self.memory)
    }
}

#[test]
fn blocks_of_a_seed_go_out_and_those_of_an_epoch_come_with_it() {
    let mut sender = Sender::new(DISK_BLOCKS);
    let begin = SeedBegin { mode: SeedMode::DIFFERING, history: History::default() };
    assert!(matches!(sender.message(&begin), Ok(Step::Seed(SeedMode::DIFFERING))));
    let Ok(Step::SeedBlocks(part)) = sender.blocks(&[zero(0, 5), data(7, 2)], 3) else {
        panic!("not passed on")
    };
    let found: Vec<_> =
        part.runs().map(|run| (run.first().0, run.count(), run.bytes().map(|b| b[0]))).collect();
    assert_eq!((part.bytes(), found), (2 * 4096, vec![(0, 5, None), (7, 2, Some(3))]));
    sender.begin(None);
    sender.blocks(&[data(9, 1)], 4).unwrap();
    sender.blocks(&[data(9, 1), zero(DISK_BLOCKS - 1, 1)], 5).unwrap();
    // Counted over the whole transfer, the seed's among them.
    let Ok(Step::Whole(epoch)) = sender.end(4, 6) else { panic!("not whole") };
    assert_eq!((epoch.blocks.len(), epoch.point, epoch.base), (2, point(1, 5), None));
    assert!(epoch.bytes > 2 * BLOCK_SIZE as u64);
    // The next transfer counts anew.
    (sender.at, sender.digest) = (point(1, 6), TransferDigest::new());
    sender.begin(Some(point(1, 5)));
    assert!(matches!(sender.end(0, 0), Ok(Step::Whole(epoch)) if epoch.blocks.is_empty()));
}

#[test]
fn blocks_that_do_not_belong_are_refused() {
    let mut sender = Sender::new(0);
    sender.begin(Some(point(1, 4)));
    assert!(matches!(sender.blocks(&[zero(0, 1)], 0), Err(StagingError::NoDisk)));
    let mut sender = Sender::new(DISK_BLOCKS);
    assert!(matches!(
        sender.blocks(&[zero(0, 1)], 0),
        Err(StagingError::OutOfPlace { kind: Kind::Blocks, .. })
    ));
    for runs in [[zero(DISK_BLOCKS, 1)], [data(DISK_BLOCKS - 1, 2)], [zero(1, u32::MAX)]] {
        let mut sender = Sender::new(DISK_BLOCKS);
        sender.begin(Some(point(1, 4)));
        let error = sender.blocks(&runs, 1).unwrap_err();
        assert!(error.to_string().contains("beyond the guest's disk"), "{error}");
    }
    let mut sender = Sender::new(DISK_BLOCKS);
    sender.begin(Some(point(1, 4)));
    let full = [data(0, 255)];
    sender.blocks(&full, 1).unwrap();
    let error = sender.blocks(&full, 1).unwrap_err().to_string();
    assert!(error.contains("1.5 has more than 1048576 bytes of blocks"), "{error}");
    for (counts, what) in [((1, 1), "blocks 2"), ((2, 0), "zero blocks 1")] {
        let mut sender = Sender::new(DISK_BLOCKS);
        sender.begin(Some(point(1, 4)));
        sender.blocks(&[data(0, 2), zero(2, 1)], 1).unwrap();
        let error = sender.end(counts.0, counts.1).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

/// Of memory or of the disk, the first so many.
fn list(part: VerifyPart, ranges: Vec<VerifyRange>) -> Verify {
    Verify { part, first: 0, ranges }
}

#[test]
fn what_is_to_be_compared_comes_between_transfers() {
    let mut sender = Sender::new(DISK_BLOCKS);
    let (frames, disk) = (sender.memory.layout().frame_limit(), VerifyPart::Disk);
    for good in [
        list(disk, vec![VerifyRange::Zero(DISK_BLOCKS)]),
        list(VerifyPart::Memory, vec![VerifyRange::Zero(frames)]),
    ] {
        let frame = Frame::transfer(VM, sender.at, 0, &good);
        let step = sender.staging.frame(&frame, &sender.memory).unwrap();
        assert!(matches!(step, Step::Verify(at, found) if at == sender.at && found == good));
    }
    // It is of no transfer, so nothing of the next one is counted otherwise.
    sender.begin(Some(point(1, 4)));
    let within =
        Frame::transfer(VM, sender.at, sender.digest.frames(), &list(disk, vec![VerifyRange::Zero(1)]));
    let error = sender.staging.frame(&within, &sender.memory).unwrap_err();
    assert!(matches!(error, StagingError::OutOfPlace { kind: Kind::Verify, .. }), "{error}");
    for (part, count) in [(disk, DISK_BLOCKS + 1), (VerifyPart::Memory, frames + 1)] {
        let mut sender = Sender::new(DISK_BLOCKS);
        let beyond = Frame::transfer(VM, sender.at, 0, &list(part, vec![VerifyRange::Skip(count)]));
        let error = sender.staging.frame(&beyond, &sender.memory).unwrap_err();
        assert!(matches!(error, StagingError::Verify { .. }), "{error}");
    }
}

#[test]
fn a_disk_is_compared_with_all_epochs_before_in_it() {
    let (worker, disk) = Worker::start();
    worker.persister.order(Job::Epoch(staged(&worker.state, 2, vec![data(3, 1)], 9)));
    let each = |bytes: &[u8]| {
        VerifyRange::Each(bytes.iter().map(|&byte| PageDigest::of(&[byte; BLOCK_SIZE])).collect())
    };
    let right = list(VerifyPart::Disk, vec![VerifyRange::Zero(1), each(&[1, 2, 9]), VerifyRange::Zero(1000)]);
    worker.persister.order(Job::Verify(7, point(1, 2), right, None));
    let wrong =
        list(VerifyPart::Disk, vec![each(&[5]), VerifyRange::Zero(1), VerifyRange::Skip(1), each(&[1])]);
    worker.persister.order(Job::Verify(7, point(1, 2), wrong, None));
    let mut answers = Vec::new();
    while answers.len() < 2 {
        let told = worker.told.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
        if let Persisted::Verified(7, answer) = told {
            answers.push((answer.compared, answer.differing, answer.places));
        }
    }
    assert_eq!(answers, [(1004, 0, vec![]), (3, 3, vec![0, 1, 3])]);
    drop(disk);
}

struct Worker {
    persister: Persister,
    told: Receiver<Persisted>,
    state: MachineState,
    place: tempfile::TempDir,
}

/// Sparse.
const WORKER_BLOCKS: u64 = 3 << 20;

impl Worker {
    /// A persist thread with a whole copy, of which block 1 is 1, and 2 is 2.
    fn start() -> (Self, Arc<colo_secondary::disk::DiskImage>) {
        let vm = "web".parse().unwrap();
        let store = Store::open_in_memory(&MemoryDisk::new(), &vm).unwrap();
        let (tell, told) = crossbeam_channel::unbounded();
        let persister = Persister::start(store, move |persisted| drop(tell.send(persisted))).unwrap();
        let worker = Self { persister, told, state: machine().0, place: tempfile::tempdir().unwrap() };
        let (reply, answer) = crossbeam_channel::bounded(1);
        let path = worker.place.path().join("disk.img");
        worker.persister.order(Job::OpenDisk(path, WORKER_BLOCKS * BLOCK_SIZE as u64, reply));
        let disk = answer.recv().unwrap().unwrap();
        worker.persister.order(Job::Begin(Base::Empty));
        let seed = StagedBlocks::new(vec![data(1, 1)], vec![1; BLOCK_SIZE].into());
        worker.persister.order(Job::SeedBlocks(seed, None));
        worker.persister.order(Job::BlockDigests(3, BlockDigestRequest { first: Block(0), count: 4 }));
        worker.persister.order(Job::Complete(staged(&worker.state, 1, vec![data(2, 1)], 2)));
        (worker, disk)
    }

    fn tells(&self) -> String {
        format!("{:?}", self.told.recv_timeout(std::time::Duration::from_secs(60)).unwrap())
    }

    /// The register names this node while three epochs wait to be stored.
    fn promote(&self, third: Vec<Run<Block>>) {
        self.persister.end_copy();
        for (at, runs) in [(2, vec![data(3, 2)]), (3, vec![data(4, 1), zero(1, 1)]), (4, third)] {
            self.persister.order(Job::Epoch(staged(&self.state, at, runs, at as u8 + 10)));
        }
        let (done, wait) = crossbeam_channel::bounded(1);
        self.persister.order(Job::Activate(Term(2), done));
        wait.recv().unwrap().unwrap();
    }
}

fn content(disk: &dyn Disk, blocks: u64) -> Vec<u8> {
    let mut bytes = vec![0; blocks as usize * BLOCK_SIZE];
    disk.read(0, &mut bytes).unwrap();
    bytes.into_iter().step_by(BLOCK_SIZE).collect()
}

#[test]
fn a_promotion_takes_the_blocks_of_epochs_that_were_not_stored() {
    // The last is more than one batch of the store takes.
    let thirds = [
        (vec![data(6, 1)], [0, 0, 2, 12, 13, 0, 14]),
        (vec![zero(0, 2 << 20)], [0; 7]),
        (vec![data(6, 4000)], [0, 0, 2, 12, 13, 0, 14]),
    ];
    for (third, after) in thirds {
        let (worker, disk) = Worker::start();
        assert!(worker.tells().starts_with("Digests(3,"));
        assert!(worker.tells().contains("Point("));
        assert_eq!(content(disk.as_ref(), 4), [0, 1, 2, 0]);
        worker.promote(third);
        assert_eq!(content(disk.as_ref(), 7), after);
        assert!(worker.told.try_recv().is_err(), "none of them is stored as a point");
        let store = worker.persister.finish().unwrap();
        assert_eq!((store.summary().copy, store.summary().active), (StoredCopy::None, Some(Term(2))));
        // The guest's disk outlives the thread of the store.
        disk.write(0, &[9; 512]).unwrap();
        disk.flush().unwrap();
        assert_eq!(content(disk.as_ref(), 1), [9]);
    }
}

#[test]
fn digests_of_a_seed_tell_what_came_of_it() {
    let (worker, _disk) = Worker::start();
    let Ok(Persisted::Digests(3, digests)) = worker.told.recv() else { panic!("no digests") };
    assert_eq!((digests.first, digests.end()), (Block(0), Block(4)));
    let counts: Vec<_> = digests
        .ranges
        .iter()
        .map(|range| (matches!(range, DigestRange::Zero { .. }), range.count()))
        .collect();
    assert_eq!(counts, [(true, 1), (false, 1), (true, 2)]);
}
