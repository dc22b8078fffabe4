//! Following a runner, simulated: `secondary::node::following` and `receiver`, function by function.

use colo_common::ReplicaId;
use colo_primary::link::Purpose;
use colo_primary::release::Release;
use colo_primary::replicator::{Ack, Offer};
use colo_proto::frame::{Frame, HEADER_LEN, Header, Kind};
use colo_proto::message::{Diverged, SeedMode, SeedPart};
use colo_secondary::node::{judge_epoch, offered};
use colo_secondary::persist::ToStore;
use colo_secondary::replica::{Action, Refusal};
use colo_secondary::staging::{StagedEpoch, Staging, Step};
use colo_secondary::store::Base;
use colo_vmm::egress::Output;
use std::sync::Arc;

use crate::common::{Common, index};
use crate::follower::{Apply, Follower, Link, Outcome};
use crate::net::{Msg, Way};
use crate::outside::Known;
use crate::persister::{Job, Persisted};
use crate::plan::{BLOCKS, FRAMES, PROMOTE_DELAY};

impl Follower {
    /// Something came by a link: `receiver::Receiver` and `Follower::on_link`.
    pub(crate) fn on_message(&mut self, number: u64, message: Msg, common: &mut Common) {
        if self.taking.is_some() {
            // Its inbox is read no more.
            return;
        }
        if let Msg::Hello { node, term, purpose } = message {
            return self.on_caller(number, node, term, purpose, common);
        }
        let Some(link) = self.link.as_mut().filter(|link| link.number == number) else {
            // Of a link that was replaced or dropped.
            return common.close(number, 1);
        };
        match message {
            Msg::Frame(frame) => self.on_frame(*frame, common),
            Msg::Term(term) => match self.replica.hear_term(term) {
                Ok(actions) => self.act(actions, common),
                Err(e) => self.refuse(&e.to_string(), common),
            },
            Msg::DigestRequest(request) if link.seeding => {
                self.apply.push_back(Apply::Digests(number, request));
            }
            Msg::DigestRequest(request) => {
                link.asked = Some(request).filter(|_| !common.mutations.early_digests_dropped);
            }
            Msg::BlockDigestRequest(request) if link.seeding => {
                self.persister.order(Job::BlockDigests(number, request));
            }
            Msg::BlockDigestRequest(request) => link.asked_blocks = Some(request),
            Msg::Yield(failed) => {
                common.count("yields");
                common.note(self.x, || "is told to take over".to_owned());
                self.yielded += u32::from(failed);
                self.planned = !failed;
                self.detector.yielded(common.now);
            }
            Msg::Goodbye => {}
            Msg::Down(why) => self.link_down(&why, common),
            other => panic!("a runner said {other:?}"),
        }
        self.settle(common);
    }

    /// `Follower::pair` and `on_caller`.
    fn on_caller(
        &mut self,
        number: u64,
        node: colo_common::NodeId,
        term: colo_common::Term,
        purpose: Purpose,
        common: &mut Common,
    ) {
        if self.guest.is_none() {
            let memory = common.memory();
            self.warm_up(memory, None, common);
        }
        if !self.observed {
            common.note(self.x, || format!("refuses link {number}: it has not read the register yet"));
            common.send(number, Way::Hear, Msg::NotReady);
            return;
        }
        if let Err(why) = self.judge(term, purpose) {
            common.note(self.x, || format!("refuses link {number}: {why}"));
            common.send(number, Way::Hear, Msg::Refused(why));
            return;
        }
        let (replica, staged, stale) = offered(self.replica.copy());
        let max_epoch_bytes = common.plan.max_epoch_bytes;
        let staging = Staging::new(FRAMES, max_epoch_bytes, common.digest()).with_disk(BLOCKS);
        common.net.accept(number, self.incarnation, common.now);
        let bases = self.rejoin.bases(self.replica.copy());
        let offer = Offer { replica, staged: staged.or(stale), bases, history: self.history.clone() };
        let me = self.me.clone();
        common.send(number, Way::Hear, Msg::Welcome { node: me, offer, max_epoch_bytes });
        if let Some(old) = &self.link {
            common.count("links replaced");
            common.close(old.number, 1);
        }
        self.rejoin.break_off();
        let link = Link {
            number,
            node: node.clone(),
            term,
            seeding: false,
            asked: None,
            asked_blocks: None,
            staging,
            over: false,
        };
        self.needless_since = None;
        self.link = Some(link);
        self.detector.heard();
        self.planned = false;
        self.followed = true;
        self.runner_at = Some(index(&node));
        if let Purpose::Link(replica) = purpose {
            match self.replica.accept_link(&node, term, replica) {
                Ok(actions) => self.act(actions, common),
                Err(e) => self.refuse(&e.to_string(), common),
            }
        }
    }

