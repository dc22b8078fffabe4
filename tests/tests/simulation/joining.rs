//! Getting protected: `primary::node::joining`, function by function. Its thread is a list of work that is done a bit at
//! a time, between the guest's steps.

use colo_common::{Gfn, PAGE_SIZE, Point};
use colo_primary::encode::Encoder;
use colo_primary::link::Purpose;
use colo_primary::replicator::{Ack, Offer, Phase};
use colo_proto::message::{DigestRange, DigestRequest, PageDigest, RangeDigests, SeedMode};
use colo_vmm::page_batch::is_zero;
use colo_vmm::{DirtySet, PageBatch, ProtectedGuest};
use std::collections::VecDeque;

use crate::common::{Common, name};
use crate::net::{Msg, Way};
use crate::plan::{
    BACKOFF, CHUNK_PAGES, DIGEST_WINDOW, FRAMES, HANDSHAKE_LIMIT, KEEP_LIMIT, MAX_ROUNDS, REFUSED_BACKOFF,
    RELINK_LIMIT,
};
use crate::runner::{Linking, Peer, Runner};

/// Chunks on their way before the copying thread waits.
const MAX_CHUNKS: usize = 8;

/// `joining::SeedJob` and `joining::Copier`.
pub(crate) struct SeedJob {
    busy: bool,
    rounds: u32,
    pub(crate) waits_for_rest: bool,
    chunks: VecDeque<(Gfn, u64)>,
    digests: VecDeque<RangeDigests>,
    /// The first pass of a resync: frames looked at, and those whose digests were asked for.
    pass: Option<(u64, u64)>,
    populated: Vec<(Gfn, u64)>,
}

impl Runner {
    pub(crate) fn look_for_secondary(&mut self, common: &mut Common) {
        let paired = matches!(self.replicator.phase(), Phase::Paired { .. });
        if paired && !self.replicator.is_linked() && !self.failed {
            let since = *self.lost_since.get_or_insert(common.now);
            let late = common.now - since > RELINK_LIMIT;
            if common.plan.solo_on_loss && late && !self.replicator.is_proposing() {
                common.count("solo after loss");
                let actions = self.replicator.go_solo();
                self.act(actions, common);
            }
        }
        match self.linking {
            Linking::Waiting { until } if common.now >= until => self.linking = Linking::Idle,
            Linking::Connecting { since, link, .. } if common.now - since > HANDSHAKE_LIMIT => {
                common.close(link, 0);
                self.linking = Linking::Waiting { until: common.now + BACKOFF };
            }
            _ => {}
        }
        if matches!(self.linking, Linking::Idle)
            && let Some(purpose) = self.wanted_link()
            && let Some(secondary) = self.secondary
        {
            self.connect(secondary, purpose, common);
        }
    }

    fn wanted_link(&self) -> Option<Purpose> {
        if self.peer.is_some() || self.parked || self.failed {
            return None;
        }
        self.replicator.wanted_link()
    }

    pub(crate) fn connect(&mut self, secondary: usize, purpose: Purpose, common: &mut Common) {
        let hello = Msg::Hello { node: name(self.x), term: self.replicator.register().term, purpose };
        let link = common.net.connect(self.x, secondary, hello, common.now, &mut common.seed);
        common.note(self.x, || format!("calls {} on link {link} for {purpose:?}", name(secondary)));
        self.linking = Linking::Connecting { link, purpose, since: common.now };
    }

    /// `Node::on_link` and `on_connecting`.
    pub(crate) fn on_message(&mut self, link: u64, message: Msg, common: &mut Common) {
        match &self.linking {
            Linking::Connecting { link: awaited, purpose, .. } if *awaited == link => {
                let purpose = *purpose;
                return self.on_connecting(link, purpose, message, common);
            }
            _ => {}
        }
        if self.peer.as_ref().is_none_or(|peer| peer.link != link) {
            return common.close(link, 0);
        }
        match message {
            Msg::Ack(ack) => self.on_ack(ack, common),
            Msg::Digests(digests) => {
                if let Some(seed) = &mut self.seed {
                    seed.digests.push_back(digests);
                }
            }
            Msg::Refused(why) | Msg::Down(why) => {
                common.count("links lost");
                common.note(self.x, || format!("link {link} is down: {why}"));
                self.lose_link(common);
            }
            Msg::Goodbye => self.lose_link(common),
            _ => {}
        }
    }

    fn on_ack(&mut self, ack: Ack, common: &mut Common) {
        common.note(self.x, || format!("takes the ack of {} in {}", ack.point, ack.term));
        let before = self.replicator.covered();
        match self.replicator.ack(ack) {
            Ok(actions) => {
                common.count("acks");
                if self.replicator.covered() > before {
                    self.lost_since = None;
                }
                self.act(actions, common);
            }
            Err(e) => {
                common.count("bad acks");
                common.note(self.x, || e.to_string());
                self.lose_link(common);
            }
        }
    }

