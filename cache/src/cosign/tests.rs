#![allow(clippy::unwrap_used, clippy::expect_used)]
//! Against what `fixtures/make` has openssl sign, issue and log.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize;

use super::*;
use crate::image::ImageRef;

/// As `fixtures/make` has it.
fn digest() -> Digest {
    Digest::of(b"cow")
}

pub(crate) fn fixture(name: &str) -> String {
    let all: BTreeMap<String, String> = serde_json::from_str(include_str!("fixtures/fixtures.json")).unwrap();
    all.get(name).expect(name).clone()
}

const URI: &str = "https://git.example/team/app/release.yml@refs/tags/v1";
const ISSUER: &str = "https://token.issuer.example";

/// What would stand in the configuration; `@NAME` is the path of a fixture.
pub(crate) fn policy(directory: &Path, text: &str) -> Result<Policy, String> {
    #[derive(Deserialize)]
    struct File {
        cosign: Vec<Policy>,
    }
    let mut text = format!("[[cosign]]\nimages = [\"*\"]\n{text}");
    while let Some((before, after)) = text.split_once("\"@") {
        let (name, rest) = after.split_once('"').unwrap();
        let path = directory.join(name);
        fs::write(&path, fixture(name)).unwrap();
        text = format!("{before}{:?}{rest}", path.display().to_string());
    }
    toml::from_str::<File>(&text).map(|mut file| file.cosign.remove(0)).map_err(|error| error.to_string())
}

fn trust(text: &str) -> Trust {
    let directory = tempfile::tempdir().unwrap();
    policy(directory.path(), text).unwrap().trust().unwrap()
}

/// A signature of parts: payload, signature, certificate, bundle; all of the chain that there is.
struct Parts {
    payload: String,
    signature: String,
    certificate: Option<String>,
    chain: String,
    bundle: Option<String>,
}

impl Parts {
    fn of(payload: &str, signature: &str) -> Self {
        let (payload, signature) = (fixture(payload), fixture(signature));
        Self { payload, signature, certificate: None, chain: fixture("middle.pem"), bundle: None }
    }

    fn certified(certificate: &str, bundle: &str) -> Self {
        let (certificate, bundle) = (Some(fixture(certificate)), Some(fixture(bundle)));
        Self { certificate, bundle, ..Self::of("payload", "leaf.sig") }
    }

    fn held_against(&self, trust: &Trust) -> Result<String, String> {
        let signature = Signature {
            payload: self.payload.as_bytes(),
            signature: &self.signature,
            certificate: self.certificate.as_deref(),
            chain: Some(&self.chain),
            bundle: self.bundle.as_deref(),
        };
        trust.expect(&signature, &digest())
    }
}

#[test]
fn keys_of_all_kinds() {
    for kind in ["p256", "p384", "rsa", "ed25519"] {
        let parts = Parts::of("payload", &format!("{kind}.sig"));
        let by = parts.held_against(&trust(&format!("keys = [\"@{kind}.pub\"]"))).unwrap();
        assert!(by.starts_with("key ") && by.len() == 20, "{by}");
        let others: Vec<String> = ["p256", "p384", "rsa", "ed25519", "other"]
            .iter()
            .filter(|other| **other != kind)
            .map(|other| format!("\"@{other}.pub\""))
            .collect();
        let no = parts.held_against(&trust(&format!("keys = [{}]", others.join(", "))));
        assert_eq!(no.unwrap_err(), "none of the keys has made it", "{kind}");
        // Any one will do.
        parts.held_against(&trust(&format!("keys = [{}, \"@{kind}.pub\"]", others.join(", ")))).unwrap();
    }
}

#[test]
fn what_a_key_has_signed_has_to_be_about_the_image() {
    let trust = trust("keys = [\"@p256.pub\"]");
    let pig = Digest::of(b"pig");
    let table = [
        ("payload-other", "p256-other.sig", format!("it is for {pig}")),
        ("payload-type", "p256-type.sig", "\"atomic container signature\"".to_owned()),
        ("payload-broken", "p256-broken.sig", "its payload cannot be read".to_owned()),
        ("payload", "p256-other.sig", "none of the keys".to_owned()),
        ("payload-other", "p256.sig", "none of the keys".to_owned()),
    ];
    for (payload, signature, expected) in table {
        let why = Parts::of(payload, signature).held_against(&trust).unwrap_err();
        assert!(why.contains(&expected), "{payload} {signature}: {why}");
    }
    let good = Parts::of("payload", "p256.sig");
    for (signature, expected) in [
        (String::new(), "none of the keys"),
        ("%".to_owned(), "not in base 64"),
        (good.signature.replacen('M', "N", 1), "none of the keys"),
    ] {
        let why = Parts { signature, ..Parts::of("payload", "p256.sig") }.held_against(&trust).unwrap_err();
        assert!(why.contains(expected), "{why}");
    }
    // A digest that is said twice is none.
    let twice = fixture("payload").replace("\"critical\":", "\"critical\":{},\"critical\":");
    assert!(payload::expect(twice.as_bytes(), &digest()).is_err());
}

