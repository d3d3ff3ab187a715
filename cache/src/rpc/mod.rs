//! The gRPC service: parses requests, calls what does the work, and turns the outcome into replies.

mod convert;
mod page;
mod pull;

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use cowshed_leases::{Lease, LeaseId, VmId};
use cowshed_proto::v1::{self, cowshed_server::Cowshed};
use tonic::{Code, Request, Response, Status};

use crate::{
    acquire::{Acquired, Acquirer, Wish},
    admission::Admission,
    error::{Error, Reason, Result},
    image::{ImageRef, Images, Platform},
    kernel::Devices,
    ledger::Ledger,
    metrics::Metrics,
    reclaim::Waiting,
    status::StatusSource,
};

/// `cowshed.v1.Cowshed`.
pub struct Api {
    /// Acquire.
    pub acquirer: Arc<Acquirer>,
    /// Leases.
    pub ledger: Ledger,
    /// Images.
    pub images: Images,
    /// Whether there is room for another pull.
    pub admission: Admission,
    /// The pool.
    pub kernel: Devices,
    /// Status.
    pub status: Arc<StatusSource>,
    /// Why released disks are still there.
    pub waiting: Waiting,
    /// Counts calls.
    pub metrics: Metrics,
}

#[tonic::async_trait]
impl Cowshed for Api {
    async fn acquire(
        &self,
        request: Request<v1::AcquireRequest>,
    ) -> Result<Response<v1::AcquireResponse>, Status> {
        self.metered("Acquire", async |begun: Instant| {
            let outcome = match wish(request.into_inner()) {
                Ok(wish) => self.acquirer.acquire(wish).await,
                Err(error) => Err(error),
            };
            let took = begun.elapsed();
            self.metrics.acquired(&outcome, took);
            Ok(self.acquired(&*outcome?, took))
        })
        .await
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.metered("Release", async |_| {
            let outcome = self.release_now(request.into_inner()).await;
            self.metrics.released(outcome.as_ref().err());
            Ok(v1::ReleaseResponse { lease: outcome?.map(|lease| self.lease(&lease)) })
        })
        .await
    }

    async fn get_lease(
        &self,
        request: Request<v1::GetLeaseRequest>,
    ) -> Result<Response<v1::GetLeaseResponse>, Status> {
        self.metered("GetLease", async |_| {
            Ok(v1::GetLeaseResponse { lease: Some(self.find_lease(request.into_inner())?) })
        })
        .await
    }

    async fn list_leases(
        &self,
        request: Request<v1::ListLeasesRequest>,
    ) -> Result<Response<v1::ListLeasesResponse>, Status> {
        self.metered("ListLeases", async |_| self.page(&request.into_inner())).await
    }

    type PullImageStream = pull::Stream;

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<Self::PullImageStream>, Status> {
        let begun = Instant::now();
        let v1::PullImageRequest { image, platform } = request.into_inner();
        let begin = async {
            let (image, platform) = (image_reference(&image)?, self::platform(platform.as_deref())?);
            self.admission.admit(&self.kernel).await?;
            Ok::<_, Error>(self.images.pull(&image, &platform))
        };
        match begin.await {
            Ok(pull) => Ok(Response::new(pull::stream(pull, self.metrics.clone(), begun))),
            Err(error) => {
                self.metrics.called("PullImage", error.reason().code(), begun.elapsed());
                Err(error.into())
            }
        }
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        self.metered("ListImages", async |_| {
            let platform = platform(request.into_inner().platform.as_deref())?;
            let images = self.images.list(&platform).await?;
            Ok(v1::ListImagesResponse { images: images.into_iter().map(convert::image).collect() })
        })
        .await
    }

    async fn get_status(
        &self,
        _request: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Status> {
        self.metered("GetStatus", async |_| Ok(self.status.look().await)).await
    }
}

impl Api {
    async fn metered<T>(
        &self,
        method: &'static str,
        work: impl AsyncFnOnce(Instant) -> Result<T>,
    ) -> Result<Response<T>, Status> {
        let begun = Instant::now();
        let outcome = work(begun).await;
        let code = outcome.as_ref().err().map_or(Code::Ok, |error| error.reason().code());
        self.metrics.called(method, code, begun.elapsed());
        outcome.map(Response::new).map_err(Status::from)
    }

