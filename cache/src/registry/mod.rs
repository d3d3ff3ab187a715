//! Registries: where an image comes from, and what their refusals mean.

mod hosts;

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::BoxStream};
use oci_client::{
    Client, Reference,
    client::{BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol, SizedStream},
    errors::{OciDistributionError, OciErrorCode},
    secrets::RegistryAuth,
};

pub use hosts::{Endpoint, Scheme, Serves, Verify};

use crate::{
    error::{Error, Reason, Result},
    image::{Digest, ImageRef},
};

/// The registries as this host is configured to reach them.
#[derive(Clone)]
pub struct Registries {
    config_path: PathBuf,
    connect_timeout: Duration,
    read_timeout: Duration,
    /// One client per endpoint and its settings: it keeps connections and anonymous tokens.
    clients: Arc<Mutex<HashMap<Endpoint, Arc<Client>>>>,
}

/// Where one image comes from.
pub struct Source {
    image: ImageRef,
    endpoints: Vec<(Endpoint, Arc<Client>)>,
}

/// Bytes of a blob as they arrive.
pub struct Blob {
    /// Where they begin.
    pub offset: u64,
    /// The bytes from there on.
    pub bytes: BoxStream<'static, std::io::Result<Vec<u8>>>,
}

impl Registries {
    /// `config_path` is containerd's directory of `hosts.toml` files; it is read anew for each pull.
    pub fn new(config_path: PathBuf, connect_timeout: Duration, read_timeout: Duration) -> Self {
        Self { config_path, connect_timeout, read_timeout, clients: Arc::default() }
    }

    /// Where `image` comes from.
    ///
    /// # Errors
    /// If a configuration or certificate file cannot be used.
    pub fn source(&self, image: &ImageRef) -> Result<Source> {
        let endpoints = hosts::endpoints(&self.config_path, image.registry())?;
        let with_client = |endpoint: Endpoint| Ok((endpoint.clone(), self.client(endpoint)?));
        Ok(Source {
            image: image.clone(),
            endpoints: endpoints.into_iter().map(with_client).collect::<Result<_>>()?,
        })
    }

    fn client(&self, endpoint: Endpoint) -> Result<Arc<Client>> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&endpoint) {
            return Ok(client.clone());
        }
        let config = self.client_config(&endpoint)?;
        let client = Client::try_from(config).map_err(|e| {
            let message = format!(
                "no connection to registry {} can be set up: {e}; look at its hosts.toml",
                endpoint.authority
            );
            Error::new(Reason::RegistryConfiguration, message)
        })?;
        let client = Arc::new(client);
        clients.insert(endpoint, client.clone());
        Ok(client)
    }

    fn client_config(&self, endpoint: &Endpoint) -> Result<ClientConfig> {
        let certificate = |path: &PathBuf| {
            let data = fs::read(path).map_err(|e| {
                let message =
                    format!("the certificate {} cannot be read: {e}; hosts.toml names it", path.display());
                Error::new(Reason::RegistryConfiguration, message).with("path", path.display())
            })?;
            Ok(Certificate { encoding: CertificateEncoding::Pem, data })
        };
        Ok(ClientConfig {
            protocol: match endpoint.scheme {
                Scheme::Http => ClientProtocol::Http,
                Scheme::Https => ClientProtocol::Https,
            },
            accept_invalid_certificates: endpoint.verify == Verify::Nothing,
            extra_root_certificates: endpoint.ca.iter().map(certificate).collect::<Result<_>>()?,
            connect_timeout: Some(self.connect_timeout),
            read_timeout: Some(self.read_timeout),
            user_agent: concat!("cowshed/", env!("CARGO_PKG_VERSION")),
            platform_resolver: None,
            ..ClientConfig::default()
        })
    }
}

impl Source {
    /// The manifest or index that `digest`, or else the image's name, points to; its bytes and their digest, checked.
    pub async fn document(&self, digest: Option<&Digest>, accepted: &[&str]) -> Result<(Vec<u8>, Digest)> {
        let wanted = match digest {
            Some(digest) => self.image.inner().clone_with_digest(digest.to_string()),
            None => self.image.inner().clone(),
        };
        let by_tag = wanted.digest().is_none();
        let mut failure = None;
        for (endpoint, client) in &self.endpoints {
            if by_tag && endpoint.serves != Serves::TagsAndDigests {
                continue;
            }
            let at = at(&wanted, endpoint);
            match client.pull_manifest_raw(&at, &RegistryAuth::Anonymous, accepted).await {
                Ok((bytes, _)) => return self.checked(bytes.to_vec(), wanted.digest()),
                Err(error) => failure = Some(self.explain(&error, endpoint, "manifest")),
            }
        }
        Err(failure.unwrap_or_else(|| self.nowhere()))
    }

