//! Registries: where an image comes from, and what their refusals mean.

mod hosts;
mod refusal;

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
    errors::{DigestError, OciDistributionError},
    secrets::RegistryAuth,
};

pub use hosts::{Endpoint, Scheme, Serves, Verify};
use refusal::Outlook;

use crate::{
    error::{Error, Reason, Result},
    image::{Digest, ImageRef},
};

/// So many clients are kept; more than a host has registries.
const CLIENTS: usize = 256;
/// How often a document is asked for if the registry is overloaded or a connection breaks.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(300);

/// The registries as this host is configured to reach them.
#[derive(Clone)]
pub struct Registries {
    config_path: PathBuf,
    connect_timeout: Duration,
    read_timeout: Duration,
    /// One client per endpoint, its settings and the certificates as they were read: it keeps connections and
    /// anonymous tokens.
    clients: Arc<Mutex<HashMap<ClientKey, Arc<Client>>>>,
}

type ClientKey = (Endpoint, Vec<Vec<u8>>);

/// Where one image comes from.
pub struct Source {
    image: ImageRef,
    endpoints: Vec<(Endpoint, Arc<Client>)>,
}

/// Bytes of a blob as they arrive.
pub struct Blob {
    /// The endpoint that serves them, host[:port].
    pub endpoint: String,
    /// Where they begin.
    pub offset: u64,
    /// The bytes from there on. `InvalidData` at their end says that they do not have the digest.
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
        // Read anew each time: certificates are renewed under a running service.
        let certificates = endpoint.ca.iter().map(certificate).collect::<Result<Vec<_>>>()?;
        let key = (endpoint, certificates);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let (endpoint, certificates) = &key;
        let config = self.client_config(endpoint, certificates);
        let client = Client::try_from(config).map_err(|e| {
            let message = format!(
                "no connection to registry {} can be set up: {e}; look at its hosts.toml",
                endpoint.authority
            );
            Error::new(Reason::RegistryConfiguration, message)
        })?;
        let client = Arc::new(client);
        if clients.len() >= CLIENTS {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    fn client_config(&self, endpoint: &Endpoint, certificates: &[Vec<u8>]) -> ClientConfig {
        let certificate =
            |data: &Vec<u8>| Certificate { encoding: CertificateEncoding::Pem, data: data.clone() };
        ClientConfig {
            protocol: match endpoint.scheme {
                Scheme::Http => ClientProtocol::Http,
                Scheme::Https => ClientProtocol::Https,
            },
            accept_invalid_certificates: endpoint.verify == Verify::Nothing,
            extra_root_certificates: certificates.iter().map(certificate).collect(),
            connect_timeout: Some(self.connect_timeout),
            read_timeout: Some(self.read_timeout),
            user_agent: concat!("cowshed/", env!("CARGO_PKG_VERSION")),
            platform_resolver: None,
            ..ClientConfig::default()
        }
    }
}

fn certificate(path: &PathBuf) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| {
        let message = format!("the certificate {} cannot be read: {e}; hosts.toml names it", path.display());
        Error::new(Reason::RegistryConfiguration, message).with("path", path.display())
    })
}

impl Source {
    /// The manifest or index that `digest`, or else the image's name, points to; its bytes and their digest, checked.
    pub async fn document(&self, digest: Option<&Digest>, accepted: &[&str]) -> Result<(Vec<u8>, Digest)> {
        let wanted = match digest {
            Some(digest) => self.image.inner().clone_with_digest(digest.to_string()),
            None => self.image.inner().clone(),
        };
        let mut pause = FIRST_PAUSE;
        for _ in 1..TRIES {
            match self.ask(&wanted, accepted).await {
                Err((Outlook::Passing, error)) => {
                    tracing::warn!(%error, "asking again");
                    tokio::time::sleep(pause).await;
                    pause *= 4;
                }
                answer => return answer.map_err(|(_, error)| error),
            }
        }
        self.ask(&wanted, accepted).await.map_err(|(_, error)| error)
    }

    /// Asks every endpoint that may be asked, until one answers. The last one's refusal counts: it is the registry itself.
    async fn ask(
        &self,
        wanted: &Reference,
        accepted: &[&str],
    ) -> Result<(Vec<u8>, Digest), (Outlook, Error)> {
        let by_tag = wanted.digest().is_none();
        let mut failure = None;
        for (endpoint, client) in &self.endpoints {
            if by_tag && endpoint.serves != Serves::TagsAndDigests {
                continue;
            }
            let at = at(wanted, endpoint);
            let answer = client.pull_manifest_raw(&at, &RegistryAuth::Anonymous, accepted).await;
            let refusal = match answer {
                Ok((bytes, _)) => match self.checked(bytes.to_vec(), wanted.digest()) {
                    Ok(found) => return Ok(found),
                    Err(error) => (Outlook::Lasting, error),
                },
                Err(error) => (refusal::outlook(&error), self.explain(&error, endpoint, "manifest")),
            };
            tracing::debug!(endpoint = endpoint.authority, error = %refusal.1, "no manifest from here");
            failure = Some(refusal);
        }
        Err(failure.unwrap_or_else(|| (Outlook::Lasting, self.nowhere())))
    }

