//! Messages of the control stream, the first bidirectional stream of a connection. Whoever runs the guest connects and
//! says `Hello`; after a `Welcome` both speak whenever they have something to say.

use colo_common::limits::MIN_EPOCH_MIB;
use colo_common::{History, Incarnation, NodeId, Point, ReplicaId, Term, VmId};
use serde::{Deserialize, Serialize};
use std::fmt;

use super::{
    Bases, BlockDigestRequest, BlockDigests, DigestRequest, Diverged, Message, MessageError, RangeDigests,
    Verified, bounded, check_range,
};
use crate::frame::{Frame, Kind, MAX_BODY};
use crate::version::{NoCommonVersion, Versions};

/// Epochs in flight that a secondary may ask for: each holds a dirty set and a staging copy at the primary.
pub const MAX_WINDOW: u32 = 256;

/// The least that a secondary must be able to hold of one epoch.
pub const MIN_EPOCH_BYTES: u64 = (MIN_EPOCH_MIB as u64) << 20;

const _: () = assert!(MIN_EPOCH_BYTES > MAX_BODY as u64, "a full frame fits");

/// Bytes of the text of a refusal: a few lines.
pub const MAX_DETAIL: usize = 1024;

/// The first word of whoever connects. Always of version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The versions that it speaks.
    pub versions: Versions,
    /// Its node.
    pub node: NodeId,
    /// The very process.
    pub incarnation: Incarnation,
    /// The vm that it runs.
    pub vm: VmId,
    /// The register's term, as far as it knows.
    pub term: Term,
    /// Digest of the guest's spec, as agreed on by pairing.
    pub spec_digest: u64,
    /// What it wants.
    pub purpose: Purpose,
}

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// A copy from scratch, or of what differs: the register says `Solo`.
    Seed,
    /// To go on with the copy that the register names.
    Link {
        /// That copy.
        replica: ReplicaId,
    },
}

impl Message for Hello {
    const KIND: Kind = Kind::Hello;
}

/// The secondary takes the link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that all frames from now on have.
    pub version: u16,
    /// Its node.
    pub node: NodeId,
    /// The very process.
    pub incarnation: Incarnation,
    /// Its copy's id, if the copy is whole.
    pub replica: Option<ReplicaId>,
    /// The newest point that is staged whole.
    pub staged: Option<Point>,
    /// A whole point that no id vouches for: a base for a resync by digests.
    pub stale: Option<Point>,
    /// Bytes of one epoch that it can hold.
    pub max_epoch_bytes: u64,
    /// Epochs that may be in flight.
    pub window: u32,
    /// What a new copy can be made from without digests.
    pub bases: Bases,
    /// The history that the bases' points lie on.
    #[serde(with = "bounded::history")]
    pub history: History,
}

impl Message for Welcome {
    const KIND: Kind = Kind::Welcome;

    fn check(&self) -> Result<(), MessageError> {
        if !Versions::OURS.contains(self.version) {
            let theirs = Versions { min: self.version, max: self.version };
            return Err(NoCommonVersion { ours: Versions::OURS, theirs }.into());
        }
        self.bases.check(Self::KIND)?;
        check_range(Self::KIND, "a window of", self.window.into(), 1, MAX_WINDOW.into())?;
        check_range(Self::KIND, "epochs of so many bytes:", self.max_epoch_bytes, MIN_EPOCH_BYTES, u64::MAX)
    }
}

/// The secondary does not take the link, or ends it. Always of version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Why, for a program.
    pub reason: Refusal,
    /// Why, for a person.
    pub detail: Detail,
}

impl Message for Refused {
    const KIND: Kind = Kind::Refused;
}

/// Why a link is refused. Variants are only ever added at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// No version in common.
    Version {
        /// What the secondary speaks.
        versions: Versions,
    },
    /// This process follows another vm.
    OtherVm,
    /// This guest was not agreed on by this process: pair first.
    NotPaired,
    /// The runner's term is over: it must read the register.
    Fenced {
        /// The newest term known.
        known: Term,
    },
    /// The secondary is taking the guest over, or runs it.
    Promoting,
    /// The copy is not the one that was asked for: it must be seeded anew.
    NotThisReplica,
    /// Another runner holds the link.
    Busy,
    /// What came does not follow what is there.
    OutOfPlace,
    /// What came cannot be read, or fails its checksum.
    Damaged,
    /// The secondary itself has failed, as when its disk is full.
    Failed,
    /// The secondary's process has only begun and has not read the register yet: it is to be asked again soon.
    NotReady,
}

