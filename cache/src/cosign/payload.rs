//! What is signed: red hat's "simple signing" document, which names the digest.

use serde::Deserialize;

use crate::{error::shown, image::Digest};

const TYPE: &str = "cosign container image signature";
/// Words of a payload's that are repeated are cut here, in bytes.
const TOLD_MAX_BYTES: usize = 100;

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: Image,
    r#type: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// Fails unless it is about this digest. Its `docker-reference` does not count, as with cosign: images are copied and mirrored with
/// their signatures.
pub(super) fn expect(payload: &[u8], digest: &Digest) -> Result<(), String> {
    let payload: Payload =
        serde_json::from_slice(payload).map_err(|error| format!("its payload cannot be read: {error}"))?;
    let Critical { image, r#type } = payload.critical;
    if r#type != TYPE {
        return Err(format!("its payload is a {:?}, not a {TYPE:?}", shown(&r#type, TOLD_MAX_BYTES)));
    }
    if image.digest != digest.as_str() {
        return Err(format!("it is for {}", shown(&image.digest, TOLD_MAX_BYTES)));
    }
    Ok(())
}
