//! `make demo-cluster`: three members of etcd and three nodes, each on a host of its own, one guest with a service and a
//! client outside that writes over one connection all the time. The node that runs the guest is killed, then the one that
//! took over; the first one comes back, the guest is moved to it and back, and the link is cut. A timeline says what each
//! took, and at the end everything that the client was told is read back.

mod play;
mod timeline;

use clap::Parser;
use colo_common::config::LogConfig;
use colo_tests::images::{Images, kvm_usable};
use colo_tests::{etcd, lab};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Shows a cluster that heals itself while a client writes")]
struct Args {
    /// Seconds between two steps.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Where the summary is written.
    #[arg(long, default_value = "target/demo-cluster/summary.json")]
    summary: PathBuf,
}

fn main() -> ExitCode {
    colo_common::telemetry::init(&LogConfig::default());
    if !(kvm_usable() && lab::usable() && etcd::usable()) {
        return ExitCode::SUCCESS;
    }
    let args = Args::parse();
    let between = std::time::Duration::from_secs(args.seconds);
    match Images::find().and_then(|images| play::play(&images, between, &args.summary)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

/// A line on standard output; a reader that has gone away is no reason to end.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}
