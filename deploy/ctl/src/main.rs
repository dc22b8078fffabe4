//! `coloctl`: the operator's command line. It has no commands before the nodes have an admin API.

use clap::Parser;

#[derive(Parser)]
#[command(name = "coloctl", about = "Steers Colo's nodes", version = version())]
struct Args {}

/// The program's version and the protocol's: what an operator compares between hosts.
fn version() -> &'static str {
    const _: () = assert!(colo_proto::PROTOCOL_VERSION == 1);
    concat!(env!("CARGO_PKG_VERSION"), " (protocol 1)")
}

fn main() {
    Args::parse();
}
