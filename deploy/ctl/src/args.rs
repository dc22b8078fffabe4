//! What can be said on the command line.

use clap::{Parser, Subcommand, ValueEnum};
use colo_common::config::Endpoint;
use colo_common::{NodeId, VmId};
use std::path::PathBuf;

use crate::error::CtlError;

/// Where nodes listen unless they are told otherwise.
const DEFAULT_NODES: &str = "127.0.0.1:7700,127.0.0.1:7701";
/// Names the nodes when `--node` does not.
const NODES_VARIABLE: &str = "COLO_NODES";
/// Nodes of one vm: a runner, those that may follow it, and room. Each is asked at once.
const MAX_NODES: usize = 16;
/// Seconds of grace that an operator may ask for: an hour, as nodes have it. Longer is a slip of the finger.
const MAX_GRACE_S: u64 = 3600;
/// Seconds that `watch` and `console` may be told to wait for a runner: a day.
const MAX_PATIENCE_S: u64 = 86_400;

const EXIT_STATUSES: &str = "\
Nodes: --node, else COLO_NODES (HOST:PORT,HOST:PORT), else 127.0.0.1:7700 and 127.0.0.1:7701. A command goes to the node
that it is meant for: protect, pause, resume, switchover, verify
and stop --vm to the one that runs the guest, promote, policy, failover and
confirm-fenced to the one that follows; vms, nodes, fence and drain ask any
one what the cluster has. With exactly one --node it goes there.

Exit status:
  0  done; for health: healthy
  1  a node refused, or something failed; the line on standard error says what. For verify: the copy differs
  2  the command line is wrong
  3  no node answers
  4  health: not healthy, or not protected where that was asked for";

/// The program's version and the protocol's: what an operator compares between hosts.
fn version() -> &'static str {
    const _: () = assert!(colo_proto::PROTOCOL_VERSION == 3);
    concat!(env!("CARGO_PKG_VERSION"), " (protocol 3)")
}

#[derive(Parser)]
#[command(name = "coloctl", about = "Steers Colo's nodes", version = version(), after_help = EXIT_STATUSES)]
pub(crate) struct Args {
    /// A node's control plane; may be given several times.
    #[arg(long = "node", value_name = "HOST:PORT", global = true)]
    nodes: Vec<Endpoint>,
    /// Directory with ca.pem, operator.pem and operator.key; without it the nodes are spoken to in the clear.
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) tls: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Shows the nodes side by side: roles, register, points, lag, protection, last errors.
    Status(Shape),
    /// Shows every epoch of the node that runs the guest, one line each.
    Watch(Watch),
    /// Attaches to the guest's console and stays attached over a failover; Ctrl-] leaves.
    ///
    /// Output goes to standard output as it is, everything else to standard error. Typed input is kept until the
    /// nodes say that it is safe, and typed again after a failover. Ends with status 0 by Ctrl-] (at a terminal), by
    /// SIGINT or SIGTERM, and when the vm is stopped.
    Console(Console),
    /// Protects the vm by a secondary, and shows how far it is.
    ///
    /// Leaving it does not stop the protection: look at it again with `coloctl status`.
    Protect(Protect),
    /// Moves the guest to its secondary; both nodes live, nothing is lost, and they exchange their roles.
    Switchover(Shape),
    /// Compares the secondary's copy with the guest while both go on, and shows how far it is.
    ///
    /// A copy that differs is not trusted any more and made whole again. Leaving it ends the comparison.
    Verify(Verify),
    /// Makes the secondary run the guest.
    ///
    /// With --force, a node that has a whole point of the guest runs it from there whatever the register says, and what was
    /// let out after that point is lost. Every other node that the register names must be fenced first.
    Promote(Promote),
    /// Stops a node at once, and says so to the node that shall run the guest: a guest that runs there stands, and lets
    /// nothing more out.
    Fence(Fence),
    /// Says that a node does not run the guest and will not, as its host is off: before a promotion by force.
    ConfirmFenced(ConfirmFenced),
    /// Empties a node: moves guests away that it runs, has others follow instead of it, and keeps it from being chosen.
    ///
    /// It waits until the node's processes can be ended. They are left running; nobody chooses them, and nobody claims a
    /// spare among them, until the drain is ended, also if they are started anew.
    Drain(Drain),
    /// Says who decides on a failover: the node that follows, or an operator.
    Failover(Failover),
    /// Stops the vm for good, or one node's part in it.
    Stop(Stop),
    /// Pauses replication: the guest runs on without protection.
    Pause(Shape),
    /// Protects again by the secondary that was paused.
    Resume(Shape),
    /// Says what an acknowledgement means: in the secondary's memory, or on its disk.
    Policy(Policy),
    /// Whether the nodes do their part; for probes.
    Health(Health),
    /// Lists who changed what: register, roles, policies, and what operators asked for, of all nodes that answer.
    ///
    /// Of a node that does not run, `colo-primary audit` and `colo-secondary audit` list it there.
    Audit(Audit),
    /// Shows what happens at the nodes from now on: roles, register, links, copies, promotions, errors.
    Events(Events),
    /// Lists the vms of the cluster with their registers, as the nodes' membership has them.
    Vms(Shape),
    /// Lists the nodes of the cluster: runners, followers, those that wait, and spares.
    Nodes(Shape),
    /// Says how to see Colo at work.
    Demo,
}

