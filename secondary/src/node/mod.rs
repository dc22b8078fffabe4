//! The node that follows a runner: one thread that owns the protocol's state, the warm guest and the held output. It
//! takes one event at a time; what waits (the arbiter, the link, the apply and persist threads) is elsewhere and comes
//! back as an event. When the register names this process, it ends and hands the guest to `colo_primary::node`.
//!
//! ```text
//!   receiver ------+                           +--> apply thread: image
//!   apply, persist +--> inbox --> Follower ----+--> persist thread: store
//!   arbiter -------+     (owner)               +--> link: acks, progress
//!   operator ------+                           +--> arbiter: read, propose
//! ```

mod asked;
mod following;
mod leaving;
mod loading;
mod pairing;
mod promoting;
mod starting;
mod telling;
#[cfg(test)]
mod tests;
mod tray;
mod welcoming;

use colo_common::config::Endpoint;
use colo_common::register::Entry;
use colo_common::telemetry::TermSpan;
use colo_common::vmdir::{Runner, VmDirectory};
use colo_common::{Incarnation, NodeId, Point, ReplicaId, VmId};
use colo_primary::admin::{FenceAnswer, Order};
use colo_primary::arbiter_worker::{ArbiterWorker, Found};
use colo_primary::console::Console;
use colo_primary::node::Beginning;
use colo_primary::node::status::{Board, Marks, Policy};
use colo_primary::release::Release;
use colo_primary::runner_disk::RunnerDisk;
use colo_vmm::tap::Tap;
use colo_vmm::tap::learn::Learner;
use colo_vmm::{GuestMemory, ProtectedGuest, WireSpec};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::agreement::PairRequest;
use crate::apply::Applier;
use crate::detector::Detector;
use crate::disk::DiskImage;
use crate::persist::Persister;
use crate::receiver::{Budget, Caller, LinkEvent, Say};
use crate::rejoin::Rejoin;
use crate::replica::{Copy, Replica};
use crate::staging::StagedEpoch;
pub use following::judge_epoch;
pub use leaving::is_needless;
pub use loading::{Loaded, load};
pub use pairing::{PairAnswer, PairError, offered};
pub use promoting::{HandBack, Promotion};
pub use starting::{FirstLook, Known, first_look};
use tray::Told;
pub use tray::Tray;

/// How often the node looks after what no event tells.
const TICK: Duration = Duration::from_millis(10);
/// How often the register is read while nobody is followed: a dead process' request may land late.
const READ_INTERVAL: Duration = Duration::from_secs(1);
/// How often the runner is told how far this node is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// What the node is told.
pub enum Event {
    /// A runner wants a link.
    Caller(Box<Caller>),
    /// The link with this number.
    Link(u64, LinkEvent),
    /// The apply or persist thread has put something into the tray.
    Tray,
    /// The arbiter.
    Arbiter(Found),
    /// A runner wants to agree on a guest.
    Pair(Box<PairRequest>, oneshot::Sender<Result<PairAnswer, PairError>>),
    /// The old runner kept the guest.
    HandBack(HandBack),
    /// The operator wants this node to run the guest.
    Promote(Order),
    /// The operator says that this node does not run the guest; told by which entry of the register that counts.
    ConfirmFenced(NodeId, oneshot::Sender<FenceAnswer>),
    /// The operator says whether this node takes over without a word.
    Failover(bool, oneshot::Sender<()>),
    /// The operator wants acks to mean something else; told what they mean from now on.
    Policy(crate::replica::AckPolicy, oneshot::Sender<Policy>),
    /// The operator ends this process.
    Leave(Option<oneshot::Sender<()>>),
}

/// What a node does by itself.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whether it takes over without the operator's word.
    pub auto_failover: bool,
    /// How long a suspicion waits, so that a live primary wins.
    pub promote_delay: Duration,
    /// How long after its start a node with a stored copy waits for its runner.
    pub startup_grace: Duration,
    /// Bytes of pages in an epoch at most.
    pub max_epoch_bytes: u64,
    /// Epochs that a runner may have in flight.
    pub window: u32,
    /// UDP port of the QUIC endpoint.
    pub quic_port: u16,
    /// Where boot files and the guest's description are kept.
    pub boot_directory: PathBuf,
    /// Where the intent log of the disk is, of a node that runs the guest or did.
    pub intent: PathBuf,
    /// A runner has claimed this node, which is there for others if that one does not come.
    pub claimed: bool,
    /// No configuration binds this node to the vm: it is there for others once nobody needs it.
    pub spare: bool,
    /// Image file of the guest's disk; needed if it has one.
    pub disk: Option<PathBuf>,
}

/// Why a follower ended.
pub enum Outcome {
    /// The register names this process: run this.
    Run(Box<Beginning>, Promotion),
    /// The operator's word.
    Left,
    /// Nobody runs the vm any more, and this node is not to.
    Superseded(Entry),
    /// The runner that claimed this spare has not come, or is protected by another node.
    Unfollowed,
    /// It can do nothing more.
    Failed(String),
}

