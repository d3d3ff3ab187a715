//! What a registry's challenge wants of us: a token, which is handed out where the challenge says, to anybody or to who we
//! are, or our name and password themselves.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use base64::Engine as _;
use http_auth::parser::ChallengeParser;
use reqwest::{
    Client, RequestBuilder, StatusCode, Url,
    header::{CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;

use super::{
    body,
    credentials::Credential,
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

/// The tokens of one endpoint, by repository, for one identity.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    credential: Option<Credential>,
    known: Mutex<HashMap<String, Token>>,
}

#[derive(Debug)]
struct Token {
    header: HeaderValue,
    until: Instant,
}

impl Tokens {
    /// For who has this credential; without one, for anybody.
    pub(super) fn new(credential: Option<Credential>) -> Self {
        Self { credential, known: Mutex::default() }
    }

    /// What to say to the registry at `base` (scheme://host[:port]) in the first place.
    pub(super) async fn before(&self, http: &Client, base: &str, repository: &str) -> Option<HeaderValue> {
        let known = self.known(repository);
        if known.is_some() || self.credential.is_none() {
            return known;
        }
        match http.get(format!("{base}/v2/")).send().await {
            Ok(greeting) if is_of(base, greeting.url()) => {
                self.wanted(http, base, repository, greeting.headers(), None).await
            }
            // What it leads to has no right to ask; and if it does not answer, it will be seen with what is asked for.
            _ => None,
        }
    }

    /// The value of `Authorization` for this repository, if one was wanted before and is still good.
    fn known(&self, repository: &str) -> Option<HeaderValue> {
        self.remembered(repository, Instant::now())
    }

    /// What to say instead of `refused` to the registry that has answered 401 with these headers. `None` if there is nothing
    /// else to be had: then the registry's own refusal says what there is to say.
    pub(super) async fn wanted(
        &self,
        http: &Client,
        base: &str,
        repository: &str,
        headers: &HeaderMap,
        refused: Option<&HeaderValue>,
    ) -> Option<HeaderValue> {
        // Another request may have got a new one meanwhile.
        if let Some(header) = self.known(repository).filter(|header| Some(header) != refused) {
            return Some(header);
        }
        match self.ask(http, base, repository, headers).await {
            Ok(token) => {
                let (header, life) = token?;
                self.remember(repository, header.clone(), life);
                Some(header).filter(|header| Some(header) != refused)
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
        let tokens = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get(repository).filter(|token| token.until > now).map(|token| token.header.clone())
    }

    fn remember(&self, repository: &str, header: HeaderValue, life: Duration) {
        let now = Instant::now();
        let mut tokens = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, token| token.until > now);
        tokens.insert(repository.to_owned(), Token { header, until: now + life });
    }
}

/// Whether it is the registry at `base` itself that has answered, not what it has led to.
pub(super) fn is_of(base: &str, url: &Url) -> bool {
    Url::parse(base).is_ok_and(|base| base.origin() == url.origin())
}

impl Tokens {
    async fn ask(
        &self,
        http: &Client,
        base: &str,
        repository: &str,
        headers: &HeaderMap,
    ) -> Result<Option<(HeaderValue, Duration)>, Failure> {
        let challenges = headers.get_all(WWW_AUTHENTICATE).iter();
        let wanted =
            challenges.filter_map(|value| wanted(value.to_str().ok()?, repository)).max_by_key(Wanted::rank);
        match (wanted, &self.credential) {
            (Some(Wanted::Token(url)), credential) => {
                // What is for TLS does not go without.
                if credential.is_some() && base.starts_with("https://") && url.scheme() != "https" {
                    return Err(Failure::NoToken("it is to be had over plain HTTP"));
                }
                let response = token_request(http, url, repository, credential.as_ref()).send().await?;
                if response.status() != StatusCode::OK {
                    return Err(Failure::refused(response, REPLY_MAX_BYTES).await);
                }
                read(&body::whole(response, REPLY_MAX_BYTES).await?).map(Some)
            }
            (Some(Wanted::Password), Some(Credential::Password { user, password })) => {
                let pair = format!("{user}:{password}");
                let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
                let header = HeaderValue::from_str(&format!("Basic {encoded}"));
                let mut header =
                    header.map_err(|_| Failure::NoToken("it has characters that no header can have"))?;
                header.set_sensitive(true);
                Ok(Some((header, Duration::from_secs(LIFE_MAX_SECONDS))))
            }
            _ => Ok(None),
        }
    }
}

/// By name and password, by identity token (OAuth2), or as anybody.
fn token_request(
    http: &Client,
    mut url: Url,
    repository: &str,
    credential: Option<&Credential>,
) -> RequestBuilder {
    match credential {
        None => http.get(url),
        Some(Credential::Password { user, password }) => {
            url.query_pairs_mut().append_pair("account", user);
            http.get(url).basic_auth(user, Some(password))
        }
        Some(Credential::Identity(token)) => {
            let service =
                url.query_pairs().find(|(name, _)| name == "service").map(|(_, value)| value.into_owned());
            let scope = format!("repository:{repository}:pull");
            let service = service.unwrap_or_default();
            url.set_query(None);
            let mut form = Url::parse("http://form").unwrap_or_else(|_| url.clone());
            form.query_pairs_mut().extend_pairs([
                ("grant_type", "refresh_token"),
                ("client_id", "cowshed"),
                ("service", service.as_str()),
                ("scope", scope.as_str()),
                ("refresh_token", token.as_str()),
            ]);
            let body = form.query().unwrap_or_default().to_owned();
            http.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body)
        }
    }
}

/// What a challenge asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// Name and password.
    Password,
    /// A token for pulling from the repository, which is to be had there.
    Token(Url),
}

impl Wanted {
    /// Of several, a token is the better one.
    fn rank(&self) -> u8 {
        u8::from(matches!(self, Self::Token(_)))
    }
}

/// `None` if it asks for what we do not have.
fn wanted(challenge: &str, repository: &str) -> Option<Wanted> {
    let challenge = ChallengeParser::new(challenge).next()?.ok()?;
    if challenge.scheme.eq_ignore_ascii_case("Basic") {
        return Some(Wanted::Password);
    }
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
    Some(Wanted::Token(url))
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
    #![allow(clippy::unwrap_used)]
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
            (r#"Digest realm="r.example""#, None),
            (r#"Bearer service="r.example""#, None),
            (r#"Bearer realm="no address""#, None),
            ("", None),
        ];
        for (challenge, url) in table {
            let expected = url.map(|url| Wanted::Token(url.parse().unwrap()));
            assert_eq!(wanted(challenge, "a/b"), expected, "{challenge}");
        }
        assert_eq!(wanted(r#"Basic realm="r.example""#, "a/b"), Some(Wanted::Password));
    }

    #[test]
    fn who_asks_says_so() {
        let http = Client::new();
        let url: Url = "https://auth.example/token?scope=x&service=r".parse().unwrap();
        let built = |credential: Option<&Credential>| {
            token_request(&http, url.clone(), "a/b", credential).build().unwrap()
        };
        let anybody = built(None);
        assert_eq!((anybody.url().as_str(), anybody.headers().len()), (url.as_str(), 0));
        let named = built(Some(&Credential::Password { user: "cow".to_owned(), password: "moo".to_owned() }));
        assert!(named.url().query().unwrap().ends_with("account=cow"));
        assert_eq!(named.headers()["authorization"], "Basic Y293Om1vbw==");
        let token = built(Some(&Credential::Identity("s/cret".to_owned())));
        assert_eq!((token.method().as_str(), token.url().query()), ("POST", None));
        let body = String::from_utf8(token.body().unwrap().as_bytes().unwrap().to_vec()).unwrap();
        assert!(body.contains("refresh_token=s%2Fcret") && body.contains("service=r&"), "{body}");
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
