//! Turns an epoch, or pages of a seed, into frames. Zero pages become runs without bytes; everything else is sent from
//! the staging copy as it lies there.

use bytes::Bytes;
use colo_common::{BLOCK_SIZE, Block, Gfn, History, PAGE_SIZE, Point};
use colo_proto::frame::{Frame, Kind, MAX_BODY, MAX_FRAME_PAGES, VmTag};
use colo_proto::message::{
    EpochBegin, EpochEnd, Output as WireOutput, OutputItem as WireItem, Position, SeedBegin, SeedMode,
    TransferDigest, Verify,
};
use colo_proto::pages::{Content, MAX_RUNS, Run, RunTable};
use colo_vmm::block_runs::{BlockRun, NewestBlocks};
use colo_vmm::egress::{OutputItem, OutputPosition};
use colo_vmm::page_batch::{PageBuffer, is_zero};
use colo_vmm::{DiskWrite, PageBatch};

use crate::transfer::Epoch;

/// Pages of an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCount {
    /// With bytes.
    pub data: u64,
    /// Zero.
    pub zero: u64,
}

/// Numbers and sums up the frames of one transfer: a seed with the epoch that completes it, or an epoch.
pub struct Encoder {
    vm: VmTag,
    point: Point,
    digest: TransferDigest,
    data_pages: u64,
    zero_pages: u64,
    data_blocks: u64,
    zero_blocks: u64,
    state_bytes: u64,
    output_bytes: u64,
}

impl Encoder {
    /// A transfer that begins now.
    pub fn new(vm: VmTag, point: Point) -> Self {
        let digest = TransferDigest::new();
        let (data_pages, zero_pages, data_blocks, zero_blocks) = (0, 0, 0, 0);
        let (state_bytes, output_bytes) = (0, 0);
        Self {
            vm,
            point,
            digest,
            data_pages,
            zero_pages,
            data_blocks,
            zero_blocks,
            state_bytes,
            output_bytes,
        }
    }

    /// The frame that begins a seed.
    pub fn seed(&mut self, mode: SeedMode, history: Vec<Point>) -> Frame {
        let frame =
            Frame::transfer(self.vm, self.point, self.next(), &SeedBegin { mode, history: checked(history) });
        self.add(frame)
    }

    /// Pages, as many frames as they need.
    pub fn pages(&mut self, batch: PageBatch, mut send: impl FnMut(Frame)) {
        let (runs, buffer) = batch.into_parts();
        let mut cutter = Cutter { encoder: self, runs: Vec::new(), from: 0, pages: Vec::new(), holes: false };
        let bytes = Bytes::from_owner(SharedBuffer(buffer));
        let mut at = 0;
        for (first, count) in runs {
            for gfn in (first.0..first.0 + count).map(Gfn) {
                let page = &bytes[at * PAGE_SIZE..(at + 1) * PAGE_SIZE];
                let zero = is_zero(page.try_into().expect("a page"));
                cutter.push(gfn, at, if zero { Content::Zero } else { Content::Data }, &bytes, &mut send);
                at += 1;
            }
        }
        cutter.flush(&bytes, &mut send);
    }

    /// Zero pages, without bytes.
    pub fn zeros(&mut self, runs: &[(Gfn, u64)], mut send: impl FnMut(Frame)) {
        let pieces = runs.iter().flat_map(|&(first, count)| {
            let step = u64::from(u32::MAX);
            (0..count).step_by(step as usize).map(move |at| (Gfn(first.0 + at), step.min(count - at)))
        });
        let runs: Vec<Run> =
            pieces.map(|(first, count)| Run { first, count: count as u32, content: Content::Zero }).collect();
        for part in runs.chunks(MAX_RUNS) {
            send(self.page_frame(part, Bytes::new()));
        }
    }

    /// Blocks of the disk, of each its newest content. Zeroes are never counted block by block: a guest may have made its
    /// whole disk zero.
    pub fn blocks(&mut self, writes: &[DiskWrite], mut send: impl FnMut(Frame)) {
        let mut newest = NewestBlocks::default();
        newest.extend(writes.iter().map(BlockRun::from));
        let mut open = BlockFrame::default();
        for run in newest.into_runs() {
            let (mut first, mut left) = (run.first().0, run.count());
            let mut rest: &[u8] = run.bytes().unwrap_or_default();
            while left > 0 {
                let content = if run.bytes().is_some() { Content::Data } else { Content::Zero };
                let room = open.room(content);
                if room == 0 {
                    let full = std::mem::take(&mut open);
                    send(self.block_frame(&full.runs, full.body.into()));
                    continue;
                }
                let count = left.min(room);
                let bytes;
                (bytes, rest) = rest.split_at(rest.len().min(count as usize * BLOCK_SIZE));
                open.push(Run { first: Block(first), count: count as u32, content }, bytes);
                (first, left) = (first + count, left - count);
            }
        }
        if !open.runs.is_empty() {
            send(self.block_frame(&open.runs, open.body.into()));
        }
    }

