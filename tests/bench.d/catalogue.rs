//! The figures: their names, units and what they have to reach.

use serde_json::{Value, json};

use crate::samples::{Samples, rounded};

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    Higher,
    Lower,
}

/// One figure of a benchmark.
#[derive(Debug)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    /// Unit of the value, of `must` and of `aim`.
    unit: &'static str,
    /// Unit of both sides' percentiles.
    pub(crate) sample_unit: &'static str,
    better: Better,
    must: f64,
    aim: f64,
    /// What was measured, for the reader of BENCHMARKS.md.
    pub(crate) what: &'static str,
}

const fn ratio(
    name: &'static str,
    sample_unit: &'static str,
    must: f64,
    aim: f64,
    what: &'static str,
) -> Figure {
    Figure { name, unit: "ratio", sample_unit, better: Better::Higher, must, aim, what }
}

const fn lower(
    name: &'static str,
    unit: &'static str,
    sample_unit: &'static str,
    must: f64,
    aim: f64,
    what: &'static str,
) -> Figure {
    Figure { name, unit, sample_unit, better: Better::Lower, must, aim, what }
}

pub(crate) const PREPARE: Figure = ratio(
    "prepare_from_committed_p50",
    "ms",
    4.0,
    8.0,
    "one Prepare from a committed parent at a time; the p50s' ratio",
);
pub(crate) const AT_ONCE: Figure = ratio(
    "prepare_50_at_once_makespan",
    "ms",
    6.0,
    15.0,
    "50 Prepares sent at once, until the last reply; the p50s' ratio, a sample being a round of 50",
);
pub(crate) const CYCLES: Figure = ratio(
    "prepare_remove_cycles_per_second",
    "1/s",
    4.0,
    8.0,
    "Prepare, then Remove, by some workers for some time; containerd collects when it does by itself. The time ends when \
     a last collection has run and every device is gone from the kernel. The p50s' ratio, a sample being a round",
);
pub(crate) const RECLAIM: Figure = lower(
    "prepare_p99_while_reclaiming_200",
    "ratio",
    "ms",
    2.0,
    1.2,
    "p99 of one Prepare at a time from the moment at which the lease of 200 written devices is deleted until all their \
     blocks are free, against its own p99 just before; the sides' percentiles are those while reclaiming",
);
pub(crate) const UNPACK: Figure = ratio(
    "unpack_30_layers",
    "ms",
    3.0,
    8.0,
    "`ctr images pull --snapshotter …` of an image of 30 tiny layers from the host's registry, nothing of it being in \
     containerd; the p50s' ratio",
);
pub(crate) const PREPARE_STARTS: Figure = lower(
    "processes_per_prepare",
    "processes",
    "processes",
    0.0,
    0.0,
    "programs started system-wide (sched_process_exec) from a Prepare until udev is quiet; the mean",
);
pub(crate) const REMOVE_STARTS: Figure = lower(
    "processes_per_remove",
    "processes",
    "processes",
    0.0,
    0.0,
    "the same for a Remove, its collection and the end of its device; the mean",
);
pub(crate) const MEMORY: Figure = lower(
    "serve_memory_2000_snapshots",
    "MB",
    "MB",
    60.0,
    30.0,
    "resident memory (VmRSS, 10^6 bytes) of `cowshed serve` with 2,000 snapshots; the p50",
);

pub(crate) const LAYERS_30: Figure = ratio(
    "pull_30_layers_of_1_mb",
    "ms",
    4.0,
    10.0,
    "a pull of an image of 30 layers of 1 MB that does not compress, nothing of it being in containerd; the p50s' ratio",
);
pub(crate) const PYTHON: Figure = ratio(
    "pull_python_application",
    "ms",
    1.6,
    2.5,
    "the same of an application in Python, eight layers of Debian's packages and some of its own; the p50s' ratio",
);
pub(crate) const LARGE: Figure = ratio(
    "pull_one_large_layer",
    "ms",
    1.0,
    1.5,
    "the same of an image with one gzip layer of 500 MB; the p50s' ratio",
);
pub(crate) const SECOND: Figure = lower(
    "second_image_bytes",
    "ratio",
    "bytes",
    1.0,
    1.0,
    "bytes fetched of an image that shares its first six layers with one that is there, against the bytes of what is new \
     in it; no layer that is there was unpacked again",
);
pub(crate) const CALLERS_BYTES: Figure = lower(
    "callers_100_bytes",
    "ratio",
    "bytes",
    1.0,
    1.0,
    "bytes that the registry sent when 100 callers asked at once for one image that was not there, against its size",
);
pub(crate) const CALLERS_TIME: Figure = lower(
    "callers_100_makespan",
    "ratio",
    "ms",
    1.1,
    1.0,
    "until the last of the 100 had its answer, against one caller alone; the p50s' ratio",
);
pub(crate) const LARGE_MEMORY: Figure = lower(
    "memory_of_a_2_gb_layer",
    "MB",
    "MB",
    150.0,
    80.0,
    "the most resident memory (VmHWM, 10^6 bytes) of `cowshed serve` while it pulled one gzip layer of 2 GB, inflated",
);

pub(crate) const HIT: Figure = ratio(
    "acquire_spare_p50",
    "ms",
    25.0,
    100.0,
    "one Acquire at a time that a spare is handed out for, as its caller sees it, against a launcher that uses containerd \
     alone: a lease, Prepare of the image's snapshot under it, Mounts, and a look at the device; the p50s' ratio",
);
pub(crate) const HIT_P99: Figure =
    ratio("acquire_spare_p99", "ms", 12.0, 40.0, "the p99s' ratio of the same samples");
