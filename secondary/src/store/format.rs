//! Format version 2 of the store: its keys and values. Everything read back is checked before it is believed.
//!
//! | column | key | value |
//! |---|---|---|
//! | `meta` | `state` | version u32 LE, XXH3-64 over version and body, body: [`Meta`] in postcard |
//! | `epochs` | term, epoch (u64 BE), 0 | the same frame around an [`EpochRecord`] |
//! | `epochs` | term, epoch (u64 BE), 1 | the machine state as it came; its checksum is in the record |
//! | `pages` | gfn (u64 BE) | encoding (1 byte), XXH3-64 of the bytes seeded with the gfn, bytes; zero pages have no key |
//! | `disk` | block (u64 BE) | as a page, seeded with the block; encoding 1 and no bytes: the block is zero |
//! | `pending` | term, epoch, kind (0 page, 1 block), number | as in `pages` and `disk`; empty: a zero page. Under epoch 0: what a promotion to this term brought |
//!
//! Versions: 1, the first. 2: `meta` has the bytes of the guest's disk; blocks are of 4096 bytes, and none is deleted by
//! a mark; a node that runs the guest may have blocks in `pending`.

use colo_common::{Block, Epoch, Gfn, History, PAGE_SIZE, Point, ReplicaId, Term, VmId};
use colo_vmm::memory::Page;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

/// Version that this build writes and reads.
pub const FORMAT_VERSION: u32 = 2;

/// The one key of `meta`.
pub(super) const META_KEY: &[u8] = b"state";

const RAW: u8 = 0;
/// Of a block of zeroes: it has no bytes. A page of zeroes has no key.
const ZERO: u8 = 1;
const VALUE_HEADER: usize = 1 + 8;
const FRAME_HEADER: usize = 4 + 8;

/// What the store is and what it holds; small, and changed as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    pub(super) vm: VmId,
    pub(super) spec: Option<u64>,
    /// The newest term of the register that this node has seen.
    pub(super) term: Option<Term>,
    /// This node ran the guest in this term, and nobody's copy has replaced it since.
    pub(super) active: Option<Term>,
    pub(super) copy: MetaCopy,
    /// The point of the copy that is kept aside.
    pub(super) previous: Option<Point>,
    /// Bytes of the disk that `disk` is an overlay of.
    pub(super) disk: Option<u64>,
}

/// The copy in `pages`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum MetaCopy {
    None,
    Inconsistent,
    Whole(MetaWhole),
}

/// A whole copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MetaWhole {
    pub(super) point: Point,
    pub(super) replica: Option<ReplicaId>,
    /// `pending` under this point belongs to the copy and goes before `pages` and `disk`.
    pub(super) adopted: bool,
    pub(super) history: Vec<Point>,
}

/// What is known of a persisted point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EpochRecord {
    /// Pages that are not zero.
    pub(super) pages: u64,
    /// Sum of their checksums.
    pub(super) digest: u64,
    pub(super) state_bytes: u64,
    pub(super) state_checksum: u64,
    /// When it was persisted, in milliseconds since 1970.
    pub(super) unix_ms: u64,
}

/// Bytes that do not decode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FrameError {
    Version(u32),
    Malformed(&'static str),
}

impl Meta {
    pub(super) fn new(vm: VmId) -> Self {
        Self { vm, spec: None, term: None, active: None, copy: MetaCopy::None, previous: None, disk: None }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        frame(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let meta: Self = unframe(bytes)?;
        if let MetaCopy::Whole(whole) = &meta.copy {
            // The history is a peer's word that went through a disk.
            let history = History::from_points(whole.history.clone());
            history.map_err(|_| FrameError::Malformed("a history that goes back"))?;
        }
        Ok(meta)
    }
}

impl EpochRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        frame(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        unframe(bytes)
    }
}

fn frame<T: Serialize>(body: &T) -> Vec<u8> {
    let body = postcard::to_stdvec(body).expect("the store's own records can be encoded");
    let mut bytes = Vec::with_capacity(FRAME_HEADER + body.len());
    bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&frame_checksum(FORMAT_VERSION, &body).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

fn unframe<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, FrameError> {
    let Some((version, rest)) = bytes.split_first_chunk::<4>() else {
        return Err(FrameError::Malformed("a record that is cut short"));
    };
    let Some((checksum, body)) = rest.split_first_chunk::<8>() else {
        return Err(FrameError::Malformed("a record that is cut short"));
    };
    let version = u32::from_le_bytes(*version);
    if frame_checksum(version, body) != u64::from_le_bytes(*checksum) {
        return Err(FrameError::Malformed("a record's checksum"));
    }
    if version != FORMAT_VERSION {
        return Err(FrameError::Version(version));
    }
    match postcard::take_from_bytes(body) {
        Ok((record, [])) => Ok(record),
        Ok(_) => Err(FrameError::Malformed("a record with bytes after it")),
        Err(_) => Err(FrameError::Malformed("a record that does not decode")),
    }
}

fn frame_checksum(version: u32, body: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&version.to_le_bytes());
    hash.update(body);
    hash.digest()
}

