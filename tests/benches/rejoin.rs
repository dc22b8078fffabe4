//! What a runner pays so that a copy, or its own disk, can come back and get only what differs: the table of last dirty
//! epochs, marked at every cut, and the intent log in front of the disk.

#![expect(clippy::print_stdout, reason = "its result")]

use colo_common::history::point;
use colo_common::{BLOCK_SIZE, Block, Epoch, Gfn};
use colo_tests::seed::Seed;
use colo_vmm::disk::intent::{CLEAN_EVERY, Cleaner, IntentLog, LoggedDisk};
use colo_vmm::disk::{Disk, FileDisk};
use colo_vmm::{DirtySet, LastDirty};
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Frames of a guest of 1 TiB.
const FRAMES: u64 = 1 << 28;
/// Pages of 1 GiB.
const TOUCHED: u64 = 1 << 18;

fn set(pages: impl Iterator<Item = u64>) -> DirtySet {
    let mut set = DirtySet::new(FRAMES);
    for page in pages {
        set.insert(Gfn(page));
    }
    set
}

/// Runs it, and prints what a page costs.
fn per_page(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, pages: u64, mut run: impl FnMut()) {
    let (mut took, mut rounds) = (Duration::ZERO, 0);
    group.throughput(Throughput::Elements(pages));
    group.bench_function(name, |b| {
        b.iter_custom(|times| {
            let begun = Instant::now();
            (0..times).for_each(|_| run());
            let here = begun.elapsed();
            (took, rounds) = (took + here, rounds + times);
            here
        });
    });
    println!("{name}: {:.2} ns per page", took.as_nanos() as f64 / (rounds * pages) as f64);
}

fn last_dirty(c: &mut Criterion) {
    let mut seed = Seed::new(1);
    let mut group = c.benchmark_group("last_dirty");
    for pages in [64, 1024, 16384] {
        let dense = set(4096..4096 + pages);
        let within = set((0..pages * 4).filter(|_| seed.below(4) == 0).map(|n| 65536 + n));
        let scattered = set((0..pages).map(|_| seed.below(FRAMES)));
        for (name, set) in [("side by side", dense), ("one of four", within), ("over 1 TiB", scattered)] {
            let mut table = LastDirty::new(FRAMES);
            table.begin(Epoch(0));
            let (name, mut epoch) = (format!("mark {pages}, {name}"), 0);
            per_page(&mut group, &name, set.len(), || {
                epoch += 1;
                table.mark(black_box(&set), Epoch(epoch));
            });
            println!("{name}: {} bytes per page", table.bytes() as u64 / set.len());
        }
    }
    let mut table = LastDirty::new(FRAMES);
    table.begin(Epoch(0));
    table.mark(&set(0..TOUCHED), Epoch(1));
    // Each page at a time of its own.
    for epoch in 2..100 {
        table.mark(&set((0..TOUCHED / 200).map(|_| seed.below(TOUCHED))), Epoch(epoch));
    }
    for (since, name) in [(0, "all of it"), (50, "a quarter"), (98, "the last epoch"), (99, "nothing")] {
        let name = format!("since, 1 GiB touched, {name}");
        per_page(&mut group, &name, TOUCHED, || drop(black_box(table.since(Epoch(since)))));
    }
    println!("1 GiB touched of 1 TiB: {} bytes", table.bytes());
    group.finish();
}

/// Writes between two cuts, each of which is acked at once; as many as a fast guest makes in 25 ms.
const WRITES: u64 = 1024;
/// Rounds of so many writes, of each kind in turn.
const ROUNDS: u64 = 200;
/// What the kinds of disk share.
const IMAGE: u64 = 1 << 30;

/// An image whose blocks all have their place, as that of a guest that has run for a while.
fn image(place: &Path) -> anyhow::Result<Arc<FileDisk>> {
    let image = Arc::new(FileDisk::open_sized(&place.join("image"), IMAGE, true)?);
    let bytes = vec![1; 1 << 20];
    (0..IMAGE / bytes.len() as u64).try_for_each(|at| image.write(at * bytes.len() as u64, &bytes))?;
    image.flush()?;
    Ok(image)
}

/// Nanoseconds for each of some writes, as a device makes them.
fn write(disk: &dyn Disk, blocks: impl Iterator<Item = u64>) -> anyhow::Result<f64> {
    let (page, begun, mut count) = ([7; BLOCK_SIZE], Instant::now(), 0);
    for block in blocks {
        let here = Block(block)..Block(block + 1);
        disk.change_begins(here.clone());
        disk.write(here.start.offset(), &page)?;
        disk.change_recorded(here);
        count += 1;
    }
    Ok(begun.elapsed().as_nanos() as f64 / f64::from(count))
}

/// Random writes of a block within so much of the disk, with the log and without.
fn random(image: &Arc<FileDisk>, place: &Path, within: u64) -> anyhow::Result<()> {
    let log = IntentLog::create(&place.join("intent"), IMAGE, &"bench".parse()?, point(1, 0))?;
    let logged = Arc::new(LoggedDisk::new(Arc::clone(image) as Arc<dyn Disk>, log));
    let _cleaner = Cleaner::start(Arc::clone(&logged), CLEAN_EVERY)?;
    let (mut seed, blocks) = (Seed::new(3), within / BLOCK_SIZE as u64);
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let places: Vec<u64> = (0..WRITES).map(|_| seed.below(blocks)).collect();
        with.push(write(&*logged, places.iter().copied())?);
        without.push(write(&**image, places.iter().map(|block| (block + blocks / 2) % blocks))?);
        logged.log().set_open_epoch(Epoch(round + 1));
        logged.log().acked(point(1, round));
    }
    let (first, status) = (with[0] / without[0], logged.log().status());
    let (all_with, all_without) = (with.iter().sum::<f64>(), without.iter().sum::<f64>());
    let (with, without) = (median(&mut with), median(&mut without));
    println!(
        "random 4 KiB writes within {} MiB: {without:.0} ns without the log, {with:.0} ns with it: {:.2}; all {} rounds {:.2}, the first {first:.1}; the log was written {} times",
        within >> 20,
        with / without,
        ROUNDS,
        all_with / all_without,
        status.writes
    );
    Ok(())
}

/// The whole disk in sequence, which enters extents as fast as it can be done; with the guest's own syncs or none.
fn in_sequence(image: &Arc<FileDisk>, place: &Path) -> anyhow::Result<()> {
    let log = IntentLog::create(&place.join("intent"), IMAGE, &"bench".parse()?, point(1, 0))?;
    let logged = LoggedDisk::new(Arc::clone(image) as Arc<dyn Disk>, log);
    let blocks = IMAGE / BLOCK_SIZE as u64;
    image.flush()?;
    let without = write(&**image, 0..blocks)?;
    image.flush()?;
    let with = write(&logged, 0..blocks)?;
    let writes = logged.log().status().writes;
    println!(
        "1 GiB in sequence: {without:.0} ns for 4 KiB without the log, {with:.0} ns with it: {:.2}; the log was written {writes} times",
        with / without
    );
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn intent(_: &mut Criterion) {
    let run = || {
        let place = tempfile::tempdir()?;
        let image = image(place.path())?;
        random(&image, place.path(), 1 << 30)?;
        random(&image, place.path(), 16 << 20)?;
        in_sequence(&image, place.path())
    };
    run().expect("an image can be written");
}

criterion_group!(benches, last_dirty, intent);
criterion_main!(benches);
