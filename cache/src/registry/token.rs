//! Anonymous tokens: what a registry that wants one hands out to anybody who asks for it where its challenge says.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use http_auth::parser::ChallengeParser;
use reqwest::{
    Client, StatusCode, Url,
    header::{HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;

use super::{
    body,
    refusal::{Failure, words},
};

/// Replies above this are no tokens, in bytes.
const REPLY_MAX_BYTES: usize = 64 << 10;
/// A token is good for so many seconds if its registry says nothing (distribution specification, "Token Authentication").
const LIFE_SECONDS: u64 = 60;
/// No token is kept for longer, whatever its registry says.
const LIFE_MAX_SECONDS: u64 = 3600;
/// A token is not used any more when it is good for less than this: it has to last until the registry reads it.
const MARGIN_SECONDS: u64 = 10;

/// The tokens of one endpoint, by repository.
#[derive(Debug, Default)]
pub(super) struct Tokens(Mutex<HashMap<String, Token>>);

#[derive(Debug)]
struct Token {
    header: HeaderValue,
    until: Instant,
}

impl Tokens {
    /// The value of `Authorization` for this repository at `base` (scheme://host[:port]). `None` if none is wanted, or
    /// none is to be had: then the registry's own refusal says what there is to say.
    pub(super) async fn of(&self, http: &Client, base: &str, repository: &str) -> Option<HeaderValue> {
        if let Some(header) = self.remembered(repository, Instant::now()) {
            return Some(header);
        }
        match ask(http, base, repository).await {
            Ok(token) => {
                let (header, life) = token?;
                self.remember(repository, header.clone(), life);
                Some(header)
            }
            Err(error) => {
                tracing::warn!(
                    registry = base,
                    repository,
                    error = words(&error),
                    "there is no token to be had"
                );
                None
            }
        }
    }

    fn remembered(&self, repository: &str, now: Instant) -> Option<HeaderValue> {
        let tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get(repository).filter(|token| token.until > now).map(|token| token.header.clone())
    }

    fn remember(&self, repository: &str, header: HeaderValue, life: Duration) {
        let now = Instant::now();
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, token| token.until > now);
        tokens.insert(repository.to_owned(), Token { header, until: now + life });
    }
}

async fn ask(
    http: &Client,
    base: &str,
    repository: &str,
) -> Result<Option<(HeaderValue, Duration)>, Failure> {
    let greeting = http.get(format!("{base}/v2/")).send().await?;
    let challenge = greeting.headers().get(WWW_AUTHENTICATE).and_then(|value| value.to_str().ok());
    let Some(url) = challenge.and_then(|challenge| place(challenge, repository)) else { return Ok(None) };
    let response = http.get(url).send().await?;
    if response.status() != StatusCode::OK {
        return Err(Failure::refused(response, REPLY_MAX_BYTES).await);
    }
    read(&body::whole(response, REPLY_MAX_BYTES).await?).map(Some)
}

/// Where a challenge says that a token for pulling from `repository` is to be had. `None` if it asks for anything else.
fn place(challenge: &str, repository: &str) -> Option<Url> {
    let challenge = ChallengeParser::new(challenge).next()?.ok()?;
    if !challenge.scheme.eq_ignore_ascii_case("Bearer") {
        return None;
    }
    let value = |wanted: &str| {
        let named = challenge.params.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
        named.map(|(_, value)| value.to_unescaped())
    };
    let mut url = Url::parse(&value("realm")?).ok()?;
    url.query_pairs_mut().append_pair("scope", &format!("repository:{repository}:pull"));
    if let Some(service) = value("service") {
        url.query_pairs_mut().append_pair("service", &service);
    }
    Some(url)
}

/// The header that a reply makes, and for how long.
fn read(reply: &[u8]) -> Result<(HeaderValue, Duration), Failure> {
    #[derive(Deserialize)]
    struct Reply {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<u64>,
    }
    // What cannot be read is not repeated: it may be most of a token.
    let reply: Reply = serde_json::from_slice(reply).map_err(|_| Failure::NoToken("it cannot be read"))?;
    let token = reply.token.or(reply.access_token).ok_or(Failure::NoToken("there is none in it"))?;
    let header = HeaderValue::from_str(&format!("Bearer {token}"));
    let mut header = header.map_err(|_| Failure::NoToken("it has characters that no header can have"))?;
    header.set_sensitive(true);
    let life = reply.expires_in.unwrap_or(LIFE_SECONDS).min(LIFE_MAX_SECONDS);
    Ok((header, Duration::from_secs(life.saturating_sub(MARGIN_SECONDS))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_token_is_to_be_had() {
        let table = [
            (
                r#"Bearer realm="https://auth.example/token",service="r.example",scope="x""#,
                Some("https://auth.example/token?scope=repository%3Aa%2Fb%3Apull&service=r.example"),
            ),
            (
                r#"bearer Realm="http://auth.example/t?x=1""#,
                Some("http://auth.example/t?x=1&scope=repository%3Aa%2Fb%3Apull"),
            ),
            (r#"Basic realm="r.example""#, None),
            (r#"Bearer service="r.example""#, None),
            (r#"Bearer realm="no address""#, None),
            ("", None),
        ];
        for (challenge, url) in table {
            assert_eq!(place(challenge, "a/b").map(String::from).as_deref(), url, "{challenge}");
        }
    }

    #[test]
    fn what_a_reply_says() {
        let table = [
            (r#"{"token":"abc"}"#, Some(("Bearer abc", 50))),
            (r#"{"access_token":"abc","expires_in":300}"#, Some(("Bearer abc", 290))),
            (r#"{"token":"a","access_token":"b","expires_in":0}"#, Some(("Bearer a", 0))),
            (r#"{"token":"a","expires_in":18446744073709551615}"#, Some(("Bearer a", 3590))),
            (r#"{"token":"a\nb"}"#, None),
            (r#"{"token":"a\u0000"}"#, None),
            (r#"{}"#, None),
            ("<html>", None),
        ];
        for (reply, expected) in table {
            let read = read(reply.as_bytes()).ok();
            let read = read.as_ref().map(|(header, life)| (header.to_str().unwrap_or("?"), life.as_secs()));
            assert_eq!(read, expected, "{reply}");
        }
    }

    #[test]
    fn tokens_are_kept_as_long_as_they_are_good() {
        let tokens = Tokens::default();
        tokens.remember("a", HeaderValue::from_static("old"), Duration::ZERO);
        tokens.remember("b", HeaderValue::from_static("new"), Duration::from_secs(50));
        let now = Instant::now();
        assert_eq!(tokens.remembered("a", now), None);
        assert_eq!(tokens.remembered("b", now), Some(HeaderValue::from_static("new")));
        assert_eq!(tokens.remembered("b", now + Duration::from_secs(51)), None);
    }
}
