//! The world of the model: nodes, stores, links, requests on their way, and what the outside has seen. The decisions
//! are those of `Replicator` and `Replica`; here is what surrounds them, and what it must not lose.

use colo_common::register::{Entry, Proposal, Value};
use colo_common::{Epoch, History, Incarnation, NodeId, Point, ProposalId, ReplicaId, Term};
use colo_primary::replicator::{self, Ack, Carried, Replicator};
use colo_secondary::node::{FirstLook, Known, first_look};
use colo_secondary::replica::{self, AckPolicy, Replica, Rules, Stored};
use std::fmt;
use std::sync::{Arc, LazyLock};

/// Terms and epochs that a [`Ghost`] can tell apart, per node.
const MAX_TERM: u64 = 8;
const MAX_EPOCH: u64 = 5;
const MAX_NODES: u64 = 3;

static NAMES: LazyLock<[NodeId; 3]> =
    LazyLock::new(|| ["a", "b", "c"].map(|name| name.parse().expect("a name")));

/// What is let run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) nodes: usize,
    pub(crate) policy: AckPolicy,
    /// `on_crash = boot`.
    pub(crate) boot: bool,
    /// Begins as Paired instead of Solo.
    pub(crate) paired: bool,
    pub(crate) terms: u64,
    pub(crate) cuts: u8,
    pub(crate) crashes: u8,
    pub(crate) stops: u8,
    pub(crate) switches: u8,
    /// Messages on their way to a follower before the runner waits.
    pub(crate) queue: usize,
    pub(crate) runner: replicator::Mutation,
    pub(crate) follower: replica::Mutation,
    pub(crate) surroundings: Mutation,
}

/// A duty of a node towards its store, left out on purpose.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mutation {
    /// A promotion leaves the stored copy and its replica id, and does not write `active`.
    pub(crate) promotion_leaves_store: bool,
    /// The start of a seed leaves the stored copy and its replica id.
    pub(crate) seed_leaves_store: bool,
    /// A start again is not noted before it is proposed.
    pub(crate) start_is_not_noted: bool,
    /// A guest that runs leaves the note that it is about to be started.
    pub(crate) run_leaves_note: bool,
}

/// A state of the guest, as the set of cuts that it contains: of two states one is the other's ancestor if and only if
/// it is a subset.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct Ghost(pub u128);

impl Ghost {
    pub(crate) fn of(node: usize, point: Point) -> Self {
        let (term, epoch) = (point.term.0 - 1, point.epoch.0 - 1);
        assert!(term < MAX_TERM && epoch < MAX_EPOCH, "{point} is out of bounds");
        Self(1 << ((term * MAX_EPOCH + epoch) * MAX_NODES + node as u64))
    }

    pub(crate) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether this state is `later` or an ancestor of it.
    pub(crate) fn is_within(self, later: Self) -> bool {
        self.0 & !later.0 == 0
    }

    fn points(self) -> impl Iterator<Item = (Point, u128)> {
        (0..MAX_TERM * MAX_EPOCH * MAX_NODES).filter(move |bit| self.0 >> bit & 1 == 1).map(|bit| {
            let at = bit / MAX_NODES;
            let point = Point { term: Term(at / MAX_EPOCH + 1), epoch: Epoch(at % MAX_EPOCH + 1) };
            (point, 1 << bit)
        })
    }

    pub(crate) fn until(self, epoch: Epoch) -> Self {
        Self(self.points().filter(|(point, _)| point.epoch <= epoch).map(|(_, bit)| bit).sum())
    }

    pub(crate) fn history(self) -> History {
        let mut history = History::default();
        self.points().for_each(|(point, _)| history.extend(point));
        history
    }
}

impl fmt::Debug for Ghost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.points().map(|(point, _)| point.to_string())).finish()
    }
}

/// A dirty set: the cuts that wrote what it carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Pages(pub Ghost);

impl Carried for Pages {
    fn merge(&mut self, other: Self) {
        self.0 = self.0.with(other.0);
    }

