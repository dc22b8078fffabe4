//! The run table of a `Pages` or `Blocks` frame: which pages of the guest's memory, or blocks of its disk, its body holds,
//! and which are all zero. The step of the way of a page between `primary/encode` and `secondary/staging`.
//!
//! A run is 16 bytes, little endian: first number (u64), how many (u32), and 0 for data or 1 for zero (u32). Runs
//! ascend and do not overlap. The bytes of the data runs make up the body, in order; a zero run has none.

use colo_common::{BLOCK_SIZE, Block, Gfn, PAGE_SIZE};
use std::fmt::{Debug, Display};

use crate::frame::MAX_FRAME_PAGES;

/// Bytes of an encoded run.
pub const RUN_LEN: usize = 16;

/// Runs of one frame. The data runs cannot be more than its pages; the rest is for zero runs, of which a scattered
/// epoch may have many, and keeps the table at 64 KiB.
pub const MAX_RUNS: usize = 4096;

/// Bytes of a run table.
pub const MAX_TABLE: usize = MAX_RUNS * RUN_LEN;

const _: () = assert!(MAX_RUNS >= MAX_FRAME_PAGES);
const _: () = assert!(BLOCK_SIZE == PAGE_SIZE, "a body is cut into pieces of one size");

/// Bytes of one page, or of one block of a disk.
pub type Page = [u8; PAGE_SIZE];

/// What runs count.
pub trait Place: Copy + Eq + Debug + Display {
    /// What it is a part of, for messages.
    const OF: &'static str;
    /// Many of it, for messages.
    const PLURAL: &'static str;

    /// The one with this number.
    fn at(number: u64) -> Self;

    /// Its number.
    fn number(self) -> u64;
}

impl Place for Gfn {
    const OF: &'static str = "memory";
    const PLURAL: &'static str = "pages";

    fn at(number: u64) -> Self {
        Self(number)
    }

    fn number(self) -> u64 {
        self.0
    }
}

impl Place for Block {
    const OF: &'static str = "disk";
    const PLURAL: &'static str = "blocks";

    fn at(number: u64) -> Self {
        Self(number)
    }

    fn number(self) -> u64 {
        self.0
    }
}

/// What the pages or blocks of a run hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Bytes, which are in the body.
    Data,
    /// Zeros, which are not sent.
    Zero,
}

/// Pages, or blocks, that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run<N = Gfn> {
    /// The first of them.
    pub first: N,
    /// How many, at least one.
    pub count: u32,
    /// What they hold.
    pub content: Content,
}

impl<N: Place> Run<N> {
    /// Those in it, ascending.
    pub fn places(&self) -> impl Iterator<Item = N> + use<N> {
        let first = self.first.number();
        (first..first.saturating_add(u64::from(self.count))).map(N::at)
    }
}

/// Why a run table cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunError<N: Place> {
    /// Not whole runs.
    #[error("a run table of {0} bytes is not made of runs of {RUN_LEN} bytes")]
    Length(usize),
    /// More runs than a frame may have.
    #[error("a run table has {0} runs, more than {MAX_RUNS}")]
    TooMany(usize),
    /// A run of nothing.
    #[error("the run at {0} is empty")]
    Empty(N),
    /// Neither data nor zero.
    #[error("the run at {first} has content {found}, not 0 (data) or 1 (zero)")]
    Content {
        /// Its first page or block.
        first: N,
        /// What was found.
        found: u32,
    },
    /// It begins before the run before it ends.
    #[error("the run at {first} begins before {expected}, where the run before it ends")]
    Order {
        /// Its first page or block.
        first: N,
        /// The first that it may have.
        expected: N,
    },
    /// Outside the guest's memory or disk.
    #[error(
        "{count} {} from {first} go beyond the guest's {}, which ends at {limit}: do both nodes have the same spec?",
        N::PLURAL,
        N::OF
    )]
    Beyond {
        /// The run's first page or block.
        first: N,
        /// How many.
        count: u32,
        /// The first that the guest does not have.
        limit: N,
    },
    /// More data than a frame may have.
    #[error("a run table has {0} {what} with bytes, more than {MAX_FRAME_PAGES}", what = N::PLURAL)]
    TooMuchData(u64),
    /// The body does not fit the table.
    #[error("the body has {found} bytes, and the run table needs {expected}")]
    Body {
        /// Bytes of the body.
        found: usize,
        /// Bytes of the data runs.
        expected: u64,
    },
}

/// The encoding of runs.
pub struct RunTable;

