//! What a store tells of itself, as a start and an operator need it.

use colo_common::{History, Point, ReplicaId, Term, VmId};
use std::time::{Duration, SystemTime};

use super::Store;
use super::format::{EpochRecord, FORMAT_VERSION, MetaCopy, MetaWhole};

/// What a store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Version of its format.
    pub version: u32,
    /// The vm that it is of.
    pub vm: VmId,
    /// Digest of the guest's spec, once one was seen.
    pub spec: Option<u64>,
    /// The newest term of the register that this node has seen; none for a store that was never used.
    pub term: Option<Term>,
    /// This node ran the guest in this term, and nobody's copy has replaced it since.
    pub active: Option<Term>,
    /// The copy.
    pub copy: StoredCopy,
    /// The point of the last whole copy, which is kept aside while a new one grows. It cannot be promoted.
    pub previous: Option<Point>,
}

/// The copy that a store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredCopy {
    /// No pages.
    None,
    /// In the middle of a seed or resync: pages of no point.
    Inconsistent,
    /// Exactly one point.
    Whole(WholeCopy),
}

/// A copy that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholeCopy {
    /// Its point.
    pub point: Point,
    /// Its replica id, if it is stored.
    pub replica: Option<ReplicaId>,
    /// Its history.
    pub history: History,
    /// Pages that are not zero.
    pub pages: u64,
    /// Digest of all pages.
    pub digest: u64,
    /// Bytes of the machine state.
    pub state_bytes: u64,
    /// When the point was persisted.
    pub persisted: SystemTime,
}

impl Store {
    /// What it holds.
    pub fn summary(&self) -> Summary {
        let copy = match (&self.meta.copy, &self.record) {
            (MetaCopy::Whole(whole), Some(record)) => StoredCopy::Whole(whole_copy(whole, record)),
            (MetaCopy::Inconsistent, _) => StoredCopy::Inconsistent,
            _ => StoredCopy::None,
        };
        Summary {
            version: FORMAT_VERSION,
            vm: self.meta.vm.clone(),
            spec: self.meta.spec,
            term: self.meta.term,
            active: self.meta.active,
            copy,
            previous: self.meta.previous,
        }
    }
}

fn whole_copy(whole: &MetaWhole, record: &EpochRecord) -> WholeCopy {
    let history = History::from_points(whole.history.clone());
    WholeCopy {
        point: whole.point,
        replica: whole.replica,
        history: history.expect("checked when it was read or given"),
        pages: record.pages,
        digest: record.digest,
        state_bytes: record.state_bytes,
        persisted: SystemTime::UNIX_EPOCH + Duration::from_millis(record.unix_ms),
    }
}
