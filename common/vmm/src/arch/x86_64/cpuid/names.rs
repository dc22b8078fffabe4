//! What bits of CPUID are called, for messages: `leaf 0x7.0 ebx bits 0x00000020 (AVX2)`.

use std::fmt;

use super::{Eax, Ebx, Ecx, Edx, KVM_FEATURES, Word};

/// Names of the bits of a word.
type Names = (Word, &'static [(u32, &'static str)]);

/// Features that an operator is likely to know by name; others are told by their bits.
const NAMES: [Names; 11] = [
    (
        (1, 0, Ecx),
        &[
            (0, "SSE3"),
            (1, "PCLMULQDQ"),
            (3, "MONITOR"),
            (5, "VMX"),
            (9, "SSSE3"),
            (12, "FMA"),
            (13, "CMPXCHG16B"),
            (17, "PCID"),
            (19, "SSE4.1"),
            (20, "SSE4.2"),
            (21, "x2APIC"),
            (22, "MOVBE"),
            (23, "POPCNT"),
            (24, "TSC deadline"),
            (25, "AES"),
            (26, "XSAVE"),
            (28, "AVX"),
            (29, "F16C"),
            (30, "RDRAND"),
        ],
    ),
    ((1, 0, Edx), &[(7, "MCE"), (14, "MCA"), (25, "SSE"), (26, "SSE2"), (28, "HTT")]),
    (
        (7, 0, Ebx),
        &[
            (0, "FSGSBASE"),
            (3, "BMI1"),
            (4, "HLE"),
            (5, "AVX2"),
            (7, "SMEP"),
            (8, "BMI2"),
            (9, "ERMS"),
            (10, "INVPCID"),
            (11, "RTM"),
            (16, "AVX512F"),
            (17, "AVX512DQ"),
            (18, "RDSEED"),
            (19, "ADX"),
            (20, "SMAP"),
            (21, "AVX512IFMA"),
            (23, "CLFLUSHOPT"),
            (24, "CLWB"),
            (28, "AVX512CD"),
            (29, "SHA"),
            (30, "AVX512BW"),
            (31, "AVX512VL"),
        ],
    ),
    (
        (7, 0, Ecx),
        &[
            (1, "AVX512VBMI"),
            (2, "UMIP"),
            (3, "PKU"),
            (6, "AVX512VBMI2"),
            (8, "GFNI"),
            (9, "VAES"),
            (10, "VPCLMULQDQ"),
            (11, "AVX512VNNI"),
            (12, "AVX512BITALG"),
            (14, "AVX512VPOPCNTDQ"),
            (16, "LA57"),
            (22, "RDPID"),
        ],
    ),
    (
        (7, 0, Edx),
        &[
            (4, "FSRM"),
            (14, "SERIALIZE"),
            (22, "AMX-BF16"),
            (23, "AVX512FP16"),
            (24, "AMX-TILE"),
            (25, "AMX-INT8"),
            (26, "SPEC_CTRL"),
            (27, "STIBP"),
            (29, "ARCH_CAPABILITIES"),
            (31, "SSBD"),
        ],
    ),
    ((7, 1, Eax), &[(4, "AVX-VNNI"), (5, "AVX512BF16"), (23, "AVX-IFMA")]),
    ((0xd, 1, Eax), &[(0, "XSAVEOPT"), (1, "XSAVEC"), (3, "XSAVES")]),
    ((0x8000_0001, 0, Ecx), &[(0, "LAHF"), (2, "SVM"), (5, "LZCNT"), (6, "SSE4A"), (8, "3DNOWPREFETCH")]),
    ((0x8000_0001, 0, Edx), &[(11, "SYSCALL"), (20, "NX"), (26, "1 GiB pages"), (27, "RDTSCP")]),
    ((0x8000_0007, 0, Edx), &[(8, "invariant TSC")]),
    (
        (KVM_FEATURES, 0, Eax),
        &[
            (3, "kvmclock"),
            (4, "async page faults"),
            (5, "steal time"),
            (6, "PV EOI"),
            (7, "PV unhalt"),
            (9, "PV TLB flush"),
            (11, "PV IPIs"),
            (13, "PV yield"),
        ],
    ),
];

/// Bits of a word, for a person.
pub(super) struct Bits(pub(super) Word, pub(super) u32);

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(word @ (leaf, subleaf, register), bits) = *self;
        let register = match register {
            Eax => "eax",
            Ebx => "ebx",
            Ecx => "ecx",
            Edx => "edx",
        };
        write!(f, "leaf {leaf:#x}.{subleaf} {register} bits {bits:#010x}")?;
        let names = NAMES.iter().find(|(named, _)| *named == word).map_or(&[][..], |(_, names)| names);
        let known: Vec<_> =
            names.iter().filter(|(bit, _)| bits & 1 << bit != 0).map(|(_, name)| *name).collect();
        if known.is_empty() { Ok(()) } else { write!(f, " ({})", known.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Bits, Ebx, Ecx, NAMES};

    #[test]
    fn bits_are_told_with_the_names_that_are_known() {
        let avx = Bits((7, 0, Ebx), 1 << 16 | 1 << 5 | 1 << 1).to_string();
        assert_eq!(avx, "leaf 0x7.0 ebx bits 0x00010022 (AVX2, AVX512F)");
        assert_eq!(Bits((7, 2, Ecx), 1).to_string(), "leaf 0x7.2 ecx bits 0x00000001");
    }

    #[test]
    fn every_bit_has_one_name() {
        for (word, names) in NAMES {
            assert!(names.windows(2).all(|pair| pair[0].0 < pair[1].0), "{word:?}");
            assert!(names.iter().all(|(bit, _)| *bit < 32), "{word:?}");
        }
    }
}