/// The checksum of a page or block of this number; never zero, which stands for an absent one.
pub(super) fn checksum(number: u64, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, number).max(1)
}

/// A page as it is stored.
pub(super) fn encode_value(checksum: u64, bytes: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(VALUE_HEADER + bytes.len());
    value.push(RAW);
    value.extend_from_slice(&checksum.to_le_bytes());
    value.extend_from_slice(bytes);
    value
}

/// The bytes of a stored page and their checksum, if they are what was written.
fn decode_value(number: u64, value: &[u8]) -> Option<(&[u8], u64)> {
    let (&encoding, rest) = value.split_first()?;
    let (stored, bytes) = rest.split_first_chunk::<8>()?;
    let stored = u64::from_le_bytes(*stored);
    (encoding == RAW && checksum(number, bytes) == stored).then_some((bytes, stored))
}

/// The bytes of a stored page.
pub(super) fn decode_page(gfn: Gfn, value: &[u8]) -> Option<(&Page, u64)> {
    let (bytes, checksum) = decode_value(gfn.0, value)?;
    Some((bytes.first_chunk::<PAGE_SIZE>().filter(|_| bytes.len() == PAGE_SIZE)?, checksum))
}

/// A block as it is stored; none for zeroes.
pub(super) fn encode_block(block: Block, page: Option<&Page>) -> Vec<u8> {
    let bytes = page.map_or(&[] as &[u8], |page| page);
    let mut value = encode_value(checksum(block.0, bytes), bytes);
    value[0] = if page.is_some() { RAW } else { ZERO };
    value
}

/// What a stored block holds, none for zeroes; nothing if it is not what was written.
pub(crate) fn decode_block(block: Block, value: &[u8]) -> Option<Option<&Page>> {
    let (&encoding, rest) = value.split_first()?;
    let (stored, bytes) = rest.split_first_chunk::<8>()?;
    let right = checksum(block.0, bytes) == u64::from_le_bytes(*stored);
    match (encoding, bytes.len()) {
        (RAW, PAGE_SIZE) if right => bytes.first_chunk().map(Some),
        (ZERO, 0) if right => Some(None),
        _ => None,
    }
}

/// The key of a page or block.
pub(crate) fn number_key(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

/// The page or block of a key.
pub(crate) fn decode_number(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.try_into().ok()?))
}

/// Which of an epoch's two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EpochPart {
    Record = 0,
    State = 1,
}

/// The key of a part of a point.
pub(super) fn epoch_key(point: Point, part: EpochPart) -> Vec<u8> {
    let mut key = point_prefix(point).to_vec();
    key.push(part as u8);
    key
}

/// What an entry of `pending` is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Page = 0,
    Block = 1,
}

const PENDING_KEY: usize = 16 + 1 + 8;

/// The key of a page or block in `pending`.
pub(crate) fn pending_key(point: Point, kind: Kind, number: u64) -> [u8; PENDING_KEY] {
    let mut key = [0; PENDING_KEY];
    key[..16].copy_from_slice(&point_prefix(point));
    key[16] = kind as u8;
    key[17..].copy_from_slice(&number_key(number));
    key
}

/// Where a promotion puts the blocks that are too many for its batch: after every point that this node held before, and no
/// point itself, for a term's first epoch is 1 or a later one.
pub(super) fn promotion_point(term: Term) -> Point {
    Point { term, epoch: Epoch(0) }
}

/// What a key of `pending` says.
pub(super) fn decode_pending_key(key: &[u8]) -> Option<(Point, Kind, u64)> {
    let key: &[u8; PENDING_KEY] = key.try_into().ok()?;
    let number = |at: usize| decode_number(&key[at..at + 8]);
    let kind = match key[16] {
        0 => Kind::Page,
        1 => Kind::Block,
        _ => return None,
    };
    Some((Point { term: Term(number(0)?), epoch: Epoch(number(8)?) }, kind, number(17)?))
}

fn point_prefix(point: Point) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&point.term.0.to_be_bytes());
    key[8..].copy_from_slice(&point.epoch.0.to_be_bytes());
    key
}