    fn acquired(&self, done: &Acquired, took: Duration) -> v1::AcquireResponse {
        v1::AcquireResponse {
            lease: Some(self.lease(&done.lease)),
            cache: convert::cache(done.cache).into(),
            stages: done.stages.iter().map(convert::stage).collect(),
            total_micros: convert::micros(took),
            existing: done.existing,
        }
    }

    /// A lease of this very name is released; one that the VM got since is not.
    async fn release_now(&self, request: v1::ReleaseRequest) -> Result<Option<Lease>> {
        let vm = vm_id(&request.vm_id)?;
        let only = request.lease_id.as_deref().map(lease_id).transpose()?;
        self.acquirer.release(&vm, only).await
    }

    fn find_lease(&self, request: v1::GetLeaseRequest) -> Result<v1::Lease> {
        use v1::get_lease_request::By;
        let missing = |what: String| Error::new(Reason::LeaseNotFound, format!("there is no lease {what}"));
        let found = match request.by {
            Some(By::VmId(vm)) => {
                let vm = vm_id(&vm)?;
                self.ledger
                    .read(|book| book.of_vm(&vm).cloned())
                    .ok_or_else(|| missing(format!("of VM {vm}")))
            }
            Some(By::LeaseId(id)) => {
                let id = lease_id(&id)?;
                self.ledger.read(|book| book.get(&id).cloned()).ok_or_else(|| missing(id.to_string()))
            }
            None => Err(Error::new(Reason::LeaseIdInvalid, "by is missing: give vm_id or lease_id")
                .with("field", "by")),
        };
        Ok(self.lease(&found?))
    }

    fn page(&self, request: &v1::ListLeasesRequest) -> Result<v1::ListLeasesResponse> {
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(token.parse::<LeaseId>().map_err(|_| {
                let message =
                    format!("page_token {token:?} is none of ours: use next_page_token of the page before");
                Error::new(Reason::PageTokenInvalid, message).with("field", "page_token")
            })?),
        };
        let wanted = |lease: &&Lease| {
            request.states.is_empty() || request.states.contains(&i32::from(convert::state(&lease.state)))
        };
        let mut page =
            self.ledger.read(|book| page::of(book.after(after.as_ref()).filter(wanted), request.page_size));
        // After the ledger was let go of, so that nobody holds the one while waiting for the other.
        let waiting = self.waiting.read().unwrap_or_else(PoisonError::into_inner);
        for (id, lease) in page.ids.iter().zip(&mut page.reply.leases) {
            lease.waiting_for = waiting.get(id).cloned();
        }
        Ok(page.reply)
    }

    fn lease(&self, lease: &Lease) -> v1::Lease {
        let waiting = self.waiting.read().unwrap_or_else(PoisonError::into_inner).get(&lease.id).cloned();
        convert::lease(lease, waiting)
    }
}

fn wish(request: v1::AcquireRequest) -> Result<Wish> {
    let vm = vm_id(&request.vm_id)?;
    let spec = request.spec.unwrap_or_default();
    Ok(Wish { vm, image: image_reference(&spec.image)?, platform: platform(spec.platform.as_deref())? })
}

fn vm_id(text: &str) -> Result<VmId> {
    text.parse().map_err(|error| {
        let shown: String = text.chars().take(140).collect();
        Error::new(Reason::VmIdInvalid, format!("vm_id {shown:?} is no VM id: {error}"))
            .with("field", "vm_id")
    })
}

fn lease_id(text: &str) -> Result<LeaseId> {
    text.parse().map_err(|error| {
        let shown: String = text.chars().take(140).collect();
        Error::new(Reason::LeaseIdInvalid, format!("lease_id {shown:?} is no lease id: {error}"))
            .with("field", "lease_id")
    })
}

fn image_reference(text: &str) -> Result<ImageRef> {
    ImageRef::parse(text).map_err(|error| error.with("field", "image"))
}

fn platform(text: Option<&str>) -> Result<Platform> {
    match text {
        None | Some("") => Ok(Platform::host()),
        Some(text) => Platform::parse(text).map_err(|error| error.with("field", "platform")),
    }
}