pub(crate) const HIT_TO_REFLINK: Figure = ratio(
    "acquire_spare_p50_to_reflink",
    "ms",
    3.0,
    10.0,
    "the same against `cp --reflink` of a file with the image's disk on XFS, fsync of the clone and of its directory, \
     `losetup` of it, and a look at the device; the p50s' ratio",
);
pub(crate) const OFFER: Figure = lower(
    "offer_p99_to_acquire_spare_p50",
    "ratio",
    "ms",
    1.0,
    1.0,
    "p99 of one Offer at a time against the p50 of an Acquire that a spare is handed out for",
);
pub(crate) const BASE: Figure = ratio(
    "acquire_base_p50",
    "ms",
    3.0,
    6.0,
    "one Acquire at a time of an image that is there, without a spare, against the launcher that uses containerd alone; \
     the p50s' ratio",
);
pub(crate) const HITS_AT_ONCE: Figure = ratio(
    "acquire_100_at_once_100_spares_makespan",
    "ms",
    20.0,
    50.0,
    "100 Acquires of as many VMs sent at once, 100 spares being there, until the last disk is there and was looked at, \
     against as many launches by containerd alone; the p50s' ratio, a sample being a round",
);
pub(crate) const BASES_AT_ONCE: Figure =
    ratio("acquire_100_at_once_no_spare_makespan", "ms", 4.0, 10.0, "the same without any spare");
pub(crate) const SUSTAINED: Figure = ratio(
    "acquire_release_per_second",
    "1/s",
    4.0,
    10.0,
    "Acquire, then Release, by some workers for some time, against launches by containerd alone, each followed by Remove \
     and the lease's end. The time ends when the last disk is gone from the kernel",
);
pub(crate) const CROWD: Figure = lower(
    "acquire_spare_p99_while_reclaiming_500",
    "ratio",
    "ms",
    2.0,
    1.2,
    "p99 of an Acquire that a spare is handed out for while 500 written disks, all released at once, are reclaimed, against \
     the p99 just before",
);
pub(crate) const LIVE: Figure = lower(
    "acquire_spare_p50_with_3000_live",
    "ratio",
    "ms",
    1.3,
    1.1,
    "p50 of one Acquire at a time that a spare is handed out for, with 3,000 leases held against with 10",
);
pub(crate) const LIVE_MEMORY: Figure = lower(
    "serve_memory_3000_live",
    "MB",
    "MB",
    80.0,
    40.0,
    "resident memory (VmRSS, 10^6 bytes) of `cowshed serve` with 3,000 leases held; the p50",
);

pub(crate) const GC_RATE: Figure = ratio(
    "gc_reclaim_rate_500",
    "MB/s",
    2.0,
    4.0,
    "how fast what 500 disks had in use, all released at once, is free in the pool again, from the first Release until the kernel \
     says so, while disks are asked for; against a launcher that uses containerd alone. The rates' ratio",
);
pub(crate) const GC_STALL: Figure = ratio(
    "gc_longest_stall_500",
    "ms",
    20.0,
    50.0,
    "the longest that an Acquire took meanwhile, a spare or none, against the longest that a launch by containerd alone took \
     while its own disks were reclaimed; the sides' percentiles are those of all of them",
);

/// Of the benchmark `snapshots`, in the order in which they are told.
pub(crate) const ALL: [&Figure; 8] =
    [&PREPARE, &AT_ONCE, &CYCLES, &RECLAIM, &UNPACK, &PREPARE_STARTS, &REMOVE_STARTS, &MEMORY];

/// Of the benchmark `images`.
pub(crate) const IMAGES: [&Figure; 7] =
    [&LAYERS_30, &PYTHON, &LARGE, &SECOND, &CALLERS_BYTES, &CALLERS_TIME, &LARGE_MEMORY];

/// Of the benchmark `acquire`.
pub(crate) const ACQUIRE: [&Figure; 11] = [
    &HIT,
    &HIT_P99,
    &HIT_TO_REFLINK,
    &BASE,
    &HITS_AT_ONCE,
    &BASES_AT_ONCE,
    &SUSTAINED,
    &CROWD,
    &LIVE,
    &LIVE_MEMORY,
    &OFFER,
];

/// Of the benchmark `gc`.
pub(crate) const GC: [&Figure; 2] = [&GC_RATE, &GC_STALL];

/// Of a benchmark by its name.
pub(crate) fn of(benchmark: &str) -> &'static [&'static Figure] {
    match benchmark {
        "snapshots" => &ALL,
        "images" => &IMAGES,
        "acquire" => &ACQUIRE,
        "gc" => &GC,
        _ => &[],
    }
}

impl Figure {
    /// A line of the results. `peer` is its name and measurements, if it has any.
    pub(crate) fn result(&self, value: f64, ours: &Samples, peer: Option<(&str, &Samples)>) -> Value {
        let peer = peer.map(|(name, samples)| {
            let mut peer = samples.summary();
            peer["name"] = json!(name);
            peer
        });
        json!({
            "figure": self.name,
            "unit": self.unit,
            "better": if self.better == Better::Higher { "higher" } else { "lower" },
            "value": rounded(value),
            "must": self.must,
            "aim": self.aim,
            "ours": ours.summary(),
            "peer": peer,
        })
    }
}
