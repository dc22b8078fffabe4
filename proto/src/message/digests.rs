//! Digests of pages and of blocks of the disk, for a copy where histories do not tell what differs. The primary asks for a
//! range, the secondary answers with what its copy holds there, in one or more messages that follow each other without
//! a gap.

use colo_common::limits::{MAX_DIGESTS_ASKED, MAX_DISK_BYTES, MAX_GUEST_MEMORY};
use colo_common::{BLOCK_SIZE, Block, Gfn, PAGE_SIZE};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::{Message, MessageError, bounded, check_range};
use crate::frame::Kind;
use crate::pages::{Page, Place};

/// Digests in one message: 64 KiB of them, for 16 MiB of memory or disk.
pub const MAX_DIGESTS: usize = 4096;

/// Ranges in one message. Scattered zero pages make more ranges; a message ends earlier then.
pub const MAX_DIGEST_RANGES: usize = 1024;

/// What can be compared by digests, and the kinds of the messages for that.
pub trait Compared: Place + Serialize + DeserializeOwned {
    /// Asks.
    const REQUEST: Kind;
    /// Answers.
    const ANSWER: Kind;
    /// None has this number or a higher one.
    const END: u64;
}

impl Compared for Gfn {
    const REQUEST: Kind = Kind::DigestRequest;
    const ANSWER: Kind = Kind::RangeDigests;
    /// The largest guest with any hole in its address map.
    const END: u64 = 2 * MAX_GUEST_MEMORY / PAGE_SIZE as u64;
}

impl Compared for Block {
    const REQUEST: Kind = Kind::BlockDigestRequest;
    const ANSWER: Kind = Kind::BlockDigests;
    const END: u64 = MAX_DISK_BYTES / BLOCK_SIZE as u64;
}

/// XXH3-128 of a page or block. Not safe against who chooses them; but that is the guest, and they are its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageDigest([u8; 16]);

impl PageDigest {
    /// The digest of this page or block.
    pub fn of(page: &Page) -> Self {
        Self(xxh3_128(page).to_le_bytes())
    }
}

/// Asks what the secondary's copy holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestRequest<N = Gfn> {
    /// The first page or block.
    pub first: N,
    /// How many, holes of the address map among them; [`MAX_DIGESTS_ASKED`] at most.
    pub count: u64,
}

const _: () = assert!(MAX_DIGESTS_ASKED <= Gfn::END && MAX_DIGESTS_ASKED <= Block::END);

/// Asks what the secondary's copy of the disk holds.
pub type BlockDigestRequest = DigestRequest<Block>;

impl<N: Compared> Message for DigestRequest<N> {
    const KIND: Kind = N::REQUEST;

    fn check(&self) -> Result<(), MessageError> {
        check_range(Self::KIND, "a range of so many:", self.count, 1, MAX_DIGESTS_ASKED)?;
        check_range(Self::KIND, "a first number of", self.first.number(), 0, N::END - self.count)
    }
}

/// What the copy holds in pages or blocks that lie side by side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DigestRange {
    /// Zeros, or no memory at all.
    Zero {
        /// How many pages or blocks.
        count: u64,
    },
    /// A digest for each.
    Each(#[serde(deserialize_with = "page_digests")] Vec<PageDigest>),
}

fn page_digests<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PageDigest>, D::Error> {
    bounded::list::<D, PageDigest, MAX_DIGESTS>(deserializer)
}

impl DigestRange {
    /// How many pages or blocks it tells of.
    pub fn count(&self) -> u64 {
        match self {
            Self::Zero { count } => *count,
            Self::Each(digests) => digests.len() as u64,
        }
    }
}

/// Digests for the pages or blocks from `first` on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeDigests<N = Gfn> {
    /// The first.
    pub first: N,
    /// Ranges that follow each other without a gap.
    #[serde(deserialize_with = "ranges")]
    pub ranges: Vec<DigestRange>,
}

/// Digests for blocks of the disk.
pub type BlockDigests = RangeDigests<Block>;

fn ranges<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DigestRange>, D::Error> {
    bounded::list::<D, DigestRange, MAX_DIGEST_RANGES>(deserializer)
}

impl<N: Place> RangeDigests<N> {
    /// The one after the last that it tells of. Checked when it came, so it does not overflow.
    pub fn end(&self) -> N {
        let counts = self.ranges.iter().map(DigestRange::count);
        N::at(counts.fold(self.first.number(), u64::saturating_add))
    }
}

impl<N: Compared> Message for RangeDigests<N> {
    const KIND: Kind = N::ANSWER;

