//! Registries: where an image comes from, and what their refusals mean.

mod body;
mod connection;
mod credentials;
mod hosts;
mod refusal;
mod token;

use std::{
    collections::HashMap,
    fmt, fs,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use oci_client::Reference;
use reqwest::StatusCode;
use sha2::{Digest as _, Sha256};

use connection::{Connection, Document, Patience};
pub use credentials::Credential;
use credentials::Credentials;
pub use hosts::{Endpoint, Scheme, Serves, Verify};
use refusal::{Failure, Outlook};

use crate::{
    error::{Error, Reason, Result},
    image::{ACCEPTED, DOCUMENT_MAX_BYTES, Digest, ImageRef, pace::Pace},
};

/// So many connections are kept; more than a host has registries.
const CONNECTIONS: usize = 256;
/// One with a request's own credentials is forgotten when it was not asked for in this time.
const UNUSED: Duration = Duration::from_secs(600);
/// How often a document is asked for if the registry is overloaded or a connection breaks.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(300);

/// The registries as this host is configured to reach them.
#[derive(Clone)]
pub struct Registries {
    config_path: PathBuf,
    docker_config: PathBuf,
    patience: Patience,
    rate_min: u64,
    /// One per endpoint, its settings, the certificates as they were read, and who we are there: tokens of one are never
    /// another's.
    connections: Connections,
}

#[derive(Clone, Default)]
struct Connections(Arc<Mutex<HashMap<Key, Kept>>>);

/// How long a connection is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stays {
    /// The host says who we are there.
    Here,
    /// A request says so.
    WhileUsed,
}

/// A connection, and when it was last asked for.
struct Kept {
    connection: Arc<Connection>,
    at: tokio::time::Instant,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    endpoint: Endpoint,
    /// PEM.
    certificates: Vec<Vec<u8>>,
    /// Certificate and key, PEM, of our own.
    identity: Option<Vec<u8>>,
    credential: Option<Credential>,
}

/// What a digest is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A manifest or an index.
    Manifest,
    /// A configuration or a layer, of so many bytes.
    Blob(u64),
}

/// Where one image comes from.
pub struct Source {
    image: ImageRef,
    /// Where it stands how to reach registries, and who we are there.
    config_path: PathBuf,
    docker_config: PathBuf,
    /// Bytes a second.
    rate_min: u64,
    endpoints: Vec<Place>,
}

/// One place that it comes from.
struct Place {
    endpoint: Endpoint,
    connection: Arc<Connection>,
    introduced: Introduced,
}

/// Who says to an endpoint who we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Introduced {
    /// The request, by credentials of its own.
    ByRequest,
    /// Docker's `config.json` on this host.
    ByHost,
    /// Nobody does.
    Not,
}

/// Bytes of a blob as they arrive.
pub struct Blob {
    /// The endpoint that serves them, host[:port].
    pub endpoint: String,
    /// Where they begin.
    pub offset: u64,
    /// The bytes from there on; whether they have the digest, containerd says when they are committed.
    pub bytes: body::Parts,
}

impl Registries {
    /// `config_path` is containerd's directory of `hosts.toml` files, `docker_config` a `config.json` as docker has it; both
    /// are read anew for each pull. A download of fewer bytes a second than `rate_min`, over a minute, is broken off.
    pub fn new(
        config_path: PathBuf,
        docker_config: PathBuf,
        connect_timeout: Duration,
        read_timeout: Duration,
        rate_min: u64,
    ) -> Self {
        let patience = Patience { connect: connect_timeout, read: read_timeout };
        Self { config_path, docker_config, patience, rate_min, connections: Connections::default() }
    }

