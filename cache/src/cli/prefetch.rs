//! `cowshed prefetch` and its kin: what a job is to do, and jobs as text and as JSON.

use std::{
    fs,
    num::{NonZeroU32, NonZeroU64},
    path::{Path, PathBuf},
};

use cowshed_proto::v1;
use serde_json::{Value, json};
use tonic::Streaming;

use super::{
    Failure, Output, PrefetchClass, Who,
    client::{refused, seconds},
    print,
    progress::{Item, View},
    pull::not_refreshed,
    show::{bytes, cache_name, line, table},
};
use crate::{
    exit,
    image::Class,
    prefetch::{job::Plan, warm::Warm},
};

/// What `cowshed prefetch` was told.
#[derive(clap::Args, Debug)]
pub(super) struct Wish {
    /// Image references.
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    images: Vec<String>,
    /// A file of the warm set's form (TOML) that says all that the options say.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["class", "rate", "concurrency", "deadline", "pin_for", "spares", "platform", "tenant"])]
    file: Option<PathBuf>,
    /// os/architecture[/variant]; the host's if absent.
    #[arg(long)]
    platform: Option<String>,
    /// The job's name, so that it is not made twice, also when it has ended; the service makes one if absent.
    #[arg(long, value_name = "ID")]
    name: Option<String>,
    /// To whom its pulls give way; normal if absent.
    #[arg(long, value_enum)]
    class: Option<PrefetchClass>,
    /// Bytes a second that it may take, such as 20MiB; as many as there are if absent or 0.
    #[arg(long, value_name = "SIZE")]
    rate: Option<cowshed_pool::Bytes>,
    /// How many images are pulled at a time; one if absent.
    #[arg(long, value_name = "N")]
    concurrency: Option<NonZeroU32>,
    /// How long it may take, such as 90s, 15m, 12h, 7d or 4w.
    #[arg(long, value_name = "DURATION", value_parser = crate::time::duration)]
    deadline: Option<u64>,
    /// Pin each image for so long when it is here.
    #[arg(long, value_name = "DURATION", value_parser = crate::time::duration)]
    pin_for: Option<u64>,
    /// Keep at least so many disks of each ready as long as it is pinned.
    #[arg(long, value_name = "N", requires = "pin_for")]
    spares: Option<u32>,
    #[command(flatten)]
    who: Who,
    /// Follow it to its end; fails if not all images are here then.
    #[arg(long)]
    pub(super) wait: bool,
}

impl Wish {
    pub(super) fn request(self) -> Result<v1::CreatePrefetchRequest, Failure> {
        let credentials = self.who.credentials()?;
        let spec = match &self.file {
            Some(file) => spec_of(&plan(file)?),
            None => v1::PrefetchSpec {
                images: self
                    .images
                    .into_iter()
                    .map(|image| v1::PrefetchImage { image, platform: self.platform.clone() })
                    .collect(),
                class: class(self.class.unwrap_or(PrefetchClass::Normal)).into(),
                bytes_per_second: self.rate.map_or(0, |rate| rate.0),
                concurrency: self.concurrency.map_or(0, NonZeroU32::get),
                deadline: self.deadline.map(seconds),
                pin_for: self.pin_for.map(seconds),
                spares: self.spares.unwrap_or_default(),
                tenant: self.who.tenant,
            },
        };
        Ok(v1::CreatePrefetchRequest { job_id: self.name.unwrap_or_default(), spec: Some(spec), credentials })
    }
}

fn plan(file: &Path) -> Result<Plan, Failure> {
    let wrong =
        |what: String| Failure { message: format!("{}: {what}", file.display()), status: exit::USAGE };
    let text = fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    Warm::parse(&text).map(|file| file.plan).map_err(wrong)
}

