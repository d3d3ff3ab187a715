//! A job: what it is to do, how far it is, and what may become of it. No effects; the ledger has it, the runner works on it.
//!
//! ```text
//!  image:  Waiting ─► Here | Failed
//!  job:    Running ─► Ended: Done (all are here) | Incomplete (some have failed) | Cancelled | Withdrawn | Late
//! ```
//!
//! What has ended never changes, and is remembered for a while: what a job has fetched is not the next to go, until it was
//! removed all the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    num::{NonZeroU32, NonZeroU64},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use cowshed_leases::{Tenant, Ttl, UnixMicros, VmId, VmIdError};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Reason, Result},
    image::{Class, ImageRef, Platform},
};

/// So many images a job may have.
pub const IMAGES_MAX: usize = 1000;
/// So many of a job's images may be pulled at a time.
pub const CONCURRENCY_MAX: u32 = 64;
/// So many jobs may run.
const RUNNING_MAX: usize = 1000;
/// So many that have ended are remembered, the latest.
const REMEMBERED: usize = 1000;
/// So many images all that run may have, and all jobs: each is some hundred bytes in memory and in the ledger.
const RUNNING_IMAGES_MAX: usize = 10_000;
const REMEMBERED_IMAGES: usize = 20_000;

/// A job's name: made of what VM ids are made of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

impl JobId {
    /// Of a job whose creator has not named it.
    pub fn from_random(bits: u128) -> Self {
        Self(format!("{bits:032x}"))
    }
}

impl FromStr for JobId {
    type Err = VmIdError;

    fn from_str(text: &str) -> Result<Self, VmIdError> {
        text.parse::<VmId>().map(|id| Self(id.into()))
    }
}

impl TryFrom<String> for JobId {
    type Error = VmIdError;

    fn try_from(text: String) -> Result<Self, VmIdError> {
        text.parse()
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An image that is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Wanted {
    /// Its full reference.
    pub image: String,
    /// os/architecture[/variant].
    pub platform: String,
}

impl Wanted {
    /// Parsed, as it was when the job was created.
    pub(crate) fn parse(&self) -> Result<(ImageRef, Platform)> {
        Ok((ImageRef::parse(&self.image)?, Platform::parse(&self.platform)?))
    }
}

/// The first that is there twice.
pub(crate) fn twice(images: &[Wanted]) -> Option<&Wanted> {
    let mut seen = std::collections::HashSet::new();
    images.iter().find(|wanted| !seen.insert(*wanted))
}

/// What a job is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Which images.
    pub images: Vec<Wanted>,
    /// To whom they give way.
    pub class: Class,
    /// How many bytes a second they may take; `None`: all there are.
    pub bytes_per_second: Option<NonZeroU64>,
    /// How many are pulled at a time.
    pub concurrency: NonZeroU32,
    /// It ends after so long.
    pub deadline: Option<Ttl>,
    /// Each is pinned for so long when it is here.
    pub pin_for: Option<Ttl>,
    /// So many spares of each are kept as long as that pin holds.
    #[serde(default)]
    pub spares: u32,
    /// Whose they are.
    pub tenant: Tenant,
    /// Whether its creator has given credentials, which are not written down.
    pub has_credentials: bool,
}

impl Plan {
    /// What differs from another, by the names of the API's fields; empty if nothing does.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let differs = [
            ("images", self.images != other.images),
            ("class", self.class != other.class),
            ("bytes_per_second", self.bytes_per_second != other.bytes_per_second),
            ("concurrency", self.concurrency != other.concurrency),
            ("deadline", self.deadline != other.deadline),
            ("pin_for", self.pin_for != other.pin_for),
            ("spares", self.spares != other.spares),
            ("tenant", self.tenant != other.tenant),
            ("credentials", self.has_credentials != other.has_credentials),
        ];
        differs.into_iter().filter_map(|(field, differs)| differs.then_some(field)).collect()
    }
}

/// What has become of one of its images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// It is not here, as far as the job knows.
    Waiting,
    /// Fetched and unpacked, or found so.
    Here {
        /// Digest of its manifest.
        manifest: String,
        /// Sum of its layers, compressed.
        bytes: u64,
        /// Whether nothing had to be fetched or unpacked.
        was_there: bool,
        /// Why its registry was not heard of what the name means, so that what was here was taken.
        #[serde(default)]
        not_refreshed: Option<String>,
        /// Whether it was removed since: what comes back by that name is not what was fetched for later.
        #[serde(default)]
        removed: bool,
        /// When.
        at: UnixMicros,
    },
    /// Not to be had.
    Failed {
        /// The error's reason.
        reason: String,
        /// Its message.
        message: String,
        /// When.
        at: UnixMicros,
    },
}

