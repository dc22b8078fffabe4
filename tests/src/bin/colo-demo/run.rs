//! One run: start, protect, kill, go on, check.

use anyhow::{Context, bail, ensure};
use colo_proto::v1::{Promotion, Role, tracker};
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::cluster::ledger::Ledger;
use colo_tests::cluster::{Cluster, PATIENCE, runs};
use colo_tests::measure::quantile_ms;
use std::time::{Duration, Instant};

use crate::report::{Figures, Shown, say};
use crate::watch::{Reports, acks, pauses};

/// Longest time that a boot may take; emulated kernels on a busy host are slow.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
/// How long the guest is watched after the failover.
const AFTER: Duration = Duration::from_secs(3);
/// Between two looks.
const POLL: Duration = Duration::from_millis(20);
/// Between two lines of figures.
const TELL: Duration = Duration::from_secs(1);

/// What is played.
pub(crate) struct Scene {
    pub(crate) guest: Guest,
    /// From the first moment of protection.
    pub(crate) until_kill: Duration,
}

/// The stage and what is shown of it.
struct Stage {
    cluster: Cluster,
    shown: Shown,
    /// Console bytes shown.
    at: usize,
    reports: Reports,
    told: Instant,
}

/// Plays a run and adds to the figures.
///
/// # Errors
/// A broken promise, or something that does not work.
pub(crate) fn play(scene: &Scene, figures: &mut Figures) -> anyhow::Result<()> {
    let mut options = Options::new(scene.guest.clone());
    // What a configuration has that says nothing about it.
    (options.heartbeat_ms, options.suspect_after_ms, options.promote_delay_ms) = (50, 500, 250);
    let cluster = Cluster::new(options)?;
    let (shown, reports, told) = (Shown::default(), Reports::default(), Instant::now());
    let mut stage = Stage { cluster, shown, at: 0, reports, told };
    stage.play(scene, figures).map_err(|e| {
        stage.cluster.keep();
        anyhow::anyhow!("{e:#}\n{}", stage.cluster.logs())
    })
}

impl Stage {
    fn play(&mut self, scene: &Scene, figures: &mut Figures) -> anyhow::Result<()> {
        self.boot(scene, figures)?;
        self.protect(figures)?;
        self.work(scene.until_kill)?;
        self.count(figures)?;
        let (detected, promotion) = self.kill()?;
        figures.promoted(detected, &promotion);
        let released = self.cluster.ledger().whole();
        self.watch_for(AFTER)?;
        let more = self.cluster.ledger().whole().saturating_sub(released);
        ensure!(more > 0, "the guest says nothing at the secondary");
        self.check(scene, figures)?;
        self.end()
    }

    fn boot(&mut self, scene: &Scene, figures: &mut Figures) -> anyhow::Result<()> {
        say(&format!("starting the secondary, and the primary with {}", scene.guest.name));
        self.cluster.start_secondary("secondary")?;
        self.cluster.start_primary("primary", None)?;
        let started = Instant::now();
        self.cluster.until("the primary to answer", || Ok(self.cluster.status("primary")))?;
        let client = self.cluster.admin("primary")?.client()?;
        self.cluster.runtime().spawn(self.reports.clone().follow(client));
        while self.lines() == 0 {
            self.show();
            ensure!(started.elapsed() < BOOT_LIMIT, "no boot in {BOOT_LIMIT:?}");
            if let Some(status) = self.cluster.process("primary")?.status()? {
                bail!("the primary has ended: {status}");
            }
            std::thread::sleep(POLL);
        }
        figures.boots.push(started.elapsed());
        let status = self.cluster.status("primary").context("the primary does not answer")?;
        let tracker = status.guest.and_then(|guest| guest.tracker).and_then(|tracker| tracker.kind);
        figures.tracker = match tracker {
            Some(tracker::Kind::RingEntries(entries)) => format!("ring ({entries} entries)"),
            Some(tracker::Kind::Bitmap(_)) => "bitmap".to_owned(),
            None => bail!("the primary does not say how it tracks writes"),
        };
        figures.guest.clone_from(&scene.guest.name);
        Ok(())
    }

    fn protect(&mut self, figures: &mut Figures) -> anyhow::Result<()> {
        say(&format!(
            "the guest works after {:.1} s; now it gets protected",
            self.told.elapsed().as_secs_f64()
        ));
        let seeding = Instant::now();
        self.cluster.protect("primary", "secondary")?;
        figures.seeds.push(seeding.elapsed());
        say(&format!(
            "protected after {} ms: the secondary holds a whole copy",
            seeding.elapsed().as_millis()
        ));
        Ok(())
    }

