//! Whom an unprotected vm is protected by next: chosen from what the nodes of the cluster say of themselves. Pure; time is
//! an argument.
//!
//! Copies of the vm come first, the newest before others, since they lack least. Then spares that the guest fits on, the
//! one with the most memory free first. Who failed is left out for a while, longer each time.

use colo_common::membership::{NodeRecord, NodeRole};
use colo_common::{Incarnation, NodeId, VmId};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a node that failed once is left out.
const FIRST_BAN: Duration = Duration::from_secs(1);
/// The longest that one is.
const MOST_BAN: Duration = Duration::from_secs(60);
/// Failures that are remembered: of more processes than a cluster has hosts, the oldest are forgotten.
const MAX_REMEMBERED: usize = 1024;

/// What a node must have for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Bytes of its memory.
    pub memory: u64,
    /// What runs it.
    pub hypervisor: String,
    /// The protocol that its runner speaks.
    pub protocol: u32,
}

/// A node that may follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What it says of itself.
    pub record: NodeRecord,
    /// It is bound to no vm, and has to be claimed first.
    pub spare: bool,
}

#[derive(Clone, Copy, Debug)]
struct Ban {
    times: u32,
    until: Duration,
}

/// Chooses, and remembers who failed.
#[derive(Clone, Debug, Default)]
pub struct Healer {
    bans: BTreeMap<(NodeId, Incarnation), Ban>,
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
        let usable = |record: &&NodeRecord| {
            record.node != *me
                && !record.draining
                && record.protocol == needs.protocol
                && !self.is_banned(record, now)
        };
        let copies = nodes.iter().filter(usable).filter(|record| {
            let free = matches!(record.role, NodeRole::Follower | NodeRole::Waiting);
            free && record.vm.as_ref() == Some(vm)
        });
        let best = copies.max_by_key(|record| (record.copy, Reverse(record.node.clone())));
        if let Some(record) = best {
            return Some(Candidate { record: record.clone(), spare: false });
        }
        let spares = nodes.iter().filter(usable).filter(|record| {
            record.role == NodeRole::Spare
                && record.memory_free >= needs.memory
                && record.disk_free >= needs.memory
                && fits(&record.hypervisor, &needs.hypervisor)
        });
        let best = spares.max_by_key(|record| (record.memory_free, Reverse(record.node.clone())));
        best.map(|record| Candidate { record: record.clone(), spare: true })
    }

    /// That process does not follow, for whatever reason.
    pub fn failed(&mut self, node: NodeId, process: Incarnation, now: Duration) {
        if self.bans.len() >= MAX_REMEMBERED {
            self.bans.retain(|_, ban| ban.until > now);
        }
        if self.bans.len() >= MAX_REMEMBERED {
            self.bans.pop_first();
        }
        let ban = self.bans.entry((node, process)).or_insert(Ban { times: 0, until: now });
        ban.until = now + (FIRST_BAN * 2_u32.saturating_pow(ban.times)).min(MOST_BAN);
        ban.times = (ban.times + 1).min(16);
    }

    /// The vm is protected: who failed before may try again.
    pub fn healed(&mut self) {
        self.bans.clear();
    }

    fn is_banned(&self, record: &NodeRecord, now: Duration) -> bool {
        let ban = self.bans.get(&(record.node.clone(), record.incarnation));
        ban.is_some_and(|ban| ban.until > now)
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

    fn chosen(healer: &Healer, nodes: &[NodeRecord], now: Duration) -> Option<(String, bool)> {
        let needs = Needs { memory: 4 << 30, hypervisor: "kvm".to_owned(), protocol: 3 };
        let chosen = healer.choose(nodes, &"a".parse().unwrap(), &"web".parse().unwrap(), &needs, now);
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
            NodeRecord { disk_free: 1 << 30, ..spare("f") },
            NodeRecord { hypervisor: "none".to_owned(), ..spare("g") },
            NodeRecord { protocol: 2, ..spare("h") },
        ];
        assert_eq!(chosen(&Healer::default(), &nodes, NOW), None);
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
}