#[test]
fn a_log_that_is_configured_has_to_know_what_keys_sign() {
    let trust = trust("keys = [\"@p256.pub\", \"@other.pub\"]\nrekor_key = \"@rekor.pub\"");
    let with = |payload: &str, signature: &str, bundle: Option<&str>| {
        Parts { bundle: bundle.map(fixture), ..Parts::of(payload, signature) }.held_against(&trust)
    };
    with("payload", "p256.sig", Some("p256.bundle")).unwrap();
    let table = [
        (with("payload", "p256.sig", None), "it has no bundle"),
        (with("payload", "other.sig", Some("p256.bundle")), "about another signature"),
        (with("payload", "p256.sig", Some("p256-by-other.bundle")), "about another signature"),
        (with("payload", "p256.sig", Some("leaf-good.bundle")), "about another signature"),
        (with("payload", "p256.sig", Some("payload")), "cannot be read"),
    ];
    for (outcome, expected) in table {
        let why = outcome.unwrap_err();
        assert!(why.contains(expected), "{why}");
    }
}

fn keyless(roots: &str, who: &str, issuer: &str) -> Trust {
    trust(&format!("roots = \"@{roots}\"\nrekor_key = \"@rekor.pub\"\n{who}\nissuer = \"{issuer}\""))
}

#[test]
fn certificates() {
    let exact = keyless("root-ca.pem", &format!("identity = \"{URI}\""), ISSUER);
    let good = Parts::certified("leaf-good.pem", "leaf-good.bundle");
    assert_eq!(good.held_against(&exact).unwrap(), URI);
    // The intermediate itself may be trusted; then no chain is needed.
    let middle = keyless("middle.pem", &format!("identity = \"{URI}\""), ISSUER);
    let alone = Parts { chain: String::new(), ..Parts::certified("leaf-good.pem", "leaf-good.bundle") };
    alone.held_against(&middle).unwrap();
    // As Fulcio's were at first, and for a person.
    let mail = keyless("root-ca.pem", "identity = \"release@team.example\"", ISSUER);
    Parts::certified("leaf-old.pem", "leaf-old.bundle").held_against(&mail).unwrap();

    let of = |leaf: &str| Parts::certified(&format!("{leaf}.pem"), &format!("{leaf}.bundle"));
    let bundled = |bundle: &str| Parts::certified("leaf-good.pem", bundle);
    let table = [
        (of("leaf-server"), "not for signing code"),
        (of("leaf-nobody"), "its certificate is for nobody, not for https://git.example"),
        (of("leaf-unknown"), "does not say that https://token.issuer.example knew"),
        (of("leaf-elsewhere"), "was known by https://other.example, not by https://token.issuer.example"),
        (of("leaf-strange"), "not from one of the roots"),
        (of("leaf-old"), "is for release@team.example, not for https://git.example"),
        (bundled("leaf-late.bundle"), "while its certificate was not in force"),
        (bundled("leaf-early.bundle"), "while its certificate was not in force"),
        (bundled("leaf-forged.bundle"), "not signed by the log's key"),
        (bundled("leaf-kind.bundle"), "its bundle is of kind \"rekord\""),
        (bundled("leaf-other.bundle"), "about another signature"),
        (bundled("leaf-old.bundle"), "about another signature"),
        (bundled("p256.bundle"), "about another signature"),
        (Parts { bundle: None, ..of("leaf-good") }, "it has no bundle"),
        (Parts { certificate: None, ..of("leaf-good") }, "it has no certificate"),
        (Parts { certificate: Some("none".to_owned()), ..of("leaf-good") }, "certificate cannot be read"),
        (Parts { chain: String::new(), ..of("leaf-good") }, "not from one of the roots"),
        (Parts { signature: fixture("p256.sig"), ..of("leaf-good") }, "certificate's key has not made it"),
        (Parts { payload: fixture("payload-other"), ..of("leaf-good") }, "certificate's key has not made it"),
        // All of it is right, but it is of another image.
        (
            Parts {
                payload: fixture("payload-other"),
                signature: fixture("leaf-other.sig"),
                ..bundled("leaf-other.bundle")
            },
            "it is for sha256:",
        ),
    ];
    for (parts, expected) in table {
        let why = parts.held_against(&exact).unwrap_err();
        assert!(why.contains(expected), "{expected}: {why}");
    }
    let strange = keyless("strange-ca.pem", &format!("identity = \"{URI}\""), ISSUER);
    assert!(good.held_against(&strange).unwrap_err().contains("not from one of the roots"));
    // Times that were changed are not the log's any more.
    let entry = fixture("leaf-late.bundle").replace("\"integratedTime\":17356", "\"integratedTime\":17355");
    assert!(bundled("leaf-good.bundle").held_against(&exact).is_ok());
    let moved = Parts { bundle: Some(entry), ..of("leaf-good") };
    assert!(moved.held_against(&exact).unwrap_err().contains("not signed by the log's key"));
}

