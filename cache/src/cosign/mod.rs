//! Signatures of images as cosign makes them: whether one is good, decided over bytes.
//!
//! ```text
//! a signature = payload (which digest), signature of it, perhaps certificate, chain, bundle (the log's word)
//!
//! keys       signature ◄─ one of the keys
//! keyless    signature ◄─ certificate ◄─ chain ◄─ one of the roots, at the time that the log says; for this identity, by
//!            this issuer
//! both       bundle ◄─ the log's key, about this payload, signature and signer (with keys: if the log's key is configured)
//!            payload: of the right type, of the right digest
//! ```

mod certificate;
mod key;
mod log;
mod pattern;
mod payload;
mod policy;

use base64::{Engine as _, engine::general_purpose::STANDARD};

pub use policy::{Policy, Unusable};

use crate::image::Digest;
use certificate::{Keyless, Leaf};
use key::PublicKey;
use log::Signer;

/// What cosign has stored of one signature. Nothing of it is believed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Signature<'a> {
    /// What is signed.
    pub payload: &'a [u8],
    /// Of the payload, in base 64.
    pub signature: &'a str,
    /// PEM.
    pub certificate: Option<&'a str>,
    /// PEM: what is between the certificate and a root.
    pub chain: Option<&'a str>,
    /// JSON: what Rekor says of it.
    pub bundle: Option<&'a str>,
}

/// Whom a policy trusts, read from its files.
#[derive(Debug)]
pub struct Trust {
    keys: Vec<PublicKey>,
    keyless: Option<Keyless>,
    /// Rekor's. If there are any, it has to know each signature.
    log: Vec<PublicKey>,
}

impl Trust {
    /// Who has signed the image with this digest.
    ///
    /// # Errors
    /// Why the signature does not count.
    pub fn expect(&self, signature: &Signature<'_>, digest: &Digest) -> Result<String, String> {
        let bytes = STANDARD.decode(signature.signature.trim());
        let bytes = bytes.map_err(|error| format!("it is not in base 64: {error}"))?;
        let by_key = if self.keys.is_empty() { None } else { Some(self.by_key(signature, &bytes)) };
        let by_certificate =
            self.keyless.as_ref().map(|keyless| self.by_certificate(keyless, signature, &bytes));
        let who = match (by_key, by_certificate) {
            (Some(Ok(who)), _) | (_, Some(Ok(who))) => who,
            (Some(Err(key)), Some(Err(certificate))) => return Err(format!("{key}, and {certificate}")),
            (Some(Err(why)), None) | (None, Some(Err(why))) => return Err(why),
            (None, None) => return Err("nobody is trusted".to_owned()),
        };
        payload::expect(signature.payload, digest)?;
        Ok(who)
    }

    fn by_key(&self, signature: &Signature<'_>, bytes: &[u8]) -> Result<String, String> {
        let key = self.keys.iter().find(|key| key.has_signed(signature.payload, bytes));
        let key = key.ok_or("none of the keys has made it")?;
        if !self.log.is_empty() {
            log::expect(&self.log, signature, bytes, Signer::Key(key))?;
        }
        Ok(format!("key {key}"))
    }

    fn by_certificate(
        &self,
        keyless: &Keyless,
        signature: &Signature<'_>,
        bytes: &[u8],
    ) -> Result<String, String> {
        let leaf = Leaf::read(signature.certificate.ok_or("it has no certificate")?)?;
        if !leaf.key()?.has_signed(signature.payload, bytes) {
            return Err("its certificate's key has not made it".to_owned());
        }
        let at = log::expect(&self.log, signature, bytes, Signer::Certificate(&leaf))?;
        keyless.expect(&leaf, signature.chain.unwrap_or_default(), at)
    }
}

#[cfg(test)]
pub(crate) mod tests;