    fn work(&mut self, time: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + time;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            self.show();
            if self.told.elapsed() > TELL && left > POLL {
                self.tell();
            }
            // The last wait ends at the very instant that was drawn.
            std::thread::sleep(left.min(POLL));
        }
        Ok(())
    }

    fn tell(&mut self) {
        self.told = Instant::now();
        let reports = self.reports.all();
        let recent = &reports[reports.len().saturating_sub(40)..];
        let pages: u64 = recent.iter().map(|report| report.pages).sum();
        say(&format!(
            "{:>5} epochs, {:>4} pages each; pause p50 {:.2} ms p99 {:.2} ms; cut to ack p50 {:.2} ms; {:.1} MiB sent",
            reports.len(),
            pages / recent.len().max(1) as u64,
            quantile_ms(&mut pauses(recent), 0.5),
            quantile_ms(&mut pauses(recent), 0.99),
            quantile_ms(&mut acks(recent), 0.5),
            reports.iter().map(|report| report.wire_bytes).sum::<u64>() as f64 / f64::from(1 << 20),
        ));
    }

    /// What the primary counted; it will not be able to say so later.
    fn count(&mut self, figures: &mut Figures) -> anyhow::Result<()> {
        let status = self.cluster.status("primary").context("the primary does not answer")?;
        ensure!(status.role() == Role::Paired, "the vm has lost its protection: {}", status.last_error);
        figures.primary(&self.reports.all(), &status.counters.unwrap_or_default());
        Ok(())
    }

    /// Kills the primary, and waits until the guest goes on. How long until the suspicion, and what followed.
    fn kill(&mut self) -> anyhow::Result<(Duration, Promotion)> {
        let killed = self.cluster.kill("primary")?;
        self.show();
        say("killed the primary (SIGKILL)");
        let promotion = loop {
            let asked = Instant::now();
            let status = self.cluster.status("secondary");
            if let Some(promotion) =
                status.filter(|status| runs(status.role())).and_then(|status| status.promotion)
            {
                // The answer is from between the question and now: the middle is off by half of that at most.
                let ran = asked + asked.elapsed() / 2 - Duration::from_micros(promotion.age_us);
                let suspected = ran - Duration::from_micros(promotion.total_us);
                break (suspected.saturating_duration_since(killed), promotion);
            }
            ensure!(killed.elapsed() < PATIENCE, "nobody takes the guest over");
            std::thread::sleep(Duration::from_millis(2));
        };
        let (detected, parts) = &promotion;
        say(&format!(
            "the secondary suspected it after {} ms and ran the guest {} ms later (register {:.1} ms with the delay, \
             apply {:.1}, store {:.1}, restore {:.1})",
            detected.as_millis(),
            parts.total_us / 1000,
            parts.register_us as f64 / 1e3,
            parts.apply_us as f64 / 1e3,
            parts.store_us as f64 / 1e3,
            parts.restore_us as f64 / 1e3,
        ));
        Ok(promotion)
    }

    fn watch_for(&mut self, time: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.show();
            if let Some(status) = self.cluster.process("secondary")?.status()? {
                bail!("the secondary has ended: {status}");
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn check(&mut self, scene: &Scene, figures: &mut Figures) -> anyhow::Result<()> {
        let status = self.cluster.status("secondary").context("the secondary does not answer")?;
        let ledger: Ledger = self.cluster.ledger().clone();
        figures.judge(&ledger, scene.guest.seed, &status.counters.unwrap_or_default());
        let counts = ledger.check_chain(scene.guest.seed)?;
        say(&format!(
            "{} bytes of console, {} lines: no gap, no conflict, hash chain unbroken",
            ledger.end(),
            counts.lines
        ));
        Ok(())
    }

    /// The operator stops the vm, and the node that ran it ends.
    fn end(&mut self) -> anyhow::Result<()> {
        self.cluster.admin("secondary")?.stop()?;
        let status = self.cluster.ended("secondary")?;
        ensure!(status.success(), "the secondary ended with {status} after the vm was stopped");
        Ok(())
    }

    fn show(&mut self) {
        let fresh = {
            let ledger = self.cluster.ledger();
            ledger.bytes()[self.at.min(ledger.bytes().len())..].to_vec()
        };
        self.at += fresh.len();
        self.shown.show(&fresh);
    }

    fn lines(&self) -> u64 {
        self.shown.lines()
    }
}
