//! What becomes of a blob that another tenant finishes while it is fetched: against a registry, and a content store that says so
//! at the moment of choice.

#![allow(clippy::unwrap_used)]

use axum::{Router, body::Body, extract::Request, http, routing::post};
use containerd_client::services::v1::{
    AbortRequest, AddResourceRequest, Info, InfoRequest, InfoResponse, WriteAction, WriteContentRequest,
    WriteContentResponse,
};
use tonic::{Status, Streaming, server::Grpc};
use tonic_prost::ProstCodec;

use super::*;
use crate::{
    image::{
        containerd_fake::{served, unary},
        gate::{Terms, Traffic},
        tap::tap,
    },
    registry::Credential,
};

const BLOB: &[u8] = b"what is another tenant's";

/// What containerd and the registry have seen, in this order.
type Log = Arc<Mutex<Vec<&'static str>>>;

fn note(log: &Log, what: &'static str) {
    log.lock().unwrap().push(what);
}

/// When the other one finishes the blob: containerd says that it is there then, whatever was written.
#[derive(Clone, Copy, Debug)]
enum Finished {
    BeforeTheWrite,
    BeforeTheCommit,
}

/// A content store in which the blob is another tenant's as soon as it is there, who had it from `owners`.
fn content_store(log: &Log, finished: Finished, owners: &str) -> Router {
    let is_there = Arc::new(AtomicBool::new(false));
    let labels = Labels::from([("cowshed.dev/owner".to_owned(), format!("a {owners}"))]);
    let info = Info { size: BLOB.len() as i64, labels, ..Info::default() };
    let (there, writes, aborts, holds) = (is_there.clone(), log.clone(), log.clone(), log.clone());
    let info = async move |request: Request| {
        let answer = move |_: InfoRequest| match there.load(Ordering::Relaxed) {
            true => Ok(InfoResponse { info: Some(info) }),
            false => Err(Status::not_found("no such blob")),
        };
        unary(request, answer).await
    };
    let write = async move |request: Request| {
        let service = tower::service_fn(move |request: tonic::Request<Streaming<WriteContentRequest>>| {
            let (is_there, log) = (is_there.clone(), writes.clone());
            async move {
                let replies = request.into_inner().map(move |message| {
                    let is_commit = message?.action == i32::from(WriteAction::Commit);
                    note(&log, if is_commit { "commit" } else { "write" });
                    if is_commit || matches!(finished, Finished::BeforeTheWrite) {
                        is_there.store(true, Ordering::Relaxed);
                        return Err(Status::already_exists("it is there"));
                    }
                    Ok(WriteContentResponse::default())
                });
                Ok::<_, Status>(tonic::Response::new(replies))
            }
        });
        let codec = ProstCodec::<WriteContentResponse, WriteContentRequest>::default();
        Grpc::new(codec).streaming(service, request).await
    };
    let abort = async move |request: Request| {
        unary(request, move |_: AbortRequest| {
            note(&aborts, "abort");
            Ok(())
        })
        .await
    };
    let hold = async move |request: Request| {
        unary(request, move |_: AddResourceRequest| {
            note(&holds, "hold");
            Ok(())
        })
        .await
    };
    Router::new()
        .route("/containerd.services.content.v1.Content/Info", post(info))
        .route("/containerd.services.content.v1.Content/Write", post(write))
        .route("/containerd.services.content.v1.Content/Abort", post(abort))
        .route("/containerd.services.leases.v1.Leases/AddResource", post(hold))
}

