//! Runs ip(8), which knows all kinds of interfaces.

use anyhow::{Context, ensure};
use std::io::Write;
use std::process::{Command, Stdio};

/// Runs these commands of ip(8), one a line and without that word, in the calling thread's namespace. The first that
/// fails is the last.
///
/// # Errors
/// There is no ip(8) here, or it says no.
pub fn ip(commands: &str) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot run ip(8): apt-get install iproute2")?;
    let mut input = child.stdin.take().context("a pipe that was asked for")?;
    input.write_all(commands.as_bytes()).context("telling ip(8)")?;
    drop(input);
    let done = child.wait_with_output().context("ip(8)")?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "ip(8) says: {}; it was told:\n{commands}", said.trim());
    Ok(())
}
