//! What layers unpack to: the same as containerd makes of them, whatever is in them; and nothing of what must not be.

use tar::EntryType;

use crate::{
    Test,
    support::{
        Outcome, check,
        command::sh,
        containerd,
        cow::{acquire, cowshed, evict_all, pull, refused, release, snapshotter},
        fake_image::{FakeImage, digest, gzip, noise},
        fake_registry::{Answer, FakeRegistry, Hosts},
        same,
        second::Plan,
        stack::{Compression, Layer, Stack},
        tree, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("of_every_feature_are_what_overlayfs_makes_of_them", of_every_feature),
    ("that_need_what_is_below_are_what_containerds_differ_makes", that_need_what_is_below),
    ("a_hundred_and_twenty_seven", a_hundred_and_twenty_seven),
    ("hostile_ones_are_refused", hostile_ones_are_refused),
    ("larger_than_the_configuration_allows", larger_than_the_configuration_allows),
    ("need_not_be_kept", need_not_be_kept),
    ("wrong_bytes_of_one_mirror_are_not_what_is_unpacked", wrong_bytes_of_one_mirror),
];

/// Whose chain id `ctr` can be asked for by.
fn chain_id(tars: &[Vec<u8>]) -> String {
    tars.iter()
        .map(|tar| digest(tar))
        .reduce(|below, diff| digest(format!("{below} {diff}").as_bytes()))
        .unwrap_or_default()
}

fn everything() -> Outcome<Vec<Vec<u8>>> {
    let mut owned = Layer::header(EntryType::Regular, 0o640);
    owned.set_uid(100_000);
    owned.set_gid(70_000);
    let mut ancient = Layer::header(EntryType::Regular, 0o4755);
    ancient.set_mtime(0);
    let long = format!("{}/{}", "l".repeat(140), "n".repeat(200));
    let mut list = b"2\n4096\n6\n3145728\n2\n".to_vec();
    list.resize(512, 0);
    let sparse = [&list[..], b"middleto"].concat();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let lowest = Layer::new()
        .directory("./", 0o755)?
        .directory("usr", 0o755)?
        .directory("usr/lib", 0o755)?
        .directory("tmp", 0o1777)?
        .directory("shared", 0o2775)?
        .directory("empty", 0o700)?
        .raw(owned, b"usr/owned", b"", b"of a user with a large number")?
        .raw(ancient, b"usr/set-user-id", b"", b"#!/bin/true")?
        .link(EntryType::Symlink, "lib", "usr/lib")?
        .link(EntryType::Symlink, "absolute", "/usr/lib")?
        .link(EntryType::Symlink, "dangling", "no/such/thing")?
        .file("usr/twin-a", b"twins")?
        .link(EntryType::Link, "usr/twin-b", "usr/twin-a")?
        .link(EntryType::Link, "twin-c", "/usr/twin-b")?
        .raw(Layer::header(EntryType::Fifo, 0o620), b"usr/fifo", b"", b"")?
        .device(EntryType::Char, "usr/null", 1, 3)?
        .device(EntryType::Block, "usr/block", 259, 70_000)?
        .pax(&[("SCHILY.xattr.user.note", b"a\nb\0c=d"), ("SCHILY.xattr.security.capability", &capability)])?
        .file("usr/capable", b"may bind")?
        .pax(&[("SCHILY.xattr.trusted.on-directory", b"yes"), ("mtime", b"1234567890.123456789")])?
        .directory("attributes", 0o711)?
        .pax(&[("path", long.as_bytes())])?
        .file("shortened", b"long name")?
        .pax(&[("path", "ü/\u{1f404} with spaces\nand a newline".as_bytes()), ("mtime", b"-5.5")])?
        .file("x", b"odd name")?
        .raw(Layer::header(EntryType::Regular, 0o600), b"-\xff\xfe not UTF-8", b"", b"odd bytes")?
        .file("without/a/parent/file", b"parents")?
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"sparse"),
            ("GNU.sparse.realsize", b"4194304"),
        ])?
        .file("GNUSparseFile.1/sparse", &sparse)?
        .file("zeros", &vec![0; 3 << 20])?
        .file("noise", &noise(11, 2 << 20))?
        .directory("will-be-opaque", 0o755)?
        .file("will-be-opaque/old", b"old")?
        .directory("will-be-opaque/deep", 0o755)?
        .file("will-be-opaque/deep/old", b"old")?
        .directory("will-be-a-file", 0o755)?
        .file("will-be-a-file/x", b"x")?
        .file("will-be-a-directory", b"x")?
        .file("will-be-gone", b"x")?
        .directory("will-be-gone-too", 0o755)?
        .file("will-be-gone-too/x", b"x")?
        .file("will-be-a-link", b"x")?
        .bytes()?;
    let second = Layer::new()
        .file(".wh.will-be-gone", b"")?
        .file(".wh.will-be-gone-too", b"")?
        .file(".wh.never-was-there", b"")?
        .directory("will-be-opaque", 0o700)?
        .file("will-be-opaque/before", b"new")?
        .file("will-be-opaque/.wh..wh..opq", b"")?
        .file("will-be-opaque/after", b"new")?
        .file("will-be-a-file", b"a file")?
        .directory("will-be-a-directory", 0o755)?
        .file("will-be-a-directory/x", b"x")?
        .link(EntryType::Symlink, "will-be-a-link", "zeros")?
        .directory("tmp", 0o755)?
        .file("usr/owned", b"overwritten")?
        .bytes()?;
    let empty = vec![0; 1024];
    let highest = Layer::new()
        .directory("back", 0o755)?
        .file("will-be-gone", b"is back")?
        .file("back/file", &noise(12, 100_000))?
        .link(EntryType::Link, "back/link", "back/file")?
        .bytes()?;
    Ok(vec![lowest, second, empty, highest])
}

