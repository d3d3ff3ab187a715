//! Against a server that behaves badly on purpose.

#![allow(clippy::unwrap_used)]

use axum::{
    Router,
    body::{Body, Bytes},
    http::{self, Request},
    response::Response as Reply,
};
use futures_util::stream;

use super::*;
use crate::{error::Reason, registry::refusal};

/// Never ends; a piece of so many bytes, so often.
fn endless(bytes: usize, pause: Duration) -> Body {
    Body::from_stream(stream::unfold((), move |()| async move {
        tokio::time::sleep(pause).await;
        Some((Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; bytes])), ()))
    }))
}

fn reply(status: u16, body: Body) -> Reply {
    http::Response::builder().status(status).body(body).unwrap()
}

async fn answer(request: Request<Body>) -> Reply {
    let host = request.headers()["host"].to_str().unwrap();
    let authorization = request.headers().get("authorization").map(|value| value.to_str().unwrap());
    match request.uri().path() {
        // Which registry it is, its repositories say: each test has one of its own.
        "/v2/" => {
            let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
            http::Response::builder()
                .status(401)
                .header("www-authenticate", challenge)
                .body(Body::empty())
                .unwrap()
        }
        "/token" => match request.uri().query().unwrap() {
            scope if scope.contains("garbled") => reply(200, r#"{"token":"a\nb"}"#.into()),
            scope if scope.contains("flood") => reply(200, endless(1 << 16, Duration::ZERO)),
            scope if scope.contains("refusing") => reply(403, endless(1 << 16, Duration::ZERO)),
            _ => reply(200, r#"{"token":"good"}"#.into()),
        },
        "/v2/good/manifests/1" if authorization == Some("Bearer good") => reply(200, "manifest".into()),
        "/v2/endless/manifests/1" => reply(200, endless(1 << 16, Duration::ZERO)),
        "/v2/dripping/manifests/1" => reply(200, endless(1, Duration::from_millis(20))),
        "/v2/raging/manifests/1" => reply(500, endless(1 << 16, Duration::ZERO)),
        "/v2/fussy/manifests/1" => reply(403, endless(1, Duration::from_millis(20))),
        _ => reply(401, Body::empty()),
    }
}

async fn connection(read: Duration) -> (Connection, String) {
    // Another test may have done it.
    let _done = rustls::crypto::ring::default_provider().install_default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    tokio::spawn(async { axum::serve(listener, Router::new().fallback(answer)).await });
    let endpoint = Endpoint {
        authority: authority.clone(),
        scheme: Scheme::Http,
        ca: Vec::new(),
        verify: Verify::Certificate,
        serves: crate::registry::Serves::TagsAndDigests,
    };
    let patience = Patience { connect: read, read };
    (Connection::new(&endpoint, &[], patience).unwrap(), authority)
}

#[tokio::test]
async fn whatever_it_sends_is_bounded() {
    let (connection, authority) = connection(Duration::from_secs(20)).await;
    let table = [
        ("endless", Reason::ImageUnsupported, "more than 1000 bytes"),
        ("raging", Reason::RegistryUnavailable, "500"),
        // Without a token it is asked all the same, and says no.
        ("garbled", Reason::RegistryDenied, "401"),
        ("flood", Reason::RegistryDenied, "401"),
        ("refusing", Reason::RegistryDenied, "401"),
    ];
    for (repository, reason, says) in table {
        let at = format!("{authority}/{repository}:1").parse().unwrap();
        let failure = connection.document(&at, &[], 1000).await.unwrap_err();
        let words = refusal::words(&failure);
        assert_eq!(refusal::reason(&failure), reason, "{repository}: {words}");
        assert!(words.contains(says) && words.len() <= 512, "{repository}: {words}");
    }
    let at = format!("{authority}/good:1").parse().unwrap();
    assert_eq!(connection.document(&at, &[], 1000).await.unwrap().bytes, b"manifest");
}

#[tokio::test]
async fn what_comes_in_drops_is_cut_off() {
    let (connection, authority) = connection(Duration::from_millis(200)).await;
    for repository in ["dripping", "fussy"] {
        let at = format!("{authority}/{repository}:1").parse().unwrap();
        let failure = connection.document(&at, &[], 1 << 20).await.unwrap_err();
        assert!(matches!(failure, Failure::Late(_)), "{repository}: {failure:?}");
        assert_eq!(refusal::reason(&failure), Reason::RegistryUnavailable);
    }
}
