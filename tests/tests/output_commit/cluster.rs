//! Two nodes, the link between them, the register, and the steps that an interleaving is made of.

use colo_common::arbiter::scripted::ScriptedArbiter;
use colo_common::register::{Answer, Proposal, Value};
use colo_common::{History, Incarnation, NodeId, ProposalId, Term};
use colo_primary::encode::Encoder;
use colo_primary::link::Purpose;
use colo_primary::release::Release;
use colo_primary::replicator::{Ack, Offer, Phase, Replicator};
use colo_proto::frame::Frame;
use colo_proto::message::SeedMode;
use colo_secondary::node::offered;
use colo_secondary::replica::AckPolicy;
use colo_vmm::egress::OutputPosition;
use std::collections::VecDeque;

use crate::fixture::{tag, vm};
use crate::follower::{Durable, Follower};
use crate::plan::{Counts, Mutations, Op};
use crate::runner::{Peer, Runner};
use crate::world::World;

fn name(node: usize) -> NodeId {
    ["a", "b"][node].parse().expect("a name")
}

enum Role {
    Down,
    Follower(Box<Follower>),
    Runner(Box<Runner>),
}

enum Said {
    Frame(Frame),
    Term(Term),
}

struct Link {
    runner: usize,
    there: VecDeque<Said>,
    back: VecDeque<Ack>,
}

/// Two nodes and what is between them.
pub(crate) struct Cluster {
    nodes: [Role; 2],
    durable: [Durable; 2],
    link: Option<Link>,
    arbiter: ScriptedArbiter,
    world: World,
    policy: AckPolicy,
    promotions: u64,
    mutations: Mutations,
}

impl Cluster {
    /// Node 0 runs the guest alone, node 1 follows nobody yet.
    pub(crate) fn new(policy: AckPolicy, mutations: Mutations) -> Self {
        let (arbiter, mut world) = (ScriptedArbiter::new(), World::default());
        let process = Incarnation(u128::from(world.stamp()));
        let value = Value::Solo { node: name(0), incarnation: process };
        let proposal = Proposal { id: ProposalId::of(process, Term(0)), expected: None, value };
        let Answer::Applied(entry) = arbiter.apply(&vm(), &proposal) else { panic!("nobody else is there") };
        let replicator = Replicator::new(name(0), process, entry, History::default());
        let position = OutputPosition::default();
        let runner = Runner::new(replicator, Release::default(), position, mutations);
        let mut cluster = Self {
            nodes: [Role::Runner(Box::new(runner)), Role::Down],
            durable: Default::default(),
            link: None,
            arbiter,
            world,
            policy,
            promotions: 0,
            mutations,
        };
        cluster.durable[0].activate();
        cluster.start(1);
        cluster
    }

    pub(crate) fn counts(&self) -> Counts {
        self.world.counts.clone()
    }

    /// Does one thing, and what follows from it at once.
    pub(crate) fn step(&mut self, op: Op) -> Result<(), String> {
        match op {
            Op::Say(words) => self.runners(|runner, world| runner.say(words, world)),
            Op::Send => self.runners(|runner, world| runner.send_frame(world)),
            Op::Cut => self.runners(|runner, _| runner.cut()),
            Op::Deliver(most) => {
                let _all = (0..most).all(|_| self.deliver());
            }
            Op::Hear(most) => {
                let _all = (0..most).all(|_| self.hear());
            }
            Op::Persist => {
                let _any = (0..2).any(|x| self.persist(x));
            }
            Op::Connect => self.connect(),
            Op::Disconnect => self.disconnect(),
            Op::Arbiter { node, answered } => {
                let _taken = self.answer(node, answered);
            }
            Op::GoSolo(node) => self.go_solo(node),
            Op::Promote(node) => self.promote(node),
            Op::Crash(node) => self.crash(node),
            Op::Start(node) => self.start(node),
            Op::Observe(node) => self.observe(node),
            Op::Settle => self.settle(),
        }
        self.follow_up();
        self.world.verdict()
    }

    fn runners(&mut self, mut with: impl FnMut(&mut Runner, &mut World)) {
        for role in &mut self.nodes {
            if let Role::Runner(runner) = role {
                with(runner, &mut self.world);
            }
        }
    }

