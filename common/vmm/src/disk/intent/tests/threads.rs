//! Requests, cuts, acks and the cleaner at once: no byte goes into the image that the safe log does not name.

use colo_common::history::point;
use colo_common::{Block, Epoch};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::twins::{Image, Medium};
use super::world::logged;
use crate::disk::Disk;
use crate::disk::intent::EXTENT_BYTES;

/// So many that most are at rest at any time.
const EXTENTS: u64 = 16;
/// Extents that leave the log before the end, and how long that may take on a slow machine.
const LEAVE: u64 = 5000;
const AT_MOST: Duration = Duration::from_secs(60);

#[test]
fn nothing_is_written_that_the_safe_log_does_not_name() {
    let (image, medium) = (Image::new(EXTENTS * EXTENT_BYTES), Medium::default());
    let disk = Arc::new(logged(&image, &medium, point(1, 0)));
    let safe = medium.clone();
    image.allow(move |blocks| {
        let claim = safe.certain();
        blocks.into_iter().all(|block| claim.extents.contains(Block(block)))
    });
    let (done, left, written) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let (disk, image, done, written) = (&disk, &image, &done, &written);
            scope.spawn(move || {
                let mut at: u64 = writer;
                while !done.load(Ordering::Relaxed) {
                    at = at.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    let block = (at >> 40) % EXTENTS * 256 + writer;
                    let blocks = Block(block)..Block(block + 1);
                    disk.change_begins(blocks.clone());
                    image.tag(disk, block, at | 1);
                    disk.change_recorded(blocks);
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut epoch = 1;
        let begun = Instant::now();
        while left.load(Ordering::Relaxed) < LEAVE && begun.elapsed() < AT_MOST {
            epoch += 1;
            disk.log().set_open_epoch(Epoch(epoch));
            disk.log().acked(point(1, epoch - 1));
            left.fetch_add(disk.clean_all().unwrap(), Ordering::Relaxed);
        }
        done.store(true, Ordering::Relaxed);
    });
    let (left, written) = (left.into_inner(), written.into_inner());
    println!("{written} writes, {left} extents cleaned, {:?}", disk.log().status());
    assert!(left > LEAVE / 100 && written > left, "{left} {written}");
}
