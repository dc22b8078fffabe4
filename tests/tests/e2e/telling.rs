//! What nodes tell of themselves: metrics while they run, protect and take over, and a log that is JSON to its last line.

use anyhow::{Context, ensure};
use colo_primary::metrics::{On, TABLE, When};
use colo_tests::cluster::config::{Guest, Options};
use colo_tests::cluster::process::program;
use colo_tests::cluster::{Cluster, PATIENCE, scenario};
use colo_tests::scrape::{Scrape, scrape};
use colo_tests::seed::Seed;
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;

use super::{SOME, check_goes_on, synthetic};

/// Starts a node with these sections at the end of its configuration.
fn start(cluster: &mut Cluster, node: &str, secondary: Option<&str>, sections: &str) -> anyhow::Result<()> {
    let primary = secondary.is_some();
    let (path, mut command) = cluster.prepare(node, primary, secondary)?;
    let mut file = std::fs::File::options().append(true).open(&path)?;
    file.write_all(sections.as_bytes())?;
    command.env_remove("RUST_LOG").env_remove("COLO_LOG").env_remove("COLO_LOG_FORMAT");
    cluster.start(node, command, primary)
}

/// The pair of [`pair`](super::pair), each with its sections.
fn pair_with(cluster: &mut Cluster, sections: [&str; 2]) -> anyhow::Result<()> {
    start(cluster, "b", None, sections[1])?;
    start(cluster, "a", Some("b"), sections[0])?;
    cluster.until_paired("a")?;
    cluster.until_released(SOME)
}

fn free() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

fn section(listen: SocketAddr) -> String {
    format!("[metrics]\nlisten = \"{listen}\"\n")
}

/// Everything that is listed for such a node is told by it, and nothing else.
fn check_listed(told: &Scrape, on: On, node: &str) -> anyhow::Result<()> {
    let names = told.names();
    let listed: BTreeSet<String> = TABLE.iter().map(|metric| metric.name.to_owned()).collect();
    let unlisted: Vec<_> = names.difference(&listed).collect();
    ensure!(unlisted.is_empty(), "{node} tells what is not listed: {unlisted:?}");
    let here = |on_other: On| on_other == On::Both || on_other == on;
    let missing: Vec<_> = TABLE
        .iter()
        .filter(|metric| here(metric.on) && matches!(metric.when, When::Always | When::Known))
        .filter(|metric| !names.contains(metric.name))
        .map(|metric| metric.name)
        .collect();
    ensure!(missing.is_empty(), "{node} does not tell {missing:?}");
    let own = told.samples().iter().all(|sample| {
        sample.labels.get("node").map(String::as_str) == Some(node) && sample.labels.contains_key("vm")
    });
    ensure!(own, "a sample lacks its vm or its node");
    Ok(())
}

/// Of each of these the node has seen some.
fn check_moved(told: &Scrape, moved: &[(&str, &[(&str, &str)])]) -> anyhow::Result<()> {
    for (name, labels) in moved {
        let value = told.value(name, labels)?;
        ensure!(value > 0.0, "{name}{labels:?} is {value}");
    }
    Ok(())
}

#[test]
fn metrics_follow_what_nodes_do() {
    let mut seed = Seed::from_env(3901);
    scenario(synthetic(&mut seed), |cluster| {
        let (at_a, at_b) = (free()?, free()?);
        pair_with(cluster, [&section(at_a), &section(at_b)])?;
        cluster.until("the store to have an epoch", || {
            Ok((scrape(at_b)?.value("colo_epoch_persist_seconds_count", &[])? > 1.0).then_some(()))
        })?;
        let (a, b) = (scrape(at_a)?, scrape(at_b)?);
        check_listed(&a, On::Runner, "a")?;
        check_listed(&b, On::Follower, "b")?;
        check_moved(
            &a,
            &[
                ("colo_epochs_total", &[]),
                ("colo_wire_bytes_total", &[]),
                ("colo_epoch_pause_seconds_count", &[]),
                ("colo_epoch_pause_part_seconds_sum", &[("part", "copy")]),
                ("colo_epoch_ack_seconds_sum", &[]),
                ("colo_unprotected_seconds_total", &[]),
                ("colo_copy_bytes_total", &[("mode", "full")]),
                ("colo_guest_memory_populated_bytes", &[]),
                ("colo_role", &[("role", "paired")]),
                ("colo_protected", &[]),
                ("colo_guest_running", &[]),
                ("colo_link_up", &[]),
            ],
        )?;
        check_moved(
            &b,
            &[
                ("colo_epoch_stage_seconds_count", &[]),
                ("colo_epoch_apply_seconds_sum", &[]),
                ("colo_epoch_persist_seconds_sum", &[]),
                ("colo_role", &[("role", "following")]),
                ("colo_protected", &[]),
                ("colo_healthy", &[]),
            ],
        )?;
        ensure!(a.value("colo_unprotected_age_seconds", &[])? == 0.0, "it is protected");
        ensure!(b.value("colo_guest_running", &[])? == 0.0, "it runs at a");
        ensure!(a.value("colo_term", &[])? == b.value("colo_term", &[])?, "both have read one register");
        let sum: f64 =
            a.samples().iter().filter(|sample| sample.name == "colo_role").map(|sample| sample.value).sum();
        ensure!(sum == 1.0, "one role at a time, not {sum}");
        let copied = |of: &Scrape| of.value("colo_copy_bytes_total", &[("mode", "full")]);
        ensure!(copied(&a)? == copied(&b)?, "what was sent is what came");
        taken_over(cluster, at_b)
    })
    .unwrap();
}