    fn judge(&self, term: colo_common::Term, purpose: Purpose) -> Result<(), String> {
        if self.store_failed {
            return Err("the store has failed".to_owned());
        }
        self.replica.check_runner(term).map_err(|e| e.to_string())?;
        match purpose {
            Purpose::Link(wanted) if self.replica_id() != Some(wanted) => {
                Err(Refusal::NotThisReplica { wanted }.to_string())
            }
            _ => Ok(()),
        }
    }

    /// `Receiver::receive`: what came is decoded from its bytes, checked, and staged.
    fn on_frame(&mut self, frame: Frame, common: &mut Common) {
        let garble = common.plan.rates.garble;
        if self.link.as_ref().is_none_or(|link| link.over) {
            return;
        }
        let mut head: [u8; HEADER_LEN] = frame.head()[..HEADER_LEN].try_into().expect("a header");
        let mut body = frame.body().clone();
        if common.chance(garble) {
            common.count("garbled frames");
            if body.is_empty() || common.seed.below(2) == 0 {
                head[common.seed.below(HEADER_LEN as u64) as usize] ^= 1 << common.seed.below(8);
            } else {
                let mut bytes = body.to_vec();
                bytes[common.seed.below(body.len() as u64) as usize] ^= 1 << common.seed.below(8);
                body = bytes.into();
            }
        }
        let received = Header::decode(&head).and_then(|header| {
            header.check_vm(common.tag())?;
            Frame::received(header, frame.table().clone(), body)
        });
        let Ok(frame) = received else { return self.stream_is_bad("a frame is garbled", common) };
        common.count("frames");
        let memory =
            Arc::clone(self.guest.as_ref().map(colo_vmm::ProtectedGuest::memory).expect("a warm guest"));
        if common.mutations.ack_before_staged && frame.header().kind == Kind::EpochBegin {
            self.ack_early(frame.header().point, common);
        }
        let Some(link) = self.link.as_mut() else { return };
        match link.staging.frame(&frame, &memory) {
            Ok(Step::More) => {}
            Ok(Step::Seed(mode)) => {
                if !self.begin_seed(mode, common) {
                    self.stream_is_bad("the seed was not taken", common);
                }
            }
            Ok(Step::SeedPages(part)) => {
                if link.seeding {
                    self.rejoin.take_pages(&part);
                    self.apply.push_back(Apply::Seed(part.clone()));
                    self.persister.order(Job::Seed(part));
                }
            }
            Ok(Step::SeedBlocks(part)) => {
                if link.seeding {
                    self.rejoin.take_blocks(&part);
                    self.persister.order(Job::SeedBlocks(part));
                }
            }
            Ok(Step::Whole(epoch)) => self.on_epoch(*epoch, common),
            Ok(Step::Verify(at, _)) => panic!("no runner here has a copy compared, and one is at {at}"),
            Err(e) => {
                if matches!(e, colo_secondary::staging::StagingError::TooLarge { .. }) {
                    common.outside.broken(|| format!("more came than this node said that it takes: {e}"));
                }
                common.count(match e {
                    colo_secondary::staging::StagingError::Index { .. } => "frames out of order",
                    _ => "transfers refused",
                });
                self.stream_is_bad(&e.to_string(), common);
            }
        }
    }

    /// A mutation, never done.
    fn ack_early(&mut self, point: colo_common::Point, common: &mut Common) {
        if let (Some(link), Some(replica)) = (&self.link, self.replica_id()) {
            let ack = Ack { point, replica, term: link.term.max(point.term) };
            common.send(link.number, Way::Hear, Msg::Ack(ack));
        }
    }

    /// The connection ends, and the node hears that it is down.
    fn stream_is_bad(&mut self, why: &str, common: &mut Common) {
        if let Some(link) = &mut self.link {
            link.over = true;
            common.close(link.number, 1);
            self.link_down(why, common);
        }
    }

