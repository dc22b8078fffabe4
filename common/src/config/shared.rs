//! Sections that both kinds of node have.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::bounds::{
    HEARTBEAT_MS, MAX_ENDPOINT, MAX_EPOCH_MIB, MAX_INTERVAL_MS, MAX_PROMOTIONS, MAX_SUSPECT_MS, MAX_WINDOW,
};
use super::{Problem, count_from, in_range};
use crate::limits::MIN_EPOCH_MIB;

/// How a runner protects its guest: `[replication]` of a primary, `[promoted]` of a secondary.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplicationConfig {
    /// Admin address, `HOST:PORT`, of the secondary to protect to at once; default none: an operator says it later.
    pub secondary: Option<Endpoint>,
    /// Milliseconds from one cut to the next, 1 to 10000; default 25.
    pub interval_ms: u32,
    /// Epochs that may be in flight, 1 to 64; default 8.
    pub window: u32,
    /// MiB of pages in one epoch at most, 16 to 65536; default 256. A secondary may ask for less.
    pub max_epoch_mib: u32,
    /// Milliseconds between two heartbeats to the secondary, 5 to 10000; default 50.
    pub heartbeat_ms: u32,
    /// Milliseconds of silence after which the secondary is taken for lost on a calm path, at most; more than two
    /// heartbeats, up to 600000; default 500. Once the path is known to be calm, 7/10 of it are enough; where heartbeats
    /// come late or get lost, or a host is busy, up to four times as long is waited, as it takes. A process that died on
    /// a host that lives is known after two heartbeats.
    pub suspect_after_ms: u32,
    /// What to do then; default `solo`.
    pub on_secondary_loss: OnSecondaryLoss,
    /// Whether the vm is protected again without an operator's word after the loss of a secondary, a promotion or a
    /// switchover; default `auto`.
    pub reprotect: Reprotect,
}

impl Default for ReplicationConfig {
    fn default() -> Self {
        Self {
            secondary: None,
            interval_ms: 25,
            window: 8,
            max_epoch_mib: 256,
            heartbeat_ms: 50,
            suspect_after_ms: 500,
            on_secondary_loss: OnSecondaryLoss::default(),
            reprotect: Reprotect::default(),
        }
    }
}

impl ReplicationConfig {
    /// `section` is its name in the file.
    pub(super) fn check(&self, section: &str) -> Result<(), Problem> {
        let key = |name: &str| format!("{section}.{name}");
        in_range(&key("interval_ms"), self.interval_ms.into(), 1, MAX_INTERVAL_MS.into())?;
        in_range(&key("window"), self.window.into(), 1, MAX_WINDOW.into())?;
        in_range(
            &key("max_epoch_mib"),
            self.max_epoch_mib.into(),
            MIN_EPOCH_MIB.into(),
            MAX_EPOCH_MIB.into(),
        )?;
        check_heartbeats(section, self.heartbeat_ms, self.suspect_after_ms)
    }
}

/// Two heartbeats may be late on a loaded host before the third one tells.
pub(super) fn check_heartbeats(section: &str, heartbeat_ms: u32, suspect_ms: u32) -> Result<(), Problem> {
    let (low, high) = HEARTBEAT_MS;
    in_range(&format!("{section}.heartbeat_ms"), heartbeat_ms.into(), low.into(), high.into())?;
    let key = format!("{section}.suspect_after_ms");
    in_range(&key, suspect_ms.into(), 1, MAX_SUSPECT_MS.into())?;
    if suspect_ms <= 2 * heartbeat_ms {
        let text = format!(
            "{suspect_ms} is not more than two heartbeats of {heartbeat_ms} ms, so one that is late looks like a \
             dead peer; raise it, or lower {section}.heartbeat_ms"
        );
        return Err(Problem::new(key, text));
    }
    Ok(())
}

/// What a runner does whose secondary is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnSecondaryLoss {
    /// Runs on alone, unprotected, once the arbiter grants it.
    #[default]
    Solo,
    /// Holds all output until the secondary is back or an operator says otherwise.
    Hold,
}

/// What a node does at its start with a guest that it ran when it crashed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnCrash {
    /// Nothing: it waits for an operator.
    #[default]
    None,
    /// Boots it from its disk, as after a loss of power.
    Boot,
}

/// Who sees to it that a vm that lost its protection gets it again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reprotect {
    /// The node that runs it: it looks for the secondary that it had, for the node that ran the guest before, and for any
    /// other that may follow.
    #[default]
    Auto,
    /// An operator.
    Manual,
}

/// What ending a node's process (SIGTERM, SIGINT) means to a guest that it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// The vm is stopped for good: nobody takes it over.
    #[default]
    Stop,
    /// The process just ends; a secondary takes over as from a crash.
    Leave,
    /// The guest moves to its secondary, and the process ends. A guest that is not protected runs on; a second signal
    /// stops the vm.
    Switchover,
}