/// The guest that waits to be run.
struct Warm {
    guest: Box<dyn ProtectedGuest>,
    spec: WireSpec,
    digest: u64,
    memory: Arc<GuestMemory>,
    /// What is behind its disk, if it has one.
    disk: Option<Arc<DiskImage>>,
    /// The same, for a guest that runs here.
    runner_disk: Option<Arc<RunnerDisk>>,
    /// What is known of its addresses, if it has a network card.
    learner: Option<Learner>,
    /// What is known of where this copy differs from points of the vm.
    rejoin: Rejoin,
}

/// The runner that is followed.
struct Link {
    number: u64,
    say: mpsc::UnboundedSender<Say>,
    node: NodeId,
    /// The runner's term when it came.
    term: colo_common::Term,
    /// A seed goes on: its parts are passed to the threads.
    seeding: bool,
    /// Digests that were asked for before word of the seed came: that takes another stream.
    asked: Option<colo_proto::message::DigestRequest>,
    /// The same for the disk.
    asked_blocks: Option<colo_proto::message::BlockDigestRequest>,
}

/// The newest staged epoch, and the room that those before it take.
struct Tip {
    epoch: Arc<StagedEpoch>,
}

/// A follower.
pub struct Follower {
    vm: VmId,
    me: NodeId,
    incarnation: Incarnation,
    settings: Settings,
    replica: Replica,
    warm: Option<Warm>,
    /// Processes that agreed on the guest that waits, newest first.
    agreed: std::collections::VecDeque<pairing::Agreement>,
    applier: Option<Applier>,
    persister: Option<Persister>,
    /// The host's side of the guest's network card, its carrier off.
    tap: Option<Arc<Tap>>,
    /// The store takes nothing more; acks under the policy `disk` end with it.
    store_failed: Option<String>,
    link: Option<Link>,
    tip: Option<Tip>,
    /// What a stored point began with, until an epoch follows it.
    restored: Option<crate::persist::Restored>,
    history: colo_common::History,
    /// Output of staged epochs that may not be out yet.
    held: Release,
    console: Console,
    marks: Marks,
    budget: Budget,
    /// Room of epochs that are not applied or not stored yet, oldest first.
    rooms: std::collections::VecDeque<(Point, OwnedSemaphorePermit)>,
    promotions: u32,
    /// Times that the runner yielded because the guest had failed there.
    yielded: u32,
    /// The control plane of the runner that is followed, or was followed last.
    runner_at: Option<Endpoint>,
    /// The runner moves the guest here on purpose: that is an operator's word.
    planned: bool,
    /// Whether the runner is taken for dead.
    detector: Detector<Instant>,
    /// What the operator asks for.
    asked: asked::Asked,
    hand_back: Option<HandBack>,
    /// The register was read on somebody's behalf and has not answered.
    reading: bool,
    /// The register was read since the start: no runner is taken before.
    observed: bool,
    /// The operator starts a stopped vm again; counts for the first look at the register alone.
    again: bool,
    /// A runner was followed by this process.
    followed: bool,
    /// Since when a guest that it was asked to follow is known not to fit here.
    misfit: Option<Instant>,
    /// Since when the vm is protected without this node, as far as it has read.
    needless_since: Option<Instant>,
    began: Instant,
    arbiter: ArbiterWorker,
    next_read: Instant,
    /// When the register is looked at again, for the account alone.
    looked: Instant,
    /// Staged epochs that are not applied, for the account.
    staged: std::collections::VecDeque<telling::Noted>,
    next_progress: Instant,
    inbox: Receiver<Event>,
    /// Keeps the inbox open.
    _outbox: Sender<Event>,
    tray: Tray,
    directory: Arc<VmDirectory>,
    board: Board,
    end: Option<Outcome>,
}

/// What a follower begins with.
pub struct Parts {
    /// Which vm.
    pub vm: VmId,
    /// Which node.
    pub me: NodeId,
    /// Which process.
    pub incarnation: Incarnation,
    /// The protocol's state, with what the store held.
    pub replica: Replica,
    /// The operator starts a vm again that was stopped.
    pub again: bool,
    /// The history that the store held.
    pub history: colo_common::History,
    /// The persist thread.
    pub persister: Persister,
    /// The TAP for the guest's network card.
    pub tap: Option<Arc<Tap>>,
    /// The console.
    pub console: Console,
    /// Room for epochs.
    pub budget: Budget,
    /// The arbiter.
    pub arbiter: ArbiterWorker,
    /// What the apply and persist threads tell.
    pub tray: Tray,
    /// The vm's directory, which may know of a time when this node ran the guest as a primary.
    pub directory: Arc<VmDirectory>,
    /// The account.
    pub board: Board,
}

