//! `coloctl verify`: whether the secondary's copy is what the guest is, while both go on.

use colo_proto::v1::{VerifiedPart, VerifyProgress, VerifyReplicaRequest};
use serde::Serialize;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::args::Verify;
use crate::connect::{COMMAND_LIMIT, Nodes};
use crate::error::CtlError;
use crate::format::{millis, percent};
use crate::locate::{Wanted, pick};
use crate::output::{aside, print, print_json};

/// How often a progress that nobody can overwrite is said again.
const REPEAT: Duration = Duration::from_secs(5);
/// The status for a copy that differs, as for anything that failed.
const DIFFERS: u8 = 1;

/// Compares; ends when all was looked at, or with the first difference.
pub(crate) async fn run(nodes: &Nodes, options: &Verify) -> Result<ExitCode, CtlError> {
    let node = pick(nodes, Wanted::Runner).await?;
    let request = VerifyReplicaRequest {
        memory: options.memory,
        disk: options.disk,
        rate_mib: options.rate.unwrap_or(0),
    };
    let mut client = node.client.clone();
    let mut steps = node.answer(COMMAND_LIMIT, client.verify_replica(request)).await?;
    let mut display = Display { terminal: io::stderr().is_terminal(), last: None };
    loop {
        let step = steps.message().await;
        let step = step.map_err(|status| node.error(&status)).inspect_err(|_| display.close())?;
        let Some(step) = step else {
            display.close();
            let reason = "it ended the call before all was compared".to_owned();
            return Err(CtlError::Lost { address: node.address.clone(), reason });
        };
        if options.shape.json {
            print_json(&Line::from(&step))?;
        } else if step.done {
            display.close();
            print(&done(&step))?;
        } else {
            display.show(&step, Instant::now());
        }
        if step.done {
            return Ok(if differing(&step) > 0 { ExitCode::from(DIFFERS) } else { ExitCode::SUCCESS });
        }
    }
}

fn differing(step: &VerifyProgress) -> u64 {
    parts(step).map(|(_, part)| part.differing).sum()
}

fn parts(step: &VerifyProgress) -> impl Iterator<Item = (&'static str, &VerifiedPart)> {
    let memory = step.memory.iter().map(|part| ("pages", part));
    memory.chain(step.disk.iter().map(|part| ("blocks", part)))
}

/// What was found, and what follows.
fn done(step: &VerifyProgress) -> String {
    let compared: Vec<_> = parts(step).map(|(what, part)| format!("{} {what}", part.compared)).collect();
    let missed: u64 = parts(step).map(|(_, part)| part.not_compared).sum();
    let bytes: u64 = parts(step).map(|(_, part)| part.with_bytes).sum();
    let mut text = format!(
        "verified {} ({bytes} with bytes) in {}; not compared {missed}; differing {}\n",
        compared.join(", "),
        millis(step.elapsed_ms),
        differing(step)
    );
    if missed > 0 {
        text += "not compared: what was written whenever it was looked at, and so was sent again each time\n";
    }
    for (what, part) in parts(step).filter(|(_, part)| part.differing > 0) {
        let places: Vec<_> = part.places.iter().map(|place| format!("{place:#x}")).collect();
        let more = if part.differing > part.places.len() as u64 { ", ..." } else { "" };
        text += &format!("differing {what}: {}{more}\n", places.join(", "));
    }
    if differing(step) > 0 {
        text += "the copy is not trusted any more and is made whole again: look at `coloctl status`\n";
    }
    text
}

/// Shows progress on standard error: one line that changes on a terminal, a line now and then otherwise.
struct Display {
    terminal: bool,
    last: Option<Instant>,
}

impl Display {
    fn show(&mut self, step: &VerifyProgress, now: Instant) {
        let soon = self.last.is_some_and(|last| now.duration_since(last) < REPEAT);
        if parts(step).next().is_none() || (!self.terminal && soon) {
            return;
        }
        self.last = Some(now);
        let shares: Vec<_> = parts(step)
            .map(|(what, part)| format!("{}% of {} {what}", percent(part.looked_at, part.total), part.total))
            .collect();
        let text = format!("compared {}  {}", shares.join(", "), millis(step.elapsed_ms));
        aside(&if self.terminal { format!("\r{text}\x1b[K") } else { text + "\n" });
    }

    fn close(&mut self) {
        if self.terminal && self.last.take().is_some() {
            aside("\n");
        }
    }
}

/// A step, for scripts. Keys are stable.
#[derive(Serialize)]
struct Line {
    done: bool,
    memory: Option<Part>,
    disk: Option<Part>,
    elapsed_ms: u64,
    point: Option<String>,
}

#[derive(Serialize)]
struct Part {
    total: u64,
    looked_at: u64,
    compared: u64,
    with_bytes: u64,
    not_compared: u64,
    differing: u64,
    places: Vec<u64>,
}

impl From<&VerifyProgress> for Line {
    fn from(step: &VerifyProgress) -> Self {
        Self {
            done: step.done,
            memory: step.memory.as_ref().map(Part::from),
            disk: step.disk.as_ref().map(Part::from),
            elapsed_ms: step.elapsed_ms,
            point: step.point.as_ref().map(|point| format!("{}.{}", point.term, point.epoch)),
        }
    }
}

impl From<&VerifiedPart> for Part {
    fn from(part: &VerifiedPart) -> Self {
        Self {
            total: part.total,
            looked_at: part.looked_at,
            compared: part.compared,
            with_bytes: part.with_bytes,
            not_compared: part.not_compared,
            differing: part.differing,
            places: part.places.clone(),
        }
    }
}
