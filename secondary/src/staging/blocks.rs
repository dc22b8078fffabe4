//! What one frame said about blocks of the guest's disk.

use bytes::Bytes;
use colo_common::{BLOCK_SIZE, Block};
use colo_proto::pages::{Content, Run, RunTable};

use crate::store::BlockRun;

/// Runs of blocks, and the bytes of those that have any, which lie one after the other.
#[derive(Clone, Debug)]
pub struct StagedBlocks {
    runs: Vec<Run<Block>>,
    bytes: Bytes,
}

impl StagedBlocks {
    /// Takes runs and the bytes of the data runs.
    ///
    /// # Panics
    /// There are not as many bytes as the data runs have.
    pub fn new(runs: Vec<Run<Block>>, bytes: Bytes) -> Self {
        RunTable::check_body(&runs, bytes.len()).unwrap_or_else(|error| panic!("blocks that came: {error}"));
        Self { runs, bytes }
    }

    /// Bytes of the blocks.
    pub fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The runs with what they hold, ascending.
    pub fn runs(&self) -> impl Iterator<Item = BlockRun<'_>> {
        let mut rest = &self.bytes[..];
        self.runs.iter().map(move |run| match run.content {
            Content::Zero => BlockRun::zeros(run.first, run.count.into()),
            Content::Data => {
                let (these, after) = rest.split_at(run.count as usize * BLOCK_SIZE);
                rest = after;
                BlockRun::data(run.first, these)
            }
        })
    }
}
