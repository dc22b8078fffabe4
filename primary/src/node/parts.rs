//! What a node is made of and what is left of it: its settings, what it begins with, and what a follower in the same
//! place finds.

use colo_common::{History, Incarnation, NodeId, Point, VmId};
use colo_vmm::{BlockSet, BootFile, DirtySet, GuestError, GuestMemory, ProtectedGuest, WireSpec};
use std::sync::Arc;
use std::time::Duration;

use crate::changes::Changes;
use crate::last_changed::LastChanged;
use crate::outlet::Outlet;
use crate::release::Release;
use crate::replicator::Replicator;
use crate::runner_disk::RunnerDisk;

/// What a node does by itself.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Time between cuts.
    pub interval: Duration,
    /// Epochs that may be cut and not acked.
    pub window: usize,
    /// Bytes of pages in an epoch at most; the secondary may ask for less.
    pub max_epoch_bytes: u64,
    /// Whether to run alone, without the operator's word, when the secondary is lost.
    pub solo_on_loss: bool,
    /// Whom to protect to, at the start and after a loss, by the address of its pairing service.
    pub secondary: Option<String>,
    /// Promotions in a row that a failing guest is worth.
    pub max_promotions: u32,
    /// Whether it looks for a secondary when protection was lost, without the operator's word.
    pub reprotect: bool,
}

/// Everything that a node begins with. The guest is stopped: just booted, restored, or promoted.
pub struct Beginning {
    /// Which vm.
    pub vm: VmId,
    /// Which node.
    pub me: NodeId,
    /// Which process.
    pub incarnation: Incarnation,
    /// The guest.
    pub guest: Box<dyn ProtectedGuest>,
    /// Its description, for a secondary.
    pub spec: WireSpec,
    /// The register names this process.
    pub replicator: Replicator<Changes>,
    /// Output that is held.
    pub release: Release,
    /// The disk behind it, begun to be run on.
    pub disk: Option<Arc<RunnerDisk>>,
    /// Where output goes.
    pub outlet: Outlet,
    /// Whether it ran elsewhere before: the network is told where it is now.
    pub moved: bool,
    /// Whether somebody protected the vm before: by `reprotect`, somebody is to do so again.
    pub was_protected: bool,
    /// Promotions in a row because the guest had failed.
    pub promotions: u32,
    /// The control plane of the node that ran it before: it protects to that one if it is told of no other.
    pub former: Option<String>,
    /// That node moved it here on purpose, and is about to follow.
    pub planned: bool,
    /// What is known of what was changed when. If it knows anything, the guest's writes are tracked.
    pub last_changed: LastChanged,
}

/// What is left when a node's part is over: the guest's memory as it was, for a follower in the same place.
pub struct Remains {
    /// The memory; nothing writes it any more.
    pub memory: Arc<GuestMemory>,
    /// What the guest is.
    pub spec: WireSpec,
    /// Digest of that.
    pub spec_digest: u64,
    /// What it boots from.
    pub boot_files: Vec<BootFile>,
    /// The memory holds this point, but for `changed`; nothing if that is not known.
    pub base: Option<Point>,
    /// Frames that may hold something else.
    pub changed: DirtySet,
    /// The point that the image of the disk holds, and blocks where it may hold something else.
    pub disk: Option<(Point, BlockSet)>,
    /// The points that were cut here or before.
    pub history: History,
}

/// Why a node stopped running its guest.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The guest.
    #[error("the guest cannot go on here: {0}")]
    Guest(#[from] GuestError),
    /// Guest memory.
    #[error("the guest's memory cannot be copied: {0}")]
    Memory(#[from] colo_vmm::memory::MemoryError),
    /// A thread.
    #[error("no thread can be had: {0}; raise the limit on processes (ulimit -u)")]
    Thread(#[source] std::io::Error),
}
