//! A real service in a real guest, on a network and a disk of its own: what its clients were told stays true.

use anyhow::{Context, ensure};
use colo_common::register::StopReason;
use colo_tests::cluster::config::Options;
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::images::{Images, kvm_usable};
use colo_tests::lab::{self, GUEST, Lab};
use colo_tests::service::Dial;
use colo_tests::service::writer::{Writer, missing};
use std::time::{Duration, Instant};

use super::check_stopped;

/// How long a client waits for a reply: longer than any node of these tests needs to take over, on a busy host.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest may take to boot to its service: 21 s on an idle host, more with all cores busy.
const BOOT: Duration = Duration::from_secs(180);
/// How the guest ends when it is told to power off: its kernel has no ACPI to do it by.
pub(super) const END: &str = "end=exit:0";

/// The images, if tests with this guest can be run here.
pub(super) fn images() -> Option<Images> {
    (kvm_usable() && lab::usable()).then(|| Images::find().unwrap())
}

/// Runs a scenario in a lab with these nodes, on a guest with a service that is told `arguments`.
pub(super) fn in_lab(
    nodes: &[&str],
    options: Options,
    play: impl FnOnce(&Lab, &mut Cluster) -> anyhow::Result<()>,
) {
    let lab = Lab::enter(nodes).unwrap();
    scenario(options, |cluster| play(&lab, cluster)).unwrap();
}

/// A way to the service.
pub(super) fn dial(lab: &Lab) -> anyhow::Result<Dial> {
    lab.dial(&format!("{GUEST}:6379"), PATIENCE)
}

/// Starts the guest on a node and waits until it says this.
pub(super) fn boot(cluster: &mut Cluster, node: &str, until: &str) -> anyhow::Result<()> {
    cluster.start_primary(node, None)?;
    let started = Instant::now();
    // The first wait ends sooner than some hosts boot.
    loop {
        match cluster.until_said(until) {
            Err(e) if started.elapsed() > BOOT || cluster.status(node).is_none() => return Err(e),
            Err(_) => {}
            Ok(()) => return Ok(()),
        }
    }
}

/// Has the guest end by itself, with its disk unmounted: the vm is stopped then, and both nodes end.
pub(super) fn power_off(cluster: &mut Cluster, runner: &str, follower: &str) -> anyhow::Result<()> {
    cluster.admin(runner)?.type_in(vec![b"poweroff\n".to_vec()])?;
    has_ended(cluster, runner, follower)
}

/// The guest has ended by itself, and its disk is the same on both nodes, with nothing to mend on it.
pub(super) fn has_ended(cluster: &mut Cluster, runner: &str, follower: &str) -> anyhow::Result<()> {
    for node in [runner, follower] {
        let status = cluster.ended(node)?;
        ensure!(status.success(), "{node} ended with {status}");
    }
    check_stopped(cluster, StopReason::PowerOff)?;
    let (at_runner, at_follower) = (cluster.disk_digest(runner)?, cluster.disk_digest(follower)?);
    ensure!(at_runner == at_follower, "the disk is {at_runner} at {runner}, and {at_follower} at {follower}");
    Ok(())
}

/// Waits until a writer has got so many more acknowledgements.
fn until_acknowledged(cluster: &Cluster, writer: &Writer, more: u64) -> anyhow::Result<()> {
    let wanted = writer.acknowledged() + more;
    cluster.until(&format!("{more} more writes to be acknowledged"), || {
        ensure!(!writer.has_ended(), "the writer has ended by itself");
        Ok((writer.acknowledged() >= wanted).then_some(()))
    })
}

#[test]
fn a_client_goes_on_over_one_connection() {
    let Some(images) = images() else { return };
    let options = Options::service(&images, END).unwrap();
    in_lab(&["a", "b"], options, |lab, cluster| {
        cluster.start_secondary("b")?;
        boot(cluster, "a", "colo-service ready")?;
        let writer = Writer::start(dial(lab)?, PATIENCE, "key")?;
        until_acknowledged(cluster, &writer, 50)?;
        cluster.protect("a", "b")?;
        until_acknowledged(cluster, &writer, 50)?;
        cluster.kill("a")?;
        until_acknowledged(cluster, &writer, 50)?;
        let history = writer.finish()?;
        let first = history.refused.1.as_deref().unwrap_or_default();
        let trouble = (history.resets, history.timeouts, history.refused.0);
        ensure!(trouble == (0, 0, 0), "resets, timeouts and refusals ({first}): {trouble:?}");
        let lost = missing(dial(lab)?, PATIENCE, &history).context("reading back")?;
        ensure!(lost.is_empty(), "lost: {lost:?}");
        cluster.check_files("a")
    });
}
