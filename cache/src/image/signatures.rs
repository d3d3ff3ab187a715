//! Signatures of images, which cosign keeps beside them in their repository: fetched as the image is, and held against the
//! policies that are about it, before its first use.
//!
//! What `cosign sign` pushes is an OCI image with the tag `sha256-….sig`, after the digest that is signed; each layer is one
//! signature's payload, and the rest of it is in the layer's annotations. The digest may be what the image's name points
//! to, or that of the manifest that its index has for the platform. Whatever goes wrong, the image is not used: what cannot be
//! fetched or read, and what a policy cannot be held against, are never taken for signed.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use serde::Deserialize;

use super::{
    Access, Digest, ImageRef, Shared, locks::Locks, manifest, manifest::DOCUMENT_MAX_BYTES,
    verdicts::Verdicts, verify::Target,
};
use crate::{
    cosign::{Policy, Signature, Trust},
    error::{Error, Reason, Result},
    registry::{Registries, Source},
};

const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
const CERTIFICATE: &str = "dev.sigstore.cosign/certificate";
const CHAIN: &str = "dev.sigstore.cosign/chain";
const BUNDLE: &str = "dev.sigstore.cosign/bundle";

/// Signatures of one digest that are looked at, the latest first: whoever signs each night has many.
const SIGNATURES_MAX: usize = 100;
/// Payloads above this are not fetched, in bytes; they have a few hundred.
const PAYLOAD_MAX_BYTES: usize = 64 << 10;
/// So many different reasons are told of signatures that do not count.
const TOLD: usize = 3;
/// All that has to be asked is answered within this time. Each request has bounds of its own.
const PATIENCE: Duration = Duration::from_secs(120);

/// What happens to images that no policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// They may be used.
    Allowed,
    /// They may not.
    Refused,
}

/// An operator's policies, and what was found by them.
#[derive(Debug)]
pub struct Signatures {
    policies: Vec<Policy>,
    others: Others,
    verdicts: Verdicts<(ImageRef, Digest), (ImageRef, Vec<Digest>, Access)>,
}

/// What cosign has pushed.
#[derive(Deserialize)]
struct Pushed {
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    media_type: String,
    digest: Digest,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// Why an image is not used.
#[derive(Debug)]
enum No {
    /// Nobody who is trusted has signed it, as far as there are signatures.
    Unsigned(String),
    /// A policy's files cannot be used.
    Unusable(String),
    /// That could not be found out.
    Unknown(Error),
}

impl Signatures {
    /// All policies that are about an image have to agree.
    pub fn new(policies: Vec<Policy>, others: Others) -> Self {
        Self { policies, others, verdicts: Verdicts::default() }
    }

    async fn expect(
        &self,
        (registries, locks): (&Registries, &Locks),
        image: &ImageRef,
        target: Target<'_>,
        manifest: Option<&Digest>,
        access: &Access,
    ) -> Result<()> {
        let policies: Vec<&Policy> = self.policies.iter().filter(|policy| policy.is_about(image)).collect();
        if policies.is_empty() {
            return match self.others {
                Others::Allowed => Ok(()),
                Others::Refused => Err(unlisted(image, target)),
            };
        }
        let mut digests = vec![target.digest.clone()];
        digests.extend(manifest.filter(|manifest| *manifest != target.digest).cloned());
        if self.have_passed(image, &digests) {
            return Ok(());
        }
        // A hundred VMs that start at once need one answer. But registries tell tenants different things: one's is for no other.
        let came = Instant::now();
        let thing = format!("signatures {image} {}", target.digest);
        let _turn = locks.turn(&thing, &access.tenant.to_string(), None).await;
        if self.have_passed(image, &digests) {
            return Ok(());
        }
        let key = (image.clone(), digests.clone(), access.clone());
        if let Some(refused) = self.verdicts.refused_since(&key, came) {
            return Err(refused);
        }
        let asked = Instant::now();
        let finding = Box::pin(find(registries, &policies, image, &digests, access));
        match tokio::time::timeout(PATIENCE, finding).await.unwrap_or_else(|_| Err(No::late())) {
            Ok((digest, by)) => {
                tracing::info!(%image, %digest, by, "signed");
                self.verdicts.note((image.clone(), digest));
                Ok(())
            }
            Err(no) => {
                let error = no.of(image, target);
                self.verdicts.note_refused(key, asked, error.clone());
                Err(error)
            }
        }
    }

