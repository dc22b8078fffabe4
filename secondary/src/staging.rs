//! Staging: collects the frames of a transfer and believes nothing of it before the last one is there and everything
//! adds up. What comes out is an epoch that can be applied as one step.
//!
//! ```text
//!   Idle --Verify--> Idle (what is to be compared at the epoch just before)
//!   Idle --SeedBegin--> Seed --Pages, Blocks--> (go out as they come: the copy is inconsistent anyway)
//!    |                   |
//!    +---EpochBegin------+--EpochBegin--> Epoch --Pages, Blocks, State, Output--> EpochEnd: a StagedEpoch, then Idle
//! ```

mod blocks;

pub use blocks::StagedBlocks;

use bytes::Bytes;
use colo_common::limits::MAX_MACHINE_STATE;
use colo_common::{Block, Gfn, History, PAGE_SIZE, Point};
use colo_primary::release::end_of;
use colo_proto::frame::{Frame, HEADER_LEN, Kind};
use colo_proto::message::{
    EpochBegin, EpochEnd, ITEM_COST, Message, MessageError, Output as WireOutput, OutputItem as WireItem,
    Position, SeedBegin, SeedMode, TransferDigest, Verify, VerifyPart,
};
use colo_proto::pages::{Content, Run, RunError, RunTable};
use colo_vmm::MachineState;
use colo_vmm::arch::x86_64::processor::GuestCpu;
use colo_vmm::egress::{Output, OutputItem, OutputPosition};
use colo_vmm::memory::{GuestMemory, MemoryError, Page};
use colo_vmm::state::StateError;
use std::time::Instant;

/// Data pages of one frame, which lie one after the other in `bytes`.
#[derive(Clone, Debug)]
pub struct StagedPages {
    runs: Vec<(Gfn, u64)>,
    bytes: Bytes,
}

impl StagedPages {
    /// Takes pages and the runs of frames that they are of.
    ///
    /// # Panics
    /// There is not one page for each frame.
    pub fn new(runs: Vec<(Gfn, u64)>, bytes: Bytes) -> Self {
        let pages: u64 = runs.iter().map(|&(_, count)| count).sum();
        assert_eq!(pages * PAGE_SIZE as u64, bytes.len() as u64, "one page for each frame");
        Self { runs, bytes }
    }

    /// (first frame, frames), ascending.
    pub fn runs(&self) -> &[(Gfn, u64)] {
        &self.runs
    }

    /// Bytes of the pages.
    pub fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The pages with their frames.
    pub fn iter(&self) -> impl Iterator<Item = (Gfn, &Page)> {
        let frames = self.runs.iter().flat_map(|&(first, count)| (first.0..first.0 + count).map(Gfn));
        frames.zip(self.bytes.as_chunks::<PAGE_SIZE>().0)
    }

    /// Writes the pages into guest memory.
    ///
    /// # Errors
    /// A frame is not guest memory.
    pub fn write_to(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        let mut rest = &self.bytes[..];
        for &(first, count) in &self.runs {
            let (these, after) = rest.split_at(count as usize * PAGE_SIZE);
            memory.write_frames(first, these)?;
            rest = after;
        }
        Ok(())
    }
}

/// What one frame said about pages.
#[derive(Clone, Debug)]
pub struct StagedPart {
    /// Frames that are zero.
    pub zeros: Vec<(Gfn, u64)>,
    /// Frames with bytes.
    pub pages: Option<StagedPages>,
}

impl StagedPart {
    /// All its runs.
    pub fn runs(&self) -> impl Iterator<Item = (Gfn, u64)> {
        self.zeros.iter().chain(self.pages.iter().flat_map(|pages| pages.runs())).copied()
    }

    /// Writes it into guest memory.
    ///
    /// # Errors
    /// A frame is not guest memory, or the host does not take memory back.
    pub fn write_to(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        for &(first, count) in &self.zeros {
            memory.discard_frames(first, count)?;
        }
        self.pages.as_ref().map_or(Ok(()), |pages| pages.write_to(memory))
    }
}