    /// What a turn of every node's loop does at its end.
    fn follow_up(&mut self) {
        for x in 0..2 {
            if let Role::Follower(follower) = &mut self.nodes[x] {
                if let Some(link) = &mut self.link {
                    link.back.extend(follower.acks.drain(..));
                }
                follower.acks.clear();
                if let Some(runner) = follower.runs.take() {
                    self.promotions += 1;
                    self.world.counts.add_many("second promotions", u64::from(self.promotions == 2));
                    self.durable[x].activate();
                    self.nodes[x] = Role::Runner(runner);
                    self.disconnect();
                }
            }
            if let Role::Runner(runner) = &mut self.nodes[x] {
                let frames = runner.ship_if_possible(&mut self.world);
                if let Some(link) = self.link.as_mut().filter(|link| link.runner == x) {
                    link.there.extend(frames.into_iter().map(Said::Frame));
                }
                runner.let_out(&mut self.world);
                let detached = runner.peer.is_none();
                if runner.over {
                    self.crash(x);
                } else if detached && self.link.as_ref().is_some_and(|link| link.runner == x) {
                    self.disconnect();
                }
            }
        }
    }

    fn connect(&mut self) {
        let free = self.link.is_none();
        for x in (0..2).filter(|_| free) {
            let [a, b] = &mut self.nodes;
            let (runner, follower) = if x == 0 { (a, b) } else { (b, a) };
            if let (Role::Runner(runner), Role::Follower(follower)) = (runner, follower)
                && let Some(purpose) = runner.replicator.wanted_link()
                && follower.proposal.is_none()
                && let Some(link) = link(x, purpose, runner, follower, &mut self.world)
            {
                self.link = Some(link);
                return;
            }
        }
    }

    fn disconnect(&mut self) {
        let Some(link) = self.link.take() else { return };
        self.world.counts.add("links lost");
        if let Role::Runner(runner) = &mut self.nodes[link.runner] {
            runner.peer = None;
            let actions = runner.replicator.link_lost();
            runner.act(actions, &mut self.world);
        }
        if let Role::Follower(follower) = &mut self.nodes[1 - link.runner] {
            follower.unlinked();
        }
    }

    fn deliver(&mut self) -> bool {
        let Some(link) = &mut self.link else { return false };
        let to = 1 - link.runner;
        let (Some(said), Role::Follower(follower)) = (link.there.pop_front(), &mut self.nodes[to]) else {
            return false;
        };
        match said {
            Said::Term(term) => follower.hear_term(term, &mut self.world),
            Said::Frame(frame) => {
                if !follower.on_frame(&frame, &mut self.durable[to], &mut self.world) {
                    self.disconnect();
                }
            }
        }
        self.follow_up();
        true
    }

    fn hear(&mut self) -> bool {
        let Some(link) = &mut self.link else { return false };
        let (Some(ack), Role::Runner(runner)) = (link.back.pop_front(), &mut self.nodes[link.runner]) else {
            return false;
        };
        match runner.replicator.ack(ack) {
            Ok(actions) => runner.act(actions, &mut self.world),
            Err(e) => self.world.broken(|| format!("an honest ack is refused: {e}")),
        }
        self.follow_up();
        true
    }

    fn persist(&mut self, x: usize) -> bool {
        let Role::Follower(follower) = &mut self.nodes[x] else { return false };
        let done = follower.persist(&mut self.durable[x], &mut self.world);
        self.follow_up();
        done
    }

