//! What goes wrong, what the operator does meanwhile, and what a good operator does in the end.

use colo_common::register::{Entry, StopReason, Value};
use colo_common::{Gfn, PAGE_SIZE};
use colo_primary::link::Purpose;
use colo_primary::replicator::Phase;
use colo_secondary::replica::{AckPolicy, Copy};
use colo_vmm::ProtectedGuest;

use crate::common::index;
use crate::plan::{Rates, Time};
use crate::runner::Runner;
use crate::world::{Role, World};

/// Between two looks of the operator who repairs.
const LOOK: u64 = 15;
/// How long a secondary may stay away before the operator who repairs goes on without it.
const PATIENCE: u64 = 150;

impl World {
    /// What the seed lets happen in this tick.
    pub(crate) fn faults(&mut self) {
        let rates = self.common.plan.rates;
        self.arbiter_faults(&rates);
        self.network_faults(&rates);
        for x in 0..self.nodes.len() {
            match &self.nodes[x].role {
                Role::Down { since } => {
                    let waited = self.common.now - since;
                    if waited > 5 && self.common.seed.below(30) == 0 {
                        self.restart(x);
                    }
                }
                _ => self.node_faults(x, &rates),
            }
        }
    }

    fn arbiter_faults(&mut self, rates: &Rates) {
        let common = &mut self.common;
        if common.chance(rates.outage) {
            common.count("outages");
            common.arbiter.set_outage(true);
        } else if common.seed.below(40) == 0 {
            common.arbiter.set_outage(false);
        }
        let late = common.arbiter.late() as u64;
        if late > 0 && common.seed.below(25) == 0 {
            let place = common.seed.below(late) as usize;
            if common.seed.below(4) == 0 {
                common.arbiter.lose_one(place);
                common.count("proposals lost");
            } else {
                common.arbiter.deliver_one(place);
                common.count("late proposals");
            }
        }
    }

    fn network_faults(&mut self, rates: &Rates) {
        let (common, nodes) = (&mut self.common, self.nodes.len() as u64);
        let (a, b) = (common.seed.below(nodes) as usize, common.seed.below(nodes) as usize);
        let until = common.now + 3 + common.seed.below(60);
        if common.chance(rates.break_link) && common.net.break_one(&mut common.seed) {
            common.count("links broken");
        }
        if a != b && common.chance(rates.one_way) {
            common.count("one-way partitions");
            common.net.block(a, b, until);
        }
        if a != b && common.chance(rates.partition) {
            common.count("partitions");
            common.net.block(a, b, until);
            common.net.block(b, a, until);
        }
    }

    pub(crate) fn node_faults(&mut self, x: usize, rates: &Rates) {
        let promotes = self.follower(x).is_some_and(|follower| follower.replica.is_proposing());
        if self.common.chance(rates.crash) || (promotes && self.common.chance(rates.crash_in_promotion)) {
            let how = match &self.nodes[x].role {
                Role::Runner(_) => "crashes of a runner",
                Role::Follower(_) if promotes => "crashes in a promotion",
                Role::Follower(_) => "crashes of a follower",
                _ => "crashes at the start",
            };
            return self.crash(x, how);
        }
        if self.common.chance(rates.freeze) {
            self.common.count("frozen processes");
            self.common.net.frozen[x] = self.common.now + 10 + self.common.seed.below(60);
        }
        if self.common.net.frozen[x] == self.common.now {
            self.common.net.thaw(x, self.common.now);
        }
        if self.common.chance(rates.full) {
            self.common.count("full stores");
            self.nodes[x].durable.disk.set_full(true);
        } else if self.common.seed.below(100) == 0 {
            self.nodes[x].durable.disk.set_full(false);
        }
        match &self.nodes[x].role {
            Role::Follower(_) => self.follower_faults(x, rates),
            Role::Runner(_) => self.runner_faults(x, rates),
            _ => {}
        }
    }

