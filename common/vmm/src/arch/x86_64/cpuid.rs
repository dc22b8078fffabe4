//! CPU models: which CPUID the guest sees.
//!
//! A model is resolved against what this host's KVM supports, and the resolved table is what vCPUs get, what
//! the other node is checked against, and what must never be compared with KVM_GET_CPUID2: some hosts force
//! their own features back into what they are given. Whether a host can run a table is `fit`, how a table travels
//! `wire`, what bits are called `names`.

mod fit;
mod names;
mod wire;

use colo_common::bounded::list;
use colo_common::limits::MAX_CPUID_ENTRIES;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::host::Virtualisation;
use crate::spec::CpuModel;
use crate::state::StateError;
use names::Bits;
pub use wire::ENTRY_BYTES;

/// Why a model cannot be had on a host.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM does not say what it supports.
    #[error("KVM does not tell which CPUID it supports: {0}")]
    Unreadable(#[source] std::io::Error),
    /// Bytes that are no table.
    #[error(
        "a CPUID table of {0} bytes: it has 1 to {MAX_CPUID_ENTRIES} entries of {ENTRY_BYTES} bytes; do both nodes run the same version of Colo?"
    )]
    Malformed(usize),
    /// The host lacks features of the model.
    #[error("this host lacks CPU features that the guest's model needs: {0}; choose a lower CPU model")]
    Lacking(String),
    /// A table that no Colo gives a guest.
    #[error(
        "the CPU model offers what no guest of Colo has: {0}; it was not saved by Colo, or damaged: use the same \
         version of Colo on both nodes"
    )]
    Masked(String),
    /// RAM that the guest's CPU cannot address.
    #[error(
        "guest memory reaches up to {end:#x}, and the guest's CPU addresses {bits} bits: lower the guest's memory, or \
         use a host with more physical address bits"
    )]
    AddressBits {
        /// First guest-physical address after RAM.
        end: u64,
        /// Physical address bits.
        bits: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reg {
    Ebx,
    Ecx,
    Edx,
    Eax,
}

use Reg::{Eax, Ebx, Ecx, Edx};

/// A feature word: leaf, subleaf, register.
type Word = (u32, u32, Reg);

/// Bits cleared in every model, with the reason.
/// Nested virtualisation is not offered; a counter that claims to be invariant cannot move between hosts;
/// async page faults and steal time are written by the host at moments that no cut can see; machine-check
/// banks are not part of the saved state.
const MASKED: [(Word, u32); 5] = [
    ((1, 0, Ecx), 1 << 5),
    ((0x8000_0001, 0, Ecx), 1 << 2),
    ((0x8000_0007, 0, Edx), 1 << 8),
    ((KVM_FEATURES, 0, Eax), KVM_ASYNC_PF | KVM_STEAL_TIME | KVM_ASYNC_PF_VMEXIT | KVM_ASYNC_PF_INT),
    ((1, 0, Edx), 1 << 7 | 1 << 14),
];

const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_ASYNC_PF: u32 = 1 << 4;
const KVM_STEAL_TIME: u32 = 1 << 5;
const KVM_UNHALT: u32 = 1 << 7;
const KVM_ASYNC_PF_VMEXIT: u32 = 1 << 10;
const KVM_SEND_IPI: u32 = 1 << 11;
const KVM_SCHED_YIELD: u32 = 1 << 13;
const KVM_ASYNC_PF_INT: u32 = 1 << 14;

/// What a level has in each feature word beyond the level before; 0xffff_ffff words are not limited.
const V2: [(Word, u32); 4] = [
    // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, x2APIC, POPCNT, hypervisor.
    ((1, 0, Ecx), 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | 1 << 31),
    ((7, 0, Ebx), 0),
    // LAHF/SAHF in long mode.
    ((0x8000_0001, 0, Ecx), 1),
    ((7, 0, Ecx), 0),
];
const V3: [(Word, u32); 4] = [
    // FMA, MOVBE, XSAVE (OSXSAVE follows CR4), AVX, F16C.
    ((1, 0, Ecx), 1 << 12 | 1 << 22 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29),
    // BMI1, AVX2, BMI2.
    ((7, 0, Ebx), 1 << 3 | 1 << 5 | 1 << 8),
    // LZCNT.
    ((0x8000_0001, 0, Ecx), 1 << 5),
    ((7, 0, Ecx), 0),
];
/// Set by the processor or by us as it runs; a host need not have them.
const NOT_REQUIRED: u32 = 1 << 27 | 1 << 31 | 1 << 21;

/// The deadline timer is KVM's own and not in what it says to support.
const DEADLINE: u32 = 1 << 24;

/// The CPUID of one guest, the same for all its vCPUs but for their numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CpuidTable {
    #[serde(deserialize_with = "list::<_, _, MAX_CPUID_ENTRIES>")]
    entries: Vec<kvm_cpuid_entry2>,
}

