//! `[arbiter]`: who holds the registers, and which nodes there are. The same for all nodes of a cluster.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::bounds::{ARBITER_TIMEOUT_MS, LEASE_S, MAX_ARBITER_ENDPOINTS, MAX_PREFIX};
use super::shared::{BadEndpoint, Endpoint};
use super::{Problem, count_from, in_range};

/// Where Colo's keys begin in etcd, unless `prefix` says otherwise.
const PREFIX: &str = "/colo/";
/// `timeout_ms`, unless it is given: an election takes etcd one to two seconds.
const TIMEOUT_MS: u32 = 2000;
/// `lease_s`, unless it is given.
const LEASE: u32 = 5;

/// `[arbiter]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArbiterConfig {
    /// Which kind; default `file`.
    #[serde(default)]
    pub kind: ArbiterKind,
    /// `file`: directory of the registers; it must exist, on a local filesystem, and all nodes run on its host.
    pub directory: Option<PathBuf>,
    /// `etcd`: its members, each `https://HOST:PORT`, or `http://HOST:PORT` on loopback; 1 to 16.
    pub endpoints: Option<Vec<EtcdEndpoint>>,
    /// `etcd`: what all of Colo's keys begin with; default `/colo/`.
    pub prefix: Option<String>,
    /// `etcd`: milliseconds that one call may take, 100 to 60000; default 2000.
    pub timeout_ms: Option<u32>,
    /// `etcd`: seconds after its death that a node stays registered, 2 to 600; default 5.
    pub lease_s: Option<u32>,
    /// `etcd`: file with the certificate of the authority that issued the members' certificates, in PEM.
    pub ca: Option<PathBuf>,
    /// `etcd`: file with this client's certificate, in PEM; default none is shown.
    pub certificate: Option<PathBuf>,
    /// `etcd`: file with that certificate's private key, in PEM.
    pub key: Option<PathBuf>,
    /// `etcd`: allow `http` off loopback, where whoever is on the network can change every register; default false.
    pub insecure: Option<bool>,
}

/// Kinds of arbiter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArbiterKind {
    /// Files, for nodes on one host.
    #[default]
    File,
    /// An etcd cluster.
    Etcd,
}

impl ArbiterConfig {
    /// Registers in a directory of this host.
    pub fn in_directory(directory: &Path) -> Self {
        Self { directory: Some(directory.to_owned()), ..Self::default() }
    }

    /// Registers in etcd, with every default.
    pub fn in_etcd(endpoints: Vec<EtcdEndpoint>) -> Self {
        Self { kind: ArbiterKind::Etcd, endpoints: Some(endpoints), ..Self::default() }
    }

    /// What all keys begin with.
    pub fn prefix(&self) -> &str {
        self.prefix.as_deref().unwrap_or(PREFIX)
    }

