//! What can be asked of a secondary that does not run: whether its store is as it was written, what its guest's disk
//! holds, and its audit trail.

use anyhow::{Context, bail};
use colo_common::VmId;
use colo_common::config::SecondaryConfig;
use colo_common::telemetry;
use colo_common::vmdir::VmDirectory;
use colo_vmm::disk::{Disk, FileDisk};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use crate::disk::{DiskImage, content_digest, export};
use crate::store::{Store, StoredCopy};

/// A node that does not run.
#[derive(Clone, Debug)]
pub struct Of {
    /// Its configuration file.
    pub config: PathBuf,
    /// That is a primary's, with a `[standby]`.
    pub standby: bool,
    /// The vm that it was bound to, if the configuration is a spare's.
    pub vm: Option<VmId>,
}

/// Checks the store of a secondary that does not run.
///
/// # Errors
/// The store cannot be opened, or something in it is damaged.
pub fn scrub(of: &Of, bytes_per_second: u64) -> anyhow::Result<ExitCode> {
    let (_, directory, mut store) = open(of)?;
    let summary = store.summary();
    let has_disk = summary.active.is_some() && store.disk_bytes().is_some();
    if !matches!(summary.copy, StoredCopy::Whole(_)) && !has_disk {
        tracing::info!("the store in {} holds no whole copy: nothing to check", directory.path().display());
        return Ok(ExitCode::SUCCESS);
    }
    let rate = if bytes_per_second == 0 { u64::MAX } else { bytes_per_second };
    let scrub = store.scrub(rate, |_| std::ops::ControlFlow::Continue(()))?;
    if scrub.is_clean() {
        tracing::info!("the store in {} is as it was written", directory.path().display());
        return Ok(ExitCode::SUCCESS);
    }
    bail!(
        "the store in {} is damaged: {scrub:?}; remove the directory, and this node will be seeded anew",
        directory.path().display()
    )
}

/// Lists the audit trail of a secondary that does not run.
///
/// # Errors
/// It runs, or has kept none.
pub fn audit(of: &Of, last: Option<u64>) -> anyhow::Result<ExitCode> {
    let (config, vm) = of.load()?;
    colo_primary::audit::print(&VmDirectory::open(&config.directory, &vm)?, last)
}

/// Writes the guest's disk into a raw image file.
///
/// # Errors
/// There is no disk of one point here, its image file cannot be used, or the new file cannot be written.
pub fn export_disk(of: &Of, to: &Path) -> anyhow::Result<ExitCode> {
    let (config, _directory, mut store) = open(of)?;
    let (disk, at) = disk(&config, &mut store)?;
    export(disk.as_ref(), to).with_context(|| {
        format!("cannot write the disk to {}: name a new file with room for it", to.display())
    })?;
    tracing::info!("the disk {at} is in {}", to.display());
    Ok(ExitCode::SUCCESS)
}

/// Prints the digest of the guest's disk.
///
/// # Errors
/// There is no disk of one point here, or its image file cannot be used.
pub fn disk_digest(of: &Of) -> anyhow::Result<ExitCode> {
    let (config, _directory, mut store) = open(of)?;
    let (disk, at) = disk(&config, &mut store)?;
    print_digest(&at, disk.as_ref())
}

/// Prints the digest of a raw image file.
///
/// # Errors
/// It cannot be read.
pub fn image_digest(path: &Path) -> anyhow::Result<ExitCode> {
    print_digest(&format!("of {}", path.display()), &FileDisk::open(path, true)?)
}

fn print_digest(at: &str, disk: &dyn Disk) -> anyhow::Result<ExitCode> {
    let digest = content_digest(disk).with_context(|| format!("cannot read the disk {at}"))?;
    writeln!(std::io::stdout(), "disk {at}: {} bytes, digest {digest:032x}", disk.bytes())?;
    Ok(ExitCode::SUCCESS)
}

