//! What is typed at the guest's console and has not been read: kept here, whichever console gets it.

use colo_common::limits::MAX_CONSOLE_INPUT;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    /// Offset of the next byte that is taken from outside.
    offset: u64,
}

/// Input that waits for the guest.
#[derive(Debug, Default)]
pub(crate) struct ConsoleInput {
    waiting: Mutex<Waiting>,
}

impl ConsoleInput {
    /// Takes bytes from outside, as far as there is room; answers how many.
    pub(super) fn offer(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.waiting();
        let taken = bytes.len().min(MAX_CONSOLE_INPUT.saturating_sub(waiting.bytes.len()));
        waiting.bytes.extend(&bytes[..taken]);
        waiting.offset += taken as u64;
        taken
    }

    pub(super) fn offset(&self) -> u64 {
        self.waiting().offset
    }

    pub(super) fn count_from(&self, offset: u64) {
        self.waiting().offset = offset;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting().bytes.is_empty()
    }

    /// Hands up to `most` bytes over; those that `take` took are gone.
    pub(super) fn hand_over<E>(
        &self,
        most: usize,
        take: impl FnOnce(&[u8]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let mut waiting = self.waiting();
        let bytes: Vec<u8> = waiting.bytes.iter().take(most).copied().collect();
        let taken = take(&bytes)?;
        waiting.bytes.drain(..taken);
        Ok(taken)
    }

    /// What waits, and the offset after it.
    pub(super) fn save(&self) -> (Vec<u8>, u64) {
        let waiting = self.waiting();
        (waiting.bytes.iter().copied().collect(), waiting.offset)
    }

    pub(super) fn restore(&self, bytes: &[u8], offset: u64) {
        *self.waiting() = Waiting { bytes: bytes.iter().copied().collect(), offset };
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
