//! Prefetch jobs as requests and messages of the API.

use std::num::{NonZeroU32, NonZeroU64};

use cowshed_leases::VmIdError;
use cowshed_proto::v1;
use prost::Message as _;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{changes, convert, parse};
use crate::{
    clock::timestamp,
    error::{Error, Reason, Result},
    image::{Class, ImageRef, Platform, Progress},
    prefetch::{
        Picture, Prefetcher, Seen,
        job::{CONCURRENCY_MAX, Cause, End, IMAGES_MAX, JobId, Plan, Stage, Wanted, twice},
        warm,
    },
    registry::Credential,
};

pub(super) type Stream = ReceiverStream<Result<v1::WatchPrefetchResponse, Status>>;

const PAGE_MAX: u32 = 100;
/// A page ends early where it would have more.
const PAGE_MAX_BYTES: usize = 1 << 20;

pub(super) fn job_id(text: &str) -> Result<JobId> {
    text.parse().map_err(|error| no_job_id("job_id", text, error))
}

fn no_job_id(field: &str, text: &str, error: VmIdError) -> Error {
    let shown: String = text.chars().take(140).collect();
    wrong("job_id", format!("{field} {shown:?} is no name of a job: {error}"))
}

/// The name (a new one if there is none), the plan, and the credentials.
pub(super) fn wanted(request: v1::CreatePrefetchRequest) -> Result<(JobId, Plan, Option<Credential>)> {
    let v1::CreatePrefetchRequest { job_id: name, spec, credentials } = request;
    let id = match name.as_str() {
        "" => JobId::from_random(uuid::Uuid::new_v4().as_u128()),
        name if name.starts_with(warm::PREFIX) => {
            let what = format!(
                "job_id (--name) {name:?} is as those of the warm set's files: begin with another word"
            );
            return Err(wrong("job_id", what));
        }
        name => name.parse().map_err(|error| no_job_id("job_id (--name)", name, error))?,
    };
    let spec = spec.unwrap_or_default();
    let access = parse::access(&spec.tenant, credentials)?;
    if spec.images.is_empty() || spec.images.len() > IMAGES_MAX {
        let what = format!("spec.images has {} images: a job has 1 to {IMAGES_MAX}", spec.images.len());
        return Err(wrong("spec.images", what));
    }
    let images = spec.images.iter().map(wanted_image).collect::<Result<Vec<_>>>()?;
    if let Some(twice) = twice(&images) {
        let what = format!("spec.images has {} for {} twice", twice.image, twice.platform);
        return Err(wrong("spec.images", what));
    }
    if spec.concurrency > CONCURRENCY_MAX {
        let what = format!("spec.concurrency is {}: {CONCURRENCY_MAX} is the most", spec.concurrency);
        return Err(wrong("spec.concurrency", what));
    }
    if spec.spares > 0 && spec.pin_for.is_none() {
        let what = "spec.spares are kept as long as spec.pin_for says, which is missing".to_owned();
        return Err(wrong("spec.spares", what));
    }
    let plan = Plan {
        spares: spec.spares,
        images,
        class: class(spec.class)?,
        bytes_per_second: NonZeroU64::new(spec.bytes_per_second),
        concurrency: NonZeroU32::new(spec.concurrency).unwrap_or(NonZeroU32::MIN),
        deadline: spec.deadline.as_ref().map(parse::deadline).transpose()?,
        pin_for: spec.pin_for.as_ref().map(parse::pin_for).transpose()?,
        tenant: access.tenant,
        has_credentials: access.credential.is_some(),
    };
    Ok((id, plan, access.credential))
}

fn wanted_image(image: &v1::PrefetchImage) -> Result<Wanted> {
    let of = |(image, platform): (ImageRef, Platform)| Wanted {
        image: image.to_string(),
        platform: platform.to_string(),
    };
    let platform = parse::platform(image.platform.as_deref())?;
    parse::image_reference(&image.image).map(|image| of((image, platform)))
}

fn class(class: i32) -> Result<Class> {
    match v1::PrefetchClass::try_from(class) {
        Ok(v1::PrefetchClass::Background) => Ok(Class::Background),
        Ok(v1::PrefetchClass::Unspecified | v1::PrefetchClass::Normal) => Ok(Class::Normal),
        Ok(v1::PrefetchClass::Urgent) => Ok(Class::Urgent),
        Err(_) => {
            let what = format!(
                "spec.class {class} is not known to this version: BACKGROUND is 1, NORMAL 2, URGENT 3"
            );
            Err(wrong("spec.class", what))
        }
    }
}