/// The runner is killed, and the follower tells how it took over.
fn taken_over(cluster: &mut Cluster, at_b: SocketAddr) -> anyhow::Result<()> {
    cluster.kill("a")?;
    cluster.until_solo("b")?;
    check_goes_on(cluster)?;
    let told = scrape(at_b)?;
    check_listed(&told, On::Runner, "b").or_else(|e| {
        // There is no link any more, and no acked epoch.
        let gone = ["colo_epoch_age_seconds", "colo_link_rtt_seconds", "colo_link_silence_seconds"];
        let text = format!("{e}");
        ensure!(text == format!("b does not tell {gone:?}"), "{text}");
        Ok(())
    })?;
    check_moved(
        &told,
        &[
            ("colo_promotions_total", &[]),
            ("colo_promotion_seconds_sum", &[("part", "register")]),
            ("colo_promotion_seconds_sum", &[("part", "restore")]),
            ("colo_promotion_seconds_sum", &[("part", "total")]),
            ("colo_unprotected_age_seconds", &[]),
            ("colo_link_losses_total", &[]),
            ("colo_guest_running", &[]),
            ("colo_role", &[("role", "alone")]),
        ],
    )?;
    let count = told.value("colo_promotion_seconds_count", &[("part", "total")])?;
    ensure!(count == 1.0, "{count} promotions");
    Ok(())
}

/// A port that is taken is told before anything is started: no register, no directory of the vm.
#[test]
fn a_port_of_metrics_that_is_taken_starts_nothing() {
    scenario(Options::new(Guest::synthetic(1)), |cluster| {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        for (node, secondary) in [("b", None), ("a", Some("b"))] {
            start(cluster, node, secondary, &section(taken.local_addr()?))?;
            let status = cluster.process(node)?.ended(PATIENCE)?;
            ensure!(status.code() == Some(1), "{node} ended with {status}");
            let log = log(cluster, node)?;
            ensure!(log.contains("metrics.listen") && log.contains("choose another port"), "{log}");
            ensure!(!cluster.directory_of(node).exists(), "{node} has begun something");
        }
        ensure!(cluster.register()?.is_none(), "a register was made");
        Ok(())
    })
    .unwrap();
}

