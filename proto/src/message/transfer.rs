//! Messages of a transfer, from the primary to the secondary: what stands around the pages of a copy or an epoch.
//!
//! ```text
//!   seed:   SeedBegin (Pages|Blocks)*  EpochBegin(base: none) (Pages|Blocks)* State+ Output* EpochEnd
//!   epoch:                             EpochBegin(base)       (Pages|Blocks)* State+ Output* EpochEnd Verify?
//! ```
//!
//! The point of a frame's header is that of the epoch; before the `EpochBegin` of a seed it is the newest point that
//! was cut when the seed began. A page or block may come more than once in a transfer; the last version wins.

use colo_common::limits::{MAX_EPOCH_FRAMES, MAX_FRAME};
use colo_common::{History, Point};
use serde::{Deserialize, Deserializer, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::{Message, MessageError, bounded, check_range};
use crate::frame::{Header, Kind, MAX_BODY};

/// Items of output in one frame: an epoch's frames with console bytes between any two, so that what a guest can say
/// in an epoch fits and a body of empty items does not grow beyond it in memory.
pub const MAX_OUTPUT_ITEMS: usize = 2 * MAX_EPOCH_FRAMES + 1;

/// What a frame of pages or blocks and an item of output count for beside their bytes, against the `max_epoch_bytes` of a secondary.
pub const ITEM_COST: u64 = 64;

/// Console bytes or frames of a guest's whole life, as in a machine state: far from where counting overflows.
pub const MAX_POSITION: u64 = 1 << 62;

/// Room for the item's tag, slot and length, and for the number of items.
const ITEM_OVERHEAD: usize = 16;

const _: () = assert!(MAX_FRAME + 2 * ITEM_OVERHEAD <= MAX_BODY);

/// How the memory or the disk of a copy is made whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SeedPart {
    /// All that is populated is sent. The secondary empties its copy of it first. Never said of a disk.
    All,
    /// What has other digests is sent. What the secondary has is the base.
    Differing,
    /// What was written since this point is sent, and what the secondary says that it may hold otherwise than there.
    Since(Point),
}

/// How a copy is made whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SeedMode {
    /// Its memory.
    pub memory: SeedPart,
    /// Its disk; of no meaning without one.
    pub disk: SeedPart,
}

impl SeedMode {
    /// All memory, and what differs of the disk: what a secondary that holds nothing is sent.
    pub const FULL: Self = Self { memory: SeedPart::All, disk: SeedPart::Differing };
    /// What differs.
    pub const DIFFERING: Self = Self { memory: SeedPart::Differing, disk: SeedPart::Differing };

    /// What was written since this point, of both.
    pub const fn since(point: Point) -> Self {
        Self { memory: SeedPart::Since(point), disk: SeedPart::Since(point) }
    }

    /// Whether the secondary is asked where it may hold something else.
    pub fn asks_diverged(self) -> bool {
        [self.memory, self.disk].into_iter().any(|part| matches!(part, SeedPart::Since(_)))
    }
}

/// A copy begins. From here on what the secondary has is inconsistent, until the epoch that completes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedBegin {
    /// All of it, or what differs.
    pub mode: SeedMode,
    /// The sender's history.
    #[serde(with = "bounded::history")]
    pub history: History,
}

impl Message for SeedBegin {
    const KIND: Kind = Kind::SeedBegin;

    fn check(&self) -> Result<(), MessageError> {
        let all = u64::from(self.mode.disk == SeedPart::All);
        check_range(Self::KIND, "disks sent in full:", all, 0, 0)
    }
}

/// A place in what the guest has said, by offsets that grow over the whole life of the vm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Console bytes.
    pub console: u64,
    /// Frames, over all network devices.
    pub frames: u64,
}

/// An epoch begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochBegin {
    /// The point that this epoch is a delta to; none if it completes a seed.
    pub base: Option<Point>,
    /// The sender's history, this epoch's point in it.
    #[serde(with = "bounded::history")]
    pub history: History,
    /// Position of the epoch's first item of output.
    pub output_start: Position,
    /// Position up to which output was released when the epoch was sent.
    pub released: Position,
    /// Console input that the guest has taken, in bytes.
    pub console_input: u64,
    /// Promotions in a row because the guest failed, for `max_promotions`.
    pub promotions: u32,
}

