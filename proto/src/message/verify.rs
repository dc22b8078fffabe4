//! Comparing a copy with the guest while epochs go on: right behind an epoch the runner says what pages or blocks hold
//! at its point, and the secondary answers whether its copy holds the same there.

use colo_common::{Block, Gfn, Point};
use serde::{Deserialize, Deserializer, Serialize};

use super::{Compared, Message, MessageError, PageDigest, bounded, check_range};
use crate::frame::Kind;

/// Digests in one message: 16 MiB of memory or disk, so that whoever compares is soon ready for the next epoch.
pub const MAX_VERIFY_DIGESTS: usize = 4096;

/// Ranges in one message. Scattered holes, and pages that were written meanwhile, make more ranges.
pub const MAX_VERIFY_RANGES: usize = 2048;

/// Places that an answer names; what more differs is only counted.
pub const MAX_DIFFERING_NAMED: usize = 16;

/// Bytes of a message with what pages hold: the digests, and for each range its tag and number.
pub const MAX_VERIFY_BODY: usize = MAX_VERIFY_DIGESTS * 16 + MAX_VERIFY_RANGES * 16 + 64;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum VerifyPart {
    /// Guest memory: numbers are of frames.
    Memory,
    /// The guest's disk: numbers are of blocks.
    Disk,
}

impl VerifyPart {
    /// None of it has this number or a higher one.
    pub const fn end(self) -> u64 {
        match self {
            Self::Memory => <Gfn as Compared>::END,
            Self::Disk => <Block as Compared>::END,
        }
    }
}

/// What pages or blocks that lie side by side hold at the point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VerifyRange {
    /// Nothing is said of these.
    Skip(u64),
    /// Zeroes, or nothing at all.
    Zero(u64),
    /// A digest for each.
    Each(#[serde(deserialize_with = "page_digests")] Vec<PageDigest>),
}

fn page_digests<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PageDigest>, D::Error> {
    bounded::list::<D, PageDigest, MAX_VERIFY_DIGESTS>(deserializer)
}

impl VerifyRange {
    /// How many pages or blocks it is about.
    pub fn count(&self) -> u64 {
        match self {
            Self::Skip(count) | Self::Zero(count) => *count,
            Self::Each(digests) => digests.len() as u64,
        }
    }

    /// How many of them it says something of.
    pub fn told(&self) -> u64 {
        if let Self::Skip(_) = self { 0 } else { self.count() }
    }

    fn digests(&self) -> usize {
        if let Self::Each(digests) = self { digests.len() } else { 0 }
    }
}

/// What the guest has at the point of the frame, which is that of the epoch just before it on the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verify {
    /// Memory or disk.
    pub part: VerifyPart,
    /// The first page or block.
    pub first: u64,
    /// What it and those after it hold, without a gap.
    #[serde(deserialize_with = "ranges")]
    pub ranges: Vec<VerifyRange>,
}

fn ranges<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<VerifyRange>, D::Error> {
    bounded::list::<D, VerifyRange, MAX_VERIFY_RANGES>(deserializer)
}

impl Verify {
    /// The one after the last that it is about. Checked when it came, so it does not overflow.
    pub fn end(&self) -> u64 {
        self.ranges.iter().map(VerifyRange::count).fold(self.first, u64::saturating_add)
    }

    /// How many pages or blocks it says something of.
    pub fn told(&self) -> u64 {
        self.ranges.iter().map(VerifyRange::told).sum()
    }
}

impl Message for Verify {
    const KIND: Kind = Kind::Verify;

    fn check(&self) -> Result<(), MessageError> {
        let end = self.part.end();
        check_range(Self::KIND, "a first number of", self.first, 0, end)?;
        let mut at = self.first;
        for range in &self.ranges {
            check_range(Self::KIND, "a range of so many:", range.count(), 1, end - at)?;
            at += range.count();
        }
        let digests: usize = self.ranges.iter().map(VerifyRange::digests).sum();
        check_range(Self::KIND, "so many digests:", digests as u64, 0, MAX_VERIFY_DIGESTS as u64)?;
        check_range(Self::KIND, "so many ranges:", self.ranges.len() as u64, 1, MAX_VERIFY_RANGES as u64)
    }
}

