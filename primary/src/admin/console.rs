//! A reader of the console: gets what was let out from where it wants on, and types.

use colo_proto::v1::{
    ConsoleAttached, ConsoleBytes, ConsoleGap, ConsoleInput, ConsoleOutput, console_attach, console_input,
    console_output,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tonic::{Status, Streaming};

use super::{Part, Plane};
use crate::node::{Command, Event};

/// Bytes of one message of input.
const MAX_INPUT: usize = 4 << 10;
/// How often a guest that takes no more input is asked again.
const RETRY: Duration = Duration::from_millis(20);

type Out = mpsc::Sender<Result<ConsoleOutput, Status>>;

/// Attaches a reader whose first message must say where to begin.
pub(super) async fn attach(
    plane: Arc<Plane>,
    mut input: Streaming<ConsoleInput>,
) -> Result<mpsc::Receiver<Result<ConsoleOutput, Status>>, Status> {
    let first = input.message().await?.and_then(|first| first.message);
    let Some(console_input::Message::Attach(attach)) = first else {
        return Err(Status::invalid_argument("the first message must say where to begin"));
    };
    let end = plane.console.end();
    let offset = match attach.start {
        Some(console_attach::Start::From(offset)) => offset,
        Some(console_attach::Start::Tail(bytes)) => end.saturating_sub(bytes).max(plane.console.start()),
        None => end,
    };
    let (out, answers) = mpsc::channel(16);
    let attached = ConsoleAttached { output_offset: offset, input_offset: plane.board.status().input };
    let hello = console_output::Message::Attached(attached);
    let _ = out.send(Ok(ConsoleOutput { message: Some(hello) })).await;
    tokio::spawn(show(Arc::clone(&plane), out.clone(), offset));
    if !attach.read_only {
        tokio::spawn(type_in(plane, out, input));
    }
    Ok(answers)
}

/// Sends what is let out, until the reader leaves.
async fn show(plane: Arc<Plane>, out: Out, mut offset: u64) {
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
        if done > input_done {
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

/// Passes input on, as fast as the guest takes it.
async fn type_in(plane: Arc<Plane>, out: Out, mut input: Streaming<ConsoleInput>) {
    while let Ok(Some(next)) = input.message().await {
        let Some(console_input::Message::Input(typed)) = next.message else { continue };
        for (at, part) in typed.bytes.chunks(MAX_INPUT).enumerate() {
            let offset = typed.offset.saturating_add((at * MAX_INPUT) as u64);
            if let Err(status) = pass_on(&plane, offset, part).await {
                let _ = out.send(Err(status)).await;
                return;
            }
        }
    }
}

async fn pass_on(plane: &Plane, offset: u64, bytes: &[u8]) -> Result<(), Status> {
    loop {
        let Part::Runner(outbox) = plane.part() else { return Err(plane.not_here("runs the guest")) };
        let (reply, taken) = oneshot::channel();
        let command = Command::Input { offset: Some(offset), bytes: bytes.to_vec(), reply };
        let gone = || Status::unavailable("the node is ending");
        outbox.send(Event::Command(command)).map_err(|_| gone())?;
        let at = taken.await.map_err(|_| gone())?;
        if at < offset {
            return Err(Status::out_of_range(format!("input goes on at {at}, not at {offset}")));
        }
        if at >= offset.saturating_add(bytes.len() as u64) {
            return Ok(());
        }
        tokio::time::sleep(RETRY).await;
    }
}
