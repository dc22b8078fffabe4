//! What a runner is told, what it answers, and the phases it goes through. The
//! [`Replicator`](super::Replicator) decides with them.

use colo_common::register::{Entry, Proposal, StopReason};
use colo_common::{Epoch, History, NodeId, Point, ReplicaId, Term};
use colo_proto::message::Bases;

/// What an epoch carried that must not be lost before its ack: the dirty set.
pub trait Carried {
    /// Takes what `newer`, of the epoch after, carried as well.
    fn merge(&mut self, newer: Self);

    /// Whether there is nothing to lose.
    fn is_empty(&self) -> bool;
}

impl Carried for () {
    fn merge(&mut self, _newer: Self) {}

    fn is_empty(&self) -> bool {
        true
    }
}

impl Carried for colo_vmm::DirtySet {
    fn merge(&mut self, newer: Self) {
        self.union_with(&newer);
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A replica's word that it holds a point and all before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ack {
    /// The point.
    pub point: Point,
    /// The replica that holds it.
    pub replica: ReplicaId,
    /// The runner's term that the replica knows of: older acks do not count in a newer term.
    pub term: Term,
}

/// What a secondary that is connected anew holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Offer {
    /// Its replica, if its copy is whole.
    pub replica: Option<ReplicaId>,
    /// Its newest whole staged point; for a seed also that of a copy that nothing vouches for.
    pub staged: Option<Point>,
    /// What a new copy can be made from.
    pub bases: Bases,
    /// The history of those.
    pub history: History,
}

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// A new copy, or one that came back.
    Seed,
    /// To go on with this copy.
    Link(ReplicaId),
}

/// How far output may go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entitled {
    /// Nothing that is not out yet.
    Nothing,
    /// Output of this epoch and all before it.
    UpTo(Epoch),
    /// All output, as soon as it is made.
    All,
}

/// What a guest's request does once its epoch may be let out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Request {
    /// The guest ends: nobody runs it from then on.
    End,
    /// The guest begins anew.
    Reset,
}

/// What the node has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<C> {
    /// Send this to the arbiter, again and again, until [`answer`](Replicator::answer) is told what came of it.
    Propose(Proposal),
    /// Add this to the open dirty set: its epochs failed.
    MergeBack(C),
    /// This was changed in the epoch of that point, which the copy has.
    Covered(Point, C),
    /// Drop the link to the secondary.
    Detach,
    /// Reset the guest, whose request is now out.
    ResetGuest,
    /// Stop the vCPUs; they must not run again before [`Action::Unpark`].
    Park,
    /// The register was handed back: run on from where the guest was parked.
    Unpark,
    /// This process has no part in the vm any more.
    End(End),
}

/// Why a runner ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// It wrote `Stopped`.
    Stopped(StopReason),
    /// Another runs the vm and this node's guest is of no more use, or somebody stopped the vm.
    Superseded(Option<Entry>),
}

/// An ack or an offer that cannot be: the link it came by is not to be trusted any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// An ack of something that was never cut here.
    #[error("the secondary acked {0}, which is not on this history")]
    UnknownPoint(Point),
    /// Not the replica that the register names.
    #[error(
        "the secondary offers {offered:?} and the register names replica {named}: it must be seeded anew"
    )]
    OtherReplica {
        /// What it has.
        offered: Box<Offer>,
        /// What is wanted.
        named: ReplicaId,
    },
    /// Nobody is to be connected now.
    #[error("no secondary can join while {0}")]
    NotNow(&'static str),
}

/// Where the protection stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Nobody follows.
    Alone,
    /// The base copy is on its way; the register says `Solo`, output goes out.
    Seeding {
        /// To whom.
        peer: NodeId,
    },
    /// J is cut; what is made after it is held.
    Joining {
        /// To whom.
        peer: NodeId,
        /// J.
        join: Point,
    },
    /// J is acked and `Paired` is proposed.
    Pairing {
        /// To whom.
        peer: NodeId,
        /// J.
        join: Point,
    },
    /// Protected.
    Paired {
        /// By whom.
        peer: NodeId,
        /// By which copy.
        replica: ReplicaId,
    },
    /// The register went to another, who may never have run; the guest is parked and may be handed back.
    Lost {
        /// The entry that this node lost to. It ran the vm in the term just before that.
        to: Entry,
    },
    /// Nothing more to do.
    Over,
}

/// A rule left out on purpose, so that the tests can show that they would notice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mutation {
    /// Output goes on after the cut of J.
    pub release_while_pairing: bool,
    /// Output is held from the ack of J on, not from its cut.
    pub hold_from_proposal: bool,
    /// A J that was given up still leads to Paired when its ack comes.
    pub void_join_counts: bool,
    /// The dirty sets of failed epochs are dropped.
    pub drop_carried: bool,
    /// Output goes out when Solo is proposed, not when it is granted.
    pub release_on_proposal: bool,
    /// While nobody is linked output goes out, whatever the register says.
    pub release_unlinked: bool,
    /// The old value, read back, is taken for the failure of a proposal.
    pub old_value_is_refusal: bool,
    /// A refused proposal is taken as "nothing has changed".
    pub refused_changes_nothing: bool,
    /// Takes a hand-back although another may have run the vm since.
    pub take_any_hand_back: bool,
    /// A copy that is older than the kept dirty set is sent that set and no more.
    pub resync_any_copy: bool,
    /// What is in flight when `Solo` is granted is forgotten, and the dirty set goes on being kept.
    pub solo_forgets_flight: bool,
}