impl Of {
    /// The configuration of the vm's follower, and the vm; what is logged from here on is logged as it says.
    fn load(&self) -> anyhow::Result<(SecondaryConfig, VmId)> {
        let Self { config: path, standby, vm } = self;
        let config =
            if *standby { SecondaryConfig::load_standby(path) } else { SecondaryConfig::load(path) }?;
        telemetry::init(&config.log);
        let vm = match (&config.vm, vm) {
            (Some(own), Some(vm)) if own != vm => {
                bail!("{} is of the vm {own}, not of {vm}: leave --vm out", path.display())
            }
            (Some(own), _) => own.clone(),
            (None, Some(vm)) => vm.clone(),
            (None, None) => bail!(
                "{} is a spare's: say by --vm which vm's copy is meant; each has a directory of its name in {}",
                path.display(),
                config.directory.display()
            ),
        };
        Ok((config.bound_to(&vm), vm))
    }
}

/// The configuration, and the store with nobody else at it.
fn open(of: &Of) -> anyhow::Result<(SecondaryConfig, VmDirectory, Store)> {
    let (config, vm) = of.load()?;
    let directory = VmDirectory::open(&config.directory, &vm)?;
    let store = Store::open(&directory.store(), &vm)?;
    Ok((config, directory, store))
}

/// The disk, and what it is of.
fn disk(config: &SecondaryConfig, store: &mut Store) -> anyhow::Result<(Arc<DiskImage>, String)> {
    let Some(image) = &config.disk else {
        bail!("the configuration has no [disk]: name the image file of the guest's disk there")
    };
    let summary = store.summary();
    let at = match (summary.copy, summary.active) {
        (StoredCopy::Whole(whole), _) => format!("at point {}", whole.point),
        (_, Some(term)) => format!("of the guest that runs here since {term}"),
        _ => bail!("the store holds no whole copy, and the guest did not run here: its disk is of no point"),
    };
    let Some(bytes) = store.disk_bytes() else { bail!("the guest that is stored has no disk") };
    Ok((store.open_disk(&image.path, bytes)?, at))
}

#[cfg(test)]
mod tests {
    use super::Of;
    use std::path::Path;

    const SPARE: &str = "node = \"c\"\ndirectory = \"/c\"\n[arbiter]\ndirectory = \"/r\"\n[disk]\npath = \"/images/{vm}.raw\"\n";

    fn of(text: &str, standby: bool, vm: Option<&str>, place: &Path) -> Of {
        let config = place.join("node.toml");
        std::fs::write(&config, text).unwrap();
        Of { config, standby, vm: vm.map(|vm| vm.parse().unwrap()) }
    }

    #[test]
    fn a_primary_that_follows_is_read_by_its_own_configuration() {
        let place = tempfile::tempdir().unwrap();
        let primary = "node = \"a\"\nvm = \"web\"\ndirectory = \"/a\"\n[guest]\nkind = \"synthetic\"\n\
                       memory_mib = 16\n[arbiter]\ndirectory = \"/r\"\n";
        let with = format!("{primary}[standby]\n");
        let (config, vm) = of(&with, true, None, place.path()).load().unwrap();
        assert_eq!((config.directory.as_path(), vm.as_str()), (Path::new("/a"), "web"));
        of(&with, false, None, place.path()).load().unwrap_err();
        let error = of(primary, true, None, place.path()).load().unwrap_err().to_string();
        assert!(error.contains("standby"), "{error}");
    }

    #[test]
    fn a_spare_has_a_copy_for_each_vm() {
        let place = tempfile::tempdir().unwrap();
        let (config, vm) = of(SPARE, false, Some("web"), place.path()).load().unwrap();
        assert_eq!((config.directory.as_path(), vm.as_str()), (Path::new("/c/web"), "web"));
        assert_eq!(config.disk.unwrap().path, Path::new("/images/web.raw"));
        let error = of(SPARE, false, None, place.path()).load().unwrap_err().to_string();
        assert!(error.contains("--vm"), "{error}");
        let bound = format!("vm = \"mail\"\n{SPARE}");
        let error = of(&bound, false, Some("web"), place.path()).load().unwrap_err().to_string();
        assert!(error.contains("of the vm mail, not of web"), "{error}");
        of(&bound, false, Some("mail"), place.path()).load().unwrap();
    }
}
