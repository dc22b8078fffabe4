//! A simulated cluster: its nodes, what reaches them, and the run from the first fault to the last repair.

use colo_common::history::History;
use colo_common::register::{Answer, Entry, Value};
use colo_common::vmdir::Runner as Known;
use colo_common::{Epoch, Incarnation, NodeId, Point, ReplicaId, Term};
use colo_primary::arbiter_worker::Found;
use colo_primary::last_changed::LastChanged;
use colo_primary::release::Release;
use colo_primary::replicator::{End, Entitled, Phase, Replicator};
use colo_primary::start::{Allowed, decide};
use colo_secondary::replica::{AckPolicy, Copy};
use colo_secondary::store::StoreError;
use colo_vmm::ProtectedGuest;
use std::sync::Arc;

use crate::common::{ArbiterClient, Common, Counts, incarnation, index, name};
use crate::follower::{Durable, Follower, Outcome};
use crate::intent::LoggedDisk;
use crate::net::{Msg, Way};
use crate::outside::Begins;
use crate::plan::{BLOCKS, FRAMES, MAX_NODES, Mutations, Time};
use crate::runner::{Beginning, GuestDisk, Runner};
use crate::switching::Left;
use std::time::Duration;

/// A guest whose rings are overrun so often after the faults cannot be protected.
const MANY_OVERRUNS: u64 = 3;

/// What runs on a node.
pub(crate) enum Role {
    Down {
        since: Time,
    },
    /// `colo-primary` before its guest runs.
    Starting(Box<Starting>),
    Follower(Box<Follower>),
    Runner(Box<Runner>),
}

/// `primary::start`, while it waits for the arbiter.
pub(crate) struct Starting {
    incarnation: Incarnation,
    arbiter: ArbiterClient,
    allowed: Allowed,
}

/// A node.
pub(crate) struct Node {
    pub(crate) durable: Durable,
    pub(crate) role: Role,
    /// Under the policy `disk`: what the store must show after a crash, if the register still names that copy.
    promise: Option<(ReplicaId, Option<Point>)>,
    /// Its process has let go of the vm by itself.
    pub(crate) let_go: bool,
    /// How long this runner's guest was without protection, by the world's account.
    bare: Time,
}

/// What came of a seed.
pub(crate) struct Ran {
    pub(crate) broken: Option<String>,
    pub(crate) counts: Counts,
}

/// The cluster.
pub(crate) struct World {
    pub(crate) nodes: Vec<Node>,
    pub(crate) common: Common,
    /// The first point that was acked after the faults.
    goal: Option<Point>,
    /// Ring overruns until the faults ended.
    pub(crate) overruns: u64,
    /// Nodes whose process is bound to another vm.
    pub(crate) elsewhere: [bool; MAX_NODES],
    /// Nodes that no configuration binds to this vm.
    pub(crate) spares: [bool; MAX_NODES],
    /// Where the vm begins.
    pub(crate) home: usize,
}

/// Runs a seed to its end.
pub(crate) fn run(number: u64, mutations: Mutations, traced: bool) -> Ran {
    let mut world = World::new(number, mutations, traced);
    while world.common.outside.broken.is_none()
        && world.common.now < world.common.plan.limit
        && !world.is_done()
    {
        world.tick();
    }
    world.conclude();
    let counts = world.counted();
    Ran { broken: world.common.outside.broken.take(), counts }
}

impl World {
    fn new(number: u64, mutations: Mutations, traced: bool) -> Self {
        let mut world = Self::empty(0, Common::new(number, mutations, traced));
        world.start_primary(0, false);
        (1..world.nodes.len()).for_each(|x| world.start_secondary(x));
        world
    }

    /// Nodes of which none is up.
    pub(crate) fn empty(home: usize, common: Common) -> Self {
        let policy = common.plan.policy;
        let node = || Node {
            durable: Durable { policy, ..Durable::default() },
            role: Role::Down { since: 0 },
            promise: None,
            let_go: false,
            bare: 0,
        };
        let nodes: Vec<Node> = (0..common.plan.nodes).map(|_| node()).collect();
        if common.mutations.file_never_synced {
            nodes.iter().for_each(|node| node.durable.file.lie());
        }
        Self {
            nodes,
            common,
            goal: None,
            overruns: 0,
            elsewhere: [false; MAX_NODES],
            spares: [false; MAX_NODES],
            home,
        }
    }

