//! A scenario on a cluster of its own, and what is told when it fails.

use anyhow::bail;

use super::config::Options;
use super::{Cluster, process};

impl Cluster {
    /// The logs' ends, for messages.
    pub fn logs(&self) -> String {
        let says = |node: &String| match self.status(node) {
            Some(status) => format!("{:?}, last error {:?}", status.role(), status.last_error),
            None => "silent".to_owned(),
        };
        let part = |node: &String| {
            format!("--- {node} is {}; its log:\n{}", says(node), process::tail(&self.log_of(node)))
        };
        let logs: Vec<String> = self.places.keys().map(part).collect();
        let register = match self.register() {
            Ok(Some(entry)) => entry.to_string(),
            Ok(None) => "none".to_owned(),
            Err(e) => e.to_string(),
        };
        let (ledger, directory) = (self.ledger(), self.directory.display());
        format!(
            "{}\n--- register: {register}\n--- console: {} bytes up to the first gap, {} in all; it ends:\n{}\n\
             --- everything is in {directory}",
            logs.join("\n"),
            ledger.whole(),
            ledger.end(),
            ledger.tail()
        )
    }
}

/// Runs a scenario on a new cluster; if it fails, says why, with the logs, which are kept.
///
/// # Errors
/// Whatever it fails with.
pub fn scenario(
    options: Options,
    play: impl FnOnce(&mut Cluster) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut cluster = Cluster::new(options)?;
    match play(&mut cluster) {
        Ok(()) => Ok(()),
        Err(e) => {
            cluster.keep();
            bail!("{e:#}\n{}", cluster.logs())
        }
    }
}