fn wrong(field: &'static str, what: String) -> Error {
    Error::new(Reason::PrefetchInvalid, what).with("field", field)
}

pub(super) fn page(
    prefetcher: &Prefetcher,
    request: &v1::ListPrefetchesRequest,
) -> Result<v1::ListPrefetchesResponse> {
    let after = match request.page_token.as_str() {
        "" => None,
        token => Some(token.parse::<JobId>().map_err(|_| {
            let what =
                format!("page_token {token:?} is none of ours: use next_page_token of the page before");
            Error::new(Reason::PageTokenInvalid, what).with("field", "page_token")
        })?),
    };
    let size = match request.page_size {
        0 => PAGE_MAX,
        size => size.min(PAGE_MAX),
    };
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let found = prefetcher.list(after.as_ref(), size.saturating_add(1));
    let (count, mut bytes) = (found.len(), 0);
    let mut jobs: Vec<v1::Prefetch> = Vec::new();
    for job in found.into_iter().take(size).map(message) {
        bytes += job.encoded_len();
        if bytes > PAGE_MAX_BYTES && !jobs.is_empty() {
            break;
        }
        jobs.push(job);
    }
    let last = jobs.last().filter(|_| jobs.len() < count).map(|last| last.job_id.clone());
    Ok(v1::ListPrefetchesResponse { jobs, next_page_token: last.unwrap_or_default() })
}

pub(super) fn message(picture: Picture) -> v1::Prefetch {
    let Picture { job, seen, wants_credentials } = picture;
    let plan = &job.plan;
    let class = match plan.class {
        Class::Background => v1::PrefetchClass::Background,
        Class::Normal => v1::PrefetchClass::Normal,
        Class::Urgent => v1::PrefetchClass::Urgent,
    };
    let state = match job.ended {
        None => v1::PrefetchState::Running,
        Some((End::Done, _)) => v1::PrefetchState::Done,
        Some((End::Incomplete, _)) => v1::PrefetchState::Incomplete,
        Some((End::Cancelled | End::Withdrawn, _)) => v1::PrefetchState::Cancelled,
        Some((End::Late, _)) => v1::PrefetchState::Late,
    };
    let wanted = |wanted: &Wanted| v1::PrefetchImage {
        image: wanted.image.clone(),
        platform: Some(wanted.platform.clone()),
    };
    let spec = v1::PrefetchSpec {
        images: plan.images.iter().map(wanted).collect(),
        class: class.into(),
        bytes_per_second: plan.bytes_per_second.map_or(0, NonZeroU64::get),
        concurrency: plan.concurrency.get(),
        deadline: plan.deadline.map(|ttl| convert::duration(ttl.micros())),
        pin_for: plan.pin_for.map(|ttl| convert::duration(ttl.micros())),
        tenant: plan.tenant.to_string(),
        spares: plan.spares,
    };
    let images = plan.images.iter().zip(&job.stages).zip(&seen);
    v1::Prefetch {
        job_id: job.id.to_string(),
        spec: Some(spec),
        state: state.into(),
        created_at: Some(timestamp(job.created_at)),
        ended_at: job.ended.map(|(_, at)| timestamp(at)),
        images: images
            .enumerate()
            .map(|(at, ((wanted, stage), seen))| {
                let ended = job.ended.map(|_| job.causes.get(&at));
                image(wanted, stage, seen, ended)
            })
            .collect(),
        wants_credentials,
    }
}

