//! The apply thread: owns the image and takes staged epochs into it, one after the other, after their ack.

use colo_common::limits::MAX_GUEST_MEMORY;
use colo_common::telemetry::in_node;
use colo_common::{Gfn, PAGE_SIZE, Point};
use colo_primary::verify::{MemorySource, compare};
use colo_proto::message::{DigestRequest, PageDigest, RangeDigests, Verified, Verify};
use colo_vmm::GuestMemory;
use colo_vmm::page_batch::is_zero;
use crossbeam_channel::{Receiver, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::OwnedSemaphorePermit;

use crate::digests::Collector;
use crate::image::{ApplyError, Image};
use crate::staging::{StagedEpoch, StagedPart};

/// Jobs that may wait; what their epochs hold is bounded by the memory budget. The thread never waits for whoever
/// orders them.
const MAX_WAITING: usize = 1024;

/// What the thread is to do, in order.
#[derive(Debug)]
pub enum Job {
    /// A seed begins: keep what is there as a base, or empty it.
    BeginSeed {
        /// Whether it is kept.
        keep: bool,
    },
    /// Pages of a seed.
    Seed(StagedPart),
    /// An epoch.
    Epoch(Arc<StagedEpoch>),
    /// Digests of what is there now, for the link with this number.
    Digests(u64, DigestRequest),
    /// Whether the image, which is at this point, holds what the list says; for the link with this number. And the room
    /// that the list takes.
    Verify(u64, Point, Verify, Option<OwnedSemaphorePermit>),
}

/// What the thread tells.
#[derive(Debug)]
pub enum Applied {
    /// The image is at this point, which took so long.
    Point(Point, Duration),
    /// Digests, in order, for the link with this number: to another they would tell of an image that is no more.
    Digests(u64, RangeDigests),
    /// What was found to differ, for the link with this number.
    Verified(u64, Verified),
    /// The image cannot be used any more.
    Failed(String),
}

/// A handle on the thread.
#[derive(Debug)]
pub struct Applier {
    jobs: Sender<Job>,
    thread: JoinHandle<Image>,
}

impl Applier {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(image: Image, tell: impl Fn(Applied) + Send + 'static) -> std::io::Result<Self> {
        let (jobs, inbox) = crossbeam_channel::bounded(MAX_WAITING);
        let builder = std::thread::Builder::new().name("apply".to_owned());
        let thread = builder.spawn(in_node(move || work(image, &inbox, &tell)))?;
        Ok(Self { jobs, thread })
    }

    /// Orders a job; waits while too many are waiting.
    pub fn order(&self, job: Job) {
        if self.jobs.send(job).is_err() {
            tracing::error!("the apply thread has ended");
        }
    }

    /// Finishes what was ordered and gives the image back.
    ///
    /// # Errors
    /// The thread has panicked.
    pub fn finish(self) -> Result<Image, String> {
        drop(self.jobs);
        self.thread.join().map_err(|_| "the apply thread has panicked".to_owned())
    }
}

fn work(mut image: Image, inbox: &Receiver<Job>, tell: &impl Fn(Applied)) -> Image {
    while let Ok(job) = inbox.recv() {
        let done: Result<(), ApplyError> = match job {
            Job::BeginSeed { keep } => image.begin_seed(keep).map_err(ApplyError::from),
            Job::Seed(part) => image.write_seed(&part).map_err(ApplyError::from),
            Job::Epoch(epoch) => {
                let (Point { term, epoch: number }, began) = (epoch.point, Instant::now());
                let _span = tracing::debug_span!("apply", term = term.0, epoch = number.0).entered();
                image.apply(&epoch).map(|()| {
                    let took = began.elapsed();
                    tracing::debug!(?took, "applied");
                    tell(Applied::Point(epoch.point, took));
                })
            }
            Job::Verify(link, point, list, _room) => {
                verify(&image, point, &list).map(|found| tell(Applied::Verified(link, found)))
            }
            Job::Digests(link, request) => {
                digests(image.memory(), request, &mut |digests| tell(Applied::Digests(link, digests)));
                Ok(())
            }
        };
        if let Err(e) = done {
            tell(Applied::Failed(e.to_string()));
        }
    }
    image
}

fn verify(image: &Image, point: Point, list: &Verify) -> Result<Verified, ApplyError> {
    if image.point() != Some(point) {
        return Err(ApplyError::OutOfOrder { at: image.point(), offered: point, base: Some(point) });
    }
    compare(point, list, &mut MemorySource(image.memory())).map_err(ApplyError::Unreadable)
}

/// Tells what a range of frames holds; frames without memory behind them are zero and are not read.
pub fn digests(memory: &GuestMemory, request: DigestRequest, send: &mut impl FnMut(RangeDigests)) {
    let end = request.first.0.saturating_add(request.count).min(MAX_GUEST_MEMORY);
    let populated = memory.populated().unwrap_or_default();
    let mut message = Collector::new(request.first);
    for (start, frames) in populated {
        let (from, to) = (start.0.max(message.at()), (start.0 + frames).min(end));
        if from >= to {
            continue;
        }
        message.zeros(from - message.at(), send);
        for gfn in from..to {
            let mut page = [0; PAGE_SIZE];
            if memory.read_page(Gfn(gfn), &mut page).is_err() || is_zero(&page) {
                message.zeros(1, send);
            } else {
                message.one(PageDigest::of(&page), send);
            }
        }
    }
    message.zeros(end.saturating_sub(message.at()), send);
    message.flush(send);
}