    fn is_empty(&self) -> bool {
        self.0 == Ghost::default()
    }
}

/// What a power cut leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Store {
    /// What a boot would start from.
    pub(crate) disk: Option<Ghost>,
    /// A whole copy of the guest.
    pub(crate) image: Option<(Point, Ghost)>,
    pub(crate) id: Option<ReplicaId>,
    pub(crate) active: bool,
    /// In the vm's directory: the last process of this node was starting the vm again, and ran nothing.
    pub(crate) starting: bool,
}

/// How a runner came to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Came {
    First,
    Promoted,
    Booted,
    HandedBack,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Runner {
    pub(crate) replicator: Replicator<Pages>,
    /// The guest now.
    pub(crate) tip: Ghost,
    /// The open dirty set.
    pub(crate) open: Pages,
    /// What the base copy of a seed holds.
    pub(crate) base: Ghost,
    /// The link that it has not seen break, and the newest ack on it that it has not taken.
    pub(crate) peer: Option<usize>,
    pub(crate) ack: Option<Ack>,
    pub(crate) asked: Option<Proposal>,
    /// Its vCPUs stand still, for good or until a hand-back.
    pub(crate) halted: bool,
    pub(crate) came: Came,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Follower {
    pub(crate) replica: Replica,
    /// What its copy holds.
    pub(crate) held: Ghost,
    pub(crate) inbox: Vec<Message>,
    /// What the store has been told about the replica id: store it, or forget it.
    pub(crate) orders: Vec<(bool, ReplicaId)>,
    pub(crate) asked: Option<Proposal>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Message {
    Term(Term),
    /// An epoch that leads to `to`; J if `base` is what the copy holds before it.
    Epoch {
        term: Term,
        point: Point,
        base: Option<Ghost>,
        carried: Pages,
        to: Ghost,
    },
}

#[expect(clippy::large_enum_variant, reason = "most nodes run or follow, and nodes are shared")]
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    Down,
    Follower(Follower),
    Runner(Runner),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    /// Processes before this one.
    pub(crate) born: u8,
    /// As configured.
    pub(crate) policy: AckPolicy,
    pub(crate) store: Store,
    /// The process that the operator told to start the vm again, until the guest runs or the register has refused.
    pub(crate) told: Option<u8>,
    pub(crate) role: Role,
}

/// What must never be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Broken {
    TwoHistories,
    NotAnAncestor,
    LostPage,
    /// A guest was booted, and neither the configuration nor the operator had said so.
    UntoldBoot,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Spent {
    pub(crate) cuts: u8,
    pub(crate) crashes: u8,
    pub(crate) stops: u8,
    pub(crate) switches: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) register: Entry,
    /// Requests that may still change the register, each with its sender. Those that expect another entry cannot.
    pub(crate) requests: Vec<(usize, Proposal)>,
    pub(crate) nodes: Vec<Arc<Node>>,
    /// The newest state whose output the world has seen.
    pub(crate) seen: Ghost,
    pub(crate) spent: Spent,
    pub(crate) broken: Option<Broken>,
}

pub(crate) fn name(node: usize) -> NodeId {
    NAMES[node].clone()
}

pub(crate) fn index(name: &NodeId) -> usize {
    NAMES.iter().position(|known| known == name).expect("a node of the model")
}

pub(crate) fn incarnation(node: usize, born: u8) -> Incarnation {
    Incarnation((node as u128 + 1) * 100 + u128::from(born))
}

/// A copy's id. No two copies of a node become whole by the same J.
pub(crate) fn replica_id(node: usize, join: Point) -> ReplicaId {
    ReplicaId((u128::from(join.term.0) * 100 + u128::from(join.epoch.0)) * 10 + node as u128)
}

