//! The guest's disk against a model: marks, folding, a promotion, the guest's own writes and flushes, reads, and crashes
//! at any of them, on a file that forgets any part of what was not flushed and a store that forgets what was not synced.

mod fault_disk;
mod store_script;

use colo_common::history::point;
use colo_common::{BLOCK_SIZE, Block, History, Term};
use colo_proto::message::{BlockDigestRequest, DigestRange, PageDigest};
use colo_secondary::disk::{DiskImage, block_digests, content_digest, export};
use colo_secondary::store::{Base, BlockRun, Mark, MemoryDisk, Store, StoreError};
use colo_vmm::disk::{Disk, FileDisk};
use fault_disk::{Failing, FaultDisk, SECTOR};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use store_script::{Rng, vm};

const BLOCKS: u64 = 24;
const PER_BLOCK: usize = BLOCK_SIZE / SECTOR;
const BYTES: u64 = BLOCKS * BLOCK_SIZE as u64;
/// So small that some marks go through `pending`.
const BATCH: usize = 3 * BLOCK_SIZE;

fn sectors(tags: &[u64]) -> Vec<u8> {
    tags.iter().flat_map(|tag| tag.to_le_bytes().repeat(SECTOR / 8)).collect()
}

fn tags(bytes: &[u8]) -> Vec<u64> {
    let tag = |sector: &[u8; SECTOR]| {
        let words = sector.as_chunks::<8>().0;
        assert!(words.iter().all(|word| *word == words[0]), "a sector is a mix of two");
        u64::from_le_bytes(words[0])
    };
    bytes.as_chunks::<SECTOR>().0.iter().map(tag).collect()
}

fn mark<'a>(epoch: u64, history: &'a mut History, blocks: &'a [BlockRun<'a>]) -> Mark<'a> {
    history.extend(point(1, epoch));
    Mark { point: point(1, epoch), history, state: b"state", blocks, now: SystemTime::UNIX_EPOCH }
}

/// Blocks of a mark: (first, count, tag of each sector or none for zeroes).
type Written = Vec<(u64, u64, Option<u64>)>;

fn bytes_of(written: &Written) -> Vec<(Block, u64, Option<Vec<u8>>)> {
    let bytes = |&(first, count, tag): &(u64, u64, Option<u64>)| {
        let bytes = tag.map(|tag| sectors(&vec![tag; count as usize * PER_BLOCK]));
        (Block(first), count, bytes)
    };
    written.iter().map(bytes).collect()
}

fn runs(bytes: &[(Block, u64, Option<Vec<u8>>)]) -> Vec<BlockRun<'_>> {
    let mut runs = Vec::new();
    for (first, count, bytes) in bytes {
        runs.push(match bytes {
            Some(bytes) => BlockRun::data(*first, bytes),
            None => BlockRun::zeros(*first, *count),
        });
    }
    runs
}

/// Ascending, apart.
fn draw(rng: &mut Rng) -> Written {
    let (mut at, mut written) = (rng.below(6), Vec::new());
    while at < BLOCKS && written.len() < 6 {
        let count = (1 + rng.below(4)).min(BLOCKS - at);
        written.push((at, count, (rng.below(3) > 0).then(|| rng.next())));
        at += count + rng.below(8);
    }
    written
}

