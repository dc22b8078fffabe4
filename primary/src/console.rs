//! The console of a vm as the outside sees it: bytes that were let out, by absolute offset, kept for a while so that a
//! reader that comes late or comes again misses nothing.

use colo_vmm::egress::Output;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

use crate::release::Sink;

/// Bytes kept: several screens of scrollback, and far more than a reader lags.
pub const KEPT_CONSOLE: usize = 1 << 20;
/// Bytes handed over at once at most.
pub const MAX_CHUNK: usize = 64 << 10;

#[derive(Debug, Default)]
struct Kept {
    /// Offset of the first byte.
    start: u64,
    bytes: VecDeque<u8>,
}

impl Kept {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

/// The released console.
#[derive(Clone, Debug)]
pub struct Console {
    kept: Arc<Mutex<Kept>>,
    end: Arc<watch::Sender<u64>>,
}

/// A piece of the console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Offset of its first byte; later than what was asked for if that is no longer kept.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Default for Console {
    fn default() -> Self {
        Self { kept: Arc::default(), end: Arc::new(watch::Sender::new(0)) }
    }
}

impl Console {
    /// Nothing is known before `offset`, where the guest begins.
    pub fn begin_at(&self, offset: u64) {
        self.push(offset, b"");
    }

    /// Takes bytes that begin at `offset`. What is known already is dropped; beyond a gap everything begins anew there.
    pub fn push(&self, offset: u64, bytes: &[u8]) {
        let mut kept = self.kept();
        let end = kept.end();
        let fresh = match end.checked_sub(offset) {
            // Said again, as after a promotion.
            Some(known) => bytes.get(usize::try_from(known).unwrap_or(usize::MAX)..).unwrap_or_default(),
            None => {
                kept.bytes.clear();
                kept.start = offset;
                bytes
            }
        };
        kept.bytes.extend(fresh);
        let surplus = kept.bytes.len().saturating_sub(KEPT_CONSOLE);
        kept.bytes.drain(..surplus);
        kept.start += surplus as u64;
        let end = kept.end();
        drop(kept);
        self.end.send_replace(end);
    }

    /// Up to [`MAX_CHUNK`] bytes from `offset` on, or from the oldest kept; nothing if there are none yet.
    pub fn read(&self, offset: u64) -> Option<Chunk> {
        let kept = self.kept();
        let offset = offset.max(kept.start);
        let skip = usize::try_from(offset - kept.start).ok().filter(|&skip| skip < kept.bytes.len())?;
        let bytes: Vec<u8> = kept.bytes.iter().skip(skip).take(MAX_CHUNK).copied().collect();
        Some(Chunk { offset, bytes })
    }

    /// Offset of the oldest byte that is kept.
    pub fn start(&self) -> u64 {
        self.kept().start
    }

    /// Offset after the newest byte.
    pub fn end(&self) -> u64 {
        self.kept().end()
    }

    /// Tells of every change of the end.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink for Console {
    fn let_out(&mut self, output: Output) {
        self.push(output.start.console, &output.console());
    }
}

#[cfg(test)]
mod tests {
    use super::{Chunk, Console, KEPT_CONSOLE};

    #[test]
    fn bytes_are_found_by_offset_and_said_again_only_once() {
        let console = Console::default();
        assert_eq!(console.read(0), None);
        console.push(0, b"hello ");
        console.push(3, b"lo world");
        assert_eq!(console.read(0), Some(Chunk { offset: 0, bytes: b"hello world".to_vec() }));
        assert_eq!(console.read(6), Some(Chunk { offset: 6, bytes: b"world".to_vec() }));
        assert_eq!((console.read(11), console.read(99)), (None, None));
        console.push(2, b"llo");
        assert_eq!(console.end(), 11);
    }

    #[test]
    fn a_reader_of_the_guest_before_goes_on_at_the_first_byte_of_the_next() {
        let console = Console::default();
        console.begin_at(1 << 40);
        assert_eq!((console.start(), console.end()), (1 << 40, 1 << 40));
        assert_eq!(console.read(500), None);
        console.push(1 << 40, b"booting");
        assert_eq!(console.read(500), Some(Chunk { offset: 1 << 40, bytes: b"booting".to_vec() }));
    }

    #[test]
    fn what_is_no_longer_kept_is_a_gap_that_shows() {
        let console = Console::default();
        console.push(10, b"abc");
        assert_eq!(console.read(0).unwrap().offset, 10);
        console.push(13, &vec![b'x'; KEPT_CONSOLE]);
        let first = console.read(0).unwrap();
        assert_eq!((first.offset, first.bytes[0]), (13, b'x'));
        console.push(u64::MAX / 2, b"far");
        assert_eq!(console.read(0).unwrap().bytes, b"far");
    }
}
