//! A network for tests and the demo: a bridge with the TAP interfaces of the nodes, and a client on the other side of a
//! cable.
//!
//! ```text
//!   the lab's namespace                                       the client's namespace
//!   nodes, harness: 127.0.0.1                                 10.77.0.1/24
//!   tap-a ---+                                                     |
//!   tap-b ---+--- lan (bridge) --- port ===== cable ========= eth0-+
//! ```
//!
//! The thread that makes the lab enters the lab's namespace, and whatever it starts from then on inherits that: the
//! runtime's threads, the nodes. So they share a 127.0.0.1 of their own for control plane and QUIC, which the guest's
//! network is no part of and cannot harm, and a cluster knows nothing of all this. No namespace has a name: with the
//! last process and descriptor the kernel takes it away, with all interfaces in it, also when the harness was killed,
//! since its nodes end with it. So nothing can be left behind, two labs never meet, and firewalls and network managers of
//! the host see none of it.

pub mod capture;
pub mod hosts;
mod ip;
mod namespace;
pub mod speakers;
pub mod streams;

pub use namespace::Namespace;

use anyhow::{Context, bail, ensure};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::service::Dial;
use capture::Capture;
use hosts::Host;
pub use ip::ip;

/// The client's address.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The guest's, if it takes what it is told.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Bits of the network's part in both.
pub const PREFIX: u8 = 24;
/// The bridge, and the client's card.
const BRIDGE: &str = "lan";
const CARD: &str = "eth0";
/// How long to wait after a connection that could not be made.
const RETRY: Duration = Duration::from_millis(50);

/// The TAP interface of a node, as the lab makes it and nodes are told of it.
pub fn tap_of(node: &str) -> String {
    format!("tap-{node}")
}

/// Whether a lab can be made here; prints why not, for tests that are then passed over.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub fn usable() -> bool {
    match check() {
        Ok(()) => true,
        Err(e) => {
            eprintln!("skipped: {e:#}");
            false
        }
    }
}

fn check() -> anyhow::Result<()> {
    let version = Command::new("ip").arg("-V").stdout(Stdio::null()).status();
    version.context("no ip(8) here: apt-get install iproute2")?;
    ensure!(std::path::Path::new("/dev/net/tun").exists(), "no /dev/net/tun here: modprobe tun");
    Namespace::fresh().context("no network namespaces here: run as root")?;
    Ok(())
}

/// The network. The thread that made it is in its namespace, and drops it.
pub struct Lab {
    home: Namespace,
    client: Namespace,
    hosts: BTreeMap<String, Host>,
    /// It is about the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Lab {
    /// Makes the network with a TAP for each of `nodes`, and enters it with the calling thread: before a cluster is
    /// made.
    ///
    /// # Errors
    /// This needs root, ip(8), and a kernel with TAP, veth and bridges.
    pub fn enter(nodes: &[&str]) -> anyhow::Result<Self> {
        let home = Namespace::of_this_thread()?;
        let client = Namespace::fresh()?;
        Namespace::fresh()?.enter()?;
        let lab = Self { home, client, hosts: BTreeMap::new(), _thread: PhantomData };
        lab.build().context("building the network")?;
        nodes.iter().try_for_each(|node| lab.add_node(node))?;
        Ok(lab)
    }

    /// No address by itself on any interface, so that only what tests do is on the wire.
    fn build(&self) -> anyhow::Result<()> {
        ip(&format!(
            "link set lo up\n\
             link add {BRIDGE} type bridge stp_state 0 forward_delay 0\n\
             link set {BRIDGE} addrgenmode none up\n\
             link add port type veth peer name {CARD} netns {}\n\
             link set port master {BRIDGE} addrgenmode none up\n",
            self.client.path()
        ))?;
        self.client.run(|| {
            ip(&format!(
                "link set lo up\n\
                 link set {CARD} addrgenmode none up\n\
                 address add {CLIENT}/{PREFIX} dev {CARD}\n"
            ))
        })?
    }

    /// Adds a node's TAP: one that stays without its process, as a bridge's port does.
    ///
    /// # Errors
    /// There is one already, or the name is too long.
    pub fn add_node(&self, node: &str) -> anyhow::Result<()> {
        let tap = tap_of(node);
        ip(&format!(
            "tuntap add {tap} mode tap\n\
             link set {tap} addrgenmode none master {BRIDGE} up\n"
        ))
        .with_context(|| format!("the network of {node}"))
    }

    /// Does something in the client's namespace, on a thread of its own.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn client<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        self.client.run(work)
    }

    /// A way to connect from the client's namespace to this address and port, without delay of small writes. It tries
    /// again until `timeout`, since guests take their time to boot.
    ///
    /// # Errors
    /// It is no address, or no descriptor is left.
    pub fn dial(&self, to: &str, timeout: Duration) -> anyhow::Result<Dial> {
        let to: SocketAddr = to.parse().with_context(|| format!("{to} is no address and port"))?;
        let client = self.client.try_clone()?;
        Ok(Arc::new(move || client.run(|| connect(to, timeout))?))
    }

    /// Connects so, once.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn connect(&self, to: &str, timeout: Duration) -> anyhow::Result<TcpStream> {
        self.dial(to, timeout)?()
    }

    /// Records what passes at a node's TAP from now on.
    ///
    /// # Errors
    /// There is no such node, or the system refuses.
    pub fn capture(&self, node: &str) -> anyhow::Result<Capture> {
        match self.hosts.get(node) {
            Some(host) => host.capture(),
            None => Capture::start(&tap_of(node)),
        }
    }

    /// Records what passes at the client's card from now on.
    ///
    /// # Errors
    /// The system refuses.
    pub fn capture_client(&self) -> anyhow::Result<Capture> {
        self.client.run(|| Capture::start(CARD))?
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Where this fails the thread stays in a network of its own, and harms nobody.
        if let Err(e) = self.home.enter() {
            tracing::error!("the lab's thread stays in the lab: {e:#}");
        }
    }
}

fn connect(to: SocketAddr, timeout: Duration) -> anyhow::Result<TcpStream> {
    let started = Instant::now();
    loop {
        let left = timeout.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&to, left) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(e) if started.elapsed() + RETRY >= timeout => {
                bail!("{to} did not answer in {timeout:?}: {e}")
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}
