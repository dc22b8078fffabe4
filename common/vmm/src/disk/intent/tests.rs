//! The log's promise, in worlds in memory: random requests, cuts, acks, rounds of the cleaner, failures, and crashes that
//! lose any part of what was not synced. And that each way to break it is noticed.

mod threads;
mod twins;
mod world;

use super::{EXTENT_BYTES, Extents, IntentError, IntentLog};
use colo_common::history::point;
use colo_common::{Block, Epoch};
use std::ops::Range;
use world::{Lie, World};

const WORLDS: u64 = 6000;
/// Worlds in which a break must show.
const LYING: u64 = 3000;

#[test]
fn outside_of_what_the_log_names_the_image_is_the_disk_at_its_point() {
    let (mut clean, mut ahead, mut left, mut failed) = (0, 0, 0, 0);
    for seed in 0..WORLDS {
        let world = World::run(seed, None);
        assert_eq!(world.broken, None, "seed {seed}");
        clean += world.crashes_with_nothing_named;
        ahead += world.crashes_ahead;
        left += world.left;
        failed += world.failed_writes;
    }
    println!(
        "{WORLDS} worlds: {ahead} crashes with an image ahead, {clean} with nothing named, {left} extents cleaned, {failed} writes refused"
    );
    // That the worlds are worth something.
    assert!(ahead > WORLDS / 2 && clean > WORLDS / 20 && left > WORLDS && failed > WORLDS / 10);
}

#[test]
fn whatever_is_left_out_is_noticed() {
    for lie in Lie::ALL {
        let broken: Vec<u64> =
            (0..LYING).filter(|seed| World::run(*seed, Some(lie)).broken.is_some()).collect();
        println!("{lie:?}: noticed in {} of {LYING} worlds", broken.len());
        assert!(broken.len() >= 10, "{lie:?} is noticed in {} of {LYING} worlds", broken.len());
    }
}

#[test]
fn a_log_that_is_none_is_refused_with_the_remedy() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("intent");
    let (vm, bytes) = ("web".parse().unwrap(), 5 * EXTENT_BYTES);
    assert!(IntentLog::read(&path).unwrap().is_none());
    assert!(IntentLog::resume(&path, bytes, &vm, Epoch(1)).unwrap().is_none());
    let log = IntentLog::create(&path, bytes, &vm, point(2, 7)).unwrap();
    log.before_write(&(Block(255)..Block(257))).unwrap();
    let found = IntentLog::read(&path).unwrap().unwrap();
    assert_eq!((&found.vm, found.point), (&vm, point(2, 7)));
    assert_eq!(found.extents.runs().collect::<Vec<_>>(), [Block(0)..Block(512)]);
    assert!(found.extents.contains(Block(511)) && !found.extents.contains(Block(512)));
    assert_eq!(found.extents.blocks().len(), 512);
    drop(log);
    let resumed = IntentLog::resume(&path, bytes, &vm, Epoch(9)).unwrap().unwrap();
    assert_eq!(resumed.status().extents, 2);
    let says = |error: IntentError, word: &str| assert!(error.to_string().contains(word), "{error}");
    says(IntentLog::resume(&path, bytes + 4096, &vm, Epoch(9)).unwrap_err(), "name the right file");
    says(IntentLog::resume(&path, bytes, &"db".parse().unwrap(), Epoch(9)).unwrap_err(), "of vm web");
    let whole = std::fs::read(&path).unwrap();
    // Any one slot may be lost; what is left is older or newer.
    for (slot, extents) in [(0, 0), (1, 2)] {
        let mut torn = whole.clone();
        torn[slot * 4096 + 200] ^= 1;
        std::fs::write(&path, &torn).unwrap();
        assert_eq!(IntentLog::read(&path).unwrap().unwrap().extents.len(), extents);
    }
    for bad in [&whole[..4096], &whole[..5000], &[], &[7; 8192]] {
        std::fs::write(&path, bad).unwrap();
        says(IntentLog::read(&path).unwrap_err(), "compared by digests");
    }
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    says(IntentLog::read(&path).unwrap_err(), "more than");
    IntentLog::remove(&path).unwrap();
    IntentLog::remove(&path).unwrap();
    assert!(IntentLog::create(&place.path().join("no/intent"), bytes, &vm, point(0, 0)).is_err());
}

#[test]
fn what_is_in_use_stays_and_a_steady_load_hardly_writes_the_log() {
    let (image, medium) = (twins::Image::new(2000 * EXTENT_BYTES), twins::Medium::default());
    let disk = world::logged(&image, &medium, point(1, 0));
    let mut epoch = 1;
    // Everything is acked at once.
    let mut rounds = |count: u64, used: Range<u64>| {
        for _ in 0..count {
            used.clone().for_each(|extent| image.tag(&disk, extent * 256, 1));
            epoch += 1;
            disk.log().set_open_epoch(Epoch(epoch));
            disk.log().acked(point(1, epoch - 1));
            disk.clean().unwrap();
        }
        disk.log().status()
    };
    let before = rounds(1, 0..600);
    assert_eq!((before.extents, before.writes), (604, 1 + 67 + 1));
    assert_eq!(before.point, point(1, 1), "the point of the beginning is of no use to anybody");
    // But for those that were named ahead and never used; and the point goes on.
    let steady = rounds(200, 0..600);
    assert!(steady.extents == 600 && steady.writes <= before.writes + 1 + 200 / 30, "{steady:?}");
    assert!(steady.point.epoch.0 > 200 - 30, "{steady:?}");
    // 88 too many, and those that go were not used for long.
    let fewer = rounds(20, 100..600);
    assert_eq!(fewer.extents, 512);
    let after = rounds(100, 599..600);
    assert!(after.extents == 1 && after.writes <= fewer.writes + 2 + 100 / 30, "{after:?}");
    assert_eq!(disk.clean_all().unwrap(), 1);
}

#[test]
fn words_and_runs_of_extents_agree() {
    let mut extents = Extents::none(70 * EXTENT_BYTES + 4096);
    assert!(extents.is_empty());
    [0, 1, 63, 64, 70].into_iter().for_each(|extent| extents.insert(extent));
    let runs: Vec<_> = extents.runs().map(|run| (run.start.0, run.end.0)).collect();
    assert_eq!(runs, [(0, 512), (63 * 256, 65 * 256), (70 * 256, 70 * 256 + 1)]);
    extents.remove(64);
    assert_eq!(extents.len(), 4);
}