fn log(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    let path = cluster.directory().join(format!("{node}.log"));
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// The lines of a log, each of which has to be an object with all that a line has.
fn lines(log: &str) -> anyhow::Result<Vec<Value>> {
    let line = |text: &str| {
        let line: Value = serde_json::from_str(text).with_context(|| format!("no JSON: {text}"))?;
        let fields = line.as_object().with_context(|| format!("no object: {text}"))?;
        let keys: BTreeSet<&str> = fields.keys().map(String::as_str).collect();
        ensure!(
            keys.iter().copied().eq(["fields", "level", "message", "span", "target", "time"]),
            "{keys:?}: {text}"
        );
        let texts = ["level", "message", "target", "time"].iter().all(|key| line[key].is_string());
        ensure!(texts && line["fields"].is_object() && line["span"].is_object(), "{text}");
        Ok(line)
    };
    log.lines().map(line).collect()
}

#[test]
fn logs_are_json_and_name_vm_term_and_epoch() {
    let mut seed = Seed::from_env(3902);
    let sections = "[log]\nformat = \"json\"\nlevel = \"info,colo_primary=debug,colo_secondary=debug\"\n";
    scenario(synthetic(&mut seed), |cluster| {
        pair_with(cluster, [sections, sections])?;
        cluster.until("the store to have an epoch", || {
            let points = cluster.status("b").and_then(|status| status.points);
            Ok(points.and_then(|points| points.persisted).map(drop))
        })?;
        cluster.kill("a")?;
        cluster.until_solo("b")?;
        check_goes_on(cluster)?;
        cluster.signal("b", libc::SIGTERM)?;
        cluster.ended("b")?;
        let mut a = log(cluster, "a")?;
        // A kill may come in the middle of a line.
        a.truncate(a.rfind('\n').map_or(0, |end| end + 1));
        for (node, log, told) in [
            ("a", a, &["the epoch is on its way", "acked"][..]),
            ("b", log(cluster, "b")?, &["staged", "applied", "persisted", "this node runs the guest now"]),
        ] {
            let lines = lines(&log)?;
            let named =
                lines.iter().filter(|line| line["span"]["vm"] == "demo" && line["span"]["node"] == node);
            // What is told before the configuration is read has no names.
            ensure!(named.count() == lines.len(), "{node} tells something without its names:\n{log}");
            for wanted in told {
                let line = lines.iter().find(|line| line["message"] == *wanted);
                let line = line.with_context(|| format!("{node} does not tell {wanted:?}"))?;
                let has = |key: &str| line["span"][key].is_u64() || line["fields"][key].is_u64();
                ensure!(has("term"), "{wanted:?} has no term: {line}");
                ensure!(has("epoch") || wanted.contains("runs the guest"), "{wanted:?} has no epoch: {line}");
            }
            ensure!(!log.contains("PRIVATE KEY"), "a key is in the log");
        }
        Ok(())
    })
    .unwrap();
}

/// The environment wins over the configuration, and says how the commands without one log.
#[test]
fn the_environment_says_what_is_logged() {
    let run = |name: &str, arguments: &[&str], variables: &[(&str, &str)]| {
        let mut command = Command::new(program(name).unwrap());
        command.args(arguments).env_remove("RUST_LOG").env_remove("COLO_LOG").env_remove("COLO_LOG_FORMAT");
        let output = command.envs(variables.iter().copied()).output().unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    let json = ("COLO_LOG_FORMAT", "json");
    let scrub = ["scrub", "--config", "/nowhere/b.toml"];
    for (name, arguments) in [
        ("colo-primary", &["run", "--kernel", "/nowhere/vmlinux"][..]),
        ("colo-primary", &["start", "--config", "/nowhere/a.toml"]),
        ("colo-secondary", &["start", "--config", "/nowhere/b.toml"]),
        ("colo-secondary", &scrub),
        ("colo-secondary", &["disk-digest", "--image", "/nowhere/disk"]),
    ] {
        let told = run(name, arguments, &[json]);
        let lines = lines(&told).unwrap();
        assert_eq!(lines.len(), 1, "{told}");
        assert!(
            lines[0]["level"] == "ERROR" && lines[0]["message"].as_str().unwrap().contains("/nowhere/"),
            "{told}"
        );
    }
    assert_eq!(run("colo-secondary", &scrub, &[("RUST_LOG", "off"), ("COLO_LOG", "info")]), "");
    assert_eq!(run("colo-secondary", &scrub, &[("COLO_LOG", "off")]), "");
    let told = run("colo-secondary", &scrub, &[("RUST_LOG", "a=b=c"), ("COLO_LOG_FORMAT", "xml")]);
    assert!(told.contains("RUST_LOG is no filter") && told.contains("write text or json"), "{told}");
}

/// The same port answers for the node, and later for the vm that has claimed it.
#[test]
fn a_spare_tells_metrics_before_and_after_it_is_claimed() {
    let mut seed = Seed::from_env(5306);
    scenario(synthetic(&mut seed), |cluster| {
        let listen = free()?;
        let (path, command) = cluster.prepare("s", false, None)?;
        let text = std::fs::read_to_string(&path)?.replace("vm = \"demo\"\n", "") + &section(listen);
        std::fs::write(&path, text)?;
        cluster.start("s", command, false)?;
        cluster.until("the metrics of a spare", || {
            let told = scrape(listen).ok();
            Ok(told
                .filter(|told| told.value("colo_role", &[("role", "spare")]).is_ok_and(|is| is == 1.0))
                .map(drop))
        })?;
        let told = scrape(listen)?;
        ensure!(told.value("colo_healthy", &[("node", "s")])? == 1.0, "it is not healthy");
        ensure!(told.samples().iter().all(|sample| !sample.labels.contains_key("vm")), "it has no vm");
        cluster.start_secondary("b")?;
        cluster.start_primary("a", Some("b"))?;
        cluster.until_paired("a")?;
        cluster.kill("b")?;
        cluster.until("the metrics of a follower", || {
            let told = scrape(listen).ok();
            let follows = [("vm", "demo"), ("role", "following")];
            Ok(told.filter(|told| told.value("colo_role", &follows).is_ok_and(|is| is == 1.0)).map(drop))
        })
    })
    .unwrap();
}
