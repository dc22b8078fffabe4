//! When a spare lets go of the vm that it was bound to: nobody has come for it, it cannot have the guest, or the vm is
//! protected without it.

use colo_common::NodeId;
use colo_common::register::{Entry, Value};
use std::time::{Duration, Instant};

use super::{Follower, Outcome};

/// How long a spare waits for the runner that claimed it, and stays while the vm is protected by others: longer than a
/// runner takes to come, or to lose another secondary that had just joined.
pub(super) const CLAIM_LIMIT: Duration = Duration::from_secs(30);

/// How long one stays that has refused the guest: its words are on their way.
const MISFIT_LIMIT: Duration = Duration::from_secs(1);

/// Whether the register says that the vm is protected without this node.
pub fn is_needless(me: &NodeId, register: Option<&Entry>) -> bool {
    match register.map(|entry| &entry.value) {
        Some(Value::Paired { primary, secondary, .. }) => primary != me && secondary != me,
        _ => false,
    }
}

impl Follower {
    /// A claim is no promise: its runner may have died, or have found another node. A guest that does not fit here keeps this
    /// node from those that do.
    pub(super) fn leave_if_unfollowed(&mut self, now: Instant) {
        let waits = self.settings.claimed && !self.followed;
        let refused = |since: Instant| now.saturating_duration_since(since) > MISFIT_LIMIT;
        if self.end.is_none() && waits && (is_late(self.began, now) || self.misfit.is_some_and(refused)) {
            self.end = Some(Outcome::Unfollowed);
        }
    }

    /// The register was just read. A copy that nobody needs now would keep a spare from the vms that lack one; its store
    /// stays for a rejoin. What was read earlier decides nothing: this may be the secondary by now.
    pub(super) fn look_whether_needed(&mut self, found: Option<&Entry>, now: Instant) {
        if self.link.is_some() || !is_needless(&self.me, found) {
            self.needless_since = None;
            return;
        }
        let since = *self.needless_since.get_or_insert(now);
        if self.end.is_none() && self.settings.spare && is_late(since, now) {
            self.end = Some(Outcome::Unfollowed);
        }
    }
}

fn is_late(since: Instant, now: Instant) -> bool {
    now.saturating_duration_since(since) > CLAIM_LIMIT
}