    fn follower_faults(&mut self, x: usize, rates: &Rates) {
        let Self { nodes, common, .. } = self;
        let node = &mut nodes[x];
        let Role::Follower(follower) = &mut node.role else { return };
        if common.chance(rates.die_in_write) {
            follower.persister.dying = true;
            node.durable.disk.die_after(common.seed.below(6));
        }
        if common.chance(rates.promote) {
            common.count("promotes by the operator");
            follower.ask_to_run(false, Time::MAX, common);
        }
        if common.chance(rates.policy) {
            common.count("policy changes");
            node.durable.policy = match node.durable.policy {
                AckPolicy::Memory => AckPolicy::Disk,
                AckPolicy::Disk => AckPolicy::Memory,
            };
            common.note(x, || format!("is to ack under {:?}", node.durable.policy));
            let actions = follower.replica.change_policy(node.durable.policy);
            follower.act(actions, common);
        }
    }

    /// The operator's words, `operator.rs`, and what the guest does by itself.
    fn runner_faults(&mut self, x: usize, rates: &Rates) {
        let Self { nodes, common, .. } = self;
        let others = nodes.len();
        let Role::Runner(runner) = &mut nodes[x].role else { return };
        if common.chance(rates.input) {
            let line = format!("input at {}\n", common.now);
            runner.guest.console_input(line.as_bytes());
        }
        if common.chance(rates.power) {
            common.count("power buttons");
            runner.guest.power_button();
        }
        if common.chance(rates.corrupt) {
            common.count("corruptions");
            let ledger = runner.guest.memory().write_page(Gfn(0), &[0xaa; PAGE_SIZE]);
            ledger.expect("the guest has a first frame");
        }
        if common.chance(rates.pause) {
            common.count("pauses");
            runner.pause(common);
        }
        if common.chance(rates.pause) {
            runner.go_on_replicating();
        }
        if common.chance(rates.protect) {
            let to = (x + 1 + common.seed.below(others as u64 - 1) as usize) % others;
            runner.protect_by(to, common);
        }
        if common.chance(rates.switch) {
            runner.begin_switchover(common);
        }
        if common.chance(rates.stop) {
            common.count("stops by the operator");
            common.note(x, || "is stopped by the operator".to_owned());
            runner.stopping = true;
            runner.park(common);
            let actions = runner.replicator.stop(StopReason::Operator);
            runner.act(actions, common);
        }
        self.leave_if_superseded(x, 20);
    }

    /// A runner that lost its vm to one who runs it is told so by that one's answer: `Node::offer_hand_back`.
    pub(crate) fn leave_if_superseded(&mut self, x: usize, one_in: u64) {
        let Some(runner) = self.runner(x) else { return };
        let Phase::Lost { to } = runner.replicator.phase() else { return };
        let runs = self.runner(index(to.value.runner())).is_some();
        let Self { nodes, common, .. } = self;
        if runs
            && common.seed.below(one_in) == 0
            && let Role::Runner(runner) = &mut nodes[x].role
        {
            let actions = runner.replicator.give_up();
            runner.act(actions, common);
        }
    }

    /// As the operator's service manager does it.
    pub(crate) fn restart(&mut self, x: usize) {
        self.common.count("restarts");
        let ran = self.nodes[x].durable.runner.is_some();
        if x == self.home && self.common.arbiter.peek(self.common.vm()).is_none() {
            // It never got so far.
            self.start_primary(x, false);
        } else if ran && self.common.seed.below(3) == 0 {
            let again = self.common.seed.below(2) == 0;
            self.start_primary(x, again);
        } else {
            self.start_secondary(x);
        }
    }

    /// Everything works again.
    pub(crate) fn heal(&mut self) {
        let now = self.common.now;
        self.overruns = self.common.counts.of("ring overruns");
        self.common.arbiter.set_outage(false);
        self.common.arbiter.deliver_late();
        self.common.net.heal();
        for x in 0..self.nodes.len() {
            self.common.net.thaw(x, now);
            self.nodes[x].durable.disk.set_full(false);
        }
    }

    /// What an operator does who looks after it from time to time.
    pub(crate) fn repair(&mut self) {
        if self.common.seed.below(10) == 0 {
            self.common.arbiter.deliver_late();
        }
        if !(self.common.now - self.common.plan.faults_end).is_multiple_of(LOOK) {
            return;
        }
        let register = self.common.arbiter.peek(self.common.vm());
        for x in 0..self.nodes.len() {
            match &self.nodes[x].role {
                Role::Down { .. } => self.revive(x, register.as_ref()),
                Role::Runner(_) => self.repair_runner(x),
                _ => self.tend(x),
            }
        }
    }

