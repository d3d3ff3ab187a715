//! What a registry's refusal means: a reason for the caller, whether it may pass, and words without secrets.

use oci_client::errors::{OciDistributionError, OciErrorCode};

use crate::error::Reason;

/// Whether asking again in a moment may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outlook {
    /// Overload, or a connection that broke.
    Passing,
    /// A decision, or nobody there; waiting for another timeout would not be worth it.
    Lasting,
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "whatever else the registry client can say is no decision of the registry's"
)]
pub(super) fn reason(error: &OciDistributionError) -> Reason {
    match error {
        OciDistributionError::ImageManifestNotFoundError(_)
        | OciDistributionError::ServerError { code: 404, .. } => Reason::ImageNotFound,
        OciDistributionError::RegistryError { envelope, .. } => {
            let codes = envelope.errors.iter().map(|error| by_code(&error.code));
            codes
                .into_iter()
                .find(|reason| *reason != Reason::RegistryUnavailable)
                .unwrap_or(Reason::RegistryUnavailable)
        }
        OciDistributionError::AuthenticationFailure(_)
        | OciDistributionError::UnauthorizedError { .. }
        | OciDistributionError::ServerError { code: 401 | 403, .. } => Reason::RegistryDenied,
        OciDistributionError::DigestError(_) => Reason::ImageCorrupt,
        _ => Reason::RegistryUnavailable,
    }
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "whatever else the registry client can say is no decision of the registry's"
)]
fn by_code(code: &OciErrorCode) -> Reason {
    match code {
        OciErrorCode::ManifestUnknown
        | OciErrorCode::ManifestBlobUnknown
        | OciErrorCode::NameUnknown
        | OciErrorCode::NameInvalid
        | OciErrorCode::BlobUnknown
        | OciErrorCode::NotFound => Reason::ImageNotFound,
        OciErrorCode::Unauthorized | OciErrorCode::Denied => Reason::RegistryDenied,
        _ => Reason::RegistryUnavailable,
    }
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "whatever else the registry client can say is no decision of the registry's"
)]
pub(super) fn outlook(error: &OciDistributionError) -> Outlook {
    let passing = match error {
        OciDistributionError::ServerError { code, .. } => *code == 429 || (500..600).contains(code),
        OciDistributionError::RegistryError { envelope, .. } => {
            envelope.errors.iter().any(|error| error.code == OciErrorCode::Toomanyrequests)
        }
        OciDistributionError::RequestError(error) => {
            !error.is_connect() && !error.is_timeout() && !error.is_builder()
        }
        _ => false,
    };
    if passing { Outlook::Passing } else { Outlook::Lasting }
}

/// The error with its sources: a failed request says "connection refused" in the third of them only.
pub(super) fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    without_queries(&text).chars().take(500).collect()
}

/// Registries redirect to storage with URLs whose query is a credential.
fn without_queries(text: &str) -> String {
    let word = |word: &str| match word.split_once('?') {
        Some((url, _)) if url.contains("://") => {
            format!("{url}{}", if url.contains('(') { "?…)" } else { "?…" })
        }
        _ => word.to_owned(),
    };
    text.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(code: u16) -> OciDistributionError {
        OciDistributionError::ServerError { code, url: String::new(), message: "no".to_owned() }
    }

    #[test]
    fn meanings() {
        let envelope = |code: &str| {
            let text = format!(r#"{{"errors":[{{"code":"{code}","message":"m"}}]}}"#);
            match serde_json::from_str(&text) {
                Ok(envelope) => OciDistributionError::RegistryError { envelope, url: String::new() },
                Err(error) => OciDistributionError::JsonError(error),
            }
        };
        use Outlook::{Lasting, Passing};
        let table = [
            (server(404), Reason::ImageNotFound, Lasting),
            (server(401), Reason::RegistryDenied, Lasting),
            (server(403), Reason::RegistryDenied, Lasting),
            (server(429), Reason::RegistryUnavailable, Passing),
            (server(503), Reason::RegistryUnavailable, Passing),
            (envelope("MANIFEST_UNKNOWN"), Reason::ImageNotFound, Lasting),
            (envelope("NAME_UNKNOWN"), Reason::ImageNotFound, Lasting),
            (envelope("DENIED"), Reason::RegistryDenied, Lasting),
            (envelope("TOOMANYREQUESTS"), Reason::RegistryUnavailable, Passing),
            (envelope("SOMETHING_ELSE"), Reason::RegistryUnavailable, Lasting),
            (OciDistributionError::UnauthorizedError { url: String::new() }, Reason::RegistryDenied, Lasting),
        ];
        for (error, expected, expected_outlook) in table {
            assert_eq!((reason(&error), outlook(&error)), (expected, expected_outlook), "{error:?}");
        }
    }

    #[test]
    fn the_query_of_a_url_is_not_repeated() {
        let text = "failed for url (https://s3.example/x?X-Signature=abc&y=z) in transit, really?";
        assert_eq!(without_queries(text), "failed for url (https://s3.example/x?…) in transit, really?");
    }
}
