//! The node that runs a guest: one thread that owns the guest, the protocol's state and the held output. It takes one
//! event at a time, applies it, and puts everything in order again; what waits (the arbiter, the link, a seed) is
//! elsewhere and comes back as an event.
//!
//! ```text
//!   guest ---------+                              +--> guest: cut, resume, reset
//!   arbiter -------+--> inbox --> Node (owner) ---+--> arbiter: propose, read
//!   link, seed ----+                              +--> link: epochs
//!   operator ------+                              +--> sink: output that may go out
//! ```

mod copier;
mod cutting;
mod healing;
mod joining;
mod operator;
mod parts;
mod seeding;
pub mod status;
mod switching;
mod telling;
mod verifying;

use colo_common::register::{Answer, StopReason};
use colo_common::telemetry::TermSpan;
use colo_common::{BLOCK_SIZE, Incarnation, NodeId, Point, VmId};
use colo_vmm::guest::{GuestEvent, GuestFailure};
use colo_vmm::{Disk, DiskTracking, PagePool, ProtectedGuest, Tracked, WireSpec};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::arbiter_worker::{ArbiterWorker, Found};
use crate::changes::Changes;
use crate::checkpoint::Standing;
use crate::epoch::{Pacer, disk_share};
use crate::heal_worker::Advice;
use crate::last_changed::LastChanged;
use crate::link::{Connector, HandBack, LinkEvent, LinkHandle, Purpose};
use crate::outlet::Outlet;
use crate::release::Release;
use crate::replicator::{Action, Carried, End, Entitled, Phase, Replicator};
use crate::runner_disk::RunnerDisk;
pub use operator::{Command, CommandError};
pub use parts::{Beginning, NodeError, Remains, Settings};
pub use seeding::SeedEvent;
use seeding::SeedJob;
use status::Board;
pub use verifying::{VerifyEvent, VerifyProgress};

/// How often the node looks after what no event tells: output of an unprotected guest, the size of the open set.
const TICK: Duration = Duration::from_millis(5);
/// How often the register is read while nothing is proposed: another may have changed it.
const READ_INTERVAL: Duration = Duration::from_secs(1);
/// Between the first two offers to hand a guest back. Later ones come less often, as the register is read.
const FIRST_OFFER: Duration = Duration::from_millis(25);
/// How long a lost secondary may take to come back before this node asks to run alone.
/// A live runner has to be quicker than `promote_delay_ms` of its secondary (250 by default).
const RELINK_LIMIT: Duration = Duration::from_millis(100);
/// A guest that ran so long after a promotion was not brought down by what brought it down before.
const STEADY: Duration = Duration::from_secs(60);

/// What a node is told.
#[derive(Debug)]
pub enum Event {
    /// The guest has something to tell.
    Guest,
    /// The arbiter.
    Arbiter(Found),
    /// The link with this number.
    Link(u64, LinkEvent),
    /// The seed on the link with this number.
    Seed(u64, SeedEvent),
    /// The thread that reads for the comparison with this number.
    Verify(u64, VerifyEvent),
    /// The operator.
    Command(Command),
    /// The node that this one lost to runs the guest; its words.
    Superseded(String),
    /// Somebody who may protect the vm; a spare is claimed for it.
    Advice(Advice),
}

/// What the secondary has told.
struct Peer {
    link: LinkHandle,
    number: u64,
    /// The point that the next epoch follows; none before J.
    base: Option<Point>,
    /// The next epoch carries all held output, since the secondary may lack some.
    resend_output: bool,
    /// The largest epoch that it takes, in bytes of pages.
    max_epoch_bytes: u64,
    node: NodeId,
}

/// Where the search for a secondary stands.
enum Linking {
    /// Nobody is looked for.
    Idle,
    /// A connection is being made.
    Connecting {
        number: u64,
        purpose: Purpose,
        /// Whoever asked for it.
        asked: Option<operator::Reply>,
    },
    /// The next try.
    Waiting { until: Instant },
}

/// Has the guest's events wake the node; a full inbox does as well.
fn wake_by(guest: &mut dyn ProtectedGuest, outbox: Sender<Event>) {
    guest.on_event(Arc::new(move || drop(outbox.try_send(Event::Guest))));
}

