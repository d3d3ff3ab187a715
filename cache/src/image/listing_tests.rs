//! What is listed, and what is read for it: against a containerd that counts.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, path::Path, sync::Mutex};

use axum::{Router, extract::Request, routing::post};
use containerd_client::{
    services::v1::{
        Image, Info, InfoRequest, InfoResponse, ListContentRequest, ListContentResponse, ListImagesRequest,
        ListImagesResponse, ReadContentRequest, ReadContentResponse,
        snapshots::{StatSnapshotRequest, StatSnapshotResponse},
    },
    types,
};
use serde_json::{Value, json};
use tonic::Status;

use super::*;
use crate::image::{
    containerd_fake::{served, stream, unary},
    manifest::DOCUMENT_MAX_BYTES,
};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const NAME: &str = "r.example/app:1";

/// containerd's images and blobs, and what was asked.
#[derive(Default)]
struct Store {
    images: Mutex<BTreeMap<String, Digest>>,
    blobs: Mutex<BTreeMap<String, Vec<u8>>>,
    /// The blob that cannot be read.
    broken: Mutex<Option<Digest>>,
    /// Blobs that were read.
    read: Mutex<Vec<String>>,
}

impl Store {
    fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        self.blobs.lock().unwrap().insert(digest.to_string(), bytes.to_vec());
        digest
    }

    fn remove(&self, digest: &Digest) -> Vec<u8> {
        self.blobs.lock().unwrap().remove(digest.as_str()).unwrap()
    }

    /// An image of one layer that is for this architecture: its manifest.
    fn image(&self, architecture: &str, layer: &str) -> Digest {
        let diff = Digest::of(layer.as_bytes()).to_string();
        let rootfs = json!({ "type": "layers", "diff_ids": [diff] });
        let config = json!({ "os": "linux", "architecture": architecture, "rootfs": rootfs }).to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": self.put(config.as_bytes()).to_string(),
                "size": config.len(),
            },
            "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": diff, "size": 1 }],
        });
        self.put(manifest.to_string().as_bytes())
    }

    /// The image leads to an index of these.
    fn lead(&self, entries: &[Value]) -> Digest {
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
        let digest = self.put(index.to_string().as_bytes());
        self.images.lock().unwrap().insert(NAME.to_owned(), digest.clone());
        digest
    }

    fn images(&self) -> ListImagesResponse {
        let image = |(name, digest): (&String, &Digest)| {
            let digest = digest.to_string();
            let target = types::Descriptor { media_type: INDEX.to_owned(), digest, ..Default::default() };
            Image { name: name.clone(), target: Some(target), ..Default::default() }
        };
        ListImagesResponse { images: self.images.lock().unwrap().iter().map(image).collect() }
    }

    fn info(&self, digest: &str) -> Result<InfoResponse, Status> {
        let blobs = self.blobs.lock().unwrap();
        let blob = blobs.get(digest).ok_or_else(|| Status::not_found("no such blob"))?;
        let info = Info { digest: digest.to_owned(), size: blob.len() as i64, ..Info::default() };
        Ok(InfoResponse { info: Some(info) })
    }

    fn list(&self) -> Vec<ListContentResponse> {
        let info = |digest: &String| Info { digest: digest.clone(), ..Info::default() };
        // Page by page.
        let page = |digest| ListContentResponse { info: vec![info(digest)] };
        self.blobs.lock().unwrap().keys().map(page).collect()
    }

    fn read(&self, digest: &str) -> Result<Vec<ReadContentResponse>, Status> {
        self.read.lock().unwrap().push(digest.to_owned());
        if self.broken.lock().unwrap().as_ref().is_some_and(|broken| broken.as_str() == digest) {
            return Err(Status::unknown("input/output error"));
        }
        let blobs = self.blobs.lock().unwrap();
        let blob = blobs.get(digest).ok_or_else(|| Status::not_found("no such blob"))?;
        Ok(blob.chunks(1 << 20).map(|part| ReadContentResponse { offset: 0, data: part.to_vec() }).collect())
    }

    /// What was read since the last time that this was asked, sorted.
    fn reads(&self) -> Vec<String> {
        let mut reads = std::mem::take(&mut *self.read.lock().unwrap());
        reads.sort();
        reads
    }
}

/// An entry of an index; without an architecture it does not say for what it is.
fn entry(media_type: &str, digest: &Digest, architecture: Option<&str>) -> Value {
    let platform = architecture.map(|architecture| json!({ "os": "linux", "architecture": architecture }));
    json!({ "mediaType": media_type, "digest": digest.to_string(), "size": 1, "platform": platform })
}

fn containerd(store: &Arc<Store>) -> Router {
    let [images, infos, lists, reads] = [(); 4].map(|()| store.clone());
    let images =
        async move |request: Request| unary(request, move |_: ListImagesRequest| Ok(images.images())).await;
    let info =
        async move |request: Request| unary(request, move |of: InfoRequest| infos.info(&of.digest)).await;
    let list =
        async move |request: Request| stream(request, move |_: ListContentRequest| Ok(lists.list())).await;
    let read = async move |request: Request| {
        stream(request, move |of: ReadContentRequest| reads.read(&of.digest)).await
    };
    let stat = async |request: Request| {
        let none = |_: StatSnapshotRequest| Err::<StatSnapshotResponse, _>(Status::not_found("none"));
        unary(request, none).await
    };
    Router::new()
        .route("/containerd.services.images.v1.Images/List", post(images))
        .route("/containerd.services.content.v1.Content/Info", post(info))
        .route("/containerd.services.content.v1.Content/List", post(list))
        .route("/containerd.services.content.v1.Content/Read", post(read))
        .route("/containerd.services.snapshots.v1.Snapshots/Stat", post(stat))
}