    fn on_connecting(&mut self, link: u64, purpose: Purpose, message: Msg, common: &mut Common) {
        self.linking = Linking::Waiting { until: common.now + BACKOFF };
        match message {
            Msg::Welcome { node, offer, max_epoch_bytes } => {
                match self.link_up(link, purpose, &node, &offer, max_epoch_bytes, common) {
                    Ok(()) => {
                        self.linking = Linking::Idle;
                    }
                    Err(why) => {
                        common.note(self.x, || why);
                        common.close(link, 0);
                    }
                }
            }
            Msg::Refused(why) => {
                common.count("links refused");
                common.close(link, 0);
                common.note(self.x, || format!("link {link} is refused: {why}"));
                if matches!(purpose, Purpose::Link(_)) && common.plan.solo_on_loss {
                    let actions = self.replicator.go_solo();
                    self.act(actions, common);
                } else {
                    self.linking = Linking::Waiting { until: common.now + REFUSED_BACKOFF };
                }
            }
            _ => common.close(link, 0),
        }
    }

    fn link_up(
        &mut self,
        link: u64,
        purpose: Purpose,
        node: &colo_common::NodeId,
        offer: &Offer,
        max_epoch_bytes: u64,
        common: &mut Common,
    ) -> Result<(), String> {
        let tip = self.replicator.history().tip().unwrap_or_default();
        let encoder = Encoder::new(common.tag(), tip);
        let peer = |base| Peer { link, base, resend_output: true, max_epoch_bytes, encoder };
        match purpose {
            Purpose::Link(_) => {
                let base = self.replicator.relink(node, offer).map_err(|e| e.to_string())?;
                common.count("relinks");
                self.peer = Some(peer(Some(base)));
                self.send_resting_again();
            }
            Purpose::Seed => {
                let base = self.replicator.resync_from(offer);
                self.replicator.seed(node.clone()).map_err(|e| e.to_string())?;
                self.peer = Some(peer(None));
                self.begin_seed(link, offer, base, common);
            }
        }
        Ok(())
    }

    fn begin_seed(&mut self, link: u64, offer: &Offer, base: Option<Point>, common: &mut Common) {
        let (mode, changed) = self.first_pass(offer, base, common);
        common.count(match mode {
            SeedMode::Full => "seeds",
            SeedMode::Resync => "resyncs",
            SeedMode::Since(_) => "resyncs of what was written",
        });
        let history = self.replicator.history().points().to_vec();
        let Some(peer) = &mut self.peer else { return };
        let begin = peer.encoder.seed(mode, history);
        common.send(link, Way::Transfers, Msg::Frame(Box::new(begin)));
        let populated = self.guest.memory().populated().expect("guest memory can be read");
        let mut seed = SeedJob {
            busy: true,
            rounds: 0,
            waits_for_rest: false,
            chunks: VecDeque::new(),
            digests: VecDeque::new(),
            pass: (mode == SeedMode::Resync).then_some((0, 0)),
            populated,
        };
        match mode {
            SeedMode::Full => {
                let all = seed.populated.clone();
                seed.frames(&all);
            }
            SeedMode::Resync => {}
            SeedMode::Since(_) => seed.frames(&changed),
        }
        self.seed = Some(seed);
    }

    fn first_pass(
        &mut self,
        offer: &Offer,
        base: Option<Point>,
        common: &mut Common,
    ) -> (SeedMode, Vec<(Gfn, u64)>) {
        self.kept_since = None;
        if let Some(base) = base {
            self.collect(common);
            if !self.unknown {
                let runs = self.dirty.runs().collect();
                self.dirty.clear();
                return (SeedMode::Since(base), runs);
            }
        }
        let tracked = self.guest.unprotect().and_then(|()| self.guest.protect());
        if let Err(e) = tracked {
            common.outside.broken(|| format!("the guest cannot be protected: {e}"));
        }
        self.dirty = DirtySet::new(FRAMES);
        self.unknown = false;
        let mode = if offer.staged.is_some() { SeedMode::Resync } else { SeedMode::Full };
        (mode, Vec::new())
    }

    pub(crate) fn keep_or_forget(&mut self, common: &mut Common) {
        if !matches!(self.replicator.phase(), Phase::Alone) || self.peer.is_some() {
            return;
        }
        if self.replicator.kept_since().is_some() && !self.unknown {
            self.kept_since.get_or_insert(common.now);
            return;
        }
        self.forget_copy(common);
    }

    pub(crate) fn forget_if_late(&mut self, common: &mut Common) {
        let Some(since) = self.kept_since.filter(|_| self.peer.is_none()) else { return };
        self.collect(common);
        if self.unknown || self.dirty.len() > FRAMES * 3 / 4 || common.now - since > KEEP_LIMIT {
            common.count("copies forgotten");
            self.forget_copy(common);
        }
    }

    fn forget_copy(&mut self, common: &mut Common) {
        self.kept_since = None;
        self.replicator.forget_copy();
        if let Err(e) = self.guest.unprotect() {
            common.outside.broken(|| format!("the guest's tracking does not stop: {e}"));
        }
        self.dirty = DirtySet::new(FRAMES);
        self.unknown = false;
    }

