//! Layers as people and attackers make them, on this machine's own filesystem; that the result is containerd's is tested end
//! to end.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    io::Write as _,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::Path,
    sync::{Arc, Mutex},
};

use tar::{Builder, EntryType, Header};

use super::*;
use crate::image::Digest;

const BOUNDS: Bounds = Bounds { bytes: 1 << 30, members: 1000, memory: 1 << 20 };

/// Lets inflaters have what they want; and what that was, and what they kept, in MiB.
#[derive(Clone, Default)]
struct Asked(Arc<Mutex<Vec<u64>>>);

impl Warden for Asked {
    fn memory(&mut self, bytes: u64) -> Result<()> {
        self.0.lock().unwrap().push(bytes >> 20);
        Ok(())
    }

    fn go_on(&mut self) -> Result<()> {
        Ok(())
    }

    fn keep(&mut self, bytes: u64) {
        self.0.lock().unwrap().push(bytes >> 20);
    }
}

/// A layer in the making, owned by whoever runs the tests.
struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn header(kind: EntryType, mode: u32, size: usize) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(u64::from(rustix::process::getuid().as_raw()));
        header.set_gid(u64::from(rustix::process::getgid().as_raw()));
        header.set_mtime(1_000_000_000);
        header.set_size(size as u64);
        header
    }

    /// The name as it is, whatever the builder thinks of it.
    fn raw(mut self, mut header: Header, name: &str, link: &str, data: &[u8]) -> Self {
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, name: &str, data: &[u8]) -> Self {
        let header = Self::header(EntryType::Regular, 0o644, data.len());
        self.raw(header, name, "", data)
    }

    fn directory(self, name: &str) -> Self {
        self.raw(Self::header(EntryType::Directory, 0o750, 0), name, "", b"")
    }

    fn link(self, kind: EntryType, name: &str, target: &str) -> Self {
        self.raw(Self::header(kind, 0o644, 0), name, target, b"")
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn root(directory: &Path, stop: &Stop) -> Root {
    Root::new(OwnedFd::from(fs::File::open(directory).unwrap()), stop)
}

fn apply_with(directory: &Path, layer: &[u8], bounds: Bounds) -> Result<Digest> {
    let stop = Stop::default();
    let (work, inflated) = inflate(bounds.inflated(), &stop, Box::new(Asked::default()));
    let source = Box::new(io::Cursor::new(layer.to_vec()));
    let inflating = std::thread::spawn(move || work(source));
    let applied = apply(root(directory, &stop), inflated, bounds).and_then(Inflated::finish);
    inflating.join().unwrap();
    applied
}

fn applied(directory: &Path, tar: Tar) {
    let bytes = tar.bytes();
    assert_eq!(apply_with(directory, &bytes, BOUNDS).unwrap(), Digest::of(&bytes));
}

fn refused(tar: Tar) -> LayerError {
    let outer = tempfile::tempdir().unwrap();
    let directory = outer.path().join("root");
    fs::create_dir(&directory).unwrap();
    let error = apply_with(&directory, &tar.bytes(), BOUNDS).unwrap_err();
    let beside: Vec<_> =
        fs::read_dir(outer.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(beside, ["root"], "something was made outside");
    error
}

fn read(directory: &Path, name: &str) -> String {
    fs::read_to_string(directory.join(name)).unwrap()
}

#[test]
fn files_directories_and_links() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let long = "d".repeat(90) + "/" + &"f".repeat(120);
    let tar = Tar::new()
        .directory("./")
        .directory("./usr/")
        .file("usr/file", b"one")
        .file("/absent/parents/file", b"two")
        .link(EntryType::Symlink, "lib", "usr")
        .file("lib/through", b"three")
        .link(EntryType::Symlink, "dangling", "made/by/need")
        .file("dangling/file", b"four")
        .link(EntryType::Link, "hard", "/lib/file")
        .link(EntryType::Symlink, "out", "../../../../etc")
        .pax(&[("path", long.as_bytes()), ("mtime", b"1234567890.5")])
        .file("short", b"five")
        .raw(Tar::header(EntryType::Fifo, 0o600, 0), "fifo", "", b"")
        .raw(Tar::header(EntryType::Regular, 0o4755, 0), "usr/set-user-id", "", b"");
    applied(at, tar);
    assert_eq!(read(at, "usr/through"), "three");
    assert_eq!(read(at, "absent/parents/file"), "two");
    assert_eq!(read(at, "made/by/need/file"), "four");
    assert_eq!(read(at, &long), "five");
    assert_eq!(
        fs::metadata(at.join("hard")).unwrap().ino(),
        fs::metadata(at.join("usr/file")).unwrap().ino()
    );
    assert_eq!(fs::read_link(at.join("out")).unwrap(), Path::new("../../../../etc"));
    assert!(fs::metadata(at.join("fifo")).unwrap().file_type().is_fifo());
    let modified =
        |name: &str| fs::symlink_metadata(at.join(name)).map(|m| (m.mtime(), m.mtime_nsec())).unwrap();
    assert_eq!(modified(&long), (1_234_567_890, 500_000_000));
    for name in ["usr", "lib", "usr/file", "fifo"] {
        assert_eq!(modified(name), (1_000_000_000, 0), "{name}");
    }
    let mode = |name: &str| fs::metadata(at.join(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!(
        [mode("usr"), mode("usr/file"), mode("absent"), mode("usr/set-user-id")],
        [0o750, 0o644, 0o755, 0o4755]
    );
}

#[test]
fn what_is_there_is_replaced_and_directories_are_merged() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    applied(
        at,
        Tar::new()
            .directory("d")
            .file("d/old", b"old")
            .file("f", b"old")
            .directory("e")
            .file("e/x", b"x")
            .file("twin", b"t")
            .link(EntryType::Link, "twin2", "twin"),
    );
    applied(
        at,
        Tar::new()
            .directory("d")
            .file("d/new", b"new")
            .directory("f")
            .file("f/inner", b"inner")
            .file("e", b"a file now")
            // Only this name gets it.
            .file("twin", b"changed"),
    );
    assert_eq!([read(at, "d/old"), read(at, "d/new"), read(at, "f/inner")], ["old", "new", "inner"]);
    assert_eq!([read(at, "e"), read(at, "twin"), read(at, "twin2")], ["a file now", "changed", "t"]);
}

#[test]
fn whiteouts_and_opaque_directories() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let below = || {
        Tar::new()
            .directory("d")
            .directory("d/deep")
            .file("d/deep/old", b"")
            .file("d/old", b"")
            .file("gone", b"")
            .directory("tree")
            .file("tree/x", b"")
    };
    applied(at, below());
    applied(
        at,
        Tar::new()
            .file("d/new", b"new")
            .file("d/deep/new", b"new")
            // It may come after what it must leave.
            .file("d/.wh..wh..opq", b"")
            .file("d/later", b"later")
            .file(".wh.gone", b"")
            .file(".wh.tree", b"")
            .file(".wh.never-was", b""),
    );
    for name in ["d/new", "d/deep/new", "d/later"] {
        assert!(at.join(name).exists(), "{name}");
    }
    for name in ["d/old", "d/deep/old", "gone", "tree", ".wh.gone", "d/.wh..wh..opq"] {
        assert!(!at.join(name).exists(), "{name}");
    }
}

#[test]
fn holes_and_zeros_take_no_room_and_sparse_formats_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let mut zeros = vec![0; 3 << 20];
    zeros[1 << 20] = 7;
    let mut list = b"2\n0\n4\n1048576\n3\n".to_vec();
    list.resize(512, 0);
    let data = [&list[..], b"abcdxyz"].concat();
    let tar = Tar::new()
        .file("zeros", &zeros)
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"sparse-1.0"),
            ("GNU.sparse.realsize", b"2097152"),
        ])
        .file("GNUSparseFile.0/x", &data)
        .pax(&[("GNU.sparse.map", b"8,2"), ("GNU.sparse.size", b"100"), ("GNU.sparse.name", b"sparse-0.1")])
        .file("x", b"hi");
    applied(at, tar);
    assert_eq!(fs::read(at.join("zeros")).unwrap(), zeros);
    assert!(fs::metadata(at.join("zeros")).unwrap().blocks() < 1000, "its zeros take room");
    let sparse = fs::read(at.join("sparse-1.0")).unwrap();
    assert_eq!(
        (sparse.len(), &sparse[..4], &sparse[1 << 20..(1 << 20) + 4]),
        (2 << 20, &b"abcd"[..], &b"xyz\0"[..])
    );
    let mut small = vec![0; 100];
    small[8..10].copy_from_slice(b"hi");
    assert_eq!(fs::read(at.join("sparse-0.1")).unwrap(), small);
}