    /// How long one call may take.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.unwrap_or(TIMEOUT_MS).into())
    }

    /// How long a node stays registered after its death.
    pub fn lease(&self) -> Duration {
        Duration::from_secs(self.lease_s.unwrap_or(LEASE).into())
    }

    pub(super) fn resolve(&mut self, base: &Path) {
        let paths = [&mut self.directory, &mut self.ca, &mut self.certificate, &mut self.key];
        paths.into_iter().flatten().for_each(|path| count_from(base, path));
    }

    /// Checks numbers against their bounds, and keys against the kind and each other.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn check(&self) -> Result<(), Problem> {
        match self.kind {
            ArbiterKind::File => self.check_file(),
            ArbiterKind::Etcd => self.check_etcd(),
        }
    }

    fn check_file(&self) -> Result<(), Problem> {
        let keys = [
            ("endpoints", self.endpoints.is_some()),
            ("prefix", self.prefix.is_some()),
            ("timeout_ms", self.timeout_ms.is_some()),
            ("lease_s", self.lease_s.is_some()),
            ("ca", self.ca.is_some()),
            ("certificate", self.certificate.is_some()),
            ("key", self.key.is_some()),
            ("insecure", self.insecure.is_some()),
        ];
        if let Some((key, _)) = keys.iter().find(|(_, given)| *given) {
            let text = "it is of an arbiter in etcd and this one is a directory; remove this key, or set \
                        arbiter.kind = \"etcd\"";
            return Err(Problem::new(format!("arbiter.{key}"), text));
        }
        self.directory.as_ref().map(|_| ()).ok_or_else(|| missing("directory"))
    }

    fn check_etcd(&self) -> Result<(), Problem> {
        if self.directory.is_some() {
            let text = "it is of an arbiter in a directory and this one is etcd; remove this key, or set \
                        arbiter.kind = \"file\"";
            return Err(Problem::new("arbiter.directory", text));
        }
        self.check_endpoints(self.endpoints.as_ref().ok_or_else(|| missing("endpoints"))?)?;
        check_prefix(self.prefix())?;
        let (low, high) = ARBITER_TIMEOUT_MS;
        let timeout = self.timeout_ms.unwrap_or(TIMEOUT_MS);
        in_range("arbiter.timeout_ms", timeout.into(), low.into(), high.into())?;
        let (low, high) = LEASE_S;
        in_range("arbiter.lease_s", self.lease_s.unwrap_or(LEASE).into(), low.into(), high.into())?;
        match (&self.certificate, &self.key) {
            (Some(_), None) => Err(missing("key")),
            (None, Some(_)) => Err(missing("certificate")),
            _ => Ok(()),
        }
    }

    fn check_endpoints(&self, endpoints: &[EtcdEndpoint]) -> Result<(), Problem> {
        let wrong = |text: String| Err(Problem::new("arbiter.endpoints", text));
        if endpoints.is_empty() || endpoints.len() > MAX_ARBITER_ENDPOINTS {
            let text = format!(
                "it names {} members; name 1 to {MAX_ARBITER_ENDPOINTS}, best all of the cluster",
                endpoints.len()
            );
            return wrong(text);
        }
        if let Some(twice) = endpoints.iter().enumerate().find(|(n, e)| endpoints[..*n].contains(e)) {
            return wrong(format!("{} is there twice; name each member once", twice.1));
        }
        let plain = endpoints.iter().find(|endpoint| !endpoint.tls);
        match plain {
            Some(open) if !open.at.is_loopback() && self.insecure != Some(true) => wrong(format!(
                "{open} is not on loopback and not encrypted; write https:// and give arbiter.ca, or set \
                 arbiter.insecure = true if nobody else is on that network"
            )),
            Some(open) if self.ca.is_some() || self.certificate.is_some() => {
                wrong(format!("{open} is not encrypted and certificates are given; write https://"))
            }
            None if self.ca.is_none() => Err(missing("ca")),
            _ => Ok(()),
        }
    }
}

fn missing(key: &str) -> Problem {
    Problem::new(format!("arbiter.{key}"), "this key is missing; add it")
}

fn check_prefix(prefix: &str) -> Result<(), Problem> {
    let ends = prefix.starts_with('/') && prefix.ends_with('/');
    let plain = prefix.bytes().all(|b| b.is_ascii_graphic());
    if ends && plain && prefix.len() <= MAX_PREFIX {
        return Ok(());
    }
    let text =
        format!("{prefix:?} is no prefix; begin and end it with '/', with at most {MAX_PREFIX} letters");
    Err(Problem::new("arbiter.prefix", text))
}

/// The address of a member of etcd, as etcd's own tools write it: `https://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EtcdEndpoint {
    /// Whether it is `https`.
    pub tls: bool,
    /// Where it is.
    pub at: Endpoint,
}

/// A member's address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadEtcdEndpoint {
    /// It has no scheme, or another one.
    #[error("{0:?} is no address of etcd; write https://HOST:PORT, or http://HOST:PORT")]
    Scheme(String),
    /// What follows is no address.
    #[error(transparent)]
    Address(#[from] BadEndpoint),
}

impl FromStr for EtcdEndpoint {
    type Err = BadEtcdEndpoint;

    fn from_str(text: &str) -> Result<Self, BadEtcdEndpoint> {
        let (tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => {
                return Err(BadEtcdEndpoint::Scheme(
                    text.chars().take(super::bounds::MAX_ENDPOINT).collect(),
                ));
            }
        };
        Ok(Self { tls, at: rest.strip_suffix('/').unwrap_or(rest).parse()? })
    }
}

impl TryFrom<String> for EtcdEndpoint {
    type Error = BadEtcdEndpoint;

    fn try_from(text: String) -> Result<Self, BadEtcdEndpoint> {
        text.parse()
    }
}

impl From<EtcdEndpoint> for String {
    fn from(endpoint: EtcdEndpoint) -> Self {
        endpoint.to_string()
    }
}

impl fmt::Display for EtcdEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.at)
    }
}
