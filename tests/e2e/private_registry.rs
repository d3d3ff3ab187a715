//! A real registry that wants TLS with a certificate of its own, and a name and password.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use crate::{
    Test,
    support::{
        Outcome, check,
        command::sh,
        cow::evict_all,
        same,
        second::{Plan, Second},
        wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("with_a_certificate_of_its_own_and_a_password", with_a_password),
    ("with_a_credential_helper", with_a_helper),
];

const AUTHORITY: &str = "127.0.0.1:5443";
const HOSTS: &str = "/etc/containerd/certs.d/127.0.0.1:5443";
/// Of "moo", by bcrypt.
const HASH: &str = "$2b$05$abcdefghijklmnopqrstuuIvcImCbNWZEFMZ474.P3nceHvzH/JUO";
/// "cow:moo" and "cow:oink" in base 64.
const RIGHT: &str = "Y293Om1vbw==";
const WRONG: &str = "Y293Om9pbms=";
const HELPER: &str = "/usr/local/bin/docker-credential-e2e";

/// Has the images of the host's own. Stopped when dropped.
struct Private {
    directory: TempDir,
    process: Child,
}

impl Private {
    fn start() -> Outcome<Self> {
        let directory = tempfile::Builder::new().prefix("private").tempdir_in("/tmp")?;
        let at = directory.path().display();
        sh(&format!(
            "cd {at}; exec 2> /dev/null; openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca-key.pem -out ca.pem
             openssl req -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -keyout key.pem -out request.pem
             openssl x509 -req -in request.pem -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 -out cert.pem \\
               -extfile <(echo subjectAltName=IP:127.0.0.1)"
        ))?;
        fs::write(directory.path().join("passwords"), format!("cow:{HASH}\n"))?;
        let config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: /var/lib/docker-registry\nhttp:\n  addr: {AUTHORITY}\n  \
             tls:\n    certificate: {at}/cert.pem\n    key: {at}/key.pem\nauth:\n  htpasswd:\n    realm: e2e\n    path: \
             {at}/passwords\n"
        );
        fs::write(directory.path().join("config.yml"), config)?;
        fs::create_dir_all(HOSTS)?;
        fs::write(
            Path::new(HOSTS).join("hosts.toml"),
            format!("server = \"https://{AUTHORITY}\"\nca = \"{at}/ca.pem\"\n"),
        )?;
        let log = fs::File::create(directory.path().join("log"))?;
        let mut serve = Command::new("docker-registry");
        serve.arg("serve").arg(directory.path().join("config.yml"));
        let process = serve.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
        let private = Self { directory, process };
        wait_for("the private registry", || {
            let status = sh(&format!("curl -sk -o /dev/null -w '%{{http_code}}' https://{AUTHORITY}/v2/"))?;
            same!(status.trim(), "401", "what it says to anybody");
            Ok(())
        })?;
        Ok(private)
    }

    fn docker_config(&self) -> PathBuf {
        self.directory.path().join("config.json")
    }

    /// A service that has what is written there for its credentials.
    fn service(&self) -> Outcome<Second> {
        let path = self.docker_config();
        Plan::new(&format!("[registry]\ndocker_config = {:?}\n", path.display()))?.start()
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // It may have ended; the next test finds out what stays.
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
        let _removed = fs::remove_dir_all(HOSTS);
        let _gone = fs::remove_file(HELPER);
    }
}

fn with_a_password() -> Outcome {
    evict_all()?;
    let private = Private::start()?;
    let service = private.service()?;
    let image = format!("{AUTHORITY}/cowshed/tiny:1");
    let write = |auth: &str| {
        let text = format!("{{\"auths\": {{\"{AUTHORITY}\": {{\"auth\": \"{auth}\"}}}}}}");
        fs::write(private.docker_config(), text)
    };
    service.refuses("private", &image, 5, "REGISTRY_DENIED", &[AUTHORITY, "docker_config"])?;
    write(WRONG)?;
    service.refuses("private", &image, 5, "REGISTRY_DENIED", &[AUTHORITY])?;
    fs::write(private.docker_config(), "{\"auths\": \"moo\"}")?;
    service.refuses("private", &image, 6, "REGISTRY_CONFIGURATION", &["config.json"])?;
    write(RIGHT)?;
    service.cowshed(&["acquire", "private", &image])?.ok()?;
    let log = service.log();
    for secret in ["moo", "oink", RIGHT, WRONG] {
        check!(!log.contains(secret), "{secret:?} is in the log: {log}");
    }
    service.release_all()?;
    same!(service.stop()?, 0, "the exit status");
    // Without its certificate nobody is told a password.
    fs::write(Path::new(HOSTS).join("hosts.toml"), format!("server = \"https://{AUTHORITY}\"\n"))?;
    let service = private.service()?;
    service.refuses(
        "private",
        &format!("{AUTHORITY}/cowshed/app:1"),
        8,
        "REGISTRY_UNAVAILABLE",
        &["certificate"],
    )?;
    same!(service.stop()?, 0, "the exit status");
    evict_all()
}

fn with_a_helper() -> Outcome {
    evict_all()?;
    let private = Private::start()?;
    let service = private.service()?;
    let image = format!("{AUTHORITY}/cowshed/tiny:1");
    fs::write(private.docker_config(), format!("{{\"credHelpers\": {{\"{AUTHORITY}\": \"e2e\"}}}}"))?;
    service.refuses(
        "private",
        &image,
        6,
        "REGISTRY_CONFIGURATION",
        &["docker-credential-e2e", "cannot be run"],
    )?;
    let write = |script: &str| -> Outcome {
        fs::write(HELPER, format!("#!/bin/sh\n{script}\n"))?;
        Ok(fs::set_permissions(HELPER, fs::Permissions::from_mode(0o755))?)
    };
    write("echo 'the keychain is locked'; exit 1")?;
    service.refuses("private", &image, 6, "REGISTRY_CONFIGURATION", &["the keychain is locked"])?;
    write(&format!(
        "[ \"$1 $(cat)\" = 'get {AUTHORITY}' ] && echo '{{\"ServerURL\":\"x\",\"Username\":\"cow\",\"Secret\":\"moo\"}}'"
    ))?;
    service.cowshed(&["pull", &image])?.ok()?;
    same!(service.stop()?, 0, "the exit status");
    evict_all()
}