    /// A virtual millisecond.
    fn tick(&mut self) {
        self.common.now += 1;
        let now = self.common.now;
        if now < self.common.plan.faults_end {
            self.faults();
        } else if now == self.common.plan.faults_end {
            self.heal();
        } else {
            self.repair();
        }
        self.turns();
    }

    /// How often what happened, with what is counted elsewhere.
    pub(crate) fn counted(&self) -> Counts {
        let Common { net, outside, counts, now, .. } = &self.common;
        let (mut counts, (bytes, frames)) = (counts.clone(), outside.released());
        for (what, times) in [
            ("messages lost", net.lost),
            ("links doubled", net.doubled),
            ("bytes released", bytes),
            ("packets released", frames),
            ("ticks", *now),
        ] {
            counts.add(what, times);
        }
        counts
    }

    /// What arrives now, and then a turn of every node.
    pub(crate) fn turns(&mut self) {
        let now = self.common.now;
        while let Some((link, node, message)) = self.common.net.down(now) {
            self.deliver(link, node, message);
        }
        while let Some((link, node, message)) = self.common.net.deliver(now) {
            self.deliver(link, node, message);
        }
        for x in 0..self.nodes.len() {
            if self.common.net.frozen[x] <= now && self.common.net.busy[x] <= now {
                self.turn(x);
            }
        }
        self.account();
        self.check();
    }

    /// Time without protection, by what the register was when the runner heard of it last.
    fn account(&mut self) {
        let Self { nodes, common, .. } = self;
        for (x, node) in nodes.iter_mut().enumerate() {
            let Role::Runner(runner) = &node.role else {
                node.bare = 0;
                continue;
            };
            let (told, bare) = (runner.told_unprotected(common), Duration::from_millis(node.bare));
            if told != bare {
                common
                    .outside
                    .broken(|| format!("node {x} says that it was bare {told:?}, and it was {bare:?}"));
            }
            let runs = !matches!(runner.replicator.phase(), Phase::Lost { .. } | Phase::Over);
            if runs && !matches!(runner.replicator.register().value, Value::Paired { .. }) {
                node.bare += 1;
            }
        }
    }

    fn deliver(&mut self, link: u64, x: usize, message: Msg) {
        let Self { nodes, common, .. } = self;
        let Node { role, durable, .. } = &mut nodes[x];
        match role {
            Role::Runner(runner) if !matches!(message, Msg::Hello { .. }) => {
                runner.on_message(link, message, common);
                runner.settle(common);
            }
            Role::Follower(follower) => {
                // Kept with `keep_spec` when a runner first agrees with this node on the guest.
                durable.spec |= matches!(message, Msg::Hello { .. });
                follower.on_message(link, message, common);
            }
            Role::Down { .. } if self.elsewhere[x] && matches!(message, Msg::Hello { .. }) => {
                common.send(link, Way::Hear, Msg::Refused("it follows another vm".to_owned()));
            }
            _ if matches!(message, Msg::Hello { .. }) => {
                common.send(link, Way::Hear, Msg::Down("no follower answers there".to_owned()));
            }
            _ => {}
        }
        self.follow_up(x);
    }

    fn turn(&mut self, x: usize) {
        let Self { nodes, common, .. } = self;
        match &mut nodes[x].role {
            Role::Down { .. } => return,
            Role::Starting(_) => return self.go_on_starting(x),
            Role::Follower(follower) => follower.tick(common),
            Role::Runner(runner) => {
                runner.tick(common);
                let (me, process) = (name(x), runner.incarnation);
                if let Some((to, lost_to)) = runner.offers_hand_back(common.now) {
                    self.offer_hand_back(&me, process, &to, lost_to);
                }
            }
        }
        self.follow_up(x);
    }