/// How a job has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// All images are here.
    Done,
    /// Some are not to be had.
    Incomplete,
    /// By its creator's wish.
    Cancelled,
    /// The file that it was of says something else by now, or is gone.
    Withdrawn,
    /// Its deadline came first.
    Late,
}

/// Why an image was not had yet when the job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// The last try's error's reason.
    pub reason: String,
    /// Its message.
    pub message: String,
}

impl From<&Error> for Cause {
    fn from(error: &Error) -> Self {
        Self { reason: error.reason().as_str().to_owned(), message: error.to_string() }
    }
}

/// By the images' places in the plan.
pub type Causes = BTreeMap<usize, Cause>;

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its name.
    pub id: JobId,
    /// What it is to do.
    pub plan: Plan,
    /// When it was created.
    pub created_at: UnixMicros,
    /// How and when it has ended; `None`: it runs.
    pub ended: Option<(End, UnixMicros)>,
    /// Of each of the plan's images.
    pub stages: Vec<Stage>,
    /// Of those that still wait, though it has ended, as far as they were tried.
    #[serde(default, skip_serializing_if = "Causes::is_empty")]
    pub causes: Causes,
}

impl Job {
    /// A new one.
    pub fn begin(id: JobId, plan: Plan, now: UnixMicros) -> Self {
        let stages = vec![Stage::Waiting; plan.images.len()];
        Self { id, plan, created_at: now, ended: None, stages, causes: Causes::new() }
    }

    /// When it is late; by the wall clock, for it has to outlive boots.
    pub fn late_at(&self) -> Option<UnixMicros> {
        let micros = i64::try_from(self.plan.deadline?.micros()).unwrap_or(i64::MAX);
        Some(UnixMicros(self.created_at.0.saturating_add(micros)))
    }

    /// The images that are still to be had.
    pub fn waiting(&self) -> impl Iterator<Item = usize> + use<'_> {
        let is_waiting = |(at, stage): (usize, &Stage)| (*stage == Stage::Waiting).then_some(at);
        self.stages.iter().enumerate().filter_map(is_waiting)
    }

    /// What has become of one of its images. The last of them ends the job.
    fn settle(&self, at: usize, stage: Stage, now: UnixMicros) -> Option<Self> {
        if self.ended.is_some() || self.stages.get(at) != Some(&Stage::Waiting) {
            return None;
        }
        let mut job = self.clone();
        job.stages[at] = stage;
        if job.waiting().next().is_none() {
            let failed = job.stages.iter().any(|stage| matches!(stage, Stage::Failed { .. }));
            job.ended = Some((if failed { End::Incomplete } else { End::Done }, now));
        }
        Some(job)
    }

    fn end(&self, how: End, mut causes: Causes, now: UnixMicros) -> Option<Self> {
        causes.retain(|at, _| self.stages.get(*at) == Some(&Stage::Waiting));
        self.ended.is_none().then(|| Self { ended: Some((how, now)), causes, ..self.clone() })
    }

    /// Whether what was read can have been written. A name that is no image's is found out when it is pulled: no job may keep
    /// the ledger from being used.
    fn check(&self) -> Result<(), String> {
        if self.stages.len() == self.plan.images.len() && !self.stages.is_empty() {
            return Ok(());
        }
        Err(format!("{} images and {} outcomes", self.plan.images.len(), self.stages.len()))
    }
}

/// All jobs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Jobs(BTreeMap<JobId, Arc<Job>>);

/// A job is this from now on; `None`: it is forgotten.
pub(crate) type Change = (JobId, Option<Arc<Job>>);

impl Jobs {
    /// Those that were read.
    pub(crate) fn load(jobs: Vec<Job>) -> Result<Self, String> {
        jobs.iter().try_for_each(|job| job.check().map_err(|error| format!("job {}: {error}", job.id)))?;
        Ok(Self(jobs.into_iter().map(|job| (job.id.clone(), Arc::new(job))).collect()))
    }

