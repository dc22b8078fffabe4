//! One run of the second scene: a real service in the guest, on a network card and a disk, and a client outside that
//! writes over one connection while the service's host dies.

use anyhow::{Context, bail, ensure};
use colo_tests::cluster::Cluster;
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::images::Images;
use colo_tests::lab::{self, GUEST, Lab};
use colo_tests::service::figures::{Account, Marks};
use colo_tests::service::writer::{Writer, missing};
use std::time::{Duration, Instant};

use crate::report::say;

/// How long the client may wait for one answer; a failover takes a second.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the client writes before the guest is protected, for comparison.
const UNPROTECTED: Duration = Duration::from_secs(8);
/// How long it goes on after the failover.
const AFTER: Duration = Duration::from_secs(8);
/// Port of the service.
const PORT: u16 = 6379;
/// Between two lines of figures.
const TELL: Duration = Duration::from_secs(2);
/// Between two looks.
const POLL: Duration = Duration::from_millis(20);

/// Plays the scene and adds to the account; the host is killed `until_kill` after the guest is protected.
///
/// # Errors
/// A broken promise, or something that does not work.
pub(crate) fn play(images: &Images, until_kill: Duration, account: &mut Account) -> anyhow::Result<()> {
    say("a network of namespaces, a bridge, a TAP for each node, and a client on the other side");
    let lab = Lab::enter(&["primary", "secondary"])?;
    let network = format!("ip={GUEST}::{}:255.255.255.0::eth0:off", lab::CLIENT);
    let guest = Guest::service(images, &network, "end=poweroff")?;
    let disk = Some(images.service()?.disk.to_owned());
    let mut options = Options { disk, network: true, ..Options::new(guest) };
    // What a configuration has that says nothing about it.
    (options.heartbeat_ms, options.suspect_after_ms, options.promote_delay_ms) = (50, 500, 250);
    let mut cluster = Cluster::new(options)?;
    watch(&lab, &mut cluster, until_kill, account).map_err(|e| {
        cluster.keep();
        anyhow::anyhow!("{e:#}\n{}", cluster.logs())
    })
}

fn watch(
    lab: &Lab,
    cluster: &mut Cluster,
    until_kill: Duration,
    account: &mut Account,
) -> anyhow::Result<()> {
    cluster.start_secondary("secondary")?;
    cluster.start_primary("primary", None)?;
    let booting = Instant::now();
    cluster.until_said("colo-service ready")?;
    say(&format!("Redis answers in the guest after {:.1} s", booting.elapsed().as_secs_f64()));
    let dial = lab.dial(&format!("{GUEST}:{PORT}"), PATIENCE)?;
    let writer = Writer::start(dial.clone(), PATIENCE, "key")?;
    say("a client writes numbered keys over one connection, as fast as it gets answers");
    follow(&writer, UNPROTECTED)?;
    cluster.protect("primary", "secondary")?;
    let protected = Instant::now();
    say("the guest is protected, memory and disk; the client goes on");
    follow(&writer, until_kill)?;
    let killed = cluster.kill("primary")?;
    let before = writer.acknowledged();
    say(&format!("killed the primary (SIGKILL) after {before} acknowledged writes"));
    while writer.acknowledged() <= before + 1 {
        ensure!(!writer.has_ended() && killed.elapsed() < PATIENCE, "the client gets no answers any more");
        std::thread::sleep(POLL);
    }
    say(&format!("the client goes on after {} ms, over the same connection", killed.elapsed().as_millis()));
    follow(&writer, AFTER)?;
    let history = writer.finish()?;
    let lost = missing(dial, PATIENCE, &history).context("reading everything back")?;
    let acked = lost.iter().filter(|key| key.acknowledged).count() as u64;
    account.add(&history, Marks { protected, killed }, acked);
    if let Some(first) = lost.first() {
        bail!("{} keys are not as they were written; {first}", lost.len());
    }
    say(&format!(
        "all {} keys were read back: nothing that was acknowledged is missing",
        history.operations.len()
    ));
    cluster.admin("secondary")?.stop()?;
    let status = cluster.ended("secondary")?;
    ensure!(status.success(), "the secondary ended with {status} after the vm was stopped");
    Ok(())
}

/// Lets the client write, and says how it does.
fn follow(writer: &Writer, time: Duration) -> anyhow::Result<()> {
    let (began, mut told) = (Instant::now(), (Instant::now(), writer.acknowledged()));
    while let Some(left) = time.checked_sub(began.elapsed()) {
        ensure!(!writer.has_ended(), "the client has ended");
        if told.0.elapsed() > TELL {
            let now = writer.acknowledged();
            let rate = (now - told.1) as f64 / told.0.elapsed().as_secs_f64();
            say(&format!("{now:>5} writes acknowledged, {rate:.1} a second"));
            told = (Instant::now(), now);
        }
        std::thread::sleep(left.min(POLL));
    }
    Ok(())
}
