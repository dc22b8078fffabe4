//! The persist thread: owns the store and takes staged epochs into it. What waits together is folded into one mark;
//! of each page and block of the disk the newest version goes in.

use colo_common::telemetry::in_node;
use colo_common::{Gfn, Point, ReplicaId, Term};
use colo_primary::verify::{DiskSource, compare};
use colo_proto::message::{BlockDigestRequest, BlockDigests, Verified, Verify};
use colo_vmm::MachineState;
use colo_vmm::egress::{Output, OutputItem, OutputPosition};
use colo_vmm::memory::Page;
use crossbeam_channel::{Receiver, Sender};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::OwnedSemaphorePermit;

use crate::disk::{DiskImage, block_digests};
use crate::staging::{StagedBlocks, StagedEpoch, StagedPart};
use crate::store::{Base, BlockRun, Mark, NewestBlocks, PageContent, Store, StoreError};

/// Jobs that may wait; what their epochs hold is bounded by the memory budget. The thread never waits for whoever
/// orders them.
const MAX_WAITING: usize = 1024;
/// Epochs folded into one mark at most.
const MAX_FOLDED: usize = 64;
/// What is stored as a point's state: the machine, and the output that may not be out yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredState {
    machine: Vec<u8>,
    released: OutputPosition,
    /// Console bytes (no slot) and frames.
    held: Vec<(Option<u32>, Vec<u8>)>,
    promotions: u32,
}

/// What a stored point begins with.
#[derive(Debug)]
pub struct Restored {
    /// The machine.
    pub state: MachineState,
    /// Output that may not be out.
    pub held: Output,
    /// Promotions in a row because the guest had failed.
    pub promotions: u32,
}

impl StoredState {
    /// Of an epoch and the output that is held at its end.
    pub fn new(epoch: &StagedEpoch, held: &Output) -> Self {
        let item = |item: &OutputItem| match item {
            OutputItem::Console(bytes) => (None, bytes.clone()),
            OutputItem::Frame { slot, bytes } => (Some(*slot), bytes.clone()),
        };
        Self {
            machine: epoch.state.encode(),
            released: held.start,
            held: held.items.iter().map(item).collect(),
            promotions: epoch.promotions,
        }
    }

    /// The bytes to store.
    ///
    /// # Panics
    /// Never: it has only plain data in it.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a stored state has only plain data in it")
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// The bytes are no stored state, or its machine state cannot be taken.
    pub fn restore(bytes: &[u8]) -> Result<Restored, String> {
        let (stored, rest) = postcard::take_from_bytes::<Self>(bytes).map_err(|e| e.to_string())?;
        if !rest.is_empty() {
            return Err(format!("{} bytes follow it", rest.len()));
        }
        let state = MachineState::decode(&stored.machine).map_err(|e| e.to_string())?;
        let items = stored.held.into_iter().map(|(slot, bytes)| match slot {
            None => OutputItem::Console(bytes),
            Some(slot) => OutputItem::Frame { slot, bytes },
        });
        let held = Output { start: stored.released, items: items.collect() };
        Ok(Restored { state, held, promotions: stored.promotions })
    }
}

/// An epoch to be stored.
#[derive(Clone, Debug)]
pub struct ToStore {
    /// The epoch.
    pub epoch: Arc<StagedEpoch>,
    /// Output held at its end.
    pub held: Arc<Output>,
    /// The copy that it is of.
    pub replica: ReplicaId,
}

/// What the thread is to do, in order.
pub enum Job {
    /// A seed begins.
    Begin(Base),
    /// Pages of a seed, and the room that they take until they are stored.
    Seed(StagedPart, Option<OwnedSemaphorePermit>),
    /// Blocks of a seed, and the room that they take.
    SeedBlocks(StagedBlocks, Option<OwnedSemaphorePermit>),
    /// Digests of the disk as it is now, for the link with this number.
    BlockDigests(u64, BlockDigestRequest),
    /// Whether the disk, all epochs up to this point in it, holds what the list says; for the link with this number. And
    /// the room that the list takes.
    Verify(u64, Point, Verify, Option<OwnedSemaphorePermit>),
    /// The image file of the guest's disk, of so many bytes, is to be opened and folded into from now on.
    OpenDisk(PathBuf, u64, Sender<Result<Arc<DiskImage>, String>>),
    /// The epoch that makes the copy whole.
    Complete(ToStore),
    /// An epoch of a whole copy.
    Epoch(ToStore),
    /// The id is to be stored.
    StoreId(ReplicaId),
    /// The id is to be forgotten.
    EraseId(ReplicaId),
    /// A term was seen.
    Term(Term),
    /// A guest was agreed on, with this digest of its spec: what is stored from here on is of it.
    Spec(u64),
    /// This node runs the guest from this term on; told when that is synced.
    Activate(Term, Sender<Result<(), String>>),
    /// The room of dropped pages is to be given back, however long that takes.
    Reclaim,
    /// Told when everything before it is done.
    Flush(Sender<()>),
}