    /// Where `image` comes from. `own` is what its registry, and no mirror of it, is told instead of what the host says.
    ///
    /// # Errors
    /// If a configuration, certificate or credential cannot be used.
    pub async fn source(&self, image: &ImageRef, own: Option<&Credential>) -> Result<Source> {
        let credentials = Credentials::read(&self.docker_config)?;
        let mut endpoints = Vec::new();
        let mut is_told = own.is_none();
        for endpoint in hosts::endpoints(&self.config_path, image.registry())? {
            let (credential, introduced) = match own {
                Some(own) if hosts::is_itself(&endpoint, image.registry()) => {
                    is_told = true;
                    (Some(own.clone()), Introduced::ByRequest)
                }
                _ => match credentials.of(&endpoint.authority).await? {
                    Some(known) => (Some(known), Introduced::ByHost),
                    None => (None, Introduced::Not),
                },
            };
            let stays = match introduced {
                Introduced::ByRequest => Stays::WhileUsed,
                Introduced::ByHost | Introduced::Not => Stays::Here,
            };
            let connection = self.connection(endpoint.clone(), credential, stays)?;
            endpoints.push(Place { endpoint, connection, introduced });
        }
        if !is_told {
            let message = format!(
                "credentials came for {image}, and its hosts.toml has no endpoint that is {} itself: they are for no mirror",
                image.registry()
            );
            return Err(Error::new(Reason::RegistryConfiguration, message).with("image", image));
        }
        let (config_path, docker_config) = (self.config_path.clone(), self.docker_config.clone());
        let (image, rate_min) = (image.clone(), self.rate_min);
        Ok(Source { image, config_path, docker_config, rate_min, endpoints })
    }

    fn connection(
        &self,
        endpoint: Endpoint,
        credential: Option<Credential>,
        stays: Stays,
    ) -> Result<Arc<Connection>> {
        // Read anew each time: certificates are renewed under a running service.
        let certificates = endpoint.ca.iter().map(certificate).collect::<Result<Vec<_>>>()?;
        let identity = endpoint.client.iter().map(certificate).collect::<Result<Vec<_>>>()?.join(&b'\n');
        let identity = (!identity.is_empty()).then_some(identity);
        let key = Key { endpoint, certificates, identity, credential };
        let mut connections = self.connections.all();
        let now = tokio::time::Instant::now();
        if let Some(kept) = connections.get_mut(&key) {
            kept.at = now;
            return Ok(kept.connection.clone());
        }
        let Key { endpoint, certificates, identity, credential } = &key;
        let connection =
            Connection::new(endpoint, certificates, identity.as_deref(), credential.clone(), self.patience);
        let connection = connection.map_err(|e| {
            let message = format!(
                "no connection to registry {} can be set up: {}; look at its hosts.toml",
                endpoint.authority,
                refusal::words(&e)
            );
            Error::new(Reason::RegistryConfiguration, message)
        })?;
        let connection = Arc::new(connection);
        if connections.len() >= CONNECTIONS {
            connections.clear();
        }
        if stays == Stays::WhileUsed {
            tokio::spawn(self.connections.clone().forget_unused(key.clone()));
        }
        connections.insert(key, Kept { connection: connection.clone(), at: now });
        Ok(connection)
    }
}

impl Connections {
    fn all(&self) -> MutexGuard<'_, HashMap<Key, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passwords of requests are not kept in memory for ever. Whoever is at work has the connection still.
    async fn forget_unused(self, key: Key) {
        while let Some(at) = self.last_use(&key) {
            tokio::time::sleep_until(at + UNUSED).await;
            let mut all = self.all();
            if all.get(&key).is_some_and(|kept| kept.at.elapsed() >= UNUSED) {
                all.remove(&key);
            }
        }
    }

    fn last_use(&self, key: &Key) -> Option<tokio::time::Instant> {
        self.all().get(key).map(|kept| kept.at)
    }
}

fn certificate(path: &PathBuf) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| {
        let message = format!("the certificate {} cannot be read: {e}; hosts.toml names it", path.display());
        Error::new(Reason::RegistryConfiguration, message).with("path", path.display())
    })
}

impl Source {
    /// The manifest or index that `digest`, or else the image's name, points to, of `limit` bytes at the most; its bytes
    /// and their digest, checked.
    pub async fn document(
        &self,
        digest: Option<&Digest>,
        accepted: &[&str],
        limit: usize,
    ) -> Result<(Vec<u8>, Digest)> {
        let wanted = match digest {
            Some(digest) => self.image.inner().clone_with_digest(digest.to_string()),
            None => self.image.inner().clone(),
        };
        let mut pause = FIRST_PAUSE;
        for _ in 1..TRIES {
            match self.ask(&wanted, accepted, limit).await {
                Err((Outlook::Passing, error)) => {
                    tracing::warn!(%error, "asking again");
                    tokio::time::sleep(pause).await;
                    pause *= 4;
                }
                answer => return answer.map_err(|(_, error)| error),
            }
        }
        self.ask(&wanted, accepted, limit).await.map_err(|(_, error)| error)
    }

