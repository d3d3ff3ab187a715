//! Signatures as cosign pushes them, made with openssl: which images they let be used.

use std::{fs, time::SystemTime};

use tempfile::TempDir;

use crate::{
    Test,
    private_registry::{AUTHORITY, COW, Private},
    support::{
        Outcome, check,
        command::sh,
        containerd,
        cow::{REGISTRY, acquire, evict, image, release_fully},
        registry_log::{describe, mark},
        same,
        second::{Plan, Second},
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("only_what_the_right_key_has_signed_is_used", only_what_the_right_key_has_signed),
    ("of_a_private_registry_are_fetched_as_the_image_is", of_a_private_registry),
    ("a_certificate_that_the_log_has_seen_will_do", by_certificate),
    ("images_without_a_policy_and_policies_without_a_key", without_a_policy_or_a_key),
];

const REFUSED: i32 = 5;
const CONFIGURATION: i32 = 21;

/// `push REPOSITORY TAG BLOB…`: each blob, and then the manifest on standard input.
const PUSH: &str = r#"
push() {
  local repository=$1 tag=$2 location digest
  shift 2
  for file in "$@"; do
    digest=sha256:$(sha256sum < "$file" | cut -d' ' -f1)
    location=$(curl -sf -X POST -d '' -o /dev/null -D - "$repository/blobs/uploads/" | sed -n 's/^[Ll]ocation: \([^\r]*\).*/\1/p')
    case $location in /*) location=${repository%%/v2/*}$location ;; esac
    case $location in *\?*) location+="&digest=$digest" ;; *) location+="?digest=$digest" ;; esac
    curl -sf -X PUT -H 'Content-Type: application/octet-stream' --data-binary "@$file" "$location"
  done
  curl -sf -X PUT -H 'Content-Type: application/vnd.oci.image.manifest.v1+json' --data-binary @- "$repository/manifests/$tag"
}
"#;

/// A repository of its own with an image that nobody has signed yet, and those who may sign it.
struct Signed {
    directory: TempDir,
    /// Below cowshed/.
    name: String,
    /// What its tag points to.
    digest: String,
}

impl Signed {
    /// With what tiny:1 is made of.
    fn new() -> Outcome<Self> {
        let directory = tempfile::Builder::new().prefix("signed").tempdir_in("/tmp")?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let name = format!("signed-{}", now.as_nanos());
        let tiny = describe("tiny:1")?;
        let registry = format!("http://{REGISTRY}/v2/cowshed");
        let mounts = tiny.blobs().into_iter().map(|blob| {
            let url = format!("{registry}/{name}/blobs/uploads/?mount={blob}&from=cowshed/tiny");
            format!("curl -sf -X POST -d '' -o /dev/null '{url}'")
        });
        let mounts: Vec<String> = mounts.collect();
        let accept =
            "application/vnd.oci.image.manifest.v1+json,application/vnd.docker.distribution.manifest.v2+json";
        sh(&format!(
            "cd {}\n{}\n\
             curl -sf -H 'Accept: {accept}' -D head -o manifest {registry}/tiny/manifests/1\n\
             kind=$(sed -n 's/^[Cc]ontent-[Tt]ype: \\([^\\r]*\\).*/\\1/p' head)\n\
             curl -sf -X PUT -H \"Content-Type: $kind\" --data-binary @manifest {registry}/{name}/manifests/1",
            directory.path().display(),
            mounts.join("\n")
        ))?;
        let digest = describe(&format!("{name}:1"))?.digest;
        same!(digest, tiny.digest, "the copy's digest");
        Ok(Self { directory, name, digest })
    }

    fn image(&self) -> String {
        image(&format!("{}:1", self.name))
    }

    fn path(&self, file: &str) -> String {
        self.directory.path().join(file).display().to_string()
    }

    /// A shell in its directory; the output.
    fn sh(&self, script: &str) -> Outcome<String> {
        sh(&format!("cd {}\n{script}", self.directory.path().display()))
    }

    fn key(&self, name: &str) -> Outcome {
        self.sh(&format!(
            "openssl ecparam -name prime256v1 -genkey -noout -out {name}.key\n\
             openssl pkey -in {name}.key -pubout -out {name}.pub"
        ))?;
        Ok(())
    }

    /// A policy about the repository, with `more` of it.
    fn policy(&self, more: &str) -> String {
        format!("[[verification.cosign]]\nimages = [\"{REGISTRY}/cowshed/{}\"]\n{more}\n", self.name)
    }

    fn keys(&self, name: &str) -> String {
        self.policy(&format!("keys = [{:?}]", self.path(&format!("{name}.pub"))))
    }

    /// Pushes this key's signature of an image of this digest in place of what there is, as `cosign sign` does.
    fn sign(&self, key: &str, digest: &str, annotations: &str) -> Outcome {
        let payload = format!(
            r#"{{"critical":{{"identity":{{"docker-reference":""}},"image":{{"docker-manifest-digest":"{digest}"}},"type":"cosign container image signature"}},"optional":null}}"#
        );
        fs::write(self.path("payload"), payload)?;
        let config = r#"{"architecture":"","config":{},"os":"","rootfs":{"type":"layers","diff_ids":[]}}"#;
        fs::write(self.path("config"), config)?;
        let tag = format!("{}.sig", self.digest.replace(':', "-"));
        self.sh(&format!(
            r#"{PUSH}
            openssl dgst -sha256 -sign {key}.key payload | base64 -w0 > signature
            digest() {{ echo "sha256:$(sha256sum < "$1" | cut -d' ' -f1)"; }}
            more='{{}}'
            {annotations}
            jq -n --arg payload "$(digest payload)" --argjson payload_size "$(stat -c %s payload)" \
              --arg config "$(digest config)" --argjson config_size "$(stat -c %s config)" --rawfile signature signature \
              --argjson more "$more" \
              '{{schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json",
                config: {{mediaType: "application/vnd.oci.image.config.v1+json", digest: $config, size: $config_size}},
                layers: [{{mediaType: "application/vnd.dev.cosign.simplesigning.v1+json", digest: $payload, size: $payload_size,
                          annotations: ({{"dev.cosignproject.cosign/signature": $signature}} + $more)}}]}}' |
              push http://{REGISTRY}/v2/cowshed/{} {tag} payload config"#,
            self.name
        ))?;
        Ok(())
    }

    fn refuses(&self, service: &Second, words: &[&str]) -> Outcome {
        let (image, start) = (self.image(), mark()?);
        let always: [&str; 3] = [&image, &self.digest, "may not be used"];
        service.refuses("signed", &image, REFUSED, "IMAGE_UNVERIFIED", &[&always, words].concat())?;
        // What was signed is all that is looked at.
        let fetched = start.blobs()?;
        let of_image = describe(&format!("{}:1", self.name))?.blobs();
        check!(
            of_image.iter().all(|blob| !fetched.contains_key(blob)),
            "blobs of it were fetched: {fetched:?}"
        );
        Ok(())
    }

    fn clear(&self, service: Second) -> Outcome {
        service.release_all()?;
        same!(service.stop()?, 0, "the exit status");
        evict(&[&self.image()])
    }
}

