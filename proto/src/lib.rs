//! The public API of Cowshed, and nothing else: the messages and services of `cowshed.v1`.
//!
//! The documentation of every message and field is in `proto/cowshed/v1/cowshed.proto`.

/// Version 1 of the API. Field numbers are kept for ever; additions are optional fields.
#[allow(missing_docs)]
pub mod v1 {
    tonic::include_proto!("cowshed.v1");

    /// The encoded `FileDescriptorSet` of this package, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("cowshed.v1");
}
