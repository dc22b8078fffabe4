//! Guest images: what deploy/guest/prepare.sh made, by the manifest that it wrote.

use anyhow::{Context, bail};
use colo_vmm::host::Host;
use colo_vmm::{BootFile, BootSource, GuestSpec};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The manifest of prepared images.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Images {
    /// `small`: our own kernel; `stock`: the distribution's.
    pub kind: String,
    /// Kernel release.
    #[serde(default)]
    pub release: String,
    up: Option<PathBuf>,
    smp: Option<PathBuf>,
    acpi: Option<PathBuf>,
    bzimage: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    #[serde(default)]
    initramfs_workload: Option<PathBuf>,
    #[serde(default)]
    service_disk: Option<PathBuf>,
    #[serde(default)]
    service_initramfs: Option<PathBuf>,
    payloads: Option<PathBuf>,
}

/// A guest with a real service: Redis, or in its place a load for the disk and the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service<'a> {
    /// Raw image of the disk, to be copied for each run: ext4 with the programs.
    pub disk: &'a Path,
    /// The initramfs whose /init runs them.
    pub initramfs: &'a Path,
}

/// A prepared Linux kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// One CPU.
    Up,
    /// Several CPUs, found by the MP table.
    Smp,
    /// Several CPUs and devices, found by ACPI.
    Acpi,
    /// The `Up` kernel as a bzImage.
    BzImage,
}

impl Images {
    /// Reads the manifest named by `COLO_GUEST_MANIFEST`.
    ///
    /// # Errors
    /// The variable is not set, or the manifest cannot be read.
    pub fn find() -> anyhow::Result<Self> {
        let path = std::env::var_os("COLO_GUEST_MANIFEST").context(
            "COLO_GUEST_MANIFEST is not set: run `make guest` and set it to the path that it prints",
        )?;
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not an image manifest", path.display()))
    }

    /// Path of a kernel.
    ///
    /// # Errors
    /// It was not prepared.
    pub fn kernel(&self, kernel: Kernel) -> anyhow::Result<&Path> {
        let path = match kernel {
            Kernel::Up => &self.up,
            Kernel::Smp => &self.smp,
            Kernel::Acpi => &self.acpi,
            Kernel::BzImage => &self.bzimage,
        };
        path.as_deref().with_context(|| format!("kernel {kernel:?} was not prepared: run `make guest`"))
    }

    /// Path of the initramfs with busybox and the workload.
    ///
    /// # Errors
    /// It was not prepared.
    pub fn initramfs(&self) -> anyhow::Result<&Path> {
        self.initramfs.as_deref().context("the initramfs was not prepared: run `make guest`")
    }

    /// Path of the initramfs with the workload alone, which unpacks sooner.
    ///
    /// # Errors
    /// It was not prepared.
    pub fn workload(&self) -> anyhow::Result<&Path> {
        self.initramfs_workload.as_deref().context("the workload was not prepared: run `make guest`")
    }

    /// Paths of the guest with a service.
    ///
    /// # Errors
    /// It was not prepared.
    pub fn service(&self) -> anyhow::Result<Service<'_>> {
        let (Some(disk), Some(initramfs)) = (&self.service_disk, &self.service_initramfs) else {
            bail!("the service was not prepared: run `make guest`");
        };
        Ok(Service { disk, initramfs })
    }

    /// Path of a bare-metal payload.
    ///
    /// # Errors
    /// It was not prepared.
    pub fn payload(&self, name: &str) -> anyhow::Result<PathBuf> {
        let dir = self.payloads.as_deref().context("payloads were not prepared: run `make guest`")?;
        Ok(dir.join(name))
    }

    /// A Linux guest whose init is the workload, with these arguments.
    ///
    /// # Errors
    /// An image is missing.
    pub fn linux(&self, kernel: Kernel, vcpus: u32, workload: &str) -> anyhow::Result<GuestSpec> {
        self.linux_with(self.workload()?, kernel, vcpus, workload)
    }

    /// A Linux guest with busybox, whose /init runs `command`, or the workload if it holds arguments only.
    ///
    /// # Errors
    /// An image is missing.
    pub fn busybox(&self, kernel: Kernel, vcpus: u32, command: &str) -> anyhow::Result<GuestSpec> {
        self.linux_with(self.initramfs()?, kernel, vcpus, command)
    }

    fn linux_with(
        &self,
        initramfs: &Path,
        kernel: Kernel,
        vcpus: u32,
        line: &str,
    ) -> anyhow::Result<GuestSpec> {
        let boot = BootSource::Kernel {
            kernel: BootFile::kernel(self.kernel(kernel)?)?,
            modules: vec![BootFile::module(initramfs)?],
            command_line: format!("console=ttyS0 reboot=t panic=-1 quiet -- {line}"),
        };
        Ok(GuestSpec { vcpus, ..GuestSpec::new("linux", 128 << 20, boot) })
    }

    /// A bare-metal payload with this command line.
    ///
    /// # Errors
    /// The image is missing.
    pub fn bare(&self, name: &str, vcpus: u32, memory: u64, line: &str) -> anyhow::Result<GuestSpec> {
        let kernel = BootFile::kernel(&self.payload(name)?)?;
        let boot = BootSource::Kernel { kernel, modules: Vec::new(), command_line: line.to_owned() };
        Ok(GuestSpec { vcpus, ..GuestSpec::new(name, memory, boot) })
    }
}

/// Whether guests can be run here; prints why not, for tests that are then passed over.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub fn kvm_usable() -> bool {
    match Host::open() {
        Ok(_) => true,
        Err(e) => {
            eprintln!("skipped: {e}");
            false
        }
    }
}
