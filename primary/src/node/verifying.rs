//! The node's part in comparing the copy with the guest, which [`verify`](crate::verify) plans: a thread that reads, the
//! list that goes out behind an epoch, and what follows from a difference.

use colo_common::telemetry::in_node;
use colo_common::{BLOCK_SIZE, Block, Gfn, Point};
use colo_proto::message::{Verified, Verify, VerifyPart};
use colo_proto::v1::{AuditKind, EventKind};
use colo_vmm::{Disk, DiskWrite, GuestMemory, PageBatch};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

use super::operator::CommandError;
use super::{Event, Node, NodeError};
use crate::metrics;
use crate::replicator::Phase;
use crate::runner_disk::RunnerDisk;
use crate::verify::{DiskSource, MemorySource, Order, Tally, Verification, Wanted, Written, look};

/// Places that are named in words.
const NAMED: usize = 4;

/// What the thread that reads tells.
#[derive(Debug)]
pub enum VerifyEvent {
    /// What was ordered.
    Read(Verify),
    /// It cannot be read.
    Failed(String),
}

/// How far a comparison is, for whoever asked for it.
#[derive(Clone, Debug, Default)]
pub struct VerifyProgress {
    /// What was found, of memory and of the disk.
    pub tallies: Vec<Tally>,
    /// Since it began.
    pub elapsed: Duration,
    /// Where the copy was compared last.
    pub point: Option<Point>,
    /// It has ended, or why it ended early.
    pub ended: Option<Result<(), String>>,
}

/// A comparison that goes on.
pub(super) struct Verifying {
    number: u64,
    plan: Verification,
    orders: Sender<Order>,
    progress: watch::Sender<VerifyProgress>,
    began: Instant,
    point: Option<Point>,
}

impl Verifying {
    fn tell(&self, ended: Option<Result<(), String>>) {
        let (tallies, elapsed) = (self.plan.tallies(), self.began.elapsed());
        self.progress.send_replace(VerifyProgress { tallies, elapsed, point: self.point, ended });
    }
}

impl Node {
    /// Begins to compare; neither memory nor disk stands for all there is.
    pub(super) fn begin_verification(
        &mut self,
        memory: bool,
        disk: bool,
        rate_mib: u32,
        progress: watch::Sender<VerifyProgress>,
    ) -> Result<(), CommandError> {
        let not_now = |why: &str| Err(CommandError::NotNow(why.to_owned()));
        if self.verifying.is_some() {
            return not_now("the copy is being compared already: wait for that to end");
        }
        if self.switching.is_some() {
            return not_now("the guest is being moved to the secondary");
        }
        if self.distrusted || self.peer.is_none() || self.unknown {
            return not_now("the copy is not up to date: wait until the vm is protected again");
        }
        if disk && self.disk.is_none() {
            return not_now("the guest has no disk: ask for its memory alone");
        }
        let all = !memory && !disk;
        let blocks = self.disk.as_ref().map(|disk| Disk::bytes(&**disk) / BLOCK_SIZE as u64);
        let wanted = Wanted {
            frames: (memory || all).then(|| self.dirty.pages.frames()),
            blocks: blocks.filter(|_| disk || all),
            rate_mib,
        };
        let number = self.next_link;
        self.next_link += 1;
        let (orders, inbox) = bounded(1);
        let (source, outbox) = ((Arc::clone(self.guest.memory()), self.disk.clone()), self.outbox.clone());
        let thread = std::thread::Builder::new().name(format!("verify-{}", self.vm));
        let reads = in_node(move || read(number, &source, &inbox, &outbox));
        thread.spawn(reads).map_err(|e| CommandError::Refused(NodeError::Thread(e).to_string()))?;
        tracing::info!(vm = %self.vm, "the copy is being compared with the guest");
        let (plan, began) = (Verification::new(wanted), Instant::now());
        self.verifying = Some(Verifying { number, plan, orders, progress, began, point: None });
        Ok(())
    }

    /// What follows from the state and not from an event.
    pub(super) fn go_on_verifying(&mut self, now: Instant) -> Result<(), NodeError> {
        let paired = matches!(self.replicator.phase(), Phase::Paired { .. });
        if self.distrusted && paired && !self.replicator.is_proposing() {
            let actions = self.replicator.go_solo();
            self.act(actions)?;
        }
        let Some(verifying) = &mut self.verifying else { return Ok(()) };
        let why = if verifying.progress.is_closed() {
            Some("nobody asks for it any more")
        } else if self.unknown {
            Some("the tracker lost writes, so the copy is made whole again")
        } else if !paired || self.peer.is_none() || self.parked || self.stopping || self.failure.is_some() {
            Some("the vm is not protected by this copy any more")
        } else {
            None
        };
        if let Some(why) = why {
            self.end_verification(why);
            return Ok(());
        }
        if let Some(order) = verifying.plan.order(now.saturating_duration_since(verifying.began)) {
            // It has nothing else to do, and ends only with this.
            drop(verifying.orders.try_send(order));
        }
        if verifying.plan.is_over() {
            self.finish_verification();
        }
        Ok(())
    }

    pub(super) fn on_verify(&mut self, number: u64, event: VerifyEvent) {
        let Some(verifying) = self.verifying.as_mut().filter(|verifying| verifying.number == number) else {
            return;
        };
        match event {
            VerifyEvent::Read(list) => verifying.plan.read(list),
            VerifyEvent::Failed(why) => self.end_verification(&format!("the guest cannot be read: {why}")),
        }
    }

