//! Acquire: from a wish to a granted, verified disk.
//!
//! ```text
//!  parse ─► held already? ─► image? ─► admit ─► (pull) ─► intent ─► containerd lease ─► Prepare ─► verify ─► confirm
//!               │              │                            └── any failure from here on: mark, reclaim ──┘
//!               │              └─► a spare of it ─► verify ─► the ledger makes it the VM's
//!               └─► the same lease again
//! ```
//!
//! The work runs in a task of its own: a caller that goes away stops nothing, and one that asks again meanwhile joins.
//! A release ends that: it gives up what is under way, whatever it has come to.

use std::sync::Arc;

use cowshed_gc::{
    evict::Bytes,
    reserve::{self, Asked, Claim, Policy},
};
use cowshed_leases::{
    Acquisition, Ask, BookError, DeviceIdentity, Failure, Grant, Lease, LeaseId, Mode, Release, Releasing,
    RequestId, Scratch, Seen, Share, Spare, Spec, Ttl, VmId,
};
use tokio::time::Instant;
use tracing::Instrument as _;

use crate::{
    admission::Admission,
    clock::Clock,
    containerd::Snapshots,
    crowd::Crowd,
    disks::in_name_of,
    drain::Drain,
    error::{Error, Reason, Result},
    evict::{MakesRoom, admit},
    flights::{Arrival, Flights, GivenUp, Landing},
    image::{Access, Cache, ImageCache, ImageRef, Platform, PullPolicy, ResolvedImage},
    kernel::{Devices, KernelError, PoolUsage},
    ledger::{HandedOut, Ledger},
    making::{Maker, Making, Wishes},
    promises::{self, Promises, Ticket},
    reclaim::Wake,
    spares::Spares,
    stages::{Stage, Stages},
    tasks::Tasks,
};

/// What a launcher wants, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// For which VM.
    pub vm: VmId,
    /// Of which image.
    pub image: ImageRef,
    /// For which platform.
    pub platform: Platform,
    /// Whose VM it is, and what is asked of the image's registry.
    pub access: Access,
    /// What the VM may do with the image's disk.
    pub mode: Mode,
    /// What it wants beside that.
    pub scratch: Option<Scratch>,
    /// For how long.
    pub ttl: Option<Ttl>,
    /// Whether a Suspect lease's disk is not wanted any more.
    pub fresh: bool,
    /// The client's name for it.
    pub request: Option<RequestId>,
    /// Room for it is waited for until then; without it, for as long as it takes.
    pub until: Option<Instant>,
}

impl Wish {
    fn ask(&self, expects: Bytes) -> Ask {
        Ask {
            vm: self.vm.clone(),
            spec: Spec {
                image: self.image.to_string(),
                platform: self.platform.to_string(),
                tenant: self.access.tenant.clone(),
                mode: self.mode,
                scratch: self.scratch,
            },
            ttl: self.ttl,
            fresh: self.fresh,
            expects: expects.0,
            request: self.request.clone(),
            share: None,
            spare: None,
        }
    }

    /// What is due to its lease: a disk that the VM writes to is expected to have what disks of its image mostly have in the end.
    pub(crate) fn claim(&self, promises: &Promises, limits: &Policy) -> Claim {
        let tenant = self.access.tenant.clone();
        let expected = match (self.mode, self.scratch) {
            (Mode::CopyOnWrite, _) => promises.expects(limits, &tenant, &self.image.to_string()),
            (Mode::SharedReadOnly, scratch) => {
                limits.expected.min(Bytes(scratch.map_or(0, |scratch| scratch.size_bytes)))
            }
        };
        Claim { tenant, expected }
    }

    /// Whether a spare would do.
    pub(crate) fn is_plain(&self) -> bool {
        self.mode == Mode::CopyOnWrite && self.scratch.is_none()
    }

    /// Wishes of one key share a flight. What else they ask for is added to what it comes to. Whose credential it is matters not:
    /// what a VM of the tenant has got, it is granted again without any.
    fn key(&self) -> (VmId, String) {
        let Self { image, platform, access, mode, scratch, fresh, .. } = self;
        let Access { tenant, policy, credential: _ } = access;
        (self.vm.clone(), format!("{image} {platform} {tenant} {policy:?} {mode:?} {scratch:?} {fresh}"))
    }
}

