//! The line to the node that runs the guest: one call at a time, over which a session's messages go.

use colo_proto::v1::console_output::Message;
use colo_proto::v1::{ConsoleAttach, ConsoleBytes, ConsoleInput, ConsoleOutput, console_input};
use std::pin::Pin;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::scout::Runner;
use crate::connect::QUESTION_LIMIT;
use crate::error::CtlError;

/// Messages of input that may wait for the network; the session keeps the rest.
const MAX_WAITING: usize = 16;

type Opening = Pin<Box<dyn Future<Output = Result<Streaming<ConsoleOutput>, CtlError>>>>;

/// The line.
pub(super) struct Line {
    runner: Option<Runner>,
    state: State,
}

enum State {
    Down,
    Opening(Opening, mpsc::Sender<ConsoleInput>),
    Up(Box<Streaming<ConsoleOutput>>, mpsc::Sender<ConsoleInput>),
}

impl Line {
    /// One that goes nowhere.
    pub(super) fn down() -> Self {
        Self { runner: None, state: State::Down }
    }

    /// Where it goes, or went last.
    pub(super) fn runner(&self) -> Option<&Runner> {
        self.runner.as_ref()
    }

    /// Whether it goes nowhere.
    pub(super) fn is_down(&self) -> bool {
        matches!(self.state, State::Down)
    }

    /// Whether a runner that was found is another one than it goes to. The same node in a newer term is not: it only
    /// found, or lost, a secondary.
    pub(super) fn is_superseded_by(&self, found: &Runner) -> bool {
        self.runner
            .as_ref()
            .is_some_and(|now| found.node.address != now.node.address && found.term > now.term)
    }

    /// The runner is the same in this term.
    pub(super) fn renew(&mut self, term: u64) {
        if let Some(runner) = &mut self.runner {
            runner.term = term;
        }
    }

    /// Opens a new one; what it was before is closed.
    pub(super) fn open(&mut self, runner: Runner, attach: ConsoleAttach) {
        let (sender, messages) = mpsc::channel(MAX_WAITING);
        let first = ConsoleInput { message: Some(console_input::Message::Attach(attach)) };
        // A new channel has room.
        drop(sender.try_send(first));
        let node = runner.node.clone();
        let opening = async move {
            let mut client = node.client.clone();
            node.answer(QUESTION_LIMIT, client.console(ReceiverStream::new(messages))).await
        };
        *self = Self { runner: Some(runner), state: State::Opening(Box::pin(opening), sender) };
    }

    /// Closes it.
    pub(super) fn close(&mut self) {
        self.state = State::Down;
    }

    /// Whether more input can be sent now.
    pub(super) fn has_room(&self) -> bool {
        matches!(&self.state, State::Up(_, sender) if sender.capacity() > 0)
    }

    /// Waits until more input can be sent; for ever while it is not up.
    pub(super) fn room(&self) -> impl Future<Output = ()> + use<> {
        let sender = match &self.state {
            State::Up(_, sender) => Some(sender.clone()),
            State::Down | State::Opening(..) => None,
        };
        async move {
            // A closing line is told by its messages.
            let room = match &sender {
                Some(sender) => sender.reserve().await.is_ok(),
                None => false,
            };
            if !room {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Sends input; there must be room.
    pub(super) fn send(&self, bytes: ConsoleBytes) {
        if let State::Up(_, sender) = &self.state {
            let message = ConsoleInput { message: Some(console_input::Message::Input(bytes)) };
            // If the line is closing, the session keeps it and sends it again.
            drop(sender.try_send(message));
        }
    }

    /// The next message, or how the line ended; waits for ever while it is down. Cancel-safe: a half-opened line stays
    /// half open.
    pub(super) async fn next(&mut self) -> Result<Option<Message>, CtlError> {
        if let State::Opening(opening, sender) = &mut self.state {
            let sender = sender.clone();
            let opened = opening.await;
            self.state = State::Down;
            self.state = State::Up(Box::new(opened?), sender);
        }
        let (State::Up(messages, _), Some(runner)) = (&mut self.state, &self.runner) else {
            return std::future::pending().await;
        };
        match messages.message().await {
            Ok(Some(output)) => Ok(output.message),
            Ok(None) => {
                let (address, reason) = (runner.node.address.clone(), "it has ended".to_owned());
                Err(CtlError::Lost { address, reason })
            }
            Err(status) => Err(runner.node.error(&status)),
        }
    }
}
