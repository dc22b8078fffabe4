//! Getting protected: a link to a secondary, the first copy of everything while the guest runs, and the epoch that
//! makes that copy whole.
//!
//! The first copy is made by a thread of its own, which reads guest memory behind the guest's back: logging is on
//! before it starts, so whatever it reads torn is dirty and comes again. Rounds of dirty pages follow until few are
//! left; those go with J.

use colo_common::{Gfn, PAGE_SIZE};
use colo_proto::message::{DigestRange, DigestRequest, PageDigest, RangeDigests};
use colo_vmm::page_batch::is_zero;
use colo_vmm::{DirtySet, GuestMemory, PageBatch, PagePool};
use crossbeam_channel::{Receiver, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::status::LinkState;
use super::{Event, Linking, Node, NodeError, Peer, RELINK_LIMIT};
use crate::link::{LinkEvent, LinkHandle, Purpose, Request, Welcomed};
use crate::replicator::{Offer, Phase};
use crate::transfer::Transfer;

/// Between two tries to reach a secondary.
const BACKOFF: Duration = Duration::from_millis(250);
/// Where the secondary has said no.
const REFUSED_BACKOFF: Duration = Duration::from_secs(2);
/// With so few dirty pages left, they are copied while the guest stands still.
const JOIN_PAGES: u64 = 2048;
/// Rounds of dirty pages while the guest runs: one that writes faster than it is copied never gets fewer.
const MAX_ROUNDS: u32 = 10;
/// Pages copied and sent at once.
const CHUNK_PAGES: u64 = 256;
/// Frames whose digests are asked for at once: 256 MiB, for which the answer has at most 1 MiB.
const DIGEST_WINDOW: u64 = 1 << 16;
/// Orders that may wait: more than the messages that answer one such question, if every other page is zero.
const MAX_ORDERS: usize = 256;
/// Pages between two reports of progress.
const REPORT_PAGES: u64 = 8192;

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

enum Order {
    /// Digests of what the secondary has; the first pass goes by them.
    Digests(RangeDigests),
    /// Send these frames.
    Round(Vec<(Gfn, u64)>),
}

impl Node {
    /// Looks for a secondary where one is wanted and none is there, and gives up one that stays away.
    pub(super) fn look_for_secondary(&mut self, now: Instant) -> Result<(), NodeError> {
        let paired = matches!(self.replicator.phase(), Phase::Paired { .. });
        if paired && !self.replicator.is_linked() && self.failure.is_none() {
            let since = *self.lost_since.get_or_insert(now);
            if self.settings.solo_on_loss && now - since > RELINK_LIMIT && !self.replicator.is_proposing() {
                tracing::warn!(vm = %self.vm, "the secondary is lost: asking to run alone");
                let actions = self.replicator.go_solo();
                self.act(actions)?;
            }
        }
        if let Linking::Waiting { until } = self.linking
            && now >= until
        {
            self.linking = Linking::Idle;
        }
        if matches!(self.linking, Linking::Idle)
            && let Some(purpose) = self.wanted_link()
            && let Some(address) = self.secondary.clone()
        {
            self.connect(address, purpose, None);
        }
        Ok(())
    }

    fn wanted_link(&self) -> Option<Purpose> {
        if self.peer.is_some() || self.parked || self.failure.is_some() {
            return None;
        }
        match self.replicator.phase() {
            Phase::Alone if !self.replicator.is_proposing() => Some(Purpose::Seed),
            Phase::Paired { replica, .. } => Some(Purpose::Link(*replica)),
            _ => None,
        }
    }

    pub(super) fn connect(
        &mut self,
        address: String,
        purpose: Purpose,
        asked: Option<super::operator::Reply>,
    ) {
        let number = self.next_link;
        self.next_link += 1;
        let request = Request {
            number,
            address,
            vm: self.vm.clone(),
            node: self.me.clone(),
            incarnation: self.incarnation,
            term: self.replicator.register().term,
            tip: self.replicator.history().tip().unwrap_or_default(),
            spec: self.spec.clone(),
            spec_digest: self.guest.spec().digest(),
            boot_files: self.guest.spec().boot_files(),
            purpose,
        };
        self.linking = Linking::Connecting { number, purpose, asked };
        self.connector.connect(request, self.outbox.clone());
    }

    pub(super) fn on_link(&mut self, number: u64, event: LinkEvent) -> Result<(), NodeError> {
        match &self.linking {
            Linking::Connecting { number: awaited, .. } if *awaited == number => {
                return self.on_connecting(number, event);
            }
            _ => {}
        }
        let Some(peer) = self.peer.as_ref().filter(|peer| peer.number == number) else { return Ok(()) };
        match event {
            LinkEvent::Up(_) => Ok(()),
            LinkEvent::Ack(ack) => self.on_ack(ack),
            LinkEvent::Progress(marks) => {
                self.board.change(|status| status.marks = marks);
                Ok(())
            }
            LinkEvent::Sent { point, bytes, pages } => {
                self.on_sent(point, bytes, pages);
                Ok(())
            }
            LinkEvent::Digests(digests) => {
                let taken = |seed: &SeedJob| seed.orders.try_send(Order::Digests(digests)).is_ok();
                if self.seed.as_ref().is_some_and(taken) {
                    return Ok(());
                }
                tracing::warn!(vm = %self.vm, "more digests than were asked for");
                self.lose_link()
            }
            LinkEvent::Refused(reason) | LinkEvent::Down(reason) => {
                tracing::warn!(vm = %self.vm, secondary = %peer.node, "the link is down: {reason}");
                self.board.error(format!("the link to {} is down: {reason}", peer.node));
                self.lose_link()
            }
        }
    }

    fn on_connecting(&mut self, number: u64, event: LinkEvent) -> Result<(), NodeError> {
        let waiting = Linking::Waiting { until: Instant::now() + BACKOFF };
        let Linking::Connecting { purpose, asked, .. } = std::mem::replace(&mut self.linking, waiting) else {
            return Ok(());
        };
        let failed = match event {
            LinkEvent::Up(welcomed) => match self.link_up(number, purpose, *welcomed) {
                Ok(None) => {
                    self.linking = Linking::Idle;
                    // Whoever asked looks at the account next, and must find the seed there.
                    self.tell();
                    super::operator::answer(asked, Ok(()));
                    return Ok(());
                }
                Ok(Some(reason)) => reason,
                Err(e) => return Err(e),
            },
            LinkEvent::Refused(reason) => {
                // It is there and has not the copy that the register names: no use to wait for it.
                if matches!(purpose, Purpose::Link(_)) && self.settings.solo_on_loss {
                    let actions = self.replicator.go_solo();
                    self.act(actions)?;
                } else {
                    self.linking = Linking::Waiting { until: Instant::now() + REFUSED_BACKOFF };
                }
                reason
            }
            LinkEvent::Down(reason) => reason,
            _ => "the secondary answered out of turn".to_owned(),
        };
        self.board.error(failed.clone());
        super::operator::answer(asked, Err(super::CommandError::Refused(failed)));
        Ok(())
    }

    /// A secondary is there. Answers why it cannot be used, if so.
    fn link_up(&mut self, number: u64, purpose: Purpose, up: Welcomed) -> Result<Option<String>, NodeError> {
        let Welcomed { link, node, offer, max_epoch_bytes, address, pulse } = up;
        let board = self.board.clone();
        let peer = |link: LinkHandle, base, resend_output| {
            board.linked(LinkState::new(node.clone(), address, pulse));
            Some(Peer { link, number, base, resend_output, max_epoch_bytes, node: node.clone() })
        };
        match purpose {
            Purpose::Link(_) => match self.replicator.relink(&node, &offer) {
                Ok(base) => {
                    self.peer = peer(link, Some(base), true);
                    self.send_resting_again();
                    Ok(None)
                }
                Err(e) => Ok(Some(e.to_string())),
            },
            Purpose::Seed => {
                if let Err(e) = self.replicator.seed(node.clone()) {
                    return Ok(Some(e.to_string()));
                }
                self.begin_seed(number, &link, &offer)?;
                self.peer = peer(link, None, true);
                Ok(None)
            }
        }
    }

    /// Logging first, then the copy: what is written behind the copy's back is in the dirty set.
    fn begin_seed(&mut self, number: u64, link: &LinkHandle, offer: &Offer) -> Result<(), NodeError> {
        self.guest.unprotect()?;
        self.guest.protect()?;
        self.dirty = DirtySet::new(self.dirty.frames());
        self.unknown = false;
        let resync = offer.staged.is_some() && !self.send_all;
        self.board.seed_begins(resync);
        let (orders, inbox) = crossbeam_channel::bounded(MAX_ORDERS);
        let begin = Transfer::SeedBegin { resync, history: self.replicator.history().points().to_vec() };
        let copier = Copier {
            number,
            memory: Arc::clone(self.guest.memory()),
            link: link.clone(),
            inbox,
            outbox: self.outbox.clone(),
            pool: PagePool::default(),
            done: 0,
            total: 0,
        };
        let thread = std::thread::Builder::new().name(format!("seed-{}", self.vm));
        thread.spawn(move || copier.run(begin, resync)).map_err(NodeError::Thread)?;
        self.seed = Some(SeedJob { number, orders, busy: true, rounds: 0, waits_for_rest: false });
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
                return self.lose_link();
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
        let (dirty, limit) = (self.dirty.len(), JOIN_PAGES);
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

    /// The link is of no more use; what was in flight failed.
    pub(super) fn lose_link(&mut self) -> Result<(), NodeError> {
        let merged = matches!(self.replicator.phase(), Phase::Pairing { .. } | Phase::Paired { .. });
        let (lost, failed) = (u64::from(self.peer.is_some()), self.replicator.in_flight() as u64);
        self.board.count(|counters| {
            counters.link_losses += lost;
            counters.failed_epochs += if merged { failed } else { 0 };
        });
        self.drop_link();
        // The secondary may have taken over.
        self.arbiter.read();
        let actions = self.replicator.link_lost();
        self.act(actions)?;
        self.stop_tracking_if_alone()
    }

    /// Nobody needs to know what a guest writes that nobody follows.
    pub(super) fn stop_tracking_if_alone(&mut self) -> Result<(), NodeError> {
        if matches!(self.replicator.phase(), Phase::Alone) && self.peer.is_none() {
            self.guest.unprotect()?;
            self.dirty = DirtySet::new(self.dirty.frames());
            self.unknown = false;
        }
        Ok(())
    }

    pub(super) fn drop_link(&mut self) {
        self.seed = None;
        self.sent.clear();
        if let Some(peer) = self.peer.take() {
            peer.link.close();
            // At once the first time: a secondary that lives must not be given cause to take over.
            self.linking = Linking::Waiting { until: Instant::now() };
        }
    }
}

impl SeedJob {
    fn order(&mut self, dirty: &mut DirtySet) {
        let runs = dirty.runs().collect();
        dirty.clear();
        self.busy = true;
        // Its thread ends only with the link, which is told on its own.
        drop(self.orders.send(Order::Round(runs)));
    }
}

/// The thread that reads guest memory and sends it.
struct Copier {
    number: u64,
    memory: Arc<GuestMemory>,
    link: LinkHandle,
    inbox: Receiver<Order>,
    outbox: Sender<Event>,
    pool: PagePool,
    done: u64,
    total: u64,
}

/// Why a copier stops: the link or the node is gone, or memory cannot be read.
struct Stopped(String);

impl Copier {
    fn run(mut self, begin: Transfer, resync: bool) {
        if let Err(Stopped(reason)) = self.copy(begin, resync) {
            self.tell(SeedEvent::Failed(reason));
        }
    }

    fn copy(&mut self, begin: Transfer, resync: bool) -> Result<(), Stopped> {
        self.send(begin)?;
        let populated = self.memory.populated().map_err(|e| Stopped(e.to_string()))?;
        self.total = populated.iter().map(|&(_, frames)| frames).sum();
        if resync {
            self.by_digests(&populated)?;
        } else {
            self.frames(&populated)?;
        }
        // J must not wait behind what is only queued.
        self.link.drain().map_err(Stopped)?;
        self.tell(SeedEvent::Idle);
        while let Ok(order) = self.inbox.recv() {
            if let Order::Round(runs) = order {
                self.total += runs.iter().map(|&(_, frames)| frames).sum::<u64>();
                self.frames(&runs)?;
                self.link.drain().map_err(Stopped)?;
                self.tell(SeedEvent::Idle);
            }
        }
        Ok(())
    }

    /// A frame that is equal is passed over: it would be dirty if it were written after it was looked at.
    fn by_digests(&mut self, populated: &[(Gfn, u64)]) -> Result<(), Stopped> {
        let limit = self.memory.layout().frame_limit();
        let mut at = 0;
        while at < limit {
            let window = DIGEST_WINDOW.min(limit - at);
            self.link.request_digests(DigestRequest { first: Gfn(at), frames: window }).map_err(Stopped)?;
            let end = at + window;
            while at < end {
                let digests = match self.inbox.recv() {
                    Ok(Order::Digests(digests)) => digests,
                    Ok(Order::Round(_)) => continue,
                    Err(_) => return Err(Stopped("the seed was given up".to_owned())),
                };
                if digests.first.0 != at || digests.end().0 > end || digests.end().0 == at {
                    return Err(Stopped(format!("digests from {} where {at:#x} was next", digests.first)));
                }
                at = digests.end().0;
                self.compare(digests, populated)?;
            }
        }
        Ok(())
    }

    /// Sends what differs from what the secondary has.
    fn compare(&mut self, digests: RangeDigests, populated: &[(Gfn, u64)]) -> Result<(), Stopped> {
        let mut first = digests.first.0;
        for range in digests.ranges {
            let frames = range.frames();
            match range {
                DigestRange::Zero { .. } => self.frames(&overlap(populated, first, frames))?,
                DigestRange::Pages(theirs) => {
                    let mut differing = DirtySet::new(self.memory.layout().frame_limit());
                    for (gfn, theirs) in (first..).map(Gfn).zip(theirs) {
                        let mut page = [0; PAGE_SIZE];
                        self.memory.read_page(gfn, &mut page).map_err(|e| Stopped(e.to_string()))?;
                        if PageDigest::of(&page) != theirs {
                            differing.insert(gfn);
                        }
                    }
                    self.done += frames - differing.len();
                    self.frames(&differing.runs().collect::<Vec<_>>())?;
                }
            }
            first += frames;
        }
        Ok(())
    }

    fn frames(&mut self, runs: &[(Gfn, u64)]) -> Result<(), Stopped> {
        for &(first, frames) in runs {
            for offset in (0..frames).step_by(CHUNK_PAGES as usize) {
                let count = CHUNK_PAGES.min(frames - offset);
                self.chunk(Gfn(first.0 + offset), count)?;
                self.done += count;
                if self.done % REPORT_PAGES < count {
                    self.tell(SeedEvent::Progress { done: self.done, total: self.total.max(self.done) });
                }
            }
        }
        Ok(())
    }

    fn chunk(&mut self, first: Gfn, count: u64) -> Result<(), Stopped> {
        let batch = PageBatch::copy(&self.memory, vec![(first, count)], &self.pool);
        let batch = batch.map_err(|e| Stopped(e.to_string()))?;
        if batch.iter().all(|(_, page)| is_zero(page)) {
            return self.send(Transfer::SeedZeros(vec![(first, count)]));
        }
        self.send(Transfer::SeedPages(batch))
    }

    fn send(&self, transfer: Transfer) -> Result<(), Stopped> {
        self.link.send_waiting(transfer).map_err(Stopped)
    }

    fn tell(&self, event: SeedEvent) {
        drop(self.outbox.send(Event::Seed(self.number, event)));
    }
}

/// The parts of `runs` (ascending) that lie in `frames` frames from `first` on.
fn overlap(runs: &[(Gfn, u64)], first: u64, frames: u64) -> Vec<(Gfn, u64)> {
    let end = first + frames;
    let at = runs.partition_point(|&(start, count)| start.0 + count <= first);
    let parts = runs[at..].iter().take_while(|(start, _)| start.0 < end);
    parts
        .map(|&(start, count)| {
            let (from, to) = (start.0.max(first), end.min(start.0 + count));
            (Gfn(from), to - from)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::overlap;
    use colo_common::Gfn;

    #[test]
    fn runs_are_cut_to_a_range() {
        let runs = [(Gfn(2), 3), (Gfn(10), 10)];
        assert_eq!(overlap(&runs, 0, 100), runs);
        assert_eq!(overlap(&runs, 3, 9), [(Gfn(3), 2), (Gfn(10), 2)]);
        assert_eq!(overlap(&runs, 5, 5), []);
        assert_eq!(overlap(&runs, 15, 1), [(Gfn(15), 1)]);
        assert_eq!(overlap(&runs, 20, 9), []);
    }
}
