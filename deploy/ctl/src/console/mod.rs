//! `coloctl console`: the guest's console, wherever the guest runs. Decisions about offsets are the [`session`]'s;
//! this brings together the nodes ([`scout`], [`line`]) and the operator ([`terminal`]).

mod line;
mod scout;
mod session;
mod terminal;

use colo_proto::v1::console_output::Message;
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use self::line::Line;
use self::scout::{Scout, View};
use self::session::{Event, Session, Start};
use self::terminal::{Key, RawMode, Screen, keyboard};
use crate::args::Console as Options;
use crate::connect::Nodes;
use crate::error::CtlError;
use crate::output::{aside, note};

/// Looks of the scout that a stopped vm is given to say its last words over an open line.
const LAST_WORDS: u32 = 3;
/// A terminal's bell: what was typed is not taken.
const BELL: &str = "\x07";

/// Shows the console, and types, until the operator leaves or the vm is stopped.
pub(crate) async fn run(nodes: &Nodes, options: &Options) -> Result<(), CtlError> {
    let start = options.from.map_or(Start::Tail(options.tail.unwrap_or(0)), Start::From);
    let scout = Scout::start(nodes.clone());
    let screen = Screen::start()?;
    let on = |kind| signal(kind).map_err(CtlError::Runtime);
    let signals = (on(SignalKind::interrupt())?, on(SignalKind::terminate())?, on(SignalKind::hangup())?);
    let raw = if options.follow { None } else { Some(RawMode::enter()) };
    let mut console = Console {
        session: Session::new(start, (!options.follow).then(|| colo_common::Incarnation::draw().0)),
        line: Line::down(),
        scout,
        screen,
        keys: if options.follow { None } else { Some(keyboard()?) },
        typed: Vec::new(),
        patience: Duration::from_secs(options.wait),
        alone_since: Some(Instant::now()),
        told: String::new(),
        greeted: false,
        stopped: 0,
    };
    let done = console.serve(signals).await;
    // Its last output first, then the terminal, then what went wrong.
    let closed = console.screen.close().await;
    drop(raw);
    done.and(closed)
}

struct Console {
    session: Session,
    line: Line,
    scout: Scout,
    screen: Screen,
    /// Nothing once standard input has ended, or from the start if it is not read.
    keys: Option<mpsc::Receiver<Key>>,
    /// Keys from a pipe that the session has no room for: the pipe waits.
    typed: Vec<u8>,
    patience: Duration,
    /// Since when no line is up, if none is.
    alone_since: Option<Instant>,
    /// The last trouble, which is told once however often it comes.
    told: String,
    /// Whether any line was ever up.
    greeted: bool,
    /// Looks since the vm was found stopped.
    stopped: u32,
}

/// Whether to go on.
#[derive(PartialEq, Eq)]
enum Next {
    GoOn,
    Leave,
}

impl Console {
    async fn serve(&mut self, signals: (Signal, Signal, Signal)) -> Result<(), CtlError> {
        let (mut interrupt, mut terminate, mut hangup) = signals;
        loop {
            self.send();
            let (can_show, can_type) = (self.screen.has_room(), self.typed.is_empty());
            let (line_full, line_room) = (!self.line.has_room(), self.line.room());
            let next = tokio::select! {
                message = self.line.next(), if can_show => {
                    self.on_message(message)?;
                    Next::GoOn
                }
                () = self.screen.room(), if !can_show => Next::GoOn,
                key = next_key(&mut self.keys), if can_type => self.on_key(key),
                () = line_room, if line_full => Next::GoOn,
                found = self.scout.views.changed() => match found {
                    Ok(()) => self.on_view()?,
                    Err(_) => return Ok(()),
                },
                error = self.screen.failed() => return Err(error),
                _ = interrupt.recv() => Next::Leave,
                _ = terminate.recv() => Next::Leave,
                _ = hangup.recv() => Next::Leave,
            };
            if next == Next::Leave {
                return Ok(());
            }
        }
    }

    /// Sends what can be sent.
    fn send(&mut self) {
        let taken = self.session.typed(&self.typed);
        self.typed.drain(..taken);
        while self.line.has_room() {
            let Some(bytes) = self.session.next_input() else { return };
            self.line.send(bytes);
        }
    }

