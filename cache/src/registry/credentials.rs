//! What this host says of itself to registries: docker's `config.json`, with credential helpers, read anew for each pull.
//!
//! A credential is for one endpoint, by its name: what is for a registry is never sent to its mirrors.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use base64::Engine as _;
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
};

use super::hosts;
use crate::error::{Error, Reason, Result, shown};

/// What docker calls its own registry in the file.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// A helper answers within this time, or is killed.
const HELPER_PATIENCE: Duration = Duration::from_secs(30);
/// More is no credential, in bytes.
const ANSWER_MAX_BYTES: u64 = 256 << 10;
/// What a helper says instead of a name if the secret is an identity token.
const IDENTITY_TOKEN: &str = "<token>";

/// Who we are to one endpoint.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Credential {
    /// A name and a password.
    Password {
        /// The name.
        user: String,
        /// The password, or a token in its place.
        password: String,
    },
    /// What is exchanged for tokens.
    Identity(String),
}

/// Neither logged nor shown.
impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credential(…)")
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ConfigFile {
    #[serde(default)]
    auths: HashMap<String, Auth>,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Auth {
    /// user:password in base 64.
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
}

/// The credentials of one pull.
#[derive(Debug)]
pub(super) struct Credentials {
    path: PathBuf,
    file: ConfigFile,
}

impl Credentials {
    /// Of this file; none if it is not there.
    ///
    /// # Errors
    /// If it is there and cannot be used: going on without would be told as a refusal of the registry's.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let file = match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                // Not the parser's words: they may be those of a password.
                wrong(
                    path,
                    &format!(
                        "it is no config.json of docker's (line {}, column {})",
                        error.line(),
                        error.column()
                    ),
                )
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => ConfigFile::default(),
            Err(error) => return Err(wrong(path, &error.to_string())),
        };
        Ok(Self { path: path.to_owned(), file })
    }

    /// For the endpoint, host[:port], if there is one. A helper comes before what is in the file, as with docker.
    pub(super) async fn of(&self, authority: &str) -> Result<Option<Credential>> {
        let helpers = &self.file.cred_helpers;
        let helper =
            keys(authority).iter().find_map(|key| helpers.get(key)).or(self.file.creds_store.as_ref());
        if let Some(helper) = helper {
            let server = if authority == hosts::HUB { HUB_KEY } else { authority };
            if let Some(found) = self.ask(helper, server).await? {
                return Ok(Some(found));
            }
        }
        let known = self.file.auths.iter().find(|(name, _)| is_same(name, authority));
        known.map_or(Ok(None), |(name, auth)| self.plain(name, auth))
    }

    fn plain(&self, name: &str, auth: &Auth) -> Result<Option<Credential>> {
        if !auth.identitytoken.is_empty() {
            return Ok(Some(Credential::Identity(auth.identitytoken.clone())));
        }
        if auth.auth.is_empty() {
            let (user, password) = (auth.username.clone(), auth.password.clone());
            return Ok((!user.is_empty()).then_some(Credential::Password { user, password }));
        }
        let decoded = base64::engine::general_purpose::STANDARD.decode(&auth.auth).ok();
        let text = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = text.as_deref().and_then(|text| text.split_once(':'));
        let (user, password) = pair.ok_or_else(|| {
            wrong(&self.path, &format!("the auth of {name:?} is not user:password in base 64"))
        })?;
        // Docker has written a NUL at the end.
        let password = password.trim_end_matches('\0').to_owned();
        Ok(Some(Credential::Password { user: user.to_owned(), password }))
    }

    /// Has `docker-credential-HELPER get` say it.
    async fn ask(&self, helper: &str, server: &str) -> Result<Option<Credential>> {
        let program = format!("docker-credential-{helper}");
        let failed = |what: &str| {
            let message = format!(
                "{program}, which {} names for {server}, {what}; mend it, or take it out of the file",
                self.path.display()
            );
            Error::new(Reason::RegistryConfiguration, message).with("path", self.path.display())
        };
        if helper.is_empty() || helper.contains('/') {
            return Err(failed("is no name of a helper"));
        }
        let mut command = Command::new(&program);
        command
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let child = command.spawn().map_err(|error| failed(&format!("cannot be run: {error}")))?;
        let (status, answer) = match tokio::time::timeout(HELPER_PATIENCE, talk(child, server)).await {
            Ok(talked) => talked.map_err(|error| failed(&format!("cannot be talked to: {error}")))?,
            Err(_) => return Err(failed(&format!("did not answer within {} s", HELPER_PATIENCE.as_secs()))),
        };
        if !status.success() {
            let said = String::from_utf8_lossy(&answer);
            // The one refusal that means "none", by docker's protocol.
            if said.trim() == "credentials not found in native keychain" {
                return Ok(None);
            }
            return Err(failed(&format!("has failed ({status}): {}", shown(said.trim(), 200))));
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Answer {
            username: String,
            secret: String,
        }
        let Answer { username, secret } =
            serde_json::from_slice(&answer).map_err(|_| failed("has answered with no credential"))?;
        Ok(Some(if username == IDENTITY_TOKEN {
            Credential::Identity(secret)
        } else {
            Credential::Password { user: username, password: secret }
        }))
    }
}

