//! The demo's steps.

use anyhow::{Context, bail, ensure};
use colo_tests::chaos::plan::{Fault, Way};
use colo_tests::chaos::watcher::check_chain;
use colo_tests::chaos::world::{PATIENCE, Roles, World};
use colo_tests::images::Images;
use colo_tests::service::writer::{Writer, missing};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::say;
use crate::timeline::{Step, tell};

/// Answers that show that the client goes on.
const SOME: u64 = 5;

/// Plays all steps and tells how they went.
///
/// # Errors
/// A broken promise, or something that does not work.
pub(crate) fn play(images: &Images, between: Duration, summary: &Path) -> anyhow::Result<()> {
    say("three nodes and three members of etcd, each on a host of its own; the guest boots");
    let mut world = World::begin(images)?;
    let dial = world.dial()?;
    let writer = Writer::start(dial.clone(), PATIENCE, "key")?;
    let played = Demo { world: &mut world, writer: &writer, between, steps: Vec::new() }.all();
    let steps = played.map_err(|e| world.explain(&e))?;
    let history = writer.finish()?;
    let lost = missing(dial, PATIENCE, &history).context("reading everything back")?;
    let seen = world.watcher.seen();
    check_chain(&seen)?;
    let acked = lost.iter().filter(|key| key.acknowledged).count();
    tell(&steps, &history, acked, seen.len(), summary)?.iter().for_each(|line| say(line));
    if let Some(first) = lost.first() {
        bail!("{} keys are not as they were written; {first}", lost.len());
    }
    let trouble = (history.resets, history.timeouts, history.refused.0);
    ensure!(trouble == (0, 0, 0), "the client's resets, timeouts and refusals: {trouble:?}");
    let writes = history.operations.len();
    say(&format!(
        "{writes} writes over one connection, all read back: nothing that was acknowledged is missing"
    ));
    Ok(())
}

struct Demo<'a> {
    world: &'a mut World,
    writer: &'a Writer,
    between: Duration,
    steps: Vec<Step>,
}

impl Demo<'_> {
    fn all(mut self) -> anyhow::Result<Vec<Step>> {
        let Roles { primary: first, secondary: second, spare: third } = self.world.roles()?;
        self.step("nothing fails", |_| Ok(()))?;
        self.step(&format!("{first} is killed (SIGKILL)"), |world| world.cluster.kill(&first).map(drop))?;
        self.step(&format!("{second} is killed, {first} comes back"), |world| {
            world.cluster.kill(&second)?;
            world.cluster.restart(&first)
        })?;
        self.step(&format!("the guest is moved to {first}"), |world| switch_over(world, &third))?;
        self.step(&format!("and back to {third}"), |world| switch_over(world, &first))?;
        self.step(&format!("{second} comes back"), |world| world.cluster.restart(&second))?;
        let roles = self.world.roles()?;
        let link = Fault::Link(Way::Both);
        self.step("the link between both is cut", |world| world.strike(&link, &[], &roles).map(drop))?;
        self.step("the link is healed", |world| world.repair(&[]))?;
        Ok(self.steps)
    }

    /// Does something, and waits until the guest is protected and the client has answers again.
    fn step(&mut self, what: &str, act: impl FnOnce(&mut World) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let before = self.world.watcher.last();
        let at = Instant::now();
        act(&mut *self.world).with_context(|| what.to_owned())?;
        // A node that was just killed is still in the register.
        let reacts = what.contains("killed") || what.contains("cut");
        if reacts {
            let changed = |world: &World| Ok((world.watcher.last() != before).then_some(()));
            self.world.until("the register to change", changed)?;
        }
        self.world.until_protected().with_context(|| what.to_owned())?;
        let protected = Instant::now();
        self.until_answered()?;
        let register = self.world.watcher.seen().into_iter().map(|(seen, _)| seen).find(|seen| *seen > at);
        let Roles { primary, secondary, .. } = self.world.roles()?;
        let took = (protected - at).as_millis();
        say(&format!("{what}: protected after {took} ms, at {primary} by {secondary}"));
        let on = format!("{primary}, {secondary}");
        self.steps.push(Step { what: what.to_owned(), at, register, protected, on });
        std::thread::sleep(self.between);
        Ok(())
    }

    fn until_answered(&mut self) -> anyhow::Result<()> {
        let wanted = self.writer.acknowledged() + SOME;
        let writer = self.writer;
        self.world.until("the client to go on", |_| {
            ensure!(!writer.has_ended(), "the client has ended");
            Ok((writer.acknowledged() >= wanted).then_some(()))
        })
    }
}

fn switch_over(world: &mut World, runner: &str) -> anyhow::Result<()> {
    world.cluster.admin(runner)?.switchover().map(drop)
}
