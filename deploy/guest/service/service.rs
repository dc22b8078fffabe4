// SPDX-License-Identifier: Apache-2.0
//! The first process of the guest with a real service: it mounts the disk, brings the network up and keeps Redis
//! running, or drives the disk and the network card by itself in Redis's place.
//!
//! It stays for as long as the guest runs, so it starts at most one process at a time and never without a pause after
//! one that failed. See ../README.md for the arguments and for what it prints.

// What every init of ours does, and the system calls for it, are the workload's.
#[allow(dead_code, reason = "the service needs a part of it")]
#[path = "../workload/chain.rs"]
mod chain;
#[allow(dead_code, reason = "the service needs a part of it")]
#[path = "../workload/init.rs"]
mod init;
#[allow(dead_code, reason = "the service needs a part of it")]
#[path = "../workload/sys.rs"]
mod sys;

mod args;
mod calls;
mod disk;
mod flood;
mod net;
mod orders;
mod plan;
mod redis;

use args::{Args, End, Mode};
use orders::{Order, Orders};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use sys::Stop;

/// The disk, as the kernel calls the first one of virtio.
const DEVICE: &str = "/dev/vda";
/// Where its file system is mounted.
const MOUNT_POINT: &str = "/disk";
/// Where QEMU's isa-debug-exit device is, and Colo's.
const DEBUG_EXIT_PORT: u16 = 0xf4;
/// The disk is there before this process where its driver is in the kernel; a module may take a moment.
const DEVICE_WAIT: Duration = Duration::from_secs(5);

/// Where guest kernels are emulated, user mode sees AVX, since the host's CPU cannot be told to hide it, but the guest's
/// kernel cannot save its registers: a switch to another thread in the middle of a copy by AVX would spoil the copy. So
/// the C library is told to do without, here and in all that this process starts.
const NO_AVX: (&str, &str) =
    ("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX2,-AVX,-AVX_Fast_Unaligned_Load");

fn main() {
    if !init::is_first_process() {
        say("colo-error service: it is the first process of a guest and nothing else");
        std::process::exit(1);
    }
    if std::env::var_os(NO_AVX.0).is_none() {
        // The library reads it only when a program starts. What follows is for an exec that failed: better with AVX.
        let error = Command::new("/init").args(std::env::args_os().skip(1)).env(NO_AVX.0, NO_AVX.1).exec();
        say(&format!("colo-service could not start again without AVX: {error}"));
    }
    init::set_up();
    sys::echo_off(0);
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut orders = Orders::open();
    let (end, result) = match Args::parse(&words) {
        Ok(args) => (args.end, run(&args, &mut orders)),
        Err(word) => (End::Stop(Stop::Reset), Err(format!("argument {word}"))),
    };
    let order = result.unwrap_or_else(|what| {
        say(&format!("colo-error {what}"));
        // A machine that reset itself now would fail again, for ever: it waits for somebody who has read the line.
        orders.wait()
    });
    finish(order, end)
}

/// Everything from the network to the unmounted disk. The order is what ended it.
fn run(args: &Args, orders: &mut Orders) -> Result<Order, String> {
    let address = net::bring_up().map_err(|error| format!("network: {error}"))?;
    wait_for_device()?;
    let mounted = args.mode != Mode::Raw;
    if mounted {
        calls::mount_disk(DEVICE, MOUNT_POINT).map_err(|error| format!("mount {DEVICE}: {error}"))?;
    }
    let result = match args.mode {
        Mode::Redis => redis::run(args, MOUNT_POINT, address, orders),
        Mode::Blk => disk::run(args, disk::Target::Directory(MOUNT_POINT), orders),
        Mode::Raw => disk::run(args, disk::Target::Device(DEVICE), orders),
        Mode::Flood => flood::run(args, MOUNT_POINT, address, orders),
    };
    if !mounted {
        return result;
    }
    // Also after an error: what was written is worth keeping.
    let unmounted = calls::unmount(MOUNT_POINT).map_err(|error| format!("unmount {MOUNT_POINT}: {error}"));
    let order = result?;
    unmounted?;
    say("colo-service unmounted");
    Ok(order)
}

fn wait_for_device() -> Result<(), String> {
    let start = Instant::now();
    while !Path::new(DEVICE).exists() {
        if start.elapsed() > DEVICE_WAIT {
            return Err(format!("disk: there is no {DEVICE}: give the guest a virtio disk"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Stops the machine as the order says, or as the arguments do.
fn finish(order: Order, end: End) -> ! {
    match (order, end) {
        (Order::Reboot, _) => init::stop(Stop::Reset),
        (Order::Button, _) => init::stop(Stop::PowerOff),
        (Order::End, End::Stop(how)) => init::stop(how),
        (Order::End, End::Exit(code)) => {
            sys::drain(1);
            if let Err(error) = sys::port_write(DEBUG_EXIT_PORT, code) {
                say(&format!("colo-error exit: {error}"));
            }
            // Still here: the machine has no such port.
            init::stop(Stop::Reset)
        }
    }
}

/// One write per line, so that lines of two threads do not mix.
fn say(line: &str) {
    sys::write_all(1, format!("{line}\n").as_bytes());
}

/// An error of I/O with what was being done.
fn during(what: &str) -> impl FnOnce(io::Error) -> String {
    move |error| format!("{what}: {error}")
}