    /// What becomes of a process that has ended its part.
    fn follow_up(&mut self, x: usize) {
        let Self { nodes, common, .. } = self;
        let Node { role, durable, .. } = &mut nodes[x];
        match role {
            Role::Follower(follower) => {
                if follower.persister.died {
                    return self.crash(x, "deaths in a write");
                }
                let incarnation = follower.incarnation;
                if let Some(known) = durable.runner.as_mut().filter(|_| follower.forgets_running) {
                    known.active = None;
                }
                match follower.end.take() {
                    None => {}
                    Some(Outcome::Run(beginning)) => {
                        let runner = Runner::new(x, incarnation, *beginning, common);
                        *role = Role::Runner(Box::new(runner));
                    }
                    Some(Outcome::Superseded | Outcome::Unfollowed) => {
                        self.crash(x, "processes that let go");
                        self.nodes[x].let_go = true;
                    }
                    Some(Outcome::Failed(why)) => {
                        common.note(x, || format!("ends: {why}"));
                        self.crash(x, "processes that gave up");
                    }
                }
            }
            Role::Runner(runner) if runner.end.is_some() => self.end_runner(x),
            _ => {}
        }
    }

    /// `Runner::run` of `serve`: a runner that lost its vm follows, in the place of its process.
    fn end_runner(&mut self, x: usize) {
        let follows = self.runner(x).is_some_and(|runner| match &runner.end {
            Some(End::Superseded(Some(entry))) => !matches!(entry.value, Value::Stopped { .. }),
            _ => false,
        });
        if !follows || self.common.seed.below(3) == 0 {
            return self.crash(x, "runners that ended");
        }
        self.common.count("runners that follow");
        let role = std::mem::replace(&mut self.nodes[x].role, Role::Down { since: self.common.now });
        let Role::Runner(runner) = role else { return };
        self.nodes[x].durable.spec = true;
        self.nodes[x].promise = None;
        let incarnation = incarnation(&mut self.common);
        self.start_with(x, incarnation, Some(runner.remains()));
    }

    fn offer_hand_back(&mut self, me: &NodeId, process: Incarnation, to: &NodeId, lost_to: Term) {
        let (from, to, now) = (index(me), index(to), self.common.now);
        let blocked = self.common.net.is_blocked(from, to, now) || self.common.net.frozen[to] > now;
        if let Role::Follower(follower) = &mut self.nodes[to].role
            && !blocked
        {
            follower.hand_back = Some((me.clone(), process, lost_to));
            follower.read();
        }
    }

    /// The end of a process; what its memory held is gone.
    pub(crate) fn crash(&mut self, x: usize, how: &'static str) {
        let Self { nodes, common, .. } = self;
        let node = &mut nodes[x];
        node.promise = match &node.role {
            Role::Follower(follower) => match follower.replica.copy() {
                // Not while the operator wants to go back to `memory`.
                Copy::Whole { replica, named: true, .. }
                    if [follower.replica.policy(), node.durable.policy] == [AckPolicy::Disk; 2] =>
                {
                    Some((*replica, follower.replica.acked()))
                }
                _ => None,
            },
            _ => None,
        };
        common.count(how);
        common.note(x, || format!("is down ({how})"));
        let lost = common.seed.next_u64();
        node.durable.disk.crash(lost);
        node.durable.file.crash(lost);
        node.role = Role::Down { since: common.now };
        node.let_go = false;
        common.net.processes[x] = None;
        common.net.busy[x] = 0;
    }

    /// `colo-secondary start`.
    pub(crate) fn start_secondary(&mut self, x: usize) {
        let incarnation = incarnation(&mut self.common);
        self.start_with(x, incarnation, None);
    }

    /// A spare's process is bound to the vm; by a claim, or because the register names its node.
    pub(crate) fn bind(&mut self, x: usize, process: Incarnation, claimed: bool) {
        self.start_with(x, process, None);
        if let Role::Follower(follower) = &mut self.nodes[x].role {
            follower.claimed = claimed;
        }
    }

    fn start_with(&mut self, x: usize, incarnation: Incarnation, left: Option<Left>) {
        let Self { nodes, common, .. } = self;
        let node = &mut nodes[x];
        match Follower::start(x, incarnation, &node.durable, left, common) {
            Ok(mut follower) => {
                follower.spare = self.spares[x];
                let copy = follower.replica.copy().clone();
                node.role = Role::Follower(Box::new(follower));
                common.net.processes[x] = Some(incarnation);
                self.check_start(x, &copy);
            }
            Err(StoreError::NoSpace { .. }) => common.count("starts without room"),
            Err(e) => common.outside.broken(|| format!("the store of node {x} does not open: {e}")),
        }
    }

