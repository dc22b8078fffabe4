//! Why the control plane refuses, for programs: beside its code and its text, a status carries one `ErrorInfo` of
//! google.rpc in its details, as `admin.proto` lists them.

use std::collections::HashMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Whose reasons they are.
const DOMAIN: &str = "colo.v1";

/// Why something is refused. The names are part of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The request itself is wrong.
    BadRequest,
    /// Another node, or another part, has to be asked.
    OtherNode,
    /// This node is bound to no vm.
    Unbound,
    /// Not in what the node does at the moment.
    NotNow,
    /// A node that the register names is not fenced.
    NotFenced,
    /// This node has no copy that could be run.
    NoCopy,
    /// It was begun and given up; nothing has changed.
    GivenUp,
    /// The process starts or ends, or something that it needs is away.
    Unavailable,
    /// No answer in time; what was asked for may still happen.
    NoAnswer,
    /// The system refuses.
    Internal,
    /// What this node keeps cannot be read.
    DataLoss,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 11] = [
        Self::BadRequest,
        Self::OtherNode,
        Self::Unbound,
        Self::NotNow,
        Self::NotFenced,
        Self::NoCopy,
        Self::GivenUp,
        Self::Unavailable,
        Self::NoAnswer,
        Self::Internal,
        Self::DataLoss,
    ];

    /// As it is in the details.
    pub fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "BAD_REQUEST",
            Self::OtherNode => "OTHER_NODE",
            Self::Unbound => "UNBOUND",
            Self::NotNow => "NOT_NOW",
            Self::NotFenced => "NOT_FENCED",
            Self::NoCopy => "NO_COPY",
            Self::GivenUp => "GIVEN_UP",
            Self::Unavailable => "UNAVAILABLE",
            Self::NoAnswer => "NO_ANSWER",
            Self::Internal => "INTERNAL",
            Self::DataLoss => "DATA_LOSS",
        }
    }

    /// The code of a status with it.
    pub fn code(self) -> Code {
        match self {
            Self::BadRequest => Code::InvalidArgument,
            Self::OtherNode | Self::Unbound | Self::NotNow | Self::NotFenced | Self::NoCopy => {
                Code::FailedPrecondition
            }
            Self::GivenUp => Code::Aborted,
            Self::Unavailable => Code::Unavailable,
            Self::NoAnswer => Code::DeadlineExceeded,
            Self::Internal => Code::Internal,
            Self::DataLoss => Code::DataLoss,
        }
    }

    /// A status with this text.
    pub fn status(self, text: impl Into<String>) -> Status {
        self.about(text, &[])
    }

    /// A status with this text, and more that a program may want.
    pub fn about(self, text: impl Into<String>, more: &[(&str, String)]) -> Status {
        let more: HashMap<_, _> =
            more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        let details = ErrorDetails::with_error_info(self.name(), DOMAIN, more);
        Status::with_error_details(self.code(), text, details)
    }
}

/// Why what the operator asked of a node does not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WhyNot {
    /// For programs.
    pub reason: Reason,
    /// For people.
    pub text: String,
}

impl From<WhyNot> for Status {
    fn from(why: WhyNot) -> Self {
        why.reason.status(why.text)
    }
}

#[cfg(test)]
mod tests {
    use super::{DOMAIN, Reason};
    use tonic_types::StatusExt;

    #[test]
    fn a_status_carries_its_reason() {
        for reason in Reason::ALL {
            let status = reason.about("a text", &[("register", "solo on a in term 3".to_owned())]);
            assert_eq!((status.code(), status.message()), (reason.code(), "a text"));
            let info = status.get_details_error_info().unwrap();
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason.name(), DOMAIN));
            assert_eq!(info.metadata["register"], "solo on a in term 3");
        }
    }

    #[test]
    fn the_api_lists_them_all() {
        let api = include_str!("../../../proto/admin.proto");
        for reason in Reason::ALL {
            let line = format!("//   {} ", reason.name());
            assert!(api.contains(&line), "admin.proto does not list {}", reason.name());
        }
    }
}