/// A wish come true.
#[derive(Clone, Debug)]
pub struct Acquired {
    /// The lease, granted.
    pub lease: Lease,
    /// Whether the image was there.
    pub cache: Cache,
    /// Where the time went.
    pub stages: Stages,
    /// Whether the VM held the lease before.
    pub existing: bool,
    /// Whether the disk was a spare.
    pub spare: bool,
}

type Outcome = Result<Arc<Acquired>, Refusal>;

/// A wish that did not come true.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    error: Error,
    /// The lease that has failed by it, until its caller was told.
    failed: Option<LeaseId>,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self { error, failed: None }
    }
}

/// A spare's device is what it was.
struct Looked<T> {
    at: std::time::Instant,
    /// What handing it out has come to, which it has mostly done by now.
    handed: T,
}

/// A spare that cannot be handed out.
#[derive(Debug)]
enum Unfit {
    /// What has become of it is not known, or it is no disk.
    Unseen(KernelError),
    /// It is this by now.
    #[expect(dead_code, reason = "for the log")]
    Other(DeviceIdentity),
}

/// Whether a caller's flight is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seat {
    Own,
    Joined,
}

/// Grants disks.
pub struct Acquirer {
    /// Who holds what.
    pub ledger: Ledger,
    /// The images.
    pub images: Arc<dyn ImageCache>,
    /// The snapshots.
    pub snapshots: Arc<dyn Snapshots>,
    /// The devices.
    pub kernel: Devices,
    /// Whether there is room.
    pub admission: Admission,
    /// Makes it.
    pub room: Arc<dyn MakesRoom>,
    /// Whether anything new is taken on.
    pub drain: Drain,
    /// To be woken when there is something to clear away.
    pub wake: Wake,
    /// What is being made, for the reclaimer.
    pub making: Making,
    /// Of what disks are asked, for who makes room.
    pub wishes: Wishes,
    /// What time it is.
    pub clock: Clock,
    /// Where the work runs.
    pub tasks: Tasks,
    /// Work under way, so that equal wishes share it.
    pub(crate) flights: Flights<Outcome>,
    /// Who makes a disk, and who waits.
    pub crowd: Crowd,
    /// What is ready to be handed out.
    pub spares: Spares,
    /// Looks at what is shared, and its making.
    pub(crate) sharing: Flights<Result<Grant>>,
}

impl Acquirer {
    /// Grants the wish, or says why not; see `Acquire` in the API.
    pub async fn acquire(self: &Arc<Self>, wish: Wish) -> Result<Arc<Acquired>> {
        let stopped = || Error::new(Reason::Stopping, "the service is stopping; acquire again when it is up");
        let (arrival, seat) = self.join(wish.clone());
        match arrival.await.map_err(|_| stopped())? {
            Ok(acquired) if seat == Seat::Joined => self.add(&wish, acquired).await,
            Ok(acquired) => Ok(acquired),
            Err(Refusal { error, failed }) => {
                // This caller is here to be told.
                if let Some(id) = failed
                    && let Err(second) = self.ledger.see(id.clone(), self.clock.now()).await
                {
                    tracing::warn!(lease = %id, error = %second, "that its failure was told cannot be written down");
                }
                Err(error)
            }
        }
    }

    /// Adds to what an equal wish has come to what this one asks for besides.
    async fn add(&self, wish: &Wish, acquired: Arc<Acquired>) -> Result<Arc<Acquired>> {
        let Some(grant) = acquired.lease.grant() else { return Ok(acquired) };
        let scratch = grant.scratch.as_ref().map(|scratch| scratch.device.clone());
        let (id, seen) = (acquired.lease.id.clone(), Seen { root: grant.device.clone(), scratch });
        let lease = self.ledger.keep(wish.ask(Bytes(0)), id, seen, self.clock.now()).await?;
        Ok(Arc::new(Acquired { lease, ..Acquired::clone(&acquired) }))
    }

