//! What indexes, manifests and image configurations say; OCI's and Docker's.

use serde::Deserialize;

use super::{
    Digest, Platform,
    platform::{DeclaredPlatform, short},
};
use crate::error::{Error, Reason, Result};

/// Manifests and configurations above this are refused, in bytes.
pub(crate) const DOCUMENT_MAX_BYTES: usize = 8 << 20;
/// Images that want more said to their process are refused, in bytes as [`ProcessConfig::bytes`] counts them: each
/// lease, the ledger and many replies repeat it. Linux gives a process's arguments and environment 2 MiB at the most;
/// real images have a few KiB.
const PROCESS_MAX_BYTES: usize = 64 << 10;
/// Images with more layers are refused.
const LAYERS_MAX: usize = 512;
/// Indexes with more entries are refused: each entry is a label of containerd's, which lists all blobs of the host with all
/// their labels, in messages that are bounded.
const INDEX_MAX: usize = 1000;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// Tars, compressed or not.
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];
/// The same, which not every registry may hand out, and which therefore need not be where the image is.
const FOREIGN_LAYERS: [&str; 5] = [
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// What we ask registries for.
pub(crate) const ACCEPTED: [&str; 4] = [OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST];

/// The same of what cannot be an index.
pub(super) const MANIFESTS: [&str; 2] = [OCI_MANIFEST, DOCKER_MANIFEST];

/// A reference to a blob or document.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default)]
    pub(super) platform: Option<DeclaredPlatform>,
}

impl Descriptor {
    /// Whether an index can be there.
    pub(super) fn may_be_index(&self) -> bool {
        matches!(self.media_type.as_str(), "" | OCI_INDEX | DOCKER_INDEX)
    }

    /// Whether it is a layer that need not be where the image is.
    pub(super) fn is_foreign(&self) -> bool {
        FOREIGN_LAYERS.contains(&self.media_type.as_str())
    }

    /// Whether it is a layer that can be unpacked.
    fn is_layer(&self) -> bool {
        LAYERS.contains(&self.media_type.as_str()) || self.is_foreign()
    }
}

/// A document that an image's name or an index points to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Document {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

/// An image manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

impl Manifest {
    /// Bytes of all layers together, compressed.
    pub(super) fn compressed_bytes(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size))
    }
}

/// How an image wants its process started; the fields of the OCI image configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs, reason = "named as in the OCI image specification")]
pub struct ProcessConfig {
    #[serde(deserialize_with = "null_is_empty")]
    pub entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_is_empty")]
    pub cmd: Vec<String>,
    #[serde(deserialize_with = "null_is_empty")]
    pub env: Vec<String>,
    pub user: String,
    pub working_dir: String,
}

impl ProcessConfig {
    /// Its size: each string with the few bytes that any form of it takes besides, so that empty ones count too.
    pub(super) fn bytes(&self) -> usize {
        const BESIDES: usize = 4;
        let many = self.entrypoint.iter().chain(&self.cmd).chain(&self.env);
        many.chain([&self.user, &self.working_dir]).map(|text| text.len() + BESIDES).sum()
    }
}

/// What of an image configuration matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ImageConfig {
    pub(super) platform: Platform,
    pub(super) process: ProcessConfig,
    pub(super) diff_ids: Vec<Digest>,
}

/// A document's bytes, understood, and the media type that they are to be known by.
pub(super) fn parse(bytes: &[u8]) -> Result<(String, Document)> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Raw {
        schema_version: u32,
        #[serde(default)]
        media_type: String,
        config: Option<Descriptor>,
        layers: Option<Vec<Descriptor>>,
        manifests: Option<Vec<Descriptor>>,
    }
    let raw: Raw = serde_json::from_slice(bytes)
        .map_err(|e| unsupported(format!("its manifest cannot be read: {e}")))?;
    if raw.schema_version != 2 {
        return Err(unsupported(format!(
            "its manifest has schema version {}, 2 is needed",
            raw.schema_version
        )));
    }
    let (default, document) = match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), None, None) => (OCI_INDEX, Document::Index(bounded(manifests)?)),
        (None, Some(config), Some(layers)) => (OCI_MANIFEST, Document::Manifest(checked(config, layers)?)),
        _ => return Err(unsupported("its manifest is neither an index nor an image".to_owned())),
    };
    let fits = matches!(
        (&document, raw.media_type.as_str()),
        (_, "")
            | (Document::Index(_), OCI_INDEX | DOCKER_INDEX)
            | (Document::Manifest(_), OCI_MANIFEST | DOCKER_MANIFEST)
    );
    if !fits {
        return Err(unsupported(format!("its manifest has media type {:?}", raw.media_type)));
    }
    let media_type = if raw.media_type.is_empty() { default.to_owned() } else { raw.media_type };
    Ok((media_type, document))
}

fn bounded(entries: Vec<Descriptor>) -> Result<Vec<Descriptor>> {
    match entries.len() {
        0..=INDEX_MAX => Ok(entries),
        many => Err(unsupported(format!("its index has {many} entries, {INDEX_MAX} are allowed"))),
    }
}

