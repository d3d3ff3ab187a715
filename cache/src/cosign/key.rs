//! Public keys, and what was signed with them.

use std::fmt;

use rustls::pki_types::{SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};
use webpki::{Error, RawPublicKeyEntity, ring};

/// One that signatures can be held against: ECDSA (P-256, P-384), Ed25519 or RSA (PKCS #1, 2048 bits or more).
#[derive(Debug)]
pub(super) struct PublicKey(SubjectPublicKeyInfoDer<'static>);

/// What cosign signs with: SHA-256 whatever the curve, its later versions what fits the curve.
fn algorithms() -> [&'static dyn SignatureVerificationAlgorithm; 5] {
    [
        ring::ECDSA_P256_SHA256,
        ring::ECDSA_P384_SHA256,
        ring::ECDSA_P384_SHA384,
        ring::ED25519,
        ring::RSA_PKCS1_2048_8192_SHA256,
    ]
}

impl PublicKey {
    /// All of a PEM file.
    pub(super) fn all(pem: &[u8]) -> Result<Vec<Self>, String> {
        let keys = SubjectPublicKeyInfoDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        let keys = keys.map_err(|error| format!("it is no PEM: {error}"))?;
        if keys.is_empty() {
            return Err("it has no public key (BEGIN PUBLIC KEY) in it".to_owned());
        }
        let keys: Vec<_> = keys.into_iter().map(Self).collect();
        if keys.iter().any(|key| !key.is_usable()) {
            let what = "it has a key of another kind than ECDSA (P-256, P-384), Ed25519 and RSA in it";
            return Err(what.to_owned());
        }
        Ok(keys)
    }

    /// That of a certificate.
    pub(super) fn of(der: SubjectPublicKeyInfoDer<'static>) -> Self {
        Self(der)
    }

    pub(super) fn der(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        self.tries(message, signature).any(|tried| tried.is_ok())
    }

    fn is_usable(&self) -> bool {
        let other =
            |error: &Error| matches!(error, Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_));
        RawPublicKeyEntity::try_from(&self.0).is_ok()
            && !self.tries(b"", b"").all(|tried| tried.is_err_and(|error| other(&error)))
    }

    fn tries(&self, message: &[u8], signature: &[u8]) -> impl Iterator<Item = Result<(), Error>> {
        algorithms().into_iter().map(move |algorithm| {
            RawPublicKeyEntity::try_from(&self.0)?.verify_signature(algorithm, message, signature)
        })
    }
}

/// By the beginning of its SHA-256, as `openssl pkey -pubin -outform DER | sha256sum` shows it.
impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Sha256::digest(self.der()).iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
