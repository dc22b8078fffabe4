//! What a runner pays so that a copy, or its own disk, can come back and get only what differs: the table of last dirty
//! epochs, marked at every cut.

use colo_common::{Epoch, Gfn};
use colo_tests::seed::Seed;
use colo_vmm::{DirtySet, LastDirty};
use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use std::hint::black_box;
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

criterion_group!(benches, last_dirty);
criterion_main!(benches);
