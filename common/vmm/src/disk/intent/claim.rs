//! What a log claims, and its bytes in the file: one slot.

use colo_common::limits::MAX_DISK_BYTES;
use colo_common::{BLOCK_SIZE, Epoch, Point, Term, VmId};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::EXTENT_BYTES;
use super::extents::{Extents, words_of};

const MAGIC: &[u8; 8] = b"COLOINTE";
/// Version of the file; another one is refused.
pub(super) const FORMAT: u32 = 1;

/// Bytes before the extents: magic, version u32, extent's bytes u32, sequence, disk's bytes, term and epoch u64 each,
/// length of the vm's name u8, name; and last the checksum of all other bytes of the slot. Numbers are little endian.
const HEADER: usize = 128;
const NAME: usize = 49;
const CHECKSUM: usize = HEADER - 8;
const _: () = assert!(NAME + colo_common::ids::MAX_NAME <= CHECKSUM);

/// A slot has whole blocks, so that writing one never touches the other.
const SLOT_UNIT: usize = BLOCK_SIZE;

/// Every block outside `extents` is in the image file as in the disk at `point`, which the secondary has acked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Whose disk it is.
    pub vm: VmId,
    /// An acked point. The same is true of each later one of the runner's history.
    pub point: Point,
    /// What may be anything.
    pub extents: Extents,
}

/// Why a slot has no claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BadSlot {
    /// It was not written to its end, or the device has lost bits.
    Torn,
    /// Whole, and of another version.
    Version(u32),
    /// Whole, and makes no sense.
    Nonsense(&'static str),
}

/// Bytes of a slot for a disk.
pub(super) fn slot_bytes(disk_bytes: u64) -> usize {
    (HEADER + words_of(disk_bytes) * 8).next_multiple_of(SLOT_UNIT)
}

/// Bytes of the longest slot.
pub(super) fn most_slot_bytes() -> usize {
    slot_bytes(MAX_DISK_BYTES)
}