struct World {
    rng: Rng,
    medium: MemoryDisk,
    file: FaultDisk,
    store: Store,
    disk: Arc<DiskImage>,
    history: History,
    epoch: u64,
    active: bool,
    /// The content.
    live: Vec<u64>,
    /// What a crash may leave of a sector instead.
    loose: Vec<BTreeSet<u64>>,
    crashes: u64,
    failed: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let (medium, file) = (MemoryDisk::new(), FaultDisk::new(BYTES));
        let mut store = Store::open_in_memory(&medium, &vm()).unwrap();
        store.limit_batches(BATCH);
        let disk = store.attach_disk(Arc::new(file.open())).unwrap();
        let live = vec![0; BLOCKS as usize * PER_BLOCK];
        let loose = vec![BTreeSet::new(); live.len()];
        let (rng, history) = (Rng(seed), History::default());
        let mut world = Self {
            rng,
            medium,
            file,
            store,
            disk,
            history,
            live,
            loose,
            epoch: 0,
            active: false,
            crashes: 0,
            failed: false,
        };
        world.seed();
        world
    }

    fn seed(&mut self) {
        self.store.begin_copy(Base::Empty).unwrap();
        let written = draw(&mut self.rng);
        self.store.write_blocks(runs(&bytes_of(&written))).unwrap();
        self.epoch += 1;
        let (last, mut history) = (draw(&mut self.rng), self.history.clone());
        let bytes = bytes_of(&last);
        self.store.complete(mark(self.epoch, &mut history, &runs(&bytes)), None).unwrap();
        self.history = history;
        self.wrote(&written);
        self.wrote(&last);
    }

    fn wrote(&mut self, written: &Written) {
        for &(first, count, tag) in written {
            let range = first as usize * PER_BLOCK..(first + count) as usize * PER_BLOCK;
            self.live[range].fill(tag.unwrap_or(0));
        }
    }

    /// The process dies somewhere in a mark or a promotion, or after it.
    fn store_step(
        &mut self,
        written: &Written,
        step: impl FnOnce(&mut Self, &[BlockRun<'_>]) -> Result<(), StoreError>,
    ) {
        if self.rng.below(4) == 0 {
            let writes = self.rng.below(5);
            self.medium.die_after(writes);
        }
        let bytes = bytes_of(written);
        let done = step(self, &runs(&bytes));
        let before = self.live.clone();
        self.wrote(written);
        if done.is_err() {
            let after = std::mem::replace(&mut self.live, before);
            self.crash(Some(&after));
        }
        self.medium.die_after(u64::MAX);
    }

    /// The process may die in one of the next writes to the store.
    fn endanger(&mut self) {
        if self.rng.below(4) == 0 {
            let writes = self.rng.below(3);
            self.medium.die_after(writes);
        }
    }

    fn fold(&mut self) {
        self.endanger();
        let most = self.rng.below(8) as usize;
        if self.disk.fold(most).is_err() && !self.failed {
            self.crash(None);
        }
        self.medium.die_after(u64::MAX);
    }

    fn persist(&mut self) {
        let written = draw(&mut self.rng);
        self.epoch += 1;
        let (epoch, mut history) = (self.epoch, self.history.clone());
        self.store_step(&written, |world, runs| world.store.persist([], mark(epoch, &mut history, runs)));
        if !self.failed {
            self.history = History::default();
            self.history.extend(point(1, self.epoch));
        }
    }

    fn activate(&mut self) {
        let written = draw(&mut self.rng);
        self.store_step(&written, |world, runs| world.store.activate(Term(2), runs));
        self.active = self.store.summary().active.is_some();
    }

    fn crash(&mut self, or: Option<&[u64]>) {
        self.crashes += 1;
        self.medium.crash(self.rng.next());
        let rng = &mut self.rng;
        self.file.crash(&mut |end| rng.below(end));
        self.store = Store::open_in_memory(&self.medium, &vm()).unwrap();
        self.store.limit_batches(BATCH);
        self.disk = self.store.attach_disk(Arc::new(self.file.open())).unwrap();
        self.active = self.store.summary().active.is_some();
        let found = self.read();
        let is = |wanted: &[u64]| {
            found.iter().enumerate().all(|(at, tag)| *tag == wanted[at] || self.loose[at].contains(tag))
        };
        assert!(is(&self.live) || or.is_some_and(is), "found {found:?}\nwanted {:?}\nor {or:?}", self.live);
        self.live = found;
        self.loose.iter_mut().for_each(BTreeSet::clear);
        self.failed = false;
    }

    fn read(&self) -> Vec<u64> {
        let mut bytes = vec![0; BYTES as usize];
        self.disk.read(0, &mut bytes).unwrap();
        tags(&bytes)
    }

    fn check(&mut self) {
        assert_eq!(self.read(), self.live);
        let at = self.rng.below(BYTES / SECTOR as u64) as usize;
        let len = (1 + self.rng.below(20) as usize).min(self.live.len() - at);
        let mut bytes = vec![0; len * SECTOR];
        self.disk.read((at * SECTOR) as u64, &mut bytes).unwrap();
        assert_eq!(tags(&bytes), self.live[at..at + len]);
        // What is not among the data is zero.
        let mut next = Block(0);
        while let Some(found) = self.disk.next_data(next).unwrap() {
            let hole = next.0 as usize * PER_BLOCK..found.start.0 as usize * PER_BLOCK;
            assert!(found.start >= next && found.end > found.start);
            assert!(self.live[hole].iter().all(|tag| *tag == 0));
            next = found.end;
        }
        assert!(self.live[next.0 as usize * PER_BLOCK..].iter().all(|tag| *tag == 0));
    }

    /// Whatever was done, nothing is left to fold in the end.
    fn empties(&mut self) {
        if !self.active {
            self.store.fold().unwrap();
        }
        // One of the two may only end a round.
        while self.disk.fold(5).unwrap() + self.disk.fold(5).unwrap() > 0 {}
        assert_eq!(self.disk.overlay_blocks(), 0);
        assert!(self.read() == self.live);
    }

    fn guest_write(&mut self) {
        let at = self.rng.below(BYTES / SECTOR as u64) as usize;
        let len = (1 + self.rng.below(24) as usize).min(self.live.len() - at);
        let new: Vec<u64> = (0..len).map(|_| self.rng.next()).collect();
        let done = self.disk.write((at * SECTOR) as u64, &sectors(&new));
        self.guest_wrote(at, &new, done.is_ok());
    }

    fn guest_zero(&mut self) {
        let first = self.rng.below(BLOCKS);
        let end = (first + 1 + self.rng.below(5)).min(BLOCKS);
        let done = self.disk.zero(Block(first)..Block(end), self.rng.below(2) == 0);
        self.guest_wrote(
            first as usize * PER_BLOCK,
            &vec![0; (end - first) as usize * PER_BLOCK],
            done.is_ok(),
        );
    }

    fn guest_wrote(&mut self, at: usize, new: &[u64], done: bool) {
        let found = self.read();
        for (at, new) in (at..).zip(new) {
            assert!(found[at] == *new || (!done && found[at] == self.live[at]));
            let old = std::mem::replace(&mut self.live[at], found[at]);
            self.loose[at].extend([old, *new]);
        }
    }

    fn guest_flush(&mut self) {
        self.endanger();
        match self.disk.flush() {
            Ok(()) => {
                assert!(!self.failed, "a flush after one that failed cannot vouch for what is lost");
                self.loose.iter_mut().for_each(BTreeSet::clear);
            }
            Err(_) if self.failed => {}
            Err(_) => self.crash(None),
        }
        self.medium.die_after(u64::MAX);
    }

    fn fail(&mut self) {
        self.file.fail(Some(Failing::Flushes));
        self.failed = self.disk.flush().is_err();
        self.file.fail(None);
        assert!(self.failed && self.disk.fold(1).unwrap_or(0) == 0);
    }

    fn step(&mut self) {
        match (self.active, self.rng.below(16)) {
            (_, 0) => self.crash(None),
            (_, 1) => self.check(),
            (_, 2..5) => self.fold(),
            (_, 5) if self.rng.below(6) == 0 && !self.failed => self.fail(),
            (false, 6) if self.rng.below(3) == 0 => self.activate(),
            (false, 7) => drop(self.store.fold()),
            (false, 8) if self.rng.below(3) == 0 && !self.failed => self.seed(),
            (false, _) => self.persist(),
            (true, 6) if self.rng.below(4) == 0 && !self.failed => self.seed_again(),
            (true, 6..8) => self.guest_flush(),
            (true, 8 | 9) => self.guest_zero(),
            (true, 10) => {
                self.file.fail(Some(Failing::Writes));
                self.guest_write();
                self.file.fail(None);
            }
            (true, _) => self.guest_write(),
        }
    }

    /// The guest ran here, and this node follows again after a restart.
    fn seed_again(&mut self) {
        self.crash(None);
        self.seed();
        self.active = false;
    }
}

#[test]
fn no_crash_shows_anything_but_the_disk() {
    let (mut crashes, mut active) = (0, 0);
    for seed in 0..300 {
        let mut world = World::new(seed);
        for _ in 0..120 {
            world.step();
            active += u64::from(world.active);
        }
        if !world.failed {
            world.check();
            world.empties();
        }
        crashes += world.crashes;
    }
    println!("{crashes} crashes, {active} steps while the guest ran here");
    assert!(crashes > 2000 && active > 5000, "{crashes} {active}");
}

#[test]
fn folding_leaves_the_content_alone_and_empties_the_overlay() {
    let mut world = World::new(1);
    for _ in 0..20 {
        world.persist();
    }
    assert!(world.disk.overlay_blocks() > 0);
    world.store.fold().unwrap();
    let digest = content_digest(world.disk.as_ref()).unwrap();
    while world.disk.fold(3).unwrap() > 0 {}
    world.disk.fold(100).unwrap();
    assert_eq!(world.disk.overlay_blocks(), 0);
    assert_eq!(content_digest(world.disk.as_ref()).unwrap(), digest);
    world.crash(None);
    // Entries may come back, but only as what the file has anyway.
    assert_eq!(content_digest(world.disk.as_ref()).unwrap(), digest);
}

#[test]
fn a_guest_that_discards_its_whole_disk_makes_no_entries() {
    let (medium, blocks) = (MemoryDisk::new(), 1_u64 << 32);
    let file = FaultDisk::new(blocks * BLOCK_SIZE as u64);
    let mut store = Store::open_in_memory(&medium, &vm()).unwrap();
    let disk = store.attach_disk(Arc::new(file.open())).unwrap();
    store.begin_copy(Base::Empty).unwrap();
    let page = [7; BLOCK_SIZE];
    store.write_blocks([BlockRun::data(Block(1 << 20), &page)]).unwrap();
    let mut history = History::default();
    store.complete(mark(1, &mut history, &[]), None).unwrap();
    let last = [BlockRun::data(Block(blocks - 1), &page)];
    store.persist([], mark(2, &mut history, &last)).unwrap();
    assert_eq!(disk.overlay_blocks(), 1);
    let all = [BlockRun::zeros(Block(0), blocks)];
    store.persist([], mark(3, &mut history, &all)).unwrap();
    assert_eq!(disk.overlay_blocks(), 2, "the block in the file and the one in the overlay");
    disk.fold(10).unwrap();
    assert_eq!((disk.overlay_blocks(), disk.next_data(Block(0)).unwrap()), (0, None));
    store.activate(Term(2), &all).unwrap();
    assert_eq!(disk.overlay_blocks(), 0);
    assert!(store.activate(Term(3), &[BlockRun::zeros(Block(blocks - 1), 2)]).is_err(), "beyond the end");
}

#[test]
fn an_entry_that_a_mark_renews_while_the_file_is_synced_stays() {
    for tag in [Some(2), None] {
        let mut world = World::new(3);
        while world.disk.fold(100).unwrap() > 0 {}
        let old = bytes_of(&vec![(4, 2, Some(1))]);
        world.store.persist([], mark(100, &mut world.history, &runs(&old))).unwrap();
        let World { store, mut history, file, disk, medium, mut rng, .. } = world;
        let store = Arc::new(Mutex::new(store));
        let marking = Arc::clone(&store);
        file.in_flush(move || {
            let new = bytes_of(&vec![(5, 1, tag)]);
            marking.lock().unwrap().persist([], mark(101, &mut history, &runs(&new))).unwrap();
        });
        assert_eq!(disk.fold(100).unwrap(), 2);
        assert_eq!(disk.overlay_blocks(), 1, "the other one is in the file");
        drop((store, disk));
        medium.crash(rng.next());
        file.crash(&mut |end| rng.below(end));
        let mut store = Store::open_in_memory(&medium, &vm()).unwrap();
        let disk = store.attach_disk(Arc::new(file.open())).unwrap();
        let mut bytes = [0; 2 * BLOCK_SIZE];
        disk.read(Block(4).offset(), &mut bytes).unwrap();
        assert_eq!(tags(&bytes), [[1; PER_BLOCK], [tag.unwrap_or(0); PER_BLOCK]].concat());
    }
}

#[test]
fn the_file_stays_as_it_is_while_a_copy_over_it_is_kept() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    let mut store = Store::open(&place.path().join("store"), &vm()).unwrap();
    let disk = store.open_disk(&path, BYTES).unwrap();
    store.begin_copy(Base::Stored).unwrap();
    let (first, second, third) =
        (bytes_of(&vec![(0, 9, Some(1))]), bytes_of(&vec![(3, 9, Some(2))]), bytes_of(&vec![(4, 2, None)]));
    store.write_blocks(runs(&first)).unwrap();
    let mut history = History::default();
    store.complete(mark(1, &mut history, &[]), None).unwrap();
    store.persist([], mark(2, &mut history, &runs(&second))).unwrap();
    let before = std::fs::read(&path).unwrap();
    store.begin_copy(Base::Empty).unwrap();
    assert_eq!(store.summary().previous, Some(point(1, 2)));
    store.write_blocks(runs(&third)).unwrap();
    assert_eq!(disk.fold(100).unwrap(), 0);
    assert!(std::fs::read(&path).unwrap() == before, "the copy that is kept needs it");
    let content = |disk: &DiskImage| {
        let mut bytes = vec![0; BYTES as usize];
        disk.read(0, &mut bytes).unwrap();
        tags(&bytes).into_iter().step_by(PER_BLOCK).take(13).collect::<Vec<_>>()
    };
    let wanted = [1, 1, 1, 2, 0, 0, 2, 2, 2, 2, 2, 2, 0];
    assert_eq!(content(&disk), wanted);
    // The same after a restart, which finds the copy inconsistent.
    drop((store, disk));
    let mut store = Store::open(&place.path().join("store"), &vm()).unwrap();
    let disk = store.open_disk(&path, BYTES).unwrap();
    assert_eq!((content(&disk), disk.fold(100).unwrap()), (wanted.to_vec(), 0));
    store.complete(mark(3, &mut history, &[]), None).unwrap();
    assert_eq!(disk.fold(100).unwrap(), 9);
    assert_eq!((content(&disk), disk.overlay_blocks()), (wanted.to_vec(), 0));
}

