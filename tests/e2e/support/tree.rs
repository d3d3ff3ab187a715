//! What is in a filesystem, file by file.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::Path,
    time::{Duration, SystemTime},
};

use super::{Outcome, command::sh, fake_image::digest, wait_for};

/// All that a guest can tell two trees apart by, by path: kind, mode, owner, time, size, device, links, attributes, contents.
pub(crate) type Tree = BTreeMap<Vec<u8>, String>;

pub(crate) fn of(root: &Path) -> Outcome<Tree> {
    let mut tree = Tree::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            let name = path.strip_prefix(root)?.as_os_str().as_bytes().to_vec();
            // mkfs makes it.
            if name == b"lost+found" {
                continue;
            }
            let is_directory = fs::symlink_metadata(&path)?.is_dir();
            tree.insert(name, describe(&path)?);
            if is_directory {
                directories.push(path);
            }
        }
    }
    Ok(tree)
}

fn describe(path: &Path) -> Outcome<String> {
    let meta = fs::symlink_metadata(path)?;
    let kind = meta.file_type();
    let (kind, more) = if kind.is_dir() {
        ("directory", String::new())
    } else if kind.is_symlink() {
        ("link", format!(" to {:?}", fs::read_link(path)?))
    } else if kind.is_file() {
        ("file", format!(" of {} bytes {}, {} names", meta.size(), digest(&fs::read(path)?), meta.nlink()))
    } else if kind.is_fifo() {
        ("fifo", String::new())
    } else {
        let kind = if kind.is_block_device() { "block device" } else { "character device" };
        (kind, format!(" {:#x}", meta.rdev()))
    };
    let (mode, owner, group) = (meta.mode(), meta.uid(), meta.gid());
    // Of a directory that no member has set the time of.
    let is_new =
        SystemTime::now().duration_since(meta.modified()?).is_ok_and(|age| age < Duration::from_secs(86_400));
    let time = if is_new { "now".to_owned() } else { format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()) };
    Ok(format!("{kind}{more}, {mode:o}, {owner}:{group}, {time}{}", attributes(path)?))
}

fn attributes(path: &Path) -> Outcome<String> {
    let mut names = Vec::with_capacity(4096);
    rustix::fs::llistxattr(path, rustix::buffer::spare_capacity(&mut names))?;
    let mut described = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = Vec::with_capacity(65536);
        rustix::fs::lgetxattr(path, OsStr::from_bytes(name), rustix::buffer::spare_capacity(&mut value))?;
        described.push(format!(", {:?}={value:?}", OsStr::from_bytes(name)));
    }
    described.sort();
    Ok(described.concat())
}

/// The tree of an image that this snapshotter has.
pub(crate) fn of_image(snapshotter: &str, name: &str) -> Outcome<Tree> {
    let mounted = tempfile::Builder::new().prefix("tree").tempdir_in("/tmp")?;
    let at = mounted.path().display();
    // Whether it is a module, and is loaded when it is needed, differs.
    sh("modprobe overlay")?;
    sh(&format!("ctr images mount --snapshotter {snapshotter} {name} {at} > /dev/null"))?;
    let looked = of(mounted.path());
    sh(&format!("ctr images unmount --rm --snapshotter {snapshotter} {at} > /dev/null"))?;
    looked
}

/// The tree of what is committed under this chain id.
pub(crate) fn of_snapshot(snapshotter: &str, chain_id: &str) -> Outcome<Tree> {
    let ctr = format!("ctr snapshots --snapshotter {snapshotter}");
    let mounted = tempfile::Builder::new().prefix("tree").tempdir_in("/tmp")?;
    let at = mounted.path().display();
    // A view by hand is collected unless it is held, and that may come too late.
    wait_for("a view", || {
        sh(&format!(
            "{ctr} rm tree-view 2> /dev/null || true; {ctr} view tree-view {chain_id} > /dev/null && {ctr} label tree-view \
             containerd.io/gc.root=x > /dev/null && {ctr} info tree-view > /dev/null"
        ))
    })?;
    let looked = sh(&format!("$({ctr} mounts {at} tree-view)")).and_then(|_| {
        let looked = of(mounted.path());
        sh(&format!("umount {at}"))?;
        looked
    });
    sh(&format!("{ctr} rm tree-view"))?;
    looked
}