    /// How many are under way.
    pub fn under_way(&self) -> usize {
        // What was given up is off the map, and its maker may be at work still.
        let making = self.making.now();
        let of_vms =
            |id: &&LeaseId| self.ledger.read(|book| book.get(id).is_some_and(|lease| lease.vm.is_vm()));
        self.flights.count().max(making.iter().filter(of_vms).count())
    }

    /// Whether disks of VMs are being made, from the image on.
    pub(crate) fn are_disks_being_made(&self) -> bool {
        let making = self.making.now();
        !making.is_empty()
            && self.ledger.read(|book| making.iter().any(|id| book.get(id).is_some_and(|l| !l.vm.is_spare())))
    }

    /// Gives back what `ask` says.
    pub async fn release(&self, ask: Release) -> Result<Releasing> {
        let named = ask.lease.is_some() || ask.generation.is_some();
        let repeated =
            ask.request.as_ref().is_some_and(|id| self.ledger.read(|book| book.request(id).is_some()));
        if !named && !repeated {
            self.flights.give_up(&ask.vm);
        }
        let (vm, abandon) = (ask.vm.clone(), ask.abandon);
        let released = self.ledger.release(ask, self.clock.now()).await?;
        self.wake.now();
        if let Releasing::Now(lease) = &released {
            // One that began meanwhile may have found the lease as it was.
            self.flights.close(&vm);
            if abandon {
                tracing::warn!(%vm, lease = %lease.id, "given up by an operator");
            } else {
                tracing::info!(%vm, lease = %lease.id, "released");
            }
        }
        Ok(released)
    }

    /// Lets a lease hold for its time from now on, if its device still is what was granted.
    pub async fn renew(&self, id: LeaseId, ttl: Option<Ttl>) -> Result<Lease> {
        let lease = self.ledger.read(|book| book.get(&id).cloned());
        if lease.as_ref().is_some_and(|lease| lease.vm.is_spare()) {
            // Nobody has it.
            return Err(BookError::Gone(id).into());
        }
        let seen = match &lease {
            Some(lease) if lease.is_held() && lease.grant().is_some() => Some(self.seen(lease).await?),
            // Why not is the book's to say.
            _ => None,
        };
        self.ledger.renew(id, ttl, seen, self.clock.now()).await
    }

    fn join(self: &Arc<Self>, wish: Wish) -> (Arrival<Outcome>, Seat) {
        let mut seat = Seat::Joined;
        let arrival = self.flights.join(wish.key(), |landing| {
            seat = Seat::Own;
            let span =
                tracing::info_span!("acquire", vm = %wish.vm, image = %wish.image, lease = tracing::field::Empty);
            let this = Arc::clone(self);
            let work = async move {
                let outcome = this.run_for(&wish, &landing).await.map(Arc::new);
                let told = outcome.clone();
                landing.land(outcome);
                // The caller's answer goes first.
                tokio::task::yield_now().await;
                log(&told);
            };
            self.tasks.spawn(work.instrument(span));
        });
        (arrival, seat)
    }

    /// Until there is nobody who waits for it, or it is done.
    async fn run_for(self: &Arc<Self>, wish: &Wish, landing: &Landing<Outcome>) -> Result<Acquired, Refusal> {
        loop {
            if let Some(acquired) = self.run(wish, landing).await? {
                return Ok(acquired);
            }
            if !landing.is_awaited() {
                let message = format!("nobody waits for the disk of VM {} any more; acquire again", wish.vm);
                return Err(Error::new(Reason::NotReady, message).with("vm_id", &wish.vm).into());
            }
        }
    }