#[test]
fn digests_tell_zeroes_from_content_wherever_it_is() {
    let mut world = World::new(5);
    for _ in 0..10 {
        world.persist();
    }
    let (first, count) = (2, BLOCKS + 10);
    let (mut told, mut next) = (Vec::new(), Block(first));
    let request = BlockDigestRequest { first: Block(first), count };
    block_digests(world.disk.as_ref(), request, |message| {
        assert_eq!(message.first, next);
        next = message.end();
        told.extend(message.ranges);
    })
    .unwrap();
    assert_eq!(next, Block(first + count));
    let found = told.into_iter().flat_map(|range| match range {
        DigestRange::Zero { count } => vec![None; count as usize],
        DigestRange::Each(digests) => digests.into_iter().map(Some).collect(),
    });
    let wanted = (first..first + count).map(|block| {
        let mut page = [0; BLOCK_SIZE];
        if block < BLOCKS {
            world.disk.read(Block(block).offset(), &mut page).unwrap();
        }
        (page != [0; BLOCK_SIZE]).then(|| PageDigest::of(&page))
    });
    assert!(found.eq(wanted));
}

#[test]
fn an_export_has_the_same_content() {
    let mut world = World::new(9);
    for _ in 0..10 {
        world.persist();
    }
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk.img");
    export(world.disk.as_ref(), &path).unwrap();
    assert!(export(world.disk.as_ref(), &path).is_err(), "it is not written over");
    let file = FileDisk::open(&path, false).unwrap();
    let digest = content_digest(world.disk.as_ref()).unwrap();
    assert_eq!((file.bytes(), content_digest(&file).unwrap()), (BYTES, digest));
    // Written zeroes are no other content than holes.
    let zero = world.live.chunks(PER_BLOCK).position(|block| block.iter().all(|tag| *tag == 0)).unwrap();
    file.write((zero * BLOCK_SIZE) as u64, &[0; BLOCK_SIZE]).unwrap();
    assert_eq!(content_digest(&file).unwrap(), digest);
    file.write(0, &[1]).unwrap();
    assert_ne!(content_digest(&file).unwrap(), digest);
}

