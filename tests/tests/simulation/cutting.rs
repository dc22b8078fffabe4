//! Cuts of a simulated runner: `primary::node::cutting`, function by function.

use colo_primary::checkpoint::copy_out;
use colo_primary::epoch::{SeedState, Stand, Turn, can_tell, fits, has_room, is_full, turn};
use colo_primary::replicator::Request;
use colo_primary::transfer::Epoch;
use colo_vmm::guest::Lifecycle;
use colo_vmm::{Cut, DiskDelta, ProtectedGuest};
use std::time::Instant;

use crate::common::Common;
use crate::net::{Msg, Way};
use crate::plan::INTERVAL;
use crate::runner::Runner;

/// Frames that wait on a link before it is taken for too far behind: `link::MAX_WAITING`.
const MAX_WAITING: usize = 400;

impl Runner {
    pub(crate) fn cut_if_due(&mut self, common: &mut Common) {
        if self.parked || self.failed || self.standing.is_some() || self.resting.is_some() {
            return;
        }
        let due = if self.is_shipping() {
            self.collect(common);
            let paced = common.now >= self.due;
            self.cut_now
                || self.holds_guest()
                || self.is_epoch_full(common)
                || (self.has_room(common) && paced)
        } else {
            self.cut_now || self.seed_is_ready(common)
        };
        if due {
            self.cut(common);
        }
    }

    pub(crate) fn collect(&mut self, common: &mut Common) {
        let (blocks, kept) = self.guest.collect_blocks();
        self.dirty.add_blocks(&blocks);
        self.disk_bytes = kept as u64;
        match self.guest.collect(&mut self.dirty.pages) {
            Ok(tracked) => self.check_tracked(tracked, common),
            Err(e) => common.outside.broken(|| format!("the guest's writes are not told: {e}")),
        }
    }

    /// The cut of the guest, and the output of the epoch that it ends: in `cut` and `park`.
    fn stop_guest(&mut self, common: &mut Common) -> Option<Cut> {
        let mut cut = match self.guest.cut(&mut self.dirty.pages) {
            Ok(cut) => cut,
            Err(e) => {
                common.outside.broken(|| format!("the guest cannot be cut: {e}"));
                return None;
            }
        };
        common.count("cuts");
        self.check_tracked(cut.tracked, common);
        let output = std::mem::take(&mut cut.output);
        self.release.hold(self.replicator.next_point().epoch, output);
        self.disk_bytes = 0;
        self.dirty.add_disk(std::mem::replace(&mut cut.disk, DiskDelta::none()));
        if !self.is_shipping() {
            self.dirty.forget_bytes();
        }
        Some(cut)
    }

    fn cut(&mut self, common: &mut Common) {
        self.cut_now = false;
        let Some(cut) = self.stop_guest(common) else { return };
        self.due = common.now + INTERVAL;
        let failed = cut.failed.is_some();
        self.standing = Some(cut);
        if failed {
            self.guest_failed(common);
        }
    }

    pub(crate) fn ship_if_possible(&mut self, common: &mut Common) {
        if self.standing.is_none() || self.parked || self.stopping || self.failed {
            return;
        }
        let seed = SeedState {
            is_idle: self.seed_is_ready(common),
            waits_for_rest: self.seed.as_ref().is_some_and(|seed| seed.waits_for_rest),
        };
        let stand = Stand {
            is_sound: !self.unknown && self.fits_epoch(common) && self.can_tell(),
            has_room: self.has_room(common),
            may_leave: common.plan.solo_on_loss || self.replicator.is_linked(),
            seed,
        };
        match turn(self.replicator.phase(), stand) {
            Turn::Wait => {}
            Turn::Number => self.number_alone(common),
            Turn::Complete => self.send_rest_or_join(common),
            Turn::Ship => self.ship(false, common),
            Turn::GiveUp => self.give_up_epochs(common),
        }
    }

    fn number_alone(&mut self, common: &mut Common) {
        let Some(cut) = self.standing.take() else { return };
        let (point, _, actions) = self.replicator.cut(self.dirty.fresh(), request(&cut), false);
        common.note(self.x, || format!("cuts {point} for nobody"));
        common.outside.cut(self.stint, point, &self.guest, &cut.state);
        self.go_on(cut, common);
        self.act(actions, common);
    }

    fn give_up_epochs(&mut self, common: &mut Common) {
        common.count("epochs given up");
        common.note(self.x, || "gives its epochs up".to_owned());
        let actions = self.replicator.go_solo();
        self.act(actions, common);
    }

