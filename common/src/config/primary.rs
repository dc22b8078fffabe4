//! The configuration of `colo-primary`.

use serde::Deserialize;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use super::devices::{check_serial, check_tap};
use super::shared::{check_listen, check_not_self, check_peer, check_promotions, default_promotions};
use super::{
    AdminConfig, ArbiterConfig, Config, ConfigError, ConsoleConfig, DiskConfig, FollowConfig, GuestConfig,
    GuestKind, LogConfig, MetricsConfig, NetworkConfig, OnCrash, OnStop, Problem, ReplicationConfig,
    TlsConfig, count_from,
};

/// Everything that a primary is told. Keys without a default must be given.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrimaryConfig {
    /// This node's name, different from that of every other node of the vm.
    pub node: crate::NodeId,
    /// The vm's name, the same on all its nodes.
    pub vm: crate::VmId,
    /// The vm's directory on this node; made if it is not there.
    pub directory: PathBuf,
    /// What to do at the start with a guest that this node ran when it crashed; default `none`.
    #[serde(default)]
    pub on_crash: OnCrash,
    /// What ending this process means to the guest; default `stop`.
    #[serde(default)]
    pub on_stop: OnStop,
    /// How often in a row a guest whose virtual machine fails is carried on by another node, 0 to 1000; default 3.
    #[serde(default = "default_promotions")]
    pub max_promotions: u32,
    /// The guest.
    pub guest: GuestConfig,
    /// Its network card; default none.
    pub network: Option<NetworkConfig>,
    /// Its disk; default none.
    pub disk: Option<DiskConfig>,
    /// How it is protected.
    #[serde(default)]
    pub replication: ReplicationConfig,
    /// What this process becomes when another node has its vm: `colo-secondary`, which follows that one by these keys,
    /// those of a secondary's `[replication]`, and by the rest of this file. Default none: the process ends then.
    pub standby: Option<FollowConfig>,
    /// The control plane.
    #[serde(default = "default_admin")]
    pub admin: AdminConfig,
    /// Certificates.
    pub tls: Option<TlsConfig>,
    /// Who holds the register.
    pub arbiter: ArbiterConfig,
    /// Where console bytes go.
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
    AdminConfig { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7700)), advertise: None }
}

impl PrimaryConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        super::load(path)
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
        let peer = self.replication.secondary.as_ref();
        check_promotions(self.max_promotions)?;
        self.arbiter.check()?;
        self.guest.check()?;
        let device = [("network", self.network.is_some()), ("disk", self.disk.is_some())];
        if let Some((key, _)) =
            device.into_iter().find(|(_, there)| *there && self.guest.kind == GuestKind::Synthetic)
        {
            let text =
                "a synthetic guest has no such device; remove this section, or set guest.kind = \"kvm\"";
            return Err(Problem::new(key, text));
        }
        self.network.as_ref().map_or(Ok(()), |network| check_tap(&network.tap))?;
        check_serial(self.disk.as_ref().and_then(|disk| disk.serial.as_deref()))?;
        self.replication.check("replication")?;
        if let Some(standby) = &self.standby {
            standby.check("standby")?;
            check_listen("standby.listen", standby.listen, tls)?;
        }
        self.console.check()?;
        self.metrics.check(self.admin.listen)?;
        self.log.check()?;
        check_listen("admin.listen", self.admin.listen, tls)?;
        check_peer("replication.secondary", peer, tls)?;
        check_not_self("replication.secondary", peer, self.admin.listen)
    }
}

impl Config for PrimaryConfig {
    fn resolve(&mut self, base: &Path) {
        count_from(base, &mut self.directory);
        self.arbiter.resolve(base);
        self.guest.resolve(base);
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
