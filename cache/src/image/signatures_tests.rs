//! Against a registry that has what cosign would have pushed; what is signed is made as `cosign/fixtures/make` says.

#![allow(clippy::unwrap_used)]

use std::{
    collections::HashMap,
    fs,
    sync::{Arc, Mutex},
};

use axum::{Router, body::Body, extract::Request, http, response::Response};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::{
    cosign::tests::{fixture, policy},
    registry::Credential,
};

const COW: &[u8] = b"cow";
const REPOSITORY: &str = "team/cow";

#[derive(Default)]
struct State {
    answers: HashMap<String, (u16, Vec<u8>)>,
    asked: Vec<String>,
    /// "Basic …", if only who says so is told anything.
    authorization: Option<String>,
}

/// A registry, and a host that is configured to ask it.
struct Bench {
    state: Arc<Mutex<State>>,
    directory: TempDir,
    authority: String,
    registries: Registries,
    locks: Locks,
}

impl Bench {
    async fn new() -> Self {
        // Another test may have done it.
        let _done = rustls::crypto::ring::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let authority = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State::default()));
        let serving = state.clone();
        let serve = Router::new().fallback(async move |request: Request| answer(&serving, &request));
        tokio::spawn(async { axum::serve(listener, serve).await });
        let directory = tempfile::tempdir().unwrap();
        let hosts = directory.path().join(&authority);
        fs::create_dir(&hosts).unwrap();
        fs::write(hosts.join("hosts.toml"), format!("server = \"http://{authority}\"\n")).unwrap();
        let (none, patience) = (directory.path().join("config.json"), Duration::from_secs(20));
        let registries = Registries::new(directory.path().to_owned(), none, patience, patience, 0);
        Self { state, directory, authority, registries, locks: Locks::default() }
    }

    fn image(&self) -> ImageRef {
        ImageRef::parse(&format!("{}/{REPOSITORY}:1", self.authority)).unwrap()
    }

    fn signatures(&self, policies: &[&str]) -> Signatures {
        let policies = policies.iter().map(|text| policy(self.directory.path(), text).unwrap());
        Signatures::new(policies.collect(), Others::Allowed)
    }

    fn answer(&self, path: &str, status: u16, bytes: &[u8]) {
        let path = format!("/v2/{REPOSITORY}/{path}");
        self.state.lock().unwrap().answers.insert(path, (status, bytes.to_vec()));
    }

    /// What is at the tag of a digest's signatures.
    fn at_tag(&self, digest: &Digest, status: u16, bytes: &[u8]) {
        self.answer(&format!("manifests/{}.sig", digest.as_str().replace(':', "-")), status, bytes);
    }

    /// As `cosign sign` does: payload and annotations of each.
    fn push(&self, digest: &Digest, signatures: &[(&[u8], Value)]) {
        let layers = signatures.iter().map(|(payload, annotations)| {
            let digest = Digest::of(payload);
            self.answer(&format!("blobs/{digest}"), 200, payload);
            json!({"mediaType": SIMPLE_SIGNING, "digest": digest.to_string(), "size": payload.len(), "annotations": annotations})
        });
        let layers: Vec<Value> = layers.collect();
        let manifest = json!({"schemaVersion": 2, "config": {}, "layers": layers}).to_string();
        self.at_tag(digest, 200, manifest.as_bytes());
    }

    fn asked(&self) -> usize {
        self.state.lock().unwrap().asked.len()
    }

    async fn expect(
        &self,
        signatures: &Signatures,
        digest: &Digest,
        manifest: Option<&Digest>,
    ) -> Result<()> {
        self.expect_as(signatures, digest, manifest, &Access::default()).await
    }

    async fn expect_as(
        &self,
        signatures: &Signatures,
        digest: &Digest,
        manifest: Option<&Digest>,
        access: &Access,
    ) -> Result<()> {
        let target = Target { digest, media_type: "application/x", size: 3, is_here: false };
        signatures.expect((&self.registries, &self.locks), &self.image(), target, manifest, access).await
    }

    /// Fails unless it is refused so, with the image, its digest and these words.
    async fn refuses(&self, signatures: &Signatures, digest: &Digest, reason: Reason, words: &[&str]) {
        let error = self.expect(signatures, digest, None).await.unwrap_err();
        let (text, image) = (error.to_string(), self.image().to_string());
        assert_eq!(error.reason(), reason, "{text}");
        for word in words.iter().chain(&[image.as_str(), digest.as_str(), "may not be used"]) {
            assert!(text.contains(word), "{word}: {text}");
        }
    }
}

fn answer(state: &Mutex<State>, request: &Request) -> Response {
    let mut state = state.lock().unwrap();
    let path = request.uri().path().to_owned();
    let said = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
    if state.authorization.is_some() && said != state.authorization {
        let challenge = http::Response::builder().status(401).header("www-authenticate", "Basic realm=\"r\"");
        return challenge.body(Body::empty()).unwrap();
    }
    state.asked.push(path.clone());
    let (status, bytes) = state.answers.get(&path).cloned().unwrap_or((404, Vec::new()));
    http::Response::builder().status(status).body(Body::from(bytes)).unwrap()
}

