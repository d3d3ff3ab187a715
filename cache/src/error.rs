//! What can go wrong, as a caller sees it: a stable reason, a message that names the thing and the way out, metadata.
//!
//! Reasons are part of the public API (`cowshed.proto`); the mapping to gRPC codes is [`Reason::code`] and nowhere else.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::Duration,
};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// So long may a message be when it is shown, in bytes. Registries, images and containerd have a say in messages, and
/// gRPC sends them as headers, of which clients take 16 KiB: more would break all calls of the caller's connection.
const MESSAGE_MAX_BYTES: usize = 2048;
/// The same for each value of the metadata.
const VALUE_MAX_BYTES: usize = 512;

/// The `domain` of every `google.rpc.ErrorInfo` that Cowshed sends.
pub const ERROR_DOMAIN: &str = "cowshed.v1";

/// Why a request failed. The names on the wire are kept for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is documented in cowshed.proto")]
pub enum Reason {
    VmIdInvalid,
    ImageReferenceInvalid,
    PlatformInvalid,
    LeaseIdInvalid,
    PageTokenInvalid,
    TtlInvalid,
    RequestIdInvalid,
    RequestIdReused,
    DeviceInvalid,
    ModeInvalid,
    ScratchInvalid,
    TenantInvalid,
    CredentialsInvalid,
    PullPolicyInvalid,
    PrefetchInvalid,
    LeaseNotFound,
    ImageNotFound,
    PlatformNotFound,
    PrefetchNotFound,
    SpecConflict,
    RegistryDenied,
    ImageUnverified,
    SnapshotterMissing,
    SnapshotterUnfit,
    SnapshotterUnusable,
    PoolMissing,
    PoolUnusable,
    PoolUnzeroed,
    LvmUnusable,
    ImageNotPresent,
    ImageUnsupported,
    ImageInUse,
    ImagePinned,
    DeviceMismatch,
    LeaseReleased,
    Released,
    RequestOver,
    PrefetchCancelled,
    RevisionCompacted,
    PoolFull,
    QuotaExceeded,
    StateDirectoryFull,
    ContainerdFull,
    Overloaded,
    ContainerdUnavailable,
    RegistryUnavailable,
    RegistryConfiguration,
    LedgerUnusable,
    NotReady,
    Draining,
    Stopping,
    ContainerdTimeout,
    ImageCorrupt,
    ContainerdError,
    LedgerError,
    InternalError,
}

