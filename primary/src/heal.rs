//! Whom an unprotected vm is protected by next: chosen from what the nodes of the cluster say of themselves. Pure; time is
//! an argument.
//!
//! Copies of the vm come first, the newest before others, since they lack least. Then spares that the guest fits on, the
//! one with the most memory free first. Who failed is left out for a while, longer each time. Where nobody can be had, it says
//! why, of each node.

mod passed_over;

use colo_common::membership::{NodeRecord, NodeRole};
use colo_common::{Incarnation, NodeId, VmId};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

pub use passed_over::{Obstacle, PassedOver};

/// How long a node that failed once is left out.
const FIRST_BAN: Duration = Duration::from_secs(1);
/// The longest that one is.
const MOST_BAN: Duration = Duration::from_secs(60);
/// Failures that are remembered: of more processes than a cluster has hosts, the oldest are forgotten.
const MAX_REMEMBERED: usize = 1024;
/// Letters of a node's own words that are kept.
const MAX_WORDS: usize = 240;

/// What a node must have for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Bytes of its memory.
    pub memory: u64,
    /// Bytes of its disk; none has none.
    pub disk: u64,
    /// What runs it.
    pub hypervisor: String,
    /// The protocol that its runner speaks.
    pub protocol: u32,
}

impl Needs {
    /// Bytes that its copy may come to take on disk: all of its memory, and all of its disk.
    fn store(&self) -> u64 {
        self.memory.saturating_add(self.disk)
    }
}

/// A node that may follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What it says of itself.
    pub record: NodeRecord,
    /// It is bound to no vm, and has to be claimed first.
    pub spare: bool,
}

#[derive(Clone, Debug)]
struct Ban {
    times: u32,
    until: Duration,
    /// What it said.
    why: Option<String>,
}

/// Chooses, and remembers who failed.
#[derive(Clone, Debug, Default)]
pub struct Healer {
    /// By process, of one that kept silent; by node alone, of one that said no: the next process on that host, with the
    /// same configuration, would say the same.
    bans: BTreeMap<(NodeId, Option<Incarnation>), Ban>,
}

impl Healer {
    /// The best node for the vm that `me` runs; nothing if nobody can be had now.
    pub fn choose(
        &self,
        nodes: &[NodeRecord],
        me: &NodeId,
        vm: &VmId,
        needs: &Needs,
        now: Duration,
    ) -> Option<Candidate> {
        let usable =
            |record: &&NodeRecord| record.node != *me && self.obstacle(record, vm, needs, now).is_none();
        let of_role = |spare| nodes.iter().filter(move |record| (record.role == NodeRole::Spare) == spare);
        let copies = of_role(false).filter(|record| record.vm.is_some()).filter(usable);
        let best = copies.max_by_key(|record| (record.copy, Reverse(record.node.clone())));
        if let Some(record) = best {
            return Some(Candidate { record: record.clone(), spare: false });
        }
        let spares = of_role(true).filter(usable);
        let best = spares.max_by_key(|record| (record.memory_free, Reverse(record.node.clone())));
        best.map(|record| Candidate { record: record.clone(), spare: true })
    }

    /// Why it chooses nobody: what stands in the way of each other node.
    pub fn passed_over(
        &self,
        nodes: &[NodeRecord],
        me: &NodeId,
        vm: &VmId,
        needs: &Needs,
        now: Duration,
    ) -> PassedOver {
        let mut passed = PassedOver::new(needs.clone());
        for record in nodes.iter().filter(|record| record.node != *me) {
            if let Some(obstacle) = self.obstacle(record, vm, needs, now) {
                passed.add(&record.node, obstacle);
            }
        }
        passed
    }

    /// What keeps a process from following the vm now.
    fn obstacle(&self, record: &NodeRecord, vm: &VmId, needs: &Needs, now: Duration) -> Option<Obstacle> {
        let spare = record.role == NodeRole::Spare;
        match &record.vm {
            Some(other) if other != vm => return Some(Obstacle::Bound(other.clone())),
            Some(_) if record.role == NodeRole::Runner => return Some(Obstacle::Runs),
            _ => {}
        }
        if record.draining {
            return Some(Obstacle::Draining);
        }
        if record.protocol != needs.protocol {
            return Some(Obstacle::Protocol(record.protocol));
        }
        if spare && !fits(&record.hypervisor, &needs.hypervisor) {
            return Some(Obstacle::Hypervisor(record.hypervisor.clone()));
        }
        if spare && record.memory_free < needs.memory {
            return Some(Obstacle::Memory(record.memory_free));
        }
        if spare && record.disk_free < needs.store() {
            return Some(Obstacle::Disk(record.disk_free));
        }
        let ban = [None, Some(record.incarnation)]
            .into_iter()
            .filter_map(|process| self.bans.get(&(record.node.clone(), process)))
            .find(|ban| ban.until > now)?;
        Some(ban.why.clone().map_or(Obstacle::Failed, Obstacle::Refused))
    }

