//! The benchmark `images`: pulls by Cowshed against pulls by `ctr`, from the host's own registry, in turn.
//!
//! Before each pull containerd has nothing of any image, in its content store or in a snapshotter.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use clap::Args;
use cowshed_proto::v1::{PullImageRequest, cowshed_client::CowshedClient};
use futures_util::future::try_join_all;
use serde_json::{Value, json};

use crate::{
    Outcome,
    catalogue::{self, Figure},
    conditions, cowshed, memory,
    prepare::ratio,
    samples::Samples,
    snapshots::{Effort, check_names, is_wanted, meta, tell},
};

const REGISTRY_LOG: &str = "/var/log/cowshed-host/registry.log";
/// Who pulls.
const OURS: &str = "cowshed pull";
const PEER: &str = "ctr images pull, devmapper";
const PEER_ON_OURS: &str = "ctr images pull, cowshed";
const CALLERS: usize = 100;
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Args)]
pub(crate) struct Options {
    /// Only these figures.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// How much is measured.
    #[arg(long, value_enum, default_value = "full")]
    effort: Effort,
}

pub(crate) fn run(options: Options) -> Outcome {
    check_names(&options.only, &catalogue::IMAGES)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(measure_all(options))
}

async fn measure_all(options: Options) -> Outcome {
    let rounds = if options.effort == Effort::Full { 3 } else { 1 };
    meta(&conditions::of_images(options.effort)?);
    let mut failed = 0;
    for measurement in Measurement::ALL {
        let figures = measurement.figures();
        if !is_wanted(&options.only, figures) {
            continue;
        }
        let begun = Instant::now();
        let results = measurement.run(rounds).await;
        failed += usize::from(!tell(figures, &results, begun));
    }
    if failed > 0 { Err(format!("{failed} of the measurements failed").into()) } else { Ok(()) }
}

/// What is measured in one go.
#[derive(Clone, Copy)]
enum Measurement {
    Layers,
    Python,
    Second,
    Callers,
    Large,
    Memory,
}

impl Measurement {
    const ALL: [Self; 6] =
        [Self::Layers, Self::Python, Self::Second, Self::Callers, Self::Large, Self::Memory];

    fn figures(self) -> &'static [&'static Figure] {
        match self {
            Self::Layers => &[&catalogue::LAYERS_30],
            Self::Python => &[&catalogue::PYTHON],
            Self::Second => &[&catalogue::SECOND],
            Self::Callers => &[&catalogue::CALLERS_BYTES, &catalogue::CALLERS_TIME],
            Self::Large => &[&catalogue::LARGE],
            Self::Memory => &[&catalogue::LARGE_MEMORY],
        }
    }

    async fn run(self, rounds: usize) -> Outcome<Vec<Value>> {
        match self {
            Self::Layers => Ok(vec![against(&catalogue::LAYERS_30, "layers:30", rounds, true).await?]),
            Self::Python => Ok(vec![against(&catalogue::PYTHON, "python:app", rounds, true).await?]),
            Self::Large => Ok(vec![against(&catalogue::LARGE, "large:500", rounds.min(2), false).await?]),
            Self::Second => Ok(vec![second().await?]),
            Self::Callers => callers(rounds).await,
            Self::Memory => Ok(vec![peak().await?]),
        }
    }
}

fn image(name: &str) -> String {
    format!("127.0.0.1:5000/bench/{name}")
}

/// Both sides in turn; one pull of each before the first counts for nobody: it fills the registry's page cache.
async fn against(figure: &Figure, name: &str, rounds: usize, on_ours_too: bool) -> Outcome<Value> {
    let name = image(name);
    pull(OURS, &name).await?;
    let (mut ours, mut peer, mut peer_on_ours) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..rounds {
        let mut turns = [(OURS, &mut ours), (PEER, &mut peer)];
        if round % 2 == 1 {
            turns.reverse();
        }
        for (who, samples) in turns {
            samples.add_time(pull(who, &name).await?);
        }
    }
    if on_ours_too {
        peer_on_ours.add_time(pull(PEER_ON_OURS, &name).await?);
        meta(&json!({ "ctr_on_the_cowshed_snapshotter": { figure.name: peer_on_ours.summary() } }));
    }
    let bytes = sizes(&name)?.values().sum::<u64>();
    meta(
        &json!({ "conditions": { figure.name: format!("{rounds} rounds, {} MB compressed", bytes / 1_000_000) } }),
    );
    Ok(figure.result(ratio(&peer, &ours)?, &ours, Some((PEER, &peer))))
}