    pub(crate) fn ship(&mut self, join: bool, common: &mut Common) {
        let disk = self.disk.disk();
        let blocks = self.dirty.disk_part(Some(&*disk)).expect("the disk can be read");
        common.counts.add("writes to the disk shipped", blocks.len() as u64);
        let Some(cut) = self.standing.take() else { return };
        let pages = match copy_out(self.guest.memory(), &self.dirty.pages, &common.pool) {
            Ok((pages, _)) => pages,
            Err(e) => return common.outside.broken(|| format!("the guest's memory cannot be copied: {e}")),
        };
        let fresh = self.dirty.fresh();
        let carried = std::mem::replace(&mut self.dirty, fresh);
        let (point, shipped, actions) = self.replicator.cut(carried, request(&cut), join);
        assert!(shipped, "{point} was to be sent in {:?}", self.replicator.phase());
        common.outside.cut(self.stint, point, &self.guest, &cut.state);
        common.count(if join { "joins" } else { "epochs" });
        common.note(self.x, || format!("ships {point}{}", if join { " as J" } else { "" }));
        let state = cut.state.clone();
        self.track_disk(common);
        self.go_on(cut, common);
        let Some(peer) = &mut self.peer else { return self.act(actions, common) };
        let output =
            if peer.resend_output { self.release.all_held() } else { self.release.held_of(point.epoch) };
        peer.resend_output = false;
        let epoch = Epoch {
            point,
            base: peer.base.replace(point),
            history: self.replicator.history().points().to_vec(),
            pages,
            blocks,
            state,
            output,
            released: self.release.released(),
            promotions: self.promotions,
            cut_at: Instant::now(),
        };
        if common.net.waiting(peer.link, Way::Transfers) > MAX_WAITING {
            return self.lose_link(common);
        }
        let (link, mut frames) = (peer.link, Vec::new());
        peer.encoder.epoch(epoch, |frame| frames.push(frame));
        peer.encoder = colo_primary::encode::Encoder::new(common.tag(), point);
        for frame in frames {
            common.send(link, Way::Transfers, Msg::Frame(Box::new(frame)));
        }
        self.act(actions, common);
    }

    fn go_on(&mut self, cut: Cut, common: &mut Common) {
        if cut.state.pending.is_some() || self.holds_guest() {
            self.resting = Some(cut);
            return;
        }
        self.resume(common);
    }

    pub(crate) fn reset_guest(&mut self, common: &mut Common) {
        common.count("resets");
        common.note(self.x, || "resets the guest".to_owned());
        self.park(common);
        self.standing = None;
        self.resting = None;
        if let Err(e) = self.guest.reset() {
            common.outside.broken(|| format!("the guest is not reset: {e}"));
        }
        self.resume(common);
    }

    pub(crate) fn park(&mut self, common: &mut Common) {
        if let Some(cut) = self.standing.take() {
            self.resting = Some(cut);
        }
        if self.resting.is_none() {
            self.resting = self.stop_guest(common);
        }
    }

    pub(crate) fn send_resting_again(&mut self) {
        if let Some(cut) = self.resting.take_if(|_| !self.parked && !self.stopping && !self.failed) {
            self.standing = Some(cut);
        }
    }

    pub(crate) fn has_room(&self, common: &Common) -> bool {
        let (in_flight, held) = (self.replicator.in_flight(), self.release.size());
        self.replicator.is_linked() && has_room(in_flight, common.plan.window, held, self.epoch_limit(common))
    }

    fn is_epoch_full(&self, common: &Common) -> bool {
        let kept = if common.mutations.kept_blocks_uncounted { 0 } else { self.disk_bytes };
        is_full(self.dirty.bytes() + kept, self.epoch_limit(common))
    }

    fn can_tell(&self) -> bool {
        self.peer.as_ref().is_none_or(|peer| {
            let next = self.replicator.next_point().epoch;
            let told = if peer.resend_output { self.release.size() } else { self.release.size_of(next) };
            can_tell(told, peer.max_epoch_bytes)
        })
    }

    pub(crate) fn fits_epoch(&self, common: &Common) -> bool {
        if common.mutations.epochs_too_large && self.is_shipping() {
            return true;
        }
        fits(self.dirty.bytes(), self.epoch_limit(common))
    }

    /// The primary's own limit is as in its default far above what the secondary takes here.
    pub(crate) fn epoch_limit(&self, _common: &Common) -> u64 {
        self.agreed_epoch_bytes.min(1 << 28)
    }
}

fn request(cut: &Cut) -> Option<Request> {
    match cut.state.pending? {
        Lifecycle::Shutdown | Lifecycle::DebugExit(_) => Some(Request::End),
        Lifecycle::Reset(_) => Some(Request::Reset),
    }
}
