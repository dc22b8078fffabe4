//! A script of calls to a store, drawn from a seed, and the state that each leaves behind: what a crash between or in
//! two of them may show.
#![allow(dead_code, reason = "each test uses a part of it")]

use colo_common::history::point;
use colo_common::{BLOCK_SIZE, Block, Epoch, Gfn, History, PAGE_SIZE, Point, ReplicaId, Term, VmId};
use colo_secondary::disk::DiskImage;
use colo_secondary::store::{Base, BlockRun, Mark, PageContent, Store, StoreError, StoredCopy};
use colo_vmm::disk::Disk;
use colo_vmm::memory::Page;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::SystemTime;

/// Bytes of a batch here: a few pages, so that small marks go through `pending`.
pub(crate) const BATCH: usize = 5 * PAGE_SIZE;

/// Frames of the scripted guest.
const FRAMES: u64 = 48;
const BLOCKS: u64 = 16;

/// Bytes of its disk.
pub(crate) const DISK_BYTES: u64 = BLOCKS * BLOCK_SIZE as u64;

/// What pages and blocks hold: by number, a tag that the bytes are made of; 0 is zeroes.
pub(crate) type Tags = BTreeMap<u64, u64>;

/// What a store must hold after a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) spec: Option<u64>,
    pub(crate) term: Option<Term>,
    pub(crate) active: Option<Term>,
    pub(crate) copy: Copy,
    /// They and the blocks are of no account while the copy is inconsistent.
    pub(crate) pages: Tags,
    pub(crate) blocks: Tags,
}

/// The copy of a [`State`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Copy {
    #[default]
    None,
    Inconsistent,
    Whole {
        point: Point,
        replica: Option<ReplicaId>,
        history: History,
        state: u64,
    },
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    SeeSpec(u64),
    SeeTerm(Term),
    BeginCopy {
        base_stored: bool,
    },
    WritePages(Tags),
    WriteBlocks(Tags),
    Complete {
        point: Point,
        replica: Option<ReplicaId>,
        state: u64,
        blocks: Tags,
    },
    Persist {
        point: Point,
        state: u64,
        pages: Tags,
        blocks: Tags,
    },
    Fold,
    /// Some of the overlay goes into the image file.
    FoldDisk(u64),
    StoreReplica(ReplicaId),
    EraseReplica,
    Activate {
        term: Term,
        blocks: Tags,
    },
    Reclaim,
}

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn tags(&mut self, most: u64, numbers: u64) -> Tags {
        let count = self.below(most + 1);
        (0..count).map(|_| (self.below(numbers), if self.below(5) == 0 { 0 } else { self.next() })).collect()
    }
}

/// The vm of all scripts.
pub(crate) fn vm() -> VmId {
    "scripted".parse().unwrap()
}

/// Opens the store and the guest's disk below a directory.
pub(crate) fn open(dir: &Path) -> Result<Store, StoreError> {
    let mut store = Store::open(&dir.join("store"), &vm())?;
    store.open_disk(&dir.join("disk.img"), DISK_BYTES)?;
    Ok(store)
}

/// What digests of blocks are for: after a crash in a copy's making, nobody knows what of its disk is there.
pub(crate) fn send_disk_again(store: &mut Store, state: &State) {
    if state.copy == Copy::Inconsistent {
        let all = (0..BLOCKS).map(|number| (number, state.blocks.get(&number).copied().unwrap_or(0)));
        run(store, state, &Step::WriteBlocks(all.collect())).unwrap();
    }
}