fn images(store: &Arc<Store>, directory: &Path) -> Images {
    served(containerd(store), directory)
}

/// Platforms and manifests, as they are listed.
async fn listed(images: &Images) -> Vec<(String, Option<Digest>)> {
    let all = images.list_on_disk(None).await.unwrap();
    let row =
        |image: ImageInfo| (image.platform, image.manifest_digest.map(|digest| digest.parse().unwrap()));
    all.into_iter().map(row).collect()
}

fn row(platform: &str, manifest: &Digest) -> (String, Option<Digest>) {
    (platform.to_owned(), Some(manifest.clone()))
}

fn sorted<const N: usize>(digests: [&Digest; N]) -> Vec<String> {
    let mut all = digests.map(Digest::to_string).to_vec();
    all.sort();
    all
}

#[tokio::test]
async fn a_document_is_read_once_and_a_layer_never() {
    let (store, directory) = (Arc::new(Store::default()), tempfile::tempdir().unwrap());
    let [amd, arm] = ["amd64", "arm64"].map(|architecture| store.image(architecture, architecture));
    let (large, small) = (store.put(&vec![b' '; DOCUMENT_MAX_BYTES + 1]), store.put(b"a small layer"));
    // A manifest whose configuration is a layer.
    let odd = String::from_utf8(store.blobs.lock().unwrap()[amd.as_str()].clone()).unwrap();
    let odd: Value = serde_json::from_str(&odd).unwrap();
    let config: Digest = odd["config"]["digest"].as_str().unwrap().parse().unwrap();
    let odd = store.put(odd.to_string().replace(config.as_str(), large.as_str()).as_bytes());
    let index = store.lead(&[
        entry(MANIFEST, &amd, Some("amd64")),
        entry(MANIFEST, &arm, Some("arm64")),
        entry("", &large, None),
        entry(MANIFEST, &small, None),
        entry(MANIFEST, &odd, None),
        entry(MANIFEST, &Digest::of(b"never pulled"), Some("s390x")),
    ]);
    let arm_bytes = store.remove(&arm);
    let images = images(&store, directory.path());

    assert_eq!(listed(&images).await, [row("linux/amd64", &amd)]);
    assert_eq!(store.reads(), sorted([&index, &amd, &config, &small, &odd]));
    assert_eq!(listed(&images).await, [row("linux/amd64", &amd)]);
    assert_eq!(store.reads(), sorted([]));
    // What was not there may come, and what was may go.
    assert_eq!(store.put(&arm_bytes), arm);
    let both = [row("linux/amd64", &amd), row("linux/arm64", &arm)];
    assert_eq!(listed(&images).await, both);
    assert_eq!(store.reads().len(), 2);
    let config = store.remove(&config);
    assert_eq!(listed(&images).await, [row("linux/arm64", &arm)]);
    store.put(&config);
    assert_eq!(listed(&images).await, both);
    store.remove(&amd);
    assert_eq!(listed(&images).await, [row("linux/arm64", &arm)]);
    assert_eq!(store.reads(), sorted([]));
}

#[tokio::test]
async fn what_cannot_be_read_hides_nothing_else() {
    let (store, directory) = (Arc::new(Store::default()), tempfile::tempdir().unwrap());
    let [amd, arm] = ["amd64", "arm64"].map(|architecture| store.image(architecture, architecture));
    let index = store.lead(&[entry(MANIFEST, &amd, Some("amd64")), entry(MANIFEST, &arm, Some("arm64"))]);
    let images = images(&store, directory.path());
    *store.broken.lock().unwrap() = Some(index);
    assert_eq!(listed(&images).await, [(Platform::host().to_string(), None)]);
    *store.broken.lock().unwrap() = Some(amd.clone());
    assert_eq!(listed(&images).await, [row("linux/arm64", &arm)]);
    *store.broken.lock().unwrap() = None;
    assert_eq!(listed(&images).await, [row("linux/amd64", &amd), row("linux/arm64", &arm)]);
}

#[tokio::test]
async fn of_two_for_one_platform_that_is_listed_which_an_acquire_takes() {
    let (store, directory) = (Arc::new(Store::default()), tempfile::tempdir().unwrap());
    let [one, two] = ["one", "two"].map(|layer| store.image("amd64", layer));
    let images = images(&store, directory.path());
    let platform = Platform::parse("linux/amd64").unwrap();
    for (first, second) in [(&one, &two), (&two, &one)] {
        let index =
            store.lead(&[entry(MANIFEST, first, Some("amd64")), entry(MANIFEST, second, Some("amd64"))]);
        assert_eq!(listed(&images).await, [row("linux/amd64", first)]);
        let taken = images.0.facts(&index, &platform).await.unwrap().unwrap();
        assert_eq!(taken.manifest, *first);
        store.lead(&[
            entry(MANIFEST, &Digest::of(b"not here"), Some("amd64")),
            entry(MANIFEST, first, Some("amd64")),
            entry(MANIFEST, second, Some("amd64")),
        ]);
        assert_eq!(listed(&images).await.len(), 1, "the one to be taken is not here");
    }
}
