//! What the operator asks of a follower, simulated: `secondary::node::asked`, function by function.

use colo_common::NodeId;
use colo_common::register::Entry;
use colo_secondary::replica::{Action, Fences, NotMine, others};

use crate::common::Common;
use crate::follower::Follower;
use crate::plan::Time;

/// `asked::Asked`. Whoever asks leaves at some instant.
#[derive(Default)]
pub(crate) struct Asked {
    /// Whether it is to be by force.
    promote: Option<(bool, Time)>,
    confirming: Option<(NodeId, Time)>,
    fences: Fences,
}

impl Asked {
    pub(crate) fn wants(&mut self, now: Time) -> bool {
        self.promote.take_if(|(_, until)| now > *until);
        self.promote.is_some()
    }

    pub(crate) fn forces(&self) -> bool {
        self.promote.is_some_and(|(force, _)| force)
    }

    pub(crate) fn refuse(&mut self, why: &NotMine, common: &mut Common) {
        if let Some((true, _)) = self.promote.take() {
            common.count(match why {
                NotMine::NotFenced { .. } => "forces refused for want of a fence",
                NotMine::Followed(_) => "forces refused beside a runner",
                NotMine::NoCopy => "forces refused for want of a copy",
                _ => "forces refused",
            });
        }
    }

    pub(crate) fn done(&mut self) {
        self.promote = None;
    }

    /// Whether an answer is waited for.
    pub(crate) fn waits(&self, now: Time) -> bool {
        let confirms = self.confirming.as_ref().is_some_and(|(_, until)| now <= *until);
        confirms || self.promote.is_some_and(|(_, until)| now <= until)
    }

    /// Whether a word on a fence has had no answer.
    pub(crate) fn is_unanswered(&self) -> bool {
        self.confirming.is_some()
    }

    pub(crate) fn fences(&self) -> &Fences {
        &self.fences
    }
}

impl Follower {
    /// `Event::Promote`, of somebody who waits for the answer until then.
    pub(crate) fn ask_to_run(&mut self, force: bool, until: Time, common: &Common) {
        if !self.asked.wants(common.now) {
            self.asked.promote = Some((force, until));
        }
        self.read();
    }

    /// `Follower::on_confirm_fenced`.
    pub(crate) fn confirm_fenced(&mut self, node: NodeId, until: Time) {
        self.asked.confirming = Some((node, until));
        self.read();
    }

    /// `Follower::confirm_fenced`.
    pub(crate) fn take_word(&mut self, found: Option<&Entry>, common: &mut Common) {
        let Some((node, until)) = self.asked.confirming.take() else { return };
        if common.now > until {
            return;
        }
        match found {
            Some(entry)
                if self.replica.source() != Some(&node) && others(entry, &self.me).contains(&&node) =>
            {
                common.count("nodes confirmed to be fenced");
                common.note(self.x, || format!("takes {node} for fenced: {entry}"));
                self.asked.fences.confirm(node, entry.term);
            }
            _ => common.count("words on a fence refused"),
        }
    }

    /// `Follower::want_to_run`.
    pub(crate) fn want_to_run(
        &mut self,
        found: Option<&Entry>,
        common: &mut Common,
    ) -> Result<Vec<Action>, NotMine> {
        if !self.asked.forces() {
            return self.replica.promote(found);
        }
        let actions = self.replica.promote_by_force(found, &self.asked.fences)?;
        for action in &actions {
            if let Action::Propose(proposal) = action {
                common.note(self.x, || "is to run the guest by force".to_owned());
                common.forced.insert(proposal.id);
            }
        }
        Ok(actions)
    }
}
