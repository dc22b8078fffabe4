//! What a copy that comes back says of itself: the point that it can be gone on with from, and where it may hold something
//! else. So it is sent what differs, without digests of all that it holds.

use colo_common::{Block, Epoch, Gfn, Point};
use serde::{Deserialize, Deserializer, Serialize};

use super::{Compared, Message, MessageError, bounded, check_range};
use crate::frame::Kind;

/// Runs in one message.
pub const MAX_DIVERGED_RUNS: usize = 4096;

/// Bytes of a message with runs: two numbers of at most 10 bytes each, twice, and some more.
pub const MAX_DIVERGED_BODY: usize = MAX_DIVERGED_RUNS * 40 + 64;

/// What a memory or a disk can be gone on with from. It holds `point`, but for what it will name; and it can name what it
/// has beyond any point from `from` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Base {
    /// The newest point.
    pub point: Point,
    /// Not after the point's epoch.
    pub from: Epoch,
}

impl Base {
    /// One that holds exactly this point.
    pub fn at(point: Point) -> Self {
        Self { point, from: point.epoch }
    }

    fn check(self, kind: Kind) -> Result<(), MessageError> {
        check_range(kind, "a base from", self.from.0, 0, self.point.epoch.0)
    }
}

/// The bases of a copy. None: digests tell what differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bases {
    /// Of its memory.
    pub memory: Option<Base>,
    /// Of its disk.
    pub disk: Option<Base>,
}

impl Bases {
    /// Those of a copy whose memory and disk hold exactly this point.
    pub fn at(point: Point) -> Self {
        Self { memory: Some(Base::at(point)), disk: Some(Base::at(point)) }
    }

    pub(super) fn check(self, kind: Kind) -> Result<(), MessageError> {
        self.memory.into_iter().chain(self.disk).try_for_each(|base| base.check(kind))
    }
}

/// Pages and blocks that the secondary's copy may hold otherwise than the points that the seed begins from. One or more
/// messages; the runner sends these too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diverged {
    /// Runs of pages: the first and how many.
    #[serde(deserialize_with = "runs")]
    pub pages: Vec<(Gfn, u64)>,
    /// Runs of blocks.
    #[serde(deserialize_with = "runs")]
    pub blocks: Vec<(Block, u64)>,
    /// Nothing more follows.
    pub last: bool,
}

fn runs<'de, D: Deserializer<'de>, N: Compared>(deserializer: D) -> Result<Vec<(N, u64)>, D::Error> {
    bounded::list::<D, (N, u64), MAX_DIVERGED_RUNS>(deserializer)
}

fn check_runs<N: Compared>(runs: &[(N, u64)]) -> Result<(), MessageError> {
    runs.iter().try_for_each(|&(first, count)| {
        check_range(Kind::Diverged, "a run of so many:", count, 1, N::END)?;
        check_range(Kind::Diverged, "a first number of", first.number(), 0, N::END - count)
    })
}

impl Message for Diverged {
    const KIND: Kind = Kind::Diverged;

    fn check(&self) -> Result<(), MessageError> {
        check_runs(&self.pages)?;
        check_runs(&self.blocks)
    }
}

impl Diverged {
    /// Cuts runs into messages; at least one, and the last says so.
    pub fn parts(pages: &[(Gfn, u64)], blocks: &[(Block, u64)]) -> Vec<Self> {
        let pages =
            pages.chunks(MAX_DIVERGED_RUNS).map(|runs| Self { pages: runs.to_vec(), ..Self::default() });
        let blocks =
            blocks.chunks(MAX_DIVERGED_RUNS).map(|runs| Self { blocks: runs.to_vec(), ..Self::default() });
        let mut parts: Vec<Self> = pages.chain(blocks).collect();
        match parts.last_mut() {
            Some(last) => last.last = true,
            None => parts.push(Self { last: true, ..Self::default() }),
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::{Base, Bases, Diverged, MAX_DIVERGED_RUNS};
    use crate::frame::Kind;
    use crate::message::Message;
    use colo_common::history::point;
    use colo_common::{Block, Epoch, Gfn};

    #[test]
    fn runs_are_cut_into_messages_of_which_the_last_says_so() {
        assert_eq!(Diverged::parts(&[], &[]), [Diverged { last: true, ..Diverged::default() }]);
        let pages: Vec<(Gfn, u64)> = (0..MAX_DIVERGED_RUNS as u64 + 1).map(|n| (Gfn(2 * n), 1)).collect();
        let parts = Diverged::parts(&pages, &[(Block(1 << 30), 7)]);
        assert_eq!(parts.iter().map(|part| part.last).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(parts.iter().flat_map(|part| part.pages.clone()).collect::<Vec<_>>(), pages);
        for part in parts {
            assert_eq!(Diverged::decode(&part.encode()), Ok(part));
        }
    }

    #[test]
    fn runs_and_bases_that_cannot_be_are_refused() {
        for run in [(Gfn(1), 0), (Gfn(u64::MAX), 2), (Gfn(0), u64::MAX)] {
            let part = Diverged { pages: vec![run], ..Diverged::default() };
            assert!(Diverged::decode(&postcard::to_stdvec(&part).unwrap()).is_err(), "{run:?}");
        }
        assert!(Bases::at(point(2, 9)).check(Kind::Welcome).is_ok());
        let late = Base { point: point(2, 9), from: Epoch(10) };
        assert!(Bases { memory: None, disk: Some(late) }.check(Kind::Welcome).is_err());
    }
}