    fn have_passed(&self, image: &ImageRef, digests: &[Digest]) -> bool {
        digests.iter().any(|digest| self.verdicts.has_passed(&(image.clone(), digest.clone())))
    }
}

impl Layer {
    fn signature<'a>(&'a self, payload: &'a [u8]) -> Option<Signature<'a>> {
        let annotation =
            |name: &str| self.annotations.get(name).map(String::as_str).filter(|text| !text.is_empty());
        Some(Signature {
            payload,
            signature: annotation(SIGNATURE)?,
            certificate: annotation(CERTIFICATE),
            chain: annotation(CHAIN),
            bundle: annotation(BUNDLE),
        })
    }
}

impl Shared {
    /// Fails unless each policy that is about the image finds it signed, or has done so before. `manifest` is the platform's in
    /// what the name points to, if that is an index.
    pub(super) async fn expect_signed(
        &self,
        image: &ImageRef,
        target: Target<'_>,
        manifest: Option<&Digest>,
        access: &Access,
    ) -> Result<()> {
        match &self.checks.signatures {
            Some(signatures) => {
                let from = (&self.registries, &self.locks);
                signatures.expect(from, image, target, manifest, access).await
            }
            None => Ok(()),
        }
    }
}

/// Which of the digests all policies find signed, and by whom.
async fn find(
    registries: &Registries,
    policies: &[&Policy],
    image: &ImageRef,
    digests: &[Digest],
    access: &Access,
) -> Result<(Digest, String), No> {
    let mut trusts = Vec::new();
    for policy in policies {
        trusts.push((policy.to_string(), read(policy).await?));
    }
    let mut nos = Vec::new();
    for digest in digests {
        let look = async {
            let signature = tag(image, digest)?;
            let source = registries.source(&signature, access.credential.as_ref()).await;
            search(&source.map_err(No::Unknown)?, &trusts, digest).await
        };
        match look.await {
            Ok(by) => return Ok((digest.clone(), by)),
            Err(no) => nos.push((digest, no)),
        }
    }
    Err(No::all(nos))
}

async fn read(policy: &Policy) -> Result<Trust, No> {
    let reading = policy.clone();
    // They may be on a filesystem that does not answer.
    let read = tokio::task::spawn_blocking(move || reading.trust()).await;
    let trust = read.map_err(|error| No::Unusable(format!("{policy}: {error}")))?;
    trust.map_err(|unusable| No::Unusable(format!("{policy}: {} {}", unusable.field, unusable.what)))
}

/// Where cosign keeps the signatures of a digest.
fn tag(image: &ImageRef, digest: &Digest) -> Result<ImageRef, No> {
    let tag = format!("{}.sig", digest.as_str().replace(':', "-"));
    ImageRef::parse(&format!("{}/{}:{tag}", image.registry(), image.repository())).map_err(No::Unknown)
}

/// Who has signed the digest, each policy's first.
async fn search(source: &Source, trusts: &[(String, Trust)], digest: &Digest) -> Result<String, No> {
    let pushed = match source.document(None, &manifest::MANIFESTS, DOCUMENT_MAX_BYTES).await {
        Ok((bytes, _)) => serde_json::from_slice::<Pushed>(&bytes),
        Err(error) if error.reason() == Reason::ImageNotFound => {
            return Err(No::Unsigned(absent(trusts)));
        }
        Err(error) => return Err(No::Unknown(error)),
    };
    let pushed = pushed
        .map_err(|error| No::Unsigned(format!("what its signatures are in cannot be read: {error}")))?;
    let mut payloads = HashMap::new();
    let mut signers: Vec<Option<String>> = vec![None; trusts.len()];
    let mut whys: Vec<Vec<String>> = vec![Vec::new(); trusts.len()];
    let layers = pushed.layers.iter().filter(|layer| layer.media_type == SIMPLE_SIGNING);
    for layer in layers.rev().take(SIGNATURES_MAX) {
        if !payloads.contains_key(&layer.digest) {
            payloads.insert(layer.digest.clone(), payload(source, &layer.digest).await?);
        }
        let Some(payload) = payloads.get(&layer.digest) else { continue };
        for (((_, trust), signer), whys) in trusts.iter().zip(&mut signers).zip(&mut whys) {
            if signer.is_some() {
                continue;
            }
            let payload = payload.as_ref().map_err(Clone::clone);
            let signature =
                payload.and_then(|payload| layer.signature(payload).ok_or("it has none in it".to_owned()));
            match signature.and_then(|signature| trust.expect(&signature, digest)) {
                Ok(by) => *signer = Some(by),
                Err(why) if whys.contains(&why) => {}
                Err(why) => whys.push(why),
            }
        }
        if signers.iter().all(Option::is_some) {
            break;
        }
    }
    for ((policy, _), (signer, whys)) in trusts.iter().zip(signers.iter().zip(&whys)) {
        if signer.is_none() {
            return Err(No::Unsigned(format!("{policy}: {}", in_words(whys))));
        }
    }
    Ok(signers.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

fn absent(trusts: &[(String, Trust)]) -> String {
    let policies: Vec<&str> = trusts.iter().map(|(policy, _)| policy.as_str()).collect();
    format!("{}: it has no signature", policies.join(", "))
}

/// What is signed; or why it is nothing that could be.
async fn payload(source: &Source, digest: &Digest) -> Result<Result<Vec<u8>, String>, No> {
    match source.small_blob(digest, PAYLOAD_MAX_BYTES).await {
        Ok(bytes) => Ok(Ok(bytes)),
        Err(error) if [Reason::ImageNotFound, Reason::ImageCorrupt].contains(&error.reason()) => {
            Ok(Err(format!("its payload is not to be had: {error}")))
        }
        Err(error) => Err(No::Unknown(error)),
    }
}

fn in_words(whys: &[String]) -> String {
    if whys.is_empty() {
        return "it has no signature".to_owned();
    }
    let more = if whys.len() > TOLD { "; and more of the kind" } else { "" };
    let told: Vec<String> = whys.iter().take(TOLD).map(|why| format!("of a signature: {why}")).collect();
    format!("{}{more}", told.join("; "))
}

impl No {
    fn late() -> Self {
        let message = format!("no answer within {} s; repeat", PATIENCE.as_secs());
        Self::Unknown(Error::new(Reason::RegistryUnavailable, message))
    }

    /// What could not be found out may have been a yes.
    fn all(mut nos: Vec<(&Digest, Self)>) -> Self {
        if let Some(at) = nos.iter().position(|(_, no)| !matches!(no, Self::Unsigned(_))) {
            return nos.swap_remove(at).1;
        }
        let is_one = nos.len() == 1;
        let words = nos.into_iter().filter_map(|(digest, no)| match no {
            Self::Unsigned(why) if is_one => Some(why),
            Self::Unsigned(why) => Some(format!("{digest}: {why}")),
            Self::Unusable(_) | Self::Unknown(_) => None,
        });
        Self::Unsigned(words.collect::<Vec<_>>().join("; "))
    }

    fn of(self, image: &ImageRef, target: Target<'_>) -> Error {
        let digest = target.digest;
        let refused = |why: String| {
            let message = format!("image {image} ({digest}) may not be used: {why}");
            Error::new(Reason::ImageUnverified, message)
        };
        let error = match self {
            Self::Unknown(error) => error
                .context(format!("image {image} ({digest}) may not be used before its signatures were seen")),
            Self::Unusable(what) => refused(what),
            Self::Unsigned(why) => {
                let repository = format!("{}/{}", image.registry(), image.repository());
                let newer = if target.is_here {
                    format!("; if the registry has another by now: `cowshed pull {image}`")
                } else {
                    String::new()
                };
                refused(format!("{why}; have it signed (`cosign sign {repository}@{digest}`){newer}"))
            }
        };
        error.with("image", image).with("digest", digest)
    }
}

fn unlisted(image: &ImageRef, target: Target<'_>) -> Error {
    let digest = target.digest;
    let message = format!(
        "image {image} ({digest}) may not be used: [verification] signed_only is on, and no [[verification.cosign]] is \
         about {}/{}; add one that says who signs it",
        image.registry(),
        image.repository()
    );
    Error::new(Reason::ImageUnverified, message).with("image", image).with("digest", digest)
}

#[cfg(test)]
#[path = "signatures_tests.rs"]
mod tests;