impl Reason {
    /// The gRPC code that a caller gets.
    pub fn code(self) -> Code {
        match self {
            Self::VmIdInvalid
            | Self::ImageReferenceInvalid
            | Self::PlatformInvalid
            | Self::LeaseIdInvalid
            | Self::PageTokenInvalid
            | Self::TtlInvalid
            | Self::RequestIdInvalid
            | Self::RequestIdReused
            | Self::DeviceInvalid
            | Self::ModeInvalid
            | Self::ScratchInvalid
            | Self::TenantInvalid
            | Self::CredentialsInvalid
            | Self::PullPolicyInvalid
            | Self::PrefetchInvalid => Code::InvalidArgument,
            Self::LeaseNotFound | Self::ImageNotFound | Self::PlatformNotFound | Self::PrefetchNotFound => {
                Code::NotFound
            }
            Self::SpecConflict => Code::AlreadyExists,
            Self::RegistryDenied | Self::ImageUnverified => Code::PermissionDenied,
            Self::SnapshotterUnfit
            | Self::PoolUnzeroed
            | Self::ImageNotPresent
            | Self::ImageUnsupported
            | Self::ImageInUse
            | Self::ImagePinned
            | Self::RegistryConfiguration
            | Self::LeaseReleased
            | Self::DeviceMismatch => Code::FailedPrecondition,
            Self::Released | Self::RequestOver | Self::PrefetchCancelled => Code::Aborted,
            Self::RevisionCompacted => Code::OutOfRange,
            Self::PoolFull
            | Self::QuotaExceeded
            | Self::StateDirectoryFull
            | Self::ContainerdFull
            | Self::Overloaded => Code::ResourceExhausted,
            Self::ContainerdUnavailable
            | Self::RegistryUnavailable
            | Self::SnapshotterMissing
            | Self::SnapshotterUnusable
            | Self::PoolMissing
            | Self::PoolUnusable
            | Self::LvmUnusable
            | Self::LedgerUnusable
            | Self::NotReady
            | Self::Draining
            | Self::Stopping => Code::Unavailable,
            Self::ContainerdTimeout => Code::DeadlineExceeded,
            Self::ImageCorrupt => Code::DataLoss,
            Self::ContainerdError | Self::LedgerError | Self::InternalError => Code::Internal,
        }
    }

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VmIdInvalid => "VM_ID_INVALID",
            Self::ImageReferenceInvalid => "IMAGE_REFERENCE_INVALID",
            Self::PlatformInvalid => "PLATFORM_INVALID",
            Self::LeaseIdInvalid => "LEASE_ID_INVALID",
            Self::PageTokenInvalid => "PAGE_TOKEN_INVALID",
            Self::TtlInvalid => "TTL_INVALID",
            Self::RequestIdInvalid => "REQUEST_ID_INVALID",
            Self::RequestIdReused => "REQUEST_ID_REUSED",
            Self::DeviceInvalid => "DEVICE_INVALID",
            Self::ModeInvalid => "MODE_INVALID",
            Self::ScratchInvalid => "SCRATCH_INVALID",
            Self::TenantInvalid => "TENANT_INVALID",
            Self::CredentialsInvalid => "CREDENTIALS_INVALID",
            Self::PullPolicyInvalid => "PULL_POLICY_INVALID",
            Self::PrefetchInvalid => "PREFETCH_INVALID",
            Self::LeaseNotFound => "LEASE_NOT_FOUND",
            Self::ImageNotFound => "IMAGE_NOT_FOUND",
            Self::PlatformNotFound => "PLATFORM_NOT_FOUND",
            Self::PrefetchNotFound => "PREFETCH_NOT_FOUND",
            Self::SpecConflict => "SPEC_CONFLICT",
            Self::RegistryDenied => "REGISTRY_DENIED",
            Self::ImageUnverified => "IMAGE_UNVERIFIED",
            Self::SnapshotterMissing => "SNAPSHOTTER_MISSING",
            Self::SnapshotterUnfit => "SNAPSHOTTER_UNFIT",
            Self::SnapshotterUnusable => "SNAPSHOTTER_UNUSABLE",
            Self::PoolMissing => "POOL_MISSING",
            Self::PoolUnusable => "POOL_UNUSABLE",
            Self::PoolUnzeroed => "POOL_UNZEROED",
            Self::LvmUnusable => "LVM_UNUSABLE",
            Self::ImageNotPresent => "IMAGE_NOT_PRESENT",
            Self::ImageUnsupported => "IMAGE_UNSUPPORTED",
            Self::ImageInUse => "IMAGE_IN_USE",
            Self::ImagePinned => "IMAGE_PINNED",
            Self::DeviceMismatch => "DEVICE_MISMATCH",
            Self::LeaseReleased => "LEASE_RELEASED",
            Self::Released => "RELEASED",
            Self::RequestOver => "REQUEST_OVER",
            Self::PrefetchCancelled => "PREFETCH_CANCELLED",
            Self::RevisionCompacted => "REVISION_COMPACTED",
            Self::PoolFull => "POOL_FULL",
            Self::QuotaExceeded => "QUOTA_EXCEEDED",
            Self::Overloaded => "OVERLOADED",
            Self::StateDirectoryFull => "STATE_DIRECTORY_FULL",
            Self::ContainerdFull => "CONTAINERD_FULL",
            Self::ContainerdUnavailable => "CONTAINERD_UNAVAILABLE",
            Self::RegistryUnavailable => "REGISTRY_UNAVAILABLE",
            Self::RegistryConfiguration => "REGISTRY_CONFIGURATION",
            Self::LedgerUnusable => "LEDGER_UNUSABLE",
            Self::NotReady => "NOT_READY",
            Self::Draining => "DRAINING",
            Self::Stopping => "STOPPING",
            Self::ContainerdTimeout => "CONTAINERD_TIMEOUT",
            Self::ImageCorrupt => "IMAGE_CORRUPT",
            Self::ContainerdError => "CONTAINERD_ERROR",
            Self::LedgerError => "LEDGER_ERROR",
            Self::InternalError => "INTERNAL_ERROR",
        }
    }
}

/// A failed request. Cheap to clone: callers that share a pull share its failure.
#[derive(Clone, Debug)]
pub struct Error(Arc<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    reason: Reason,
    message: String,
    metadata: BTreeMap<&'static str, String>,
    retry_after: Option<Duration>,
}

