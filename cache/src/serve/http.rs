//! `GET /metrics`.

use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};

/// Serves what `scrape` gives until `stopped`.
pub(super) async fn serve<F>(
    listener: TcpListener,
    scrape: impl Fn() -> F + Clone + Send + Sync + 'static,
    mut stopped: watch::Receiver<bool>,
) where
    F: Future<Output = prometheus::Result<Vec<u8>>> + Send + 'static,
{
    let answer = move || {
        let scrape = scrape.clone();
        async move { reply(scrape().await) }
    };
    let router = Router::new().route("/metrics", get(answer));
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
