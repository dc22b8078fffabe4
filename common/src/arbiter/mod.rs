//! The arbiter: holds one [register](crate::register) per vm and changes it by compare-and-set, linearizably.
//!
//! Calls block; a node makes them on a thread that may wait. Every call that does not answer leaves the outcome
//! unknown: a proposal may have been applied, or may be applied later.

pub mod etcd;
pub(crate) mod fates;
pub mod file;
pub mod scripted;
pub(crate) mod text;

use std::path::Path;
use std::sync::Arc;

use crate::config::{ArbiterConfig, ArbiterKind};
use crate::etcd::EtcdError;
use crate::ids::VmId;
use crate::register::{Answer, Entry, Proposal};

/// Why there is no arbiter at a node's start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its directory cannot be used.
    #[error(transparent)]
    File(#[from] ArbiterError),
    /// etcd cannot be spoken to with what the configuration says.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
}

/// The arbiter that a configuration names.
///
/// # Errors
/// Its directory, or a certificate, cannot be used.
pub fn open(config: &ArbiterConfig) -> Result<Arc<dyn Arbiter>, OpenError> {
    Ok(match config.kind {
        ArbiterKind::File => {
            let directory = config.directory.as_deref().unwrap_or(Path::new(""));
            Arc::new(file::FileArbiter::open(directory)?)
        }
        ArbiterKind::Etcd => Arc::new(etcd::EtcdArbiter::open(config)?),
    })
}

/// Why the arbiter did not answer. Of a proposal nothing is known then.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// Its files or endpoints cannot be reached.
    #[error("the arbiter {place} does not answer: {reason}")]
    Unreachable {
        /// Which one.
        place: String,
        /// What was found.
        reason: String,
    },
    /// What it holds is not a register.
    #[error(
        "the register of {vm} in {place} is damaged: {reason}; restore it from a backup, and do not remove it: guests run on meanwhile, but nothing about {vm} is decided"
    )]
    Damaged {
        /// The vm.
        vm: VmId,
        /// Where.
        place: String,
        /// What is wrong.
        reason: String,
    },
}

/// Holds the registers. All nodes of a vm must use the same one.
pub trait Arbiter: Send + Sync {
    /// The register now: a value that was current between call and return.
    ///
    /// # Errors
    /// No answer.
    fn read(&self, vm: &VmId) -> Result<Option<Entry>, ArbiterError>;

    /// Applies the proposal if the register holds what it expects; repeating one that was applied finds it applied.
    ///
    /// # Errors
    /// No answer: the outcome is unknown.
    fn propose(&self, vm: &VmId, proposal: &Proposal) -> Result<Answer, ArbiterError>;
}
