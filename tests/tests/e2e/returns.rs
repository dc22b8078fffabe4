//! Runners that come back as followers: frozen and thawed, killed and started again by the same command line, with a disk
//! and without. What each is sent is what differs, and the pair is whole again.

use anyhow::{Context, ensure};
use colo_tests::cluster::config::Options;
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::seed::Seed;
use colo_vmm::disk::intent::CLEAN_EVERY;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::disks::{Exercise, Mode, at_work, check_lines, come_back, until_done, until_steps};
use super::service::{boot, has_ended, images, in_lab};
use super::verifying::check_same;
use super::{check_goes_on, kill_runner, pair, pause, synthetic};

/// Copies that a process has sent or taken: in full, by digests, and of what was missed.
pub(super) fn copies(cluster: &Cluster, runner: &str) -> anyhow::Result<(u64, u64, u64)> {
    let status = cluster.status(runner).with_context(|| format!("{runner} does not answer"))?;
    let counters = status.counters.context("no counters")?;
    Ok((counters.full_resyncs, counters.resyncs, counters.rejoins))
}

/// The one copy since `before` was of what was missed.
pub(super) fn check_rejoined(
    cluster: &Cluster,
    runner: &str,
    (full, compared, rejoined): (u64, u64, u64),
) -> anyhow::Result<()> {
    let found = copies(cluster, runner)?;
    let wanted = (full, compared, rejoined + 1);
    ensure!(found == wanted, "copies in full, by digests, of what was changed: {found:?}, not {wanted:?}");
    Ok(())
}

/// Freezes the runner until the other one runs the guest, and lets it go on.
fn freeze_until_lost(cluster: &mut Cluster, runner: &str, follower: &str) -> anyhow::Result<()> {
    cluster.signal(runner, libc::SIGSTOP)?;
    cluster.until_solo(follower)?;
    cluster.signal(runner, libc::SIGCONT)
}

/// It hands its memory to the follower that it becomes.
#[test]
fn a_runner_that_stood_still_is_sent_what_differs() {
    let mut seed = Seed::from_env(5201);
    let mut options = synthetic(&mut seed);
    options.standby = true;
    scenario(options, |cluster| {
        pair(cluster)?;
        pause(&mut seed, Duration::from_millis(300));
        let before = copies(cluster, "b")?;
        freeze_until_lost(cluster, "a", "b")?;
        check_goes_on(cluster)?;
        cluster.until_paired("b")?;
        check_rejoined(cluster, "b", before)?;
        check_same(cluster, "b")?;
        check_goes_on(cluster)?;
        pause(&mut seed, Duration::from_millis(300));
        kill_runner(cluster, "b", "a").map(drop)
    })
    .unwrap();
}

/// What the runner's last copy was to be: the words of its log.
fn last_copy(cluster: &Cluster, runner: &str) -> anyhow::Result<String> {
    let log = cluster.log(runner);
    let line = log.lines().rev().find_map(|line| line.split_once("a copy begins: ")).context("no copy")?;
    let words = line.1.split(" vm=").next().unwrap_or_default().trim().to_owned();
    tell(runner, &words);
    Ok(words)
}

#[expect(clippy::print_stderr, reason = "what was sent")]
fn tell(who: &str, words: &str) {
    eprintln!("{who}: {words}");
}

/// Memory that died with its process is sent; of the disk, what its intent log names and what was changed since.
fn check_by_intent(cluster: &Cluster, runner: &str) -> anyhow::Result<()> {
    let words = last_copy(cluster, runner)?;
    ensure!(words.starts_with("all pages, ") && words.contains(" blocks changed since "), "{words}");
    Ok(())
}

/// The exercise of a disk over the comings and goings of both nodes; both end with the same disk.
fn there_and_back(mode: Mode, steps: usize, seed: u64) {
    let Some(images) = images() else { return };
    let mut seed = Seed::from_env(seed);
    let exercise = Exercise { mode, seed: seed.below(1_000_000), steps };
    let options = Options { standby: true, ..Options::service(&images, &exercise.arguments()).unwrap() };
    in_lab(&["a", "b"], options, |_, cluster| {
        boot(cluster, "a", "colo-disk 00000001 ok")?;
        come_back(cluster, "a", "b")?;
        at_work(cluster, &exercise, &mut seed)?;
        // Until its log names an acked point.
        std::thread::sleep(2 * CLEAN_EVERY);
        // The primary, by the same command line.
        cluster.kill("a")?;
        cluster.until_solo("b")?;
        until_steps(cluster, 3)?;
        cluster.start_primary("a", Some("b"))?;
        cluster.until_paired("b").context("the primary that came back")?;
        check_by_intent(cluster, "b")?;
        check_same(cluster, "b")?;
        at_work(cluster, &exercise, &mut seed)?;
        // The secondary that runs the guest, with its store.
        cluster.kill("b")?;
        cluster.until_solo("a")?;
        until_steps(cluster, 3)?;
        cluster.start_secondary("b")?;
        cluster.until_paired("a").context("the secondary that came back")?;
        check_by_intent(cluster, "a")?;
        check_same(cluster, "a")?;
        at_work(cluster, &exercise, &mut seed)?;
        // Frozen: memory and disk are handed over.
        freeze_until_lost(cluster, "a", "b")?;
        until_steps(cluster, 3)?;
        cluster.until_paired("b").context("the runner that stood still")?;
        let words = last_copy(cluster, "b")?;
        ensure!(
            words.contains(" pages changed since ") && words.contains(" blocks changed since "),
            "{words}"
        );
        check_same(cluster, "b")?;
        until_done(cluster, &exercise)?;
        has_ended(cluster, "b", "a")?;
        check_lines(cluster, &exercise)
    });
}

