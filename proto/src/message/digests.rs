//! Digests of pages, for a resync where histories do not tell what differs. The primary asks for a range of frames, the
//! secondary answers with what its copy holds there, in one or more messages that follow each other without a gap.

use colo_common::Gfn;
use colo_common::limits::MAX_GUEST_MEMORY;
use serde::{Deserialize, Deserializer, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::{Message, MessageError, bounded, check_range};
use crate::frame::Kind;
use crate::pages::Page;

/// Digests in one message: 64 KiB of them, for 16 MiB of memory.
pub const MAX_DIGESTS: usize = 4096;

/// Ranges in one message. Scattered zero pages make more ranges; a message ends earlier then.
pub const MAX_DIGEST_RANGES: usize = 1024;

/// No frame lies at or beyond it: the largest guest with any hole in its address map.
const MAX_GFN: u64 = 2 * MAX_GUEST_MEMORY / colo_common::PAGE_SIZE as u64;

/// XXH3-128 of a page. Not safe against who chooses the pages; but that is the guest, and the memory is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageDigest([u8; 16]);

impl PageDigest {
    /// The digest of this page.
    pub fn of(page: &Page) -> Self {
        Self(xxh3_128(page).to_le_bytes())
    }
}

/// Asks what the secondary's copy holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestRequest {
    /// The first frame.
    pub first: Gfn,
    /// How many frames, holes of the address map among them.
    pub frames: u64,
}

impl Message for DigestRequest {
    const KIND: Kind = Kind::DigestRequest;

    fn check(&self) -> Result<(), MessageError> {
        check_range(Self::KIND, "so many frames:", self.frames, 1, MAX_GFN)?;
        check_range(Self::KIND, "a first frame of", self.first.0, 0, MAX_GFN - self.frames)
    }
}

/// What the copy holds in frames that lie side by side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DigestRange {
    /// Zero pages, or no memory at all.
    Zero {
        /// How many frames.
        frames: u64,
    },
    /// A digest for each page.
    Pages(#[serde(deserialize_with = "page_digests")] Vec<PageDigest>),
}

fn page_digests<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PageDigest>, D::Error> {
    bounded::list::<D, PageDigest, MAX_DIGESTS>(deserializer)
}

impl DigestRange {
    /// Frames that it tells of.
    pub fn frames(&self) -> u64 {
        match self {
            Self::Zero { frames } => *frames,
            Self::Pages(digests) => digests.len() as u64,
        }
    }
}

/// Digests for the frames from `first` on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeDigests {
    /// The first frame.
    pub first: Gfn,
    /// Ranges that follow each other without a gap.
    #[serde(deserialize_with = "ranges")]
    pub ranges: Vec<DigestRange>,
}

fn ranges<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DigestRange>, D::Error> {
    bounded::list::<D, DigestRange, MAX_DIGEST_RANGES>(deserializer)
}

impl RangeDigests {
    /// The frame after the last that it tells of. Checked when it came, so it does not overflow.
    pub fn end(&self) -> Gfn {
        Gfn(self.ranges.iter().fold(self.first.0, |at, range| at.saturating_add(range.frames())))
    }
}

impl Message for RangeDigests {
    const KIND: Kind = Kind::RangeDigests;

    fn check(&self) -> Result<(), MessageError> {
        check_range(Self::KIND, "a first frame of", self.first.0, 0, MAX_GFN)?;
        let (mut at, mut digests) = (self.first.0, 0);
        for range in &self.ranges {
            check_range(Self::KIND, "a range of so many frames:", range.frames(), 1, MAX_GFN - at)?;
            at += range.frames();
            if let DigestRange::Pages(pages) = range {
                digests += pages.len();
            }
        }
        check_range(Self::KIND, "so many digests:", digests as u64, 0, MAX_DIGESTS as u64)?;
        check_range(Self::KIND, "so many ranges:", self.ranges.len() as u64, 1, MAX_DIGEST_RANGES as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        DigestRange, DigestRequest, MAX_DIGEST_RANGES, MAX_DIGESTS, MAX_GFN, Message, PageDigest,
        RangeDigests,
    };
    use colo_common::{Gfn, PAGE_SIZE};

    fn pages(count: usize) -> DigestRange {
        DigestRange::Pages(vec![PageDigest::of(&[7; PAGE_SIZE]); count])
    }

    fn refused(first: u64, ranges: Vec<DigestRange>) -> String {
        let message = RangeDigests { first: Gfn(first), ranges };
        RangeDigests::decode(&postcard::to_stdvec(&message).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn the_fullest_message_fits_its_frame() {
        let zero = DigestRange::Zero { frames: 1 << 17 };
        let mut ranges: Vec<_> = (1..MAX_DIGEST_RANGES / 2).flat_map(|_| [pages(1), zero.clone()]).collect();
        ranges.extend([pages(MAX_DIGESTS - MAX_DIGEST_RANGES / 2 + 1), zero]);
        let full = RangeDigests { first: Gfn(1), ranges };
        assert_eq!(RangeDigests::decode(&full.encode()), Ok(full.clone()));
        let frames: u64 = full.ranges.iter().map(DigestRange::frames).sum();
        assert_eq!(full.end(), Gfn(1 + frames));
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        let zero = |frames| DigestRange::Zero { frames };
        for (first, ranges, what) in [
            (0, vec![], "so many ranges: 0"),
            (0, vec![zero(0)], "a range of so many frames: 0"),
            (0, vec![pages(1), pages(0)], "a range of so many frames: 0"),
            (u64::MAX, vec![zero(1)], "a first frame of 18446744073709551615"),
            (1, vec![zero(u64::MAX)], "a range of so many frames: 18446744073709551615"),
            (MAX_GFN - 1, vec![pages(1), zero(1)], "not between 1 and 0"),
            (0, vec![pages(MAX_DIGESTS), pages(1)], "so many digests: 4097"),
        ] {
            let error = refused(first, ranges);
            assert!(error.contains(what), "{error}");
        }
        assert!(refused(0, vec![pages(MAX_DIGESTS + 1)]).contains("cannot be read"));
        for (first, frames) in [(0, 0), (u64::MAX, 1), (1, MAX_GFN), (0, u64::MAX)] {
            let request = DigestRequest { first: Gfn(first), frames };
            assert!(DigestRequest::decode(&postcard::to_stdvec(&request).unwrap()).is_err(), "{request:?}");
        }
    }
}
