//! What the demo says and writes: the guest's console beside its own lines, figures, the summary.

use anyhow::{Context, ensure};
use colo_proto::v1::{Counters, EpochReport, Promotion};
use colo_tests::chain::{Checker, Line};
use colo_tests::cluster::ledger::Ledger;
use colo_tests::measure::quantile_ms;
use colo_tests::service::figures::{self, Account};
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

use crate::watch::pauses;

/// The demo's summary. Times of runs are medians over all of them, pauses are of all epochs.
#[derive(Serialize)]
struct Summary {
    guest: String,
    hypervisor: String,
    tracker: String,
    runs: u32,
    seed: u64,
    boot_ms: f64,
    /// From the operator's word to a whole copy that the register names.
    seed_ms: f64,
    epochs: u64,
    pages: u64,
    wire_bytes: u64,
    pause_ms: Quantiles,
    /// From the kill to the suspicion.
    detect_ms: f64,
    /// From the suspicion to the first vCPU.
    promote_ms: f64,
    /// Parts of it; the rest of the register's part is the configured delay that lets a live primary win.
    promote_parts_ms: Parts,
    detect_ms_max: f64,
    promote_ms_max: f64,
    lines_released: u64,
    lines_lost: u64,
    released_bytes: u64,
    released_bytes_conflicting: u64,
    chain_ok: bool,
    ring_overruns: u64,
    /// Full copies beside the first one of each run.
    full_resyncs: u64,
    reports_missed: u64,
    /// What a client of a service in the guest saw; none where no network can be made.
    client: Option<figures::Summary>,
}

#[derive(Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

#[derive(Serialize)]
struct Parts {
    register: f64,
    apply: f64,
    store: f64,
    restore: f64,
}

/// What is measured over all runs.
pub(crate) struct Figures {
    seed: u64,
    hypervisor: String,
    pub(crate) guest: String,
    pub(crate) tracker: String,
    pub(crate) boots: Vec<Duration>,
    pub(crate) seeds: Vec<Duration>,
    /// Of the runs with a service.
    pub(crate) clients: Option<Account>,
    runs: u32,
    pauses: Vec<Duration>,
    detected: Vec<Duration>,
    promoted: Vec<Promotion>,
    epochs: u64,
    pages: u64,
    wire_bytes: u64,
    lines_released: u64,
    lines_lost: u64,
    released_bytes: u64,
    conflicting: u64,
    chain_ok: bool,
    ring_overruns: u64,
    full_resyncs: u64,
    reports_missed: u64,
}

impl Figures {
    pub(crate) fn new(seed: u64, hypervisor: String) -> Self {
        Self {
            seed,
            hypervisor,
            guest: String::new(),
            tracker: String::new(),
            boots: Vec::new(),
            seeds: Vec::new(),
            clients: None,
            runs: 0,
            pauses: Vec::new(),
            detected: Vec::new(),
            promoted: Vec::new(),
            epochs: 0,
            pages: 0,
            wire_bytes: 0,
            lines_released: 0,
            lines_lost: 0,
            released_bytes: 0,
            conflicting: 0,
            chain_ok: true,
            ring_overruns: 0,
            full_resyncs: 0,
            reports_missed: 0,
        }
    }

    /// What the primary told before it was killed.
    pub(crate) fn primary(&mut self, reports: &[EpochReport], counters: &Counters) {
        self.pauses.extend(pauses(reports));
        self.epochs += reports.len() as u64;
        self.pages += reports.iter().map(|report| report.pages).sum::<u64>();
        self.wire_bytes += reports.iter().map(|report| report.wire_bytes).sum::<u64>();
        self.reports_missed += reports.iter().map(|report| report.missed).sum::<u64>();
        self.ring_overruns += counters.ring_overruns;
        self.full_resyncs += (counters.full_resyncs + counters.resyncs).saturating_sub(1);
    }

    pub(crate) fn promoted(&mut self, detected: Duration, promotion: &Promotion) {
        self.detected.push(detected);
        self.promoted.push(*promotion);
    }

    /// What was let out in a run.
    pub(crate) fn judge(&mut self, ledger: &Ledger, seed: u64, counters: &Counters) {
        let mut checker = Checker::from_start(seed);
        checker.feed(ledger.bytes());
        let lines = checker.counts().lines;
        self.runs += 1;
        self.released_bytes += ledger.end();
        self.lines_released += lines;
        self.lines_lost += last_number(ledger.bytes()).saturating_sub(lines);
        self.conflicting += ledger.conflicting();
        self.chain_ok &= checker.verdict().is_ok() && ledger.whole() == ledger.end();
        self.ring_overruns += counters.ring_overruns;
    }

