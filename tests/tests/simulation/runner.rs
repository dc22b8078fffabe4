//! A node that runs the guest: `primary::node::Node` without its threads and clocks. Each step names the function there
//! that it mirrors.

use colo_common::register::StopReason;
use colo_common::{Incarnation, Point};
use colo_primary::arbiter_worker::Found;
use colo_primary::changes::Changes;
use colo_primary::encode::Encoder;
use colo_primary::epoch::disk_share;
use colo_primary::last_changed::LastChanged;
use colo_primary::node::status::{Role, Status};
use colo_primary::release::Release;
use colo_primary::replicator::{Action, Carried, End, Entitled, Phase, Replicator};
use colo_secondary::disk::DiskImage;
use colo_vmm::guest::{GuestEvent, Tracked};
use colo_vmm::synthetic::SyntheticGuest;
use colo_vmm::{Cut, Disk, DiskTracking, ProtectedGuest};
use std::sync::Arc;
use std::time::Duration;

use crate::common::{ArbiterClient, Common};
use crate::healing::{Healing, RETURN};
use crate::image_file::ImageFile;
use crate::intent::Intent;
use crate::net::{Msg, Way};
use crate::outside::Outlet;
use crate::plan::{BLOCKS, FOLDED, FRAMES, INTERVAL, READ_INTERVAL, STEADY, Time};
use crate::seeding::SeedJob;
use crate::switching::Switching;

/// `node::Peer`, with the encoder of its link.
pub(crate) struct Peer {
    pub(crate) link: u64,
    pub(crate) base: Option<Point>,
    pub(crate) resend_output: bool,
    pub(crate) max_epoch_bytes: u64,
    pub(crate) encoder: Encoder,
}

/// `node::Linking`.
pub(crate) enum Linking {
    Idle,
    Connecting { link: u64, purpose: colo_primary::link::Purpose, since: Time },
    Waiting { until: Time },
}

/// `node::Node`.
pub(crate) struct Runner {
    pub(crate) x: usize,
    pub(crate) incarnation: Incarnation,
    pub(crate) replicator: Replicator<Changes>,
    pub(crate) guest: SyntheticGuest,
    pub(crate) disk: GuestDisk,
    pub(crate) intent: Intent,
    pub(crate) stint: usize,
    pub(crate) release: Release,
    pub(crate) dirty: Changes,
    /// Bytes of an epoch that the last secondary takes.
    pub(crate) agreed_epoch_bytes: u64,
    /// Bytes of writes to the disk that are kept for the next cut.
    pub(crate) disk_bytes: u64,
    tracking: DiskTracking,
    pub(crate) due: Time,
    pub(crate) standing: Option<Cut>,
    pub(crate) resting: Option<Cut>,
    pub(crate) parked: bool,
    pub(crate) stopping: bool,
    pub(crate) cut_now: bool,
    pub(crate) unknown: bool,
    pub(crate) failed: bool,
    pub(crate) peer: Option<Peer>,
    pub(crate) linking: Linking,
    pub(crate) secondary: Option<usize>,
    pub(crate) paused_secondary: Option<usize>,
    pub(crate) lost_since: Option<Time>,
    pub(crate) seed: Option<SeedJob>,
    pub(crate) switching: Option<Switching>,
    pub(crate) last_changed: LastChanged,
    pub(crate) kept_since: Option<Time>,
    pub(crate) arbiter: ArbiterClient,
    next_read: Time,
    next_offer: Time,
    pub(crate) promotions: u32,
    began: Time,
    /// In a cluster, whoever may protect the vm is found without an operator.
    pub(crate) healing: Option<Healing>,
    /// The account that operators see, as far as it is about protection.
    pub(crate) status: Status,
    pub(crate) end: Option<End>,
}

/// Where the guest's disk is: in a file alone, or with an overlay of what was acked.
#[derive(Clone)]
pub(crate) enum GuestDisk {
    File(ImageFile),
    Image(Arc<DiskImage>),
}

impl GuestDisk {
    pub(crate) fn disk(&self) -> Arc<dyn Disk> {
        match self {
            Self::File(file) => Arc::new(file.clone()),
            Self::Image(image) => Arc::clone(image) as _,
        }
    }

    /// A round of the thread that folds: a store that is full stops it and nothing else.
    fn fold(&self, common: &mut Common) {
        if let Self::Image(image) = self {
            common.counts.add("blocks folded under a guest", image.fold(FOLDED).unwrap_or(0));
        }
    }
}

/// What a runner begins with: `node::Beginning`.
pub(crate) struct Beginning {
    pub(crate) replicator: Replicator<Changes>,
    pub(crate) guest: SyntheticGuest,
    pub(crate) disk: GuestDisk,
    pub(crate) intent: Intent,
    pub(crate) stint: usize,
    pub(crate) release: Release,
    pub(crate) promotions: u32,
    pub(crate) secondary: Option<usize>,
    pub(crate) last_changed: LastChanged,
    /// It ran elsewhere before.
    pub(crate) moved: bool,
    /// That node moved it here on purpose.
    pub(crate) planned: bool,
}

