//! Why a command was not done, and with which status the program ends.

use std::error::Error;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use colo_common::config::Endpoint;
use colo_common::tls::TlsError;
use tonic::{Code, Status};

use crate::format::clean;

/// Something failed, or was refused.
const FAILED: u8 = 1;
/// The command line is wrong; clap's own status too.
const USAGE: u8 = 2;
/// No node answers.
const NO_ANSWER: u8 = 3;

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    /// The command line, or the environment, makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// tonic refuses what was checked before.
    #[error("TLS cannot be set up: {0}; check the certificates that --tls names")]
    TlsSetup(String),
    /// No threads or descriptors.
    #[error("cannot begin: {0}; raise the limits on processes and open files (ulimit)")]
    Runtime(io::Error),
    /// Nobody is there.
    #[error("no node answers at {address}: {reason}; {}", remedy(*tls, reason))]
    NoAnswer {
        /// Where.
        address: Endpoint,
        /// What was found.
        reason: String,
        /// Whether certificates were used.
        tls: bool,
    },
    /// Nobody is anywhere.
    #[error("no node answers: {}; {}", found.join(", "), remedy(*tls, &found.concat()))]
    NoneAnswers {
        /// What was found at each address.
        found: Vec<String>,
        /// Whether certificates were used.
        tls: bool,
    },
    /// It took the call and says nothing.
    #[error("the node at {address} has not answered within {} s; look at `coloctl status`", limit.as_secs())]
    Silent {
        /// Where.
        address: Endpoint,
        /// How long it had.
        limit: Duration,
    },
    /// The node's own words.
    #[error("{0}")]
    Refused(String),
    /// The connection broke in the middle of a call.
    #[error("the connection to {address} was lost: {reason}; look at `coloctl status`")]
    Lost {
        /// Where.
        address: Endpoint,
        /// Why.
        reason: String,
    },
    /// Nodes answer, and none is the one that the command is meant for.
    #[error("none of these nodes {wanted}: {}; name another with --node", found.join(", "))]
    Nobody {
        /// What it should do.
        wanted: &'static str,
        /// What each does.
        found: Vec<String>,
    },
    /// More than one could be meant.
    #[error("{} of these nodes {wanted}: {}; name one with --node", found.len(), found.join(", "))]
    Several {
        /// What it should do.
        wanted: &'static str,
        /// Which do.
        found: Vec<String>,
    },
    /// The nodes are not of one vm.
    #[error("these nodes are of several vms: {}; name the nodes of one of them with --node", found.join(", "))]
    SeveralVms {
        /// Each node and its vm.
        found: Vec<String>,
    },
    /// The console waited for a runner as long as it was told to.
    #[error("{why}")]
    GivenUp {
        /// What was found last.
        why: String,
        /// Whether any node answered.
        answers: bool,
    },
    /// Standard output was closed by its reader.
    #[error("standard output is closed")]
    ReaderLeft,
    /// Standard output cannot be written.
    #[error("cannot write to standard output: {0}; is its disk full?")]
    Output(io::Error),
}

fn remedy(tls: bool, found: &str) -> &'static str {
    match tls {
        true => "start it, check --node, and that it has certificates of the same authority",
        // Where nobody listens it is not for want of a certificate.
        false if found.contains("refused") => "start it, or check --node",
        false => "start it, or check --node; a node with certificates needs --tls",
    }
}

impl CtlError {
    /// What a node at `address` said to a call, or what became of the connection.
    pub(crate) fn from_status(address: &Endpoint, status: &Status) -> Self {
        // What the connection did has a cause on this side; what the node says has none.
        if status.source().is_some() {
            return Self::Lost { address: address.clone(), reason: root_cause(status) };
        }
        let words = clean(status.message());
        Self::Refused(match status.code() {
            Code::Unimplemented if words.is_empty() => {
                format!("the node at {address} does not know this command: does it run an older version?")
            }
            code if words.is_empty() => format!("the node at {address} refuses: {}", code.description()),
            _ => words,
        })
    }

    /// The status that the program ends with.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Usage(_) => USAGE,
            Self::NoAnswer { .. } | Self::NoneAnswers { .. } | Self::GivenUp { answers: false, .. } => {
                NO_ANSWER
            }
            _ => FAILED,
        })
    }

    /// The same in few words, for a cell of a table.
    pub(crate) fn brief(&self) -> String {
        match self {
            Self::NoAnswer { reason, .. } | Self::Lost { reason, .. } => reason.clone(),
            other => other.to_string(),
        }
    }
}

/// The innermost cause: outer ones only say that a transport failed.
pub(crate) fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    clean(&cause.to_string())
}

#[cfg(test)]
mod tests {
    use super::CtlError;
    use tonic::Status;

    #[test]
    fn a_refusal_is_passed_on_as_it_is_and_made_safe_to_show() {
        let at = "a:1".parse().unwrap();
        let said = |status: Status| CtlError::from_status(&at, &status).to_string();
        assert_eq!(said(Status::failed_precondition("pause first")), "pause first");
        assert_eq!(said(Status::failed_precondition("x\x1b[2Jy")), "x?[2Jy");
        assert!(said(Status::unimplemented("")).contains("older version"));
        assert!(said(Status::permission_denied("")).starts_with("the node at a:1 refuses: "));
    }

    #[test]
    fn a_broken_connection_is_no_refusal() {
        let at = "a:1".parse().unwrap();
        let status = Status::from_error(Box::new(std::io::Error::other("cable cut")));
        let error = CtlError::from_status(&at, &status);
        assert_eq!(error.to_string(), "the connection to a:1 was lost: cable cut; look at `coloctl status`");
    }
}