fn only_what_the_right_key_has_signed() -> Outcome {
    let signed = Signed::new()?;
    signed.key("right")?;
    signed.key("other")?;
    // So that there is something that could be fetched.
    evict(&[&image("tiny:1")])?;
    let service = Plan::new(&signed.keys("right"))?.start()?;
    let (image, digest) = (signed.image(), signed.digest.clone());
    let policy = format!("[[verification.cosign]] for {REGISTRY}/cowshed/{}", signed.name);
    signed.refuses(&service, &[&policy, "it has no signature", "cosign sign"])?;
    signed.sign("other", &digest, "")?;
    signed.refuses(&service, &[&policy, "none of the keys has made it"])?;
    let another = format!("sha256:{}", "0".repeat(64));
    signed.sign("right", &another, "")?;
    signed.refuses(&service, &[&policy, &format!("it is for {another}")])?;
    check!(!containerd::images()?.contains(&image), "{image} is listed");

    // Somebody else has pulled it: that makes it no better.
    acquire("signed-elsewhere", &image)?;
    release_fully("signed-elsewhere")?;
    signed.refuses(&service, &["it is for", &format!("`cowshed pull {image}`")])?;

    signed.sign("right", &digest, "")?;
    service.cowshed(&["acquire", "signed", &image])?.ok()?;
    // Once is enough, whatever becomes of the signature, until the service begins anew.
    signed.sign("other", &digest, "")?;
    service.cowshed(&["acquire", "signed-again", &image])?.ok()?;
    let service = service.restart()?;
    service.cowshed(&["acquire", "signed", &image])?.ok()?;
    service.refuses("signed-new", &image, REFUSED, "IMAGE_UNVERIFIED", &["none of the keys"])?;
    // By its digest it is the same image, and has the same signature.
    let by_digest = format!("{REGISTRY}/cowshed/{}@{digest}", signed.name);
    service.refuses("signed-new", &by_digest, REFUSED, "IMAGE_UNVERIFIED", &["none of the keys"])?;
    signed.sign("right", &digest, "")?;
    service.cowshed(&["acquire", "signed-new", &by_digest])?.ok()?;
    signed.clear(service)?;
    evict(&[&by_digest])
}

