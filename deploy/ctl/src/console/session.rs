//! What a console has shown and typed, by offset, whatever connection it goes over. Sans-IO: fed with keys, messages of
//! nodes and losses; says what to show and what to send.
//!
//! ```text
//!   detached --attach()--> attaching --Attached--> attached
//!       ^                      |                      |
//!       +------- lost() -------+----------------------+
//! ```
//!
//! Output is shown once: what lies before `next` was shown, by this node or by the one before it. Input is kept until
//! `input_done` says that it is safe, since a failover takes the guest back to a state that may not have read it. What
//! was sent to a guest is not typed into another that was started after it.
//!
//! ```text
//!   start          start + sent      start + tried        start + kept.len()
//!     | sent here, not safe | sent to the node before | not sent yet |
//! ```

use colo_common::life::{self, LIFE};
use colo_common::limits::MAX_CONSOLE_INPUT;
use colo_proto::v1::console_attach::Start as Place;
use colo_proto::v1::console_output::Message;
use colo_proto::v1::{ConsoleAttach, ConsoleBytes};
use std::collections::VecDeque;

/// Bytes of one message of input: what a node passes on at once.
const MAX_INPUT: usize = 4 << 10;

/// Where the first attachment begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// At this offset.
    From(u64),
    /// So many bytes before the end.
    Tail(u64),
}

/// Something to tell the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Output, each byte once.
    Show(Vec<u8>),
    /// Output that is nowhere kept any more.
    Gap {
        /// The first missing byte.
        from: u64,
        /// The first that is there.
        to: u64,
    },
    /// Another guest was started: what comes is its output.
    StartedAnew {
        /// Bytes from its beginning that are not kept any more.
        missing: u64,
        /// The first that is there.
        to: u64,
    },
    /// Output and input go on here.
    Attached {
        /// Offset of the next output.
        output: u64,
    },
    /// So many typed bytes that were sent are not in the guest, and are gone.
    InputGone(u64),
}

/// A node that does not keep to the rules.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SessionError {
    /// Before the first answer.
    #[error("something came before the console was attached")]
    NotAttached,
    /// No offset has a place for them.
    #[error("console bytes at {0} go beyond the last offset that there is")]
    Offset(u64),
    /// A gap that ends before it begins.
    #[error("a gap from {from} to {to}")]
    Gap {
        /// Its begin.
        from: u64,
        /// Its end.
        to: u64,
    },
    /// Nothing in it.
    #[error("a message of an unknown kind")]
    Unknown,
}

/// The state of one console.
#[derive(Debug)]
pub(crate) struct Session {
    start: Start,
    read_only: bool,
    attached: bool,
    /// Offset of the next byte to show; not known before the first attachment by a tail.
    next: Option<u64>,
    input: Input,
}

/// What was typed and is not safe.
#[derive(Debug, Default)]
struct Input {
    /// Offset of the first kept byte; not known before the first attachment.
    start: Option<u64>,
    kept: VecDeque<u8>,
    /// Kept bytes that were sent over this attachment.
    sent: usize,
    /// Kept bytes that were ever sent; never less than `sent`.
    tried: usize,
}

impl Session {
    /// A console that begins there.
    pub(crate) fn new(start: Start, read_only: bool) -> Self {
        let next = match start {
            Start::From(offset) => Some(offset),
            Start::Tail(_) => None,
        };
        Self { start, read_only, attached: false, next, input: Input::default() }
    }

    /// The first message of a new attachment.
    pub(crate) fn attach(&mut self) -> ConsoleAttach {
        self.lost();
        let place = match (self.next, self.start) {
            (Some(offset), _) | (None, Start::From(offset)) => Place::From(offset),
            (None, Start::Tail(bytes)) => Place::Tail(bytes),
        };
        ConsoleAttach { start: Some(place), read_only: self.read_only }
    }

    /// The attachment is over.
    pub(crate) fn lost(&mut self) {
        self.attached = false;
        self.input.sent = 0;
    }

    /// Keeps what was typed; tells how much of it. The rest has to wait, or is lost.
    pub(crate) fn typed(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        self.input.kept.extend(&bytes[..taken]);
        taken
    }

    /// Bytes that can be typed now.
    pub(crate) fn room(&self) -> usize {
        MAX_CONSOLE_INPUT.saturating_sub(self.input.kept.len())
    }

