//! A guest is started anew on the same vm: after a crash, after a stop, and by starts that are themselves killed.

use anyhow::{Context, ensure};
use colo_common::life::LIFE;
use colo_common::register::StopReason;
use colo_common::vmdir::{Runner, VmDirectory};
use colo_proto::v1::Console;
use colo_tests::chain::Checker;
use colo_tests::cluster::{Cluster, is_solo_of, process, scenario};
use colo_tests::seed::Seed;
use colo_tests::session::find;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{SOME, check_goes_on, check_stopped, kill_runner, pair, pause, synthetic};

/// What a start is told beside its usual configuration.
#[derive(Clone, Copy, Default)]
struct Told {
    boot: bool,
    again: bool,
}

const NOTHING: Told = Told { boot: false, again: false };
const BOOT: Told = Told { boot: true, again: false };
const AGAIN: Told = Told { boot: false, again: true };

fn start(cluster: &mut Cluster, node: &str, primary: bool, told: Told) -> anyhow::Result<()> {
    let (path, mut command) = cluster.prepare(node, primary, None)?;
    if told.boot {
        let text = fs::read_to_string(&path)?;
        fs::write(&path, format!("on_crash = \"boot\"\n{text}"))?;
    }
    if told.again {
        command.arg("--again");
    }
    cluster.start(node, command, false)
}

/// The node ends by itself, with an error that has this in it.
fn refused(cluster: &mut Cluster, node: &str, why: &str) -> anyhow::Result<()> {
    let status = cluster.ended(node)?;
    ensure!(status.code() == Some(1), "{node} ended with {status}");
    let log = cluster.process(node)?.log();
    let last = log.lines().last().unwrap_or_default();
    ensure!(last.contains(why), "{node} ended without {why:?}:\n{log}");
    Ok(())
}

/// The guest on `node` has offsets of the register's term.
fn begins_by_its_term(cluster: &Cluster, node: &str) -> anyhow::Result<u64> {
    cluster.until(&format!("output of {node} from the first offset of its term on"), || {
        let Some(entry) = cluster.register()?.filter(|entry| is_solo_of(entry, node)) else {
            return Ok(None);
        };
        let begins = (entry.term.0 - 1) * LIFE;
        let console = cluster.status(node).and_then(|status| status.console);
        let it_is = |now: &Console| now.kept_from == begins && now.released > begins + SOME;
        Ok(console.filter(it_is).map(|_| begins))
    })
}

/// `coloctl console`, which types what it is told to.
struct Reader {
    child: Child,
    directory: PathBuf,
}

impl Reader {
    fn start(cluster: &Cluster, nodes: &[&str], from: u64) -> anyhow::Result<Self> {
        let directory = cluster.directory().to_owned();
        let mut command = Command::new(process::program("coloctl")?);
        for node in nodes {
            command.arg("--node").arg(cluster.admin(node)?.address().to_string());
        }
        command.args(["console", "--from", &from.to_string()]).stdin(Stdio::piped());
        command.stdout(File::create(directory.join("reader.out"))?);
        command.stderr(File::create(directory.join("reader.err"))?);
        Ok(Self { child: command.spawn()?, directory })
    }

    fn out(&self) -> Vec<u8> {
        fs::read(self.directory.join("reader.out")).unwrap_or_default()
    }

    fn notes(&self) -> String {
        fs::read_to_string(self.directory.join("reader.err")).unwrap_or_default()
    }