fn of_a_private_registry() -> Outcome {
    let private = Private::start()?;
    let signed = Signed::new()?;
    signed.key("right")?;
    signed.sign("right", &signed.digest, "")?;
    // The same storage, behind a password.
    let image = format!("{AUTHORITY}/cowshed/{}:1", signed.name);
    let policy = signed.keys("right").replace(REGISTRY, AUTHORITY);
    let nobody = private.docker_config();
    let extra = format!("[registry]\ndocker_config = {:?}\n{policy}", nobody.display());
    let service = Plan::new(&extra)?.start()?;
    let credentials = signed.path("credentials");
    fs::write(&credentials, COW)?;
    service.refuses("signed", &image, REFUSED, "REGISTRY_DENIED", &[AUTHORITY])?;
    let red = ["acquire", "signed", &image, "--tenant", "red", "--credentials", &credentials];
    service.cowshed(&red)?.ok()?;
    service.release_all()?;
    same!(service.stop()?, 0, "the exit status");
    evict(&[&image])
}

/// A root, a certificate of ten minutes, and a log, all of them openssl's.
const CERTIFIED: &str = r#"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=root -keyout root.key -out root.pem 2> /dev/null
openssl req -new -key right.key -subj /CN=leaf -out request
printf '%s\n' keyUsage=critical,digitalSignature extendedKeyUsage=codeSigning \
  subjectAltName=critical,URI:https://git.example/team/release \
  1.3.6.1.4.1.57264.1.8=ASN1:UTF8String:https://token.example > extensions
openssl x509 -req -in request -CA root.pem -CAkey root.key -CAcreateserial -days 1 -extfile extensions -out leaf.pem 2> /dev/null
"#;

/// What Rekor says of it, at the moment.
const LOGGED: &str = r#"
body=$(printf '{"apiVersion":"0.0.1","kind":"hashedrekord","spec":{"data":{"hash":{"algorithm":"sha256","value":"%s"}},"signature":{"content":"%s","publicKey":{"content":"%s"}}}}' \
  "$(sha256sum < payload | cut -d' ' -f1)" "$(cat signature)" "$(base64 -w0 < leaf.pem)" | base64 -w0)
log=$(openssl pkey -pubin -in log.pub -outform DER | sha256sum | cut -d' ' -f1)
time=$(date +%s)
printf '{"body":"%s","integratedTime":%s,"logID":"%s","logIndex":7}' "$body" "$time" "$log" > entry
bundle=$(jq -c --arg set "$(openssl dgst -sha256 -sign log.key entry | base64 -w0)" '{SignedEntryTimestamp: $set, Payload: .}' entry)
more=$(jq -n --rawfile certificate leaf.pem --rawfile chain root.pem --arg bundle "$bundle" \
  '{"dev.sigstore.cosign/certificate": $certificate, "dev.sigstore.cosign/chain": $chain, "dev.sigstore.cosign/bundle": $bundle}')
"#;

fn by_certificate() -> Outcome {
    let signed = Signed::new()?;
    signed.key("right")?;
    signed.key("log")?;
    signed.sh(CERTIFIED)?;
    let certified = |identity: &str| {
        let policy = format!(
            "roots = {:?}\nrekor_key = {:?}\nidentity = {identity:?}\nissuer = \"https://token.example\"",
            signed.path("root.pem"),
            signed.path("log.pub")
        );
        Plan::new(&signed.policy(&policy))?.start()
    };
    let service = certified("https://git.example/team/other")?;
    signed.sign("right", &signed.digest, "")?;
    signed.refuses(&service, &["it has no certificate"])?;
    signed.sign("right", &signed.digest, LOGGED)?;
    signed.refuses(
        &service,
        &["is for https://git.example/team/release, not for https://git.example/team/other"],
    )?;
    same!(service.stop()?, 0, "the exit status");
    let service = certified("https://git.example/team/release")?;
    service.cowshed(&["acquire", "signed", &signed.image()])?.ok()?;
    signed.clear(service)
}

fn without_a_policy_or_a_key() -> Outcome {
    let service = Plan::new("[verification]\nsigned_only = true\n")?.start()?;
    let words = ["signed_only", "[[verification.cosign]]"];
    service.refuses("signed", &image("tiny:1"), REFUSED, "IMAGE_UNVERIFIED", &words)?;
    same!(service.stop()?, 0, "the exit status");

    let signed = Signed::new()?;
    signed.key("right")?;
    let ran = Plan::new(&signed.keys("absent"))?.run()?;
    ran.fails(CONFIGURATION, &["[[verification.cosign]] keys", "absent.pub"])?;
    // A key that goes while the service runs leaves nobody who could have signed.
    signed.sign("right", &signed.digest, "")?;
    let service = Plan::new(&signed.keys("right"))?.start()?;
    fs::remove_file(signed.path("right.pub"))?;
    signed.refuses(&service, &["right.pub cannot be used"])?;
    same!(service.stop()?, 0, "the exit status");
    Ok(())
}
