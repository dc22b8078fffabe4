//! What a node tells about itself: written by the thread that owns the guest, read by the control plane.

use colo_common::register::Entry;
use colo_common::{History, NodeId, Point, ReplicaId};
use colo_vmm::{MachineState, PageBatch};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;

use super::Node;
use crate::checkpoint::Timing;
use crate::replicator::{Ack, Entitled, Phase};

/// Reports that a slow watcher may be behind before it misses some.
const REPORTS: usize = 1024;

/// What a node does for its vm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Not known yet.
    #[default]
    Starting,
    /// Runs the guest without protection.
    Alone,
    /// Runs it while the first copy is on its way.
    Seeding,
    /// Runs it; J is cut.
    Joining,
    /// Runs it; `Paired` is proposed.
    Pairing,
    /// Runs it, protected.
    Paired,
    /// Ran it; another has the register.
    Lost,
    /// Waits for a runner.
    Waiting,
    /// Holds a whole copy.
    Following,
    /// Receives a copy.
    Receiving,
    /// Takes the guest over.
    Promoting,
    /// Is done.
    Stopped,
}

/// What was counted since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Epochs cut or staged.
    pub epochs: u64,
    /// Pages with bytes.
    pub pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Losses of the dirty set.
    pub ring_overruns: u64,
    /// First copies made in full.
    pub seeds: u64,
    /// Copies made by comparing everything.
    pub full_resyncs: u64,
    /// Copies that were sent what had been written since their point.
    pub delta_resyncs: u64,
    /// Times that epochs failed and were merged back.
    pub failed_epochs: u64,
    /// Links lost.
    pub link_losses: u64,
    /// Times that this node took the guest over.
    pub promotions: u64,
}

/// How far a secondary is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Staged whole.
    pub staged: Option<Point>,
    /// In the image.
    pub applied: Option<Point>,
    /// In the store.
    pub persisted: Option<Point>,
    /// Bytes staged and not yet applied and persisted.
    pub backlog_bytes: u64,
}

/// Where the time of a promotion went.
#[derive(Clone, Copy, Debug)]
pub struct Promoted {
    /// The point that the guest ran on from; none if it was booted anew.
    pub point: Option<Point>,
    /// From the suspicion to the register's answer; nothing if the operator asked.
    pub register: Duration,
    /// Finishing the backlog of the image.
    pub apply: Duration,
    /// Writing that this node runs the guest.
    pub store: Duration,
    /// Restoring the machine.
    pub restore: Duration,
    /// When the register answered.
    pub granted: Instant,
    /// When the first vCPU ran.
    pub ran: Option<Instant>,
}

/// A node's account of itself.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// What it does.
    pub role: Role,
    /// The register as it knows it.
    pub register: Option<Entry>,
    /// The copy that protects, or that it holds.
    pub replica: Option<ReplicaId>,
    /// The newest cut.
    pub tip: Option<Point>,
    /// The newest acked point.
    pub acked: Option<Point>,
    /// The secondary's marks.
    pub marks: Marks,
    /// A whole point of a copy that no replica id vouches for.
    pub stale: Option<Point>,
    /// Its history.
    pub history: History,
    /// The other node, while a link to it is up.
    pub peer: Option<NodeId>,
    /// Epochs on their way.
    pub in_flight: usize,
    /// The last thing that went wrong, and when.
    pub error: Option<(String, Instant)>,
    /// Pages of a seed looked at, and in all.
    pub seed: Option<(u64, u64)>,
    /// Counters.
    pub counters: Counters,
    /// When the guest began to run without protection; nothing while it is protected.
    pub unprotected_since: Option<Instant>,
    /// Console bytes let out.
    pub released: u64,
    /// Console input that the guest has taken.
    pub input: u64,
    /// Console input that is in an acked epoch.
    pub input_done: u64,
    /// Bytes of output that are held.
    pub held_bytes: usize,
    /// How this process took the guest over.
    pub promotion: Option<Promoted>,
}

/// One epoch, as watchers are told of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its point.
    pub point: Point,
    /// Pages in it.
    pub pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Where the pause went.
    pub timing: Timing,
    /// From the cut to the ack.
    pub ack: Duration,
    /// Epochs in flight after it.
    pub in_flight: usize,
    /// Bytes of backlog at the secondary.
    pub backlog_bytes: u64,
    /// Console bytes up to its end.
    pub console: u64,
}

/// An epoch that is on its way.
#[derive(Clone, Debug)]
pub(crate) struct SentEpoch {
    pub(crate) point: Point,
    pages: u64,
    timing: Timing,
    cut_at: Instant,
    pub(crate) wire_bytes: u64,
    /// Console input taken, and output made, at the cut.
    input: u64,
    console: u64,
}