#[test]
fn every_compression_and_what_is_behind_the_end() {
    let tar = [Tar::new().file("f", &[b'x'; 5000]).bytes(), vec![0; 10_000]].concat();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let members = [gzip(&tar[..700]), gzip(&tar[700..])].concat();
    for layer in [tar.clone(), gzip(&tar), members, zstd::encode_all(&tar[..], 3).unwrap()] {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(apply_with(directory.path(), &layer, BOUNDS).unwrap(), Digest::of(&tar));
        assert_eq!(read(directory.path(), "f").len(), 5000);
    }
    // Never closed, and not filled up.
    let directory = tempfile::tempdir().unwrap();
    assert!(apply_with(directory.path(), &tar[..512 + 5000], BOUNDS).is_ok());
    for cut in [
        gzip(&tar)[..40].to_vec(),
        zstd::encode_all(&tar[..], 3).unwrap()[..30].to_vec(),
        tar[..2000].to_vec(),
        tar[..300].to_vec(),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let error = apply_with(directory.path(), &cut, BOUNDS).unwrap_err();
        assert!(matches!(error, LayerError::Damaged(_)), "{error:?}");
    }
}

#[test]
fn attributes_are_kept_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let value = b"a\nb\0c=\n";
    applied(directory.path(), Tar::new().pax(&[("SCHILY.xattr.user.test", value)]).file("f", b""));
    let mut there = Vec::with_capacity(100);
    match rustix::fs::getxattr(
        directory.path().join("f"),
        "user.test",
        rustix::buffer::spare_capacity(&mut there),
    ) {
        Ok(_) => assert_eq!(there, value),
        Err(errno) => assert_eq!(errno, rustix::io::Errno::OPNOTSUPP),
    }
}

