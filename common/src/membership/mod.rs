//! Who is there: what the nodes of a cluster say of themselves while they live, and the claim of a spare.
//!
//! ```text
//!   nodes/NODE/VM        what the process of NODE that is bound to VM says of itself
//!   nodes/NODE/@spare    the same of a process that is bound to no vm
//!   claims/NODE          which vm has claimed that spare; ends with the record of the claimed process at the latest
//!   vms/VM/register      the register (see the arbiter)
//! ```
//!
//! A record lasts as long as its process. Nothing that must be safe rests on that: a record may be there for seconds
//! after its process has died, and may be gone while it lives. Who runs a vm is decided by the register alone, and a
//! claim only keeps two runners from preparing the same spare: it is granted in one transaction over the register of the
//! vm, the spare's record and the claim. The claim of a runner that died stays until the spare
//! [releases](Membership::release) it, or a later term of the same vm takes it over.

pub mod etcd;
pub mod file;
mod judge;
mod record;
pub mod scripted;

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::arbiter::{ArbiterError, OpenError};
use crate::config::{ArbiterConfig, ArbiterKind, Endpoint};
use crate::etcd::EtcdError;
use crate::ids::{Incarnation, NodeId, Point, Term, VmId};
use crate::register::Entry;

/// Records that are listed at most: more processes than that are beyond what one arbiter serves.
pub const MAX_NODES: usize = 4096;

/// Registers that are listed at most.
pub const MAX_VMS: usize = 4096;

/// Letters of each of a record's free words that are kept; CPU models have some 60.
pub const MAX_WORDS: usize = 128;

/// Complaints about what is no record that are remembered, so that each is told once.
const MAX_TOLD: usize = 1000;

/// The slot of a process that is bound to no vm. No vm's name begins with '@'.
const SPARE: &str = "@spare";

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    /// Bound to no vm; may be claimed.
    Spare,
    /// Follows a vm, or offers to.
    Follower,
    /// Runs a vm.
    Runner,
    /// Bound to a vm, and neither: it waits for the register or for an operator.
    Waiting,
}

impl fmt::Display for NodeRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Spare => "spare",
            Self::Follower => "follower",
            Self::Runner => "runner",
            Self::Waiting => "waiting",
        })
    }
}

/// What one process says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its host.
    pub node: NodeId,
    /// The very process.
    pub incarnation: Incarnation,
    /// Its control plane, as others reach it.
    pub address: Endpoint,
    /// What it does.
    pub role: NodeRole,
    /// The vm that it is bound to.
    pub vm: Option<VmId>,
    /// Colo's version.
    pub version: String,
    /// The newest protocol that it speaks.
    pub protocol: u32,
    /// The host's CPU model, in its own words.
    pub cpu: String,
    /// What runs guests there, such as `kvm`.
    pub hypervisor: String,
    /// Bytes of memory that a guest could have.
    pub memory_free: u64,
    /// Bytes of disk that a store could have.
    pub disk_free: u64,
    /// The newest whole point of its copy.
    pub copy: Option<Point>,
    /// Whether an operator is emptying the node: nothing new is to come to it.
    pub draining: bool,
}

impl NodeRecord {
    /// The part of its key that tells the processes of one host apart.
    fn slot(&self) -> &str {
        self.vm.as_ref().map_or(SPARE, VmId::as_str)
    }
}

/// A vm's runner wants a spare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The vm.
    pub vm: VmId,
    /// What its register must hold: the entry by which the claimant runs it.
    pub expected: Entry,
    /// The claimant's node.
    pub by: NodeId,
    /// The claimant's process.
    pub incarnation: Incarnation,
    /// The spare's node.
    pub node: NodeId,
    /// The spare's process.
    pub node_incarnation: Incarnation,
}

impl Claim {
    /// The term in which it was made.
    pub fn term(&self) -> Term {
        self.expected.term
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for {} by {} in {}", self.node, self.vm, self.by, self.term())
    }
}

/// What becomes of a claim. No answer at all means that it may have been granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimAnswer {
    /// The spare is the claimant's.
    Claimed,
    /// It is not, and nothing was changed.
    Refused(ClaimRefusal),
}

/// Why a spare is not the claimant's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimRefusal {
    /// The claimant does not run the vm by this entry any more.
    #[error("the register has moved on{}", .0.as_ref().map(|entry| format!(": {entry}")).unwrap_or_default())]
    RegisterMoved(Option<Entry>),
    /// That process is not registered any more.
    #[error("the spare's process is not registered; choose another one")]
    Gone,
    /// It is bound to a vm.
    #[error("it is bound to {0} and no spare any more; choose another one")]
    Busy(VmId),
    /// An operator is emptying its node.
    #[error("its node is being drained; choose another one")]
    Draining,
    /// Another vm, or another runner of this one, has it.
    #[error("it is claimed already ({0}); choose another one")]
    ClaimedBy(Box<Claim>),
}