    fn on_key(&mut self, key: Option<Key>) -> Next {
        match key {
            Some(Key::Leave) => return Next::Leave,
            Some(Key::Bytes(bytes)) => {
                let taken = self.session.typed(&bytes);
                self.keep(&bytes[taken..]);
            }
            None => self.keys = None,
        }
        Next::GoOn
    }

    /// A terminal must still be able to leave, so what is too much for it is refused as terminals do.
    fn keep(&mut self, rest: &[u8]) {
        if !std::io::stdin().is_terminal() {
            self.typed = rest.to_vec();
        } else if !rest.is_empty() {
            aside(BELL);
        }
    }

    fn on_message(&mut self, message: Result<Option<Message>, CtlError>) -> Result<(), CtlError> {
        let told = match message {
            Ok(message) => self.session.receive(message),
            Err(e @ CtlError::Refused(_)) if !self.greeted => return Err(e),
            Err(e) => return self.on_loss(e.to_string()),
        };
        self.stopped = 0;
        match told {
            Ok(events) => events.into_iter().for_each(|event| self.tell(event)),
            Err(e) => return self.on_loss(format!("the node sends what makes no sense: {e}")),
        }
        Ok(())
    }

    fn tell(&mut self, event: Event) {
        match event {
            Event::Show(bytes) => self.screen.show(bytes),
            Event::Gap { from, to } => {
                let count = to - from;
                note(&format!("output from {from} to {to} ({count} bytes) is not kept any more"));
            }
            Event::StartedAnew { missing: 0, to } => {
                note(&format!("the guest was started anew: its console begins at {to}"));
            }
            Event::StartedAnew { missing, to } => {
                note(&format!(
                    "the guest was started anew: its console from {to} on; {missing} bytes before that are not kept"
                ));
            }
            Event::Attached { output } => self.greet(output),
            Event::InputGone(count) => {
                note(&format!("{count} typed bytes are not in the guest any more; type them again"));
            }
        }
    }

    fn greet(&mut self, output: u64) {
        let Some(runner) = self.line.runner() else { return };
        let (name, address) = (&runner.name, &runner.node.address);
        let leave = if self.keys.is_some() && !self.greeted { "; Ctrl-] leaves" } else { "" };
        note(&format!("attached to {name} ({address}) at {output}{leave}"));
        self.greeted = true;
        self.alone_since = None;
        self.told.clear();
    }

    fn on_loss(&mut self, why: String) -> Result<(), CtlError> {
        self.line.close();
        self.session.lost();
        if self.alone_since.get_or_insert_with(Instant::now).elapsed() >= self.patience {
            return Err(CtlError::GivenUp { why, answers: true });
        }
        if why != self.told {
            note(&why);
            self.told = why;
        }
        Ok(())
    }

    /// After every look at the nodes. A lost line is opened again here and not at once, so that it is not hammered.
    fn on_view(&mut self) -> Result<Next, CtlError> {
        let view = self.scout.views.borrow_and_update();
        match &*view {
            View::Unknown => {}
            View::Runs(runner) => {
                self.stopped = 0;
                if self.line.is_down() || self.line.is_superseded_by(runner) {
                    let attach = self.session.attach();
                    self.line.open(runner.clone(), attach);
                } else if self.line.runner().is_some_and(|now| now.node.address == runner.node.address) {
                    self.line.renew(runner.term);
                }
            }
            View::Stopped(why) => {
                self.stopped += 1;
                if self.line.is_down() || self.stopped >= LAST_WORDS {
                    note(why);
                    return Ok(Next::Leave);
                }
            }
            View::Nobody { why, answers } if self.line.is_down() => {
                let hopeless = !answers && !self.greeted;
                let alone = self.alone_since.map_or(Duration::ZERO, |since| since.elapsed());
                if hopeless || alone >= self.patience {
                    return Err(CtlError::GivenUp { why: why.to_string(), answers: *answers });
                }
            }
            View::Nobody { .. } => {}
        }
        Ok(Next::GoOn)
    }
}

async fn next_key(keys: &mut Option<mpsc::Receiver<Key>>) -> Option<Key> {
    match keys {
        Some(keys) => keys.recv().await,
        None => std::future::pending().await,
    }
}