    /// Blocks whose writes are not in the epoch of the cut that the guest stands after.
    pub(super) fn under_way(&self) -> Vec<Range<u64>> {
        let disk = self.disk.as_ref().filter(|_| self.verifying.is_some());
        let under_way = disk.map(|disk| disk.under_way()).unwrap_or_default();
        under_way.into_iter().map(|blocks| blocks.start.0..blocks.end.0).collect()
    }

    /// What is to be sent behind the epoch of `point`, which has these pages and blocks.
    pub(super) fn verify_at(
        &mut self,
        point: Point,
        pages: &PageBatch,
        blocks: &[DiskWrite],
        under_way: &[Range<u64>],
    ) -> Option<Verify> {
        let verifying = self.verifying.as_mut()?;
        let run = |write: &DiskWrite| write.blocks().start.0..write.blocks().end.0;
        let blocks: Vec<_> = blocks.iter().map(run).collect();
        verifying.plan.cut(point, Written { pages: pages.runs(), blocks: &blocks, under_way })
    }

    pub(super) fn on_verified(&mut self, answer: &Verified) -> Result<(), NodeError> {
        let Some(verifying) = &mut self.verifying else { return Ok(()) };
        if let Err(e) = verifying.plan.answer(answer) {
            tracing::warn!(vm = %self.vm, "{e}");
            self.board.error(e.to_string());
            return self.lose_link();
        }
        verifying.point = Some(answer.point);
        let meters = self.board.meters();
        meters.add_for(metrics::VERIFY_COMPARED, word(answer.part), answer.compared as f64);
        meters.add_for(metrics::VERIFY_DIFFERING, word(answer.part), answer.differing as f64);
        if verifying.plan.differs() {
            self.distrust_copy();
        } else {
            verifying.tell(None);
        }
        Ok(())
    }

    /// It must not be promoted: this node goes on alone, and the copy is made whole again by digests. What was changed
    /// when is of no use for that.
    fn distrust_copy(&mut self) {
        let Some(verifying) = self.verifying.take() else { return };
        let node = self.peer.as_ref().map(|peer| peer.node.to_string()).unwrap_or_default();
        let what = format!(
            "the copy at {node} differs from the guest: {}; it is not trusted any more, and made whole again",
            differences(&verifying)
        );
        tracing::error!(vm = %self.vm, "{what}");
        self.board.error(what.clone());
        self.note_verification("differs", what);
        self.last_changed.forget();
        self.forgot = Some("the copy was found to differ from the guest");
        self.distrusted = true;
        verifying.tell(Some(Ok(())));
    }

    fn finish_verification(&mut self) {
        let Some(verifying) = self.verifying.take() else { return };
        let tallies = verifying.plan.tallies();
        let found: Vec<String> = tallies.iter().map(summary).collect();
        let what = format!("the copy is the same as the guest: {}", found.join("; "));
        tracing::info!(vm = %self.vm, "{what}");
        self.note_verification("equal", what);
        verifying.tell(Some(Ok(())));
    }

    /// Ends it early, if one goes on.
    pub(super) fn end_verification(&mut self, why: &str) {
        let Some(verifying) = self.verifying.take() else { return };
        tracing::info!(vm = %self.vm, "the copy is compared no further: {why}");
        self.note_verification("ended", format!("the copy was compared in part: {why}"));
        verifying.tell(Some(Err(why.to_owned())));
    }

    fn note_verification(&self, outcome: &'static str, what: String) {
        self.board.meters().add_for(metrics::VERIFICATIONS, outcome, 1.0);
        self.board.happens(EventKind::Verified, what.clone());
        self.board.note(AuditKind::Verified, what, String::new(), String::new());
    }
}

/// The thread: reads what is ordered until nobody orders any more.
fn read(
    number: u64,
    (memory, disk): &(Arc<GuestMemory>, Option<Arc<RunnerDisk>>),
    orders: &Receiver<Order>,
    outbox: &Sender<Event>,
) {
    for order in orders {
        let found = match (order.part, disk) {
            (VerifyPart::Memory, _) => look(&order, &mut MemorySource(memory)),
            (VerifyPart::Disk, Some(disk)) => look(&order, &mut DiskSource(&**disk)),
            (VerifyPart::Disk, None) => Err(std::io::Error::other("there is no disk")),
        };
        let event = found.map_or_else(|e| VerifyEvent::Failed(e.to_string()), VerifyEvent::Read);
        if outbox.send(Event::Verify(number, event)).is_err() {
            return;
        }
    }
}

fn word(part: VerifyPart) -> &'static str {
    match part {
        VerifyPart::Memory => "memory",
        VerifyPart::Disk => "disk",
    }
}

fn things(part: VerifyPart) -> &'static str {
    match part {
        VerifyPart::Memory => "pages",
        VerifyPart::Disk => "blocks",
    }
}

fn summary(tally: &Tally) -> String {
    let Tally { compared, with_bytes, not_compared, .. } = tally;
    let things = things(tally.part);
    format!("{compared} {things} ({with_bytes} with bytes), {not_compared} not compared")
}

/// What differs and where, in words.
fn differences(verifying: &Verifying) -> String {
    let mut text = String::new();
    for tally in verifying.plan.tallies().iter().filter(|tally| tally.differing > 0) {
        let places = tally.places.iter().take(NAMED).map(|&at| match tally.part {
            VerifyPart::Memory => Gfn(at).to_string(),
            VerifyPart::Disk => Block(at).to_string(),
        });
        let more = if tally.differing > NAMED as u64 { ", ..." } else { "" };
        let _ = write!(
            text,
            "{} {} ({}{more}) at {}",
            tally.differing,
            things(tally.part),
            places.collect::<Vec<_>>().join(", "),
            verifying.point.unwrap_or_default()
        );
    }
    text
}
