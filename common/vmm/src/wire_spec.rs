//! A guest's description as one node tells it to the other: everything but the content of the boot files, of which it
//! has the digests.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use xxhash_rust::xxh3::xxh3_128;

use crate::devices::Backends;
use crate::machine::BuildError;
use crate::memory::GuestMemory;
use crate::spec::{BootFile, BootSource, CpuModel, GuestSpec, SpecError, TrackerKind, VirtioSpec};
use crate::synthetic::{SyntheticConfig, SyntheticError};
use crate::tracker::Cadence;
use std::sync::Arc;

/// Longest encoded description: names, a command line and the digests of a kernel and its modules.
pub const MAX_WIRE_SPEC: usize = 64 << 10;
/// Modules of one kernel.
const MAX_MODULES: usize = 64;

/// What runs the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestKind {
    /// KVM.
    Kvm,
    /// Software, for where there is no KVM and for tests.
    Synthetic(SyntheticConfig),
}

impl GuestKind {
    /// Its name, as nodes and operators say it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Synthetic(_) => "synthetic",
        }
    }

    /// Whether a guest of the other kind could run on as this one: both on KVM, or both with the same program. How
    /// writes are tracked makes no difference.
    pub fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Kvm, Self::Kvm) => true,
            (Self::Synthetic(a), Self::Synthetic(b)) => a.program == b.program,
            _ => false,
        }
    }
}

/// A boot file by its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// Its path on the node that read it, for messages.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
    /// XXH3-128 of its bytes.
    pub digest: u128,
}