/// A thread that folds the disk all the time.
pub(crate) struct Folder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Folder {
    pub(crate) fn start(store: &Store, most: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, disk): (_, Arc<DiskImage>) = (Arc::clone(&stop), Arc::clone(store.disk().unwrap()));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                disk.fold(most).unwrap();
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// A script of `length` steps: entry n of the states is what holds after n steps.
pub(crate) fn script(seed: u64, length: usize) -> (Vec<Step>, Vec<State>) {
    let (mut rng, mut steps, mut states) = (Rng(seed), Vec::new(), vec![State::default()]);
    while steps.len() < length {
        let step = draw(&mut rng, states.last().unwrap());
        states.push(states.last().unwrap().after(&step));
        steps.push(step);
    }
    (steps, states)
}

/// A call that the state allows.
pub(crate) fn draw(rng: &mut Rng, state: &State) -> Step {
    let term = state.term.unwrap_or_default();
    let id = ReplicaId(u128::from(rng.next()));
    let replica = (rng.below(2) == 0).then_some(id);
    match &state.copy {
        Copy::None => match rng.below(4) {
            0 if state.spec.is_none() => Step::SeeSpec(rng.next()),
            0 if rng.below(2) == 0 => Step::Reclaim,
            0 => Step::FoldDisk(rng.below(12)),
            1 => Step::SeeTerm(term.next()),
            _ => Step::BeginCopy { base_stored: rng.below(3) == 0 },
        },
        Copy::Inconsistent => match rng.below(12) {
            0 => Step::BeginCopy { base_stored: rng.below(2) == 0 },
            1..=3 => {
                let point = Point { term, epoch: Epoch(rng.below(1000)) };
                Step::Complete { point, replica, state: rng.next(), blocks: rng.tags(4, BLOCKS) }
            }
            4 => Step::FoldDisk(rng.below(12)),
            5..8 => Step::WriteBlocks(rng.tags(6, BLOCKS)),
            _ => Step::WritePages(rng.tags(20, FRAMES)),
        },
        Copy::Whole { point: at, .. } => match rng.below(24) {
            0 => Step::BeginCopy { base_stored: rng.below(2) == 0 },
            1 => Step::Activate { term: term.next(), blocks: rng.tags(14, BLOCKS) },
            2 => Step::SeeTerm(term.next()),
            3 => Step::StoreReplica(id),
            4 => Step::EraseReplica,
            5 | 6 => Step::Fold,
            7 | 8 => Step::FoldDisk(rng.below(12)),
            kind => {
                let epoch = at.epoch.0 + 1 + rng.below(3);
                let most = if kind < 12 { 16 } else { 4 };
                Step::Persist {
                    point: point(at.term.0.max(term.0), epoch),
                    state: rng.next(),
                    pages: rng.tags(most, FRAMES),
                    blocks: rng.tags(if kind < 14 { 8 } else { 2 }, BLOCKS),
                }
            }
        },
    }
}

impl State {
    /// The state that a step leaves.
    pub(crate) fn after(&self, step: &Step) -> Self {
        let mut state = self.clone();
        match step {
            Step::SeeSpec(digest) => state.spec = Some(*digest),
            Step::SeeTerm(term) => state.term = state.term.max(Some(*term)),
            Step::BeginCopy { base_stored } => {
                (state.copy, state.active) = (Copy::Inconsistent, None);
                if !base_stored {
                    state.pages = Tags::new();
                }
            }
            Step::WritePages(pages) => merge(&mut state.pages, pages),
            Step::WriteBlocks(blocks) => merge(&mut state.blocks, blocks),
            Step::Complete { point, replica, state: machine, blocks } => {
                merge(&mut state.blocks, blocks);
                let mut history = History::default();
                history.extend(*point);
                state.copy = Copy::Whole { point: *point, replica: *replica, history, state: *machine };
            }
            Step::Persist { point, state: machine, pages, blocks } => {
                merge(&mut state.pages, pages);
                merge(&mut state.blocks, blocks);
                state.copy = self.at(*point, *machine);
            }
            Step::Fold | Step::FoldDisk(_) | Step::Reclaim => {}
            Step::StoreReplica(id) => state.name(Some(*id)),
            Step::EraseReplica => state.name(None),
            Step::Activate { term, blocks } => {
                (state.term, state.active) = (state.term.max(Some(*term)), Some(*term));
                merge(&mut state.blocks, blocks);
                (state.copy, state.pages) = (Copy::None, Tags::new());
            }
        }
        state
    }

    /// Whether a store that shows `found` may be in this state.
    pub(crate) fn allows(&self, found: &Self) -> bool {
        let known = |state: &Self| (state.spec, state.term, state.active);
        let told = known(self) == known(found) && self.copy == found.copy;
        let whole = self.copy != Copy::Inconsistent;
        told && (!whole || (&self.pages, &self.blocks) == (&found.pages, &found.blocks))
    }

    fn at(&self, to: Point, machine: u64) -> Copy {
        let Copy::Whole { replica, history, .. } = &self.copy else { panic!("{to} follows no whole copy") };
        let mut history = history.clone();
        history.extend(to);
        Copy::Whole { point: to, replica: *replica, history, state: machine }
    }