    /// Asks every endpoint that may be asked, until one answers. The last one's refusal counts: it is the registry itself.
    async fn ask(
        &self,
        wanted: &Reference,
        accepted: &[&str],
        limit: usize,
    ) -> Result<(Vec<u8>, Digest), (Outlook, Error)> {
        let by_tag = wanted.digest().is_none();
        let mut failure = None;
        for place in &self.endpoints {
            let Place { endpoint, connection, .. } = place;
            if by_tag && endpoint.serves != Serves::TagsAndDigests {
                continue;
            }
            let refusal = match connection.document(&at(wanted, endpoint), accepted, limit).await {
                Ok(document) => match self.checked(document, wanted.digest()) {
                    Ok(found) => return Ok(found),
                    Err(error) => (Outlook::Lasting, error),
                },
                Err(error) => (refusal::outlook(&error), self.explain(&error, place, "manifest")),
            };
            tracing::debug!(endpoint = endpoint.authority, error = %refusal.1, "no manifest from here");
            failure = Some(refusal);
        }
        Err(failure.unwrap_or_else(|| (Outlook::Lasting, self.nowhere())))
    }

    /// Whether an endpoint hands this out to us, as it says when it is asked. Nothing is fetched, unless one answers, but not
    /// with what would say so: that one has to show it.
    ///
    /// # Errors
    /// If none does, and one refuses to say so or does not answer, or what it sends is something else.
    pub async fn has(&self, kind: Kind, digest: &Digest) -> Result<bool> {
        let (mut failure, mut is_vague): (Option<Error>, bool) = (None, false);
        for place in &self.endpoints {
            let Place { endpoint, connection, .. } = place;
            if endpoint.serves == Serves::Nothing {
                continue;
            }
            match connection.has(&at(self.image.inner(), endpoint), kind, digest).await {
                Ok(true) => return Ok(true),
                Ok(false) => is_vague = true,
                Err(error) => {
                    let error = self.explain(&error, place, digest.as_str());
                    // One that may say yes when it answers outweighs one that says no.
                    if error.reason() != Reason::ImageNotFound
                        && failure.as_ref().is_none_or(|other| other.reason() != Reason::RegistryUnavailable)
                    {
                        failure = Some(error);
                    }
                }
            }
        }
        if is_vague && self.proves(kind, digest).await? {
            return Ok(true);
        }
        failure.map_or(Ok(false), Err)
    }

    /// Whether an endpoint hands this out to us, as it shows by sending it. Nothing of it is kept.
    ///
    /// # Errors
    /// If none does, and one refuses to or does not answer, or what it sends is something else.
    pub async fn proves(&self, kind: Kind, digest: &Digest) -> Result<bool> {
        let Kind::Blob(size) = kind else {
            return match self.document(Some(digest), &ACCEPTED, DOCUMENT_MAX_BYTES).await {
                Ok(_) => Ok(true),
                Err(error) if error.reason() == Reason::ImageNotFound => Ok(false),
                Err(error) => Err(error),
            };
        };
        let mut outcome = Ok(false);
        for failed in 0..self.endpoints() {
            outcome = match self.hash(digest, size, failed).await {
                Ok(sent) if sent == *digest => return Ok(true),
                Ok(sent) => {
                    let message = format!("{}: the registry served {sent} for {digest}", self.image);
                    Err(Error::new(Reason::ImageCorrupt, message).with("digest", digest))
                }
                Err(error) if error.reason() == Reason::ImageNotFound => return outcome,
                Err(error) => Err(error),
            };
        }
        outcome
    }

    async fn hash(&self, digest: &Digest, size: u64, failed: u32) -> Result<Digest> {
        let (mut hash, mut left) = (Sha256::new(), size);
        let take = |part: &[u8]| {
            hash.update(part);
            let rest = left.checked_sub(part.len() as u64);
            left = rest.unwrap_or_default();
            // If there is more, it is something else, however it goes on.
            rest.is_some()
        };
        self.receive(digest, failed, take).await?;
        Ok(Digest::of_hash(&hash.finalize()))
    }