    /// The thread's share of a tick: `Copier::copy`.
    pub(crate) fn copy(&mut self, common: &mut Common) {
        let (Some(seed), Some(peer)) = (&mut self.seed, &mut self.peer) else { return };
        if !seed.busy {
            return;
        }
        for _ in 0..3 {
            if common.net.waiting(peer.link, Way::Transfers) > MAX_CHUNKS {
                return;
            }
            if let Some((first, count)) = seed.chunks.pop_front() {
                let batch = PageBatch::copy(self.guest.memory(), vec![(first, count)], &common.pool);
                let batch = batch.expect("frames of the guest");
                let mut frames = Vec::new();
                if batch.iter().all(|(_, page)| is_zero(page)) {
                    peer.encoder.zeros(&[(first, count)], |frame| frames.push(frame));
                } else {
                    peer.encoder.pages(batch, |frame| frames.push(frame));
                }
                for frame in frames {
                    common.send(peer.link, Way::Transfers, Msg::Frame(Box::new(frame)));
                }
                continue;
            }
            let Some((at, asked)) = seed.pass else {
                seed.busy = false;
                return self.next_round(common);
            };
            if at == FRAMES {
                seed.pass = None;
            } else if at == asked {
                let frames = DIGEST_WINDOW.min(FRAMES - at);
                seed.pass = Some((at, at + frames));
                common.send(
                    peer.link,
                    Way::Say,
                    Msg::DigestRequest(DigestRequest { first: Gfn(at), count: frames }),
                );
            } else if let Some(digests) = seed.digests.pop_front() {
                assert_eq!(digests.first.0, at, "digests come in order");
                seed.pass = Some((digests.end().0, asked));
                seed.compare(digests, self.guest.memory());
            } else {
                return;
            }
        }
    }

    fn next_round(&mut self, common: &mut Common) {
        if self.standing.is_some() || self.parked {
            return;
        }
        self.collect(common);
        let (dirty, limit) = (self.dirty.len(), common.plan.join_pages);
        let Some(seed) = &mut self.seed else { return };
        if dirty > limit && seed.rounds < MAX_ROUNDS {
            seed.rounds += 1;
            seed.order(&mut self.dirty);
        }
    }

    pub(crate) fn seed_is_ready(&mut self, common: &mut Common) -> bool {
        if self.unknown && matches!(self.replicator.phase(), Phase::Seeding { .. }) {
            self.lose_link(common);
            return false;
        }
        self.seed.as_ref().is_some_and(|seed| !seed.busy)
    }

    pub(crate) fn send_rest_or_join(&mut self, common: &mut Common) {
        let too_much = !self.fits_epoch(common);
        if let Some(seed) = self.seed.as_mut().filter(|_| too_much) {
            common.count("rests");
            seed.waits_for_rest = true;
            seed.order(&mut self.dirty);
            return;
        }
        self.seed = None;
        self.ship(true, common);
    }

    pub(crate) fn lose_link(&mut self, common: &mut Common) {
        self.drop_link(common);
        self.arbiter.read();
        let actions = self.replicator.link_lost();
        self.act(actions, common);
        self.keep_or_forget(common);
    }

    pub(crate) fn drop_link(&mut self, common: &mut Common) {
        self.seed = None;
        if let Some(peer) = self.peer.take() {
            // Which of the two arrives is a race in the real link as well.
            if common.seed.below(2) == 0 {
                common.send(peer.link, Way::Say, Msg::Goodbye);
            }
            common.close(peer.link, 0);
            self.linking = Linking::Waiting { until: common.now };
        }
    }
}

impl SeedJob {
    fn order(&mut self, dirty: &mut DirtySet) {
        let runs: Vec<_> = dirty.runs().collect();
        dirty.clear();
        self.busy = true;
        self.frames(&runs);
    }

    fn frames(&mut self, runs: &[(Gfn, u64)]) {
        for &(first, frames) in runs {
            for offset in (0..frames).step_by(CHUNK_PAGES as usize) {
                self.chunks.push_back((Gfn(first.0 + offset), CHUNK_PAGES.min(frames - offset)));
            }
        }
    }

    /// Sends what differs from what the secondary has.
    fn compare(&mut self, digests: RangeDigests, memory: &colo_vmm::GuestMemory) {
        let mut first = digests.first.0;
        for range in digests.ranges {
            let frames = range.count();
            let mut differing = DirtySet::new(FRAMES);
            match range {
                DigestRange::Zero { .. } => {
                    let populated = self.populated.iter().flat_map(|&(at, count)| at.0..at.0 + count);
                    let inside = populated.filter(|gfn| (first..first + frames).contains(gfn));
                    inside.for_each(|gfn| {
                        differing.insert(Gfn(gfn));
                    });
                }
                DigestRange::Each(theirs) => {
                    for (gfn, theirs) in (first..).map(Gfn).zip(theirs) {
                        let mut page = [0; PAGE_SIZE];
                        memory.read_page(gfn, &mut page).expect("a frame of the guest");
                        if PageDigest::of(&page) != theirs {
                            differing.insert(gfn);
                        }
                    }
                }
            }
            let runs: Vec<_> = differing.runs().collect();
            self.frames(&runs);
            first += frames;
        }
    }
}
