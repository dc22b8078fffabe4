//! Cuts: when, what becomes of them, and what follows for the guest.

use colo_common::Point;
use colo_common::limits::MAX_HISTORY;
use colo_vmm::guest::Lifecycle;
use colo_vmm::{Cut, Disk, DiskDelta};
use std::time::Instant;

use super::telling::SentEpoch;
use super::{Node, NodeError};
use crate::checkpoint::{Standing, Timing, copy_out};
use crate::epoch::{SeedState, Stand, Turn, can_tell, fits, has_room, is_full, turn};
use crate::replicator::{Phase, Request};
use crate::transfer::{Epoch, Transfer};

impl Node {
    pub(super) fn cut_if_due(&mut self, now: Instant) -> Result<(), NodeError> {
        if self.parked || self.failure.is_some() || self.standing.is_some() || self.resting.is_some() {
            return Ok(());
        }
        let due = if self.is_shipping() {
            self.collect()?;
            // With no room the guest runs on, as long as what it writes fits one epoch.
            self.cut_now
                || self.holds_guest()
                || self.is_epoch_full()
                || (self.has_room() && self.pacer.wait(now).is_zero())
        } else {
            self.cut_now || self.seed_is_ready()?
        };
        if due { self.cut(now) } else { Ok(()) }
    }

    /// Takes what is known to be dirty without stopping the guest.
    pub(super) fn collect(&mut self) -> Result<(), NodeError> {
        let tracked = self.guest.collect(&mut self.dirty.pages)?;
        let (blocks, kept) = self.guest.collect_blocks();
        self.dirty.add_blocks(&blocks);
        self.disk_bytes = kept as u64;
        self.check_tracked(tracked);
        Ok(())
    }

    fn cut(&mut self, now: Instant) -> Result<(), NodeError> {
        let Point { term, epoch } = self.replicator.next_point();
        let _span = tracing::debug_span!("cut", term = term.0, epoch = epoch.0).entered();
        self.cut_now = false;
        let cut = self.stop_guest()?;
        self.pacer.cut(now);
        let failed = cut.failed.clone();
        self.standing = Some(Standing { cut, since: now });
        failed.map_or(Ok(()), |failure| self.guest_failed(failure))
    }

    /// Cuts the guest. What it said and wrote is of the epoch that this cut ends, whenever that is sent.
    fn stop_guest(&mut self) -> Result<Cut, NodeError> {
        if let Some(disk) = &self.disk {
            disk.open(self.replicator.next_point().epoch.next());
        }
        let mut cut = self.guest.cut(&mut self.dirty.pages)?;
        self.check_tracked(cut.tracked);
        let output = std::mem::take(&mut cut.output);
        self.release.hold(self.replicator.next_point().epoch, output);
        self.disk_bytes = 0;
        self.dirty.add_disk(std::mem::replace(&mut cut.disk, DiskDelta::none()));
        if !self.is_shipping() {
            self.dirty.forget_bytes();
        }
        Ok(cut)
    }

    /// Sends a guest's epoch that stands still, as soon as there is room, and lets the guest go on.
    pub(super) fn ship_if_possible(&mut self) -> Result<(), NodeError> {
        if self.standing.is_none() || self.parked || self.stopping || self.failure.is_some() {
            return Ok(());
        }
        let seed = SeedState {
            is_idle: self.seed_is_ready()?,
            waits_for_rest: self.seed.as_ref().is_some_and(|seed| seed.waits_for_rest),
        };
        let stand = Stand {
            is_sound: !self.unknown && !self.disk_fails && self.fits_epoch() && self.can_tell(),
            has_room: self.has_room(),
            may_leave: self.settings.solo_on_loss || self.replicator.is_linked(),
            seed,
        };
        match turn(self.replicator.phase(), stand) {
            Turn::Wait => Ok(()),
            Turn::Number => self.number_alone(),
            Turn::Complete => self.send_rest_or_join(),
            Turn::Ship => self.ship(false),
            Turn::GiveUp => self.give_up_epochs(),
        }
    }

    /// Nobody has to hold this epoch: it only gives the guest's request a place in the order of things.
    fn number_alone(&mut self) -> Result<(), NodeError> {
        let Some(Standing { cut, .. }) = self.standing.take() else { return Ok(()) };
        let (_, _, actions) = self.replicator.cut(self.dirty.fresh(), request(&cut), false);
        self.go_on(cut)?;
        self.act(actions)
    }

    /// No epoch can be made of this cut: the tracker lost writes, or what failed and was merged is too much for one. The
    /// guest stands until this node runs alone; then the secondary gets what it lacks while the guest runs.
    fn give_up_epochs(&mut self) -> Result<(), NodeError> {
        let actions = self.replicator.go_solo();
        self.act(actions)
    }

