//! Following a runner: links, seeds, epochs, and what becomes of them.

use colo_common::{Point, ReplicaId, Term};
use colo_primary::metrics;
use colo_primary::release::{Release, after};
use colo_primary::runner_disk::RunnerDisk;
use colo_proto::message::{
    Ack as WireAck, Diverged, Progress, Refusal as WireRefusal, SeedMode, SeedPart, Verified, Verify,
    VerifyPart,
};
use colo_proto::v1::EventKind;
use colo_vmm::egress::{Output, OutputItem, OutputPosition};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::OwnedSemaphorePermit;

use super::welcoming::reason_of;
use super::{Follower, Tip};
use crate::apply::{self, Applied};
use crate::persist::{self, Persisted, ToStore};
use crate::receiver::{LinkEvent, Say, refused};
use crate::replica::{Action, Copy};
use crate::staging::{StagedEpoch, StagedPages};
use crate::store::Base;

impl Follower {
    pub(super) fn on_link(&mut self, number: u64, event: LinkEvent) {
        let Some(link) = self.link.as_mut().filter(|link| link.number == number) else { return };
        match event {
            LinkEvent::SeedBegin { mode, reply } => {
                let taken = self.begin_seed(mode);
                let _ = reply.send(taken);
            }
            LinkEvent::SeedPages(part, room) => {
                if link.seeding
                    && let (Some(applier), Some(persister)) = (&self.applier, &self.persister)
                {
                    self.warm.iter_mut().for_each(|warm| warm.rejoin.take_pages(&part));
                    self.board.copied(part.pages.iter().map(StagedPages::bytes).sum());
                    applier.order(apply::Job::Seed(part.clone()));
                    persister.order(persist::Job::Seed(part, Some(room)));
                }
            }
            LinkEvent::SeedBlocks(part, room) => {
                if link.seeding
                    && let Some(persister) = &self.persister
                {
                    self.warm.iter_mut().for_each(|warm| warm.rejoin.take_blocks(&part));
                    self.board.copied(part.bytes());
                    persister.order(persist::Job::SeedBlocks(part, Some(room)));
                }
            }
            LinkEvent::Epoch(epoch, room) => self.on_epoch(*epoch, room),
            LinkEvent::Term(term) => match self.replica.hear_term(term) {
                Ok(actions) => self.act(actions),
                Err(e) => self.refuse(reason_of(&e), &e.to_string()),
            },
            LinkEvent::Digests(request) => {
                if !link.seeding {
                    link.asked = Some(request);
                } else if let Some(applier) = &self.applier {
                    applier.order(apply::Job::Digests(number, request));
                }
            }
            LinkEvent::BlockDigests(_) if self.warm.as_ref().is_none_or(|warm| warm.disk.is_none()) => {
                self.refuse(
                    WireRefusal::OutOfPlace,
                    "digests of a disk are asked for, and the guest has none",
                );
            }
            LinkEvent::BlockDigests(request) => {
                if !link.seeding {
                    link.asked_blocks = Some(request);
                } else if let Some(persister) = &self.persister {
                    persister.order(persist::Job::BlockDigests(number, request));
                }
            }
            LinkEvent::Verify(point, list, room) => self.verify(number, point, list, room),
            LinkEvent::Yield(word) => {
                tracing::warn!(vm = %self.vm, "the runner yields (failed: {})", word.failed);
                self.yielded += u32::from(word.failed);
                self.planned = !word.failed;
                self.detector.yielded(Instant::now());
            }
            LinkEvent::Down(why) => self.link_down(&why),
        }
    }

    fn link_down(&mut self, why: &str) {
        let Some(link) = self.link.take() else { return };
        tracing::warn!(vm = %self.vm, runner = %link.node, "the link is down: {why}");
        self.board.error(format!("the link to {} is down: {why}", link.node));
        self.board.count(|counters| counters.link_losses += 1);
        self.needless_since = None;
        self.replica.link_lost();
        self.break_off_seed();
        self.suspect();
    }

    /// What the intent log of a life before says is of no more use.
    fn forget_intent(&self) {
        if let Err(e) = RunnerDisk::forget(&self.settings.intent) {
            tracing::warn!(vm = %self.vm, "{e}");
        }
    }

