//! Waiting for a cluster to get somewhere, as its control planes, its register and its console tell.

use anyhow::{Context, ensure};
use colo_common::register::{Entry, Value};
use colo_proto::v1::Role;
use std::time::{Duration, Instant};

use super::Cluster;

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);
/// Longer than any step takes on a host that others load as well.
pub const PATIENCE: Duration = Duration::from_secs(60);

impl Cluster {
    /// Waits until a condition gives something.
    ///
    /// # Errors
    /// It fails, or gives nothing in time.
    pub fn until<T>(
        &self,
        what: &str,
        mut look: impl FnMut() -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let started = Instant::now();
        loop {
            if let Some(found) = look().with_context(|| format!("waiting for {what}"))? {
                return Ok(found);
            }
            ensure!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
            std::thread::sleep(POLL);
        }
    }

    /// Waits until a node has this role.
    ///
    /// # Errors
    /// It does not get there.
    pub fn until_role(&self, node: &str, role: Role) -> anyhow::Result<()> {
        let what = format!("{node} to be {role:?}");
        self.until(&what, || Ok(self.status(node).filter(|status| status.role() == role).map(drop)))
    }

    /// Waits until `runner` runs the guest, protected.
    ///
    /// # Errors
    /// It does not get there.
    pub fn until_paired(&self, runner: &str) -> anyhow::Result<()> {
        self.until_role(runner, Role::Paired)
    }

    /// Waits until the register names `node` as the only runner, and that node runs the guest.
    ///
    /// # Errors
    /// It does not get there.
    pub fn until_solo(&self, node: &str) -> anyhow::Result<()> {
        self.until(&format!("the register to say Solo({node})"), || {
            let entry = self.register()?;
            Ok(entry.filter(|entry| is_solo_of(entry, node)).map(drop))
        })?;
        self.until(&format!("{node} to run the guest"), || {
            Ok(self.status(node).filter(|status| runs(status.role())).map(drop))
        })
    }

    /// Waits until that many more bytes of console are out.
    ///
    /// # Errors
    /// They do not come.
    pub fn until_released(&self, more: u64) -> anyhow::Result<()> {
        let from = self.ledger().whole();
        let what = format!("{more} more bytes of console after byte {from}");
        self.until(&what, || Ok((self.ledger().whole() >= from + more).then_some(())))
    }

    /// Waits until this text has been let out.
    ///
    /// # Errors
    /// It does not come.
    pub fn until_said(&self, text: &str) -> anyhow::Result<()> {
        let mut from = 0;
        self.until(&format!("the guest to say {text:?}"), || {
            let ledger = self.ledger();
            let said = crate::session::find(&ledger.bytes()[from..], text.as_bytes());
            from = ledger.bytes().len().saturating_sub(text.len());
            Ok(said.map(drop))
        })
    }
}

/// Whether the register names this node as the only runner.
pub fn is_solo_of(entry: &Entry, node: &str) -> bool {
    matches!(&entry.value, Value::Solo { node: named, .. } if named.as_str() == node)
}

/// Whether a node with this role runs the guest.
pub fn runs(role: Role) -> bool {
    matches!(role, Role::Alone | Role::Seeding | Role::Joining | Role::Pairing | Role::Paired)
}
