//! `cowshed prefetch` and its kin: what a job is to do, and jobs as text and as JSON.

use std::{
    fs,
    num::{NonZeroU32, NonZeroU64},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
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
#[command(group = clap::ArgGroup::new("what").required(true))]
pub(super) struct Wish {
    /// Image references.
    #[arg(group = "what")]
    images: Vec<String>,
    /// A file of the warm set's form (TOML), which says what there is to say: it goes with none of IMAGES, --class, --rate,
    /// --concurrency, --deadline, --pin-for, --spares, --platform and --tenant.
    #[arg(long, value_name = "FILE", group = "what", conflicts_with_all = ["class", "rate", "concurrency", "deadline", "pin_for", "spares", "platform", "tenant"])]
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
    /// How long it may take, such as 90s, 15m, 12h, 7d or 4w; without one it goes on trying whatever may pass, also a registry
    /// that does not answer.
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
    let mut last: Option<v1::Prefetch> = None;
    let goes_on = |why: &str| {
        format!(
            "{why}; the job goes on when the service is up: follow it with `cowshed prefetches {id} --wait`"
        )
    };
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            // Only changes are streamed, and the time until the next try goes by.
            () = tokio::time::sleep(Duration::from_secs(1)), if view.is_live() => {
                if let Some(job) = &last {
                    show(&mut view, job)?;
                }
                continue;
            }
        };
        let message = message.map_err(|status| {
            view.clear();
            let Failure { message, status } = refused(&status);
            Failure { message: goes_on(&message), status }
        })?;
        let Some(job) = message.and_then(|message| message.job) else {
            let message = goes_on("the service stopped");
            return Err(Failure { message, status: exit::for_code(tonic::Code::Unavailable) });
        };
        show(&mut view, &job)?;
        if job.state() != v1::PrefetchState::Running {
            view.clear();
            if output == Output::Text {
                print(&one(&job, output))?;
            }
            return judge(&job);
        }
        last = Some(job);
    }
}

fn show(view: &mut View, job: &v1::Prefetch) -> Result<(), Failure> {
    let now = SystemTime::now();
    view.show(job.images.iter().map(|image| item(image, job.state(), now)), || json_of(job))
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

fn item(image: &v1::PrefetchedImage, state: v1::PrefetchState, now: SystemTime) -> Item {
    let (name, stage) = (image.image.clone(), stage_name(image.stage()));
    let note = why(image, state, now);
    let after_colon = note.as_ref().map(|note| format!(": {note}")).unwrap_or_default();
    let is_begun = image.stage() != v1::PrefetchStage::Waiting;
    let is_retried = image.stage() == v1::PrefetchStage::Retrying;
    Item {
        line: is_begun.then(|| format!("{name} {stage}{after_colon}")),
        note,
        turn: if is_retried { image.tries } else { 0 },
        name,
        bytes: image.bytes_fetched,
        bytes_total: image.bytes_total,
        stage,
    }
}

/// Why the image is not here, and what will be done about it; or why it may not be what its registry has by now.
fn why(image: &v1::PrefetchedImage, state: v1::PrefetchState, now: SystemTime) -> Option<String> {
    let last = image.failure.as_ref().map(|failure| failure.message.as_str());
    match image.stage() {
        // It may be that nothing is begun at the moment.
        v1::PrefetchStage::Retrying if image.tries > 0 => {
            let (tries, last) = (image.tries, last?);
            let next = match image.next_try_at.and_then(|at| SystemTime::try_from(at).ok()) {
                None => String::new(),
                Some(at) => match at.duration_since(now).map(|left| left.as_secs_f64().ceil()) {
                    Ok(seconds) if seconds > 0.0 => format!("; the next is in {seconds} s"),
                    _ => "; the next is when its turn comes".to_owned(),
                },
            };
            Some(format!("tries: {tries}{next}; the last: {last}"))
        }
        v1::PrefetchStage::GivenUp => {
            let ended = match state {
                v1::PrefetchState::Late => "its deadline has passed",
                _ => "the job was cancelled",
            };
            Some(last.map_or_else(|| ended.to_owned(), |last| format!("{ended}; the last try: {last}")))
        }
        _ => last.map(str::to_owned).or_else(|| image.not_refreshed.as_ref().map(|why| not_refreshed(why))),
    }
}

/// A job, with all of its images.
pub(super) fn one(job: &v1::Prefetch, output: Output) -> String {
    if output == Output::Json {
        return line(&json_of(job));
    }
    let now = SystemTime::now();
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
            why(image, job.state(), now).unwrap_or_else(|| "-".to_owned()),
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
            "next_try_at": image.next_try_at.map(|at| at.to_string()),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn who_waits_is_told_what_is_waited_for() {
        use v1::{PrefetchStage as Stage, PrefetchState as State};
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let at = |seconds: i64| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let down = || v1::Failure { reason: "X".to_owned(), message: "down".to_owned(), at: None };
        let table = [
            (Stage::Waiting, State::Running, None, None, None),
            (
                Stage::Retrying,
                State::Running,
                Some(down()),
                at(1004),
                Some("tries: 3; the next is in 4 s; the last: down"),
            ),
            (
                Stage::Retrying,
                State::Running,
                Some(down()),
                at(999),
                Some("tries: 3; the next is when its turn comes; the last: down"),
            ),
            (Stage::Retrying, State::Running, Some(down()), None, Some("tries: 3; the last: down")),
            (Stage::Failed, State::Incomplete, Some(down()), None, Some("down")),
            (
                Stage::GivenUp,
                State::Late,
                Some(down()),
                None,
                Some("its deadline has passed; the last try: down"),
            ),
            (Stage::GivenUp, State::Late, None, None, Some("its deadline has passed")),
            (
                Stage::GivenUp,
                State::Cancelled,
                Some(down()),
                None,
                Some("the job was cancelled; the last try: down"),
            ),
        ];
        for (stage, state, failure, next_try_at, says) in table {
            let image = v1::PrefetchedImage {
                stage: stage.into(),
                tries: 3,
                failure,
                next_try_at,
                ..Default::default()
            };
            assert_eq!(why(&image, state, now).as_deref(), says, "{stage:?} {state:?}");
        }
    }

    #[test]
    fn images_or_a_file() {
        #[derive(clap::Parser, Debug)]
        struct Line {
            #[command(flatten)]
            wish: Wish,
        }
        let parse =
            |words: &str| <Line as clap::Parser>::try_parse_from(format!("x {words}").split_whitespace());
        for good in ["a b --wait", "--file f --wait", "--file f --name n"] {
            let _line = parse(good).unwrap();
        }
        for bad in ["", "a --file f", "--file f --rate 1KiB"] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains("--file"), "{bad}: {error}");
            assert!(!error.contains("--file <FILE> <IMAGES>"), "{bad}: {error}");
        }
    }
}
