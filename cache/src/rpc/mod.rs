//! The gRPC service: parses requests, calls what does the work, and turns the outcome into replies.

mod audit;
mod changes;
mod convert;
mod drain;
mod gc;
mod keep_alive;
mod offer;
mod page;
mod parse;
mod prefetch;
mod pull;
mod usage;
mod verify;
mod watch;

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use cowshed_leases::{Generation, Lease, LeaseId, Release, Releasing, Revision};
use cowshed_proto::v1::{self, cowshed_server::Cowshed};
use tokio::sync;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    acquire::{Acquired, Acquirer, Wish},
    admission::Admission,
    audit::{Audited, Repair},
    containerd::Containerd,
    error::{Error, Reason, Result},
    evict::{self, Evictor},
    image::{ImageInfo, Images},
    keeping::{self, Keeper, Removed},
    kernel::Devices,
    ledger::Ledger,
    metrics::Metrics,
    offer::{Latencies, Shareable},
    prefetch::Prefetcher,
    reclaim::{Reclaimer, Waiting},
    spares::Spares,
    status::StatusSource,
    usage::Usage,
};

/// `cowshed.v1.Cowshed`.
pub struct Api {
    /// Acquire.
    pub acquirer: Arc<Acquirer>,
    /// Leases.
    pub ledger: Ledger,
    /// Images.
    pub images: Images,
    /// Which of them stay.
    pub keeper: Arc<Keeper>,
    /// Makes room.
    pub evictor: Arc<Evictor>,
    /// Whether there is room for another disk.
    pub admission: Admission,
    /// The pool.
    pub kernel: Devices,
    /// Compares, and mends.
    pub reclaimer: Arc<Reclaimer>,
    /// Prefetch jobs.
    pub prefetcher: Prefetcher,
    /// Where images change.
    pub containerd: Containerd,
    /// Whether streams are to end.
    pub stopped: sync::watch::Receiver<bool>,
    /// Status.
    pub status: Arc<StatusSource>,
    /// Why released disks are still there.
    pub waiting: Waiting,
    /// What is ready to be handed out.
    pub spares: Spares,
    /// How long Acquires have taken.
    pub latencies: Latencies,
    /// Whether disks can be shared.
    pub shareable: Shareable,
    /// Who takes how much of the pool.
    pub usage: Arc<Usage>,
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
            let until = parse::until(request.metadata());
            let (foreseen, outcome) = match parse::wish(request.into_inner()) {
                Ok(wish) => {
                    let (foreseen, mode) = (offer::foresee(self, &wish), wish.mode);
                    let outcome = self.acquirer.acquire(Wish { until, ..wish }).await;
                    self.shareable.note(mode, &outcome);
                    (foreseen, outcome)
                }
                Err(error) => (None, Err(error)),
            };
            let took = begun.elapsed();
            self.metrics.acquired(&outcome, took);
            offer::compare(&self.metrics, &self.latencies, foreseen, &outcome, took);
            Ok(self.acquired(&*outcome?, took))
        })
        .await
    }

    async fn offer(&self, request: Request<v1::OfferRequest>) -> Result<Response<v1::OfferResponse>, Status> {
        self.metered("Offer", async |_| offer::offer(self, request.into_inner()).await).await
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.metered("Release", async |_| {
            let outcome = self.release_now(request.into_inner()).await;
            self.metrics.released(outcome.as_ref().err());
            let Some(lease) = outcome? else { return Ok(v1::ReleaseResponse { lease: None }) };
            Ok(v1::ReleaseResponse { lease: Some(self.with_holders(&lease).await) })
        })
        .await
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::RenewResponse>, Status> {
        self.metered("Renew", async |_| {
            let request = request.into_inner();
            let id = parse::lease_id(&request.lease_id)?;
            let ttl = request.ttl.as_ref().map(parse::ttl).transpose()?;
            let lease = self.acquirer.renew(id, ttl).await?;
            Ok(v1::RenewResponse { lease: Some(self.lease(&lease)) })
        })
        .await
    }

    type KeepAliveStream = keep_alive::Stream;

    async fn keep_alive(
        &self,
        request: Request<Streaming<v1::KeepAliveRequest>>,
    ) -> Result<Response<Self::KeepAliveStream>, Status> {
        self.metered("KeepAlive", async |_| {
            Ok(keep_alive::stream(self.acquirer.clone(), request.into_inner(), self.stopped.clone()))
        })
        .await
    }

    async fn verify_device(
        &self,
        request: Request<v1::VerifyDeviceRequest>,
    ) -> Result<Response<v1::VerifyDeviceResponse>, Status> {
        self.metered("VerifyDevice", async |_| {
            let (differences, lease) = verify::verify(&self.acquirer, &request.into_inner()).await?;
            let verified = differences.is_empty();
            Ok(v1::VerifyDeviceResponse { verified, differences, lease: Some(self.lease(&lease)) })
        })
        .await
    }

    async fn audit(&self, request: Request<v1::AuditRequest>) -> Result<Response<v1::AuditResponse>, Status> {
        self.metered("Audit", async |_| {
            let audited = if request.into_inner().repair {
                self.repair().await?
            } else {
                self.reclaimer.audit(Repair::Nothing).await?
            };
            Ok(v1::AuditResponse { findings: audited.into_iter().map(audit::finding).collect() })
        })
        .await
    }

    type DrainStream = drain::Stream;

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<Self::DrainStream>, Status> {
        self.metered("Drain", async |_| {
            let v1::DrainRequest { undo, leases } = request.into_inner();
            self.acquirer.drain.set(!undo);
            let rest = drain::Rest {
                acquirer: self.acquirer.clone(),
                images: self.images.clone(),
                leases,
                once: undo,
            };
            Ok(drain::stream(rest, self.stopped.clone()))
        })
        .await
    }

    type WatchStream = watch::Stream;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.metered("Watch", async |_| {
            let source = watch::Source {
                ledger: self.ledger.clone(),
                images: self.images.clone(),
                containerd: self.containerd.clone(),
                clock: self.acquirer.clock.clone(),
                stopped: self.stopped.clone(),
            };
            Ok(watch::stream(source, request.into_inner().after_revision.map(Revision)))
        })
        .await
    }

    async fn get_lease(
        &self,
        request: Request<v1::GetLeaseRequest>,
    ) -> Result<Response<v1::GetLeaseResponse>, Status> {
        self.metered("GetLease", async |_| {
            let lease = self.find_lease(request.into_inner())?;
            Ok(v1::GetLeaseResponse { lease: Some(self.with_holders(&lease).await) })
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
        let (begun, until) = (Instant::now(), parse::until(request.metadata()));
        let v1::PullImageRequest { image, platform, tenant, credentials } = request.into_inner();
        let begin = async {
            let (image, platform) = (parse::image_reference(&image)?, parse::platform(platform.as_deref())?);
            let access = parse::access(&tenant, credentials)?;
            self.acquirer.drain.admit()?;
            evict::admit(&self.admission, &self.kernel, &*self.acquirer.room, until).await?;
            Ok::<_, Error>(self.images.pull(&image, &platform, &access))
        };
        match begin.await {
            Ok(pull) => {
                let says = pull::Says { ledger: self.ledger.clone(), clock: self.acquirer.clock.clone() };
                Ok(Response::new(pull::stream(pull, says, self.metrics.clone(), begun)))
            }
            Err(error) => {
                self.metrics.called("PullImage", error.reason().code(), begun.elapsed());
                Err(error.into())
            }
        }
    }

    async fn create_prefetch(
        &self,
        request: Request<v1::CreatePrefetchRequest>,
    ) -> Result<Response<v1::CreatePrefetchResponse>, Status> {
        self.metered("CreatePrefetch", async |_| {
            let (id, plan, credential) = prefetch::wanted(request.into_inner())?;
            self.acquirer.drain.admit()?;
            let job = self.prefetcher.create(id, plan, credential).await?;
            Ok(v1::CreatePrefetchResponse { job: Some(prefetch::message(job)) })
        })
        .await
    }

    async fn get_prefetch(
        &self,
        request: Request<v1::GetPrefetchRequest>,
    ) -> Result<Response<v1::GetPrefetchResponse>, Status> {
        self.metered("GetPrefetch", async |_| {
            let job = self.prefetcher.get(&prefetch::job_id(&request.into_inner().job_id)?)?;
            Ok(v1::GetPrefetchResponse { job: Some(prefetch::message(job)) })
        })
        .await
    }

    async fn list_prefetches(
        &self,
        request: Request<v1::ListPrefetchesRequest>,
    ) -> Result<Response<v1::ListPrefetchesResponse>, Status> {
        self.metered("ListPrefetches", async |_| prefetch::page(&self.prefetcher, &request.into_inner()))
            .await
    }

    async fn cancel_prefetch(
        &self,
        request: Request<v1::CancelPrefetchRequest>,
    ) -> Result<Response<v1::CancelPrefetchResponse>, Status> {
        self.metered("CancelPrefetch", async |_| {
            let job = self.prefetcher.cancel(&prefetch::job_id(&request.into_inner().job_id)?).await?;
            Ok(v1::CancelPrefetchResponse { job: Some(prefetch::message(job)) })
        })
        .await
    }

    type WatchPrefetchStream = prefetch::Stream;

    async fn watch_prefetch(
        &self,
        request: Request<v1::WatchPrefetchRequest>,
    ) -> Result<Response<Self::WatchPrefetchStream>, Status> {
        self.metered("WatchPrefetch", async |_| {
            let id = prefetch::job_id(&request.into_inner().job_id)?;
            self.prefetcher.get(&id)?;
            Ok(prefetch::stream(self.prefetcher.clone(), id, self.stopped.clone()))
        })
        .await
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        self.metered("ListImages", async |_| {
            let platform = request.into_inner().platform;
            let platform = platform.map(|platform| parse::platform(Some(&platform))).transpose()?;
            let images = self.images.list_on_disk(platform.as_ref()).await?;
            Ok(v1::ListImagesResponse { images: self.kept(images).collect() })
        })
        .await
    }

    async fn pin_image(
        &self,
        request: Request<v1::PinImageRequest>,
    ) -> Result<Response<v1::PinImageResponse>, Status> {
        self.metered("PinImage", async |_| {
            let v1::PinImageRequest { image, platform, hold_for, spares } = request.into_inner();
            let (image, platform) = (parse::image_reference(&image)?, parse::platform(platform.as_deref())?);
            let hold_for = hold_for.as_ref().map(parse::hold_for).transpose()?;
            let asked = spares.unwrap_or_default();
            let pinned = self.keeper.pin(&image, &platform, hold_for, asked).await?;
            let (spares, spares_limited) = self.acquirer.spares_pinned(&image, asked).await;
            Ok(v1::PinImageResponse { image: self.kept(vec![pinned]).next(), spares, spares_limited })
        })
        .await
    }

    async fn unpin_image(
        &self,
        request: Request<v1::UnpinImageRequest>,
    ) -> Result<Response<v1::UnpinImageResponse>, Status> {
        self.metered("UnpinImage", async |_| {
            let image = parse::image_reference(&request.into_inner().image)?;
            Ok(v1::UnpinImageResponse { was_pinned: self.keeper.unpin(&image).await? })
        })
        .await
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        self.metered("RemoveImage", async |_| {
            let image = parse::image_reference(&request.into_inner().image)?;
            let removed = self.keeper.remove(image).await?;
            Ok(v1::RemoveImageResponse {
                existed: removed != Removed::Nothing,
                untagged: removed == Removed::Name,
            })
        })
        .await
    }

    async fn plan_gc(
        &self,
        request: Request<v1::PlanGcRequest>,
    ) -> Result<Response<v1::PlanGcResponse>, Status> {
        self.metered("PlanGc", async |_| {
            let plan = self.evictor.plan(gc::trigger(request.into_inner().free_bytes)).await?;
            Ok(v1::PlanGcResponse { report: Some(gc::planned(&plan)) })
        })
        .await
    }

    async fn run_gc(
        &self,
        request: Request<v1::RunGcRequest>,
    ) -> Result<Response<v1::RunGcResponse>, Status> {
        self.metered("RunGc", async |_| {
            let ran = self.evictor.run_on_request(gc::trigger(request.into_inner().free_bytes)).await?;
            Ok(v1::RunGcResponse { report: Some(gc::ran(&ran)) })
        })
        .await
    }

    async fn get_usage(
        &self,
        request: Request<v1::GetUsageRequest>,
    ) -> Result<Response<v1::GetUsageResponse>, Status> {
        self.metered("GetUsage", async |_| usage::usage(&self.usage, &request.into_inner()).await).await
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
            spare: done.spare,
        }
    }

    /// A lease of this very name is released; one that the VM got since is not. `None`: nothing is left of it.
    async fn release_now(&self, request: v1::ReleaseRequest) -> Result<Option<Lease>> {
        let ask = Release {
            vm: parse::vm_id(&request.vm_id)?,
            lease: request.lease_id.as_deref().map(parse::lease_id).transpose()?,
            generation: request.generation.map(Generation),
            request: request.request_id.as_deref().map(parse::request_id).transpose()?,
            abandon: request.abandon,
        };
        let lease = match self.acquirer.release(ask).await? {
            Releasing::Nothing => return Ok(None),
            Releasing::Again(lease) | Releasing::Now(lease) => *lease,
        };
        if !request.wait {
            return Ok(Some(lease));
        }
        self.wait_gone(&lease.id).await.map(|()| None)
    }

    /// Until the lease is forgotten, which comes after its disk is gone. The caller's deadline bounds it.
    async fn wait_gone(&self, id: &LeaseId) -> Result<()> {
        let (mut changes, mut stopped) = (self.ledger.changes(), self.stopped.clone());
        loop {
            changes.borrow_and_update();
            if self.ledger.read(|book| book.get(id).is_none()) {
                return Ok(());
            }
            tokio::select! {
                changed = changes.changed() => changed.map_err(|_| stopping())?,
                () = until_stopped(&mut stopped) => return Err(stopping()),
            }
        }
    }

    fn find_lease(&self, request: v1::GetLeaseRequest) -> Result<Lease> {
        use v1::get_lease_request::By;
        let missing = |what: String| Error::new(Reason::LeaseNotFound, format!("there is no lease {what}"));
        match request.by {
            Some(By::VmId(vm)) => {
                let vm = parse::vm_id(&vm)?;
                self.ledger
                    .read(|book| book.of_vm(&vm).cloned())
                    .ok_or_else(|| missing(format!("of VM {vm}")))
            }
            Some(By::LeaseId(id)) => {
                let id = parse::lease_id(&id)?;
                self.ledger.read(|book| book.get(&id).cloned()).ok_or_else(|| missing(id.to_string()))
            }
            None => Err(Error::new(Reason::LeaseIdInvalid, "by is missing: give vm_id or lease_id")
                .with("field", "by")),
        }
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
            (request.shared || lease.vm.is_vm())
                && (request.states.is_empty()
                    || request.states.contains(&i32::from(convert::state(&lease.state))))
        };
        let now = self.acquirer.clock.now();
        let mut page = self
            .ledger
            .read(|book| page::of(book.after(after.as_ref()).filter(wanted), request.page_size, &now));
        // After the ledger was let go of, so that nobody holds the one while waiting for the other.
        let waiting = self.waiting.read().unwrap_or_else(PoisonError::into_inner);
        for (id, lease) in page.ids.iter().zip(&mut page.reply.leases) {
            lease.waiting_for = waiting.get(id).cloned();
        }
        Ok(page.reply)
    }

    fn lease(&self, lease: &Lease) -> v1::Lease {
        let waiting = self.waiting.read().unwrap_or_else(PoisonError::into_inner).get(&lease.id).cloned();
        convert::lease(lease, waiting, &self.acquirer.clock.now())
    }

    /// The images, with what the ledger knows of them.
    fn kept(&self, images: Vec<ImageInfo>) -> impl Iterator<Item = v1::Image> + use<> {
        let spares = self.spares.clone();
        let kept = keeping::kept(&self.ledger, images, &self.acquirer.clock.now());
        kept.into_iter().map(move |(image, kept)| {
            let manifest = image.manifest_digest.as_deref().and_then(|digest| digest.parse().ok());
            let count = manifest.map(|manifest| spares.count(&manifest)).unwrap_or_default();
            v1::Image { spares: count.ready, spares_wanted: count.wanted, ..convert::image((image, kept)) }
        })
    }

    /// In a task of its own: what is mended is mended to its end, also if the caller goes away.
    async fn repair(&self) -> Result<Vec<Audited>> {
        let (done, outcome) = sync::oneshot::channel();
        let reclaimer = self.reclaimer.clone();
        self.acquirer.tasks.spawn(async move {
            // The caller may have gone.
            let _gone = done.send(reclaimer.audit(Repair::Everything).await);
        });
        outcome.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// The same, with who has its device open.
    async fn with_holders(&self, lease: &Lease) -> v1::Lease {
        let mut shown = self.lease(lease);
        // Who has open what is shared is said of that.
        let Some(device) = lease.own_device() else { return shown };
        if let Ok(Some(1..)) = self.kernel.open_count(&device.dm_name).await
            && let Ok(holders) = self.kernel.holders(&device.path).await
        {
            shown.holders = holders.into_iter().map(convert::holder).collect();
        }
        shown
    }
}

/// The sender lives as long as the service: its end is a stop as well.
async fn until_stopped(stopped: &mut sync::watch::Receiver<bool>) {
    let _stopped = stopped.wait_for(|stopped| *stopped).await;
}

fn stopping() -> Error {
    Error::new(Reason::Stopping, "the service is stopping; call again when it is up")
}
