//! What runs in the child: one command of LVM2's, by liblvm2cmd. A file with unsafe code, for the library is C's.
//!
//! The library is looked for when it is needed: whoever has no LVM2 can still start. It keeps global state, locks its
//! process's memory, prints, and may wait for ever; here all of that ends with the process.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, c_char, c_int, c_void},
    io::Write as _,
    os::unix::process::CommandExt as _,
    process::Command,
};

use nix::{libc, unistd::alarm};

/// Its name since 2018; Debian has it in liblvm2cmd2.03, without which there is no lvm2 there.
const LIBRARY: &std::ffi::CStr = c"liblvm2cmd.so.2.03";
const RUN: &std::ffi::CStr = c"lvm2_run";
/// `LVM2_COMMAND_SUCCEEDED` (lvm2: tools/lvm2cmd.h).
const SUCCEEDED: c_int = 1;
/// The exit status if there is no LVM2 on the host. LVM2's own are 2 to 5.
pub(super) const NO_LVM: u8 = 127;
/// The same if the arguments cannot be told to it.
const UNSPEAKABLE: u8 = 126;

/// `int lvm2_run(void *handle, const char *cmdline)`: makes a handle of its own if it is given none.
type Run = unsafe extern "C" fn(*mut c_void, *const c_char) -> c_int;

/// Runs `arguments`, the first of which is the command, and returns the exit status. Whatever happens, the kernel ends this
/// process after `limit_seconds`, also if nobody is left who waits for it.
pub fn run(limit_seconds: u32, arguments: &[String]) -> u8 {
    let _none_before = alarm::set(limit_seconds.max(1));
    let line = match command_line(arguments) {
        Ok(line) => line,
        Err(what) => return refuse(&what, UNSPEAKABLE),
    };
    let Some(run) = find() else {
        // Becomes the program instead, which is the same code.
        let error = Command::new("lvm").args(arguments).exec();
        return refuse(&format!("there is neither liblvm2cmd nor the program lvm: {error}"), NO_LVM);
    };
    // SAFETY: `run` is the library's function of this signature, the string ends with a zero and lives across the call, and
    // no other thread is in the library.
    let status = unsafe { run(std::ptr::null_mut(), line.as_ptr()) };
    if status == SUCCEEDED { 0 } else { u8::try_from(status).ok().filter(|s| *s > 0).unwrap_or(1) }
}

fn find() -> Option<Run> {
    // SAFETY: both names end with a zero; the library is never closed, so what is found in it stays.
    let found = unsafe {
        let library = libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW);
        if library.is_null() {
            return None;
        }
        libc::dlsym(library, RUN.as_ptr())
    };
    // SAFETY: a function of this name has this signature in every version of the library.
    (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Run>(found) })
}

fn refuse(what: &str, status: u8) -> u8 {
    let _gone = writeln!(std::io::stderr(), "  {what}");
    status
}

/// As the library splits it: at spaces, but for what stands in quotes.
fn command_line(arguments: &[String]) -> Result<CString, String> {
    let unspeakable = |word: &String| word.contains(['\'', '\0', '\n']) || word.is_empty();
    if let Some(word) = arguments.iter().find(|word| unspeakable(word)) {
        return Err(format!("LVM2 cannot be told {word:?}"));
    }
    let quoted: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
    CString::new(quoted.join(" ")).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::command_line;

    #[test]
    fn every_word_stays_one() {
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let line = command_line(&words(&["lvs", "--config", "global/x=[ \"-q\" ]"])).unwrap();
        assert_eq!(line.to_str(), Ok("'lvs' '--config' 'global/x=[ \"-q\" ]'"));
        for bad in ["a'b", "", "a\nb", "a\0b"] {
            assert!(command_line(&words(&["lvs", bad])).unwrap_err().contains(&format!("{bad:?}")));
        }
    }
}
