//! Nodes that must not start: one clear line, status 1, and a register that is what it was.

use anyhow::{Context, ensure};
use std::fs;
use std::process::Command;

use super::process::Process;
use super::{Cluster, PATIENCE};

/// The status of an error that is told in one line.
const ERROR: i32 = 1;

impl Cluster {
    /// A node whose configuration was changed by `edit` ends by itself with one line, which has all of `wanted` in it.
    /// The register is what it was. `edit` may also change the node's files.
    ///
    /// # Errors
    /// It does not.
    pub fn is_refused(
        &mut self,
        node: &str,
        primary: bool,
        edit: impl FnOnce(String) -> String,
        wanted: &[&str],
    ) -> anyhow::Result<()> {
        let (path, command) = self.prepare(node, primary, None)?;
        fs::write(&path, edit(fs::read_to_string(&path)?))?;
        self.refuses(node, command, wanted)
    }

    /// The same of a command that [`prepare`](Self::prepare) gave.
    ///
    /// # Errors
    /// It does not end so.
    pub fn refuses(&self, node: &str, mut command: Command, wanted: &[&str]) -> anyhow::Result<()> {
        let before = self.register()?;
        let path = self.directory().join(format!("{node}.refusal"));
        // Only what this process says.
        fs::write(&path, "")?;
        let mut process = Process::start(&mut command, &path)?;
        let status = process.ended(PATIENCE).with_context(|| format!("{node} was to be refused"))?;
        let log = process.log();
        ensure!(status.code() == Some(ERROR), "{status}:\n{log}");
        ensure!(log.lines().count() == 1 && log.contains(" ERROR "), "not one line:\n{log}");
        for part in wanted {
            ensure!(log.contains(part), "it does not say {part:?}:\n{log}");
        }
        ensure!(self.register()? == before, "the register was changed");
        Ok(())
    }
}
