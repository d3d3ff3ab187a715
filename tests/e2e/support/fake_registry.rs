//! A registry on a port of its own that does what a test tells it to, and remembers what it was asked.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use super::{
    Outcome,
    fake_image::{FakeImage, MANIFEST, digest},
    stack::Stack,
};

const CERTS: &str = "/etc/containerd/certs.d";
const REPOSITORY: &str = "odd/image";

/// What it was asked.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// The first line, without the version; bytes that are no HTTP begin with "not HTTP".
    pub(crate) line: String,
    pub(crate) range: Option<String>,
    /// Whether it says who asks.
    pub(crate) authorized: bool,
}

/// What it answers to one path.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Bytes(Vec<u8>),
    /// A status, with an empty body.
    Status(u16),
    /// A status, with a body that does not end.
    Endless(u16),
    /// Says that it sends all, and sends a byte a second.
    Drip(Vec<u8>),
    /// To whatever is asked without a token, if it is the answer to "/v2/": one is to be had at this path.
    Challenge(String),
    /// Says that it sends all, and closes the connection after so many bytes, the first time; honours ranges after it.
    CutOnce(Vec<u8>, usize),
    /// All of it, or the range that is asked for.
    Ranges(Vec<u8>),
    /// Never answers.
    Stall,
    /// Answers when the gate is opened.
    Gated(Vec<u8>),
}

#[derive(Default)]
struct State {
    answers: HashMap<String, Answer>,
    requests: Vec<Request>,
    open: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether containerd's hosts.toml says how to talk to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hosts {
    PlainHttp,
    Absent,
}

/// A registry that runs as long as the test does. Its hosts.toml goes when it is dropped.
pub(crate) struct FakeRegistry {
    pub(crate) authority: String,
    shared: Arc<Shared>,
    hosts: PathBuf,
}

impl FakeRegistry {
    pub(crate) fn start(hosts: Hosts) -> Outcome<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let authority = listener.local_addr()?.to_string();
        let directory = PathBuf::from(CERTS).join(&authority);
        if hosts == Hosts::PlainHttp {
            fs::create_dir_all(&directory)?;
            let text = format!("server = \"http://{authority}\"\n");
            fs::write(directory.join("hosts.toml"), text)?;
        }
        let shared = Arc::new(Shared::default());
        let serving = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&serving);
                // A client that goes away is no failure of ours.
                thread::spawn(move || serve(&shared, stream));
            }
        });
        Ok(Self { authority, shared, hosts: directory })
    }

    /// The name of the image with this tag, or this digest.
    pub(crate) fn image(&self, reference: &str) -> String {
        let separator = if reference.contains(':') { '@' } else { ':' };
        format!("{}/{REPOSITORY}{separator}{reference}", self.authority)
    }

    /// Serves the image under a tag, and by its digests.
    pub(crate) fn serve(&self, tag: &str, image: &FakeImage) {
        self.manifest(tag, Answer::Bytes(image.manifest.clone()));
        self.manifest(&digest(&image.manifest), Answer::Bytes(image.manifest.clone()));
        self.blob(&digest(&image.config), Answer::Bytes(image.config.clone()));
        self.blob(&digest(&image.layer), Answer::Bytes(image.layer.clone()));
    }

    /// From now on the other one is asked too, after this one.
    pub(crate) fn mirrored_by(&self, other: &Self) -> Outcome {
        let text = format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
            other.authority, self.authority
        );
        Ok(fs::write(self.hosts.join("hosts.toml"), text)?)
    }

    /// Serves the image of several layers under a tag, and by its digests.
    pub(crate) fn serve_stack(&self, tag: &str, image: &Stack) {
        self.manifest(tag, Answer::Bytes(image.manifest.clone()));
        for bytes in [&image.manifest, &image.config].into_iter().chain(&image.layers) {
            self.blob(&digest(bytes), Answer::Bytes(bytes.clone()));
            self.manifest(&digest(bytes), Answer::Bytes(bytes.clone()));
        }
    }

    pub(crate) fn manifest(&self, reference: &str, answer: Answer) {
        self.shared.lock().answers.insert(format!("/v2/{REPOSITORY}/manifests/{reference}"), answer);
    }

    pub(crate) fn blob(&self, digest: &str, answer: Answer) {
        self.shared.lock().answers.insert(format!("/v2/{REPOSITORY}/blobs/{digest}"), answer);
    }

    /// What it answers to a path of no image.
    pub(crate) fn answer(&self, path: &str, answer: Answer) {
        self.shared.lock().answers.insert(path.to_owned(), answer);
    }

    /// What it was asked so far, as far as `about` is in the line.
    pub(crate) fn requests(&self, about: &str) -> Vec<Request> {
        self.shared.lock().requests.iter().filter(|r| r.line.contains(about)).cloned().collect()
    }

    pub(crate) fn open_gate(&self) {
        self.shared.lock().open = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.open_gate();
        // It is not there if the test wanted none.
        let _absent = fs::remove_dir_all(&self.hosts);
    }
}

