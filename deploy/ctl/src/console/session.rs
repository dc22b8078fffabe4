//! What a console has shown and typed, by offset, whatever connection it goes over. Sans-IO: fed with keys, messages of
//! nodes and losses; says what to show and what to send.
//!
//! ```text
//!   detached --attach()--> attaching --Attached--> attached
//!       ^                      |                      |
//!       +------- lost() -------+----------------------+
//! ```
//!
//! Output is shown once: what lies before `next` was shown, by this node or by the one before it. Input is kept until it
//! is safe, since a failover takes the guest back to a state that may not have read it; what was sent to a guest is not
//! typed into another that was started after it. Others may type too, so a node tells where each part of it went in the
//! guest's input:
//!
//! ```text
//!   | taken: where it went is known | sent, and not known to be taken | not sent yet |
//!   0                          taken_len()                           sent        kept.len()
//! ```
//!
//! Taken input is safe once the nodes say that all input up to its place is. Where a node that was lost took bytes
//! without a word, they are looked for right behind those whose place is known: right unless another console typed in
//! that very moment.

use colo_common::life::{self, LIFE};
use colo_common::limits::MAX_CONSOLE_INPUT;
use colo_proto::v1::console_attach::Start as Place;
use colo_proto::v1::console_output::Message;
use colo_proto::v1::{ConsoleAttach, ConsoleBytes, ConsoleTaken};
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
    /// More was taken than was sent, or less than before, or at a place that cannot be.
    #[error("{count} bytes of input taken up to {offset}")]
    Taken {
        /// Of this attachment.
        count: u64,
        /// The place after them.
        offset: u64,
    },
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
    /// Who types: the same over all attachments. Nobody, if it only looks.
    typist: Option<u128>,
    attached: bool,
    /// Offset of the next byte to show; not known before the first attachment by a tail.
    next: Option<u64>,
    input: Input,
}

/// What was typed and is not safe.
#[derive(Debug, Default)]
struct Input {
    kept: VecDeque<u8>,
    /// Kept bytes, from the first on, whose place in the guest's input is known: their number and the offset after them.
    taken: VecDeque<(usize, u64)>,
    /// Kept bytes that were sent over this attachment or were in the guest before it.
    sent: usize,
    /// Kept bytes that were ever sent; never less than `sent`.
    tried: usize,
    /// The end of the guest's input when this was attached, or of what it has taken since; not known before.
    place: Option<u64>,
    /// Bytes of this attachment that were taken.
    count: u64,
    /// Input before this is safe.
    done: u64,
    /// The place after the newest byte that is safe and kept no more.
    safe: u64,
}

impl Session {
    /// A console that begins there; `typist` is drawn for it, or it only looks.
    pub(crate) fn new(start: Start, typist: Option<u128>) -> Self {
        let next = match start {
            Start::From(offset) => Some(offset),
            Start::Tail(_) => None,
        };
        Self { start, typist, attached: false, next, input: Input::default() }
    }

    /// The first message of a new attachment.
    pub(crate) fn attach(&mut self) -> ConsoleAttach {
        self.lost();
        let place = match (self.next, self.start) {
            (Some(offset), _) | (None, Start::From(offset)) => Place::From(offset),
            (None, Start::Tail(bytes)) => Place::Tail(bytes),
        };
        let typist = self.typist.map(|typist| typist.to_be_bytes().to_vec()).unwrap_or_default();
        ConsoleAttach { start: Some(place), read_only: self.typist.is_none(), typist }
    }

