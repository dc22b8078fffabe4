//! The persist thread of a simulated node: `secondary::persist::Worker`, a bit at a time, on a medium in memory that
//! forgets in a crash what was not synced.

use colo_common::{Gfn, ReplicaId, Term};
use colo_proto::message::{BlockDigestRequest, BlockDigests};
use colo_secondary::disk::block_digests;
use colo_secondary::persist::{StoredState, ToStore};
use colo_secondary::staging::{StagedBlocks, StagedEpoch, StagedPart};
use colo_secondary::store::{Base, BlockRun, Mark, NewestBlocks, PageContent, Store, StoreError};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use crate::plan::{Mutations, Time};

/// `persist::MAX_FOLDED`, and some of the time less: the thread takes what there is.
const MAX_FOLDED: usize = 6;

/// `persist::Job`.
pub(crate) enum Job {
    Begin(Base),
    Seed(StagedPart),
    SeedBlocks(StagedBlocks),
    BlockDigests(u64, BlockDigestRequest),
    Complete(ToStore),
    Epoch(ToStore),
    StoreId(ReplicaId),
    EraseId(ReplicaId),
    Term(Term),
}

/// `persist::Persisted`.
pub(crate) enum Persisted {
    Point(ReplicaId, Arc<StagedEpoch>),
    IdStored(ReplicaId),
    IdErased(ReplicaId),
    Digests(u64, Vec<BlockDigests>),
    Failed(String),
}

/// `persist::Worker`, with its inbox.
pub(crate) struct Persister {
    store: Store,
    jobs: VecDeque<Job>,
    failed: bool,
    /// A mutation: epochs whose blocks are not stored yet.
    late: Vec<ToStore>,
    /// Until when its disk does nothing.
    pub(crate) stalled: Time,
    /// The node's wall clock, which nothing is decided by.
    pub(crate) wall_clock: SystemTime,
    /// The process is to die within one of the next writes.
    pub(crate) dying: bool,
    /// It has.
    pub(crate) died: bool,
}