    /// `None`: nobody waits for it, so that the disk was not made, or is a spare.
    async fn run(
        self: &Arc<Self>,
        wish: &Wish,
        landing: &Landing<Outcome>,
    ) -> Result<Option<Acquired>, Refusal> {
        let given_up = landing.given_up();
        let mut stages = Stages::start();
        let claim = wish.claim(self.ledger.promises(), &self.admission.limits);
        let ask = wish.ask(claim.expected);
        let fresh = || LeaseId::from_random(uuid::Uuid::new_v4().as_u128());
        let known =
            self.ledger.read(|book| book.acquire(&ask, fresh(), &self.clock.now())).map_err(Error::from)?;
        if let Acquisition::Existing(lease) = known {
            return Ok(Some(self.existing(ask, *lease, stages).await?));
        }
        let _wished = self.wishes.begin(wish.image.to_string());
        self.drain.admit()?;
        self.within_quota(wish, &claim)?;
        if self.admission.admit_lately(&self.kernel).await.is_err() {
            self.admit(wish).await?;
        }
        let found = self.images.resolve(&wish.image, &wish.platform, &wish.access).await?;
        stages.done(Stage::Resolve);
        if let Some(image) = found.as_ref().filter(|_| wish.is_plain())
            && let Some(lease) = self.hand_out(wish, (&ask, &claim), image, &given_up, &mut stages).await?
        {
            self.spares.asked(image);
            tracing::Span::current().record("lease", lease.id.as_str());
            return Ok(Some(Acquired { lease, cache: Cache::Hit, stages, existing: false, spare: true }));
        }
        self.admit(wish).await?;
        // Before anything that takes its time: who does not fit is told at once.
        let id = fresh();
        let ticket = self.promise(wish, id.clone(), &claim, &mut stages).await?;
        let (image, cache) = match found {
            Some(image) => (image, Cache::Hit),
            None => self.pulled(wish, &mut stages).await?,
        };
        let lane = (wish.access.tenant.to_string(), image.manifest.to_string());
        let Some((mut seat, waited)) = self.crowd.enter(lane, landing.callers(), wish.until).await? else {
            return Ok(None);
        };
        if waited {
            stages.done(Stage::Queue);
            if !landing.is_awaited() {
                return Ok(None);
            }
        }
        let maker = self.making.begin(id.clone());
        let share = match wish.mode {
            Mode::CopyOnWrite => None,
            Mode::SharedReadOnly => Some(Share { image: in_name_of(&image)?, fresh: fresh() }),
        };
        // Whoever makes it: it has a maker from before its intent on.
        let _shared = share.as_ref().map(|share| self.making.begin(share.fresh.clone()));
        let ask = Ask { share, ..ask };
        let lease = match self.ledger.acquire(ask.clone(), id, self.clock.now(), given_up).await? {
            Acquisition::Existing(lease) => return Ok(Some(self.existing(ask, *lease, stages).await?)),
            Acquisition::New { lease, .. } => *lease,
        };
        ticket.keep();
        stages.done(Stage::Intent);
        tracing::Span::current().record("lease", lease.id.as_str());
        let plain = wish.is_plain().then(|| image.clone());
        let made = self.make(wish, &lease, image, &mut stages, || landing.is_awaited()).await;
        match made.inspect(|_| seat.made()) {
            Ok(lease) if lease.vm.is_spare() => {
                tracing::info!("nobody waits for it any more: it is a spare");
                let manifest = lease.grant().and_then(|grant| grant.image_digest.parse().ok());
                manifest.into_iter().for_each(|manifest| self.spares.put(&manifest, lease.id.clone()));
                Ok(None)
            }
            Ok(lease) => {
                plain.iter().for_each(|image| self.spares.asked(image));
                Ok(Some(Acquired { lease, cache, stages, existing: false, spare: false }))
            }
            Err(error) => Err(self.give_up(&lease.id, maker, error).await),
        }
    }

    async fn admit(&self, wish: &Wish) -> Result<()> {
        admit(&self.admission, &self.kernel, &*self.room, wish.until).await
    }

    /// Refuses at once what its tenant's quota does not let through; what counts is the promise.
    fn within_quota(&self, wish: &Wish, claim: &Claim) -> Result<()> {
        let (promises, limits) = (self.ledger.promises(), &*self.admission.limits);
        let instead_of = self.held_by(wish).filter(|_| wish.fresh);
        let asked = Asked { claim, instead_of: instead_of.as_ref(), free: None };
        promises.would(limits, &asked).map_err(|refusal| self.over_limit(&refusal))
    }