    pub(super) fn break_off_seed(&mut self) {
        self.warm.iter_mut().for_each(|warm| warm.rejoin.break_off());
    }

    /// Nothing is heard of the runner any more, for whatever reason: it may be dead.
    fn suspect(&mut self) {
        let now = Instant::now();
        self.detector.silent(now, now + self.settings.promote_delay);
        self.next_read = now;
        let wait = self.settings.promote_delay.as_millis();
        self.board.happens(
            EventKind::Suspicion,
            format!("the runner may be dead: it has {wait} ms to show that it is not"),
        );
    }

    /// The copy is inconsistent from here on: synced in the store before the first page is taken.
    fn begin_seed(&mut self, mode: SeedMode) -> bool {
        let Some((node, term)) = self.link.as_ref().map(|link| (link.node.clone(), link.term)) else {
            return false;
        };
        let copy = self.replica.copy().clone();
        let begun = self.warm.as_mut().ok_or("no guest was agreed on".to_owned());
        let diverged = match begun.and_then(|warm| warm.rejoin.begin(&copy, mode)) {
            Ok(diverged) => diverged,
            Err(why) => {
                self.refuse(WireRefusal::OutOfPlace, &why);
                return false;
            }
        };
        if let Err(e) = self.replica.accept_seed(&node, term) {
            self.refuse(reason_of(&e), &e.to_string());
            return false;
        }
        // What this node ran as a primary is replaced as well.
        if let Err(e) = self.forget_running() {
            self.refuse(WireRefusal::Failed, &e);
            return false;
        }
        // What it says is over once a block is taken; this process knows it until the copy is whole.
        self.forget_intent();
        let keep = mode.memory != SeedPart::All;
        self.note_seed(mode);
        let (Some(applier), Some(persister)) = (&self.applier, &self.persister) else { return false };
        persister.order(persist::Job::Begin(if keep { Base::Stored } else { Base::Empty }));
        let (done, wait) = crossbeam_channel::bounded(1);
        persister.order(persist::Job::Flush(done));
        if wait.recv().is_err() || self.store_failed.is_some() {
            return false;
        }
        applier.order(apply::Job::BeginSeed { keep });
        // What the epochs before took is given back: nobody will tell of their points any more.
        self.rooms.clear();
        self.tip = None;
        self.restored = None;
        self.marks = Default::default();
        if mode.asks_diverged() {
            for part in Diverged::parts(&diverged.page_runs(), &diverged.block_runs()) {
                self.say(Say::Diverged(part));
            }
        }
        if let Some(link) = &mut self.link {
            link.seeding = true;
            let (Some(applier), Some(persister)) = (&self.applier, &self.persister) else { return false };
            if let Some(request) = link.asked.take() {
                applier.order(apply::Job::Digests(link.number, request));
            }
            if let Some(request) = link.asked_blocks.take() {
                persister.order(persist::Job::BlockDigests(link.number, request));
            }
        }
        true
    }

    /// An epoch is here as a whole. Nothing of this node changes before all that can be wrong with it was looked at.
    fn on_epoch(&mut self, epoch: StagedEpoch, room: OwnedSemaphorePermit) {
        let point = epoch.point;
        let _span = tracing::debug_span!("stage", term = point.term.0, epoch = point.epoch.0).entered();
        let Some(term) = self.link.as_ref().map(|link| link.term) else { return };
        let fresh = match judge_epoch(self.replica.copy(), term, self.held.end(), &epoch) {
            Ok(fresh) => fresh,
            Err(why) => return self.refuse(WireRefusal::OutOfPlace, &why),
        };
        let completes = epoch.base.is_none();
        // An epoch of the term before may still be on its way when the runner tells of a newer one.
        let heard = if point.term > self.replica.fence() {
            self.replica.hear_term(point.term)
        } else {
            Ok(Vec::new())
        };
        let drawn = ReplicaId::draw();
        let staged = heard.and_then(|mut actions| {
            actions.extend(if completes {
                self.replica.whole(point, drawn)?
            } else {
                self.replica.staged(point)?
            });
            Ok(actions)
        });
        let actions = match staged {
            Ok(actions) => actions,
            Err(e) => return self.refuse(reason_of(&e), &e.to_string()),
        };
        if completes {
            self.held = Release::new(epoch.output.start);
        }
        self.learn_addresses(&fresh);
        self.held.hold(point.epoch, fresh);
        self.held.let_out_to(epoch.released, &mut self.console);
        self.promotions = epoch.promotions;
        self.history = epoch.history.clone();
        self.warm.iter_mut().for_each(|warm| warm.rejoin.stage(&epoch));
        self.note_staged(&epoch);
        let epoch = Arc::new(epoch);
        self.tip = Some(Tip { epoch: Arc::clone(&epoch) });
        self.restored = None;
        self.marks.staged = Some(point);
        self.rooms.push_back((point, room));
        // The ack first: nothing that follows may hold it up. An id comes after the mark of its copy.
        let (acks, rest) = actions.into_iter().partition(|action| matches!(action, Action::Ack(_)));
        self.act(acks);
        self.pass_on(epoch, completes);
        self.act(rest);
    }