    /// The arbiter takes the proposal of a node. Without an answer the same is proposed again.
    fn answer(&mut self, x: usize, answered: bool) -> bool {
        let proposal = match &mut self.nodes[x] {
            Role::Runner(runner) => runner.proposal.as_ref(),
            Role::Follower(follower) => follower.proposal.as_ref(),
            Role::Down => None,
        };
        let Some(proposal) = proposal.cloned() else { return false };
        let answer = self.arbiter.apply(&vm(), &proposal);
        if !answered {
            return false;
        }
        match &mut self.nodes[x] {
            Role::Runner(runner) => {
                runner.proposal = None;
                let actions = runner.replicator.answer(proposal.id, answer);
                runner.act(actions, &mut self.world);
                let term = runner.replicator.register().term;
                let paired = matches!(runner.replicator.phase(), Phase::Paired { .. });
                if let Some(link) = self.link.as_mut().filter(|link| link.runner == x && paired) {
                    link.there.push_back(Said::Term(term));
                }
            }
            Role::Follower(follower) => {
                follower.proposal = None;
                // The persist thread's backlog goes before the end of the copy.
                follower.flush(&mut self.durable[x], &mut self.world);
                let actions = follower.replica.answer(proposal.id, answer);
                follower.act(actions, &mut self.world);
            }
            Role::Down => {}
        }
        self.follow_up();
        true
    }

    fn go_solo(&mut self, x: usize) {
        if let Role::Runner(runner) = &mut self.nodes[x] {
            let actions = runner.replicator.go_solo();
            runner.act(actions, &mut self.world);
        }
    }

    fn promote(&mut self, x: usize) {
        let found = self.arbiter.peek(&vm());
        if let Role::Follower(follower) = &mut self.nodes[x]
            && let Ok(actions) = follower.replica.promote(found.as_ref())
        {
            follower.act(actions, &mut self.world);
        }
    }

    fn crash(&mut self, x: usize) {
        self.nodes[x] = Role::Down;
        self.disconnect();
    }

    fn start(&mut self, x: usize) {
        if matches!(self.nodes[x], Role::Down) {
            let process = Incarnation(u128::from(self.world.stamp()));
            let (policy, durable) = (self.policy, &self.durable[x]);
            let world = &mut self.world;
            let follower = Follower::start(name(x), process, policy, durable, world, self.mutations);
            self.nodes[x] = Role::Follower(Box::new(follower));
            self.observe(x);
        }
    }

    fn observe(&mut self, x: usize) {
        let found = self.arbiter.peek(&vm());
        match &mut self.nodes[x] {
            Role::Runner(runner) => {
                let actions = runner.replicator.observe(found);
                runner.act(actions, &mut self.world);
            }
            Role::Follower(follower) => {
                let actions = follower.replica.observe(found.as_ref());
                follower.act(actions, &mut self.world);
            }
            Role::Down => {}
        }
    }

    fn settle(&mut self) {
        self.connect();
        self.follow_up();
        while self.deliver() || self.persist(0) || self.persist(1) || self.hear() || {
            let (first, second) = (self.answer(0, true), self.answer(1, true));
            first || second
        } {}
    }
}

/// A link, if both ends agree on it: `Follower::on_caller` and `Node::link_up`.
fn link(
    x: usize,
    purpose: Purpose,
    runner: &mut Runner,
    follower: &mut Follower,
    world: &mut World,
) -> Option<Link> {
    let term = runner.replicator.register().term;
    follower.replica.check_runner(term).ok()?;
    let (there, back) = (VecDeque::new(), VecDeque::new());
    let mut link = Link { runner: x, there, back };
    let tip = runner.replicator.history().tip().unwrap_or_default();
    let mut encoder = Encoder::new(tag(), tip);
    let base = match purpose {
        Purpose::Seed => {
            let (_, staged, stale) = offered(follower.replica.copy());
            let mode = if staged.or(stale).is_some() { SeedMode::DIFFERING } else { SeedMode::FULL };
            runner.replicator.seed(name(1 - x)).ok()?;
            let history = runner.replicator.history().points().to_vec();
            link.there.push_back(Said::Frame(encoder.seed(mode, history)));
            follower.linked(name(x), term, None, world);
            None
        }
        Purpose::Link(wanted) => {
            let (replica, staged, stale) = offered(follower.replica.copy());
            let offer = Offer { replica, staged: staged.or(stale), ..Offer::default() };
            let Ok(base) = runner.replicator.relink(&name(1 - x), &offer) else {
                // Nobody can come back with that copy.
                let actions = runner.replicator.go_solo();
                runner.act(actions, world);
                return None;
            };
            world.counts.add("links made again");
            follower.linked(name(x), term, Some(wanted), world);
            Some(base)
        }
    };
    runner.peer = Some(Peer { base, resend_output: true, encoder });
    Some(link)
}
