//! Getting protected: `primary::node::joining`, function by function.

use colo_primary::encode::Encoder;
use colo_primary::link::Purpose;
use colo_primary::replicator::{Ack, Offer, Phase};

use crate::common::{Common, name};
use crate::net::{Msg, Way};
use crate::plan::{BACKOFF, HANDSHAKE_LIMIT, REFUSED_BACKOFF, RELINK_LIMIT};
use crate::runner::{Linking, Peer, Runner};

impl Runner {
    pub(crate) fn look_for_secondary(&mut self, common: &mut Common) {
        let paired = matches!(self.replicator.phase(), Phase::Paired { .. });
        if paired && !self.replicator.is_linked() && !self.failed && !self.has_yielded() {
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
                self.candidate_failed(false, common);
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
        if self.peer.is_some() || self.parked || self.failed || self.has_yielded() {
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
                    seed.take_digests(digests);
                }
            }
            Msg::BlockDigests(digests) => {
                if let Some(seed) = &mut self.seed {
                    seed.take_block_digests(digests);
                }
            }
            Msg::Diverged(diverged) => {
                if let Some(seed) = &mut self.seed {
                    seed.take_diverged(diverged);
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
                self.replicator.acked().iter().for_each(|acked| self.intent.acked(*acked));
                if self.replicator.covered() > before {
                    self.lost_since = None;
                }
                common.outside.acked(self.replicator.acked());
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
                self.candidate_failed(true, common);
                common.close(link, 0);
                common.note(self.x, || format!("link {link} is refused: {why}"));
                if matches!(purpose, Purpose::Link(_)) && common.plan.solo_on_loss {
                    let actions = self.replicator.go_solo();
                    self.act(actions, common);
                } else {
                    self.linking = Linking::Waiting { until: common.now + REFUSED_BACKOFF };
                }
            }
            Msg::NotReady => {
                common.count("links that came too early");
                common.close(link, 0);
            }
            _ => {
                self.candidate_failed(false, common);
                common.close(link, 0);
            }
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
                self.agreed_epoch_bytes = max_epoch_bytes;
                common.count("relinks");
                if self.failed {
                    common.send(link, Way::Say, Msg::Yield(true));
                }
                self.peer = Some(peer(Some(base)));
                self.send_resting_again();
            }
            Purpose::Seed => {
                self.replicator.seed(node.clone()).map_err(|e| e.to_string())?;
                self.agreed_epoch_bytes = max_epoch_bytes;
                self.peer = Some(peer(None));
                self.begin_seed(link, offer, common);
            }
        }
        Ok(())
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
