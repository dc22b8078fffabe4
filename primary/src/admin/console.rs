//! A reader of the console: gets what was let out from where it wants on, and types. Several may type at once: the input
//! of each goes to the end of the guest's input, in its own order, and each is told where its bytes went. So a reader
//! that attaches again, here or at the node that took over, knows which of its bytes the guest has.

use colo_proto::v1::{
    ConsoleAttach, ConsoleAttached, ConsoleBytes, ConsoleGap, ConsoleInput, ConsoleOutput, ConsoleTaken,
    console_attach, console_input, console_output,
};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tonic::{Status, Streaming};

use super::reason::Reason;
use super::{Part, Plane};
use crate::node::{Command, Event};

/// Bytes of one message of input.
const MAX_INPUT: usize = 4 << 10;
/// Readers that may type at once; of more, the one that has been there longest may no more.
const MAX_TYPISTS: usize = 64;
/// How often a guest that takes no more input is asked again.
const RETRY: Duration = Duration::from_millis(20);

type Out = mpsc::Sender<Result<ConsoleOutput, Status>>;

/// Which attachments may type. A reader that attaches again has ended its attachment before, whether this node has
/// noticed that or not: what was still on its way there would be typed twice.
#[derive(Debug, Default)]
pub(super) struct Typists(Mutex<Attachments>);

#[derive(Debug, Default)]
struct Attachments {
    next: u64,
    /// Number and reader, oldest first.
    open: VecDeque<(u64, Option<[u8; 16]>)>,
}

impl Typists {
    /// A reader attaches; answers the attachment's number.
    fn attach(&self, typist: Option<[u8; 16]>) -> u64 {
        let mut attachments = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        attachments.next += 1;
        let number = attachments.next;
        attachments.open.retain(|(_, other)| typist.is_none() || *other != typist);
        attachments.open.push_back((number, typist));
        if attachments.open.len() > MAX_TYPISTS {
            attachments.open.pop_front();
        }
        number
    }

    /// Does something for an attachment that may still type: nobody attaches meanwhile.
    fn as_one<T>(&self, number: u64, act: impl FnOnce() -> T) -> Option<T> {
        let attachments = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        attachments.open.iter().any(|(open, _)| *open == number).then(act)
    }

    fn detach(&self, number: u64) {
        let mut attachments = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        attachments.open.retain(|(open, _)| *open != number);
    }
}

/// Attaches a reader whose first message must say where to begin.
pub(super) async fn attach(
    plane: Arc<Plane>,
    mut input: Streaming<ConsoleInput>,
) -> Result<mpsc::Receiver<Result<ConsoleOutput, Status>>, Status> {
    plane.bound()?;
    let first = input.message().await?.and_then(|first| first.message);
    let Some(console_input::Message::Attach(attach)) = first else {
        return Err(Reason::BadRequest.status("the first message must say where to begin"));
    };
    let end = plane.console.end();
    let offset = match attach.start {
        Some(console_attach::Start::From(offset)) => offset,
        Some(console_attach::Start::Tail(bytes)) => end.saturating_sub(bytes).max(plane.console.start()),
        None => end,
    };
    let typist = if attach.read_only { None } else { Some(Typist::attach(&plane, &attach)?) };
    let input_offset = match &typist {
        // After all that came by the attachment before.
        Some(typist) if matches!(plane.part(), Part::Runner(_)) => typist.pass_on(Vec::new()).await?.1,
        _ => plane.board.status().input,
    };
    let (out, answers) = mpsc::channel(16);
    let hello = console_output::Message::Attached(ConsoleAttached { output_offset: offset, input_offset });
    let _ = send(&out, hello).await;
    let taking = typist.as_ref().map(|typist| Arc::clone(&typist.taking)).unwrap_or_default();
    tokio::spawn(show(Arc::clone(&plane), out.clone(), offset, taking));
    if let Some(typist) = typist {
        tokio::spawn(async move {
            if let Err(status) = typist.type_in(&out, input).await {
                let _ = out.send(Err(status)).await;
            }
        });
    }
    Ok(answers)
}

