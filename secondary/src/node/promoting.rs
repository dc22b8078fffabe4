//! Taking the guest over: from a suspicion, or from nothing (a boot), to a running vCPU.
//!
//! 1. Suspicion: the link is down; wait `promote_delay`, so that a live primary wins.
//! 2. Read the register; if it names this copy, stop acking for good and propose.
//! 3. Granted: finish what is being applied, restore the machine, write `active` to the store (synced), run.

use colo_common::register::{Answer, Entry, Value};
use colo_common::{Epoch, Incarnation, NodeId, Point, Term};
use colo_primary::admin::Reason;
use colo_primary::arbiter_worker::Found;
use colo_primary::node::Beginning;
use colo_primary::node::status::{Promoted, Role};
use colo_primary::outlet::{Network, Outlet};
use colo_primary::release::Release;
use colo_primary::replicator::Replicator;
use colo_vmm::MachineState;
use colo_vmm::egress::OutputPosition;
use colo_vmm::tap::learn::Learner;
use std::time::{Duration, Instant};

use super::asked::reason_of;
use super::{Follower, Outcome, READ_INTERVAL};
use crate::persist;
use crate::replica::{Copy, NotMine, Start};

/// Where the time of a promotion went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Promotion {
    /// The point that the guest runs from.
    pub point: Option<Point>,
    /// From the suspicion to the register's answer.
    pub register: Duration,
    /// Finishing the backlog of the image.
    pub apply: Duration,
    /// Writing `active`.
    pub store: Duration,
    /// Restoring the machine.
    pub restore: Duration,
    /// From the register's answer to the machine being ready.
    pub total: Duration,
}

/// The old runner's offer to run on.
#[derive(Clone, Debug)]
pub struct HandBack {
    /// Its node.
    pub node: NodeId,
    /// Its process.
    pub incarnation: Incarnation,
    /// The term that it lost to.
    pub lost_to: Term,
}

impl Follower {
    /// Asks to run the guest once the runner has had its time.
    pub(super) fn suspect_if_due(&mut self, now: Instant) {
        if !self.detector.is_due(now) || !self.takes_over() {
            return;
        }
        if self.replica.is_proposing() || self.cannot_run().is_some() {
            return;
        }
        self.detector.ask(now + READ_INTERVAL);
        self.read();
    }

    /// Whether a runner that is gone is replaced without a word to this node.
    fn takes_over(&self) -> bool {
        self.settings.auto_failover || self.planned
    }

    /// Why this node could not run the guest if the register named it.
    fn cannot_run(&self) -> Option<(Reason, String)> {
        if !matches!(self.replica.copy(), Copy::Whole { .. }) && !self.asked.forces() {
            return Some((Reason::NoCopy, NotMine::NoCopy.to_string()));
        }
        if let Some(why) = &self.store_failed {
            return Some((Reason::NotNow, format!("this node's store has failed: {why}")));
        }
        let ready = self.warm.is_some() && (self.applier.is_some() || self.replica.is_active());
        (!ready).then(|| (Reason::NoCopy, "this node does not know the guest's description".to_owned()))
    }

    pub(super) fn on_arbiter(&mut self, found: Found) {
        match found {
            Found::Answer(id, answer) => {
                let entry = match &answer {
                    Answer::Applied(entry) => Some(entry.clone()),
                    Answer::Refused(found) => found.clone(),
                };
                self.remember(entry.as_ref());
                let started_again = self.replica.is_starting() && matches!(answer, Answer::Refused(_));
                let actions = self.replica.answer(id, answer);
                if started_again {
                    self.start_refused(entry.as_ref(), actions.is_empty());
                }
                self.act(actions);
            }
            Found::Entry(entry) => self.on_register(entry),
            Found::Silent(reason) => self.board.arbiter_silent(reason),
        }
    }

    /// The register was read, for whatever reason.
    fn on_register(&mut self, found: Option<Entry>) {
        self.remember(found.as_ref());
        if !std::mem::take(&mut self.reading) {
            return;
        }
        if !std::mem::replace(&mut self.observed, true) && !self.on_first_look(found.as_ref()) {
            return;
        }
        self.look_whether_needed(found.as_ref(), Instant::now());
        if let Some(entry) = &found
            && matches!(entry.value, Value::Stopped { .. })
            && self.followed
            && self.link.is_none()
        {
            self.end = Some(Outcome::Superseded(entry.clone()));
            return;
        }
        let actions = self.replica.observe(found.as_ref());
        self.act(actions);
        if let Some(offer) = self.hand_back.take() {
            let HandBack { node, incarnation, lost_to } = offer;
            match self.replica.hand_back(found.as_ref(), &node, incarnation, lost_to) {
                Ok(actions) => self.act(actions),
                Err(e) => tracing::info!(vm = %self.vm, "nothing is handed back to {node}: {e}"),
            }
        }
        self.confirm_fenced(found.as_ref());
        let suspected = self.takes_over() && self.detector.has_asked();
        if !self.asked.wants() && !suspected {
            return;
        }
        if let Some((reason, why)) = self.cannot_run() {
            return self.asked.refuse(reason, why);
        }
        match self.want_to_run(found.as_ref()) {
            Ok(actions) => self.act(actions),
            Err(NotMine::Proposing) => {}
            Err(e) => self.asked.refuse(reason_of(&e), e.to_string()),
        }
    }

