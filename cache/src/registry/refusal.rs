//! What a registry's refusal means: a reason for the caller, whether it may pass, and words without secrets.

use std::time::Duration;

use oci_client::errors::{OciEnvelope, OciErrorCode};
use reqwest::{Response, StatusCode};
use thiserror::Error as ThisError;

use super::body;
use crate::error::{Reason, shown};

/// Words above this are cut, in bytes.
const WORDS_MAX_BYTES: usize = 500;

/// Why an endpoint did not give what it was asked for.
#[derive(Debug, ThisError)]
pub(super) enum Failure {
    /// No connection, or one that broke.
    #[error(transparent)]
    Request(#[from] reqwest::Error),
    /// It answered, and refused.
    #[error("{status} for {url}{}", after_colon(.text))]
    Refused {
        status: StatusCode,
        url: String,
        /// As the distribution specification names them; empty if it named none.
        codes: Vec<OciErrorCode>,
        /// What it said; may be empty.
        text: String,
    },
    /// It sent more than it may.
    #[error("it has more than {0} bytes")]
    TooLarge(usize),
    /// It was not done in time.
    #[error("it was not there after {} s", .0.as_secs())]
    Late(Duration),
    /// What was to be a token is none.
    #[error("the reply with the token: {0}")]
    NoToken(&'static str),
}

impl Failure {
    /// What `response` says, as far as the first `limit` bytes of its body tell.
    pub(super) async fn refused(response: Response, limit: usize) -> Self {
        let (status, url) = (response.status(), response.url().to_string());
        Self::of_status(status, url, &body::beginning(response, limit).await)
    }

    fn of_status(status: StatusCode, url: String, body: &[u8]) -> Self {
        let envelope: Option<OciEnvelope> = serde_json::from_slice(body).ok();
        let (codes, text) = match envelope.filter(|_| status.is_client_error()) {
            Some(OciEnvelope { errors }) => {
                let texts: Vec<String> = errors.iter().map(|error| error.message.clone()).collect();
                (errors.into_iter().map(|error| error.code).collect(), texts.join("; "))
            }
            None => (Vec::new(), String::from_utf8_lossy(body).into_owned()),
        };
        Self::Refused { status, url, codes, text }
    }
}

fn after_colon(text: &str) -> String {
    if text.trim().is_empty() { String::new() } else { format!(": {text}") }
}

/// Whether asking again in a moment may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outlook {
    /// Overload, or a connection that broke.
    Passing,
    /// A decision, or nobody there; waiting for another timeout would not be worth it.
    Lasting,
}

pub(super) fn reason(failure: &Failure) -> Reason {
    match failure {
        // Whatever it says besides.
        Failure::Refused { status: StatusCode::UNAUTHORIZED, .. } => Reason::RegistryDenied,
        Failure::Refused { status, codes, .. } => {
            codes.iter().find_map(by_code).unwrap_or_else(|| by_status(*status))
        }
        Failure::TooLarge(_) => Reason::ImageUnsupported,
        Failure::Request(_) | Failure::Late(_) | Failure::NoToken(_) => Reason::RegistryUnavailable,
    }
}

fn by_status(status: StatusCode) -> Reason {
    match status {
        StatusCode::NOT_FOUND => Reason::ImageNotFound,
        StatusCode::FORBIDDEN => Reason::RegistryDenied,
        _ => Reason::RegistryUnavailable,
    }
}

#[allow(clippy::wildcard_enum_match_arm, reason = "what is none of these decides nothing")]
fn by_code(code: &OciErrorCode) -> Option<Reason> {
    match code {
        OciErrorCode::ManifestUnknown
        | OciErrorCode::ManifestBlobUnknown
        | OciErrorCode::NameUnknown
        | OciErrorCode::NameInvalid
        | OciErrorCode::BlobUnknown
        | OciErrorCode::NotFound => Some(Reason::ImageNotFound),
        OciErrorCode::Unauthorized | OciErrorCode::Denied => Some(Reason::RegistryDenied),
        OciErrorCode::Toomanyrequests => Some(Reason::RegistryUnavailable),
        _ => None,
    }
}

pub(super) fn outlook(failure: &Failure) -> Outlook {
    let passing = match failure {
        Failure::Refused { status, codes, .. } => {
            *status == StatusCode::TOO_MANY_REQUESTS
                || status.is_server_error()
                || codes.contains(&OciErrorCode::Toomanyrequests)
        }
        Failure::Request(error) => !error.is_connect() && !error.is_timeout() && !error.is_builder(),
        Failure::TooLarge(_) | Failure::Late(_) | Failure::NoToken(_) => false,
    };
    if passing { Outlook::Passing } else { Outlook::Lasting }
}

/// Whether it may be that the endpoint, host[:port], which was asked with TLS, speaks plain HTTP.
pub(super) fn may_be_plain(failure: &Failure, authority: &str) -> bool {
    let Failure::Request(error) = failure else { return false };
    let sources = || std::iter::successors(std::error::Error::source(error), |error| error.source());
    let says = |what: &str| sources().any(|error| error.to_string().starts_with(what));
    if !error.is_connect() || says("dns error") {
        return false;
    }
    // Without a port it may listen on HTTP's alone.
    if error.is_timeout() || says("tcp connect error") {
        return !has_port(authority);
    }
    // Who has TLS, and another certificate or version, is no such server.
    sources().find_map(of_tls).is_none_or(|error| matches!(error, rustls::Error::InvalidMessage(_)))
}

fn has_port(authority: &str) -> bool {
    authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
}

/// An I/O error tells of its cause's causes only.
fn of_tls<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let within = |error: &'a std::io::Error| of_tls(error.get_ref()?);
    error.downcast_ref().or_else(|| error.downcast_ref::<std::io::Error>().and_then(within))
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
    shown(&without_queries(&text), WORDS_MAX_BYTES)
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
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn refused(status: u16, body: &str) -> Failure {
        let status = StatusCode::from_u16(status).unwrap();
        Failure::of_status(status, "http://r.example/v2/".to_owned(), body.as_bytes())
    }

