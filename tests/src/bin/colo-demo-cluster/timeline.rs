//! What each step of the demo took, as it is printed and written.

use anyhow::Context;
use colo_tests::service::history::History;
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

/// One step.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    /// What was done.
    pub(crate) what: String,
    /// When.
    pub(crate) at: Instant,
    /// The register's first change after it.
    pub(crate) register: Option<Instant>,
    /// When the guest was protected after that.
    pub(crate) protected: Instant,
    /// On which nodes it was then.
    pub(crate) on: String,
}

#[derive(Serialize)]
struct Row {
    step: String,
    /// Since the first step.
    at_ms: u64,
    register_ms: Option<u64>,
    protected_ms: u64,
    /// The longest that the client got no answer, until the next step.
    client_gap_ms: u64,
    /// Answers until the next step.
    answers: usize,
    on: String,
}

#[derive(Serialize)]
struct Summary {
    steps: Vec<Row>,
    writes: usize,
    acked_lost: usize,
    resets: u64,
    timeouts: u64,
    refused: u64,
    register_changes: usize,
}

/// Writes the summary and answers the lines of the table.
///
/// # Errors
/// It cannot be written.
pub(crate) fn tell(
    steps: &[Step],
    history: &History,
    acked_lost: usize,
    register_changes: usize,
    path: &Path,
) -> anyhow::Result<Vec<String>> {
    let rows = rows(steps, history);
    let mut lines =
        vec!["      at  what                                   register  protected  client's gap".to_owned()];
    lines.extend(rows.iter().map(|row| {
        let register = row.register_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms"));
        let Row { step, at_ms, protected_ms, client_gap_ms, on, .. } = row;
        let at = *at_ms as f64 / 1e3;
        format!("{at:>6.1} s  {step:<36} {register:>10} {protected_ms:>7} ms {client_gap_ms:>10} ms   {on}")
    }));
    let summary = Summary {
        steps: rows,
        writes: history.operations.len(),
        acked_lost,
        resets: history.resets,
        timeouts: history.timeouts,
        refused: history.refused.0,
        register_changes,
    };
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let text = serde_json::to_string_pretty(&summary)? + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(lines)
}

fn rows(steps: &[Step], history: &History) -> Vec<Row> {
    let Some(first) = steps.first().map(|step| step.at) else { return Vec::new() };
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let replies = history.replies();
    let row = |(n, step): (usize, &Step)| {
        let from = history.at(step.at);
        let until = steps.get(n + 1).map_or(history.end, |next| history.at(next.at));
        let within: Vec<Duration> = replies.iter().copied().filter(|at| (from..until).contains(at)).collect();
        let ends = within.iter().copied().chain([until]);
        // What was sent before the step and answered after it counts from the step.
        let gaps = std::iter::once(from).chain(within.iter().copied()).zip(ends);
        Row {
            step: step.what.clone(),
            at_ms: ms(step.at - first),
            register_ms: step.register.map(|at| ms(at.saturating_duration_since(step.at))),
            protected_ms: ms(step.protected - step.at),
            client_gap_ms: ms(gaps.map(|(from, until)| until - from).max().unwrap_or_default()),
            answers: within.len(),
            on: step.on.clone(),
        }
    };
    steps.iter().enumerate().map(row).collect()
}