    fn types(&mut self, text: &str) -> anyhow::Result<()> {
        let stdin = self.child.stdin.as_mut().context("it has no standard input")?;
        Ok(stdin.write_all(text.as_bytes())?)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // One that has ended already is no error here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two lives of the same guest, one after the other: each a chain from its first line on.
fn check_two_lives(bytes: &[u8], seed: u64) -> anyhow::Result<()> {
    let first_line = bytes.split_inclusive(|&byte| byte == b'\n').next().context("nothing was said")?;
    let second = first_line.len() + find(&bytes[first_line.len()..], first_line).context("one life only")?;
    for life in [&bytes[..second], &bytes[second..]] {
        let mut checker = Checker::from_start(seed);
        checker.feed(life);
        checker.verdict().map_err(|fault| anyhow::anyhow!("a life's chain is broken: {fault}"))?;
    }
    Ok(())
}

fn input_of(cluster: &Cluster, node: &str, wanted: u64) -> anyhow::Result<()> {
    cluster.until(&format!("{node} to have input up to {wanted}"), || {
        let console = cluster.status(node).and_then(|status| status.console);
        Ok(console.filter(|now| now.input == wanted).map(drop))
    })
}

/// One console over a crash and a boot: it tells that the guest is another, shows all that this one says, and types.
#[test]
fn a_console_goes_on_over_a_boot() {
    let mut seed = Seed::from_env(3501);
    scenario(synthetic(&mut seed), |cluster| {
        start(cluster, "a", true, BOOT)?;
        cluster.until_solo("a")?;
        let mut reader = Reader::start(cluster, &["a"], 0)?;
        reader.types("one\n")?;
        input_of(cluster, "a", 4)?;
        cluster.until("the first life", || Ok((reader.out().len() as u64 > SOME).then_some(())))?;
        cluster.kill("a")?;
        start(cluster, "a", true, BOOT)?;
        let begins = begins_by_its_term(cluster, "a")?;
        ensure!(begins == LIFE, "the second term begins at {begins}");
        let note = format!("the guest was started anew: its console begins at {begins}");
        cluster.until("a word about the new guest", || Ok(reader.notes().contains(&note).then_some(())))?;
        reader.types("two\n")?;
        input_of(cluster, "a", begins + 4)?;
        let enough = reader.out().len() as u64 + SOME;
        cluster.until("the second life", || Ok((reader.out().len() as u64 > enough).then_some(())))?;
        check_two_lives(&reader.out(), cluster.options.guest.seed)?;
        let file = fs::read(cluster.directory().join("a.console"))?;
        check_two_lives(&file, cluster.options.guest.seed)
    })
    .unwrap();
}

/// A primary's vm: only the operator's word starts it again, and a reader's old offset still means what it meant.
#[test]
fn a_primary_starts_a_stopped_vm_again() {
    let mut seed = Seed::from_env(3502);
    scenario(synthetic(&mut seed), |cluster| {
        start(cluster, "a", true, NOTHING)?;
        cluster.until_released(SOME)?;
        let heard = cluster.ledger().whole();
        cluster.admin("a")?.stop()?;
        ensure!(cluster.ended("a")?.success(), "it was stopped");
        start(cluster, "a", true, BOOT)?;
        refused(cluster, "a", "Start it again with --again")?;
        start(cluster, "a", true, AGAIN)?;
        let begins = begins_by_its_term(cluster, "a")?;
        let reader = Reader::start(cluster, &["a"], heard)?;
        cluster.until("the new guest", || Ok((reader.out().len() as u64 > SOME).then_some(())))?;
        let note = format!("the guest was started anew: its console begins at {begins}");
        ensure!(reader.notes().contains(&note), "it does not say so: {}", reader.notes());
        let mut checker = Checker::from_start(cluster.options.guest.seed);
        checker.feed(&reader.out());
        checker.verdict().map_err(|fault| anyhow::anyhow!("the chain is broken: {fault}"))
    })
    .unwrap();
}

/// A secondary that was promoted, and stopped: nobody else may start the vm, and it may by the operator's word. What it
/// runs then is protected again, and outlives it.
#[test]
fn a_secondary_starts_a_stopped_vm_again() {
    let mut seed = Seed::from_env(3503);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        ensure!(kill_runner(cluster, "a", "b")?, "a protected guest died with its host");
        check_goes_on(cluster)?;
        cluster.admin("b")?.stop()?;
        check_stopped(cluster, StopReason::Operator)?;
        ensure!(cluster.ended("b")?.success(), "it was stopped");
        start(cluster, "b", false, BOOT)?;
        refused(cluster, "b", "Start it again with --again")?;
        start(cluster, "b", false, AGAIN)?;
        cluster.until_solo("b")?;
        let begins = begins_by_its_term(cluster, "b")?;
        start(cluster, "a", false, NOTHING)?;
        cluster.protect("b", "a")?;
        cluster.kill("b")?;
        cluster.until_solo("a")?;
        let told = cluster.status("a").and_then(|status| status.console).context("a does not answer")?;
        ensure!(told.released > begins && told.released / LIFE == begins / LIFE, "it goes on at {told:?}");
        start(cluster, "b", false, AGAIN)?;
        refused(cluster, "b", "leave it out")
    })
    .unwrap();
}