    /// The register names this process.
    pub(super) fn take_over(&mut self, start: Start, entry: Entry) {
        let granted = Instant::now();
        self.board.change(|status| status.role = Role::Promoting);
        self.link = None;
        self.asked.done();
        let mut promotion = Promotion::default();
        if let Some(since) = self.detector.since() {
            promotion.register = granted - since;
        }
        let outcome = match (&self.store_failed, start) {
            // It may have failed while the register was asked.
            (Some(why), _) => Err(format!("its store has failed: {why}")),
            (None, Start::Promote(point)) => self.promote_from(point, entry, granted, promotion),
            (None, Start::Boot) => self.boot(entry, granted, promotion),
        };
        if let Ok(Outcome::Run(_, took)) = &outcome {
            let Promotion { point, register, apply, store, restore, .. } = *took;
            let promoted = Promoted { point, register, apply, store, restore, granted, ran: None };
            self.board.change(|status| status.promotion = Some(promoted));
        }
        self.end = Some(outcome.unwrap_or_else(|why| {
            Outcome::Failed(format!("this node has the register and cannot run the guest: {why}"))
        }));
    }

    fn promote_from(
        &mut self,
        point: Point,
        entry: Entry,
        granted: Instant,
        mut promotion: Promotion,
    ) -> Result<Outcome, String> {
        promotion.point = Some(point);
        if point.term >= entry.term {
            return Err(format!("{point} was staged, which is of no term before {}", entry.term));
        }
        let applier = self.applier.take().ok_or("there is no image")?;
        let image = applier.finish()?;
        if image.point() != Some(point) {
            return Err(format!("the image is at {:?} and {point} was staged", image.point()));
        }
        promotion.apply = granted.elapsed();
        if let Some(persister) = &self.persister {
            persister.end_copy();
        }
        let state = self.staged_state()?;
        let restoring = Instant::now();
        self.begin_disk(point)?;
        let warm = self.warm.as_mut().ok_or("there is no guest")?;
        // Before: setting the state writes guest memory too.
        warm.guest.protect().map_err(|e| e.to_string())?;
        warm.guest.restore(&state).map_err(|e| e.to_string())?;
        promotion.restore = restoring.elapsed();
        // Only a guest that can run here ends the stored copy; no vCPU runs before that is synced.
        self.activate(entry.term, &mut promotion)?;
        promotion.total = granted.elapsed();
        self.begin(entry, promotion)
    }

    /// A power cut's worth of loss, by the operator's choice: the guest starts anew, with offsets of its own.
    fn boot(&mut self, entry: Entry, granted: Instant, mut promotion: Promotion) -> Result<Outcome, String> {
        let begins = OutputPosition::at_start(entry.term);
        self.begin_disk(Point { term: entry.term, epoch: Epoch(0) })?;
        let warm = self.warm.as_mut().ok_or("the guest's description is not known here")?;
        warm.guest.boot().and_then(|()| warm.guest.count_from(begins)).map_err(|e| e.to_string())?;
        warm.rejoin.forget();
        self.held = Release::new(begins);
        self.console.begin_at(begins.console);
        self.activate(entry.term, &mut promotion)?;
        self.end_start()?;
        promotion.total = granted.elapsed();
        self.begin(entry, promotion)
    }

    /// From here on an intent log says where the disk is ahead of what others have.
    fn begin_disk(&self, point: Point) -> Result<(), String> {
        let disk = self.warm.as_ref().and_then(|warm| Some((warm.runner_disk.as_ref()?, &warm.spec)));
        let written =
            disk.filter(|(_, spec)| spec.virtio().disk.as_ref().is_some_and(|disk| !disk.read_only));
        written.map_or(Ok(()), |(disk, _)| disk.begin(&self.vm, point).map_err(|e| e.to_string()))
    }

    fn staged_state(&mut self) -> Result<MachineState, String> {
        match (&self.tip, self.restored.take()) {
            (Some(tip), _) => Ok(tip.epoch.state.clone()),
            (None, Some(restored)) => Ok(restored.state),
            (None, None) => Err("there is no machine state".to_owned()),
        }
    }

    /// Synced before a vCPU runs.
    fn activate(&mut self, term: Term, promotion: &mut Promotion) -> Result<(), String> {
        let storing = Instant::now();
        let persister = self.persister.as_ref().ok_or("there is no store")?;
        let (done, wait) = crossbeam_channel::bounded(1);
        persister.order(persist::Job::Activate(term, done));
        wait.recv().map_err(|_| "the persist thread has ended".to_owned())??;
        promotion.store = storing.elapsed();
        persister.order(persist::Job::Reclaim);
        Ok(())
    }

    fn begin(&mut self, entry: Entry, promotion: Promotion) -> Result<Outcome, String> {
        let warm = self.warm.take().ok_or("there is no guest")?;
        let replicator =
            Replicator::new(self.me.clone(), self.incarnation, entry, std::mem::take(&mut self.history));
        self.board.count(|counters| counters.promotions += 1);
        let network =
            warm.spec.virtio().net.zip(self.tap.take()).map(|(net, tap)| {
                Network::new(tap, net.mac, warm.learner.iter().flat_map(Learner::addresses))
            });
        let beginning = Beginning {
            vm: self.vm.clone(),
            me: self.me.clone(),
            incarnation: self.incarnation,
            guest: warm.guest,
            spec: warm.spec,
            replicator,
            release: std::mem::take(&mut self.held),
            disk: warm.runner_disk,
            outlet: Outlet::new(self.console.clone(), network),
            moved: true,
            was_protected: true,
            promotions: self.promotions + self.yielded,
            last_changed: warm.rejoin.into_last_changed(),
            planned: self.planned,
            former: self.runner_at.as_ref().map(ToString::to_string),
        };
        Ok(Outcome::Run(Box::new(beginning), promotion))
    }
}
