//! The clients and judges against a real Redis on this host, if it has one: so that a history that fails in a guest is
//! the guest's fault and not theirs.

use anyhow::ensure;
use colo_tests::cluster::process::Process;
use colo_tests::lab::{self, Namespace, ip};
use colo_tests::service::Dial;
use colo_tests::service::figures::{Account, Marks};
use colo_tests::service::linear::{Verdict, check};
use colo_tests::service::mixed::{Mixed, Plan};
use colo_tests::service::writer::{Writer, missing};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);
/// In a namespace of its own.
const ADDRESS: &str = "127.0.0.1:6379";

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn redis_is_here() -> bool {
    let there = Command::new("redis-server").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        eprintln!("skipped: no redis-server here: apt-get install redis-server");
    }
    there && lab::usable()
}

/// A Redis that has what it acknowledged on its disk.
fn start(directory: &Path) -> anyhow::Result<Process> {
    let mut command = Command::new("redis-server");
    command.args([
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
        "--dir",
    ]);
    Process::start(command.arg(directory), &directory.join("log"))
}

/// Connects as soon as somebody answers.
fn dial() -> Dial {
    Arc::new(|| {
        let started = Instant::now();
        loop {
            match TcpStream::connect(ADDRESS) {
                Ok(stream) => return Ok(stream),
                Err(e) if started.elapsed() > PATIENCE => return Err(e.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    })
}

fn until(done: impl Fn() -> bool) -> anyhow::Result<()> {
    let started = Instant::now();
    while !done() {
        ensure!(started.elapsed() < PATIENCE, "the clients do not get on");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn alone(test: impl FnOnce(&Path) -> anyhow::Result<()> + Send) {
    if redis_is_here() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let play = || ip("link set lo up\n").and_then(|()| test(path));
        Namespace::fresh().unwrap().run(play).unwrap().unwrap();
    }
}

#[test]
fn what_redis_does_is_what_the_judge_expects() {
    alone(|directory| {
        let _redis = start(directory)?;
        let plan = Plan { clients: 6, keys: 3, prefix: "mixed".to_owned(), seed: 3, patience: PATIENCE };
        let mixed = Mixed::start(&dial(), plan)?;
        until(|| mixed.answered() >= 3000 || mixed.has_ended())?;
        let history = mixed.finish()?;
        ensure!(history.operations.len() >= 3000 && history.resets == 0);
        let verdict = check(&history.operations);
        ensure!(verdict == Verdict::Linearizable, "{verdict:?}");
        Ok(())
    });
}

#[test]
fn a_redis_that_is_killed_loses_the_connection_and_nothing_else() {
    alone(|directory| {
        let mut redis = start(directory)?;
        let began = Instant::now();
        let writer = Writer::start(dial(), PATIENCE, "key")?;
        until(|| writer.acknowledged() >= 200 || writer.has_ended())?;
        let killed = redis.kill()?;
        let _redis = start(directory)?;
        until(|| writer.acknowledged() >= 400 || writer.has_ended())?;
        let history = writer.finish()?;
        let lost = missing(dial(), PATIENCE, &history)?;
        let mut account = Account::default();
        account.add(&history, Marks { protected: began, killed }, lost.len() as u64);
        let summary = account.summary();
        ensure!((summary.acked_lost, summary.timeouts) == (0, 0), "{summary:?}, {lost:?}");
        // The dying process can take one more connection, before its listening socket is closed too.
        ensure!((1..=2).contains(&summary.resets), "{summary:?}");
        ensure!(
            summary.rps_before > 0.0 && summary.rps_after > 0.0 && summary.longest_gap_ms > 1.0,
            "{summary:?}"
        );
        Ok(())
    });
}
