//! What nodes tell of what happened: events as they come, and the audit trail, which outlives its node.

use anyhow::{Context, ensure};
use colo_proto::v1::{AckPolicy, AuditEntry, AuditKind, EventKind};
use colo_tests::cluster::process::program;
use colo_tests::cluster::{Cluster, scenario};
use colo_tests::seed::Seed;
use std::process::Command;
use std::sync::PoisonError;

use super::{check_goes_on, pair, synthetic};

/// The entries of these kinds, in words.
fn told(entries: &[AuditEntry], kinds: &[AuditKind]) -> Vec<String> {
    let wanted = entries.iter().filter(|entry| kinds.contains(&entry.kind()));
    wanted.map(|entry| format!("{}: {}", entry.kind().as_str_name(), entry.what)).collect()
}

/// These lines are there, in this order.
fn in_order(lines: &[String], wanted: &[&str]) -> anyhow::Result<()> {
    let mut rest = lines.iter();
    for want in wanted {
        ensure!(rest.any(|line| line.contains(want)), "no {want:?}, or not in its place: {lines:#?}");
    }
    Ok(())
}

/// The trail of a node that does not run, as its program lists it.
fn offline(cluster: &Cluster, node: &str, name: &str) -> anyhow::Result<Vec<String>> {
    let mut command = Command::new(program(name)?);
    let listed = command.arg("audit").arg("--config").arg(cluster.config_of(node)).output()?;
    ensure!(listed.status.success(), "{name} audit: {}", String::from_utf8_lossy(&listed.stderr));
    Ok(String::from_utf8(listed.stdout)?.lines().map(ToOwned::to_owned).collect())
}

#[test]
fn the_trails_of_both_nodes_tell_a_failover() {
    let mut seed = Seed::from_env(3701);
    scenario(synthetic(&mut seed), |cluster| {
        pair(cluster)?;
        cluster.admin("b")?.set_policy(AckPolicy::Disk)?;
        cluster.until("acks of b to mean disk", || {
            let status = cluster.status("b").filter(|status| status.ack_policy() == AckPolicy::Disk);
            Ok(status.filter(|status| !status.ack_policy_pending).map(drop))
        })?;
        let events = cluster.admin("b")?.listen()?;
        cluster.kill("a")?;
        cluster.until_solo("b")?;
        check_goes_on(cluster)?;

        let changes = "AUDIT_KIND_REGISTER_CHANGED: ";
        let trail = cluster.until("b to have noted that it runs the guest", || {
            let trail = cluster.admin("b")?.audit()?;
            let runs = trail.iter().any(|entry| entry.what.starts_with("alone after"));
            Ok(runs.then_some(trail))
        })?;
        let all = told(
            &trail,
            &[
                AuditKind::FailoverPolicy,
                AuditKind::RegisterSeen,
                AuditKind::RegisterChanged,
                AuditKind::Role,
                AuditKind::AckPolicy,
                AuditKind::Command,
            ],
        );
        in_order(
            &all,
            &[
                "failover = auto",
                "an ack means memory",
                "receiving after waiting",
                "following after receiving",
                "acks shall mean disk",
                "an ack means disk",
                "AUDIT_KIND_REGISTER_CHANGED: solo on b",
                "alone after",
            ],
        )?;
        ensure!(
            told(&trail, &[AuditKind::RegisterChanged]) == [format!("{changes}{}", last_register(cluster)?)]
        );
        let numbered = trail.windows(2).all(|pair| pair[1].sequence == pair[0].sequence + 1);
        ensure!(numbered && trail.iter().all(|entry| entry.node == "b"), "{trail:?}");
        let asked = trail.iter().find(|entry| entry.kind() == AuditKind::Command).context("no command")?;
        ensure!(asked.who.starts_with("somebody without a certificate, from 127.0.0.1:"), "{}", asked.who);

        check_dead(cluster)?;

        let heard = events.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let kinds: Vec<_> = heard.iter().map(|event| event.kind().as_str_name().to_owned()).collect();
        in_order(&kinds, &["SUSPICION", "LINK_DOWN", "ROLE", "REGISTER", "PROMOTED"])?;
        let noted = heard.iter().any(|event| event.kind() == EventKind::Audit && event.audit.is_some());
        ensure!(noted, "{heard:?}");
        cluster.signal("b", libc::SIGTERM)?;
        cluster.ended("b")?;
        in_order(
            &offline(cluster, "b", "colo-secondary")?,
            &["register_changed: solo on b", "stopped after alone"],
        )
    })
    .unwrap();
}

fn last_register(cluster: &Cluster) -> anyhow::Result<String> {
    Ok(cluster.register()?.context("no register")?.to_string())
}

/// What the dead node had noted was written before it died.
fn check_dead(cluster: &Cluster) -> anyhow::Result<()> {
    let lines = offline(cluster, "a", "colo-primary")?;
    in_order(
        &lines,
        &[
            "on_secondary_loss = solo",
            "register_changed: solo on a",
            "alone after starting",
            "seeding after alone",
            "register_changed: on a, protected by b",
            "paired after",
        ],
    )
}
