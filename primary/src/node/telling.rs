//! How a runner keeps its account: after every event, and for every acked epoch.

use colo_common::Point;
use colo_vmm::MachineState;
use std::time::Instant;

use super::status::{Report, Role};
use super::{Node, NodeError};
use crate::checkpoint::Timing;
use crate::encode::PageCount;
use crate::replicator::{Ack, Entitled, Phase};

/// An epoch that is on its way.
#[derive(Clone, Debug)]
pub(crate) struct SentEpoch {
    point: Point,
    pages: PageCount,
    wire_bytes: u64,
    timing: Timing,
    cut_at: Instant,
    /// Console input taken, and output made, at the cut.
    input: u64,
    console: u64,
}

impl SentEpoch {
    pub(super) fn new(point: Point, timing: Timing, cut_at: Instant, state: &MachineState) -> Self {
        let (input, console) = (state.console_input, state.output.console);
        Self { point, pages: PageCount::default(), wire_bytes: 0, timing, cut_at, input, console }
    }
}

impl Node {
    /// An epoch's frames are written.
    pub(super) fn on_sent(&mut self, point: Point, bytes: u64, pages: PageCount) {
        if let Some(sent) = self.sent.iter_mut().find(|sent| sent.point == point) {
            (sent.wire_bytes, sent.pages) = (bytes, pages);
        }
    }

    pub(super) fn on_ack(&mut self, ack: Ack) -> Result<(), NodeError> {
        let before = self.replicator.covered();
        let actions = match self.replicator.ack(ack) {
            Ok(actions) => actions,
            Err(e) => {
                tracing::warn!(vm = %self.vm, "{e}");
                self.board.error(e.to_string());
                return self.lose_link();
            }
        };
        if let (Some(disk), Some(acked)) = (&self.disk, self.replicator.acked()) {
            disk.acked(acked);
        }
        // Not before: a link that comes and goes with nothing new acked is as good as none.
        if self.replicator.covered() > before {
            self.lost_since = None;
        }
        while let Some(sent) = self.sent.pop_front_if(|sent| sent.point <= ack.point) {
            self.report(&sent);
        }
        self.act(actions)
    }

    fn report(&self, sent: &SentEpoch) {
        let mut backlog_bytes = 0;
        self.board.change(|status| {
            status.input_done = status.input_done.max(sent.input);
            status.epoch_at = Some(sent.cut_at);
            backlog_bytes = status.marks.backlog_bytes;
        });
        let ack = sent.cut_at.elapsed().saturating_sub(sent.timing.pause);
        let Point { term, epoch } = sent.point;
        tracing::debug!(term = term.0, epoch = epoch.0, wire_bytes = sent.wire_bytes, ?ack, "acked");
        self.board.report(Report {
            point: sent.point,
            role: Role::of(self.replicator.phase()),
            pages: sent.pages.data,
            zero_pages: sent.pages.zero,
            wire_bytes: sent.wire_bytes,
            timing: Some(sent.timing),
            ack: Some(ack),
            stage: None,
            apply: None,
            in_flight: self.replicator.in_flight(),
            backlog_bytes,
            console: sent.console,
        });
    }

    /// Writes down what has changed.
    pub(super) fn tell(&mut self) {
        let phase = self.replicator.phase();
        let role = if self.end.is_some() { Role::Stopped } else { Role::of(phase) };
        let replica = match phase {
            Phase::Paired { replica, .. } => Some(*replica),
            _ => None,
        };
        // Wanted once, for the copy that is whole now.
        self.send_all &= role != Role::Paired;
        let input = self.guest.console_input_offset();
        let entitled = self.replicator.entitled();
        let out = released(entitled, phase, self.replicator.history().tip(), self.replicator.acked());
        let resting = self.parked || self.stopping || self.standing.is_some() || self.resting.is_some();
        let failure = self.failure.as_ref().map(|failure| format!("the guest failed: {failure}"));
        self.board.change(|status| {
            (status.role, status.replica) = (role, replica);
            status.proposing = self.replicator.is_proposing();
            if &status.history != self.replicator.history() {
                status.history = self.replicator.history().clone();
            }
            status.judge_protection(Instant::now());
            if !matches!(role, Role::Seeding | Role::Joining | Role::Pairing) {
                status.seed = None;
            }
            status.tip = self.replicator.history().tip();
            status.acked = self.replicator.acked();
            status.out = status.out.max(out);
            status.link_stands(self.peer.is_some());
            // Where nobody is to follow, nobody is missed.
            if self.peer.is_none() && !matches!(role, Role::Pairing | Role::Paired) {
                (status.link, status.marks, status.epoch_at) = (None, super::status::Marks::default(), None);
            }
            status.in_flight = self.replicator.in_flight();
            status.running = role.runs() && !resting && failure.is_none();
            status.failure = failure;
            status.released = self.release.released().console;
            status.held_frames = self.release.frames();
            status.input = input;
            if entitled == Entitled::All {
                status.input_done = input;
            }
        });
    }
}

/// The newest point whose output is out, as far as this says; what was out before stays out.
fn released(entitled: Entitled, phase: &Phase, tip: Option<Point>, acked: Option<Point>) -> Option<Point> {
    match (entitled, phase) {
        (Entitled::All, _) => tip,
        (Entitled::UpTo(_), Phase::Joining { join, .. } | Phase::Pairing { join, .. }) => Some(*join),
        (Entitled::UpTo(_), _) => acked,
        (Entitled::Nothing, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::released;
    use crate::replicator::{Entitled, Phase};
    use colo_common::history::point;
    use colo_common::{Epoch, ReplicaId};

    #[test]
    fn what_is_out_follows_from_what_is_entitled() {
        let (tip, acked, join) = (Some(point(2, 9)), Some(point(2, 7)), point(1, 5));
        let peer = "b".parse().unwrap();
        let paired = Phase::Paired { peer, replica: ReplicaId(1) };
        let joining = Phase::Joining { peer: "b".parse().unwrap(), join };
        assert_eq!(released(Entitled::All, &Phase::Alone, tip, None), tip);
        assert_eq!(released(Entitled::UpTo(Epoch(5)), &joining, tip, None), Some(join));
        assert_eq!(released(Entitled::UpTo(Epoch(7)), &paired, tip, acked), acked);
        assert_eq!(released(Entitled::Nothing, &paired, tip, None), None);
    }
}