    /// One.
    pub fn get(&self, id: &JobId) -> Option<&Arc<Job>> {
        self.0.get(id)
    }

    /// All, by name, from after this one on.
    pub fn after(&self, id: Option<&JobId>) -> impl Iterator<Item = &Arc<Job>> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.0.range((id.map_or(Unbounded, Excluded), Unbounded)).map(|(_, job)| job)
    }

    /// Those that run.
    pub fn running(&self) -> impl Iterator<Item = &Arc<Job>> {
        self.0.values().filter(|job| job.ended.is_none())
    }

    /// Names of the images that jobs still wait for.
    pub fn awaited(&self) -> BTreeSet<&str> {
        self.running().flat_map(|job| job.waiting().map(|at| job.plan.images[at].image.as_str())).collect()
    }

    /// What jobs have fetched for who comes for it: its name, its manifest, and until when it is kept for him, if that is for so
    /// long.
    pub(crate) fn fetched(&self, kept_for: Duration) -> impl Iterator<Item = (&str, &str, UnixMicros)> {
        let kept_for = i64::try_from(kept_for.as_micros()).unwrap_or(i64::MAX);
        // What nobody wants any more nobody comes for.
        let counts = |job: &&Arc<Job>| !matches!(job.ended, Some((End::Cancelled | End::Withdrawn, _)));
        let all = self.0.values().filter(counts).flat_map(|job| job.plan.images.iter().zip(&job.stages));
        all.filter_map(move |(wanted, stage)| match stage {
            Stage::Here { removed: true, .. } => None,
            Stage::Here { manifest, at, .. } => {
                let until = UnixMicros(at.0.saturating_add(kept_for));
                Some((wanted.image.as_str(), manifest.as_str(), until))
            }
            Stage::Waiting | Stage::Failed { .. } => None,
        })
    }

    /// The images of these names are gone since: what was fetched is not for later any more.
    pub(crate) fn forget(&self, names: &BTreeSet<String>, since: UnixMicros) -> Vec<Change> {
        let forget = |job: &Arc<Job>| {
            let mut job = Job::clone(job);
            let mut is_other = false;
            for (wanted, stage) in job.plan.images.iter().zip(&mut job.stages) {
                if let Stage::Here { removed, at, .. } = stage
                    && *at <= since
                    && names.contains(&wanted.image)
                {
                    is_other |= !std::mem::replace(removed, true);
                }
            }
            is_other.then(|| Arc::new(job))
        };
        let is_about = |job: &&Arc<Job>| job.plan.images.iter().any(|wanted| names.contains(&wanted.image));
        let changed = self.0.values().filter(is_about).filter_map(forget);
        changed.map(|job| (job.id.clone(), Some(job))).collect()
    }

    /// A new job, or the one of this name, if it is to do the same.
    pub(crate) fn create(&self, id: JobId, plan: Plan, now: UnixMicros) -> Result<(Arc<Job>, Vec<Change>)> {
        if let Some(job) = self.get(&id) {
            let differences = plan.differences(&job.plan);
            if differences.is_empty() {
                return Ok((job.clone(), Vec::new()));
            }
            let differences = differences.join(", ");
            let message = format!(
                "there is a prefetch job {id} already, which differs in {differences}: give this one another name (job_id, --name)"
            );
            return Err(Error::new(Reason::SpecConflict, message)
                .with("job_id", &id)
                .with("differences", differences));
        }
        let images = self.running().map(|job| job.stages.len()).sum::<usize>() + plan.images.len();
        if self.running().count() >= RUNNING_MAX || images > RUNNING_IMAGES_MAX {
            let message = format!(
                "{RUNNING_MAX} prefetch jobs are running, or have {RUNNING_IMAGES_MAX} images with this one: wait for some of \
                 them, or cancel them, then create this one"
            );
            return Err(Error::new(Reason::NotReady, message));
        }
        let job = Arc::new(Job::begin(id.clone(), plan, now));
        let mut changes = vec![(id, Some(job.clone()))];
        let mut ended: Vec<_> =
            self.0.values().filter_map(|job| job.ended.map(|(_, at)| (at, job))).collect();
        // The latest first.
        ended.sort_by(|a, b| (b.0, &b.1.id).cmp(&(a.0, &a.1.id)));
        let mut room = REMEMBERED_IMAGES.saturating_sub(images);
        let mut is_forgotten = |at: usize, job: &Job| {
            room = room.saturating_sub(job.stages.len());
            at + 1 >= REMEMBERED || room == 0
        };
        let forgotten = ended.iter().enumerate().filter(|(at, (_, job))| is_forgotten(*at, job));
        changes.extend(forgotten.map(|(_, (_, job))| (job.id.clone(), None)));
        Ok((job, changes))
    }

    /// What has become of one of a job's images; `None` if it was known already, or the job has ended.
    pub(crate) fn settle(&self, id: &JobId, at: usize, stage: Stage, now: UnixMicros) -> Option<Arc<Job>> {
        self.get(id)?.settle(at, stage, now).map(Arc::new)
    }

    /// Ends a job; `None` if there is none that runs. `causes` are the last tries' errors.
    pub(crate) fn end(&self, id: &JobId, how: End, causes: Causes, now: UnixMicros) -> Option<Arc<Job>> {
        self.get(id)?.end(how, causes, now).map(Arc::new)
    }

    /// Makes the change; gives back the one that takes it back.
    pub(crate) fn apply(&mut self, (id, job): Change) -> Change {
        let before = match job {
            Some(job) => self.0.insert(id.clone(), job),
            None => self.0.remove(&id),
        };
        (id, before)
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub(crate) fn plan(images: &[&str]) -> Plan {
        let wanted = |image: &&str| Wanted { image: (*image).to_owned(), platform: "linux/amd64".to_owned() };
        Plan {
            images: images.iter().map(wanted).collect(),
            class: Class::Background,
            bytes_per_second: None,
            concurrency: NonZeroU32::MIN,
            deadline: None,
            pin_for: None,
            spares: 0,
            tenant: Tenant::default(),
            has_credentials: false,
        }
    }

    #[test]
    fn a_job_of_an_earlier_version_is_read() {
        let job = Job::begin(id("j"), plan(&["r/a:1"]), UnixMicros(0));
        let text = serde_json::to_string(&job).unwrap();
        assert!(!text.contains("causes"), "as it was before: {text}");
        assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), job);
        // As it was before `not_refreshed` and `removed`.
        let before = r#"{"Here":{"manifest":"sha256:0","bytes":1,"was_there":false,"at":5}}"#;
        assert_eq!(serde_json::from_str::<Stage>(before).unwrap(), here(5));
        let text = text.replace(r#""Waiting""#, before);
        assert_eq!(serde_json::from_str::<Job>(&text).unwrap().stages, [here(5)]);
        let causes = Causes::from([(0, Cause { reason: "X".to_owned(), message: "x".to_owned() })]);
        let late = job.end(End::Late, causes, UnixMicros(1)).unwrap();
        let text = serde_json::to_string(&late).unwrap();
        assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), late);
    }

    fn id(text: &str) -> JobId {
        text.parse().unwrap()
    }

    fn here(at: i64) -> Stage {
        Stage::Here {
            manifest: "sha256:0".to_owned(),
            bytes: 1,
            was_there: false,
            not_refreshed: None,
            removed: false,
            at: UnixMicros(at),
        }
    }

    fn failed(at: i64) -> Stage {
        Stage::Failed { reason: "X".to_owned(), message: "x".to_owned(), at: UnixMicros(at) }
    }

    fn create(jobs: &mut Jobs, name: &str, plan: Plan, now: i64) {
        let (_, changes) = jobs.create(id(name), plan, UnixMicros(now)).unwrap();
        // They can be taken back.
        let (before, mut undone) = (jobs.clone(), jobs.clone());
        let undo: Vec<Change> = changes.iter().map(|change| undone.apply(change.clone())).collect();
        undo.into_iter().rev().for_each(|change| drop(undone.apply(change)));
        assert_eq!(undone, before);
        changes.into_iter().for_each(|change| drop(jobs.apply(change)));
    }

    #[test]
    fn the_last_image_ends_the_job_and_what_has_ended_stays_so() {
        for (stages, end) in [
            ([here(1), here(2)], End::Done),
            ([failed(1), here(2)], End::Incomplete),
            ([here(1), failed(2)], End::Incomplete),
        ] {
            let mut jobs = Jobs::default();
            create(&mut jobs, "j", plan(&["r/a:1", "r/b:1"]), 0);
            let [first, second] = stages;
            let job = jobs.settle(&id("j"), 1, second.clone(), UnixMicros(5)).unwrap();
            assert_eq!(job.ended, None);
            assert_eq!(job.waiting().collect::<Vec<_>>(), [0]);
            assert_eq!(jobs.awaited(), ["r/a:1", "r/b:1"].into());
            jobs.apply((id("j"), Some(job)));
            assert_eq!(jobs.awaited(), ["r/a:1"].into());
            assert!(jobs.settle(&id("j"), 1, second, UnixMicros(6)).is_none(), "settled twice");
            assert!(jobs.settle(&id("j"), 2, first.clone(), UnixMicros(6)).is_none(), "no such image");
            let job = jobs.settle(&id("j"), 0, first.clone(), UnixMicros(7)).unwrap();
            assert_eq!(job.ended, Some((end, UnixMicros(7))));
            jobs.apply((id("j"), Some(job)));
            assert!(jobs.settle(&id("j"), 0, first, UnixMicros(8)).is_none());
            assert!(jobs.end(&id("j"), End::Cancelled, Causes::new(), UnixMicros(8)).is_none());
            assert_eq!((jobs.running().count(), jobs.awaited()), (0, BTreeSet::new()));
        }
        let mut jobs = Jobs::default();
        create(&mut jobs, "j", plan(&["r/a:1"]), 0);
        let job = jobs.end(&id("j"), End::Late, Causes::new(), UnixMicros(3)).unwrap();
        jobs.apply((id("j"), Some(job)));
        assert!(jobs.settle(&id("j"), 0, here(4), UnixMicros(4)).is_none(), "it came after the end");
        assert!(jobs.end(&id("other"), End::Cancelled, Causes::new(), UnixMicros(8)).is_none());
    }

    #[test]
    fn what_was_fetched_is_kept_unless_nobody_wants_it_any_more() {
        let until = |jobs: &Jobs| {
            let fetched = jobs.fetched(Duration::from_micros(10));
            fetched.map(|(name, _, until)| (name.to_owned(), until.0)).collect::<Vec<_>>()
        };
        for (end, expected) in
            [(None, 1), (Some(End::Late), 1), (Some(End::Cancelled), 0), (Some(End::Withdrawn), 0)]
        {
            let mut jobs = Jobs::default();
            create(&mut jobs, "j", plan(&["r/a:1", "r/b:1", "r/c:1"]), 0);
            for (at, stage) in [(0, here(5)), (1, failed(6))] {
                let job = jobs.settle(&id("j"), at, stage, UnixMicros(7)).unwrap();
                jobs.apply((id("j"), Some(job)));
            }
            if let Some(end) = end {
                let job = jobs.end(&id("j"), end, Causes::new(), UnixMicros(8)).unwrap();
                jobs.apply((id("j"), Some(job)));
            }
            let fetched = until(&jobs);
            assert_eq!(fetched.len(), expected, "{end:?}");
            assert!(fetched.iter().all(|fetched| *fetched == ("r/a:1".to_owned(), 15)), "{fetched:?}");
        }
    }

    #[test]
    fn what_was_removed_is_not_kept_for_later_when_it_comes_back() {
        let mut jobs = Jobs::default();
        for (name, at) in [("first", 5), ("again", 9)] {
            create(&mut jobs, name, plan(&["r/a:1", "r/b:1"]), 0);
            for (image, stage) in [(0, here(at)), (1, here(at))] {
                let job = jobs.settle(&id(name), image, stage, UnixMicros(at)).unwrap();
                jobs.apply((id(name), Some(job)));
            }
        }
        let gone: BTreeSet<String> = ["r/a:1", "r/c:1"].map(str::to_owned).into();
        let changes = jobs.forget(&gone, UnixMicros(7));
        assert_eq!(changes.len(), 1, "of one job: {changes:?}");
        changes.into_iter().for_each(|change| drop(jobs.apply(change)));
        assert_eq!(jobs.forget(&gone, UnixMicros(7)), [], "once");
        let kept: Vec<_> = jobs.fetched(Duration::ZERO).map(|(name, _, at)| (name, at.0)).collect();
        assert_eq!(kept, [("r/a:1", 9), ("r/b:1", 9), ("r/b:1", 5)]);
        assert_eq!(jobs.get(&id("first")).unwrap().ended, Some((End::Done, UnixMicros(5))), "as it was");
    }

    #[test]
    fn a_name_means_one_job() {
        let mut jobs = Jobs::default();
        create(&mut jobs, "j", plan(&["r/a:1"]), 0);
        let (job, changes) = jobs.create(id("j"), plan(&["r/a:1"]), UnixMicros(9)).unwrap();
        assert_eq!((job.created_at, changes.len()), (UnixMicros(0), 0));
        let other = Plan {
            class: Class::Urgent,
            bytes_per_second: NonZeroU64::new(7),
            has_credentials: true,
            ..plan(&["r/b:1"])
        };
        let error = jobs.create(id("j"), other, UnixMicros(9)).unwrap_err();
        assert_eq!(error.reason(), Reason::SpecConflict);
        let said = error.to_string();
        assert!(said.contains("differs in images, class, bytes_per_second, credentials:"), "{said}");
    }

    #[test]
    fn so_many_run_and_so_many_are_remembered() {
        let mut jobs = Jobs::default();
        for n in 0..RUNNING_MAX {
            create(&mut jobs, &format!("j{n}"), plan(&["r/a:1"]), 0);
        }
        let refused = jobs.create(id("more"), plan(&["r/a:1"]), UnixMicros(1)).unwrap_err();
        assert_eq!(refused.reason(), Reason::NotReady);
        for n in 0..RUNNING_MAX {
            let name = id(&format!("j{n}"));
            // The first ones end last.
            let at = UnixMicros(i64::try_from(RUNNING_MAX - n).unwrap());
            let ended = jobs.end(&name, End::Cancelled, Causes::new(), at);
            jobs.apply((name, ended));
        }
        create(&mut jobs, "more", plan(&["r/a:1"]), 2);
        assert_eq!(jobs.after(None).count(), REMEMBERED);
        let last = format!("j{}", RUNNING_MAX - 1);
        assert!(
            jobs.get(&id(&last)).is_none() && jobs.get(&id("j0")).is_some(),
            "the one that ended first goes"
        );
        assert_eq!(jobs.after(Some(&id("j998"))).map(|job| job.id.to_string()).collect::<Vec<_>>(), ["more"]);
    }

    #[test]
    fn so_many_images_are_remembered() {
        let names: Vec<String> = (0..IMAGES_MAX).map(|n| format!("r/a:{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut jobs = Jobs::default();
        let running = RUNNING_IMAGES_MAX / IMAGES_MAX;
        let count = |jobs: &Jobs| jobs.after(None).map(|job| job.stages.len()).sum::<usize>();
        for round in 0..4_usize {
            for n in 0..running {
                create(&mut jobs, &format!("j{round}.{n}"), plan(&names), 0);
                assert!(count(&jobs) <= REMEMBERED_IMAGES, "{}", count(&jobs));
            }
            assert!(jobs.create(id("more"), plan(&["r/a:1"]), UnixMicros(1)).is_err());
            for n in 0..running {
                let name = id(&format!("j{round}.{n}"));
                let ended =
                    jobs.end(&name, End::Cancelled, Causes::new(), UnixMicros(i64::try_from(round).unwrap()));
                jobs.apply((name, ended));
            }
        }
        assert!(jobs.get(&id("j3.0")).is_some() && jobs.get(&id("j0.0")).is_none());
    }

    #[test]
    fn what_is_read_is_checked() {
        let job = Job::begin(id("j"), plan(&["r/a:1"]), UnixMicros(0));
        let written = serde_json::to_string(&job).unwrap();
        let read: Job = serde_json::from_str(&written).unwrap();
        assert_eq!(
            Jobs::load(vec![read]).unwrap().get(&id("j")).map(|job| (**job).clone()),
            Some(job.clone())
        );
        for damaged in [
            Job { stages: Vec::new(), ..job.clone() },
            Job { plan: plan(&[]), stages: Vec::new(), ..job.clone() },
        ] {
            assert!(Jobs::load(vec![damaged]).is_err());
        }
        let odd = Job { plan: plan(&["r/A:1"]), ..job.clone() };
        assert!(
            Jobs::load(vec![odd]).is_ok(),
            "a name that is none any more keeps the ledger from being used"
        );
        let deadline = Some(Ttl::from_seconds(3).unwrap());
        let job = Job { plan: Plan { deadline, ..job.plan.clone() }, ..job };
        assert_eq!(job.late_at(), Some(UnixMicros(3_000_000)));
    }
}