impl Follower {
    /// Puts a follower together; [`run`](Self::run) it on a thread of its own.
    pub fn new(parts: Parts, settings: Settings, (outbox, inbox): (Sender<Event>, Receiver<Event>)) -> Self {
        let Parts {
            vm,
            me,
            incarnation,
            replica,
            again,
            history,
            persister,
            tap,
            console,
            budget,
            arbiter,
            tray,
            directory,
            board,
        } = parts;
        let now = Instant::now();
        Self {
            vm,
            me,
            incarnation,
            settings,
            replica,
            warm: None,
            agreed: std::collections::VecDeque::new(),
            applier: None,
            persister: Some(persister),
            tap,
            store_failed: None,
            link: None,
            tip: None,
            restored: None,
            history,
            held: Release::default(),
            console,
            marks: Marks::default(),
            budget,
            rooms: std::collections::VecDeque::new(),
            promotions: 0,
            yielded: 0,
            runner_at: None,
            planned: false,
            detector: Detector::new(),
            asked: asked::Asked::default(),
            hand_back: None,
            reading: false,
            observed: false,
            again,
            followed: false,
            misfit: None,
            needless_since: None,
            began: now,
            arbiter,
            next_read: now,
            looked: now,
            staged: std::collections::VecDeque::new(),
            next_progress: now,
            inbox,
            _outbox: outbox,
            tray,
            directory,
            board,
            end: None,
        }
    }

    /// Follows until the register names this process or the operator ends it.
    pub fn run(mut self) -> Outcome {
        let mut span = TermSpan::default();
        span.follow(self.replica.fence());
        if matches!(self.replica.copy(), Copy::Whole { .. }) {
            let now = Instant::now();
            self.detector.silent(now, now + self.settings.startup_grace);
        }
        loop {
            match self.inbox.recv_timeout(TICK) {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the node holds a sender itself"),
            }
            self.settle(Instant::now());
            span.follow(self.replica.fence());
            if let Some(end) = self.end.take() {
                if !matches!(end, Outcome::Run(..))
                    && let Some(Err(why)) = self.persister.take().map(Persister::finish)
                {
                    // The process ends next, and RocksDB must be closed before its own statics go.
                    tracing::error!(vm = %self.vm, "{why}");
                }
                return end;
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Caller(caller) => self.on_caller(*caller),
            Event::Link(number, event) => self.on_link(number, event),
            // Taken below, whatever woke the node.
            Event::Tray => {}
            Event::Arbiter(found) => self.on_arbiter(found),
            Event::Pair(request, reply) => {
                let answer = self.pair(&request);
                if answer.is_err() {
                    self.misfit.get_or_insert_with(Instant::now);
                }
                // Whoever asked may have given up.
                let _ = reply.send(answer);
            }
            Event::HandBack(offer) => {
                self.hand_back = Some(offer);
                self.read();
            }
            Event::Promote(order) => {
                self.asked.promote(order);
                self.read();
            }
            Event::ConfirmFenced(node, reply) => self.on_confirm_fenced(node, reply),
            Event::Failover(auto, reply) => {
                self.settings.auto_failover = auto;
                // Whoever asked may have given up.
                let _ = reply.send(());
            }
            Event::Policy(policy, reply) => {
                let actions = self.replica.change_policy(policy);
                self.act(actions);
                // Whoever asked may have given up.
                let _ = reply.send(self.policy());
            }
            Event::Leave(reply) => {
                self.end = Some(Outcome::Left);
                // Whoever asked may have given up, or is a signal.
                let _ = reply.map(|reply| reply.send(()));
            }
        }
    }

    /// Everything that follows from the state and not from an event.
    fn settle(&mut self, now: Instant) {
        for told in self.tray.take() {
            match told {
                Told::Applied(applied) => self.on_applied(applied),
                Told::Persisted(persisted) => self.on_persisted(persisted),
            }
        }
        self.look_at_disk();
        self.leave_if_unfollowed(now);
        self.suspect_if_due(now);
        if now >= self.next_read && self.link.is_none() {
            self.next_read = now + READ_INTERVAL;
            self.read();
        }
        self.look_at_register(now);
        if now >= self.next_progress {
            self.next_progress = now + PROGRESS_INTERVAL;
            self.tell_progress();
        }
        self.tell();
    }

    fn read(&mut self) {
        self.reading = true;
        self.arbiter.read();
    }

    fn forget_running(&self) -> Result<(), String> {
        match self.directory.runner().map_err(|e| e.to_string())? {
            Some(Runner { seen, active, starting }) if active.is_some() || starting.is_some() => {
                let fresh = Runner { seen, ..Runner::default() };
                self.directory.set_runner(fresh).map_err(|e| e.to_string())
            }
            _ => Ok(()),
        }
    }

    fn replica_id(&self) -> Option<ReplicaId> {
        match self.replica.copy() {
            Copy::Whole { replica, .. } => Some(*replica),
            _ => None,
        }
    }
}
