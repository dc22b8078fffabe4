//! A node that follows, with nothing but its output: `secondary::node::Follower` around the real parts.

use colo_common::register::Proposal;
use colo_common::{History, Incarnation, NodeId, Point, ReplicaId, Term};
use colo_primary::release::Release;
use colo_primary::replicator::{Ack, Replicator};
use colo_proto::frame::Frame;
use colo_secondary::node::judge_epoch;
use colo_secondary::persist::StoredState;
use colo_secondary::replica::{AckPolicy, Action, Copy, Replica, Rules, Start, Stored};
use colo_secondary::staging::{StagedEpoch, Staging, Step};
use colo_vmm::egress::OutputPosition;
use std::collections::VecDeque;

use crate::fixture::fixture;
use crate::plan::Mutations;
use crate::runner::Runner;
use crate::world::{Known, World};

/// A stored point: its state with the output that was held, and the history that ends with it.
#[derive(Clone)]
pub(crate) struct StoredPoint {
    point: Point,
    state: Vec<u8>,
    history: History,
}

/// What of a node outlives its processes.
#[derive(Clone, Default)]
pub(crate) struct Durable {
    active: bool,
    point: Option<StoredPoint>,
    replica: Option<ReplicaId>,
}

/// A link from a runner, and what has come of the transfer on it.
struct Link {
    node: NodeId,
    term: Term,
    staging: Staging,
}

enum Job {
    Begin,
    Point(ReplicaId, StoredPoint),
    StoreId(ReplicaId),
    EraseId(ReplicaId),
}

/// `node::Follower`.
pub(crate) struct Follower {
    pub(crate) replica: Replica,
    /// Proposed, and not answered yet.
    pub(crate) proposal: Option<Proposal>,
    /// Said, and not on their way yet.
    pub(crate) acks: Vec<Ack>,
    /// It runs the guest now.
    pub(crate) runs: Option<Box<Runner>>,
    me: NodeId,
    incarnation: Incarnation,
    link: Option<Link>,
    held: Release,
    history: History,
    /// Where the newest staged point's output ends.
    end: OutputPosition,
    jobs: VecDeque<Job>,
    mutations: Mutations,
}

impl Follower {
    /// A process that starts with what the one before has left.
    pub(crate) fn start(
        me: NodeId,
        incarnation: Incarnation,
        policy: AckPolicy,
        durable: &Durable,
        world: &mut World,
        mutations: Mutations,
    ) -> Self {
        let whole = durable.point.as_ref().map(|stored| (stored.point, durable.replica));
        let rules = Rules { policy, boot_after_crash: false };
        let replica = Replica::new(me.clone(), incarnation, rules, Stored { active: durable.active, whole });
        let mut follower = Self {
            replica,
            proposal: None,
            acks: Vec::new(),
            runs: None,
            me,
            incarnation,
            link: None,
            held: Release::default(),
            history: History::default(),
            end: OutputPosition::default(),
            jobs: VecDeque::new(),
            mutations,
        };
        if let Some(StoredPoint { point, state, history }) = &durable.point {
            world.counts.add("stores read back");
            let restored = StoredState::restore(state).expect("what was stored can be read");
            follower.held = Release::new(restored.held.start);
            follower.held.hold(point.epoch, restored.held);
            (follower.end, follower.history) = (restored.state.output, history.clone());
        }
        follower
    }

    /// The newest point that it would run from.
    pub(crate) fn replica_id(&self) -> Option<ReplicaId> {
        match self.replica.copy() {
            Copy::Whole { replica, .. } => Some(*replica),
            _ => None,
        }
    }

    /// A runner's link; `wanted` is the copy that it goes on with.
    pub(crate) fn linked(&mut self, node: NodeId, term: Term, wanted: Option<ReplicaId>, world: &mut World) {
        let staging = Staging::new(fixture().frames, 1 << 20, fixture().digest);
        self.link = Some(Link { node: node.clone(), term, staging });
        if let Some(wanted) = wanted {
            match self.replica.accept_link(&node, term, wanted) {
                Ok(actions) => self.act(actions, world),
                Err(_) => self.unlinked(),
            }
        }
    }

    pub(crate) fn unlinked(&mut self) {
        self.link = None;
        self.replica.link_lost();
    }

    /// A frame came; false if the link is of no more use.
    pub(crate) fn on_frame(&mut self, frame: &Frame, durable: &mut Durable, world: &mut World) -> bool {
        let Some(link) = &mut self.link else { return false };
        match link.staging.frame(frame, &fixture().memory) {
            Ok(Step::More) => true,
            Ok(Step::Seed(_)) => {
                let (node, term) = (link.node.clone(), link.term);
                let taken = self.replica.accept_seed(&node, term).is_ok();
                if taken {
                    // Synced before a page is taken.
                    self.jobs.push_back(Job::Begin);
                    self.flush(durable, world);
                }
                taken
            }
            Ok(Step::Whole(epoch)) => self.on_epoch(*epoch, world),
            Ok(other) => panic!("nobody sent {other:?}"),
            Err(e) => {
                world.broken(|| format!("a sound transfer is refused: {e}"));
                false
            }
        }
    }