/// One pull of what is not there.
async fn pull(who: &str, name: &str) -> Outcome<Duration> {
    evict().await?;
    let begun = Instant::now();
    match who {
        OURS => run_program("cowshed", &["pull", name])?,
        _ => {
            let snapshotter = if who == PEER { "devmapper" } else { "cowshed" };
            let hosts = "/etc/containerd/certs.d";
            run_program("ctr", &["images", "pull", "--hosts-dir", hosts, "--snapshotter", snapshotter, name])?
        }
    };
    let took = begun.elapsed();
    eprintln!("  {who}: {took:.1?}");
    Ok(took)
}

/// The image that shares most of its layers with one that is there: what is fetched and unpacked of it.
async fn second() -> Outcome<Value> {
    pull(OURS, &image("python:app")).await?;
    let (first, next) = (sizes(&image("python:app"))?, sizes(&image("python:next"))?);
    let new: BTreeMap<&String, u64> =
        next.iter().filter(|(digest, _)| !first.contains_key(*digest)).map(|(d, s)| (d, *s)).collect();
    let (mark, before) = (mark()?, unpacked()?);
    run_program("cowshed", &["pull", &image("python:next")])?;
    let fetched = fetched_since(mark)?;
    let layers = unpacked()? - before;
    let wanted = new.values().sum::<u64>();
    meta(&json!({ "second_image": {
        "bytes_of_all": next.values().sum::<u64>(), "bytes_new": wanted, "bytes_fetched": fetched,
        "layers_unpacked": layers,
    } }));
    // The configuration is no layer.
    if layers + 1 != new.len() {
        return Err(format!("{layers} layers were unpacked; {} are new", new.len() - 1).into());
    }
    let value = fetched as f64 / wanted as f64;
    Ok(catalogue::SECOND.result(value, &Samples::of(fetched as f64), None))
}

/// A hundred callers of one cold image against one.
async fn callers(rounds: usize) -> Outcome<Vec<Value>> {
    let name = image("python:app");
    let (mut one, mut all, mut bytes) = (Samples::default(), Samples::default(), Samples::default());
    let size = sizes(&name)?.values().sum::<u64>();
    for _ in 0..rounds {
        evict().await?;
        one.add_time(call_at_once(&name, 1).await?);
        evict().await?;
        let mark = mark()?;
        all.add_time(call_at_once(&name, CALLERS).await?);
        bytes.add(fetched_since(mark)? as f64);
    }
    let of_bytes = bytes.median().ok_or("nothing was measured")? / size as f64;
    let of_time = ratio(&all, &one)?;
    Ok(vec![
        catalogue::CALLERS_BYTES.result(of_bytes, &bytes, None),
        catalogue::CALLERS_TIME.result(of_time, &all, Some(("one caller", &one))),
    ])
}

async fn call_at_once(name: &str, callers: usize) -> Outcome<Duration> {
    let begun = Instant::now();
    try_join_all((0..callers).map(|_| async {
        let channel = cowshed::channel(Path::new(cowshed::SOCKET)).await?;
        let request = PullImageRequest { image: name.to_owned(), ..PullImageRequest::default() };
        let mut pictures = CowshedClient::new(channel).pull_image(request).await?.into_inner();
        let mut image = None;
        while let Some(picture) = pictures.message().await? {
            image = picture.image;
        }
        image.map(drop).ok_or_else(|| "a pull ended without an image".into())
    }))
    .await
    .map(|_: Vec<()>| begun.elapsed())
}