fn serve(tars: &[Vec<u8>], compressions: &[Compression]) -> Outcome<(FakeRegistry, String)> {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let layers: Vec<_> = tars.iter().cloned().zip(compressions.iter().copied()).collect();
    registry.serve_stack("1", &Stack::of(&layers)?);
    let name = registry.image("1");
    Ok((registry, name))
}

fn same_trees(ours: &tree::Tree, theirs: &tree::Tree) -> Outcome {
    let mut differ = Vec::new();
    for path in ours.keys().chain(theirs.keys()) {
        if ours.get(path) != theirs.get(path) {
            let path_text = String::from_utf8_lossy(path);
            differ.push(format!("{path_text:?}: {:?}, containerd: {:?}", ours.get(path), theirs.get(path)));
        }
    }
    differ.dedup();
    check!(differ.is_empty(), "the trees differ: {differ:#?}");
    Ok(())
}

fn of_every_feature() -> Outcome {
    let tars = everything()?;
    let compressions = [Compression::TwiceGzip, Compression::None, Compression::Gzip, Compression::Zstd];
    let (_registry, name) = serve(&tars, &compressions)?;
    pull(&name)?;
    let ours = tree::of_image(snapshotter(), &name)?;
    check!(ours.len() > 40, "only {} files are there: {ours:?}", ours.len());
    sh(&format!("ctr images pull --plain-http --snapshotter overlayfs {name} > /dev/null"))?;
    let theirs = tree::of_image("overlayfs", &name)?;
    same_trees(&ours, &theirs)?;
    // The image that was pulled is an ordinary one.
    let checked = sh(&format!("ctr images check --snapshotter {} name=={name} | sed 1d", snapshotter()))?;
    check!(checked.contains("complete") && checked.contains("true"), "ctr images check: {checked}");
    evict_all()
}

/// What overlayfs cannot: a layer is applied there without those below.
fn that_need_what_is_below() -> Outcome {
    let lowest = Layer::new()
        .directory("usr", 0o755)?
        .directory("usr/bin", 0o755)?
        .file("usr/bin/tool", b"tool")?
        .link(EntryType::Symlink, "bin", "usr/bin")?
        .bytes()?;
    let upper = Layer::new()
        .directory("usr/bin", 0o755)?
        .link(EntryType::Link, "usr/bin/alias", "usr/bin/tool")?
        .file("bin/through-the-link", b"is in usr/bin")?
        .file("bin/.wh.never", b"")?
        .bytes()?;
    let tars = [lowest, upper];
    let (_registry, name) = serve(&tars, &[Compression::Gzip, Compression::Gzip])?;
    pull(&name)?;
    let ours = tree::of_snapshot(snapshotter(), &chain_id(&tars))?;
    check!(ours[&b"usr/bin/alias"[..]].contains("2 names"), "the alias: {ours:?}");
    check!(ours.contains_key(&b"usr/bin/through-the-link"[..]), "what went through a link: {ours:?}");
    evict_all()?;
    let second = Plan::new("[images]\nunpacker = \"containerd\"\n")?.start()?;
    second.cowshed(&["pull", &name])?.ok()?;
    let theirs = tree::of_snapshot(snapshotter(), &chain_id(&tars))?;
    same_trees(&ours, &theirs)?;
    same!(second.stop()?, 0, "the exit status");
    evict_all()
}

fn a_hundred_and_twenty_seven() -> Outcome {
    let tars = (0..127)
        .map(|n| Layer::new().file(&format!("of-{n}"), format!("{n}").as_bytes())?.bytes())
        .collect::<Outcome<Vec<_>>>()?;
    let (_registry, name) = serve(&tars, &[Compression::Gzip; 127])?;
    let disk = acquire("layers-127", &name)?;
    release("layers-127")?;
    check!(!disk.path.is_empty(), "no path");
    same!(tree::of_snapshot(snapshotter(), &chain_id(&tars))?.len(), 127, "files");
    same!(tree::of_snapshot(snapshotter(), &chain_id(&tars[..70]))?.len(), 70, "files of the first 70");
    evict_all()
}