/// Nothing of the guest's memory or of its disk has changed yet.
fn nothing_changed(guest: &dyn ProtectedGuest, disk: Option<&RunnerDisk>) -> Changes {
    let blocks = disk.map_or(0, |disk| disk.bytes() / BLOCK_SIZE as u64);
    Changes::none(guest.memory().layout().frame_limit(), blocks)
}

/// The register was just read, or just written.
fn begin_account(board: &Board, replicator: &Replicator<Changes>) {
    board.begins_to_run();
    board.change(|status| status.found(Some(replicator.register())));
}

/// The runner of a guest.
pub struct Node {
    vm: VmId,
    me: NodeId,
    incarnation: Incarnation,
    guest: Box<dyn ProtectedGuest>,
    spec: WireSpec,
    settings: Settings,
    replicator: Replicator<Changes>,
    release: Release,
    outlet: Outlet,
    moved: bool,
    disk: Option<Arc<RunnerDisk>>,
    /// How the guest's writes to it are kept.
    tracking: DiskTracking,
    /// Bytes of an epoch that the last secondary takes.
    agreed_epoch_bytes: u64,
    /// Bytes of its writes that are kept for the next cut.
    disk_bytes: u64,
    /// It could not be read when an epoch needed it.
    disk_fails: bool,
    /// What changed since the last epoch that was sent.
    dirty: Changes,
    pool: PagePool,
    pacer: Pacer,
    /// A cut guest that could not go on yet.
    standing: Option<Standing>,
    /// The machine of a guest that stays stopped after its epoch was sent, until its request is carried out.
    resting: Option<colo_vmm::Cut>,
    /// The register went to another: the guest must not run.
    parked: bool,
    /// The operator stops the vm: the guest must not run again.
    stopping: bool,
    /// Something asks for a cut before the next is due.
    cut_now: bool,
    /// The dirty set is not to be trusted: everything must be compared.
    unknown: bool,
    failure: Option<GuestFailure>,
    peer: Option<Peer>,
    linking: Linking,
    /// Whom to link to; the last that the operator named.
    secondary: Option<String>,
    /// Whom to link to when the operator lets replication go on.
    paused_secondary: Option<String>,
    /// The operator pauses replication: as soon as the register has answered.
    pause_wanted: bool,
    /// The next copy is sent in full, whatever the secondary has.
    send_all: bool,
    next_link: u64,
    lost_since: Option<Instant>,
    seed: Option<SeedJob>,
    /// The guest is being moved to the secondary on purpose.
    switching: Option<switching::Switching>,
    healing: healing::Healing,
    /// The copy is being compared with the guest.
    verifying: Option<verifying::Verifying>,
    /// The copy was found to differ: it is to be made whole again.
    distrusted: bool,
    /// When each page and block was changed last, up to the open dirty set and what is in flight.
    last_changed: LastChanged,
    /// Since when the guest's writes are tracked for nothing but a copy that may come back.
    kept_since: Option<Instant>,
    arbiter: ArbiterWorker,
    next_read: Instant,
    /// When the guest is offered back to whoever has the register, and how long after that again.
    next_offer: (Instant, Duration),
    connector: Arc<dyn Connector>,
    inbox: Receiver<Event>,
    outbox: Sender<Event>,
    board: Board,
    sent: VecDeque<telling::SentEpoch>,
    promotions: u32,
    began: Instant,
    /// The operator has fenced this node, and is to be told that the guest stands.
    fenced: Option<operator::Reply>,
    end: Option<End>,
}