/// What a layer of 2 GB costs the service in memory.
async fn peak() -> Outcome<Value> {
    evict().await?;
    let serve = memory::pid_of("cowshed", Some("serve"))?;
    let before = memory::megabytes(serve, "VmRSS")?;
    // "5": the peak begins anew (proc(5), clear_refs).
    fs::write(format!("/proc/{serve}/clear_refs"), "5")?;
    run_program("cowshed", &["pull", &image("large:2000")])?;
    let peak = memory::megabytes(serve, "VmHWM")?;
    meta(
        &json!({ "memory": { "before_mb": before, "containerd_mb": memory::megabytes(memory::pid_of("containerd", None)?, "VmRSS")? } }),
    );
    Ok(catalogue::LARGE_MEMORY.result(peak, &Samples::of(peak), None))
}

/// Removes all images with all that they hold, in both snapshotters, and waits until the pools are at rest.
async fn evict() -> Outcome {
    for name in run_program("ctr", &["images", "ls", "-q"])?.lines() {
        run_program("ctr", &["images", "rm", "--sync", name])?;
    }
    let begun = Instant::now();
    loop {
        run_program("ctr", &["leases", "create", "--id", "bench-nudge"])?;
        run_program("ctr", &["leases", "delete", "--sync", "bench-nudge"])?;
        let content = run_program("ctr", &["content", "ls", "-q"])?;
        if content.trim().is_empty() && unpacked()? == 0 && unpacked_in("devmapper")? == 0 {
            break;
        }
        if begun.elapsed() > PATIENCE {
            return Err("what was pulled is not collected".into());
        }
    }
    run_program("sync", &[])?;
    // The snapshotters free their blocks behind the answer.
    tokio::time::sleep(Duration::from_secs(5)).await;
    Ok(())
}

/// Layers that are unpacked in Cowshed's snapshotter.
fn unpacked() -> Outcome<usize> {
    unpacked_in("cowshed")
}

fn unpacked_in(snapshotter: &str) -> Outcome<usize> {
    let listed = run_program("ctr", &["snapshots", "--snapshotter", snapshotter, "ls"])?;
    Ok(listed.lines().filter(|line| line.contains("Committed")).count())
}

/// Blobs of an image and their sizes, as the registry has it.
fn sizes(name: &str) -> Outcome<BTreeMap<String, u64>> {
    let (repository, tag) = name.rsplit_once(':').ok_or("no tag")?;
    let repository = repository.trim_start_matches("127.0.0.1:5000/");
    let url = format!("http://127.0.0.1:5000/v2/{repository}/manifests/{tag}");
    let accept = "Accept: application/vnd.oci.image.manifest.v1+json";
    let manifest: Value = serde_json::from_str(&run_program("curl", &["-sf", "-H", accept, &url])?)?;
    let layers = manifest["layers"].as_array().cloned().unwrap_or_default();
    let blob = |blob: &Value| Some((blob["digest"].as_str()?.to_owned(), blob["size"].as_u64()?));
    Ok(layers.iter().chain([&manifest["config"]]).filter_map(blob).collect())
}

/// The end of the registry's log.
fn mark() -> Outcome<usize> {
    Ok(fs::read(REGISTRY_LOG)?.len())
}

/// Bytes of blobs that the registry has sent since.
fn fetched_since(mark: usize) -> Outcome<u64> {
    let log = fs::read(REGISTRY_LOG)?;
    let log = String::from_utf8_lossy(log.get(mark..).unwrap_or_default()).into_owned();
    let bytes = log.lines().filter(|line| line.contains("\"GET /v2/") && line.contains("/blobs/"));
    // … "GET /v2/… HTTP/1.1" 200 BYTES …
    Ok(bytes
        .filter_map(|line| line.split("HTTP/1.1\" ").nth(1)?.split(' ').nth(1)?.parse::<u64>().ok())
        .sum())
}

fn run_program(program: &str, arguments: &[&str]) -> Outcome<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(format!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
