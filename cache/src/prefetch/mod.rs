//! Prefetch: jobs that pull images ahead of need, and what a job's images are at.
//!
//! The ledger has the jobs; each that runs has a task here, which is begun anew with the service. It pulls so many images at
//! a time as the job says, through the same pulls as launchers, to whom they give way. What fails and may pass is tried again
//! until the job's deadline.

pub mod job;
pub mod warm;

use std::{
    collections::HashMap,
    num::NonZeroU64,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cowshed_leases::UnixMicros;
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, join_all},
};
use tokio::{
    sync::{Semaphore, watch},
    task::AbortHandle,
};

use crate::{
    admission::Admission,
    clock::Clock,
    drain::Drain,
    error::{Error, Reason, Result},
    image::{Access, Budget, Cache, ImageRef, Images, Platform, Progress, PullPolicy, ResolvedImage, Terms},
    kernel::Devices,
    ledger::Ledger,
    metrics::Metrics,
    reclaim::Wake,
    registry::Credential,
    tasks::Tasks,
};
use job::{Causes, End, Job, JobId, Plan, Stage};

/// Pause before an image is tried again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What fails for no reason of the image's or its registry's is tried so often.
const TRIES_MAX: u32 = 5;
/// Images that are pulled at a time, of all jobs.
const PULLS_MAX: usize = 16;
/// More room is not asked for, in percent.
const ROOM_MAX_PERCENT: u8 = 95;
/// How often it is looked whether a new pull may begin, when none may.
const ADMISSION_PAUSE: Duration = Duration::from_secs(1);
/// How often the warm set is looked at.
const WARM_LOOK: Duration = Duration::from_secs(5);
/// A clock that is set is noticed so soon.
const CLOCK_LOOK: Duration = Duration::from_secs(30);

/// How far a pull is.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// It is at this; `None`: it is not being pulled.
    pub progress: Option<Progress>,
    /// It gives way to others.
    pub gives_way: bool,
    /// How often it was tried, this time included; since the service has started.
    pub tries: u32,
    /// Why the last try has failed.
    pub error: Option<Error>,
    /// When the next one is, if the last has failed; in the past if its turn has not come.
    pub next_try: Option<UnixMicros>,
}

/// Who pulls; the seam where tests put a fake.
#[async_trait::async_trait]
pub trait Puller: Send + Sync {
    /// Pulls, and shows how far it is. Whoever drops this has no interest in it any more.
    async fn pull(
        &self,
        wanted: (&ImageRef, &Platform),
        access: &Access,
        terms: &Terms,
        show: &(dyn Fn(Progress, bool) + Send + Sync),
    ) -> Result<(ResolvedImage, Cache)>;
}

#[async_trait::async_trait]
impl Puller for Images {
    async fn pull(
        &self,
        (image, platform): (&ImageRef, &Platform),
        access: &Access,
        terms: &Terms,
        show: &(dyn Fn(Progress, bool) + Send + Sync),
    ) -> Result<(ResolvedImage, Cache)> {
        let (pull, interest) = self.prefetch(image, platform, access, terms);
        let mut progress = pull.progress();
        loop {
            let now = progress.borrow_and_update().clone();
            show(now, pull.gives_way());
            tokio::select! {
                changed = progress.changed() => if changed.is_err() { break },
                // Whether it gives way, nobody tells.
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
            }
        }
        let outcome = pull.outcome().await;
        drop(interest);
        outcome
    }
}

/// A job's credentials and pictures: what is not written down.
struct Live {
    credential: watch::Sender<Option<Credential>>,
    seen: Mutex<Vec<Seen>>,
    task: Mutex<Option<AbortHandle>>,
}

impl Live {
    fn see(&self, at: usize, change: impl FnOnce(&mut Seen)) {
        if let Some(seen) = self.seen.lock().unwrap_or_else(PoisonError::into_inner).get_mut(at) {
            change(seen);
        }
    }

    /// Why the registry was not heard of what the image's name means, if it was not.
    fn not_refreshed(&self, at: usize) -> Option<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(at)?.progress.as_ref()?.not_refreshed.clone()
    }

    /// Why the last tries have failed.
    fn causes(&self) -> Causes {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let cause = |(at, seen): (usize, &Seen)| Some((at, seen.error.as_ref()?.into()));
        seen.iter().enumerate().filter_map(cause).collect()
    }
}

