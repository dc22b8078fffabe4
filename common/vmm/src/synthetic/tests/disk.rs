//! A synthetic guest with a disk, beside a twin that is never moved: its copy lives on what its cuts say of the disk.

use super::super::{Program, SyntheticGuest, Tracking};
use super::{copy_all, dirty_for, guest, ring_spec};
use crate::devices::DiskTracking;
use crate::disk::intent::{EXTENT_BYTES, IntentLog, LoggedDisk};
use crate::disk::{Disk, DiskContent, DiskDelta, DiskWrite, FileDisk};
use crate::guest::ProtectedGuest;
use colo_common::history::point;
use colo_common::limits::MAX_EPOCH_DISK;
use colo_common::{BLOCK_SIZE, Block, Epoch};
use proptest::prelude::{ProptestConfig, any, proptest};
use std::sync::Arc;
use tempfile::TempDir;

const BLOCKS: u64 = 64;

struct Place {
    _dir: TempDir,
    disk: Arc<FileDisk>,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::open_sized(&dir.path().join("disk"), BLOCKS * BLOCK_SIZE as u64, true);
        Self { disk: Arc::new(disk.unwrap()), _dir: dir }
    }

    fn guest(&self, program: &Program, host: u64) -> SyntheticGuest {
        let tracking = Tracking { seed: host, ..Tracking::default() };
        guest(ring_spec(2), program, &tracking).with_disk(Arc::clone(&self.disk) as _).unwrap()
    }

    fn write(&self, write: &DiskWrite) {
        match &write.content {
            DiskContent::Bytes(bytes) => self.disk.write(write.first.offset(), bytes).unwrap(),
            DiskContent::Zeroes(_) => self.disk.zero(write.blocks(), true).unwrap(),
        }
    }

    /// Blocks first, as the other disk has them, and then the writes.
    fn take(&self, delta: &DiskDelta, other: &Self) {
        for block in delta.blocks.iter() {
            let mut page = [0; BLOCK_SIZE];
            other.disk.read(block.offset(), &mut page).unwrap();
            self.disk.write(block.offset(), &page).unwrap();
        }
        delta.writes.iter().for_each(|write| self.write(write));
    }
}

fn program(seed: u64, blocks: u32, write_steps: u32) -> Program {
    Program { seed, pages: 40, blocks, block_every: 2, write_steps, ..Program::default() }
}

const BYTES: DiskTracking = DiskTracking::Bytes { most: MAX_EPOCH_DISK };

fn started(mut guest: SyntheticGuest) -> SyntheticGuest {
    guest.boot().unwrap();
    guest.resume().unwrap();
    guest
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_goes_on_as_its_twin_from_what_the_cuts_say(
        seed in any::<u64>(),
        blocks in 2..=BLOCKS as u32,
        write_steps in 1..60_u32,
        moves in proptest::collection::vec((1..90_u64, any::<bool>(), any::<bool>()), 1..24),
    ) {
        let program = program(seed, blocks, write_steps);
        let (twins, mut here, mut there) = (Place::new(), Place::new(), Place::new());
        let mut twin = started(twins.guest(&program, 1));
        let mut guest = started(here.guest(&program, 2));
        guest.track_disk(BYTES);
        for (at, (steps, with_bytes, is_moved)) in (3..).zip(moves) {
            assert_eq!(guest.advance(steps), twin.advance(steps));
            let (collected, kept) = guest.collect_blocks();
            let mut cut = guest.cut(&mut dirty_for(&guest)).unwrap();
            let seen = guest.collect_blocks();
            assert!(seen.0.is_empty() && seen.1 == 0, "the cut took them");
            assert_eq!(kept == 0, cut.disk.writes.is_empty());
            let twin_cut = super::cut(&mut twin);
            assert!(twin_cut.disk.writes.is_empty() && twin_cut.disk.blocks.is_empty(), "nobody asked");
            assert_eq!(cut.state.encode(), twin_cut.state.encode(), "what its host does is not in it");
            assert_eq!(guest.disk_digest(), twin.disk_digest());
            cut.disk.blocks.union_with(&collected);
            there.take(&cut.disk, &here);
            if is_moved {
                let next = there.guest(&program, at);
                copy_all(guest.memory(), next.memory());
                guest = next;
                guest.restore(&cut.state).unwrap();
                std::mem::swap(&mut here, &mut there);
                // What was under way may be on the disk that is left, and is in the state.
                for block in (0..BLOCKS).map(Block) {
                    let mut page = [0; BLOCK_SIZE];
                    here.disk.read(block.offset(), &mut page).unwrap();
                    there.disk.write(block.offset(), &page).unwrap();
                }
            }
            assert_eq!(guest.disk_digest(), twin.disk_digest());
            guest.track_disk(if with_bytes { BYTES } else { DiskTracking::Blocks });
            guest.resume().unwrap();
            twin.resume().unwrap();
        }
        assert!(guest.state.failed.is_none() && twin.state.failed.is_none());
    }
}

