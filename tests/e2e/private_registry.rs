//! A real registry that wants TLS with a certificate of its own, and a name and password.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Test,
    support::{
        Outcome, check,
        command::{number, sh},
        cow::{collect, evict_all, snapshots},
        fake_image::{FakeImage, digest},
        fake_registry::{Answer, FakeRegistry, Hosts},
        same,
        second::{Plan, Second},
        stack::Layer,
        wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("with_a_certificate_of_its_own_and_a_password", with_a_password),
    ("with_a_credential_helper", with_a_helper),
    ("of_several_tenants", of_several_tenants),
    ("of_a_tenant_that_cheats", of_a_tenant_that_cheats),
    ("behind_a_page_to_log_in_on", behind_a_page_to_log_in_on),
    ("of_several_tenants_without_kept_layers", of_tenants_without_layers),
    ("spares_of_another_tenants_image", spares_of_another_tenants_image),
];

pub(crate) const AUTHORITY: &str = "127.0.0.1:5443";
const HOSTS: &str = "/etc/containerd/certs.d/127.0.0.1:5443";
/// Of "moo", by bcrypt.
const HASH: &str = "$2b$05$abcdefghijklmnopqrstuuIvcImCbNWZEFMZ474.P3nceHvzH/JUO";
/// "cow:moo" and "cow:oink" in base 64.
const RIGHT: &str = "Y293Om1vbw==";
const WRONG: &str = "Y293Om9pbms=";
/// As `--credentials` takes it.
pub(crate) const COW: &str = r#"{"username":"cow","password":"moo"}"#;
const WRONG_COW: &str = r#"{"username":"cow","password":"oink"}"#;
const HELPER: &str = "/usr/local/bin/docker-credential-e2e";

/// Has the images of the host's own. Stopped when dropped.
pub(crate) struct Private {
    directory: TempDir,
    process: Child,
}

impl Private {
    pub(crate) fn start() -> Outcome<Self> {
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
        answers()?;
        Ok(private)
    }