    /// Input to send now; each byte once over each attachment.
    pub(crate) fn next_input(&mut self) -> Option<ConsoleBytes> {
        let input = &mut self.input;
        let start = input.start.filter(|_| self.attached && !self.read_only)?;
        let bytes: Vec<u8> = input.kept.iter().skip(input.sent).take(MAX_INPUT).copied().collect();
        let offset = start.checked_add(input.sent as u64)?;
        if bytes.is_empty() {
            return None;
        }
        input.sent += bytes.len();
        input.tried = input.tried.max(input.sent);
        Some(ConsoleBytes { offset, bytes })
    }

    /// Takes a message of the node.
    pub(crate) fn receive(&mut self, message: Option<Message>) -> Result<Vec<Event>, SessionError> {
        match (message.ok_or(SessionError::Unknown)?, self.attached) {
            (Message::Attached(place), _) => {
                let output = *self.next.get_or_insert(place.output_offset);
                self.attached = true;
                let gone = self.input.attach(place.input_offset);
                let gone = (gone > 0).then_some(Event::InputGone(gone));
                Ok([Event::Attached { output }].into_iter().chain(gone).collect())
            }
            (_, false) => Err(SessionError::NotAttached),
            (Message::Output(ConsoleBytes { offset, bytes }), true) => self.output(offset, bytes),
            (Message::Gap(gap), true) => {
                let next = self.next.ok_or(SessionError::NotAttached)?;
                if gap.to < gap.from {
                    return Err(SessionError::Gap { from: gap.from, to: gap.to });
                }
                Ok(self.skip_to(next, gap.to).into_iter().collect())
            }
            (Message::InputDone(done), true) => {
                self.input.done(done);
                Ok(Vec::new())
            }
        }
    }

    /// Bytes that were shown are dropped; a hole before them is one also if the node does not say so.
    fn output(&mut self, offset: u64, mut bytes: Vec<u8>) -> Result<Vec<Event>, SessionError> {
        let next = self.next.ok_or(SessionError::NotAttached)?;
        let end = offset.checked_add(bytes.len() as u64).ok_or(SessionError::Offset(offset))?;
        let hole = self.skip_to(next, offset);
        let known = usize::try_from(next.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        bytes.drain(..known);
        self.next = Some(next.max(end));
        let fresh = (!bytes.is_empty()).then_some(Event::Show(bytes));
        Ok(hole.into_iter().chain(fresh).collect())
    }

    fn skip_to(&mut self, next: u64, to: u64) -> Option<Event> {
        (to > next).then(|| {
            self.next = Some(to);
            if life::is_same(next, to) {
                Event::Gap { from: next, to }
            } else {
                Event::StartedAnew { missing: to % LIFE, to }
            }
        })
    }
}

impl Input {
    /// The guest goes on with input at `offset`. Tells how many bytes are gone that were safe.
    fn attach(&mut self, offset: u64) -> u64 {
        let Some(start) = self.start else {
            self.start = Some(offset);
            return 0;
        };
        match offset.checked_sub(start) {
            // Nodes promise that this does not happen. Input can only go on where the guest takes it.
            None => {
                self.start = Some(offset);
                start - offset
            }
            Some(_) if !life::is_same(start, offset) => {
                let gone = self.tried as u64;
                self.go_on_at(offset);
                gone
            }
            Some(ahead) => {
                self.taken(offset, ahead);
                0
            }
        }
    }

    /// The guest has input up to `offset`, `ahead` bytes from the start.
    fn taken(&mut self, offset: u64, ahead: u64) {
        match usize::try_from(ahead).ok().filter(|&ahead| ahead <= self.tried) {
            Some(ahead) => self.sent = ahead,
            // More than we ever sent: another console types too, and what we have not sent comes after its bytes.
            None => self.go_on_at(offset),
        }
    }

    /// Everything before `offset` is safe.
    fn done(&mut self, offset: u64) {
        let Some(ahead) = self.start.and_then(|start| offset.checked_sub(start)) else { return };
        match usize::try_from(ahead).ok().filter(|&ahead| ahead <= self.tried) {
            Some(ahead) => {
                self.kept.drain(..ahead);
                self.start = Some(offset);
                self.sent = self.sent.saturating_sub(ahead);
                self.tried -= ahead;
            }
            None => self.go_on_at(offset),
        }
    }

    fn go_on_at(&mut self, offset: u64) {
        self.kept.drain(..self.tried);
        (self.start, self.sent, self.tried) = (Some(offset), 0, 0);
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
