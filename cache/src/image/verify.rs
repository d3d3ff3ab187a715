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
//! started or does not end in time, each refuse the image. What is granted already stays granted.

use std::{
    fs, io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    pin::pin,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{ChildStdout, Command},
    sync::Semaphore,
};

use super::{Digest, ImageRef, Shared, verdicts::Verdicts};
use crate::error::{Error, Reason, Result, shown};

/// Of what a program says, so much is read, in bytes.
const REASON_MAX_BYTES: u64 = 16 << 10;
/// So much of it is told, in bytes.
const TOLD_MAX_BYTES: usize = 500;
/// Programs that run at the same time.
const AT_ONCE: usize = 4;
/// For what one has said before its end and is not read yet.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a name points to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub(super) digest: &'a Digest,
    pub(super) media_type: &'a str,
    /// Bytes of the document.
    pub(super) size: u64,
    /// Whether it is what the host has, so that the registry may have another.
    pub(super) is_here: bool,
}

/// Why an image is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
enum No {
    /// A program does not agree, or there is none that could.
    Refused(String),
    /// It could not be asked; perhaps the next time.
    Unasked(String),
}

type Key = (ImageRef, Digest);

/// Asks an operator's programs.
#[derive(Debug)]
pub struct Verifiers {
    directory: PathBuf,
    timeout: Duration,
    verdicts: Verdicts<Key, Key>,
    room: Semaphore,
}

impl Verifiers {
    /// All programs in `directory`; each has so much time.
    pub fn new(directory: PathBuf, timeout: Duration) -> Self {
        Self { directory, timeout, verdicts: Verdicts::default(), room: Semaphore::new(AT_ONCE) }
    }

    async fn ask_all(&self, image: &ImageRef, target: Target<'_>) -> Result<()> {
        let about = format!("[verification] directory {}", self.directory.display());
        let late = || No::Unasked(format!("no answer within {} s", self.timeout.as_secs()));
        let directory = self.directory.clone();
        // It may be on a filesystem that does not answer.
        let listing = tokio::task::spawn_blocking(move || programs(&directory));
        let programs = match tokio::time::timeout(self.timeout, listing).await {
            Ok(listed) => listed.unwrap_or_else(|error| Err(No::Unasked(error.to_string()))),
            Err(_) => Err(late()),
        };
        for program in programs.map_err(|no| no.of(image, target, &about))? {
            let _room = self.room.acquire().await;
            let verdict = tokio::time::timeout(self.timeout, ask(&program, image, target)).await;
            let about = format!("verifier {}", program.display());
            verdict.unwrap_or_else(|_| Err(late())).map_err(|no| no.of(image, target, &about))?;
        }
        Ok(())
    }
}

/// By name. Directories and what begins with a dot are none.
fn programs(directory: &Path) -> Result<Vec<PathBuf>, No> {
    let refused = |error: io::Error| No::Refused(format!("it cannot be read: {error}"));
    let mut programs = Vec::new();
    for entry in fs::read_dir(directory).map_err(refused)? {
        let path = entry.map_err(refused)?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !is_hidden && !path.is_dir() {
            programs.push(path);
        }
    }
    if programs.is_empty() {
        return Err(No::Refused("there is no verifier in it".to_owned()));
    }
    programs.sort();
    Ok(programs)
}

impl No {
    fn of(self, image: &ImageRef, target: Target<'_>, about: &str) -> Error {
        let (reason, why) = match self {
            Self::Refused(why) => (Reason::ImageUnverified, why),
            Self::Unasked(why) => (Reason::NotReady, why),
        };
        let way_out = match (reason, target.is_here) {
            (Reason::NotReady, _) => "; repeat".to_owned(),
            (_, true) => format!("; if the registry has another by now: `cowshed pull {image}`"),
            (_, false) => String::new(),
        };
        let message = format!("image {image} ({}) may not be used: {about}: {why}{way_out}", target.digest);
        Error::new(reason, message).with("image", image).with("digest", target.digest)
    }
}