/// Content of a disk, block by block.
fn pages(disk: &dyn Disk) -> Vec<[u8; BLOCK_SIZE]> {
    let mut pages = vec![[0; BLOCK_SIZE]; (disk.bytes() / BLOCK_SIZE as u64) as usize];
    disk.read(0, pages.as_flattened_mut()).unwrap();
    pages
}

/// The guest's requests end long after their bytes are on the disk, and acks come late: whenever its process is killed, what
/// its intent log does not name is as the copy has it.
#[test]
fn its_image_is_what_the_intent_log_claims() {
    const EXTENTS: u64 = 4;
    let (dir, bytes) = (tempfile::tempdir().unwrap(), EXTENTS * EXTENT_BYTES);
    let [image, copy] = ["image", "copy"].map(|name| Place {
        disk: Arc::new(FileDisk::open_sized(&dir.path().join(name), bytes, true).unwrap()),
        _dir: tempfile::tempdir().unwrap(),
    });
    let path = dir.path().join("intent");
    let log = IntentLog::create(&path, bytes, &"web".parse().unwrap(), point(1, 0)).unwrap();
    let disk = Arc::new(LoggedDisk::new(Arc::clone(&image.disk) as _, log));
    let (program, tracking) =
        (program(5, (bytes / BLOCK_SIZE as u64) as u32, 70), Tracking { seed: 9, ..Tracking::default() });
    let mut guest =
        started(guest(ring_spec(2), &program, &tracking).with_disk(Arc::clone(&disk) as _).unwrap());
    guest.track_disk(BYTES);
    let (mut copies, mut ahead, mut hidden) = (vec![pages(&*copy.disk)], 0, 0);
    for epoch in 1..=60_u64 {
        // Most of the time it is idle, so that extents come to rest.
        guest.advance(if epoch % 6 == 0 { 40 } else { 3 });
        disk.log().set_open_epoch(Epoch(epoch + 1));
        let cut = guest.cut(&mut dirty_for(&guest)).unwrap();
        copy.take(&cut.disk, &image);
        copies.push(pages(&*copy.disk));
        disk.log().acked(point(1, epoch.saturating_sub(2)));
        disk.clean_all().unwrap();
        guest.resume().unwrap();
        guest.advance(epoch % 4);
        let (claim, image) = (IntentLog::read(&path).unwrap().unwrap(), pages(&*image.disk));
        for at in claim.point.epoch.0..=epoch {
            let differ = (0..).map(Block).zip(image.iter().zip(&copies[at as usize]));
            for (block, _) in differ.filter(|(_, (here, there))| here != there) {
                assert!(
                    claim.extents.contains(block),
                    "{block} after epoch {epoch} is not as in {at}: {claim:?}"
                );
                ahead += 1;
            }
        }
        hidden += EXTENTS - claim.extents.len();
    }
    assert!(ahead > 100 && hidden > 20 && guest.state.failed.is_none(), "{ahead} {hidden}");
}

#[test]
fn a_block_that_is_not_what_the_guest_left_there_stops_it() {
    let place = Place::new();
    let mut guest = started(place.guest(&program(7, 8, 1), 1));
    guest.advance(200);
    guest.cut(&mut dirty_for(&guest)).unwrap();
    assert!(guest.state.failed.is_none());
    // A whole older version of each block.
    place.disk.zero(Block(0)..Block(8), true).unwrap();
    guest.resume().unwrap();
    guest.advance(200);
    let wrong = guest.state.failed.expect("it found one").to_string();
    assert!(wrong.starts_with("disk at 0x"), "{wrong}");
}

#[test]
fn a_guest_without_the_disk_that_its_program_works_on_is_refused() {
    let mut alone = guest(ring_spec(2), &program(1, 8, 4), &Tracking::default());
    assert!(alone.boot().is_err(), "it has none");
    let place = Place::new();
    let wants_more = guest(ring_spec(2), &program(1, BLOCKS as u32 + 1, 4), &Tracking::default());
    assert!(wants_more.with_disk(Arc::clone(&place.disk) as _).is_err(), "it is too small");
    let mut with = started(place.guest(&program(1, 8, 4), 1));
    with.advance(10);
    let state = super::cut(&mut with).state;
    let mut without = guest(ring_spec(2), &Program::default(), &Tracking::default());
    assert!(without.restore(&state).is_err(), "of a guest with a disk");
}
