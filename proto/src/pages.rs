//! The run table of a `Pages` frame: which frames of the guest's memory its body holds, and which are all zero. The step
//! of the way of a page between `primary/encode` and `secondary/staging`.
//!
//! A run is 16 bytes, little endian: first frame (u64), number of frames (u32), and 0 for data or 1 for zero (u32). Runs
//! ascend and do not overlap. The bytes of the data runs make up the body, in order; a zero run has none.

use colo_common::{Gfn, PAGE_SIZE};

use crate::frame::MAX_FRAME_PAGES;

/// Bytes of an encoded run.
pub const RUN_LEN: usize = 16;

/// Runs of one frame. The data runs cannot be more than its pages; the rest is for zero runs, of which a scattered
/// epoch may have many, and keeps the table at 64 KiB.
pub const MAX_RUNS: usize = 4096;

/// Bytes of a run table.
pub const MAX_TABLE: usize = MAX_RUNS * RUN_LEN;

const _: () = assert!(MAX_RUNS >= MAX_FRAME_PAGES);

/// Bytes of one page.
pub type Page = [u8; PAGE_SIZE];

/// What the pages of a run hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Bytes, which are in the body.
    Data,
    /// Zeros, which are not sent.
    Zero,
}

/// Frames that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first of them.
    pub first: Gfn,
    /// How many, at least one.
    pub count: u32,
    /// What they hold.
    pub content: Content,
}

impl Run {
    /// The frames in it, ascending.
    pub fn frames(&self) -> impl Iterator<Item = Gfn> + use<> {
        (self.first.0..self.first.0.saturating_add(u64::from(self.count))).map(Gfn)
    }
}

/// Why a run table cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PagesError {
    /// Not whole runs.
    #[error("a run table of {0} bytes is not made of runs of {RUN_LEN} bytes")]
    Length(usize),
    /// More runs than a frame may have.
    #[error("a run table has {0} runs, more than {MAX_RUNS}")]
    TooMany(usize),
    /// A run of no frames.
    #[error("the run at {0} is empty")]
    Empty(Gfn),
    /// Neither data nor zero.
    #[error("the run at {first} has content {found}, not 0 (data) or 1 (zero)")]
    Content {
        /// Its first frame.
        first: Gfn,
        /// What was found.
        found: u32,
    },
    /// It begins before the run before it ends.
    #[error("the run at {first} begins before {expected}, where the run before it ends")]
    Order {
        /// Its first frame.
        first: Gfn,
        /// The first frame that it may have.
        expected: Gfn,
    },
    /// Outside guest memory.
    #[error("{count} pages from {first} go beyond the guest's memory, which ends at {}: do both nodes have the same spec?", Gfn(*.limit))]
    Beyond {
        /// The run's first frame.
        first: Gfn,
        /// Its frames.
        count: u32,
        /// The guest's frame limit.
        limit: u64,
    },
    /// More data than a frame may have.
    #[error("a run table has {0} pages with bytes, more than {MAX_FRAME_PAGES}")]
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
    pub fn encode(runs: &[Run]) -> Vec<u8> {
        check_all(runs, u64::MAX).unwrap_or_else(|error| panic!("a run table to send: {error}"));
        let mut bytes = Vec::with_capacity(runs.len() * RUN_LEN);
        for run in runs {
            let content: u32 = match run.content {
                Content::Data => 0,
                Content::Zero => 1,
            };
            bytes.extend_from_slice(&run.first.0.to_le_bytes());
            bytes.extend_from_slice(&run.count.to_le_bytes());
            bytes.extend_from_slice(&content.to_le_bytes());
        }
        bytes
    }

    /// Reads the table of a guest whose frames all lie below `frame_limit`. Holes in its address map are not known
    /// here; whoever applies the pages checks that each is memory.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn decode(bytes: &[u8], frame_limit: u64) -> Result<Vec<Run>, PagesError> {
        let (encoded, rest) = bytes.as_chunks::<RUN_LEN>();
        if !rest.is_empty() {
            return Err(PagesError::Length(bytes.len()));
        }
        if encoded.len() > MAX_RUNS {
            return Err(PagesError::TooMany(encoded.len()));
        }
        let runs = encoded.iter().map(decode_run).collect::<Result<Vec<_>, _>>()?;
        check_all(&runs, frame_limit)?;
        Ok(runs)
    }

    /// Pages whose bytes are in the body.
    pub fn data_pages(runs: &[Run]) -> u64 {
        count(runs, Content::Data)
    }

    /// Pages that are all zero.
    pub fn zero_pages(runs: &[Run]) -> u64 {
        count(runs, Content::Zero)
    }

    /// Checks that a body of this many bytes holds the data runs and nothing else.
    ///
    /// # Errors
    /// It does not.
    pub fn check_body(runs: &[Run], body_len: usize) -> Result<(), PagesError> {
        let expected = Self::data_pages(runs) * PAGE_SIZE as u64;
        if body_len as u64 == expected { Ok(()) } else { Err(PagesError::Body { found: body_len, expected }) }
    }

    /// The pages of the data runs with their bytes, ascending.
    ///
    /// # Errors
    /// The body does not fit the runs.
    pub fn data<'a>(
        runs: &'a [Run],
        body: &'a [u8],
    ) -> Result<impl Iterator<Item = (Gfn, &'a Page)>, PagesError> {
        Self::check_body(runs, body.len())?;
        let frames = runs.iter().filter(|run| run.content == Content::Data).flat_map(Run::frames);
        Ok(frames.zip(body.as_chunks().0))
    }
}

