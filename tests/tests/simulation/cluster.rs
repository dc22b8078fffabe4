//! A whole cluster: several vms, each a [`World`] of its own, and nodes that stand in at most one of them at a time, as a
//! process is bound to one vm. A node is named by a vm's configuration, or it is a spare and bound by its claim until it
//! lets go. The vms share the time, the arbiter, the membership, the hosts and the network.

use colo_common::Incarnation;
use colo_common::arbiter::scripted::{Fate, ScriptedArbiter};
use colo_common::membership::Claim;
use colo_common::membership::scripted::ScriptedMembership;
use colo_common::register::{Entry, Value};
use colo_tests::seed::Seed;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::common::{Common, Counts, index, name};
use crate::operating::Forcing;
use crate::plan::{ClusterPlan, Mutations, Plan, Time};
use crate::presence::{LEASE, Presence};
use crate::world::{Ran, Role, World};

/// Between two looks whether a vm is one that nobody may run.
const LOOK: Time = 25;
/// A vm that is one for so long stays one: there is no need to wait for the end.
const LOST_FOR_GOOD: Time = 500;
/// After what part of that an operator has it run by force, if he is one who does.
pub(crate) const BROUGHT_BACK: Time = 250;

/// What the process of a node does.
pub(crate) enum Life {
    Down {
        since: Time,
    },
    /// Bound to no vm.
    Spare {
        next_look: Time,
    },
    /// Its part is in that vm's world.
    Bound(usize),
}

/// A node: one process, and what outlives it in each vm's world.
pub(crate) struct Unit {
    pub(crate) host: usize,
    /// The vm of its configuration; a spare's has none.
    pub(crate) home: Option<usize>,
    pub(crate) life: Life,
    pub(crate) presence: Option<Presence>,
    pub(crate) claim: Option<Claim>,
    /// It is being emptied: `drain::Drain`.
    pub(crate) draining: bool,
    /// Until when an operator keeps it off, on behalf of each vm.
    pub(crate) off_until: Vec<Time>,
}

impl Unit {
    pub(crate) fn is_kept_off(&self, now: Time) -> bool {
        self.off_until.iter().any(|&until| now < until)
    }
}

/// All of it.
pub(crate) struct Cluster {
    pub(crate) now: Time,
    pub(crate) seed: Seed,
    pub(crate) plan: ClusterPlan,
    pub(crate) mutations: Mutations,
    pub(crate) worlds: Vec<World>,
    /// Vms that were seen to be protected again, or stopped, after the faults.
    done: Vec<bool>,
    /// Since when nobody may run a vm, at each look.
    pub(crate) lost_since: Vec<Option<Time>>,
    pub(crate) units: Vec<Unit>,
    pub(crate) arbiter: Arc<ScriptedArbiter>,
    pub(crate) membership: ScriptedMembership,
    pub(crate) outage: bool,
    /// Until when, and how, a host cannot speak to the arbiter.
    pub(crate) cut_off: Vec<(Time, Fate)>,
    /// Processes that died without a word, and when their leases run out.
    dead: Vec<(Time, Incarnation)>,
    /// To which vm a spare's process was granted, until its lease runs out or it lets go: the claim ends with that.
    pub(crate) granted: BTreeMap<(String, Incarnation), usize>,
    /// Of each vm, the node that an operator has run it by force.
    pub(crate) forcing: Vec<Option<Forcing>>,
    pub(crate) counts: Counts,
    broken: Option<String>,
}

/// Runs a seed to its end.
pub(crate) fn run(number: u64, mutations: Mutations, traced: bool) -> Ran {
    let mut cluster = Cluster::new(number, mutations, traced);
    while cluster.broken.is_none()
        && cluster.now < cluster.plan.limit
        && !cluster.done.iter().all(|&done| done)
    {
        cluster.tick();
    }
    cluster.conclude();
    for world in &mut cluster.worlds {
        cluster.counts.merge(&world.counted());
    }
    Ran { broken: cluster.broken, counts: cluster.counts }
}

