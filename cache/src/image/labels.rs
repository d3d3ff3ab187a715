//! The labels of blobs, named as containerd's own client names them, so that its garbage collection follows them.

use std::collections::HashMap;

use super::{
    Digest, ImageRef,
    manifest::{Descriptor, Manifest, is_index},
};

const SOURCE: &str = "containerd.io/distribution.source.";
/// containerd refuses a label whose name and value together have more bytes.
const LABEL_MAX_BYTES: usize = 4096;

pub(super) type Labels = HashMap<String, String>;

/// What a manifest holds: its layers as well, if they are kept.
pub(super) fn of_manifest(manifest: &Manifest, keeps_layers: bool) -> Labels {
    let layers = manifest.layers.iter().enumerate().filter(|_| keeps_layers);
    let layers =
        layers.map(|(at, layer)| (format!("containerd.io/gc.ref.content.l.{at}"), layer.digest.to_string()));
    let config = ("containerd.io/gc.ref.content.config".to_owned(), manifest.config.digest.to_string());
    layers.chain([config]).collect()
}

/// What an index holds: all its entries, also those that are not fetched. The names are by position, so that two pulls
/// for two platforms do not use one name for two things.
pub(super) fn of_index(entries: &[Descriptor]) -> Labels {
    let (mut manifests, mut indexes) = (0, 0);
    let label = |entry: &Descriptor| {
        let (count, prefix) =
            if is_index(&entry.media_type) { (&mut indexes, "") } else { (&mut manifests, "m.") };
        let name = format!("containerd.io/gc.ref.content.{prefix}{count}");
        *count += 1;
        (name, entry.digest.to_string())
    };
    entries.iter().map(label).collect()
}

/// What a configuration holds: the unpacked layers in one snapshotter.
pub(super) fn of_config(snapshotter: &str, chain_id: &Digest) -> Labels {
    HashMap::from([(format!("containerd.io/gc.ref.snapshot.{snapshotter}"), chain_id.to_string())])
}

/// Where a layer comes from. Nothing depends on it, so that what is too long for a label is left out.
pub(super) fn of_layer(image: &ImageRef) -> Labels {
    of_source(image.registry(), image.repository())
}

fn of_source(registry: &str, repository: &str) -> Labels {
    let label = (format!("{SOURCE}{registry}"), repository.to_owned());
    HashMap::from_iter(fits(&label.0, &label.1).then_some(label))
}

fn fits(name: &str, value: &str) -> bool {
    name.len() + value.len() <= LABEL_MAX_BYTES
}

/// What a layer is when it is inflated, as applying it has shown.
pub(super) fn of_applied(diff_id: &Digest) -> Labels {
    HashMap::from([("containerd.io/uncompressed".to_owned(), diff_id.to_string())])
}

/// Those of `wanted` that are not in `present`. Several repositories of a registry are one label's list; when that is
/// full, it stays as it is.
pub(super) fn missing(present: &Labels, wanted: Labels) -> Labels {
    let addition = |(name, value): (String, String)| match present.get(&name) {
        None => Some((name, value)),
        Some(there) if *there == value => None,
        Some(there) if name.starts_with(SOURCE) => {
            let known = there.split(',').any(|repository| repository == value);
            let longer = format!("{there},{value}");
            (!known && fits(&name, &longer)).then_some((name, longer))
        }
        Some(_) => Some((name, value)),
    };
    wanted.into_iter().filter_map(addition).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn descriptor(media_type: &str, of: &str) -> Descriptor {
        let digest = Digest::of(of.as_bytes());
        serde_json::from_value(
            serde_json::json!({"mediaType": media_type, "digest": digest.as_str(), "size": 1}),
        )
        .unwrap()
    }

    #[test]
    fn an_index_numbers_manifests_and_indexes_apart() {
        let manifest = "application/vnd.oci.image.manifest.v1+json";
        let index = "application/vnd.oci.image.index.v1+json";
        let labels =
            of_index(&[descriptor(manifest, "a"), descriptor(index, "b"), descriptor(manifest, "c")]);
        for (name, of) in [("m.0", "a"), ("0", "b"), ("m.1", "c")] {
            let value = &labels[&format!("containerd.io/gc.ref.content.{name}")];
            assert_eq!(*value, Digest::of(of.as_bytes()).to_string(), "{name}");
        }
        assert_eq!(labels.len(), 3);
    }

    #[test]
    fn a_manifest_holds_configuration_and_layers() {
        let manifest = Manifest {
            config: descriptor("c", "c"),
            layers: vec![descriptor("l", "x"), descriptor("l", "y")],
        };
        assert_eq!(of_manifest(&manifest, false).len(), 1, "the configuration alone");
        let labels = of_manifest(&manifest, true);
        for (name, of) in [("config", "c"), ("l.0", "x"), ("l.1", "y")] {
            assert_eq!(
                labels[&format!("containerd.io/gc.ref.content.{name}")],
                Digest::of(of.as_bytes()).to_string()
            );
        }
    }

    #[test]
    fn only_what_is_missing_is_written() {
        let source =
            |repositories: &str| Labels::from([(format!("{SOURCE}r.example"), repositories.to_owned())]);
        let image = ImageRef::parse("r.example/a/b:1").unwrap();
        let table = [
            (Labels::new(), source("a/b")),
            (source("a/b"), Labels::new()),
            (source("x,a/b"), Labels::new()),
            (source("x/a/b"), source("x/a/b,a/b")),
        ];
        for (present, written) in table {
            assert_eq!(missing(&present, of_layer(&image)), written, "{present:?}");
        }
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        assert_eq!(missing(&of_config("s", &old), of_config("s", &new)), of_config("s", &new));
    }

    #[test]
    fn a_list_of_repositories_ends_where_containerd_would_refuse_it() {
        let name = format!("{SOURCE}r.example");
        let room = LABEL_MAX_BYTES - name.len();
        let list = |bytes: usize| Labels::from([(name.clone(), "x".repeat(bytes))]);
        // Bytes that are there, bytes of the repository, whether it is appended.
        let table = [(room - 4, 3, true), (room - 4, 4, false), (room, 1, false), (room + 10, 1, false)];
        for (there, bytes, appended) in table {
            let wanted = of_source("r.example", &"y".repeat(bytes));
            let written = missing(&list(there), wanted);
            assert_eq!(written.len(), usize::from(appended), "{there} {bytes}");
            assert!(written.values().all(|value| value.len() == there + 1 + bytes), "{there} {bytes}");
        }
        assert_eq!(of_source("r.example", &"y".repeat(room)).len(), 1);
        assert!(of_source("r.example", &"y".repeat(room + 1)).is_empty(), "it is dropped");
    }
}