    /// Starts a process again, of the binary that can do something.
    pub(crate) fn revive(&mut self, x: usize, register: Option<&Entry>) {
        let ran = self.nodes[x].durable.runner.is_some_and(|known| known.active.is_some());
        let primary = match register.map(|entry| &entry.value) {
            None => x == self.home,
            // Now and then the wrong one.
            Some(Value::Solo { node, .. }) => index(node) == x && ran && self.common.seed.below(8) > 0,
            _ => false,
        };
        if primary { self.start_primary(x, false) } else { self.start_secondary(x) }
    }

    /// What a process needs that cannot help itself, and what the operator has to take back.
    pub(crate) fn tend(&mut self, x: usize) {
        let register = self.common.arbiter.peek(self.common.vm());
        match &mut self.nodes[x].role {
            Role::Follower(follower) if follower.store_failed => self.crash(x, "restarts of a full node"),
            Role::Follower(_) => self.repair_follower(x, register.as_ref().map(|entry| &entry.value)),
            Role::Runner(runner) => runner.go_on_replicating(),
            Role::Starting(_) | Role::Down { .. } => {}
        }
    }

    fn repair_follower(&mut self, x: usize, register: Option<&Value>) {
        let runs = (0..self.nodes.len()).any(|x| self.runner(x).is_some_and(|runner| !runner.failed));
        let ours = matches!(register, Some(Value::Solo { node, .. }) if index(node) == x);
        let Role::Follower(follower) = &mut self.nodes[x].role else { return };
        let named = match register {
            Some(Value::Paired { secondary, replica, .. }) => {
                index(secondary) == x
                    && matches!(follower.replica.copy(), Copy::Whole { replica: held, .. } if held == replica)
            }
            _ => false,
        };
        if named && !follower.auto_failover && !runs {
            follower.ask_to_run(false, Time::MAX, &self.common);
        } else if ours && !runs && !follower.replica.is_proposing() && !follower.replica.is_active() {
            // It ran here as `colo-primary`, perhaps.
            let known = self.nodes[x].durable.runner.is_some_and(|known| known.active.is_some());
            if known && self.common.plan.boot && self.common.seed.below(4) == 0 {
                self.crash(x, "other binary tried");
            }
        }
    }

    fn repair_runner(&mut self, x: usize) {
        let others = self.nodes.len();
        let follower =
            (1..others).map(|step| (x + step) % others).find(|&other| self.follower(other).is_some());
        let Self { nodes, common, .. } = self;
        if let Role::Runner(runner) = &mut nodes[x].role
            && let Some(follower) = follower
            && matches!(runner.replicator.phase(), Phase::Alone)
            && runner.secondary != Some(follower)
        {
            runner.protect_by(follower, common);
        }
        // Under `on_secondary_loss = hold` it waits for the operator's word.
        if let Role::Runner(runner) = &mut nodes[x].role
            && let (Phase::Paired { .. }, Some(since)) = (runner.replicator.phase(), runner.lost_since)
            && !runner.replicator.is_linked()
            && !common.plan.solo_on_loss
            && common.now - since > PATIENCE
        {
            runner.pause(common);
        }
        self.leave_if_superseded(x, 1);
    }
}

impl Runner {
    /// `Command::Pause`.
    fn pause(&mut self, common: &mut crate::common::Common) {
        self.paused_secondary = self.secondary.take().or(self.paused_secondary.take());
        let actions = self.replicator.go_solo();
        self.act(actions, common);
    }

    /// `Command::Resume`.
    fn go_on_replicating(&mut self) {
        self.secondary = self.secondary.take().or(self.paused_secondary.take());
    }

    /// `Node::protect_by`.
    fn protect_by(&mut self, to: usize, common: &mut crate::common::Common) {
        if !matches!(self.replicator.phase(), Phase::Alone) || self.replicator.is_proposing() {
            return;
        }
        common.count("protects by the operator");
        self.secondary = Some(to);
        self.connect(to, Purpose::Seed, common);
    }
}