fn hostile_ones_are_refused() -> Outcome {
    let endless: Vec<u8> = "d/".repeat(450).into_bytes();
    // What it is, whether it is damaged or refused, what the error says.
    let table: Vec<(&str, Layer, bool, &str)> = vec![
        (
            "a name that leads out",
            Layer::new().file("../../etc/cron.d/x", b"x")?,
            false,
            "leads out of the image",
        ),
        (
            "a name that leads out later",
            Layer::new().file("a/b/../../../x", b"x")?,
            false,
            "leads out of the image",
        ),
        (
            "a hard link out",
            Layer::new().link(EntryType::Link, "x", "../../etc/passwd")?,
            false,
            "leads out of the image",
        ),
        (
            "a hard link to nothing",
            Layer::new().link(EntryType::Link, "x", "/etc/passwd")?,
            true,
            "no file of it",
        ),
        (
            "a hard link by way of a link",
            Layer::new().link(EntryType::Symlink, "up", "/")?.link(EntryType::Link, "x", "up/etc/passwd")?,
            true,
            "no file of it",
        ),
        (
            "links in a circle",
            Layer::new()
                .link(EntryType::Symlink, "a", "b")?
                .link(EntryType::Symlink, "b", "a")?
                .file("a/x", b"")?,
            false,
            "without end",
        ),
        (
            "directories without end",
            Layer::new().pax(&[("path", &endless)])?.file("x", b"")?,
            false,
            "deeper than",
        ),
        ("a name too long", Layer::new().pax(&[("path", &[b'n'; 256])])?.file("x", b"")?, false, "too long"),
        ("a removal of the directory itself", Layer::new().file("d/.wh..", b"")?, true, "removes nothing"),
        (
            "a header of megabytes",
            Layer::new().pax(&[("comment", &vec![b'x'; 6 << 20])])?.file("x", b"")?,
            false,
            "are allowed",
        ),
        (
            "a kind that is none",
            Layer::new().raw(Layer::header(EntryType::Continuous, 0o644), b"x", b"", b"")?,
            false,
            "no image has",
        ),
        (
            "a sparse file of nonsense",
            Layer::new()
                .pax(&[("GNU.sparse.map", b"9,9,1,1"), ("GNU.sparse.size", b"10")])?
                .file("x", b"0123456789")?,
            true,
            "sparse",
        ),
        (
            "a file larger than any",
            Layer::new()
                .pax(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"9223372036854775807")])?
                .file("x", b"0")?,
            false,
            "layer_size_max",
        ),
    ];
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let mut served = Vec::new();
    for (n, (what, layer, is_damaged, words)) in table.into_iter().enumerate() {
        let tag = format!("{n}");
        let stack = Stack::of(&[(layer.bytes()?, Compression::Gzip)])?;
        registry.serve_stack(&tag, &stack);
        served.extend([&stack.manifest, &stack.config, &stack.layers[0]].map(|bytes| digest(bytes)));
        let (status, reason) = if is_damaged { (10, "IMAGE_CORRUPT") } else { (6, "IMAGE_UNSUPPORTED") };
        refused("hostile", &registry.image(&tag), status, reason, &[words, "layer 1 of 1"])
            .map_err(|e| format!("{what}: {}", e.message().unwrap_or_default()))?;
    }
    let cut = Layer::new().file("x", &noise(3, 10_000))?.bytes()?[..5000].to_vec();
    let image = FakeImage::of(gzip(&cut)?, &digest(&cut));
    registry.serve("cut", &image);
    served.extend([&image.manifest, &image.config, &image.layer].map(|bytes| digest(bytes)));
    refused("hostile", &registry.image("cut"), 10, "IMAGE_CORRUPT", &["ends in the middle"])?;
    let mut extracted = containerd::snapshots(snapshotter())?;
    extracted.retain(|(key, _)| key.contains("extract-"));
    check!(extracted.is_empty(), "half-made snapshots: {extracted:?}");
    wait_for("their blobs to go", || {
        let mut left = containerd::blobs()?;
        left.retain(|blob| served.contains(blob));
        check!(left.is_empty(), "{left:?} are left");
        Ok(())
    })
}