/// An epoch that is here as a whole.
#[derive(Debug)]
pub struct StagedEpoch {
    /// Its name.
    pub point: Point,
    /// What it follows; none if it makes a seeded copy whole.
    pub base: Option<Point>,
    /// The history that ends with it.
    pub history: History,
    /// Pages, part by part; where a frame comes twice, the later one counts.
    pub parts: Vec<StagedPart>,
    /// Blocks of the disk, part by part; of a block the later version counts.
    pub blocks: Vec<StagedBlocks>,
    /// The machine.
    pub state: MachineState,
    /// Output of the epoch, and perhaps of some before it.
    pub output: Output,
    /// Everything before this was let out when the epoch was sent.
    pub released: OutputPosition,
    /// Promotions in a row because the guest had failed.
    pub promotions: u32,
    /// Bytes that it holds.
    pub bytes: u64,
    /// For the account.
    pub measures: Measures,
}

/// What a staged epoch was on its way here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measures {
    /// Pages with bytes.
    pub pages: u64,
    /// Pages that were zero.
    pub zero_pages: u64,
    /// Bytes of its frames.
    pub wire_bytes: u64,
    /// When its last frame was here; staging itself knows no time.
    pub arrived: Option<Instant>,
}

/// What a frame led to.
#[derive(Debug)]
pub enum Step {
    /// More has to come.
    More,
    /// A seed begins.
    Seed(SeedMode),
    /// Pages of a seed.
    SeedPages(StagedPart),
    /// Blocks of a seed.
    SeedBlocks(StagedBlocks),
    /// A whole epoch.
    Whole(Box<StagedEpoch>),
    /// What the guest has at this point, to be compared.
    Verify(Point, Verify),
}

/// Why a transfer cannot be taken. Nothing of it counts.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// A frame that has no place where it came.
    #[error("a {kind} frame came while {state}")]
    OutOfPlace {
        /// Its kind.
        kind: Kind,
        /// What was going on.
        state: &'static str,
    },
    /// A frame is missing, or came twice.
    #[error("frame {found} of a transfer came where frame {expected} was next")]
    Index {
        /// Its number.
        found: u32,
        /// The next one.
        expected: u32,
    },
    /// A frame of another epoch.
    #[error("a frame of {found} came within {expected}")]
    OtherPoint {
        /// The frame's.
        found: Point,
        /// The epoch's.
        expected: Point,
    },
    /// A message that is none.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A run table that is none.
    #[error(transparent)]
    Pages(#[from] RunError<Gfn>),
    /// A run table of blocks that is none.
    #[error(transparent)]
    Blocks(#[from] RunError<Block>),
    /// Blocks for a guest without a disk.
    #[error("blocks of a disk came, and the guest has none: do both nodes have the same spec?")]
    NoDisk,
    /// A page that the guest does not have.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A list of what the guest does not have.
    #[error(
        "pages or blocks below {end} are to be compared, and the guest has {limit}: do both nodes have the same spec?"
    )]
    Verify {
        /// Where it ends.
        end: u64,
        /// What there is.
        limit: u64,
    },
    /// A machine state that cannot be taken.
    #[error(transparent)]
    State(#[from] StateError),
    /// More than was agreed on.
    #[error("{point} has more than {limit} bytes of {what}")]
    TooLarge {
        /// The epoch.
        point: Point,
        /// Of what.
        what: &'static str,
        /// How many were agreed on.
        limit: u64,
    },
    /// The sums do not agree.
    #[error("{point} is not what was sent: {what} {found}, announced {announced}")]
    Sum {
        /// The epoch.
        point: Point,
        /// Which.
        what: &'static str,
        /// Counted here.
        found: u128,
        /// Counted there.
        announced: u128,
    },
    /// What it says of itself in two places differs.
    #[error(
        "{0} contradicts itself: its output does not end where its machine says, or its base is not on its history"
    )]
    Contradicts(Point),
    /// The history does not end with the epoch.
    #[error("{point} comes with a history that ends at {tip:?}")]
    History {
        /// The epoch.
        point: Point,
        /// The history's end.
        tip: Option<Point>,
    },
}

/// What a transfer holds so far.
struct Epoch {
    point: Point,
    begin: EpochBegin,
    parts: Vec<StagedPart>,
    blocks: Vec<StagedBlocks>,
    state: Vec<u8>,
    output: Vec<OutputItem>,
}