impl World {
    /// The first node runs, the others follow nobody.
    pub(crate) fn new(config: &Config) -> Self {
        let value = Value::Solo { node: name(0), incarnation: incarnation(0, 0) };
        let proposal = ProposalId::of(incarnation(0, 0), Term(0));
        let register = Entry { term: Term(1), proposal, value };
        let (store, role) = (Store::default(), Role::Down);
        let node = Node { born: 0, policy: config.policy, store, told: None, role };
        let nodes = (0..config.nodes).map(|_| Arc::new(node.clone())).collect();
        let spent = Spent::default();
        let seen = Ghost::default();
        let mut world = Self { register, requests: Vec::new(), nodes, seen, spent, broken: None };
        world.begin(0, Ghost::default(), Came::First, config);
        (1..config.nodes).for_each(|node| world.start(node, config));
        world
    }

    pub(crate) fn node(&mut self, node: usize) -> &mut Node {
        Arc::make_mut(&mut self.nodes[node])
    }

    pub(crate) fn follower(&self, node: usize) -> Option<&Follower> {
        match &self.nodes[node].role {
            Role::Follower(follower) => Some(follower),
            _ => None,
        }
    }

    pub(crate) fn runner(&self, node: usize) -> Option<&Runner> {
        match &self.nodes[node].role {
            Role::Runner(runner) => Some(runner),
            _ => None,
        }
    }

    pub(crate) fn follower_mut(&mut self, node: usize) -> &mut Follower {
        match &mut self.node(node).role {
            Role::Follower(follower) => follower,
            role => panic!("{role:?} does not follow"),
        }
    }

    pub(crate) fn runner_mut(&mut self, node: usize) -> &mut Runner {
        match &mut self.node(node).role {
            Role::Runner(runner) => runner,
            role => panic!("{role:?} does not run"),
        }
    }

    /// The register names this process of `node`, which runs from `from`.
    pub(crate) fn begin(&mut self, node: usize, from: Ghost, came: Came, config: &Config) {
        let register = self.register.clone();
        let this = self.node(node);
        let untold = came == Came::Booted && !config.boot && this.told.is_none();
        this.told = None;
        this.store.disk = Some(from);
        if came != Came::Promoted || !config.surroundings.promotion_leaves_store {
            let starting = this.store.starting && config.surroundings.run_leaves_note;
            this.store = Store { disk: Some(from), active: true, starting, ..Store::default() };
        }
        let process = incarnation(node, this.born);
        let mut replicator = Replicator::new(name(node), process, register, from.history());
        replicator.mutate(config.runner);
        this.role = Role::Runner(Runner {
            replicator,
            tip: from,
            open: Pages::default(),
            base: Ghost::default(),
            peer: None,
            ack: None,
            asked: None,
            halted: false,
            came,
        });
        if untold {
            self.broken = Some(Broken::UntoldBoot);
        }
    }

    /// A new process of `node` begins with what the store holds; the one after a start again that was cut off is the same
    /// to all others.
    pub(crate) fn start(&mut self, node: usize, config: &Config) {
        let register = self.register.clone();
        let this = self.node(node);
        let Store { image, id, active, starting, .. } = this.store;
        let stored = Stored { active, whole: image.map(|(point, _)| (point, id)) };
        let rules = Rules { policy: this.policy, boot_after_crash: config.boot };
        let mut replica = Replica::new(name(node), incarnation(node, this.born), rules, stored);
        replica.mutate(config.follower);
        let (me, process) = (name(node), incarnation(node, this.born));
        let known = Known { me: &me, incarnation: process, active, starting, again: false, boots: false };
        this.store.starting = match first_look(known, Some(&register)) {
            FirstLook::GoOn => true,
            // It ends, and leaves all as it is.
            FirstLook::End(_) => starting,
            FirstLook::Follow | FirstLook::Wait(_) | FirstLook::Again => false,
        };
        replica.go_on_starting(this.store.starting);
        let held = image.map_or(Ghost::default(), |(_, held)| held);
        let (inbox, orders) = (Vec::new(), Vec::new());
        this.role = Role::Follower(Follower { replica, held, inbox, orders, asked: None });
    }
}
