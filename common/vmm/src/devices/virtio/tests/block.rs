//! The disk.

use colo_common::limits::MAX_EPOCH_DISK;
use colo_common::{BLOCK_SIZE, Block};

use super::driver::{DATA, NEXT, Rig, WRITE};
use super::{DISK_SLOT, DiskTracking};
use crate::disk::{Disk, DiskContent};
use crate::guest::GuestEvent;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

const VERSION_1: u64 = 1 << 32;
const READ: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Sends a request with `len` bytes of data at [`DATA`] + 64 KiB; its header and status are at [`DATA`].
fn request(rig: &Rig, number: u16, kind: u32, sector: u64, len: u32) {
    let header = [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat();
    let at = DATA + u64::from(number % 2) * 0x100;
    rig.put(at, &header);
    rig.put(at + 0x80, &[0xff]);
    let first = number % 2 * 3;
    let into = if matches!(kind, READ | GET_ID) { WRITE } else { 0 };
    rig.descriptor(DISK_SLOT, 0, first, (at, 16, NEXT, first + 1));
    rig.descriptor(DISK_SLOT, 0, first + 1, (DATA + 0x10000, len, NEXT | into, first + 2));
    rig.descriptor(DISK_SLOT, 0, first + 2, (at + 0x80, 1, WRITE, 0));
    rig.offer(DISK_SLOT, 0, number, first);
}

/// The same, and waits for its end; answers its status.
fn ask(rig: &Rig, number: u16, kind: u32, sector: u64, len: u32) -> u8 {
    request(rig, number, kind, sector, len);
    rig.wait_used(DISK_SLOT, 0, number + 1);
    rig.get(DATA + u64::from(number % 2) * 0x100 + 0x80, 1)[0]
}

fn blocks(rig: &Rig) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    for write in rig.virtio.take_disk().writes {
        match write.content {
            DiskContent::Bytes(bytes) => {
                let each = bytes.chunks(BLOCK_SIZE).map(<[u8]>::to_vec);
                found.extend((write.first.0..).zip(each));
            }
            DiskContent::Zeroes(count) => {
                found.extend((write.first.0..write.first.0 + count).map(|n| (n, vec![0; BLOCK_SIZE])));
            }
        }
    }
    found
}