impl Error {
    /// `message` is a sentence without a full stop: what is wrong with which thing, and the way out.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            reason,
            message: message.into(),
            metadata: BTreeMap::new(),
            retry_after: None,
        }))
    }

    /// Adds a field, id or path by name, for programs.
    #[must_use]
    pub fn with(self, key: &'static str, value: impl fmt::Display) -> Self {
        let mut inner = Arc::unwrap_or_clone(self.0);
        inner.metadata.insert(key, value.to_string());
        Self(Arc::new(inner))
    }

    /// Adds how long to wait before the next try.
    #[must_use]
    pub fn retry_after(self, after: Duration) -> Self {
        let mut inner = Arc::unwrap_or_clone(self.0);
        inner.retry_after = Some(after);
        Self(Arc::new(inner))
    }

    /// Puts `context` and a colon before the message.
    #[must_use]
    pub fn context(self, context: impl fmt::Display) -> Self {
        let mut inner = Arc::unwrap_or_clone(self.0);
        inner.message = format!("{context}: {}", inner.message);
        Self(Arc::new(inner))
    }

    /// Puts a semicolon and `more` after the message.
    #[must_use]
    pub fn and(self, more: impl fmt::Display) -> Self {
        let mut inner = Arc::unwrap_or_clone(self.0);
        inner.message = format!("{}; {more}", inner.message);
        Self(Arc::new(inner))
    }

    /// Why.
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// What was added by this name.
    pub(crate) fn detail(&self, key: &str) -> Option<&str> {
        self.0.metadata.get(key).map(String::as_str)
    }

    /// The same as a gRPC status with `google.rpc.ErrorInfo`, and `RetryInfo` if it says when to try again; bounded whatever went into it.
    pub fn to_status(&self) -> Status {
        let value = |(key, value): (&&str, &String)| ((*key).to_owned(), shown(value, VALUE_MAX_BYTES));
        let metadata: HashMap<_, _> = self.0.metadata.iter().map(value).collect();
        let mut details = ErrorDetails::with_error_info(self.0.reason.as_str(), ERROR_DOMAIN, metadata);
        if let Some(after) = self.0.retry_after {
            details.set_retry_info(Some(after));
        }
        Status::with_error_details(self.0.reason.code(), self.to_string(), details)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&shown(&self.0.message, MESSAGE_MAX_BYTES))
    }
}

/// `text` with its control characters escaped, so that it can end no line of a log and no header, and cut to at most
/// `limit` bytes.
pub(crate) fn shown(text: &str, limit: usize) -> String {
    const CUT: &str = "…";
    let mut shown = String::new();
    // What still leaves room for the sign that more was there.
    let mut whole = 0;
    for character in text.chars() {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
        if shown.len() > limit {
            shown.truncate(whole);
            shown.push_str(CUT);
            return shown;
        }
        if shown.len() + CUT.len() <= limit {
            whole = shown.len();
        }
    }
    shown
}

impl std::error::Error for Error {}

/// As a lease keeps it.
impl From<&Error> for cowshed_leases::Failure {
    fn from(error: &Error) -> Self {
        Self { reason: error.reason().as_str().to_owned(), message: error.to_string() }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        error.to_status()
    }
}

/// What the service's fallible functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_shown_is_cut_at_characters_and_controls_nothing() {
        let table = [
            ("", 8, ""),
            ("12345678", 8, "12345678"),
            ("123456789", 8, "12345…"),
            ("äöüß", 8, "äöüß"),
            ("äöüßx", 8, "äö…"),
            ("a\nb\r\u{1b}", 20, "a\\nb\\r\\u{1b}"),
            ("1234567\n", 8, "12345…"),
            ("12\u{1b}34", 7, "12…"),
        ];
        for (text, limit, expected) in table {
            let shown = shown(text, limit);
            assert_eq!(shown, expected, "{text:?}");
            assert!(shown.len() <= limit, "{text:?}");
        }
    }

    #[test]
    fn a_status_fits_the_headers_that_clients_take() {
        // The worst: each of these bytes is three in a header.
        let much = "ä\n".repeat(100_000);
        let mut error = Error::new(Reason::ImageUnsupported, much.clone()).context(&much);
        for key in ["image", "digest", "platform", "available", "registry", "field"] {
            error = error.with(key, &much);
        }
        assert!(error.to_string().len() <= MESSAGE_MAX_BYTES);
        let status = error.to_status();
        let details = status.get_error_details();
        let values: Vec<&String> = details.error_info().unwrap().metadata.values().collect();
        assert_eq!(values.len(), 6);
        assert!(values.iter().all(|value| value.len() <= VALUE_MAX_BYTES && !value.contains('\n')));
        let mut headers = tonic::metadata::MetadataMap::new().into_headers();
        status.add_header(&mut headers).unwrap();
        let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
        assert!(bytes < 16 << 10, "{bytes} bytes of headers");
    }
}