#[derive(clap::Args)]
pub(crate) struct Shape {
    /// Prints JSON, for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(clap::Args)]
pub(crate) struct Watch {
    #[command(flatten)]
    pub(crate) shape: Shape,
    /// Ends after so many epochs.
    #[arg(long, value_name = "EPOCHS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// Seconds to wait for a node that runs the guest before giving up.
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(0..=MAX_PATIENCE_S))]
    pub(crate) wait: u64,
}

#[derive(clap::Args)]
pub(crate) struct Console {
    /// Only shows: nothing is typed.
    #[arg(long)]
    pub(crate) follow: bool,
    /// Begins at this offset, in bytes; default: at the end.
    #[arg(long, value_name = "OFFSET", conflicts_with = "tail")]
    pub(crate) from: Option<u64>,
    /// Begins so many bytes before the end.
    #[arg(long, value_name = "BYTES")]
    pub(crate) tail: Option<u64>,
    /// Seconds to wait for a node that runs the guest before giving up.
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(0..=MAX_PATIENCE_S))]
    pub(crate) wait: u64,
}

#[derive(clap::Args)]
pub(crate) struct Protect {
    /// The secondary's control plane, as the node that runs the guest reaches it.
    #[arg(value_name = "HOST:PORT")]
    pub(crate) address: Endpoint,
    /// Sends everything, whatever the secondary has.
    #[arg(long)]
    pub(crate) full: bool,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(clap::Args)]
pub(crate) struct Verify {
    /// Compares the memory; with neither --memory nor --disk, all there is.
    #[arg(long)]
    pub(crate) memory: bool,
    /// Compares the disk.
    #[arg(long)]
    pub(crate) disk: bool,
    /// MiB a second that the guest's node reads for it at most [default: 64]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: Option<u32>,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(clap::Args)]
#[group(id = "scope", required = true, multiple = false, args = ["vm", "this_node"])]
pub(crate) struct Stop {
    /// Stops the vm: nobody runs it any more until it is started again.
    #[arg(long)]
    pub(crate) vm: bool,
    /// Ends the process of the one node that --node names; the other one goes on.
    #[arg(long)]
    pub(crate) this_node: bool,
    /// Seconds that the guest has after its power button was pressed before it is stopped hard; 0 stops it at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, conflicts_with = "this_node",
        value_parser = clap::value_parser!(u64).range(0..=MAX_GRACE_S))]
    pub(crate) grace: u64,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(clap::Args)]
pub(crate) struct Promote {
    /// Runs the guest from what the node has, whatever the register says.
    #[arg(long, requires = "reason")]
    pub(crate) force: bool,
    /// Why, in a line, for the audit trail.
    #[arg(long, value_name = "TEXT", requires = "force")]
    pub(crate) reason: Option<String>,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(clap::Args)]
pub(crate) struct Fence {
    /// The node that is to stop.
    #[arg(value_name = "NODE")]
    pub(crate) name: NodeId,
    /// Where it listens; default as the cluster lists it.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) at: Option<Endpoint>,
    /// Why, in a line, for the audit trail.
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: String,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(clap::Args)]
pub(crate) struct ConfirmFenced {
    /// The node that does not run the guest.
    #[arg(value_name = "NODE")]
    pub(crate) name: NodeId,
    /// How that is known, in a line, for the audit trail.
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: String,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(clap::Args)]
pub(crate) struct Drain {
    /// The node.
    #[arg(value_name = "NODE")]
    pub(crate) name: NodeId,
    /// It is not to be emptied any more.
    #[arg(long)]
    pub(crate) end: bool,
    /// Why, in a line, for the audit trail.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) reason: String,
    /// Seconds to wait until the node is empty.
    #[arg(long, value_name = "SECONDS", default_value_t = 300,
        value_parser = clap::value_parser!(u64).range(0..=MAX_PATIENCE_S))]
    pub(crate) wait: u64,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(clap::Args)]
