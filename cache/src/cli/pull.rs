//! `cowshed pull`: follows a pull to its end.

use cowshed_proto::v1;
use serde_json::{Value, json};
use tonic::Streaming;

use super::{
    Failure, Output,
    client::refused,
    images::image_json,
    print,
    progress::{Item, View},
    show::{bytes, cache_name},
};

/// Follows the pull to its end.
pub(super) async fn follow(
    name: &str,
    mut stream: Streaming<v1::PullImageResponse>,
    output: Output,
) -> Result<(), Failure> {
    let mut view = View::new(output);
    loop {
        match stream.message().await {
            Ok(Some(picture)) => {
                view.show(picture.layers.iter().map(item), || picture_json(&picture))?;
                if let Some(image) = &picture.image {
                    view.clear();
                    return if output == Output::Json {
                        Ok(())
                    } else {
                        print(&summary(image, picture.cache()))
                    };
                }
            }
            Ok(None) => {
                view.clear();
                let message =
                    format!("the pull of {name} ended without a result: the service stopped; pull again");
                return Err(Failure { message, status: crate::exit::for_code(tonic::Code::Unavailable) });
            }
            Err(status) => {
                view.clear();
                return Err(refused(&status));
            }
        }
    }
}

fn summary(image: &v1::Image, cache: v1::CacheResult) -> String {
    let done = if cache == v1::CacheResult::Hit { "was there already" } else { "pulled and unpacked" };
    let digest = image.manifest_digest.as_deref().unwrap_or("-");
    format!(
        "{} {done}: {} layers, {} compressed, {}, {digest}\n",
        image.name,
        image.layers,
        bytes(image.compressed_bytes),
        image.platform
    )
}

fn item(layer: &v1::LayerProgress) -> Item {
    let (name, stage) = (short(&layer.digest), stage_name(layer.stage()));
    let size = bytes(layer.bytes_total);
    let is_begun = layer.stage() != v1::LayerStage::Waiting;
    Item {
        line: is_begun.then(|| format!("{name} {size:>12} {stage}")),
        name,
        bytes: layer.bytes_fetched,
        bytes_total: layer.bytes_total,
        stage,
        note: None,
        turn: 0,
    }
}

fn picture_json(picture: &v1::PullImageResponse) -> Value {
    let stage = match picture.stage() {
        v1::PullStage::Unspecified => "unknown",
        v1::PullStage::Resolving => "resolving",
        v1::PullStage::Layers => "layers",
        v1::PullStage::Done => "done",
    };
    let layers = picture.layers.iter().map(|layer| {
        json!({
            "digest": layer.digest,
            "stage": stage_name(layer.stage()),
            "bytes_fetched": layer.bytes_fetched,
            "bytes_total": layer.bytes_total,
        })
    });
    let mut value = json!({ "stage": stage, "layers": layers.collect::<Vec<_>>() });
    if let Some(image) = &picture.image {
        value["image"] = image_json(image);
        value["cache"] = cache_name(picture.cache()).into();
    }
    value
}

fn stage_name(stage: v1::LayerStage) -> &'static str {
    match stage {
        v1::LayerStage::Unspecified => "unknown",
        v1::LayerStage::Waiting => "waiting",
        v1::LayerStage::Fetching => "fetching",
        v1::LayerStage::Fetched => "fetched",
        v1::LayerStage::Unpacking => "unpacking",
        v1::LayerStage::Done => "done",
    }
}

/// The first twelve digits of a digest, as people quote it.
fn short(digest: &str) -> String {
    digest.split_once(':').map_or(digest, |(_, hex)| hex).chars().take(12).collect()
}
