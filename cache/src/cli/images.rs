//! Images as text and as JSON.

use cowshed_proto::v1;
use serde_json::{Value, json};

use super::{
    Output,
    show::{bytes, count, line, table},
};

pub(super) fn images(images: &[v1::Image], output: Output) -> String {
    if output == Output::Json {
        return line(&json!({ "images": images.iter().map(image_json).collect::<Vec<_>>() }));
    }
    let titles = [
        "IMAGE",
        "PLATFORM",
        "LAYERS",
        "SIZE",
        "ON DISK",
        "OWN",
        "LEASES",
        "SPARES",
        "LAST USED",
        "PINNED",
        "MANIFEST",
    ];
    let mut rows = vec![titles.map(str::to_owned)];
    rows.extend(images.iter().map(|image| {
        let digest = image.manifest_digest.clone().unwrap_or_else(|| "-".to_owned());
        [
            image.name.clone(),
            image.platform.clone(),
            image.layers.to_string(),
            bytes(image.compressed_bytes),
            image.disk_bytes.map_or_else(|| "-".to_owned(), bytes),
            image.exclusive_disk_bytes.map_or_else(|| "-".to_owned(), bytes),
            image.leases.to_string(),
            spares(image),
            image.last_used_at.as_ref().map_or_else(|| "-".to_owned(), minute),
            match &image.pinned_until {
                Some(until) => format!("until {}", minute(until)),
                None => if image.pinned { "yes" } else { "no" }.to_owned(),
            },
            digest.chars().take(19).collect(),
        ]
    }));
    table(&rows)
}

pub(super) fn image_json(image: &v1::Image) -> Value {
    json!({
        "name": image.name,
        "target_digest": image.target_digest,
        "manifest_digest": image.manifest_digest,
        "platform": image.platform,
        "compressed_bytes": image.compressed_bytes,
        "layers": image.layers,
        "unpacked": image.unpacked,
        "created_at": image.created_at.map(|at| at.to_string()),
        "last_used_at": image.last_used_at.map(|at| at.to_string()),
        "pinned": image.pinned,
        "pinned_until": image.pinned_until.map(|at| at.to_string()),
        "leases": image.leases,
        "disk_bytes": image.disk_bytes,
        "exclusive_disk_bytes": image.exclusive_disk_bytes,
        "spares": image.spares,
        "spares_wanted": image.spares_wanted,
    })
}

pub(super) fn pinned(reply: &v1::PinImageResponse, output: Output) -> String {
    let image = reply.image.clone().unwrap_or_default();
    if output == Output::Json {
        return line(&json!({
            "image": image_json(&image),
            "spares": reply.spares,
            "spares_limited": reply.spares_limited,
        }));
    }
    let end = match &image.pinned_until {
        Some(until) => minute(until),
        None => "it is unpinned".to_owned(),
    };
    let spares = match reply.spares {
        0 => String::new(),
        n => format!("; at least {} kept ready", count(n.into(), "spare is", "spares are")),
    };
    format!("image {} is pinned until {end}{spares}\n", image.name)
}

pub(super) fn unpinned(image: &str, reply: v1::UnpinImageResponse, output: Output) -> String {
    match (output, reply.was_pinned) {
        (Output::Json, was_pinned) => line(&json!({ "image": image, "was_pinned": was_pinned })),
        (Output::Text, true) => format!("image {image} is not pinned any more\n"),
        (Output::Text, false) => format!("image {image} was not pinned\n"),
    }
}

/// One of many: a line.
pub(super) fn removed(image: &str, reply: v1::RemoveImageResponse, output: Output) -> String {
    let v1::RemoveImageResponse { existed, untagged } = reply;
    match output {
        Output::Json => line(&json!({ "image": image, "existed": existed, "untagged": untagged })),
        Output::Text if !existed => format!("image {image} is not there: nothing to remove\n"),
        Output::Text if untagged => {
            format!("image {image} is gone; it has other names, so nothing was freed\n")
        }
        Output::Text => format!("image {image} is gone\n"),
    }
}

/// "3", or "3 of 5" while more are wanted.
fn spares(image: &v1::Image) -> String {
    if image.spares < image.spares_wanted {
        format!("{} of {}", image.spares, image.spares_wanted)
    } else {
        image.spares.to_string()
    }
}

/// "2026-07-30 12:34Z"
fn minute(at: &prost_types::Timestamp) -> String {
    let minute: String = at.to_string().chars().take(16).collect();
    minute.replace('T', " ") + "Z"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_says_what_it_keeps() {
        let reply = |spares| v1::PinImageResponse {
            image: Some(v1::Image { name: "r/a:1".to_owned(), ..v1::Image::default() }),
            spares,
            spares_limited: None,
        };
        let table = [
            (0, "image r/a:1 is pinned until it is unpinned\n"),
            (1, "image r/a:1 is pinned until it is unpinned; at least 1 spare is kept ready\n"),
            (2, "image r/a:1 is pinned until it is unpinned; at least 2 spares are kept ready\n"),
        ];
        for (spares, text) in table {
            assert_eq!(pinned(&reply(spares), Output::Text), text);
        }
    }

    #[test]
    fn times_are_shown_to_the_minute() {
        let at = |seconds| prost_types::Timestamp { seconds, nanos: 999 };
        assert_eq!(minute(&at(1_785_415_259)), "2026-07-30 12:40Z");
        assert_eq!(minute(&at(0)), "1970-01-01 00:00Z");
    }
}
