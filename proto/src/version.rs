//! The version of what two processes say to each other, and how they agree on one.
//!
//! Versions:
//! - 1: the first. Frames, run tables, messages, heartbeats and the gRPC package `colo.v1`.
//! - 2: disks. `Blocks`, `BlockDigestRequest` and `BlockDigests`; `EpochEnd` counts blocks. A request for digests has a
//!   bound (`MAX_DIGESTS_ASKED`), which version 1 kept to.
//! - 3: copies that come back. `Welcome` has bases and a history, `SeedBegin` a mode for memory and one for the disk,
//!   and the secondary says `Diverged`. A heartbeat says how late its sender runs, in what was reserved. A copy may be compared while epochs go on: `Verify` and `Verified`.
//!
//! Every change of the wire adds a line here and a test against the version before. What never changes, so that
//! nodes of any two versions understand why they part: the length of a frame's header, its magic, the places of
//! version and header checksum in it, and the frames `Hello` and `Refused`, which are always of version 1.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The newest version that this build speaks.
pub const PROTOCOL_VERSION: u16 = 3;

/// The oldest version that this build speaks: a seed begins otherwise than in the one before.
pub const OLDEST_VERSION: u16 = 3;

/// The version of the frames that never change.
pub const FIRST_VERSION: u16 = 1;

const _: () = assert!(OLDEST_VERSION >= FIRST_VERSION && OLDEST_VERSION <= PROTOCOL_VERSION);

/// A range of versions that a node speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

/// Two nodes that have no version in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the peer speaks protocol {theirs}, this build speaks {ours}: run the same version of Colo on both nodes"
)]
pub struct NoCommonVersion {
    /// What this node speaks.
    pub ours: Versions,
    /// What the peer speaks.
    pub theirs: Versions,
}

impl Versions {
    /// What this build speaks.
    pub const OURS: Self = Self { min: OLDEST_VERSION, max: PROTOCOL_VERSION };

    /// Whether it has this version in it.
    pub const fn contains(self, version: u16) -> bool {
        self.min <= version && version <= self.max
    }

    /// The newest version that both speak.
    ///
    /// # Errors
    /// There is none; a range that ends before it begins has none with anybody.
    pub fn agree(self, theirs: Self) -> Result<u16, NoCommonVersion> {
        let version = self.max.min(theirs.max);
        if self.contains(version) && theirs.contains(version) {
            Ok(version)
        } else {
            Err(NoCommonVersion { ours: self, theirs })
        }
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "version {}", self.max)
        } else {
            write!(f, "versions {} to {}", self.min, self.max)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Versions;

    const fn versions(min: u16, max: u16) -> Versions {
        Versions { min, max }
    }

    #[test]
    fn the_newest_common_version_is_taken() {
        for (ours, theirs, agreed) in
            [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 5), (1, 3), 3), ((1, 9), (4, 4), 4)]
        {
            assert_eq!(versions(ours.0, ours.1).agree(versions(theirs.0, theirs.1)), Ok(agreed));
        }
    }

    #[test]
    fn without_one_both_ranges_are_named() {
        let error = versions(1, 1).agree(versions(2, 3)).unwrap_err().to_string();
        assert!(
            error.contains("the peer speaks protocol versions 2 to 3, this build speaks version 1:"),
            "{error}"
        );
        assert!(versions(1, 4).agree(versions(3, 2)).is_err(), "a range the wrong way round");
        assert!(versions(4, 5).agree(versions(1, 3)).is_err());
    }
}