impl RunTable {
    /// The bytes to send.
    ///
    /// # Panics
    /// The runs are not what [`decode`](Self::decode) takes: an own bug.
    pub fn encode<N: Place>(runs: &[Run<N>]) -> Vec<u8> {
        check_all(runs, u64::MAX).unwrap_or_else(|error| panic!("a run table to send: {error}"));
        let mut bytes = Vec::with_capacity(runs.len() * RUN_LEN);
        for run in runs {
            let content: u32 = match run.content {
                Content::Data => 0,
                Content::Zero => 1,
            };
            bytes.extend_from_slice(&run.first.number().to_le_bytes());
            bytes.extend_from_slice(&run.count.to_le_bytes());
            bytes.extend_from_slice(&content.to_le_bytes());
        }
        bytes
    }

    /// Reads the table of a guest whose pages, or blocks, all lie below number `limit`. Holes in its address map are
    /// not known here; whoever applies pages checks that each is memory.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn decode<N: Place>(bytes: &[u8], limit: u64) -> Result<Vec<Run<N>>, RunError<N>> {
        let (encoded, rest) = bytes.as_chunks::<RUN_LEN>();
        if !rest.is_empty() {
            return Err(RunError::Length(bytes.len()));
        }
        if encoded.len() > MAX_RUNS {
            return Err(RunError::TooMany(encoded.len()));
        }
        let runs = encoded.iter().map(decode_run).collect::<Result<Vec<_>, _>>()?;
        check_all(&runs, limit)?;
        Ok(runs)
    }

    /// Pages or blocks whose bytes are in the body.
    pub fn data<N>(runs: &[Run<N>]) -> u64 {
        count(runs, Content::Data)
    }

    /// Pages or blocks that are all zero.
    pub fn zero<N>(runs: &[Run<N>]) -> u64 {
        count(runs, Content::Zero)
    }

    /// Checks that a body of this many bytes holds the data runs and nothing else.
    ///
    /// # Errors
    /// It does not.
    pub fn check_body<N: Place>(runs: &[Run<N>], body_len: usize) -> Result<(), RunError<N>> {
        let expected = Self::data(runs) * PAGE_SIZE as u64;
        if body_len as u64 == expected { Ok(()) } else { Err(RunError::Body { found: body_len, expected }) }
    }

    /// What the data runs hold, ascending.
    ///
    /// # Errors
    /// The body does not fit the runs.
    pub fn bytes<'a, N: Place>(
        runs: &'a [Run<N>],
        body: &'a [u8],
    ) -> Result<impl Iterator<Item = (N, &'a Page)>, RunError<N>> {
        Self::check_body(runs, body.len())?;
        let places = runs.iter().filter(|run| run.content == Content::Data).flat_map(Run::places);
        Ok(places.zip(body.as_chunks().0))
    }
}

fn count<N>(runs: &[Run<N>], content: Content) -> u64 {
    runs.iter().filter(|run| run.content == content).map(|run| u64::from(run.count)).sum()
}

fn decode_run<N: Place>(bytes: &[u8; RUN_LEN]) -> Result<Run<N>, RunError<N>> {
    let field = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let first = N::at(u64::from(field(0)) | u64::from(field(4)) << 32);
    let content = match field(12) {
        0 => Content::Data,
        1 => Content::Zero,
        found => return Err(RunError::Content { first, found }),
    };
    Ok(Run { first, count: field(8), content })
}