    /// Goes to whoever has the epoch of its point next, right behind that.
    fn verify(&mut self, link: u64, point: Point, list: Verify, room: OwnedSemaphorePermit) {
        match self.replica.copy() {
            Copy::Whole { staged, .. } if *staged == point => {}
            _ => {
                let why = format!("a copy at {point} is to be compared, which is not the newest here");
                return self.refuse(WireRefusal::OutOfPlace, &why);
            }
        }
        match (list.part, &self.applier, &self.persister) {
            (VerifyPart::Memory, Some(applier), _) => {
                applier.order(apply::Job::Verify(link, point, list, Some(room)));
            }
            (VerifyPart::Disk, _, Some(persister)) => {
                persister.order(persist::Job::Verify(link, point, list, Some(room)));
            }
            // It is about to run the guest.
            _ => {}
        }
    }

    /// What the guest sends tells its addresses, which are announced if it runs on here.
    fn learn_addresses(&mut self, output: &Output) {
        let Some(learner) = self.warm.as_mut().and_then(|warm| warm.learner.as_mut()) else { return };
        for item in &output.items {
            if let OutputItem::Frame { bytes, .. } = item {
                learner.observe(bytes);
            }
        }
    }

    /// To the image and to the store.
    fn pass_on(&mut self, epoch: Arc<StagedEpoch>, completes: bool) {
        let (Some(applier), Some(persister), Some(replica)) =
            (&self.applier, &self.persister, self.replica_id())
        else {
            return;
        };
        applier.order(apply::Job::Epoch(Arc::clone(&epoch)));
        let to_store = ToStore { epoch, held: Arc::new(self.held.all_held()), replica };
        if completes {
            if let Some(link) = &mut self.link {
                link.seeding = false;
            }
            persister.order(persist::Job::Complete(to_store));
        } else {
            persister.order(persist::Job::Epoch(to_store));
        }
    }

    pub(super) fn on_applied(&mut self, applied: Applied) {
        match applied {
            Applied::Point(point, took) => {
                self.marks.applied = Some(point);
                self.note_applied(point, took);
                self.free_rooms();
            }
            Applied::Digests(number, digests) => {
                if self.link.as_ref().is_some_and(|link| link.number == number) {
                    self.say(Say::Digests(digests));
                }
            }
            Applied::Verified(number, found) => self.say_verified(number, found),
            Applied::Failed(why) => {
                self.refuse(WireRefusal::Failed, &format!("an epoch cannot be applied: {why}"));
                self.end = Some(super::Outcome::Failed(format!("an epoch cannot be applied: {why}")));
            }
        }
    }

    pub(super) fn on_persisted(&mut self, persisted: Persisted) {
        match persisted {
            Persisted::Point(replica, point, took) => {
                self.board.meters().observe(metrics::EPOCH_PERSIST, took);
                if self.replica_id() == Some(replica) {
                    self.marks.persisted = Some(point);
                }
                let actions = self.replica.persisted(replica, point);
                self.act(actions);
                self.free_rooms();
            }
            Persisted::IdStored(id) => {
                let actions = self.replica.id_stored(id);
                self.act(actions);
            }
            Persisted::IdErased(id) => {
                let actions = self.replica.id_erased(id);
                self.act(actions);
            }
            Persisted::Digests(number, digests) => {
                if self.link.as_ref().is_some_and(|link| link.number == number) {
                    self.say(Say::BlockDigests(digests));
                }
            }
            Persisted::Verified(number, found) => self.say_verified(number, found),
            Persisted::Failed(why) => self.on_store_failed(&why),
        }
    }

