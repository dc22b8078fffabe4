//! What the guest said in the open epoch, held until the epoch loop may let it out.
//!
//! Console bytes and frames are kept in the one order in which the guest made them, each with an absolute
//! position (counted from the guest's start, which has offsets of its own: [`colo_common::life`]), so that after
//! a promotion the same output can be offered again and be recognised. The hold is bounded: when it is full,
//! whoever makes output waits for the cut that takes it; nothing is ever dropped.

use colo_common::limits::{MAX_EPOCH_CONSOLE, MAX_EPOCH_FRAME_BYTES, MAX_EPOCH_FRAMES, MAX_FRAME};
use colo_common::{Term, life};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};

/// Where a guest is in its output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputPosition {
    /// Console bytes.
    pub console: u64,
    /// Frames, over all network devices.
    pub frames: u64,
}

impl OutputPosition {
    /// Where a guest begins that is started from its boot files in `term`.
    pub fn at_start(term: Term) -> Self {
        let first = life::first_offset(term);
        Self { console: first, frames: first }
    }
}

/// One piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputItem {
    /// Console bytes that the guest wrote without a frame in between.
    Console(Vec<u8>),
    /// A frame that the guest sent.
    Frame {
        /// virtio slot of the device.
        slot: u32,
        /// The frame with its virtio-net header.
        bytes: Vec<u8>,
    },
}

/// The output of one epoch, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Position of the first item.
    pub start: OutputPosition,
    /// What was said, in order.
    pub items: Vec<OutputItem>,
}

impl Output {
    /// Console bytes of the epoch, without what came between.
    pub fn console(&self) -> Vec<u8> {
        let bytes = self.items.iter().filter_map(|item| match item {
            OutputItem::Console(bytes) => Some(bytes.as_slice()),
            OutputItem::Frame { .. } => None,
        });
        bytes.flatten().copied().collect()
    }
}

/// The hold is full, or the frame too long: try again after the next cut, or drop the guest's descriptor.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum EgressError {
    /// Backpressure: the epoch holds as much as it may.
    #[error("the epoch's output is full")]
    Full,
    /// A frame longer than any device may send.
    #[error("a frame of {0} bytes is longer than {MAX_FRAME}")]
    FrameTooLong(usize),
}

#[derive(Debug, Default)]
struct Open {
    output: Output,
    end: OutputPosition,
    frame_bytes: usize,
}

/// The output of the open epoch; shared by the vCPU threads and the device workers.
#[derive(Debug, Default)]
pub struct Egress {
    open: Mutex<Open>,
}

impl Egress {
    /// Appends console bytes. The console cannot refuse what the guest has written, so this always succeeds; whoever
    /// calls asks [`is_full`](Self::is_full) before it lets the guest write more.
    pub fn push_console(&self, said: &[u8]) {
        if said.is_empty() {
            return;
        }
        let mut open = self.open();
        open.end.console += said.len() as u64;
        match open.output.items.last_mut() {
            Some(OutputItem::Console(bytes)) => bytes.extend_from_slice(said),
            _ => open.output.items.push(OutputItem::Console(said.to_vec())),
        }
    }

    /// Appends a frame.
    ///
    /// # Errors
    /// The hold is full (keep the descriptor and try again after the cut), or the frame is too long.
    pub fn push_frame(&self, slot: u32, bytes: Vec<u8>) -> Result<(), EgressError> {
        if bytes.len() > MAX_FRAME {
            return Err(EgressError::FrameTooLong(bytes.len()));
        }
        let mut open = self.open();
        if open.is_full() {
            return Err(EgressError::Full);
        }
        open.end.frames += 1;
        open.frame_bytes += bytes.len();
        open.output.items.push(OutputItem::Frame { slot, bytes });
        Ok(())
    }

    /// Whether the guest has to wait for the cut before it makes more.
    pub fn is_full(&self) -> bool {
        self.open().is_full()
    }

    /// Takes the open epoch's output and begins the next one's.
    pub fn take(&self) -> Output {
        let mut open = self.open();
        open.frame_bytes = 0;
        let start = open.end;
        std::mem::replace(&mut open.output, Output { start, items: Vec::new() })
    }

    /// Position after everything made so far.
    pub fn position(&self) -> OutputPosition {
        self.open().end
    }

    /// Goes on from a restored position with nothing held.
    pub fn restore(&self, position: OutputPosition) {
        let output = Output { start: position, items: Vec::new() };
        *self.open() = Open { output, end: position, frame_bytes: 0 };
    }

    fn open(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn is_full(&self) -> bool {
        let console = self.end.console - self.output.start.console;
        let frames = self.end.frames - self.output.start.frames;
        console >= MAX_EPOCH_CONSOLE as u64
            || frames >= MAX_EPOCH_FRAMES as u64
            || self.frame_bytes >= MAX_EPOCH_FRAME_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::{Egress, EgressError, Output, OutputItem, OutputPosition};
    use colo_common::limits::{MAX_EPOCH_CONSOLE, MAX_EPOCH_FRAMES, MAX_FRAME};

    #[test]
    fn output_keeps_its_order_and_positions_across_epochs() {
        let egress = Egress::default();
        egress.push_console(b"ab");
        egress.push_frame(1, vec![9]).unwrap();
        egress.push_console(b"c");
        let first = egress.take();
        let frame = OutputItem::Frame { slot: 1, bytes: vec![9] };
        let items = vec![OutputItem::Console(b"ab".to_vec()), frame, OutputItem::Console(b"c".to_vec())];
        assert_eq!(first, Output { start: OutputPosition::default(), items });
        assert_eq!(first.console(), b"abc");
        egress.push_console(b"d");
        assert_eq!(egress.take().start, OutputPosition { console: 3, frames: 1 });
        assert_eq!(egress.position(), OutputPosition { console: 4, frames: 1 });
    }

    #[test]
    fn a_full_hold_refuses_frames_until_it_is_taken() {
        let egress = Egress::default();
        for _ in 0..MAX_EPOCH_FRAMES {
            egress.push_frame(0, vec![0; 60]).unwrap();
        }
        assert_eq!(egress.push_frame(0, vec![0]), Err(EgressError::Full));
        egress.take();
        egress.push_frame(0, vec![0]).unwrap();
        assert_eq!(
            egress.push_frame(0, vec![0; MAX_FRAME + 1]),
            Err(EgressError::FrameTooLong(MAX_FRAME + 1))
        );
        for _ in 0..MAX_EPOCH_CONSOLE {
            egress.push_console(b"x");
        }
        assert!(egress.is_full());
    }

    #[test]
    fn a_restored_guest_goes_on_at_its_position() {
        let egress = Egress::default();
        egress.push_console(b"x");
        egress.restore(OutputPosition { console: 41, frames: 7 });
        egress.push_console(b"y");
        let output = egress.take();
        assert_eq!((output.start.console, output.console()), (41, b"y".to_vec()));
    }
}