/// The rules of a table, asked of what came and of what is to be sent.
fn check_all<N: Place>(runs: &[Run<N>], limit: u64) -> Result<(), RunError<N>> {
    if runs.len() > MAX_RUNS {
        return Err(RunError::TooMany(runs.len()));
    }
    let mut free = 0;
    for run in runs {
        let (first, count) = (run.first, run.count);
        if count == 0 {
            return Err(RunError::Empty(first));
        }
        if first.number() < free {
            return Err(RunError::Order { first, expected: N::at(free) });
        }
        free = match first.number().checked_add(u64::from(count)) {
            Some(end) if end <= limit => end,
            _ => return Err(RunError::Beyond { first, count, limit: N::at(limit) }),
        };
    }
    let data = RunTable::data(runs);
    if data > MAX_FRAME_PAGES as u64 { Err(RunError::TooMuchData(data)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::{Content, MAX_RUNS, MAX_TABLE, RUN_LEN, Run, RunError, RunTable};
    use colo_common::{Block, Gfn, PAGE_SIZE};
    use proptest::prelude::{any, prop_assert_eq, proptest};

    fn run(first: u64, count: u32, content: Content) -> Run {
        Run { first: Gfn(first), count, content }
    }

    fn data(first: u64, count: u32) -> Run {
        run(first, count, Content::Data)
    }

    fn zero(first: u64, count: u32) -> Run {
        run(first, count, Content::Zero)
    }

    /// The encoding without its checks.
    fn raw(runs: &[(u64, u32, u32)]) -> Vec<u8> {
        let fields = |&(first, count, content): &(u64, u32, u32)| {
            let mut bytes = first.to_le_bytes().to_vec();
            bytes.extend(count.to_le_bytes().into_iter().chain(content.to_le_bytes()));
            bytes
        };
        runs.iter().flat_map(fields).collect()
    }

    #[test]
    fn what_is_wrong_with_a_table_is_named() {
        let gfn = Gfn;
        for (runs, expected) in [
            (vec![(1, 0, 0)], RunError::Empty(gfn(1))),
            (vec![(1, 1, 2)], RunError::Content { first: gfn(1), found: 2 }),
            (vec![(1, 2, 0), (2, 1, 1)], RunError::Order { first: gfn(2), expected: gfn(3) }),
            (vec![(5, 1, 0), (1, 1, 0)], RunError::Order { first: gfn(1), expected: gfn(6) }),
            (vec![(99, 2, 0)], RunError::Beyond { first: gfn(99), count: 2, limit: gfn(100) }),
            (vec![(u64::MAX, 1, 1)], RunError::Beyond { first: gfn(u64::MAX), count: 1, limit: gfn(100) }),
            (vec![(0, u32::MAX, 1)], RunError::Beyond { first: gfn(0), count: u32::MAX, limit: gfn(100) }),
        ] {
            assert_eq!(RunTable::decode(&raw(&runs), 100), Err(expected));
        }
        assert_eq!(RunTable::decode::<Gfn>(&[0; RUN_LEN + 1], 100), Err(RunError::Length(RUN_LEN + 1)));
        assert_eq!(RunTable::decode::<Gfn>(&raw(&[(0, 257, 0)]), 1000), Err(RunError::TooMuchData(257)));
        assert_eq!(
            RunTable::decode::<Gfn>(&vec![0; MAX_TABLE + RUN_LEN], 100),
            Err(RunError::TooMany(MAX_RUNS + 1))
        );
        let most: Vec<_> = (0..MAX_RUNS as u64).map(|n| zero(n * 2, 1)).collect();
        assert_eq!(RunTable::decode(&RunTable::encode(&most), 1 << 20), Ok(most));
        assert_eq!(RunTable::decode::<Gfn>(&[], 0), Ok(vec![]));
    }

    #[test]
    fn data_runs_take_their_pages_from_the_body_in_order() {
        let runs = [data(3, 2), zero(5, 1 << 20), data(1 << 30, 1)];
        assert_eq!((RunTable::data(&runs), RunTable::zero(&runs)), (3, 1 << 20));
        let body: Vec<u8> = (0..3).flat_map(|n| [n; PAGE_SIZE]).collect();
        let pages: Vec<_> =
            RunTable::bytes(&runs, &body).unwrap().map(|(gfn, page)| (gfn.0, page[0])).collect();
        assert_eq!(pages, [(3, 0), (4, 1), (1 << 30, 2)]);
        for len in [0, body.len() - 1, body.len() + PAGE_SIZE] {
            let expected = Err(RunError::Body { found: len, expected: 3 * 4096 });
            assert_eq!(RunTable::check_body(&runs, len), expected);
        }
    }

    #[test]
    fn blocks_of_a_disk_are_told_by_their_own_name() {
        let runs = [Run { first: Block(9), count: 2, content: Content::Zero }];
        assert_eq!(RunTable::decode(&RunTable::encode(&runs), 11), Ok(runs.to_vec()));
        let error = RunTable::decode::<Block>(&RunTable::encode(&runs), 10).unwrap_err().to_string();
        assert!(
            error.starts_with("2 blocks from block 0x9 go beyond the guest's disk, which ends at block 0xa"),
            "{error}"
        );
    }

    #[test]
    #[should_panic(expected = "a run table to send: the run at gfn 0x1 is empty")]
    fn a_table_that_nobody_takes_is_not_made() {
        RunTable::encode(&[data(1, 0)]);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(steps in proptest::collection::vec((0..9_u64, 1..9_u32, any::<bool>()), 0..32)) {
            let mut free = 0;
            let runs: Vec<_> = steps.into_iter().map(|(gap, count, is_data)| {
                let first = free + gap;
                free = first + u64::from(count);
                if is_data { data(first, count) } else { zero(first, count) }
            }).collect();
            prop_assert_eq!(RunTable::decode(&RunTable::encode(&runs), free), Ok(runs.clone()));
            if !runs.is_empty() {
                let beyond = RunTable::decode::<Gfn>(&RunTable::encode(&runs), free - 1);
                prop_assert_eq!(matches!(beyond, Err(RunError::Beyond { .. })), true);
            }
        }
    }
}