/// What a helper may be named for.
fn keys(authority: &str) -> Vec<String> {
    let mut keys = vec![authority.to_owned(), format!("https://{authority}")];
    if authority == hosts::HUB {
        keys.extend([HUB_KEY.to_owned(), "docker.io".to_owned(), "index.docker.io".to_owned()]);
    }
    keys
}

/// Whether a name in the file means this endpoint: it may have a scheme, and a path that docker once wrote.
fn is_same(name: &str, authority: &str) -> bool {
    let bare = name.split_once("://").map_or(name, |(_, rest)| rest);
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let is_root = matches!(path.trim_end_matches('/'), "" | "v1" | "v2");
    let is_hub =
        authority == hosts::HUB && ["docker.io", "index.docker.io", "registry-1.docker.io"].contains(&host);
    is_root && (host == authority || is_hub)
}

fn wrong(path: &Path, what: &str) -> Error {
    let message = format!(
        "the credentials {} cannot be used: {what}; mend or remove it ([registry] docker_config)",
        path.display()
    );
    Error::new(Reason::RegistryConfiguration, message).with("path", path.display())
}

/// Asks a helper; returns how it has ended, and what it said. One that has made up its mind need not read what it is asked.
async fn talk(mut child: Child, asked: &str) -> io::Result<(ExitStatus, Vec<u8>)> {
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(asked.as_bytes()).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            written => written?,
        }
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(ANSWER_MAX_BYTES).read_to_end(&mut answer).await?;
    }
    Ok((child.wait().await?, answer))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn credentials(text: &str) -> Credentials {
        Credentials { path: "/c.json".into(), file: serde_json::from_str(text).unwrap() }
    }

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password { user: user.to_owned(), password: password.to_owned() })
    }

    #[tokio::test]
    async fn what_is_in_the_file() {
        // "cow:moo:x"
        let file = credentials(
            r#"{"auths": {
                "r.example:5000": {"auth": "Y293Om1vbzp4"},
                "https://s.example/v2/": {"username": "u", "password": "p"},
                "https://index.docker.io/v1/": {"identitytoken": "t"},
                "t.example/with/a/path": {"username": "u", "password": "p"},
                "empty.example": {}
            }, "HttpHeaders": {}}"#,
        );
        let table = [
            ("r.example:5000", password("cow", "moo:x")),
            ("r.example", None),
            ("s.example", password("u", "p")),
            ("registry-1.docker.io", Some(Credential::Identity("t".to_owned()))),
            ("t.example", None),
            ("empty.example", None),
            ("elsewhere.example", None),
        ];
        for (authority, expected) in table {
            assert_eq!(file.of(authority).await.unwrap(), expected, "{authority}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_used_is_told_without_its_secrets() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        assert!(Credentials::read(&path).unwrap().of("r").await.unwrap().is_none(), "it is not there");
        for text in [r#"{"auths": {"r": {"auth": 5, "password": "geheim"}}}"#, "geheim"] {
            std::fs::write(&path, text).unwrap();
            let error = Credentials::read(&path).unwrap_err().to_string();
            assert!(error.contains("config.json") && !error.contains("geheim"), "{error}");
        }
        for auth in ["Z2VoZWlt", "geheim!"] {
            let file = credentials(&format!(r#"{{"auths": {{"r.example": {{"auth": "{auth}"}}}}}}"#));
            let error = file.of("r.example").await.unwrap_err().to_string();
            assert!(error.contains("r.example") && !error.contains("geheim"), "{error}");
        }
        let secret = Credential::Password { user: "u".to_owned(), password: "geheim".to_owned() };
        assert_eq!(format!("{secret:?}"), "Credential(…)");
    }

    /// One that answers is found by PATH, which tests must not change for one another: end to end.
    #[tokio::test]
    async fn what_a_helper_says_counts_also_if_it_has_not_read_what_was_asked() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exec <&-; echo no; exit 3"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        // More than a pipe takes.
        let (status, answer) = talk(command.spawn().unwrap(), &"x".repeat(1 << 20)).await.unwrap();
        assert_eq!((status.code(), answer.as_slice()), (Some(3), b"no\n".as_slice()));
    }

    #[tokio::test]
    async fn helpers_that_cannot_be_asked_are_told() {
        for (helper, says) in [("../x", "no name"), ("", "no name"), ("that-is-not-there", "cannot be run")] {
            let file = credentials(&format!(r#"{{"credsStore": "{helper}"}}"#));
            let error = file.of("r.example").await.unwrap_err().to_string();
            assert!(error.contains(says), "{helper}: {error}");
        }
    }
}
