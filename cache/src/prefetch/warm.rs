//! The warm set: files that say which images this host is to have, for configuration management.
//!
//! Each file is one job, over and over: begun when the file appears or says something else, and again so long after it has
//! ended. Which job is a file's, its name says, so that nothing has to be remembered: `warm.FILE@SECONDS`.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt, fs,
    io::{self, Read as _},
    num::{NonZeroU32, NonZeroU64},
    path::Path,
};

use cowshed_leases::{Tenant, Ttl, UnixMicros};
use cowshed_pool::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::job::{CONCURRENCY_MAX, End, IMAGES_MAX, Job, JobId, Jobs, Plan, Wanted, twice};
use crate::{
    config::toml_words,
    image::{Class, ImageRef, Platform},
    time,
};

/// What all names of the warm set's jobs begin with, and no other's.
pub(crate) const PREFIX: &str = "warm.";
/// Has as many digits as any time that a job is made at.
const LAST: UnixMicros = UnixMicros(9_999_999_999_999_999);
/// A file without a schedule is looked after so often, in seconds: a tag may mean something else by then.
const EVERY_SECONDS: u64 = 24 * 3600;
/// More than this is no list of a thousand images, in bytes.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// A file of images to have.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WarmFile {
    /// Which images.
    images: Vec<Entry>,
    /// To whom their pulls give way.
    class: Option<Class>,
    /// Bytes a second that they may take, such as "20MiB".
    rate: Option<Bytes>,
    /// How many are pulled at a time.
    concurrency: Option<NonZeroU32>,
    /// How long it may take, such as "2h".
    deadline: Option<Period>,
    /// How long each is pinned when it is here, such as "7d".
    pin_for: Option<Period>,
    /// So many spares of each are kept as long as it is pinned.
    spares: Option<u32>,
    /// Whose they are.
    tenant: Option<Tenant>,
    /// How long after its end the job is begun again, such as "6h".
    every: Option<Period>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    /// For the host's platform.
    Name(String),
    /// For this one.
    For(EntryFor),
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryFor {
    image: String,
    platform: String,
}

/// By hand, for an untagged enum says only that it is none of the two.
impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an image's name, or { image = \"NAME\", platform = \"OS/ARCHITECTURE\" }")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Entry, E> {
                Ok(Entry::Name(name.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Entry, A::Error> {
                EntryFor::deserialize(MapAccessDeserializer::new(map)).map(Entry::For)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

/// A time, as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct Period(Ttl);

impl TryFrom<String> for Period {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let seconds = time::duration(&text)?;
        Ttl::from_seconds(seconds).map(Self).map_err(|error| format!("{text:?}: {error}"))
    }
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warm {
    /// What its job is to do.
    pub plan: Plan,
    /// How long after the job's end it is begun again, in microseconds.
    every: i64,
}

impl Warm {
    /// Reads it.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: WarmFile = toml::from_str(text).map_err(|error| toml_words(&error))?;
        let every = file.every.map_or(EVERY_SECONDS * 1_000_000, |Period(ttl)| ttl.micros());
        Ok(Self { plan: file.plan()?, every: i64::try_from(every).unwrap_or(i64::MAX) })
    }
}

impl WarmFile {
    fn plan(&self) -> Result<Plan, String> {
        if self.images.is_empty() || self.images.len() > IMAGES_MAX {
            return Err(format!("it has {} images: 1 to {IMAGES_MAX} are allowed", self.images.len()));
        }
        let images = self.images.iter().map(Entry::wanted).collect::<Result<Vec<_>, _>>()?;
        if let Some(twice) = twice(&images) {
            return Err(format!("it has {} for {} twice", twice.image, twice.platform));
        }
        let concurrency = self.concurrency.unwrap_or(NonZeroU32::MIN);
        if concurrency.get() > CONCURRENCY_MAX {
            return Err(format!("its concurrency is {concurrency}: {CONCURRENCY_MAX} is the most"));
        }
        let spares = self.spares.unwrap_or_default();
        if spares > 0 && self.pin_for.is_none() {
            return Err(format!(
                "it has spares = {spares} and no pin_for: they are kept as long as the images are pinned"
            ));
        }
        Ok(Plan {
            spares,
            images,
            class: self.class.unwrap_or(Class::Background),
            bytes_per_second: self.rate.and_then(|rate| NonZeroU64::new(rate.0)),
            concurrency,
            deadline: self.deadline.map(|Period(ttl)| ttl),
            pin_for: self.pin_for.map(|Period(ttl)| ttl),
            tenant: self.tenant.clone().unwrap_or_default(),
            has_credentials: false,
        })
    }
}

impl Entry {
    fn wanted(&self) -> Result<Wanted, String> {
        let (image, platform) = match self {
            Self::Name(image) => (image, None),
            Self::For(EntryFor { image, platform }) => (image, Some(platform)),
        };
        let image = ImageRef::parse(image).map_err(|error| error.to_string())?;
        let platform = match platform {
            Some(platform) => Platform::parse(platform).map_err(|error| error.to_string())?,
            None => Platform::host(),
        };
        Ok(Wanted { image: image.to_string(), platform: platform.to_string() })
    }
}

/// Files by name; those that cannot be used say why.
pub(crate) type Files = BTreeMap<String, Result<Warm, String>>;

/// Reads all `*.toml` of the directory.
///
/// # Errors
/// If it cannot be listed. One that is not there has no files.
pub(crate) fn read(directory: &Path) -> io::Result<Files> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Files::new()),
        entries => entries?,
    };
    let mut files = Files::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension() != Some(OsStr::new("toml")) {
            continue;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        files.insert(name, read_one(&path));
    }
    Ok(files)
}

