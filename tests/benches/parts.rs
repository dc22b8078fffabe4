//! The parts of an epoch that need no running guest: the dirty set, and the machine state's encoding.

use colo_common::Gfn;
use colo_tests::images::{Images, kvm_usable};
use colo_tests::seed::Seed;
use colo_vmm::{DirtySet, KvmGuest, MachineState, ProtectedGuest};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;

/// Frames of a guest of 1 TiB.
const FRAMES: u64 = 1 << 28;
const PAGES: u64 = 4096;

fn dirty_set(c: &mut Criterion) {
    let mut seed = Seed::new(1);
    let neighbours: Vec<Gfn> = (0..PAGES).map(|n| Gfn(4096 + n)).collect();
    let scattered: Vec<Gfn> = (0..PAGES).map(|_| Gfn(seed.below(FRAMES))).collect();
    let mut group = c.benchmark_group("dirty_set");
    group.throughput(Throughput::Elements(PAGES));
    for (name, frames) in [("neighbours", neighbours), ("scattered over 1 TiB", scattered)] {
        let mut set = DirtySet::new(FRAMES);
        group.bench_function(format!("clear and insert, {name}"), |b| {
            b.iter(|| {
                set.clear();
                frames.iter().filter(|&&gfn| set.insert(gfn)).count()
            });
        });
        group.bench_function(format!("iterate, {name}"), |b| {
            b.iter(|| set.iter().map(|gfn| gfn.0).sum::<u64>());
        });
        group.bench_function(format!("unite, {name}"), |b| {
            b.iter_batched_ref(|| DirtySet::new(FRAMES), |all| all.union_with(&set), BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn machine_state(c: &mut Criterion) {
    if !kvm_usable() {
        return;
    }
    let mut group = c.benchmark_group("machine_state");
    for vcpus in [1, 4] {
        let state = state(vcpus).expect("compute.elf runs");
        let bytes = state.encode();
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format!("encode, {vcpus} vCPUs"), |b| b.iter(|| black_box(&state).encode()));
        group.bench_function(format!("decode, {vcpus} vCPUs"), |b| {
            b.iter(|| MachineState::decode(black_box(&bytes)).expect("it was just encoded"));
        });
    }
    group.finish();
}

/// The machine of a guest in the middle of its work.
fn state(vcpus: u32) -> anyhow::Result<MachineState> {
    let line = format!("rounds=1000000 cpus={vcpus}");
    let mut guest = KvmGuest::new(Images::find()?.bare("compute.elf", vcpus, 32 << 20, &line)?)?;
    guest.boot()?;
    guest.resume()?;
    let event = guest.next_event(Duration::from_millis(300));
    anyhow::ensure!(event.is_none(), "compute.elf asked for {event:?}");
    let mut dirty = DirtySet::new(guest.memory().layout().frame_limit());
    Ok(guest.cut(&mut dirty)?.state)
}

criterion_group!(benches, dirty_set, machine_state);
criterion_main!(benches);