fn spec_of(plan: &Plan) -> v1::PrefetchSpec {
    let class = match plan.class {
        Class::Background => v1::PrefetchClass::Background,
        Class::Normal => v1::PrefetchClass::Normal,
        Class::Urgent => v1::PrefetchClass::Urgent,
    };
    let images = plan.images.iter();
    v1::PrefetchSpec {
        images: images
            .map(|wanted| v1::PrefetchImage {
                image: wanted.image.clone(),
                platform: Some(wanted.platform.clone()),
            })
            .collect(),
        class: class.into(),
        bytes_per_second: plan.bytes_per_second.map_or(0, NonZeroU64::get),
        concurrency: plan.concurrency.get(),
        deadline: plan.deadline.map(|ttl| seconds(ttl.micros() / 1_000_000)),
        pin_for: plan.pin_for.map(|ttl| seconds(ttl.micros() / 1_000_000)),
        spares: plan.spares,
        tenant: plan.tenant.to_string(),
    }
}

fn class(class: PrefetchClass) -> v1::PrefetchClass {
    match class {
        PrefetchClass::Background => v1::PrefetchClass::Background,
        PrefetchClass::Normal => v1::PrefetchClass::Normal,
        PrefetchClass::Urgent => v1::PrefetchClass::Urgent,
    }
}

/// Follows a job to its end; a failure if not all of its images are here.
pub(super) async fn follow(
    id: &str,
    mut stream: Streaming<v1::WatchPrefetchResponse>,
    output: Output,
) -> Result<(), Failure> {
    let mut view = View::new(output);
    let goes_on = |why: &str| {
        format!(
            "{why}; the job goes on when the service is up: follow it with `cowshed prefetches {id} --wait`"
        )
    };
    loop {
        let message = stream.message().await.map_err(|status| {
            view.clear();
            let Failure { message, status } = refused(&status);
            Failure { message: goes_on(&message), status }
        })?;
        let Some(job) = message.and_then(|message| message.job) else {
            let message = goes_on("the service stopped");
            return Err(Failure { message, status: exit::for_code(tonic::Code::Unavailable) });
        };
        view.show(job.images.iter().map(item), || json_of(&job))?;
        if job.state() != v1::PrefetchState::Running {
            view.clear();
            if output == Output::Text {
                print(&one(&job, output))?;
            }
            return judge(&job);
        }
    }
}

fn judge(job: &v1::Prefetch) -> Result<(), Failure> {
    let (message, status) = match job.state() {
        v1::PrefetchState::Done => return Ok(()),
        v1::PrefetchState::Late => ("its deadline has passed", exit::for_code(tonic::Code::DeadlineExceeded)),
        v1::PrefetchState::Cancelled => ("it was cancelled", exit::FAILURE),
        _ => ("some images are not to be had", exit::FAILURE),
    };
    Err(Failure { message: format!("prefetch job {}: {message}", job.job_id), status })
}

fn item(image: &v1::PrefetchedImage) -> Item {
    let (name, stage) = (image.image.clone(), stage_name(image.stage()));
    let why = why(image).map(|why| format!(": {why}")).unwrap_or_default();
    let is_begun = image.stage() != v1::PrefetchStage::Waiting;
    Item {
        line: is_begun.then(|| format!("{name} {stage}{why}")),
        name,
        bytes: image.bytes_fetched,
        bytes_total: image.bytes_total,
        stage,
    }
}

/// Why it is not here, or not what its registry says.
fn why(image: &v1::PrefetchedImage) -> Option<String> {
    let failure = image.failure.as_ref().map(|failure| failure.message.clone());
    failure.or_else(|| image.not_refreshed.as_ref().map(|why| not_refreshed(why)))
}

/// A job, with all of its images.
pub(super) fn one(job: &v1::Prefetch, output: Output) -> String {
    if output == Output::Json {
        return line(&json_of(job));
    }
    let mut rows = vec![["IMAGE", "PLATFORM", "STAGE", "BYTES", "WHY"].map(str::to_owned)];
    rows.extend(job.images.iter().map(|image| {
        [
            image.image.clone(),
            image.platform.clone(),
            stage_name(image.stage()).to_owned(),
            match image.bytes_total {
                0 => "-".to_owned(),
                total => format!("{} of {}", bytes(image.bytes_fetched), bytes(total)),
            },
            why(image).unwrap_or_else(|| "-".to_owned()),
        ]
    }));
    let wants =
        if job.wants_credentials { ", and waits for credentials: create it again, with them" } else { "" };
    format!("prefetch job {} is {}{wants}\n{}", job.job_id, state_name(job.state()), table(&rows))
}

