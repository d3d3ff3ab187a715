//! A containerd that is some of its calls, for tests of what asks it.

#![allow(clippy::unwrap_used)]

use std::{path::Path, sync::Arc, time::Duration};

use axum::{Router, extract::Request, http};
use tonic::{Status, server::Grpc};
use tonic_prost::ProstCodec;

use super::{Checks, Images, PullJournal, PullLimits};
use crate::{containerd::Containerd, error::Result, metrics::Metrics, registry::Registries};

/// Answers one call of containerd's, without a stream.
pub(super) async fn unary<In, Out>(
    request: Request,
    answer: impl FnOnce(In) -> std::result::Result<Out, Status> + Clone + Send + 'static,
) -> http::Response<tonic::body::Body>
where
    In: prost::Message + Default + Send + 'static,
    Out: prost::Message + Default + Send + 'static,
{
    let service = tower::service_fn(move |request: tonic::Request<In>| {
        let answer = answer.clone();
        async move { answer(request.into_inner()).map(tonic::Response::new) }
    });
    Grpc::new(ProstCodec::<Out, In>::default()).unary(service, request).await
}

/// Answers one with a stream.
pub(super) async fn stream<In, Out>(
    request: Request,
    answer: impl FnOnce(In) -> std::result::Result<Vec<Out>, Status> + Clone + Send + 'static,
) -> http::Response<tonic::body::Body>
where
    In: prost::Message + Default + Send + 'static,
    Out: prost::Message + Default + Send + 'static,
{
    let service = tower::service_fn(move |request: tonic::Request<In>| {
        let answer = answer.clone();
        async move {
            let messages = answer(request.into_inner())?.into_iter().map(Ok::<_, Status>);
            Ok::<_, Status>(tonic::Response::new(tokio_stream::iter(messages)))
        }
    });
    Grpc::new(ProstCodec::<Out, In>::default()).server_streaming(service, request).await
}

struct NoJournal;

#[async_trait::async_trait]
impl PullJournal for NoJournal {
    async fn begin(&self, _lease: &str, _image: &str) -> Result<()> {
        Ok(())
    }

    async fn end(&self, _lease: &str) -> Result<()> {
        Ok(())
    }
}

/// Images of this containerd; its socket and the registries' hosts are in the directory.
pub(super) fn served(containerd: Router, directory: &Path) -> Images {
    // Another test may have done it.
    let _done = rustls::crypto::ring::default_provider().install_default();
    let socket = directory.join("containerd.sock");
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let server = tonic::transport::Server::builder().add_routes(tonic::service::Routes::from(containerd));
    tokio::spawn(server.serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener)));
    let patience = Duration::from_secs(20);
    Images::new(
        Arc::new(Containerd::new(socket, "n".to_owned(), "s".to_owned(), patience)),
        Registries::new(directory.to_owned(), directory.join("config.json"), patience, patience, 0),
        Arc::new(NoJournal),
        Arc::new(Metrics::new().unwrap()),
        PullLimits::default(),
        Checks::default(),
    )
}