    /// An epoch, which completes the transfer; answers the pages in it.
    pub fn epoch(&mut self, epoch: Epoch, mut send: impl FnMut(Frame)) -> PageCount {
        self.point = epoch.point;
        // Those of a seed that it completes are not its own.
        let before = (self.data_pages, self.zero_pages);
        let begin = EpochBegin {
            base: epoch.base,
            history: checked(epoch.history),
            output_start: position(epoch.output.start),
            released: position(epoch.released),
            console_input: epoch.state.console_input,
            promotions: epoch.promotions,
        };
        let frame = Frame::transfer(self.vm, self.point, self.next(), &begin);
        send(self.add(frame));
        self.pages(epoch.pages, &mut send);
        self.blocks(&epoch.blocks, &mut send);
        let state = Bytes::from(epoch.state.encode());
        self.state_bytes = state.len() as u64;
        for at in (0..state.len()).step_by(MAX_BODY) {
            let part = state.slice(at..state.len().min(at + MAX_BODY));
            let frame = Frame::new(Kind::State, self.vm, self.point, self.next(), Bytes::new(), part);
            send(self.add(frame));
        }
        let items = epoch.output.items.into_iter().map(|item| match item {
            OutputItem::Console(bytes) => WireItem::Console(bytes),
            OutputItem::Frame { slot, bytes } => WireItem::Frame { slot, bytes },
        });
        for part in WireOutput::split(items) {
            self.output_bytes += part.bytes();
            let frame = Frame::transfer(self.vm, self.point, self.next(), &part);
            send(self.add(frame));
        }
        let end = EpochEnd {
            frames: self.digest.frames(),
            data_pages: self.data_pages,
            zero_pages: self.zero_pages,
            data_blocks: self.data_blocks,
            zero_blocks: self.zero_blocks,
            state_bytes: self.state_bytes,
            output_bytes: self.output_bytes,
            digest: self.digest.finish(),
        };
        send(Frame::transfer(self.vm, self.point, self.next(), &end));
        PageCount { data: self.data_pages - before.0, zero: self.zero_pages - before.1 }
    }

    /// What is to be compared at the point of the epoch just before; of no transfer.
    pub fn verify(&self, verify: &Verify) -> Frame {
        Frame::transfer(self.vm, self.point, 0, verify)
    }

    fn next(&self) -> u32 {
        self.digest.frames()
    }

    fn add(&mut self, frame: Frame) -> Frame {
        self.digest.add(frame.header());
        frame
    }

    fn page_frame(&mut self, runs: &[Run], body: Bytes) -> Frame {
        self.data_pages += RunTable::data(runs);
        self.zero_pages += RunTable::zero(runs);
        let table = Bytes::from(RunTable::encode(runs));
        let frame = Frame::new(Kind::Pages, self.vm, self.point, self.next(), table, body);
        self.add(frame)
    }

    fn block_frame(&mut self, runs: &[Run<Block>], body: Bytes) -> Frame {
        self.data_blocks += RunTable::data(runs);
        self.zero_blocks += RunTable::zero(runs);
        let table = Bytes::from(RunTable::encode(runs));
        let frame = Frame::new(Kind::Blocks, self.vm, self.point, self.next(), table, body);
        self.add(frame)
    }
}

/// Keeps the staging copy alive for as long as any frame of it is on its way.
struct SharedBuffer(PageBuffer);

impl AsRef<[u8]> for SharedBuffer {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// Cuts pages into frames.
struct Cutter<'e> {
    encoder: &'e mut Encoder,
    runs: Vec<Run>,
    /// Where the frame's first page lies in the staging copy.
    from: usize,
    /// Where its data pages lie.
    pages: Vec<usize>,
    /// Its data pages are not one piece of the staging copy.
    holes: bool,
}

impl Cutter<'_> {
    fn push(&mut self, gfn: Gfn, at: usize, content: Content, bytes: &Bytes, send: &mut impl FnMut(Frame)) {
        let data = content == Content::Data;
        let continues = self.runs.last().is_some_and(|run| {
            run.content == content && run.first.0 + u64::from(run.count) == gfn.0 && run.count < u32::MAX
        });
        if (data && self.pages.len() == MAX_FRAME_PAGES) || (!continues && self.runs.len() == MAX_RUNS) {
            self.flush(bytes, send);
        }
        match self.runs.last_mut().filter(|_| continues) {
            Some(run) => run.count += 1,
            None => self.runs.push(Run { first: gfn, count: 1, content }),
        }
        if data {
            match self.pages.last() {
                None => self.from = at,
                Some(&last) => self.holes |= last + 1 != at,
            }
            self.pages.push(at);
        }
    }

    fn flush(&mut self, bytes: &Bytes, send: &mut impl FnMut(Frame)) {
        if self.runs.is_empty() {
            return;
        }
        let body = if self.holes {
            let parts = self.pages.iter().map(|&at| &bytes[at * PAGE_SIZE..(at + 1) * PAGE_SIZE]);
            Bytes::from(parts.collect::<Vec<_>>().concat())
        } else {
            bytes.slice(self.from * PAGE_SIZE..(self.from + self.pages.len()) * PAGE_SIZE)
        };
        let frame = self.encoder.page_frame(&self.runs, body);
        self.runs.clear();
        self.pages.clear();
        (self.from, self.holes) = (0, false);
        send(frame);
    }
}