/// Whether the copy holds at the point what the runner has said of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// The point.
    pub point: Point,
    /// Memory or disk.
    pub part: VerifyPart,
    /// Pages or blocks compared.
    pub compared: u64,
    /// How many of them differ.
    pub differing: u64,
    /// The first of those.
    #[serde(deserialize_with = "places")]
    pub places: Vec<u64>,
}

fn places<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    bounded::list::<D, u64, MAX_DIFFERING_NAMED>(deserializer)
}

impl Verified {
    /// Nothing compared yet.
    pub fn new(point: Point, part: VerifyPart) -> Self {
        Self { point, part, compared: 0, differing: 0, places: Vec::new() }
    }

    /// One of those that were compared differs.
    pub fn differs(&mut self, at: u64) {
        self.differing += 1;
        if self.places.len() < MAX_DIFFERING_NAMED {
            self.places.push(at);
        }
    }
}

impl Message for Verified {
    const KIND: Kind = Kind::Verified;

    fn check(&self) -> Result<(), MessageError> {
        let named = self.differing.min(MAX_DIFFERING_NAMED as u64);
        check_range(Self::KIND, "so many compared:", self.compared, 0, self.part.end())?;
        check_range(Self::KIND, "so many differing:", self.differing, 0, self.compared)?;
        check_range(Self::KIND, "so many named:", self.places.len() as u64, named, named)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        MAX_VERIFY_DIGESTS, MAX_VERIFY_RANGES, Message, PageDigest, Verified, Verify, VerifyPart, VerifyRange,
    };
    use colo_common::PAGE_SIZE;
    use colo_common::history::point;

    fn each(count: usize) -> VerifyRange {
        VerifyRange::Each(vec![PageDigest::of(&[7; PAGE_SIZE]); count])
    }

    fn verify(first: u64, ranges: Vec<VerifyRange>) -> Verify {
        Verify { part: VerifyPart::Memory, first, ranges }
    }

    #[test]
    fn the_fullest_message_fits_its_frame() {
        let mut ranges: Vec<_> =
            (2..MAX_VERIFY_RANGES / 2).flat_map(|_| [each(1), VerifyRange::Skip(1 << 17)]).collect();
        ranges.extend([each(MAX_VERIFY_DIGESTS + 2 - MAX_VERIFY_RANGES / 2), VerifyRange::Zero(1 << 20)]);
        let full = verify(1, ranges);
        assert_eq!(Verify::decode(&full.encode()), Ok(full.clone()));
        assert_eq!(full.told(), MAX_VERIFY_DIGESTS as u64 + (1 << 20));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (first, ranges, what) in [
            (0, vec![], "so many ranges: 0"),
            (0, vec![VerifyRange::Skip(0)], "a range of so many: 0"),
            (0, vec![each(0)], "a range of so many: 0"),
            (u64::MAX, vec![VerifyRange::Zero(1)], "a first number of 18446744073709551615"),
            (1, vec![VerifyRange::Zero(u64::MAX)], "a range of so many: 18446744073709551615"),
            (VerifyPart::Memory.end() - 1, vec![each(1), VerifyRange::Zero(1)], "not between 1 and 0"),
            (0, vec![each(MAX_VERIFY_DIGESTS), each(1)], "so many digests: 4097"),
        ] {
            let error = Verify::decode(&postcard::to_stdvec(&verify(first, ranges)).unwrap()).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[test]
    fn an_answer_names_the_first_that_differ() {
        let mut answer = Verified::new(point(1, 2), VerifyPart::Disk);
        answer.compared = 40;
        (0..20).for_each(|at| answer.differs(2 * at));
        assert_eq!((answer.compared, answer.differing, answer.places.len()), (40, 20, 16));
        assert_eq!(Verified::decode(&answer.encode()), Ok(answer.clone()));
        for wrong in [
            Verified { differing: 41, ..answer.clone() },
            Verified { places: Vec::new(), ..answer.clone() },
            Verified { differing: 0, ..answer.clone() },
            Verified { compared: u64::MAX, ..answer },
        ] {
            assert!(Verified::decode(&postcard::to_stdvec(&wrong).unwrap()).is_err(), "{wrong:?}");
        }
    }
}
