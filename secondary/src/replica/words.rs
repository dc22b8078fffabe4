//! What a follower is told, what it answers, and what it can hold. The [`Replica`](super::Replica) decides with them.

use colo_common::register::{Entry, Proposal};
use colo_common::{NodeId, Point, ReplicaId, Term};
use colo_primary::replicator::Ack;

/// What an ack means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AckPolicy {
    /// Staged whole in this process' memory: survives the loss of the primary.
    #[default]
    Memory,
    /// In the store and synced: survives the loss of both.
    Disk,
}

/// The copy of the guest that this node holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Copy {
    /// Nothing.
    Nothing,
    /// A whole point in the store that no replica id vouches for: a base for a resync by digests, no more.
    Stale {
        /// The point.
        point: Point,
    },
    /// In the middle of a seed or resync: can never be promoted.
    Inconsistent,
    /// Holds every point that it acked under this id.
    Whole {
        /// The id.
        replica: ReplicaId,
        /// The newest point that is staged whole.
        staged: Point,
        /// The newest point that the store holds, synced.
        persisted: Option<Point>,
        /// Whether the store holds the id too, synced.
        named: bool,
    },
}

impl Copy {
    /// The point that it holds whole.
    pub fn point(&self) -> Option<Point> {
        match self {
            Self::Whole { staged: point, .. } | Self::Stale { point } => Some(*point),
            Self::Inconsistent | Self::Nothing => None,
        }
    }
}

/// What the store of a node held when it started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stored {
    /// This node ran the guest, and nobody's copy has replaced it since.
    pub active: bool,
    /// A whole point in the store, with the replica id if one was stored.
    pub whole: Option<(Point, Option<ReplicaId>)>,
}

/// What a node may do by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rules {
    /// What an ack means.
    pub policy: AckPolicy,
    /// `on_crash = boot`: boot from disk a guest that this node ran when it crashed.
    pub boot_after_crash: bool,
}

/// How this node comes to run the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Start {
    /// From the newest whole staged point.
    Promote(Point),
    /// From its disk, as after a power cut.
    Boot,
}

/// What the node has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this to the arbiter, again and again, until [`answer`](super::Replica::answer) is told what came of it.
    Propose(Proposal),
    /// Tell the runner.
    Ack(Ack),
    /// Make the store hold this replica id, synced and beside a whole copy, so not before the copy's first mark; then
    /// say [`id_stored`](super::Replica::id_stored). The store does this and `EraseId` in the order they are asked for.
    StoreId(ReplicaId),
    /// Make the store forget the replica id, synced, then say [`id_erased`](super::Replica::id_erased).
    EraseId(ReplicaId),
    /// Run the guest: the register names this process. This machine is done; a replicator takes over.
    Run(Start, Entry),
}

/// Why a runner is turned away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A newer term is known here.
    #[error("{offered} is over: {known} is known here; read the register")]
    Fenced {
        /// The runner's.
        offered: Term,
        /// The newest known.
        known: Term,
    },
    /// This node is taking the guest over.
    #[error("this node is taking the guest over")]
    Promoting,
    /// The copy is not the one that the register names.
    #[error("this node holds no whole copy as replica {wanted}: seed it anew")]
    NotThisReplica {
        /// The runner's.
        wanted: ReplicaId,
    },
    /// An epoch came where none belongs.
    #[error("{0} does not follow what is staged here")]
    OutOfPlace(Point),
}

/// Why this node does not take the guest over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotMine {
    /// The register names another.
    #[error("the register says: {0}")]
    Register(Entry),
    /// There is no register.
    #[error("the register does not exist")]
    Absent,
    /// No whole copy.
    #[error("this node has no whole copy of the guest")]
    NoCopy,
    /// The register names another replica than this node's copy.
    #[error("the register names replica {named} and this node holds {held}")]
    OtherReplica {
        /// Of the register.
        named: ReplicaId,
        /// Of this node.
        held: ReplicaId,
    },
    /// It follows a node that lives.
    #[error("this node follows {0}, which lives: move the guest with a switchover, or fence {0} first")]
    Followed(NodeId),
    /// A forced promotion, and a node that may run the guest.
    #[error(
        "{node} may run the guest: fence it with `coloctl fence {node}`, or make sure that it is off and say so with \
         `coloctl confirm-fenced {node}` (a word before {term} does not count)"
    )]
    NotFenced {
        /// That node.
        node: NodeId,
        /// The register's term.
        term: Term,
    },
    /// An earlier proposal has no answer yet.
    #[error("a proposal to the arbiter has no answer yet")]
    Proposing,
}

/// A rule left out on purpose, so that the tests can show that they would notice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mutation {
    /// Under `disk`, acks what is only staged.
    pub ack_before_sync: bool,
    /// Promotes whatever whole copy it has, whatever replica the register names.
    pub promote_any_replica: bool,
    /// Promotes although the vm was stopped.
    pub promote_stopped: bool,
    /// Goes on acking when it has proposed to run from the point that it had then.
    pub never_silent: bool,
    /// Stores the replica id under `memory` too.
    pub store_id_under_memory: bool,
    /// `disk -> memory` leaves the stored id.
    pub keep_id_on_switch: bool,
    /// `memory -> disk` stores the id while the store still lacks what was acked.
    pub store_id_early: bool,
    /// `memory -> disk` goes on acking as under `memory` until the id is stored.
    pub memory_acks_until_stored: bool,
    /// A seed leaves `active`.
    pub seed_keeps_active: bool,
    /// Boots from disk although it is not `active`.
    pub boot_inactive: bool,
    /// Boots although the register names another node.
    pub boot_for_another: bool,
    /// Starts a stopped vm that another node ran last.
    pub start_for_another: bool,
    /// Runs the guest by force although a node that may run it is not fenced.
    pub force_unfenced: bool,
    /// Gives the register back although it has run the guest.
    pub hand_back_active: bool,
}
