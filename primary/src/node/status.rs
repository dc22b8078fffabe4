//! What a node tells about itself: written by the thread that owns the guest or the copy, read by the control plane.
//! Instants stand here where the control plane tells ages: an age is as of the question.

mod board;
mod devices;

pub use board::Board;
pub use devices::{Devices, DiskAccount, NetworkAccount, Overlay};

use colo_common::register::Entry;
use colo_common::{History, NodeId, Point, ReplicaId};
use colo_proto::message::{SeedMode, SeedPart};
use colo_proto::v1;
use colo_vmm::GuestMemory;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::checkpoint::Timing;
use crate::heartbeat::Pulse;
use crate::release::Size;
use crate::replicator::Phase;

/// What a node does for its vm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Not known yet.
    #[default]
    Starting,
    /// Runs the guest without protection.
    Alone,
    /// Runs it while the first copy is on its way.
    Seeding,
    /// Runs it; J is cut.
    Joining,
    /// Runs it; `Paired` is proposed.
    Pairing,
    /// Runs it, protected.
    Paired,
    /// Ran it; another has the register.
    Lost,
    /// Waits for a runner.
    Waiting,
    /// Holds a whole copy.
    Following,
    /// Receives a copy.
    Receiving,
    /// Takes the guest over.
    Promoting,
    /// Is done.
    Stopped,
    /// Is bound to no vm, and waits for one that needs it.
    Spare,
}

impl Role {
    /// Of a runner whose protection stands there.
    pub fn of(phase: &Phase) -> Self {
        match phase {
            Phase::Alone => Self::Alone,
            Phase::Seeding { .. } => Self::Seeding,
            Phase::Joining { .. } => Self::Joining,
            Phase::Pairing { .. } => Self::Pairing,
            Phase::Paired { .. } => Self::Paired,
            Phase::Lost { .. } => Self::Lost,
            Phase::Over => Self::Stopped,
        }
    }

    /// Whether the guest is this node's to run.
    pub fn runs(self) -> bool {
        matches!(self, Self::Alone | Self::Seeding | Self::Joining | Self::Pairing | Self::Paired)
    }
}

/// What was counted since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Epochs acked or staged.
    pub epochs: u64,
    /// Pages with bytes.
    pub pages: u64,
    /// Pages that were zero.
    pub zero_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Losses of the dirty set.
    pub ring_overruns: u64,
    /// Copies in full.
    pub full_copies: u64,
    /// Copies of what differed.
    pub resyncs: u64,
    /// Copies that came back and were sent what had been written since.
    pub rejoins: u64,
    /// Epochs that failed and were merged back.
    pub failed_epochs: u64,
    /// Links lost.
    pub link_losses: u64,
    /// Times that this node took the guest over.
    pub promotions: u64,
}

impl Counters {
    fn copy_begins(&mut self, mode: SeedMode) {
        *match mode.memory {
            SeedPart::All => &mut self.full_copies,
            SeedPart::Differing => &mut self.resyncs,
            SeedPart::Since(_) => &mut self.rejoins,
        } += 1;
    }
}

/// How far a secondary is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Staged whole.
    pub staged: Option<Point>,
    /// In the image.
    pub applied: Option<Point>,
    /// In the store.
    pub persisted: Option<Point>,
    /// Bytes staged and not yet applied and persisted.
    pub backlog_bytes: u64,
}

/// Where the time of a promotion went.
#[derive(Clone, Copy, Debug)]
pub struct Promoted {
    /// The point that the guest ran on from; none if it was booted anew.
    pub point: Option<Point>,
    /// From the suspicion to the register's answer; nothing if the operator asked.
    pub register: Duration,
    /// Finishing the backlog of the image.
    pub apply: Duration,
    /// Writing that this node runs the guest.
    pub store: Duration,
    /// Restoring the machine.
    pub restore: Duration,
    /// When the register answered.
    pub granted: Instant,
    /// When the first vCPU ran.
    pub ran: Option<Instant>,
}

/// The link to the other node, as it is or as it was last.
#[derive(Clone, Debug)]
pub struct LinkState {
    /// The other node.
    pub peer: NodeId,
    /// The other end of the connection.
    pub address: SocketAddr,
    /// Whether it stands.
    pub up: bool,
    /// Since when it does, or does not.
    pub since: Instant,
    /// What its heartbeats have found.
    pub pulse: Arc<Pulse>,
}

impl LinkState {
    /// A link that has just come up.
    pub fn new(peer: NodeId, address: SocketAddr, pulse: Arc<Pulse>) -> Self {
        Self { peer, address, up: true, since: Instant::now(), pulse }
    }
}

/// A copy on its way.
#[derive(Clone, Copy, Debug)]
pub struct Seed {
    /// Pages looked at.
    pub done: u64,
    /// Pages in all, as far as known.
    pub total: u64,
    /// Digests are compared.
    pub compares: bool,
    /// Since when.
    pub since: Instant,
}

/// What is sent in a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyNote {
    /// What.
    pub what: String,
    /// Why that is more than what was written since the point that the copy holds; empty if it is not.
    pub why: String,
    /// Since when.
    pub since: Instant,
}

/// What an ack of a follower means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Disk, or memory.
    pub disk: bool,
    /// The other one was asked for and waits until it is safe.
    pub pending: bool,
}

/// The guest.
#[derive(Clone, Debug)]
pub struct GuestAccount {
    /// What it is.
    pub description: v1::Guest,
    /// Its memory here.
    pub memory: Arc<GuestMemory>,
}

