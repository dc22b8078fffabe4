//! This host's KVM: opened, and asked for everything that a guest of ours needs before one is built.

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_SREGS2,
    KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_XSAVE2,
};
use kvm_ioctls::{Cap, Kvm};
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::dirty_ring::ENTRY_BYTES;
use crate::spec::TrackerKind;

/// The device that KVM is reached by.
const DEVICE: &str = "/dev/kvm";

/// KVM API version; the only one there has been since 2007.
const API_VERSION: i32 = 12;

/// Capabilities without which no guest of ours can be run, stopped, saved and restored.
const REQUIRED: [(Cap, &str); 15] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];

/// Why this host cannot run a guest.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no KVM device.
    #[error("{DEVICE} does not exist: load the kvm module (kvm_intel or kvm_amd), or run on a host with KVM")]
    NoDevice,
    /// The device may not be opened.
    #[error("no permission to open {DEVICE}: run as root or join the group that owns it (usually kvm)")]
    NoPermission,
    /// The device cannot be opened for another reason.
    #[error("cannot open {DEVICE}: {source}{}", remedy(.source))]
    Open {
        /// What the system said.
        source: io::Error,
    },
    /// A KVM of another API.
    #[error(
        "{DEVICE} speaks KVM API version {0}, this build speaks {API_VERSION}: use a Linux kernel from after 2007"
    )]
    ApiVersion(i32),
    /// A capability is missing.
    #[error(
        "this host's KVM lacks {capability}, which Colo needs {purpose}: use a newer kernel or another host"
    )]
    Missing {
        /// Its name in the KVM API.
        capability: &'static str,
        /// What for.
        purpose: &'static str,
    },
    /// Rings smaller than asked for.
    #[error(
        "this host's dirty rings have at most {most} entries and {wanted} were asked for: set a smaller ring, or the bitmap tracker"
    )]
    RingTooLarge {
        /// Entries asked for.
        wanted: u32,
        /// Entries possible.
        most: u32,
    },
    /// More vCPUs than KVM gives one VM.
    #[error(
        "this host's KVM runs at most {most} vCPUs in a guest and {wanted} were asked for: give the guest fewer"
    )]
    TooManyVcpus {
        /// vCPUs asked for.
        wanted: u32,
        /// vCPUs possible.
        most: u32,
    },
}

/// What to do about an answer of the system that has a remedy, to follow the answer's own words.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "; raise the limit on open files (ulimit -n)",
        Some(libc::ENFILE) => "; raise the host's limit on open files (sysctl fs.file-max)",
        Some(libc::EAGAIN) => "; raise the limit on processes (ulimit -u, or the cgroup's pids.max)",
        Some(libc::ENOMEM) => "; free memory on this host or raise the limits on it (ulimit -v, cgroup)",
        _ => "",
    }
}

/// How this host's processor runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtualisation {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
    /// Neither: guest kernel code is run by KVM's instruction emulator (kvm-pvm).
    Software,
}

impl std::fmt::Display for Virtualisation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Vmx => "kvm (vmx)",
            Self::Svm => "kvm (svm)",
            Self::Software => "kvm (pvm: no VMX or SVM, guest kernel mode is emulated)",
        })
    }
}

/// A KVM that has what every guest needs.
pub struct Host {
    kvm: Kvm,
    virtualisation: Virtualisation,
}

impl Host {
    /// Opens KVM and checks it.
    ///
    /// # Errors
    /// No device, no permission, or something missing, by its name.
    pub fn open() -> Result<Self, HostError> {
        if !Path::new(DEVICE).exists() {
            return Err(HostError::NoDevice);
        }
        let kvm = Kvm::new().map_err(|e| match e.errno() {
            libc::EACCES | libc::EPERM => HostError::NoPermission,
            libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::NoDevice,
            _ => HostError::Open { source: e.into() },
        })?;
        if kvm.get_api_version() != API_VERSION {
            return Err(HostError::ApiVersion(kvm.get_api_version()));
        }
        check_required(|cap| kvm.check_extension_int(cap))?;
        let host = Self { kvm, virtualisation: virtualisation() };
        // Where guest code runs on the processor, its TSC goes backward on a restore unless it can be moved.
        if host.virtualisation != Virtualisation::Software && !host.has_vcpu_attributes() {
            let (capability, purpose) = ("KVM_CAP_VCPU_ATTRIBUTES", "to carry the guest's TSC");
            return Err(HostError::Missing { capability, purpose });
        }
        Ok(host)
    }

    /// The KVM device.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// How guests are run here.
    pub fn virtualisation(&self) -> Virtualisation {
        self.virtualisation
    }

    /// Checks that the tracker can be had.
    ///
    /// # Errors
    /// No rings, or smaller ones.
    pub fn check_tracker(&self, tracker: TrackerKind) -> Result<(), HostError> {
        check_ring(tracker, self.ring_entries())
    }

