//! The configuration of `colo-secondary`.

use serde::Deserialize;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use super::bounds::{MAX_PROMOTE_DELAY_MS, MEMORY_BUDGET_MIB};
use super::devices::check_tap;
use super::shared::{
    check_heartbeats, check_listen, check_not_self, check_peer, check_promotions, default_promotions,
};
use super::{
    AdminConfig, ArbiterConfig, Config, ConfigError, ConsoleConfig, FollowDiskConfig, FollowNetworkConfig,
    LogConfig, MetricsConfig, OnCrash, OnStop, PrimaryConfig, Problem, ReplicationConfig, TlsConfig,
    count_from, in_range,
};

/// Everything that a secondary is told. Keys without a default must be given. What the guest is, it learns from the
/// primary.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecondaryConfig {
    /// This node's name, different from that of every other node of the vm.
    pub node: crate::NodeId,
    /// The vm's name, the same on all its nodes; default none: the node is a spare, which the runner of a vm may claim.
    pub vm: Option<crate::VmId>,
    /// The vm's directory on this node; made if it is not there. Of a spare, where those of vms are.
    pub directory: PathBuf,
    /// What to do at the start with a guest that this node ran when it crashed; default `none`.
    #[serde(default)]
    pub on_crash: OnCrash,
    /// What ending this process means to a guest that it runs; default `stop`. While it follows, it just ends.
    #[serde(default)]
    pub on_stop: OnStop,
    /// How often in a row a guest whose virtual machine fails is carried on by another node, 0 to 1000; default 3.
    #[serde(default = "default_promotions")]
    pub max_promotions: u32,
    /// How it follows.
    #[serde(default)]
    pub replication: FollowConfig,
    /// How it protects the guest once it runs it; the keys are those of a primary's `[replication]`.
    #[serde(default)]
    pub promoted: ReplicationConfig,
    /// The host's side of the guest's network card; needed if the guest has one.
    pub network: Option<FollowNetworkConfig>,
    /// The host's side of the guest's disk; needed if the guest has one.
    pub disk: Option<FollowDiskConfig>,
    /// The control plane.
    #[serde(default = "default_admin")]
    pub admin: AdminConfig,
    /// Certificates.
    pub tls: Option<TlsConfig>,
    /// Who holds the register.
    pub arbiter: ArbiterConfig,
    /// Where console bytes go once it runs the guest.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// Its metrics.
    #[serde(default)]
    pub metrics: MetricsConfig,
    /// Its log.
    #[serde(default)]
    pub log: LogConfig,
}

fn default_admin() -> AdminConfig {
    AdminConfig { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7701)), advertise: None }
}

/// `[replication]` of a secondary: how it follows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FollowConfig {
    /// UDP address, `IP:PORT`, that epochs come to; default `127.0.0.1:7702`. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// UDP port that primaries are told to send epochs to, where something passes them on to `listen`, such as NAT;
    /// default the port of `listen`. It is on the address of `admin.listen`, as primaries reach that.
    pub advertise_port: Option<NonZeroU16>,
    /// What an ack means; default `memory`.
    pub ack: Ack,
    /// Who decides that the primary is dead; default `auto`.
    pub failover: Failover,
    /// Milliseconds between two heartbeats to the primary, 5 to 10000; default 50.
    pub heartbeat_ms: u32,
    /// Milliseconds of silence after which the primary is taken for dead on a calm path, at most; more than two
    /// heartbeats, up to 600000; default 500. What is waited in fact is 7/10 of it to four times it, as for a primary's
    /// `suspect_after_ms`.
    pub suspect_after_ms: u32,
    /// Milliseconds from then to the promotion, 0 to 600000; default 250. A primary that is alive wins in that time.
    pub promote_delay_ms: u32,
    /// MiB for epochs that are not yet in the image and in the store, 64 to 1048576; default 1024. The guest's own
    /// memory is not in it.
    pub memory_budget_mib: u32,
}

impl Default for FollowConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7702)),
            advertise_port: None,
            ack: Ack::default(),
            failover: Failover::default(),
            heartbeat_ms: 50,
            suspect_after_ms: 500,
            promote_delay_ms: 250,
            memory_budget_mib: 1024,
        }
    }
}

