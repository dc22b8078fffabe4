//! When a spare lets go of the vm that it was bound to: nobody has come for it, or the vm is protected without it.

use colo_common::NodeId;
use colo_common::register::{Entry, Value};
use std::time::{Duration, Instant};

use super::{Follower, Outcome};

/// How long a spare waits for the runner that claimed it, and stays while the vm is protected by others: longer than a
/// runner takes to come, or to lose another secondary that had just joined.
pub(super) const CLAIM_LIMIT: Duration = Duration::from_secs(30);

/// Whether the register says that the vm is protected without this node.
pub fn is_needless(me: &NodeId, register: Option<&Entry>) -> bool {
    match register.map(|entry| &entry.value) {
        Some(Value::Paired { primary, secondary, .. }) => primary != me && secondary != me,
        _ => false,
    }
}

impl Follower {
    /// A claim is no promise: its runner may have died, or have found another node.
    pub(super) fn leave_if_unfollowed(&mut self, now: Instant) {
        if self.end.is_some() {
            return;
        }
        let unfollowed = Some(self.began).filter(|_| self.settings.claimed && !self.followed);
        let needless = self.needless_since.filter(|_| self.settings.spare && self.link.is_none());
        let late = |since: Instant| now.saturating_duration_since(since) > CLAIM_LIMIT;
        if unfollowed.is_some_and(late) || needless.is_some_and(late) {
            self.end = Some(Outcome::Unfollowed);
        }
    }

    /// A copy that nobody needs now would keep a spare from the vms that lack one. Its store stays for a rejoin.
    pub(super) fn look_whether_needed(&mut self, found: Option<&Entry>) {
        let needless = is_needless(&self.me, found) && self.link.is_none();
        self.needless_since = needless.then(|| self.needless_since.unwrap_or_else(Instant::now));
    }
}
