//! What containerd's labels hold: from a blob to other blobs, and to unpacked layers, as its collection follows them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use cowshed_gc::evict::{ChainId, Manifest};

/// The labels of something.
pub(super) type Labels = HashMap<String, String>;

const CONTENT: &str = "containerd.io/gc.ref.content";
const SNAPSHOT: &str = "containerd.io/gc.ref.snapshot.";
const ROOT: &str = "containerd.io/gc.root";

/// All blobs, and the snapshotter whose snapshots count.
#[derive(Clone, Copy)]
pub(super) struct Holds<'a> {
    pub(super) blobs: &'a HashMap<String, Labels>,
    pub(super) snapshotter: &'a str,
}

impl<'a> Holds<'a> {
    /// The blobs that one holds, directly or not, and itself; also those that are not here.
    fn reached(self, from: &'a str) -> BTreeSet<&'a str> {
        let (mut reached, mut left) = (BTreeSet::new(), vec![from]);
        while let Some(digest) = left.pop() {
            if reached.insert(digest) {
                left.extend(self.below(digest));
            }
        }
        reached
    }

    fn below(self, digest: &str) -> impl Iterator<Item = &'a str> {
        let labels = self.blobs.get(digest).into_iter().flatten();
        labels.filter(|(name, _)| is_of_content(name)).map(|(_, value)| value.as_str())
    }

    /// The snapshots that a blob holds, directly or not.
    pub(super) fn snapshots(self, digest: &'a str) -> BTreeSet<&'a str> {
        self.reached(digest).into_iter().flat_map(|digest| self.snapshots_of(self.labels(digest))).collect()
    }

    /// The snapshots that labels name.
    pub(super) fn snapshots_of<'b>(
        self,
        labels: impl IntoIterator<Item = (&'b String, &'b String)>,
    ) -> Vec<&'b str> {
        let of_ours = |name: &str| {
            let of = name.strip_prefix(SNAPSHOT).map(|rest| rest.split_once('/').map_or(rest, |(of, _)| of));
            of == Some(self.snapshotter)
        };
        labels.into_iter().filter(|(name, _)| of_ours(name)).map(|(_, value)| value.as_str()).collect()
    }

    fn labels(self, digest: &str) -> impl Iterator<Item = (&'a String, &'a String)> {
        self.blobs.get(digest).into_iter().flatten()
    }

    /// What an image record's target is or leads to: manifests, indexes, and what cannot be told for it is not here; each with
    /// its top layer, if it names one.
    pub(super) fn manifests(self, target: &'a str) -> BTreeMap<Manifest, Option<ChainId>> {
        let mut manifests = BTreeMap::new();
        for digest in self.reached(target) {
            let is_document = self.below(digest).next().is_some() || !self.blobs.contains_key(digest);
            if digest != target && !is_document {
                continue;
            }
            // An image's configuration names it, or another client's manifest itself.
            let mut tops = std::iter::once(digest)
                .chain(self.below(digest))
                .flat_map(|digest| self.snapshots_of(self.labels(digest)));
            manifests.insert(Manifest::from(digest), tops.next().map(ChainId::from));
        }
        manifests
    }
}

/// Whether what has these labels is never collected.
pub(super) fn is_root(labels: &Labels) -> bool {
    labels.contains_key(ROOT)
}

fn is_of_content(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(CONTENT) else { return false };
    rest.is_empty() || rest.starts_with(['.', '/'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(all: &[(&str, &str)]) -> Labels {
        all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn blobs() -> HashMap<String, Labels> {
        [
            (
                "index",
                labels(&[
                    ("containerd.io/gc.ref.content.m.0", "amd"),
                    ("containerd.io/gc.ref.content.m.1", "arm"),
                ]),
            ),
            (
                "amd",
                labels(&[
                    ("containerd.io/gc.ref.content.config", "config"),
                    ("containerd.io/gc.ref.content.l.0", "layer"),
                ]),
            ),
            (
                "config",
                labels(&[
                    ("containerd.io/gc.ref.snapshot.cowshed", "top"),
                    ("containerd.io/gc.ref.snapshot.other", "x"),
                ]),
            ),
            ("layer", labels(&[("containerd.io/uncompressed", "diff")])),
            (
                "suffixed",
                labels(&[
                    ("containerd.io/gc.ref.snapshot.cowshed/1", "a"),
                    ("containerd.io/gc.ref.snapshot.cowshed2", "b"),
                ]),
            ),
            (
                "loop",
                labels(&[
                    ("containerd.io/gc.ref.content", "loop"),
                    ("containerd.io/gc.ref.contents", "layer"),
                ]),
            ),
        ]
        .into_iter()
        .map(|(digest, labels)| (digest.to_owned(), labels))
        .collect()
    }

    #[test]
    fn an_image_leads_to_its_manifests_and_their_layers() {
        let blobs = blobs();
        let holds = Holds { blobs: &blobs, snapshotter: "cowshed" };
        let manifests = |target: &'static str| {
            let all: Vec<_> = holds.manifests(target).into_iter().collect();
            all.into_iter()
                .map(|(Manifest(name), top)| (name, top.map(|ChainId(top)| top)))
                .collect::<Vec<_>>()
        };
        let entry = |name: &str, top: Option<&str>| (name.to_owned(), top.map(str::to_owned));
        let top = Some("top");
        assert_eq!(manifests("index"), [entry("amd", top), entry("arm", None), entry("index", None)]);
        assert_eq!(manifests("amd"), [entry("amd", top)]);
        assert_eq!(manifests("gone"), [entry("gone", None)]);
    }

    #[test]
    fn a_blob_holds_snapshots_of_this_snapshotter_only() {
        let blobs = blobs();
        let holds = |snapshotter| Holds { blobs: &blobs, snapshotter };
        let table = [
            ("index", "cowshed", vec!["top"]),
            ("index", "other", vec!["x"]),
            ("layer", "cowshed", vec![]),
            ("suffixed", "cowshed", vec!["a"]),
            ("loop", "cowshed", vec![]),
        ];
        for (digest, snapshotter, expected) in table {
            let found: Vec<_> = holds(snapshotter).snapshots(digest).into_iter().collect();
            assert_eq!(found, expected, "{digest} {snapshotter}");
        }
    }
}
