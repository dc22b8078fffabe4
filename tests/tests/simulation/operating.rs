//! What operators do with a whole cluster at any moment, beside what they ask of one vm's nodes: they have a guest run by
//! force, fence a runner, say who decides on failovers, and empty nodes. Their words are true: whoever says that a node is
//! fenced has ended its process, and keeps it off until he has his answer.

use colo_common::Incarnation;
use colo_primary::node::status::Role as Runs;
use colo_secondary::replica::{Copy, others};

use crate::cluster::{BROUGHT_BACK, Cluster, Life};
use crate::common::{index, name};
use crate::plan::{HASTE, Time};
use crate::world::{Role, World};

/// How long an operator tries to have a node run a vm, and how long he waits for one answer at most.
const TRIES: Time = 300;
const WAITS: u64 = 60;
/// Between two times that a runner on a node that is emptied is told to move its guest: `drain::AGAIN` of coloctl.
const AGAIN: Time = 5_000 / HASTE;

/// An operator has a node run a vm by force.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Forcing {
    x: usize,
    process: Incarnation,
    until: Time,
    /// He does nothing before.
    next: Time,
    /// Nodes may come back once he has had his answer, though he has not forced anything yet.
    careless: bool,
    /// He has asked for it, and waits.
    asked: bool,
}

impl Cluster {
    /// What is done in this tick.
    pub(crate) fn operate(&mut self) {
        let rates = self.plan.rates;
        for vm in 0..self.worlds.len() {
            if self.chance(rates.force) {
                self.begin_forcing(vm);
            }
            self.go_on_forcing(vm);
        }
        for x in 0..self.units.len() {
            if self.is_frozen(x) {
                continue;
            }
            if let Life::Bound(vm) = self.units[x].life {
                if self.worlds[vm].runner(x).is_some() && self.chance(rates.fence) {
                    self.counts.add("runners fenced", 1);
                    self.worlds[vm].fence(x);
                } else if self.chance(rates.failover) {
                    self.set_failover(x, vm);
                }
            }
            if self.chance(rates.drain) {
                if self.units[x].draining { self.end_drain(x) } else { self.begin_drain(x) }
            }
            self.go_on_draining(x);
        }
    }

    fn set_failover(&mut self, x: usize, vm: usize) {
        if let Role::Follower(follower) = &mut self.worlds[vm].nodes[x].role {
            follower.auto_failover ^= true;
            let auto = follower.auto_failover;
            self.counts.add(if auto { "failovers set to auto" } else { "failovers set to manual" }, 1);
        }
    }

    /// One that has something to run the guest from is chosen. Now and then he just asks, and is refused.
    fn begin_forcing(&mut self, vm: usize) {
        if self.forcing[vm].is_some() {
            return;
        }
        let holds = |x: &usize| !self.is_frozen(*x) && self.worlds[vm].may_be_forced(*x);
        let able: Vec<usize> = (0..self.units.len()).filter(holds).collect();
        if able.is_empty() {
            return;
        }
        let x = able[self.seed.below(able.len() as u64) as usize];
        self.counts.add("forces by the operator", 1);
        let (asks, careless) = (self.seed.below(3) == 0, self.seed.below(2) == 0);
        self.force(vm, x, careless, asks);
    }

    fn force(&mut self, vm: usize, x: usize, careless: bool, asks: bool) {
        let until = self.now + TRIES;
        let World { nodes, common, .. } = &mut self.worlds[vm];
        let Role::Follower(follower) = &mut nodes[x].role else { return };
        common.note(x, || "is chosen to run the guest by force".to_owned());
        let process = follower.incarnation;
        if asks {
            follower.ask_to_run(true, until, common);
        }
        self.forcing[vm] = Some(Forcing { x, process, until, next: 0, careless, asked: asks });
    }

    /// Whoever may run the vm is ended, and said to be fenced; then the node is told to run it.
    pub(crate) fn go_on_forcing(&mut self, vm: usize) {
        let Some(mut forcing) = self.forcing[vm] else { return };
        let (x, now) = (forcing.x, self.now);
        let register = self.arbiter.peek(self.worlds[vm].common.vm());
        let World { nodes, common, .. } = &mut self.worlds[vm];
        let follower = match &mut nodes[x].role {
            Role::Follower(follower) if follower.incarnation == forcing.process && now < forcing.until => {
                follower
            }
            _ => return self.end_forcing(vm),
        };
        if now < forcing.next || follower.asked.waits(now) {
            return;
        }
        let unanswered = follower.asked.is_unanswered();
        if unanswered || forcing.careless {
            self.units.iter_mut().for_each(|unit| unit.off_until[vm] = 0);
        }
        if unanswered && forcing.next == 0 {
            // He leaves without an answer, and comes back.
            forcing.next = now + 10 + self.seed.below(WAITS);
            self.forcing[vm] = Some(forcing);
            return;
        }
        forcing.next = 0;
        let Some(entry) = register.filter(|_| !forcing.asked) else { return self.end_forcing(vm) };
        let fences = follower.asked.fences();
        let unfenced = others(&entry, &name(x)).into_iter().find(|node| !fences.hold(node, entry.term));
        match unfenced.map(index) {
            None => {
                follower.ask_to_run(true, forcing.until, common);
                forcing.asked = true;
            }
            Some(other) => {
                let until = now + 10 + self.seed.below(WAITS);
                follower.confirm_fenced(name(other), until);
                self.put_out(other, vm, until);
            }
        }
        self.forcing[vm] = Some(forcing);
    }