fn larger_than_the_configuration_allows() -> Outcome {
    let bomb = Layer::new().file("zeros", &vec![0; 20 << 20])?.bytes()?;
    let crowd = (0..200).try_fold(Layer::new(), |layer, n| layer.file(&format!("f{n}"), b""))?.bytes()?;
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    registry.serve_stack("bomb", &Stack::of(&[(bomb, Compression::Gzip)])?);
    registry.serve_stack("crowd", &Stack::of(&[(crowd, Compression::Gzip)])?);
    let second = Plan::new("[images]\nlayer_size_max = \"16 MiB\"\nlayer_members_max = 199\n")?.start()?;
    for tag in ["bomb", "crowd"] {
        second.refuses(
            "bounds",
            &registry.image(tag),
            6,
            "IMAGE_UNSUPPORTED",
            &["layer_size_max", "199 members"],
        )?;
    }
    same!(second.stop()?, 0, "the exit status");
    // Before anything of it is fetched, where the disks are known.
    if snapshotter() == "cowshed" {
        let small = "[snapshotter]\nserve = \"never\"\nbase_size = \"16MiB\"\n";
        let second = Plan::new(small)?.start()?;
        let layer = Layer::new().file("noise", &noise(20, 17 << 20))?.bytes()?;
        let large = Stack::of(&[(layer, Compression::Gzip)])?;
        registry.serve_stack("large", &large);
        let words = ["17 MiB compressed", "16 MiB", "try \"2GiB\"", "base_size"];
        second.refuses("large", &registry.image("large"), 6, "IMAGE_UNSUPPORTED", &words)?;
        check!(registry.requests(&digest(&large.layers[0])).is_empty(), "its layer was asked for");
        same!(second.stop()?, 0, "the exit status");
    }
    // The defaults allow both.
    for tag in ["bomb", "crowd"] {
        cowshed(&["pull", &registry.image(tag)])?.ok()?;
    }
    evict_all()
}

fn need_not_be_kept() -> Outcome {
    evict_all()?;
    let shared = Layer::new().file("shared", &noise(21, 50_000))?.bytes()?;
    let own = |n: u64| Layer::new().file("own", &noise(n, 50_000))?.bytes();
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let (one, two) = (own(22)?, own(23)?);
    let stacks = [&one, &two]
        .map(|own| Stack::of(&[(shared.clone(), Compression::Gzip), (own.clone(), Compression::Gzip)]));
    let [first, second] = stacks;
    let (first, second) = (first?, second?);
    registry.serve_stack("1", &first);
    registry.serve_stack("2", &second);
    let service = Plan::new("[images]\nkeep_layers = false\n")?.start()?;
    service.cowshed(&["pull", &registry.image("1")])?.ok()?;
    crate::support::cow::collect()?;
    let content = containerd::blobs()?;
    check!(content.contains(&digest(&first.config)), "the configuration is gone: {content:?}");
    for layer in &first.layers {
        check!(!content.contains(&digest(layer)), "a layer was kept: {content:?}");
    }
    service.cowshed(&["acquire", "not-kept", &registry.image("1")])?.ok()?;
    let again = service.cowshed(&["pull", &registry.image("1")])?.ok()?;
    check!(again.contains("was there already"), "{again}");
    // One that shares its lowest layer: only what is new is fetched.
    service.cowshed(&["pull", &registry.image("2")])?.ok()?;
    same!(registry.requests(&digest(&second.layers[0])).len(), 1, "requests for the shared layer");
    same!(registry.requests(&digest(&second.layers[1])).len(), 1, "requests for the new layer");
    same!(tree::of_snapshot(snapshotter(), &chain_id(&[shared, two]))?.len(), 2, "files");
    service.release_all()?;
    same!(service.stop()?, 0, "the exit status");
    evict_all()
}

/// A layer is unpacked while it arrives; what arrives turns out to be something else: no layer at all, or another one.
fn wrong_bytes_of_one_mirror() -> Outcome {
    for (n, compression) in [Compression::Gzip, Compression::None].into_iter().enumerate() {
        let contents = noise(31 + n as u64, 3_000_000);
        let tar = Layer::new().file("file", &contents)?.bytes()?;
        let stack = Stack::of(&[(tar.clone(), compression)])?;
        let (liar, honest) = (FakeRegistry::start(Hosts::PlainHttp)?, FakeRegistry::start(Hosts::PlainHttp)?);
        for registry in [&liar, &honest] {
            registry.serve_stack("1", &stack);
        }
        let layer = &stack.layers[0];
        let mut wrong = layer.clone();
        // Within gzip's data, or within the file: more of it than is kept until it is verified comes after.
        wrong[700] ^= 1;
        liar.blob(&digest(layer), Answer::Bytes(wrong));
        liar.mirrored_by(&honest)?;
        pull(&liar.image("1"))?;
        let tree = tree::of_snapshot(snapshotter(), &chain_id(&[tar]))?;
        check!(tree.values().any(|file| file.contains(&digest(&contents))), "{tree:?}");
        let asked = [&liar, &honest].map(|registry| registry.requests(&digest(layer)).len());
        check!(asked.iter().all(|count| *count > 0), "who was asked for the layer, how often: {asked:?}");
    }
    evict_all()
}