    /// How many endpoints there are.
    pub fn endpoints(&self) -> u32 {
        u32::try_from(self.endpoints.len()).unwrap_or(u32::MAX)
    }

    /// The bytes of a blob from `offset` on; they may begin before `offset`. They come from the first endpoint that
    /// has it, beginning with another one at each `attempt`, so that one that always breaks off is left.
    pub async fn blob(&self, digest: &Digest, offset: u64, attempt: u32) -> Result<Blob> {
        let mut failure: Option<Error> = None;
        let (count, first) = (self.endpoints.len(), attempt as usize);
        let from_first =
            self.endpoints.iter().cycle().skip(first.checked_rem(count).unwrap_or(0)).take(count);
        for (endpoint, client) in from_first {
            let at = at(self.image.inner(), endpoint);
            client.store_auth_if_needed(at.resolve_registry(), &RegistryAuth::Anonymous).await;
            let from = match offset {
                0 => client.pull_blob_stream(&at, digest.as_str()).await.map(BlobResponse::Full),
                offset => client.pull_blob_stream_partial(&at, digest.as_str(), offset, None).await,
            };
            match from {
                Ok(BlobResponse::Full(stream)) => {
                    return Ok(Blob {
                        endpoint: endpoint.authority.clone(),
                        offset: 0,
                        bytes: bytes(stream),
                    });
                }
                Ok(BlobResponse::Partial(stream)) => {
                    return Ok(Blob { endpoint: endpoint.authority.clone(), offset, bytes: bytes(stream) });
                }
                Err(error) => {
                    let error = self.explain(&error, endpoint, digest.as_str());
                    tracing::debug!(endpoint = endpoint.authority, %error, "no blob from here");
                    // One that may have it when it answers again outweighs one that has it not.
                    if failure.as_ref().is_none_or(|other| other.reason() != Reason::RegistryUnavailable) {
                        failure = Some(error);
                    }
                }
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

    #[allow(clippy::wildcard_enum_match_arm, reason = "`refusal::reason` gives these few only")]
    fn explain(&self, error: &OciDistributionError, endpoint: &Endpoint, what: &str) -> Error {
        let (image, at) = (&self.image, &endpoint.authority);
        let reason = refusal::reason(error);
        let words = refusal::words(error);
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
    let (registry, authority) = (image.registry(), endpoint.authority.as_str());
    if registry == authority {
        return image.clone();
    }
    // Mirrors are told which registry they stand for; Docker's own has another name than its images, but is no mirror.
    if registry == "docker.io" && authority == hosts::HUB {
        let (authority, repository) = (authority.to_owned(), image.repository().to_owned());
        return match (image.digest(), image.tag()) {
            (Some(digest), _) => Reference::with_digest(authority, repository, digest.to_owned()),
            (None, tag) => Reference::with_tag(authority, repository, tag.unwrap_or("latest").to_owned()),
        };
    }
    let mut image = image.clone();
    image.set_mirror_registry(authority.to_owned());
    image
}

fn bytes(stream: SizedStream) -> BoxStream<'static, std::io::Result<Vec<u8>>> {
    let plain = |error: std::io::Error| {
        let is_wrong = error.get_ref().is_some_and(|inner| inner.is::<DigestError>());
        let kind = if is_wrong { std::io::ErrorKind::InvalidData } else { error.kind() };
        std::io::Error::new(kind, refusal::words(&error))
    };
    stream.stream.map(move |part| part.map(|bytes| bytes.to_vec()).map_err(plain)).boxed()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_mirrors_are_told_whom_they_stand_for() {
        let table = [
            ("debian:12", "registry-1.docker.io", "registry-1.docker.io", None),
            ("debian:12", "mirror.example", "mirror.example", Some("docker.io")),
            ("r.example:5000/a:1", "r.example:5000", "r.example:5000", None),
            ("r.example/a:1", "127.0.0.1:5000", "127.0.0.1:5000", Some("r.example")),
        ];
        for (image, authority, asked, namespace) in table {
            let directory = tempfile::tempdir().unwrap();
            let mut endpoint = hosts::endpoints(directory.path(), authority).unwrap().remove(0);
            endpoint.authority = authority.to_owned();
            let image = ImageRef::parse(image).unwrap();
            let at = at(image.inner(), &endpoint);
            assert_eq!((at.resolve_registry(), at.namespace()), (asked, namespace), "{image}");
            assert_eq!((at.repository(), at.tag()), (image.inner().repository(), image.inner().tag()));
        }
    }
}
