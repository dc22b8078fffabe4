//! `[guest]` of a primary: what it boots. A secondary is told by the primary.

use serde::Deserialize;
use std::path::{Path, PathBuf};

use super::bounds::{MAX_MODULES, MAX_VIRTIO_SLOTS};
use super::{Problem, count_from, in_range};
use crate::limits::{MAX_COMMAND_LINE, MAX_GUEST_MEMORY, MAX_RING_ENTRIES, MAX_VCPUS, MIN_GUEST_MEMORY};

/// Entries of a dirty ring at least: KVM keeps some in reserve, and fewer leave no room beside those.
const MIN_RING_ENTRIES: u32 = 1024;

/// What a new guest is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuestConfig {
    /// Whether KVM runs it or it is made of software; default `kvm`.
    pub kind: GuestKind,
    /// Kernel (ELF vmlinux, bzImage or multiboot-1); no default, needed with `kvm` and refused with `synthetic`.
    pub kernel: Option<PathBuf>,
    /// initramfs, or modules of a multiboot kernel, up to 16; default none.
    pub initrd: Vec<PathBuf>,
    /// Kernel command line, up to 2047 bytes; default `console=ttyS0 reboot=t panic=-1`.
    pub cmdline: String,
    /// Memory in MiB, 1 to 1048576; default 256.
    pub memory_mib: u64,
    /// vCPUs, 1 to 64; default 1.
    pub vcpus: u32,
    /// CPU that the guest sees; default `host`. Choose a level if its nodes have different processors.
    pub cpu_model: CpuModel,
    /// How writes are tracked; default `ring`.
    pub tracker: Tracker,
    /// Entries of each vCPU's dirty ring, a power of two from 1024 to 65536; default 65536.
    pub ring_entries: u32,
    /// virtio-mmio windows, 0 to 8; default 2, and as many as there are devices at least.
    pub virtio_slots: u32,
    /// Whether its virtio devices are named on its kernel's command line, for a Linux without ACPI; default false, since
    /// others find them in the ACPI tables.
    pub virtio_cmdline: bool,
    /// Whether it has a source of randomness; default true. A synthetic guest has none.
    pub rng: bool,
    /// Whether it has a virtio console (hvc0) beside the serial one; default false. What it says there is part of the
    /// vm's one console.
    pub virtio_console: bool,
    /// Which of its consoles gets what is typed; default `serial`.
    pub console_input: ConsoleDevice,
    /// Offer more memory than the host has available; default false.
    pub overcommit: bool,
    /// Where all choices of a synthetic guest come from; default 1.
    pub seed: u64,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            kind: GuestKind::default(),
            kernel: None,
            initrd: Vec::new(),
            cmdline: "console=ttyS0 reboot=t panic=-1".to_owned(),
            memory_mib: 256,
            vcpus: 1,
            cpu_model: CpuModel::default(),
            tracker: Tracker::default(),
            ring_entries: MAX_RING_ENTRIES,
            virtio_slots: 2,
            virtio_cmdline: false,
            rng: true,
            virtio_console: false,
            console_input: ConsoleDevice::default(),
            overcommit: false,
            seed: 1,
        }
    }
}

/// Kinds of guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestKind {
    /// A virtual machine of KVM.
    #[default]
    Kvm,
    /// A program that behaves like one, for hosts without KVM.
    Synthetic,
}

/// Consoles of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleDevice {
    /// The 16550 (ttyS0).
    #[default]
    Serial,
    /// virtio-console (hvc0).
    Virtio,
}

/// CPUs that a guest can see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum CpuModel {
    /// What this host has, less what cannot move between hosts.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// SSE4.2, POPCNT, CMPXCHG16B.
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    /// v2 with AVX2, BMI, FMA, MOVBE.
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
}

/// Ways to track a guest's writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tracker {
    /// A ring of dirty pages for each vCPU.
    #[default]
    Ring,
    /// A bit for each page.
    Bitmap,
}

impl GuestConfig {
    pub(super) fn resolve(&mut self, base: &Path) {
        self.kernel.iter_mut().chain(&mut self.initrd).for_each(|path| count_from(base, path));
    }

    pub(super) fn check(&self) -> Result<(), Problem> {
        self.check_boot()?;
        in_range("guest.memory_mib", self.memory_mib, MIN_GUEST_MEMORY >> 20, MAX_GUEST_MEMORY >> 20)?;
        in_range("guest.vcpus", self.vcpus.into(), 1, MAX_VCPUS.into())?;
        in_range("guest.virtio_slots", self.virtio_slots.into(), 0, MAX_VIRTIO_SLOTS.into())?;
        if self.console_input == ConsoleDevice::Virtio && !self.virtio_console {
            let text = "there is no virtio console; set guest.virtio_console = true";
            return Err(Problem::new("guest.console_input", text));
        }
        let ring = self.ring_entries;
        if !ring.is_power_of_two() || !(MIN_RING_ENTRIES..=MAX_RING_ENTRIES).contains(&ring) {
            let text = format!(
                "{ring} is no power of two from {MIN_RING_ENTRIES} to {MAX_RING_ENTRIES}; choose one"
            );
            return Err(Problem::new("guest.ring_entries", text));
        }
        Ok(())
    }

    fn check_boot(&self) -> Result<(), Problem> {
        let wrong = |key, text: &str| Err(Problem::new(key, text));
        match (self.kind, &self.kernel) {
            (GuestKind::Kvm, None) => wrong("guest.kernel", "a kvm guest needs a kernel; name its file"),
            (GuestKind::Synthetic, Some(_)) => wrong(
                "guest.kernel",
                "a synthetic guest boots no kernel; remove this key, or set guest.kind = \"kvm\"",
            ),
            (GuestKind::Synthetic, None) if !self.initrd.is_empty() => wrong(
                "guest.initrd",
                "a synthetic guest boots no files; remove this key, or set guest.kind = \"kvm\"",
            ),
            _ if self.initrd.len() > MAX_MODULES => {
                wrong("guest.initrd", &format!("it names more than {MAX_MODULES} files; name fewer"))
            }
            _ if self.cmdline.len() >= MAX_COMMAND_LINE || self.cmdline.contains('\0') => wrong(
                "guest.cmdline",
                &format!(
                    "it has {} bytes or a NUL in it; up to {} are passed on",
                    self.cmdline.len(),
                    MAX_COMMAND_LINE - 1
                ),
            ),
            _ => Ok(()),
        }
    }
}
