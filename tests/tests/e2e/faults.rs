//! Faults of hosts and of the network between them, at random instants, under a guest with a real service: whoever runs
//! the guest after each of them, its clients' connections live on, what they saw is the history of one service, and
//! nothing that was acknowledged is missing.
//!
//! `COLO_FAULTS` is the number of faults of a run, and `COLO_SEED` repeats one.

use anyhow::{Context, bail, ensure};
use colo_common::Mac;
use colo_proto::v1::Role;
use colo_tests::cluster::config::Options;
use colo_tests::cluster::{Cluster, is_solo_of};
use colo_tests::lab::Lab;
use colo_tests::lab::speakers::Speakers;
use colo_tests::seed::Seed;
use colo_tests::service::Dial;
use colo_tests::service::linear::{Verdict, check};
use colo_tests::service::mixed::{Mixed, Plan};
use colo_tests::service::writer::{Writer, missing};
use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use super::service::{END, PATIENCE, boot, dial, images, in_lab, power_off};
use super::{SUPERSEDED, pause};

/// Faults of a run that is asked for nothing else: each kind once, about 20 s each.
const FAULTS: usize = 6;
/// Clients that meet, and their keys: few of each, since a guest here answers some 25 requests a second.
const CLIENTS: u32 = 3;
const KEYS: u32 = 3;
/// Requests that are answered before a fault, after it, and when the guest is protected again.
const SOME: u64 = 8;
/// A fault comes so much later at most.
const INSTANT: Duration = Duration::from_millis(1500);
/// Between the deaths of both nodes at most: shorter than either waits before it acts by itself.
const BOTH: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Runner,
    Follower,
    Both,
    Cut,
    AcksCut,
    EpochsCut,
}

const ALL: [Fault; 6] =
    [Fault::Runner, Fault::Follower, Fault::Both, Fault::Cut, Fault::AcksCut, Fault::EpochsCut];

/// All kinds equally often, in a random order.
fn plan(seed: &mut Seed, faults: usize) -> Vec<Fault> {
    let mut plan: Vec<Fault> = Vec::new();
    while plan.len() < faults {
        let mut left = ALL.to_vec();
        while !left.is_empty() {
            plan.push(left.swap_remove(seed.below(left.len() as u64) as usize));
        }
    }
    plan.truncate(faults);
    plan
}

/// What is under fault.
struct Scene<'a> {
    lab: &'a Lab,
    cluster: &'a mut Cluster,
    speakers: Speakers,
    dial: Dial,
    seed: Seed,
    runner: String,
    follower: String,
    /// Nodes that there were.
    nodes: u32,
    /// How often each fault left the guest on the node that ran it, and on the other.
    stayed: BTreeMap<Fault, (u32, u32)>,
    /// From each fault to the next answer, at most.
    longest: Duration,
}

