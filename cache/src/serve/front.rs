//! What the API's callers reach: all of the service once the ledger is open; before that GetStatus, and refusals.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    future::ready,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Instant,
};

use cowshed_proto::v1::{self, cowshed_server::CowshedServer};
use futures_util::future::{BoxFuture, FutureExt as _};
use prost::Message as _;
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codegen::{Service, http},
    server::{Grpc, NamedService, UnaryService},
};
use tonic_prost::ProstCodec;

use crate::{
    error::{Error, Reason},
    metrics::Metrics,
    rpc::Api,
    status::StatusSource,
};

/// `cowshed.v1.Cowshed`. Clones are the same one.
#[derive(Clone)]
pub(super) struct Front(Arc<Inner>);

struct Inner {
    full: OnceLock<CowshedServer<Api>>,
    status: Arc<StatusSource>,
    metrics: Metrics,
    /// Names of calls: others are not counted, since anybody can make them up.
    methods: BTreeSet<String>,
}

impl Front {
    pub(super) fn new(status: Arc<StatusSource>, metrics: Metrics) -> Self {
        Self(Arc::new(Inner { full: OnceLock::new(), status, metrics, methods: methods() }))
    }

    /// From now on all is served.
    pub(super) fn open(&self, api: Api) {
        // Only one ledger is ever opened.
        let _opened = self.0.full.set(CowshedServer::new(api));
    }

    fn refuse(&self, method: &str) -> http::Response<Body> {
        let busy = || Error::new(Reason::LedgerUnusable, "the ledger was opened this moment; call again");
        let error = self.0.status.ledger.get().err().unwrap_or_else(busy);
        let metrics = &self.0.metrics;
        if self.0.methods.contains(method) {
            metrics.called(method, error.reason().code(), std::time::Duration::ZERO);
        }
        let status = error.to_status();
        match method {
            "Acquire" => metrics.acquired(&Err(error), std::time::Duration::ZERO),
            "Release" => metrics.released(Some(&error)),
            _ => {}
        }
        status.into_http()
    }
}

fn methods() -> BTreeSet<String> {
    let described = prost_types::FileDescriptorSet::decode(v1::FILE_DESCRIPTOR_SET).unwrap_or_default();
    let services = described.file.into_iter().flat_map(|file| file.service);
    services.flat_map(|service| service.method).filter_map(|method| method.name).collect()
}

impl NamedService for Front {
    const NAME: &'static str = <CowshedServer<Api> as NamedService>::NAME;
}

impl Service<http::Request<Body>> for Front {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if let Some(full) = self.0.full.get() {
            return full.clone().call(request);
        }
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        if method != "GetStatus" {
            return ready(Ok(self.refuse(method))).boxed();
        }
        let inner = self.0.clone();
        async move { Ok(Grpc::new(ProstCodec::default()).unary(GetStatus(inner), request).await) }.boxed()
    }
}

struct GetStatus(Arc<Inner>);

impl UnaryService<v1::GetStatusRequest> for GetStatus {
    type Response = v1::GetStatusResponse;
    type Future = BoxFuture<'static, Result<Response<v1::GetStatusResponse>, Status>>;

    fn call(&mut self, _request: Request<v1::GetStatusRequest>) -> Self::Future {
        let (inner, begun) = (self.0.clone(), Instant::now());
        async move {
            let reply = inner.status.look().await;
            inner.metrics.called("GetStatus", Code::Ok, begun.elapsed());
            Ok(Response::new(reply))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_have_the_names_of_the_api() {
        let methods = methods();
        for method in ["Acquire", "Release", "GetStatus", "KeepAlive"] {
            assert!(methods.contains(method), "{method} is not among {methods:?}");
        }
    }
}
