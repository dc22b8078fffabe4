//! What the node hands to the link, each an owned value: from here on nobody shares anything with the guest.

use colo_common::Point;
use colo_proto::message::{SeedMode, Verify};
use colo_vmm::egress::{Output, OutputPosition};
use colo_vmm::{DiskWrite, MachineState, PageBatch};
use std::time::Instant;

/// An epoch on its way.
#[derive(Debug)]
pub struct Epoch {
    /// Its name.
    pub point: Point,
    /// The point that it follows; none if it completes a seed.
    pub base: Option<Point>,
    /// The history that it is the tip of.
    pub history: Vec<Point>,
    /// Every page that changed since the base.
    pub pages: PageBatch,
    /// Blocks of the disk that changed since the base; where one comes twice, the later counts.
    pub blocks: Vec<DiskWrite>,
    /// The machine.
    pub state: MachineState,
    /// Output that the secondary does not know yet, or may not.
    pub output: Output,
    /// Everything before this is out.
    pub released: OutputPosition,
    /// Promotions in a row because the guest had failed.
    pub promotions: u32,
    /// When it was cut.
    pub cut_at: Instant,
}

/// One thing to send, in order.
#[derive(Debug)]
pub enum Transfer {
    /// A seed or resync begins.
    SeedBegin {
        /// What is sent.
        mode: SeedMode,
        /// The history of the runner.
        history: Vec<Point>,
    },
    /// Pages of a seed.
    SeedPages(PageBatch),
    /// Frames of a seed that are zero: (first frame, frames).
    SeedZeros(Vec<(colo_common::Gfn, u64)>),
    /// Blocks of the disk.
    SeedBlocks(Vec<DiskWrite>),
    /// An epoch.
    Epoch(Box<Epoch>),
    /// What the guest has at the epoch just before, to be compared.
    Verify(Verify),
}
