//! `coloctl protect|pause|resume`: whether the vm is protected, and by whom.

use colo_proto::v1::protect_progress::Phase;
use colo_proto::v1::{PauseReplicationRequest, ProtectProgress, ProtectRequest, ResumeReplicationRequest};
use serde::Serialize;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use crate::args::Protect;
use crate::connect::{COMMAND_LIMIT, Node, Nodes};
use crate::error::CtlError;
use crate::format::{bytes, clean, millis, percent, rate};
use crate::locate::{Wanted, pick};
use crate::output::{aside, print, print_json};
use crate::status_json::{Register, progress, register};
use crate::words;

/// How often a progress that nobody can overwrite is said again.
const REPEAT: Duration = Duration::from_secs(5);

/// Protects the vm by a secondary; ends when it is protected.
pub(crate) async fn protect(nodes: &Nodes, options: &Protect) -> Result<(), CtlError> {
    let node = pick(nodes, Wanted::Runner).await?;
    let request = ProtectRequest { address: options.address.to_string(), full: options.full };
    let mut client = node.client.clone();
    let mut steps = node.answer(COMMAND_LIMIT, client.protect(request)).await?;
    let mut display = Display::new(io::stderr().is_terminal());
    loop {
        let step = steps.message().await;
        let step = step.map_err(|status| node.error(&status)).inspect_err(|_| display.close())?;
        let Some(step) = step else {
            display.close();
            return Err(ended_early(&node));
        };
        if options.shape.json {
            print_json(&progress(&step))?;
        } else {
            display.show(&step, Instant::now());
        }
        if step.phase == Phase::Paired as i32 {
            display.close();
            return if options.shape.json { Ok(()) } else { print(&done(&step)) };
        }
    }
}

fn ended_early(node: &Node) -> CtlError {
    let reason = "it ended the call before the vm was protected".to_owned();
    CtlError::Lost { address: node.address.clone(), reason }
}

fn done(step: &ProtectProgress) -> String {
    let register = words::register(step.register.as_ref());
    format!("protected by {} after {}: {register}\n", clean(&step.secondary), millis(step.elapsed_ms))
}

/// Shows progress on standard error: one line that changes on a terminal, a line now and then otherwise.
struct Display {
    terminal: bool,
    open: bool,
    last: Option<(i32, Instant)>,
    /// Why so much is copied was shown.
    reasoned: bool,
    /// Where and when the phase began: a rate over all phases would say nothing.
    began: (u64, u64),
}

impl Display {
    fn new(terminal: bool) -> Self {
        Self { terminal, open: false, last: None, reasoned: false, began: (0, 0) }
    }

    fn show(&mut self, step: &ProtectProgress, now: Instant) {
        if !step.why.is_empty() && !std::mem::replace(&mut self.reasoned, true) {
            self.close();
            aside(&format!("why so much is copied: {}\n", clean(&step.why)));
        }
        if let Some(text) = self.line(step, now) {
            aside(&text);
        }
    }

    /// What is to be written now.
    fn line(&mut self, step: &ProtectProgress, now: Instant) -> Option<String> {
        let same = self.last.filter(|(phase, _)| *phase == step.phase);
        if same.is_none() {
            self.began = (step.bytes_done, step.elapsed_ms);
        }
        if !self.terminal && same.is_some_and(|(_, at)| now.duration_since(at) < REPEAT) {
            return None;
        }
        self.last = Some((step.phase, now));
        let text = self.describe(step);
        if !self.terminal {
            return Some(text + "\n");
        }
        self.open = true;
        // To the start of the line, and what was longer before is erased.
        Some(format!("\r{text}\x1b[K"))
    }

    fn describe(&self, step: &ProtectProgress) -> String {
        let mut parts = vec![format!("{:<10}", words::phase(step.phase))];
        if step.bytes_total > 0 {
            let share = percent(step.bytes_done, step.bytes_total);
            parts.push(format!("{share}% of {}", bytes(step.bytes_total)));
            let (done, ms) = self.began;
            let speed = rate(step.bytes_done.saturating_sub(done), step.elapsed_ms.saturating_sub(ms));
            parts.extend(Some(speed).filter(|speed| !speed.is_empty()));
        }
        parts.push(millis(step.elapsed_ms));
        parts.join("  ")
    }

    /// What comes next begins on a line of its own.
    fn close(&mut self) {
        if std::mem::take(&mut self.open) {
            aside("\n");
        }
    }
}

#[derive(Serialize)]
struct Paused {
    register: Option<Register>,
}

/// Goes on without protection.
pub(crate) async fn pause(nodes: &Nodes, json: bool) -> Result<(), CtlError> {
    let node = pick(nodes, Wanted::Runner).await?;
    let mut client = node.client.clone();
    let reply = node.answer(COMMAND_LIMIT, client.pause_replication(PauseReplicationRequest {})).await?;
    if json {
        return print_json(&Paused { register: register(reply.register.as_ref()) });
    }
    let register = words::register(reply.register.as_ref());
    print(&format!("replication is paused, the vm is NOT PROTECTED: {register}\n"))
}

/// Protects again by the same secondary.
pub(crate) async fn resume(nodes: &Nodes, json: bool) -> Result<(), CtlError> {
    #[derive(Serialize)]
    struct Resumed {
        begun: bool,
    }
    let node = pick(nodes, Wanted::Runner).await?;
    let mut client = node.client.clone();
    node.answer(COMMAND_LIMIT, client.resume_replication(ResumeReplicationRequest {})).await?;
    if json {
        return print_json(&Resumed { begun: true });
    }
    print("protection has begun; follow it with `coloctl status`\n")
}

#[cfg(test)]
mod tests {
    use super::{Display, REPEAT};
    use colo_proto::v1::ProtectProgress;
    use colo_proto::v1::protect_progress::Phase;
    use std::time::Instant;

    fn step(phase: Phase, done: u64, elapsed_ms: u64) -> ProtectProgress {
        ProtectProgress {
            phase: phase.into(),
            bytes_done: done << 20,
            bytes_total: 100 << 20,
            elapsed_ms,
            ..Default::default()
        }
    }

    #[test]
    fn a_terminal_has_one_line_that_changes() {
        let (mut display, now) = (Display::new(true), Instant::now());
        display.line(&step(Phase::Memory, 10, 1_000), now);
        let line = display.line(&step(Phase::Memory, 30, 2_000), now).unwrap();
        assert_eq!(line, "\rmemory      30% of 100.0 MiB  20.0 MiB/s  2.0 s\x1b[K");
    }

    #[test]
    fn elsewhere_a_line_comes_with_each_phase_and_now_and_then() {
        let (mut display, now) = (Display::new(false), Instant::now());
        assert!(display.line(&step(Phase::Memory, 0, 0), now).is_some());
        assert!(display.line(&step(Phase::Memory, 1, 100), now).is_none());
        assert!(display.line(&step(Phase::Memory, 2, 200), now + REPEAT).unwrap().ends_with('\n'));
        let next = display.line(&step(Phase::Joining, 100, 300), now + REPEAT).unwrap();
        assert_eq!(next, "joining     100% of 100.0 MiB  300 ms\n");
    }
}
