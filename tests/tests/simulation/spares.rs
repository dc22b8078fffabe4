//! How a simulated node's process begins, is claimed and lets go: `secondary::spare` and `Secondary::finish`.

use colo_common::arbiter::Arbiter;
use colo_common::membership::Membership;
use colo_common::register::Value;

use crate::cluster::{Cluster, Life};
use crate::common::{incarnation, name};
use crate::plan::{HASTE, Time};
use crate::presence::Presence;

/// As in `spare`.
const LOOK: Time = 150 / HASTE;

impl Cluster {
    /// As the host's service manager starts it.
    pub(crate) fn start(&mut self, x: usize) {
        match self.units[x].home {
            Some(vm) => {
                let found = self.arbiter.peek(self.worlds[vm].common.vm());
                if self.now > 0 && self.now < self.plan.faults_end {
                    self.worlds[vm].restart(x);
                } else {
                    self.worlds[vm].revive(x, found.as_ref());
                }
                self.units[x].life = Life::Bound(vm);
                self.say_where(x, vm);
            }
            None => self.start_spare(x),
        }
    }

    fn say_where(&mut self, x: usize, bound: usize) {
        for (vm, world) in self.worlds.iter_mut().enumerate() {
            world.elsewhere[x] = vm != bound;
        }
    }

    /// `spare::bind`. Without an answer of the arbiter it ends, and is started again.
    fn start_spare(&mut self, x: usize) {
        let Ok(left) = self.left_off(x) else {
            self.counts.add("spares without an answer", 1);
            return self.die(x);
        };
        let process = incarnation(&mut self.worlds[left.unwrap_or(0)].common);
        if let Some(vm) = left {
            self.counts.add("spares that go on where they left off", 1);
            return self.bind(x, vm, process, false);
        }
        let mut presence = Presence::new(x, process, self.units[x].draining, self.now);
        if !presence.register(x, &self.worlds[0].common) {
            // What was asked may still be done, and the record then ends with its lease.
            self.units[x].presence = Some(presence);
            self.counts.add("spares not registered", 1);
            return self.die(x);
        }
        self.units[x].presence = Some(presence);
        self.units[x].life = Life::Spare { next_look: self.now + LOOK };
    }

    /// `spare::left_off`.
    fn left_off(&self, x: usize) -> Result<Option<usize>, ()> {
        let me = name(x);
        for (vm, world) in self.worlds.iter().enumerate() {
            if !world.nodes[x].durable.spec {
                continue;
            }
            self.arbiter.script(world.common.cut_off[x]);
            let named = match self.arbiter.read(world.common.vm()).map_err(drop)?.map(|entry| entry.value) {
                Some(Value::Paired { secondary, .. }) => secondary == me,
                Some(Value::Solo { node, .. }) => node == me,
                _ => false,
            };
            if named {
                return Ok(Some(vm));
            }
        }
        Ok(None)
    }

    fn bind(&mut self, x: usize, vm: usize, process: colo_common::Incarnation, claimed: bool) {
        self.worlds[vm].bind(x, process, claimed);
        self.units[x].life = Life::Bound(vm);
        self.say_where(x, vm);
    }

    /// A turn of `spare::claimed`.
    pub(crate) fn look_for_claim(&mut self, x: usize) {
        let Life::Spare { next_look } = self.units[x].life else { return };
        if self.now < next_look || self.is_frozen(x) {
            return;
        }
        self.units[x].life = Life::Spare { next_look: self.now + LOOK };
        let common = &self.worlds[0].common;
        let Some(presence) = &mut self.units[x].presence else { return };
        presence.write_again(x, common);
        let process = presence.process;
        let found = common.ask_membership(x, |membership| membership.claim_of(&name(x)));
        let Ok(Some(claim)) = found else { return };
        if claim.node_incarnation != process {
            return;
        }
        let vm = (0..self.worlds.len()).find(|&vm| *self.worlds[vm].common.vm() == claim.vm);
        self.units[x].claim = Some(claim);
        self.counts.add("spares bound", 1);
        self.bind(x, vm.expect("a vm of the cluster"), process, true);
    }

    /// `Secondary::be_spare_again`: the claim is given up, and the next process has a name of its own.
    pub(crate) fn be_spare_again(&mut self, x: usize, of: usize) {
        if self.mutations.spares_stay {
            let process = incarnation(&mut self.worlds[of].common);
            return self.bind(x, of, process, false);
        }
        self.counts.add("spares that let go", 1);
        if let Some(claim) = self.units[x].claim.take() {
            // What is left of this process' record may be claimed by others, who find nobody.
            self.granted.retain(|(_, process), _| *process != claim.node_incarnation);
            // Without an answer it ends with the record of this process, next.
            drop(self.worlds[0].common.ask_membership(x, |membership| membership.release(&claim)));
        }
        drop(self.units[x].presence.take());
        self.worlds.iter_mut().for_each(|world| world.elsewhere[x] = false);
        self.start_spare(x);
    }
}
