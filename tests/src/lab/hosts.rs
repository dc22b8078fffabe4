//! Hosts of a lab: each a namespace of its own on a network of the cluster's, on which any of them can be cut off from
//! any other, one way or both.
//!
//! ```text
//!   a node's namespace                          the lab's namespace             a member's namespace
//!   eth0 10.78.0.11 ====== cable ======= net (bridge) 10.78.0.1 ==== cable ====== eth0 10.78.0.21
//!   tap-a --- guest (bridge) == cable == lan (bridge) ==== cable ==== client
//! ```
//!
//! A cut is a wrong entry in the neighbour table of the one that sends: what it sends goes out with the address of a card
//! that nobody has, and is lost on the way as by a broken switch. Nobody is told, nothing is refused, and the harness, which
//! is at the bridge, reaches all of them.

use anyhow::Context;
use std::net::Ipv4Addr;
use std::process::Command;

use super::capture::Capture;
use super::{BRIDGE, Lab, Namespace, ip, tap_of};

/// The network's bridge, and the harness' own address on it.
const NETWORK: &str = "net";
const HARNESS: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
/// The first host's.
const FIRST: u8 = 11;
/// A host's card on it, and the bridge of its TAP.
const CARD: &str = "eth0";
const TAPS: &str = "guest";
/// The address of no card.
const NOWHERE: &str = "02:de:ad:de:ad:00";

/// A host.
#[derive(Debug)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    namespace: Namespace,
}

impl Host {
    /// Has `command` run there.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn house(&self, command: &mut Command) -> anyhow::Result<()> {
        self.namespace.house(command)
    }

    /// Does something there, on a thread of its own.
    ///
    /// # Errors
    /// Its namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        self.namespace.run(work)
    }

    /// Another handle of it.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn try_clone(&self) -> anyhow::Result<Self> {
        Ok(Self { name: self.name.clone(), address: self.address, namespace: self.namespace.try_clone()? })
    }

    /// Nothing that it sends to these arrives any more.
    ///
    /// # Errors
    /// ip(8) says no.
    pub fn cut_to(&self, others: &[&Self]) -> anyhow::Result<()> {
        let told: String = others
            .iter()
            .map(|other| {
                format!("neigh replace {} lladdr {NOWHERE} dev {CARD} nud permanent\n", other.address)
            })
            .collect();
        self.namespace.run(|| ip(&told))?.with_context(|| format!("cutting {} off", self.name))
    }

    /// Everything that it sends arrives again.
    ///
    /// # Errors
    /// ip(8) says no.
    pub fn heal(&self) -> anyhow::Result<()> {
        let told = format!("neigh flush dev {CARD} nud permanent\n");
        self.namespace.run(|| ip(&told))?.with_context(|| format!("healing the network of {}", self.name))
    }

    /// Records what passes at its TAP.
    pub(super) fn capture(&self) -> anyhow::Result<Capture> {
        self.namespace.run(|| Capture::start(&tap_of(&self.name)))?
    }
}

impl Lab {
    /// Adds a host to the cluster's network; with a TAP on the guest's network if it is a node's. Names have at most ten
    /// letters.
    ///
    /// # Errors
    /// There is one already, or the name is too long.
    pub fn add_host(&mut self, name: &str, node: bool) -> anyhow::Result<&Host> {
        if self.hosts.is_empty() {
            ip(&format!(
                "link add {NETWORK} type bridge stp_state 0 forward_delay 0\n\
                 link set {NETWORK} addrgenmode none up\n\
                 address add {HARNESS}/24 dev {NETWORK}\n"
            ))?;
        }
        let number = u8::try_from(self.hosts.len()).ok().and_then(|n| FIRST.checked_add(n));
        let address = Ipv4Addr::new(10, 78, 0, number.context("no address is left")?);
        let host = Host { name: name.to_owned(), address, namespace: Namespace::fresh()? };
        host.connect().with_context(|| format!("the network of {name}"))?;
        if node {
            host.add_tap().with_context(|| format!("the TAP of {name}"))?;
        }
        Ok(self.hosts.entry(name.to_owned()).insert_entry(host).into_mut())
    }

    /// A host.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn host(&self, name: &str) -> anyhow::Result<&Host> {
        self.hosts.get(name).with_context(|| format!("the lab has no host {name}"))
    }

    /// All hosts.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }

    /// Every cut is healed.
    ///
    /// # Errors
    /// ip(8) says no.
    pub fn heal(&self) -> anyhow::Result<()> {
        self.hosts().try_for_each(Host::heal)
    }
}

impl Host {
    fn connect(&self) -> anyhow::Result<()> {
        let Self { name, address, namespace } = self;
        let outside = format!("n-{name}");
        ip(&format!(
            "link add {outside} type veth peer name {CARD} netns {}\n\
             link set {outside} addrgenmode none master {NETWORK} up\n",
            namespace.path()
        ))?;
        namespace.run(|| {
            ip(&format!(
                "link set lo up\n\
                 link set {CARD} addrgenmode none up\n\
                 address add {address}/24 dev {CARD}\n"
            ))
        })?
    }

    fn add_tap(&self) -> anyhow::Result<()> {
        let Self { name, namespace, .. } = self;
        let (outside, tap) = (format!("g-{name}"), tap_of(name));
        ip(&format!(
            "link add {outside} type veth peer name uplink netns {}\n\
             link set {outside} addrgenmode none master {BRIDGE} up\n",
            namespace.path()
        ))?;
        namespace.run(|| {
            ip(&format!(
                "link add {TAPS} type bridge stp_state 0 forward_delay 0\n\
                 link set {TAPS} addrgenmode none up\n\
                 link set uplink addrgenmode none master {TAPS} up\n\
                 tuntap add {tap} mode tap\n\
                 link set {tap} addrgenmode none master {TAPS} up\n"
            ))
        })?
    }
}