/// What the thread tells.
#[derive(Debug)]
pub enum Persisted {
    /// The copy is stored up to this point, synced, which took so long.
    Point(ReplicaId, Point, Duration),
    /// The id is stored, synced.
    IdStored(ReplicaId),
    /// The id is forgotten, synced.
    IdErased(ReplicaId),
    /// Digests of the disk, in order, for the link with this number.
    Digests(u64, BlockDigests),
    /// What was found to differ, for the link with this number.
    Verified(u64, Verified),
    /// The store is of no more use to this process.
    Failed(String),
}

/// A handle on the thread.
#[derive(Debug)]
pub struct Persister {
    jobs: Sender<Job>,
    /// The stored copy is about to end: epochs that wait need not be stored any more.
    ending: Arc<AtomicBool>,
    thread: JoinHandle<Store>,
}

impl Persister {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(store: Store, tell: impl Fn(Persisted) + Send + 'static) -> std::io::Result<Self> {
        let (jobs, inbox) = crossbeam_channel::bounded(MAX_WAITING);
        let builder = std::thread::Builder::new().name("persist".to_owned());
        let ending = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ending);
        let worker = Worker { store, failed: None, ending: ended, skipped: Vec::new(), tell };
        let thread = builder.spawn(in_node(move || worker.run(&inbox)))?;
        Ok(Self { jobs, ending, thread })
    }

    /// Orders a job; waits while too many are waiting.
    pub fn order(&self, job: Job) {
        if self.jobs.send(job).is_err() {
            tracing::error!("the persist thread has ended");
        }
    }

    /// The register names this process, so the stored copy ends with [`Job::Activate`]: nobody waits for epochs that are
    /// not stored yet. What was acked under `disk` is stored already. What they wrote to the disk goes with the end.
    pub fn end_copy(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    /// Finishes what was ordered and gives the store back.
    ///
    /// # Errors
    /// The thread has panicked.
    pub fn finish(self) -> Result<Store, String> {
        drop(self.jobs);
        self.thread.join().map_err(|_| "the persist thread has panicked".to_owned())
    }
}

struct Worker<T> {
    store: Store,
    /// Why nothing is taken any more.
    failed: Option<String>,
    ending: Arc<AtomicBool>,
    /// Epochs that are not stored because the copy ends.
    skipped: Vec<ToStore>,
    tell: T,
}

impl<T: Fn(Persisted)> Worker<T> {
    fn run(mut self, inbox: &Receiver<Job>) -> Store {
        let mut next = None;
        while let Some(job) = next.take().or_else(|| inbox.recv().ok()) {
            if let Some(why) = &self.failed {
                refuse(job, why);
                continue;
            }
            let done = match job {
                Job::Epoch(first) => {
                    let mut epochs = vec![first];
                    while epochs.len() < MAX_FOLDED
                        && let Ok(job) = inbox.try_recv()
                    {
                        match job {
                            Job::Epoch(more) => epochs.push(more),
                            other => {
                                next = Some(other);
                                break;
                            }
                        }
                    }
                    self.persist(epochs)
                }
                other => self.other(other),
            };
            if let Err(e) = done {
                self.fail(&e);
            }
        }
        self.store
    }

    fn other(&mut self, job: Job) -> Result<(), StoreError> {
        match job {
            Job::Epoch(_) => {}
            Job::Begin(base) => self.store.begin_copy(base)?,
            Job::Seed(part, _room) => self.store.write_pages(contents(&part))?,
            Job::SeedBlocks(part, _room) => self.store.write_blocks(part.runs())?,
            Job::BlockDigests(link, request) => self.digests(link, request)?,
            Job::Verify(link, point, list, _room) => self.verify(link, point, &list)?,
            Job::OpenDisk(path, bytes, reply) => {
                let opened = self.store.open_disk(&path, bytes).map_err(|e| e.to_string());
                let folding =
                    opened.and_then(|disk| disk.start_folding().map(|()| disk).map_err(|e| e.to_string()));
                // Whoever asked has left only if this process is ending.
                let _ = reply.send(folding);
            }
            Job::Complete(first) => self.complete(&first)?,
            Job::StoreId(id) => {
                self.store.store_replica_id(id)?;
                (self.tell)(Persisted::IdStored(id));
            }
            Job::EraseId(id) => {
                self.store.erase_replica_id()?;
                (self.tell)(Persisted::IdErased(id));
            }
            Job::Term(term) => self.store.see_term(term)?,
            Job::Spec(digest) => self.store.see_spec(digest)?,
            Job::Activate(term, reply) => {
                let done = self.activate(term);
                // Whoever asked has left only if this process is ending.
                let _ = reply.send(done.as_ref().map(drop).map_err(ToString::to_string));
                // The blocks that were skipped went with it: nobody may ask again.
                done?;
            }
            Job::Reclaim => self.store.reclaim()?,
            Job::Flush(reply) => {
                let _ = reply.send(());
            }
        }
        Ok(())
    }

