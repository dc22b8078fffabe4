// SPDX-License-Identifier: Apache-2.0
//! Keeps Redis running in the disk's file system: started, asked until it answers, started again when it ends, and
//! stopped in order when the guest is told to end.

use crate::args::{Args, Fsync};
use crate::calls;
use crate::during;
use crate::orders::{Order, Orders};
use crate::say;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

const PROGRAM: &str = "/usr/bin/redis-server";
const CONFIGURATION: &str = "/etc/redis.conf";
const PORT: u16 = 6379;
/// Between two looks at what happens.
const LOOK_MS: i32 = 500;
/// Between two looks while Redis starts: what is waited for is a part of the boot, but each look slows it down too.
const STARTING_LOOK_MS: i32 = 300;
/// Before Redis is started again: one that ends at once must not keep the guest busy for days.
const REST: Duration = Duration::from_secs(10);
/// Redis syncs its file when it stops, and the disk may be slow.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
const ANSWER_PATIENCE: Duration = Duration::from_millis(500);
const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;

enum Service {
    Starting(u32),
    Ready(u32),
    Resting { until: Instant },
}

/// Runs Redis until an order comes.
pub(crate) fn run(
    args: &Args,
    root: &str,
    address: Option<Ipv4Addr>,
    orders: &mut Orders,
) -> Result<Order, String> {
    prepare(root)?;
    let start = || start(root, address, args.fsync);
    let mut service = Service::Starting(start()?);
    let order = loop {
        service = look(service, &start)?;
        let wait_ms = if matches!(service, Service::Starting(_)) { STARTING_LOOK_MS } else { LOOK_MS };
        if let Some(order) = orders.take(wait_ms) {
            break order;
        }
    };
    if let Service::Starting(pid) | Service::Ready(pid) = service {
        stop(pid)?;
    }
    calls::unmount(&format!("{root}/dev")).map_err(during("unmount /dev"))?;
    calls::unmount(&format!("{root}/proc")).map_err(during("unmount /proc"))?;
    Ok(order)
}

/// What Redis expects of a system.
fn prepare(root: &str) -> Result<(), String> {
    for name in ["dev", "proc"] {
        calls::mount_bind(&format!("/{name}"), &format!("{root}/{name}")).map_err(during(name))?;
    }
    // It warns otherwise. Memory for a fork matters to saves and rewrites, which its configuration rules out.
    fs::write("/proc/sys/vm/overcommit_memory", "1").map_err(during("overcommit_memory"))
}

/// One step of the service's life.
fn look(service: Service, start: &dyn Fn() -> Result<u32, String>) -> Result<Service, String> {
    if let Service::Starting(pid) | Service::Ready(pid) = service {
        if let Some(status) = ended(pid) {
            report(status);
            return Ok(Service::Resting { until: Instant::now() + REST });
        }
    }
    Ok(match service {
        Service::Starting(pid) if answers() => {
            say("colo-service ready");
            Service::Ready(pid)
        }
        Service::Resting { until } if Instant::now() >= until => Service::Starting(start()?),
        other => other,
    })
}

/// Reaps all that ended, and says whether this one is among them.
fn ended(pid: u32) -> Option<ExitStatus> {
    let mut found = None;
    while let Some((who, status)) = calls::reap() {
        if who == pid {
            found = Some(status);
        }
    }
    found
}

fn report(status: ExitStatus) {
    say(&format!("colo-service ended {status}"));
}

/// Starts Redis with the disk as its root. This process goes there and back, which is a few system calls; a child that
/// went there alone would have to be a fork, which copies this process.
fn start(root: &str, address: Option<Ipv4Addr>, fsync: Fsync) -> Result<u32, String> {
    let mut command = Command::new(PROGRAM);
    command.args([CONFIGURATION, "--appendfsync", fsync.name(), "--bind"]);
    command.args(address.map(|address| address.to_string()));
    // For the question whether it is ready.
    command.arg(Ipv4Addr::LOCALHOST.to_string());
    let outside = File::open("/").map_err(during("/"))?;
    calls::change_root(root).map_err(during(root))?;
    let child = command.spawn();
    calls::return_to_root(&outside).map_err(during("the way back from the disk"))?;
    // Not waited for by this handle: it may be an orphan that ends first, and all are reaped in one place.
    Ok(child.map_err(during(PROGRAM))?.id())
}

/// Whether it accepts connections and has read its file: until then it answers that it is loading.
fn answers() -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, PORT).into(), ANSWER_PATIENCE)?;
        stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
        stream.write_all(b"PING\r\n")?;
        let mut answer = [0; 7];
        stream.read_exact(&mut answer)?;
        Ok(&answer == b"+PONG\r\n")
    };
    ask().unwrap_or(false)
}

/// SIGTERM lets Redis write and sync its file before it ends.
fn stop(pid: u32) -> Result<(), String> {
    say("colo-service stopping");
    calls::signal(pid, SIGTERM).map_err(during("stopping Redis"))?;
    let start = Instant::now();
    let mut killed = false;
    loop {
        if let Some(status) = ended(pid) {
            report(status);
            return Ok(());
        }
        if !killed && start.elapsed() > STOP_PATIENCE {
            say(&format!("colo-error Redis did not stop in {} s: killed", STOP_PATIENCE.as_secs()));
            calls::signal(pid, SIGKILL).map_err(during("killing Redis"))?;
            killed = true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