enum Stage {
    Idle,
    Seed,
    Epoch(Box<Epoch>),
}

/// Takes the frames of one stream of transfers.
pub struct Staging {
    stage: Stage,
    /// Frames of the guest's address map end here.
    frame_limit: u64,
    /// Blocks of the guest's disk; 0 without one.
    disk_blocks: u64,
    max_epoch_bytes: u64,
    spec_digest: u64,
    cpu: Option<GuestCpu>,
    digest: TransferDigest,
    data_pages: u64,
    zero_pages: u64,
    data_blocks: u64,
    zero_blocks: u64,
    output_bytes: u64,
    /// Bytes of pages and blocks in the open epoch.
    page_bytes: u64,
    /// Of the open epoch.
    measures: Measures,
}

impl Staging {
    /// For a guest in software whose frames lie below `frame_limit`, in epochs of at most `max_epoch_bytes` of pages
    /// and blocks.
    pub fn new(frame_limit: u64, max_epoch_bytes: u64, spec_digest: u64) -> Self {
        Self {
            stage: Stage::Idle,
            frame_limit,
            disk_blocks: 0,
            max_epoch_bytes,
            spec_digest,
            cpu: None,
            digest: TransferDigest::new(),
            data_pages: 0,
            zero_pages: 0,
            data_blocks: 0,
            zero_blocks: 0,
            output_bytes: 0,
            page_bytes: 0,
            measures: Measures::default(),
        }
    }

    /// For a guest with the processor that was agreed on: a state with another is refused before it is acked.
    #[must_use]
    pub fn with_cpu(self, cpu: Option<GuestCpu>) -> Self {
        Self { cpu, ..self }
    }

    /// For a guest with a disk of so many blocks.
    #[must_use]
    pub fn with_disk(self, disk_blocks: u64) -> Self {
        Self { disk_blocks, ..self }
    }

    /// Takes the next frame.
    ///
    /// # Errors
    /// It does not belong there, or the transfer does not add up; the stream is of no more use.
    pub fn frame(&mut self, frame: &Frame, memory: &GuestMemory) -> Result<Step, StagingError> {
        let header = *frame.header();
        let expected = self.digest.frames();
        if header.index != expected || expected == u32::MAX {
            return Err(StagingError::Index { found: header.index, expected });
        }
        if let Stage::Epoch(epoch) = &self.stage
            && epoch.point != header.point
        {
            return Err(StagingError::OtherPoint { found: header.point, expected: epoch.point });
        }
        if header.kind == Kind::Verify && matches!(self.stage, Stage::Idle) {
            return self.verify(header.point, Verify::decode(frame.body())?);
        }
        if header.kind == Kind::EpochBegin {
            self.measures = Measures::default();
        }
        self.measures.wire_bytes += (HEADER_LEN + frame.table().len() + frame.body().len()) as u64;
        if header.kind == Kind::EpochEnd {
            return self.end(&EpochEnd::decode(frame.body())?);
        }
        self.digest.add(&header);
        match (header.kind, &self.stage) {
            (Kind::SeedBegin, Stage::Idle) if expected == 0 => {
                let begin = SeedBegin::decode(frame.body())?;
                self.stage = Stage::Seed;
                Ok(Step::Seed(begin.mode))
            }
            (Kind::EpochBegin, Stage::Idle | Stage::Seed) => {
                self.begin(header.point, EpochBegin::decode(frame.body())?)
            }
            (Kind::Pages, Stage::Seed | Stage::Epoch(_)) => self.pages(frame, memory),
            (Kind::Blocks, Stage::Seed | Stage::Epoch(_)) => self.blocks(frame),
            (Kind::State, Stage::Epoch(_)) => self.state(frame.body()),
            (Kind::Output, Stage::Epoch(_)) => self.output(WireOutput::decode(frame.body())?),
            (kind, stage) => Err(StagingError::OutOfPlace { kind, state: stage.name() }),
        }
    }

