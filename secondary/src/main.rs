//! `colo-secondary`: follows a primary, and carries its guest on when it dies.

use clap::{Parser, Subcommand};
use colo_common::VmId;
use colo_common::config::LogConfig;
use colo_common::telemetry;
use colo_secondary::offline;
use colo_secondary::secondary::Options;
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
        #[command(flatten)]
        of: Of,
        /// Bytes read per second at most, in MiB; 0 is as fast as the disk.
        #[arg(long, default_value_t = 0)]
        rate: u64,
    },
    /// Lists the audit trail of a secondary that does not run, oldest first; of one that runs, `coloctl audit` does.
    Audit {
        #[command(flatten)]
        of: Of,
        /// Only so many entries, the newest.
        #[arg(long, value_name = "ENTRIES")]
        last: Option<u64>,
    },
    /// Writes the guest's disk, as a secondary that does not run has it, into a raw image file.
    ExportDisk {
        #[command(flatten)]
        of: Of,
        /// The file to write; there must be none.
        #[arg(long)]
        to: PathBuf,
    },
    /// Prints the point, the size and the digest of the guest's disk: equal for equal content, written or sparse.
    DiskDigest {
        /// Configuration file (TOML) of a secondary that does not run.
        #[arg(long, conflicts_with = "image", required_unless_present = "image")]
        config: Option<PathBuf>,
        #[command(flatten)]
        kind: Kind,
        /// A raw image file instead.
        #[arg(long)]
        image: Option<PathBuf>,
    },
}

/// A secondary that does not run.
#[derive(clap::Args)]
struct Of {
    /// Configuration file (TOML).
    #[arg(long)]
    config: PathBuf,
    #[command(flatten)]
    kind: Kind,
}

/// What a configuration file is.
#[derive(clap::Args)]
struct Kind {
    /// The file is a primary's, which has a [standby].
    #[arg(long)]
    standby: bool,
    /// The file is a spare's, which was bound to this vm.
    #[arg(long)]
    vm: Option<VmId>,
}

impl Kind {
    fn of(self, config: PathBuf) -> offline::Of {
        offline::Of { config, standby: self.standby, vm: self.vm }
    }
}

impl Of {
    fn node(self) -> offline::Of {
        self.kind.of(self.config)
    }
}

fn main() -> ExitCode {
    telemetry::end_on_panic();
    let done = match Args::parse().command {
        Command::Start { config, again, standby, handover, bind } => {
            let options = Options { again, of_primary: standby, handover, bind };
            colo_secondary::secondary::start(&config, options)
        }
        Command::Scrub { of, rate } => offline::scrub(&of.node(), rate << 20),
        Command::Audit { of, last } => offline::audit(&of.node(), last),
        Command::ExportDisk { of, to } => offline::export_disk(&of.node(), &to),
        Command::DiskDigest { config: Some(config), kind, .. } => offline::disk_digest(&kind.of(config)),
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
