//! The gRPC API itself, where codes, details or streams matter.

use std::{collections::HashMap, path::Path, sync::OnceLock};

use cowshed_proto::v1::{self, cowshed_client::CowshedClient};
use tokio::runtime::Runtime;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;

use super::{
    Outcome,
    cowshed::{self, SOCKET},
};

/// Runs the future to its end.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    #[allow(clippy::expect_used, reason = "without threads there are no tests")]
    RUNTIME.get_or_init(|| Runtime::new().expect("a runtime")).block_on(future)
}

/// A connection to the service on a socket.
pub(crate) async fn channel(socket: &Path) -> Outcome<Channel> {
    Ok(cowshed::channel(socket).await?)
}

/// The host's service.
pub(crate) async fn client() -> Outcome<CowshedClient<Channel>> {
    Ok(CowshedClient::new(channel(Path::new(SOCKET)).await?))
}

pub(crate) fn acquire_request(vm: &str, image: &str) -> v1::AcquireRequest {
    let spec = v1::DiskSpec { image: image.to_owned(), platform: None, ..Default::default() };
    v1::AcquireRequest { vm_id: vm.to_owned(), spec: Some(spec), ..v1::AcquireRequest::default() }
}

pub(crate) fn pull_request(image: &str) -> v1::PullImageRequest {
    v1::PullImageRequest { image: image.to_owned(), ..v1::PullImageRequest::default() }
}

/// An error of the service, taken apart.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: Code,
    pub(crate) reason: String,
    pub(crate) domain: String,
    pub(crate) metadata: HashMap<String, String>,
    pub(crate) message: String,
}

/// Takes an error apart; a success fails the test.
pub(crate) fn refusal<T: std::fmt::Debug>(reply: Result<T, Status>) -> Outcome<Refusal> {
    let status = match reply {
        Ok(reply) => return Err(format!("it succeeded: {reply:?}").into()),
        Err(status) => status,
    };
    let info = status.get_details_error_info().ok_or_else(|| format!("no ErrorInfo in {status:?}"))?;
    Ok(Refusal {
        code: status.code(),
        reason: info.reason,
        domain: info.domain,
        metadata: info.metadata,
        message: status.message().to_owned(),
    })
}

/// What became of VMs that asked all at once: their leases, or why not.
pub(crate) async fn acquire_all(vms: &[String], image: &str) -> Vec<(String, Result<v1::Lease, Status>)> {
    let asked = vms.iter().map(|vm| async move {
        let unreachable = |e: libtest_mimic::Failed| Status::unavailable(e.message().unwrap_or_default());
        let reply = match client().await.map_err(unreachable) {
            Ok(mut client) => client.acquire(acquire_request(vm, image)).await,
            Err(status) => Err(status),
        };
        (vm.clone(), reply.map(|reply| reply.into_inner().lease.unwrap_or_default()))
    });
    futures_util::future::join_all(asked).await
}
