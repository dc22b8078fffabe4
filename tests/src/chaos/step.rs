//! One fault, from the clients' first requests to the guest's protection after the repair, and the end of a world.

use anyhow::{Context, ensure};
use colo_common::register::{StopReason, Value};
use colo_proto::v1::{Role, StatusReply};
use std::time::{Duration, Instant};

use super::faults::{Hit, aim};
use super::judge::{Seen, Step, judge};
use super::plan::{Expected, Fault};
use super::world::{PATIENCE, Roles, World};
use crate::cluster::runs;
use crate::images::Images;
use crate::seed::Seed;
use crate::service::Dial;
use crate::service::mixed::{Mixed, Plan};
use crate::service::writer::{Writer, missing};

/// Clients that meet, and their keys: few of each, since a guest may answer no more than some 25 requests a second.
const CLIENTS: u32 = 3;
const KEYS: u32 = 3;
/// Requests that are answered before a fault, after it, and when the guest is protected again.
const SOME: u64 = 8;
/// A fault comes so much later at most.
const INSTANT: Duration = Duration::from_millis(1500);
/// A fault that is waited out lasts so long at least: longer than any node waits before it acts by itself.
const LEAST: Duration = Duration::from_secs(2);
/// How long nobody must run the guest to be sure that nobody does.
const LONG: Duration = Duration::from_secs(5);

/// A world with a client that writes over one connection all the time.
pub struct Scene {
    writer: Option<Writer>,
    dial: Dial,
    seed: Seed,
    /// A fault lasts so much longer at most.
    hold: Duration,
    steps: u32,
    world: World,
}

impl Scene {
    /// Builds a world and has the writer begin.
    ///
    /// # Errors
    /// Something does not come up.
    pub fn begin(images: &Images, seed: Seed, hold: Duration) -> anyhow::Result<Self> {
        let mut world = World::begin(images)?;
        let started = world.dial().and_then(|dial| Ok((Writer::start(dial.clone(), PATIENCE, "key")?, dial)));
        let (writer, dial) = started.map_err(|e| world.explain(&e))?;
        Ok(Self { writer: Some(writer), dial, seed, hold, steps: 0, world })
    }

    /// Plays a fault that the guest outlives.
    ///
    /// # Errors
    /// Something else than the guest's promises broke, or the guest does not go on.
    pub fn play(&mut self, fault: &Fault) -> anyhow::Result<Seen> {
        let played = self.step(fault);
        played.map_err(|e| self.world.explain(&e))
    }

    fn step(&mut self, fault: &Fault) -> anyhow::Result<Seen> {
        self.world.until_whole()?;
        let roles = self.world.roles()?;
        self.world.speakers.said().map(drop)?;
        self.steps += 1;
        let plan = Plan {
            clients: CLIENTS,
            keys: KEYS,
            prefix: format!("step-{}", self.steps),
            seed: self.seed.next_u64(),
            patience: PATIENCE,
        };
        let mixed = Mixed::start(&self.dial, plan)?;
        self.until_answered(&mixed).context("before the fault")?;
        pause(&mut self.seed, INSTANT);
        let hits = aim(fault, &roles, &mut self.seed);
        let struck = self.world.strike(fault, &hits, &roles)?;
        let mut step = Step::new(fault.clone(), roles, struck);
        self.endure(fault.expected(), &mixed, &mut step)?;
        step.repaired = Instant::now();
        self.world.repair(&hits)?;
        self.until_answered(&mixed).context("after the repair")?;
        self.note_promotion(&mut step);
        self.world.until_whole().context("after the repair")?;
        step.whole = Instant::now();
        self.until_answered(&mixed).context("protected again")?;
        ensure!(!self.writer.as_ref().is_some_and(Writer::has_ended), "the writer has ended by itself");
        step.history = Some(mixed.finish()?);
        judge(&self.world, &step)
    }

    /// The fault lasts, until what is expected of it has happened and for a random time longer.
    fn endure(&mut self, expected: Expected, mixed: &Mixed, step: &mut Step) -> anyhow::Result<()> {
        let before = mixed.answered();
        if expected == Expected::Repaired {
            std::thread::sleep(LEAST);
        } else {
            // Who is lost does not answer: what came before that does not count.
            std::thread::sleep(LEAST / 4);
            self.until_answered(mixed).context("while the fault lasts")?;
            self.note_promotion(step);
        }
        pause(&mut self.seed, self.hold);
        step.answered_before_repair = mixed.answered() >= before + SOME;
        Ok(())
    }

    fn until_answered(&mut self, mixed: &Mixed) -> anyhow::Result<()> {
        let wanted = mixed.answered() + SOME;
        self.world.until(&format!("{SOME} more answers"), |_| {
            ensure!(!mixed.has_ended(), "a client has ended by itself");
            Ok((mixed.answered() >= wanted).then_some(()))
        })
    }

