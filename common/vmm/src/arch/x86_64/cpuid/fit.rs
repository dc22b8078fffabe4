//! Whether a host can run a guest with a CPUID table: every feature of the guest's must be one of the host's, and what
//! is counted must be no more.

use colo_common::Gfn;

use super::names::Bits;
use super::{CpuidError, CpuidTable, DEADLINE, Eax, Ebx, Ecx, Edx, KVM_FEATURES, MASKED, NOT_REQUIRED, Word};

/// Feature words in which every bit of a guest's must be one of the host's.
const FEATURE_WORDS: [Word; 23] = [
    (1, 0, Ecx),
    (1, 0, Edx),
    (7, 0, Ebx),
    (7, 0, Ecx),
    (7, 0, Edx),
    (7, 1, Eax),
    (7, 1, Ebx),
    (7, 1, Ecx),
    (7, 1, Edx),
    (7, 2, Edx),
    // State components: of user mode in the first subleaf, of kernel mode in the second.
    (0xd, 0, Eax),
    (0xd, 0, Edx),
    (0xd, 1, Eax),
    (0xd, 1, Ecx),
    (0xd, 1, Edx),
    // AMX and AVX10.
    (0x1e, 1, Eax),
    (0x24, 1, Ecx),
    (0x8000_0001, 0, Ecx),
    (0x8000_0001, 0, Edx),
    (0x8000_0007, 0, Edx),
    (0x8000_0008, 0, Ebx),
    (0x8000_0021, 0, Eax),
    (KVM_FEATURES, 0, Eax),
];
/// Where the number of physical address bits is, in the lowest byte.
pub(super) const ADDRESS_BITS: Word = (0x8000_0008, 0, Eax);
/// What a processor has that does not tell.
const LEAST_ADDRESS_BITS: u32 = 36;
/// AVX10: its version in the lowest byte, vector lengths above it.
const AVX10: Word = (0x24, 0, Ebx);
/// Numbers of which a guest's may not be more than the host's, in the lowest byte.
const COUNTS: [(Word, &str); 3] =
    [(ADDRESS_BITS, "physical address bits"), ((0x1d, 0, Eax), "tile palettes"), (AVX10, "as AVX10 version")];
/// Sizes of AMX tiles, which a guest that has tiles finds as they were.
const TILE_SIZES: [Word; 4] = [(0x1d, 1, Eax), (0x1d, 1, Ebx), (0x1d, 1, Ecx), (0x1e, 0, Ebx)];

impl CpuidTable {
    /// Refuses a guest's table on a host that lacks a feature of it, and one that no guest of Colo has.
    ///
    /// # Errors
    /// The leaves and bits that are lacking, or too many.
    pub fn check_runs_on(&self, host: &Self) -> Result<(), CpuidError> {
        for (word, bits) in MASKED {
            let bits = self.word(word) & bits;
            if bits != 0 {
                return Err(CpuidError::Masked(Bits(word, bits).to_string()));
            }
        }
        let mut lacking = Vec::new();
        for word in FEATURE_WORDS.into_iter().chain([AVX10]) {
            let own = match word {
                (1, 0, Ecx) => NOT_REQUIRED | DEADLINE,
                AVX10 => 0xff,
                _ => 0,
            };
            let missing = self.word(word) & !host.word(word) & !own;
            if missing != 0 {
                lacking.push(Bits(word, missing).to_string());
            }
        }
        // Of address bits: page tables and memory-type masks of the guest may use all that it was told of.
        for (word, what) in COUNTS {
            let (own, host) = (self.word(word) & 0xff, host.word(word) & 0xff);
            if own > host {
                lacking.push(format!("{own} {what} (it has {host})"));
            }
        }
        for word in TILE_SIZES {
            let (own, host) = (self.word(word), host.word(word));
            if own != 0 && own != host {
                lacking.push(format!("leaf {:#x} of {own:#x} (it has {host:#x})", word.0));
            }
        }
        if lacking.is_empty() { Ok(()) } else { Err(CpuidError::Lacking(lacking.join(", "))) }
    }