impl Cluster {
    fn new(number: u64, mutations: Mutations, traced: bool) -> Self {
        let mut seed = Seed::new(number.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0xc1);
        let plan = ClusterPlan::of(&mut seed);
        let arbiter = Arc::new(ScriptedArbiter::seeded(seed.next_u64(), plan.arbiter));
        let membership = ScriptedMembership::seeded(Arc::clone(&arbiter), seed.next_u64(), plan.arbiter);
        let world = |vm: usize, seed: &mut Seed| {
            let mut own = Seed::new(seed.next_u64());
            let vm_plan = Plan::of(&mut own).in_cluster(&plan);
            let mut common = Common::of(vm, (own, vm_plan), Arc::clone(&arbiter), mutations, traced);
            common.membership = Some(membership.clone());
            World::empty(vm, common)
        };
        let worlds: Vec<World> = (0..plan.vms).map(|vm| world(vm, &mut seed)).collect();
        let unit = |x: usize| Unit {
            host: x % plan.hosts,
            home: Some(x).filter(|&x| x < plan.vms),
            life: Life::Down { since: 0 },
            presence: None,
            claim: None,
            draining: false,
            off_until: vec![0; plan.vms],
        };
        let units: Vec<Unit> = (0..plan.nodes).map(unit).collect();
        let mut cluster = Self {
            now: 0,
            seed,
            mutations,
            done: vec![false; worlds.len()],
            lost_since: vec![None; worlds.len()],
            worlds,
            units,
            arbiter,
            membership,
            outage: false,
            cut_off: vec![(0, Fate::Lost); plan.hosts],
            dead: Vec::new(),
            granted: BTreeMap::new(),
            forcing: vec![None; plan.vms],
            counts: Counts::default(),
            broken: None,
            plan,
        };
        for x in (0..cluster.units.len()).filter(|&x| cluster.units[x].home.is_none()) {
            cluster.worlds.iter_mut().for_each(|world| world.spares[x] = true);
        }
        (0..cluster.units.len()).for_each(|x| cluster.start(x));
        cluster
    }

    /// A virtual millisecond.
    fn tick(&mut self) {
        self.now += 1;
        self.worlds.iter_mut().for_each(|world| world.common.now = self.now);
        self.reach();
        if self.now < self.plan.faults_end {
            self.faults();
        } else if self.now == self.plan.faults_end {
            self.heal();
        } else {
            self.repair();
        }
        self.renew_leases();
        for x in 0..self.units.len() {
            self.look_for_claim(x);
        }
        for world in &mut self.worlds {
            world.turns();
        }
        for x in 0..self.units.len() {
            self.follow_up(x);
        }
        self.check();
    }

    /// Which nodes can speak to the arbiter. In an outage none can, whatever the network does.
    fn reach(&mut self) {
        let Self { worlds, units, cut_off, outage, now, .. } = self;
        for common in worlds.iter_mut().map(|world| &mut world.common) {
            for (x, unit) in units.iter().enumerate() {
                let (until, fate) = cut_off[unit.host];
                common.cut_off[x] = Some(fate).filter(|_| until > *now && !*outage);
            }
        }
    }

    /// Whether a node's process stands still.
    pub(crate) fn is_frozen(&self, x: usize) -> bool {
        let world = match self.units[x].life {
            Life::Bound(vm) => &self.worlds[vm],
            _ => &self.worlds[0],
        };
        world.common.net.frozen[x] > self.now
    }

    fn renew_leases(&mut self) {
        for x in 0..self.units.len() {
            // While etcd has no majority, no lease runs out.
            let renews = self.outage || !self.is_frozen(x) && self.worlds[0].common.cut_off[x].is_none();
            if let Some(presence) = &mut self.units[x].presence
                && presence.renew(renews, self.now)
            {
                self.counts.add("leases of the living run out", 1);
                self.membership.expire_process(presence.process);
                let process = presence.process;
                self.granted.retain(|(_, of), _| *of != process);
            }
        }
        if self.outage || self.mutations.endless_leases {
            return;
        }
        let (now, membership) = (self.now, &self.membership);
        self.dead.retain(|(until, process)| {
            if *until <= now {
                membership.expire_process(*process);
            }
            *until > now
        });
    }

    /// A process is gone, and nobody has said so.
    pub(crate) fn die(&mut self, x: usize) {
        let unit = &mut self.units[x];
        (unit.life, unit.claim) = (Life::Down { since: self.now }, None);
        if let Some(presence) = unit.presence.take() {
            self.dead.push((self.now + LEASE, presence.process));
            self.membership.set_outage(true);
            drop(presence);
            self.membership.set_outage(self.outage);
        }
        self.worlds.iter_mut().for_each(|world| world.elsewhere[x] = false);
    }

    /// What became of a bound process in this tick, and what it says of itself.
    fn follow_up(&mut self, x: usize) {
        let Life::Bound(vm) = self.units[x].life else { return };
        let node = &self.worlds[vm].nodes[x];
        if matches!(node.role, Role::Down { .. }) {
            if node.let_go && self.units[x].home.is_none() {
                return self.be_spare_again(x, vm);
            }
            return self.die(x);
        }
        let (process, now) = (self.worlds[vm].common.net.processes[x], self.now);
        let Some(process) = process else { return };
        let unit = &mut self.units[x];
        if unit.presence.as_ref().is_none_or(|presence| presence.process != process) {
            // Another process in the place of the one before, which has said that it goes.
            unit.presence = Some(Presence::new(x, process, unit.draining, now));
            unit.claim = None;
        }
        let frozen = self.is_frozen(x);
        let Unit { presence, draining, .. } = &mut self.units[x];
        if !frozen && let Some(presence) = presence {
            presence.tell(x, &self.worlds[vm].nodes[x].role, *draining, &self.worlds[vm].common);
        }
    }