/// A frame of blocks that is being filled.
#[derive(Default)]
struct BlockFrame {
    runs: Vec<Run<Block>>,
    body: Vec<u8>,
}

impl BlockFrame {
    /// How many blocks more a run may have; none if the frame is full.
    fn room(&self, content: Content) -> u64 {
        match content {
            _ if self.runs.len() == MAX_RUNS => 0,
            Content::Zero => u32::MAX.into(),
            Content::Data => (MAX_FRAME_PAGES - self.body.len() / BLOCK_SIZE) as u64,
        }
    }

    fn push(&mut self, run: Run<Block>, bytes: &[u8]) {
        self.body.extend_from_slice(bytes);
        if let Some(last) = self.runs.last_mut()
            && last.content == run.content
            && last.first.0 + u64::from(last.count) == run.first.0
            && let Some(count) = last.count.checked_add(run.count)
        {
            last.count = count;
        } else {
            self.runs.push(run);
        }
    }
}

fn position(at: OutputPosition) -> Position {
    Position { console: at.console, frames: at.frames }
}

fn checked(history: Vec<Point>) -> History {
    History::from_points(history).expect("the runner's own history ascends")
}

#[cfg(test)]
mod tests {
    use super::Encoder;
    use bytes::Bytes;
    use colo_common::{BLOCK_SIZE, Block, Epoch, Point, Term};
    use colo_proto::frame::{Frame, VmTag};
    use colo_proto::pages::{Content, Run, RunTable};
    use colo_vmm::{DiskContent, DiskWrite};
    use proptest::prelude::{ProptestConfig, any, prop_assert_eq, proptest};
    use std::collections::BTreeMap;

    fn frames(writes: &[DiskWrite]) -> Vec<Frame> {
        let (vm, point) = ("vm".parse().expect("a name"), Point { term: Term(1), epoch: Epoch(1) });
        let mut frames = Vec::new();
        Encoder::new(VmTag::of(&vm), point).blocks(writes, |frame| frames.push(frame));
        frames
    }

    fn runs(frame: &Frame) -> Vec<Run<Block>> {
        let runs = RunTable::decode(frame.table(), u64::MAX).expect("a table");
        RunTable::check_body(&runs, frame.body().len()).expect("its body");
        runs
    }

    #[test]
    fn a_disk_of_zeroes_is_a_few_runs() {
        let blocks = (1 << 33) + 5;
        let frames = frames(&[DiskWrite { first: Block(1), content: DiskContent::Zeroes(blocks) }]);
        let runs: Vec<_> = frames.iter().flat_map(runs).collect();
        assert_eq!((frames.len(), runs.len()), (1, 3));
        assert_eq!(runs.iter().map(|run| u64::from(run.count)).sum::<u64>(), blocks);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_comes_is_the_newest_of_every_block(
            writes in proptest::collection::vec((0..3000_u64, 1..400_u64, any::<u8>()), 0..20),
        ) {
            let mut model = BTreeMap::new();
            let writes: Vec<_> = writes.into_iter().map(|(first, count, value)| {
                model.extend((first..first + count).map(|block| (block, value)));
                let content = match value {
                    0..128 => DiskContent::Zeroes(count),
                    _ => DiskContent::Bytes(Bytes::from(vec![value; count as usize * BLOCK_SIZE])),
                };
                DiskWrite { first: Block(first), content }
            }).collect();
            let (mut found, mut end) = (BTreeMap::new(), 0);
            for frame in frames(&writes) {
                let mut body = frame.body().chunks(BLOCK_SIZE);
                for run in runs(&frame) {
                    assert!(run.first.0 >= end, "{run:?} after {end}");
                    end = run.first.0 + u64::from(run.count);
                    for block in run.places() {
                        let data = run.content == Content::Data;
                        found.insert(block.0, data.then(|| body.next().expect("its bytes")[7]));
                    }
                }
            }
            let model: BTreeMap<_, _> =
                model.into_iter().map(|(block, value)| (block, (value >= 128).then_some(value))).collect();
            prop_assert_eq!(found, model);
        }
    }
}