    /// Refuses RAM of `frames` frames that the guest's CPU cannot address.
    ///
    /// # Errors
    /// The end of RAM, and how far addresses go.
    pub fn check_reaches(&self, frames: u64) -> Result<(), CpuidError> {
        let bits = match self.word(ADDRESS_BITS) & 0xff {
            0 => LEAST_ADDRESS_BITS,
            bits => bits,
        };
        let end = Gfn(frames).address();
        let fits = bits >= u64::BITS || end <= 1 << bits;
        if fits { Ok(()) } else { Err(CpuidError::AddressBits { end, bits }) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::everything;
    use super::{ADDRESS_BITS, AVX10, CpuidError, CpuidTable, Eax, Ebx, FEATURE_WORDS, MASKED, TILE_SIZES};
    use crate::host::Virtualisation;
    use crate::spec::CpuModel;

    #[test]
    fn a_guest_moves_only_to_a_host_that_has_its_features() {
        let host = CpuidTable { entries: everything() };
        let v3 =
            CpuidTable::from_supported(everything(), CpuModel::X86_64V3, Virtualisation::Vmx, true).unwrap();
        v3.check_runs_on(&host).unwrap();
        let mut poor = host.clone();
        poor.change((7, 0, Ebx), |value| value & !(1 << 5));
        let error = v3.check_runs_on(&poor).unwrap_err().to_string();
        assert!(error.contains("leaf 0x7.0 ebx bits 0x00000020 (AVX2)"), "{error}");
        let v2 =
            CpuidTable::from_supported(everything(), CpuModel::X86_64V2, Virtualisation::Vmx, true).unwrap();
        v2.check_runs_on(&poor).unwrap();
        poor.change(ADDRESS_BITS, |value| value & !0xff | 46);
        let error = v2.check_runs_on(&poor).unwrap_err().to_string();
        assert!(error.contains("255 physical address bits (it has 46)"), "{error}");
    }

    #[test]
    fn every_word_with_features_is_compared() {
        let host = CpuidTable { entries: everything() };
        let guest =
            CpuidTable::from_supported(everything(), CpuModel::Host, Virtualisation::Vmx, true).unwrap();
        guest.check_runs_on(&host).unwrap();
        for word in FEATURE_WORDS.into_iter().chain(TILE_SIZES).chain([AVX10, (0x1d, 0, Eax)]) {
            let mut poor = host.clone();
            // Not a bit that any model masks or that a host need not have.
            let bit = if word.0 == 0x1d || word == AVX10 { 1 } else { 1 << 16 };
            poor.change(word, |value| value & !bit);
            if guest.word(word) & bit != 0 {
                assert!(guest.check_runs_on(&poor).is_err(), "leaf {:#x}.{}", word.0, word.1);
            } else {
                panic!("the guest lacks what leaf {:#x}.{} is tried with", word.0, word.1);
            }
        }
        // Without tiles their sizes are nothing to a guest.
        let mut simple = guest.clone();
        simple.entries.retain(|e| !matches!(e.function, 0x1d | 0x1e | 0x24));
        let mut poor = host;
        poor.entries.retain(|e| !matches!(e.function, 0x1d | 0x1e | 0x24));
        simple.check_runs_on(&poor).unwrap();
        assert!(guest.check_runs_on(&poor).is_err());
    }

    #[test]
    fn a_table_with_what_is_always_masked_is_refused() {
        let host = CpuidTable { entries: everything() };
        let guest =
            CpuidTable::from_supported(everything(), CpuModel::Host, Virtualisation::Vmx, true).unwrap();
        for (word, bits) in MASKED {
            let mut foreign = guest.clone();
            foreign.change(word, |value| value | bits);
            let error = foreign.check_runs_on(&host).unwrap_err();
            assert!(
                matches!(&error, CpuidError::Masked(what) if what.contains(&format!("leaf {:#x}.", word.0))),
                "{error}"
            );
        }
    }

    #[test]
    fn ram_above_what_the_cpu_addresses_is_refused() {
        let mut table = CpuidTable { entries: everything() };
        table.check_reaches(u64::MAX >> 12).unwrap();
        for (told, bits) in [(39, 39), (0, 36)] {
            table.change(ADDRESS_BITS, |value| value & !0xff | told);
            table.check_reaches(1 << (bits - 12)).unwrap();
            let error = table.check_reaches((1 << (bits - 12)) + 1).unwrap_err().to_string();
            assert!(error.contains(&format!("{bits} bits")) && error.contains("lower"), "{error}");
        }
    }
}
