//! Rekor's word that it has seen a signature, and when: the bundle that cosign keeps beside it.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer, UnixTime, pem::PemObject as _};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{Signature, certificate::Leaf, key::PublicKey};
use crate::{error::shown, image::Digest};

#[derive(Deserialize)]
struct Bundle {
    #[serde(rename = "SignedEntryTimestamp")]
    timestamp: String,
    #[serde(rename = "Payload")]
    entry: Entry,
}

#[derive(Deserialize)]
struct Entry {
    body: String,
    #[serde(rename = "integratedTime")]
    time: u64,
    #[serde(rename = "logIndex")]
    index: u64,
    #[serde(rename = "logID")]
    log: String,
}

/// Of entries of signatures as cosign makes them.
const KIND: &str = "hashedrekord";
/// Another one is cut here when it is told, in bytes.
const KIND_MAX_BYTES: usize = 40;

#[derive(Deserialize)]
struct Body {
    kind: String,
    spec: Spec,
}

#[derive(Deserialize)]
struct Spec {
    data: Data,
    signature: Signed,
}

#[derive(Deserialize)]
struct Data {
    hash: Hash,
}

#[derive(Deserialize)]
struct Hash {
    algorithm: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Signed {
    content: String,
    public_key: Content,
}

#[derive(Deserialize)]
struct Content {
    content: String,
}

/// Who has signed.
#[derive(Clone, Copy)]
pub(super) enum Signer<'a> {
    Key(&'a PublicKey),
    Certificate(&'a Leaf),
}

/// When the log has seen this signature by this signer.
pub(super) fn expect(
    keys: &[PublicKey],
    signature: &Signature<'_>,
    bytes: &[u8],
    signer: Signer<'_>,
) -> Result<UnixTime, String> {
    let bundle = signature.bundle.ok_or("it has no bundle: Rekor has not seen it, or it was not kept")?;
    let unreadable = |error: &dyn std::fmt::Display| format!("its bundle cannot be read: {error}");
    let Bundle { timestamp, entry } = serde_json::from_str(bundle).map_err(|error| unreadable(&error))?;
    let timestamp = STANDARD.decode(timestamp).map_err(|error| unreadable(&error))?;
    let signed = entry.canonical();
    if !keys.iter().any(|key| key.has_signed(signed.as_bytes(), &timestamp)) {
        return Err("its bundle is not signed by the log's key".to_owned());
    }
    let body = STANDARD.decode(&entry.body).map_err(|error| unreadable(&error))?;
    let body: Body = serde_json::from_slice(&body).map_err(|error| unreadable(&error))?;
    if body.kind != KIND {
        return Err(format!("its bundle is of kind {:?}, not {KIND:?}", shown(&body.kind, KIND_MAX_BYTES)));
    }
    if !body.is_about(signature.payload, bytes, signer) {
        return Err("its bundle is about another signature".to_owned());
    }
    Ok(UnixTime::since_unix_epoch(Duration::from_secs(entry.time)))
}

impl Entry {
    /// As it is signed: JSON by RFC 8785, which sorts names. (serde_json writes such strings and numbers as it wants them.)
    fn canonical(&self) -> String {
        format!(
            r#"{{"body":{},"integratedTime":{},"logID":{},"logIndex":{}}}"#,
            json!(self.body),
            self.time,
            json!(self.log),
            self.index
        )
    }
}

impl Body {
    fn is_about(&self, payload: &[u8], signature: &[u8], signer: Signer<'_>) -> bool {
        let Spec { data, signature: signed } = &self.spec;
        let hash = format!("sha256:{}", data.hash.value);
        data.hash.algorithm == "sha256"
            && hash == Digest::of_hash(&Sha256::digest(payload)).as_str()
            && STANDARD.decode(&signed.content).is_ok_and(|content| content == signature)
            && STANDARD.decode(&signed.public_key.content).is_ok_and(|pem| signer.is(&pem))
    }
}

impl Signer<'_> {
    fn is(self, pem: &[u8]) -> bool {
        match self {
            Self::Key(key) => {
                SubjectPublicKeyInfoDer::from_pem_slice(pem).is_ok_and(|der| *der == *key.der())
            }
            Self::Certificate(leaf) => {
                CertificateDer::from_pem_slice(pem).is_ok_and(|der| *der == *leaf.der())
            }
        }
    }
}
