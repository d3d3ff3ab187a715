//! Against a server that behaves badly on purpose.

#![allow(clippy::unwrap_used, clippy::panic)]

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
        "/token" => match request.uri().query().unwrap() {
            scope if scope.contains("private") => match authorization {
                Some("Basic Y293Om1vbw==") if scope.contains("account=cow") => {
                    reply(200, r#"{"token":"of-cow"}"#.into())
                }
                _ => reply(401, Body::empty()),
            },
            scope if scope.contains("garbled") => reply(200, r#"{"token":"a\nb"}"#.into()),
            scope if scope.contains("flood") => reply(200, endless(1 << 16, Duration::ZERO)),
            scope if scope.contains("refusing") => reply(403, endless(1 << 16, Duration::ZERO)),
            _ => reply(200, r#"{"token":"good"}"#.into()),
        },
        "/v2/good/manifests/1" if authorization == Some("Bearer good") => reply(200, "manifest".into()),
        "/v2/private/manifests/1" if authorization == Some("Bearer of-cow") => reply(200, "secret".into()),
        "/v2/endless/manifests/1" => reply(200, endless(1 << 16, Duration::ZERO)),
        "/v2/dripping/manifests/1" => reply(200, endless(1, Duration::from_millis(20))),
        "/v2/raging/manifests/1" => reply(500, endless(1 << 16, Duration::ZERO)),
        "/v2/fussy/manifests/1" => reply(403, endless(1, Duration::from_millis(20))),
        _ => {
            let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
            http::Response::builder()
                .status(401)
                .header("www-authenticate", challenge)
                .body(Body::empty())
                .unwrap()
        }
    }
}

/// A registry that wants name and password themselves; and that leads astray.
async fn plain_answer(request: Request<Body>) -> Reply {
    let host = request.headers()["host"].to_str().unwrap().to_owned();
    let authorization = request.headers().get("authorization").map(|value| value.to_str().unwrap());
    let to = |location: String| {
        http::Response::builder().status(307).header("location", location).body(Body::empty()).unwrap()
    };
    match (request.uri().path(), authorization) {
        ("/v2/round/manifests/1", _) => to(format!("http://{host}/v2/round/manifests/1")),
        ("/v2/private/manifests/1", Some("Basic Y293Om1vbw==")) => reply(200, "secret".into()),
        // Another host: it must not be told who we are.
        ("/v2/elsewhere/manifests/1", Some(_)) => {
            to(format!("http://localhost:{}/stored", host.rsplit(':').next().unwrap()))
        }
        ("/stored", None) => reply(200, "stored".into()),
        _ => http::Response::builder()
            .status(401)
            .header("www-authenticate", "Basic realm=\"r\"")
            .body(Body::empty())
            .unwrap(),
    }
}

async fn connection(read: Duration) -> (Connection, String) {
    connection_as(None, Router::new().fallback(answer), read).await
}

async fn connection_as(
    credential: Option<Credential>,
    registry: Router,
    read: Duration,
) -> (Connection, String) {
    // Another test may have done it.
    let _done = rustls::crypto::ring::default_provider().install_default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    tokio::spawn(async { axum::serve(listener, registry).await });
    let endpoint = Endpoint {
        authority: authority.clone(),
        scheme: Scheme::Http,
        ca: Vec::new(),
        client: Vec::new(),
        verify: Verify::Certificate,
        serves: crate::registry::Serves::TagsAndDigests,
    };
    let patience = Patience { connect: read, read };
    (Connection::new(&endpoint, &[], None, credential, patience).unwrap(), authority)
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
    let (connection, authority) = connection(Duration::from_millis(600)).await;
    for repository in ["dripping", "fussy"] {
        let at = format!("{authority}/{repository}:1").parse().unwrap();
        let failure = connection.document(&at, &[], 1 << 20).await.unwrap_err();
        assert!(matches!(failure, Failure::Late(_)), "{repository}: {failure:?}");
        assert_eq!(refusal::reason(&failure), Reason::RegistryUnavailable);
    }
}

#[tokio::test]
async fn who_we_are_is_told_to_the_registry_alone() {
    let patience = Duration::from_secs(20);
    let cow = || Some(Credential::Password { user: "cow".to_owned(), password: "moo".to_owned() });
    let wrong = || Some(Credential::Password { user: "cow".to_owned(), password: "oink".to_owned() });
    let (token, plain) = (Router::new().fallback(answer), Router::new().fallback(plain_answer));
    // Whether a token is wanted or the password, who we are, what is had.
    let table = [
        (&token, cow(), "private", Some("secret")),
        (&token, wrong(), "private", None),
        (&token, None, "private", None),
        (&token, cow(), "good", Some("manifest")),
        (&plain, cow(), "private", Some("secret")),
        (&plain, wrong(), "private", None),
        (&plain, None, "private", None),
        (&plain, cow(), "elsewhere", Some("stored")),
    ];
    for (registry, credential, repository, expected) in table {
        let (connection, authority) = connection_as(credential, registry.clone(), patience).await;
        let at = format!("{authority}/{repository}:1").parse().unwrap();
        match (connection.document(&at, &[], 1000).await, expected) {
            (Ok(document), Some(expected)) => assert_eq!(document.bytes, expected.as_bytes(), "{repository}"),
            (Err(failure), None) => {
                assert_eq!(refusal::reason(&failure), Reason::RegistryDenied, "{repository}: {failure:?}");
                assert!(!refusal::words(&failure).contains("moo"), "{failure:?}");
            }
            (other, _) => panic!("{repository}: {other:?}"),
        }
    }
    let (connection, authority) = connection_as(cow(), plain, patience).await;
    let failure =
        connection.document(&format!("{authority}/round:1").parse().unwrap(), &[], 1000).await.unwrap_err();
    assert!(refusal::words(&failure).contains("without end"), "{failure:?}");
}

/// Sends on, with whatever it is asked for, to another host that wants to know who asks.
#[tokio::test]
async fn what_a_registry_leads_to_may_not_ask_who_we_are() {
    let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let answer = {
        let told = told.clone();
        move |request: Request<Body>| async move {
            let host = request.headers()["host"].to_str().unwrap().to_owned();
            let elsewhere = format!("localhost:{}", host.rsplit(':').next().unwrap());
            let path = request.uri().path().to_owned();
            if path == "/spy" {
                told.lock().unwrap().push(format!("{:?}", request.headers().get("authorization")));
                return reply(200, r#"{"token":"of-spy"}"#.into());
            }
            let answer = http::Response::builder();
            let answer = match path.as_str() {
                "/asks" => answer
                    .status(401)
                    .header("www-authenticate", format!("Bearer realm=\"http://{elsewhere}/spy\"")),
                _ => answer.status(307).header("location", format!("http://{elsewhere}/asks")),
            };
            answer.body(Body::empty()).unwrap()
        }
    };
    let cow = Credential::Password { user: "cow".to_owned(), password: "moo".to_owned() };
    for credential in [None, Some(cow)] {
        let registry = Router::new().fallback(answer.clone());
        let (connection, authority) = connection_as(credential, registry, Duration::from_secs(20)).await;
        let at = format!("{authority}/curious:1").parse().unwrap();
        let failure = connection.document(&at, &[], 1000).await.unwrap_err();
        assert_eq!(refusal::reason(&failure), Reason::RegistryDenied, "{failure:?}");
    }
    assert_eq!(*told.lock().unwrap(), Vec::<String>::new());
}

/// Some registries tell nobody that there is what is not for everybody.
#[tokio::test]
async fn what_nobody_is_told_of_is_there_for_somebody() {
    let answer = |request: Request<Body>| async move {
        let authorization = request.headers().get("authorization").map(|value| value.to_str().unwrap());
        match (request.uri().path(), authorization) {
            ("/v2/hidden/manifests/1", Some("Basic Y293Om1vbw==")) => reply(200, "hidden".into()),
            ("/v2/", None) => http::Response::builder()
                .status(401)
                .header("www-authenticate", "Basic realm=\"r\"")
                .body(Body::empty())
                .unwrap(),
            _ => reply(404, Body::empty()),
        }
    };
    let cow = Credential::Password { user: "cow".to_owned(), password: "moo".to_owned() };
    for (credential, is_there) in [(Some(cow), true), (None, false)] {
        let registry = Router::new().fallback(answer);
        let (connection, authority) = connection_as(credential, registry, Duration::from_secs(20)).await;
        let at = format!("{authority}/hidden:1").parse().unwrap();
        assert_eq!(connection.document(&at, &[], 1000).await.is_ok(), is_there);
    }
}
