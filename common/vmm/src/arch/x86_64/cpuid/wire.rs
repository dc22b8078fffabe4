//! How a CPUID table travels between nodes: one entry after the other, each as seven numbers of 32 bits, little endian:
//! leaf, subleaf, flags of KVM, EAX, EBX, ECX, EDX.

use colo_common::limits::MAX_CPUID_ENTRIES;
use kvm_bindings::kvm_cpuid_entry2;

use super::{CpuidError, CpuidTable};

/// Bytes of one entry.
pub const ENTRY_BYTES: usize = 28;

impl CpuidTable {
    /// The bytes to send: [`ENTRY_BYTES`] for each entry.
    pub fn encode(&self) -> Vec<u8> {
        let words = |e: &kvm_cpuid_entry2| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx];
        self.entries.iter().flat_map(words).flat_map(u32::to_le_bytes).collect()
    }

    /// Reads what a peer sent.
    ///
    /// # Errors
    /// The bytes are not 1 to [`MAX_CPUID_ENTRIES`] entries.
    pub fn decode(bytes: &[u8]) -> Result<Self, CpuidError> {
        let (entries, rest) = bytes.as_chunks::<ENTRY_BYTES>();
        if !rest.is_empty() || !(1..=MAX_CPUID_ENTRIES).contains(&entries.len()) {
            return Err(CpuidError::Malformed(bytes.len()));
        }
        let entry = |bytes: &[u8; ENTRY_BYTES]| {
            let mut words = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
            let mut next = || words.next().unwrap_or_default();
            kvm_cpuid_entry2 {
                function: next(),
                index: next(),
                flags: next(),
                eax: next(),
                ebx: next(),
                ecx: next(),
                edx: next(),
                ..Default::default()
            }
        };
        Ok(Self { entries: entries.iter().map(entry).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::everything;
    use super::{CpuidTable, ENTRY_BYTES};
    use colo_common::limits::MAX_CPUID_ENTRIES;
    use kvm_bindings::kvm_cpuid_entry2;
    use proptest::prelude::{any, prop_assert_eq, proptest};

    /// Two builds of one version must read each other.
    #[test]
    fn the_bytes_of_an_entry_stay() {
        let entry = kvm_cpuid_entry2 {
            function: 7,
            index: 1,
            flags: 2,
            eax: 0x0403_0201,
            ebx: 3,
            ecx: 4,
            edx: 0xffff_ffff,
            ..Default::default()
        };
        let table = CpuidTable { entries: vec![entry] };
        let golden = [7, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 1, 2, 3, 4, 3, 0, 0, 0, 4, 0, 0, 0];
        assert_eq!(table.encode(), [&golden[..], &[0xff; 4]].concat());
        assert_eq!(CpuidTable::decode(&table.encode()).unwrap(), table);
    }

    #[test]
    fn a_table_of_another_length_is_refused() {
        let good = CpuidTable { entries: everything() }.encode();
        CpuidTable::decode(&good).unwrap();
        for bad in [&good[..0], &good[1..], &vec![0; ENTRY_BYTES * (MAX_CPUID_ENTRIES + 1)]] {
            let error = CpuidTable::decode(bad).unwrap_err().to_string();
            assert!(
                error.contains(&format!("{} bytes", bad.len())) && error.contains("same version"),
                "{error}"
            );
        }
    }

    proptest! {
        /// Whatever a peer sends: it is refused, or taken as it is, and can be judged.
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), entries in 0..20_usize) {
            let host = CpuidTable { entries: everything() };
            let whole = &bytes[..bytes.len().min(entries * ENTRY_BYTES)];
            for bytes in [&bytes, whole] {
                if let Ok(table) = CpuidTable::decode(bytes) {
                    prop_assert_eq!(table.encode(), bytes);
                    let _ = table.check_runs_on(&host).map_err(|e| e.to_string());
                    let _ = table.check_reaches(1 << 40).map_err(|e| e.to_string());
                }
            }
        }

        /// A table of a guest with some bytes changed has words that are looked at.
        #[test]
        fn no_changed_table_panics(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..16),
        ) {
            let host = CpuidTable { entries: everything() };
            let mut bytes = host.encode();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let table = CpuidTable::decode(&bytes).unwrap();
            prop_assert_eq!(table.encode(), bytes);
            let _ = table.check_runs_on(&host).map_err(|e| e.to_string());
            let _ = host.check_runs_on(&table).map_err(|e| e.to_string());
        }
    }
}