    /// What must hold at every instant, of all vms together.
    fn check(&mut self) {
        for vm in 0..self.worlds.len() {
            for claim in std::mem::take(&mut self.worlds[vm].common.claimed) {
                let spare = (claim.node.to_string(), claim.node_incarnation);
                let other = *self.granted.entry(spare).or_insert(vm);
                if other != vm {
                    self.break_rule(format!("the spare {} is promised to two vms: {claim}", claim.node));
                }
                let drained = self.units[index(&claim.node)].presence.as_ref().is_some_and(|presence| {
                    presence.process == claim.node_incarnation && presence.drained_spare
                });
                if drained {
                    self.break_rule(format!(
                        "the spare {} is being emptied and was claimed: {claim}",
                        claim.node
                    ));
                }
            }
            if let Some(why) = self.worlds[vm].common.outside.broken.take() {
                let name = self.worlds[vm].common.vm().clone();
                self.break_rule(format!("{name}: {why}"));
            }
            if !self.done[vm] && self.now > self.plan.faults_end {
                self.look_whether_done(vm);
            }
        }
        for x in 0..self.units.len() {
            let up = |world: &&World| !matches!(world.nodes[x].role, Role::Down { .. });
            let serves = self.worlds.iter().filter(up).count();
            let bound = matches!(self.units[x].life, Life::Bound(_));
            if serves != usize::from(bound) {
                self.break_rule(format!("node {x} serves {serves} vms, and is bound: {bound}"));
            }
        }
    }

    fn look_whether_done(&mut self, vm: usize) {
        let (now, faults_end) = (self.now, self.plan.faults_end);
        if self.worlds[vm].is_done() {
            self.done[vm] = true;
            self.counts.add(Self::took(now - faults_end), 1);
            return;
        }
        if !(now - faults_end).is_multiple_of(LOOK) {
            return;
        }
        let Some(why) = self.worlds[vm].why_nobody() else {
            if self.lost_since[vm].take().is_some_and(|since| now - since > BROUGHT_BACK) {
                self.counts.add("vms brought back by force", 1);
            }
            return;
        };
        if now - *self.lost_since[vm].get_or_insert(now) > LOST_FOR_GOOD {
            self.done[vm] = true;
            self.counts.add(why, 1);
        }
    }

    fn took(ticks: Time) -> &'static str {
        match ticks {
            0..100 => "healed within 3 s",
            100..300 => "healed within 10 s",
            300..1000 => "healed within 30 s",
            1000..2000 => "healed within 60 s",
            _ => "healed later",
        }
    }

    fn break_rule(&mut self, why: String) {
        self.broken.get_or_insert(why);
    }

    /// A vm that is neither protected nor stopped must be one that nobody may run, or that nobody is left for.
    fn conclude(&mut self) {
        if self.broken.is_some() {
            return;
        }
        for vm in 0..self.worlds.len() {
            if self.done[vm] {
                continue;
            }
            if self.now >= self.plan.limit && self.has_nobody_left(vm) {
                self.counts.add("ended without a node", 1);
                continue;
            }
            self.worlds[vm].conclude();
            if let Some(why) = self.worlds[vm].common.outside.broken.take() {
                let lives: Vec<String> = (0..self.units.len()).map(|x| self.describe(x)).collect();
                let claims = self.membership.peek_claims();
                return self.break_rule(format!("{why}; {}; {claims:?}", lives.join("; ")));
            }
        }
    }

    /// Whether a vm runs, and all other nodes are needed by other vms or bound to them by their configuration.
    fn has_nobody_left(&self, vm: usize) -> bool {
        let runs = |x: &usize| self.worlds[vm].runner(*x).is_some_and(|runner| !runner.failed);
        let Some(runner) = (0..self.units.len()).find(runs) else { return false };
        let needed = |x: usize, of: usize| match self.arbiter.peek(self.worlds[of].common.vm()) {
            Some(Entry { value: Value::Paired { primary, secondary, .. }, .. }) => {
                [primary, secondary].contains(&name(x))
            }
            Some(Entry { value: Value::Solo { node, .. }, .. }) => node == name(x),
            _ => false,
        };
        let is_taken = |x: usize| match self.units[x].life {
            Life::Bound(of) => of != vm && (self.units[x].home.is_some() || needed(x, of)),
            _ => false,
        };
        (0..self.units.len()).all(|x| x == runner || is_taken(x))
    }

    fn describe(&self, x: usize) -> String {
        match self.units[x].life {
            Life::Down { .. } => format!("{x} down"),
            Life::Spare { .. } => format!("{x} spare"),
            Life::Bound(vm) => format!("{x} of {}", self.worlds[vm].common.vm()),
        }
    }
}