fn serve(shared: &Shared, mut stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let first = reader.fill_buf().ok()?;
    if !first.first().is_some_and(u8::is_ascii_uppercase) {
        shared.lock().requests.push(Request {
            line: format!("not HTTP: {} bytes", first.len()),
            range: None,
            authorized: false,
        });
        return None;
    }
    let request = read(&mut reader)?;
    let path = request.line.split(' ').nth(1)?.split('?').next()?.to_owned();
    let answer = {
        let mut state = shared.lock();
        state.requests.push(request.clone());
        let greeting = (path == "/v2/").then(|| Answer::Bytes(b"{}".to_vec()));
        let challenge = (path.starts_with("/v2/") && !request.authorized).then(|| state.answers.get("/v2/"));
        let challenge = challenge.flatten().filter(|answer| matches!(answer, Answer::Challenge(_)));
        challenge.or_else(|| state.answers.get(&path)).cloned().or(greeting)
    };
    let head_only = request.line.starts_with("HEAD ");
    match answer {
        None => status(&mut stream, 404),
        Some(Answer::Status(code)) => status(&mut stream, code),
        Some(Answer::Bytes(bytes)) => whole(&mut stream, &path, &bytes, head_only),
        Some(Answer::Endless(code)) => endless(&mut stream, code),
        Some(Answer::Drip(bytes)) => drip(shared, &mut stream, &path, &bytes),
        Some(Answer::Challenge(path)) => challenge(&mut stream, &path),
        Some(Answer::Stall) => wait(shared),
        Some(Answer::Gated(bytes)) => {
            wait(shared)?;
            whole(&mut stream, &path, &bytes, head_only)
        }
        Some(Answer::CutOnce(bytes, at)) => cut_once(shared, &mut stream, &path, &bytes, at, &request),
        Some(Answer::Ranges(bytes)) => ranges(&mut stream, &path, &bytes, &request),
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let line = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
    let mut request = Request { line, range: None, authorized: false };
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).ok()? == 0 || header.trim().is_empty() {
            return Some(request);
        }
        let (name, value) = header.split_once(':').unwrap_or_default();
        request.authorized |= name.eq_ignore_ascii_case("authorization");
        if name.eq_ignore_ascii_case("range") {
            request.range = Some(value.trim().to_owned());
        }
    }
}

fn wait(shared: &Shared) -> Option<()> {
    let mut state = shared.lock();
    while !state.open {
        state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    Some(())
}

fn status(stream: &mut TcpStream, code: u16) -> Option<()> {
    write!(stream, "HTTP/1.1 {code} As told\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").ok()
}

fn endless(stream: &mut TcpStream, code: u16) -> Option<()> {
    write!(stream, "HTTP/1.1 {code} As told\r\nConnection: close\r\n\r\n").ok()?;
    // Until the client has had enough.
    while stream.write_all(&[b'x'; 1 << 16]).is_ok() {}
    None
}

/// Until the client has had enough, or the registry is dropped.
fn drip(shared: &Shared, stream: &mut TcpStream, path: &str, bytes: &[u8]) -> Option<()> {
    head(stream, 200, path, bytes.len(), "")?;
    for byte in bytes {
        stream.write_all(&[*byte]).ok()?;
        let state = shared.lock();
        let slept = shared.changed.wait_timeout(state, Duration::from_secs(1));
        if slept.unwrap_or_else(PoisonError::into_inner).0.open {
            return None;
        }
    }
    None
}

fn challenge(stream: &mut TcpStream, path: &str) -> Option<()> {
    let place = format!("http://{}{path}", stream.local_addr().ok()?);
    write!(
        stream,
        "HTTP/1.1 401 As told\r\nWWW-Authenticate: Bearer realm=\"{place}\",service=\"fake\"\r\n\
         Content-Length: 0\r\nConnection: close\r\n\r\n"
    )
    .ok()
}

fn head(stream: &mut TcpStream, code: u16, path: &str, length: usize, more: &str) -> Option<()> {
    let kind = if path.contains("/manifests/") { MANIFEST } else { "application/octet-stream" };
    write!(
        stream,
        "HTTP/1.1 {code} As told\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}Connection: close\r\n\r\n"
    )
    .ok()
}

fn whole(stream: &mut TcpStream, path: &str, bytes: &[u8], head_only: bool) -> Option<()> {
    let is_manifest = path.contains("/manifests/");
    let said =
        if is_manifest { format!("Docker-Content-Digest: {}\r\n", digest(bytes)) } else { String::new() };
    head(stream, 200, path, bytes.len(), &said)?;
    if head_only { Some(()) } else { stream.write_all(bytes).ok() }
}

fn cut_once(
    shared: &Shared,
    stream: &mut TcpStream,
    path: &str,
    bytes: &[u8],
    at: usize,
    request: &Request,
) -> Option<()> {
    let first = shared.lock().requests.iter().filter(|r| r.line == request.line).count() == 1;
    if first {
        head(stream, 200, path, bytes.len(), "")?;
        return stream.write_all(&bytes[..at]).ok();
    }
    ranges(stream, path, bytes, request)
}

fn ranges(stream: &mut TcpStream, path: &str, bytes: &[u8], request: &Request) -> Option<()> {
    let from = request.range.as_ref().and_then(|r| r.strip_prefix("bytes=")?.split('-').next()?.parse().ok());
    let Some(from) = from.filter(|from: &usize| *from < bytes.len()) else {
        return whole(stream, path, bytes, false);
    };
    let more = format!("Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
    head(stream, 206, path, bytes.len() - from, &more)?;
    stream.write_all(&bytes[from..]).ok()
}