impl Node {
    /// Puts a node together; [`run`](Self::run) it on a thread of its own.
    pub fn new(
        mut beginning: Beginning,
        settings: Settings,
        arbiter: ArbiterWorker,
        connector: Arc<dyn Connector>,
        (outbox, inbox): (Sender<Event>, Receiver<Event>),
        board: Board,
    ) -> Self {
        wake_by(&mut *beginning.guest, outbox.clone());
        let dirty = nothing_changed(&*beginning.guest, beginning.disk.as_deref());
        let now = Instant::now();
        begin_account(&board, &beginning.replicator);
        Self {
            vm: beginning.vm,
            me: beginning.me,
            incarnation: beginning.incarnation,
            guest: beginning.guest,
            spec: beginning.spec,
            replicator: beginning.replicator,
            release: beginning.release,
            outlet: beginning.outlet,
            moved: beginning.moved,
            disk: beginning.disk,
            tracking: DiskTracking::Off,
            agreed_epoch_bytes: u64::MAX,
            disk_bytes: 0,
            disk_fails: false,
            dirty,
            pool: PagePool::default(),
            pacer: Pacer::new(settings.interval, now),
            standing: None,
            resting: None,
            parked: false,
            stopping: false,
            cut_now: false,
            unknown: false,
            failure: None,
            peer: None,
            linking: Linking::Idle,
            secondary: settings.secondary.clone().or(beginning.former.filter(|_| settings.reprotect)),
            paused_secondary: None,
            pause_wanted: false,
            send_all: false,
            next_link: 1,
            lost_since: None,
            seed: None,
            switching: None,
            healing: healing::Healing::new(beginning.moved, beginning.planned.then(|| now + healing::RETURN)),
            verifying: None,
            distrusted: false,
            kept_since: beginning.last_changed.known().memory.map(|_| now),
            last_changed: beginning.last_changed,
            arbiter,
            next_read: now + READ_INTERVAL,
            next_offer: (now, READ_INTERVAL),
            connector,
            inbox,
            outbox,
            board,
            sent: VecDeque::new(),
            promotions: beginning.promotions,
            began: now,
            fenced: None,
            end: None,
            settings,
        }
    }

    /// Runs the guest until its part is over.
    ///
    /// # Errors
    /// The guest cannot go on here; the other node will take over.
    pub fn run(mut self) -> Result<(End, Remains), NodeError> {
        let mut span = TermSpan::default();
        span.follow(self.replicator.register().term);
        self.outlet.plug_in(self.moved, Instant::now());
        self.track_disk();
        self.guest.resume()?;
        self.board.ran();
        loop {
            match self.inbox.recv_timeout(self.wait(Instant::now())) {
                Ok(event) => self.handle(event)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the node holds a sender itself"),
            }
            if let Some(reply) = self.fenced.take() {
                tracing::warn!(vm = %self.vm, "this node is fenced by an operator: the guest stands here");
                operator::answer(Some(reply), Ok(()));
                return Ok((End::Superseded(None), self.remains()));
            }
            self.settle(Instant::now())?;
            span.follow(self.replicator.register().term);
            if let Some(end) = self.end.take() {
                return Ok((end, self.remains()));
            }
        }
    }

    /// The guest's threads and devices end here.
    fn remains(self) -> Remains {
        let spec = self.guest.spec();
        let parted = self.replicator.parted().filter(|_| !self.unknown);
        let known = parted.and_then(|base| Some((base, self.last_changed.pages_since(base.epoch)?)));
        let mut changed = self.dirty.pages;
        known.iter().for_each(|(_, before)| changed.union_with(before));
        Remains {
            memory: Arc::clone(self.guest.memory()),
            spec_digest: spec.digest(),
            boot_files: spec.boot_files(),
            base: known.map(|(base, _)| base),
            changed,
            disk: self.disk.and_then(|disk| disk.remains()),
            history: self.replicator.history().clone(),
            spec: self.spec,
        }
    }

    fn wait(&self, now: Instant) -> Duration {
        if self.is_shipping() { self.pacer.wait(now).min(TICK) } else { TICK }
    }

    fn handle(&mut self, event: Event) -> Result<(), NodeError> {
        match event {
            // Asked for below, whatever woke the node.
            Event::Guest => {}
            Event::Arbiter(found) => self.on_arbiter(found)?,
            Event::Link(number, event) => self.on_link(number, event)?,
            Event::Seed(number, event) => self.on_seed(number, event)?,
            Event::Verify(number, event) => self.on_verify(number, event),
            Event::Command(command) => self.on_command(command)?,
            Event::Advice(advice) => self.on_advice(advice),
            Event::Superseded(why) => {
                tracing::info!(vm = %self.vm, "the kept guest is given up: {why}");
                let actions = self.replicator.give_up();
                self.act(actions)?;
            }
        }
        Ok(())
    }