/// A short text for a person, from a peer or for one: one line without control characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Detail(String);

impl Detail {
    /// Cuts the text to [`MAX_DETAIL`] bytes and makes one line of it.
    pub fn new(text: &str) -> Self {
        let mut line = String::new();
        for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
            if line.len() + c.len_utf8() > MAX_DETAIL {
                break;
            }
            line.push(c);
        }
        Self(line)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A text that is too long, or would disturb a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a text of a peer has more than {MAX_DETAIL} bytes, or control characters in it")]
pub struct BadDetail;

impl TryFrom<String> for Detail {
    type Error = BadDetail;

    fn try_from(text: String) -> Result<Self, BadDetail> {
        let fits = text.len() <= MAX_DETAIL && !text.chars().any(char::is_control);
        if fits { Ok(Self(text)) } else { Err(BadDetail) }
    }
}

impl From<Detail> for String {
    fn from(detail: Detail) -> Self {
        detail.0
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The secondary's word that a point and all before it are safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// The point.
    pub point: Point,
    /// The replica that holds it.
    pub replica: ReplicaId,
    /// The runner's term that the replica knows of.
    pub term: Term,
}

impl Message for Ack {
    const KIND: Kind = Kind::Ack;
}

/// How far the secondary is. Nothing is decided by it but the pace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Received whole and verified.
    pub staged: Option<Point>,
    /// In the image.
    pub applied: Option<Point>,
    /// In the store, synced.
    pub persisted: Option<Point>,
    /// Bytes that are staged and not yet applied and persisted.
    pub backlog_bytes: u64,
}

impl Message for Progress {
    const KIND: Kind = Kind::Progress;
}

/// The runner's term is newer than in its `Hello`: a proposal of its own was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TermChanged {
    /// The new term.
    pub term: Term,
}

impl Message for TermChanged {
    const KIND: Kind = Kind::TermChanged;
}

/// The primary does not run the guest any more and asks the secondary to promote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Yield {
    /// The guest failed: it counts for `max_promotions`. Otherwise it is a switchover.
    pub failed: bool,
}

impl Message for Yield {
    const KIND: Kind = Kind::Yield;
}

/// The link ends on purpose. What that means, the register says: the other end looks at it as after any loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goodbye;

impl Message for Goodbye {
    const KIND: Kind = Kind::Goodbye;
}

/// Any message of the control stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// See [`Hello`].
    Hello(Hello),
    /// See [`Welcome`].
    Welcome(Welcome),
    /// See [`Refused`].
    Refused(Refused),
    /// See [`Ack`].
    Ack(Ack),
    /// See [`Progress`].
    Progress(Progress),
    /// See [`TermChanged`].
    TermChanged(TermChanged),
    /// See [`DigestRequest`].
    DigestRequest(DigestRequest),
    /// See [`RangeDigests`].
    RangeDigests(RangeDigests),
    /// See [`BlockDigestRequest`].
    BlockDigestRequest(BlockDigestRequest),
    /// See [`BlockDigests`].
    BlockDigests(BlockDigests),
    /// See [`Diverged`].
    Diverged(Diverged),
    /// See [`Verified`].
    Verified(Verified),
    /// See [`Yield`].
    Yield(Yield),
    /// See [`Goodbye`].
    Goodbye(Goodbye),
}