    /// A run did not come to its end.
    pub(crate) fn fail(&mut self) {
        self.chain_ok = false;
    }

    fn summary(&mut self) -> Summary {
        let us = |part: fn(&Promotion) -> u64| -> Vec<Duration> {
            self.promoted.iter().map(|promotion| Duration::from_micros(part(promotion))).collect()
        };
        let p50 = |part| ms(&mut us(part), 0.5);
        Summary {
            guest: self.guest.clone(),
            hypervisor: self.hypervisor.clone(),
            tracker: self.tracker.clone(),
            runs: self.runs,
            seed: self.seed,
            promote_ms: p50(|promotion| promotion.total_us),
            promote_parts_ms: Parts {
                register: p50(|promotion| promotion.register_us),
                apply: p50(|promotion| promotion.apply_us),
                store: p50(|promotion| promotion.store_us),
                restore: p50(|promotion| promotion.restore_us),
            },
            promote_ms_max: ms(&mut us(|promotion| promotion.total_us), 1.0),
            boot_ms: ms(&mut self.boots, 0.5),
            seed_ms: ms(&mut self.seeds, 0.5),
            epochs: self.epochs,
            pages: self.pages,
            wire_bytes: self.wire_bytes,
            pause_ms: Quantiles { p50: ms(&mut self.pauses, 0.5), p99: ms(&mut self.pauses, 0.99) },
            detect_ms: ms(&mut self.detected, 0.5),
            detect_ms_max: ms(&mut self.detected, 1.0),
            lines_released: self.lines_released,
            lines_lost: self.lines_lost,
            released_bytes: self.released_bytes,
            released_bytes_conflicting: self.conflicting,
            chain_ok: self.chain_ok,
            ring_overruns: self.ring_overruns,
            full_resyncs: self.full_resyncs,
            reports_missed: self.reports_missed,
            client: self.clients.as_ref().map(Account::summary),
        }
    }

    /// Prints and writes the summary, and says whether every promise was kept.
    pub(crate) fn finish(mut self, path: &Path) -> anyhow::Result<()> {
        let summary = self.summary();
        let text = serde_json::to_string_pretty(&summary)?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        std::fs::write(path, format!("{text}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        say(&format!("summary, also in {}:", path.display()));
        text.lines().for_each(say);
        ensure!(summary.lines_lost == 0, "{} lines were lost", summary.lines_lost);
        let conflicting = summary.released_bytes_conflicting;
        ensure!(conflicting == 0, "{conflicting} bytes were let out twice and differ");
        ensure!(summary.chain_ok, "the released console is not one unbroken history");
        ensure!(summary.lines_released > 0, "the guest's workload said nothing: give it more --seconds");
        if let Some(client) = &summary.client {
            ensure!(client.acked_lost == 0, "{} acknowledged writes were lost", client.acked_lost);
            ensure!(client.resets == 0, "{} connections of the client were lost", client.resets);
        }
        say("the guest outlived its host: nothing that it had said was taken back or lost");
        Ok(())
    }
}

/// A quantile in milliseconds, to the microsecond that it was measured to.
fn ms(samples: &mut [Duration], fraction: f64) -> f64 {
    (quantile_ms(samples, fraction) * 1e3).round() / 1e3
}

/// The number of the newest line; 0 if there is none.
fn last_number(console: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(console);
    let last = text.lines().rev().find_map(Line::parse);
    last.map_or(0, |line| line.number)
}

/// The guest's console, line by line, apart from what the demo says.
#[derive(Default)]
pub(crate) struct Shown {
    partial: Vec<u8>,
    lines: u64,
}

impl Shown {
    /// Lines of the workload so far.
    pub(crate) fn lines(&self) -> u64 {
        self.lines
    }

    /// All lines of the boot, then every fiftieth of the workload: enough to watch.
    #[expect(clippy::print_stdout, reason = "the demo shows the guest's console")]
    pub(crate) fn show(&mut self, bytes: &[u8]) {
        self.partial.extend(bytes);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            let text = String::from_utf8_lossy(&line);
            self.lines += u64::from(text.starts_with("colo "));
            if !text.starts_with("colo ") || self.lines % 50 == 1 {
                println!("guest | {}", text.trim_end());
            }
        }
    }
}

#[expect(clippy::print_stdout, reason = "the demo speaks to whoever started it")]
pub(crate) fn say(text: &str) {
    println!("demo  | {text}");
}
