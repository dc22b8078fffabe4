//! What a guest is: everything that both nodes must agree on before they can hold the same machine.

pub mod virtio;

use colo_common::limits::{
    MAX_BOOT_MODULE, MAX_COMMAND_LINE, MAX_DISK_BYTES, MAX_GUEST_MEMORY, MAX_GUEST_NAME, MAX_KERNEL_IMAGE,
    MAX_VCPUS, MIN_GUEST_MEMORY,
};
use colo_common::{BLOCK_SIZE, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

use crate::arch::x86_64::layout::MAX_VIRTIO_SLOTS;
pub use virtio::{DiskSpec, MAX_SERIAL, NetSpec, VirtioSpec};

/// Why a guest's description was refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A name that no thread or message can carry.
    #[error(
        "the guest's name {name:?} is not 1 to {MAX_GUEST_NAME} bytes without control characters: choose another"
    )]
    Name {
        /// The name, or its beginning.
        name: String,
    },
    /// Memory outside the supported range, or not whole pages.
    #[error(
        "guest memory of {bytes} bytes is not between {MIN_GUEST_MEMORY} and {MAX_GUEST_MEMORY} bytes in whole pages: choose another size"
    )]
    Memory {
        /// What was asked for.
        bytes: u64,
    },
    /// No vCPU, or more than Colo runs.
    #[error("{count} vCPUs asked for; a guest has 1 to {MAX_VCPUS}")]
    Vcpus {
        /// What was asked for.
        count: u32,
    },
    /// More virtio slots than the I/O APIC has pins for.
    #[error("{count} virtio slots asked for; a guest has up to {MAX_VIRTIO_SLOTS}")]
    VirtioSlots {
        /// What was asked for.
        count: u32,
    },
    /// A disk of a size that none has.
    #[error("a disk of {bytes} bytes; it has 1 to {} blocks of {BLOCK_SIZE} bytes", MAX_DISK_BYTES / BLOCK_SIZE as u64)]
    DiskSize {
        /// What was asked for.
        bytes: u64,
    },
    /// A serial number that virtio cannot carry.
    #[error("the disk's serial number {serial:?} is not up to {MAX_SERIAL} printable ASCII characters")]
    Serial {
        /// What was asked for, or its beginning.
        serial: String,
    },
    /// A ring size that KVM does not take.
    #[error("a dirty ring of {entries} entries: it must be a power of two between 1024 and 65536")]
    RingEntries {
        /// What was asked for.
        entries: u32,
    },
    /// The command line does not fit, or has a NUL in it.
    #[error("the kernel command line has {len} bytes or a NUL in it; it may have up to {} and none", MAX_COMMAND_LINE - 1)]
    CommandLine {
        /// Bytes of the line.
        len: usize,
    },
    /// A boot file cannot be read.
    #[error("cannot read {what} {}: {source}; check the path and its permissions", path.display())]
    Read {
        /// The file's role.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A boot file larger than any such file should be.
    #[error("{what} {} has more than {limit} bytes; is it the right file?", path.display())]
    TooLarge {
        /// The file's role.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
}

/// A kernel, initramfs or module, held in memory so that a reset on either node finds it again.
#[derive(Clone)]
pub struct BootFile {
    /// Where it was read from; for messages only.
    pub path: PathBuf,
    /// Its content.
    pub bytes: Arc<[u8]>,
}

impl std::fmt::Debug for BootFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.path.display(), self.bytes.len())
    }
}

impl BootFile {
    /// Reads a kernel image of any supported kind.
    ///
    /// # Errors
    /// The file cannot be read or is larger than [`MAX_KERNEL_IMAGE`].
    pub fn kernel(path: &Path) -> Result<Self, SpecError> {
        Self::read("kernel", path, MAX_KERNEL_IMAGE)
    }

    /// Reads an initramfs or a multiboot module.
    ///
    /// # Errors
    /// The file cannot be read or is larger than [`MAX_BOOT_MODULE`].
    pub fn module(path: &Path) -> Result<Self, SpecError> {
        Self::read("initramfs or module", path, MAX_BOOT_MODULE)
    }

    fn read(what: &'static str, path: &Path, limit: u64) -> Result<Self, SpecError> {
        let failed = |source| SpecError::Read { what, path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mut bytes = Vec::new();
        // One byte past the limit tells "too large" without trusting the file's length.
        file.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > limit {
            return Err(SpecError::TooLarge { what, path: path.to_owned(), limit });
        }
        Ok(Self { path: path.to_owned(), bytes: bytes.into() })
    }
}

/// What the guest starts from, at power-on and at every reset.
#[derive(Clone, Debug)]
pub enum BootSource {
    /// A kernel image whose kind is told by its content: ELF vmlinux, bzImage or multiboot-1.
    Kernel {
        /// The image.
        kernel: BootFile,
        /// initramfs for Linux, modules for multiboot.
        modules: Vec<BootFile>,
        /// Kernel command line.
        command_line: String,
    },
    /// Raw bytes, loaded and entered at `address` in flat 32-bit protected mode.
    Flat {
        /// The image.
        image: BootFile,
        /// Guest-physical address of its first byte, which is its entry too.
        address: u64,
    },
}

/// How the guest's writes are tracked; fixed at start, since KVM allows one kind per VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrackerKind {
    /// One ring of dirty pages per vCPU.
    Ring {
        /// Entries of each ring, a power of two.
        entries: u32,
    },
    /// One bit per page, read slot by slot.
    Bitmap,
}

