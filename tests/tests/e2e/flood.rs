//! A guest that sends frames and writes to its disk as fast as it can: it is slowed, and stays protected; what the nodes
//! need for it is bounded.

use anyhow::{Context, ensure};
use colo_common::Mac;
use colo_proto::v1::{Counters, Role};
use colo_tests::cluster::Cluster;
use colo_tests::cluster::config::Options;
use std::fs;
use std::time::{Duration, Instant};

use super::service::{END, boot, images, in_lab};

const MIB: u64 = 1 << 20;
/// How long the guest floods under protection: many times what it takes to fill every hold.
const FLOOD: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// The least that a secondary may be given for epochs.
const BUDGET_MIB: u64 = 64;
/// The program, its threads and runtime, buffers of sockets, and what the allocator does not give back at once.
const FIXED: u64 = 64 * MIB;
/// A secondary: its budget, and RocksDB's write buffers and cache (192 and 32 MiB).
const SECONDARY_MAX: u64 = (BUDGET_MIB + 192 + 32) * MIB + FIXED;
/// A primary: eight epochs in flight, each a quarter of the secondary's budget at most and held twice; the output that
/// waits for their acks (16 MiB) and that of the open epoch, with its disk writes and those under way (3 times 4 MiB).
const PRIMARY_MAX: u64 = (8 * 2 * (BUDGET_MIB / 4) + 16 + 3 * 4) * MIB + FIXED;

/// How far the guest is, by its last line: bytes written, frames sent.
fn progress(cluster: &Cluster) -> Option<(u64, u64)> {
    let ledger = cluster.ledger();
    let text = String::from_utf8_lossy(ledger.bytes());
    let (whole, _) = text.rsplit_once('\n')?;
    let line = whole.lines().rev().find(|line| line.contains(" ok flood "))?;
    let number = |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key))?.parse().ok();
    Some((number("written=")?, number("frames=")?))
}

/// Waits until it has written and sent more.
fn until_further(cluster: &Cluster, than: (u64, u64)) -> anyhow::Result<(u64, u64)> {
    cluster
        .until("the flood to go on", || Ok(progress(cluster).filter(|now| now.0 > than.0 && now.1 > than.1)))
}

fn counters(cluster: &Cluster, node: &str) -> anyhow::Result<Counters> {
    cluster.status(node).and_then(|status| status.counters).with_context(|| format!("no counters of {node}"))
}

/// Starts b with the least memory that it may be given.
fn start_small(cluster: &mut Cluster) -> anyhow::Result<()> {
    let (path, command) = cluster.prepare("b", false, None)?;
    let text = fs::read_to_string(&path)?;
    let section = "[replication]\n";
    ensure!(text.contains(section), "no {section:?} in {text}");
    fs::write(&path, text.replace(section, &format!("{section}memory_budget_mib = {BUDGET_MIB}\n")))?;
    cluster.start("b", command, false)
}

/// The most that both nodes used beside the guest's memory, while the guest flooded and was protected all the time.
fn watch(cluster: &mut Cluster) -> anyhow::Result<(u64, u64)> {
    let (started, mut most) = (Instant::now(), (0, 0));
    while started.elapsed() < FLOOD {
        let role = cluster.status("a").context("a does not answer")?.role();
        ensure!(role == Role::Paired, "a is {role:?} after {:?}", started.elapsed());
        let used = (cluster.process("a")?.own_memory()?, cluster.process("b")?.own_memory()?);
        most = (used.0.max(most.0), used.1.max(most.1));
        std::thread::sleep(LOOK);
    }
    Ok(most)
}

#[test]
fn a_guest_that_floods_stays_protected() {
    let Some(images) = images() else { return };
    let options = Options::service(&images, &format!("mode=flood blocks=16384 {END}")).unwrap();
    in_lab(&["a", "b"], options, |lab, cluster| {
        start_small(cluster)?;
        boot(cluster, "a", " ok flood ")?;
        cluster.protect("a", "b")?;
        let (before, copies) = (until_further(cluster, (0, 0))?, counters(cluster, "a")?);
        let client = lab.capture_client()?;
        let most = watch(cluster)?;
        let after = until_further(cluster, before)?;
        let now = counters(cluster, "a")?;
        let news =
            |now: &Counters| (now.full_resyncs, now.resyncs, now.rejoins, now.link_losses, now.failed_epochs);
        ensure!(news(&now) == news(&copies), "something failed: {copies:?} became {now:?}");
        let mac = Mac::of(cluster.vm()).bytes();
        let heard = client.frames().iter().filter(|frame| frame.source() == Some(mac)).count();
        ensure!(heard > 0, "no frame got out in {FLOOD:?}");
        tell(most, (after.0 - before.0, after.1 - before.1), heard, now.epochs - copies.epochs);
        ensure!(most.0 < PRIMARY_MAX, "a used {} MiB and may use {}", most.0 / MIB, PRIMARY_MAX / MIB);
        ensure!(most.1 < SECONDARY_MAX, "b used {} MiB and may use {}", most.1 / MIB, SECONDARY_MAX / MIB);
        // With all holds full.
        cluster.kill("a")?;
        cluster.until_solo("b")?;
        let there = progress(cluster).unwrap_or_default();
        until_further(cluster, there)?;
        cluster.kill("b").map(drop)
    });
}

#[expect(clippy::print_stderr, reason = "the figures")]
fn tell(most: (u64, u64), (written, sent): (u64, u64), heard: usize, epochs: u64) {
    eprintln!(
        "flooded for {FLOOD:?}, protected: {} MiB of disk writes, {sent} frames sent and {heard} heard, {epochs} epochs; at most {} MiB of memory at the primary and {} MiB at the secondary, beside the guest's",
        written / MIB,
        most.0 / MIB,
        most.1 / MIB
    );
}
