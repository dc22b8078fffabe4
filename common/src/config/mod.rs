//! Configuration of the nodes: TOML files whose every key is known, has a unit in its name and a default here.
//!
//! Each section is a struct; its fields are its keys. Relative paths count from the directory of the configuration
//! file. What is wrong is told with file, line, key and remedy, before anything is touched.

mod arbiter;
mod bounds;
mod devices;
mod guest;
mod locate;
mod primary;
mod secondary;
mod shared;
mod telling;

use serde::de::DeserializeOwned;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub use arbiter::{ArbiterConfig, ArbiterKind, BadEtcdEndpoint, EtcdEndpoint};
pub use devices::{DiskConfig, FollowDiskConfig, FollowNetworkConfig, MAX_SERIAL, NetworkConfig};
pub use guest::{ConsoleDevice, CpuModel, GuestConfig, GuestKind, Tracker};
pub use primary::PrimaryConfig;
pub use secondary::{Ack, Failover, FollowConfig, SecondaryConfig};
pub use shared::{
    AdminConfig, BadEndpoint, ConsoleConfig, Endpoint, OnCrash, OnSecondaryLoss, OnStop, ReplicationConfig,
    Reprotect, TlsConfig,
};
pub use telling::{LogConfig, LogFormat, MetricsConfig};

use crate::durable;

/// Bytes of a configuration file at most: a full one has some 2 KiB.
const MAX_FILE: u64 = 256 << 10;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration {}: {source}; check the path and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something in it is wrong.
    #[error("{}{}: {problem}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1; none for a default that does not fit the rest.
        line: Option<usize>,
        /// What and where.
        problem: Problem,
    },
}

/// What is wrong with a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, with its section's name before it; empty if the file is no TOML.
    pub key: String,
    /// What is wrong, and the remedy.
    pub text: String,
}

impl Problem {
    fn new(key: impl Into<String>, text: impl Into<String>) -> Self {
        Self { key: key.into(), text: text.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.key.is_empty() { f.write_str(&self.text) } else { write!(f, "{}: {}", self.key, self.text) }
    }
}

impl std::error::Error for Problem {}

/// A configuration of some kind.
trait Config: DeserializeOwned {
    /// Makes relative paths count from `base`.
    fn resolve(&mut self, base: &Path);

    /// Checks numbers against their bounds, and keys against each other.
    fn check(&self) -> Result<(), Problem>;
}

fn load<T: Config>(path: &Path) -> Result<T, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let bytes = durable::read(path, MAX_FILE)
        .and_then(|found| found.ok_or_else(|| io::ErrorKind::NotFound.into()))
        .map_err(failed)?;
    let text = String::from_utf8(bytes).map_err(|_| failed(io::Error::other("it is not text")))?;
    parse(&text, path)
}

fn parse<T: Config>(text: &str, path: &Path) -> Result<T, ConfigError> {
    let wrong = |line, problem| ConfigError::Wrong { path: path.to_owned(), line, problem };
    let mut config: T = toml::from_str(text).map_err(|e| {
        let (line, problem) = locate::explain(text, &e);
        wrong(line, problem)
    })?;
    config.resolve(path.parent().unwrap_or(Path::new("")));
    config.check().map_err(|problem| wrong(locate::line_of(text, &problem.key), problem))?;
    Ok(config)
}

/// Makes `path` count from `base`; an absolute one stays.
fn count_from(base: &Path, path: &mut PathBuf) {
    *path = base.join(&path);
}

/// Whether the value of `key` is within its bounds.
fn in_range(key: &str, value: u64, low: u64, high: u64) -> Result<(), Problem> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Problem::new(key, format!("{value} is out of range; choose a number from {low} to {high}")))
}

#[cfg(test)]
mod tests;
