//! Policies: which images have to be signed by whom; `[[verification.cosign]]`.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use regex_lite::Regex;
use serde::Deserialize;

use super::{
    Trust,
    certificate::{Keyless, Roots},
    key::PublicKey,
    pattern::Pattern,
};
use crate::image::ImageRef;

/// Files with keys and certificates above this are not read, in bytes.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// Images of these repositories are used only if one of those whom it trusts has signed them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Policy {
    images: Vec<Pattern>,
    keys: Vec<PathBuf>,
    keyless: Option<Certified>,
    rekor_key: Option<PathBuf>,
}

/// Who signs with certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Certified {
    roots: PathBuf,
    identity: Identity,
    issuer: String,
}

/// For whom a certificate has to be: one of these.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    is: Option<String>,
    /// As it is written, and so that it has to fit from end to end.
    matches: Option<(String, Regex)>,
}

/// As it stands in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    images: Vec<String>,
    #[serde(default)]
    keys: Vec<PathBuf>,
    roots: Option<PathBuf>,
    rekor_key: Option<PathBuf>,
    identity: Option<String>,
    identity_regex: Option<String>,
    issuer: Option<String>,
}

/// A file that a policy names and that cannot be used.
#[derive(Debug)]
pub struct Unusable {
    /// The field that names it.
    pub field: &'static str,
    /// Which, and why.
    pub what: String,
}

impl TryFrom<Written> for Policy {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let Written { images, keys, roots, rekor_key, identity, identity_regex, issuer } = written;
        if images.is_empty() {
            return Err("images is empty: \"*\" means all".to_owned());
        }
        let images = images.iter().map(|text| Pattern::parse(text)).collect::<Result<Vec<_>, _>>();
        let images = images.map_err(|what| format!("images: {what}"))?;
        let blank = |text: &Option<String>| text.as_ref().is_some_and(|text| text.trim().is_empty());
        for (field, text) in
            [("identity", &identity), ("identity_regex", &identity_regex), ("issuer", &issuer)]
        {
            if blank(text) {
                return Err(format!("{field} is empty"));
            }
        }
        let certified = match (roots, Identity::of(identity, identity_regex)?, issuer) {
            (None, None, None) => None,
            (Some(roots), Some(identity), Some(issuer)) if rekor_key.is_some() => {
                Some(Certified { roots, identity, issuer })
            }
            _ => {
                return Err(
                    "signers with certificates need all of roots, rekor_key, issuer, and identity or \
                            identity_regex"
                        .to_owned(),
                );
            }
        };
        if keys.is_empty() && certified.is_none() {
            return Err(
                "nobody is trusted: name keys, or roots and who may sign with their certificates".to_owned()
            );
        }
        let files = [("roots", certified.as_ref().map(|c| &c.roots)), ("rekor_key", rekor_key.as_ref())];
        let files = files.into_iter().filter_map(|(field, path)| Some((field, path?)));
        for (field, path) in keys.iter().map(|path| ("keys", path)).chain(files) {
            if !path.is_absolute() {
                return Err(format!("{field}: {:?} is not an absolute path", path.display()));
            }
        }
        Ok(Self { images, keys, keyless: certified, rekor_key })
    }
}

impl Policy {
    /// Whether it has a say in this image.
    pub fn is_about(&self, image: &ImageRef) -> bool {
        self.images.iter().any(|pattern| pattern.fits(image))
    }

    /// Whom it trusts, by its files as they are now.
    ///
    /// # Errors
    /// If one cannot be used.
    pub fn trust(&self) -> Result<Trust, Unusable> {
        let mut keys = Vec::new();
        for path in &self.keys {
            keys.extend(load("keys", path, PublicKey::all)?);
        }
        let keyless = match &self.keyless {
            Some(Certified { roots, identity, issuer }) => Some(Keyless {
                roots: load("roots", roots, Roots::read)?,
                identity: identity.clone(),
                issuer: issuer.clone(),
            }),
            None => None,
        };
        let log = match &self.rekor_key {
            Some(path) => load("rekor_key", path, PublicKey::all)?,
            None => Vec::new(),
        };
        Ok(Trust { keys, keyless, log })
    }
}

fn load<T>(
    field: &'static str,
    path: &Path,
    read: impl FnOnce(&[u8]) -> Result<T, String>,
) -> Result<T, Unusable> {
    let bytes = match fs::metadata(path).map(|found| found.len()) {
        Ok(size) if size > FILE_MAX_BYTES => Err(format!("it has more than {FILE_MAX_BYTES} bytes")),
        Ok(_) => fs::read(path).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let loaded = bytes.and_then(|bytes| read(&bytes));
    loaded.map_err(|why| Unusable { field, what: format!("{} cannot be used: {why}", path.display()) })
}

/// By what it is about.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let images: Vec<String> = self.images.iter().map(Pattern::to_string).collect();
        write!(f, "[[verification.cosign]] for {}", images.join(", "))
    }
}

impl Identity {
    fn of(is: Option<String>, regex: Option<String>) -> Result<Option<Self>, String> {
        let matches = match regex {
            Some(text) => {
                // By itself first, so that no parenthesis of it closes ours.
                let whole = Regex::new(&text).and_then(|_| Regex::new(&format!(r"\A(?:{text})\z")));
                let whole = whole.map_err(|error| format!("identity_regex {text:?}: {error}"))?;
                Some((text, whole))
            }
            None => None,
        };
        Ok((is.is_some() || matches.is_some()).then_some(Self { is, matches }))
    }

    pub(super) fn fits(&self, name: &str) -> bool {
        self.is.as_deref() == Some(name)
            || self.matches.as_ref().is_some_and(|(_, regex)| regex.is_match(name))
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        let texts = |it: &Self| (it.is.clone(), it.matches.as_ref().map(|(text, _)| text.clone()));
        texts(self) == texts(other)
    }
}

impl Eq for Identity {}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let regex = self.matches.as_ref().map(|(text, _)| text.as_str());
        let all: Vec<&str> = self.is.as_deref().into_iter().chain(regex).collect();
        f.write_str(&all.join(" or "))
    }
}