/// A job that was created or cancelled.
pub(super) fn brief(job: &v1::Prefetch, output: Output) -> String {
    match output {
        Output::Json => line(&json_of(job)),
        Output::Text => {
            let count = job.images.len();
            format!("prefetch job {} is {}, images: {count}\n", job.job_id, state_name(job.state()))
        }
    }
}

pub(super) fn all(jobs: &[v1::Prefetch], output: Output) -> String {
    if output == Output::Json {
        return line(&json!({ "jobs": jobs.iter().map(json_of).collect::<Vec<_>>() }));
    }
    let titles = ["JOB", "STATE", "CLASS", "IMAGES", "DONE", "FAILED", "CREATED"];
    let mut rows = vec![titles.map(str::to_owned)];
    rows.extend(jobs.iter().map(|job| {
        let count =
            |stage: v1::PrefetchStage| job.images.iter().filter(|i| i.stage() == stage).count().to_string();
        [
            job.job_id.clone(),
            state_name(job.state()).to_owned(),
            class_name(job.spec.as_ref().map_or(v1::PrefetchClass::Unspecified, v1::PrefetchSpec::class))
                .to_owned(),
            job.images.len().to_string(),
            count(v1::PrefetchStage::Done),
            count(v1::PrefetchStage::Failed),
            job.created_at.map_or_else(|| "-".to_owned(), |at| at.to_string()),
        ]
    }));
    table(&rows)
}

fn json_of(job: &v1::Prefetch) -> Value {
    let spec = job.spec.clone().unwrap_or_default();
    let images = job.images.iter().map(|image| {
        let failure = image.failure.as_ref();
        json!({
            "image": image.image,
            "platform": image.platform,
            "stage": stage_name(image.stage()),
            "bytes_fetched": image.bytes_fetched,
            "bytes_total": image.bytes_total,
            "tries": image.tries,
            "failure": failure.map(|failure| json!({ "reason": failure.reason, "message": failure.message })),
            "manifest_digest": Some(&image.manifest_digest).filter(|digest| !digest.is_empty()),
            "cache": Some(image.cache()).filter(|c| *c != v1::CacheResult::Unspecified).map(cache_name),
            "ended_at": image.ended_at.map(|at| at.to_string()),
            "not_refreshed": image.not_refreshed,
        })
    });
    json!({
        "job_id": job.job_id,
        "state": state_name(job.state()),
        "class": class_name(spec.class()),
        "bytes_per_second": spec.bytes_per_second,
        "concurrency": spec.concurrency,
        "tenant": spec.tenant,
        "created_at": job.created_at.map(|at| at.to_string()),
        "ended_at": job.ended_at.map(|at| at.to_string()),
        "wants_credentials": job.wants_credentials,
        "images": images.collect::<Vec<_>>(),
    })
}

fn state_name(state: v1::PrefetchState) -> &'static str {
    match state {
        v1::PrefetchState::Unspecified => "unknown",
        v1::PrefetchState::Running => "running",
        v1::PrefetchState::Done => "done",
        v1::PrefetchState::Incomplete => "incomplete",
        v1::PrefetchState::Cancelled => "cancelled",
        v1::PrefetchState::Late => "late",
    }
}

fn stage_name(stage: v1::PrefetchStage) -> &'static str {
    match stage {
        v1::PrefetchStage::Unspecified => "unknown",
        v1::PrefetchStage::Waiting => "waiting",
        v1::PrefetchStage::Pulling => "pulling",
        v1::PrefetchStage::GivingWay => "giving way",
        v1::PrefetchStage::Retrying => "retrying",
        v1::PrefetchStage::Done => "done",
        v1::PrefetchStage::Failed => "failed",
        v1::PrefetchStage::GivenUp => "given up",
    }
}

fn class_name(class: v1::PrefetchClass) -> &'static str {
    match class {
        v1::PrefetchClass::Unspecified => "unknown",
        v1::PrefetchClass::Background => "background",
        v1::PrefetchClass::Normal => "normal",
        v1::PrefetchClass::Urgent => "urgent",
    }
}
