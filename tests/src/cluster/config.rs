//! The configuration files of a cluster's nodes.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use colo_common::config::ArbiterConfig;

use crate::etcd;
use crate::images::{Images, Kernel};
use crate::lab::{self, tap_of};

/// Bytes of a small Linux guest's memory, in MiB.
const LINUX_MIB: u64 = 128;
/// The same of a synthetic guest.
const SYNTHETIC_MIB: u64 = 16;

/// What a cluster runs.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The lines of `[guest]`.
    lines: String,
    /// For messages and summaries.
    pub name: String,
    /// Where its console's hash chain begins.
    pub seed: u64,
}

impl Guest {
    /// The guest in software: 1250 lines a second.
    pub fn synthetic(seed: u64) -> Self {
        let lines = format!("kind = \"synthetic\"\nmemory_mib = {SYNTHETIC_MIB}\nseed = {seed}\n");
        Self { lines, name: "synthetic".to_owned(), seed }
    }

    /// Linux with one CPU, whose init is the workload with these arguments.
    ///
    /// # Errors
    /// An image is missing.
    pub fn linux(images: &Images, kernel: Kernel, seed: u64, workload: &str) -> anyhow::Result<Self> {
        let (kernel, initrd) = (images.kernel(kernel)?.display(), images.workload()?.display());
        let command_line = format!("console=ttyS0 reboot=t panic=-1 quiet -- seed={seed} {workload}");
        let lines = format!(
            "kind = \"kvm\"\nkernel = \"{kernel}\"\ninitrd = [\"{initrd}\"]\ncmdline = \"{command_line}\"\n\
             memory_mib = {LINUX_MIB}\n"
        );
        Ok(Self { lines, name: format!("linux {} ({} kernel)", images.release, images.kind), seed })
    }

    /// Linux with a service: give it a disk like that of [`Images::service`]. `network` is what the kernel is told of its
    /// address, `arguments` what its init is.
    ///
    /// # Errors
    /// An image is missing.
    pub fn service(images: &Images, network: &str, arguments: &str) -> anyhow::Result<Self> {
        let (kernel, initrd) = (images.kernel(Kernel::Up)?.display(), images.service()?.initramfs.display());
        let command_line = format!("console=ttyS0 reboot=t panic=-1 quiet {network} -- {arguments}");
        let by_line = images.kind == "small";
        let lines = format!(
            "kind = \"kvm\"\nkernel = \"{kernel}\"\ninitrd = [\"{initrd}\"]\ncmdline = \"{command_line}\"\n\
             memory_mib = {LINUX_MIB}\nvirtio_cmdline = {by_line}\n"
        );
        Ok(Self {
            lines,
            name: format!("linux {} ({} kernel) with a service", images.release, images.kind),
            seed: 0,
        })
    }

    /// A bare-metal program with this command line.
    ///
    /// # Errors
    /// The image is missing.
    pub fn bare(images: &Images, program: &str, line: &str) -> anyhow::Result<Self> {
        let kernel = images.payload(program)?;
        let lines = format!(
            "kind = \"kvm\"\nkernel = \"{}\"\ncmdline = \"{line}\"\nmemory_mib = {SYNTHETIC_MIB}\n",
            kernel.display()
        );
        Ok(Self { lines, name: program.to_owned(), seed: 0 })
    }
}

/// How nodes are configured; what is not named here keeps its default.
#[derive(Clone, Debug)]
pub struct Options {
    /// The guest of a primary.
    pub guest: Guest,
    /// `replication.ack`: `memory` or `disk`.
    pub ack: &'static str,
    /// `replication.failover`: `auto` or `manual`.
    pub failover: &'static str,
    /// `replication.on_secondary_loss`: `solo` or `hold`.
    pub on_secondary_loss: &'static str,
    /// Milliseconds between heartbeats.
    pub heartbeat_ms: u32,
    /// Milliseconds of silence until a peer is taken for lost.
    pub suspect_after_ms: u32,
    /// Milliseconds from then to the promotion.
    pub promote_delay_ms: u32,
    /// Milliseconds between cuts.
    pub interval_ms: u32,
    /// Whether nodes reach each other through links that can be cut.
    pub links: bool,
    /// The guest's disk at its start, if it has one; nodes have files of their own.
    pub disk: Option<PathBuf>,
    /// Whether a primary that loses its vm follows.
    pub standby: bool,
    /// `on_stop`: `stop`, `leave` or `switchover`.
    pub on_stop: &'static str,
    /// Whether the guest has a network card, behind the TAP that a [lab](crate::lab) has for each node. The cluster is
    /// made in the lab then.
    pub network: bool,
    /// The `[arbiter]` of all nodes; default a directory of the cluster's own.
    pub arbiter: Option<ArbiterConfig>,
    /// The `[tls]` of all nodes, which has an operator's certificate too; default certificates for development.
    pub tls: Option<PathBuf>,
}

impl Options {
    /// Quick to suspect, but not so quick that a busy host is taken for a dead one.
    pub fn new(guest: Guest) -> Self {
        Self {
            guest,
            ack: "memory",
            failover: "auto",
            on_secondary_loss: "solo",
            heartbeat_ms: 25,
            suspect_after_ms: 400,
            promote_delay_ms: 100,
            interval_ms: 25,
            links: false,
            disk: None,
            standby: false,
            on_stop: "stop",
            network: false,
            arbiter: None,
            tls: None,
        }
    }

