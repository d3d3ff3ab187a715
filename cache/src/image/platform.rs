//! Platforms, normalised as containerd does it.

use std::fmt;

use serde::{Deserialize, Deserializer, de};

use crate::error::{Error, Reason, Result};

/// Operating system, architecture and variant, by Go's names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Platform {
    os: String,
    architecture: String,
    variant: String,
}

/// A platform as an image index or configuration has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct DeclaredPlatform {
    #[serde(deserialize_with = "short")]
    pub(super) os: String,
    #[serde(deserialize_with = "short")]
    pub(super) architecture: String,
    #[serde(deserialize_with = "short")]
    pub(super) variant: String,
}

/// Longer names of systems, architectures and variants are refused: leases and errors repeat them.
const NAME_MAX_BYTES: usize = 64;

/// A name of a system, an architecture or a variant.
pub(super) fn short<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    if name.len() > NAME_MAX_BYTES {
        let what = format!(
            "a platform's os, architecture or variant has {} bytes, {NAME_MAX_BYTES} are allowed",
            name.len()
        );
        return Err(de::Error::custom(what));
    }
    Ok(name)
}

impl Platform {
    /// That of this machine.
    pub fn host() -> Self {
        Self::normal("linux", std::env::consts::ARCH, "")
    }

    /// Parses `os/architecture[/variant]`.
    ///
    /// # Errors
    /// `PLATFORM_INVALID`.
    pub fn parse(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split('/').collect();
        let word = |part: &&str| {
            !part.is_empty()
                && part.len() <= 32
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
        };
        match parts[..] {
            [os, architecture] if parts.iter().all(word) => Ok(Self::normal(os, architecture, "")),
            [os, architecture, variant] if parts.iter().all(word) => {
                Ok(Self::normal(os, architecture, variant))
            }
            _ => {
                let shown: String = text.chars().take(100).collect();
                let message = format!(
                    "platform {shown:?} is none: it has the form os/architecture[/variant], as linux/arm64"
                );
                Err(Error::new(Reason::PlatformInvalid, message).with("platform", shown))
            }
        }
    }

    fn normal(os: &str, architecture: &str, variant: &str) -> Self {
        let os = os.to_ascii_lowercase();
        let (architecture, variant) =
            match (architecture.to_ascii_lowercase().as_str(), variant.to_ascii_lowercase().as_str()) {
                ("x86_64" | "x86-64" | "amd64", "v1" | "") => ("amd64".to_owned(), String::new()),
                ("x86_64" | "x86-64" | "amd64", variant) => ("amd64".to_owned(), variant.to_owned()),
                ("aarch64" | "arm64", "8" | "v8" | "") => ("arm64".to_owned(), String::new()),
                ("aarch64" | "arm64", variant) => ("arm64".to_owned(), variant.to_owned()),
                ("armhf", _) | ("arm", "" | "7") => ("arm".to_owned(), "v7".to_owned()),
                ("armel", _) | ("arm", "6") => ("arm".to_owned(), "v6".to_owned()),
                ("i386" | "i686" | "x86" | "386", _) => ("386".to_owned(), String::new()),
                (other, variant) => (other.to_owned(), variant.to_owned()),
            };
        Self { os, architecture, variant }
    }

    /// Whether both have the same operating system and architecture. (Image configurations often leave the variant out.)
    pub fn is_same_machine(&self, other: &Self) -> bool {
        self.os == other.os && self.architecture == other.architecture
    }

    /// How far `declared` is below this platform: 0 if it is the same, more if it is made for an older variant that
    /// this one can run too. `None` if it does not run here.
    pub fn distance(&self, declared: &DeclaredPlatform) -> Option<u32> {
        let declared = Self::from(declared);
        if declared == *self {
            return Some(0);
        }
        let both = self.is_same_machine(&declared).then(|| (self.version(), declared.version()));
        both.and_then(|(ours, theirs)| ours?.checked_sub(theirs?))
    }

    /// The variant as a number, where later ones run what was made for earlier ones.
    fn version(&self) -> Option<u32> {
        match (self.architecture.as_str(), self.variant.as_str()) {
            ("amd64", "") => Some(1),
            ("arm64", "") => Some(8),
            ("amd64" | "arm64" | "arm", variant) => variant.strip_prefix('v')?.parse().ok(),
            _ => None,
        }
    }
}

impl From<&DeclaredPlatform> for Platform {
    fn from(declared: &DeclaredPlatform) -> Self {
        Self::normal(&declared.os, &declared.architecture, &declared.variant)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn forms() {
        let table = [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("Linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/riscv64", "linux/riscv64"),
        ];
        for (text, full) in table {
            assert_eq!(Platform::parse(text).unwrap().to_string(), full, "{text}");
        }
        for bad in ["", "linux", "linux/", "/amd64", "linux/amd64/v1/x", "linux/am d64", "linux/\n"] {
            assert_eq!(Platform::parse(bad).unwrap_err().reason(), Reason::PlatformInvalid, "{bad:?}");
        }
    }

    #[test]
    fn matching() {
        let declared = |architecture: &str, variant: &str| DeclaredPlatform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.into(),
        };
        let arm64 = Platform::parse("linux/arm64").unwrap();
        assert_eq!(arm64.distance(&DeclaredPlatform::default()), None);
        let table = [
            ("linux/arm64", "arm64", "v8", Some(0)),
            ("linux/arm64", "arm64", "", Some(0)),
            ("linux/arm64", "amd64", "", None),
            ("linux/arm64", "arm64", "v9", None),
            ("linux/arm64/v9", "arm64", "", Some(1)),
            ("linux/amd64", "amd64", "v1", Some(0)),
            ("linux/amd64", "amd64", "v2", None),
            ("linux/amd64/v3", "amd64", "", Some(2)),
            ("linux/amd64/v3", "amd64", "v2", Some(1)),
            ("linux/arm", "arm", "v6", Some(1)),
            ("linux/arm/v6", "arm", "v7", None),
            ("linux/riscv64", "riscv64", "", Some(0)),
            ("linux/riscv64", "riscv64", "x", None),
        ];
        for (ours, architecture, variant, distance) in table {
            let ours = Platform::parse(ours).unwrap();
            assert_eq!(
                ours.distance(&declared(architecture, variant)),
                distance,
                "{ours} {architecture} {variant}"
            );
        }
    }
}
