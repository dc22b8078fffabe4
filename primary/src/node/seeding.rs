//! The copy of everything that a secondary lacks, while the guest runs, and the epoch that makes that copy whole.
//!
//! Logging is on before the [`copier`](super::copier) starts, so whatever it reads torn is dirty and comes again, of the
//! memory as of the disk. Rounds of dirty pages and blocks follow until few are left; those go with J.
//!
//! A secondary that was lost may come back with its copy. For a while the guest's writes are still tracked, so that it
//! is sent only those; else everything is compared by digests, or sent.

use colo_common::Point;
use colo_common::telemetry::in_node;
use crossbeam_channel::Sender;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copier::{Copier, First, Order, Round};
use super::{Node, NodeError};
use crate::changes::Changes;
use crate::link::{Digests, LinkHandle};
use crate::replicator::{Offer, Phase};
use crate::transfer::Transfer;

/// With so few dirty pages left, they are copied while the guest stands still.
const JOIN_PAGES: u64 = 2048;
/// Rounds of dirty pages while the guest runs: one that writes faster than it is copied never gets fewer.
const MAX_ROUNDS: u32 = 10;
/// Orders that may wait: more than the messages that answer one question for digests, if every other page is zero.
const MAX_ORDERS: usize = 256;
/// How long the writes of an unprotected guest are tracked for a copy that may come back.
const KEEP_LIMIT: Duration = Duration::from_secs(600);
/// Above this share of all frames, comparing costs no more than what is kept.
const KEEP_SHARE: u64 = 2;

/// What the thread that seeds tells.
#[derive(Debug)]
pub enum SeedEvent {
    /// Pages looked at, and pages in all.
    Progress {
        /// Looked at.
        done: u64,
        /// In all.
        total: u64,
    },
    /// Everything ordered so far is sent.
    Idle,
    /// It cannot go on.
    Failed(String),
}

/// A seed that is going on.
pub(super) struct SeedJob {
    number: u64,
    orders: Sender<Order>,
    busy: bool,
    rounds: u32,
    /// The guest stands still and the rest of its dirty pages is on its way: J is next.
    pub(super) waits_for_rest: bool,
}

impl Node {
    /// Logging first, then the copy: what is written behind the copy's back is in the dirty set. With a `base`, the
    /// dirty set has what was written since.
    pub(super) fn begin_seed(
        &mut self,
        number: u64,
        link: &LinkHandle,
        offer: &Offer,
        base: Option<Point>,
    ) -> Result<(), NodeError> {
        // Before anything is read: what is written from now on is known.
        self.track_disk();
        self.disk_fails = false;
        let first = self.first_pass(offer, base)?;
        let mode = first.mode();
        self.board.seed_begins(mode);
        tracing::info!(vm = %self.vm, "a copy begins: {first}");
        let begin = Transfer::SeedBegin { mode, history: self.replicator.history().points().to_vec() };
        let (orders, inbox) = crossbeam_channel::bounded(MAX_ORDERS);
        let memory = Arc::clone(self.guest.memory());
        let copier =
            Copier::new(number, (memory, self.disk.clone()), link.clone(), inbox, self.outbox.clone());
        let thread = std::thread::Builder::new().name(format!("seed-{}", self.vm));
        thread.spawn(in_node(move || copier.run(begin, first))).map_err(NodeError::Thread)?;
        self.seed = Some(SeedJob { number, orders, busy: true, rounds: 0, waits_for_rest: false });
        Ok(())
    }

    fn first_pass(&mut self, offer: &Offer, base: Option<Point>) -> Result<First, NodeError> {
        self.kept_since = None;
        if let Some(base) = base.filter(|_| !self.send_all) {
            self.collect()?;
            if !self.unknown {
                let round = Round::of(&mut self.dirty);
                return Ok(First::Since(base, round));
            }
        }
        self.guest.unprotect()?;
        self.guest.protect()?;
        self.dirty = self.dirty.fresh();
        self.unknown = false;
        Ok(match offer.staged.filter(|_| !self.send_all) {
            Some(_) => First::Differing,
            None => First::Populated,
        })
    }