    /// Rule 5, and what a replica id says.
    fn check_start(&mut self, x: usize, copy: &Copy) {
        let promise = self.nodes[x].promise.take();
        let Some(Value::Paired { secondary, replica: named, .. }) =
            self.common.arbiter.peek(self.common.vm()).map(|entry| entry.value)
        else {
            return;
        };
        if secondary != name(x) {
            return;
        }
        if let Some((_, acked)) = promise.filter(|(replica, _)| *replica == named) {
            let kept = matches!(copy, Copy::Whole { replica, staged, .. }
                if *replica == named && Some(*staged) >= acked);
            self.common.count("disk promises");
            if !kept {
                self.common
                    .outside
                    .broken(|| format!("{acked:?} was acked under disk, and now there is {copy:?}"));
            }
        }
        if let Copy::Whole { replica, staged, .. } = copy
            && *replica == named
        {
            self.common.outside.check_stored(*staged);
        }
    }

    /// `colo-primary start`.
    pub(crate) fn start_primary(&mut self, x: usize, again: bool) {
        let incarnation = incarnation(&mut self.common);
        let allowed = Allowed { boot_after_crash: self.common.plan.boot, start_again: again };
        let mut arbiter = ArbiterClient::of(x);
        arbiter.read();
        self.common.net.processes[x] = Some(incarnation);
        self.nodes[x].role = Role::Starting(Box::new(Starting { incarnation, arbiter, allowed }));
    }

    fn go_on_starting(&mut self, x: usize) {
        let Self { nodes, common, .. } = self;
        let Node { role, durable, .. } = &mut nodes[x];
        let Role::Starting(starting) = role else { return };
        let (incarnation, allowed) = (starting.incarnation, starting.allowed);
        let Some(found) = starting.arbiter.poll(common) else { return };
        match found {
            Found::Entry(found) => {
                match decide(&name(x), incarnation, found.as_ref(), durable.runner, allowed) {
                    Ok(proposal) => starting.arbiter.propose(proposal),
                    Err(e) => {
                        common.note(x, || e.to_string());
                        self.crash(x, "primaries not started");
                    }
                }
            }
            Found::Answer(_, Answer::Applied(entry)) => self.run_primary(x, incarnation, entry),
            _ => self.crash(x, "primaries not started"),
        }
    }

    fn run_primary(&mut self, x: usize, incarnation: Incarnation, entry: Entry) {
        let Self { nodes, common, .. } = self;
        nodes[x].durable.runner = Some(Known { seen: entry.term, active: Some(entry.term), starting: None });
        common.count("primaries started");
        common.note(x, || format!("boots the guest: {entry}"));
        let disk = GuestDisk::File(nodes[x].durable.file.clone());
        let intent = nodes[x].durable.intent.clone();
        let begun = intent.begin(&*disk.disk(), Point { term: entry.term, epoch: Epoch(0) });
        begun.expect("an image in memory");
        let logged = LoggedDisk { image: disk.disk(), intent: intent.clone() };
        let mut guest = common.guest(common.memory(), Arc::new(logged));
        guest.boot().expect("a new guest boots");
        let stint = common.outside.boot(Begins { node: x, term: entry.term, forced: false });
        let replicator = Replicator::new(name(x), incarnation, entry, History::default());
        let last_changed = LastChanged::none(FRAMES, BLOCKS);
        let secondary = Some((x + 1) % nodes.len());
        let release = Release::default();
        let beginning = Beginning {
            replicator,
            guest,
            disk,
            intent,
            stint,
            release,
            promotions: 0,
            secondary,
            last_changed,
            moved: false,
            planned: false,
        };
        nodes[x].role = Role::Runner(Box::new(Runner::new(x, incarnation, beginning, common)));
    }

    pub(crate) fn runner(&self, x: usize) -> Option<&Runner> {
        match &self.nodes[x].role {
            Role::Runner(runner) => Some(runner),
            _ => None,
        }
    }

    pub(crate) fn follower(&self, x: usize) -> Option<&Follower> {
        match &self.nodes[x].role {
            Role::Follower(follower) => Some(follower),
            _ => None,
        }
    }