    /// That process does not follow: it is not to be had, or keeps silent.
    pub fn failed(&mut self, node: NodeId, process: Incarnation, now: Duration) {
        self.ban((node, Some(process)), None, now);
    }

    /// That node says no, and why. Whichever process says it, it is that host which does not fit.
    pub fn refused(&mut self, node: NodeId, why: &str, now: Duration) {
        let why = why.chars().take(MAX_WORDS).collect();
        self.ban((node, None), Some(why), now);
    }

    fn ban(&mut self, who: (NodeId, Option<Incarnation>), why: Option<String>, now: Duration) {
        if self.bans.len() >= MAX_REMEMBERED {
            self.bans.retain(|_, ban| ban.until > now);
        }
        if self.bans.len() >= MAX_REMEMBERED {
            self.bans.pop_first();
        }
        let ban = self.bans.entry(who).or_insert(Ban { times: 0, until: now, why: None });
        ban.until = now + (FIRST_BAN * 2_u32.saturating_pow(ban.times)).min(MOST_BAN);
        ban.times = (ban.times + 1).min(16);
        ban.why = why;
    }

    /// The vm is protected: who failed before may try again.
    pub fn healed(&mut self) {
        self.bans.clear();
    }
}

/// A guest in software runs anywhere.
fn fits(offered: &str, needed: &str) -> bool {
    offered == needed || needed == "synthetic"
}

#[cfg(test)]
mod tests {
    use super::{FIRST_BAN, Healer, MAX_REMEMBERED, MOST_BAN, Needs};
    use colo_common::history::point;
    use colo_common::membership::{NodeRecord, NodeRole};
    use colo_common::{Incarnation, Point};
    use std::time::Duration;

    const NOW: Duration = Duration::from_secs(100);

    fn record(node: &str, role: NodeRole, vm: Option<&str>) -> NodeRecord {
        NodeRecord {
            node: node.parse().unwrap(),
            incarnation: Incarnation(1),
            address: "host:7701".parse().unwrap(),
            role,
            vm: vm.map(|vm| vm.parse().unwrap()),
            version: String::new(),
            protocol: 3,
            cpu: String::new(),
            hypervisor: "kvm".to_owned(),
            memory_free: 8 << 30,
            disk_free: 8 << 30,
            copy: None,
            draining: false,
        }
    }

    fn copy(node: &str, at: Point) -> NodeRecord {
        NodeRecord { copy: Some(at), ..record(node, NodeRole::Waiting, Some("web")) }
    }

    fn needs() -> Needs {
        Needs { memory: 4 << 30, disk: 1 << 30, hypervisor: "kvm".to_owned(), protocol: 3 }
    }

    fn passed_over(healer: &Healer, nodes: &[NodeRecord], now: Duration) -> String {
        let (me, vm) = ("a".parse().unwrap(), "web".parse().unwrap());
        healer.passed_over(nodes, &me, &vm, &needs(), now).to_string()
    }

    fn chosen(healer: &Healer, nodes: &[NodeRecord], now: Duration) -> Option<(String, bool)> {
        let (me, vm) = ("a".parse().unwrap(), "web".parse().unwrap());
        let chosen = healer.choose(nodes, &me, &vm, &needs(), now);
        chosen.map(|chosen| (chosen.record.node.to_string(), chosen.spare))
    }

    fn is(node: &str, spare: bool) -> Option<(String, bool)> {
        Some((node.to_owned(), spare))
    }

    #[test]
    fn copies_come_before_spares_and_the_newest_first() {
        let (healer, spare) = (Healer::default(), record("s", NodeRole::Spare, None));
        assert_eq!(chosen(&healer, &[], NOW), None);
        assert_eq!(chosen(&healer, std::slice::from_ref(&spare), NOW), is("s", true));
        let nodes = [spare, copy("b", point(1, 4)), copy("c", point(2, 3)), copy("d", point(2, 3))];
        assert_eq!(chosen(&healer, &nodes, NOW), is("c", false));
        let empty = record("e", NodeRole::Follower, Some("web"));
        assert_eq!(chosen(&healer, &[nodes[0].clone(), empty], NOW), is("e", false), "what it is there for");
    }