/// A job, and what its images are at.
#[derive(Clone, Debug)]
pub struct Picture {
    /// As the ledger has it.
    pub job: Arc<Job>,
    /// Of each of its images.
    pub seen: Vec<Seen>,
    /// Whether it waits for credentials that were not written down.
    pub wants_credentials: bool,
}

/// Whether a pull may begin.
#[async_trait::async_trait]
pub trait Permit: Send + Sync {
    /// Refuses if none may.
    async fn admit(&self) -> Result<()>;
    /// Waits until those that have begun are to be given up.
    async fn withdrawn(&self);
}

/// What admits Acquires, when there is twice the room that they need.
pub struct Permits {
    /// Whether anything new is taken on.
    pub drain: Drain,
    /// Whether there is room.
    pub admission: Admission,
    /// Who knows.
    pub kernel: Devices,
}

#[async_trait::async_trait]
impl Permit for Permits {
    async fn admit(&self) -> Result<()> {
        self.drain.admit()?;
        let Admission { data_headroom_percent, metadata_headroom_percent, .. } = self.admission;
        let admission = Admission {
            data_headroom_percent: data_headroom_percent.saturating_mul(2).min(ROOM_MAX_PERCENT),
            metadata_headroom_percent: metadata_headroom_percent.saturating_mul(2).min(ROOM_MAX_PERCENT),
            ..self.admission.clone()
        };
        admission.admit(&self.kernel).await
    }

    async fn withdrawn(&self) {
        // The sender lives as long as the service.
        let mut changes = self.drain.changes();
        let _drains = changes.wait_for(|drains| *drains).await;
    }
}

/// Runs jobs. Clones share everything.
#[derive(Clone)]
pub struct Prefetcher(Arc<Inner>);

struct Inner {
    ledger: Ledger,
    puller: Arc<dyn Puller>,
    permit: Arc<dyn Permit>,
    clock: Clock,
    tasks: Tasks,
    wake: Wake,
    metrics: Metrics,
    pulls: Semaphore,
    warm_set_problems: Mutex<Vec<String>>,
    live: Mutex<HashMap<JobId, Arc<Live>>>,
}

impl Prefetcher {
    /// Of this ledger's jobs. Runs none yet.
    pub fn new(
        ledger: Ledger,
        puller: Arc<dyn Puller>,
        permit: Arc<dyn Permit>,
        clock: Clock,
        tasks: Tasks,
        wake: Wake,
        metrics: Metrics,
    ) -> Self {
        let (live, warm_set_problems) = (Mutex::default(), Mutex::default());
        let pulls = Semaphore::new(PULLS_MAX);
        Self(Arc::new(Inner {
            ledger,
            puller,
            permit,
            clock,
            tasks,
            wake,
            metrics,
            pulls,
            warm_set_problems,
            live,
        }))
    }

    /// Goes on with all jobs that have not ended.
    pub fn resume(&self) {
        let running: Vec<_> = self.0.ledger.read_jobs(|jobs| jobs.running().cloned().collect());
        for job in running {
            tracing::info!(job = %job.id, waiting = job.waiting().count(), "a prefetch job goes on");
            self.run(&job, None);
        }
    }

    /// Has the jobs follow the files of a directory, until the service stops; see [`warm`].
    pub async fn follow(&self, directory: PathBuf) {
        tokio::select! {
            () = self.follow_on(directory) => {}
            () = self.0.tasks.closing() => {}
        }
    }

    async fn follow_on(&self, directory: PathBuf) {
        let mut files = warm::Files::new();
        loop {
            let at = directory.clone();
            let read = tokio::task::spawn_blocking(move || warm::read(&at)).await;
            let problems = match read.map_err(std::io::Error::other).flatten() {
                Ok(read) => {
                    let problems = warm::problems(&directory, &read);
                    files = warm::as_it_was(files, read);
                    self.reconcile(&files).await;
                    problems
                }
                Err(error) => vec![format!("{}: {error}", directory.display())],
            };
            self.tell(problems);
            tokio::time::sleep(WARM_LOOK).await;
        }
    }