    fn held_by(&self, wish: &Wish) -> Option<LeaseId> {
        self.ledger.read(|book| book.held_by(&wish.vm).map(|lease| lease.id.clone()))
    }

    fn over_limit(&self, refusal: &reserve::Refusal) -> Error {
        let vm_of = |id: &LeaseId| self.ledger.read(|book| book.get(id).map(|lease| lease.vm.to_string()));
        promises::refused(refusal, &self.admission.limits, self.ledger.promises(), vm_of)
    }

    /// Promises the wish's lease, of this id, its room; where the pool has promised what it has, more is made first, and waited
    /// for.
    async fn promise(&self, wish: &Wish, id: LeaseId, claim: &Claim, stages: &mut Stages) -> Result<Ticket> {
        let Self { ledger, kernel, admission, room, .. } = self;
        let (promises, limits) = (ledger.promises(), &*admission.limits);
        promises.get_ready(limits, wish.until).await?;
        let instead_of = self.held_by(wish).filter(|_| wish.fresh);
        let ask = |pool: Result<PoolUsage, KernelError>| {
            let free = match pool {
                Ok(pool) => Some(admission.to_promise(&pool)),
                // What is free is not promised by who does not know it.
                Err(error) if limits.overcommit_percent.is_some() => {
                    return Err(crate::admission::unknown(&error));
                }
                Err(_) => None,
            };
            let asked = Asked { claim, instead_of: instead_of.as_ref(), free };
            Ok(promises.promise(limits, id.clone(), &asked))
        };
        let mut asked = ask(kernel.pool_lately().await)?;
        if matches!(asked, Err(reserve::Refusal::Pool { .. })) {
            // Nobody is refused for what is over.
            asked = ask(kernel.pool().await)?;
        }
        // Who waits with others may find that they have taken what was made, and asks for more; until there is none.
        while let Err(refusal @ reserve::Refusal::Pool { needed, .. }) = &asked {
            room.make(self.over_limit(refusal), *needed, wish.until).await?;
            stages.done(Stage::Queue);
            asked = ask(kernel.pool().await)?;
        }
        asked.map_err(|refusal| self.over_limit(&refusal))
    }

    /// The VM's own lease again, if its device still is what was granted.
    async fn existing(&self, ask: Ask, lease: Lease, mut stages: Stages) -> Result<Acquired> {
        let seen = self.seen(&lease).await?;
        let lease = self.ledger.keep(ask, lease.id, seen, self.clock.now()).await?;
        stages.done(Stage::Ledger);
        Ok(Acquired { lease, cache: Cache::Hit, stages, existing: true, spare: false })
    }