impl Claim {
    /// The bytes of a slot.
    pub(super) fn encode(&self, sequence: u64) -> Vec<u8> {
        let mut slot = vec![0; slot_bytes(self.extents.disk_bytes())];
        let name = self.vm.as_str().as_bytes();
        slot[..8].copy_from_slice(MAGIC);
        slot[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        slot[12..16].copy_from_slice(&(EXTENT_BYTES as u32).to_le_bytes());
        let numbers = [sequence, self.extents.disk_bytes(), self.point.term.0, self.point.epoch.0];
        for (at, number) in (16..).step_by(8).zip(numbers) {
            slot[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        slot[NAME - 1] = name.len() as u8;
        slot[NAME..NAME + name.len()].copy_from_slice(name);
        for (bytes, word) in slot[HEADER..].as_chunks_mut::<8>().0.iter_mut().zip(self.extents.words()) {
            *bytes = word.to_le_bytes();
        }
        let sum = checksum(&slot);
        slot[CHECKSUM..HEADER].copy_from_slice(&sum.to_le_bytes());
        slot
    }

    /// The claim of a slot and its sequence. The bytes may be anything.
    pub(super) fn decode(slot: &[u8]) -> Result<(u64, Self), BadSlot> {
        if slot.len() < HEADER || slot.len() > most_slot_bytes() {
            return Err(BadSlot::Torn);
        }
        if &slot[..8] != MAGIC || number(slot, CHECKSUM) != checksum(slot) {
            return Err(BadSlot::Torn);
        }
        let version = number(slot, 8) as u32;
        if version != FORMAT {
            return Err(BadSlot::Version(version));
        }
        if number(slot, 8) >> 32 != EXTENT_BYTES {
            return Err(BadSlot::Nonsense("its extents have another size"));
        }
        let disk_bytes = number(slot, 24);
        let is_disk = disk_bytes > 0 && disk_bytes <= MAX_DISK_BYTES;
        if !is_disk || !disk_bytes.is_multiple_of(BLOCK_SIZE as u64) || slot_bytes(disk_bytes) != slot.len() {
            return Err(BadSlot::Nonsense("its length is not that of its disk"));
        }
        let name = slot[NAME..CHECKSUM].get(..usize::from(slot[NAME - 1]));
        let vm = name.and_then(|name| std::str::from_utf8(name).ok()?.parse().ok());
        let vm = vm.ok_or(BadSlot::Nonsense("it names no vm"))?;
        let words = slot[HEADER..].as_chunks::<8>().0.iter().take(words_of(disk_bytes));
        let words = words.map(|word| u64::from_le_bytes(*word)).collect();
        let beyond = BadSlot::Nonsense("it names what the disk does not have");
        let extents = Extents::from_words(disk_bytes, words).ok_or(beyond)?;
        let point = Point { term: Term(number(slot, 32)), epoch: Epoch(number(slot, 40)) };
        Ok((number(slot, 16), Self { vm, point, extents }))
    }
}

fn number(slot: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(slot[at..at + 8].try_into().expect("eight bytes"))
}

fn checksum(slot: &[u8]) -> u64 {
    xxh3_64_with_seed(&slot[HEADER..], xxh3_64(&slot[..CHECKSUM]))
}

#[cfg(test)]
mod tests {
    use super::{BadSlot, CHECKSUM, Claim, HEADER, checksum, slot_bytes};
    use crate::disk::intent::EXTENT_BYTES;
    use crate::disk::intent::extents::{Extents, count_of};
    use colo_common::history::point;
    use colo_common::limits::MAX_DISK_BYTES;
    use proptest::prelude::{ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, proptest};

    fn claim() -> impl Strategy<Value = Claim> {
        let numbers = (1..3000_u64, any::<u64>(), any::<u64>(), "[a-z0-9][a-z0-9_.-]{0,63}");
        (numbers, proptest::collection::vec(any::<u64>(), 0..20)).prop_map(|(numbers, named)| {
            let (blocks, term, epoch, vm) = numbers;
            let mut extents = Extents::none(blocks * 4096);
            named.iter().for_each(|extent| extents.insert(extent % count_of(blocks * 4096)));
            Claim { vm: vm.parse().unwrap(), point: point(term, epoch), extents }
        })
    }

    fn seal(slot: &mut [u8]) {
        let sum = checksum(slot);
        slot[CHECKSUM..HEADER].copy_from_slice(&sum.to_le_bytes());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2048))]
        #[test]
        fn a_claim_comes_back_and_one_with_a_bit_flipped_does_not(claim in claim(), seq in any::<u64>(), at in any::<usize>()) {
            let mut slot = claim.encode(seq);
            prop_assert_eq!(Claim::decode(&slot).unwrap(), (seq, claim));
            let bit = at % (slot.len() * 8);
            slot[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Claim::decode(&slot).unwrap_err(), BadSlot::Torn);
        }

        #[test]
        fn any_bytes_are_a_claim_or_refused(bytes in any::<Vec<u8>>(), claim in claim(), edits in proptest::collection::vec((0..HEADER + 64, any::<u8>()), 0..9), cut in any::<usize>()) {
            let _ = Claim::decode(&bytes);
            // As far as the checksum lets them in.
            let mut slot = claim.encode(1);
            edits.iter().for_each(|(at, byte)| slot[*at] = *byte);
            if cut.is_multiple_of(3) {
                slot.truncate(HEADER + cut % (slot.len() - HEADER));
            }
            seal(&mut slot);
            if let Ok((sequence, decoded)) = Claim::decode(&slot) {
                let (_, again) = Claim::decode(&decoded.encode(sequence)).unwrap();
                prop_assert!(again == decoded && decoded.extents.runs().all(|run| run.end.offset() <= decoded.extents.disk_bytes()));
            }
        }
    }

    #[test]
    fn the_largest_disk_has_its_place_and_versions_to_come_are_told_apart() {
        let mut extents = Extents::none(MAX_DISK_BYTES);
        extents.insert(MAX_DISK_BYTES / EXTENT_BYTES - 1);
        let claim = Claim { vm: "web".parse().unwrap(), point: point(1, 2), extents };
        let mut slot = claim.encode(9);
        assert_eq!(slot.len(), slot_bytes(MAX_DISK_BYTES));
        assert_eq!(Claim::decode(&slot).unwrap(), (9, claim));
        slot[8] = 2;
        seal(&mut slot);
        assert_eq!(Claim::decode(&slot).unwrap_err(), BadSlot::Version(2));
    }

    #[test]
    fn the_bytes_of_version_1_stay_as_they_are() {
        let mut extents = Extents::none(3 << 20);
        extents.insert(2);
        let claim = Claim { vm: "web".parse().unwrap(), point: point(3, 77), extents };
        let slot = claim.encode(5);
        assert_eq!((slot.len(), xxhash_rust::xxh3::xxh3_64(&slot)), (4096, GOLDEN));
        assert_eq!(slot[HEADER], 4);
    }

    const GOLDEN: u64 = 1489993228690275610;
}