#[test]
fn what_leads_out_is_refused() {
    for tar in [
        Tar::new().file("../x", b""),
        Tar::new().file("a/../../x", b""),
        Tar::new().file("x", b"").link(EntryType::Link, "l", "../../etc/passwd"),
        Tar::new().pax(&[("path", b"../../x")]).file("y", b""),
        Tar::new().link(EntryType::Symlink, "a", "b").link(EntryType::Symlink, "b", "a").file("a/x", b""),
        Tar::new().raw(Tar::header(EntryType::Continuous, 0o644, 0), "x", "", b""),
        Tar::new().pax(&[("uid", b"4294967295")]).file("x", b""),
        Tar::new().file("x", b"").file("x/y", b""),
        Tar::new().link(EntryType::Symlink, "x", ""),
        Tar::new().pax(&[("path", "d/".repeat(500).as_bytes())]).file("x", b""),
        Tar::new().file(&"n".repeat(90), b"").pax(&[("path", "n".repeat(300).as_bytes())]).file("x", b""),
        Tar::new().pax(&[("comment", &[b'x'; 5 << 20])]).file("x", b""),
    ] {
        let error = refused(tar);
        assert!(matches!(error, LayerError::Refused(_)), "{error:?}");
    }
}

#[test]
fn what_makes_no_sense_is_damage() {
    let mut wrong_sum = Tar::new().file("x", b"").bytes();
    wrong_sum[0] = b'y';
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(apply_with(directory.path(), &wrong_sum, BOUNDS), Err(LayerError::Damaged(_))));
    for tar in [
        Tar::new().link(EntryType::Link, "l", "nowhere"),
        Tar::new().link(EntryType::Link, "l", "l"),
        Tar::new().directory("d").link(EntryType::Link, "l", "d"),
        Tar::new().file(".wh...", b""),
        Tar::new().file(".wh.", b""),
        Tar::new().pax(&[("path", b"a\0b")]).file("x", b""),
        Tar::new().pax(&[("path", b"a")]),
        Tar::new().pax(&[("GNU.sparse.map", b"0,9"), ("GNU.sparse.size", b"4")]).file("x", b"123456789"),
        Tar::new()
            .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"4")])
            .file("x", b"9\n"),
    ] {
        let error = refused(tar);
        assert!(matches!(error, LayerError::Damaged(_)), "{error:?}");
    }
}

