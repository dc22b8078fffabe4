//! What an operator asks where nodes cannot decide by themselves, or shall not: that a node stops at once, that another one
//! does not run the guest, who decides on a failover, and that a node is emptied.

use colo_common::NodeId;
use colo_proto::convert::id_bytes;
use colo_proto::v1::{
    AuditKind, ConfirmFencedReply, ConfirmFencedRequest, DrainReply, DrainRequest, FailoverPolicy,
    FenceReply, FenceRequest, RegisterEntry, SetFailoverReply, SetFailoverRequest,
};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tonic::{Request, Status};

use super::convert::role;
use super::plane::{PATIENCE, POLL, Part, Plane};
use super::reason::Reason;
use crate::node::Command;
use crate::node::status::Role;

/// Bytes of a reason: some lines of text, each of which is kept for as long as the audit trail.
const MAX_REASON: usize = 512;
/// How long a change of a node's own record may take until it is listed.
const LISTED: Duration = Duration::from_secs(5);

/// Whether a typed reason is one.
pub(super) fn check_reason(reason: &str, needed: bool) -> Result<(), Status> {
    if needed && reason.trim().is_empty() {
        return Err(Reason::BadRequest.status("say why: a reason is needed, for the audit trail"));
    }
    if reason.len() > MAX_REASON || reason.chars().any(char::is_control) {
        return Err(Reason::BadRequest.status(format!("a reason is one line of {MAX_REASON} bytes at most")));
    }
    Ok(())
}

fn gone<T>(_: T) -> Status {
    Reason::Unavailable.status("the node is ending; look at the other node")
}

impl Plane {
    /// Ends this process' part at once.
    pub(super) async fn fence(&self, request: Request<FenceRequest>) -> Result<FenceReply, Status> {
        let FenceRequest { reason, node } = request.get_ref();
        self.bound()?;
        check_reason(reason, true)?;
        if !node.is_empty() && *node != self.node.as_str() {
            let text = format!("this node is {}, not {node}: nothing is stopped", self.node);
            return Err(Reason::OtherNode.about(text, &[("node", self.node.to_string())]));
        }
        self.asked(&request, "fence this node".to_owned(), reason);
        self.leave(|reply| Command::Fence { reply }).await?;
        Ok(FenceReply { node: self.node.to_string(), register: self.register() })
    }

    /// Takes the operator's word that another node does not run the guest.
    pub(super) async fn confirm_fenced(
        &self,
        request: Request<ConfirmFencedRequest>,
    ) -> Result<ConfirmFencedReply, Status> {
        let ConfirmFencedRequest { node, reason } = request.get_ref();
        check_reason(reason, true)?;
        let node: NodeId = node.parse().map_err(|e| Reason::BadRequest.status(format!("{e}")))?;
        self.asked(&request, format!("{node} is fenced"), reason);
        let Part::Follower(control) = self.part() else { return Err(self.not_here("follows")) };
        let (reply, answer) = oneshot::channel();
        control.confirm_fenced(node, reply);
        let silent = |_| Reason::NoAnswer.status("the arbiter does not answer; look at the node's status");
        let answer = tokio::time::timeout(PATIENCE, answer).await.map_err(silent)?.map_err(gone)?;
        let entry = answer?;
        Ok(ConfirmFencedReply { register: Some(RegisterEntry::from(&entry)) })
    }

    /// Says who decides on a failover.
    pub(super) async fn set_failover(
        &self,
        request: Request<SetFailoverRequest>,
    ) -> Result<SetFailoverReply, Status> {
        let (auto, word) = match request.get_ref().policy() {
            FailoverPolicy::Auto => (true, "auto"),
            FailoverPolicy::Manual => (false, "manual"),
            FailoverPolicy::Unspecified => {
                return Err(Reason::BadRequest.status("say who decides on a failover: auto or manual"));
            }
        };
        let Part::Follower(control) = self.part() else { return Err(self.not_here("follows")) };
        self.asked(&request, format!("failover shall be {word}"), "");
        let (reply, answer) = oneshot::channel();
        control.set_failover(auto, reply);
        let slow = |_| Reason::NoAnswer.status("the node takes long; look at its status");
        tokio::time::timeout(PATIENCE, answer).await.map_err(slow)?.map_err(gone)?;
        self.board.note(
            AuditKind::FailoverPolicy,
            format!("failover = {word}"),
            String::new(),
            String::new(),
        );
        Ok(SetFailoverReply { policy: request.get_ref().policy })
    }

    /// Says that the node is being emptied, or not any more, and moves a guest that runs here away.
    pub(super) async fn empty_node(&self, request: Request<DrainRequest>) -> Result<DrainReply, Status> {
        let DrainRequest { drain, reason } = request.get_ref();
        check_reason(reason, false)?;
        let drains = self.drain().ok_or_else(|| Reason::Unavailable.status("this node starts: try again"))?;
        self.asked(&request, if *drain { "drain this node" } else { "end the drain" }.to_owned(), reason);
        let kept = if *drain { drains.begin() } else { drains.end() };
        kept.map_err(|e| Reason::Internal.status(e.to_string()))?;
        match self.part() {
            Part::Runner(_) if *drain && self.board.status().role == Role::Paired => {
                self.command(|reply| Command::Switchover { reply: Some(reply) }).await?;
            }
            // From then on no claim of it is granted.
            Part::Spare(_) => {
                // It has no audit trail.
                let what = if *drain { "is being emptied" } else { "can be claimed again" };
                tracing::info!(node = %self.node, reason, "this spare {what}, by an operator's word");
                self.until_listed(*drain).await?;
            }
            _ => {}
        }
        Ok(DrainReply { role: role(self.board.status().role).into() })
    }

    /// Waits until the cluster knows whether this process is being emptied.
    async fn until_listed(&self, draining: bool) -> Result<(), Status> {
        let until = Instant::now() + LISTED;
        loop {
            let mine = id_bytes(self.incarnation.0);
            let why = match self.list_cluster().await {
                Ok(listed)
                    if listed
                        .nodes
                        .iter()
                        .any(|node| node.incarnation == mine && node.draining == draining) =>
                {
                    return Ok(());
                }
                Ok(_) => String::new(),
                Err(silent) => format!(" ({})", silent.message()),
            };
            if Instant::now() > until {
                let text = format!(
                    "it is kept here, and the cluster does not know of it yet{why}; look at `coloctl nodes`"
                );
                return Err(Reason::NoAnswer.status(text));
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_REASON, check_reason};

    #[test]
    fn a_reason_is_a_line_of_text() {
        assert!(check_reason("its host burnt down", true).is_ok() && check_reason("", false).is_ok());
        let refused = |reason: &str| check_reason(reason, true).unwrap_err().message().to_owned();
        assert!(refused(" ").contains("say why") && refused("a\nb").contains("one line"));
        assert!(refused(&"x".repeat(MAX_REASON + 1)).contains("512"));
    }
}