/// A node's account of itself.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// What it does.
    pub role: Role,
    /// The register as it was found last.
    pub register: Option<Entry>,
    /// When the arbiter answered last.
    pub arbiter_answered: Option<Instant>,
    /// Why the arbiter does not answer, since it has not.
    pub arbiter_silent: Option<String>,
    /// A proposal waits for the arbiter's answer.
    pub proposing: bool,
    /// The copy that protects, or that it holds.
    pub replica: Option<ReplicaId>,
    /// The newest cut.
    pub tip: Option<Point>,
    /// The newest acked point.
    pub acked: Option<Point>,
    /// The newest point whose output is out.
    pub out: Option<Point>,
    /// A whole point that no replica id vouches for.
    pub stale: Option<Point>,
    /// This node ran the guest when it crashed, and nothing has replaced its disk since: the guest could be booted from it.
    pub disk_of_runner: bool,
    /// When that was stored.
    pub stale_at: Option<SystemTime>,
    /// When the newest acked point was cut, or the newest whole one was staged.
    pub epoch_at: Option<Instant>,
    /// The secondary's marks.
    pub marks: Marks,
    /// Its history.
    pub history: History,
    /// The link to the other node.
    pub link: Option<LinkState>,
    /// What an ack means, if this node gives acks.
    pub policy: Option<Policy>,
    /// Whether a follower takes over without an operator's word.
    pub auto_failover: Option<bool>,
    /// The guest, once it is known.
    pub guest: Option<GuestAccount>,
    /// What is behind its disk and its network card.
    pub devices: Devices,
    /// Frames of epochs that are cut and may not go out yet.
    pub held_frames: Size,
    /// Its vCPUs run here.
    pub running: bool,
    /// Whom else there is, and why none of them can protect the vm that runs here without protection.
    pub nobody: Option<String>,
    /// Why this node cannot do its part any more: its guest or its store has failed.
    pub failure: Option<String>,
    /// Epochs on their way.
    pub in_flight: usize,
    /// The last thing that went wrong, and when.
    pub error: Option<(String, Instant)>,
    /// The copy on its way.
    pub seed: Option<Seed>,
    /// Counters.
    pub counters: Counters,
    /// When the guest began to run without protection; nothing while it is protected, or does not run here.
    pub unprotected_since: Option<Instant>,
    /// How long it ran here without protection before that, also under earlier processes, as far as the audit trail tells.
    pub unprotected_before: Duration,
    /// What is sent or received in the copy that was begun last.
    pub copying: Option<SeedMode>,
    /// The same in words, of a copy that is sent.
    pub copy: Option<CopyNote>,
    /// Console bytes let out.
    pub released: u64,
    /// Console input that the guest has taken.
    pub input: u64,
    /// Console input that is in an acked epoch.
    pub input_done: u64,
    /// How this process took the guest over.
    pub promotion: Option<Promoted>,
}

impl Status {
    /// The arbiter has answered: this is the register.
    pub fn found(&mut self, register: Option<&Entry>) {
        if self.register.as_ref() != register {
            self.register = register.cloned();
        }
        self.arbiter_answered = Some(Instant::now());
        self.arbiter_silent = None;
    }

    /// The role says whether the guest is protected from now on.
    pub fn judge_protection(&mut self, now: Instant) {
        let bare = self.role.runs() && self.role != Role::Paired;
        match self.unprotected_since {
            None if bare => self.unprotected_since = Some(now),
            Some(since) if !bare => {
                self.unprotected_before += now.saturating_duration_since(since);
                self.unprotected_since = None;
            }
            _ => {}
        }
    }

    /// All time without protection, with the time that still goes on.
    pub fn unprotected(&self, now: Instant) -> Duration {
        let open =
            self.unprotected_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.unprotected_before + open
    }

    /// The link stands, or does not.
    pub fn link_stands(&mut self, up: bool) {
        if let Some(link) = self.link.as_mut().filter(|link| link.up != up) {
            (link.up, link.since) = (up, Instant::now());
        }
    }

    /// How old the stale point is, as far as clocks can tell.
    pub fn stale_age(&self) -> Option<Duration> {
        let at = self.stale_at.filter(|_| self.stale.is_some())?;
        Some(SystemTime::now().duration_since(at).unwrap_or_default())
    }

    /// Whether the link stands.
    pub fn is_linked(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.up)
    }
}

/// One epoch, as watchers are told of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its point.
    pub point: Point,
    /// What the node did.
    pub role: Role,
    /// Pages with bytes.
    pub pages: u64,
    /// Pages that were zero.
    pub zero_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Where the pause went; of a runner.
    pub timing: Option<Timing>,
    /// From the resume to the ack; of a runner.
    pub ack: Option<Duration>,
    /// From the last frame to staged; of a follower.
    pub stage: Option<Duration>,
    /// Applying it; of a follower.
    pub apply: Option<Duration>,
    /// Epochs in flight after it.
    pub in_flight: usize,
    /// Bytes of backlog at the secondary.
    pub backlog_bytes: u64,
    /// Console bytes up to its end.
    pub console: u64,
}

#[cfg(test)]
mod tests {
    use super::{Role, Status};
    use std::time::{Duration, Instant};

    #[test]
    fn time_without_protection_adds_up() {
        let (mut status, began) = (Status::default(), Instant::now());
        let mut at = |role, second| {
            status.role = role;
            status.judge_protection(began + Duration::from_secs(second));
            (status.unprotected_since.is_some(), status.unprotected_before.as_secs())
        };
        assert_eq!(at(Role::Following, 0), (false, 0), "it does not run here");
        assert_eq!(at(Role::Alone, 1), (true, 0));
        assert_eq!(at(Role::Seeding, 2), (true, 0));
        assert_eq!(at(Role::Paired, 4), (false, 3));
        assert_eq!(at(Role::Paired, 9), (false, 3));
        assert_eq!(at(Role::Alone, 10), (true, 3));
        assert_eq!(at(Role::Lost, 12), (false, 5), "it stands still");
    }
}
