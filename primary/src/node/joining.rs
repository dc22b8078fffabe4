//! Getting protected and staying so: a link to a secondary where one is wanted, and what becomes of it. What a new copy
//! is sent is in [`seeding`](super::seeding).

use std::time::{Duration, Instant};

use super::status::LinkState;
use super::switching::Switching;
use super::{Linking, Node, NodeError, Peer, RELINK_LIMIT};
use crate::link::{LinkEvent, LinkHandle, Purpose, Request, Welcomed};
use crate::replicator::Phase;

/// Between two tries to reach a secondary.
const BACKOFF: Duration = Duration::from_millis(250);
/// Where the secondary has said no.
pub(super) const REFUSED_BACKOFF: Duration = Duration::from_secs(2);

impl Node {
    /// Looks for a secondary where one is wanted and none is there, and gives up one that stays away.
    pub(super) fn look_for_secondary(&mut self, now: Instant) -> Result<(), NodeError> {
        let paired = matches!(self.replicator.phase(), Phase::Paired { .. });
        if paired && !self.replicator.is_linked() && self.failure.is_none() && !self.has_yielded() {
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

    /// A secondary that was told to take over leaves its link to do so.
    fn has_yielded(&self) -> bool {
        self.switching.as_ref().is_some_and(Switching::has_yielded)
    }

    fn wanted_link(&self) -> Option<Purpose> {
        if self.peer.is_some() || self.parked || self.failure.is_some() || self.has_yielded() {
            return None;
        }
        self.replicator.wanted_link()
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
            cpu: self.guest.cpu(),
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
            LinkEvent::Verified(answer) => self.on_verified(&answer),
            LinkEvent::Copied(bytes) => {
                self.board.copied(bytes);
                self.seed.iter_mut().for_each(|seed| seed.count(bytes));
                Ok(())
            }
            LinkEvent::Sent { point, bytes, pages } => {
                self.on_sent(point, bytes, pages);
                Ok(())
            }
            LinkEvent::Answer(answer) => {
                if self.seed.as_ref().is_some_and(|seed| seed.pass_on(answer)) {
                    return Ok(());
                }
                tracing::warn!(vm = %self.vm, "more answers than were asked for");
                self.lose_link()
            }
            LinkEvent::Refused(reason) | LinkEvent::NotReady(reason) | LinkEvent::Down(reason) => {
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
                self.candidate_failed(Some(&reason));
                // It is there and has not the copy that the register names: no use to wait for it.
                if matches!(purpose, Purpose::Link(_)) && self.settings.solo_on_loss {
                    let actions = self.replicator.go_solo();
                    self.act(actions)?;
                } else {
                    self.linking = Linking::Waiting { until: Instant::now() + REFUSED_BACKOFF };
                }
                reason
            }
            LinkEvent::NotReady(reason) => reason,
            LinkEvent::Down(reason) => {
                self.candidate_failed(None);
                reason
            }
            _ => "the secondary answered out of turn".to_owned(),
        };
        tracing::debug!(vm = %self.vm, "no link came about: {failed}");
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
                    self.agreed_epoch_bytes = max_epoch_bytes;
                    if self.failure.is_some() {
                        // It failed while nobody was there to be told.
                        link.send_yield(true);
                    }
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
                self.agreed_epoch_bytes = max_epoch_bytes;
                self.begin_seed(number, &link, &offer)?;
                self.peer = peer(link, None, true);
                Ok(None)
            }
        }
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
        self.keep_or_forget()
    }

    pub(super) fn drop_link(&mut self) {
        self.seed = None;
        self.end_verification("the link to the secondary has ended");
        self.sent.clear();
        if let Some(peer) = self.peer.take() {
            peer.link.close();
            // At once the first time: a secondary that lives must not be given cause to take over.
            self.linking = Linking::Waiting { until: Instant::now() };
        }
    }
}
