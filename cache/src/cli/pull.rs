//! `cowshed pull`: a pull's progress, as bars on a terminal and as lines elsewhere.

use std::{
    collections::HashMap,
    io::{IsTerminal as _, stderr},
};

use cowshed_proto::v1;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tonic::Streaming;

use super::{
    Failure, Output,
    client::refused,
    images::image_json,
    print,
    show::{bytes, cache_name, line},
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
                view.show(&picture)?;
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

enum View {
    Bars(Bars),
    /// Stage changes only; remembers the last stage of each layer.
    Lines(HashMap<String, i32>),
    Json,
}

impl View {
    fn new(output: Output) -> Self {
        match output {
            Output::Json => Self::Json,
            Output::Text if stderr().is_terminal() => Self::Bars(Bars::default()),
            Output::Text => Self::Lines(HashMap::new()),
        }
    }

    fn show(&mut self, picture: &v1::PullImageResponse) -> Result<(), Failure> {
        match self {
            Self::Bars(bars) => {
                bars.show(&picture.layers);
                Ok(())
            }
            Self::Lines(seen) => print(&changes(seen, &picture.layers)),
            Self::Json => print(&line(&picture_json(picture))),
        }
    }

    fn clear(&self) {
        if let Self::Bars(bars) = self {
            // A terminal that cannot be cleared is not worth failing for.
            let _ = bars.all.clear();
        }
    }
}

#[derive(Default)]
struct Bars {
    all: MultiProgress,
    layers: Vec<ProgressBar>,
}

impl Bars {
    fn show(&mut self, layers: &[v1::LayerProgress]) {
        for layer in layers.iter().skip(self.layers.len()) {
            let bar = ProgressBar::new(layer.bytes_total);
            let style = "{prefix} {bar:30} {binary_bytes:>10}/{binary_total_bytes:10} {binary_bytes_per_sec:>12} {eta:>4} {msg}";
            bar.set_style(
                ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar.set_prefix(short(&layer.digest));
            self.layers.push(self.all.add(bar));
        }
        for (bar, layer) in self.layers.iter().zip(layers) {
            bar.set_length(layer.bytes_total);
            bar.set_position(layer.bytes_fetched);
            bar.set_message(stage_name(layer.stage()));
        }
    }
}

fn changes(seen: &mut HashMap<String, i32>, layers: &[v1::LayerProgress]) -> String {
    let mut text = String::new();
    for layer in layers {
        let before = seen.insert(layer.digest.clone(), layer.stage);
        if before != Some(layer.stage) && layer.stage() != v1::LayerStage::Waiting {
            let size = bytes(layer.bytes_total);
            text.push_str(&format!("{} {size:>12} {}\n", short(&layer.digest), stage_name(layer.stage())));
        }
    }
    text
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
