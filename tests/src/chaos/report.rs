//! The table of faults, and the summary of a run.

use anyhow::{Context, ensure};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use super::judge::Seen;
use crate::measure::quantile_ms;

/// Everything that was seen, by the fault's name.
#[derive(Debug, Default)]
pub struct Report {
    faults: BTreeMap<String, Vec<Seen>>,
    violations: Vec<Violation>,
}

/// A promise that was broken.
#[derive(Clone, Debug, Serialize)]
struct Violation {
    fault: String,
    what: String,
}

#[derive(Serialize)]
struct Summary<'a> {
    seeds: [u64; 1],
    runs: usize,
    faults: Vec<Row>,
    violations: &'a [Violation],
}

/// All runs of one fault.
#[derive(Serialize)]
struct Row {
    name: String,
    expected: String,
    /// How often what happened.
    seen: BTreeMap<String, usize>,
    runs: usize,
    /// Those in which it was what was expected, and no promise was broken.
    ok: usize,
    /// From the fault to the suspicion of the node that took over.
    detection_ms: Option<Quantiles>,
    /// From the fault to the register's first change.
    register_ms: Option<Quantiles>,
    /// From the suspicion to the first vCPU.
    promotion_ms: Option<Quantiles>,
    /// Without a pair in the register.
    unprotected_ms: Option<Quantiles>,
    /// The longest that no client got an answer.
    client_gap_ms: Option<Quantiles>,
    /// Frames of a node that had stood still, and said nothing new.
    late_frames: usize,
    /// What a node said of why nobody goes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    told: Option<String>,
}

#[derive(Serialize)]
struct Quantiles {
    p50: f64,
    max: f64,
}

impl Report {
    /// A fault is over.
    pub fn add(&mut self, seen: Seen) {
        for what in &seen.violations {
            self.violations.push(Violation { fault: seen.fault.clone(), what: what.clone() });
        }
        self.faults.entry(seen.fault.clone()).or_default().push(seen);
    }

    /// A fault, or the end of a world, after which it did not go on as promised.
    pub fn fail(&mut self, fault: &str, error: &anyhow::Error) {
        self.violations.push(Violation { fault: fault.to_owned(), what: format!("{error:#}") });
    }

    /// What was expected did not happen, or a promise was broken.
    ///
    /// # Errors
    /// How often.
    pub fn verdict(&self) -> anyhow::Result<()> {
        let first = self.violations.first();
        let told = first.map(|Violation { fault, what }| format!("; the first, {fault}: {what}"));
        ensure!(first.is_none(), "{} promises broken{}", self.violations.len(), told.unwrap_or_default());
        let strange: Vec<String> = self.faults.values().flatten().filter_map(unexpected).collect();
        ensure!(strange.is_empty(), "not as expected: {}", strange.join("; "));
        Ok(())
    }

    /// Writes the summary.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, seed: u64, path: &Path) -> anyhow::Result<()> {
        let faults: Vec<Row> = self.faults.iter().map(|(name, runs)| row(name, runs)).collect();
        let runs = faults.iter().map(|row| row.runs).sum();
        let summary = Summary { seeds: [seed], runs, faults, violations: &self.violations };
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        let text = serde_json::to_string_pretty(&summary)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The table, as a page of documentation has it.
    pub fn table(&self) -> String {
        let mut text =
            "| fault | expected | seen | ok | detected, p50 / max ms | register | promoted | unprotected | \
                        no answer for |\n|---|---|---|---|---|---|---|---|---|\n"
                .to_owned();
        for (name, runs) in &self.faults {
            let row = row(name, runs);
            let seen: Vec<String> =
                row.seen.iter().map(|(what, times)| format!("{what} ({times})")).collect();
            let times = [
                &row.detection_ms,
                &row.register_ms,
                &row.promotion_ms,
                &row.unprotected_ms,
                &row.client_gap_ms,
            ];
            let times = times.map(|time| {
                time.as_ref().map_or_else(|| "-".to_owned(), |q| format!("{:.0} / {:.0}", q.p50, q.max))
            });
            let Row { expected, ok, runs, .. } = &row;
            writeln!(
                text,
                "| {name} | {expected} | {} | {ok} of {runs} | {} |",
                seen.join(", "),
                times.join(" | ")
            )
            .expect("a string takes all");
        }
        text
    }
}