    /// What is wrong with the warm set: each once in the log, all of it in the status.
    fn tell(&self, problems: Vec<String>) {
        self.0.metrics.warm_set_errors(problems.len());
        let mut told = self.0.warm_set_problems.lock().unwrap_or_else(PoisonError::into_inner);
        for problem in problems.iter().filter(|problem| !told.contains(problem)) {
            tracing::error!(problem, "the warm set is wrong; what it said before goes on");
        }
        *told = problems;
    }

    /// What is wrong with the warm set, by its files' paths.
    pub fn warm_set_problems(&self) -> Vec<String> {
        self.0.warm_set_problems.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many jobs run.
    pub fn running(&self) -> usize {
        self.live().len()
    }

    async fn reconcile(&self, files: &warm::Files) {
        let now = self.0.clock.now().wall;
        for step in self.0.ledger.read_jobs(|jobs| warm::steps(files, jobs, now)) {
            let done = match step {
                warm::Step::Withdraw(id) => self.end(&id, End::Withdrawn).await,
                warm::Step::Create(id, plan) => self.create(id, plan, None).await.map(drop),
            };
            if let Err(error) = done {
                tracing::warn!(%error, "the jobs do not follow the warm set yet");
            }
        }
    }

    /// Creates a job and runs it; see `CreatePrefetch` in the API. One that is there is given the credentials.
    pub async fn create(&self, id: JobId, plan: Plan, credential: Option<Credential>) -> Result<Picture> {
        let this = self.clone();
        // In a task of its own: what is written is run, also if the caller goes away.
        finished(async move {
            let job = this.0.ledger.create_job(id, plan, this.0.clock.now().wall).await?;
            if job.ended.is_none() {
                this.run(&job, credential);
            }
            Ok(this.picture(job))
        })
        .await
    }

    /// Cancels a job; what it was pulling for nobody else is given up. One that has ended stays as it is.
    pub async fn cancel(&self, id: &JobId) -> Result<Picture> {
        self.end(id, End::Cancelled).await?;
        self.get(id)
    }

    /// One job.
    pub fn get(&self, id: &JobId) -> Result<Picture> {
        let job = self.0.ledger.read_jobs(|jobs| jobs.get(id).cloned());
        job.map(|job| self.picture(job)).ok_or_else(|| {
            let message = format!("there is no prefetch job {id}: `cowshed prefetches` lists them all");
            Error::new(Reason::PrefetchNotFound, message).with("job_id", id)
        })
    }

    /// At most so many jobs, by name, after this one.
    pub fn list(&self, after: Option<&JobId>, count: usize) -> Vec<Picture> {
        let jobs: Vec<_> = self.0.ledger.read_jobs(|jobs| jobs.after(after).take(count).cloned().collect());
        jobs.into_iter().map(|job| self.picture(job)).collect()
    }

    fn live(&self) -> std::sync::MutexGuard<'_, HashMap<JobId, Arc<Live>>> {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn picture(&self, job: Arc<Job>) -> Picture {
        let live = self.live().get(&job.id).cloned().filter(|_| job.ended.is_none());
        let Some(live) = live else {
            let seen = vec![Seen::default(); job.stages.len()];
            return Picture { job, seen, wants_credentials: false };
        };
        let seen = live.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let wants_credentials = job.plan.has_credentials && live.credential.borrow().is_none();
        Picture { job, seen, wants_credentials }
    }

