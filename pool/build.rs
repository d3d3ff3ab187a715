//! Generates the server side of containerd's Snapshots API over the message types of `containerd-client`, which has the
//! client's side only.

use tonic_build::manual::{Builder, Method, Service};

const MESSAGES: &str = "containerd_client::services::v1::snapshots";

fn method(name: &str, route: &str, request: &str, reply: &str) -> Method {
    let of = |message: &str| {
        if message == "()" { "crate::service::Empty".to_owned() } else { format!("{MESSAGES}::{message}") }
    };
    let method = Method::builder()
        .name(name)
        .route_name(route)
        .input_type(of(request))
        .output_type(of(reply))
        .codec_path("tonic_prost::ProstCodec");
    if route == "List" { method.server_streaming().build() } else { method.build() }
}

fn main() {
    let methods = [
        ("prepare", "Prepare", "PrepareSnapshotRequest", "PrepareSnapshotResponse"),
        ("view", "View", "ViewSnapshotRequest", "ViewSnapshotResponse"),
        ("mounts", "Mounts", "MountsRequest", "MountsResponse"),
        ("commit", "Commit", "CommitSnapshotRequest", "()"),
        ("remove", "Remove", "RemoveSnapshotRequest", "()"),
        ("stat", "Stat", "StatSnapshotRequest", "StatSnapshotResponse"),
        ("update", "Update", "UpdateSnapshotRequest", "UpdateSnapshotResponse"),
        ("list", "List", "ListSnapshotsRequest", "ListSnapshotsResponse"),
        ("usage", "Usage", "UsageRequest", "UsageResponse"),
        ("cleanup", "Cleanup", "CleanupRequest", "()"),
    ];
    let mut service = Service::builder().name("Snapshots").package("containerd.services.snapshots.v1");
    for (name, route, request, reply) in methods {
        service = service.method(method(name, route, request, reply));
    }
    Builder::new().build_client(false).compile(&[service.build()]);
}