    #[test]
    fn who_cannot_have_the_guest_is_passed_over() {
        let spare = |node| record(node, NodeRole::Spare, None);
        let nodes = [
            spare("a"),
            record("b", NodeRole::Follower, Some("mail")),
            record("c", NodeRole::Runner, Some("web")),
            NodeRecord { draining: true, ..spare("d") },
            NodeRecord { memory_free: 1 << 30, ..spare("e") },
            // Room for its memory or its disk, and not for both.
            NodeRecord { disk_free: (5 << 30) - 1, ..spare("f") },
            NodeRecord { hypervisor: "none".to_owned(), ..spare("g") },
            NodeRecord { protocol: 2, ..spare("h") },
        ];
        assert_eq!(chosen(&Healer::default(), &nodes, NOW), None);
        assert_eq!(
            passed_over(&Healer::default(), &nodes, NOW),
            "nobody can protect it: b is there for mail; c says that it runs the vm itself; d is being emptied; \
             e has 1024 MiB of memory free, 4096 are needed; f has 5119 MiB of disk free, 5120 are needed; \
             g runs guests on none, kvm is needed; h speaks protocol 2, 3 is needed"
        );
        let more = NodeRecord { memory_free: 16 << 30, ..spare("y") };
        assert_eq!(chosen(&Healer::default(), &[spare("x"), more], NOW), is("y", true));
    }

    #[test]
    fn who_fails_waits_longer_each_time() {
        let (mut healer, nodes) = (Healer::default(), [record("s", NodeRole::Spare, None)]);
        let fail = |healer: &mut Healer, now| healer.failed("s".parse().unwrap(), Incarnation(1), now);
        fail(&mut healer, NOW);
        assert_eq!(chosen(&healer, &nodes, NOW), None);
        assert!(chosen(&healer, &nodes, NOW + FIRST_BAN).is_some());
        (0..20).for_each(|_| fail(&mut healer, NOW));
        assert_eq!(chosen(&healer, &nodes, NOW + MOST_BAN - FIRST_BAN), None);
        assert!(chosen(&healer, &nodes, NOW + MOST_BAN).is_some());
        let anew = [NodeRecord { incarnation: Incarnation(2), ..nodes[0].clone() }];
        assert!(chosen(&healer, &anew, NOW).is_some(), "another process");
        healer.healed();
        assert!(chosen(&healer, &nodes, NOW).is_some());
        for process in 0..2 * MAX_REMEMBERED as u128 {
            healer.failed("s".parse().unwrap(), Incarnation(process), NOW);
        }
        assert!(healer.bans.len() <= MAX_REMEMBERED);
    }

    #[test]
    fn a_refusal_holds_for_whichever_process_the_node_has() {
        let process =
            |process| NodeRecord { incarnation: Incarnation(process), ..record("s", NodeRole::Spare, None) };
        let mut healer = Healer::default();
        let refuse = |healer: &mut Healer, now| healer.refused("s".parse().unwrap(), "it has no TAP", now);
        refuse(&mut healer, NOW);
        assert_eq!(chosen(&healer, &[process(2)], NOW), None, "another process of the same node");
        assert_eq!(
            passed_over(&healer, &[process(2)], NOW),
            "nobody can protect it: s refused it (it has no TAP)"
        );
        assert!(chosen(&healer, &[process(2)], NOW + FIRST_BAN).is_some());
        refuse(&mut healer, NOW + FIRST_BAN);
        assert_eq!(chosen(&healer, &[process(3)], NOW + 2 * FIRST_BAN), None, "longer each time");
        let other = [process(3), record("t", NodeRole::Spare, None)];
        assert_eq!(chosen(&healer, &other, NOW + FIRST_BAN), is("t", true));
        healer.healed();
        assert!(chosen(&healer, &[process(3)], NOW).is_some());
    }

    #[test]
    fn of_several_processes_the_one_that_says_something_of_the_node_is_told() {
        let healer = Healer::default();
        assert_eq!(passed_over(&healer, &[], NOW), "nobody can protect it: no other node is there");
        let bound = |vm| record("b", NodeRole::Follower, Some(vm));
        let spare = NodeRecord { draining: true, ..record("b", NodeRole::Spare, None) };
        let nodes = [bound("db"), spare, bound("mail")];
        assert_eq!(passed_over(&healer, &nodes, NOW), "nobody can protect it: b is being emptied");
        let many: Vec<NodeRecord> =
            (0..10).map(|n| record(&format!("n{n}"), NodeRole::Follower, Some("db"))).collect();
        let told = passed_over(&healer, &many, NOW);
        assert!(told.contains("n7 is there for db; and 2 more") && !told.contains("n8"), "{told}");
        let before =
            healer.passed_over(&nodes, &"a".parse().unwrap(), &"web".parse().unwrap(), &needs(), NOW);
        assert_eq!(before.kinds(), [("b".parse().unwrap(), "draining")]);
    }
}