impl CpuidTable {
    /// Resolves `model` on this host.
    ///
    /// # Errors
    /// KVM cannot be asked, or the host lacks features of the model.
    pub fn resolve(
        kvm: &Kvm,
        model: CpuModel,
        how: Virtualisation,
        deadline: bool,
    ) -> Result<Self, CpuidError> {
        Self::from_supported(Self::supported(kvm)?.entries, model, how, deadline)
    }

    /// Everything that this host's KVM supports.
    ///
    /// # Errors
    /// KVM cannot be asked.
    pub fn supported(kvm: &Kvm) -> Result<Self, CpuidError> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let supported = supported.map_err(|e| CpuidError::Unreadable(e.into()))?;
        // A table is compared as a whole, and padding does not travel.
        let plain = |entry: &kvm_cpuid_entry2| kvm_cpuid_entry2 { padding: [0; 3], ..*entry };
        Ok(Self { entries: supported.as_slice().iter().map(plain).collect() })
    }

    pub(crate) fn check_limits(&self) -> Result<(), StateError> {
        let count = self.entries.len();
        let fits = (1..=MAX_CPUID_ENTRIES).contains(&count);
        if fits { Ok(()) } else { Err(StateError::Malformed(format!("{count} CPUID entries"))) }
    }

    fn from_supported(
        entries: Vec<kvm_cpuid_entry2>,
        model: CpuModel,
        how: Virtualisation,
        deadline: bool,
    ) -> Result<Self, CpuidError> {
        let mut table = Self { entries };
        table.entries.truncate(MAX_CPUID_ENTRIES);
        if model != CpuModel::Host {
            table.limit_to(model)?;
        }
        for (word, bits) in MASKED {
            table.change(word, |value| value & !bits);
        }
        // Their hypercalls hang where kernel mode is emulated.
        if how == Virtualisation::Software {
            let hypercalls = KVM_UNHALT | KVM_SEND_IPI | KVM_SCHED_YIELD;
            table.change((KVM_FEATURES, 0, Eax), |value| value & !hypercalls);
        }
        table.change((1, 0, Ecx), |value| if deadline { value | DEADLINE } else { value & !DEADLINE });
        table.change((1, 0, Ecx), |value| value | 1 << 31);
        Ok(table)
    }

    /// The table for one vCPU: its APIC id, and one flat package of `vcpus` cores.
    pub(crate) fn for_vcpu(&self, vcpu: u32, vcpus: u32) -> std::io::Result<CpuId> {
        let mut table = self.clone();
        table.change((1, 0, Ebx), |value| value & 0x0000_ffff | vcpu << 24 | vcpus.min(255) << 16);
        for entry in table.entries.iter_mut().filter(|e| matches!(e.function, 0xb | 0x1f)) {
            entry.edx = vcpu;
        }
        CpuId::from_entries(&table.entries).map_err(|e| std::io::Error::other(format!("{e:?}")))
    }

    fn limit_to(&mut self, model: CpuModel) -> Result<(), CpuidError> {
        let mut lacking = Vec::new();
        for (&(word, v2), (_, v3)) in V2.iter().zip(V3) {
            let allowed = if model == CpuModel::X86_64V3 { v2 | v3 } else { v2 };
            let missing = allowed & !NOT_REQUIRED & !self.word(word);
            if missing != 0 {
                lacking.push(Bits(word, missing).to_string());
            }
            self.change(word, |value| value & allowed);
        }
        // Extended leaves of leaf 7 and the state components above AVX go with the features that use them.
        self.change((7, 0, Edx), |_| 0);
        self.change((7, 0, Eax), |_| 0);
        self.entries.retain(|e| e.function != 7 || e.index == 0);
        let components = if model == CpuModel::X86_64V3 { 0b111 } else { 0b011 };
        self.change((0xd, 0, Eax), |value| value & components);
        self.change((0xd, 0, Edx), |_| 0);
        self.entries.retain(|e| e.function != 0xd || e.index < 3);
        if lacking.is_empty() { Ok(()) } else { Err(CpuidError::Lacking(lacking.join(", "))) }
    }

    fn word(&self, (leaf, subleaf, reg): Word) -> u32 {
        let entry = self.entries.iter().find(|e| e.function == leaf && e.index == subleaf);
        entry.map_or(0, |e| match reg {
            Eax => e.eax,
            Ebx => e.ebx,
            Ecx => e.ecx,
            Edx => e.edx,
        })
    }

    fn change(&mut self, (leaf, subleaf, reg): Word, f: impl Fn(u32) -> u32) {
        for e in self.entries.iter_mut().filter(|e| e.function == leaf && e.index == subleaf) {
            let value = match reg {
                Eax => &mut e.eax,
                Ebx => &mut e.ebx,
                Ecx => &mut e.ecx,
                Edx => &mut e.edx,
            };
            *value = f(*value);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::fit::ADDRESS_BITS;
    use super::{CpuidTable, Eax, Ebx, Ecx, Edx, KVM_FEATURES};
    use crate::host::Virtualisation;
    use crate::spec::CpuModel;
    use kvm_bindings::kvm_cpuid_entry2;

    /// Every bit of every leaf that anything here looks at.
    pub(crate) fn everything() -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        let leaves = [
            (1, 0),
            (7, 0),
            (7, 1),
            (7, 2),
            (0xd, 0),
            (0xd, 1),
            (0xd, 9),
            (0x1d, 0),
            (0x1d, 1),
            (0x1e, 0),
            (0x1e, 1),
            (0x24, 0),
            (0x24, 1),
            (0x8000_0001, 0),
            (0x8000_0007, 0),
            (0x8000_0008, 0),
            (0x8000_0021, 0),
            (KVM_FEATURES, 0),
        ];
        leaves.into_iter().map(|(f, i)| leaf(f, i)).collect()
    }

    /// What a guest gets on a host that has everything.
    pub(crate) fn of_a_guest() -> CpuidTable {
        CpuidTable::from_supported(everything(), CpuModel::Host, Virtualisation::Vmx, true).unwrap()
    }

    impl CpuidTable {
        pub(crate) fn from_entries(entries: Vec<kvm_cpuid_entry2>) -> Self {
            Self { entries }
        }

        pub(crate) fn with_address_bits(&self, bits: u32) -> Self {
            let mut table = self.clone();
            table.change(ADDRESS_BITS, |value| value & !0xff | bits);
            table
        }
    }

    #[test]
    fn what_cannot_move_is_masked_in_every_model() {
        for model in [CpuModel::Host, CpuModel::X86_64V2, CpuModel::X86_64V3] {
            let table =
                CpuidTable::from_supported(everything(), model, Virtualisation::Software, false).unwrap();
            assert_eq!(table.word((0x8000_0007, 0, Edx)) & 1 << 8, 0, "invariant TSC");
            assert_eq!(
                table.word((KVM_FEATURES, 0, Eax)) & (1 << 4 | 1 << 5 | 1 << 7 | 1 << 11 | 1 << 13 | 1 << 14),
                0
            );
            assert_eq!(table.word((1, 0, Ecx)) & 1 << 5, 0, "VMX");
            assert_eq!(table.word((1, 0, Ecx)) & 1 << 24, 0, "TSC deadline");
            assert_ne!(table.word((1, 0, Ecx)) & 1 << 31, 0, "hypervisor");
        }
        let table =
            CpuidTable::from_supported(everything(), CpuModel::Host, Virtualisation::Vmx, true).unwrap();
        assert_ne!(table.word((1, 0, Ecx)) & 1 << 24, 0);
        assert_ne!(table.word((KVM_FEATURES, 0, Eax)) & 1 << 11, 0);
    }

    #[test]
    fn levels_limit_features_and_refuse_a_host_without_them() {
        let v2 =
            CpuidTable::from_supported(everything(), CpuModel::X86_64V2, Virtualisation::Vmx, false).unwrap();
        assert_eq!(v2.word((7, 0, Ebx)), 0);
        assert_eq!(v2.word((1, 0, Ecx)) & 1 << 28, 0, "AVX");
        let v3 =
            CpuidTable::from_supported(everything(), CpuModel::X86_64V3, Virtualisation::Vmx, false).unwrap();
        assert_eq!(v3.word((7, 0, Ebx)), 1 << 3 | 1 << 5 | 1 << 8);
        assert_eq!(v3.word((0xd, 0, Eax)), 7);
        let mut poor = everything();
        poor[1].ebx = 0;
        let error =
            CpuidTable::from_supported(poor, CpuModel::X86_64V3, Virtualisation::Vmx, false).unwrap_err();
        assert!(error.to_string().contains("leaf 0x7"), "{error}");
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let table =
            CpuidTable::from_supported(everything(), CpuModel::Host, Virtualisation::Vmx, false).unwrap();
        let ids: Vec<u32> = (0..2).map(|n| table.for_vcpu(n, 2).unwrap().as_slice()[0].ebx >> 24).collect();
        assert_eq!(ids, [0, 1]);
    }
}