impl FileDigest {
    /// Of a file that was read.
    pub fn of(file: &BootFile) -> Self {
        Self { path: file.path.clone(), len: file.bytes.len() as u64, digest: xxh3_128(&file.bytes) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum WireBoot {
    Kernel { command_line: String },
    Flat { address: u64 },
}

/// A [`GuestSpec`] and its kind, without the bytes of its boot files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireSpec {
    /// What runs it.
    pub kind: GuestKind,
    name: String,
    memory_bytes: u64,
    vcpus: u32,
    cpu_model: CpuModel,
    tracker: TrackerKind,
    virtio_slots: u32,
    virtio: VirtioSpec,
    overcommit: bool,
    boot: WireBoot,
    /// The kernel or image first, then modules.
    files: Vec<FileDigest>,
}

/// Why a description cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum WireSpecError {
    /// The bytes are none.
    #[error("the guest's description is malformed: {0}")]
    Malformed(String),
    /// A number in it is out of its range.
    #[error("the guest's description cannot be taken: {0}")]
    Spec(#[from] SpecError),
    /// A boot file was not given.
    #[error("the boot file {} ({len} bytes) of the guest's description is missing", path.display())]
    MissingFile {
        /// Where it was read.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
}

impl WireSpec {
    /// Describes a guest.
    pub fn new(spec: &GuestSpec, kind: GuestKind) -> Self {
        let (boot, files) = match &spec.boot {
            BootSource::Kernel { kernel, modules, command_line } => {
                let files = std::iter::once(kernel).chain(modules).map(FileDigest::of).collect();
                (WireBoot::Kernel { command_line: command_line.clone() }, files)
            }
            BootSource::Flat { image, address } => {
                (WireBoot::Flat { address: *address }, vec![FileDigest::of(image)])
            }
        };
        Self {
            kind,
            name: spec.name.clone(),
            memory_bytes: spec.memory_bytes,
            vcpus: spec.vcpus,
            cpu_model: spec.cpu_model,
            tracker: spec.tracker,
            virtio_slots: spec.virtio_slots,
            virtio: spec.virtio.clone(),
            overcommit: spec.overcommit,
            boot,
            files,
        }
    }

    /// Bytes of guest memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// The CPU model that the guest was started with.
    pub fn cpu_model(&self) -> CpuModel {
        self.cpu_model
    }

    /// The guest's virtio devices.
    pub fn virtio(&self) -> &VirtioSpec {
        &self.virtio
    }

    /// How the guest's writes are tracked.
    pub fn tracker(&self) -> TrackerKind {
        self.tracker
    }

    /// The boot files that it needs.
    pub fn files(&self) -> &[FileDigest] {
        &self.files
    }

    /// Encodes it.
    ///
    /// # Panics
    /// Never: it has only plain data in it.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a description has only plain data in it")
    }

    /// Decodes what a peer or a disk has. Every number of it is in its range.
    ///
    /// # Errors
    /// The bytes are no description of a guest that can be.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireSpecError> {
        if bytes.len() > MAX_WIRE_SPEC {
            return Err(WireSpecError::Malformed(format!(
                "{} bytes, more than {MAX_WIRE_SPEC}",
                bytes.len()
            )));
        }
        let (spec, rest) =
            postcard::take_from_bytes::<Self>(bytes).map_err(|e| WireSpecError::Malformed(e.to_string()))?;
        if !rest.is_empty() || spec.files.is_empty() || spec.files.len() > 1 + MAX_MODULES {
            let what = format!("{} files and {} bytes left over", spec.files.len(), rest.len());
            return Err(WireSpecError::Malformed(what));
        }
        spec.complete(|_| Some(Arc::from([])))?.validate()?;
        Ok(spec)
    }

    /// The description with the boot files, each found by its digest.
    ///
    /// # Errors
    /// A file is missing.
    pub fn complete(
        &self,
        find: impl Fn(&FileDigest) -> Option<Arc<[u8]>>,
    ) -> Result<GuestSpec, WireSpecError> {
        let mut files = Vec::new();
        for file in &self.files {
            let bytes = find(file)
                .ok_or_else(|| WireSpecError::MissingFile { path: file.path.clone(), len: file.len })?;
            files.push(BootFile { path: file.path.clone(), bytes });
        }
        let first = files.remove(0);
        let boot = match &self.boot {
            WireBoot::Kernel { command_line } => {
                BootSource::Kernel { kernel: first, modules: files, command_line: command_line.clone() }
            }
            WireBoot::Flat { address } => BootSource::Flat { image: first, address: *address },
        };
        Ok(GuestSpec {
            name: self.name.clone(),
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            cpu_model: self.cpu_model,
            tracker: self.tracker,
            virtio_slots: self.virtio_slots,
            virtio: self.virtio.clone(),
            overcommit: self.overcommit,
            boot,
        })
    }
}

/// Why a guest of some kind could not be built.
#[derive(Debug, thiserror::Error)]
pub enum GuestBuildError {
    /// On KVM.
    #[error(transparent)]
    Kvm(#[from] BuildError),
    /// In software.
    #[error(transparent)]
    Synthetic(#[from] SyntheticError),
}

impl GuestKind {
    /// Builds the guest around `memory`, with devices on these parts of the host; neither booted nor restored.
    ///
    /// # Errors
    /// The host or the description does not allow it.
    pub fn build(
        &self,
        spec: GuestSpec,
        memory: Arc<GuestMemory>,
        backends: &Backends,
    ) -> Result<Box<dyn crate::ProtectedGuest>, GuestBuildError> {
        Ok(match self {
            Self::Kvm => Box::new(crate::KvmGuest::on(spec, memory, backends, Cadence::default())?),
            Self::Synthetic(config) => {
                Box::new(crate::synthetic::PacedGuest::new(spec, config.clone(), memory)?)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{GuestKind, WireSpec, WireSpecError};
    use crate::spec::{BootFile, BootSource, GuestSpec};
    use crate::synthetic::SyntheticConfig;
    use proptest::prelude::{any, prop_assert_eq, proptest};

    fn described() -> WireSpec {
        let image = BootFile { path: "image".into(), bytes: [0xf4].into() };
        let spec = GuestSpec::new("demo", 16 << 20, BootSource::Flat { image, address: 1 << 20 });
        WireSpec::new(&spec, GuestKind::Synthetic(SyntheticConfig::default()))
    }

    #[test]
    fn numbers_out_of_their_range_are_refused_before_anything_is_made_of_them() {
        assert_eq!(WireSpec::decode(&described().encode()).unwrap(), described());
        for memory_bytes in [0, 4095, u64::MAX] {
            let error = WireSpec::decode(&WireSpec { memory_bytes, ..described() }.encode()).unwrap_err();
            assert!(matches!(error, WireSpecError::Spec(_)), "{error}");
            assert!(error.to_string().contains("choose another size"), "{error}");
        }
        for vcpus in [0, u32::MAX] {
            let error = WireSpec::decode(&WireSpec { vcpus, ..described() }.encode()).unwrap_err();
            assert!(error.to_string().contains("vCPUs"), "{error}");
        }
    }

    #[test]
    fn guests_are_alike_whatever_tracks_them() {
        let config = SyntheticConfig::default();
        let (mut tracked, mut other) = (config.clone(), config.clone());
        tracked.tracking.seed += 1;
        other.program.seed += 1;
        let [config, tracked, other] = [config, tracked, other].map(GuestKind::Synthetic);
        assert!(config.is_like(&tracked) && GuestKind::Kvm.is_like(&GuestKind::Kvm));
        assert!(!config.is_like(&other) && !config.is_like(&GuestKind::Kvm));
    }

    proptest! {
        #[test]
        fn no_changed_description_panics(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut bytes = described().encode();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(spec) = WireSpec::decode(&bytes) {
                prop_assert_eq!(WireSpec::decode(&spec.encode()).unwrap(), spec);
            }
        }
    }
}
