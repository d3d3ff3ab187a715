//! Programs of the operator's that say which images may be used.

use std::{fs, os::unix::fs::PermissionsExt as _};

use crate::{
    Test,
    support::{
        Outcome, check, containerd,
        cow::{acquire, evict, image, release_fully},
        registry_log::{describe, mark},
        same,
        second::Plan,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("what_is_refused_is_neither_fetched_nor_used", what_is_refused_is_neither_fetched_nor_used),
    ("is_not_waved_through_without_programs", is_not_waved_through_without_programs),
];

const REFUSED: i32 = 5;

/// Agrees to what an operator has written down, a line each: name, digest, media type of what is on standard input.
const VERIFIER: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$2 $4 $6 $(cat)" >> "$here/.asked"
grep -qxF "$2 $4" "$here/.signed" || { echo "nobody has signed $2"; exit 1; }
"#;

fn what_is_refused_is_neither_fetched_nor_used() -> Outcome {
    let programs = tempfile::Builder::new().prefix("verifiers").tempdir_in("/tmp")?;
    let at = |name: &str| programs.path().join(name);
    fs::write(at("signatures"), VERIFIER)?;
    fs::set_permissions(at("signatures"), fs::Permissions::from_mode(0o755))?;
    fs::write(at(".signed"), "")?;
    let (tiny, digest) = (image("tiny:1"), describe("tiny:1")?.digest);
    evict(&[&tiny])?;
    let second = Plan::new(&format!("[verification]\ndirectory = {:?}\n", programs.path()))?.start()?;

    let start = mark()?;
    let words = ["nobody has signed", &tiny, &digest, "signatures", "(status 1)"];
    second.refuses("verified", &tiny, REFUSED, "IMAGE_UNVERIFIED", &words)?;
    check!(start.blobs()?.is_empty(), "blobs of it were fetched: {:?}", start.blobs()?);
    check!(!containerd::images()?.contains(&tiny), "{tiny} is listed");
    let asked = fs::read_to_string(at(".asked"))?;
    check!(
        asked.starts_with(&format!("{tiny} {digest} application/vnd.oci.descriptor.v1+json {{")),
        "{asked}"
    );
    check!(asked.contains(&format!(r#""digest":"{digest}""#)), "{asked}");

    // Somebody else has pulled it: that makes it no better.
    acquire("verified-elsewhere", &tiny)?;
    release_fully("verified-elsewhere")?;
    second.refuses("verified", &tiny, REFUSED, "IMAGE_UNVERIFIED", &words)?;

    fs::write(at(".signed"), format!("{tiny} {digest}\n"))?;
    second.cowshed(&["acquire", "verified", &tiny])?.ok()?;
    let times = || Outcome::Ok(fs::read_to_string(at(".asked"))?.lines().count());
    let once = times()?;
    second.cowshed(&["acquire", "verified-again", &tiny])?.ok()?;
    same!(times()?, once, "how often the program was asked");
    for vm in ["verified", "verified-again"] {
        second.cowshed(&["release", vm, "--wait", "60"])?.ok()?;
    }
    same!(second.stop()?, 0, "the exit status");
    Ok(())
}

fn is_not_waved_through_without_programs() -> Outcome {
    let nowhere = "[verification]\ndirectory = \"/nonexistent/verifiers\"\n";
    let second = Plan::new(nowhere)?.start()?;
    let words = ["[verification] directory /nonexistent/verifiers"];
    second.refuses("verified-no", &image("tiny:1"), REFUSED, "IMAGE_UNVERIFIED", &words)?;
    same!(second.stop()?, 0, "the exit status");
    Ok(())
}