/// Links of the image lead to what is in the image, also if they say otherwise.
#[test]
fn links_do_not_lead_out() {
    let outer = tempfile::tempdir().unwrap();
    let at = outer.path().join("root");
    fs::create_dir(&at).unwrap();
    fs::write(outer.path().join("victim"), b"whole").unwrap();
    let absolute = outer.path().display().to_string();
    let tar = Tar::new()
        .link(EntryType::Symlink, "up", "..")
        .file("up/victim", b"mine")
        .link(EntryType::Symlink, "abs", &absolute)
        .file("abs/victim", b"mine")
        .file("up/.wh.victim", b"")
        .link(EntryType::Symlink, "file", "../victim")
        .file("file", b"replaces the link");
    applied(&at, tar);
    assert_eq!(fs::read(outer.path().join("victim")).unwrap(), b"whole");
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 2);
    assert_eq!(read(&at, "file"), "replaces the link");
    assert!(at.join(&absolute[1..]).join("victim").exists());
}

#[test]
fn bounds_hold() {
    let directory = tempfile::tempdir().unwrap();
    let many = (0..20).fold(Tar::new(), |tar, n| tar.file(&format!("f{n}"), b"12345")).bytes();
    for bounds in [Bounds { members: 19, ..BOUNDS }, Bounds { bytes: 99, ..BOUNDS }] {
        let error = apply_with(directory.path(), &many, bounds).unwrap_err();
        assert!(matches!(&error, LayerError::Refused(why) if why.contains("layer_size_max")), "{error:?}");
    }
    assert!(apply_with(directory.path(), &many, Bounds { members: 20, bytes: 100, ..BOUNDS }).is_ok());
}

/// What a layer makes us remember, and inflate, is bounded too.
#[test]
fn small_layers_take_no_memory_and_no_time() {
    let refusal = |bytes: &[u8], bounds: Bounds| {
        let directory = tempfile::tempdir().unwrap();
        match apply_with(directory.path(), bytes, bounds) {
            Err(LayerError::Refused(why)) => why,
            other => panic!("{other:?}"),
        }
    };
    // One directory, named in ever other ways.
    let named = |n: usize| format!("{}d", "./".repeat(n % 40));
    let ways = (0..900).fold(Tar::new(), |tar, n| tar.directory(&named(n))).bytes();
    let directory = tempfile::tempdir().unwrap();
    let little = Bounds { memory: 200, ..BOUNDS };
    assert!(apply_with(directory.path(), &ways, little).is_ok(), "it is remembered once");
    // Ever other ones, opaque ones, and parents that nobody has named.
    let directories = (0..10).fold(Tar::new(), |tar, n| tar.directory(&format!("d{n}"))).bytes();
    let opaque = (0..10).fold(Tar::new(), |tar, n| tar.file(&format!("o{n}/.wh..wh..opq"), b"")).bytes();
    let deep = Tar::new().file("a/b/c/d/e/f/g/h/i/j/k/l/m/n", b"").bytes();
    for many in [directories, opaque, deep] {
        assert!(refusal(&many, little).contains("bytes of memory"));
        assert!(apply_with(directory.path(), &many, BOUNDS).is_ok());
    }
    // Behind the end of the archive.
    let endless = [Tar::new().file("f", b"x").bytes(), vec![0; 300_000]].concat();
    assert!(refusal(&endless, Bounds { bytes: 1000, members: 10, ..BOUNDS }).contains("when it is inflated"));
    let crowd: Vec<String> = (0..10_001).map(|n| format!("SCHILY.xattr.a{n}")).collect();
    let crowd: Vec<(&str, &[u8])> = crowd.iter().map(|key| (key.as_str(), &b"x"[..])).collect();
    assert!(refusal(&Tar::new().pax(&crowd).file("f", b"").bytes(), BOUNDS).contains("records"));
}

#[test]
fn who_is_stopped_ends() {
    let stop = Stop::default();
    let (work, inflated) = inflate(u64::MAX, &stop, Box::new(Asked::default()));
    let endless = Box::new(io::repeat(0x41));
    let inflating = std::thread::spawn(move || work(endless));
    stop.stop();
    let directory = tempfile::tempdir().unwrap();
    let error = apply(root(directory.path(), &stop), inflated, BOUNDS).map(drop).unwrap_err();
    assert!(matches!(error, LayerError::Stopped), "{error:?}");
    inflating.join().unwrap();
}