/// What is wrong with files, each with its path.
pub(crate) fn problems(directory: &Path, files: &Files) -> Vec<String> {
    let wrong = files.iter().filter_map(|(name, file)| Some((name, file.as_ref().err()?)));
    wrong.map(|(name, error)| format!("{}/{name}.toml: {error}", directory.display())).collect()
}

/// A file that cannot be used says what it said before, if it has.
pub(crate) fn as_it_was(mut before: Files, now: Files) -> Files {
    let said = |(name, file): (String, Result<Warm, String>)| {
        let said = before.remove(&name).filter(|before| file.is_err() && before.is_ok());
        (name, said.unwrap_or(file))
    };
    now.into_iter().map(said).collect()
}

fn read_one(path: &Path) -> Result<Warm, String> {
    let text = read_text(path).map_err(|error| error.to_string())?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    job_id(&name, LAST).map_err(|error| format!("its name cannot be a job's: {error}"))?;
    Warm::parse(&text)
}

fn read_text(path: &Path) -> io::Result<String> {
    // To open what is no file may take for ever.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    let mut text = String::new();
    fs::File::open(path)?.take(FILE_MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_MAX_BYTES {
        return Err(io::Error::other(format!("it has more than {FILE_MAX_BYTES} bytes")));
    }
    Ok(text)
}

fn job_id(name: &str, now: UnixMicros) -> Result<JobId, String> {
    let id = format!("{PREFIX}{name}@{}", now.0.div_euclid(1_000_000));
    id.parse().map_err(|error: cowshed_leases::VmIdError| error.to_string())
}

/// Of which file a job is.
fn file_of(job: &Job) -> Option<String> {
    let id = job.id.to_string();
    let (name, seconds) = id.strip_prefix(PREFIX)?.rsplit_once('@')?;
    seconds.parse::<u64>().is_ok().then(|| name.to_owned())
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A job of a file that says something else by now, or is gone.
    Withdraw(JobId),
    /// A file's next.
    Create(JobId, Plan),
}

/// What makes the jobs those of the files. A file of which nothing is known changes nothing: its last job goes on.
pub(crate) fn steps(files: &Files, jobs: &Jobs, now: UnixMicros) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut latest: BTreeMap<String, &Job> = BTreeMap::new();
    // One that runs; then the newest, but for those of a time that a clock has been set back from.
    let rank = |job: &Job| (job.ended.is_none(), job.created_at <= now, job.created_at);
    for job in jobs.after(None) {
        let Some(file) = file_of(job) else { continue };
        let is_wanted = match files.get(&file) {
            None => false,
            Some(Err(_)) => true,
            Some(Ok(warm)) => warm.plan == job.plan,
        };
        if job.ended.is_none() && !is_wanted {
            steps.push(Step::Withdraw(job.id.clone()));
        }
        if is_wanted {
            let newest = latest.entry(file).or_insert(job);
            if rank(job) >= rank(newest) {
                *newest = job;
            }
        }
    }
    for (name, file) in files {
        let Ok(file) = file else { continue };
        let is_due = match latest.get(name).map(|job| job.ended) {
            None | Some(Some((End::Withdrawn, _))) => true,
            Some(None) => false,
            // A clock that was set back is no reason to wait for it.
            Some(Some((_, at))) => !(0..file.every).contains(&now.0.saturating_sub(at.0)),
        };
        let next = job_id(name, now).ok().filter(|id| is_due && jobs.get(id).is_none());
        steps.extend(next.map(|id| Step::Create(id, file.plan.clone())));
    }
    steps
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{super::job::Causes, *};

    const SECOND: i64 = 1_000_000;

    fn files(texts: &[(&str, &str)]) -> Files {
        texts.iter().map(|(name, text)| ((*name).to_owned(), Warm::parse(text))).collect()
    }

    /// Does what is to be done; says what that was.
    fn go(jobs: &mut Jobs, files: &Files, now: i64) -> Vec<String> {
        let now = UnixMicros(now * SECOND);
        let mut done = Vec::new();
        for step in steps(files, jobs, now) {
            match step {
                Step::Withdraw(id) => {
                    done.push(format!("withdraw {id}"));
                    let ended = jobs.end(&id, End::Withdrawn, Causes::new(), now);
                    jobs.apply((id, ended));
                }
                Step::Create(id, plan) => {
                    done.push(format!("create {id}"));
                    let (_, changes) = jobs.create(id, plan, now).unwrap();
                    changes.into_iter().for_each(|change| drop(jobs.apply(change)));
                }
            }
        }
        assert_eq!(steps(files, jobs, now), [], "twice is once");
        done
    }

    fn end(jobs: &mut Jobs, id: &str, now: i64) {
        let id: JobId = id.parse().unwrap();
        let ended = jobs.end(&id, End::Done, Causes::new(), UnixMicros(now * SECOND)).unwrap();
        jobs.apply((id, Some(ended)));
    }

    #[test]
    fn the_jobs_follow_the_files() {
        let mut jobs = Jobs::default();
        let one = files(&[("a", "images = ['r/a:1']\nevery = '100s'"), ("b", "images = ['r/b:1']")]);
        assert_eq!(go(&mut jobs, &one, 10), ["create warm.a@10", "create warm.b@10"]);
        assert!(go(&mut jobs, &one, 500).is_empty(), "they run");
        end(&mut jobs, "warm.a@10", 500);
        assert!(go(&mut jobs, &one, 599).is_empty());
        assert_eq!(go(&mut jobs, &one, 600), ["create warm.a@600"], "on its schedule");
        // One says something else, the other is gone; a file of another's is none of ours.
        let (mine, _) = jobs
            .create("mine".parse().unwrap(), one["b"].as_ref().unwrap().plan.clone(), UnixMicros(0))
            .unwrap();
        jobs.apply((mine.id.clone(), Some(mine)));
        let two = files(&[("a", "images = ['r/a:1', 'r/c:1']\nevery = '100s'")]);
        assert_eq!(
            go(&mut jobs, &two, 700),
            ["withdraw warm.a@600", "withdraw warm.b@10", "create warm.a@700"]
        );
        // One that cannot be read changes nothing.
        let broken = files(&[("a", "images = 5")]);
        assert!(broken["a"].is_err());
        assert!(go(&mut jobs, &broken, 900).is_empty());
        // But what it said before is known as long as the service runs, and goes on.
        let as_before = as_it_was(two.clone(), broken.clone());
        assert_eq!(as_before, two);
        assert_eq!(as_it_was(as_before, broken.clone()), two, "and once more");
        assert_eq!(as_it_was(Files::new(), broken.clone()), broken);
        assert_eq!(as_it_was(two, one.clone()), one);
        let problems = problems(Path::new("/warm"), &broken);
        assert!(problems[0].starts_with("/warm/a.toml: ") && problems.len() == 1, "{problems:?}");
        // As it was at first: its job of then has ended long ago.
        end(&mut jobs, "warm.a@700", 900);
        assert_eq!(go(&mut jobs, &one, 900), ["create warm.a@900", "create warm.b@900"]);
        // The clock was set back: what is made then is not made again and again.
        end(&mut jobs, "warm.a@900", 900);
        assert_eq!(go(&mut jobs, &one, 300), ["create warm.a@300"]);
        assert!(go(&mut jobs, &one, 305).is_empty());
        end(&mut jobs, "warm.a@300", 310);
        assert!(go(&mut jobs, &one, 315).is_empty());
        assert_eq!(go(&mut jobs, &one, 410), ["create warm.a@410"]);
        end(&mut jobs, "warm.a@410", 411);
        assert!(go(&mut jobs, &one, 420).is_empty());
        assert_eq!(go(&mut jobs, &Files::new(), 421), ["withdraw warm.b@900"]);
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let table = [
            ("", "images"),
            ("images = []", "0 images"),
            ("images = ['r/A:1']", "r/A:1"),
            ("images = ['r/a:1', 'r/a:1']", "twice"),
            ("images = [{ image = 'r/a:1' }]", "missing field `platform`"),
            ("images = [\n'r/a:1',\n{ platform = 'linux/arm64' }]", "missing field `image`"),
            ("images = [\n'r/a:1',\n{ platform = 'linux/arm64' }]", "3 | { platform = 'linux/arm64' }]"),
            ("images = [{ image = 'r/a:1', platfrom = 'linux/arm64' }]", "unknown field `platfrom`"),
            ("images = [5]", "an image's name, or { image"),
            ("images = [{ image = 'r/a:1', platform = 'x' }]", "platform"),
            ("images = ['r/a:1']\nrate = '1 cow'", "1 cow"),
            ("images = ['r/a:1']\nevery = '1y'", "1y"),
            ("images = ['r/a:1']\nevery = '0s'", "0s"),
            ("images = ['r/a:1']\nclass = 'first'", "first"),
            ("images = ['r/a:1']\nspares = 2", "spares"),
            ("images = ['r/a:1']\nconcurrency = 65", "65"),
            ("images = ['r/a:1']\nconcurrency = 0", "expected a number of at least 1"),
            ("images = ['r/a:1']\nconcurrency = 0", "2 | concurrency = 0"),
            ("images = ['r/a:1']\ntenant = '../a'", "tenant"),
        ];
        for (text, says) in table {
            let error = Warm::parse(text).unwrap_err();
            assert!(error.contains(says), "{text:?}: {error}");
        }
        let all = "images = ['r/a:1', { image = 'r/b:2', platform = 'linux/arm64' }]\nclass = 'urgent'\nrate = '2MiB'\n\
                   concurrency = 3\ndeadline = '2h'\npin_for = '7d'\ntenant = 't'\nevery = '6h'";
        let plan = Warm::parse(all).unwrap().plan;
        assert_eq!(plan.images[1].platform, "linux/arm64");
        assert_eq!((plan.class, plan.bytes_per_second.map(NonZeroU64::get)), (Class::Urgent, Some(2 << 20)));
        assert_eq!(plan.deadline, Ttl::from_seconds(7200).ok());
    }

    #[test]
    fn files_are_read_by_name() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read(&directory.path().join("none")).unwrap(), Files::new());
        fs::create_dir(directory.path().join("c.toml")).unwrap();
        for (name, text) in
            [("a.toml", "images = ['r/a:1']"), ("b b.toml", "images = ['r/a:1']"), ("README", "")]
        {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let files = read(directory.path()).unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["a", "b b", "c"]);
        assert!(files["c"].as_ref().is_err_and(|error| error.contains("no file")));
        assert!(files["a"].is_ok());
        assert!(files["b b"].as_ref().is_err_and(|error| error.contains("name")));
    }
}