    /// A blob of `limit` bytes at the most, checked.
    ///
    /// # Errors
    /// `IMAGE_NOT_FOUND`: there is none. `IMAGE_CORRUPT`: what is sent is something else.
    pub async fn small_blob(&self, digest: &Digest, limit: usize) -> Result<Vec<u8>> {
        let mut outcome = Err(self.nowhere());
        for failed in 0..self.endpoints() {
            outcome = self.read(digest, limit, failed).await;
            match &outcome {
                Err(error) if error.reason() != Reason::ImageNotFound => {}
                _ => break,
            }
        }
        outcome
    }

    async fn read(&self, digest: &Digest, limit: usize, failed: u32) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let take = |part: &[u8]| {
            bytes.extend_from_slice(part);
            bytes.len() <= limit
        };
        self.receive(digest, failed, take).await?;
        let sent = Digest::of(&bytes);
        if bytes.len() <= limit && sent == *digest {
            return Ok(bytes);
        }
        let what = if bytes.len() > limit { format!("more than {limit} bytes") } else { sent.to_string() };
        let message = format!("{}: the registry served {what} for {digest}", self.image);
        Err(Error::new(Reason::ImageCorrupt, message).with("digest", digest))
    }

    /// Hands the bytes of a blob to `take` as they arrive, until it wants no more.
    async fn receive(&self, digest: &Digest, failed: u32, mut take: impl FnMut(&[u8]) -> bool) -> Result<()> {
        let mut blob = self.blob(digest, 0, failed).await?;
        let mut pace = self.pace();
        loop {
            let asked = Instant::now();
            let Some(part) = blob.bytes.next().await else { return Ok(()) };
            let broken = |what: &dyn fmt::Display| {
                let message =
                    format!("registry {} broke off while serving {digest}: {what}; repeat", blob.endpoint);
                Error::new(Reason::RegistryUnavailable, message)
            };
            let part = part.map_err(|error| broken(&error))?;
            if !pace.keeps(part.len(), asked.elapsed()) {
                return Err(broken(&"it is too slow"));
            }
            if !take(&part) {
                return Ok(());
            }
        }
    }

    /// Of a download.
    pub(crate) fn pace(&self) -> Pace {
        Pace::of(self.rate_min)
    }

    /// How many endpoints there are.
    pub fn endpoints(&self) -> u32 {
        u32::try_from(self.endpoints.len()).unwrap_or(u32::MAX)
    }

    /// The bytes of a blob from `offset` on; they may begin before `offset`. They come from the first endpoint that
    /// has it, beginning with another one after each that has `failed`, so that one that always breaks off is left.
    pub async fn blob(&self, digest: &Digest, offset: u64, failed: u32) -> Result<Blob> {
        let mut failure: Option<Error> = None;
        let (count, first) = (self.endpoints.len(), failed as usize);
        let from_first =
            self.endpoints.iter().cycle().skip(first.checked_rem(count).unwrap_or(0)).take(count);
        for place in from_first {
            let Place { endpoint, connection, .. } = place;
            match connection.blob(&at(self.image.inner(), endpoint), digest, offset).await {
                Ok(response) => {
                    let endpoint = endpoint.authority.clone();
                    let is_part = response.status() == StatusCode::PARTIAL_CONTENT;
                    let offset = if is_part { offset } else { 0 };
                    return Ok(Blob { endpoint, offset, bytes: body::parts(response) });
                }
                Err(error) => {
                    let error = self.explain(&error, place, digest.as_str());
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

    /// Holds it against the digest that is wanted, or else against the one that the registry says it has.
    fn checked(&self, document: Document, wanted: Option<&str>) -> Result<(Vec<u8>, Digest)> {
        let Document { bytes, digest: said } = document;
        let digest = Digest::of(&bytes);
        match wanted.or(said.as_ref().map(Digest::as_str)) {
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
    fn explain(&self, error: &Failure, place: &Place, what: &str) -> Error {
        let endpoint = &place.endpoint;
        let (image, at) = (&self.image, &endpoint.authority);
        let reason = refusal::reason(error);
        let words = refusal::words(error);
        let message = match reason {
            Reason::ImageNotFound => {
                let which = if image.digest().is_some() { "digest" } else { "tag" };
                format!("image {image} is not at registry {at} ({what}: {words}); check its name and {which}")
            }
            Reason::RegistryDenied => {
                format!("registry {at} does not hand out {image} to us ({words}); {}", self.who(place))
            }
            Reason::ImageUnsupported => format!("its {what} at registry {at} cannot be used: {words}"),
            _ => {
                let is_plain = endpoint.scheme == Scheme::Https && refusal::may_be_plain(error, at);
                let hint = if is_plain { self.say_plain(endpoint) } else { String::new() };
                format!(
                    "registry {at} cannot be reached for {image} ({what}: {words}){hint}; repeat when it answers"
                )
            }
        };
        Error::new(reason, message).with("image", image).with("registry", at)
    }
}

impl Source {
    /// Who we are to the endpoint that has refused us, and what can be done about it.
    fn who(&self, place: &Place) -> String {
        let file = format!(
            "docker's config.json on this host, {} ([registry] docker_config)",
            self.docker_config.display()
        );
        match (place.introduced, hosts::is_itself(&place.endpoint, self.image.registry())) {
            (Introduced::ByRequest, _) => {
                "the credentials that came with the request are not good for it: give others".to_owned()
            }
            (Introduced::ByHost, true) => format!(
                "the credentials in {file}, are not good for it: mend them there, or give others with the request (--credentials)"
            ),
            (Introduced::Not, true) => {
                format!(
                    "the request came without credentials (--credentials): give them with it, or in {file}"
                )
            }
            (Introduced::ByHost, false) => {
                format!("the credentials in {file}, are not good for this mirror: mend them there")
            }
            (Introduced::Not, false) => {
                format!("there are no credentials for this mirror in {file}: give them there")
            }
        }
    }

    /// What to do if the endpoint speaks plain HTTP.
    fn say_plain(&self, endpoint: &Endpoint) -> String {
        let (registry, at) = (self.image.registry(), &endpoint.authority);
        let (own, read) = hosts::files(&self.config_path, registry);
        let (file, says) = if hosts::is_itself(endpoint, registry) {
            // What is there for all registries is no place for it.
            let instead = read.as_ref().filter(|read| **read != own);
            let instead = instead.map(|read| format!(" (read instead of {} then)", read.display()));
            (format!("{}{}", own.display(), instead.unwrap_or_default()), format!("server = \"http://{at}\""))
        } else {
            let file = read.unwrap_or(own);
            (file.display().to_string(), format!("[host.\"http://{at}\"]"))
        };
        format!("; if it speaks plain HTTP, say so in {file}: {says}")
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

    #[tokio::test]
    async fn who_was_refused_is_told_what_to_do() {
        let _done = rustls::crypto::ring::default_provider().install_default();
        let (image, patience) = (ImageRef::parse("r.example:5000/x:1").unwrap(), Duration::from_secs(1));
        let own = Credential::Identity("geheim".to_owned());
        let directory = tempfile::tempdir().unwrap();
        let hosts = directory.path().join("r.example:5000");
        fs::create_dir(&hosts).unwrap();
        fs::write(hosts.join("hosts.toml"), "[host.\"https://mirror.example\"]\n").unwrap();
        let file = directory.path().join("config.json");
        let registries = Registries::new(directory.path().to_owned(), file.clone(), patience, patience, 0);
        let auth = |name: &str| format!(r#""{name}": {{"username": "u", "password": "geheim"}}"#);
        let (both, one) =
            (format!("{}, {}", auth("r.example:5000"), auth("mirror.example")), auth("mirror.example"));
        // What the request says, and the host; what the mirror's refusal says, and the registry's; and what that does not.
        for (own, host, mirror, itself, not) in [
            (None, "", "no credentials for this mirror", "the request came without", "not good"),
            (None, &*one, "not good for this mirror", "the request came without", "not good"),
            (None, &*both, "not good for this mirror", "docker_config), are not good for it", "without"),
            (Some(&own), "", "no credentials for this mirror", "came with the request", "config.json"),
            (Some(&own), &*both, "not good for this mirror", "came with the request", "config.json"),
        ] {
            fs::write(&file, format!("{{\"auths\": {{{host}}}}}")).unwrap();
            let source = registries.source(&image, own).await.unwrap();
            let refused = Failure::Refused {
                status: StatusCode::UNAUTHORIZED,
                url: "https://r.example/v2/".to_owned(),
                codes: Vec::new(),
                text: String::new(),
            };
            let said = |at: usize| source.explain(&refused, &source.endpoints[at], "manifest").to_string();
            let named = format!("{} ([registry] docker_config)", file.display());
            assert!(said(0).contains(mirror) && said(0).contains(&named), "{}", said(0));
            assert!(said(1).contains(itself) && !said(1).contains(not), "{}", said(1));
            assert_eq!(said(1).contains(&named), own.is_none(), "{}", said(1));
            assert!(!said(0).contains("geheim") && !said(1).contains("geheim"));
        }
    }

    #[tokio::test]
    async fn plain_http_is_to_be_told_where_it_is_read() {
        let _done = rustls::crypto::ring::default_provider().install_default();
        let (image, patience) = (ImageRef::parse("r.example:5000/x:1").unwrap(), Duration::from_secs(1));
        // The directory that there is, the one that is named for the mirror and for the registry, and what is said besides.
        for (there, mirror, itself, instead) in [
            ("r.example_5000_", "r.example_5000_", "r.example_5000_", false),
            ("r.example:5000", "r.example:5000", "r.example:5000", false),
            ("_default", "_default", "r.example:5000", true),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let file = |name: &str| directory.path().join(name).join("hosts.toml");
            fs::create_dir(directory.path().join(there)).unwrap();
            fs::write(file(there), "[host.\"https://mirror.example\"]\n").unwrap();
            let none = directory.path().join("config.json");
            let registries = Registries::new(directory.path().to_owned(), none, patience, patience, 0);
            let source = registries.source(&image, None).await.unwrap();
            let said = |at: usize| source.say_plain(&source.endpoints[at].endpoint);
            let of_mirror = format!("{}: [host.\"http://mirror.example\"]", file(mirror).display());
            assert!(said(0).contains(&of_mirror), "{}", said(0));
            assert!(said(1).contains(&file(itself).display().to_string()), "{}", said(1));
            assert_eq!(said(1).contains(&file("_default").display().to_string()), instead, "{}", said(1));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_s_password_is_forgotten_when_it_is_not_used() {
        let _done = rustls::crypto::ring::default_provider().install_default();
        let (image, patience) = (ImageRef::parse("r.example/x:1").unwrap(), Duration::from_secs(1));
        let directory = tempfile::tempdir().unwrap();
        let none = directory.path().join("config.json");
        let registries = Registries::new(directory.path().to_owned(), none, patience, patience, 0);
        let own = Credential::Identity("geheim".to_owned());
        let kept = || registries.connections.all().len();
        let pass = async |time| tokio::time::sleep(time).await;
        registries.source(&image, None).await.unwrap();
        for _ in 0..3 {
            registries.source(&image, Some(&own)).await.unwrap();
            pass(UNUSED - patience).await;
            assert_eq!(kept(), 2, "it is in use");
        }
        pass(2 * patience).await;
        assert_eq!(kept(), 1, "the host's own stays");
        // The same one comes back.
        registries.source(&image, Some(&own)).await.unwrap();
        assert_eq!(kept(), 2);
        pass(UNUSED + patience).await;
        assert_eq!(kept(), 1);
    }

    #[tokio::test]
    async fn what_is_not_there_is_looked_for_by_its_own_name() {
        let (source, _) = registry_that_is(Manner::Plain, b"honest").await;
        let error = source.document(None, &ACCEPTED, 1000).await.unwrap_err().to_string();
        assert!(error.contains("check its name and tag"), "{error}");
        let pinned = format!("{}/x@{}", source.image.registry(), Digest::of(b"missing"));
        let source = Source { image: ImageRef::parse(&pinned).unwrap(), ..source };
        let error = source.document(None, &ACCEPTED, 1000).await.unwrap_err().to_string();
        assert!(error.contains("check its name and digest"), "{error}");
    }

    #[tokio::test]
    async fn plain_http_is_spoken_of_where_it_may_be_spoken() {
        // It answers to anything as a server without TLS does.
        let (source, _) = registry_that_is(Manner::Plain, b"honest").await;
        let plain = source.image.registry().to_owned();
        let none = {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap().to_string()
        };
        let (directory, patience) = (tempfile::tempdir().unwrap(), Duration::from_secs(20));
        let registries =
            Registries::new(directory.path().to_owned(), "/etc/d/config.json".into(), patience, patience, 0);
        let file = directory.path().join(&plain).join("hosts.toml");
        for (authority, hint) in [
            (plain.as_str(), Some(format!("{}: server = \"http://{plain}\"", file.display()))),
            // Nobody listens there; nobody knows it.
            (none.as_str(), None),
            ("nowhere.invalid", None),
        ] {
            let image = ImageRef::parse(&format!("{authority}/x:1")).unwrap();
            let source = registries.source(&image, None).await.unwrap();
            let error = source.document(None, &ACCEPTED, 1000).await.unwrap_err().to_string();
            match hint {
                Some(hint) => assert!(error.contains(&hint), "{error}"),
                None => assert!(!error.contains("plain HTTP"), "{error}"),
            }
        }
    }

    /// How a registry answers.
    #[derive(Clone, Copy)]
    enum Manner {
        /// It says what it has, as the specification wants it.
        Plain,
        /// It has it, and says nothing of it.
        Terse,
        /// It says what is wanted to be heard, and sends something else.
        Lying,
        /// With a page to log in on.
        Page,
    }

    /// A registry that answers in this manner, whatever it is asked for but what it does not have; and what it was asked.
    async fn registry_that_is(manner: Manner, honest: &'static [u8]) -> (Source, Arc<Mutex<Vec<String>>>) {
        use axum::{Router, body::Body, extract::Request, http};
        // Another test may have done it.
        let _done = rustls::crypto::ring::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let wanted = Digest::of(honest).to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let told = asked.clone();
        let serve = Router::new().fallback(async move |request: Request| {
            let name = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
            let answer = http::Response::builder();
            if name != wanted {
                return answer.status(404).body(Body::empty()).unwrap();
            }
            told.lock().unwrap().push(request.method().to_string());
            let answer = match manner {
                Manner::Plain | Manner::Lying => answer.header("docker-content-digest", &wanted),
                Manner::Terse | Manner::Page => answer,
            };
            let body = match manner {
                // Its length is not told.
                Manner::Terse => {
                    let parts = futures_util::stream::iter([Ok::<_, std::io::Error>(honest)]);
                    Body::from_stream(parts)
                }
                Manner::Plain => Body::from(honest),
                Manner::Lying => Body::from(vec![b'?'; honest.len()]),
                Manner::Page => Body::from("<html>Who are you?</html>"),
            };
            answer.body(body).unwrap()
        });
        tokio::spawn(async { axum::serve(listener, serve).await });
        let directory = tempfile::tempdir().unwrap();
        let hosts = directory.path().join(&authority);
        fs::create_dir(&hosts).unwrap();
        fs::write(hosts.join("hosts.toml"), format!("server = \"http://{authority}\"\n")).unwrap();
        let patience = Duration::from_secs(20);
        let none = directory.path().join("config.json");
        let registries = Registries::new(directory.path().to_owned(), none, patience, patience, 0);
        let image = ImageRef::parse(&format!("{authority}/x:1")).unwrap();
        (registries.source(&image, None).await.unwrap(), asked)
    }

    #[tokio::test]
    async fn to_say_that_one_has_it_is_not_to_prove_it() {
        let (there, missing) = (Digest::of(b"honest"), Digest::of(b"missing"));
        // What it says of what it has, whether it can show that, and how often it is asked before it is believed.
        let corrupt = Err(Reason::ImageCorrupt);
        let table = [
            (Manner::Plain, Ok(true), Ok(true), vec!["HEAD"]),
            (Manner::Terse, Ok(true), Ok(true), vec!["HEAD", "GET"]),
            (Manner::Lying, Ok(true), corrupt, vec!["HEAD"]),
            (Manner::Page, corrupt, corrupt, vec!["HEAD", "GET"]),
        ];
        for (manner, has, proves, requests) in table {
            for kind in [Kind::Manifest, Kind::Blob(6)] {
                let (source, asked) = registry_that_is(manner, b"honest").await;
                assert_eq!(source.has(kind, &there).await.map_err(|e| e.reason()), has, "{kind:?}");
                assert_eq!(*asked.lock().unwrap(), requests, "{kind:?}");
                assert_eq!(source.proves(kind, &there).await.map_err(|e| e.reason()), proves, "{kind:?}");
                assert!(!source.has(kind, &missing).await.unwrap());
                assert!(!source.proves(kind, &missing).await.unwrap());
            }
        }
        // More than there should be is read no further.
        let (source, _) = registry_that_is(Manner::Lying, b"honest").await;
        assert!(source.proves(Kind::Blob(3), &there).await.is_err());
        assert!(source.has(Kind::Blob(3), &there).await.is_err());
    }
}