pub(crate) struct Failover {
    /// auto takes over when the runner is taken for dead, manual waits for `coloctl promote`.
    pub(crate) policy: Who,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Who {
    Auto,
    Manual,
}

#[derive(clap::Args)]
pub(crate) struct Policy {
    /// memory survives the loss of the primary, disk that of both nodes.
    pub(crate) policy: Ack,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Ack {
    Memory,
    Disk,
}

#[derive(clap::Args)]
pub(crate) struct Audit {
    /// Only nodes of this vm; needed if the nodes are of several.
    #[arg(long, value_name = "VM")]
    pub(crate) vm: Option<VmId>,
    /// Only so many entries, the newest; with --follow, of each node.
    #[arg(long, value_name = "ENTRIES", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) last: Option<u64>,
    /// Goes on with what comes, until it is ended.
    #[arg(long)]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(clap::Args)]
pub(crate) struct Events {
    /// Only nodes of this vm; needed if the nodes are of several.
    #[arg(long, value_name = "VM")]
    pub(crate) vm: Option<VmId>,
    /// Ends after so many events.
    #[arg(long, value_name = "EVENTS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

#[derive(clap::Args)]
pub(crate) struct Health {
    /// Demands protection too.
    #[arg(long)]
    pub(crate) protected: bool,
    #[command(flatten)]
    pub(crate) shape: Shape,
}

impl Args {
    /// The nodes to talk to.
    pub(crate) fn addresses(&self) -> Result<Vec<Endpoint>, CtlError> {
        if self.nodes.is_empty() {
            let listed = std::env::var(NODES_VARIABLE).ok().filter(|listed| !listed.trim().is_empty());
            return parse(&listed.unwrap_or_else(|| DEFAULT_NODES.to_owned()));
        }
        distinct(self.nodes.clone())
    }
}

fn parse(listed: &str) -> Result<Vec<Endpoint>, CtlError> {
    let parsed: Result<_, _> = listed.split(',').map(|text| text.trim().parse::<Endpoint>()).collect();
    distinct(parsed.map_err(|e| CtlError::Usage(format!("{NODES_VARIABLE}: {e}")))?)
}

/// Each once, as asking a node twice would show two of it.
fn distinct(addresses: Vec<Endpoint>) -> Result<Vec<Endpoint>, CtlError> {
    let mut once: Vec<Endpoint> = Vec::new();
    for address in addresses {
        if !once.contains(&address) {
            once.push(address);
        }
    }
    if once.len() > MAX_NODES {
        return Err(CtlError::Usage(format!("{} nodes are named, {MAX_NODES} at most can be", once.len())));
    }
    Ok(once)
}

#[cfg(test)]
mod tests {
    use super::{Args, parse};
    use clap::{CommandFactory, Parser};

    fn error(line: &str) -> String {
        let parsed = Args::try_parse_from(line.split(' '));
        parsed.map(|_| ()).expect_err(line).to_string()
    }

    #[test]
    fn the_command_line_is_consistent_and_documents_its_exit_statuses() {
        Args::command().debug_assert();
        let help = Args::command().render_help().to_string();
        for line in ["0  done", "2  the command line", "3  no node answers", "COLO_NODES"] {
            assert!(help.contains(line), "{help}");
        }
    }

    #[test]
    fn nodes_come_from_the_line_then_the_variable_then_the_defaults() {
        let args = Args::try_parse_from("coloctl status --node [::1]:7700 --node a:1 --node a:1".split(' '));
        let shown: Vec<String> = args.unwrap().addresses().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["[::1]:7700", "a:1"]);
        assert_eq!(parse(super::DEFAULT_NODES).unwrap().len(), 2);
        assert_eq!(parse("a:1, b:2").unwrap()[1].to_string(), "b:2");
        assert!(parse("a").unwrap_err().to_string().contains("COLO_NODES: \"a\" is no address"));
        let many: Vec<String> = (1..=17).map(|port| format!("a:{port}")).collect();
        assert!(parse(&many.join(",")).unwrap_err().to_string().contains("16 at most"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(error("coloctl stop").contains("<--vm|--this-node>"), "{}", error("coloctl stop"));
        assert!(error("coloctl stop --vm --this-node").contains("cannot be used with"));
        assert!(error("coloctl stop --this-node --grace 3").contains("cannot be used with"));
        assert!(error("coloctl console --from 1 --tail 2").contains("cannot be used with"));
        assert!(error("coloctl protect nowhere").contains("write HOST:PORT"));
        assert!(error("coloctl policy tape").contains("memory, disk"));
        assert!(error("coloctl promote --force").contains("--reason"));
        assert!(error("coloctl fence b").contains("--reason"));
        assert!(error("coloctl confirm-fenced b/c --reason x").contains("b/c"));
        assert!(error("coloctl failover never").contains("auto, manual"));
        assert!(error("coloctl watch --count 0").contains("--count"));
        assert!(error("coloctl verify --rate 0").contains("--rate"));
    }
}