/// What comes of it that a tenant fetches the blob from a registry that serves `sent` for it, while another one, who had it from
/// `owners` (or from the same registry), finishes it; what was seen, and whether what had arrived is read again.
async fn fetched(
    finished: Finished,
    sent: &'static [u8],
    owners: Option<&str>,
) -> (Result<Cache>, Vec<&'static str>, bool) {
    let (log, directory) = (Log::default(), tempfile::tempdir().unwrap());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    let asked = log.clone();
    let serve = Router::new().fallback(async move |request: Request| {
        if !request.uri().path().contains("/blobs/") {
            return http::Response::new(Body::empty());
        }
        if *request.method() == http::Method::HEAD {
            note(&asked, "HEAD");
            // Not to this one.
            return http::Response::builder().status(404).body(Body::empty()).unwrap();
        }
        note(&asked, "GET");
        http::Response::new(Body::from(sent))
    });
    tokio::spawn(async { axum::serve(listener, serve).await });
    let hosts = directory.path().join(&authority);
    std::fs::create_dir(&hosts).unwrap();
    std::fs::write(hosts.join("hosts.toml"), format!("server = \"http://{authority}\"\n")).unwrap();

    let images = served(content_store(&log, finished, owners.unwrap_or(&authority)), directory.path());
    let image = ImageRef::parse(&format!("{authority}/x:1")).unwrap();
    let credential = Credential::Password { user: "b".to_owned(), password: "b".to_owned() };
    let access = Access { tenant: "b".parse().unwrap(), credential: Some(credential), ..Access::default() };
    let source = images.0.registries.source(&image, access.credential.as_ref()).await.unwrap();
    let (gate, _) = Gate::new(&Traffic::default(), &Terms::LAUNCHER);
    let store = Store {
        shared: &images.0,
        lease: "l",
        image: &image,
        source: &source,
        access: &access,
        unpacked: Owners::default(),
        applied: Mutex::default(),
        brake: Brake::default(),
        gate: &gate,
    };
    let size = BLOB.len() as u64;
    let blob = Descriptor { media_type: String::new(), digest: Digest::of(BLOB), size, platform: None };
    let (tap, outlet) = tap(store.room());
    let outcome = store.fetch(&blob, Labels::new(), Some(&tap), |_| ()).await;
    let seen = log.lock().unwrap().clone();
    (outcome, seen, outlet.take_spoiled())
}

#[tokio::test]
async fn what_another_tenant_finishes_meanwhile_is_taken_only_if_the_registry_hands_it_out() {
    use Finished::{BeforeTheCommit, BeforeTheWrite};
    const OTHER: &[u8] = b"nothing of that content!";
    const ELSEWHERE: Option<&str> = Some("r.example");
    assert_eq!(BLOB.len(), OTHER.len());
    // When it is finished, what the registry sends, where the owner had it from; what comes of it, and what was seen.
    let table = [
        (BeforeTheWrite, BLOB, ELSEWHERE, Ok(()), vec!["write", "abort", "GET", "hold"]),
        (BeforeTheWrite, OTHER, ELSEWHERE, Err(Reason::ImageCorrupt), vec!["write", "abort", "GET"]),
        (BeforeTheWrite, BLOB, None, Err(Reason::RegistryDenied), vec!["write", "abort", "HEAD"]),
        (BeforeTheCommit, BLOB, ELSEWHERE, Ok(()), vec!["write", "GET", "commit", "abort", "GET", "hold"]),
        // containerd has not looked at what was sent.
        (
            BeforeTheCommit,
            OTHER,
            ELSEWHERE,
            Err(Reason::ImageCorrupt),
            vec!["write", "GET", "commit", "abort", "GET"],
        ),
        // It was to be had a moment ago.
        (
            BeforeTheCommit,
            BLOB,
            None,
            Err(Reason::RegistryDenied),
            vec!["write", "GET", "commit", "abort", "HEAD"],
        ),
    ];
    for (finished, sent, owners, outcome, sees) in table {
        let case = format!("{finished:?}, {:?}, {owners:?}", String::from_utf8_lossy(sent));
        let (fetched, mut seen, is_spoiled) = fetched(finished, sent, owners).await;
        assert_eq!(fetched.map(drop).map_err(|error| error.reason()), outcome, "{case}");
        // What is cleared away after a refusal has gone already.
        if outcome.is_err() {
            seen.pop_if(|last| *last == "abort");
        }
        assert_eq!(seen, sees, "{case}");
        assert_eq!(is_spoiled, matches!(finished, BeforeTheCommit), "{case}");
    }
}