    /// The attachment is over.
    pub(crate) fn lost(&mut self) {
        self.attached = false;
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
        let place = input.place.filter(|_| self.attached && self.typist.is_some())?;
        let bytes: Vec<u8> = input.kept.iter().skip(input.sent).take(MAX_INPUT).copied().collect();
        let offset = place.checked_add((input.sent - input.taken_len()) as u64)?;
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
            (Message::Taken(ConsoleTaken { count, offset }), true) => {
                let wrong = SessionError::Taken { count, offset };
                self.input.taken(count, offset).ok_or(wrong)?;
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
    fn taken_len(&self) -> usize {
        self.taken.iter().map(|(len, _)| len).sum()
    }

    /// The guest goes on with input at `offset`, whoever typed it. Tells how many bytes are gone that were safe, at most.
    fn attach(&mut self, offset: u64) -> u64 {
        if self.place.is_some_and(|place| !life::is_same(place, offset)) {
            return self.begin_anew(offset);
        }
        let begin = |(len, end): &(usize, u64)| end.saturating_sub(*len as u64);
        // What was taken and is before the end is there; what came after it is not.
        while self.taken.back().is_some_and(|run| begin(run) >= offset) {
            self.taken.pop_back();
        }
        if let Some((len, end)) = self.taken.back_mut()
            && let Some(beyond) = end.checked_sub(offset).filter(|beyond| *beyond > 0)
        {
            // Less than the run is long, since it begins before.
            *len -= beyond as usize;
            *end = offset;
        } else if let Some(place) = self.place {
            // Everything whose place is known is there: what was sent after it may be.
            let ahead = usize::try_from(offset.saturating_sub(place)).unwrap_or(usize::MAX);
            let untold = ahead.min(self.tried - self.taken_len());
            if untold > 0 {
                self.taken.push_back((untold, place + untold as u64));
            }
        }
        self.sent = self.taken_len();
        (self.place, self.count) = (Some(offset), 0);
        // Nodes promise that this does not happen.
        let gone = self.safe.saturating_sub(offset);
        (self.safe, self.done) = (self.safe.min(offset), self.done.min(offset));
        self.drop_safe();
        gone
    }

    /// Another guest: what was sent to the one before it is gone with it. Tells how many bytes that are.
    fn begin_anew(&mut self, offset: u64) -> u64 {
        // Nodes promise not to go back to a guest before; that would lose what was safe as well.
        let gone = self.safe.saturating_sub(offset).saturating_add(self.tried as u64);
        self.kept.drain(..self.tried);
        self.taken.clear();
        (self.sent, self.tried, self.count) = (0, 0, 0);
        (self.place, self.done, self.safe) = (Some(offset), offset, offset);
        gone
    }

    /// Everything before `offset` is safe. A node tells of what it has taken first: what it has not told of comes after.
    fn done(&mut self, offset: u64) {
        self.done = self.done.max(offset);
        self.place = self.place.max(Some(offset));
        self.drop_safe();
    }

    /// So many bytes of this attachment were taken, up to this place. Nothing if that cannot be.
    fn taken(&mut self, count: u64, offset: u64) -> Option<()> {
        let fresh = usize::try_from(count.checked_sub(self.count)?).ok()?;
        let begin = offset.checked_sub(fresh as u64)?;
        if fresh > self.sent - self.taken_len() || Some(begin) < self.place {
            return None;
        }
        match self.taken.back_mut().filter(|(_, end)| *end == begin) {
            Some((len, end)) => (*len, *end) = (*len + fresh, offset),
            None if fresh > 0 => self.taken.push_back((fresh, offset)),
            None => {}
        }
        (self.place, self.count) = (Some(offset), count);
        self.drop_safe();
        Some(())
    }

    /// What is safe is kept no longer.
    fn drop_safe(&mut self) {
        while let Some((len, end)) = self.taken.front_mut() {
            let begin = *end - *len as u64;
            let safe = usize::try_from(self.done.saturating_sub(begin)).unwrap_or(usize::MAX).min(*len);
            if safe > 0 {
                self.kept.drain(..safe);
                (self.sent, self.tried) = (self.sent - safe, self.tried - safe);
                self.safe = self.safe.max(begin + safe as u64);
                *len -= safe;
            }
            if *len > 0 {
                return;
            }
            self.taken.pop_front();
        }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