impl Default for TrackerKind {
    fn default() -> Self {
        Self::Ring { entries: 65_536 }
    }
}

/// Which CPUID the guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuModel {
    /// What this host's KVM supports, less what cannot move between hosts.
    #[default]
    Host,
    /// The x86-64-v2 level: SSE4.2, POPCNT, CMPXCHG16B.
    X86_64V2,
    /// The x86-64-v3 level: v2 with AVX2, BMI, FMA, MOVBE.
    X86_64V3,
}

impl CpuModel {
    /// Its name, as configurations have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
        }
    }
}

/// The whole description of a guest.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// For thread names and messages.
    pub name: String,
    /// Guest memory in bytes, whole pages.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The CPU that the guest sees.
    pub cpu_model: CpuModel,
    /// How its writes are tracked.
    pub tracker: TrackerKind,
    /// virtio-mmio windows; those without a device show device id 0, as the standard has it.
    pub virtio_slots: u32,
    /// Its virtio devices.
    pub virtio: VirtioSpec,
    /// Offer guest memory beyond what the host has available: for sparse guests.
    pub overcommit: bool,
    /// What it boots.
    pub boot: BootSource,
}

impl GuestSpec {
    /// A guest of one vCPU with the default tracker and CPU model, and two empty virtio slots.
    pub fn new(name: &str, memory_bytes: u64, boot: BootSource) -> Self {
        Self {
            name: name.to_owned(),
            memory_bytes,
            vcpus: 1,
            cpu_model: CpuModel::default(),
            tracker: TrackerKind::default(),
            virtio_slots: 2,
            virtio: VirtioSpec::default(),
            overcommit: false,
            boot,
        }
    }

    /// virtio-mmio windows that it has.
    pub fn slots(&self) -> u32 {
        self.virtio_slots.max(self.virtio.slots())
    }

    /// The files that it boots from: kernel or image first.
    pub fn boot_files(&self) -> Vec<BootFile> {
        match &self.boot {
            BootSource::Kernel { kernel, modules, .. } => {
                std::iter::once(kernel).chain(modules).cloned().collect()
            }
            BootSource::Flat { image, .. } => vec![image.clone()],
        }
    }

    /// Checks every number against its limit.
    ///
    /// # Errors
    /// The first field that is out of its range.
    pub fn validate(&self) -> Result<(), SpecError> {
        let fits = (1..=MAX_GUEST_NAME).contains(&self.name.len());
        if !fits || self.name.contains(char::is_control) {
            return Err(SpecError::Name { name: self.name.chars().take(80).collect() });
        }
        let bytes = self.memory_bytes;
        if !(MIN_GUEST_MEMORY..=MAX_GUEST_MEMORY).contains(&bytes) || !bytes.is_multiple_of(PAGE_SIZE as u64)
        {
            return Err(SpecError::Memory { bytes });
        }
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(SpecError::Vcpus { count: self.vcpus });
        }
        if self.virtio_slots > MAX_VIRTIO_SLOTS {
            return Err(SpecError::VirtioSlots { count: self.virtio_slots });
        }
        self.virtio.validate()?;
        if let TrackerKind::Ring { entries } = self.tracker
            && (!entries.is_power_of_two() || !(1024..=65_536).contains(&entries))
        {
            return Err(SpecError::RingEntries { entries });
        }
        if let BootSource::Kernel { command_line, .. } = &self.boot
            && (command_line.len() >= MAX_COMMAND_LINE || command_line.contains('\0'))
        {
            return Err(SpecError::CommandLine { len: command_line.len() });
        }
        Ok(())
    }

    /// Digest of what a saved state depends on: memory, vCPUs, slots, CPU model and boot files. The tracker
    /// and the name are not in it: a state may move between trackers.
    pub fn digest(&self) -> u64 {
        let mut text = format!(
            "memory={} vcpus={} virtio={} {:?} cpu={:?}",
            self.memory_bytes,
            self.vcpus,
            self.slots(),
            self.virtio,
            self.cpu_model
        );
        match &self.boot {
            BootSource::Kernel { kernel, modules, command_line } => {
                text += &format!(" kernel={:016x} line={command_line:?}", xxh3_64(&kernel.bytes));
                for module in modules {
                    text += &format!(" module={:016x}", xxh3_64(&module.bytes));
                }
            }
            BootSource::Flat { image, address } => {
                text += &format!(" flat={:016x}@{address:#x}", xxh3_64(&image.bytes));
            }
        }
        xxh3_64(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::{BootFile, BootSource, GuestSpec, SpecError};

    #[test]
    fn a_name_that_no_thread_can_have_is_refused() {
        let named = |name: &str| {
            let image = BootFile { path: "none".into(), bytes: Vec::new().into() };
            GuestSpec::new(name, 1 << 20, BootSource::Flat { image, address: 0 }).validate()
        };
        for name in ["vmlinux", "a guest (2)", "gäst", &"x".repeat(255)] {
            named(name).unwrap();
        }
        for name in ["", "a\0b", "a\nb", &"x".repeat(256)] {
            let error = named(name).unwrap_err();
            assert!(matches!(error, SpecError::Name { .. }), "{error}");
            assert!(
                error.to_string().contains("choose another") && !error.to_string().contains('\0'),
                "{error}"
            );
        }
    }
}
