//! Device-mapper calls without a udev cookie. A file with unsafe code.
//!
//! With a cookie, each resume and removal has udevd start `dmsetup` twice and has the caller wait for it. A device of
//! ours needs none of that: its node is there when the kernel has made it, its link is made here, and a udev rule tells
//! udevd to leave it alone.
#![allow(unsafe_code)]

use std::{fs::File, io, os::fd::AsRawFd as _};

use nix::{errno::Errno, libc, request_code_none, request_code_readwrite};
use tokio::io::{Interest, unix::AsyncFd};

/// `struct dm_ioctl` (kernel: include/uapi/linux/dm-ioctl.h), version 4.
#[repr(C)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

const _: () = assert!(size_of::<Header>() == 312);

const DEV_REMOVE: u8 = 4;
const DEV_SUSPEND: u8 = 6;
const DEV_ARM_POLL: u8 = 16;

/// Removes the device `name`. EBUSY if it is open, ENXIO if it is not there.
pub(super) fn remove(control: &File, name: &str) -> Result<(), Errno> {
    call(control, DEV_REMOVE, name)
}

/// Puts the loaded table of `name` to use, and lets its I/O go.
pub(super) fn resume(control: &File, name: &str) -> Result<(), Errno> {
    call(control, DEV_SUSPEND, name)
}

/// From now on the control node is readable when the kernel has something new to tell.
pub(super) fn arm_poll(control: &File) -> Result<(), Errno> {
    call(control, DEV_ARM_POLL, "")
}

/// The control node, to be waited for.
pub(super) fn readable(control: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: the file is what is registered, owned by the result, and closed when that is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(control, Interest::READABLE) }?)
}

/// `BLKDISCARD`: the device forgets a range of its bytes (kernel: include/uapi/linux/fs.h).
pub(super) fn discard(device: &File, from: u64, bytes: u64) -> Result<(), Errno> {
    let range = [from, bytes];
    // SAFETY: the kernel reads two 64-bit numbers for this request, which live across the call, and `device` is open.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), request_code_none!(0x12, 119), range.as_ptr()) };
    Errno::result(done).map(drop)
}

fn call(control: &File, command: u8, name: &str) -> Result<(), Errno> {
    let mut header = Header {
        version: [4, 0, 0],
        data_size: 312,
        data_start: 312,
        target_count: 0,
        open_count: 0,
        flags: 0,
        event_nr: 0, // no cookie
        padding: 0,
        dev: 0,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
    };
    let bytes = name.as_bytes();
    if bytes.len() >= header.name.len() {
        return Err(Errno::ENAMETOOLONG);
    }
    header.name[..bytes.len()].copy_from_slice(bytes);
    let request = request_code_readwrite!(0xfd, command, size_of::<Header>());
    // SAFETY: `header` is the structure that the kernel expects for this request, lives across the call, is written
    // within its `data_size` only, and `control` is open.
    let done = unsafe { libc::ioctl(control.as_raw_fd(), request, &raw mut header) };
    Errno::result(done).map(drop)
}

/// The control node, opened.
pub(super) fn control() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/mapper/control")
}