    /// Everything that follows from the state and not from an event.
    fn settle(&mut self, now: Instant) -> Result<(), NodeError> {
        self.ask_guest()?;
        self.end_failed()?;
        self.pause_if_wanted()?;
        self.go_on_switching(now)?;
        self.let_go_if_replaced()?;
        self.say_whether_wanted();
        self.go_on_verifying(now)?;
        self.look_for_secondary(now)?;
        if now >= self.next_read {
            self.next_read = now + READ_INTERVAL;
            self.arbiter.read();
            self.forget_if_late(now)?;
        }
        self.offer_hand_back(now);
        self.track_disk();
        if self.promotions > 0 && self.failure.is_none() && now.duration_since(self.began) > STEADY {
            self.promotions = 0;
        }
        self.cut_if_due(now)?;
        self.ship_if_possible()?;
        self.let_out();
        self.outlet.announce_if_due(now);
        self.tell();
        Ok(())
    }

    /// The register went to another: unless that one has run, its guest may be handed back.
    fn offer_hand_back(&mut self, now: Instant) {
        if now < self.next_offer.0 {
            return;
        }
        let (_, wait) = self.next_offer;
        self.next_offer = (now + wait, (wait * 2).min(READ_INTERVAL));
        // A pause that came too late has only put it aside.
        let known = self.secondary.as_ref().or(self.paused_secondary.as_ref());
        if let (Phase::Lost { to }, Some(address)) = (self.replicator.phase(), known) {
            let offer = HandBack {
                vm: self.vm.clone(),
                node: self.me.clone(),
                incarnation: self.incarnation,
                lost_to: to.term,
            };
            self.connector.offer_hand_back(address.clone(), offer, self.outbox.clone());
        }
    }

    /// Takes what the guest has to tell.
    fn ask_guest(&mut self) -> Result<(), NodeError> {
        while let Some(event) = self.guest.next_event(Duration::ZERO) {
            match event {
                GuestEvent::Lifecycle(_) | GuestEvent::TrackingLost(_) => self.cut_now = true,
                GuestEvent::OutputFull => self.cut_now |= self.is_shipping(),
                GuestEvent::Output => self.pacer.hurry(),
                GuestEvent::Failed(failure) => self.guest_failed(failure)?,
            }
        }
        Ok(())
    }

    /// The guest cannot run on here. Where somebody follows, it may be able to there; else the vm stops.
    fn guest_failed(&mut self, failure: GuestFailure) -> Result<(), NodeError> {
        if self.failure.is_some() {
            return Ok(());
        }
        tracing::error!(vm = %self.vm, "the guest failed: {failure}");
        self.failure = Some(failure);
        self.park()?;
        match (&self.peer, self.replicator.phase()) {
            (peer, Phase::Paired { .. }) if self.promotions < self.settings.max_promotions => {
                // It takes over without waiting; what it lacks of this epoch was never let out. One that is away
                // takes this node for dead.
                peer.iter().for_each(|peer| peer.link.send_yield(true));
                Ok(())
            }
            _ => {
                let actions = self.replicator.stop(StopReason::Failed);
                self.act(actions)
            }
        }
    }

    /// A guest that failed, and that nobody can take over any more, is run nowhere: the vm stops.
    fn end_failed(&mut self) -> Result<(), NodeError> {
        let alone = matches!(self.replicator.phase(), Phase::Alone) && !self.replicator.is_proposing();
        if self.failure.is_none() || !alone {
            return Ok(());
        }
        let actions = self.replicator.stop(StopReason::Failed);
        self.act(actions)
    }

