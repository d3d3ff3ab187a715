//! containerd's `hosts.toml`: which endpoints serve a registry's images, and how to talk to them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, de};

use crate::error::{Error, Reason, Result};

/// Where the images of docker.io are served.
pub(super) const HUB: &str = "registry-1.docker.io";
/// Of registries that have no directory of their own.
const DEFAULT: &str = "_default";

/// One place to fetch from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// host[:port].
    pub authority: String,
    /// With or without TLS.
    pub scheme: Scheme,
    /// Certificates that are trusted besides the system's; PEM files.
    pub ca: Vec<PathBuf>,
    /// Our own certificate and its key: one PEM file, or two. Empty: none.
    pub client: Vec<PathBuf>,
    /// Whether the server's certificate has to be right.
    pub verify: Verify,
    /// What it may be asked for.
    pub serves: Serves,
}

/// How to talk to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Only where `hosts.toml` says so.
    Http,
    /// Everywhere else.
    Https,
}

/// Whether certificates are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verify {
    /// Yes.
    Certificate,
    /// No: `skip_verify = true`.
    Nothing,
}

/// `capabilities` of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Serves {
    /// Tags and digests.
    TagsAndDigests,
    /// Digests only: it must not say what a tag means.
    Digests,
    /// Nothing that we ask for.
    Nothing,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostsFile {
    server: Option<String>,
    #[serde(default, deserialize_with = "in_order")]
    host: Vec<(String, Host)>,
    #[serde(default)]
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    ca: OneOrMany,
    #[serde(default)]
    client: Client,
    #[serde(default)]
    skip_verify: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Host {
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    ca: OneOrMany,
    #[serde(default)]
    client: Client,
    #[serde(default)]
    skip_verify: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    #[default]
    None,
    One(PathBuf),
    Many(Vec<PathBuf>),
}

/// A file with both, or pairs of certificate and key.
#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
enum Client {
    #[default]
    None,
    One(PathBuf),
    Many(Vec<PathBuf>),
    Pairs(Vec<Vec<PathBuf>>),
}

impl Client {
    /// The files of the one that there is.
    fn files(self) -> Result<Vec<PathBuf>, &'static str> {
        match self {
            Self::None => Ok(Vec::new()),
            Self::One(path) => Ok(vec![path]),
            Self::Many(paths) if paths.len() < 2 => Ok(paths),
            Self::Pairs(mut pairs) if pairs.len() == 1 && (1..=2).contains(&pairs[0].len()) => {
                Ok(pairs.remove(0))
            }
            Self::Many(_) | Self::Pairs(_) => Err(
                "`client` has to be one file with certificate and key, or one pair of them: [[\"C\", \"K\"]]",
            ),
        }
    }
}

/// The endpoints of `registry`, in the order in which they are tried.
///
/// # Errors
/// If a file is there and cannot be used; ignoring it could mean asking the wrong server.
pub(super) fn endpoints(config_path: &Path, registry: &str) -> Result<Vec<Endpoint>> {
    for directory in directories(registry) {
        let file = config_path.join(&directory).join("hosts.toml");
        match fs::read_to_string(&file) {
            Ok(text) => return parse(&text, &file, registry),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                refuse_bare_certificates(&config_path.join(&directory), &file)?;
            }
            Err(error) => return Err(wrong(&file, &error.to_string())),
        }
    }
    Ok(vec![itself(registry)])
}

/// The file to change for this registry alone, and the one that is read for it now, if there is one.
pub(super) fn files(config_path: &Path, registry: &str) -> (PathBuf, Option<PathBuf>) {
    let file = |directory: &str| config_path.join(directory).join("hosts.toml");
    let read = directories(registry).into_iter().find(|directory| file(directory).exists());
    let own = read.as_deref().filter(|directory| *directory != DEFAULT).unwrap_or(registry);
    (file(own), read.as_deref().map(file))
}

/// Without a `hosts.toml`, containerd takes certificates and keys that lie in the directory, as Docker does.
fn refuse_bare_certificates(directory: &Path, file: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    let is_one = |path: &PathBuf| {
        path.extension()
            .is_some_and(|extension| ["crt", "cert", "key"].iter().any(|known| extension == *known))
    };
    match entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).find(is_one) {
        None => Ok(()),
        Some(path) => {
            let what =
                format!("it is not there, and {} is not used without it: name it in `ca`", path.display());
            Err(wrong(file, &what))
        }
    }
}

/// containerd's search order.
fn directories(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':') {
        names.push(format!("{host}_{port}_"));
    }
    names.extend([registry.to_owned(), DEFAULT.to_owned()]);
    names
}

