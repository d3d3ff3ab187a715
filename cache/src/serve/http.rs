//! `GET /metrics`.

use std::sync::Arc;

use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};

use crate::{kernel::Kernel, ledger::Ledger, metrics::Metrics};

pub(super) async fn serve(
    listener: TcpListener,
    metrics: Metrics,
    ledger: Ledger,
    kernel: Arc<dyn Kernel>,
    mut stopped: watch::Receiver<bool>,
) {
    let scrape = move || {
        let (metrics, ledger, kernel) = (metrics.clone(), ledger.clone(), kernel.clone());
        async move { reply(metrics.scrape(&ledger, &*kernel)) }
    };
    let router = Router::new().route("/metrics", get(scrape));
    let until = async move {
        let _stopped = stopped.wait_for(|stop| *stop).await;
    };
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(until).await {
        tracing::error!(%error, "the metrics' listener stopped");
    }
}

fn reply(scraped: prometheus::Result<Vec<u8>>) -> Response {
    match scraped {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
