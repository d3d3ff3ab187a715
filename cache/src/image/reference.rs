//! Image references in their full form.

use std::fmt;

use oci_client::Reference;

use crate::error::{Error, Reason, Result};

/// Longer references are refused, in bytes: leases, labels and errors repeat them.
const MAX_BYTES: usize = 512;

/// A parsed image reference. Equal if they mean the same: `debian` is `docker.io/library/debian:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageRef(Reference);

impl ImageRef {
    /// Parses `[registry/]repository[:tag][@digest]`.
    ///
    /// # Errors
    /// `IMAGE_REFERENCE_INVALID`, with what is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        let shown: String = text.chars().take(300).collect();
        let wrong = |what: &str| {
            let message = format!(
                "image {shown:?} is no image reference: {what}; it has the form [registry/]repository[:tag][@digest]"
            );
            Error::new(Reason::ImageReferenceInvalid, message).with("image", &shown)
        };
        if text.is_empty() {
            return Err(wrong("it is empty"));
        }
        if text.len() > MAX_BYTES {
            return Err(wrong(&format!("it has {} bytes, {MAX_BYTES} are allowed", text.len())));
        }
        if let Some((scheme, rest)) = text.split_once("://") {
            return Err(wrong(&format!("it is without {scheme}://, as {rest:?}")));
        }
        if let Some(what) = text.split_once('@').and_then(|(_, digest)| no_digest(digest)) {
            return Err(wrong(&what));
        }
        let reference: Reference = text.parse().map_err(|e: oci_client::ParseError| wrong(&e.to_string()))?;
        // What stands where a registry could stand is let through by the parser.
        if reference.repository().contains(|c: char| c.is_ascii_uppercase()) {
            return Err(wrong("its repository has capital letters"));
        }
        let parsed = Self(reference);
        // With the registry and tag that it means, it may be longer.
        let full = parsed.to_string().len();
        if full > MAX_BYTES {
            return Err(wrong(&format!("it has {full} bytes in its full form, {MAX_BYTES} are allowed")));
        }
        Ok(parsed)
    }

    /// Registry host, with its port if it has one.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// The repository within the registry.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// The digest that it is pinned to, if it is.
    pub fn digest(&self) -> Option<super::Digest> {
        self.0.digest().and_then(|digest| digest.parse().ok())
    }

    /// The reference for the registry client, at the same registry.
    pub(crate) fn inner(&self) -> &Reference {
        &self.0
    }
}

/// Why it is no digest, if it is none.
fn no_digest(text: &str) -> Option<String> {
    let error = text.parse::<super::Digest>().err()?;
    let Some(hex) = text.strip_prefix("sha256:") else { return Some(error.to_string()) };
    let how = match hex.chars().count() {
        ..64 => "too short",
        64 => "no number",
        65.. => "too long",
    };
    Some(format!("the digest is {how}: sha256 has 64 hex digits (0-9, a-f), not {hex:?}"))
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.whole())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn full_forms() {
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let table = [
            ("debian", "docker.io/library/debian:latest".to_owned()),
            ("docker.io/debian:12", "docker.io/library/debian:12".to_owned()),
            ("me/app", "docker.io/me/app:latest".to_owned()),
            ("127.0.0.1:5000/cowshed/app:1", "127.0.0.1:5000/cowshed/app:1".to_owned()),
            ("localhost/app", "localhost/app:latest".to_owned()),
        ];
        for (text, full) in table {
            assert_eq!(ImageRef::parse(text).unwrap().to_string(), full, "{text}");
        }
        let pinned = format!("registry.example/app@{digest}");
        assert_eq!(ImageRef::parse(&pinned).unwrap().to_string(), pinned);
        let both = format!("registry.example/app:1@{digest}");
        assert_eq!(ImageRef::parse(&both).unwrap().to_string(), both);
    }

    #[test]
    fn what_is_none() {
        for bad in ["", " ", "a b", "app:", "app@sha256:abc", "-x", "a//b", "app:1@md5:00", "a\nb"] {
            let reason = ImageRef::parse(bad).err().map(|error| error.reason());
            assert_eq!(reason, Some(Reason::ImageReferenceInvalid), "{bad:?}");
        }
        let short = "z".repeat(64);
        for (bad, says) in [
            ("tiny@sha256:abc", "the digest is too short: sha256 has 64 hex digits"),
            (&format!("tiny:1@sha256:{short}0"), "too long"),
            (&format!("tiny@sha256:{short}"), "no number"),
            ("tiny@md5:00", "md5:00"),
            ("http://r.example/tiny:1", "without http://, as \"r.example/tiny:1\""),
        ] {
            let error = ImageRef::parse(bad).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let of = |bytes: usize| format!("{}.r/app:1", "r".repeat(bytes - 8));
        assert!(ImageRef::parse(&of(512)).is_ok());
        let error = ImageRef::parse(&of(513)).unwrap_err().to_string();
        assert!(error.contains("513 bytes, 512 are allowed"), "{error}");
    }
}