    /// A spare, if there is one. It is looked at before it is anybody's: whoever gets it need not wonder. `None` also if the VM
    /// has got a lease meanwhile.
    async fn hand_out(
        &self,
        wish: &Wish,
        (ask, claim): (&Ask, &Claim),
        image: &ResolvedImage,
        given_up: &GivenUp,
        stages: &mut Stages,
    ) -> Result<Option<Lease>> {
        while let Some(spare) = self.spares.take(&image.manifest) {
            let id = spare.lease().clone();
            let granted =
                self.ledger.read(|book| book.get(&id).and_then(|l| l.grant().map(|g| g.device.clone())));
            let Some(granted) = granted else {
                spare.gone();
                continue;
            };
            let ticket = self.promise(wish, id.clone(), claim, stages).await?;
            let look = self.look_and_hand_out(id.clone(), granted, image, ask, given_up);
            let handed = match look.await {
                Ok(Looked { at, handed }) => {
                    stages.done_at(Stage::Verify, at);
                    handed.await?
                }
                // It may be there in a moment: it is looked at again, by whoever has the time.
                Err(Unfit::Unseen(KernelError::Missing(_))) => {
                    // What is promised goes by the lease: nobody may get that before.
                    drop(ticket);
                    spare.gone();
                    self.spares.look_again();
                    continue;
                }
                Err(Unfit::Unseen(
                    error @ (KernelError::Slow { .. } | KernelError::Refused { .. } | KernelError::NoPool(_)),
                )) => {
                    tracing::warn!(lease = %id, %error, "whether a spare is well cannot be told");
                    return Ok(None);
                }
                Err(unfit) => {
                    tracing::warn!(lease = %id, ?unfit, "a spare is not what it was; it is given up");
                    drop(ticket);
                    spare.gone();
                    self.ledger.drop_spares(vec![id], self.clock.now()).await?;
                    self.wake.now();
                    continue;
                }
            };
            stages.done(Stage::Spare);
            match handed {
                HandedOut::Lease(lease) => {
                    ticket.keep();
                    spare.gone();
                    return Ok(Some(*lease));
                }
                HandedOut::NoSpare => {
                    let now = self.clock.now();
                    if self.ledger.read(|book| book.get(&id).is_some_and(|lease| lease.is_ready_spare(&now)))
                    {
                        // It does not fit this wish, and no other one does.
                        return Ok(None);
                    }
                    // Somebody has dropped it.
                    drop(ticket);
                    spare.gone();
                }
                HandedOut::Held => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Looks at the spare's device, and if it is what was `granted`, has the ledger make it the VM's, in the same turn.
    async fn look_and_hand_out(
        &self,
        id: LeaseId,
        granted: DeviceIdentity,
        image: &ResolvedImage,
        ask: &Ask,
        given_up: &GivenUp,
    ) -> Result<Looked<impl Future<Output = Result<HandedOut>> + use<>>, Unfit> {
        let (ledger, clock, given_up) = (self.ledger.clone(), self.clock.clone(), given_up.clone());
        let (image_digest, ask, path) = (image.manifest.to_string(), ask.clone(), granted.path.clone());
        let hand_out = move |seen: Result<DeviceIdentity, KernelError>| {
            let root = seen.map_err(Unfit::Unseen)?;
            if granted.differs_from(&root).is_some() || root.read_only {
                return Err(Unfit::Other(root));
            }
            let at = std::time::Instant::now();
            let spare = Spare { lease: id, image_digest, seen: Seen { root, scratch: None } };
            let ask = Ask { spare: Some(spare), ..ask };
            Ok(Looked { at, handed: ledger.hand_out_here(ask, clock.now(), given_up) })
        };
        self.kernel.inspect_then(&path, hand_out).await.map_err(Unfit::Unseen)?
    }

    /// The image, which was not there a moment ago.
    async fn pulled(&self, wish: &Wish, stages: &mut Stages) -> Result<(ResolvedImage, Cache)> {
        let Wish { image, platform, access, .. } = wish;
        let (image, cache) = self.images.ensure(image, platform, access).await?;
        stages.done(Stage::Pull);
        // This caller has waited for a pull, whoever had begun it. Unless it was to see that there is nothing to pull.
        Ok((image, if access.policy == PullPolicy::Always { cache } else { Cache::Miss }))
    }

    /// Leaves nothing behind: marks the lease, and the reclaimer clears away whatever was made of it. If it cannot be
    /// marked, the reclaimer does that too, as soon as it finds it without a maker.
    async fn give_up(&self, id: &LeaseId, maker: Maker, error: Error) -> Refusal {
        let marked = self.ledger.fail(id.clone(), Failure::from(&error), self.clock.now()).await;
        drop(maker);
        self.wake.now();
        let error = match marked {
            Ok(_) => error,
            Err(second) => {
                error.context(format!("(and lease {id} could not be marked for removal: {second})"))
            }
        };
        Refusal { error, failed: Some(id.clone()) }
    }
}

fn log(outcome: &Outcome) {
    match outcome {
        Ok(done) if done.existing => tracing::debug!(lease = %done.lease.id, "held already"),
        Ok(done) => {
            tracing::info!(cache = done.cache.as_str(), spare = done.spare, stages = %done.stages, "granted");
        }
        Err(Refusal { error, .. }) => tracing::warn!(reason = error.reason().as_str(), %error, "refused"),
    }
}

#[cfg(test)]
#[path = "acquire_tests.rs"]
mod tests;
