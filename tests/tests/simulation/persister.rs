//! The persist thread of a simulated node: `secondary::persist::Worker`, a bit at a time, on a medium in memory that
//! forgets in a crash what was not synced.

use colo_common::{Gfn, Point, ReplicaId, Term};
use colo_secondary::persist::{StoredState, ToStore};
use colo_secondary::staging::StagedPart;
use colo_secondary::store::{Base, Mark, PageContent, Store, StoreError};
use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

/// `persist::MAX_FOLDED`, and some of the time less: the thread takes what there is.
const MAX_FOLDED: usize = 6;

/// `persist::Job`.
pub(crate) enum Job {
    Begin(Base),
    Seed(StagedPart),
    Complete(ToStore),
    Epoch(ToStore),
    StoreId(ReplicaId),
    EraseId(ReplicaId),
    Term(Term),
}

/// `persist::Persisted`.
pub(crate) enum Persisted {
    Point(ReplicaId, Point),
    IdStored(ReplicaId),
    IdErased(ReplicaId),
    Failed(String),
}

/// `persist::Worker`, with its inbox.
pub(crate) struct Persister {
    store: Store,
    jobs: VecDeque<Job>,
    failed: bool,
    /// The process is to die within one of the next writes.
    pub(crate) dying: bool,
    /// It has.
    pub(crate) died: bool,
}

impl Persister {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, jobs: VecDeque::new(), failed: false, dying: false, died: false }
    }

    pub(crate) fn order(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    pub(crate) fn waiting(&self) -> usize {
        self.jobs.len()
    }

    /// Does the next job, or some epochs at once: a turn of `Worker::run`.
    pub(crate) fn work(&mut self) -> Option<Persisted> {
        let done = match self.jobs.pop_front()? {
            Job::Epoch(first) => {
                let mut epochs = vec![first];
                while epochs.len() < MAX_FOLDED
                    && let Some(Job::Epoch(_)) = self.jobs.front()
                    && let Some(Job::Epoch(more)) = self.jobs.pop_front()
                {
                    epochs.push(more);
                }
                self.persist(&epochs)
            }
            other => self.other(other),
        };
        match done {
            Ok(told) => told,
            // Said once; a store that failed takes nothing more.
            Err(_) if self.failed || self.died => None,
            Err(_) if self.dying => {
                self.died = true;
                None
            }
            Err(e) => {
                self.failed = true;
                Some(Persisted::Failed(e.to_string()))
            }
        }
    }

    /// `Job::Activate`, after all that was ordered before.
    pub(crate) fn activate(&mut self, term: Term, leaves_store: bool) -> Result<(), String> {
        while !self.jobs.is_empty() {
            self.work();
        }
        if leaves_store {
            return Ok(());
        }
        let done = self.store.activate(term, &[]);
        self.died |= done.is_err() && self.dying;
        done.map_err(|e| e.to_string())
    }

    fn other(&mut self, job: Job) -> Result<Option<Persisted>, StoreError> {
        match job {
            Job::Epoch(_) => {}
            Job::Begin(base) => self.store.begin_copy(base)?,
            Job::Seed(part) => self.store.write_pages(contents(&part))?,
            Job::Complete(ToStore { epoch, held, replica }) => {
                for part in &epoch.parts {
                    self.store.write_pages(contents(part))?;
                }
                let state = StoredState::new(&epoch, &held).encode();
                self.store.complete(mark(&epoch, &state), None)?;
                return Ok(Some(Persisted::Point(replica, epoch.point)));
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

    fn persist(&mut self, epochs: &[ToStore]) -> Result<Option<Persisted>, StoreError> {
        let Some(last) = epochs.last() else { return Ok(None) };
        let mut newest: BTreeMap<Gfn, PageContent<'_>> = BTreeMap::new();
        for part in epochs.iter().flat_map(|epoch| &epoch.epoch.parts) {
            newest.extend(contents(part));
        }
        let state = StoredState::new(&last.epoch, &last.held).encode();
        self.store.persist(newest, mark(&last.epoch, &state))?;
        Ok(Some(Persisted::Point(last.replica, last.epoch.point)))
    }
}

fn contents(part: &StagedPart) -> impl Iterator<Item = (Gfn, PageContent<'_>)> {
    let frames = part.zeros.iter().flat_map(|&(first, count)| (first.0..first.0 + count).map(Gfn));
    let zeros = frames.map(|gfn| (gfn, PageContent::Zero));
    let pages = part.pages.iter().flat_map(|pages| pages.iter());
    zeros.chain(pages.map(|(gfn, page)| (gfn, PageContent::Bytes(page))))
}

fn mark<'a>(epoch: &'a colo_secondary::staging::StagedEpoch, state: &'a [u8]) -> Mark<'a> {
    Mark { point: epoch.point, history: &epoch.history, state, blocks: &[], now: SystemTime::UNIX_EPOCH }
}