impl SentEpoch {
    pub(super) fn new(
        point: Point,
        pages: &PageBatch,
        timing: Timing,
        cut_at: Instant,
        state: &MachineState,
    ) -> Self {
        let (input, console) = (state.console_input, state.output.console);
        Self { point, pages: pages.len() as u64, timing, cut_at, wire_bytes: 0, input, console }
    }
}

/// Where the account is kept.
#[derive(Clone, Debug)]
pub struct Board {
    status: Arc<Mutex<Status>>,
    reports: broadcast::Sender<Report>,
}

impl Default for Board {
    fn default() -> Self {
        Self { status: Arc::default(), reports: broadcast::Sender::new(REPORTS) }
    }
}

impl Board {
    /// The account as of now.
    pub fn status(&self) -> Status {
        self.lock().clone()
    }

    /// A report of every epoch from now on.
    pub fn watch(&self) -> broadcast::Receiver<Report> {
        self.reports.subscribe()
    }

    /// Changes the account.
    pub fn change(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock());
    }

    /// Changes the counters.
    pub fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.lock().counters);
    }

    /// A vCPU runs.
    pub(super) fn ran(&self) {
        if let Some(promotion) = &mut self.lock().promotion {
            promotion.ran.get_or_insert_with(Instant::now);
        }
    }

    /// Something went wrong.
    pub fn error(&self, what: String) {
        self.lock().error = Some((what, Instant::now()));
    }

    pub(super) fn progress(&self, marks: Marks) {
        self.lock().marks = marks;
    }

    pub(super) fn seeding(&self, done: u64, total: u64) {
        self.lock().seed = Some((done, total));
    }

    pub(super) fn seeded(&self) {
        self.lock().seed = None;
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Node {
    pub(super) fn on_ack(&mut self, ack: Ack) -> Result<(), super::NodeError> {
        let actions = match self.replicator.ack(ack) {
            Ok(actions) => actions,
            Err(e) => {
                tracing::warn!(vm = %self.vm, "{e}");
                self.board.error(e.to_string());
                return self.lose_link();
            }
        };
        // Not before: a link that comes and goes without an ack is as good as none.
        self.lost_since = None;
        while let Some(sent) = self.sent.pop_front_if(|sent| sent.point <= ack.point) {
            self.report(&sent);
        }
        self.act(actions)
    }

    fn report(&self, sent: &SentEpoch) {
        let backlog_bytes = self.board.lock().marks.backlog_bytes;
        self.board.change(|status| {
            status.counters.epochs += 1;
            status.counters.pages += sent.pages;
            status.counters.wire_bytes += sent.wire_bytes;
            status.input_done = status.input_done.max(sent.input);
        });
        // Nobody watching is no error.
        drop(self.board.reports.send(Report {
            point: sent.point,
            pages: sent.pages,
            wire_bytes: sent.wire_bytes,
            timing: sent.timing,
            ack: sent.cut_at.elapsed(),
            in_flight: self.replicator.in_flight(),
            backlog_bytes,
            console: sent.console,
        }));
    }

    /// Writes down what has changed.
    pub(super) fn tell(&mut self) {
        let (role, replica) = match self.replicator.phase() {
            Phase::Alone => (Role::Alone, None),
            Phase::Seeding { .. } => (Role::Seeding, None),
            Phase::Joining { .. } => (Role::Joining, None),
            Phase::Pairing { .. } => (Role::Pairing, None),
            Phase::Paired { replica, .. } => (Role::Paired, Some(*replica)),
            Phase::Lost { .. } => (Role::Lost, None),
            Phase::Over => (Role::Stopped, None),
        };
        let input = self.guest.console_input_offset();
        let everything_is_out = self.replicator.entitled() == Entitled::All;
        let mut status = self.board.lock();
        if status.role != role || status.register.as_ref() != Some(self.replicator.register()) {
            status.register = Some(self.replicator.register().clone());
            status.history = self.replicator.history().clone();
        }
        if role == Role::Paired {
            status.unprotected_since = None;
        } else {
            status.unprotected_since.get_or_insert_with(Instant::now);
        }
        (status.role, status.replica) = (role, replica);
        status.tip = self.replicator.history().tip();
        status.acked = self.replicator.acked();
        status.peer = self.peer.as_ref().map(|peer| peer.node.clone());
        status.in_flight = self.replicator.in_flight();
        status.released = self.release.released().console;
        status.input = input;
        if everything_is_out {
            status.input_done = input;
        }
        status.held_bytes = self.release.bytes();
    }
}