    fn name(&mut self, id: Option<ReplicaId>) {
        if let Copy::Whole { replica, .. } = &mut self.copy {
            *replica = id;
        }
    }
}

/// Does a step on a store that is in `before`.
pub(crate) fn run(store: &mut Store, before: &State, step: &Step) -> Result<(), StoreError> {
    let mark = |point: Point,
                history: &History,
                machine: u64,
                blocks: &Tags,
                then: &mut dyn FnMut(Mark<'_>) -> _| {
        let (bytes, state) = (block_bytes(blocks), machine_state(machine));
        then(Mark { point, history, state: &state, blocks: &as_runs(&bytes), now: SystemTime::UNIX_EPOCH })
    };
    match step {
        Step::SeeSpec(digest) => store.see_spec(*digest),
        Step::SeeTerm(term) => store.see_term(*term),
        Step::BeginCopy { base_stored } => {
            store.begin_copy(if *base_stored { Base::Stored } else { Base::Empty })
        }
        Step::WritePages(tags) => store.write_pages(contents(&page_bytes(tags))),
        Step::WriteBlocks(tags) => store.write_blocks(as_runs(&block_bytes(tags))),
        Step::Complete { point, replica, state, blocks } => {
            let Copy::Whole { history, .. } = before.after(step).copy else { unreachable!() };
            mark(*point, &history, *state, blocks, &mut |mark| store.complete(mark, *replica))
        }
        Step::Persist { point, state, pages, blocks } => {
            let Copy::Whole { history, .. } = before.after(step).copy else { unreachable!() };
            let pages = page_bytes(pages);
            mark(*point, &history, *state, blocks, &mut |mark| store.persist(contents(&pages), mark))
        }
        Step::Fold => store.fold(),
        Step::FoldDisk(most) => {
            let folded = store.disk().expect("it was opened").fold(*most as usize);
            folded.map(drop).map_err(|source| StoreError::Io {
                dir: "disk".into(),
                what: "be folded",
                source,
            })
        }
        Step::StoreReplica(id) => store.store_replica_id(*id),
        Step::EraseReplica => store.erase_replica_id(),
        Step::Activate { term, blocks } => store.activate(*term, &as_runs(&block_bytes(blocks))),
        Step::Reclaim => store.reclaim(),
    }
}

/// Everything that a store shows.
pub(crate) fn observe(store: &mut Store) -> Result<State, StoreError> {
    let (summary, mut pages, mut blocks) = (store.summary(), Tags::new(), Tags::new());
    let copy = match summary.copy {
        StoredCopy::None => Copy::None,
        StoredCopy::Inconsistent => {
            let dropped = store.load_base(|gfn, page| {
                pages.insert(gfn.0, page_tag(page));
            })?;
            assert_eq!(dropped, 0);
            Copy::Inconsistent
        }
        StoredCopy::Whole(whole) => {
            store.load(|gfn, page| {
                pages.insert(gfn.0, page_tag(page));
            })?;
            assert_eq!(whole.pages, pages.len() as u64);
            let state = store.state()?;
            let tag = u64::from_le_bytes(state[..8].try_into().unwrap());
            assert_eq!(state, machine_state(tag));
            Copy::Whole { point: whole.point, replica: whole.replica, history: whole.history, state: tag }
        }
    };
    let disk = store.disk().expect("it was opened");
    for number in (0..BLOCKS).filter(|_| copy != Copy::Inconsistent) {
        let mut bytes = [0; BLOCK_SIZE];
        disk.read(Block(number).offset(), &mut bytes).unwrap();
        Some(page_tag(&bytes)).filter(|&tag| tag != 0).map(|tag| blocks.insert(number, tag));
    }
    Ok(State { spec: summary.spec, term: summary.term, active: summary.active, copy, pages, blocks })
}

fn merge(into: &mut Tags, newer: &Tags) {
    for (&number, &tag) in newer {
        if tag == 0 {
            into.remove(&number)
        } else {
            into.insert(number, tag)
        };
    }
}

/// Every second zero page is given by its bytes.
fn page_bytes(tags: &Tags) -> Vec<(Gfn, Option<Box<Page>>)> {
    let page = |(&gfn, &tag): (&u64, &u64)| {
        let bytes = (tag != 0 || gfn % 2 == 0).then(|| {
            let mut page = Box::new([0; PAGE_SIZE]);
            page.as_chunks_mut().0.fill(tag.to_le_bytes());
            page
        });
        (Gfn(gfn), bytes)
    };
    tags.iter().map(page).collect()
}

fn contents(pages: &[(Gfn, Option<Box<Page>>)]) -> impl Iterator<Item = (Gfn, PageContent<'_>)> {
    pages.iter().map(|(gfn, page)| (*gfn, page.as_deref().map_or(PageContent::Zero, PageContent::Bytes)))
}

fn page_tag(page: &Page) -> u64 {
    let (first, all) = (page.as_chunks::<8>().0[0], page.as_chunks::<8>().0);
    assert!(all.iter().all(|word| *word == first), "a page is a mix of two");
    u64::from_le_bytes(first)
}

/// Every second zero block is given by its bytes.
fn block_bytes(tags: &Tags) -> Vec<(Block, Option<Box<Page>>)> {
    page_bytes(tags).into_iter().map(|(gfn, page)| (Block(gfn.0), page)).collect()
}

fn as_runs(blocks: &[(Block, Option<Box<Page>>)]) -> Vec<BlockRun<'_>> {
    blocks
        .iter()
        .map(|(block, page)| match page {
            Some(page) => BlockRun::data(*block, &page[..]),
            None => BlockRun::zeros(*block, 1),
        })
        .collect()
}

fn machine_state(tag: u64) -> Vec<u8> {
    tag.to_le_bytes().repeat(1 + (tag % 1000) as usize)
}