    fn complete(&mut self, first: &ToStore) -> Result<(), StoreError> {
        let began = Instant::now();
        let ToStore { epoch, held, replica } = first;
        for part in &epoch.parts {
            self.store.write_pages(contents(part))?;
        }
        let (state, blocks) = (StoredState::new(epoch, held).encode(), newest(std::slice::from_ref(first)));
        self.store.complete(mark(epoch, &state, &blocks), None)?;
        (self.tell)(Persisted::Point(*replica, epoch.point, began.elapsed()));
        Ok(())
    }

    /// Moves the mark over all of them at once.
    fn persist(&mut self, epochs: Vec<ToStore>) -> Result<(), StoreError> {
        if self.ending.load(Ordering::SeqCst) {
            self.skipped.extend(epochs);
            return Ok(());
        }
        let Some(last) = epochs.last() else { return Ok(()) };
        let (Point { term, epoch }, began) = (last.epoch.point, Instant::now());
        let _span = tracing::debug_span!("persist", term = term.0, epoch = epoch.0).entered();
        let mut newest_pages: BTreeMap<Gfn, PageContent<'_>> = BTreeMap::new();
        for part in epochs.iter().flat_map(|epoch| &epoch.epoch.parts) {
            newest_pages.extend(contents(part));
        }
        let (state, blocks) = (StoredState::new(&last.epoch, &last.held).encode(), newest(&epochs));
        self.store.persist(newest_pages, mark(&last.epoch, &state, &blocks))?;
        let took = began.elapsed();
        tracing::debug!(epochs = epochs.len(), ?took, "persisted");
        (self.tell)(Persisted::Point(last.replica, last.epoch.point, took));
        Ok(())
    }

    /// The guest runs from the newest epoch. Of those that are not stored, the disk's blocks are still missing; nobody
    /// needs their pages.
    fn activate(&mut self, term: Term) -> Result<(), StoreError> {
        let skipped = std::mem::take(&mut self.skipped);
        self.store.activate(term, &newest(&skipped))
    }

    fn digests(&self, link: u64, request: BlockDigestRequest) -> Result<(), StoreError> {
        let Some(disk) = self.store.disk() else { return Ok(()) };
        let tell = |digests| (self.tell)(Persisted::Digests(link, digests));
        block_digests(disk.as_ref(), request, tell).map_err(|source| self.store.disk_error(source))
    }

    /// The epochs ordered before are in the store, unless the copy is about to end: then nobody asks any more.
    fn verify(&self, link: u64, point: Point, list: &Verify) -> Result<(), StoreError> {
        let disk = self.store.disk().filter(|_| self.skipped.is_empty());
        let Some(disk) = disk else { return Ok(()) };
        let found = compare(point, list, &mut DiskSource(&**disk));
        let found = found.map_err(|source| self.store.disk_error(source))?;
        (self.tell)(Persisted::Verified(link, found));
        Ok(())
    }

    /// A store that failed takes nothing more: what the job was to store is missing, so no later one makes a whole of it.
    fn fail(&mut self, error: &StoreError) {
        let why = error.to_string();
        (self.tell)(Persisted::Failed(why.clone()));
        self.failed = Some(why);
    }
}

/// What becomes of a job once the store has failed: whoever waits for it is answered.
fn refuse(job: Job, why: &str) {
    let why = format!("the store has failed before: {why}");
    // Whoever asked has left only if this process is ending.
    match job {
        Job::Activate(_, reply) => drop(reply.send(Err(why))),
        Job::OpenDisk(_, _, reply) => drop(reply.send(Err(why))),
        Job::Flush(reply) => drop(reply.send(())),
        _ => {}
    }
}

fn contents(part: &StagedPart) -> impl Iterator<Item = (Gfn, PageContent<'_>)> {
    let frames = part.zeros.iter().flat_map(|&(first, count)| (first.0..first.0 + count).map(Gfn));
    let zeros = frames.map(|gfn| (gfn, PageContent::Zero));
    let pages = part.pages.iter().flat_map(|pages| pages.iter());
    zeros.chain(pages.map(|(gfn, page): (Gfn, &Page)| (gfn, PageContent::Bytes(page))))
}

/// What the epochs wrote to the disk, of each block the newest version.
fn newest(epochs: &[ToStore]) -> Vec<BlockRun<'_>> {
    let mut newest = NewestBlocks::default();
    for part in epochs.iter().flat_map(|epoch| &epoch.epoch.blocks) {
        newest.extend(part.runs());
    }
    newest.into_runs()
}

fn mark<'a>(epoch: &'a StagedEpoch, state: &'a [u8], blocks: &'a [BlockRun<'a>]) -> Mark<'a> {
    Mark { point: epoch.point, history: &epoch.history, state, blocks, now: SystemTime::now() }
}