/// `ended`: the job has, and why the image was not had until then, if that is known.
fn image(wanted: &Wanted, stage: &Stage, seen: &Seen, ended: Option<Option<&Cause>>) -> v1::PrefetchedImage {
    let (fetched, total) = seen.progress.as_ref().map(Progress::bytes).unwrap_or_default();
    let image = v1::PrefetchedImage {
        image: wanted.image.clone(),
        platform: wanted.platform.clone(),
        bytes_fetched: fetched,
        bytes_total: total,
        tries: seen.tries,
        ..v1::PrefetchedImage::default()
    };
    let failure = |cause: &Cause| convert::failure(&cause.reason, &cause.message, None);
    match (stage, ended) {
        (Stage::Waiting, Some(cause)) => v1::PrefetchedImage {
            stage: v1::PrefetchStage::GivenUp.into(),
            failure: cause.map(failure),
            ..image
        },
        (Stage::Waiting, None) => {
            let now = match (&seen.progress, &seen.error) {
                (Some(_), _) if seen.gives_way => v1::PrefetchStage::GivingWay,
                (Some(_), _) => v1::PrefetchStage::Pulling,
                (None, Some(_)) => v1::PrefetchStage::Retrying,
                (None, None) => v1::PrefetchStage::Waiting,
            };
            let is_retried = now == v1::PrefetchStage::Retrying;
            let error = seen.error.as_ref().filter(|_| is_retried).map(Cause::from);
            v1::PrefetchedImage {
                stage: now.into(),
                failure: error.as_ref().map(failure),
                next_try_at: seen.next_try.filter(|_| is_retried).map(timestamp),
                ..image
            }
        }
        (Stage::Here { manifest, bytes, was_there, not_refreshed, removed: _, at }, _) => {
            v1::PrefetchedImage {
                stage: v1::PrefetchStage::Done.into(),
                bytes_fetched: *bytes,
                bytes_total: *bytes,
                manifest_digest: manifest.clone(),
                cache: if *was_there { v1::CacheResult::Hit } else { v1::CacheResult::Miss }.into(),
                ended_at: Some(timestamp(*at)),
                not_refreshed: not_refreshed.clone(),
                ..image
            }
        }
        (Stage::Failed { reason, message, at }, _) => v1::PrefetchedImage {
            stage: v1::PrefetchStage::Failed.into(),
            failure: Some(convert::failure(reason, message, Some(*at))),
            ended_at: Some(timestamp(*at)),
            ..image
        },
    }
}

/// Each change of the job, until it has ended.
pub(super) fn stream(prefetcher: Prefetcher, id: JobId, stopped: watch::Receiver<bool>) -> Stream {
    let look = move || {
        let job = message(prefetcher.get(&id)?);
        let has_ended = job.state() != v1::PrefetchState::Running;
        Ok((v1::WatchPrefetchResponse { job: Some(job) }, has_ended))
    };
    changes::stream(look, stopped)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn request(spec: v1::PrefetchSpec) -> v1::CreatePrefetchRequest {
        v1::CreatePrefetchRequest { job_id: "warm".to_owned(), spec: Some(spec), credentials: None }
    }

    fn images(names: &[&str]) -> Vec<v1::PrefetchImage> {
        let of = |name: &&str| v1::PrefetchImage { image: (*name).to_owned(), platform: None };
        names.iter().map(of).collect()
    }

    #[test]
    fn what_is_asked_for_is_checked_and_named() {
        let good = v1::PrefetchSpec { images: images(&["app", "r.example/b:2"]), ..Default::default() };
        let (id, plan, credential) = wanted(request(good.clone())).unwrap();
        assert_eq!((id.to_string().as_str(), plan.class, credential), ("warm", Class::Normal, None));
        assert_eq!(plan.images[0].image, "docker.io/library/app:latest");
        assert_eq!((plan.concurrency.get(), plan.bytes_per_second), (1, None));
        // The service names it.
        let unnamed = || v1::CreatePrefetchRequest { job_id: String::new(), ..request(good.clone()) };
        assert_ne!(wanted(unnamed()).unwrap().0, wanted(unnamed()).unwrap().0);
        let with = |images, class, concurrency| v1::PrefetchSpec {
            images,
            class,
            concurrency,
            ..Default::default()
        };
        let many: Vec<String> = (0..=IMAGES_MAX).map(|n| format!("app:{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let table = [
            (with(images(&[]), 0, 0), "spec.images"),
            (with(images(&many), 0, 0), "spec.images"),
            (with(images(&["app", "docker.io/library/app:latest"]), 0, 0), "twice"),
            (with(images(&["app"]), 9, 0), "spec.class"),
            (with(images(&["app"]), 0, 65), "spec.concurrency"),
        ];
        for (spec, says) in table {
            let error = wanted(request(spec)).unwrap_err();
            assert_eq!(error.reason(), Reason::PrefetchInvalid, "{error}");
            assert!(error.to_string().contains(says), "{error}");
        }
        assert_eq!(job_id("../x").unwrap_err().reason(), Reason::PrefetchInvalid);
    }
}