fn checked(config: Descriptor, layers: Vec<Descriptor>) -> Result<Manifest> {
    if !CONFIGS.contains(&config.media_type.as_str()) {
        return Err(unsupported(format!(
            "its configuration has media type {:?}: it is no image",
            config.media_type
        )));
    }
    if let Some(odd) = layers.iter().find(|layer| !layer.is_layer()) {
        let is_encrypted = odd.media_type.ends_with("+encrypted");
        let hint = if is_encrypted { ": push it without encryption, nobody has the keys here" } else { "" };
        return Err(unsupported(format!(
            "its layer {} has media type {:?}{hint}",
            odd.digest, odd.media_type
        )));
    }
    if layers.is_empty() || layers.len() > LAYERS_MAX {
        return Err(unsupported(format!(
            "it has {} layers, 1 to {LAYERS_MAX} can be unpacked",
            layers.len()
        )));
    }
    // No file is larger than the kernel can count.
    let sum = layers.iter().try_fold(0_i64, |sum, layer| sum.checked_add_unsigned(layer.size));
    if sum.is_none() {
        let largest = layers.iter().map(|layer| layer.size).max().unwrap_or_default();
        return Err(unsupported(format!(
            "its manifest says that its layers have more than {} bytes together, the largest {largest}",
            i64::MAX
        )));
    }
    if config.size > DOCUMENT_MAX_BYTES as u64 {
        return Err(unsupported(format!("its configuration has {} bytes", config.size)));
    }
    Ok(Manifest { config, layers })
}

/// Reads an image configuration and holds it against its manifest.
pub(super) fn parse_config(bytes: &[u8], manifest: &Manifest) -> Result<ImageConfig> {
    // By name: flattened into one field, they would have serde keep all else that is there.
    #[derive(Deserialize)]
    struct Raw {
        #[serde(default, deserialize_with = "short")]
        os: String,
        #[serde(default, deserialize_with = "short")]
        architecture: String,
        #[serde(default, deserialize_with = "short")]
        variant: String,
        #[serde(default)]
        config: Option<ProcessConfig>,
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Vec<Digest>,
    }
    let Raw { os, architecture, variant, config, rootfs } = serde_json::from_slice(bytes)
        .map_err(|e| unsupported(format!("its configuration cannot be read: {e}")))?;
    let (diffs, layers) = (rootfs.diff_ids.len(), manifest.layers.len());
    if diffs != layers {
        return Err(unsupported(format!("its configuration names {diffs} layers, its manifest {layers}")));
    }
    let process = config.unwrap_or_default();
    let bytes = process.bytes();
    if bytes > PROCESS_MAX_BYTES {
        return Err(unsupported(format!(
            "its Entrypoint, Cmd, Env, User and WorkingDir have {bytes} bytes, {PROCESS_MAX_BYTES} are allowed"
        )));
    }
    let platform = Platform::from(&DeclaredPlatform { os, architecture, variant });
    Ok(ImageConfig { platform, process, diff_ids: rootfs.diff_ids })
}

/// Whether this is the media type of an index.
pub(super) fn is_index(media_type: &str) -> bool {
    [OCI_INDEX, DOCKER_INDEX].contains(&media_type)
}

/// The digest of the platform's manifest in an index, as far as the index itself says that it is one.
pub(super) fn in_index(document: &Document, platform: &Platform) -> Option<Digest> {
    match document {
        Document::Index(entries) => {
            let entry = pick(entries, platform).ok().filter(|entry| !entry.may_be_index())?;
            Some(entry.digest.clone())
        }
        Document::Manifest(_) => None,
    }
}

/// The entry of an index that is best for `platform`; the first of several.
pub(super) fn pick<'a>(entries: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor> {
    let distance =
        |entry: &Descriptor| entry.platform.as_ref().and_then(|declared| platform.distance(declared));
    let fitting = entries.iter().filter_map(|entry| distance(entry).map(|distance| (distance, entry)));
    if let Some((_, best)) = fitting.min_by_key(|(distance, _)| *distance) {
        return Ok(best);
    }
    // An index within an index need not say for what it is; nor a manifest: its configuration does.
    if let Some(unsaid) = entries.iter().find(|entry| entry.platform.is_none()) {
        return Ok(unsaid);
    }
    let mut there: Vec<String> = entries
        .iter()
        .filter_map(|entry| entry.platform.as_ref().map(|declared| Platform::from(declared).to_string()))
        // Attestations are filed under this.
        .filter(|platform| platform != "unknown/unknown")
        .collect();
    there.sort();
    there.dedup();
    Err(no_platform(platform, &there))
}

pub(super) fn no_platform(platform: &Platform, there: &[String]) -> Error {
    let list = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
    Error::new(
        Reason::PlatformNotFound,
        format!("it is not there for platform {platform}; it is there for: {list}"),
    )
    .with("platform", platform)
    .with("available", list)
}

/// Indexes within indexes, and the manifest, at the most.
pub(super) const DOCUMENTS_MAX: usize = 6;

pub(super) fn unsupported(what: String) -> Error {
    Error::new(Reason::ImageUnsupported, what)
}

fn null_is_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
