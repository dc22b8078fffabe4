//! What the operator asks of a follower: to run the guest, by force or not, and that other nodes do not run it. Each is
//! answered from the register as it is read then.

use colo_common::NodeId;
use colo_common::register::Entry;
use colo_primary::admin::{FenceAnswer, Order, Reason, WhyNot};
use tokio::sync::oneshot;

use super::Follower;
use crate::replica::{Action, Fences, NotMine, others};

/// As the control plane names it.
pub(super) fn reason_of(why: &NotMine) -> Reason {
    match why {
        NotMine::NoCopy | NotMine::OtherReplica { .. } => Reason::NoCopy,
        NotMine::NotFenced { .. } => Reason::NotFenced,
        NotMine::Register(_) | NotMine::Absent | NotMine::Followed(_) | NotMine::Proposing => Reason::NotNow,
    }
}

/// Where it says that a node is fenced, and who waits for the answer.
type Confirming = (NodeId, oneshot::Sender<FenceAnswer>);

/// The operator's words that wait for the register, and those that count.
#[derive(Default)]
pub(super) struct Asked {
    promote: Option<Order>,
    confirming: Option<Confirming>,
    fences: Fences,
}

impl Asked {
    /// To run the guest. One at a time: somebody else's word may still be waited for.
    pub(super) fn promote(&mut self, order: Order) {
        if self.wants() {
            let text = "another operator's word is waited for: look at the status, and ask again".to_owned();
            // Whoever asked may have given up.
            drop(order.reply.send(WhyNot { reason: Reason::NotNow, text }));
        } else {
            self.promote = Some(order);
        }
    }

    /// Whether somebody waits for this node to run the guest. Whoever asked may have left while the arbiter was silent:
    /// an order does not outlive that.
    pub(super) fn wants(&mut self) -> bool {
        self.promote.take_if(|order| order.reply.is_closed());
        self.promote.is_some()
    }

    /// Whether it is to be by force.
    pub(super) fn forces(&self) -> bool {
        self.promote.as_ref().is_some_and(|order| order.force)
    }

    /// It does not come to that.
    pub(super) fn refuse(&mut self, reason: Reason, text: String) {
        if let Some(order) = self.promote.take() {
            // Whoever asked may have given up.
            drop(order.reply.send(WhyNot { reason, text }));
        }
    }

    /// It has come to that.
    pub(super) fn done(&mut self) {
        self.promote = None;
    }
}

impl Follower {
    pub(super) fn on_confirm_fenced(&mut self, node: NodeId, reply: oneshot::Sender<FenceAnswer>) {
        if self.asked.confirming.as_ref().is_some_and(|(_, waits)| !waits.is_closed()) {
            let text = "another operator's word is waited for: ask again".to_owned();
            // Whoever asked may have given up.
            drop(reply.send(Err(WhyNot { reason: Reason::NotNow, text })));
            return;
        }
        self.asked.confirming = Some((node, reply));
        self.read();
    }

    /// The register was read: a confirmation counts for what it says now.
    pub(super) fn confirm_fenced(&mut self, found: Option<&Entry>) {
        // Whoever has left without an answer may have started that node again since.
        let waits = |(_, reply): &Confirming| !reply.is_closed();
        let Some((node, reply)) = self.asked.confirming.take().filter(waits) else { return };
        let refused = |reason, text| Err(WhyNot { reason, text });
        let answer = match found {
            None => refused(Reason::NotNow, "the register does not exist".to_owned()),
            Some(entry) if self.replica.source() == Some(&node) => refused(
                Reason::NotNow,
                format!("{node} lives: this node follows it; the register says: {entry}"),
            ),
            Some(entry) if others(entry, &self.me).contains(&&node) => {
                self.asked.fences.confirm(node, entry.term);
                Ok(entry.clone())
            }
            Some(entry) => {
                let text =
                    format!("{node} is no other node that may run the guest; the register says: {entry}");
                refused(Reason::BadRequest, text)
            }
        };
        // Whoever asked may have given up.
        drop(reply.send(answer));
    }

    /// What follows from the operator's word, or from a suspicion, by the register as it was just read.
    pub(super) fn want_to_run(&mut self, found: Option<&Entry>) -> Result<Vec<Action>, NotMine> {
        if self.asked.forces() {
            let fences = &self.asked.fences;
            return self.replica.promote_by_force(found, fences);
        }
        self.replica.promote(found)
    }
}
