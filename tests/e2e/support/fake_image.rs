//! Images made up on the spot, for registries that misbehave.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use sha2::{Digest as _, Sha256};

use super::{Outcome, check};

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// An image of one layer.
#[derive(Clone)]
pub(crate) struct FakeImage {
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) layer: Vec<u8>,
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

impl FakeImage {
    /// With a file of `size` bytes that do not compress; `seed` makes it unlike all others.
    pub(crate) fn new(seed: u64, size: usize) -> Outcome<Self> {
        let tar = tar("etc/noise", &noise(seed, size));
        Ok(Self::of(gzip(&tar)?, &digest(&tar)))
    }

    /// With this layer, and what the configuration says of it.
    pub(crate) fn of(layer: Vec<u8>, diff_id: &str) -> Self {
        Self::saying(layer, diff_id, "amd64", r#"{"Cmd":["/bin/sh"]}"#)
    }

    /// The same, for this architecture and with this process configuration.
    pub(crate) fn saying(layer: Vec<u8>, diff_id: &str, architecture: &str, process: &str) -> Self {
        let config = format!(
            r#"{{"architecture":"{architecture}","os":"linux","config":{process},"rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#
        )
        .into_bytes();
        let manifest = format!(
            concat!(
                r#"{{"schemaVersion":2,"mediaType":"{}","#,
                r#""config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},"#,
                r#""layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{}","size":{}}}]}}"#
            ),
            MANIFEST,
            digest(&config),
            config.len(),
            digest(&layer),
            layer.len()
        )
        .into_bytes();
        Self { manifest, config, layer }
    }
}

/// An archive with one file.
pub(crate) fn tar(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0_u8; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000644");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{:011o}", content.len()));
    put(136, "00000000000");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\u{0}00");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\u{0} ").as_bytes());
    let padding = content.len().next_multiple_of(512) - content.len();
    [&header, content, &vec![0; padding + 1024]].concat()
}

pub(crate) fn gzip(bytes: &[u8]) -> Outcome<Vec<u8>> {
    let mut child =
        Command::new("gzip").args(["-n", "-1"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().ok_or("gzip has no stdin")?;
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output()?;
    check!(output.status.success() && writer.join().is_ok_and(|w| w.is_ok()), "gzip failed");
    Ok(output.stdout)
}

/// Bytes that do not compress (xorshift).
pub(crate) fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(size).collect()
}
