//! What goes wrong in a cluster beside what goes wrong with its vms: hosts, the paths between them and to the arbiter,
//! disks and clocks. And what is done about it: nothing but what a service manager does, and what an operator has
//! started himself. What operators do meanwhile is in `operating`.

use colo_common::arbiter::scripted::Fate;

use crate::cluster::{Cluster, Life};
use crate::common::Common;
use crate::plan::Time;
use crate::world::Role;

/// Between two looks of the service manager, and of the operator at what he has paused.
const LOOK: Time = 15;
/// The longest time that a disk does nothing: four seconds.
const STALL: Time = 130;
/// Wall clocks are wrong by ten years at most: more than any battery.
const WRONG: u64 = 10 * 365 * 86_400_000;

impl Cluster {
    /// What the seed lets happen in this tick.
    pub(crate) fn faults(&mut self) {
        let quiet = self.now < self.plan.quiet;
        if !quiet {
            self.arbiter_faults();
            self.path_faults();
            (0..self.plan.hosts).for_each(|host| self.host_faults(host));
            self.operate();
        }
        for x in 0..self.units.len() {
            match self.units[x].life {
                Life::Down { since } => {
                    let off = self.units[x].is_kept_off(self.now);
                    if self.now - since > 5 && self.seed.below(30) == 0 && !off {
                        self.counts.add("restarts", 1);
                        self.start(x);
                    }
                }
                _ if quiet => {}
                Life::Spare { .. } => {
                    if self.chance(self.plan.rates.crash) {
                        self.counts.add("crashes of a spare", 1);
                        self.die(x);
                    }
                }
                Life::Bound(vm) => self.process_faults(x, vm),
            }
        }
    }

    pub(crate) fn chance(&mut self, rate: u64) -> bool {
        rate > 0 && self.seed.below(10_000) < rate
    }

    fn arbiter_faults(&mut self) {
        let outage = if self.chance(self.plan.rates.outage) {
            self.counts.add("outages", 1);
            true
        } else {
            self.outage && self.seed.below(60) > 0
        };
        self.set_outage(outage);
        let late = self.arbiter.late() as u64;
        if late > 0 && self.seed.below(25) == 0 {
            let place = self.seed.below(late) as usize;
            if self.seed.below(4) == 0 {
                self.arbiter.lose_one(place);
            } else {
                self.counts.add("late proposals", 1);
                self.arbiter.deliver_one(place);
            }
        }
        if self.seed.below(25) == 0 {
            let late = self.membership.deliver_late();
            self.counts.add("late words to the membership", late as u64);
        }
    }

    fn set_outage(&mut self, outage: bool) {
        if outage != self.outage {
            self.outage = outage;
            self.arbiter.set_outage(outage);
            self.membership.set_outage(outage);
        }
    }

    /// Of two parties, hosts or the arbiter, one does not hear the other, or neither.
    fn path_faults(&mut self) {
        let rates = self.plan.rates;
        let parties = self.plan.hosts as u64 + 1;
        let (a, b) = (self.seed.below(parties) as usize, self.seed.below(parties) as usize);
        let until = self.now + 3 + self.seed.below(150);
        let both = if self.chance(rates.partition) {
            true
        } else if self.chance(rates.one_way) {
            false
        } else {
            return;
        };
        match (a.min(b), a.max(b)) {
            (a, b) if a == b => self.isolate(a, until),
            (host, arbiter) if arbiter == self.plan.hosts => {
                self.counts.add("hosts cut off from the arbiter", 1);
                let fate = if both || self.seed.below(2) == 0 { Fate::Lost } else { Fate::Unanswered };
                self.cut_off[host] = (until, fate);
            }
            _ => {
                self.counts.add(if both { "partitions" } else { "one-way partitions" }, 1);
                self.block(a, b, until);
                if both {
                    self.block(b, a, until);
                }
            }
        }
    }

    /// A host's own path is gone.
    fn isolate(&mut self, host: usize, until: Time) {
        if host == self.plan.hosts {
            return;
        }
        self.counts.add("hosts cut off from all", 1);
        self.cut_off[host] = (until, Fate::Lost);
        for other in (0..self.plan.hosts).filter(|&other| other != host) {
            self.block(host, other, until);
            self.block(other, host, until);
        }
    }