    fn check(&self) -> Result<(), MessageError> {
        check_range(Self::KIND, "a first number of", self.first.number(), 0, N::END)?;
        let (mut at, mut digests) = (self.first.number(), 0);
        for range in &self.ranges {
            check_range(Self::KIND, "a range of so many:", range.count(), 1, N::END - at)?;
            at += range.count();
            if let DigestRange::Each(each) = range {
                digests += each.len();
            }
        }
        check_range(Self::KIND, "so many digests:", digests as u64, 0, MAX_DIGESTS as u64)?;
        check_range(Self::KIND, "so many ranges:", self.ranges.len() as u64, 1, MAX_DIGEST_RANGES as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Compared, DigestRange, DigestRequest, MAX_DIGEST_RANGES, MAX_DIGESTS, MAX_DIGESTS_ASKED, Message,
        PageDigest, RangeDigests,
    };
    use colo_common::{Block, Gfn, PAGE_SIZE};

    fn pages(count: usize) -> DigestRange {
        DigestRange::Each(vec![PageDigest::of(&[7; PAGE_SIZE]); count])
    }

    fn refused(first: u64, ranges: Vec<DigestRange>) -> String {
        let message = RangeDigests { first: Gfn(first), ranges };
        RangeDigests::<Gfn>::decode(&postcard::to_stdvec(&message).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn the_fullest_message_fits_its_frame() {
        let zero = DigestRange::Zero { count: 1 << 17 };
        let mut ranges: Vec<_> = (1..MAX_DIGEST_RANGES / 2).flat_map(|_| [pages(1), zero.clone()]).collect();
        ranges.extend([pages(MAX_DIGESTS - MAX_DIGEST_RANGES / 2 + 1), zero]);
        let full = RangeDigests { first: Gfn(1), ranges };
        assert_eq!(RangeDigests::decode(&full.encode()), Ok(full.clone()));
        let frames: u64 = full.ranges.iter().map(DigestRange::count).sum();
        assert_eq!(full.end(), Gfn(1 + frames));
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        let zero = |count| DigestRange::Zero { count };
        for (first, ranges, what) in [
            (0, vec![], "so many ranges: 0"),
            (0, vec![zero(0)], "a range of so many: 0"),
            (0, vec![pages(1), pages(0)], "a range of so many: 0"),
            (u64::MAX, vec![zero(1)], "a first number of 18446744073709551615"),
            (1, vec![zero(u64::MAX)], "a range of so many: 18446744073709551615"),
            (Gfn::END - 1, vec![pages(1), zero(1)], "not between 1 and 0"),
            (0, vec![pages(MAX_DIGESTS), pages(1)], "so many digests: 4097"),
        ] {
            let error = refused(first, ranges);
            assert!(error.contains(what), "{error}");
        }
        assert!(refused(0, vec![pages(MAX_DIGESTS + 1)]).contains("cannot be read"));
        for (first, count) in [(0, 0), (u64::MAX, 1), (1, Gfn::END), (0, u64::MAX)] {
            let request = DigestRequest { first: Gfn(first), count };
            assert!(
                DigestRequest::<Gfn>::decode(&postcard::to_stdvec(&request).unwrap()).is_err(),
                "{request:?}"
            );
        }
    }

    #[test]
    fn nobody_is_asked_to_read_more_at_one_go_than_the_limit() {
        let request = |count| DigestRequest { first: Gfn(0), count };
        let most = request(MAX_DIGESTS_ASKED);
        assert_eq!(DigestRequest::decode(&most.encode()), Ok(most));
        let beyond = postcard::to_stdvec(&request(MAX_DIGESTS_ASKED + 1)).unwrap();
        let error = DigestRequest::<Gfn>::decode(&beyond).unwrap_err().to_string();
        assert!(error.contains("a range of so many: 65537") && error.contains("65536"), "{error}");
    }

    #[test]
    fn blocks_beyond_the_largest_disk_are_refused() {
        let last = Block::END - 1;
        let ranges = vec![DigestRange::Zero { count: 1 }];
        let good = RangeDigests { first: Block(last), ranges: ranges.clone() };
        assert_eq!(RangeDigests::decode(&good.encode()), Ok(good));
        let beyond = RangeDigests { first: Block(Block::END), ranges };
        assert!(RangeDigests::<Block>::decode(&postcard::to_stdvec(&beyond).unwrap()).is_err());
        let request = DigestRequest { first: Block(last), count: 2 };
        assert!(DigestRequest::<Block>::decode(&postcard::to_stdvec(&request).unwrap()).is_err());
    }
}