    /// Runs it, unless it is run; gives it the credentials.
    fn run(&self, job: &Arc<Job>, credential: Option<Credential>) {
        let mut all = self.live();
        if let Some(live) = all.get(&job.id) {
            if credential.is_some() {
                live.credential.send_replace(credential);
            }
            return;
        }
        // It may have been cancelled meanwhile.
        let is_running = |jobs: &job::Jobs| jobs.get(&job.id).is_some_and(|job| job.ended.is_none());
        if !self.0.ledger.read_jobs(is_running) {
            return;
        }
        let live = Arc::new(Live {
            credential: watch::Sender::new(credential),
            seen: Mutex::new(vec![Seen::default(); job.stages.len()]),
            task: Mutex::default(),
        });
        all.insert(job.id.clone(), live.clone());
        self.0.metrics.prefetch_jobs(all.len());
        let (this, job_, live_) = (self.clone(), job.clone(), live.clone());
        let task = tokio::spawn(async move {
            // Also if it panics.
            let _running = Running { of: this.clone(), id: job_.id.clone(), live: live_.clone() };
            let end = this.work(&job_, &live_).await;
            tracing::info!(job = %job_.id, ?end, "a prefetch job has ended");
        });
        *live.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task.abort_handle());
    }

    fn forget(&self, id: &JobId, live: &Arc<Live>) {
        let mut all = self.live();
        if all.get(id).is_some_and(|other| Arc::ptr_eq(other, live)) {
            all.remove(id);
        }
        self.0.metrics.prefetch_jobs(all.len());
    }

    async fn end(&self, id: &JobId, how: End) -> Result<()> {
        let (this, id) = (self.clone(), id.clone());
        // As for `create`.
        finished(async move {
            let causes = this.live().get(&id).map(|live| live.causes()).unwrap_or_default();
            let ended = this.0.ledger.end_job(id.clone(), how, causes, this.0.clock.now().wall).await?;
            let live = ended.and_then(|_| this.live().get(&id).cloned());
            if let Some(live) = live {
                let task = live.task.lock().unwrap_or_else(PoisonError::into_inner).take();
                // What it has begun is dropped, and with it its interest in pulls.
                task.inspect(AbortHandle::abort);
                this.forget(&id, &live);
                tracing::info!(job = %id, ?how, "a prefetch job was ended");
            }
            Ok(())
        })
        .await
    }

    /// Until it has ended. Says how, if the job itself has brought it about.
    async fn work(&self, job: &Arc<Job>, live: &Live) -> Option<End> {
        let plan = &job.plan;
        let budget = plan.bytes_per_second.map(|rate: NonZeroU64| Arc::new(Budget::new(rate)));
        let terms = Terms { class: plan.class, budget, stays: false };
        // Held while one is pulled: those that are tried again later do not keep the others waiting.
        let turns = Semaphore::new(usize::try_from(plan.concurrency.get()).unwrap_or(1));
        let all = join_all(job.waiting().map(|at| self.fetch(job, live, at, (&terms, &turns)).boxed()));
        tokio::select! {
            _ = all => self.0.ledger.read_jobs(|jobs| jobs.get(&job.id)?.ended.map(|(how, _)| how)),
            () = self.late(job) => {
                let (ledger, clock, id) = (self.0.ledger.clone(), self.0.clock.clone(), job.id.clone());
                let causes = live.causes();
                persist(move || {
                    let (ledger, id, now) = (ledger.clone(), id.clone(), clock.now().wall);
                    let causes = causes.clone();
                    async move { ledger.end_job(id, End::Late, causes, now).await.map(drop) }.boxed()
                })
                .await;
                Some(End::Late)
            }
        }
    }

    /// Until the job is late.
    async fn late(&self, job: &Job) {
        let Some(late_at) = job.late_at() else { return std::future::pending().await };
        loop {
            let left = late_at.0.saturating_sub(self.0.clock.now().wall.0);
            let Ok(left @ 1..) = u64::try_from(left) else { return };
            tokio::time::sleep(Duration::from_micros(left).min(CLOCK_LOOK)).await;
        }
    }

    /// One image, until it is here, or is known not to be had.
    async fn fetch(&self, job: &Job, live: &Live, at: usize, (terms, turns): (&Terms, &Semaphore)) {
        let id = &job.id;
        let (mut pause, mut broken) = (FIRST_PAUSE, 0);
        let outcome = loop {
            match self.attempt(job, live, at, (terms, turns)).await {
                Err(error) if is_passing(error.reason(), &mut broken) => {
                    tracing::info!(job = %id, %error, "tried again");
                    let next_try = self.0.clock.now().wall.0.saturating_add(micros(pause));
                    live.see(at, |seen| {
                        seen.error = Some(error);
                        seen.next_try = Some(UnixMicros(next_try));
                    });
                }
                outcome => break outcome,
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        let now = self.0.clock.now();
        self.0.metrics.prefetched(outcome.as_ref().map(|(_, cache)| *cache));
        let stage = match outcome {
            Ok((image, cache)) => Stage::Here {
                manifest: image.manifest.to_string(),
                bytes: image.compressed_bytes,
                was_there: cache == Cache::Hit,
                not_refreshed: live.not_refreshed(at),
                removed: false,
                at: now.wall,
            },
            Err(error) => {
                tracing::warn!(job = %id, reason = error.reason().as_str(), %error, "an image was not prefetched");
                let (reason, message) = (error.reason().as_str().to_owned(), error.to_string());
                Stage::Failed { reason, message, at: now.wall }
            }
        };
        let (ledger, id) = (self.0.ledger.clone(), id.clone());
        persist(move || {
            let (ledger, id, stage) = (ledger.clone(), id.clone(), stage.clone());
            async move { ledger.settle_job(id, at, stage, now).await.map(drop) }.boxed()
        })
        .await;
    }

    async fn attempt(
        &self,
        job: &Job,
        live: &Live,
        at: usize,
        (terms, turns): (&Terms, &Semaphore),
    ) -> Result<(ResolvedImage, Cache)> {
        let plan = &job.plan;
        let (image, platform) = plan.images[at].parse()?;
        let mut credential = live.credential.subscribe();
        if plan.has_credentials {
            // The sender lives as long as the job's task.
            let _given = credential.wait_for(Option::is_some).await;
        }
        let closed = |_| Error::new(Reason::Stopping, "the service is stopping");
        let _turn = turns.acquire().await.map_err(closed)?;
        let _among_all = self.0.pulls.acquire().await.map_err(closed)?;
        while let Err(error) = self.0.permit.admit().await {
            live.see(at, |seen| seen.error = Some(error));
            tokio::time::sleep(ADMISSION_PAUSE).await;
        }
        // What is being pulled when the service stops is cut off as by a crash, and gone on with after the start.
        if self.0.tasks.is_closed() {
            return std::future::pending().await;
        }
        let credential = credential.borrow().clone();
        let access = Access { tenant: plan.tenant.clone(), credential, policy: PullPolicy::default() };
        live.see(at, |seen| {
            seen.tries += 1;
            seen.next_try = None;
        });
        let show = |progress, gives_way| {
            live.see(at, |seen| {
                seen.progress = Some(progress);
                seen.gives_way = gives_way;
            });
        };
        let outcome = tokio::select! {
            outcome = self.0.puller.pull((&image, &platform), &access, terms, &show) => outcome,
            () = self.0.permit.withdrawn() => {
                Err(Error::new(Reason::Draining, "the service is draining: it goes on when that is over"))
            }
        };
        live.see(at, |seen| seen.gives_way = false);
        if outcome.is_err() {
            live.see(at, |seen| seen.progress = None);
        }
        outcome
    }
}

fn micros(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX)
}