/// Threads of the guest's device with blocks of their own, and folding under them, on a file.
#[test]
fn the_guests_threads_read_what_they_wrote_while_it_is_folded() {
    let place = tempfile::tempdir().unwrap();
    let mut store = Store::open_in_memory(&MemoryDisk::new(), &vm()).unwrap();
    let disk = store.open_disk(&place.path().join("disk.img"), 256 * BLOCK_SIZE as u64).unwrap();
    store.begin_copy(Base::Empty).unwrap();
    let mut history = History::default();
    store.complete(mark(1, &mut history, &[]), None).unwrap();
    let bytes = vec![9; 256 * BLOCK_SIZE];
    store.activate(Term(2), &[BlockRun::data(Block(0), &bytes)]).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                disk.fold(2).unwrap();
            }
        });
        let guests: Vec<_> = (0..2_u64)
            .map(|me| {
                let disk = &disk;
                scope.spawn(move || {
                    let (mut rng, mut model) = (Rng(me), vec![[9_u8; BLOCK_SIZE]; 128]);
                    for round in 0..3000_u32 {
                        let (at, from) = (rng.below(128), rng.below(8) as usize * SECTOR);
                        let to = (from + SECTOR * (1 + rng.below(8) as usize)).min(BLOCK_SIZE);
                        let offset = Block(me * 128 + at).offset();
                        model[at as usize][from..to].fill(round as u8);
                        disk.write(offset + from as u64, &model[at as usize][from..to]).unwrap();
                        let (look, mut found) = (rng.below(128), [0; BLOCK_SIZE]);
                        disk.read(Block(me * 128 + look).offset(), &mut found).unwrap();
                        assert!(found == model[look as usize], "block {look} of {me} in round {round}");
                        if round % 64 == 0 {
                            disk.flush().unwrap();
                        }
                    }
                })
            })
            .collect();
        let ended: Vec<_> = guests.into_iter().map(|guest| guest.join()).collect();
        stop.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });
    while disk.fold(1000).unwrap() > 0 {}
    assert_eq!(disk.overlay_blocks(), 0);
}