impl Shared {
    /// Fails unless all verifiers agree that the image is used, or have done so before.
    pub(super) async fn verify(&self, image: &ImageRef, target: Target<'_>) -> Result<()> {
        let Some(verifiers) = &self.checks.verifiers else { return Ok(()) };
        let key = (image.clone(), target.digest.clone());
        let verdicts = &verifiers.verdicts;
        if verdicts.has_passed(&key) {
            return Ok(());
        }
        // A hundred VMs that start at once need one answer, whichever it is.
        let came = Instant::now();
        let _turn = self.locks.turn(&format!("verify {image} {}", target.digest), "", None).await;
        if verdicts.has_passed(&key) {
            return Ok(());
        }
        if let Some(refused) = verdicts.refused_since(&key, came) {
            return Err(refused);
        }
        let asked = Instant::now();
        match verifiers.ask_all(image, target).await {
            Ok(()) => {
                verdicts.note(key);
                tracing::info!(%image, digest = %target.digest, "verified");
                Ok(())
            }
            Err(error) => {
                verdicts.note_refused(key, asked, error.clone());
                Err(error)
            }
        }
    }
}

/// Whether one agrees.
async fn ask(program: &Path, image: &ImageRef, target: Target<'_>) -> Result<(), No> {
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
        // To the service's log.
        .stderr(Stdio::inherit())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| {
        let why = format!("it cannot be started: {error}");
        let passes = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory);
        if passes { No::Unasked(why) } else { No::Refused(why) }
    })?;
    // What it has started itself must not outlive its time either.
    let _group = Group(child.id());
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read is free to.
        let _unread = stdin.write_all(descriptor.to_string().as_bytes()).await;
    }
    let mut said = Vec::new();
    let stdout = child.stdout.take();
    let status = {
        let mut listening = pin!(listen(stdout, &mut said));
        tokio::select! {
            status = child.wait() => {
                // What it has left running may hold its output open for ever.
                let _over = tokio::time::timeout(LAST_WORDS, listening).await;
                status
            }
            () = &mut listening => child.wait().await,
        }
    };
    let status = status.map_err(|error| No::Unasked(format!("it was lost: {error}")))?;
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    Err(No::Refused(match said.trim() {
        "" => format!("it has given no reason ({})", ended(status)),
        said => format!("{} ({})", shown(said, TOLD_MAX_BYTES), ended(status)),
    }))
}

/// Keeps the beginning, and reads the rest so that nobody has to wait to say it.
async fn listen(stdout: Option<ChildStdout>, said: &mut Vec<u8>) {
    let Some(mut stdout) = stdout else { return };
    // An output that breaks is one that has ended.
    let _kept = (&mut stdout).take(REASON_MAX_BYTES).read_to_end(said).await;
    let _dropped = tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await;
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
        let target = Target { digest: &digest, media_type: "application/x", size: 3, is_here: true };
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
        assert!(words.contains("`cowshed pull r.example/cow:1`"), "{words}");
        assert!(words.contains("r.example/cow:1") && words.contains(digest.as_str()), "{words}");
    }

    #[tokio::test]
    async fn what_cannot_be_asked_refuses() {
        let directory = tempfile::tempdir().unwrap();
        use Reason::{ImageUnverified as Refused, NotReady as Unasked};
        let table = [
            ("silent", Some("exit 1"), Refused, "no reason (status 1)"),
            ("killed", Some("kill -9 $$"), Refused, "signal 9"),
            ("loud", Some("yes no | head -c 1000000; exit 2"), Refused, "… (status 2)"),
            ("slow", Some("sleep 30"), Unasked, "no answer within 2 s"),
            ("deep", Some("sleep 30 & wait"), Unasked, "no answer within 2 s"),
            ("empty", None, Refused, "no verifier in it"),
        ];
        for (name, text, reason, expected) in table {
            let at = directory.path().join(name);
            fs::create_dir(&at).unwrap();
            text.into_iter().for_each(|text| script(&at, "v", text));
            let begun = Instant::now();
            let error = verdict(&at).await.unwrap_err();
            let words = error.to_string();
            assert!(words.contains(expected), "{name}: {words}");
            assert_eq!(error.reason(), reason, "{name}: {words}");
            assert!(begun.elapsed() < Duration::from_secs(20), "{name}: {:?}", begun.elapsed());
        }
        fs::write(directory.path().join("empty/plain"), "no program").unwrap();
        let words = verdict(&directory.path().join("empty")).await.unwrap_err().to_string();
        assert!(words.contains("cannot be started"), "{words}");
        let words = verdict(&directory.path().join("absent")).await.unwrap_err().to_string();
        assert!(words.contains("cannot be read"), "{words}");
    }

    #[tokio::test]
    async fn who_agrees_may_talk_and_leave_something_running() {
        let directory = tempfile::tempdir().unwrap();
        script(directory.path(), "talks", "yes | head -c 1000000");
        script(directory.path(), "leaves", "sleep 30 & exit 0");
        verdict(directory.path()).await.unwrap();
    }
}