    /// Sends the epoch. The guest goes on before anything is on the wire.
    pub(super) fn ship(&mut self, join: bool) -> Result<(), NodeError> {
        let blocks = match self.dirty.disk_part(self.disk.as_deref().map(|disk| disk as &dyn Disk)) {
            Ok(blocks) => blocks,
            Err(e) => return self.disk_failed(&e),
        };
        let Some(Standing { cut, since }) = self.standing.take() else { return Ok(()) };
        let (pages, copy) = copy_out(self.guest.memory(), &self.dirty.pages, &self.pool)?;
        let fresh = self.dirty.fresh();
        let carried = std::mem::replace(&mut self.dirty, fresh);
        let (point, shipped, actions) = self.replicator.cut(carried, request(&cut), join);
        assert!(shipped, "{point} was to be sent in {:?}", self.replicator.phase());
        let timing = Timing { cut: cut.timing, copy, pause: since.elapsed() };
        let _span = tracing::debug_span!("ship", term = point.term.0, epoch = point.epoch.0).entered();
        tracing::debug!(pages = pages.len(), pause = ?timing.pause, "the epoch is on its way");
        self.pacer.paused(timing.cut.stop + timing.cut.save + timing.cut.harvest + copy);
        let state = cut.state.clone();
        // Before the guest goes on.
        let under_way = self.under_way();
        self.track_disk();
        self.go_on(cut)?;
        let verify = self.verify_at(point, &pages, &blocks, &under_way);
        let Some(peer) = &mut self.peer else { return self.act(actions) };
        let output =
            if peer.resend_output { self.release.all_held() } else { self.release.held_of(point.epoch) };
        peer.resend_output = false;
        let history = self.replicator.history().points();
        self.sent.push_back(SentEpoch::new(point, timing, since, &state));
        let epoch = Epoch {
            point,
            base: peer.base.replace(point),
            history: history[history.len().saturating_sub(MAX_HISTORY)..].to_vec(),
            pages,
            blocks,
            state,
            output,
            released: self.release.released(),
            promotions: self.promotions,
            cut_at: since,
        };
        let sent = peer.link.send(Transfer::Epoch(Box::new(epoch)));
        let sent = sent.and_then(|()| verify.map_or(Ok(()), |list| peer.link.send(Transfer::Verify(list))));
        if let Err(reason) = sent {
            tracing::warn!(vm = %self.vm, "{point} cannot be sent: {reason}");
            self.act(actions)?;
            return self.lose_link();
        }
        self.act(actions)
    }

    /// The disk cannot be read, so no epoch can be made of what was written to it: this node asks to run alone, once.
    fn disk_failed(&mut self, error: &std::io::Error) -> Result<(), NodeError> {
        let why = format!("the guest's disk cannot be read, so it cannot be protected: {error}");
        tracing::error!(vm = %self.vm, "{why}");
        self.board.error(why);
        self.disk_fails = true;
        if matches!(self.replicator.phase(), Phase::Paired { .. } | Phase::Pairing { .. }) {
            return self.give_up_epochs();
        }
        self.lose_link()
    }

    /// Lets the guest go on after its cut, unless it asked for something, or is about to move: then it rests until that is
    /// carried out.
    fn go_on(&mut self, cut: Cut) -> Result<(), NodeError> {
        if cut.state.pending.is_some() || self.holds_guest() {
            self.resting = Some(cut);
            return Ok(());
        }
        Ok(self.guest.resume()?)
    }

    /// A guest that is about to move stands from its next cut on.
    pub(super) fn holds_guest(&self) -> bool {
        self.switching.as_ref().is_some_and(super::switching::Switching::holds_guest)
    }

    pub(super) fn reset_guest(&mut self) -> Result<(), NodeError> {
        // One that was handed back runs already.
        self.park()?;
        self.standing = None;
        self.resting = None;
        tracing::info!(vm = %self.vm, "the guest begins anew");
        self.guest.reset()?;
        Ok(self.guest.resume()?)
    }

    /// Stops the guest where it is, for as long as somebody else may run it, or for good.
    pub(super) fn park(&mut self) -> Result<(), NodeError> {
        if let Some(Standing { cut, .. }) = self.standing.take() {
            self.resting = Some(cut);
        }
        if self.resting.is_none() {
            self.resting = Some(self.stop_guest()?);
        }
        Ok(())
    }

    /// What was in flight failed: a guest that rests after its epoch was sent has to be sent again.
    pub(super) fn send_resting_again(&mut self) {
        if let Some(cut) = self.resting.take_if(|_| !self.parked && !self.stopping && self.failure.is_none())
        {
            self.standing = Some(Standing { cut, since: Instant::now() });
        }
    }

    fn has_room(&self) -> bool {
        let (in_flight, held) = (self.replicator.in_flight(), self.release.size());
        self.replicator.is_linked() && has_room(in_flight, self.settings.window, held, self.epoch_limit())
    }

    fn is_epoch_full(&self) -> bool {
        is_full(self.dirty.bytes() + self.disk_bytes, self.epoch_limit())
    }

    /// Whether the next epoch's output, and what has to be told again with it, is not too much for the secondary.
    fn can_tell(&self) -> bool {
        self.peer.as_ref().is_none_or(|peer| {
            let next = self.replicator.next_point().epoch;
            let told = if peer.resend_output { self.release.size() } else { self.release.size_of(next) };
            can_tell(told, peer.max_epoch_bytes)
        })
    }

    /// Whether the open set makes an epoch that the secondary takes.
    pub(super) fn fits_epoch(&self) -> bool {
        fits(self.dirty.bytes(), self.epoch_limit())
    }

    /// Bytes of an epoch at most. Without a link, as agreed on with the secondary that had it: it may come back.
    pub(super) fn epoch_limit(&self) -> u64 {
        self.agreed_epoch_bytes.min(self.settings.max_epoch_bytes)
    }
}

fn request(cut: &Cut) -> Option<Request> {
    match cut.state.pending? {
        Lifecycle::Shutdown | Lifecycle::DebugExit(_) => Some(Request::End),
        Lifecycle::Reset(_) => Some(Request::Reset),
    }
}