#[cfg(test)]
mod tests {
    use super::{
        EpochRecord, FORMAT_VERSION, FrameError, Kind, Meta, MetaCopy, MetaWhole, checksum, decode_block,
        decode_page, decode_pending_key, decode_value, encode_block, encode_value, frame_checksum,
        pending_key,
    };
    use colo_common::history::point;
    use colo_common::{Block, Gfn, PAGE_SIZE, ReplicaId, Term};
    use proptest::prelude::*;

    fn meta() -> Meta {
        let mut meta = Meta::new("web-1".parse().unwrap());
        (meta.term, meta.disk) = (Some(Term(3)), Some(4096));
        meta.copy = MetaCopy::Whole(MetaWhole {
            point: point(3, 9),
            replica: Some(ReplicaId(7)),
            adopted: true,
            history: vec![point(1, 4), point(3, 9)],
        });
        meta
    }

    /// These bytes are on disks: they change only with the version.
    #[test]
    fn golden_bytes_of_version_2() {
        let bytes = meta().encode();
        assert_eq!(bytes[..4], 2_u32.to_le_bytes());
        assert_eq!(
            bytes[12..],
            [5, b'w', b'e', b'b', b'-', b'1', 0, 1, 3, 0, 2, 3, 9, 1, 7, 1, 2, 1, 4, 3, 9, 0, 1, 0x80, 0x20]
        );
        assert_eq!(Meta::decode(&bytes), Ok(meta()));
        let key = pending_key(point(1, 2), Kind::Block, 3);
        assert_eq!(key, [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!(encode_value(0x0102, b"ab"), [0, 2, 1, 0, 0, 0, 0, 0, 0, b'a', b'b']);
        let zero = encode_block(Block(3), None);
        assert_eq!(zero[..], [&[1][..], &checksum(3, &[]).to_le_bytes()].concat());
    }

    #[test]
    fn another_version_is_told_from_damage() {
        let body = &meta().encode()[12..];
        for version in [1, FORMAT_VERSION + 1] {
            // Version 1 had no disk at the end.
            let body = if version == 1 { &body[..body.len() - 3] } else { body };
            let mut bytes = version.to_le_bytes().to_vec();
            bytes.extend_from_slice(&frame_checksum(version, body).to_le_bytes());
            bytes.extend_from_slice(body);
            assert_eq!(Meta::decode(&bytes), Err(FrameError::Version(version)));
            bytes[0] = FORMAT_VERSION as u8;
            assert!(matches!(Meta::decode(&bytes), Err(FrameError::Malformed(_))));
        }
    }

    #[test]
    fn a_page_or_block_is_bound_to_its_number() {
        let page = [7; PAGE_SIZE];
        let value = encode_value(checksum(5, &page), &page);
        assert_eq!(decode_page(Gfn(5), &value).map(|(page, _)| *page), Some(page));
        assert_eq!(decode_page(Gfn(6), &value), None);
        assert_eq!(decode_page(Gfn(5), &value[..value.len() - 1]), None);
        for content in [Some(&page), None] {
            let mut value = encode_block(Block(5), content);
            assert_eq!(decode_block(Block(5), &value), Some(content));
            assert_eq!(decode_block(Block(6), &value), None);
            value[0] ^= 1;
            assert_eq!(decode_block(Block(5), &value), None);
        }
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_found(number: u64, bytes: Vec<u8>, at: prop::sample::Index, bit in 0_u8..8) {
            let mut value = encode_value(checksum(number, &bytes), &bytes);
            let at = at.index(value.len());
            value[at] ^= 1 << bit;
            prop_assert_eq!(decode_value(number, &value), None);
            let mut record = meta().encode();
            let at = at % record.len();
            record[at] ^= 1 << bit;
            prop_assert!(Meta::decode(&record).is_err());
        }

        #[test]
        fn no_bytes_are_too_strange(bytes: Vec<u8>) {
            let _ = Meta::decode(&bytes);
            let _ = EpochRecord::decode(&bytes);
            let _ = decode_pending_key(&bytes);
            prop_assert_eq!(decode_page(Gfn(0), &bytes), None);
            prop_assert_eq!(decode_block(Block(0), &bytes), None);
        }

        #[test]
        fn pending_keys_round_trip_in_order(a: (u64, u64, bool, u64), b: (u64, u64, bool, u64)) {
            let key = |(t, e, block, n): (u64, u64, bool, u64)| {
                let kind = if block { Kind::Block } else { Kind::Page };
                (pending_key(point(t, e), kind, n), (point(t, e), kind, n))
            };
            prop_assert_eq!(decode_pending_key(&key(a).0), Some(key(a).1));
            prop_assert_eq!(key(a).0.cmp(&key(b).0), a.cmp(&b));
        }
    }
}
