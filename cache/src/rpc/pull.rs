//! `PullImage`: a pull's progress as a stream of messages, the last with the image.

use std::time::Instant;

use cowshed_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::convert;
use crate::{
    clock::Clock,
    image::{LayerProgress, LayerStage, Progress, Pull, PullStage, ResolvedImage},
    keeping,
    ledger::Ledger,
    metrics::Metrics,
};

pub(super) type Stream = ReceiverStream<Result<v1::PullImageResponse, Status>>;

/// A slow reader skips pictures rather than hold them up: each replaces the one before.
const BUFFER: usize = 4;

/// Who says what an image is kept for.
pub(super) struct Says {
    pub(super) ledger: Ledger,
    pub(super) clock: Clock,
}

pub(super) fn stream(pull: Pull, says: Says, metrics: Metrics, begun: Instant) -> Stream {
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        let code = forward(pull, &says, &sender).await;
        metrics.called("PullImage", code, begun.elapsed());
    });
    ReceiverStream::new(receiver)
}

async fn forward(
    pull: Pull,
    says: &Says,
    sender: &mpsc::Sender<Result<v1::PullImageResponse, Status>>,
) -> Code {
    let mut progress = pull.progress();
    loop {
        let picture = message(&progress.borrow_and_update());
        if picture.stage != i32::from(v1::PullStage::Done) && sender.send(Ok(picture)).await.is_err() {
            return Code::Cancelled;
        }
        tokio::select! {
            changed = progress.changed() => if changed.is_err() { break },
            () = sender.closed() => return Code::Cancelled,
        }
    }
    let picture = message(&progress.borrow());
    let (last, code) = match pull.outcome().await {
        Ok((image, cache)) => (Ok(done(picture, image, says, convert::cache(cache))), Code::Ok),
        Err(error) => {
            let code = error.reason().code();
            (Err(Status::from(error)), code)
        }
    };
    match sender.send(last).await {
        Ok(()) => code,
        Err(_) => Code::Cancelled,
    }
}

fn done(
    picture: v1::PullImageResponse,
    image: ResolvedImage,
    says: &Says,
    cache: v1::CacheResult,
) -> v1::PullImageResponse {
    let mut images = keeping::kept(&says.ledger, vec![image.into()], &says.clock.now());
    v1::PullImageResponse {
        stage: v1::PullStage::Done.into(),
        image: images.pop().map(convert::image),
        cache: cache.into(),
        ..picture
    }
}

fn message(progress: &Progress) -> v1::PullImageResponse {
    let stage = match progress.stage {
        PullStage::Resolving => v1::PullStage::Resolving,
        PullStage::Layers => v1::PullStage::Layers,
        PullStage::Done => v1::PullStage::Done,
    };
    v1::PullImageResponse {
        stage: stage.into(),
        layers: progress.layers.iter().map(layer).collect(),
        image: None,
        cache: v1::CacheResult::Unspecified.into(),
        not_refreshed: progress.not_refreshed.clone(),
    }
}

fn layer(layer: &LayerProgress) -> v1::LayerProgress {
    let stage = match layer.stage {
        LayerStage::Waiting => v1::LayerStage::Waiting,
        LayerStage::Fetching => v1::LayerStage::Fetching,
        LayerStage::Fetched => v1::LayerStage::Fetched,
        LayerStage::Unpacking => v1::LayerStage::Unpacking,
        LayerStage::Done => v1::LayerStage::Done,
    };
    v1::LayerProgress {
        digest: layer.digest.to_string(),
        stage: stage.into(),
        bytes_fetched: layer.bytes_fetched,
        bytes_total: layer.bytes_total,
    }
}
