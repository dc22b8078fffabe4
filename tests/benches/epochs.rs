//! The way of an epoch through both nodes, step by step, without the network: copy, encode, stage, apply, store. Each for
//! pages that cannot be compressed and lie scattered over the guest's memory; beside them `memcpy` of as many
//! pages that lie together, which every step can be measured against.

use colo_common::{Gfn, PAGE_SIZE, Point, ReplicaId, VmId};
use colo_primary::checkpoint::copy_out;
use colo_primary::encode::Encoder;
use colo_primary::transfer::Epoch;
use colo_proto::frame::{Frame, VmTag};
use colo_proto::message::SeedMode;
use colo_secondary::image::Image;
use colo_secondary::persist::{Job, Persisted, Persister, ToStore};
use colo_secondary::staging::{StagedEpoch, Staging, Step};
use colo_secondary::store::{Base, Store};
use colo_tests::seed::Seed;
use colo_vmm::egress::{Output, OutputPosition};
use colo_vmm::memory::GuestMemory;
use colo_vmm::synthetic::{SyntheticConfig, SyntheticGuest};
use colo_vmm::{BootFile, BootSource, DirtySet, GuestSpec, MachineState, PagePool, ProtectedGuest};
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

const MEMORY: u64 = 512 << 20;
const PAGES: [u64; 3] = [64, 1024, 16384];
const LIMIT: u64 = 256 << 20;

/// A guest's memory with so many dirty pages, and its machine.
struct Source {
    vm: VmId,
    spec_digest: u64,
    memory: Arc<GuestMemory>,
    dirty: DirtySet,
    state: MachineState,
    pool: PagePool,
}

impl Source {
    fn new(pages: u64) -> Self {
        let image = BootFile { path: "none".into(), bytes: Vec::new().into() };
        let spec = GuestSpec::new("bench", MEMORY, BootSource::Flat { image, address: 1 << 16 });
        let memory = Arc::new(GuestMemory::new(MEMORY).expect("memory for a guest"));
        let guest =
            SyntheticGuest::with_memory(spec.clone(), SyntheticConfig::default(), Arc::clone(&memory));
        let mut guest = guest.expect("a guest");
        guest.boot().expect("it boots");
        guest.resume().expect("it runs");
        let frames = memory.layout().frame_limit();
        let state = guest.cut(&mut DirtySet::new(frames)).expect("it is cut").state;
        let (mut seed, mut dirty) = (Seed::new(pages), DirtySet::new(frames));
        while dirty.len() < pages {
            let gfn = Gfn(seed.below(MEMORY / PAGE_SIZE as u64));
            let mut page = [0; PAGE_SIZE];
            page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&seed.next_u64().to_le_bytes()));
            memory.write_page(gfn, &page).expect("a frame of the guest");
            dirty.insert(gfn);
        }
        let vm = "bench".parse().expect("a name");
        Self { vm, spec_digest: spec.digest(), memory, dirty, state, pool: PagePool::default() }
    }

    fn epoch(&self, base: Option<Point>, point: Point) -> Epoch {
        let (pages, _) = copy_out(&self.memory, &self.dirty, &self.pool).expect("pages of the guest");
        let start = OutputPosition::default();
        Epoch {
            point,
            base,
            history: vec![point],
            pages,
            blocks: Vec::new(),
            state: self.state.clone(),
            output: Output { start, items: Vec::new() },
            released: start,
            promotions: 0,
            cut_at: Instant::now(),
        }
    }

    fn frames(&self, epoch: Epoch) -> Vec<Frame> {
        let mut encoder = Encoder::new(VmTag::of(&self.vm), epoch.point);
        let mut frames = Vec::new();
        if epoch.base.is_none() {
            frames.push(encoder.seed(SeedMode::FULL, epoch.history.clone()));
        }
        encoder.epoch(epoch, |frame| frames.push(frame));
        frames
    }

    fn stage(&self, frames: &[Frame]) -> StagedEpoch {
        let mut staging = Staging::new(self.memory.layout().frame_limit(), LIMIT, self.spec_digest);
        for frame in frames {
            if let Step::Whole(epoch) = staging.frame(frame, &self.memory).expect("what was encoded") {
                return *epoch;
            }
        }
        panic!("the epoch has no end");
    }
}

fn point(epoch: u64) -> Point {
    colo_common::history::point(1, epoch)
}

fn steps(c: &mut Criterion) {
    for pages in PAGES {
        let source = Source::new(pages);
        let mut group = c.benchmark_group(format!("epoch of {pages} pages"));
        group.throughput(Throughput::Bytes(pages * PAGE_SIZE as u64)).sample_size(20);
        memcpy(&mut group, pages);
        group.bench_function("copy", |b| {
            b.iter(|| copy_out(&source.memory, &source.dirty, &source.pool).expect("pages of the guest"));
        });
        group.bench_function("encode", |b| {
            let epoch = || source.epoch(Some(point(1)), point(2));
            b.iter_batched(epoch, |epoch| source.frames(epoch), BatchSize::PerIteration);
        });
        let frames = source.frames(source.epoch(Some(point(1)), point(2)));
        group.bench_function("stage", |b| b.iter(|| source.stage(black_box(&frames))));
        let staged = source.stage(&frames);
        group.bench_function("apply", |b| {
            let target = Arc::new(GuestMemory::new(MEMORY).expect("memory for an image"));
            let image = || Image::new(Arc::clone(&target), Some(point(1)));
            b.iter_batched(
                image,
                |mut image| image.apply(&staged).expect("it follows"),
                BatchSize::PerIteration,
            );
        });
        store(&mut group, &source);
        group.finish();
    }
}

fn memcpy(group: &mut BenchmarkGroup<'_, criterion::measurement::WallTime>, pages: u64) {
    let from = vec![1_u8; pages as usize * PAGE_SIZE];
    let mut to = vec![0_u8; from.len()];
    group.bench_function("memcpy", |b| {
        b.iter(|| {
            let pages = black_box(&from).chunks_exact(PAGE_SIZE);
            black_box(&mut to)
                .chunks_exact_mut(PAGE_SIZE)
                .zip(pages)
                .for_each(|(to, from)| to.copy_from_slice(from));
        });
    });
}

/// Until the mark is synced.
fn store(group: &mut BenchmarkGroup<'_, criterion::measurement::WallTime>, source: &Source) {
    let directory = tempfile::tempdir().expect("a directory");
    let store = Store::open(directory.path(), &source.vm).expect("a store");
    let (tell, told) = std::sync::mpsc::channel();
    let persister = Persister::start(store, move |persisted| drop(tell.send(persisted))).expect("a thread");
    let wait = || loop {
        match told.recv().expect("the thread lives") {
            Persisted::Point(..) => return,
            Persisted::Failed(why) => panic!("{why}"),
            _ => {}
        }
    };
    let to_store = |base: Option<Point>, at: Point| {
        let epoch = Arc::new(source.stage(&source.frames(source.epoch(base, at))));
        let held = Arc::new(Output { start: OutputPosition::default(), items: Vec::new() });
        ToStore { epoch, held, replica: ReplicaId(1) }
    };
    persister.order(Job::Begin(Base::Empty));
    persister.order(Job::Complete(to_store(None, point(1))));
    wait();
    let mut at = 1;
    group.bench_function("store", |b| {
        b.iter_batched(
            || {
                at += 1;
                to_store(Some(point(at - 1)), point(at))
            },
            |to_store| {
                persister.order(Job::Epoch(to_store));
                wait();
            },
            BatchSize::PerIteration,
        );
    });
    persister.finish().expect("it ends");
}

criterion_group!(benches, steps);
criterion_main!(benches);
