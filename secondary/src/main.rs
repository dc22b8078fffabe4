//! `colo-secondary`: follows a primary, and carries its guest on when it dies.

use clap::{Parser, Subcommand};
use colo_common::VmId;
use colo_common::config::LogConfig;
use colo_common::telemetry;
use colo_secondary::offline::{self, File};
use colo_secondary::secondary::Options;
use std::path::{Path, PathBuf};
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
        /// The file is a primary's, which has a [standby].
        #[arg(long)]
        standby: bool,
        /// What the process that ran the guest left; said by that process alone.
        #[arg(long, hide = true)]
        handover: Option<i32>,
        /// The vm that a spare was bound to; said by its own process alone.
        #[arg(long, hide = true)]
        bind: Option<VmId>,
    },
    /// Reads and checks everything in the store of a secondary that does not run.
    Scrub {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// Bytes read per second at most, in MiB; 0 is as fast as the disk.
        #[arg(long, default_value_t = 0)]
        rate: u64,
        /// The file is a primary's, which has a [standby].
        #[arg(long)]
        standby: bool,
    },
    /// Lists the audit trail of a secondary that does not run, oldest first; of one that runs, `coloctl audit` does.
    Audit {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// Only so many entries, the newest.
        #[arg(long, value_name = "ENTRIES")]
        last: Option<u64>,
        /// The file is a primary's, which has a [standby].
        #[arg(long)]
        standby: bool,
    },
    /// Writes the guest's disk, as a secondary that does not run has it, into a raw image file.
    ExportDisk {
        /// Configuration file (TOML).
        #[arg(long)]
        config: PathBuf,
        /// The file to write; there must be none.
        #[arg(long)]
        to: PathBuf,
        /// The file is a primary's, which has a [standby].
        #[arg(long)]
        standby: bool,
    },
    /// Prints the point, the size and the digest of the guest's disk: equal for equal content, written or sparse.
    DiskDigest {
        /// Configuration file (TOML) of a secondary that does not run.
        #[arg(long, conflicts_with = "image", required_unless_present = "image")]
        config: Option<PathBuf>,
        /// A raw image file instead.
        #[arg(long)]
        image: Option<PathBuf>,
        /// The file is a primary's, which has a [standby].
        #[arg(long, requires = "config")]
        standby: bool,
    },
}

fn file(path: &Path, of_primary: bool) -> File<'_> {
    File { path, of_primary }
}

fn main() -> ExitCode {
    telemetry::end_on_panic();
    let done = match Args::parse().command {
        Command::Start { config, again, standby, handover, bind } => {
            let options = Options { again, of_primary: standby, handover, bind };
            colo_secondary::secondary::start(&config, options)
        }
        Command::Scrub { config, rate, standby } => offline::scrub(file(&config, standby), rate << 20),
        Command::Audit { config, last, standby } => offline::audit(file(&config, standby), last),
        Command::ExportDisk { config, to, standby } => offline::export_disk(file(&config, standby), &to),
        Command::DiskDigest { config: Some(config), standby, .. } => {
            offline::disk_digest(file(&config, standby))
        }
        Command::DiskDigest { image, .. } => {
            telemetry::init(&LogConfig::default());
            offline::image_digest(&image.unwrap_or_default())
        }
    };
    done.unwrap_or_else(|e| {
        // One that was refused with its configuration has not begun to log.
        telemetry::init(&LogConfig::default());
        tracing::error!("{}", telemetry::one_line(&*e));
        ExitCode::FAILURE
    })
}
