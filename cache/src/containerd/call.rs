//! One call to containerd: namespace and lease headers, a deadline, and what its failure means.

use std::{future::Future, time::Duration};

use thiserror::Error as ThisError;
use tonic::{Code, Request, Response, Status, metadata::MetadataValue};

use super::Containerd;
use crate::error::{Error, Reason};

/// A call that containerd did not answer with success.
#[derive(Debug, ThisError)]
pub enum CallError {
    /// containerd answered, or the connection to it failed.
    #[error("containerd: {call}: {}", .status.message())]
    Status {
        /// Which call.
        call: &'static str,
        /// Its answer; `Unavailable` if the connection failed.
        status: Box<Status>,
    },
    /// No answer in time.
    #[error("containerd: {call}: no answer within {} s", .after.as_secs())]
    Timeout {
        /// Which call.
        call: &'static str,
        /// The deadline that passed.
        after: Duration,
    },
}

impl CallError {
    fn is(&self, code: Code) -> bool {
        matches!(self, Self::Status { status, .. } if status.code() == code)
    }

    /// What was named does not exist.
    pub fn is_not_found(&self) -> bool {
        self.is(Code::NotFound)
    }

    /// What was to be made is there.
    pub fn is_already_exists(&self) -> bool {
        self.is(Code::AlreadyExists)
    }

    /// containerd could not be reached, or asks to try later (a locked content reference).
    pub fn is_unavailable(&self) -> bool {
        self.is(Code::Unavailable)
    }

    /// containerd has no connection to a snapshotter that it has to ask, and so has not asked it. gRPC for Go says so, in which it is
    /// written, and of nothing that was sent.
    pub fn is_without_snapshotter(&self) -> bool {
        let says = |status: &Status| status.message().contains("connection error: desc = ");
        self.is_unavailable() && matches!(self, Self::Status { status, .. } if says(status))
    }

    /// It has not answered in time, and may be at it still.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }

    /// What containerd or the connection said.
    pub fn message(&self) -> &str {
        match self {
            Self::Status { status, .. } => status.message(),
            Self::Timeout { .. } => "timeout",
        }
    }
}

impl Containerd {
    /// A request in our namespace.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        insert(&mut request, "containerd-namespace", &self.namespace);
        request
    }

    /// A request in our namespace whose effects are held by the containerd lease `lease`.
    pub(super) fn leased<T>(&self, lease: &str, message: T) -> Request<T> {
        let mut request = self.request(message);
        insert(&mut request, "containerd-lease", lease);
        request
    }

    /// Awaits `call`, for the configured time at the most.
    pub(super) async fn call<T>(
        &self,
        name: &'static str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, CallError> {
        within(name, self.call_timeout, call).await
    }

    /// What a failed call means to a caller of Cowshed.
    pub fn explain(&self, error: CallError) -> Error {
        let address = self.address.display();
        match &error {
            CallError::Timeout { .. } => Error::new(
                Reason::ContainerdTimeout,
                format!("{error}; it hangs or is overloaded, see its log; the request can be repeated"),
            )
            .with("address", address),
            CallError::Status { call, status } => match classify(status, &self.snapshotter) {
                Reason::ContainerdUnavailable if error.is_without_snapshotter() => Error::new(
                    Reason::ContainerdUnavailable,
                    format!(
                        "containerd at {address} has no connection to the snapshotter {:?} now ({}); it tries again by itself, \
                         repeat the request; if that lasts, `ctr plugins ls` and its log say why",
                        self.snapshotter,
                        status.message()
                    ),
                )
                .with("address", address)
                .with("snapshotter", &self.snapshotter),
                Reason::ContainerdUnavailable => Error::new(
                    Reason::ContainerdUnavailable,
                    format!("containerd does not answer at {address} ({}); start it, then repeat", status.message()),
                )
                .with("address", address),
                Reason::SnapshotterMissing => Error::new(
                    Reason::SnapshotterMissing,
                    format!(
                        "containerd at {address} has no working snapshotter {:?}: configure it in containerd's \
                         configuration, or name another one in [containerd] snapshotter; `ctr plugins ls` says why",
                        self.snapshotter
                    ),
                )
                .with("snapshotter", &self.snapshotter),
                Reason::PoolFull => Error::new(
                    Reason::PoolFull,
                    format!("the thin pool is full ({}); extend it or release disks, then repeat", status.message()),
                ),
                Reason::PoolMissing => Error::new(
                    Reason::PoolMissing,
                    format!("the thin pool is not usable ({}); activate it, then repeat", status.message()),
                ),
                Reason::ContainerdFull => Error::new(
                    Reason::ContainerdFull,
                    format!("containerd's root directory is full ({}); free space there, then repeat", status.message()),
                ),
                reason => Error::new(reason, format!("containerd: {call}: {}", status.message())),
            }
            .with("call", call),
        }
    }
}

/// Bounds one call in time.
pub(super) async fn within<T>(
    call: &'static str,
    after: Duration,
    future: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(after, future).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(CallError::Status { call, status: Box::new(status) }),
        Err(_) => Err(CallError::Timeout { call, after }),
    }
}

/// containerd has no code for most of these: what its error text says is all there is.
fn classify(status: &Status, snapshotter: &str) -> Reason {
    let message = status.message();
    let text = message.to_ascii_lowercase();
    // One with a source was made on this side of the connection: what was at the other end has gone in the middle of a call.
    // In order, it takes back what it was about to do.
    if matches!(status.code(), Code::Unavailable | Code::Cancelled)
        || std::error::Error::source(status).is_some()
        || text.contains("transport error")
        || text.contains("error trying to connect")
        || text.contains("h2 protocol error")
    {
        return Reason::ContainerdUnavailable;
    }
    if text.contains("snapshotter not loaded") && text.contains(&snapshotter.to_ascii_lowercase()) {
        return Reason::SnapshotterMissing;
    }
    if text.contains("no space left on device") {
        let pool = text.contains("thin") || text.contains("dmsetup") || text.contains("device-mapper");
        return if pool { Reason::PoolFull } else { Reason::ContainerdFull };
    }
    let device = text.contains("dmsetup") || text.contains("/dev/mapper") || text.contains("pool");
    if device
        && (text.contains("no such device")
            || text.contains("does not exist")
            || text.contains("no such file"))
    {
        return Reason::PoolMissing;
    }
    Reason::ContainerdError
}

fn insert<T>(request: &mut Request<T>, key: &'static str, value: &str) {
    // Names come from the configuration, checked there, and from us; one that is no header value is left out, and
    // containerd then says that the namespace is required.
    if let Ok(value) = MetadataValue::try_from(value) {
        request.metadata_mut().insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_gone_is_unavailable() {
        let broken = std::io::Error::other("error reading a body from connection");
        for (status, reason) in [
            (Status::unavailable("error reading server preface"), Reason::ContainerdUnavailable),
            (Status::unknown("transport error"), Reason::ContainerdUnavailable),
            (Status::cancelled("context canceled"), Reason::ContainerdUnavailable),
            (Status::from_error(Box::new(broken)), Reason::ContainerdUnavailable),
            (Status::internal("h2 protocol error: error reading a body"), Reason::ContainerdUnavailable),
            (Status::unknown("snapshot x: internal error"), Reason::ContainerdError),
        ] {
            assert_eq!(classify(&status, "cowshed"), reason, "{status:?}");
        }
    }
}
