//! `cowshed pull`: follows a pull to its end.

use std::collections::HashSet;

use cowshed_proto::v1;
use serde_json::{Value, json};
use tonic::Streaming;

use super::{
    Failure, Output,
    client::refused,
    images::image_json,
    print,
    progress::{Item, View},
    show::{bytes, cache_name, count},
    warn,
};

/// Follows the pull to its end.
pub(super) async fn follow(
    name: &str,
    mut stream: Streaming<v1::PullImageResponse>,
    output: Output,
) -> Result<(), Failure> {
    let (mut view, mut begun) = (View::new(output), HashSet::new());
    loop {
        match stream.message().await {
            Ok(Some(picture)) => {
                let items = picture.layers.iter().enumerate();
                let items = items.map(|(at, layer)| item(layer, has_begun(&mut begun, at, layer.stage())));
                view.show(items, || picture_json(&picture))?;
                if let Some(image) = &picture.image {
                    view.clear();
                    if let Some(why) = &picture.not_refreshed {
                        warn(&format!("{name}: {}", not_refreshed(why)));
                    }
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
        "{} {done}: {}, {} compressed, {}, {digest}\n",
        image.name,
        count(image.layers.into(), "layer", "layers"),
        bytes(image.compressed_bytes),
        image.platform
    )
}

/// What was taken for want of an answer.
pub(super) fn not_refreshed(why: &str) -> String {
    format!("the registry did not say what the name means now, what was here is used: {why}")
}

/// Whether anything has to be done for the layer, as far as was seen: one that is done at once was there.
fn has_begun(begun: &mut HashSet<usize>, at: usize, stage: v1::LayerStage) -> bool {
    match stage {
        v1::LayerStage::Unspecified | v1::LayerStage::Waiting => false,
        v1::LayerStage::Done => begun.contains(&at),
        v1::LayerStage::Fetching | v1::LayerStage::Fetched | v1::LayerStage::Unpacking => {
            begun.insert(at);
            true
        }
    }
}

fn item(layer: &v1::LayerProgress, has_begun: bool) -> Item {
    let (name, stage) = (short(&layer.digest), stage_name(layer.stage()));
    let size = bytes(layer.bytes_total);
    Item {
        line: has_begun.then(|| format!("{name} {size:>12} {stage}")),
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
        value["not_refreshed"] = picture.not_refreshed.clone().into();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_is_no_progress() {
        use v1::LayerStage::{Done, Fetched, Fetching, Unpacking, Waiting};
        // The stages that are seen of one layer, and of which there is a line.
        let table: [(&[v1::LayerStage], &[bool]); 4] = [
            (&[Done], &[false]),
            (&[Waiting, Done], &[false, false]),
            (&[Waiting, Fetching, Fetched, Done], &[false, true, true, true]),
            (&[Unpacking, Done], &[true, true]),
        ];
        for (stages, lines) in table {
            let mut begun = HashSet::from([7]);
            let seen: Vec<bool> = stages.iter().map(|stage| has_begun(&mut begun, 3, *stage)).collect();
            assert_eq!(seen, lines, "{stages:?}");
        }
    }
}