/// Why there is no answer, or none that helps.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// Its files or endpoints cannot be reached. Whether anything was changed is not known.
    #[error("the membership {place} does not answer: {reason}")]
    Unreachable {
        /// Which one.
        place: String,
        /// What was found.
        reason: String,
    },
    /// Another process that lives has this name.
    #[error(
        "another process (at {address}) is registered as {name}, also after {waited:?}; give every node a name of its own, or end that process"
    )]
    Taken {
        /// Node, and vm or `@spare`.
        name: String,
        /// Where the other one is.
        address: String,
        /// How long its end was waited for.
        waited: Duration,
    },
    /// What is there is no record or no claim.
    #[error(
        "{place} does not hold what it should: {reason}; look at it, and remove it if nothing of Colo's wrote it"
    )]
    Damaged {
        /// Where.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// A register that was needed.
    #[error(transparent)]
    Register(#[from] ArbiterError),
}

impl From<EtcdError> for MembershipError {
    fn from(error: EtcdError) -> Self {
        Self::Unreachable { place: "in etcd".to_owned(), reason: error.to_string() }
    }
}

/// Who is there. Calls block, for a bounded time.
pub trait Membership: Send + Sync {
    /// Says that this process lives, until the answer is dropped. The record of a process of the same name that has
    /// died may still be there for a while; its end is waited for.
    ///
    /// # Errors
    /// Another process that lives has the name; or no answer.
    fn register(&self, record: NodeRecord) -> Result<Box<dyn Registration>, MembershipError>;

    /// What all processes say of themselves, by name, [`MAX_NODES`] at most. What is no record is left out.
    ///
    /// # Errors
    /// No answer.
    fn nodes(&self) -> Result<Vec<NodeRecord>, MembershipError>;

    /// All registers, by name, [`MAX_VMS`] at most. What is no register is left out.
    ///
    /// # Errors
    /// No answer.
    fn vms(&self) -> Result<Vec<(VmId, Entry)>, MembershipError>;

    /// Claims a spare, if in one instant the register of the vm holds exactly what is expected, the spare's process is
    /// registered, and nobody else has claimed it. The same vm may claim again, in a later term too. Repeating a claim
    /// that was granted finds it granted.
    ///
    /// # Errors
    /// No answer: it may have been granted.
    fn claim(&self, claim: &Claim) -> Result<ClaimAnswer, MembershipError>;

    /// The claim on this node's spare.
    ///
    /// # Errors
    /// No answer.
    fn claim_of(&self, node: &NodeId) -> Result<Option<Claim>, MembershipError>;

    /// Gives a claim up, if it is still exactly this one.
    ///
    /// # Errors
    /// No answer.
    fn release(&self, claim: &Claim) -> Result<(), MembershipError>;
}

/// A process' own record; dropped, the process leaves.
pub trait Registration: Send + Sync {
    /// The process says something else of itself from now on, also if this call has no answer: what could not be
    /// written is written as soon as that can be done. A spare that is bound to a vm keeps the claim on it.
    ///
    /// # Errors
    /// Another process has the new name; or no answer.
    fn update(&self, record: NodeRecord) -> Result<(), MembershipError>;

    /// Whether others see it, as far as this process knows.
    fn is_registered(&self) -> bool;
}

/// The membership beside the arbiter that a configuration names.
///
/// # Errors
/// Its directory, or a certificate, cannot be used.
pub fn open(config: &ArbiterConfig) -> Result<Arc<dyn Membership>, OpenError> {
    Ok(match config.kind {
        ArbiterKind::File => {
            let directory = config.directory.as_deref().unwrap_or(Path::new(""));
            Arc::new(file::FileMembership::open(directory)?)
        }
        ArbiterKind::Etcd => Arc::new(etcd::EtcdMembership::open(config)?),
    })
}

/// Tells of each place once that it does not hold what it should.
#[derive(Debug, Default)]
struct Complaints(Mutex<BTreeSet<String>>);

impl Complaints {
    fn tell(&self, place: &str, reason: &str) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < MAX_TOLD && told.insert(place.to_owned()) {
            tracing::warn!("{place} is left out: {reason}; remove it if nothing of Colo's wrote it");
        }
    }
}
