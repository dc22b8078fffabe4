//! What the guest's disk is on nodes that do not run: its digest, and whether the file system on it is whole, as after a
//! loss of power: with what its journal says, and nothing else, put right.

use anyhow::{Context, ensure};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::config::disk_of;
use super::{Cluster, process};

impl Cluster {
    /// The image file of a node. All that the guest's disk is only where a primary ran.
    pub fn image_of(&self, node: &str) -> PathBuf {
        self.directory().join(disk_of(node))
    }

    /// Size and digest of the guest's disk as a node that does not run has it.
    ///
    /// # Errors
    /// It has none of one point.
    pub fn disk_digest(&self, node: &str) -> anyhow::Result<String> {
        let mut command = Command::new(process::program("colo-secondary")?);
        command.arg("disk-digest");
        if self.holds_image(node)? {
            command.arg("--image").arg(self.image_of(node));
        } else {
            command.args(self.config_as_follower(node)?);
        }
        let said = done(&mut command, &[0]).with_context(|| format!("the digest of {node}'s disk"))?;
        let said = String::from_utf8(said.stdout)?;
        // "disk of WHAT: BYTES bytes, digest HEX"
        let (_, digest) = said.trim_end().rsplit_once(": ").with_context(|| format!("no digest: {said}"))?;
        Ok(digest.to_owned())
    }

    /// Whether the image file is all that there is of the disk: of a primary that never followed.
    fn holds_image(&self, node: &str) -> anyhow::Result<bool> {
        Ok(self.is_primary(node)? && !self.directory_of(node).join("store").exists())
    }

    /// How a command is told of a node that follows.
    fn config_as_follower(&self, node: &str) -> anyhow::Result<Vec<OsString>> {
        let mut arguments = vec!["--config".into(), self.config_of(node).into()];
        if self.is_primary(node)? {
            arguments.push("--standby".into());
        }
        Ok(arguments)
    }

    /// Writes the guest's disk as a node that does not run has it into a new file.
    ///
    /// # Errors
    /// It has none of one point, or there is no room.
    pub fn export_disk(&self, node: &str, to: &Path) -> anyhow::Result<()> {
        let mut command = if self.holds_image(node)? {
            let mut copy = Command::new("cp");
            copy.arg("--sparse=always").arg(self.image_of(node)).arg(to);
            copy
        } else {
            let mut export = Command::new(process::program("colo-secondary")?);
            export.arg("export-disk").args(self.config_as_follower(node)?).arg("--to").arg(to);
            export
        };
        done(&mut command, &[0]).map(drop).with_context(|| format!("the disk of {node}"))
    }

    /// Checks the ext4 on the guest's disk as a node that does not run has it: after its journal was replayed there must
    /// be nothing to mend.
    ///
    /// # Errors
    /// There is, or there is no disk of one point.
    pub fn check_files(&self, node: &str) -> anyhow::Result<()> {
        let copy = self.directory().join(format!("{node}.fsck"));
        self.export_disk(node, &copy)?;
        let checked = fsck(&copy).with_context(|| format!("the file system on {node}'s disk"));
        // What is wrong with it is worth a look.
        if checked.is_ok() {
            std::fs::remove_file(&copy).with_context(|| format!("cannot remove {}", copy.display()))?;
        }
        checked
    }
}

/// Replays the journal in an image file, and then changes nothing.
///
/// # Errors
/// The file system has more wrong with it than its journal knows.
pub fn fsck(image: &Path) -> anyhow::Result<()> {
    let mut replay = Command::new("e2fsck");
    // 1: something was put right.
    done(replay.args(["-y", "-E", "journal_only"]).arg(image), &[0, 1])?;
    done(Command::new("e2fsck").arg("-fn").arg(image), &[0]).map(drop)
}

/// Runs a command to an end with one of these statuses.
fn done(command: &mut Command, good: &[i32]) -> anyhow::Result<Output> {
    let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let is_good = output.status.code().is_some_and(|code| good.contains(&code));
    ensure!(is_good, "{command:?}: {}\n{out}{err}", output.status);
    Ok(output)
}