    /// Until it is started again it does not answer.
    fn stop(&mut self) -> Outcome {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    fn start_again(&mut self) -> Outcome {
        let mut serve = Command::new("docker-registry");
        serve.arg("serve").arg(self.directory.path().join("config.yml"));
        self.process = serve.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        answers()
    }

    pub(crate) fn docker_config(&self) -> PathBuf {
        self.directory.path().join("config.json")
    }

    /// A service that has what is written there for its credentials.
    fn service(&self) -> Outcome<Second> {
        let path = self.docker_config();
        Plan::new(&format!("[registry]\ndocker_config = {:?}\n", path.display()))?.start()
    }
}

fn answers() -> Outcome {
    wait_for("the private registry", || {
        let status = sh(&format!("curl -sk -o /dev/null -w '%{{http_code}}' https://{AUTHORITY}/v2/"))?;
        same!(status.trim(), "401", "what it says to anybody");
        Ok(())
    })
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
    service.refuses(
        "private",
        &image,
        5,
        "REGISTRY_DENIED",
        &[AUTHORITY, "came without credentials", "docker_config", "--credentials"],
    )?;
    write(WRONG)?;
    service.refuses(
        "private",
        &image,
        5,
        "REGISTRY_DENIED",
        &[AUTHORITY, "config.json", "docker_config), are not good for it", "--credentials"],
    )?;
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

/// What one tenant has pulled with credentials of its own, another gets if the registry lets it, and not otherwise.
fn of_several_tenants() -> Outcome {
    evict_all()?;
    let mut private = Private::start()?;
    let service = private.service()?;
    let (right, wrong) = (private.directory.path().join("right"), private.directory.path().join("wrong"));
    fs::write(&right, COW)?;
    fs::write(&wrong, WRONG_COW)?;
    let (right, wrong) = (right.display().to_string(), wrong.display().to_string());
    let image = format!("{AUTHORITY}/cowshed/tiny:1");
    let acquire = |vm: &str, image: &str, more: &[&str]| {
        service.cowshed(&[&["acquire", vm, image, "--output", "json"], more].concat())
    };
    let denied = |vm: &str, image: &str, more: &[&str]| -> Outcome {
        acquire(vm, image, more)?.fails(5, &["REGISTRY_DENIED"])
    };
    let never = ["--pull", "never"];
    acquire("a-1", &image, &[&["--tenant", "a"][..], &never].concat())?.fails(6, &["IMAGE_NOT_PRESENT"])?;
    denied("a-1", &image, &["--tenant", "a"])?;
    acquire("a-1", &image, &["--tenant", "a", "--credentials", &wrong])?
        .fails(5, &["REGISTRY_DENIED", "credentials that came with the request"])?;
    let got = acquire("a-1", &image, &["--tenant", "a", "--credentials", &right])?.json()?;
    same!(got["cache"].as_str(), Some("miss"), "{got}");
    same!(got["lease"]["tenant"].as_str(), Some("a"), "{got}");
    // It need not show who it is again, nor does the registry have to be there; by whatever name of it.
    let digest = got["lease"]["image_digest"].as_str().ok_or("no digest")?.to_owned();
    let by_digest = format!("{AUTHORITY}/cowshed/tiny@{digest}");
    acquire("a-2", &image, &["--tenant", "a", "--pull", "never"])?.ok()?;
    // Another one has to, whatever the name, and the VM of another tenant is another VM.
    for name in [&image, &by_digest] {
        denied("b-1", name, &["--tenant", "b"])?;
        denied("b-1", name, &["--tenant", "b", "--credentials", &wrong])?;
        denied("b-1", name, &[])?;
    }
    denied("b-1", &image, &["--tenant", "b", "--pull", "never"])?;
    acquire("a-1", &image, &["--tenant", "b", "--credentials", &right])?
        .fails(4, &["SPEC_CONFLICT", "tenant"])?;
    service.cowshed(&["pull", &image, "--tenant", "b"])?.fails(5, &["REGISTRY_DENIED"])?;
    tells_no_secret(&service)?;
    // A service that has been started anew knows as much.
    let service = service.restart()?;
    let acquire = |vm: &str, image: &str, more: &[&str]| {
        service.cowshed(&[&["acquire", vm, image, "--output", "json"], more].concat())
    };
    acquire("b-1", &by_digest, &["--tenant", "b"])?.fails(5, &["REGISTRY_DENIED"])?;
    // Who cannot be asked has not said yes.
    private.stop()?;
    acquire("b-1", &image, &["--tenant", "b", "--credentials", &right])?
        .fails(8, &["REGISTRY_UNAVAILABLE"])?;
    acquire("a-3", &image, &["--tenant", "a"])?.ok()?;
    acquire("a-4", &image, &["--tenant", "a", "--pull", "always"])?.fails(8, &["REGISTRY_UNAVAILABLE"])?;
    private.start_again()?;
    let got = acquire("b-1", &image, &["--tenant", "b", "--credentials", &right])?.json()?;
    same!(got["cache"].as_str(), Some("hit"), "nothing is fetched to see it: {got}");
    let got =
        acquire("b-3", &image, &["--tenant", "b", "--credentials", &right, "--pull", "always"])?.json()?;
    same!(got["cache"].as_str(), Some("hit"), "nothing is fetched that is there: {got}");
    // For a while that counts.
    acquire("b-2", &image, &["--tenant", "b"])?.ok()?;
    // What the host may have is everybody's.
    fs::write(
        private.docker_config(),
        format!("{{\"auths\": {{\"{AUTHORITY}\": {{\"auth\": \"{RIGHT}\"}}}}}}"),
    )?;
    acquire("c-1", &image, &["--tenant", "c"])?.ok()?;
    fs::remove_file(private.docker_config())?;
    acquire("d-1", &image, &["--tenant", "d"])?.ok()?;
    tells_no_secret(&service)?;
    service.release_all()?;
    same!(service.stop()?, 0, "the exit status");
    evict_all()
}

fn tells_no_secret(service: &Second) -> Outcome {
    let log = service.log();
    for secret in ["moo", "oink", RIGHT, WRONG] {
        check!(!log.contains(secret), "{secret:?} is in the log: {log}");
    }
    Ok(())
}

/// A tenant with a registry of its own, which says what it likes of another one's image.
fn of_a_tenant_that_cheats() -> Outcome {
    evict_all()?;
    let private = Private::start()?;
    let service = private.service()?;
    let right = private.directory.path().join("right");
    fs::write(&right, COW)?;
    let image = format!("{AUTHORITY}/cowshed/tiny:1");
    service
        .cowshed(&["pull", &image, "--tenant", "a", "--credentials", &right.display().to_string()])?
        .ok()?;
    let (manifest, config) = private_manifest()?;
    let denied = |command: &[&str], status: i32, reason: &str| -> Outcome {
        service.cowshed(&[command, &["--tenant", "b"]].concat())?.fails(status, &[reason])
    };
    // Other layers, and a configuration that says that they are the ones that are unpacked.
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let junk = Layer::new().file("junk", b"junk")?.bytes()?;
    let mut other: Value = serde_json::from_slice(&manifest)?;
    for layer in other["layers"].as_array_mut().into_iter().flatten() {
        let kind = layer["mediaType"].as_str().unwrap_or_default().replace("+gzip", "").replace(".gzip", "");
        *layer = json!({ "mediaType": kind, "digest": digest(&junk), "size": junk.len() });
    }
    registry.manifest("1", Answer::Bytes(serde_json::to_vec(&other)?));
    registry.blob(&digest(&junk), Answer::Bytes(junk));
    // It does not have the configuration …
    denied(&["pull", &registry.image("1")], 5, "REGISTRY_DENIED")?;
    denied(&["acquire", "b-1", &registry.image("1")], 5, "REGISTRY_DENIED")?;
    // … and then it has.
    registry.blob(&digest(&config), Answer::Bytes(config));
    denied(&["pull", &registry.image("1")], 10, "IMAGE_CORRUPT")?;
    denied(&["acquire", "b-1", &registry.image("1")], 10, "IMAGE_CORRUPT")?;
    // An index that leads to the other tenant's manifest, without it, and with it.
    let entry = json!({
        "mediaType": other["mediaType"].as_str().unwrap_or("application/vnd.oci.image.manifest.v1+json"),
        "digest": digest(&manifest),
        "size": manifest.len(),
        "platform": { "os": "linux", "architecture": "amd64" },
    });
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": [entry] });
    registry.manifest("2", Answer::Bytes(serde_json::to_vec(&index)?));
    for _ in 0..2 {
        denied(&["pull", &registry.image("2")], 5, "REGISTRY_DENIED")?;
        denied(&["acquire", "b-2", &registry.image("2")], 5, "REGISTRY_DENIED")?;
        registry.manifest(&digest(&manifest), Answer::Bytes(manifest.clone()));
    }
    // To have shown a part of it opens nothing.
    denied(&["acquire", "b-3", &image], 5, "REGISTRY_DENIED")?;
    service.cowshed(&["acquire", "a-1", &image, "--tenant", "a"])?.ok()?;
    service.release_all()?;
    same!(service.stop()?, 0, "the exit status");
    evict_all()
}

/// Who answers whatever he is asked, and that with a page to log in on, has handed nothing out.
fn behind_a_page_to_log_in_on() -> Outcome {
    evict_all()?;
    let image = FakeImage::new(41, 1000)?;
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    registry.serve("1", &image);
    let name = registry.image("1");
    let service = Plan::new("")?.start()?;
    let directory = tempfile::Builder::new().prefix("page").tempdir_in("/tmp")?;
    let right = directory.path().join("right");
    fs::write(&right, COW)?;
    let right = right.display().to_string();
    service.cowshed(&["pull", &name, "--tenant", "a", "--credentials", &right])?.ok()?;
    let page = || Answer::Bytes(b"<html>Who are you?</html>".to_vec());
    registry.manifest(&digest(&image.manifest), page());
    registry.blob(&digest(&image.config), page());
    registry.blob(&digest(&image.layer), page());
    service
        .cowshed(&["acquire", "b-1", &name, "--tenant", "b"])?
        .fails(10, &["IMAGE_CORRUPT", "another tenant"])?;
    service.cowshed(&["acquire", "a-1", &name, "--tenant", "a"])?.ok()?;
    // One that says what it has is believed, and sends nothing.
    registry.serve("1", &image);
    let before = registry.requests("GET /v2/odd/").len();
    service.cowshed(&["acquire", "b-1", &name, "--tenant", "b"])?.ok()?;
    same!(registry.requests("GET /v2/odd/").len(), before, "what was fetched to see it");
    service.release_all()?;
    same!(service.stop()?, 0, "the exit status");
    evict_all()
}

/// Layers that are unpacked and not there otherwise are no less somebody's.
fn of_tenants_without_layers() -> Outcome {
    evict_all()?;
    let private = Private::start()?;
    let config = format!(
        "[images]\nkeep_layers = false\n[registry]\ndocker_config = {:?}\n",
        private.docker_config().display()
    );
    let service = Plan::new(&config)?.start()?;
    let right = private.directory.path().join("right");
    fs::write(&right, COW)?;
    let right = right.display().to_string();
    let image = format!("{AUTHORITY}/cowshed/tiny:1");
    service.cowshed(&["pull", &image, "--tenant", "a", "--credentials", &right])?.ok()?;
    collect()?;
    // An image of another registry that says that it has the same layer, which that registry does not have.
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let (manifest, config) = private_manifest()?;
    registry.manifest("1", Answer::Bytes(manifest.clone()));
    registry.blob(&digest(&config), Answer::Bytes(config));
    service.cowshed(&["pull", &registry.image("1"), "--tenant", "b"])?.fails(3, &["IMAGE_NOT_FOUND"])?;
    service.cowshed(&["pull", &registry.image("1"), "--tenant", "a"])?.ok()?;
    same!(service.stop()?, 0, "the exit status");
    evict_all()
}

/// A spare is made for nobody, and goes to nobody whom the registry does not let have its image.
fn spares_of_another_tenants_image() -> Outcome {
    evict_all()?;
    let private = Private::start()?;
    let config = format!(
        "[registry]\ndocker_config = {:?}\n[spares]\nimage_min = 1\n",
        private.docker_config().display()
    );
    let service = Plan::new(&config)?.start()?;
    let (right, wrong) = (private.directory.path().join("right"), private.directory.path().join("wrong"));
    fs::write(&right, COW)?;
    fs::write(&wrong, WRONG_COW)?;
    let (right, wrong) = (right.display().to_string(), wrong.display().to_string());
    let image = format!("{AUTHORITY}/cowshed/tiny:1");
    service.cowshed(&["pull", &image, "--tenant", "a", "--credentials", &right])?.ok()?;
    service.cowshed(&["pin", &image, "--spares", "1"])?.ok()?;
    let is_ready = || {
        wait_for("a spare", || {
            let listed = service.cowshed(&["images", "-o", "json"])?.json()?;
            check!(number(&listed, "/images/0/spares")? > 0, "{listed}");
            Ok(())
        })
    };
    let acquire = |vm: &str, more: &[&str]| {
        service.cowshed(&[&["acquire", vm, &image, "--output", "json"], more].concat())
    };
    is_ready()?;
    for more in [&[][..], &["--tenant", "b"][..], &["--tenant", "b", "--credentials", &wrong][..]] {
        acquire("b-1", more)?.fails(5, &["REGISTRY_DENIED"])?;
    }
    for (vm, more) in
        [("a-1", &["--tenant", "a"][..]), ("b-1", &["--tenant", "b", "--credentials", &right][..])]
    {
        is_ready()?;
        let got = acquire(vm, more)?.json()?;
        same!(got["spare"].as_bool(), Some(true), "whether {vm} has got a spare: {got}");
    }
    service.release_all()?;
    service.cowshed(&["unpin", &image])?.ok()?;
    service.cowshed(&["remove-image", &image])?.ok()?;
    wait_for("the spares to go", || {
        same!(snapshots("Active")?.len(), 0, "active snapshots");
        Ok(())
    })?;
    same!(service.stop()?, 0, "the exit status");
    evict_all()
}

/// The manifest of the image that is there, and its configuration.
fn private_manifest() -> Outcome<(Vec<u8>, Vec<u8>)> {
    let get =
        |digest: &str| -> Outcome<Vec<u8>> { Ok(sh(&format!("ctr content get {digest}"))?.into_bytes()) };
    let target =
        sh(&format!("ctr images ls name=={AUTHORITY}/cowshed/tiny:1 | awk 'NR == 2 {{ print $3 }}'"))?;
    let mut manifest = get(target.trim())?;
    let mut parsed: Value = serde_json::from_slice(&manifest)?;
    if let Some(first) = parsed["manifests"][0]["digest"].as_str() {
        manifest = get(first)?;
        parsed = serde_json::from_slice(&manifest)?;
    }
    let config = parsed["config"]["digest"].as_str().ok_or("no configuration")?.to_owned();
    Ok((manifest, get(&config)?))
}