    fn link_down(&mut self, why: &str, common: &mut Common) {
        let Some(link) = self.link.take() else { return };
        self.needless_since = None;
        common.note(self.x, || format!("link {} is down: {why}", link.number));
        self.replica.link_lost();
        self.rejoin.break_off();
        self.suspect(common);
    }

    fn suspect(&mut self, common: &Common) {
        self.detector.silent(common.now, common.now + PROMOTE_DELAY);
        self.next_read = common.now;
    }

    fn begin_seed(&mut self, mode: SeedMode, common: &mut Common) -> bool {
        let Some(link) = &mut self.link else { return false };
        let (node, term) = (link.node.clone(), link.term);
        let copy = self.replica.copy().clone();
        let diverged = match self.rejoin.begin(&copy, mode) {
            Ok(diverged) => diverged,
            Err(why) => {
                common.outside.broken(|| why);
                return false;
            }
        };
        if let Err(e) = self.replica.accept_seed(&node, term) {
            self.refuse(&e.to_string(), common);
            return false;
        }
        self.forgets_running = true;
        self.intent.forget();
        common.note(self.x, || format!("is seeded ({mode:?}) by {node} in {term}"));
        let keep = mode.memory != SeedPart::All;
        self.persister.order(Job::Begin(if keep { Base::Stored } else { Base::Empty }));
        self.waits_for_disk(common);
        // The flush; what the thread tells meanwhile waits in the inbox.
        let mut told = Vec::new();
        while self.persister.waiting() > 0 {
            told.extend(self.persister.work(common.mutations));
        }
        let taken = !self.store_failed;
        if taken {
            self.apply.push_back(Apply::BeginSeed { keep });
            self.tip = None;
            self.restored = None;
            if let Some(link) = &mut self.link {
                link.seeding = true;
                let number = link.number;
                if mode.asks_diverged() {
                    for part in Diverged::parts(&diverged.page_runs(), &diverged.block_runs()) {
                        common.send(number, Way::Hear, Msg::Diverged(part));
                    }
                }
                self.apply.extend(link.asked.take().map(|request| Apply::Digests(number, request)));
                if let Some(request) = link.asked_blocks.take() {
                    self.persister.order(Job::BlockDigests(number, request));
                }
            }
        }
        told.into_iter().for_each(|persisted| self.on_persisted(persisted, common));
        taken
    }

    fn on_epoch(&mut self, epoch: StagedEpoch, common: &mut Common) {
        let point = epoch.point;
        let Some(term) = self.link.as_ref().map(|link| link.term) else { return };
        let fresh = match judge_epoch(self.replica.copy(), term, self.held.end(), &epoch) {
            Ok(fresh) => fresh,
            Err(why) => {
                common.count("epochs out of place");
                return self.refuse(&why, common);
            }
        };
        let completes = epoch.base.is_none();
        let drawn = ReplicaId(common.draw());
        if common.mutations.term_overtakes && point.term < self.replica.fence() {
            self.held.hold(point.epoch, fresh);
            return self.refuse("an epoch of a term before", common);
        }
        let heard = if point.term > self.replica.fence() {
            self.replica.hear_term(point.term)
        } else {
            Ok(Vec::new())
        };
        let staged = heard.and_then(|mut actions| {
            actions.extend(if completes {
                self.replica.whole(point, drawn)?
            } else {
                self.replica.staged(point)?
            });
            Ok(actions)
        });
        let actions = match staged {
            Ok(actions) => actions,
            Err(e) => return self.refuse(&e.to_string(), common),
        };
        common.count(if completes { "copies whole" } else { "staged" });
        common.note(self.x, || format!("stages {point}{}", if completes { ", a whole copy" } else { "" }));
        self.take_output(&epoch, fresh, common);
        self.promotions = epoch.promotions;
        self.history = epoch.history.clone();
        self.rejoin.stage(&epoch);
        let epoch = Arc::new(epoch);
        self.tip = Some(Arc::clone(&epoch));
        self.restored = None;
        let (acks, rest) = actions.into_iter().partition(|action| matches!(action, Action::Ack(_)));
        self.act(acks, common);
        self.pass_on(epoch, completes);
        self.act(rest, common);
    }

    fn pass_on(&mut self, epoch: Arc<StagedEpoch>, completes: bool) {
        let Some(replica) = self.replica_id() else { return };
        self.apply.push_back(Apply::Epoch(Arc::clone(&epoch)));
        let to_store = ToStore { epoch, held: Arc::new(self.held.all_held()), replica };
        if completes {
            if let Some(link) = &mut self.link {
                link.seeding = false;
            }
            self.persister.order(Job::Complete(to_store));
        } else {
            self.persister.order(Job::Epoch(to_store));
        }
    }