/// Whether the endpoint is the registry, and no mirror of it.
pub(super) fn is_itself(endpoint: &Endpoint, registry: &str) -> bool {
    endpoint.authority == itself(registry).authority
}

/// The registry as it is called, over TLS.
fn itself(registry: &str) -> Endpoint {
    let authority = if registry == "docker.io" { HUB } else { registry };
    Endpoint {
        authority: authority.to_owned(),
        scheme: Scheme::Https,
        ca: Vec::new(),
        client: Vec::new(),
        verify: Verify::Certificate,
        serves: Serves::TagsAndDigests,
    }
}

fn parse(text: &str, file: &Path, registry: &str) -> Result<Vec<Endpoint>> {
    let hosts: HostsFile = toml::from_str(text).map_err(|e| wrong(file, &in_one_line(&e)))?;
    let mut endpoints = Vec::new();
    for (url, host) in hosts.host {
        endpoints.push(endpoint(&url, host, file)?);
    }
    let server = Host {
        capabilities: hosts.capabilities,
        ca: hosts.ca,
        client: hosts.client,
        skip_verify: hosts.skip_verify,
    };
    endpoints.push(match hosts.server {
        Some(url) => endpoint(&url, server, file)?,
        None => endpoint(&format!("https://{}", itself(registry).authority), server, file)?,
    });
    endpoints.retain(|endpoint| endpoint.serves != Serves::Nothing);
    Ok(endpoints)
}

