//! What the host's registry was asked for: the access log, from a mark on.

use std::{collections::BTreeMap, fs};

use serde_json::Value;

use super::{Outcome, check, command::sh, cow::REGISTRY, fake_image::digest, same};

const LOG: &str = "/var/log/cowshed-host/registry.log";

/// A moment in the log.
pub(crate) struct Mark(usize);

/// Now.
pub(crate) fn mark() -> Outcome<Mark> {
    Ok(Mark(fs::read(LOG)?.len()))
}

impl Mark {
    /// How often each blob was handed out since, by digest.
    pub(crate) fn blobs(&self) -> Outcome<BTreeMap<String, usize>> {
        let log = fs::read(LOG)?;
        let since = String::from_utf8_lossy(log.get(self.0..).unwrap_or_default()).into_owned();
        let mut counts = BTreeMap::new();
        for line in since.lines().filter(|line| line.contains("\"GET /v2/") && line.contains("/blobs/")) {
            let Some((_, rest)) = line.split_once("/blobs/") else { continue };
            let Some((digest, after)) = rest.split_once(' ') else { continue };
            if after.contains("\" 200 ") || after.contains("\" 206 ") {
                *counts.entry(digest.to_owned()).or_default() += 1;
            }
        }
        Ok(counts)
    }

    /// Fails unless exactly these blobs were handed out since, each once.
    pub(crate) fn each_once(&self, expected: &[String]) -> Outcome {
        let mut wanted: Vec<&String> = expected.iter().collect();
        wanted.sort();
        wanted.dedup();
        let counts = self.blobs()?;
        same!(counts.keys().collect::<Vec<_>>(), wanted, "the blobs that were fetched");
        check!(counts.values().all(|count| *count == 1), "a blob was fetched more than once: {counts:?}");
        Ok(())
    }
}

/// An image as the registry has it.
pub(crate) struct Described {
    pub(crate) digest: String,
    pub(crate) config: String,
    /// Digest and size, the lowest first.
    pub(crate) layers: Vec<(String, u64)>,
}

impl Described {
    /// Configuration and layers.
    pub(crate) fn blobs(&self) -> Vec<String> {
        let layers = self.layers.iter().map(|(digest, _)| digest.clone());
        layers.chain([self.config.clone()]).collect()
    }
}

/// Asks the registry for an image's manifest: "app:1" is cowshed/app with tag 1.
pub(crate) fn describe(name: &str) -> Outcome<Described> {
    let (repository, tag) = name.split_once(':').unwrap_or((name, "latest"));
    let accept =
        "application/vnd.oci.image.manifest.v1+json,application/vnd.docker.distribution.manifest.v2+json";
    let url = format!("http://{REGISTRY}/v2/cowshed/{repository}/manifests/{tag}");
    let manifest = sh(&format!("curl -sf -H 'Accept: {accept}' {url}"))?;
    let digest = digest(manifest.as_bytes());
    let manifest: Value = serde_json::from_str(&manifest)?;
    let text = |value: &Value| value["digest"].as_str().unwrap_or_default().to_owned();
    let layers = manifest["layers"].as_array().cloned().unwrap_or_default();
    check!(!layers.is_empty(), "{name} has no layers: {manifest}");
    Ok(Described {
        digest,
        config: text(&manifest["config"]),
        layers: layers
            .iter()
            .map(|layer| (text(layer), layer["size"].as_u64().unwrap_or_default()))
            .collect(),
    })
}
