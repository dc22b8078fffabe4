//! The copy of everything that a secondary lacks, while the guest runs, and the epoch that makes that copy whole.
//!
//! Logging is on before the [`copier`](super::copier) starts, so whatever it reads torn is dirty and comes again, of the
//! memory as of the disk. Rounds of dirty pages and blocks follow until few are left; those go with J.
//!
//! A secondary that was lost may come back with its copy, and so may the node that ran the guest before. For a while the
//! guest's writes are still tracked, so that a copy is sent only those; else everything is compared by digests, or sent.

use colo_common::Epoch;
use colo_common::telemetry::in_node;
use colo_proto::message::SeedPart;
use colo_vmm::Disk;
use crossbeam_channel::Sender;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copier::{Copier, First, Order, Round};
use super::{Node, NodeError};
use crate::link::{Answer, LinkHandle};
use crate::rejoin::plan;
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
    began: Instant,
    /// Written of its pages and blocks.
    bytes: u64,
    /// The guest stands still and the rest of its dirty pages is on its way: J is next.
    pub(super) waits_for_rest: bool,
}

impl Node {
    /// Logging first, then the copy: what is written behind the copy's back is in the dirty set.
    pub(super) fn begin_seed(
        &mut self,
        number: u64,
        link: &LinkHandle,
        offer: &Offer,
    ) -> Result<(), NodeError> {
        // Before anything is read: what is written from now on is known.
        self.track_disk();
        self.disk_fails = false;
        let first = self.first_pass(offer)?;
        self.board.seed_begins(first.mode, first.to_string(), first.why.clone());
        let why = &first.why;
        tracing::info!(vm = %self.vm, "a copy begins: {first}{}{why}", if why.is_empty() { "" } else { "; " });
        let begin =
            Transfer::SeedBegin { mode: first.mode, history: self.replicator.history().points().to_vec() };
        let (orders, inbox) = crossbeam_channel::bounded(MAX_ORDERS);
        let memory = Arc::clone(self.guest.memory());
        let disk = self.disk.clone().map(|disk| disk as Arc<dyn Disk>);
        let copier = Copier::new(number, (memory, disk), link.clone(), inbox, self.outbox.clone());
        let thread = std::thread::Builder::new().name(format!("seed-{}", self.vm));
        thread.spawn(in_node(move || copier.run(begin, first))).map_err(NodeError::Thread)?;
        self.seed = Some(SeedJob {
            number,
            orders,
            busy: true,
            rounds: 0,
            began: Instant::now(),
            bytes: 0,
            waits_for_rest: false,
        });
        Ok(())
    }

    /// What is sent first. Everything known to be dirty goes into the tables of what was changed last, so that the open
    /// set has what is written from here on.
    fn first_pass(&mut self, offer: &Offer) -> Result<First, NodeError> {
        self.kept_since = None;
        let tracked = self.last_changed.known().memory.is_some();
        if tracked {
            self.collect()?;
        }
        if !tracked || self.unknown {
            self.track_anew()?;
        }
        self.account_open();
        if self.last_changed.known().disk.is_none() {
            // Too much for its table; what is of the epochs after the next cut will be known again.
            self.last_changed.blocks.begin(self.replicator.next_point().epoch);
        }
        let history = self.replicator.history();
        let plan = plan(history, self.last_changed.known(), offer, self.send_all);
        let (mode, why) = (plan.mode, plan.reasons(self.disk.is_some(), self.forgot.take()));
        let pages = since(mode.memory, |epoch| self.last_changed.pages_since(epoch));
        let blocks = since(mode.disk, |epoch| self.last_changed.blocks_since(epoch));
        Ok(First { mode, why, pages, blocks })
    }

    /// Begins to track the guest's writes, with nothing known of those before.
    fn track_anew(&mut self) -> Result<(), NodeError> {
        self.guest.unprotect()?;
        self.guest.protect()?;
        self.dirty = self.dirty.fresh();
        self.unknown = false;
        // The epoch that is open began before this.
        self.last_changed.begin(self.replicator.next_point().epoch);
        Ok(())
    }

    /// What is in the open set is of the next epoch at the latest; the set is empty after that.
    fn account_open(&mut self) {
        let fresh = self.dirty.fresh();
        let changes = std::mem::replace(&mut self.dirty, fresh);
        self.last_changed.mark(&changes, self.replicator.next_point().epoch);
    }

    /// Nobody follows. What the guest writes from now on is of use only to a copy that may come back.
    pub(super) fn keep_or_forget(&mut self) -> Result<(), NodeError> {
        if !matches!(self.replicator.phase(), Phase::Alone) || self.peer.is_some() {
            return Ok(());
        }
        if self.last_changed.known().memory.is_some() && !self.unknown {
            self.kept_since.get_or_insert_with(Instant::now);
            return Ok(());
        }
        self.forget_copy("what was written was not tracked, or lost track of")
    }

    /// What is kept for a copy that may come back is not kept for ever.
    pub(super) fn forget_if_late(&mut self, now: Instant) -> Result<(), NodeError> {
        let Some(since) = self.kept_since.filter(|_| self.peer.is_none()) else { return Ok(()) };
        self.collect()?;
        let much = self.dirty.pages.len() > self.dirty.pages.frames() / KEEP_SHARE;
        let why = if self.unknown {
            "the dirty ring has overrun meanwhile"
        } else if much {
            "more than half of the memory was written meanwhile"
        } else if now.duration_since(since) > KEEP_LIMIT {
            "what is written is kept for 10 minutes after a loss"
        } else {
            return Ok(());
        };
        self.forget_copy(why)
    }

    fn forget_copy(&mut self, why: &'static str) -> Result<(), NodeError> {
        if self.kept_since.take().is_some() {
            tracing::info!(vm = %self.vm, "a copy that comes back will be compared by digests: {why}");
        }
        self.forgot.get_or_insert(why);
        self.last_changed.forget();
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
            self.order_round();
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
            self.order_round();
            return Ok(());
        }
        if let Some(seed) = self.seed.take() {
            let ms = seed.began.elapsed().as_millis();
            tracing::info!(vm = %self.vm, bytes = seed.bytes, ms, "the copy is sent, but for what is changed since");
        }
        self.ship(true)
    }

    /// Has everything that was changed sent.
    fn order_round(&mut self) {
        let Some(seed) = &mut self.seed else { return };
        self.last_changed.mark(&self.dirty, self.replicator.next_point().epoch);
        seed.busy = true;
        // Its thread ends only with the link, which is told on its own.
        drop(seed.orders.send(Order::Round(Round::of(&mut self.dirty))));
    }
}

/// What was changed since the point that a part begins from.
fn since<S>(part: SeedPart, table: impl Fn(Epoch) -> Option<S>) -> Option<S> {
    match part {
        SeedPart::Since(point) => table(point.epoch),
        SeedPart::All | SeedPart::Differing => None,
    }
}

impl SeedJob {
    /// So many bytes of it are written.
    pub(super) fn count(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// Passes on what the secondary was asked for; false if there is more than that.
    pub(super) fn pass_on(&self, answer: Answer) -> bool {
        self.orders.try_send(Order::Answer(answer)).is_ok()
    }
}
