//! What a node that ran a vm becomes when another has it: `colo-secondary`, by the same configuration, in the place of
//! this process. A fresh process image has no thread, no virtual machine and no open file of the old one.

use colo_common::VmId;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::guest_files::keep_guest;
use crate::handover::Handover;
use crate::node::Remains;

/// The program that follows.
const PROGRAM: &str = "colo-secondary";

/// How `colo-secondary` is started by whoever becomes it.
#[derive(Clone, Debug)]
pub struct Standby {
    /// The configuration file.
    pub config: PathBuf,
    /// It is that of a primary.
    pub of_primary: bool,
    /// The vm, of a node whose configuration names none.
    pub bind: Option<VmId>,
    /// Where the guest's description and boot files are kept.
    pub boot_directory: PathBuf,
}

impl Standby {
    /// Goes on with what is left of a guest that ran here. Comes back only if that cannot be done.
    pub fn follow(&self, vm: &VmId, remains: &Remains) -> anyhow::Error {
        let Remains { memory, spec, spec_digest, boot_files, base, changed, disk, history } = remains;
        if let Err(e) = keep_guest(&self.boot_directory, spec, boot_files) {
            // It will be sent again.
            tracing::warn!(%vm, "{e}");
        }
        let left = Handover {
            vm: vm.clone(),
            spec_digest: *spec_digest,
            memory: Arc::clone(memory),
            base: *base,
            changed: changed.clone(),
            disk: disk.clone(),
            history: history.clone(),
        };
        self.become_secondary(Some(&left))
    }

    /// Becomes it, with the guest's memory if there is any. Comes back only if that cannot be done.
    pub fn become_secondary(&self, left: Option<&Handover>) -> anyhow::Error {
        let program = match beside_this(PROGRAM) {
            Ok(program) => program,
            Err(e) => return e,
        };
        let handover = left.map(Handover::leave).transpose().unwrap_or_else(|e| {
            tracing::warn!("the guest's memory is not handed over, and will be compared or sent: {e}");
            None
        });
        let arguments = self.arguments(handover);
        tracing::info!("this process goes on as {}", program.display());
        let error = Command::new(&program).args(arguments).exec();
        anyhow::anyhow!(
            "cannot go on as {}: {error}; is it installed beside this program?",
            program.display()
        )
    }

    fn arguments(&self, handover: Option<i32>) -> Vec<OsString> {
        let mut arguments = vec!["start".into(), "--config".into(), self.config.clone().into()];
        if self.of_primary {
            arguments.push("--standby".into());
        }
        if let Some(vm) = &self.bind {
            arguments.extend(["--bind".into(), vm.as_str().into()]);
        }
        if let Some(fd) = handover {
            arguments.extend(["--handover".into(), fd.to_string().into()]);
        }
        arguments
    }
}

/// A program of the same installation.
fn beside_this(name: &str) -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe()?;
    // A program that was replaced while it ran is still found by its old path.
    let this = this.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
    let directory = Path::new(&this).parent().unwrap_or(Path::new("/"));
    Ok(directory.join(name))
}

#[cfg(test)]
mod tests {
    use super::Standby;

    #[test]
    fn it_is_started_as_an_operator_would() {
        let standby = Standby {
            config: "/etc/colo/web.toml".into(),
            of_primary: true,
            bind: None,
            boot_directory: "/var/lib/colo/web/boot".into(),
        };
        let arguments = standby.arguments(Some(9));
        assert_eq!(arguments, ["start", "--config", "/etc/colo/web.toml", "--standby", "--handover", "9"]);
        let own = Standby { of_primary: false, bind: Some("web".parse().unwrap()), ..standby };
        assert_eq!(own.arguments(None), ["start", "--config", "/etc/colo/web.toml", "--bind", "web"]);
    }
}
