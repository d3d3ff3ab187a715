//! Names: VM ids as launchers choose them, lease ids and generations as we do.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest VM id, in bytes.
pub const VM_ID_MAX_BYTES: usize = 128;

/// A VM's name, chosen by its launcher: 1 to 128 bytes of ASCII letters, digits and `-_.:@`, the first a letter or a
/// digit, without `..`. Safe in a log line, a label, a path component and a command line.
///
/// What all VMs of an image share is held in the name of that image, and a disk that is made ahead of need in the name of its
/// own lease: see [`VmId::of_image`] and [`VmId::of_spare`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(Arc<str>);

/// Why a string is no VM id.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum VmIdError {
    /// It is empty.
    #[error("it is empty")]
    Empty,
    /// It is longer than [`VM_ID_MAX_BYTES`].
    #[error("it is {0} bytes long, {VM_ID_MAX_BYTES} are allowed")]
    TooLong(usize),
    /// It begins with something else than a letter or a digit.
    #[error("it must begin with a letter or a digit, not {0:?}")]
    BadFirst(char),
    /// It has a character that is not allowed.
    #[error("{0:?} is not allowed; use letters, digits and \"-_.:@\"")]
    BadCharacter(char),
    /// It contains `..`.
    #[error("\"..\" is not allowed")]
    DotDot,
}

impl VmId {
    /// Who holds the device that all VMs of an image share: `@` and the digest of its manifest. No VM can be called so.
    ///
    /// # Errors
    /// If the rest is nothing that a VM can be called.
    pub fn of_image(digest: &str) -> Result<Self, VmIdError> {
        let Self(rest) = digest.parse()?;
        Ok(Self(format!("{IMAGE_PREFIX}{rest}").into()))
    }

    /// Who holds a spare, a disk that is made ahead of need: `+` and its lease. No VM can be called so.
    pub fn of_spare(lease: &LeaseId) -> Self {
        Self(format!("{SPARE_PREFIX}{lease}").into())
    }

    /// Whether it is an image, and no VM.
    pub fn is_image(&self) -> bool {
        self.0.starts_with(IMAGE_PREFIX)
    }

    /// Whether it is a spare, and no VM.
    pub fn is_spare(&self) -> bool {
        self.0.starts_with(SPARE_PREFIX)
    }

    /// Whether it is what a launcher can call a VM.
    pub fn is_vm(&self) -> bool {
        !self.is_image() && !self.is_spare()
    }
}

const IMAGE_PREFIX: char = '@';
const SPARE_PREFIX: char = '+';

/// Whom a VM belongs to, as the launcher knows it: made of what VM ids are made of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tenant(Arc<str>);

/// The only one, where nobody says which.
impl Default for Tenant {
    fn default() -> Self {
        Self("default".into())
    }
}

impl Tenant {
    /// One that no request can name.
    pub fn nobody() -> Self {
        Self("".into())
    }
}

impl FromStr for Tenant {
    type Err = VmIdError;

    fn from_str(text: &str) -> Result<Self, VmIdError> {
        text.parse::<VmId>().map(|VmId(text)| Self(text))
    }
}

/// Reads what was written down; a launcher's name is parsed, and can be neither an image nor a spare.
impl TryFrom<String> for VmId {
    type Error = VmIdError;
    fn try_from(text: String) -> Result<Self, VmIdError> {
        if let Some(lease) = text.strip_prefix(SPARE_PREFIX).and_then(|rest| rest.parse().ok()) {
            return Ok(Self::of_spare(&lease));
        }
        text.strip_prefix(IMAGE_PREFIX).map_or_else(|| text.parse(), Self::of_image)
    }
}

impl FromStr for VmId {
    type Err = VmIdError;

    fn from_str(text: &str) -> Result<Self, VmIdError> {
        if text.len() > VM_ID_MAX_BYTES {
            return Err(VmIdError::TooLong(text.len()));
        }
        let first = text.chars().next().ok_or(VmIdError::Empty)?;
        if let Some(bad) = text.chars().find(|c| !c.is_ascii_alphanumeric() && !"-_.:@".contains(*c)) {
            return Err(VmIdError::BadCharacter(bad));
        }
        if !first.is_ascii_alphanumeric() {
            return Err(VmIdError::BadFirst(first));
        }
        if text.contains("..") {
            return Err(VmIdError::DotDot);
        }
        Ok(Self(text.into()))
    }
}

/// Names one lease among all that there ever were: 32 hexadecimal digits, random, never used again. Snapshot keys and
/// containerd leases are named after it, so a stale name cannot mean somebody else's disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LeaseId(Arc<str>);

/// A string that is no lease id.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a lease id is 32 lower-case hexadecimal digits")]
pub struct LeaseIdError;

impl LeaseId {
    /// From 128 random bits.
    pub fn from_random(bits: u128) -> Self {
        Self(format!("{bits:032x}").into())
    }

    /// The name of this lease's snapshot, and of the containerd lease that holds it.
    pub fn snapshot_key(&self) -> String {
        format!("{SNAPSHOT_KEY_PREFIX}{}", self.0)
    }

    /// The lease whose snapshot or containerd lease is called `key`; `None` if it is no such name.
    pub fn from_snapshot_key(key: &str) -> Option<Self> {
        key.strip_prefix(SNAPSHOT_KEY_PREFIX)?.parse().ok()
    }
}