/// Writes, again and again if the ledger cannot be written.
async fn persist(write: impl Fn() -> BoxFuture<'static, Result<()>> + Send) {
    let mut pause = FIRST_PAUSE;
    while let Err(error) = write().await {
        if error.reason() == Reason::Stopping {
            return;
        }
        tracing::warn!(%error, "what has become of a prefetch job is written down later");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether it may pass by itself. What nobody has foreseen may, but for so often.
fn is_passing(reason: Reason, broken: &mut u32) -> bool {
    use tonic::Code::{Aborted, Internal, ResourceExhausted, Unavailable};
    match reason.code() {
        Unavailable | ResourceExhausted | Aborted => true,
        Internal => {
            *broken += 1;
            *broken < TRIES_MAX
        }
        _ => reason == Reason::ContainerdTimeout,
    }
}

/// Runs it to its end, also if whoever waits for that goes away.
async fn finished<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        let message =
            format!("it has run into a defect of cowshed's, its log says where ({error}); report it");
        Err(Error::new(Reason::InternalError, message))
    })
}

/// A job's task.
struct Running {
    of: Prefetcher,
    id: JobId,
    live: Arc<Live>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.of.forget(&self.id, &self.live);
        // What its pulls have left nobody waits for any more.
        self.of.0.wake.now();
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
