//! Why nodes of the cluster were passed over when a vm lacks protection, in words for an operator.

use colo_common::{NodeId, VmId};
use std::collections::BTreeMap;
use std::fmt;

use super::Needs;

/// Nodes that are named at most: more make no line that is read.
const MAX_NAMED: usize = 8;

/// Why a process of a node cannot protect the vm now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// An operator is emptying its node.
    Draining,
    /// It speaks another protocol.
    Protocol(u32),
    /// It said no a moment ago, with these words.
    Refused(String),
    /// It was asked a moment ago, and did not follow.
    Failed,
    /// Bytes of memory that it has free.
    Memory(u64),
    /// Bytes of disk that it has free.
    Disk(u64),
    /// What it runs guests on.
    Hypervisor(String),
    /// It is there for another vm.
    Bound(VmId),
    /// It says that it runs the vm itself.
    Runs,
}

impl Obstacle {
    /// A process beside one of another kind tells nothing of its node.
    fn is_of_the_process(&self) -> bool {
        matches!(self, Self::Bound(_) | Self::Runs)
    }

    /// The kind, without what changes all the time.
    fn kind(&self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Protocol(_) => "protocol",
            Self::Refused(_) => "refused",
            Self::Failed => "failed",
            Self::Memory(_) => "memory",
            Self::Disk(_) => "disk",
            Self::Hypervisor(_) => "hypervisor",
            Self::Bound(_) => "bound",
            Self::Runs => "runs",
        }
    }

    fn write(&self, needs: &Needs, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let room = |f: &mut fmt::Formatter<'_>, what: &str, free: u64, needed: u64| {
            let (free, needed) = (free >> 20, needed.div_ceil(1 << 20));
            write!(f, "has {free} MiB of {what} free, {needed} are needed")
        };
        match self {
            Self::Draining => f.write_str("is being emptied"),
            Self::Protocol(theirs) => write!(f, "speaks protocol {theirs}, {} is needed", needs.protocol),
            Self::Refused(why) => write!(f, "refused it ({why})"),
            Self::Failed => f.write_str("was asked and did not follow; it is asked again"),
            Self::Memory(free) => room(f, "memory", *free, needs.memory),
            Self::Disk(free) => room(f, "disk", *free, needs.store()),
            Self::Hypervisor(theirs) => write!(f, "runs guests on {theirs}, {} is needed", needs.hypervisor),
            Self::Bound(vm) => write!(f, "is there for {vm}"),
            Self::Runs => f.write_str("says that it runs the vm itself"),
        }
    }
}

/// The nodes of the cluster, each with what keeps it from protecting the vm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    needs: Needs,
    nodes: BTreeMap<NodeId, Obstacle>,
}

impl PassedOver {
    /// Nobody yet, of those who could have the guest.
    pub(super) fn new(needs: Needs) -> Self {
        Self { needs, nodes: BTreeMap::new() }
    }

    /// One more process; of several of a node, the first that tells something of the node.
    pub(super) fn add(&mut self, node: &NodeId, obstacle: Obstacle) {
        match self.nodes.get_mut(node) {
            Some(known) if known.is_of_the_process() && !obstacle.is_of_the_process() => *known = obstacle,
            Some(_) => {}
            None => drop(self.nodes.insert(node.clone(), obstacle)),
        }
    }

    /// Who, and by which kind of obstacle: what is free changes all the time, and is no news.
    pub fn kinds(&self) -> Vec<(NodeId, &'static str)> {
        self.nodes.iter().map(|(node, obstacle)| (node.clone(), obstacle.kind())).collect()
    }
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nobody can protect it: ")?;
        if self.nodes.is_empty() {
            return f.write_str("no other node is there");
        }
        for (at, (node, obstacle)) in self.nodes.iter().take(MAX_NAMED).enumerate() {
            f.write_str(if at > 0 { "; " } else { "" })?;
            write!(f, "{node} ")?;
            obstacle.write(&self.needs, f)?;
        }
        match self.nodes.len().saturating_sub(MAX_NAMED) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}
