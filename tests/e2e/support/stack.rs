//! Images of several layers, made member by member.

use std::io::Write as _;

use tar::{Builder, EntryType, Header};

use super::{
    Outcome,
    fake_image::{MANIFEST, digest},
};

/// How a layer is compressed.
#[derive(Clone, Copy)]
pub(crate) enum Compression {
    None,
    Gzip,
    /// One member of gzip's for each half.
    TwiceGzip,
    Zstd,
}

/// A layer in the making.
pub(crate) struct Layer(Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    /// A header of this kind; all else of it can be set.
    pub(crate) fn header(kind: EntryType, mode: u32) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(0);
        header
    }

    /// The names as they are, whatever the library thinks of them.
    pub(crate) fn raw(mut self, mut header: Header, name: &[u8], link: &[u8], data: &[u8]) -> Outcome<Self> {
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        if !data.is_empty() {
            header.set_size(data.len() as u64);
        }
        header.set_cksum();
        self.0.append(&header, data)?;
        Ok(self)
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Outcome<Self> {
        self.raw(Self::header(EntryType::Regular, 0o644), name.as_bytes(), b"", data)
    }

    pub(crate) fn directory(self, name: &str, mode: u32) -> Outcome<Self> {
        self.raw(Self::header(EntryType::Directory, mode), name.as_bytes(), b"", b"")
    }

    pub(crate) fn link(self, kind: EntryType, name: &str, target: &str) -> Outcome<Self> {
        self.raw(Self::header(kind, 0o777), name.as_bytes(), target.as_bytes(), b"")
    }

    pub(crate) fn device(self, kind: EntryType, name: &str, major: u32, minor: u32) -> Outcome<Self> {
        let mut header = Self::header(kind, 0o660);
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        self.raw(header, name.as_bytes(), b"", b"")
    }

    /// Extended headers of the next member.
    pub(crate) fn pax(mut self, records: &[(&str, &[u8])]) -> Outcome<Self> {
        self.0.append_pax_extensions(records.iter().copied())?;
        Ok(self)
    }

    pub(crate) fn bytes(self) -> Outcome<Vec<u8>> {
        Ok(self.0.into_inner()?)
    }
}

/// An image of such layers.
pub(crate) struct Stack {
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    /// As they are served.
    pub(crate) layers: Vec<Vec<u8>>,
}

impl Stack {
    /// Of inflated layers, the lowest first.
    pub(crate) fn of(tars: &[(Vec<u8>, Compression)]) -> Outcome<Self> {
        let mut layers = Vec::new();
        let mut described = Vec::new();
        for (tar, compression) in tars {
            let (layer, suffix) = match compression {
                Compression::None => (tar.clone(), ""),
                Compression::Gzip => (gzip(tar)?, "+gzip"),
                Compression::TwiceGzip => {
                    let (first, second) = tar.split_at(tar.len() / 2);
                    ([gzip(first)?, gzip(second)?].concat(), "+gzip")
                }
                Compression::Zstd => (zstd::encode_all(&tar[..], 3)?, "+zstd"),
            };
            described.push(serde_json::json!({
                "mediaType": format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
                "digest": digest(&layer),
                "size": layer.len(),
            }));
            layers.push(layer);
        }
        let diff_ids: Vec<String> = tars.iter().map(|(tar, _)| digest(tar)).collect();
        let config = serde_json::to_vec(&serde_json::json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Cmd": ["/bin/sh"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        }))?;
        let manifest = serde_json::to_vec(&serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(&config),
                "size": config.len(),
            },
            "layers": described,
        }))?;
        Ok(Self { manifest, config, layers })
    }
}

fn gzip(bytes: &[u8]) -> Outcome<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}
