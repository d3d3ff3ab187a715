#![allow(clippy::unwrap_used, clippy::panic)]

use serde_json::{Value, json};

use super::*;

fn digest(n: u8) -> Digest {
    Digest::of(&[n])
}

fn descriptor(media_type: &str, n: u8) -> Value {
    json!({ "mediaType": media_type, "digest": digest(n).as_str(), "size": 10 })
}

fn manifest(media_type: Option<&str>, layers: &[&str]) -> Value {
    let layers: Vec<Value> =
        layers.iter().zip((1..=200).cycle()).map(|(kind, n)| descriptor(kind, n)).collect();
    let mut value = json!({ "schemaVersion": 2, "config": descriptor(CONFIGS[0], 0), "layers": layers });
    if let Some(media_type) = media_type {
        value["mediaType"] = media_type.into();
    }
    value
}

fn parsed(value: &Value) -> Result<(String, Document)> {
    parse(value.to_string().as_bytes())
}

#[test]
fn manifests_of_both_kinds_are_read() {
    for (said, known_as) in
        [(None, OCI_MANIFEST), (Some(OCI_MANIFEST), OCI_MANIFEST), (Some(DOCKER_MANIFEST), DOCKER_MANIFEST)]
    {
        let (media_type, document) = parsed(&manifest(said, &LAYERS)).unwrap();
        assert_eq!(media_type, known_as);
        let Document::Manifest(manifest) = document else { panic!("{document:?}") };
        assert_eq!(manifest.layers.len(), LAYERS.len());
        assert_eq!(manifest.layers[1].digest, digest(2));
        assert!(!manifest.layers.iter().any(Descriptor::is_foreign));
    }
}

#[test]
fn foreign_layers_are_layers() {
    let (_, document) = parsed(&manifest(None, &FOREIGN_LAYERS)).unwrap();
    let Document::Manifest(manifest) = document else { panic!("{document:?}") };
    assert_eq!(manifest.layers.len(), FOREIGN_LAYERS.len());
    assert!(manifest.layers.iter().all(Descriptor::is_foreign));
}

#[test]
fn an_index_is_bounded() {
    let index = |entries: usize| json!({ "schemaVersion": 2, "manifests": vec![descriptor(OCI_MANIFEST, 1); entries] });
    let (_, document) = parsed(&index(1000)).unwrap();
    assert!(matches!(document, Document::Index(entries) if entries.len() == 1000));
    let error = parsed(&index(1001)).unwrap_err();
    assert_eq!(error.reason(), Reason::ImageUnsupported);
    assert!(error.to_string().contains("1001 entries, 1000 are allowed"), "{error}");
}

#[test]
fn sizes_that_no_file_can_have_are_refused() {
    let most = u64::try_from(i64::MAX).unwrap();
    let table = [
        ([1, 2], true),
        ([most - 1, 1], true),
        ([most, 1], false),
        ([most + 1, 0], false),
        ([u64::MAX, u64::MAX], false),
    ];
    for (sizes, fits) in table {
        let mut value = manifest(None, &[LAYERS[1], LAYERS[1]]);
        sizes.iter().enumerate().for_each(|(at, size)| value["layers"][at]["size"] = (*size).into());
        match parsed(&value) {
            Ok((_, Document::Manifest(manifest))) => {
                assert!(fits, "{sizes:?}");
                assert_eq!(manifest.compressed_bytes(), sizes.iter().sum::<u64>());
            }
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert!(!fits && error.to_string().contains("bytes together"), "{sizes:?}: {error}");
                assert_eq!(error.reason(), Reason::ImageUnsupported);
            }
        }
    }
}

#[test]
fn what_is_no_image_is_refused_with_what_it_is() {
    let mut schema1 = manifest(None, &[LAYERS[0]]);
    schema1["schemaVersion"] = 1.into();
    let mut artifact = manifest(None, &[LAYERS[0]]);
    artifact["config"]["mediaType"] = "application/vnd.oci.empty.v1+json".into();
    let mut both = manifest(None, &[LAYERS[0]]);
    both["manifests"] = json!([]);
    let mut bad_digest = manifest(None, &[LAYERS[0]]);
    bad_digest["layers"][0]["digest"] = "sha256:../../etc/passwd".into();
    let mut negative = manifest(None, &[LAYERS[0]]);
    negative["layers"][0]["size"] = (-1).into();
    let encrypted = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted";
    let other = "application/vnd.oci.image.layer.v1.erofs";
    let table = [
        (schema1, "schema version 1"),
        (artifact, "no image"),
        (both, "neither"),
        (bad_digest, "no sha256 digest"),
        (negative, "cannot be read"),
        (manifest(None, &[encrypted]), "without encryption"),
        (manifest(None, &[other]), "erofs"),
        (manifest(None, &[""]), "media type \"\""),
        (manifest(None, &[]), "0 layers"),
        (manifest(None, &[LAYERS[1]; 513]), "513 layers"),
        (manifest(Some(OCI_INDEX), &[LAYERS[1]]), "media type"),
        (json!({}), "cannot be read"),
        (json!([]), "cannot be read"),
    ];
    for (value, says) in table {
        let error = parsed(&value).unwrap_err();
        assert_eq!(error.reason(), Reason::ImageUnsupported);
        assert!(error.to_string().contains(says), "{says}: {error}");
    }
}