impl Runner {
    /// `Node::new` and the beginning of `Node::run`.
    pub(crate) fn new(x: usize, incarnation: Incarnation, beginning: Beginning, common: &mut Common) -> Self {
        let Beginning {
            mut replicator,
            mut guest,
            disk,
            intent,
            stint,
            release,
            promotions,
            secondary,
            last_changed,
            moved,
            planned,
        } = beginning;
        replicator.mutate(common.mutations.runner);
        if last_changed.known().memory.is_some() {
            // `Node::track_disk` before the first vCPU runs.
            guest.track_disk(DiskTracking::Blocks);
        }
        if let Err(e) = guest.resume() {
            common.outside.broken(|| format!("the guest does not run: {e}"));
        }
        // What no two runs have in common: without it, two histories might say the same.
        guest.console_input(format!("node {x} at {}\n", common.now).as_bytes());
        let now = common.now;
        let mut runner = Self {
            x,
            incarnation,
            replicator,
            guest,
            disk,
            intent,
            stint,
            release,
            dirty: Changes::none(FRAMES, BLOCKS),
            agreed_epoch_bytes: u64::MAX,
            disk_bytes: 0,
            tracking: if last_changed.known().memory.is_some() {
                DiskTracking::Blocks
            } else {
                DiskTracking::Off
            },
            due: now + INTERVAL,
            standing: None,
            resting: None,
            parked: false,
            stopping: false,
            cut_now: false,
            unknown: false,
            failed: false,
            peer: None,
            linking: Linking::Idle,
            secondary,
            paused_secondary: None,
            lost_since: None,
            seed: None,
            switching: None,
            kept_since: last_changed.known().memory.map(|_| now),
            last_changed,
            arbiter: ArbiterClient::of(x),
            next_read: now + READ_INTERVAL,
            next_offer: now,
            promotions,
            began: now,
            healing: common.membership.is_some().then(|| {
                let lacks = moved || secondary.is_some();
                Healing::new(lacks, planned.then_some(now + RETURN), common)
            }),
            status: Status::default(),
            end: None,
        };
        runner.keep_account(common);
        runner
    }

    /// A turn of `Node::run`: the guest moves, then what came meanwhile is handled.
    pub(crate) fn tick(&mut self, common: &mut Common) {
        self.guest.advance(common.plan.steps);
        while let Some(found) = self.arbiter.poll(common) {
            self.on_arbiter(found, common);
            self.settle(common);
        }
        self.copy(common);
        self.disk.fold(common);
        self.look_for_candidates(common);
        self.settle(common);
    }

    /// `Node::settle`.
    pub(crate) fn settle(&mut self, common: &mut Common) {
        if self.end.is_some() {
            return;
        }
        self.ask_guest(common);
        self.end_failed(common);
        self.go_on_switching(common);
        self.let_go_if_replaced(common);
        self.say_whether_wanted(common);
        self.look_for_secondary(common);
        if common.now >= self.next_read {
            self.next_read = common.now + READ_INTERVAL;
            self.arbiter.read();
            self.forget_if_late(common);
        }
        self.track_disk(common);
        if self.promotions > 0 && !self.failed && common.now - self.began > STEADY {
            self.promotions = 0;
        }
        self.cut_if_due(common);
        self.ship_if_possible(common);
        self.let_out(common);
        self.keep_account(common);
    }

    /// `Node::tell`, as far as it is about protection.
    fn keep_account(&mut self, common: &Common) {
        self.status.role = Role::of(self.replicator.phase());
        self.status.judge_protection(common.instant());
    }

    /// Time without protection, as the status tells it.
    pub(crate) fn told_unprotected(&self, common: &Common) -> Duration {
        let open = self.status.unprotected_since.map(|since| common.instant() - since);
        self.status.unprotected_before + open.unwrap_or_default()
    }

    /// `Node::ask_guest`.
    fn ask_guest(&mut self, common: &mut Common) {
        while let Some(event) = self.guest.next_event(Duration::ZERO) {
            match event {
                GuestEvent::Lifecycle(_) | GuestEvent::TrackingLost(_) => self.cut_now = true,
                GuestEvent::OutputFull => self.cut_now |= self.is_shipping(),
                // Its frames are made as steps go by, and nobody waits for one.
                GuestEvent::Output => {}
                GuestEvent::Failed(_) => self.guest_failed(common),
            }
        }
    }

    /// `Node::guest_failed`.
    pub(crate) fn guest_failed(&mut self, common: &mut Common) {
        if self.failed {
            return;
        }
        common.count("guest failures");
        common.note(self.x, || "the guest failed".to_owned());
        if common.counts.of("corruptions") == 0 {
            common
                .outside
                .broken(|| "the guest found memory or a disk that is not what it left there".to_owned());
        }
        self.failed = true;
        self.park(common);
        match (&self.peer, self.replicator.phase()) {
            (peer, Phase::Paired { .. }) if self.promotions < common.plan.max_promotions => {
                if let Some(link) = peer.as_ref().map(|peer| peer.link) {
                    common.send(link, Way::Say, Msg::Yield(true));
                }
            }
            _ => {
                let actions = self.replicator.stop(StopReason::Failed);
                self.act(actions, common);
            }
        }
    }