    #[test]
    fn meanings() {
        let envelope = |status: u16, code: &str| {
            refused(status, &format!(r#"{{"errors":[{{"code":"{code}","message":"m"}}]}}"#))
        };
        use Outlook::{Lasting, Passing};
        let table = [
            (refused(404, "no"), Reason::ImageNotFound, Lasting),
            (refused(401, ""), Reason::RegistryDenied, Lasting),
            (refused(403, "no"), Reason::RegistryDenied, Lasting),
            (refused(429, "no"), Reason::RegistryUnavailable, Passing),
            (refused(503, "no"), Reason::RegistryUnavailable, Passing),
            (refused(204, ""), Reason::RegistryUnavailable, Lasting),
            (envelope(404, "MANIFEST_UNKNOWN"), Reason::ImageNotFound, Lasting),
            (envelope(400, "NAME_UNKNOWN"), Reason::ImageNotFound, Lasting),
            (envelope(404, "DENIED"), Reason::RegistryDenied, Lasting),
            (envelope(403, "TOOMANYREQUESTS"), Reason::RegistryUnavailable, Passing),
            (envelope(400, "SOMETHING_ELSE"), Reason::RegistryUnavailable, Lasting),
            (envelope(404, "SOMETHING_ELSE"), Reason::ImageNotFound, Lasting),
            (envelope(401, "MANIFEST_UNKNOWN"), Reason::RegistryDenied, Lasting),
            (envelope(500, "DENIED"), Reason::RegistryUnavailable, Passing),
            (Failure::TooLarge(1), Reason::ImageUnsupported, Lasting),
            (Failure::Late(Duration::ZERO), Reason::RegistryUnavailable, Lasting),
        ];
        for (failure, expected, expected_outlook) in table {
            assert_eq!((reason(&failure), outlook(&failure)), (expected, expected_outlook), "{failure:?}");
        }
    }

    #[test]
    fn the_query_of_a_url_is_not_repeated() {
        let text = "failed for url (https://s3.example/x?X-Signature=abc&y=z) in transit, really?";
        assert_eq!(without_queries(text), "failed for url (https://s3.example/x?…) in transit, really?");
    }

    #[test]
    fn words_are_one_short_line() {
        let failure = refused(500, &format!("<html>\r\n{}", "x".repeat(100_000)));
        let words = words(&failure);
        assert!(
            words.starts_with("500 Internal Server Error for http://r.example/v2/: <html>\\r\\n"),
            "{words}"
        );
        assert!(words.len() <= WORDS_MAX_BYTES, "{words}");
    }
}
