//! Generates the API's code and its descriptor set (which reflection serves).

use std::{env, io, path::PathBuf};

fn main() -> io::Result<()> {
    let descriptors = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("cowshed.v1.bin");
    tonic_prost_build::configure()
        .file_descriptor_set_path(descriptors)
        .compile_protos(&["proto/cowshed/v1/cowshed.proto"], &["proto"])
}
