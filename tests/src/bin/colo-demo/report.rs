//! What the demo says and writes: the guest's console beside its own lines, figures, the summary.

use anyhow::{Context, ensure};
use colo_tests::measure::quantile_ms;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

#[derive(Default, Serialize)]
pub(crate) struct Quantiles {
    p50: f64,
    p99: f64,
}

impl Quantiles {
    fn of(samples: &mut [Duration]) -> Self {
        Self { p50: quantile_ms(samples, 0.5), p99: quantile_ms(samples, 0.99) }
    }
}

/// The demo's summary.
#[derive(Default, Serialize)]
pub(crate) struct Summary {
    pub(crate) guest: String,
    pub(crate) hypervisor: String,
    pub(crate) tracker: String,
    runs: u32,
    seed: u64,
    boot_ms: f64,
    pub(crate) cuts: u64,
    pub(crate) dirty_pages: u64,
    /// Of cuts after which the guest ran on in place: from the first kick until it ran on.
    pause_ms: Quantiles,
    restores: u64,
    /// Building the fresh VM and setting its state.
    restore_ms: Quantiles,
    /// Of cuts that became a move, from the first kick until the guest ran on elsewhere: the cut and the copy of its
    /// pages, the comparison of all memory, the state encoded and decoded, the old VM ended, the fresh one built and
    /// set.
    move_standstill_ms: Quantiles,
    pub(crate) lines: u64,
    pub(crate) console_bytes: u64,
    chain_ok: bool,
    pub(crate) ring_overruns: u64,
    pub(crate) tsc_moves: bool,
}

impl Summary {
    pub(crate) fn new(runs: u32, seed: u64) -> Self {
        Self { runs, seed, ..Self::default() }
    }

    /// Works out the quantiles, prints and writes the summary. Whoever comes here has kept every promise:
    /// chain and memory are checked at each cut and move, and a broken one ends the demo there.
    pub(crate) fn finish(mut self, figures: &mut Figures, path: &Path) -> anyhow::Result<()> {
        self.chain_ok = true;
        self.boot_ms = quantile_ms(&mut figures.boots, 0.5);
        self.pause_ms = Quantiles::of(&mut figures.pauses);
        self.restores = figures.restores.len() as u64;
        self.restore_ms = Quantiles::of(&mut figures.restores);
        self.move_standstill_ms = Quantiles::of(&mut figures.standstills);
        let text = serde_json::to_string_pretty(&self)?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        std::fs::write(path, format!("{text}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        say(&format!("summary, also in {}:", path.display()));
        text.lines().for_each(say);
        ensure!(self.restores > 0, "the guest never moved: give it more --seconds");
        ensure!(self.lines > 0, "the guest's workload said nothing: give it more --seconds");
        say("pause_ms is of cuts in place; restore_ms only of building and setting a fresh VM;");
        say(
            "move_standstill_ms is all of a move: cut, comparison of all memory, end of the old VM, fresh VM",
        );
        say(&self.verdict());
        Ok(())
    }

    fn verdict(&self) -> String {
        let carried = "every move carried the same guest on: memory equal, console chain unbroken";
        match self.ring_overruns {
            0 => format!("{carried}; memory was rebuilt out of dirty sets alone"),
            lost => format!(
                "{carried}; but {lost} cuts had lost track of writes (ring overrun) and said so, and all memory was \
                 copied anew there"
            ),
        }
    }
}

/// What is measured over all runs.
#[derive(Default)]
pub(crate) struct Figures {
    pub(crate) boots: Vec<Duration>,
    pub(crate) pauses: Vec<Duration>,
    pub(crate) restores: Vec<Duration>,
    pub(crate) standstills: Vec<Duration>,
}

impl Figures {
    /// A line of figures after a move.
    pub(crate) fn tell(&mut self, cuts: u64, lines: u64) {
        let last = |samples: &[Duration]| samples.last().map_or(0.0, |sample| sample.as_secs_f64() * 1e3);
        let (restore, standstill) = (last(&self.restores), last(&self.standstills));
        say(&format!(
            "{cuts:>5} cuts, {lines:>5} lines, pause in place p50 {:.2} ms p99 {:.2} ms; memory equal, stood still \
             {standstill:.1} ms, of that new VM {restore:.1} ms",
            quantile_ms(&mut self.pauses, 0.5),
            quantile_ms(&mut self.pauses, 0.99),
        ));
    }
}

/// The guest's console, line by line, apart from what the demo says.
#[derive(Default)]
pub(crate) struct Shown {
    partial: Vec<u8>,
    lines: u64,
}

impl Shown {
    /// All lines of the boot, then every tenth of the workload: enough to watch.
    #[expect(clippy::print_stdout, reason = "the demo shows the guest's console")]
    pub(crate) fn show(&mut self, bytes: &[u8]) {
        self.partial.extend(bytes);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            let text = String::from_utf8_lossy(&line);
            self.lines += u64::from(text.starts_with("colo "));
            if !text.starts_with("colo ") || self.lines % 10 == 1 {
                println!("guest | {}", text.trim_end());
            }
        }
    }
}

#[expect(clippy::print_stdout, reason = "the demo speaks to whoever started it")]
pub(crate) fn say(text: &str) {
    println!("demo  | {text}");
}