fn count(runs: &[Run], content: Content) -> u64 {
    runs.iter().filter(|run| run.content == content).map(|run| u64::from(run.count)).sum()
}

fn decode_run(bytes: &[u8; RUN_LEN]) -> Result<Run, PagesError> {
    let field = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let first = Gfn(u64::from(field(0)) | u64::from(field(4)) << 32);
    let content = match field(12) {
        0 => Content::Data,
        1 => Content::Zero,
        found => return Err(PagesError::Content { first, found }),
    };
    Ok(Run { first, count: field(8), content })
}

/// The rules of a table, asked of what came and of what is to be sent.
fn check_all(runs: &[Run], frame_limit: u64) -> Result<(), PagesError> {
    if runs.len() > MAX_RUNS {
        return Err(PagesError::TooMany(runs.len()));
    }
    let mut free = 0;
    for run in runs {
        let (first, count) = (run.first, run.count);
        if count == 0 {
            return Err(PagesError::Empty(first));
        }
        if first.0 < free {
            return Err(PagesError::Order { first, expected: Gfn(free) });
        }
        free = match first.0.checked_add(u64::from(count)) {
            Some(end) if end <= frame_limit => end,
            _ => return Err(PagesError::Beyond { first, count, limit: frame_limit }),
        };
    }
    let data = RunTable::data_pages(runs);
    if data > MAX_FRAME_PAGES as u64 { Err(PagesError::TooMuchData(data)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::{Content, MAX_RUNS, MAX_TABLE, PagesError, RUN_LEN, Run, RunTable};
    use colo_common::{Gfn, PAGE_SIZE};
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
            (vec![(1, 0, 0)], PagesError::Empty(gfn(1))),
            (vec![(1, 1, 2)], PagesError::Content { first: gfn(1), found: 2 }),
            (vec![(1, 2, 0), (2, 1, 1)], PagesError::Order { first: gfn(2), expected: gfn(3) }),
            (vec![(5, 1, 0), (1, 1, 0)], PagesError::Order { first: gfn(1), expected: gfn(6) }),
            (vec![(99, 2, 0)], PagesError::Beyond { first: gfn(99), count: 2, limit: 100 }),
            (vec![(u64::MAX, 1, 1)], PagesError::Beyond { first: gfn(u64::MAX), count: 1, limit: 100 }),
            (vec![(0, u32::MAX, 1)], PagesError::Beyond { first: gfn(0), count: u32::MAX, limit: 100 }),
        ] {
            assert_eq!(RunTable::decode(&raw(&runs), 100), Err(expected));
        }
        assert_eq!(RunTable::decode(&[0; RUN_LEN + 1], 100), Err(PagesError::Length(RUN_LEN + 1)));
        assert_eq!(RunTable::decode(&raw(&[(0, 257, 0)]), 1000), Err(PagesError::TooMuchData(257)));
        assert_eq!(
            RunTable::decode(&vec![0; MAX_TABLE + RUN_LEN], 100),
            Err(PagesError::TooMany(MAX_RUNS + 1))
        );
        let most: Vec<_> = (0..MAX_RUNS as u64).map(|n| zero(n * 2, 1)).collect();
        assert_eq!(RunTable::decode(&RunTable::encode(&most), 1 << 20), Ok(most));
        assert_eq!(RunTable::decode(&[], 0), Ok(vec![]));
    }

    #[test]
    fn data_runs_take_their_pages_from_the_body_in_order() {
        let runs = [data(3, 2), zero(5, 1 << 20), data(1 << 30, 1)];
        assert_eq!((RunTable::data_pages(&runs), RunTable::zero_pages(&runs)), (3, 1 << 20));
        let body: Vec<u8> = (0..3).flat_map(|n| [n; PAGE_SIZE]).collect();
        let pages: Vec<_> =
            RunTable::data(&runs, &body).unwrap().map(|(gfn, page)| (gfn.0, page[0])).collect();
        assert_eq!(pages, [(3, 0), (4, 1), (1 << 30, 2)]);
        for len in [0, body.len() - 1, body.len() + PAGE_SIZE] {
            let expected = Err(PagesError::Body { found: len, expected: 3 * 4096 });
            assert_eq!(RunTable::check_body(&runs, len), expected);
        }
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
                let beyond = RunTable::decode(&RunTable::encode(&runs), free - 1);
                prop_assert_eq!(matches!(beyond, Err(PagesError::Beyond { .. })), true);
            }
        }
    }
}