/// What the directory of a node says that was just killed.
fn runner(cluster: &Cluster, node: &str) -> anyhow::Result<Runner> {
    let directory = VmDirectory::open(&cluster.directory_of(node), &"demo".parse()?)?;
    Ok(directory.runner()?.unwrap_or_default())
}

/// Kills a node that starts, close to the instant at which the register names it.
fn kill_in_start(cluster: &mut Cluster, node: &str, seed: &mut Seed) -> anyhow::Result<()> {
    let started = Instant::now();
    while !cluster.register()?.is_some_and(|entry| is_solo_of(&entry, node)) {
        ensure!(started.elapsed() < Duration::from_secs(60), "{node} does not start");
    }
    pause(seed, Duration::from_millis(3));
    cluster.kill(node)?;
    Ok(())
}

/// A kill between the register's grant and the first vCPU leaves a vm that can be started with no further word; one
/// after it a guest that has run, which is not booted by itself.
#[test]
fn a_new_guest_whose_start_is_killed() {
    let (mut seed, mut cut_off, rounds) = (Seed::from_env(3504), 0, 16);
    for _ in 0..rounds {
        scenario(synthetic(&mut seed), |cluster| {
            loop {
                start(cluster, "a", true, NOTHING)?;
                kill_in_start(cluster, "a", &mut seed)?;
                let known = runner(cluster, "a")?;
                if known.active.is_some() {
                    ensure!(known.starting.is_none(), "it runs and starts: {known:?}");
                    start(cluster, "a", true, NOTHING)?;
                    return refused(cluster, "a", "on_crash = \"boot\"");
                }
                cut_off += 1;
                if seed.below(2) == 0 {
                    start(cluster, "a", true, NOTHING)?;
                    cluster.until_solo("a")?;
                    return begins_by_its_term(cluster, "a").map(drop);
                }
            }
        })
        .unwrap();
    }
    tell("new guests", cut_off, rounds);
}

/// The same of a vm that is started again on the operator's word: the word counts until it was carried out.
#[test]
fn a_start_again_that_is_killed() {
    let (mut seed, mut cut_off, rounds) = (Seed::from_env(3505), 0, 8);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        ensure!(kill_runner(cluster, "a", "b")?, "a protected guest died with its host");
        for _ in 0..rounds {
            cluster.admin("b")?.stop()?;
            cluster.ended("b")?;
            start(cluster, "b", false, AGAIN)?;
            kill_in_start(cluster, "b", &mut seed)?;
            // A start that had come too far is of a guest that has run; then it takes the configuration's word.
            let goes_on = runner(cluster, "b")?.starting.is_some();
            cut_off += u32::from(goes_on);
            start(cluster, "b", false, if goes_on { NOTHING } else { BOOT })?;
            cluster.until_solo("b")?;
            begins_by_its_term(cluster, "b")?;
            ensure!(!still_starts(cluster, "b")?, "it runs, and still starts");
        }
        Ok(())
    })
    .unwrap();
    tell("starts again", cut_off, rounds);
}

/// Whether the directory of a node that runs, and has it locked, says that it starts.
fn still_starts(cluster: &Cluster, node: &str) -> anyhow::Result<bool> {
    Ok(fs::read_to_string(cluster.directory_of(node).join("runner.toml"))?.contains("starting = "))
}

#[expect(clippy::print_stderr, reason = "how the kills went")]
fn tell(what: &str, cut_off: u32, rounds: u32) {
    eprintln!("{what}: {cut_off} kills came before the guest ran, in {rounds} rounds");
}