impl Persister {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            jobs: VecDeque::new(),
            failed: false,
            late: Vec::new(),
            stalled: 0,
            wall_clock: SystemTime::UNIX_EPOCH,
            dying: false,
            died: false,
        }
    }

    pub(crate) fn order(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    pub(crate) fn waiting(&self) -> usize {
        self.jobs.len()
    }

    /// Does the next job, or some epochs at once: a turn of `Worker::run`.
    pub(crate) fn work(&mut self, mutations: Mutations) -> Option<Persisted> {
        let job = self.jobs.pop_front()?;
        if self.failed {
            return None;
        }
        let done = match job {
            Job::Epoch(first) => {
                let mut epochs = vec![first];
                while epochs.len() < MAX_FOLDED
                    && let Some(Job::Epoch(_)) = self.jobs.front()
                    && let Some(Job::Epoch(more)) = self.jobs.pop_front()
                {
                    epochs.push(more);
                }
                self.persist(epochs, mutations)
            }
            other => self.other(other),
        };
        match done {
            Ok(told) => told,
            Err(_) if self.died => None,
            Err(_) if self.dying => {
                self.died = true;
                None
            }
            // A store that failed takes nothing more.
            Err(e) => {
                self.failed = true;
                Some(Persisted::Failed(e.to_string()))
            }
        }
    }

    /// `Persister::end_copy` and `Job::Activate`, after all that was ordered before: epochs that wait are not stored any
    /// more, but for their blocks.
    pub(crate) fn activate(&mut self, term: Term, mutations: Mutations) -> Result<(), String> {
        let (waiting, mut skipped) = (std::mem::take(&mut self.jobs), std::mem::take(&mut self.late));
        for job in waiting {
            match job {
                Job::Epoch(epoch) if !mutations.promotion_leaves_store => skipped.push(epoch),
                other => {
                    self.jobs.push_back(other);
                    self.work(mutations);
                }
            }
        }
        if mutations.promotion_leaves_store {
            return Ok(());
        }
        if mutations.skipped_blocks_dropped {
            skipped.clear();
        }
        if self.failed {
            return Err("the store has failed before".to_owned());
        }
        let done = self.store.activate(term, &newest(&skipped));
        self.died |= done.is_err() && self.dying;
        done.map_err(|e| e.to_string())
    }

    fn other(&mut self, job: Job) -> Result<Option<Persisted>, StoreError> {
        match job {
            Job::Epoch(_) => {}
            Job::Begin(base) => self.store.begin_copy(base)?,
            Job::SeedBlocks(part) => self.store.write_blocks(part.runs())?,
            Job::BlockDigests(link, request) => {
                let (mut told, disk) = (Vec::new(), self.store.disk().expect("it was opened"));
                block_digests(&**disk, request, |digests| told.push(digests)).expect("the disk can be read");
                return Ok(Some(Persisted::Digests(link, told)));
            }
            Job::Seed(part) => self.store.write_pages(contents(&part))?,
            Job::Complete(first) => {
                let ToStore { epoch, held, replica } = &first;
                for part in &epoch.parts {
                    self.store.write_pages(contents(part))?;
                }
                let state = StoredState::new(epoch, held).encode();
                let blocks = newest(std::slice::from_ref(&first));
                self.store.complete(mark(epoch, &state, &blocks, self.wall_clock), None)?;
                return Ok(Some(Persisted::Point(*replica, Arc::clone(epoch))));
            }
            Job::StoreId(id) => {
                self.store.store_replica_id(id)?;
                return Ok(Some(Persisted::IdStored(id)));
            }
            Job::EraseId(id) => {
                self.store.erase_replica_id()?;
                return Ok(Some(Persisted::IdErased(id)));
            }
            Job::Term(term) => self.store.see_term(term)?,
        }
        Ok(None)
    }

    fn persist(
        &mut self,
        epochs: Vec<ToStore>,
        mutations: Mutations,
    ) -> Result<Option<Persisted>, StoreError> {
        let Some(last) = epochs.last() else { return Ok(None) };
        let mut pages: BTreeMap<Gfn, PageContent<'_>> = BTreeMap::new();
        for part in epochs.iter().flat_map(|epoch| &epoch.epoch.parts) {
            pages.extend(contents(part));
        }
        let state = StoredState::new(&last.epoch, &last.held).encode();
        let with = if mutations.blocks_stored_late { &self.late } else { &epochs };
        self.store.persist(pages, mark(&last.epoch, &state, &newest(with), self.wall_clock))?;
        let persisted = Persisted::Point(last.replica, Arc::clone(&last.epoch));
        if mutations.blocks_stored_late {
            self.late = epochs;
        }
        Ok(Some(persisted))
    }
}

fn contents(part: &StagedPart) -> impl Iterator<Item = (Gfn, PageContent<'_>)> {
    let frames = part.zeros.iter().flat_map(|&(first, count)| (first.0..first.0 + count).map(Gfn));
    let zeros = frames.map(|gfn| (gfn, PageContent::Zero));
    let pages = part.pages.iter().flat_map(|pages| pages.iter());
    zeros.chain(pages.map(|(gfn, page)| (gfn, PageContent::Bytes(page))))
}

/// What the epochs wrote to the disk, of each block the newest version.
fn newest(epochs: &[ToStore]) -> Vec<BlockRun<'_>> {
    let mut newest = NewestBlocks::default();
    for part in epochs.iter().flat_map(|epoch| &epoch.epoch.blocks) {
        newest.extend(part.runs());
    }
    newest.into_runs()
}

fn mark<'a>(
    epoch: &'a StagedEpoch,
    state: &'a [u8],
    blocks: &'a [BlockRun<'a>],
    now: SystemTime,
) -> Mark<'a> {
    Mark { point: epoch.point, history: &epoch.history, state, blocks, now }
}
