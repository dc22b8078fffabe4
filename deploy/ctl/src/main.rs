//! `coloctl`: the operator's command line. It stands beside the way of a page: it asks the nodes' control planes what
//! they do, and passes on what they shall do.

mod args;
mod audit;
mod cluster;
mod connect;
mod console;
mod demo;
mod devices;
mod drain;
mod error;
mod events;
mod fence;
mod format;
mod health;
mod locate;
mod operate;
mod output;
mod protect;
mod status;
mod status_json;
mod streams;
mod watch;
mod words;

use clap::Parser;
use std::process::ExitCode;

use args::{Args, Command};
use connect::Nodes;
use error::CtlError;

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        // Whoever reads has seen enough, as in `coloctl watch | head`.
        Err(CtlError::ReaderLeft) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&error.to_string());
            error.exit_code()
        }
    }
}

fn run(args: Args) -> Result<ExitCode, CtlError> {
    let nodes = Nodes::new(args.addresses()?, args.tls.as_deref())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(CtlError::Runtime)?;
    let done = runtime.block_on(obey(nodes, args.command));
    // A look-up of a name that hangs must not keep the shell waiting.
    runtime.shutdown_background();
    done
}

async fn obey(nodes: Nodes, command: Command) -> Result<ExitCode, CtlError> {
    let done = match command {
        Command::Status(shape) => status::run(&nodes, shape.json).await,
        Command::Watch(options) => watch::run(&nodes, &options).await,
        Command::Console(options) => console::run(&nodes, &options).await,
        Command::Protect(options) => protect::protect(&nodes, &options).await,
        Command::Pause(shape) => protect::pause(&nodes, shape.json).await,
        Command::Resume(shape) => protect::resume(&nodes, shape.json).await,
        Command::Vms(shape) => cluster::vms(&nodes, shape.json).await,
        Command::Nodes(shape) => cluster::nodes(&nodes, shape.json).await,
        Command::Switchover(shape) => operate::switchover(&nodes, shape.json).await,
        Command::Promote(options) => operate::promote(&nodes, &options).await,
        Command::Fence(options) => fence::fence(&nodes, &options).await,
        Command::ConfirmFenced(options) => fence::confirm(&nodes, &options).await,
        Command::Drain(options) => drain::run(&nodes, &options).await,
        Command::Failover(options) => operate::failover(&nodes, &options).await,
        Command::Stop(options) => operate::stop(&nodes, &options).await,
        Command::Policy(options) => operate::policy(&nodes, &options).await,
        Command::Health(options) => return health::run(&nodes, &options).await,
        Command::Audit(options) => audit::run(&nodes, &options).await,
        Command::Events(options) => events::run(&nodes, &options).await,
        Command::Demo => demo::run(),
    };
    done.map(|()| ExitCode::SUCCESS)
}
