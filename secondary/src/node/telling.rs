//! How a follower keeps its account: after every event, and for every epoch that it has staged and applied.

use colo_common::register::{Entry, Value};
use colo_common::{Point, ReplicaId};
use colo_primary::node::status::{Devices, DiskAccount, NetworkAccount, Overlay, Policy, Report, Role};
use colo_proto::message::SeedMode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Follower, Outcome, READ_INTERVAL, Warm};
use crate::replica::{AckPolicy, Copy};
use crate::staging::{Measures, StagedEpoch};

/// Between two looks at a register that is known to be older than what the runner says.
const SOON: Duration = Duration::from_millis(50);

/// An epoch that is staged and not applied.
pub(super) struct Noted {
    point: Point,
    measures: Measures,
    /// From its last frame to here.
    stage: Duration,
    console: u64,
}

impl Follower {
    /// What an ack means.
    pub(super) fn policy(&self) -> Policy {
        let disk = self.replica.policy() == AckPolicy::Disk;
        Policy { disk, pending: self.replica.is_changing_policy() }
    }

    /// What of this node is behind the devices of the guest that waits.
    pub(super) fn devices(&self, warm: &Warm) -> Devices {
        let virtio = warm.spec.virtio();
        let disk = virtio.disk.as_ref().zip(warm.disk.as_ref()).zip(self.settings.disk.as_ref());
        let disk = disk.map(|((spec, disk), path)| DiskAccount {
            path: path.clone(),
            bytes: spec.bytes,
            read_only: spec.read_only,
            // The file is locked as long as the disk lives, and another guest may need it.
            overlay: Some(Arc::new(Arc::downgrade(disk)) as Arc<dyn Overlay>),
        });
        let network = virtio.net.zip(self.tap.clone()).map(|(net, tap)| NetworkAccount { tap, mac: net.mac });
        Devices { disk, network }
    }

    /// Reads the register for the account, whose answer decides nothing: nobody asked on behalf of the protocol.
    pub(super) fn look_at_register(&mut self, now: Instant) {
        let known = self.board.status().register.map(|entry| entry.term);
        let old = known.unwrap_or_default() < self.replica.fence();
        let wait = if old { SOON } else { READ_INTERVAL };
        // Without a link it is read anyhow.
        if now.saturating_duration_since(self.looked) < wait || self.link.is_none() {
            return;
        }
        self.looked = now;
        self.arbiter.read();
    }

    /// Whether a whole copy protects the vm: its runner is there, or the register names it as far as this node knows.
    fn counts(&self, copy: ReplicaId) -> bool {
        let named = self.board.status().register.as_ref().is_none_or(|entry| match &entry.value {
            Value::Paired { replica, .. } => *replica == copy,
            _ => entry.term < self.replica.fence(),
        });
        self.link.is_some() || named
    }

    /// Writes down what has changed.
    pub(super) fn tell(&mut self) {
        let role = match self.replica.copy() {
            _ if matches!(self.end, Some(Outcome::Run(..))) || self.replica.is_proposing() => Role::Promoting,
            _ if self.end.is_some() => Role::Stopped,
            Copy::Whole { replica, .. } if self.counts(*replica) => Role::Following,
            Copy::Inconsistent if self.link.is_some() => Role::Receiving,
            _ => Role::Waiting,
        };
        let stale = match self.replica.copy() {
            Copy::Stale { point } => Some(*point),
            _ => None,
        };
        self.marks.backlog_bytes = self.budget.used();
        let state = self.tip.as_ref().map(|tip| &tip.epoch.state);
        let state = state.or(self.restored.as_ref().map(|restored| &restored.state));
        let input = state.map_or(0, |state| state.console_input);
        self.board.change(|status| {
            (status.role, status.replica, status.stale) = (role, self.replica_id(), stale);
            status.disk_of_runner = self.replica.is_active();
            (status.marks, status.acked) = (self.marks, self.replica.acked());
            status.link_stands(self.link.is_some());
            status.proposing = self.replica.is_proposing();
            status.policy = Some(self.policy());
            status.auto_failover = Some(self.settings.auto_failover);
            status.failure = self.store_failed.as_ref().map(|why| format!("the store has failed: {why}"));
            (status.released, status.input, status.input_done) = (self.console.end(), input, input);
            status.held_frames = self.held.frames();
            if role != Role::Following && role != Role::Promoting {
                status.epoch_at = None;
            }
            if status.history != self.history {
                status.history = self.history.clone();
            }
        });
    }

    /// The register was found.
    pub(super) fn remember(&mut self, found: Option<&Entry>) {
        if let (Some(entry), Some(persister)) = (found, &self.persister)
            && self.board.status().register.as_ref().map(|known| known.term) != Some(entry.term)
        {
            persister.order(crate::persist::Job::Term(entry.term));
        }
        self.board.change(|status| status.found(found));
    }

    /// A copy begins; what was staged of the one before is not told any more.
    pub(super) fn note_seed(&mut self, mode: SeedMode) {
        self.staged.clear();
        self.board.copy_begins(mode);
    }

    /// An epoch is staged.
    pub(super) fn note_staged(&mut self, epoch: &StagedEpoch) {
        let stage = epoch.measures.arrived.map_or(Duration::ZERO, |at| at.elapsed());
        let (point, measures, console) = (epoch.point, epoch.measures, epoch.state.output.console);
        tracing::debug!(pages = measures.pages, wire_bytes = measures.wire_bytes, took = ?stage, "staged");
        self.staged.push_back(Noted { point, measures, stage, console });
        self.board.change(|status| status.epoch_at = Some(Instant::now()));
    }

    /// The epoch at `point` is applied, which took so long.
    pub(super) fn note_applied(&mut self, point: Point, took: Duration) {
        while let Some(noted) = self.staged.pop_front_if(|noted| noted.point <= point) {
            let Measures { pages, zero_pages, wire_bytes, .. } = noted.measures;
            self.board.report(Report {
                point: noted.point,
                role: Role::Following,
                pages,
                zero_pages,
                wire_bytes,
                timing: None,
                ack: None,
                stage: Some(noted.stage),
                apply: Some(took),
                in_flight: self.staged.len(),
                backlog_bytes: self.budget.used(),
                console: noted.console,
            });
        }
    }
}