    /// Checks that a VM may have so many vCPUs.
    ///
    /// # Errors
    /// KVM allows fewer.
    pub fn check_vcpus(&self, wanted: u32) -> Result<(), HostError> {
        let most = self.kvm.get_max_vcpus() as u32;
        if wanted > most { Err(HostError::TooManyVcpus { wanted, most }) } else { Ok(()) }
    }

    /// Entries of the largest dirty ring; 0 where there are no rings.
    pub fn ring_entries(&self) -> u32 {
        let bytes = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING].map(|cap| self.extension(cap));
        bytes.into_iter().max().unwrap_or(0) / ENTRY_BYTES
    }

    /// Whether special registers come with cached PDPTRs.
    pub fn has_sregs2(&self) -> bool {
        self.extension(KVM_CAP_SREGS2) > 0
    }

    /// Whether vCPU attributes (the TSC offset) are there.
    pub fn has_vcpu_attributes(&self) -> bool {
        self.extension(KVM_CAP_VCPU_ATTRIBUTES) > 0
    }

    /// Whether KVM can refuse a guest the paravirtual features that its CPUID does not offer.
    pub fn enforces_pv_features(&self) -> bool {
        self.extension(KVM_CAP_ENFORCE_PV_FEATURE_CPUID) > 0
    }

    /// Whether KVM_GET_XSAVE2 is there; its size is asked of each VM.
    pub fn has_xsave2(&self) -> bool {
        self.extension(KVM_CAP_XSAVE2) > 0
    }

    /// Whether a guest may have another TSC rate than the host.
    pub fn scales_tsc(&self) -> bool {
        self.kvm.check_extension(Cap::TscControl)
    }

    fn extension(&self, cap: u32) -> u32 {
        u32::try_from(self.kvm.check_extension_raw(u64::from(cap))).unwrap_or(0)
    }
}

fn check_required(mut value: impl FnMut(Cap) -> i32) -> Result<(), HostError> {
    for (cap, capability) in REQUIRED {
        if value(cap) <= 0 {
            return Err(HostError::Missing { capability, purpose: "to run, save and restore a guest" });
        }
    }
    Ok(())
}

fn check_ring(tracker: TrackerKind, most: u32) -> Result<(), HostError> {
    match tracker {
        TrackerKind::Ring { .. } if most == 0 => Err(HostError::Missing {
            capability: "KVM_CAP_DIRTY_LOG_RING",
            purpose: "for the ring tracker (the bitmap tracker does without)",
        }),
        TrackerKind::Ring { entries } if entries > most => {
            Err(HostError::RingTooLarge { wanted: entries, most })
        }
        TrackerKind::Ring { .. } | TrackerKind::Bitmap => Ok(()),
    }
}

/// What this host's processor is called, for messages; empty if it does not say.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(": ")).map_or_else(String::new, |(_, name)| name.trim().to_owned())
}

/// Bytes that this process may still write to the file system of `dir`; nothing if the system does not say.
pub fn disk_free(dir: &Path) -> Option<u64> {
    let path = CString::new(dir.as_os_str().as_bytes()).ok()?;
    let mut answer = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is a NUL-terminated string that outlives the call, and the call writes one `statvfs`.
    if unsafe { libc::statvfs(path.as_ptr(), answer.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the call succeeded, so it has filled the whole structure.
    let answer = unsafe { answer.assume_init() };
    answer.f_bavail.checked_mul(answer.f_frsize)
}

/// From the flags of /proc/cpuinfo; a host that does not say is taken for one without.
fn virtualisation() -> Virtualisation {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    if flags.split_whitespace().any(|flag| flag == "vmx") {
        Virtualisation::Vmx
    } else if flags.split_whitespace().any(|flag| flag == "svm") {
        Virtualisation::Svm
    } else {
        Virtualisation::Software
    }
}

#[cfg(test)]
mod tests {
    use super::{REQUIRED, check_required, check_ring};
    use crate::spec::TrackerKind;

    #[test]
    fn each_missing_capability_is_refused_by_its_name() {
        for (missing, name) in REQUIRED {
            let error = check_required(|cap| i32::from(cap as u32 != missing as u32)).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        check_required(|_| 1).unwrap();
    }

    #[test]
    fn rings_are_needed_by_the_ring_tracker_alone() {
        let ring = TrackerKind::Ring { entries: 65_536 };
        let error = check_ring(ring, 0).unwrap_err().to_string();
        assert!(error.contains("KVM_CAP_DIRTY_LOG_RING"), "{error}");
        let error = check_ring(ring, 4096).unwrap_err().to_string();
        assert!(error.contains("at most 4096 entries"), "{error}");
        check_ring(ring, 65_536).unwrap();
        check_ring(TrackerKind::Bitmap, 0).unwrap();
    }
}