/// Arrives in pieces of so many bytes.
struct Piecemeal(io::Cursor<Vec<u8>>, usize);

impl io::Read for Piecemeal {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = into.len().min(self.1);
        self.0.read(&mut into[..most])
    }
}

/// What comes out, and what memory was asked for.
fn inflated(bytes: &[u8], piece: usize) -> (Result<Digest>, Vec<u64>) {
    let asked = Asked::default();
    let (work, inflated) = inflate(u64::MAX, &Stop::default(), Box::new(asked.clone()));
    let source = Piecemeal(io::Cursor::new(bytes.to_vec()), piece);
    let inflating = std::thread::spawn(move || work(Box::new(source)));
    let digest = inflated.finish();
    inflating.join().unwrap();
    let asked = asked.0.lock().unwrap().clone();
    (digest, asked)
}

#[test]
fn memory_is_kept_until_all_was_read_or_is_dropped() {
    let data = vec![0x41; 1_000_000];
    for is_read in [true, false] {
        let asked = Asked::default();
        let (work, inflated) = inflate(u64::MAX, &Stop::default(), Box::new(asked.clone()));
        // It ends, and what it has made is still there.
        work(Box::new(io::Cursor::new(data.clone())));
        assert_eq!(*asked.0.lock().unwrap(), [5, 5]);
        assert_eq!(Arc::strong_count(&asked.0), 2);
        if is_read {
            assert_eq!(inflated.finish().unwrap(), Digest::of(&data));
        } else {
            drop(inflated);
        }
        assert_eq!(Arc::strong_count(&asked.0), 1);
    }
    // Nobody reads on from a failure, however much came before it.
    let asked = Asked::default();
    let (work, mut inflated) = inflate(data.len() as u64 - 1, &Stop::default(), Box::new(asked.clone()));
    work(Box::new(io::Cursor::new(data.clone())));
    assert_eq!(Arc::strong_count(&asked.0), 2);
    assert!(io::copy(&mut inflated, &mut io::sink()).is_err());
    assert_eq!(Arc::strong_count(&asked.0), 1);
}

#[test]
fn memory_is_asked_for_before_each_frame_that_needs_more() {
    let frame = |window_log: u32, data: &[u8]| {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window_log).unwrap();
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    };
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n >> 5) as u8).collect();
    let skipped = [&[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let empty = [0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0];
    let frames = [
        &skipped[..],
        &frame(20, &data),
        &empty,
        &frame(20, b""),
        &frame(23, &data),
        &frame(21, &data),
        &frame(27, &data),
        &skipped,
    ]
    .concat();
    let all = Digest::of(&data.repeat(4));
    for piece in [4, 7, 1 << 20] {
        let (digest, asked) = inflated(&frames, piece);
        assert_eq!((digest.unwrap(), asked), (all.clone(), vec![5, 6, 13, 133, 5]), "in pieces of {piece}");
    }
    // Others take what all take.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&data).unwrap();
    for bytes in [data.clone(), gzip.finish().unwrap()] {
        let (digest, asked) = inflated(&bytes, 1 << 20);
        assert_eq!((digest.unwrap(), asked), (Digest::of(&data), vec![5, 5]));
    }
    // A window of 144 MiB is refused before anything is asked for, in whichever frame it is.
    let larger = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x89, 1, 0, 0];
    for (before, had) in [(vec![], vec![5, 5]), (frame(20, &data), vec![5, 6, 5])] {
        let (error, asked) = inflated(&[&before[..], &larger].concat(), 1 << 20);
        let error = error.unwrap_err();
        assert!(matches!(&error, LayerError::Refused(what) if what.contains("144 MiB")), "{error:?}");
        assert_eq!(asked, had);
    }
    // Cut short, and followed by what is no frame.
    let whole = frame(20, &data);
    for bytes in
        [&whole[..3], &whole[..4], &whole[..5], &whole[..whole.len() - 1], &[&whole[..], b"x"].concat()]
    {
        let (error, _) = inflated(bytes, 1 << 20);
        assert!(bytes.len() < 4 || matches!(error, Err(LayerError::Damaged(_))), "{} {error:?}", bytes.len());
    }
}