    /// `Node::end_failed`.
    fn end_failed(&mut self, common: &mut Common) {
        let alone = matches!(self.replicator.phase(), Phase::Alone) && !self.replicator.is_proposing();
        if self.failed && alone && !common.mutations.failed_guest_left {
            let actions = self.replicator.stop(StopReason::Failed);
            self.act(actions, common);
        }
    }

    /// `Node::on_arbiter`.
    fn on_arbiter(&mut self, found: Found, common: &mut Common) {
        self.arbiter.note(self.x, &found, common);
        self.switching.iter_mut().for_each(|switching| switching.answered = true);
        let actions = match found {
            Found::Answer(id, answer) => self.replicator.answer(id, answer),
            Found::Entry(entry) => self.replicator.observe(entry),
            Found::Silent(_) => return,
        };
        let term = self.replicator.register().term;
        let before = self.replicator.acked();
        self.act(actions, common);
        if let (Some(peer), Phase::Paired { .. }) = (&self.peer, self.replicator.phase()) {
            let link = peer.link;
            if before.is_none() {
                common.count("paired");
            }
            common.send(link, Way::Say, Msg::Term(term));
        }
    }

    /// `Node::act`.
    pub(crate) fn act(&mut self, actions: Vec<Action<Changes>>, common: &mut Common) {
        for action in actions {
            match action {
                Action::Propose(proposal) => {
                    common.note(self.x, || format!("proposes {}", proposal.entry()));
                    self.arbiter.propose(proposal);
                }
                Action::MergeBack(set) => {
                    common.count("failed epochs");
                    if common.mutations.failed_blocks_dropped {
                        self.dirty.pages.union_with(&set.pages);
                    } else {
                        let newer = std::mem::replace(&mut self.dirty, set);
                        self.dirty.merge(newer);
                    }
                    self.send_resting_again();
                }
                Action::Detach => {
                    self.drop_link(common);
                    self.keep_or_forget(common);
                }
                Action::Covered(point, changes) => self.last_changed.mark(&changes, point.epoch),
                Action::ResetGuest => self.reset_guest(common),
                Action::Park => {
                    common.count("parked");
                    self.parked = true;
                    self.park(common);
                }
                Action::Unpark => self.unpark(common),
                Action::End(end) => {
                    common.note(self.x, || format!("ends: {end:?}"));
                    self.let_out(common);
                    self.end = Some(end);
                }
            }
        }
    }

    fn unpark(&mut self, common: &mut Common) {
        common.count("hand-backs");
        common.note(self.x, || "is handed the guest back".to_owned());
        self.parked = false;
        self.standing = None;
        self.resting = None;
        self.keep_or_forget(common);
        if self.failed {
            let actions = self.replicator.stop(StopReason::Failed);
            self.act(actions, common);
        } else {
            self.resume(common);
        }
    }

    /// `Node::let_out`.
    fn let_out(&mut self, common: &mut Common) {
        let mut entitled = self.replicator.entitled();
        if common.mutations.release_before_ack && matches!(self.replicator.phase(), Phase::Paired { .. }) {
            entitled = Entitled::All;
        }
        let outlet = &mut Outlet(&mut common.outside, self.stint);
        self.release.let_out(entitled, outlet);
        if entitled == Entitled::All && !self.parked && self.standing.is_none() {
            let epoch = self.replicator.next_point().epoch;
            let output = self.guest.drain_output();
            self.release.hold(epoch, output);
            self.release.let_out(entitled, outlet);
        }
    }

    /// `Node::is_shipping`.
    pub(crate) fn is_shipping(&self) -> bool {
        matches!(
            self.replicator.phase(),
            Phase::Joining { .. } | Phase::Pairing { .. } | Phase::Paired { .. }
        )
    }

    /// `Node::track_disk`.
    pub(crate) fn track_disk(&mut self, common: &Common) {
        let wanted = if self.is_shipping() {
            DiskTracking::Bytes { most: disk_share(self.epoch_limit(common)) }
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

    /// `Node::check_tracked`.
    pub(crate) fn check_tracked(&mut self, tracked: Tracked, common: &mut Common) {
        if let Tracked::Unknown(_) = tracked {
            common.count("ring overruns");
            common.note(self.x, || "loses track of the guest's writes".to_owned());
            self.unknown = true;
            self.last_changed.forget();
        }
    }

    pub(crate) fn resume(&mut self, common: &mut Common) {
        if let Err(e) = self.guest.resume() {
            common.outside.broken(|| format!("the guest does not go on: {e}"));
        }
    }

    /// Mirrors what a parked runner does for its hand-back: `pairing::PairingClient::offer_hand_back`. Answers to whom,
    /// and since which term.
    pub(crate) fn offers_hand_back(&mut self, now: Time) -> Option<(colo_common::NodeId, colo_common::Term)> {
        let Phase::Lost { to } = self.replicator.phase() else { return None };
        if now < self.next_offer {
            return None;
        }
        self.next_offer = now + READ_INTERVAL;
        Some((to.value.runner().clone(), to.term))
    }
}