    fn block(&mut self, from: usize, to: usize, until: Time) {
        let (from, to) = (self.on(from), self.on(to));
        for net in self.worlds.iter_mut().map(|world| &mut world.common.net) {
            for &a in &from {
                to.iter().for_each(|&b| net.block(a, b, until));
            }
        }
    }

    /// The nodes of a host.
    fn on(&self, host: usize) -> Vec<usize> {
        (0..self.units.len()).filter(|&x| self.units[x].host == host).collect()
    }

    fn host_faults(&mut self, host: usize) {
        let rates = self.plan.rates;
        let there = self.on(host);
        if self.chance(rates.crash) {
            self.counts.add("hosts that died", 1);
            there.iter().for_each(|&x| self.kill(x));
        }
        if self.chance(rates.freeze) {
            self.counts.add("hosts frozen", 1);
            let until = self.now + 10 + self.seed.below(400);
            for world in &mut self.worlds {
                there.iter().for_each(|&x| world.common.net.frozen[x] = until);
            }
        }
        for world in &mut self.worlds {
            for &x in &there {
                if world.common.net.frozen[x] == self.now {
                    world.common.net.thaw(x, self.now);
                }
            }
        }
        if self.chance(rates.clock) {
            self.counts.add("clock jumps", 1);
            let wrong = self.seed.below(2 * WRONG) as i64 - WRONG as i64;
            for world in &mut self.worlds {
                there.iter().for_each(|&x| world.common.wrong_by[x] = wrong);
            }
        }
        if self.chance(rates.slow) {
            self.counts.add("slow disks", 1);
            let until = self.now + 10 + self.seed.below(STALL);
            for world in &mut self.worlds {
                for &x in &there {
                    if let Role::Follower(follower) = &mut world.nodes[x].role {
                        follower.persister.stalled = until;
                    }
                }
            }
        }
    }

    pub(crate) fn kill(&mut self, x: usize) {
        if let Life::Bound(vm) = self.units[x].life
            && !matches!(self.worlds[vm].nodes[x].role, Role::Down { .. })
        {
            self.worlds[vm].crash(x, "processes that died with their host");
        }
        if !matches!(self.units[x].life, Life::Down { .. }) {
            self.die(x);
        }
    }

    /// Of one process: crashes, and the operator's words to it.
    fn process_faults(&mut self, x: usize, vm: usize) {
        if self.is_frozen(x) {
            return;
        }
        let rates = self.worlds[vm].common.plan.rates;
        self.worlds[vm].node_faults(x, &rates);
    }

    /// Everything works again, all nodes come up, and the operator takes back what he had paused.
    pub(crate) fn heal(&mut self) {
        self.end_operations();
        self.set_outage(false);
        self.membership.deliver_late();
        self.cut_off.iter_mut().for_each(|(until, _)| *until = 0);
        self.reach_again();
        for world in &mut self.worlds {
            world.heal();
            for node in &mut world.nodes {
                if let Role::Follower(follower) = &mut node.role {
                    follower.persister.stalled = 0;
                }
            }
        }
    }

    fn reach_again(&mut self) {
        let clear = |common: &mut Common| common.cut_off.fill(None);
        self.worlds.iter_mut().for_each(|world| clear(&mut world.common));
    }

    /// What is done without anybody's word about the cluster: processes are started again.
    pub(crate) fn repair(&mut self) {
        if self.seed.below(10) == 0 {
            self.arbiter.deliver_late();
            self.membership.deliver_late();
        }
        for x in 0..self.units.len() {
            if let Life::Bound(vm) = self.units[x].life {
                self.worlds[vm].leave_if_superseded(x, 20);
            }
        }
        (0..self.worlds.len()).for_each(|vm| self.bring_back(vm));
        if !(self.now - self.plan.faults_end).is_multiple_of(LOOK) {
            return;
        }
        for x in 0..self.units.len() {
            match self.units[x].life {
                Life::Down { .. } if self.units[x].is_kept_off(self.now) => {}
                Life::Down { .. } => self.start(x),
                Life::Spare { .. } => {}
                Life::Bound(vm) => self.worlds[vm].tend(x),
            }
        }
    }
}
