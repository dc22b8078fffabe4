//! Reading lists and bytes whose length a peer chose: never more than their limit, and room is made only for what is
//! there.

pub(super) use colo_common::bounded::list;
use serde::Deserializer;
use serde::de::{Error, Visitor};
use std::fmt;

/// A history: on the wire the list of its points.
pub(super) mod history {
    use colo_common::limits::MAX_HISTORY;
    use colo_common::{History, Point};
    use serde::de::Error;
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(history: &History, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(history.points())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<History, D::Error> {
        let points = super::list::<D, Point, MAX_HISTORY>(deserializer)?;
        History::from_points(points).map_err(D::Error::custom)
    }
}

/// Bytes in one piece; on the wire as a list of bytes, but not read one by one.
pub(super) mod bytes {
    use super::{Deserializer, Error, Visitor, fmt};
    use serde::Serializer;

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Piece;

        impl Visitor<'_> for Piece {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
        }

        deserializer.deserialize_bytes(Piece)
    }
}