#[test]
fn what_is_written_is_on_the_disk_and_in_the_epoch_as_whole_blocks() {
    let rig = Rig::new();
    rig.virtio.track_disk(DiskTracking::Bytes { most: MAX_EPOCH_DISK });
    rig.disk.write(Block(2).offset(), &[0x11; 2 * BLOCK_SIZE]).unwrap();
    rig.start(DISK_SLOT, VERSION_1, 1);
    rig.put(DATA + 0x10000, &[0x22; 1024]);
    // Two sectors, across the border of blocks 2 and 3.
    assert_eq!(ask(&rig, 0, OUT, 23, 1024), 0);
    let mut expected = vec![0x11; 2 * BLOCK_SIZE];
    expected[BLOCK_SIZE - 512..BLOCK_SIZE + 512].fill(0x22);
    let mut found = vec![0; 2 * BLOCK_SIZE];
    rig.disk.read(Block(2).offset(), &mut found).unwrap();
    assert_eq!(found, expected);
    let logged = blocks(&rig);
    assert_eq!(logged, [(2, expected[..BLOCK_SIZE].to_vec()), (3, expected[BLOCK_SIZE..].to_vec())]);
    assert_eq!(ask(&rig, 1, FLUSH, 0, 512), 0);
    rig.put(DATA + 0x10000, &[0; 1024]);
    assert_eq!(ask(&rig, 2, READ, 23, 1024), 0);
    assert_eq!(rig.get(DATA + 0x10000, 1024), [0x22; 1024]);
    assert_eq!(rig.used_entry(DISK_SLOT, 0, 2), (0, 1025));
    assert_eq!(ask(&rig, 3, GET_ID, 0, 20), 0);
    assert_eq!(rig.get(DATA + 0x10000, 20), b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert!(blocks(&rig).is_empty() && rig.lines.0.lock().unwrap().contains(&(16 + DISK_SLOT)));
}

#[test]
fn zeroes_are_exact_and_a_discard_keeps_to_whole_blocks() {
    let rig = Rig::new();
    rig.virtio.track_disk(DiskTracking::Bytes { most: MAX_EPOCH_DISK });
    rig.disk.write(0, &[0x33; 8 * BLOCK_SIZE]).unwrap();
    rig.start(DISK_SLOT, VERSION_1, 1);
    let range = |sector: u64, sectors: u32, flags: u32| {
        [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    rig.put(DATA + 0x10000, &range(4, 16, 1));
    assert_eq!(ask(&rig, 0, WRITE_ZEROES, 0, 16), 0);
    rig.put(DATA + 0x10000, &range(36, 20, 0));
    assert_eq!(ask(&rig, 1, DISCARD, 0, 16), 0);
    rig.put(DATA + 0x10000, &range(57, 2, 0));
    assert_eq!(ask(&rig, 2, WRITE_ZEROES, 0, 16), 0);
    let mut expected = vec![0x33; 8 * BLOCK_SIZE];
    for sectors in [4..20, 40..56, 57..59] {
        expected[sectors.start * 512..sectors.end * 512].fill(0);
    }
    let mut found = vec![0; 8 * BLOCK_SIZE];
    rig.disk.read(0, &mut found).unwrap();
    assert!(found == expected);
    for (number, bytes) in blocks(&rig) {
        let at = number as usize * BLOCK_SIZE;
        assert!(bytes == expected[at..at + BLOCK_SIZE], "block {number}");
    }
    for (number, (bytes, flags)) in [(u32::MAX, 0), (0, 0), (1, 2)].into_iter().enumerate() {
        rig.put(DATA + 0x10000, &range(0, bytes, flags));
        assert_ne!(ask(&rig, 3 + number as u16, WRITE_ZEROES, 0, 16), 0);
    }
}

#[test]
fn requests_that_cannot_be_done_are_refused_and_the_device_goes_on() {
    let rig = Rig::new();
    rig.start(DISK_SLOT, VERSION_1, 1);
    let sectors = super::driver::DISK / 512;
    let bad =
        [(READ, sectors, 512), (READ, sectors - 1, 1024), (OUT, u64::MAX, 512), (READ, u64::MAX / 512, 512)];
    let odd = [(READ, 0, 511), (OUT, 0, 1), (99, 0, 512)];
    for (number, (kind, sector, len)) in bad.into_iter().chain(odd).enumerate() {
        let expected = if kind == 99 { 2 } else { 1 };
        assert_eq!(ask(&rig, number as u16, kind, sector, len), expected, "{kind} at {sector}");
    }
    assert_eq!(ask(&rig, 7, READ, 0, 512), 0);
    assert!(!rig.is_broken(DISK_SLOT));
}

#[test]
fn a_request_that_has_not_ended_is_in_the_state_and_done_again() {
    let (one, two) = (Rig::new(), Rig::new());
    one.start(DISK_SLOT, VERSION_1, 1);
    one.put(DATA + 0x10000, &[0x44; 4096]);
    // Nothing that ends is taken from here on, as at a cut; the driver's notification still is.
    one.virtio.pause();
    request(&one, 0, OUT, 8, 4096);
    let state = one.virtio.save();
    assert_eq!(one.used(DISK_SLOT, 0), 0);
    let encoded = postcard::to_stdvec(&state).unwrap();
    assert!(encoded.len() > 4096, "the bytes to write travel with it");
    let decoded: Vec<Option<super::SlotState>> = postcard::from_bytes(&encoded).unwrap();
    assert_eq!(decoded, state);
    decoded.iter().flatten().for_each(|slot| slot.check_limits().unwrap());
    // The memory of the same instant; the bytes to write are no longer there.
    for at in (1 << 20..3 << 20).step_by(4096) {
        two.put(at, &one.get(at, 4096));
    }
    two.put(DATA + 0x10000, &[0; 4096]);
    two.virtio.pause();
    two.virtio.track_disk(DiskTracking::Bytes { most: MAX_EPOCH_DISK });
    two.virtio.restore(&decoded).unwrap();
    two.virtio.resume();
    two.wait_used(DISK_SLOT, 0, 1);
    let mut found = [0; 4096];
    two.disk.read(4096, &mut found).unwrap();
    assert_eq!((found, two.get(DATA + 0x80, 1)), ([0x44; 4096], vec![0]));
    assert_eq!(blocks(&two), [(1, vec![0x44; 4096])]);
}

#[test]
fn a_change_is_open_until_the_epoch_has_it() {
    let rig = Rig::new();
    rig.virtio.track_disk(DiskTracking::Bytes { most: MAX_EPOCH_DISK });
    rig.start(DISK_SLOT, VERSION_1, 1);
    assert_eq!(ask(&rig, 0, READ, 0, 4096), 0);
    rig.put(DATA + 0x10000, &[0x44; 4096]);
    rig.virtio.pause();
    request(&rig, 1, OUT, 8, 4096);
    let on_disk = || {
        let mut found = [0; 4096];
        rig.disk.read(4096, &mut found).unwrap();
        found == [0x44; 4096]
    };
    rig.wait(on_disk);
    // However long that takes: cuts may come and go.
    assert!(rig.virtio.log.clone().take().0.is_empty());
    assert_eq!(*rig.faults.open.lock().unwrap(), [Block(1)..Block(2)]);
    rig.virtio.resume();
    rig.wait_used(DISK_SLOT, 0, 2);
    assert_eq!(blocks(&rig), [(1, vec![0x44; 4096])]);
    // One that fails has an end too.
    rig.faults.fails.store(true, Relaxed);
    assert_eq!(ask(&rig, 2, OUT, 9, 1024), 1);
    assert!(rig.faults.open.lock().unwrap().is_empty());
}

#[test]
fn a_write_that_outlives_its_driver_is_in_the_epoch_all_the_same() {
    let rig = Rig::new();
    rig.virtio.track_disk(DiskTracking::Bytes { most: MAX_EPOCH_DISK });
    rig.start(DISK_SLOT, VERSION_1, 1);
    rig.put(DATA + 0x10000, &[0x55; 4096]);
    rig.virtio.pause();
    request(&rig, 0, OUT, 0, 4096);
    rig.start(DISK_SLOT, VERSION_1, 1);
    rig.virtio.resume();
    rig.wait(|| !rig.virtio.log.clone().take().0.is_empty());
    assert_eq!(rig.used(DISK_SLOT, 0), 0, "nobody is told of it");
    assert_eq!(ask(&rig, 0, READ, 0, 4096), 0);
    assert_eq!(rig.get(DATA + 0x10000, 4096), [0x55; 4096]);
}

#[test]
fn a_guest_that_writes_more_than_an_epoch_holds_waits_for_the_cut() {
    let rig = Rig::new();
    rig.virtio.track_disk(DiskTracking::Bytes { most: MAX_EPOCH_DISK });
    rig.start(DISK_SLOT, VERSION_1, 1);
    let (len, mut done) = (1 << 20, 0_u16);
    while usize::from(done) * len < MAX_EPOCH_DISK {
        rig.put(DATA + 0x10000, &[done as u8; 64]);
        assert_eq!(ask(&rig, done, OUT, 0, len as u32), 0);
        done += 1;
    }
    request(&rig, done, OUT, 0, len as u32);
    rig.wait(|| rig.events.next(Duration::ZERO) == Some(GuestEvent::OutputFull));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.used(DISK_SLOT, 0), done);
    rig.virtio.pause();
    assert_eq!(blocks(&rig)[0].1[..64], [done as u8 - 1; 64], "of each block the newest");
    rig.virtio.resume();
    rig.wait_used(DISK_SLOT, 0, done + 1);
    rig.virtio.track_disk(DiskTracking::Blocks);
    let delta = rig.virtio.take_disk();
    assert!(delta.writes.is_empty() && delta.blocks.len() == 256, "{delta:?}");
}

#[test]
fn a_write_that_fails_leaves_blocks_that_only_the_disk_knows() {
    let rig = Rig::new();
    rig.virtio.track_disk(DiskTracking::Bytes { most: MAX_EPOCH_DISK });
    rig.start(DISK_SLOT, VERSION_1, 1);
    rig.put(DATA + 0x10000, &[0x66; 3 * BLOCK_SIZE]);
    assert_eq!(ask(&rig, 0, OUT, 0, 3 * BLOCK_SIZE as u32), 0);
    assert_eq!(ask(&rig, 1, OUT, 40, BLOCK_SIZE as u32), 0);
    rig.put(DATA + 0x10000, &[0x77; 2 * BLOCK_SIZE]);
    rig.faults.fails.store(true, Relaxed);
    assert_eq!(ask(&rig, 2, OUT, 16, 2 * BLOCK_SIZE as u32), 1, "the guest is told");
    rig.faults.fails.store(false, Relaxed);
    assert_eq!(ask(&rig, 3, OUT, 24, BLOCK_SIZE as u32), 0);
    rig.virtio.pause();
    let delta = rig.virtio.take_disk();
    let kept: Vec<_> = delta.writes.iter().map(|write| write.blocks()).collect();
    assert_eq!(kept, [Block(0)..Block(2), Block(3)..Block(4), Block(5)..Block(6)]);
    assert_eq!(delta.blocks.runs().collect::<Vec<_>>(), [(Block(2), 2)]);
}

#[test]
fn a_restored_disk_does_not_start_what_waited() {
    let rig = Rig::new();
    rig.virtio.track_disk(DiskTracking::Bytes { most: MAX_EPOCH_DISK });
    let fresh = rig.virtio.power_on();
    rig.start(DISK_SLOT, VERSION_1, 1);
    let closed = rig.faults.gate.lock().unwrap();
    for (number, value) in [(0, 0x11), (1, 0x22)] {
        rig.put(DATA + 0x10000, &[value; BLOCK_SIZE]);
        request(&rig, number, OUT, 0, BLOCK_SIZE as u32);
    }
    rig.virtio.pause();
    std::thread::scope(|scope| {
        let restored = scope.spawn(|| rig.virtio.restore(&fresh));
        drop(closed);
        restored.join().unwrap().unwrap();
    });
    rig.virtio.resume();
    rig.start(DISK_SLOT, VERSION_1, 1);
    assert_eq!(ask(&rig, 0, READ, 0, BLOCK_SIZE as u32), 0);
    assert_eq!(rig.get(DATA + 0x10000, BLOCK_SIZE), [0x11; BLOCK_SIZE], "only what was under way");
    assert_eq!(blocks(&rig), [(0, vec![0x11; BLOCK_SIZE])]);
}

#[test]
fn a_discard_of_the_whole_disk_weighs_little_and_is_cut_into_requests() {
    let rig = Rig::new();
    rig.virtio.track_disk(DiskTracking::Bytes { most: 1 << 20 });
    rig.start(DISK_SLOT, VERSION_1, 1);
    for number in 0..128 {
        let range = [0_u64.to_le_bytes().as_slice(), &2048_u32.to_le_bytes(), &[0; 4]].concat();
        rig.put(DATA + 0x10000, &range);
        assert_eq!(ask(&rig, number, DISCARD, 0, 16), 0);
    }
    rig.virtio.pause();
    let delta = rig.virtio.take_disk();
    assert_eq!((delta.writes.len(), delta.writes[0].blocks()), (1, Block(0)..Block(256)));
    rig.virtio.resume();
    let range = [0_u64.to_le_bytes().as_slice(), &2049_u32.to_le_bytes(), &[0; 4]].concat();
    rig.put(DATA + 0x10000, &range);
    assert_eq!(ask(&rig, 128, DISCARD, 0, 16), 1, "more than one request may have");
}