#[test]
fn patterns_of_identities_fit_from_end_to_end() {
    let good = Parts::certified("leaf-good.pem", "leaf-good.bundle");
    let table = [
        (r"https://git\\.example/team/[^/]+/release\\.yml@refs/tags/v.*", true),
        (r"x|https://git\\.example/team/app/.*", true),
        (r"https://git\\.example/team/", false),
        (r"git\\.example/team/app/.*", false),
        (r"https://git\\.example/team/app/release\\.yml@refs/heads/main|x", false),
    ];
    for (regex, expected) in table {
        let trust = keyless("root-ca.pem", &format!("identity_regex = \"{regex}\""), ISSUER);
        assert_eq!(good.held_against(&trust).is_ok(), expected, "{regex}");
    }
}

#[test]
fn keys_and_certificates_side_by_side() {
    let both = trust(&format!(
        "keys = [\"@other.pub\"]\nroots = \"@root-ca.pem\"\nrekor_key = \"@rekor.pub\"\nidentity = \"{URI}\"\nissuer = \"{ISSUER}\""
    ));
    Parts::certified("leaf-good.pem", "leaf-good.bundle").held_against(&both).unwrap();
    let why = Parts::of("payload", "p256.sig").held_against(&both).unwrap_err();
    assert_eq!(why, "none of the keys has made it, and it has no certificate");
    // A certificate is nothing to those who trust keys only.
    let keys = trust("keys = [\"@p256.pub\"]");
    assert!(Parts::certified("leaf-good.pem", "leaf-good.bundle").held_against(&keys).is_err());
}

#[test]
fn policies_that_make_no_sense_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let whole = format!("identity = \"{URI}\"\nissuer = \"{ISSUER}\"\nroots = \"@root-ca.pem\"");
    let table = [
        (String::new(), "nobody is trusted"),
        ("keys = []".to_owned(), "nobody is trusted"),
        ("keys = [\"team.pub\"]".to_owned(), "keys: \"team.pub\" is not an absolute path"),
        (whole.clone(), "need all of roots, rekor_key"),
        (format!("identity = \"{URI}\"\nkeys = [\"/k\"]"), "need all of roots, rekor_key"),
        (
            format!("roots = \"@root-ca.pem\"\nrekor_key = \"@rekor.pub\"\nissuer = \"{ISSUER}\""),
            "identity or identity_regex",
        ),
        (whole.replace(URI, " "), "identity is empty"),
        (format!("{whole}\nidentity_regex = \"(\""), "identity_regex \"(\""),
        (format!("{whole}\nidentity_regex = \"a)|(b\""), "identity_regex"),
        ("key = [\"/k\"]".to_owned(), "unknown field `key`"),
    ];
    for (text, expected) in table {
        let error = policy(directory.path(), &text).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }
    let no_images = toml::from_str::<Policy>("images = []\nkeys = [\"/k\"]").unwrap_err();
    assert!(no_images.to_string().contains("images is empty"), "{no_images}");
    let tagged = toml::from_str::<Policy>("images = [\"r.example/app:1\"]\nkeys = [\"/k\"]").unwrap_err();
    assert!(tagged.to_string().contains("r.example/app:1"), "{tagged}");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let whole = |roots: &str, rekor: &str| {
        format!("roots = \"@{roots}\"\nrekor_key = \"@{rekor}\"\nidentity = \"{URI}\"\nissuer = \"{ISSUER}\"")
    };
    let table = [
        (format!("keys = [{missing:?}]"), "keys", "No such file"),
        ("keys = [\"@p521.pub\"]".to_owned(), "keys", "another kind"),
        ("keys = [\"@p256.pub\", \"@payload\"]".to_owned(), "keys", "no public key"),
        ("keys = [\"@root-ca.pem\"]".to_owned(), "keys", "no public key"),
        (whole("rekor.pub", "rekor.pub"), "roots", "no certificate"),
        (whole("root-ca.pem", "root-ca.pem"), "rekor_key", "no public key"),
    ];
    for (text, field, expected) in table {
        let unusable = policy(directory.path(), &text).unwrap().trust().unwrap_err();
        assert_eq!(unusable.field, field, "{text}");
        assert!(unusable.what.contains(expected) && unusable.what.contains('/'), "{unusable:?}");
    }
}

#[test]
fn a_policy_tells_what_it_is_about() {
    let text = "images = [\"r.example/a/*\", \"docker.io/library/*\"]\nkeys = [\"/k\"]";
    let policy: Policy = toml::from_str(text).unwrap();
    assert_eq!(policy.to_string(), "[[verification.cosign]] for r.example/a/*, docker.io/library/*");
    for (image, expected) in [("r.example/a/b:1", true), ("debian", true), ("r.example/b", false)] {
        assert_eq!(policy.is_about(&ImageRef::parse(image).unwrap()), expected, "{image}");
    }
}
