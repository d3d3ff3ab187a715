//! What an operation of the snapshotter can fail with, and what containerd is told of it.

use thiserror::Error as ThisError;

/// As containerd's `errdefs` distinguish them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request makes no sense.
    InvalidArgument,
    /// No such snapshot.
    NotFound,
    /// There is one of this name.
    AlreadyExists,
    /// It is in a state that does not allow it.
    FailedPrecondition,
    /// The pool, its ids or the state directory are used up.
    ResourceExhausted,
    /// Not now.
    Unavailable,
    /// Store or pool are damaged.
    DataLoss,
    /// Nobody waits for it any more.
    Cancelled,
    /// The kernel or a helper refused.
    Internal,
}

/// A refusal, in words for the one who reads it at night.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[error("{message}")]
pub struct Error {
    /// Its kind.
    pub code: Code,
    message: String,
}

/// What operations return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// `message` names key, id or path, and the way out.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// Puts what was being done before it.
    #[must_use]
    pub fn context(self, what: impl std::fmt::Display) -> Self {
        Self { code: self.code, message: format!("{what}: {}", self.message) }
    }

    /// Keeps the failure of undoing beside the failure that made it necessary.
    #[must_use]
    pub fn and(self, second: impl std::fmt::Display) -> Self {
        Self { code: self.code, message: format!("{} (and then: {second})", self.message) }
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let code = match error.code {
            Code::InvalidArgument => tonic::Code::InvalidArgument,
            Code::NotFound => tonic::Code::NotFound,
            Code::AlreadyExists => tonic::Code::AlreadyExists,
            Code::FailedPrecondition => tonic::Code::FailedPrecondition,
            Code::ResourceExhausted => tonic::Code::ResourceExhausted,
            Code::Unavailable => tonic::Code::Unavailable,
            Code::DataLoss => tonic::Code::DataLoss,
            Code::Cancelled => tonic::Code::Cancelled,
            Code::Internal => tonic::Code::Internal,
        };
        Self::new(code, error.message)
    }
}