    /// `Follower::on_epoch`.
    fn on_epoch(&mut self, epoch: StagedEpoch, world: &mut World) -> bool {
        let (point, completes) = (epoch.point, epoch.base.is_none());
        let Some(term) = self.link.as_ref().map(|link| link.term) else { return false };
        let fresh = match judge_epoch(self.replica.copy(), term, self.held.end(), &epoch) {
            Ok(fresh) => fresh,
            Err(why) => {
                world.broken(|| format!("an epoch of an honest runner is refused: {why}"));
                return false;
            }
        };
        let fresh = if self.mutations.held_output_not_cut_off { epoch.output.clone() } else { fresh };
        let drawn = ReplicaId(u128::from(world.stamp()));
        let newer = point.term > self.replica.fence();
        let heard = if newer { self.replica.hear_term(point.term) } else { Ok(Vec::new()) };
        let staged = heard.and_then(|mut actions| {
            actions.extend(match completes {
                true => self.replica.whole(point, drawn)?,
                false => self.replica.staged(point)?,
            });
            Ok(actions)
        });
        let Ok(actions) = staged else { return false };
        if completes {
            self.held = Release::new(fresh.start);
        }
        self.held.hold(point.epoch, fresh);
        self.held.let_out_to(epoch.released, &mut Known);
        world.check_out(self.held.released());
        if self.mutations.held_output_dropped {
            self.held = Release::new(self.held.end());
        }
        (self.end, self.history) = (epoch.state.output, epoch.history.clone());
        if self.held.end() != self.end {
            let (held, made) = (self.held.end(), self.end);
            world.broken(|| format!("{point} comes with output up to {held:?} of {made:?}"));
        }
        let state = StoredState::new(&epoch, &self.held.all_held()).encode();
        let stored = StoredPoint { point, state, history: epoch.history };
        let (acks, rest) = actions.into_iter().partition(|action| matches!(action, Action::Ack(_)));
        self.act(acks, world);
        self.jobs.extend(self.replica_id().map(|replica| Job::Point(replica, stored)));
        self.act(rest, world);
        true
    }

    pub(crate) fn hear_term(&mut self, term: Term, world: &mut World) {
        if let Ok(actions) = self.replica.hear_term(term) {
            self.act(actions, world);
        }
    }

    /// The persist thread's next job.
    pub(crate) fn persist(&mut self, durable: &mut Durable, world: &mut World) -> bool {
        let Some(job) = self.jobs.pop_front() else { return false };
        let actions = match job {
            Job::Begin => {
                *durable = Durable::default();
                Vec::new()
            }
            Job::Point(replica, stored) => {
                let point = stored.point;
                durable.point = Some(stored);
                self.replica.persisted(replica, point)
            }
            Job::StoreId(id) => {
                durable.replica = Some(id);
                self.replica.id_stored(id)
            }
            Job::EraseId(id) => {
                durable.replica = None;
                self.replica.id_erased(id)
            }
        };
        self.act(actions, world);
        true
    }

    /// All that waits.
    pub(crate) fn flush(&mut self, durable: &mut Durable, world: &mut World) {
        while self.persist(durable, world) {}
    }

    pub(crate) fn act(&mut self, actions: Vec<Action>, world: &mut World) {
        for action in actions {
            match action {
                Action::Propose(proposal) => self.proposal = Some(proposal),
                Action::Ack(ack) => {
                    world.acked(ack.replica, ack.point);
                    self.acks.push(ack);
                }
                Action::StoreId(id) => self.jobs.push_back(Job::StoreId(id)),
                Action::EraseId(id) => self.jobs.push_back(Job::EraseId(id)),
                Action::Run(start, entry) => {
                    let Start::Promote(point) = start else { panic!("nobody boots here") };
                    world.counts.add("promotions");
                    world.check_lacks(point, self.end);
                    let history = std::mem::take(&mut self.history);
                    let replicator = Replicator::new(self.me.clone(), self.incarnation, entry, history);
                    let held = std::mem::take(&mut self.held);
                    let runner = Runner::new(replicator, held, self.end, self.mutations);
                    self.runs = Some(Box::new(runner));
                }
            }
        }
    }
}

impl Durable {
    /// The node runs the guest: the copy has ended.
    pub(crate) fn activate(&mut self) {
        *self = Self { active: true, point: None, replica: None };
    }
}