    fn say_verified(&mut self, number: u64, found: Verified) {
        if self.link.as_ref().is_some_and(|link| link.number == number) {
            if found.differing > 0 {
                let what = format!("{} pages or blocks of this copy differ from the guest", found.differing);
                tracing::error!(vm = %self.vm, at = %found.point, "{what}");
                self.board.error(what);
            }
            self.say(Say::Verified(found));
        }
    }

    /// The image file of the disk may fail while nothing is written to the store.
    pub(super) fn look_at_disk(&mut self) {
        let disk = self.warm.as_ref().and_then(|warm| warm.disk.clone());
        if let Some(why) = disk.as_ref().and_then(|disk| disk.failure()) {
            self.on_store_failed(&format!("the guest's disk: {why}"));
        }
    }

    /// It takes nothing more; the first reason is told.
    fn on_store_failed(&mut self, why: &str) {
        if self.store_failed.is_some() {
            return;
        }
        tracing::error!(vm = %self.vm, "the store has failed: {why}");
        self.board.error(format!("the store has failed: {why}"));
        self.board.meters().add(metrics::STORE_FAILURES, 1.0);
        self.store_failed = Some(why.to_owned());
        // Under `memory` the copy is as good as before, but it is not what the operator was promised.
        self.refuse(WireRefusal::Failed, &format!("the store has failed: {why}"));
    }

    /// Room is free once an epoch is in the image and in the store.
    fn free_rooms(&mut self) {
        let done = self.marks.applied.min(self.marks.persisted);
        while self.rooms.pop_front_if(|(point, _)| Some(*point) <= done).is_some() {}
    }

    pub(super) fn tell_progress(&mut self) {
        let marks = self.marks;
        self.say(Say::Progress(Progress {
            staged: marks.staged,
            applied: marks.applied,
            persisted: marks.persisted,
            backlog_bytes: marks.backlog_bytes,
        }));
    }

    pub(super) fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Propose(proposal) => self.arbiter.propose(proposal),
                Action::Ack(ack) => {
                    self.say(Say::Ack(WireAck { point: ack.point, replica: ack.replica, term: ack.term }));
                }
                Action::StoreId(id) => {
                    if let Some(persister) = &self.persister {
                        persister.order(persist::Job::StoreId(id));
                    }
                }
                Action::EraseId(id) => {
                    if let Some(persister) = &self.persister {
                        persister.order(persist::Job::EraseId(id));
                    }
                }
                Action::Run(start, entry) => self.take_over(start, entry),
            }
        }
    }

    fn say(&mut self, word: Say) {
        if let Some(link) = &self.link {
            // A link that is down says so itself.
            let _ = link.say.send(word);
        }
    }

    /// The link is of no more use: says why and drops it.
    pub(super) fn refuse(&mut self, reason: WireRefusal, why: &str) {
        tracing::warn!(vm = %self.vm, "the link is ended: {why}");
        self.board.error(why.to_owned());
        self.say(Say::Refused(refused(reason, why)));
        self.link = None;
        self.replica.link_lost();
        self.break_off_seed();
        self.suspect();
    }
}

/// Whether an epoch on a link that began in `term` follows the copy; answers its output that is new where everything up
/// to `known` is known.
///
/// # Errors
/// Why not; the link is to be ended.
pub fn judge_epoch(
    copy: &Copy,
    term: Term,
    known: OutputPosition,
    epoch: &StagedEpoch,
) -> Result<Output, String> {
    let point = epoch.point;
    let follows = match copy {
        Copy::Whole { staged, .. } => epoch.base == Some(*staged) && *staged < point,
        Copy::Inconsistent => epoch.base.is_none(),
        _ => false,
    };
    if !follows {
        return Err(format!("{point} does not follow what is staged here"));
    }
    if point.term < term {
        return Err(format!("{point} is of a term before this link's"));
    }
    let start = epoch.output.start;
    let known = if epoch.base.is_none() { start } else { known };
    after(epoch.output.clone(), known)
        .ok_or_else(|| format!("output from {start:?} on leaves a gap after {known:?}"))
}