    /// Of no transfer: nothing is counted.
    fn verify(&self, point: Point, list: Verify) -> Result<Step, StagingError> {
        let limit = match list.part {
            VerifyPart::Memory => self.frame_limit,
            VerifyPart::Disk => self.disk_blocks,
        };
        let end = list.end();
        if end > limit { Err(StagingError::Verify { end, limit }) } else { Ok(Step::Verify(point, list)) }
    }

    fn begin(&mut self, point: Point, begin: EpochBegin) -> Result<Step, StagingError> {
        let completes = matches!(self.stage, Stage::Seed);
        if completes != begin.base.is_none() {
            return Err(StagingError::OutOfPlace { kind: Kind::EpochBegin, state: self.stage.name() });
        }
        if begin.history.tip() != Some(point) {
            return Err(StagingError::History { point, tip: begin.history.tip() });
        }
        self.page_bytes = 0;
        let (parts, blocks, state, output) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        self.stage = Stage::Epoch(Box::new(Epoch { point, begin, parts, blocks, state, output }));
        Ok(Step::More)
    }

    fn pages(&mut self, frame: &Frame, memory: &GuestMemory) -> Result<Step, StagingError> {
        let runs = RunTable::decode(frame.table(), self.frame_limit)?;
        RunTable::check_body(&runs, frame.body().len())?;
        for run in &runs {
            check_frames(run, memory)?;
        }
        self.data_pages += RunTable::data(&runs);
        self.zero_pages += RunTable::zero(&runs);
        self.measures.pages += RunTable::data(&runs);
        self.measures.zero_pages += RunTable::zero(&runs);
        let of = |content: Content| {
            let runs = runs.iter().filter(move |run| run.content == content);
            runs.map(|run| (run.first, u64::from(run.count))).collect::<Vec<_>>()
        };
        let (data, zeros) = (of(Content::Data), of(Content::Zero));
        let pages = (!data.is_empty()).then(|| StagedPages::new(data, frame.body().clone()));
        let part = StagedPart { zeros, pages };
        self.count(frame, "pages")?;
        let Stage::Epoch(epoch) = &mut self.stage else { return Ok(Step::SeedPages(part)) };
        epoch.parts.push(part);
        Ok(Step::More)
    }

    fn blocks(&mut self, frame: &Frame) -> Result<Step, StagingError> {
        if self.disk_blocks == 0 {
            return Err(StagingError::NoDisk);
        }
        let runs: Vec<Run<Block>> = RunTable::decode(frame.table(), self.disk_blocks)?;
        RunTable::check_body(&runs, frame.body().len())?;
        self.data_blocks += RunTable::data(&runs);
        self.zero_blocks += RunTable::zero(&runs);
        let part = StagedBlocks::new(runs, frame.body().clone());
        self.count(frame, "blocks")?;
        let Stage::Epoch(epoch) = &mut self.stage else { return Ok(Step::SeedBlocks(part)) };
        epoch.blocks.push(part);
        Ok(Step::More)
    }

    /// Counts a frame of pages or blocks into the open epoch. A run of zeros costs a few bytes here, whatever it covers,
    /// and a frame without any still costs some.
    fn count(&mut self, frame: &Frame, what: &'static str) -> Result<(), StagingError> {
        let Stage::Epoch(epoch) = &self.stage else { return Ok(()) };
        self.page_bytes += (frame.body().len() + frame.table().len()) as u64 + ITEM_COST;
        let (point, limit) = (epoch.point, self.max_epoch_bytes);
        if self.page_bytes > limit { Err(StagingError::TooLarge { point, what, limit }) } else { Ok(()) }
    }

    fn state(&mut self, part: &[u8]) -> Result<Step, StagingError> {
        let Stage::Epoch(epoch) = &mut self.stage else { return Ok(Step::More) };
        if epoch.state.len() + part.len() > MAX_MACHINE_STATE + 64 {
            let limit = MAX_MACHINE_STATE as u64;
            return Err(StagingError::TooLarge { point: epoch.point, what: "machine state", limit });
        }
        epoch.state.extend_from_slice(part);
        Ok(Step::More)
    }