/// A signature of the fixture's payload by this key.
fn by(key: &str) -> (Vec<u8>, Value) {
    (fixture("payload").into_bytes(), json!({SIGNATURE: fixture(&format!("{key}.sig"))}))
}

const KEY: &str = "keys = [\"@p256.pub\"]";
use Reason::{ImageUnverified, RegistryDenied, RegistryUnavailable};

#[tokio::test]
async fn what_is_signed_is_asked_for_once() {
    let (bench, cow) = (Bench::new().await, Digest::of(COW));
    let signatures = bench.signatures(&[KEY]);
    bench.refuses(&signatures, &cow, ImageUnverified, &["it has no signature", "`cosign sign "]).await;
    let (payload, good) = by("p256");
    let (_, other) = by("other");
    bench.push(&cow, &[(&payload, other.clone())]);
    bench
        .refuses(
            &signatures,
            &cow,
            ImageUnverified,
            &["none of the keys has made it", "[[verification.cosign]]"],
        )
        .await;
    // One that is good will do, wherever it is; a refusal is not remembered.
    bench.push(&cow, &[(&payload, other.clone()), (&payload, good), (&payload, json!({})), (b"pig", other)]);
    bench.expect(&signatures, &cow, None).await.unwrap();
    let asked = bench.asked();
    bench.expect(&signatures, &cow, None).await.unwrap();
    assert_eq!(bench.asked(), asked);
    // That it was signed makes no other digest signed.
    bench.refuses(&signatures, &Digest::of(b"calf"), ImageUnverified, &["it has no signature"]).await;
}

#[tokio::test]
async fn a_signature_counts_for_its_digest_only() {
    let (bench, cow, calf) = (Bench::new().await, Digest::of(COW), Digest::of(b"calf"));
    let signatures = bench.signatures(&[KEY]);
    // Somebody has moved the tag.
    let (payload, good) = by("p256");
    bench.push(&calf, &[(&payload, good.clone())]);
    bench.refuses(&signatures, &calf, ImageUnverified, &[&format!("it is for {cow}")]).await;
    // The manifest of an index may be signed in its place, and then only that one.
    bench.push(&cow, &[(&payload, good)]);
    bench.expect(&signatures, &calf, Some(&cow)).await.unwrap();
    bench.expect(&signatures, &cow, None).await.unwrap();
    let pig = Digest::of(b"pig");
    let no = bench.expect(&signatures, &calf, Some(&pig)).await.unwrap_err().to_string();
    assert!(no.contains(&format!("{pig}: ")) && no.contains("it has no signature"), "{no}");
    assert!(bench.expect(&signatures, &calf, None).await.is_err());
}