fn endpoint(url: &str, host: Host, file: &Path) -> Result<Endpoint> {
    let (scheme, rest) = match url.split_once("://") {
        Some(("http", rest)) => (Scheme::Http, rest),
        Some(("https", rest)) => (Scheme::Https, rest),
        None => (Scheme::Https, url),
        Some(_) => return Err(wrong(file, &format!("{url:?} is neither http:// nor https://"))),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.is_empty()
        || authority.contains(['@', '?', '#'])
        || !matches!(path.trim_end_matches('/'), "" | "v2")
    {
        // The part before "@" may be a password.
        let shown = authority.rsplit('@').next().unwrap_or_default();
        let what = format!(
            "a URL at {shown:?} has a path or a user, or no host: it has to be [scheme://]host[:port]"
        );
        return Err(wrong(file, &what));
    }
    let client = host.client.files().map_err(|what| wrong(file, what))?;
    let beside = |path: PathBuf| file.parent().unwrap_or(Path::new("/")).join(path);
    Ok(Endpoint {
        authority: authority.to_owned(),
        scheme,
        ca: match host.ca {
            OneOrMany::None => Vec::new(),
            OneOrMany::One(path) => vec![beside(path)],
            OneOrMany::Many(paths) => paths.into_iter().map(beside).collect(),
        },
        client: client.into_iter().map(beside).collect(),
        verify: if host.skip_verify { Verify::Nothing } else { Verify::Certificate },
        serves: serves(host.capabilities.as_deref()),
    })
}

fn serves(capabilities: Option<&[String]>) -> Serves {
    let Some(capabilities) = capabilities else { return Serves::TagsAndDigests };
    let has = |name: &str| capabilities.iter().any(|c| c == name);
    match (has("pull"), has("resolve")) {
        (true, true) => Serves::TagsAndDigests,
        (true, false) => Serves::Digests,
        (false, _) => Serves::Nothing,
    }
}

/// The parser draws a picture of several lines; errors have one.
fn in_one_line(error: &toml::de::Error) -> String {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join(" ")
}

fn wrong(file: &Path, what: &str) -> Error {
    let message = format!("{} cannot be used: {what}; mend or remove it", file.display());
    Error::new(Reason::RegistryConfiguration, message).with("path", file.display())
}

/// A table's entries in the file's order, which is the order of preference.
fn in_order<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, Host)>, D::Error> {
    struct Entries;
    impl<'de> de::Visitor<'de> for Entries {
        type Value = Vec<(String, Host)>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a table of hosts")
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = map.next_entry()? {
                entries.push(entry);
            }
            Ok(entries)
        }
    }
    deserializer.deserialize_map(Entries)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(text: &str) -> Result<Vec<Endpoint>> {
        parse(text, Path::new("/etc/certs.d/r.example/hosts.toml"), "r.example")
    }

    fn names(endpoints: &[Endpoint]) -> Vec<String> {
        endpoints.iter().map(|e| format!("{:?} {} {:?}", e.scheme, e.authority, e.serves)).collect()
    }

    #[test]
    fn without_a_file_it_is_the_registry_itself_over_tls() {
        let directory = tempfile::tempdir().unwrap();
        let found = endpoints(directory.path(), "127.0.0.1:5000").unwrap();
        assert_eq!(names(&found), ["Https 127.0.0.1:5000 TagsAndDigests"]);
        assert_eq!(endpoints(directory.path(), "docker.io").unwrap()[0].authority, "registry-1.docker.io");
    }

    #[test]
    fn the_file_is_found_where_containerd_finds_it() {
        for name in ["127.0.0.1_5000_", "127.0.0.1:5000", "_default"] {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join(name)).unwrap();
            fs::write(directory.path().join(name).join("hosts.toml"), "server = \"http://127.0.0.1:5000\"")
                .unwrap();
            let found = endpoints(directory.path(), "127.0.0.1:5000").unwrap();
            assert_eq!(names(&found), ["Http 127.0.0.1:5000 TagsAndDigests"], "{name}");
            let file = |name: &str| directory.path().join(name).join("hosts.toml");
            let own = if name == DEFAULT { "127.0.0.1:5000" } else { name };
            assert_eq!(files(directory.path(), "127.0.0.1:5000"), (file(own), Some(file(name))));
        }
        let nothing = Path::new("/nothing");
        assert_eq!(files(nothing, "r.example"), (nothing.join("r.example/hosts.toml"), None));
    }

    #[test]
    fn certificates_without_a_file_are_not_ignored() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("r.example")).unwrap();
        assert_eq!(endpoints(directory.path(), "r.example").unwrap().len(), 1);
        fs::write(directory.path().join("r.example/ca.crt"), "x").unwrap();
        let error = endpoints(directory.path(), "r.example").unwrap_err();
        assert!(error.to_string().contains("ca.crt"), "{error}");
    }

    #[test]
    fn mirrors_come_first_and_in_the_files_order() {
        let found = read(
            "server = \"https://r.example\"\n\
             [host.\"http://z.example:8080\"]\n capabilities = [\"pull\"]\n\
             [host.\"https://a.example/v2\"]\n capabilities = [\"pull\", \"resolve\"]\n ca = \"ca.pem\"\n\
             [host.\"https://push.example\"]\n capabilities = [\"push\"]\n\
             [host.\"https://m.example\"]\n skip_verify = true\n ca = [\"/a.pem\", \"b.pem\"]\n",
        );
        let found = found.unwrap();
        assert_eq!(
            names(&found),
            [
                "Http z.example:8080 Digests",
                "Https a.example TagsAndDigests",
                "Https m.example TagsAndDigests",
                "Https r.example TagsAndDigests"
            ]
        );
        assert_eq!(found[1].ca, [Path::new("/etc/certs.d/r.example/ca.pem")]);
        assert_eq!(found[2].ca, [Path::new("/a.pem"), Path::new("/etc/certs.d/r.example/b.pem")]);
        assert_eq!(found[2].verify, Verify::Nothing);
    }

    #[test]
    fn our_own_certificate_is_one_file_or_two() {
        let table = [
            ("", vec![]),
            ("client = \"both.pem\"", vec!["/etc/certs.d/r.example/both.pem"]),
            ("client = [\"/both.pem\"]", vec!["/both.pem"]),
            ("client = [[\"/c.pem\", \"k.pem\"]]", vec!["/c.pem", "/etc/certs.d/r.example/k.pem"]),
        ];
        for (line, expected) in table {
            let found = read(&format!("[host.\"https://a\"]\n{line}\n")).unwrap();
            let expected: Vec<_> = expected.into_iter().map(PathBuf::from).collect();
            assert_eq!(found[0].client, expected, "{line}");
        }
    }

    #[test]
    fn what_we_cannot_honour_is_an_error_that_names_it() {
        let table = [
            ("server = 5", "server"),
            ("[host.\"https://a\"]\nclient = [\"a.pem\", \"b.pem\"]", "client"),
            ("[host.\"https://a\"]\nclient = [[\"a\", \"b\"], [\"c\", \"d\"]]", "client"),
            ("[host.\"https://a\"]\noverride_path = true", "override_path"),
            ("[host.\"https://a/prefix\"]", "path"),
            ("[host.\"https://user:word@a\"]", "host[:port]"),
            ("server = \"ftp://a\"", "ftp"),
            ("server = ", "hosts.toml"),
        ];
        for (text, says) in table {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("hosts.toml"), "{text}: {error}");
        }
    }
}
