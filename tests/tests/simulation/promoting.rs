//! Taking the guest over, simulated: `secondary::node::promoting`, function by function.

use colo_common::register::{Answer, Entry, Value};
use colo_common::{Epoch, Point};
use colo_primary::arbiter_worker::Found;
use colo_primary::release::Release;
use colo_primary::replicator::Replicator;
use colo_secondary::rejoin::Rejoin;
use colo_secondary::replica::{Copy, NotMine, Start};
use colo_vmm::{MachineState, ProtectedGuest};

use crate::common::Common;
use crate::follower::{Follower, Outcome};
use crate::outside::Begins;
use crate::persister::Job;
use crate::plan::{BLOCKS, FRAMES, Mutations, SUSPECT_AGAIN};
use crate::runner::{Beginning, GuestDisk};
use std::sync::Arc;

impl Follower {
    pub(crate) fn suspect_if_due(&mut self, common: &mut Common) {
        if !self.detector.is_due(common.now) || !self.takes_over() {
            return;
        }
        if self.replica.is_proposing() || self.cannot_run() {
            return;
        }
        self.detector.ask(common.now + SUSPECT_AGAIN);
        self.read();
    }

    /// `Follower::takes_over`.
    fn takes_over(&self) -> bool {
        self.auto_failover || self.planned
    }

    fn cannot_run(&self) -> bool {
        let copy = matches!(self.replica.copy(), Copy::Whole { .. }) || self.asked.forces();
        let ready = self.guest.is_some() && (self.image.is_some() || self.replica.is_active());
        !copy || self.store_failed || !ready
    }

    pub(crate) fn on_arbiter(&mut self, found: Found, common: &mut Common) {
        self.arbiter.note(self.x, &found, common);
        match found {
            Found::Answer(id, answer) => {
                let entry = match &answer {
                    Answer::Applied(entry) => Some(entry.clone()),
                    Answer::Refused(found) => found.clone(),
                };
                self.remember(entry.as_ref());
                let actions = self.replica.answer(id, answer);
                self.act(actions, common);
            }
            Found::Entry(entry) => self.on_register(entry, common),
            Found::Silent(_) => {}
        }
    }

    /// `Follower::remember`.
    fn remember(&mut self, found: Option<&Entry>) {
        if let Some(entry) = found {
            self.persister.order(Job::Term(entry.term));
        }
    }

    fn on_register(&mut self, found: Option<Entry>, common: &mut Common) {
        self.remember(found.as_ref());
        if !std::mem::take(&mut self.reading) {
            return;
        }
        self.observed = true;
        self.look_whether_needed(found.as_ref(), common);
        if let Some(entry) = found.as_ref().filter(|entry| matches!(entry.value, Value::Stopped { .. }))
            && self.followed
            && self.link.is_none()
        {
            common.note(self.x, || format!("has nothing to follow any more: {entry}"));
            self.end = Some(Outcome::Superseded);
            return;
        }
        let actions = self.replica.observe(found.as_ref());
        self.act(actions, common);
        if let Some((node, process, lost_to)) = self.hand_back.take()
            && let Ok(actions) = self.replica.hand_back(found.as_ref(), &node, process, lost_to)
        {
            common.count("hand-backs proposed");
            self.act(actions, common);
        }
        self.take_word(found.as_ref(), common);
        let suspected = self.takes_over() && self.detector.has_asked();
        if !self.asked.wants(common.now) && !suspected {
            return;
        }
        if self.cannot_run() {
            return self.asked.refuse(&NotMine::NoCopy, common);
        }
        match self.want_to_run(found.as_ref(), common) {
            Ok(actions) => self.act(actions, common),
            Err(NotMine::Proposing) => {}
            Err(why) => self.asked.refuse(&why, common),
        }
    }

    pub(crate) fn take_over(&mut self, start: Start, entry: Entry, common: &mut Common) {
        if let Some(link) = self.link.take() {
            common.close(link.number, 1);
        }
        if self.waits_for_disk(common) {
            self.taking = Some((start, entry));
            return;
        }
        common.note(self.x, || format!("runs by {start:?}: {entry}"));
        self.asked.done();
        let outcome = match start {
            Start::Promote(point) => self.promote_from(point, entry, common),
            Start::Boot => self.boot(entry, common),
        };
        self.end = Some(outcome.unwrap_or_else(Outcome::Failed));
    }

    fn promote_from(&mut self, point: Point, entry: Entry, common: &mut Common) -> Result<Outcome, String> {
        while !self.apply.is_empty() && self.end.is_none() {
            self.apply_one(common);
        }
        let image = self.image.take().ok_or("there is no image")?;
        if image.point() != Some(point) {
            let at = image.point();
            common.outside.broken(|| format!("the image is at {at:?} and {point} was staged"));
            return Err("the image is elsewhere".to_owned());
        }
        let state = self.staged_state()?;
        self.intent.begin(&*self.disk, point)?;
        let guest = self.guest.as_mut().ok_or("there is no guest")?;
        guest.protect().map_err(|e| e.to_string())?;
        guest.restore(&state).map_err(|e| e.to_string())?;
        common.outside.activating(self.x);
        self.persister.activate(entry.term, common.mutations)?;
        let guest = self.guest.take().ok_or("there is no guest")?;
        common.count("promotions");
        let begins = self.begins(&entry, common);
        let stint = common.outside.promote(begins, point, &guest, &state);
        common.counts.add("promotions by force", u64::from(begins.forced));
        common.counts.add("promotions that give acked output up", u64::from(common.outside.gave_up()));
        Ok(self.begin(entry, guest, stint))
    }

    fn boot(&mut self, entry: Entry, common: &mut Common) -> Result<Outcome, String> {
        self.intent.begin(&*self.disk, Point { term: entry.term, epoch: Epoch(0) })?;
        self.persister.activate(entry.term, Mutations::default())?;
        let mut guest = self.guest.take().ok_or("the guest's description is not known here")?;
        guest.boot().map_err(|e| e.to_string())?;
        self.rejoin.forget();
        self.held = Release::default();
        common.count("boots");
        let begins = self.begins(&entry, common);
        common.counts.add("boots by force", u64::from(begins.forced));
        let stint = common.outside.boot(begins);
        Ok(self.begin(entry, guest, stint))
    }

    fn begins(&self, entry: &Entry, common: &Common) -> Begins {
        let forced = common.is_forced(self.x, entry.term);
        Begins { node: self.x, term: entry.term, forced }
    }

    fn staged_state(&mut self) -> Result<MachineState, String> {
        match (&self.tip, self.restored.take()) {
            (Some(tip), _) => Ok(tip.state.clone()),
            (None, Some(restored)) => Ok(restored.state),
            (None, None) => Err("there is no machine state".to_owned()),
        }
    }

    fn begin(&mut self, entry: Entry, guest: colo_vmm::synthetic::SyntheticGuest, stint: usize) -> Outcome {
        let history = std::mem::take(&mut self.history);
        let replicator = Replicator::new(self.me.clone(), self.incarnation, entry, history);
        let release = std::mem::take(&mut self.held);
        let promotions = self.promotions + self.yielded;
        let disk = GuestDisk::Image(Arc::clone(&self.disk));
        Outcome::Run(Box::new(Beginning {
            replicator,
            guest,
            disk,
            intent: self.intent.clone(),
            stint,
            release,
            promotions,
            secondary: self.runner_at,
            moved: true,
            planned: self.planned,
            last_changed: std::mem::replace(&mut self.rejoin, Rejoin::new(FRAMES, BLOCKS))
                .into_last_changed(),
        }))
    }
}