/// `[admin]`: the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminConfig {
    /// TCP address, `IP:PORT`, of the gRPC services; default `127.0.0.1:7700` on a primary and `127.0.0.1:7701` on a
    /// secondary. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// The same, `HOST:PORT`, as other nodes reach it; default `listen`. Needed where that is every address.
    pub advertise: Option<Endpoint>,
}

impl AdminConfig {
    /// The control plane as other nodes reach it.
    pub fn address(&self) -> Endpoint {
        self.advertise.clone().unwrap_or_else(|| Endpoint::of(self.listen))
    }
}

/// `[tls]`: certificates. Without it, certificates for development are made, and only loopback is allowed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Directory with `ca.pem`, `node.pem` and `node.key`.
    pub directory: PathBuf,
}

/// `[console]`: where this node puts released console bytes, beside those who ask it over the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConsoleConfig {
    /// File that they are added to; default none.
    pub file: Option<PathBuf>,
    /// Path of a link to a pseudo-terminal that shows them and takes input; default none.
    pub pty: Option<PathBuf>,
}

impl ConsoleConfig {
    pub(super) fn resolve(&mut self, base: &Path) {
        self.file.iter_mut().chain(&mut self.pty).for_each(|path| count_from(base, path));
    }

    pub(super) fn check(&self) -> Result<(), Problem> {
        if self.pty.is_some() && self.pty == self.file {
            return Err(Problem::new(
                "console.pty",
                "it is the same path as console.file; choose another one",
            ));
        }
        Ok(())
    }
}

/// The address of another node: a host's name or IP, and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Endpoint {
    host: String,
    port: u16,
}

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address; write HOST:PORT, and an IPv6 address in brackets")]
pub struct BadEndpoint(String);

impl Endpoint {
    /// A socket's address.
    pub fn of(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }

    /// Name, IPv4 address, or IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Port, never 0.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether it is on this host for certain.
    pub fn is_loopback(&self) -> bool {
        match self.host.parse::<IpAddr>() {
            Ok(ip) => ip.is_loopback(),
            Err(_) => self.host.eq_ignore_ascii_case("localhost"),
        }
    }
}

impl FromStr for Endpoint {
    type Err = BadEndpoint;

    fn from_str(text: &str) -> Result<Self, BadEndpoint> {
        let bad = || BadEndpoint(text.chars().take(MAX_ENDPOINT).collect());
        if text.len() > MAX_ENDPOINT {
            return Err(bad());
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = port.parse().ok().filter(|&port| port != 0).ok_or_else(bad)?;
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(ip) => ip.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?.to_string(),
            None => host.to_owned(),
        };
        let named = host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        let good = !host.is_empty() && (named || host.parse::<IpAddr>().is_ok() && text.starts_with('['));
        if good { Ok(Self { host, port }) } else { Err(bad()) }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = BadEndpoint;

    fn try_from(text: String) -> Result<Self, BadEndpoint> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// Rule 7: off loopback nobody talks without certificates of the operator's own.
pub(super) fn check_listen(key: &str, listen: SocketAddr, tls: Option<&TlsConfig>) -> Result<(), Problem> {
    if listen.ip().is_loopback() || tls.is_some() {
        return Ok(());
    }
    let text = format!(
        "{listen} is not on loopback and there are no certificates; name their directory in [tls], or listen on \
         127.0.0.1"
    );
    Err(Problem::new(key, text))
}

/// The same for a node that is connected to.
pub(super) fn check_peer(key: &str, peer: Option<&Endpoint>, tls: Option<&TlsConfig>) -> Result<(), Problem> {
    match peer {
        Some(peer) if tls.is_none() && !peer.is_loopback() => {
            let text = format!(
                "{peer} is not on loopback and there are no certificates; name their directory in [tls]"
            );
            Err(Problem::new(key, text))
        }
        _ => Ok(()),
    }
}

/// A node does not protect to itself.
pub(super) fn check_not_self(key: &str, peer: Option<&Endpoint>, admin: SocketAddr) -> Result<(), Problem> {
    match peer {
        Some(peer) if peer.to_string() == admin.to_string() => {
            let text = "it is this node's own admin address; give that of the node to protect to";
            Err(Problem::new(key, text))
        }
        _ => Ok(()),
    }
}

/// `max_promotions`.
pub(super) fn check_promotions(max_promotions: u32) -> Result<(), Problem> {
    in_range("max_promotions", max_promotions.into(), 0, MAX_PROMOTIONS.into())
}

pub(super) fn default_promotions() -> u32 {
    3
}