fn unexpected(seen: &Seen) -> Option<String> {
    (!seen.is_expected).then(|| format!("{}: {}, where {}", seen.fault, seen.outcome, seen.expected))
}

fn row(name: &str, runs: &[Seen]) -> Row {
    let mut seen = BTreeMap::new();
    runs.iter().for_each(|run| *seen.entry(run.outcome.clone()).or_default() += 1);
    let of = |time: fn(&Seen) -> Option<Duration>| quantiles(runs.iter().filter_map(time).collect());
    Row {
        name: name.to_owned(),
        expected: runs.first().map(|run| run.expected.to_string()).unwrap_or_default(),
        seen,
        runs: runs.len(),
        ok: runs.iter().filter(|run| run.is_expected && run.violations.is_empty()).count(),
        detection_ms: of(|run| run.detection),
        register_ms: of(|run| run.register),
        promotion_ms: of(|run| run.promotion),
        unprotected_ms: of(|run| run.register.map(|_| run.unprotected)),
        client_gap_ms: of(|run| run.gap),
        late_frames: runs.iter().map(|run| run.late).sum(),
        told: runs.iter().find_map(|run| run.told.clone()),
    }
}

fn quantiles(mut samples: Vec<Duration>) -> Option<Quantiles> {
    let any = !samples.is_empty();
    any.then(|| Quantiles { p50: quantile_ms(&mut samples, 0.5), max: quantile_ms(&mut samples, 1.0) })
}

#[cfg(test)]
mod tests {
    use super::{Report, Seen};
    use crate::chaos::plan::Expected;
    use std::time::Duration;

    fn seen(outcome: &str, is_expected: bool, gap: u64) -> Seen {
        Seen {
            fault: "kill primary".to_owned(),
            expected: Expected::Moves,
            outcome: outcome.to_owned(),
            is_expected,
            violations: Vec::new(),
            told: None,
            detection: None,
            register: Some(Duration::from_millis(500)),
            promotion: Some(Duration::from_millis(270)),
            unprotected: Duration::from_millis(1200),
            gap: Some(Duration::from_millis(gap)),
            late: 0,
        }
    }

    #[test]
    fn a_row_says_what_came_of_all_runs() {
        let mut report = Report::default();
        for gap in [700, 900, 800] {
            report.add(seen("moved", true, gap));
        }
        report.verdict().unwrap();
        let row = "| kill primary | the guest moves | moved (3) | 3 of 3 | - | 500 / 500 | 270 / 270 | 1200 / 1200 | 800 / 900 |";
        assert_eq!(report.table().lines().last(), Some(row));
        report.add(seen("stayed", false, 100));
        let error = report.verdict().unwrap_err().to_string();
        assert!(error.contains("kill primary: stayed, where the guest moves"), "{error}");
        report.add(Seen { violations: vec!["two say two things".to_owned()], ..seen("moved", true, 1) });
        let error = report.verdict().unwrap_err().to_string();
        assert!(error.contains("1 promises broken; the first, kill primary: two say"), "{error}");
        assert!(report.table().contains("| 3 of 5 |"), "{}", report.table());
    }

    #[test]
    fn a_summary_is_written_where_there_was_no_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("chaos/summary.json");
        let mut report = Report::default();
        report.add(seen("moved", true, 700));
        report.write(7, &path).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!((&value["seeds"][0], &value["runs"]), (&7.into(), &1.into()));
        assert_eq!(value["faults"][0]["client_gap_ms"]["max"], 700.0);
        assert_eq!(value["violations"], serde_json::json!([]));
    }
}