impl Message for EpochBegin {
    const KIND: Kind = Kind::EpochBegin;

    fn check(&self) -> Result<(), MessageError> {
        let positions = [
            ("an output position of", self.output_start.console),
            ("an output position of", self.output_start.frames),
            ("a released position of", self.released.console),
            ("a released position of", self.released.frames),
            ("a console input offset of", self.console_input),
        ];
        positions.into_iter().try_for_each(|(what, at)| check_range(Self::KIND, what, at, 0, MAX_POSITION))
    }
}

/// One piece of output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputItem {
    /// Console bytes.
    Console(#[serde(with = "bounded::bytes")] Vec<u8>),
    /// A frame that the guest sent.
    Frame {
        /// virtio slot of the device.
        slot: u32,
        /// The frame with its virtio-net header.
        #[serde(with = "bounded::bytes")]
        bytes: Vec<u8>,
    },
}

impl OutputItem {
    fn len(&self) -> usize {
        match self {
            Self::Console(bytes) | Self::Frame { bytes, .. } => bytes.len(),
        }
    }
}

/// A part of the epoch's output; the parts follow each other in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// What was said, in order.
    #[serde(deserialize_with = "output_items")]
    pub items: Vec<OutputItem>,
}

fn output_items<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<OutputItem>, D::Error> {
    bounded::list::<D, OutputItem, MAX_OUTPUT_ITEMS>(deserializer)
}

impl Output {
    /// Cuts an epoch's output into parts that fit a frame each. Console bytes may be cut anywhere, frames never.
    ///
    /// # Panics
    /// A frame is longer than [`MAX_FRAME`], which the hold of the guest's output rules out.
    pub fn split(items: impl IntoIterator<Item = OutputItem>) -> Vec<Self> {
        let mut parts = Parts::default();
        for item in items {
            match item {
                OutputItem::Console(bytes) if bytes.len() > MAX_FRAME => {
                    bytes.chunks(MAX_FRAME).for_each(|piece| parts.push(OutputItem::Console(piece.to_vec())));
                }
                item => {
                    assert!(item.len() <= MAX_FRAME, "a frame of {} bytes", item.len());
                    parts.push(item);
                }
            }
        }
        parts.done
    }

    /// Bytes of its items, as [`EpochEnd::output_bytes`] counts them.
    pub fn bytes(&self) -> u64 {
        self.items.iter().map(|item| item.len() as u64).sum()
    }
}

/// Output that is being cut into parts.
#[derive(Default)]
struct Parts {
    done: Vec<Output>,
    /// Bytes of the last part, at most.
    used: usize,
}

impl Parts {
    fn push(&mut self, item: OutputItem) {
        let len = item.len() + ITEM_OVERHEAD;
        match self.done.last_mut() {
            Some(part) if self.used + len <= MAX_BODY && part.items.len() < MAX_OUTPUT_ITEMS => {
                self.used += len;
                part.items.push(item);
            }
            _ => {
                self.used = ITEM_OVERHEAD + len;
                self.done.push(Output { items: vec![item] });
            }
        }
    }
}

impl Message for Output {
    const KIND: Kind = Kind::Output;

    fn check(&self) -> Result<(), MessageError> {
        let frames = self.items.iter().filter(|item| matches!(item, OutputItem::Frame { .. }));
        frames.map(OutputItem::len).try_for_each(|len| {
            check_range(Self::KIND, "a frame of so many bytes:", len as u64, 0, MAX_FRAME as u64)
        })
    }
}

/// An epoch is complete: what the receiver must have counted before it believes a byte of it. All over the whole
/// transfer, so of a seed too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochEnd {
    /// Frames before this one.
    pub frames: u32,
    /// Pages that came with bytes.
    pub data_pages: u64,
    /// Pages that came as zero.
    pub zero_pages: u64,
    /// Blocks that came with bytes.
    pub data_blocks: u64,
    /// Blocks that came as zero.
    pub zero_blocks: u64,
    /// Bytes of the encoded machine state.
    pub state_bytes: u64,
    /// Bytes of output.
    pub output_bytes: u64,
    /// The [`TransferDigest`] of the frames before this one.
    pub digest: u128,
}

impl Message for EpochEnd {
    const KIND: Kind = Kind::EpochEnd;
}