    /// The bytes of a blob from `offset` on, from the first endpoint that has it; they may begin before `offset`.
    pub async fn blob(&self, digest: &Digest, offset: u64) -> Result<Blob> {
        let mut failure = None;
        for (endpoint, client) in &self.endpoints {
            let at = at(self.image.inner(), endpoint);
            client.store_auth_if_needed(at.resolve_registry(), &RegistryAuth::Anonymous).await;
            let from = match offset {
                0 => client.pull_blob_stream(&at, digest.as_str()).await.map(BlobResponse::Full),
                offset => client.pull_blob_stream_partial(&at, digest.as_str(), offset, None).await,
            };
            match from {
                Ok(BlobResponse::Full(stream)) => return Ok(Blob { offset: 0, bytes: bytes(stream) }),
                Ok(BlobResponse::Partial(stream)) => return Ok(Blob { offset, bytes: bytes(stream) }),
                Err(error) => failure = Some(self.explain(&error, endpoint, digest.as_str())),
            }
        }
        Err(failure.unwrap_or_else(|| self.nowhere()))
    }

    fn checked(&self, bytes: Vec<u8>, wanted: Option<&str>) -> Result<(Vec<u8>, Digest)> {
        let digest = Digest::of(&bytes);
        match wanted {
            Some(wanted) if wanted != digest.as_str() => {
                let message = format!("{}: the registry served {digest} for {wanted}", self.image);
                Err(Error::new(Reason::ImageCorrupt, message).with("digest", wanted))
            }
            _ => Ok((bytes, digest)),
        }
    }

    fn nowhere(&self) -> Error {
        let message = format!(
            "no endpoint may be asked for {}: give one the capabilities \"pull\" and \"resolve\" in the hosts.toml of {}",
            self.image,
            self.image.registry()
        );
        Error::new(Reason::RegistryConfiguration, message)
    }

    fn explain(&self, error: &OciDistributionError, endpoint: &Endpoint, what: &str) -> Error {
        let (image, at) = (&self.image, &endpoint.authority);
        let reason = classify(error);
        let words = words(error);
        let message = match reason {
            Reason::ImageNotFound => {
                format!("image {image} is not at registry {at} ({what}: {words}); check its name and tag")
            }
            Reason::RegistryDenied => {
                format!(
                    "registry {at} does not hand out {image} to us ({words}); only what it serves to anybody can be pulled"
                )
            }
            Reason::ImageCorrupt => format!("registry {at} serves a wrong {what} for {image}: {words}"),
            _ => {
                let hint = if endpoint.scheme == Scheme::Https {
                    "; if it speaks plain HTTP, say so in its hosts.toml"
                } else {
                    ""
                };
                format!(
                    "registry {at} cannot be reached for {image} ({what}: {words}){hint}; repeat when it answers"
                )
            }
        };
        Error::new(reason, message).with("image", image).with("registry", at)
    }
}

/// The image's name at the endpoint.
fn at(image: &Reference, endpoint: &Endpoint) -> Reference {
    let mut image = image.clone();
    if image.resolve_registry() != endpoint.authority {
        image.set_mirror_registry(endpoint.authority.clone());
    }
    image
}

fn bytes(stream: SizedStream) -> BoxStream<'static, std::io::Result<Vec<u8>>> {
    stream.stream.map(|part| part.map(|bytes| bytes.to_vec())).boxed()
}

fn classify(error: &OciDistributionError) -> Reason {
    match error {
        OciDistributionError::ImageManifestNotFoundError(_)
        | OciDistributionError::ServerError { code: 404, .. } => Reason::ImageNotFound,
        OciDistributionError::RegistryError { envelope, .. } => {
            let has =
                |wanted: &[OciErrorCode]| envelope.errors.iter().any(|error| wanted.contains(&error.code));
            if has(&[
                OciErrorCode::ManifestUnknown,
                OciErrorCode::NameUnknown,
                OciErrorCode::BlobUnknown,
                OciErrorCode::NotFound,
            ]) {
                Reason::ImageNotFound
            } else if has(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
                Reason::RegistryDenied
            } else {
                Reason::RegistryUnavailable
            }
        }
        OciDistributionError::AuthenticationFailure(_)
        | OciDistributionError::UnauthorizedError { .. }
        | OciDistributionError::ServerError { code: 401 | 403, .. } => Reason::RegistryDenied,
        OciDistributionError::DigestError(_) => Reason::ImageCorrupt,
        _ => Reason::RegistryUnavailable,
    }
}

/// The error with its sources: a failed request says "connection refused" in the third of them only.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text.chars().take(500).collect()
}