/// Sends what is let out, until the reader leaves. Input is called safe only after the reader was told where it went.
async fn show(plane: Arc<Plane>, out: Out, mut offset: u64, taking: Arc<AtomicBool>) {
    let mut ends = plane.console.watch();
    let mut input_done = 0;
    loop {
        ends.mark_unchanged();
        while let Some(chunk) = plane.console.read(offset) {
            if chunk.offset > offset {
                let gap = ConsoleGap { from: offset, to: chunk.offset };
                if send(&out, console_output::Message::Gap(gap)).await.is_err() {
                    return;
                }
            }
            offset = chunk.offset + chunk.bytes.len() as u64;
            let bytes = ConsoleBytes { offset: chunk.offset, bytes: chunk.bytes };
            if send(&out, console_output::Message::Output(bytes)).await.is_err() {
                return;
            }
        }
        let done = plane.board.status().input_done;
        if done > input_done && !taking.load(Ordering::SeqCst) {
            input_done = done;
            if send(&out, console_output::Message::InputDone(done)).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = ends.changed() => if changed.is_err() { return },
            () = out.closed() => return,
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
    }
}

async fn send(out: &Out, message: console_output::Message) -> Result<(), ()> {
    out.send(Ok(ConsoleOutput { message: Some(message) })).await.map_err(|_| ())
}

/// An attachment that may type.
struct Typist {
    plane: Arc<Plane>,
    number: u64,
    /// From before the guest takes input until the reader is told.
    taking: Arc<AtomicBool>,
}

impl Typist {
    fn attach(plane: &Arc<Plane>, attach: &ConsoleAttach) -> Result<Self, Status> {
        let named =
            match attach.typist.as_slice() {
                [] => None,
                bytes => Some(bytes.try_into().map_err(|_| {
                    Reason::BadRequest.status("a typist is named by 16 bytes, or not at all")
                })?),
            };
        let (plane, number) = (Arc::clone(plane), plane.typists.attach(named));
        Ok(Self { plane, number, taking: Arc::default() })
    }

    /// Passes input on, as fast as the guest takes it, until the reader leaves.
    async fn type_in(&self, out: &Out, mut input: Streaming<ConsoleInput>) -> Result<(), Status> {
        let mut count = 0;
        while let Ok(Some(next)) = input.message().await {
            let Some(console_input::Message::Input(typed)) = next.message else { continue };
            let mut rest = typed.bytes.as_slice();
            while !rest.is_empty() {
                self.taking.store(true, Ordering::SeqCst);
                let (taken, offset) = self.pass_on(rest[..rest.len().min(MAX_INPUT)].to_vec()).await?;
                count += taken as u64;
                rest = &rest[taken..];
                let told = console_output::Message::Taken(ConsoleTaken { count, offset });
                if out.is_closed() || (taken > 0 && send(out, told).await.is_err()) {
                    return Ok(());
                }
                self.taking.store(false, Ordering::SeqCst);
                if taken == 0 {
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
        Ok(())
    }

    /// Answers how many bytes the guest took, and the offset after them.
    async fn pass_on(&self, bytes: Vec<u8>) -> Result<(usize, u64), Status> {
        let plane = &self.plane;
        let Part::Runner(outbox) = plane.part() else { return Err(plane.not_here("runs the guest")) };
        let (reply, taken) = oneshot::channel();
        let command = Event::Command(Command::Input { bytes, reply });
        let gone = || Reason::Unavailable.status("the node is ending");
        let passed = plane.typists.as_one(self.number, || outbox.send(command).is_ok());
        let again = || Reason::GivenUp.status("this console was attached again, or too many type");
        if !passed.ok_or_else(again)? {
            return Err(gone());
        }
        taken.await.map_err(|_| gone())
    }
}

impl Drop for Typist {
    fn drop(&mut self) {
        self.plane.typists.detach(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_TYPISTS, Typists};

    #[test]
    fn a_reader_that_attaches_again_ends_its_attachment_before() {
        let typists = Typists::default();
        let (one, two) = (Some([1; 16]), Some([2; 16]));
        let (first, other) = (typists.attach(one), typists.attach(two));
        let again = typists.attach(one);
        let types = |number| typists.as_one(number, || ()).is_some();
        assert_eq!((types(first), types(other), types(again)), (false, true, true));
        typists.detach(other);
        assert!(!types(other));
    }

    #[test]
    fn readers_without_a_name_are_different_ones_and_bounded() {
        let typists = Typists::default();
        let numbers: Vec<u64> = (0..=MAX_TYPISTS).map(|_| typists.attach(None)).collect();
        let types = |number| typists.as_one(number, || ()).is_some();
        assert!(!types(numbers[0]) && numbers[1..].iter().all(|&number| types(number)));
    }
}