/// What an ack means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ack {
    /// The epoch is whole in this node's memory: survives the loss of the primary.
    #[default]
    Memory,
    /// It is in the store, synced: survives the loss of both.
    Disk,
}

/// Who decides that the primary is dead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Failover {
    /// An operator.
    Manual,
    /// This node, when it hears nothing; the arbiter sees to it that only one runs.
    #[default]
    Auto,
}

impl FollowConfig {
    /// `section` is its name in the file.
    pub(super) fn check(&self, section: &str) -> Result<(), Problem> {
        check_heartbeats(section, self.heartbeat_ms, self.suspect_after_ms)?;
        let delay = self.promote_delay_ms.into();
        in_range(&format!("{section}.promote_delay_ms"), delay, 0, MAX_PROMOTE_DELAY_MS.into())?;
        let (low, high) = MEMORY_BUDGET_MIB;
        let budget = self.memory_budget_mib.into();
        in_range(&format!("{section}.memory_budget_mib"), budget, low.into(), high.into())
    }
}

impl SecondaryConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        super::load(path)
    }

    /// Reads a primary's file, for the secondary that the primary becomes when another node has its vm.
    ///
    /// # Errors
    /// It cannot be read, something in it is wrong, or it has no `[standby]`.
    pub fn load_standby(path: &Path) -> Result<Self, ConfigError> {
        let config = PrimaryConfig::load(path)?;
        let text = "this section is missing; add it, so that the node can follow the one that has its vm";
        let none = || ConfigError::Wrong {
            path: path.to_owned(),
            line: None,
            problem: Problem::new("standby", text),
        };
        Self::of_standby(config).ok_or_else(none)
    }

    /// The same for a spare that is bound to `vm`: its files are in a directory of the vm's name, and `{vm}` in the path of
    /// its disk is that name.
    #[must_use]
    pub fn bound_to(mut self, vm: &crate::VmId) -> Self {
        if self.vm.is_none() {
            self.directory = self.directory.join(vm.as_str());
            if let Some(disk) = &mut self.disk {
                disk.path = disk.path.to_string_lossy().replace("{vm}", vm.as_str()).into();
            }
            self.vm = Some(vm.clone());
        }
        self
    }

    fn of_standby(config: PrimaryConfig) -> Option<Self> {
        Some(Self {
            replication: config.standby?,
            node: config.node,
            vm: Some(config.vm),
            directory: config.directory,
            on_crash: config.on_crash,
            on_stop: config.on_stop,
            max_promotions: config.max_promotions,
            promoted: config.replication,
            network: config.network.map(|network| FollowNetworkConfig { tap: network.tap }),
            disk: config.disk.map(|disk| FollowDiskConfig { path: disk.path }),
            admin: config.admin,
            tls: config.tls,
            arbiter: config.arbiter,
            console: config.console,
            metrics: config.metrics,
            log: config.log,
        })
    }

    /// Takes and checks a text; `path` is its name, and what relative paths count from.
    ///
    /// # Errors
    /// Something in it is wrong.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        super::parse(text, path)
    }

    /// Checks it, as loading does: for whoever has changed it since.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn check(&self) -> Result<(), Problem> {
        let tls = self.tls.as_ref();
        let peer = self.promoted.secondary.as_ref();
        check_promotions(self.max_promotions)?;
        self.arbiter.check()?;
        self.replication.check("replication")?;
        self.promoted.check("promoted")?;
        self.console.check()?;
        self.metrics.check(self.admin.listen)?;
        self.log.check()?;
        self.network.as_ref().map_or(Ok(()), |network| check_tap(&network.tap))?;
        check_listen("admin.listen", self.admin.listen, tls)?;
        check_listen("replication.listen", self.replication.listen, tls)?;
        check_peer("promoted.secondary", peer, tls)?;
        check_not_self("promoted.secondary", peer, self.admin.listen)
    }
}

impl Config for SecondaryConfig {
    fn resolve(&mut self, base: &Path) {
        count_from(base, &mut self.directory);
        self.arbiter.resolve(base);
        self.console.resolve(base);
        if let Some(disk) = &mut self.disk {
            count_from(base, &mut disk.path);
        }
        if let Some(tls) = &mut self.tls {
            count_from(base, &mut tls.directory);
        }
    }

    fn check(&self) -> Result<(), Problem> {
        self.check()
    }
}
