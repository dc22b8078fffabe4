//! Between what travels by gRPC and the types of `colo-common`. Nothing that a peer sends is taken without these.

use colo_common::history::HistoryError;
use colo_common::register::{Entry, StopReason, Value};
use colo_common::{BadName, Epoch, History, Incarnation, NodeId, Point, ProposalId, ReplicaId, Term};

use crate::v1;

/// Bytes of a boot file in one chunk: well below the 4 MiB at which gRPC refuses a message.
pub const MAX_BOOT_FILE_CHUNK: usize = 1 << 20;

/// A field of a gRPC message that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A field that must be there.
    #[error("{0} is missing; do both sides run the same version of Colo?")]
    Missing(&'static str),
    /// An id of another length.
    #[error("{what} has {found} bytes, not 16")]
    IdLength {
        /// The field.
        what: &'static str,
        /// Its bytes.
        found: usize,
    },
    /// A value of an enum that has no meaning here.
    #[error("{what} has the unknown value {found}; do both sides run the same version of Colo?")]
    UnknownValue {
        /// The field.
        what: &'static str,
        /// Its value.
        found: i32,
    },
    /// A number that does not fit.
    #[error("{what} is {found}, which is not between {min} and {max}")]
    OutOfRange {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The smallest that fits.
        min: u64,
        /// The largest.
        max: u64,
    },
    /// Not a name.
    #[error(transparent)]
    Name(#[from] BadName),
    /// Not a history.
    #[error(transparent)]
    History(#[from] HistoryError),
}

/// A random number as it travels: 16 bytes, big endian, so that it prints as it is written.
pub fn id_bytes(id: u128) -> Vec<u8> {
    id.to_be_bytes().to_vec()
}

/// Reads a random number; `what` names the field.
///
/// # Errors
/// It has not 16 bytes.
pub fn id(what: &'static str, bytes: &[u8]) -> Result<u128, ConvertError> {
    let bytes = bytes.try_into().map_err(|_| ConvertError::IdLength { what, found: bytes.len() })?;
    Ok(u128::from_be_bytes(bytes))
}

/// Reads a replica id that may be absent, which is an empty field.
///
/// # Errors
/// It has neither 0 nor 16 bytes.
pub fn replica(bytes: &[u8]) -> Result<Option<ReplicaId>, ConvertError> {
    if bytes.is_empty() { Ok(None) } else { id("replica", bytes).map(|id| Some(ReplicaId(id))) }
}

/// A replica id that may be absent, as it travels.
pub fn replica_bytes(replica: Option<ReplicaId>) -> Vec<u8> {
    replica.map_or_else(Vec::new, |replica| id_bytes(replica.0))
}

/// Reads a process.
///
/// # Errors
/// It has not 16 bytes.
pub fn incarnation(bytes: &[u8]) -> Result<Incarnation, ConvertError> {
    id("incarnation", bytes).map(Incarnation)
}

/// Reads a history, per term its last epoch.
///
/// # Errors
/// It is too long or does not ascend.
pub fn history(points: &[v1::Point]) -> Result<History, ConvertError> {
    if points.len() > colo_common::limits::MAX_HISTORY {
        return Err(HistoryError::TooLong(points.len()).into());
    }
    Ok(History::from_points(points.iter().copied().map(Point::from).collect())?)
}

/// A history as it travels.
pub fn history_points(history: &History) -> Vec<v1::Point> {
    history.points().iter().copied().map(v1::Point::from).collect()
}

impl From<Point> for v1::Point {
    fn from(point: Point) -> Self {
        Self { term: point.term.0, epoch: point.epoch.0 }
    }
}

impl From<v1::Point> for Point {
    fn from(point: v1::Point) -> Self {
        Self { term: Term(point.term), epoch: Epoch(point.epoch) }
    }
}

impl From<StopReason> for v1::StopReason {
    fn from(reason: StopReason) -> Self {
        match reason {
            StopReason::PowerOff => Self::PowerOff,
            StopReason::Operator => Self::Operator,
            StopReason::Failed => Self::Failed,
        }
    }
}

fn stop_reason(found: i32) -> Result<StopReason, ConvertError> {
    match v1::StopReason::try_from(found) {
        Ok(v1::StopReason::PowerOff) => Ok(StopReason::PowerOff),
        Ok(v1::StopReason::Operator) => Ok(StopReason::Operator),
        Ok(v1::StopReason::Failed) => Ok(StopReason::Failed),
        Ok(v1::StopReason::Unspecified) | Err(_) => {
            Err(ConvertError::UnknownValue { what: "stop reason", found })
        }
    }
}

impl From<&Entry> for v1::RegisterEntry {
    fn from(entry: &Entry) -> Self {
        use v1::register_entry::Value as Sent;
        let value = match &entry.value {
            Value::Solo { node, incarnation } => {
                Sent::Solo(v1::Solo { node: node.to_string(), incarnation: id_bytes(incarnation.0) })
            }
            Value::Paired { primary, secondary, replica } => Sent::Paired(v1::Paired {
                primary: primary.to_string(),
                secondary: secondary.to_string(),
                replica: id_bytes(replica.0),
            }),
            Value::Stopped { node, reason } => Sent::Stopped(v1::Stopped {
                node: node.to_string(),
                reason: v1::StopReason::from(*reason).into(),
            }),
        };
        Self { term: entry.term.0, proposal: id_bytes(entry.proposal.0), value: Some(value) }
    }
}

impl TryFrom<&v1::RegisterEntry> for Entry {
    type Error = ConvertError;

    fn try_from(entry: &v1::RegisterEntry) -> Result<Self, ConvertError> {
        use v1::register_entry::Value as Sent;
        let node = |name: &str| Ok::<NodeId, ConvertError>(name.parse()?);
        let value = match entry.value.as_ref().ok_or(ConvertError::Missing("the register's value"))? {
            Sent::Solo(solo) => {
                Value::Solo { node: node(&solo.node)?, incarnation: incarnation(&solo.incarnation)? }
            }
            Sent::Paired(paired) => Value::Paired {
                primary: node(&paired.primary)?,
                secondary: node(&paired.secondary)?,
                replica: ReplicaId(id("replica", &paired.replica)?),
            },
            Sent::Stopped(stopped) => {
                Value::Stopped { node: node(&stopped.node)?, reason: stop_reason(stopped.reason)? }
            }
        };
        if entry.term == 0 {
            return Err(ConvertError::OutOfRange {
                what: "the register's term",
                found: 0,
                min: 1,
                max: u64::MAX,
            });
        }
        let proposal = ProposalId(id("proposal", &entry.proposal)?);
        Ok(Self { term: Term(entry.term), proposal, value })
    }
}

#[cfg(test)]
mod tests {
    use super::{ConvertError, history, history_points, id, id_bytes, replica, replica_bytes};
    use crate::v1;
    use colo_common::history::point;
    use colo_common::limits::MAX_HISTORY;
    use colo_common::register::{Entry, StopReason, Value};
    use colo_common::{History, Incarnation, Point, ProposalId, ReplicaId, Term};

    fn entries() -> Vec<Entry> {
        let node = |name: &str| name.parse().unwrap();
        let stopped = |reason| Value::Stopped { node: node("c"), reason };
        [
            Value::Solo { node: node("a"), incarnation: Incarnation(1 << 100) },
            Value::Paired { primary: node("a"), secondary: node("b"), replica: ReplicaId(7) },
            stopped(StopReason::PowerOff),
            stopped(StopReason::Operator),
            stopped(StopReason::Failed),
        ]
        .into_iter()
        .map(|value| Entry { term: Term(9), proposal: ProposalId(u128::MAX - 5), value })
        .collect()
    }

    #[test]
    fn what_is_sent_is_taken() {
        for entry in entries() {
            assert_eq!(Entry::try_from(&v1::RegisterEntry::from(&entry)), Ok(entry));
        }
        assert_eq!(Point::from(v1::Point::from(point(3, 4))), point(3, 4));
        let h = History::from_points(vec![point(1, 5), point(3, 9)]).unwrap();
        assert_eq!(history(&history_points(&h)), Ok(h));
        assert_eq!(id("replica", &id_bytes(77)), Ok(77));
        for id in [None, Some(ReplicaId(5))] {
            assert_eq!(replica(&replica_bytes(id)), Ok(id));
        }
    }

    #[test]
    fn what_cannot_be_taken_is_named() {
        let change = |which: usize, change: fn(&mut v1::RegisterEntry)| {
            let mut sent = v1::RegisterEntry::from(&entries()[which]);
            change(&mut sent);
            Entry::try_from(&sent).unwrap_err().to_string()
        };
        assert!(change(0, |e| e.value = None).starts_with("the register's value is missing"));
        assert!(change(0, |e| e.term = 0).starts_with("the register's term is 0"));
        assert_eq!(change(0, |e| e.proposal.truncate(15)), "proposal has 15 bytes, not 16");
        let solo = |e: &mut v1::RegisterEntry| {
            e.value =
                Some(v1::register_entry::Value::Solo(v1::Solo { node: "/etc".into(), incarnation: vec![] }));
        };
        assert!(change(0, solo).contains("\"/etc\" is no name"));
        let stopped = |e: &mut v1::RegisterEntry| {
            e.value = Some(v1::register_entry::Value::Stopped(v1::Stopped { node: "a".into(), reason: 0 }));
        };
        assert!(change(2, stopped).starts_with("stop reason has the unknown value 0"));
        assert!(replica(&[1]).is_err());
        assert!(matches!(
            history(&vec![v1::Point::default(); MAX_HISTORY + 1]),
            Err(ConvertError::History(_))
        ));
        assert!(history(&[v1::Point { term: 2, epoch: 1 }, v1::Point { term: 1, epoch: 1 }]).is_err());
    }
}