#[test]
fn nothing_acknowledged_is_lost_whatever_fails() {
    let Some(images) = images() else { return };
    let mut seed = Seed::from_env(4001);
    let faults = std::env::var("COLO_FAULTS").map_or(FAULTS, |text| text.parse().unwrap());
    let plan = plan(&mut seed, faults);
    let options = Options { links: true, ..Options::service(&images, END).unwrap() };
    in_lab(&["a", "b"], options, |lab, cluster| {
        let mut scene = Scene::new(lab, cluster, seed)?;
        scene.start(plan.first().copied())?;
        let writer = Writer::start(dial(lab)?, PATIENCE, "key")?;
        for (step, fault) in plan.iter().enumerate() {
            let what = format!("fault {} of {faults}, {fault:?}", step + 1);
            scene.step(step, *fault, plan.get(step + 1).copied()).context(what)?;
            ensure!(!writer.has_ended(), "the writer has ended: {:?}", writer.finish().err());
        }
        let history = writer.finish()?;
        let trouble = (history.resets, history.timeouts, history.refused.0);
        ensure!(trouble == (0, 0, 0), "the writer's resets, timeouts and refusals: {trouble:?}");
        let lost = missing(dial(lab)?, PATIENCE, &history).context("reading back")?;
        ensure!(lost.is_empty(), "acknowledged and lost: {lost:?}");
        scene.tell(faults, history.operations.len());
        scene.end()
    });
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab, cluster: &'a mut Cluster, seed: Seed) -> anyhow::Result<Self> {
        let mut speakers = Speakers::new(Mac::of(cluster.vm()));
        ["a", "b"].iter().try_for_each(|node| speakers.listen(lab, node))?;
        let (runner, follower) = ("a".to_owned(), "b".to_owned());
        let (stayed, longest) = (BTreeMap::new(), Duration::ZERO);
        let dial = dial(lab)?;
        Ok(Self { lab, cluster, speakers, dial, seed, runner, follower, nodes: 2, stayed, longest })
    }

    /// The guest runs on a, and b is ready for the first fault.
    fn start(&mut self, next: Option<Fault>) -> anyhow::Result<()> {
        boot(self.cluster, "a", "colo-service ready")?;
        self.start_follower(next)?;
        self.cluster.protect("a", "b")
    }

    /// What an ack means is decided for each copy; only one that means the disk outlives both nodes.
    fn start_follower(&mut self, next: Option<Fault>) -> anyhow::Result<()> {
        let disk = next == Some(Fault::Both) || self.seed.below(3) == 0;
        self.cluster.options.ack = if disk { "disk" } else { "memory" };
        // Where the link fails, either may be the first to ask.
        self.cluster.options.promote_delay_ms = self.seed.below(200) as u32;
        self.cluster.start_secondary(&self.follower)
    }

    /// One fault under clients who meet on keys of their own, until the guest is protected again.
    fn step(&mut self, step: usize, fault: Fault, next: Option<Fault>) -> anyhow::Result<()> {
        let prefix = format!("step-{step}");
        let plan =
            Plan { clients: CLIENTS, keys: KEYS, prefix, seed: self.seed.next_u64(), patience: PATIENCE };
        let mixed = Mixed::start(&self.dial, plan)?;
        self.until_answered(&mixed)?;
        pause(&mut self.seed, INSTANT);
        let before = self.runner.clone();
        let struck = Instant::now();
        let lost = self.strike(fault)?;
        self.until_answered(&mixed)?;
        self.longest = self.longest.max(struck.elapsed());
        self.check_speakers(&before, fault)?;
        self.protect(lost, next)?;
        self.until_answered(&mixed)?;
        let history = mixed.finish()?;
        let trouble = (history.resets, history.timeouts, history.refused.0);
        ensure!(trouble == (0, 0, 0), "resets, timeouts and refusals: {trouble:?}");
        let verdict = check(&history.operations);
        if let Verdict::Broken(dead) = verdict {
            bail!("the history is not linearizable: {dead}");
        }
        ensure!(verdict == Verdict::Linearizable, "{verdict:?}");
        let count = self.stayed.entry(fault).or_default();
        *(if before == self.runner { &mut count.0 } else { &mut count.1 }) += 1;
        Ok(())
    }

    fn until_answered(&self, mixed: &Mixed) -> anyhow::Result<()> {
        let wanted = mixed.answered() + SOME;
        self.cluster.until(&format!("{SOME} more answers"), || {
            ensure!(!mixed.has_ended(), "a client has ended by itself");
            Ok((mixed.answered() >= wanted).then_some(()))
        })
    }

    /// Lets something fail; answers the node that is not there any more, if one is not. The other one runs the guest.
    fn strike(&mut self, fault: Fault) -> anyhow::Result<Option<String>> {
        let (runner, follower) = (self.runner.clone(), self.follower.clone());
        match fault {
            Fault::Runner => {
                self.cluster.kill(&runner)?;
                self.cluster.until_solo(&follower)?;
                self.turn_over();
                Ok(Some(runner))
            }
            Fault::Follower => {
                self.cluster.kill(&follower)?;
                self.cluster.until_solo(&runner)?;
                Ok(Some(follower))
            }
            Fault::Both => {
                let runner_first = self.seed.below(2) == 0;
                let (first, second) = if runner_first { (&runner, &follower) } else { (&follower, &runner) };
                self.cluster.kill(first)?;
                pause(&mut self.seed, BOTH);
                self.cluster.kill(second)?;
                self.cluster.check_files(&follower)?;
                // Its acks may have come to mean the disk by the operator's word, which its configuration outlives.
                self.cluster.options.ack = "disk";
                self.cluster.start_secondary(&follower)?;
                self.cluster.until_solo(&follower)?;
                self.turn_over();
                Ok(Some(runner))
            }
            Fault::Cut | Fault::AcksCut | Fault::EpochsCut => self.cut(fault),
        }
    }

    /// The link fails, and one of the two goes on. Which is not known before; the other one gives in.
    fn cut(&mut self, fault: Fault) -> anyhow::Result<Option<String>> {
        let (runner, follower) = (self.runner.clone(), self.follower.clone());
        let link = self.cluster.link(&follower)?;
        match fault {
            Fault::AcksCut => link.cut_acks(),
            Fault::EpochsCut => link.cut_epochs(),
            _ => link.cut(),
        }
        let winner = self.cluster.until("one node to have the register alone", || {
            let Some(entry) = self.cluster.register()? else { return Ok(None) };
            Ok([&runner, &follower].into_iter().find(|node| is_solo_of(&entry, node)))
        })?;
        self.cluster.until_solo(winner)?;
        pause(&mut self.seed, INSTANT);
        self.cluster.link(&follower)?.heal();
        if *winner == runner {
            return Ok(None);
        }
        self.turn_over();
        if self.cluster.goes_on_as_follower(&runner) {
            return Ok(None);
        }
        let status = self.cluster.ended(&runner)?;
        ensure!(status.code() == Some(SUPERSEDED), "the old runner ended with {status}");
        Ok(Some(runner))
    }

    fn turn_over(&mut self) {
        std::mem::swap(&mut self.runner, &mut self.follower);
    }

    /// Protects the guest again: by the node that was lost with what it has, or by one that nobody has seen before.
    fn protect(&mut self, lost: Option<String>, next: Option<Fault>) -> anyhow::Result<()> {
        let Some(lost) = lost else {
            // It comes back by itself; what its acks mean can be changed meanwhile.
            self.cluster.until_paired(&self.runner)?;
            return if next == Some(Fault::Both) { self.change_policy() } else { Ok(()) };
        };
        // A power cut is the least that its disk must stand.
        self.cluster.check_files(&lost)?;
        if self.seed.below(2) == 0 {
            self.follower = format!("n{}", self.nodes);
            self.nodes += 1;
            self.lab.add_node(&self.follower)?;
            self.speakers.listen(self.lab, &self.follower)?;
            fs::remove_dir_all(self.cluster.directory_of(&lost)).context("removing a node that is gone")?;
            fs::remove_file(self.cluster.image_of(&lost)).context("removing a disk that is gone")?;
        }
        self.start_follower(next)?;
        self.cluster.protect(&self.runner, &self.follower)
    }

    fn change_policy(&self) -> anyhow::Result<()> {
        let disk = colo_proto::v1::AckPolicy::Disk;
        self.cluster.until("acks to mean the disk", || {
            let changed = self.cluster.admin(&self.follower)?.set_policy(disk)?;
            Ok((!changed.pending).then_some(()))
        })
    }

    /// Only the runner speaks for the guest: first the one before the fault, then the one after it, and when that is
    /// another one, it tells the network so.
    fn check_speakers(&self, before: &str, fault: Fault) -> anyhow::Result<()> {
        let turns = self.speakers.turns()?;
        let nodes: Vec<&str> = turns.iter().map(|turn| turn.node.as_str()).collect();
        if before == self.runner {
            ensure!(nodes == [before], "spoke for the guest: {turns:?}, and it stayed on {before}");
            return Ok(());
        }
        ensure!(nodes == [before, &self.runner], "spoke for the guest: {turns:?}");
        let (by_card, by_address) = turns[1].announced;
        // A process that found its copy in the store has heard nothing of the guest's: it knows its card alone.
        let good = by_card > 0 && (by_address > 0 || fault == Fault::Both);
        ensure!(good, "not announced: {turns:?}");
        Ok(())
    }

    /// The guest is told to power off: both nodes have the same disk, and its file system was unmounted.
    fn end(self) -> anyhow::Result<()> {
        let Self { cluster, speakers, runner, follower, .. } = self;
        cluster.until_role(&runner, Role::Paired)?;
        let turns = speakers.turns()?;
        ensure!(turns.iter().all(|turn| turn.node == runner), "spoke for the guest at the end: {turns:?}");
        power_off(cluster, &runner, &follower)?;
        [&runner, &follower].into_iter().try_for_each(|node| cluster.check_files(node))
    }

    #[expect(clippy::print_stderr, reason = "how the faults went")]
    fn tell(&self, faults: usize, writes: usize) {
        let Self { stayed, longest, .. } = self;
        eprintln!(
            "{faults} faults, on {} nodes, {writes} writes over one connection; the guest stayed, moved: {stayed:?}; at most {longest:?} to the next {SOME} answers",
            self.nodes
        );
    }
}