    fn on_arbiter(&mut self, found: Found) -> Result<(), NodeError> {
        let found_entry = match &found {
            Found::Answer(_, Answer::Applied(entry)) => Some(entry),
            Found::Answer(_, Answer::Refused(entry)) | Found::Entry(entry) => entry.as_ref(),
            Found::Silent(reason) => {
                self.board.arbiter_silent(reason.clone());
                return Ok(());
            }
        };
        self.board.change(|status| status.found(found_entry));
        self.switching.iter_mut().for_each(switching::Switching::hear);
        let actions = match found {
            Found::Answer(id, answer) => self.replicator.answer(id, answer),
            Found::Entry(entry) => self.replicator.observe(entry),
            Found::Silent(_) => Vec::new(),
        };
        let term = self.replicator.register().term;
        self.act(actions)?;
        if let (Some(peer), Phase::Paired { .. }) = (&self.peer, self.replicator.phase()) {
            peer.link.send_term(term);
        }
        Ok(())
    }

    /// Does what the protocol asks for.
    fn act(&mut self, actions: Vec<Action<Changes>>) -> Result<(), NodeError> {
        for action in actions {
            match action {
                Action::Propose(proposal) => self.arbiter.propose(proposal),
                Action::MergeBack(set) => {
                    let newer = std::mem::replace(&mut self.dirty, set);
                    self.dirty.merge(newer);
                    self.send_resting_again();
                }
                Action::Detach => {
                    // A copy that was found to differ is made whole again at once, whatever is to follow other losses.
                    if !self.settings.reprotect && !self.distrusted {
                        // Until the operator says that it goes on.
                        self.paused_secondary = self.secondary.take().or(self.paused_secondary.take());
                    }
                    self.distrusted = false;
                    self.drop_link();
                    self.keep_or_forget()?;
                }
                Action::Covered(point, changes) => self.last_changed.mark(&changes, point.epoch),
                Action::ResetGuest => self.reset_guest()?,
                Action::Park => {
                    self.parked = true;
                    self.next_offer = (Instant::now(), FIRST_OFFER);
                    self.outlet.unplug();
                    self.park()?;
                }
                Action::Unpark => {
                    self.parked = false;
                    self.outlet.plug_in(true, Instant::now());
                    self.standing = None;
                    self.resting = None;
                    self.keep_or_forget()?;
                    if self.failure.is_some() {
                        let actions = self.replicator.stop(StopReason::Failed);
                        self.act(actions)?;
                    } else {
                        self.guest.resume()?;
                    }
                }
                Action::End(end) => self.end = Some(end),
            }
        }
        Ok(())
    }

    /// Output that may go out, does.
    fn let_out(&mut self) {
        let entitled = self.replicator.entitled();
        self.release.let_out(entitled, &mut self.outlet);
        if entitled == Entitled::All && !self.parked && self.standing.is_none() {
            let epoch = self.replicator.next_point().epoch;
            let output = self.guest.drain_output();
            self.release.hold(epoch, output);
            self.release.let_out(entitled, &mut self.outlet);
        }
    }

    /// Whether epochs are cut and sent.
    fn is_shipping(&self) -> bool {
        matches!(
            self.replicator.phase(),
            Phase::Joining { .. } | Phase::Pairing { .. } | Phase::Paired { .. }
        )
    }

    /// Has the guest's disk writes kept as they are needed: with their bytes for epochs, else only which blocks, for a
    /// copy that is being made or may come back.
    fn track_disk(&mut self) {
        let wanted = if self.is_shipping() {
            DiskTracking::Bytes { most: disk_share(self.epoch_limit()) }
        } else if matches!(self.replicator.phase(), Phase::Seeding { .. }) || self.kept_since.is_some() {
            DiskTracking::Blocks
        } else {
            DiskTracking::Off
        };
        if wanted == self.tracking {
            return;
        }
        self.tracking = wanted;
        self.guest.track_disk(wanted);
        if !self.is_shipping() {
            self.dirty.forget_bytes();
        }
    }

    /// An incomplete set: whatever follows, the memory has to be compared as a whole.
    fn check_tracked(&mut self, tracked: Tracked) {
        if let Tracked::Unknown(loss) = tracked {
            tracing::error!(vm = %self.vm, "{loss}: all memory will be compared with the secondary's");
            self.board.count(|counters| counters.ring_overruns += 1);
            self.unknown = true;
            self.last_changed.forget();
        }
    }
}
