//! `colo-secondary`: follows a primary, and carries its guest on when it dies.

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "colo-secondary",
    version,
    about = "Follows a guest, and carries it on when its primary dies"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Follows the vm of a configuration file.
    Start {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// Start a vm again that was stopped while this node ran it.
        #[arg(long)]
        again: bool,
    },
    /// Reads and checks everything in the store of a secondary that does not run.
    Scrub {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// Bytes read per second at most, in MiB; 0 is as fast as the disk.
        #[arg(long, default_value_t = 0)]
        rate: u64,
    },
}

fn main() -> ExitCode {
    colo_common::telemetry::init();
    colo_common::telemetry::end_on_panic();
    let done = match Args::parse().command {
        Command::Start { config, again } => colo_secondary::secondary::start(&config, again),
        Command::Scrub { config, rate } => colo_secondary::secondary::scrub(&config, rate << 20),
    };
    done.unwrap_or_else(|e| {
        tracing::error!("{}", colo_common::telemetry::one_line(&*e));
        ExitCode::FAILURE
    })
}
