//! The messages: what a frame's body says, unless it is raw (`Pages`, `Blocks`, `State`). Postcard inside the frame; every list,
//! text and number that a peer could blow up is bounded, and nothing may follow what was read.
//!
//! ```text
//!   primary                                secondary
//!     | == control: Hello ==================> |      one bidirectional stream, the connection's first
//!     | <================ Welcome | Refused = |
//!     | == transfer: SeedBegin, Pages, Blocks ... ==> | one stream of the primary, in order
//!     |      (Since: <============== Diverged)
//!     |      (Differing: DigestRequest =====> |
//!     |       <==================== RangeDigests)
//!     |      (of the disk: BlockDigestRequest |
//!     |       <==================== BlockDigests)
//!     | == EpochBegin, Pages, Blocks, State, Output, EpochEnd => |
//!     | <===================== Ack, Progress = |     control again
//!     | == Verify (behind an epoch) =========> |     transfers
//!     | <========================== Verified = |     control
//!     | == TermChanged, Yield, Goodbye ======> |
//! ```

mod bounded;
mod control;
mod digests;
mod rejoin;
mod transfer;
mod verify;

pub use control::{
    Ack, Control, Detail, Goodbye, Hello, MAX_DETAIL, MAX_WINDOW, MIN_EPOCH_BYTES, Progress, Purpose,
    Refusal, Refused, TermChanged, Welcome, Yield,
};
pub use digests::{
    BlockDigestRequest, BlockDigests, Compared, DigestRange, DigestRequest, MAX_DIGEST_RANGES, MAX_DIGESTS,
    PageDigest, RangeDigests,
};
pub use rejoin::{Base, Bases, Diverged, MAX_DIVERGED_BODY, MAX_DIVERGED_RUNS};
pub use transfer::{
    EpochBegin, EpochEnd, ITEM_COST, MAX_OUTPUT_ITEMS, MAX_POSITION, Output, OutputItem, Position, SeedBegin,
    SeedMode, SeedPart, TransferDigest,
};
pub use verify::{
    MAX_DIFFERING_NAMED, MAX_VERIFY_BODY, MAX_VERIFY_DIGESTS, MAX_VERIFY_RANGES, Verified, Verify,
    VerifyPart, VerifyRange,
};

use colo_common::limits::MAX_HISTORY;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::frame::Kind;
use crate::version::NoCommonVersion;

/// Bytes of a message on the control stream: names, points and one text of [`MAX_DETAIL`] bytes.
pub const MAX_CONTROL_BODY: usize = 4 << 10;

/// Bytes of a message with a history: two numbers of at most 10 bytes for each term, and some more.
pub const MAX_HISTORY_BODY: usize = MAX_HISTORY * 20 + 256;

/// Bytes of a message with digests: the digests, and for each range its tag and length.
pub const MAX_DIGEST_BODY: usize = MAX_DIGESTS * 16 + MAX_DIGEST_RANGES * 16 + 64;

const _: () = assert!(MAX_CONTROL_BODY > MAX_DETAIL + 4 * colo_common::ids::MAX_NAME + 512);

/// Why bytes are not the message that they are said to be. The link is not to be trusted any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Longer than any message of the kind.
    #[error("the message {kind} has {found} bytes, more than {limit}")]
    TooLong {
        /// The kind.
        kind: Kind,
        /// Its bytes.
        found: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Not what the kind consists of, or a list in it is too long.
    #[error("the message {kind} cannot be read: {reason}; do both nodes run the same version of Colo?")]
    Malformed {
        /// The kind.
        kind: Kind,
        /// What the decoder said.
        reason: String,
    },
    /// More bytes than the message has.
    #[error("{found} bytes follow the message {kind}; do both nodes run the same version of Colo?")]
    Trailing {
        /// The kind.
        kind: Kind,
        /// Bytes left over.
        found: usize,
    },
    /// A value that makes no sense.
    #[error("the message {kind} has {what} {found}, which is not between {min} and {max}")]
    OutOfRange {
        /// The kind.
        kind: Kind,
        /// The value's name.
        what: &'static str,
        /// The value.
        found: u64,
        /// The smallest that makes sense.
        min: u64,
        /// The largest.
        max: u64,
    },
    /// A kind that has no place where it came.
    #[error("the message {kind} came on the {stream} stream, where it has no place")]
    OutOfPlace {
        /// The kind.
        kind: Kind,
        /// Control or transfer.
        stream: &'static str,
    },
    /// A welcome of a version that this build does not speak.
    #[error(transparent)]
    Version(#[from] NoCommonVersion),
}

/// A message: a value that travels as the body of a frame of its kind.
pub trait Message: Serialize + DeserializeOwned {
    /// Its kind.
    const KIND: Kind;

    /// Checks what the types of the fields do not.
    ///
    /// # Errors
    /// A value makes no sense.
    fn check(&self) -> Result<(), MessageError> {
        Ok(())
    }

    /// The body to send.
    ///
    /// # Panics
    /// It is not what [`decode`](Self::decode) takes: an own bug.
    fn encode(&self) -> Vec<u8> {
        self.check().unwrap_or_else(|error| panic!("to be sent: {error}"));
        let body = postcard::to_stdvec(self).expect("a message has only plain data in it");
        assert!(body.len() <= Self::KIND.max_body(), "the message {} of {} bytes", Self::KIND, body.len());
        body
    }

    /// Reads a body that came from a peer.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    fn decode(body: &[u8]) -> Result<Self, MessageError> {
        let (kind, limit) = (Self::KIND, Self::KIND.max_body());
        if body.len() > limit {
            return Err(MessageError::TooLong { kind, found: body.len(), limit });
        }
        let malformed = |error: postcard::Error| MessageError::Malformed { kind, reason: error.to_string() };
        let (message, rest) = postcard::take_from_bytes::<Self>(body).map_err(malformed)?;
        if !rest.is_empty() {
            return Err(MessageError::Trailing { kind, found: rest.len() });
        }
        message.check()?;
        Ok(message)
    }
}

/// Refuses a value outside `min..=max`.
fn check_range(kind: Kind, what: &'static str, found: u64, min: u64, max: u64) -> Result<(), MessageError> {
    if (min..=max).contains(&found) {
        Ok(())
    } else {
        Err(MessageError::OutOfRange { kind, what, found, min, max })
    }
}