/// XXH3-128 over the checksums (u64, little endian) of a transfer's frames in order: sender and receiver keep one each.
#[derive(Clone, Default)]
pub struct TransferDigest {
    hasher: Xxh3,
    frames: u32,
}

impl TransferDigest {
    /// A digest of no frames.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next frame. The count stops at the last that a header can name, 4 PiB of pages away.
    pub fn add(&mut self, header: &Header) {
        self.hasher.update(&header.checksum.to_le_bytes());
        self.frames = self.frames.saturating_add(1);
    }

    /// Frames taken so far, which is the index of the next one.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// The digest of all frames taken so far.
    pub fn finish(&self) -> u128 {
        self.hasher.digest128()
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_OUTPUT_ITEMS, Message, Output, OutputItem, TransferDigest};
    use crate::frame::{Frame, Kind, MAX_BODY, VmTag};
    use crate::message::MessageError;
    use bytes::Bytes;
    use colo_common::Point;
    use colo_common::limits::{MAX_EPOCH_CONSOLE, MAX_EPOCH_FRAMES, MAX_FRAME};

    fn joined(parts: &[Output]) -> (Vec<u8>, Vec<OutputItem>) {
        let (mut console, mut frames) = (Vec::new(), Vec::new());
        for item in parts.iter().flat_map(|part| &part.items) {
            match item {
                OutputItem::Console(bytes) => console.extend_from_slice(bytes),
                frame @ OutputItem::Frame { .. } => frames.push(frame.clone()),
            }
        }
        (console, frames)
    }

    #[test]
    fn output_of_any_size_is_cut_into_parts_that_fit() {
        let console: Vec<u8> = (0..MAX_EPOCH_CONSOLE + 5000).map(|n| n as u8).collect();
        let frame = |n: usize| OutputItem::Frame { slot: 7, bytes: vec![n as u8; MAX_FRAME] };
        let small = |n: usize| OutputItem::Frame { slot: u32::MAX, bytes: vec![n as u8; 60] };
        let frames: Vec<_> = (0..40).map(frame).chain((0..MAX_EPOCH_FRAMES).map(small)).collect();
        let mut items = vec![OutputItem::Console(console.clone())];
        items.extend(frames.iter().cloned());
        let parts = Output::split(items);
        assert!(parts.len() > 3);
        for part in &parts {
            assert!(!part.items.is_empty());
            assert_eq!(Output::decode(&part.encode()).as_ref(), Ok(part));
        }
        let bytes = console.len() + 40 * MAX_FRAME + MAX_EPOCH_FRAMES * 60;
        assert_eq!(parts.iter().map(Output::bytes).sum::<u64>(), bytes as u64);
        assert_eq!(joined(&parts), (console, frames));
        let many = vec![OutputItem::Console(Vec::new()); MAX_OUTPUT_ITEMS + 1];
        assert_eq!(Output::split(many).len(), 2);
        assert_eq!(Output::split([]), []);
    }

    #[test]
    fn a_frame_that_no_device_sends_is_refused() {
        let long = Output { items: vec![OutputItem::Frame { slot: 0, bytes: vec![0; MAX_FRAME + 1] }] };
        let body = postcard::to_stdvec(&long).unwrap();
        let error = Output::decode(&body).unwrap_err();
        assert!(matches!(error, MessageError::OutOfRange { found, .. } if found == MAX_FRAME as u64 + 1));
        let error = Output::decode(&vec![0; MAX_BODY + 1]).unwrap_err();
        assert_eq!(error, MessageError::TooLong { kind: Kind::Output, found: MAX_BODY + 1, limit: MAX_BODY });
    }

    #[test]
    fn the_digest_sees_content_and_order() {
        let frame = |n: u8| {
            let body = Bytes::from(vec![n; 10]);
            *Frame::new(Kind::State, VmTag(1), Point::default(), u32::from(n), Bytes::new(), body).header()
        };
        let digest = |order: &[u8]| {
            let mut digest = TransferDigest::new();
            order.iter().for_each(|&n| digest.add(&frame(n)));
            (digest.frames(), digest.finish())
        };
        assert_eq!(digest(&[1, 2, 3]), digest(&[1, 2, 3]));
        assert_ne!(digest(&[1, 2, 3]).1, digest(&[1, 3, 2]).1);
        assert_ne!(digest(&[1, 2]).1, digest(&[1, 2, 3]).1);
        assert_eq!(digest(&[]).0, 0);
    }
}
