//! Why etcd gave no answer, in words that name the member and the remedy.

use std::error::Error;
use std::time::Duration;
use tonic::{Code, Status};

use crate::tls::TlsError;

/// Bytes of a member's complaint that are kept: a peer must not fill the log.
const MAX_COMPLAINT: usize = 300;

/// Why a call has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EtcdError {
    /// No member answered in time. What was asked for may still be done.
    #[error("no member of etcd answered within {within:?}: {told}; {remedy}")]
    Silent {
        /// How long was waited.
        within: Duration,
        /// What each of them did.
        told: String,
        /// What helps.
        remedy: &'static str,
    },
    /// Members answered that they will not do it.
    #[error("etcd refuses: {told}; {remedy}")]
    Refused {
        /// gRPC's word for it.
        code: Code,
        /// What they said.
        told: String,
        /// What helps.
        remedy: &'static str,
    },
    /// The answer is none that a member of etcd gives.
    #[error("etcd answered what it never should: {0}; is it etcd 3.4 or newer that the endpoints name?")]
    Answer(&'static str),
    /// The endpoints lead to several clusters, none of which most of them are of.
    #[error(
        "the endpoints are of different clusters: {0}; name the members of one only in arbiter.endpoints"
    )]
    Clusters(String),
    /// The client cannot be made.
    #[error("no client of etcd can be made: {0}")]
    Setup(String),
}

impl From<TlsError> for EtcdError {
    fn from(error: TlsError) -> Self {
        Self::Setup(error.to_string())
    }
}

impl EtcdError {
    /// Whether etcd does not know the lease that was named.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: Code::NotFound, .. })
    }

    /// Whether there is already what was to be made.
    pub(crate) fn is_there_already(&self) -> bool {
        matches!(self, Self::Refused { code: Code::FailedPrecondition | Code::AlreadyExists, .. })
    }

    /// Whether the answer was larger than is taken.
    pub(crate) fn is_too_large(&self) -> bool {
        matches!(self, Self::Refused { code: Code::OutOfRange, .. })
    }
}

/// Whether asking again is of no use if most members say this.
pub(super) fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
    )
}

/// What a member or the way to it said, with all its causes.
pub(super) fn words(status: &Status) -> String {
    let mut words = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !words.contains(&text) {
            words = if words.is_empty() { text } else { format!("{words}: {text}") };
        }
        cause = error.source();
    }
    if words.is_empty() {
        words = status.code().description().to_owned();
    }
    words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_COMPLAINT).collect()
}

/// Whether it only says that there is no connection, which a member that refuses a certificate may say as well.
pub(super) fn is_vague(told: &str) -> bool {
    ["canceled", "closed", "reset", "broken pipe"].iter().any(|word| told.contains(word))
}

/// What helps against what was told, by members that use TLS or do not.
pub(super) fn remedy(told: &str, tls: bool) -> &'static str {
    let has = |parts: &[&str]| parts.iter().any(|part| told.contains(part));
    if has(&["certificate", "fatal alert", "tls", "TLS"]) || tls && is_vague(told) {
        "check arbiter.ca, arbiter.certificate and arbiter.key against what etcd's members use, and the clocks"
    } else if has(&["user name is empty", "permission denied", "invalid auth token"]) {
        "give the user that arbiter.certificate names the role for arbiter.prefix, or switch etcd's authentication off"
    } else if has(&["database space exceeded"]) {
        "compact and defragment etcd, then clear its alarm (etcdctl alarm disarm)"
    } else if has(&["another cluster"]) {
        "name the members of one cluster only in arbiter.endpoints"
    } else {
        "see that most of etcd's members run and reach each other, and that arbiter.endpoints names them"
    }
}

#[cfg(test)]
mod tests {
    use super::{is_vague, remedy, words};
    use tonic::Status;

    #[test]
    fn a_complaint_is_one_short_line() {
        assert_eq!(words(&Status::unavailable("a\nb")), "a b");
        assert!(words(&Status::unavailable("")).contains("unavailable"));
        assert_eq!(words(&Status::internal("x".repeat(9999))).len(), 300);
        assert!(remedy("invalid peer certificate: Expired", true).contains("arbiter.ca"));
        assert!(remedy("connection closed", true).contains("arbiter.ca") && is_vague("connection closed"));
        assert!(remedy("connection closed", false).contains("most of etcd's members"));
        assert!(remedy("connection refused", true).contains("most of etcd's members"));
    }
}