    /// When the other node suspected, and what it took from there; once for each step.
    fn note_promotion(&self, step: &mut Step) {
        if step.promotion.is_some() {
            return;
        }
        // Only that one: a node that stands still would have this wait.
        let Some(entry) = self.world.watcher.last() else { return };
        let asked = Instant::now();
        let status = self.world.cluster.status(entry.value.runner().as_str());
        let runs = |status: &StatusReply| runs(status.role());
        let Some(promotion) = status.filter(runs).and_then(|status| status.promotion) else { return };
        // The answer is from between the question and now: the middle is off by half of that at most.
        let ran = asked + asked.elapsed() / 2 - Duration::from_micros(promotion.age_us);
        if ran > step.struck {
            let suspected = ran - Duration::from_micros(promotion.total_us);
            let detected = suspected.saturating_duration_since(step.struck);
            step.promotion = Some((detected, Duration::from_micros(promotion.total_us)));
        }
    }

    /// Plays the fault that nobody outlives: both nodes are started again, nobody runs the guest, and they say why. It is
    /// the end of the world.
    ///
    /// # Errors
    /// Somebody runs the guest, or nobody says why nobody does.
    pub fn play_last(mut self, fault: &Fault) -> anyhow::Result<Seen> {
        let played = self.step_last(fault);
        played.map_err(|e| self.world.explain(&e))
    }

    fn step_last(&mut self, fault: &Fault) -> anyhow::Result<Seen> {
        self.world.until_whole()?;
        self.check_writes()?;
        let roles = self.world.roles()?;
        let hits = aim(fault, &roles, &mut self.seed);
        let before = self.world.cluster.register()?;
        let struck = self.world.strike(fault, &hits, &roles)?;
        let mut step = Step::new(fault.clone(), roles.clone(), struck);
        std::thread::sleep(LEAST);
        step.repaired = Instant::now();
        self.world.repair(&hits)?;
        let told = self.until_told(&roles, &hits)?;
        self.stays_down()?;
        step.whole = Instant::now();
        ensure!(self.world.cluster.register()? == before, "the register has changed");
        let mut seen = judge(&self.world, &step)?;
        seen.outcome = "nobody goes on".to_owned();
        seen.told = Some(told);
        Ok(seen)
    }

    /// What the node that had the copy says of it.
    fn until_told(&mut self, roles: &Roles, hits: &[Hit]) -> anyhow::Result<String> {
        let secondary = roles.secondary.clone();
        let killed = hits.iter().any(|hit| hit.kills(&secondary));
        self.world.until("the secondary to say what it holds", |world| {
            let Some(status) = world.cluster.status(&secondary) else { return Ok(None) };
            let says = |status: &StatusReply| status.role() == Role::Waiting && status.register.is_some();
            ensure!(killed, "the secondary was not killed");
            Ok(says(&status).then(|| {
                let stale = status.points.and_then(|points| points.stale);
                let point = stale.map_or_else(|| "none".to_owned(), |p| format!("{}.{}", p.term, p.epoch));
                format!("{:?}, newest whole point {point}, {:?}", status.role(), status.last_error)
            }))
        })
    }

    fn stays_down(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        while started.elapsed() < LONG {
            let runner = self.world.runner();
            ensure!(runner.is_none(), "{runner:?} runs a guest that nobody may run");
            std::thread::sleep(LEAST / 10);
        }
        Ok(())
    }

    /// Ends the writer: nothing that it was told is missing.
    fn check_writes(&mut self) -> anyhow::Result<()> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let history = writer.finish()?;
        let trouble = (history.resets, history.timeouts, history.refused.0);
        ensure!(trouble == (0, 0, 0), "the writer's resets, timeouts and refusals: {trouble:?}");
        let lost = missing(self.dial.clone(), PATIENCE, &history).context("reading back")?;
        ensure!(lost.is_empty(), "acknowledged and lost: {lost:?}");
        Ok(())
    }

    /// The end of a world: nothing that was acknowledged is missing, and after the guest has powered itself off both disks
    /// are the same, with nothing to mend on them.
    ///
    /// # Errors
    /// It is not so.
    pub fn end(mut self) -> anyhow::Result<()> {
        let ended = self.finish();
        ended.map_err(|e| self.world.explain(&e))
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        self.world.until_whole()?;
        self.check_writes()?;
        let Roles { primary, secondary, .. } = self.world.roles()?;
        let cluster = &mut self.world.cluster;
        cluster.admin(&primary)?.type_in(vec![b"poweroff\n".to_vec()])?;
        for node in [&primary, &secondary] {
            let status = cluster.ended(node)?;
            ensure!(status.success(), "{node} ended with {status}");
        }
        let entry = cluster.register()?.context("no register")?;
        let off = matches!(entry.value, Value::Stopped { reason: StopReason::PowerOff, .. });
        ensure!(off, "the guest has powered itself off, and the register says {entry}");
        let (left, right) = (cluster.disk_digest(&primary)?, cluster.disk_digest(&secondary)?);
        ensure!(left == right, "the disk is {left} at {primary}, and {right} at {secondary}");
        [&primary, &secondary].into_iter().try_for_each(|node| cluster.check_files(node))
    }
}

fn pause(seed: &mut Seed, most: Duration) {
    let most = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
    std::thread::sleep(Duration::from_micros(seed.below(most.max(1))));
}
