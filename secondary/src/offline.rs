//! What can be asked of a secondary that does not run: whether its store is as it was written, what its guest's disk
//! holds, and its audit trail.

use anyhow::{Context, bail};
use colo_common::VmId;
use colo_common::config::{ConfigError, SecondaryConfig};
use colo_common::telemetry;
use colo_common::vmdir::VmDirectory;
use colo_vmm::disk::{Disk, FileDisk};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use crate::disk::{DiskImage, content_digest, export};
use crate::store::{Store, StoredCopy};

/// A configuration file.
#[derive(Clone, Copy, Debug)]
pub struct File<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// It is that of a primary, which has a `[standby]`.
    pub of_primary: bool,
}

impl File<'_> {
    /// What it says of a node that follows.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong.
    pub fn load(self) -> Result<SecondaryConfig, ConfigError> {
        if self.of_primary {
            SecondaryConfig::load_standby(self.path)
        } else {
            SecondaryConfig::load(self.path)
        }
    }
}

/// Checks the store of a secondary that does not run.
///
/// # Errors
/// The store cannot be opened, or something in it is damaged.
pub fn scrub(file: File<'_>, bytes_per_second: u64) -> anyhow::Result<ExitCode> {
    let (_, directory, mut store) = open(file)?;
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
pub fn audit(file: File<'_>, last: Option<u64>) -> anyhow::Result<ExitCode> {
    let config = file.load()?;
    telemetry::init(&config.log);
    colo_primary::audit::print(&VmDirectory::open(&config.directory, &vm_of(&config)?)?, last)
}

/// Writes the guest's disk into a raw image file.
///
/// # Errors
/// There is no disk of one point here, its image file cannot be used, or the new file cannot be written.
pub fn export_disk(file: File<'_>, to: &Path) -> anyhow::Result<ExitCode> {
    let (config, _directory, mut store) = open(file)?;
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
pub fn disk_digest(file: File<'_>) -> anyhow::Result<ExitCode> {
    let (config, _directory, mut store) = open(file)?;
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

/// The vm that a configuration is of.
fn vm_of(config: &SecondaryConfig) -> anyhow::Result<VmId> {
    let Some(vm) = &config.vm else {
        bail!(
            "the configuration is a spare's: in a copy of it, name the vm (vm = \"NAME\"), and the directory and disk that it has here"
        )
    };
    Ok(vm.clone())
}

/// The configuration, and the store with nobody else at it.
fn open(file: File<'_>) -> anyhow::Result<(SecondaryConfig, VmDirectory, Store)> {
    let config = file.load()?;
    telemetry::init(&config.log);
    let directory = VmDirectory::open(&config.directory, &vm_of(&config)?)?;
    let store = Store::open(&directory.store(), &vm_of(&config)?)?;
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