    /// What must hold at every instant beside what is checked where it happens.
    fn check(&mut self) {
        let runners = (0..self.nodes.len()).filter_map(|x| self.runner(x));
        let alone = runners.filter(|runner| runner.replicator.entitled() == Entitled::All).count();
        if alone > 1 {
            self.common.outside.broken(|| format!("{alone} nodes run the guest alone"));
        }
    }

    /// After the faults: protected again, and going on; or stopped for good.
    pub(crate) fn is_done(&mut self) -> bool {
        if self.common.now <= self.common.plan.faults_end {
            return false;
        }
        let register = self.common.arbiter.peek(self.common.vm());
        if matches!(register, Some(Entry { value: Value::Stopped { .. }, .. })) {
            self.common.count("ended stopped");
            return true;
        }
        let acked = (0..self.nodes.len()).filter_map(|x| self.runner(x)).find_map(|runner| {
            let paired = matches!(runner.replicator.phase(), Phase::Paired { .. });
            runner.replicator.acked().filter(|_| paired && runner.replicator.is_linked())
        });
        let Some(acked) = acked else { return false };
        let first = *self.goal.get_or_insert(acked);
        let done = acked.term > first.term || acked.epoch.0 > first.epoch.0 + 2;
        if done {
            self.common.count("ended protected");
        }
        done
    }

    /// A cluster that is neither must be one in which nobody may run the guest.
    pub(crate) fn conclude(&mut self) {
        if self.common.now < self.common.plan.limit || self.common.outside.broken.is_some() {
            return;
        }
        match self.why_nobody() {
            Some(why) => self.common.count(why),
            None => {
                let register = self.common.arbiter.peek(self.common.vm());
                let roles: Vec<String> = (0..self.nodes.len()).map(|x| self.describe(x)).collect();
                self.common
                    .outside
                    .broken(|| format!("the vm is not protected again: {register:?}; {}", roles.join("; ")));
            }
        }
    }

    /// Why nobody may run the guest, or protect it, if that is so.
    pub(crate) fn why_nobody(&self) -> Option<&'static str> {
        let boot = self.common.plan.boot;
        let register = self.common.arbiter.peek(self.common.vm())?;
        if self.common.counts.of("ring overruns") > self.overruns + MANY_OVERRUNS {
            return Some("ended overrunning");
        }
        let x = match &register.value {
            Value::Paired { secondary, replica, .. } => {
                let follower = self.follower(index(secondary))?;
                let lives = (0..self.nodes.len()).filter_map(|x| self.runner(x)).any(|runner| !runner.failed);
                return (!lives && follower.replica_id() != Some(*replica)).then_some("ended without a copy");
            }
            Value::Solo { node, .. } => index(node),
            Value::Stopped { .. } => return None,
        };
        let follower = self.follower(x)?;
        let active = follower.replica.is_active();
        let known = self.nodes[x].durable.runner.is_some_and(|known| known.active.is_some());
        let holds = matches!(follower.replica.copy(), Copy::Whole { .. });
        let lost = (0..self.nodes.len()).filter_map(|x| self.runner(x)).any(
            |runner| matches!(runner.replicator.phase(), Phase::Lost { to } if to.term == register.term),
        );
        let may = (active || known) && boot || (holds && !active) || (lost && !active);
        (!may).then_some("ended without a guest")
    }

    fn describe(&self, x: usize) -> String {
        match &self.nodes[x].role {
            Role::Down { .. } => format!("{} is down", name(x)),
            Role::Starting(_) => format!("{} starts", name(x)),
            Role::Follower(f) => {
                format!(
                    "{} follows {:?} with {:?}, active {}, store failed {}",
                    name(x),
                    f.replica.source(),
                    f.replica.copy(),
                    f.replica.is_active(),
                    f.store_failed
                )
            }
            Role::Runner(r) => format!(
                "{} runs in {:?}, linked {}, standing {}, resting {}, failed {}, secondary {:?}, proposing {}",
                name(x),
                r.replicator.phase(),
                r.replicator.is_linked(),
                r.standing.is_some(),
                r.resting.is_some(),
                r.failed,
                r.secondary,
                r.replicator.is_proposing()
            ),
        }
    }
}