#[tokio::test]
async fn with_a_certificate() {
    let (bench, cow) = (Bench::new().await, Digest::of(COW));
    let signatures = bench.signatures(&["roots = \"@root-ca.pem\"\nrekor_key = \"@rekor.pub\"\n\
         issuer = \"https://token.issuer.example\"\nidentity_regex = \"https://git\\\\.example/team/.*\""]);
    let payload = fixture("payload").into_bytes();
    let of = |certificate: &str, bundle: &str| {
        json!({
            SIGNATURE: fixture("leaf.sig"),
            CERTIFICATE: fixture(certificate),
            CHAIN: fixture("middle.pem") + &fixture("root-ca.pem"),
            BUNDLE: fixture(bundle),
        })
    };
    bench.push(
        &cow,
        &[
            (&payload, of("leaf-good.pem", "leaf-late.bundle")),
            (&payload, of("leaf-old.pem", "leaf-old.bundle")),
        ],
    );
    let words = ["was not in force", "is for release@team.example"];
    bench.refuses(&signatures, &cow, ImageUnverified, &words).await;
    bench.push(&cow, &[(&payload, of("leaf-good.pem", "leaf-good.bundle"))]);
    bench.expect(&signatures, &cow, None).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_fetched_or_read_is_not_signed() {
    let (bench, cow) = (Bench::new().await, Digest::of(COW));
    let signatures = bench.signatures(&[KEY]);
    let (payload, good) = by("p256");
    for (status, reason) in [(503, RegistryUnavailable), (403, RegistryDenied)] {
        bench.at_tag(&cow, status, b"");
        bench.refuses(&signatures, &cow, reason, &["before its signatures were seen"]).await;
        // It may be the other digest's signature that cannot be seen.
        let pig = Digest::of(b"pig");
        assert_eq!(bench.expect(&signatures, &pig, Some(&cow)).await.unwrap_err().reason(), reason);
    }
    for (document, word) in
        [(&b"no json"[..], "cannot be read"), (b"{}", "cannot be read"), (b"{\"layers\":[]}", "no signature")]
    {
        bench.at_tag(&cow, 200, document);
        bench.refuses(&signatures, &cow, ImageUnverified, &[word]).await;
    }
    bench.at_tag(&cow, 200, &vec![b' '; DOCUMENT_MAX_BYTES + 1]);
    assert!(bench.expect(&signatures, &cow, None).await.is_err());

    bench.push(&cow, &[(&payload, good.clone())]);
    let blob = format!("blobs/{}", Digest::of(&payload));
    for (status, bytes, reason, word) in [
        (404, vec![], ImageUnverified, "its payload is not to be had"),
        (200, b"something else".to_vec(), ImageUnverified, "served sha256:"),
        (200, vec![b' '; PAYLOAD_MAX_BYTES + 1], ImageUnverified, "served more than 65536 bytes"),
        (500, vec![], RegistryUnavailable, "before its signatures were seen"),
    ] {
        bench.answer(&blob, status, &bytes);
        bench.refuses(&signatures, &cow, reason, &[word]).await;
    }
    let missing = bench.signatures(&["keys = [\"/nonexistent/team.pub\"]"]);
    bench.refuses(&missing, &cow, ImageUnverified, &["keys /nonexistent/team.pub cannot be used"]).await;
    // The signature was good all the time.
    bench.answer(&blob, 200, &payload);
    bench.expect(&signatures, &cow, None).await.unwrap();
}

#[tokio::test]
async fn a_registry_that_is_not_there_has_no_say() {
    let (bench, cow) = (Bench::new().await, Digest::of(COW));
    let signatures = bench.signatures(&[KEY]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = listener.local_addr().unwrap().to_string();
    drop(listener);
    let hosts = bench.directory.path().join(&bench.authority).join("hosts.toml");
    fs::write(hosts, format!("server = \"http://{gone}\"\n")).unwrap();
    bench.refuses(&signatures, &cow, RegistryUnavailable, &[&gone]).await;
}

#[tokio::test]
async fn only_the_latest_are_looked_at() {
    let (bench, cow) = (Bench::new().await, Digest::of(COW));
    let signatures = bench.signatures(&[KEY]);
    let ((payload, good), (_, other)) = (by("p256"), by("other"));
    let mut many = vec![(&payload[..], other); SIGNATURES_MAX];
    many.insert(0, (&payload, good));
    bench.push(&cow, &many);
    bench.refuses(&signatures, &cow, ImageUnverified, &["none of the keys"]).await;
    many.pop();
    bench.push(&cow, &many);
    bench.expect(&signatures, &cow, None).await.unwrap();
}

#[tokio::test]
async fn all_policies_have_to_agree() {
    let (bench, cow) = (Bench::new().await, Digest::of(COW));
    let both = bench.signatures(&[KEY, "keys = [\"@rsa.pub\"]"]);
    let ((payload, p256), (_, rsa)) = (by("p256"), by("rsa"));
    bench.push(&cow, &[(&payload, p256.clone())]);
    bench.refuses(&both, &cow, ImageUnverified, &["none of the keys"]).await;
    bench.push(&cow, &[(&payload, p256), (&payload, rsa)]);
    bench.expect(&both, &cow, None).await.unwrap();
}

#[tokio::test]
async fn images_that_no_policy_is_about() {
    let (bench, cow) = (Bench::new().await, Digest::of(COW));
    let elsewhere: Vec<Policy> =
        vec![toml::from_str("images = [\"other.example/*\"]\nkeys = [\"/k\"]").unwrap()];
    let allowed = Signatures::new(elsewhere.clone(), Others::Allowed);
    bench.expect(&allowed, &cow, None).await.unwrap();
    for policies in [elsewhere, Vec::new()] {
        let refused = Signatures::new(policies, Others::Refused);
        bench.refuses(&refused, &cow, ImageUnverified, &["signed_only", REPOSITORY]).await;
    }
    assert_eq!(bench.asked(), 0);
}

#[tokio::test]
async fn the_registry_is_asked_as_who_wants_the_image() {
    let (bench, cow) = (Bench::new().await, Digest::of(COW));
    let signatures = bench.signatures(&[KEY]);
    // cow:moo
    bench.state.lock().unwrap().authorization = Some("Basic Y293Om1vbw==".to_owned());
    let (payload, good) = by("p256");
    bench.push(&cow, &[(&payload, good)]);
    bench.refuses(&signatures, &cow, RegistryDenied, &["before its signatures were seen"]).await;
    let red = |password: &str| {
        let credential = Credential::Password { user: "cow".to_owned(), password: password.to_owned() };
        Access { tenant: "red".parse().unwrap(), credential: Some(credential), ..Access::default() }
    };
    let wrong = bench.expect_as(&signatures, &cow, None, &red("oink")).await.unwrap_err();
    assert_eq!(wrong.reason(), RegistryDenied, "{wrong}");
    bench.expect_as(&signatures, &cow, None, &red("moo")).await.unwrap();
}