    /// Nobody follows. What the guest writes from now on is of use only to a copy that may come back.
    pub(super) fn keep_or_forget(&mut self) -> Result<(), NodeError> {
        if !matches!(self.replicator.phase(), Phase::Alone) || self.peer.is_some() {
            return Ok(());
        }
        if self.replicator.kept_since().is_some() && !self.unknown {
            self.kept_since.get_or_insert_with(Instant::now);
            return Ok(());
        }
        self.forget_copy()
    }

    /// What is kept for a copy that may come back is not kept for ever.
    pub(super) fn forget_if_late(&mut self, now: Instant) -> Result<(), NodeError> {
        let Some(since) = self.kept_since.filter(|_| self.peer.is_none()) else { return Ok(()) };
        self.collect()?;
        let much = self.dirty.pages.len() > self.dirty.pages.frames() / KEEP_SHARE;
        if self.unknown || much || now.duration_since(since) > KEEP_LIMIT {
            return self.forget_copy();
        }
        Ok(())
    }

    fn forget_copy(&mut self) -> Result<(), NodeError> {
        self.kept_since = None;
        self.replicator.forget_copy();
        self.guest.unprotect()?;
        self.track_disk();
        self.dirty = self.dirty.fresh();
        self.unknown = false;
        Ok(())
    }

    pub(super) fn on_seed(&mut self, number: u64, event: SeedEvent) -> Result<(), NodeError> {
        let Some(seed) = self.seed.as_mut().filter(|seed| seed.number == number) else { return Ok(()) };
        match event {
            SeedEvent::Progress { done, total } => self.board.seeding(done, total),
            SeedEvent::Idle => {
                seed.busy = false;
                self.board.compared();
                return self.next_round();
            }
            SeedEvent::Failed(reason) => {
                self.board.error(reason);
                self.lose_link()?;
                // The next try may well fail as this one did.
                self.linking =
                    super::Linking::Waiting { until: Instant::now() + super::joining::REFUSED_BACKOFF };
                return Ok(());
            }
        }
        Ok(())
    }

    /// What was written meanwhile follows while the guest runs, as long as that is much and getting less.
    fn next_round(&mut self) -> Result<(), NodeError> {
        if self.standing.is_some() || self.parked {
            return Ok(());
        }
        self.collect()?;
        let (dirty, limit) = (self.dirty.count(), JOIN_PAGES);
        let Some(seed) = &mut self.seed else { return Ok(()) };
        if dirty > limit && seed.rounds < MAX_ROUNDS {
            seed.rounds += 1;
            seed.order(&mut self.dirty);
        }
        Ok(())
    }

    /// Whether J is next.
    pub(super) fn seed_is_ready(&mut self) -> Result<bool, NodeError> {
        if self.unknown && matches!(self.replicator.phase(), Phase::Seeding { .. }) {
            // Nothing of this seed can be relied on.
            self.lose_link()?;
            return Ok(false);
        }
        Ok(self.seed.as_ref().is_some_and(|seed| !seed.busy))
    }

    /// The guest stands still. What is too much for one epoch goes ahead of J.
    pub(super) fn send_rest_or_join(&mut self) -> Result<(), NodeError> {
        let too_much = !self.fits_epoch();
        if let Some(seed) = self.seed.as_mut().filter(|_| too_much) {
            seed.waits_for_rest = true;
            seed.order(&mut self.dirty);
            return Ok(());
        }
        self.seed = None;
        self.ship(true)
    }
}

impl SeedJob {
    /// Passes digests on that were asked for; false if there are more than that.
    pub(super) fn compare(&self, digests: Digests) -> bool {
        self.orders.try_send(Order::Digests(digests)).is_ok()
    }

    fn order(&mut self, dirty: &mut Changes) {
        self.busy = true;
        // Its thread ends only with the link, which is told on its own.
        drop(self.orders.send(Order::Round(Round::of(dirty))));
    }
}
