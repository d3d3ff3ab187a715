//! One endpoint: its HTTP client, and requests that are bounded in bytes and in time whatever the endpoint does.

use std::{future::Future, time::Duration};

use oci_client::Reference;
use reqwest::{
    Certificate, Client, Identity, Method, RequestBuilder, Response, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, HeaderMap, HeaderValue, RANGE},
    redirect::{Action, Attempt, Policy},
};

use super::{
    Kind, body,
    credentials::Credential,
    hosts::{Endpoint, Scheme, Verify},
    refusal::Failure,
    token::{Tokens, is_of},
};
use crate::image::{ACCEPTED, Digest};

/// What a refusal says is read up to here, in bytes.
const REFUSAL_MAX_BYTES: usize = 64 << 10;
/// A document, and the beginning of a blob, may take so many times what a connection and the wait for its first byte
/// may take: there are up to five requests in it (greeting, token, the thing itself, another token, the thing with it). An
/// endpoint that sends a byte now and then is cut off here.
const REQUESTS: u32 = 5;
/// Registries send us to their storage, which may send us on.
const REDIRECTS_MAX: usize = 5;

/// How long to wait for an endpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For a connection.
    pub(super) connect: Duration,
    /// For the next bytes.
    pub(super) read: Duration,
}

/// Keeps connections and tokens.
#[derive(Debug)]
pub(super) struct Connection {
    http: Client,
    scheme: Scheme,
    tokens: Tokens,
    limit: Duration,
}

/// A manifest or an index, as it came.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) bytes: Vec<u8>,
    /// The digest that the endpoint says it has, if it says any that we know.
    pub(super) digest: Option<Digest>,
}

impl Connection {
    /// To `endpoint`, which may also be known by these certificates, and knows us by `identity` (PEM, certificate and key)
    /// or `credential`.
    pub(super) fn new(
        endpoint: &Endpoint,
        certificates: &[Vec<u8>],
        identity: Option<&[u8]>,
        credential: Option<Credential>,
        patience: Patience,
    ) -> Result<Self, reqwest::Error> {
        let certificates = certificates.iter().map(|pem| Certificate::from_pem(pem));
        let mut http = Client::builder();
        if let Some(identity) = identity {
            http = http.identity(Identity::from_pem(identity)?);
        }
        let http = http
            .redirect(Policy::custom(redirect))
            .danger_accept_invalid_certs(endpoint.verify == Verify::Nothing)
            .tls_certs_merge(certificates.collect::<Result<Vec<_>, _>>()?)
            .connect_timeout(patience.connect)
            .read_timeout(patience.read)
            .user_agent(concat!("cowshed/", env!("CARGO_PKG_VERSION")))
            .build()?;
        let limit = (patience.connect + patience.read) * REQUESTS;
        Ok(Self { http, scheme: endpoint.scheme, tokens: Tokens::new(credential), limit })
    }

    /// The manifest or index that `at` names, of `limit` bytes at the most.
    pub(super) async fn document(
        &self,
        at: &Reference,
        accepted: &[&str],
        limit: usize,
    ) -> Result<Document, Failure> {
        let name = at.digest().or(at.tag()).unwrap_or("latest");
        let request = self.get(at, &format!("manifests/{name}")).header(ACCEPT, accepted.join(", "));
        let work = async {
            let response = self.answer(at, request).await?;
            let digest = said_digest(response.headers());
            Ok(Document { bytes: body::whole(response, limit).await?, digest })
        };
        self.in_time(Box::pin(work)).await
    }

    /// A blob from `offset` on, or, if the status is not "partial content", from its beginning. Only its head is
    /// waited for.
    pub(super) async fn blob(
        &self,
        at: &Reference,
        digest: &Digest,
        offset: u64,
    ) -> Result<Response, Failure> {
        let mut request = self.get(at, &format!("blobs/{digest}"));
        if offset > 0 {
            request = request.header(RANGE, format!("bytes={offset}-"));
        }
        self.in_time(Box::pin(self.answer(at, request))).await
    }

    /// Whether it says that it is there, and that we may have it. False: it has answered, but not with what would say so; who
    /// is to log in first gets a page for it from some, whatever he asks for.
    pub(super) async fn has(&self, at: &Reference, kind: Kind, digest: &Digest) -> Result<bool, Failure> {
        let request = match kind {
            Kind::Manifest => {
                self.ask(Method::HEAD, at, &format!("manifests/{digest}")).header(ACCEPT, ACCEPTED.join(", "))
            }
            Kind::Blob(_) => self.ask(Method::HEAD, at, &format!("blobs/{digest}")),
        };
        let response = self.in_time(Box::pin(self.answer(at, request))).await?;
        Ok(match kind {
            Kind::Manifest => said_digest(response.headers()).as_ref() == Some(digest),
            Kind::Blob(size) => said_length(response.headers()) == Some(size),
        })
    }

    fn base(&self, at: &Reference) -> String {
        let scheme = match self.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        format!("{scheme}://{}", at.resolve_registry())
    }

    fn get(&self, at: &Reference, what: &str) -> RequestBuilder {
        self.ask(Method::GET, at, what)
    }

    fn ask(&self, method: Method, at: &Reference, what: &str) -> RequestBuilder {
        let namespace = at.namespace().map(|registry| format!("?ns={registry}")).unwrap_or_default();
        self.http.request(method, format!("{}/v2/{}/{what}{namespace}", self.base(at), at.repository()))
    }

    /// What is for anybody is asked for without further ado, and with a token if the registry then wants one. Who is somebody
    /// asks first what it wants: some registries tell nobody that there is what is not for everybody.
    async fn answer(&self, at: &Reference, request: RequestBuilder) -> Result<Response, Failure> {
        let again = request.try_clone();
        let known = self.tokens.before(&self.http, &self.base(at), at.repository()).await;
        let mut response = with(request, known.clone()).send().await?;
        if response.status() == StatusCode::UNAUTHORIZED
            && let Some(again) = again
            // What a registry leads to has no right to ask.
            && is_of(&self.base(at), response.url())
            && let Some(token) = self
                .tokens
                .wanted(&self.http, &self.base(at), at.repository(), response.headers(), known.as_ref())
                .await
        {
            // Read, the connection can be used again.
            body::beginning(response, REFUSAL_MAX_BYTES).await;
            response = with(again, Some(token)).send().await?;
        }
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(response),
            _ => Err(Failure::refused(response, REFUSAL_MAX_BYTES).await),
        }
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let in_time = tokio::time::timeout(self.limit, work).await;
        in_time.unwrap_or(Err(Failure::Late(self.limit)))
    }
}

fn with(request: RequestBuilder, authorization: Option<HeaderValue>) -> RequestBuilder {
    match authorization {
        Some(value) => request.header(AUTHORIZATION, value),
        None => request,
    }
}

/// A few, and never from TLS to none. (What we say of ourselves goes to no other host: that is reqwest's own doing.)
fn redirect(attempt: Attempt<'_>) -> Action {
    let from_tls = attempt.previous().iter().any(|url| url.scheme() == "https");
    if attempt.previous().len() > REDIRECTS_MAX {
        attempt.error("it redirects without end")
    } else if from_tls && attempt.url().scheme() != "https" {
        attempt.error("it redirects to plain HTTP")
    } else {
        attempt.follow()
    }
}

fn said_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get("docker-content-digest")?.to_str().ok()?.parse().ok()
}

fn said_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