    fn take_output(&mut self, epoch: &StagedEpoch, fresh: Output, common: &mut Common) {
        if epoch.base.is_none() {
            self.held = Release::new(fresh.start);
        }
        self.held.hold(epoch.point.epoch, fresh);
        self.held.let_out_to(epoch.released, &mut Known);
        common.outside.check_out(epoch.point, self.held.released());
        if self.held.end() != epoch.state.output {
            let (end, made) = (self.held.end(), epoch.state.output);
            common.outside.broken(|| format!("{} comes with output up to {end:?} of {made:?}", epoch.point));
        }
    }

    /// A turn of the apply thread: `apply::work`.
    pub(crate) fn apply_one(&mut self, common: &mut Common) {
        if common.mutations.apply_out_of_order && self.apply.len() > 1 {
            self.apply.swap(0, 1);
        }
        let (Some(job), Some(image)) = (self.apply.pop_front(), &mut self.image) else { return };
        let done = match job {
            Apply::BeginSeed { keep } => image.begin_seed(keep).map_err(|e| e.to_string()),
            Apply::Seed(part) => image.write_seed(&part).map_err(|e| e.to_string()),
            Apply::Epoch(epoch) => image.apply(&epoch).map_err(|e| e.to_string()).map(|()| {
                common.count("applied");
                common.outside.check_memory("an image", epoch.point, image.memory());
            }),
            Apply::Digests(number, request) => {
                let any = common.mutations.digests_to_any_link;
                let number = self.link.as_ref().filter(|_| any).map_or(number, |link| link.number);
                let current = self.link.as_ref().is_some_and(|link| link.number == number);
                colo_secondary::apply::digests(image.memory(), request, &mut |digests| {
                    if current {
                        common.send(number, Way::Hear, Msg::Digests(digests));
                    }
                });
                Ok(())
            }
        };
        if let Err(why) = done {
            common.outside.broken(|| format!("an epoch cannot be applied: {why}"));
            self.end = Some(Outcome::Failed(why));
        }
    }

    pub(crate) fn on_persisted(&mut self, persisted: Persisted, common: &mut Common) {
        let actions = match persisted {
            Persisted::Point(replica, epoch) => {
                common.count("persisted");
                self.replica.persisted(replica, epoch.point)
            }
            Persisted::Digests(number, digests) => {
                for digests in digests {
                    if self.link.as_ref().is_some_and(|link| link.number == number) {
                        common.send(number, Way::Hear, Msg::BlockDigests(digests));
                    }
                }
                return;
            }
            Persisted::IdStored(id) => self.replica.id_stored(id),
            Persisted::IdErased(id) => self.replica.id_erased(id),
            Persisted::Failed(why) => {
                common.count("stores failed");
                self.store_failed = true;
                return self.refuse(&format!("the store has failed: {why}"), common);
            }
        };
        self.act(actions, common);
    }

    pub(crate) fn act(&mut self, actions: Vec<Action>, common: &mut Common) {
        for action in actions {
            match action {
                Action::Propose(proposal) => {
                    common.note(self.x, || format!("proposes {}", proposal.entry()));
                    self.arbiter.propose(proposal);
                }
                Action::Ack(ack) => {
                    if let Some(link) = &self.link {
                        common.note(self.x, || format!("acks {}", ack.point));
                        common.outside.said(ack.point);
                        common.send(link.number, Way::Hear, Msg::Ack(ack));
                    }
                }
                Action::StoreId(id) => self.persister.order(Job::StoreId(id)),
                Action::EraseId(id) => self.persister.order(Job::EraseId(id)),
                Action::Run(start, entry) => self.take_over(start, entry, common),
            }
        }
    }

    pub(crate) fn refuse(&mut self, why: &str, common: &mut Common) {
        common.count("links refused by the follower");
        common.note(self.x, || format!("ends its link: {why}"));
        if let Some(link) = self.link.take() {
            common.send(link.number, Way::Hear, Msg::Refused(why.to_owned()));
            common.net.close_after(link.number, common.now);
        }
        self.replica.link_lost();
        self.rejoin.break_off();
        self.suspect(common);
    }
}