    /// A guest with a service, on the network of a [lab](crate::lab) and a disk of its own. `arguments` is what its init
    /// is told.
    ///
    /// # Errors
    /// An image is missing.
    pub fn service(images: &Images, arguments: &str) -> anyhow::Result<Self> {
        let network = format!("ip={}::{}:255.255.255.0::eth0:off", lab::GUEST, lab::CLIENT);
        let guest = Guest::service(images, &network, arguments)?;
        let disk = Some(images.service()?.disk.to_owned());
        Ok(Self { disk, network: true, ..Self::new(guest) })
    }
}

/// The mask in what a service's guest is told of its network.
const _: () = assert!(lab::PREFIX == 24);

/// Where a node listens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ports {
    pub(super) admin: SocketAddr,
    pub(super) quic: SocketAddr,
    /// The port that runners are told of instead.
    pub(super) advertised: Option<u16>,
}

pub(super) fn primary(
    options: &Options,
    vm: &str,
    node: &str,
    ports: Ports,
    secondary: Option<SocketAddr>,
) -> String {
    let mut text = common(options, vm, node, ports);
    text += &format!("[guest]\n{}", options.guest.lines);
    text += &network(options, node);
    text += &disk(options, node);
    text += &replication("replication", options, secondary);
    if options.standby {
        text += &following("standby", options, ports);
    }
    text
}

pub(super) fn secondary(options: &Options, vm: &str, node: &str, ports: Ports) -> String {
    let mut text = common(options, vm, node, ports) + &network(options, node) + &disk(options, node);
    text += &following("replication", options, ports);
    text += &replication("promoted", options, None);
    text
}

/// How a node follows.
fn following(section: &str, options: &Options, ports: Ports) -> String {
    let Options { ack, failover, heartbeat_ms, suspect_after_ms, promote_delay_ms, .. } = options;
    let mut text = format!(
        "[{section}]\nlisten = \"{}\"\nack = \"{ack}\"\nfailover = \"{failover}\"\nheartbeat_ms = {heartbeat_ms}\n\
         suspect_after_ms = {suspect_after_ms}\npromote_delay_ms = {promote_delay_ms}\n",
        ports.quic
    );
    if let Some(port) = ports.advertised {
        writeln!(text, "advertise_port = {port}").expect("a string takes all");
    }
    text
}

fn common(options: &Options, vm: &str, node: &str, ports: Ports) -> String {
    let in_files = || "directory = \"arbiter\"\n".to_owned();
    let arbiter = options.arbiter.as_ref().map_or_else(in_files, etcd::lines);
    let tls = options.tls.as_ref().map(|tls| format!("[tls]\ndirectory = \"{}\"\n", tls.display()));
    let tls = tls.unwrap_or_default();
    format!(
        "node = \"{node}\"\nvm = \"{vm}\"\ndirectory = \"{node}\"\non_stop = \"{}\"\n{tls}[arbiter]\n{arbiter}\
         [admin]\nlisten = \"{}\"\n[console]\nfile = \"{node}.console\"\n",
        options.on_stop, ports.admin
    )
}

fn network(options: &Options, node: &str) -> String {
    let tap = options.network.then(|| format!("[network]\ntap = \"{}\"\n", tap_of(node)));
    tap.unwrap_or_default()
}

fn disk(options: &Options, node: &str) -> String {
    options.disk.as_ref().map(|_| format!("[disk]\npath = \"{}\"\n", disk_of(node))).unwrap_or_default()
}

/// The file of a node's disk.
pub fn disk_of(node: &str) -> String {
    format!("{node}.disk")
}

fn replication(section: &str, options: &Options, secondary: Option<SocketAddr>) -> String {
    let Options { on_secondary_loss, heartbeat_ms, suspect_after_ms, interval_ms, .. } = options;
    let whom = secondary.map(|address| format!("secondary = \"{address}\"\n")).unwrap_or_default();
    format!(
        "[{section}]\n{whom}on_secondary_loss = \"{on_secondary_loss}\"\nheartbeat_ms = {heartbeat_ms}\n\
         suspect_after_ms = {suspect_after_ms}\ninterval_ms = {interval_ms}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::{Guest, Options, Ports, primary, secondary};
    use crate::lab::tap_of;
    use colo_common::config::{PrimaryConfig, SecondaryConfig};
    use std::path::Path;

    #[test]
    fn nodes_have_the_taps_of_the_lab() {
        let kernel = "kind = \"kvm\"\nkernel = \"vmlinux\"\n".to_owned();
        let guest = Guest { lines: kernel, ..Guest::synthetic(1) };
        let options = Options { network: true, ..Options::new(guest) };
        let any = "127.0.0.1:1".parse().unwrap();
        let ports = Ports { admin: any, quic: any, advertised: None };
        let path = Path::new("/test.toml");
        let config = PrimaryConfig::parse(&primary(&options, "vm", "a", ports, None), path).unwrap();
        assert_eq!(config.network.unwrap().tap, tap_of("a"));
        let config = SecondaryConfig::parse(&secondary(&options, "vm", "b", ports), path).unwrap();
        assert_eq!(config.network.unwrap().tap, tap_of("b"));
        let without = Options { network: false, ..options };
        let config = SecondaryConfig::parse(&secondary(&without, "vm", "b", ports), path).unwrap();
        assert_eq!(config.network, None);
    }
}
