//! Certificates of those who sign without a key of their own: from whom, for whom, and when.

use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime, pem::PemObject as _};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, Error, KeyUsage, anchor_from_trusted_cert};
use x509_cert::{
    Certificate,
    der::{Decode as _, asn1::Utf8StringRef, oid::ObjectIdentifier},
    ext::{
        Extension,
        pkix::name::{GeneralName, GeneralNames},
    },
};

use super::{key::PublicKey, policy::Identity};
use crate::error::shown;

/// "code signing", 1.3.6.1.5.5.7.3.3, as DER has it.
const CODE_SIGNING: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 3];
const SUBJECT_ALT_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.17");
/// Fulcio's, the OIDC issuer: bare bytes, and, since 2023, a UTF8String beside them.
const ISSUER: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.57264.1.1");
const ISSUER_V2: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.4.1.57264.1.8");
/// Certificates between the signer's and a root that are looked at.
const CHAIN_MAX: usize = 8;
/// Words of a certificate's that are repeated are cut here, in bytes.
const TOLD_MAX_BYTES: usize = 200;

/// Who may sign with which certificates.
#[derive(Debug)]
pub(super) struct Keyless {
    pub(super) roots: Roots,
    pub(super) identity: Identity,
    pub(super) issuer: String,
}

/// Certificates that are trusted.
#[derive(Debug)]
pub(super) struct Roots(Vec<TrustAnchor<'static>>);

/// A signer's certificate.
pub(super) struct Leaf(CertificateDer<'static>);

impl Roots {
    /// All of a PEM file.
    pub(super) fn read(pem: &[u8]) -> Result<Self, String> {
        let roots = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        let roots = roots.map_err(|error| format!("it is no PEM: {error}"))?;
        if roots.is_empty() {
            return Err("it has no certificate (BEGIN CERTIFICATE) in it".to_owned());
        }
        let anchor = |root| anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned());
        let anchors = roots.iter().map(anchor).collect::<Result<Vec<_>, _>>();
        Ok(Self(anchors.map_err(|error| format!("it has a certificate in it that cannot be used: {error}"))?))
    }
}

impl Keyless {
    /// For whom it is, if it is for somebody who may sign, and was good at that time.
    pub(super) fn expect(&self, leaf: &Leaf, chain: &str, at: UnixTime) -> Result<String, String> {
        leaf.expect_from(&self.roots, chain, at)?;
        let (names, issuer) = leaf.names()?;
        let cut = |text: &str| shown(text, TOLD_MAX_BYTES);
        let Some(name) = names.iter().find(|name| self.identity.fits(name)) else {
            let whom = if names.is_empty() { "nobody".to_owned() } else { cut(&names.join(" ")) };
            return Err(format!("its certificate is for {whom}, not for {}", self.identity));
        };
        match issuer {
            Some(issuer) if issuer == self.issuer => Ok(cut(name)),
            Some(issuer) => {
                Err(format!("{} was known by {}, not by {}", cut(name), cut(&issuer), self.issuer))
            }
            None => Err(format!("its certificate does not say that {} knew {}", self.issuer, cut(name))),
        }
    }
}

impl Leaf {
    pub(super) fn read(pem: &str) -> Result<Self, String> {
        CertificateDer::from_pem_slice(pem.as_bytes()).map(Self).map_err(|error| unreadable(&error))
    }

    pub(super) fn der(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn key(&self) -> Result<PublicKey, String> {
        let certificate = EndEntityCert::try_from(&self.0).map_err(|error| unreadable(&error))?;
        Ok(PublicKey::of(certificate.subject_public_key_info()))
    }

    /// Fails unless it was issued under one of the roots to sign code, and was in force.
    fn expect_from(&self, roots: &Roots, chain: &str, at: UnixTime) -> Result<(), String> {
        let certificate = EndEntityCert::try_from(&self.0).map_err(|error| unreadable(&error))?;
        let chain =
            CertificateDer::pem_slice_iter(chain.as_bytes()).take(CHAIN_MAX).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| format!("its certificate's chain cannot be read: {error}"))?;
        let usage = KeyUsage::required(CODE_SIGNING);
        let verified =
            certificate.verify_for_usage(ALL_VERIFICATION_ALGS, &roots.0, &chain, at, usage, None, None);
        verified.map(drop).map_err(|error| refusal(&error))
    }

    /// For whom it is, and who knew them.
    fn names(&self) -> Result<(Vec<String>, Option<String>), String> {
        let certificate = Certificate::from_der(&self.0).map_err(|error| unreadable(&error))?;
        let extensions = certificate.tbs_certificate().extensions().map(Vec::as_slice).unwrap_or_default();
        let find = |id: ObjectIdentifier| extensions.iter().find(move |extension| extension.extn_id == id);
        let names = match find(SUBJECT_ALT_NAME) {
            Some(extension) => names(extension)?,
            None => Vec::new(),
        };
        let issuer = match (find(ISSUER_V2), find(ISSUER)) {
            (Some(extension), _) => {
                let text = Utf8StringRef::from_der(extension.extn_value.as_bytes());
                Some(text.map_err(|error| unreadable(&error))?.as_str().to_owned())
            }
            (None, Some(extension)) => Some(
                String::from_utf8(extension.extn_value.as_bytes().to_vec()).map_err(|e| unreadable(&e))?,
            ),
            (None, None) => None,
        };
        Ok((names, issuer))
    }
}

/// Mail addresses and URIs: what Fulcio knows people, workflows and workloads by.
fn names(extension: &Extension) -> Result<Vec<String>, String> {
    let names =
        GeneralNames::from_der(extension.extn_value.as_bytes()).map_err(|error| unreadable(&error))?;
    let text = |name: GeneralName| match name {
        GeneralName::Rfc822Name(text) | GeneralName::UniformResourceIdentifier(text) => {
            Some(text.as_str().to_owned())
        }
        GeneralName::OtherName(_)
        | GeneralName::DnsName(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EdiPartyName(_)
        | GeneralName::IpAddress(_)
        | GeneralName::RegisteredId(_) => None,
    };
    Ok(names.into_iter().filter_map(text).collect())
}

fn unreadable(error: &dyn std::fmt::Display) -> String {
    format!("its certificate cannot be read: {error}")
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum of fifty; what has no words here has its own"
)]
fn refusal(error: &Error) -> String {
    match error {
        Error::UnknownIssuer => "its certificate is not from one of the roots".to_owned(),
        Error::CertExpired { .. } | Error::CertNotValidYet { .. } => {
            "it was made while its certificate was not in force".to_owned()
        }
        Error::RequiredEkuNotFoundContext(_) => "its certificate is not for signing code".to_owned(),
        error => format!("its certificate is not good: {error}"),
    }
}