#[test]
fn an_index_is_picked_from_by_platform() {
    let entry = |n: u8, os: &str, architecture: &str| {
        let mut entry = descriptor(OCI_MANIFEST, n);
        entry["platform"] = json!({ "os": os, "architecture": architecture });
        entry
    };
    let index = json!({
        "schemaVersion": 2,
        "manifests": [entry(1, "unknown", "unknown"), entry(2, "linux", "arm64"), entry(3, "linux", "amd64")],
    });
    let (_, Document::Index(entries)) = parsed(&index).unwrap() else { panic!("no index") };
    let found = pick(&entries, &Platform::parse("linux/amd64").unwrap()).unwrap();
    assert_eq!(found.digest, digest(3));
    let error = pick(&entries, &Platform::parse("linux/s390x").unwrap()).unwrap_err();
    assert_eq!(error.reason(), Reason::PlatformNotFound);
    assert!(error.to_string().ends_with("linux/amd64, linux/arm64"), "{error}");
}

#[test]
fn configurations() {
    let (_, Document::Manifest(manifest)) = parsed(&manifest(None, &[LAYERS[1], LAYERS[1]])).unwrap() else {
        panic!("no manifest")
    };
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Entrypoint": ["/app"], "Cmd": null, "Env": ["A=b"], "User": "1000", "WorkingDir": "/srv" },
        "rootfs": { "type": "layers", "diff_ids": [digest(7).as_str(), digest(8).as_str()] },
    });
    let read = parse_config(config.to_string().as_bytes(), &manifest).unwrap();
    assert_eq!(read.platform.to_string(), "linux/amd64");
    assert_eq!(read.diff_ids, [digest(7), digest(8)]);
    assert_eq!(read.process.entrypoint, ["/app"]);
    assert_eq!((read.process.cmd.len(), read.process.user.as_str()), (0, "1000"));
    // What else is there does not matter.
    let mut full = config.clone();
    full["variant"] = "v2".into();
    full["history"] = json!([{ "created_by": "cow" }, 5, null]);
    full["platform"] = json!({ "os": 7 });
    let read = parse_config(full.to_string().as_bytes(), &manifest).unwrap();
    assert_eq!(read.platform.to_string(), "linux/amd64/v2");

    let mut short = config.clone();
    short["rootfs"]["diff_ids"] = json!([digest(7).as_str()]);
    let error = parse_config(short.to_string().as_bytes(), &manifest).unwrap_err();
    assert!(error.to_string().contains("names 1 layers, its manifest 2"), "{error}");
    let mut odd = config.clone();
    odd["architecture"] = "x".repeat(65).into();
    let error = parse_config(odd.to_string().as_bytes(), &manifest).unwrap_err();
    assert!(error.to_string().contains("65 bytes, 64 are allowed"), "{error}");
    let mut bare = config;
    bare["config"] = Value::Null;
    assert_eq!(
        parse_config(bare.to_string().as_bytes(), &manifest).unwrap().process,
        ProcessConfig::default()
    );
}

#[test]
fn what_the_process_is_told_is_bounded() {
    let (_, Document::Manifest(manifest)) = parsed(&manifest(None, &[LAYERS[1]])).unwrap() else {
        panic!("no manifest")
    };
    let much = "x".repeat(PROCESS_MAX_BYTES);
    let table = [
        (json!({ "Env": ["x".repeat(PROCESS_MAX_BYTES - 12)] }), true),
        (json!({ "Env": ["x".repeat(PROCESS_MAX_BYTES - 11)] }), false),
        (json!({ "Entrypoint": [much] }), false),
        (json!({ "Cmd": [much] }), false),
        (json!({ "User": much }), false),
        (json!({ "WorkingDir": much }), false),
        // Empty ones take room too.
        (json!({ "Env": vec![""; PROCESS_MAX_BYTES / 2] }), false),
        // Nobody is told of these.
        (json!({ "Labels": { "a": much } }), true),
    ];
    for (process, is_taken) in table {
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": process, "rootfs": { "diff_ids": [digest(7).as_str()] },
        });
        match parse_config(config.to_string().as_bytes(), &manifest) {
            Ok(_) => assert!(is_taken),
            Err(error) => {
                assert!(!is_taken, "{error}");
                assert_eq!(error.reason(), Reason::ImageUnsupported);
                assert!(error.to_string().contains("bytes, 65536 are allowed"), "{error}");
            }
        }
    }
}

#[test]
fn what_an_index_says_is_the_platforms_manifest() {
    let here = Platform::parse("linux/amd64").unwrap();
    let of = |media_type: &str, architecture: &str| {
        let mut entry = descriptor(media_type, 7);
        entry["platform"] = json!({ "os": "linux", "architecture": architecture });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] });
        in_index(&parsed(&index).unwrap().1, &here)
    };
    assert_eq!(of(OCI_MANIFEST, "amd64"), Some(digest(7)));
    // What is further in is not known yet.
    for (media_type, architecture) in [(OCI_INDEX, "amd64"), ("", "amd64"), (OCI_MANIFEST, "arm64")] {
        assert_eq!(of(media_type, architecture), None, "{media_type} {architecture}");
    }
    let single = parsed(&manifest(None, &[LAYERS[0]])).unwrap().1;
    assert_eq!(in_index(&single, &here), None);
}