#[test]
fn a_raw_disk_comes_back_by_its_intent_log() {
    there_and_back(Mode::Raw, 600, 5202);
}

#[test]
fn files_come_back_by_the_intent_log() {
    there_and_back(Mode::Files, 200, 5203);
}

/// Bytes of the guest's disk, and of it what is written when the guest begins.
const DISK: u64 = 1 << 30;
const WRITTEN: u64 = 64 << 20;
/// Where that lies: beyond what the exercise works on.
const PLACE: u64 = 512 << 20;
/// An intent log names a newer point at least that often, if there is one.
const NEWER_POINT: Duration = Duration::from_secs(35);

/// A disk with holes.
fn sparse_disk(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let file = File::create(cluster.image_of(node))?;
    file.set_len(DISK)?;
    let (mut seed, mut bytes) = (Seed::new(64), vec![0; 1 << 20]);
    for at in (0..WRITTEN).step_by(bytes.len()) {
        bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&seed.next_u64().to_le_bytes()));
        file.write_all_at(&bytes, PLACE + at)?;
    }
    Ok(())
}

/// What the runner says of its last copy: how it was made, bytes, milliseconds.
fn sent(cluster: &Cluster, runner: &str) -> anyhow::Result<(String, u64, u64)> {
    let log = cluster.log(runner);
    let line = log.lines().rev().find(|line| line.contains("the copy is sent")).context("no copy")?;
    let field = |name: &str| {
        let (_, rest) = line.split_once(name).with_context(|| format!("no {name} in {line}"))?;
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        digits.parse::<u64>().with_context(|| format!("{name} in {line}"))
    };
    Ok((last_copy(cluster, runner)?, field("bytes=")?, field("ms=")?))
}

/// A line of the table, and the same copy in full.
fn row(cluster: &mut Cluster, what: &str, runner: &str, follower: &str) -> anyhow::Result<()> {
    let (words, bytes, ms) = sent(cluster, runner)?;
    cluster.admin(runner)?.pause_replication()?;
    cluster.until_solo(runner)?;
    cluster.protect_in_full(runner, follower)?;
    let (_, all, all_ms) = sent(cluster, runner)?;
    tell(
        what,
        &format!("{words}: {} KiB in {ms} ms; in full: {} KiB in {all_ms} ms", bytes >> 10, all >> 10),
    );
    Ok(())
}

/// Prints what returns cost beside full copies. `cargo test ... what_returns_cost -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn what_returns_cost() {
    let Some(images) = images() else { return };
    let exercise = Exercise { mode: Mode::Raw, seed: 7, steps: 1_000_000 };
    let options = Options::service(&images, &exercise.arguments()).unwrap();
    let options = Options { standby: true, ack: "disk", ..options };
    in_lab(&["a", "b"], options, |_, cluster| {
        sparse_disk(cluster, "a")?;
        boot(cluster, "a", "colo-disk 00000001 ok")?;
        come_back(cluster, "a", "b")?;
        for away in [1, 10] {
            cluster.kill("b")?;
            cluster.until_solo("a")?;
            std::thread::sleep(Duration::from_secs(away));
            cluster.start_secondary("b")?;
            cluster.until_paired("a")?;
            row(cluster, &format!("follower started again after {away} s"), "a", "b")?;
        }
        freeze_until_lost(cluster, "a", "b")?;
        cluster.until_paired("b")?;
        row(cluster, "runner frozen and thawed", "b", "a")?;
        // The other node knows nothing from before the copy in full: until the log names a point after it.
        std::thread::sleep(NEWER_POINT);
        until_steps(cluster, 3)?;
        cluster.kill("b")?;
        cluster.until_solo("a")?;
        cluster.start_secondary("b")?;
        cluster.until_paired("a")?;
        row(cluster, "runner killed and started again", "a", "b")
    });
}