impl Control {
    /// Reads the message of a frame that came on the control stream.
    ///
    /// # Errors
    /// It is of a transfer, or cannot be read.
    pub fn decode(frame: &Frame) -> Result<Self, MessageError> {
        let (kind, body) = (frame.header().kind, frame.body());
        Ok(match kind {
            Kind::Hello => Self::Hello(Hello::decode(body)?),
            Kind::Welcome => Self::Welcome(Welcome::decode(body)?),
            Kind::Refused => Self::Refused(Refused::decode(body)?),
            Kind::Ack => Self::Ack(Ack::decode(body)?),
            Kind::Progress => Self::Progress(Progress::decode(body)?),
            Kind::TermChanged => Self::TermChanged(TermChanged::decode(body)?),
            Kind::DigestRequest => Self::DigestRequest(DigestRequest::decode(body)?),
            Kind::RangeDigests => Self::RangeDigests(RangeDigests::decode(body)?),
            Kind::BlockDigestRequest => Self::BlockDigestRequest(BlockDigestRequest::decode(body)?),
            Kind::BlockDigests => Self::BlockDigests(BlockDigests::decode(body)?),
            Kind::Diverged => Self::Diverged(Diverged::decode(body)?),
            Kind::Verified => Self::Verified(Verified::decode(body)?),
            Kind::Yield => Self::Yield(Yield::decode(body)?),
            Kind::Goodbye => Self::Goodbye(Goodbye::decode(body)?),
            Kind::SeedBegin
            | Kind::Pages
            | Kind::Blocks
            | Kind::Verify
            | Kind::EpochBegin
            | Kind::State
            | Kind::Output
            | Kind::EpochEnd => {
                return Err(MessageError::OutOfPlace { kind, stream: "control" });
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Bases, Control, Detail, MAX_DETAIL, MIN_EPOCH_BYTES, Refusal, Refused, Welcome, Yield};
    use crate::frame::{Frame, Kind, VmTag};
    use crate::message::{Message, MessageError};
    use bytes::Bytes;
    use colo_common::{History, Incarnation, Point};

    fn welcome() -> Welcome {
        Welcome {
            version: 3,
            node: "b".parse().unwrap(),
            incarnation: Incarnation(1),
            replica: None,
            staged: None,
            stale: None,
            max_epoch_bytes: MIN_EPOCH_BYTES,
            window: 1,
            bases: Bases::default(),
            history: History::default(),
        }
    }

    fn refused(welcome: &Welcome) -> String {
        Welcome::decode(&postcard::to_stdvec(welcome).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn a_welcome_that_nobody_can_follow_is_refused() {
        assert_eq!(Welcome::decode(&welcome().encode()), Ok(welcome()));
        let error = refused(&Welcome { version: 2, ..welcome() });
        assert!(error.contains("the peer speaks protocol version 2, this build speaks version 3"), "{error}");
        for window in [0, 257] {
            let error = refused(&Welcome { window, ..welcome() });
            assert_eq!(
                error,
                format!("the message Welcome has a window of {window}, which is not between 1 and 256")
            );
        }
        assert!(refused(&Welcome { max_epoch_bytes: 0, ..welcome() }).contains("epochs of so many bytes: 0"));
    }

    #[test]
    fn a_text_of_a_peer_is_one_short_line() {
        let detail = Detail::new(&format!("a\nb\x1b[2J{}", "é".repeat(MAX_DETAIL)));
        assert!(detail.as_str().starts_with("a b [2Jé") && detail.as_str().len() <= MAX_DETAIL);
        let good = Refused { reason: Refusal::Busy, detail };
        assert_eq!(Refused::decode(&good.encode()), Ok(good));
        for bad in ["a\nb", &"x".repeat(MAX_DETAIL + 1)] {
            let body = postcard::to_stdvec(&(Refusal::Busy, bad)).unwrap();
            assert!(matches!(Refused::decode(&body), Err(MessageError::Malformed { .. })), "{bad:?}");
        }
    }

    #[test]
    fn each_stream_has_its_kinds() {
        let frame = Frame::control(VmTag(1), &Yield { failed: true });
        assert_eq!(Control::decode(&frame), Ok(Control::Yield(Yield { failed: true })));
        for kind in Kind::ALL {
            let frame = Frame::new(kind, VmTag(1), Point::default(), 0, Bytes::new(), Bytes::new());
            let out_of_place = matches!(Control::decode(&frame), Err(MessageError::OutOfPlace { .. }));
            assert_eq!(out_of_place, kind.is_transfer(), "{kind}");
        }
    }

    #[test]
    fn nothing_may_follow_a_message() {
        assert_eq!(Yield::decode(&[1, 0]), Err(MessageError::Trailing { kind: Kind::Yield, found: 1 }));
        assert!(matches!(Yield::decode(&[2]), Err(MessageError::Malformed { .. })));
    }
}