/// What all names made by [`LeaseId::snapshot_key`] begin with.
pub const SNAPSHOT_KEY_PREFIX: &str = "cowshed-vm-";

impl FromStr for LeaseId {
    type Err = LeaseIdError;

    fn from_str(text: &str) -> Result<Self, LeaseIdError> {
        let hex = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if hex && text.len() == 32 { Ok(Self(text.into())) } else { Err(LeaseIdError) }
    }
}

/// The longest request id, in bytes.
pub const REQUEST_ID_MAX_BYTES: usize = 128;

/// A client's name for one request, so that the request repeated is not made twice: 1 to 128 printable ASCII characters,
/// a UUID for example.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RequestId(Arc<str>);

/// A string that is no request id.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a request id is 1 to {REQUEST_ID_MAX_BYTES} printable ASCII characters without blanks")]
pub struct RequestIdError;

impl FromStr for RequestId {
    type Err = RequestIdError;

    fn from_str(text: &str) -> Result<Self, RequestIdError> {
        let fits = (1..=REQUEST_ID_MAX_BYTES).contains(&text.len());
        if fits && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text.into()))
        } else {
            Err(RequestIdError)
        }
    }
}

/// Counts changes of leases on this host: each is greater than every one before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Revision(pub u64);

impl Revision {
    /// The one after it.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Counts grants on this host: each lease's is greater than that of every one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Generation(pub u64);

macro_rules! string_newtype {
    ($name:ident) => {
        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.as_ref().to_owned()
            }
        }
    };
}
macro_rules! parsed_when_read {
    ($name:ident, $error:ident) => {
        impl TryFrom<String> for $name {
            type Error = $error;
            fn try_from(text: String) -> Result<Self, $error> {
                text.parse()
            }
        }
    };
}
string_newtype!(VmId);
string_newtype!(Tenant);
string_newtype!(LeaseId);
string_newtype!(RequestId);
parsed_when_read!(Tenant, VmIdError);
parsed_when_read!(LeaseId, LeaseIdError);
parsed_when_read!(RequestId, RequestIdError);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn vm_ids() {
        let longest = "x".repeat(VM_ID_MAX_BYTES);
        for good in ["a", "vm-1", "7f3c", "tenant@app:1.2_x", longest.as_str()] {
            assert_eq!(good.parse::<VmId>().unwrap().as_str(), good);
        }
        let long = "x".repeat(VM_ID_MAX_BYTES + 1);
        let table = [
            ("", VmIdError::Empty),
            (long.as_str(), VmIdError::TooLong(129)),
            ("-a", VmIdError::BadFirst('-')),
            (".", VmIdError::BadFirst('.')),
            ("a b", VmIdError::BadCharacter(' ')),
            ("a/b", VmIdError::BadCharacter('/')),
            ("a\nb", VmIdError::BadCharacter('\n')),
            ("a\0", VmIdError::BadCharacter('\0')),
            ("vmé", VmIdError::BadCharacter('é')),
            ("a..b", VmIdError::DotDot),
            ("..", VmIdError::BadFirst('.')),
        ];
        for (bad, why) in table {
            assert_eq!(bad.parse::<VmId>(), Err(why), "{bad:?}");
        }
    }

    #[test]
    fn an_image_is_no_vm() {
        let image = VmId::of_image("sha256:0a").unwrap();
        assert!(image.is_image() && !"sha256:0a".parse::<VmId>().unwrap().is_image());
        assert_eq!(VmId::try_from(String::from(image.clone())), Ok(image.clone()), "as it is written down");
        assert_eq!(image.as_str().parse::<VmId>(), Err(VmIdError::BadFirst('@')), "as a launcher says it");
        assert!(VmId::of_image("@sha256:0a").is_err() && VmId::try_from("@".to_owned()).is_err());
    }

    #[test]
    fn lease_ids_name_their_snapshots() {
        let id = LeaseId::from_random(0xfeed);
        assert_eq!(id.as_str(), "0000000000000000000000000000feed");
        assert_eq!(LeaseId::from_snapshot_key(&id.snapshot_key()), Some(id));
        for foreign in
            ["", "vm", "cowshed-vm-", "cowshed-vm-XYZ", "cowshed-pull-0000000000000000000000000000feed"]
        {
            assert_eq!(LeaseId::from_snapshot_key(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn request_ids() {
        let longest = "x".repeat(REQUEST_ID_MAX_BYTES);
        for good in ["1", "0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0", longest.as_str()] {
            assert_eq!(good.parse::<RequestId>().unwrap().as_str(), good);
        }
        let long = "x".repeat(REQUEST_ID_MAX_BYTES + 1);
        for bad in ["", " ", "a b", "a\n", "é", long.as_str()] {
            assert_eq!(bad.parse::<RequestId>(), Err(RequestIdError), "{bad:?}");
        }
    }

    #[test]
    fn deserialisation_checks_again() {
        use serde::de::{
            IntoDeserializer as _,
            value::{Error, StringDeserializer},
        };
        let bad: StringDeserializer<Error> = "a/b".to_owned().into_deserializer();
        assert!(VmId::deserialize(bad).is_err());
        let bad: StringDeserializer<Error> = "nothex".to_owned().into_deserializer();
        assert!(LeaseId::deserialize(bad).is_err());
    }
}