    fn end_forcing(&mut self, vm: usize) {
        self.forcing[vm] = None;
        self.units.iter_mut().for_each(|unit| unit.off_until[vm] = 0);
    }

    /// A node's process is ended: over the network if it answers, else by its plug.
    fn put_out(&mut self, x: usize, vm: usize, until: Time) {
        let answers = matches!(self.units[x].life, Life::Bound(of) if of == vm) && !self.is_frozen(x);
        if answers {
            self.counts.add("nodes fenced", 1);
            self.worlds[vm].fence(x);
        }
        self.kill(x);
        self.units[x].off_until[vm] = until + 1;
    }

    fn begin_drain(&mut self, x: usize) {
        self.counts.add("drains", 1);
        self.units[x].draining = true;
        if matches!(self.units[x].life, Life::Spare { .. }) && self.seed.below(2) == 0 {
            // Until its process has ended it can be claimed.
            self.die(x);
        }
    }

    /// A spare says only at its start whether it is emptied.
    fn end_drain(&mut self, x: usize) {
        self.counts.add("drains ended", 1);
        self.units[x].draining = false;
        if matches!(self.units[x].life, Life::Spare { .. }) {
            self.die(x);
        }
    }

    /// A guest that runs there is moved, as soon as there is somebody to move it to.
    fn go_on_draining(&mut self, x: usize) {
        let Life::Bound(vm) = self.units[x].life else { return };
        if !self.units[x].draining || !self.now.is_multiple_of(AGAIN) {
            return;
        }
        let World { nodes, common, .. } = &mut self.worlds[vm];
        if let Role::Runner(runner) = &mut nodes[x].role
            && runner.status.role == Runs::Paired
        {
            common.count("guests told to leave a node");
            runner.begin_switchover(common);
        }
    }

    /// Everything is as it was before operators came.
    pub(crate) fn end_operations(&mut self) {
        (0..self.worlds.len()).for_each(|vm| self.end_forcing(vm));
        for x in 0..self.units.len() {
            if self.units[x].draining {
                self.end_drain(x);
            }
        }
        for world in &mut self.worlds {
            let auto = world.common.plan.auto_failover;
            for node in &mut world.nodes {
                if let Role::Follower(follower) = &mut node.role {
                    follower.auto_failover = auto;
                }
            }
        }
    }

    /// A vm that nobody may run is run by force, from the newest point that there is.
    pub(crate) fn bring_back(&mut self, vm: usize) {
        let lost = self.lost_since[vm].is_some_and(|since| self.now - since > BROUGHT_BACK);
        if lost && self.plan.brings_back && self.forcing[vm].is_none() {
            let able = (0..self.units.len()).filter(|&x| self.worlds[vm].may_be_forced(x));
            if let Some(x) = able.max_by_key(|&x| self.worlds[vm].newest_point(x)) {
                self.force(vm, x, false, false);
            }
        }
        self.go_on_forcing(vm);
    }
}

impl World {
    /// `Command::Fence` of a runner, which ends where it stands; a follower leaves.
    pub(crate) fn fence(&mut self, x: usize) {
        let Self { nodes, common, .. } = self;
        match &mut nodes[x].role {
            Role::Runner(runner) => {
                common.note(x, || "is fenced".to_owned());
                runner.park(common);
                self.crash(x, "runners that ended");
            }
            Role::Follower(_) => self.crash(x, "followers that left"),
            Role::Starting(_) | Role::Down { .. } => {}
        }
    }

    /// Whether a node follows and has something to run the guest from.
    fn may_be_forced(&self, x: usize) -> bool {
        self.follower(x).is_some_and(|follower| match follower.replica.copy() {
            Copy::Whole { .. } | Copy::Stale { .. } => !follower.store_failed,
            Copy::Nothing => follower.replica.is_active() && !follower.store_failed,
            Copy::Inconsistent => false,
        })
    }

    fn newest_point(&self, x: usize) -> Option<colo_common::Point> {
        match self.follower(x)?.replica.copy() {
            Copy::Whole { staged: point, .. } | Copy::Stale { point } => Some(*point),
            _ => None,
        }
    }
}