    fn output(&mut self, part: WireOutput) -> Result<Step, StagingError> {
        let Stage::Epoch(epoch) = &mut self.stage else { return Ok(Step::More) };
        self.output_bytes += part.bytes();
        self.page_bytes += part.items.len() as u64 * ITEM_COST;
        if self.output_bytes.max(self.page_bytes) > self.max_epoch_bytes {
            let (point, limit) = (epoch.point, self.max_epoch_bytes);
            return Err(StagingError::TooLarge { point, what: "output", limit });
        }
        epoch.output.extend(part.items.into_iter().map(|item| match item {
            WireItem::Console(bytes) => OutputItem::Console(bytes),
            WireItem::Frame { slot, bytes } => OutputItem::Frame { slot, bytes },
        }));
        Ok(Step::More)
    }

    fn end(&mut self, end: &EpochEnd) -> Result<Step, StagingError> {
        let stage = std::mem::replace(&mut self.stage, Stage::Idle);
        let Stage::Epoch(epoch) = stage else {
            return Err(StagingError::OutOfPlace { kind: Kind::EpochEnd, state: stage.name() });
        };
        let Epoch { point, begin, parts, blocks, state, output } = *epoch;
        let digest = std::mem::take(&mut self.digest);
        let sums = [
            ("frames", digest.frames().into(), end.frames.into()),
            ("pages", self.data_pages.into(), end.data_pages.into()),
            ("zero pages", self.zero_pages.into(), end.zero_pages.into()),
            ("blocks", self.data_blocks.into(), end.data_blocks.into()),
            ("zero blocks", self.zero_blocks.into(), end.zero_blocks.into()),
            ("bytes of state", state.len() as u128, end.state_bytes.into()),
            ("bytes of output", self.output_bytes.into(), end.output_bytes.into()),
            ("digest", digest.finish(), end.digest),
        ];
        for (what, found, announced) in sums {
            if found != announced {
                return Err(StagingError::Sum { point, what, found, announced });
            }
        }
        let bytes = self.page_bytes + state.len() as u64 + self.output_bytes;
        (self.data_pages, self.zero_pages, self.output_bytes, self.page_bytes) = (0, 0, 0, 0);
        (self.data_blocks, self.zero_blocks) = (0, 0);
        let state = MachineState::decode(&state)?;
        state.check_spec(self.spec_digest)?;
        state.check_cpu(self.cpu.as_ref())?;
        let output = Output { start: position(begin.output_start), items: output };
        if end_of(&output) != state.output || begin.base.is_some_and(|base| !begin.history.contains(base)) {
            return Err(StagingError::Contradicts(point));
        }
        Ok(Step::Whole(Box::new(StagedEpoch {
            point,
            base: begin.base,
            history: begin.history,
            parts,
            blocks,
            state,
            output,
            released: position(begin.released),
            promotions: begin.promotions,
            bytes,
            measures: self.measures,
        })))
    }
}

impl Stage {
    fn name(&self) -> &'static str {
        match self {
            Self::Idle => "nothing was being sent",
            Self::Seed => "a seed was being sent",
            Self::Epoch(_) => "an epoch was being sent",
        }
    }
}

/// Both ends of a run; between them there is no hole that they are not at both sides of, so each slot is looked at.
fn check_frames(run: &Run, memory: &GuestMemory) -> Result<(), MemoryError> {
    let (first, last) = (run.first, Gfn(run.first.0 + u64::from(run.count) - 1));
    let inside = |gfn: Gfn| {
        let mut slots = memory.layout().slots().iter();
        slots.position(|slot| (slot.first.0..slot.first.0 + slot.frames).contains(&gfn.0))
    };
    let (Some(from), Some(to)) = (inside(first), inside(last)) else {
        memory.check_frame(first)?;
        return memory.check_frame(last);
    };
    let slots = &memory.layout().slots()[from..=to];
    match slots.windows(2).find(|pair| pair[0].first.0 + pair[0].frames != pair[1].first.0) {
        Some(pair) => Err(MemoryError::NoSuchFrame(Gfn(pair[0].first.0 + pair[0].frames))),
        None => Ok(()),
    }
}

fn position(at: Position) -> OutputPosition {
    OutputPosition { console: at.console, frames: at.frames }
}
