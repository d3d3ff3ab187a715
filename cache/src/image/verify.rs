//! Verifiers: programs of the operator's that say whether an image may be used, asked before its first use.
//!
//! The convention is containerd's (its `docs/image-verification.md`). Each program in a directory is started as
//!
//! ```text
//! PROGRAM -name REFERENCE -digest DIGEST -stdin-media-type application/vnd.oci.descriptor.v1+json
//! ```
//!
//! and reads what the name points to from its standard input, an OCI descriptor in JSON. It ends with status 0 if the image
//! may be used; what it has written to its standard output is the reason. All have to agree.
//!
//! Unlike there nothing is waved through: a directory that is not there or has no program in it, a program that cannot be
//! started or does not end in time, each refuse the image.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
};

use super::{Digest, ImageRef, Shared};
use crate::error::{Error, Reason, Result, shown};

/// Of what a program says, so much is read, in bytes.
const REASON_MAX_BYTES: u64 = 16 << 10;
/// So much of it is told, in bytes.
const TOLD_MAX_BYTES: usize = 500;
/// So many images that have passed are remembered; more than a host has.
const REMEMBERED: usize = 10_000;

/// What a name points to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub(super) digest: &'a Digest,
    pub(super) media_type: &'a str,
    /// Bytes of the document.
    pub(super) size: u64,
}

/// Asks an operator's programs.
#[derive(Debug)]
pub struct Verifiers {
    directory: PathBuf,
    timeout: Duration,
    /// Names, and what they point to, that all programs have agreed to since this service started.
    passed: Mutex<HashSet<(ImageRef, Digest)>>,
}

impl Verifiers {
    /// All programs in `directory`; each has so much time.
    pub fn new(directory: PathBuf, timeout: Duration) -> Self {
        Self { directory, timeout, passed: Mutex::default() }
    }

    fn has_passed(&self, image: &ImageRef, digest: &Digest) -> bool {
        let passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        passed.contains(&(image.clone(), digest.clone()))
    }

    fn note(&self, image: &ImageRef, digest: &Digest) {
        let mut passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        if passed.len() >= REMEMBERED {
            passed.clear();
        }
        passed.insert((image.clone(), digest.clone()));
    }

    /// By name. Directories and what begins with a dot are none.
    fn programs(&self) -> Result<Vec<PathBuf>, String> {
        let refused = |error: io::Error| format!("it cannot be read: {error}");
        let mut programs = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(refused)? {
            let path = entry.map_err(refused)?.path();
            let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if !is_hidden && !path.is_dir() {
                programs.push(path);
            }
        }
        if programs.is_empty() {
            return Err("there is no verifier in it".to_owned());
        }
        programs.sort();
        Ok(programs)
    }

    async fn ask_all(&self, image: &ImageRef, target: Target<'_>) -> Result<()> {
        let programs = self.programs().map_err(|what| {
            let directory = self.directory.display();
            refusal(image, target.digest, &format!("[verification] directory {directory}: {what}"))
        })?;
        for program in programs {
            let verdict = tokio::time::timeout(self.timeout, ask(&program, image, target)).await;
            let late = || Err(format!("it has not ended within {} s", self.timeout.as_secs()));
            verdict.unwrap_or_else(|_| late()).map_err(|why| {
                refusal(image, target.digest, &format!("verifier {}: {why}", program.display()))
            })?;
        }
        Ok(())
    }
}

impl Shared {
    /// Fails unless all verifiers agree that the image is used, or have done so before.
    pub(super) async fn verify(&self, image: &ImageRef, target: Target<'_>) -> Result<()> {
        let Some(verifiers) = &self.verifiers else { return Ok(()) };
        if verifiers.has_passed(image, target.digest) {
            return Ok(());
        }
        // A hundred VMs that start at once need one answer.
        let _turn = self.locks.turn(&format!("verify {image} {}", target.digest), "").await;
        if verifiers.has_passed(image, target.digest) {
            return Ok(());
        }
        verifiers.ask_all(image, target).await?;
        verifiers.note(image, target.digest);
        tracing::info!(%image, digest = %target.digest, "verified");
        Ok(())
    }
}

fn refusal(image: &ImageRef, digest: &Digest, why: &str) -> Error {
    Error::new(Reason::ImageUnverified, format!("image {image} ({digest}) may not be used: {why}"))
        .with("image", image)
        .with("digest", digest)
}

/// Whether one agrees; if not, why.
async fn ask(program: &Path, image: &ImageRef, target: Target<'_>) -> Result<(), String> {
    let descriptor = json!({
        "mediaType": target.media_type,
        "digest": target.digest.to_string(),
        "size": target.size,
    });
    let mut command = Command::new(program);
    command
        .args(["-name", &image.to_string(), "-digest", target.digest.as_str()])
        .args(["-stdin-media-type", "application/vnd.oci.descriptor.v1+json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| format!("it cannot be started: {error}"))?;
    // What it has started itself must not outlive its time either.
    let _group = Group(child.id());
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read is free to.
        let _unread = stdin.write_all(descriptor.to_string().as_bytes()).await;
    }
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let read = stdout.take(REASON_MAX_BYTES).read_to_end(&mut said).await;
        read.map_err(|error| format!("what it says cannot be read: {error}"))?;
    }
    let status = child.wait().await.map_err(|error| format!("it was lost: {error}"))?;
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    match said.trim() {
        "" => Err(format!("it has given no reason ({})", ended(status))),
        said => Err(format!("{} ({})", shown(said, TOLD_MAX_BYTES), ended(status))),
    }
}

fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

/// A program with all that it has started; killed when this is dropped.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        let id = self.0.and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
        if let Some(group) = id {
            // It has no members any more if all went well.
            let _gone = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{io::Write as _, time::Instant};

    use super::*;

    /// Written by another process: what this one has open for writing it cannot start, nor can a child of another thread.
    fn script(directory: &Path, name: &str, text: &str) {
        let path = directory.join(name);
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "cat > \"$1\" && chmod +x \"$1\"", "sh"])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        write!(shell.stdin.take().unwrap(), "#!/bin/sh\n{text}\n").unwrap();
        assert!(shell.wait().unwrap().success());
    }

    fn image() -> ImageRef {
        ImageRef::parse("r.example/cow:1").unwrap()
    }

    async fn verdict(directory: &Path) -> Result<()> {
        let digest = Digest::of(b"cow");
        let verifiers = Verifiers::new(directory.to_owned(), Duration::from_secs(2));
        let target = Target { digest: &digest, media_type: "application/x", size: 3 };
        verifiers.ask_all(&image(), target).await
    }

    #[tokio::test]
    async fn all_have_to_agree() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let digest = Digest::of(b"cow");
        script(
            at,
            "a",
            "cat > \"$0.stdin\"; echo \"$@\" > \"$0.arguments\"; mv \"$0.\"* \"$(dirname \"$0\")/told/\"",
        );
        fs::create_dir(at.join("told")).unwrap();
        fs::write(at.join(".hidden"), "is no verifier").unwrap();
        verdict(at).await.unwrap();
        let told = |name: &str| fs::read_to_string(at.join("told").join(name)).unwrap();
        assert_eq!(
            told("a.arguments").trim(),
            format!(
                "-name r.example/cow:1 -digest {digest} -stdin-media-type application/vnd.oci.descriptor.v1+json"
            )
        );
        let descriptor: serde_json::Value = serde_json::from_str(&told("a.stdin")).unwrap();
        assert_eq!(
            descriptor,
            json!({"mediaType": "application/x", "digest": digest.to_string(), "size": 3})
        );
        script(at, "b", "echo it has no signature; exit 3");
        let error = verdict(at).await.unwrap_err();
        assert_eq!(error.reason(), Reason::ImageUnverified);
        let words = error.to_string();
        assert!(words.contains("it has no signature (status 3)") && words.contains("/b"), "{words}");
        assert!(words.contains("r.example/cow:1") && words.contains(digest.as_str()), "{words}");
    }

    #[tokio::test]
    async fn what_cannot_be_asked_refuses() {
        let directory = tempfile::tempdir().unwrap();
        let table = [
            ("silent", Some("exit 1"), "no reason (status 1)"),
            ("killed", Some("kill -9 $$"), "signal 9"),
            ("loud", Some("yes no | head -c 1000000; exit 2"), "no (status 2)"),
            ("slow", Some("sleep 30"), "not ended within 2 s"),
            ("deep", Some("sleep 30 & wait"), "not ended within 2 s"),
            ("empty", None, "no verifier in it"),
        ];
        for (name, text, expected) in table {
            let at = directory.path().join(name);
            fs::create_dir(&at).unwrap();
            text.into_iter().for_each(|text| script(&at, "v", text));
            let begun = Instant::now();
            let words = verdict(&at).await.unwrap_err().to_string();
            assert!(words.contains(expected), "{name}: {words}");
            assert!(begun.elapsed() < Duration::from_secs(20), "{name}: {:?}", begun.elapsed());
        }
        fs::write(directory.path().join("empty/plain"), "no program").unwrap();
        let words = verdict(&directory.path().join("empty")).await.unwrap_err().to_string();
        assert!(words.contains("cannot be started"), "{words}");
        let words = verdict(&directory.path().join("absent")).await.unwrap_err().to_string();
        assert!(words.contains("cannot be read"), "{words}");
    }

    #[test]
    fn what_has_passed_is_a_name_and_what_it_points_to() {
        let verifiers = Verifiers::new("/nowhere".into(), Duration::from_secs(1));
        let (digest, other) = (Digest::of(b"1"), Digest::of(b"2"));
        verifiers.note(&image(), &digest);
        assert!(verifiers.has_passed(&image(), &digest));
        assert!(!verifiers.has_passed(&image(), &other));
        assert!(!verifiers.has_passed(&ImageRef::parse("r.example/cow:2").unwrap(), &digest));
    }
}
