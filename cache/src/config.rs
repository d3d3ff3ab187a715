//! The configuration: what may stand in `cowshed.toml`, its defaults, and whether it makes sense.
//!
//! `deploy/cowshed.toml` lists every option with its default and unit; a test holds it to this file.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use cowshed_gc::{
    evict::{self, Floor, Growth, Marks, MarksError, Policy as GcPolicy, Share, Yields, Young},
    reserve::{self, Policy as Promised},
};
use cowshed_leases::{Grace, Tenant, Ttl, VmIdError};
use cowshed_pool::lvm::sizing::METADATA_MAX;
use cowshed_pool::{Bytes, Trim};
use serde::Deserialize;
use thiserror::Error as ThisError;

use crate::{
    cosign::Policy,
    evict::{Settings as GcSettings, Steps},
    image::{Checks, Others, PullLimits, Signatures, Unpacker, Verifiers},
    spares::{Settings, policy::Limits},
};

/// Where `serve` looks if it is not told; if nothing is there, everything has its default.
pub const DEFAULT_PATH: &str = "/etc/cowshed/cowshed.toml";
/// Where the service listens and clients call if they are not told.
pub const DEFAULT_SOCKET: &str = "/run/cowshed/cowshed.sock";

/// More layers of an image are not fetched at the same time: hardly any has as many.
const DOWNLOADS_MAX: usize = 256;

/// A configuration that cannot be used.
#[derive(Debug, ThisError)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("the configuration {path} cannot be read: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no TOML, or has a field that does not exist or has a wrong type.
    #[error("the configuration {path} is wrong: {what}")]
    Parse {
        /// The file.
        path: String,
        /// The parser's words, with line and field.
        what: String,
    },
    /// A value makes no sense.
    #[error("the configuration{}: [{section}] {field} is wrong: {what}", .path.as_ref().map(|path| format!(" {path}")).unwrap_or_default())]
    Value {
        /// The file, if it is known.
        path: Option<String>,
        /// Section of the file.
        section: &'static str,
        /// Field of the section.
        field: &'static str,
        /// Why, and what would be right.
        what: String,
    },
}

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How to be called.
    pub server: Server,
    /// Where to remember.
    pub state: State,
    /// Where to be scraped.
    pub metrics: Metrics,
    /// Which containerd.
    pub containerd: Containerd,
    /// Which thin pool.
    pub pool: Pool,
    /// What of it may be promised to disks.
    pub admission: Admission,
    /// What tenants may have.
    pub quota: Vec<Quota>,
    /// Cowshed's own snapshotter.
    pub snapshotter: Snapshotter,
    /// How to fetch images.
    pub registry: Registry,
    /// How to unpack and keep them.
    pub images: Images,
    /// Who has to agree before one is used.
    pub verification: Verification,
    /// What to pull ahead of need.
    pub prefetch: Prefetch,
    /// Which disks to make ahead of need.
    pub spares: Spares,
    /// How long leases are kept that nobody may want any more.
    pub leases: Leases,
    /// When to look after released disks.
    pub reclaim: Reclaim,
    /// What goes when the pool gets full.
    pub gc: Gc,
    /// How to log.
    pub log: Log,
}

/// `[server]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Unix socket of the API; made with mode 0600. Not used if systemd passes a socket.
    pub socket: PathBuf,
    /// TCP address of the API, without authentication; off if absent.
    pub tcp: Option<SocketAddr>,
    /// How long a stop waits for requests under way, in seconds.
    pub stop_timeout_seconds: u64,
}

/// `[state]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct State {
    /// Directory of the ledger. One `cowshed serve` at a time can have it.
    pub directory: PathBuf,
}

/// `[metrics]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Address of `GET /metrics`; "" turns it off.
    pub listen: String,
}

/// `[containerd]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Containerd {
    /// Its socket.
    pub address: PathBuf,
    /// The namespace for images, snapshots and leases.
    pub namespace: String,
    /// The snapshotter; it has to hand out block devices.
    pub snapshotter: String,
    /// Deadline of one call, in seconds.
    pub call_timeout_seconds: u64,
    /// Deadline for unpacking one layer, in seconds.
    pub unpack_timeout_seconds: u64,
}

/// `[pool]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pool {
    /// device-mapper name of the thin pool; "" means the only one there is.
    pub name: String,
    /// New disks are refused when less than this share of the pool's data is free, in percent.
    pub data_headroom_percent: u8,
    /// New disks are refused when less than this share of the pool's metadata is free, in percent.
    pub metadata_headroom_percent: u8,
    /// Whether a pool is used that does not zero new blocks: one disk's old bytes may then be read from another.
    pub allow_unzeroed: bool,
    /// Whether the disk below the pool is told what is free.
    pub trim: TrimWhen,
    /// At most so many bytes a second are trimmed.
    pub trim_rate: Bytes,
}

/// When the disk below the pool is told what is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrimWhen {
    /// Never, but for what guests discard themselves.
    Off,
    /// When a removed disk or layer is deleted, if it has enough of its own.
    OnReclaim,
}

/// `[admission]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admission {
    /// What disks are expected to write may be so much of what is free of the pool's data beyond its headroom, in percent; new disks
    /// are refused otherwise. Absent: there is no limit.
    pub overcommit_percent: Option<u32>,
    /// What a disk is expected to have written in the end, as long as nothing is known of its image.
    pub expected_bytes: Bytes,
    /// Whether what disks of the image had written when they were released counts instead.
    pub learn: bool,
    /// How often it is looked what disks have written, in seconds.
    pub look_seconds: u64,
}

/// `[[quota]]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// Whose; "*": that of each tenant that has none of its own.
    pub tenant: String,
    /// At most so many leases.
    pub leases: Option<u64>,
    /// At most so much that their disks have written or are expected to, whichever is more.
    pub bytes: Option<Bytes>,
}

/// `[snapshotter]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Snapshotter {
    /// Whether `cowshed serve` serves it.
    pub serve: ServeSnapshotter,
    /// Unix socket that containerd's `[proxy_plugins.cowshed]` names.
    pub socket: PathBuf,
    /// Size of disks whose image or snapshot has no size of its own.
    pub base_size: Bytes,
    /// How many snapshots are kept at the most that were made ahead of a Prepare; 0: none is made.
    pub heirs: usize,
}

/// Whether `cowshed serve` serves the snapshotter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServeSnapshotter {
    /// If [containerd] snapshotter is "cowshed".
    Auto,
    /// Yes.
    Always,
    /// No: there is none, or `cowshed snapshotter` serves it.
    Never,
}

/// `[registry]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Directory of containerd's `hosts.toml` files.
    pub config_path: PathBuf,
    /// docker's `config.json`: names and passwords for registries, and credential helpers. It need not be there.
    pub docker_config: PathBuf,
    /// Layers of one image that are fetched at the same time.
    pub concurrent_downloads: usize,
    /// A connection must be made within this time, in seconds.
    pub connect_timeout_seconds: u64,
    /// A download without a byte for this time is broken off, in seconds.
    pub read_timeout_seconds: u64,
    /// So is one that has had fewer bytes a second than this, over a minute. 0: none.
    pub rate_min: Bytes,
    /// How long its word counts that a tenant may have what another has pulled with credentials of its own, in seconds;
    /// 0: it is asked each time.
    pub access_check_seconds: u64,
}

/// `[images]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Images {
    /// Who unpacks layers.
    pub unpacker: Unpacker,
    /// An image whose layers have more bytes than this together, compressed, is refused.
    pub image_size_max: Bytes,
    /// A layer with more bytes than this, inflated, is refused.
    pub layer_size_max: Bytes,
    /// A layer with more files, directories and links than this is refused.
    pub layer_members_max: u64,
    /// Whether compressed layers stay in containerd's content store when they are unpacked.
    pub keep_layers: bool,
    /// How long it counts what a tag meant, in seconds; then the next Acquire asks the registry again. 0: for ever.
    pub revalidate_seconds: u64,
}

/// `[verification]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Verification {
    /// Directory of programs that say whether an image may be used, by containerd's convention for image verifiers. "":
    /// every image may.
    pub directory: PathBuf,
    /// A program that has not ended within this time refuses the image, in seconds.
    pub timeout_seconds: u64,
    /// Whether images that no entry of `cosign` is about are refused.
    pub signed_only: bool,
    /// Which images have to be signed by whom.
    pub cosign: Vec<Policy>,
}

/// `[prefetch]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prefetch {
    /// Directory of `*.toml` files that say which images to have; it need not be there. "": none.
    pub warm_set: PathBuf,
}

/// `[spares]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Spares {
    /// Whether disks are made ahead of need.
    pub enabled: bool,
    /// At least so many are kept ready of each image that is in use.
    pub image_min: u32,
    /// At most so many of one image, also by pins.
    pub image_max: u32,
    /// At most so many of all images.
    pub total_max: u32,
    /// In this time half of the demand for an image is forgotten, in seconds: as many as VMs have asked for at once are kept
    /// ready at first, and half as many after this time.
    pub half_life_seconds: u64,
    /// So many are made at a time; one at a time while VMs wait for their own disks.
    pub concurrency: u32,
    /// None are made while the pool's data or metadata is fuller than this, in percent.
    pub pool_max_percent: u8,
}

/// `[leases]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Leases {
    /// A lease that has expired is kept for so long, and as long as its device is open, in seconds.
    pub expired_grace_seconds: u64,
    /// A lease of an earlier boot of the host is kept for so long after the boot, and as long as its device is open, in
    /// seconds.
    pub boot_grace_seconds: u64,
    /// So many disks are made at a time.
    pub parallel: usize,
    /// So many Acquires wait for that at the most; further ones are refused at once.
    pub waiting_max: usize,
}

/// `[reclaim]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reclaim {
    /// A released disk that is still open is looked at again after 0.2 s, then after twice that, up to this many
    /// seconds.
    pub retry_seconds: u64,
    /// How often leases, snapshots and devices are compared without any cause, in seconds.
    pub interval_seconds: u64,
}

/// `[gc]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gc {
    /// Whether anything goes without somebody asking for it.
    pub enabled: bool,
    /// When so much of the pool's data is in use, in percent, spares and images go …
    pub data_high_percent: u8,
    /// … until it is no more than this, in percent.
    pub data_low_percent: u8,
    /// From here on, in percent, also images go that have not reached the least age, if `young_in_emergency` says so.
    pub data_emergency_percent: u8,
    /// The same for the pool's metadata.
    pub metadata_high_percent: u8,
    /// See above.
    pub metadata_low_percent: u8,
    /// See above.
    pub metadata_emergency_percent: u8,
    /// An image of which a disk was made, or that came, so short a time ago stays, in seconds.
    pub min_age_seconds: u64,
    /// Whether such an image goes in an emergency, when nothing else is left to go.
    pub young_in_emergency: bool,
    /// What no disk was made of for so long goes also without need, in seconds; 0: nothing does.
    pub retention_seconds: u64,
    /// How often that is looked at, in seconds.
    pub interval_seconds: u64,
    /// What a prefetch job has fetched stays for so long for who comes for it, in seconds.
    pub prefetched_seconds: u64,
    /// Whether all spares go before the first image. Otherwise those that are wanted go after the last.
    pub spares_first: bool,
    /// Whether the pool is extended from its volume group before anything goes.
    pub grow: bool,
    /// Its data grows by so much at a time, at the least: each time all disks stand still for a moment.
    pub data_step: Bytes,
    /// The same for its metadata. So much of the volume group is left to that.
    pub metadata_step: Bytes,
    /// Its data grows up to this in all; without it, as far as the volume group goes.
    pub data_max: Option<Bytes>,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// One line a record: for people or for programs.
    pub format: LogFormat,
    /// "error", "warn", "info", "debug", "trace", or directives as "cowshed=debug,info".
    pub level: String,
}

/// How a log record looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text.
    Human,
    /// JSON.
    Json,
}

impl Default for Server {
    fn default() -> Self {
        Self { socket: DEFAULT_SOCKET.into(), tcp: None, stop_timeout_seconds: 30 }
    }
}

impl Default for State {
    fn default() -> Self {
        Self { directory: "/var/lib/cowshed".into() }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9850".to_owned() }
    }
}

impl Default for Containerd {
    fn default() -> Self {
        Self {
            address: "/run/containerd/containerd.sock".into(),
            namespace: "default".to_owned(),
            snapshotter: "cowshed".to_owned(),
            call_timeout_seconds: 120,
            unpack_timeout_seconds: 1800,
        }
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            name: String::new(),
            data_headroom_percent: 5,
            metadata_headroom_percent: 10,
            allow_unzeroed: false,
            trim: TrimWhen::OnReclaim,
            trim_rate: Bytes(256 << 20),
        }
    }
}

impl Default for Admission {
    fn default() -> Self {
        Self { overcommit_percent: None, expected_bytes: Bytes(256 << 20), learn: true, look_seconds: 10 }
    }
}

impl Default for Snapshotter {
    fn default() -> Self {
        Self {
            serve: ServeSnapshotter::Auto,
            socket: "/run/cowshed/snapshotter.sock".into(),
            base_size: Bytes(10 << 30),
            heirs: 64,
        }
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            config_path: "/etc/containerd/certs.d".into(),
            docker_config: "/etc/cowshed/docker/config.json".into(),
            concurrent_downloads: 3,
            connect_timeout_seconds: 10,
            read_timeout_seconds: 60,
            rate_min: Bytes(16 << 10),
            access_check_seconds: PullLimits::default().access_check.as_secs(),
        }
    }
}

impl Default for Images {
    fn default() -> Self {
        let PullLimits { unpacker, image_bytes, layer, keep_layers, revalidate, .. } = PullLimits::default();
        Self {
            unpacker,
            image_size_max: Bytes(image_bytes),
            layer_size_max: Bytes(layer.bytes),
            layer_members_max: layer.members,
            keep_layers,
            revalidate_seconds: revalidate.as_secs(),
        }
    }
}

impl Default for Verification {
    fn default() -> Self {
        Self { directory: PathBuf::new(), timeout_seconds: 10, signed_only: false, cosign: Vec::new() }
    }
}

impl Default for Prefetch {
    fn default() -> Self {
        Self { warm_set: "/etc/cowshed/warm.d".into() }
    }
}

impl Default for Spares {
    fn default() -> Self {
        Self {
            enabled: true,
            image_min: 1,
            image_max: 128,
            total_max: 1024,
            half_life_seconds: 600,
            concurrency: 4,
            pool_max_percent: 80,
        }
    }
}

impl Default for Leases {
    fn default() -> Self {
        Self { expired_grace_seconds: 300, boot_grace_seconds: 86_400, parallel: 32, waiting_max: 4096 }
    }
}

impl Default for Reclaim {
    fn default() -> Self {
        Self { retry_seconds: 5, interval_seconds: 60 }
    }
}

impl Default for Gc {
    fn default() -> Self {
        Self {
            enabled: true,
            data_high_percent: 85,
            data_low_percent: 75,
            data_emergency_percent: 95,
            metadata_high_percent: 75,
            metadata_low_percent: 65,
            metadata_emergency_percent: 90,
            min_age_seconds: 600,
            young_in_emergency: true,
            retention_seconds: 0,
            interval_seconds: 3600,
            prefetched_seconds: 172_800,
            spares_first: true,
            grow: false,
            data_step: Bytes(10 << 30),
            metadata_step: Bytes(256 << 20),
            data_max: None,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Human, level: "info".to_owned() }
    }
}

impl ConfigError {
    /// It is of this file.
    fn of(self, file: &str) -> Self {
        match self {
            Self::Value { section, field, what, .. } => {
                Self::Value { path: Some(file.to_owned()), section, field, what }
            }
            other @ (Self::Read { .. } | Self::Parse { .. }) => other,
        }
    }
}

/// What is wrong with a file, with the line, in words for who has written it: the parser's name types of ours.
pub(crate) fn toml_words(error: &toml::de::Error) -> String {
    let words = [
        ("expected a nonzero u32", "expected a number of at least 1"),
        ("expected u8", "expected a number from 0 to 255"),
        ("expected u16", "expected a number from 0 to 65535"),
        ("expected u32", "expected a number from 0 to 4294967295"),
        ("expected u64", "expected a number of at least 0"),
        ("expected usize", "expected a number of at least 0"),
        ("invalid socket address syntax", "expected an address and a port, such as 127.0.0.1:9851"),
    ];
    let text = error.to_string();
    match words.iter().find(|(theirs, _)| error.message().contains(theirs)) {
        Some((theirs, ours)) => text.trim().replacen(theirs, ours, 1),
        None => text.trim().to_owned(),
    }
}

impl Config {
    /// Reads `path`. Without one, reads [`DEFAULT_PATH`] if it is there.
    ///
    /// # Errors
    /// Names the file and the field.
    pub fn read(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ConfigError::Read { path: file.display().to_string(), source }),
        };
        Self::parse(&text, &file.display().to_string())
    }

    fn parse(text: &str, path: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)
            .map_err(|e| ConfigError::Parse { path: path.to_owned(), what: toml_words(&e) })?;
        config.check().map_err(|error| error.of(path))?;
        Ok(config)
    }

    /// The metrics' address; `None` if they are off.
    ///
    /// # Errors
    /// If it is no address.
    pub fn metrics_address(&self) -> Result<Option<SocketAddr>, ConfigError> {
        if self.metrics.listen.is_empty() {
            return Ok(None);
        }
        let what = || format!("{:?} is no address:port; \"\" turns it off", self.metrics.listen);
        self.metrics.listen.parse().map(Some).map_err(|_| value("metrics", "listen", what()))
    }

    fn check(&self) -> Result<(), ConfigError> {
        self.metrics_address()?;
        for (section, field, path) in [
            ("server", "socket", &self.server.socket),
            ("state", "directory", &self.state.directory),
            ("containerd", "address", &self.containerd.address),
            ("registry", "config_path", &self.registry.config_path),
            ("registry", "docker_config", &self.registry.docker_config),
            ("snapshotter", "socket", &self.snapshotter.socket),
            ("verification", "directory", &self.verification.directory),
            ("prefetch", "warm_set", &self.prefetch.warm_set),
        ] {
            let is_off = ["verification", "prefetch"].contains(&section) && path.as_os_str().is_empty();
            if !path.is_absolute() && !is_off {
                return Err(value(section, field, format!("{:?} is not an absolute path", path.display())));
            }
        }
        for (field, name) in
            [("namespace", &self.containerd.namespace), ("snapshotter", &self.containerd.snapshotter)]
        {
            let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if name.is_empty() || name.len() > 76 || !name.chars().all(fits) {
                return Err(value(
                    "containerd",
                    field,
                    format!("{name:?}: use 1 to 76 letters, digits and \"-_.\""),
                ));
            }
        }
        for (section, field, number) in [
            ("containerd", "call_timeout_seconds", self.containerd.call_timeout_seconds),
            ("containerd", "unpack_timeout_seconds", self.containerd.unpack_timeout_seconds),
            ("registry", "connect_timeout_seconds", self.registry.connect_timeout_seconds),
            ("registry", "read_timeout_seconds", self.registry.read_timeout_seconds),
            ("verification", "timeout_seconds", self.verification.timeout_seconds),
            ("reclaim", "retry_seconds", self.reclaim.retry_seconds),
            ("reclaim", "interval_seconds", self.reclaim.interval_seconds),
            ("gc", "interval_seconds", self.gc.interval_seconds),
            ("admission", "look_seconds", self.admission.look_seconds),
            ("leases", "parallel", self.leases.parallel as u64),
            ("leases", "waiting_max", self.leases.waiting_max as u64),
            ("spares", "half_life_seconds", self.spares.half_life_seconds),
            ("spares", "concurrency", self.spares.concurrency.into()),
        ] {
            if !(1..=86_400).contains(&number) {
                return Err(value(section, field, format!("{number} is not between 1 and 86400")));
            }
        }
        let downloads = self.registry.concurrent_downloads;
        if !(1..=DOWNLOADS_MAX).contains(&downloads) {
            let what = format!("{downloads} is not between 1 and {DOWNLOADS_MAX}");
            return Err(value("registry", "concurrent_downloads", what));
        }
        for (field, number) in [
            ("image_size_max", self.images.image_size_max.0),
            ("layer_size_max", self.images.layer_size_max.0),
            ("layer_members_max", self.images.layer_members_max),
        ] {
            // No file is larger than the kernel can count.
            if number == 0 || i64::try_from(number).is_err() {
                return Err(value("images", field, format!("{number} is not between 1 and 2^63 - 1")));
            }
        }
        for (field, seconds) in [
            ("expired_grace_seconds", self.leases.expired_grace_seconds),
            ("boot_grace_seconds", self.leases.boot_grace_seconds),
        ] {
            Ttl::from_seconds(seconds).map_err(|e| value("leases", field, format!("{seconds}: {e}")))?;
        }
        self.gc.check()?;
        self.quotas()?;
        let overcommit = self.admission.overcommit_percent;
        if let Some(percent) = overcommit.filter(|percent| !(1..=100_000).contains(percent)) {
            let what = format!("{percent} is not between 1 and 100000; without it there is no limit");
            return Err(value("admission", "overcommit_percent", what));
        }
        if self.spares.pool_max_percent > 90 {
            let what = format!("{} is more than 90: VMs need the rest", self.spares.pool_max_percent);
            return Err(value("spares", "pool_max_percent", what));
        }
        for (field, percent) in [
            ("data_headroom_percent", self.pool.data_headroom_percent),
            ("metadata_headroom_percent", self.pool.metadata_headroom_percent),
        ] {
            if percent > 90 {
                return Err(value("pool", field, format!("{percent} is not between 0 and 90")));
            }
        }
        if self.pool.trim_rate.0 < 1 << 20 {
            let what = format!("{} is less than 1MiB a second: say trim = \"off\"", self.pool.trim_rate);
            return Err(value("pool", "trim_rate", what));
        }
        let levels = ["off", "error", "warn", "info", "debug", "trace"];
        let bare = |part: &&str| !part.contains('=') && !levels.contains(part);
        if let Some(word) = self.log.level.split(',').map(str::trim).find(bare) {
            // The logging library would take it for the name of a module, and log nothing else.
            let what = format!("{word:?} is no level: use one of {}, or MODULE=LEVEL", levels.join(", "));
            return Err(value("log", "level", what));
        }
        self.snapshotter.base_size.of_disk().map_err(|what| value("snapshotter", "base_size", what))?;
        Ok(())
    }

    /// What may be promised to disks, and to tenants.
    pub fn limits(&self) -> Promised {
        let Admission { overcommit_percent, expected_bytes, learn, look_seconds: _ } = self.admission;
        let limited = overcommit_percent.is_some() || self.quota.iter().any(|quota| quota.bytes.is_some());
        Promised {
            expected: evict::Bytes(expected_bytes.0),
            // To look at each disk that goes costs the pool, and without a limit nobody asks.
            learns: learn && limited,
            overcommit_percent,
            // Checked when it was read.
            quotas: self.quotas().unwrap_or_default(),
        }
    }

    fn quotas(&self) -> Result<reserve::Quotas, ConfigError> {
        let mut quotas = reserve::Quotas::default();
        for Quota { tenant, leases, bytes } in &self.quota {
            if leases.is_none() && bytes.is_none() {
                let what = format!(
                    "that of tenant {tenant:?} has neither leases nor bytes: say one, or leave it out"
                );
                return Err(value("[quota]", "leases", what));
            }
            let quota = reserve::Quota { leases: *leases, bytes: bytes.map(|bytes| evict::Bytes(bytes.0)) };
            let before = if tenant == "*" {
                quotas.any_other.replace(quota)
            } else {
                let name = tenant.parse::<Tenant>();
                let wrong =
                    |e: VmIdError| value("[quota]", "tenant", format!("{tenant:?}: {e}; \"*\" is any other"));
                quotas.own.insert(name.map_err(wrong)?, quota)
            };
            if before.is_some() {
                return Err(value("[quota]", "tenant", format!("{tenant:?} has two")));
            }
        }
        Ok(quotas)
    }

    /// Whether `cowshed serve` serves a snapshotter of its own.
    pub fn serves_snapshotter(&self) -> bool {
        match self.snapshotter.serve {
            ServeSnapshotter::Auto => self.containerd.snapshotter == "cowshed",
            ServeSnapshotter::Always => true,
            ServeSnapshotter::Never => false,
        }
    }

    /// The size of disks that images are unpacked into, in bytes, if the snapshotter is Cowshed's own.
    pub fn disk_bytes(&self) -> Option<u64> {
        let size = self.snapshotter.base_size.of_disk().unwrap_or(self.snapshotter.base_size);
        (self.containerd.snapshotter == "cowshed").then_some(size.0)
    }

    /// How spares are kept.
    pub fn spares(&self) -> Settings {
        let s = &self.spares;
        let limits = Limits {
            image_min: s.image_min,
            image_max: s.image_max,
            total_max: s.total_max,
            half_life: Duration::from_secs(s.half_life_seconds),
        };
        let Spares { enabled, concurrency, pool_max_percent, .. } = *s;
        // Above the marks spares are the first to go: none are made for that.
        let most = |mark: u8| if self.gc.enabled { pool_max_percent.min(mark) } else { pool_max_percent };
        let (data_max, metadata_max) = (most(self.gc.data_high_percent), most(self.gc.metadata_high_percent));
        Settings {
            enabled,
            limits,
            concurrency,
            data_max_percent: data_max,
            metadata_max_percent: metadata_max,
        }
    }

    /// What goes when the pool gets full. How it grows is said by who lets it grow.
    pub fn gc_policy(&self) -> GcPolicy {
        let gc = &self.gc;
        let limits = |marks: Result<Marks, MarksError>, otherwise: Marks, headroom: u8| evict::Limits {
            // Checked when it was read.
            marks: marks.unwrap_or(otherwise),
            admits_up_to: Share::try_from(100 - headroom.min(99)).unwrap_or(otherwise.emergency()),
            growth: Growth::Never,
        };
        GcPolicy {
            data: limits(gc.data_marks(), Marks::DATA, self.pool.data_headroom_percent),
            metadata: limits(gc.metadata_marks(), Marks::METADATA, self.pool.metadata_headroom_percent),
            kept_for_metadata: if gc.grow { evict::Bytes(gc.metadata_step.0) } else { evict::Bytes(0) },
            min_age: Duration::from_secs(gc.min_age_seconds),
            in_emergency: if gc.young_in_emergency { Young::Go } else { Young::Stay },
            retention: (gc.retention_seconds > 0).then(|| Duration::from_secs(gc.retention_seconds)),
            spares: Floor {
                // As many as each is asked for is known.
                kept: 0,
                yields: if gc.spares_first { Yields::BeforeImages } else { Yields::AfterImages },
            },
        }
    }

    /// How the pool grows by itself, if it does.
    pub fn gc_steps(&self) -> Option<Steps> {
        let up_to = |step: Bytes, ceiling: u64| Growth::UpTo {
            step: evict::Bytes(step.0),
            ceiling: evict::Bytes(ceiling),
        };
        let gc = &self.gc;
        gc.grow.then(|| Steps {
            data: up_to(gc.data_step, gc.data_max.map_or(u64::MAX, |most| most.0)),
            metadata: up_to(gc.metadata_step, METADATA_MAX),
        })
    }

    /// When anything goes.
    pub fn gc_settings(&self) -> GcSettings {
        GcSettings {
            enabled: self.gc.enabled,
            interval: Duration::from_secs(self.gc.interval_seconds),
            prefetched_for: Duration::from_secs(self.gc.prefetched_seconds),
        }
    }

    /// What the snapshotter is told.
    pub fn snapshotter_settings(&self) -> cowshed_pool::Settings {
        cowshed_pool::Settings {
            store: self.state.directory.join("snapshots.db"),
            pool: self.pool.name.clone(),
            base_size: self.snapshotter.base_size.of_disk().unwrap_or(self.snapshotter.base_size),
            allow_unzeroed: self.pool.allow_unzeroed,
            heirs: self.snapshotter.heirs,
            trim: match self.pool.trim {
                TrimWhen::Off => None,
                TrimWhen::OnReclaim => Some(Trim { rate: self.pool.trim_rate }),
            },
        }
    }

    /// Who has to agree before an image is used.
    pub fn checks(&self) -> Checks {
        let Verification { directory, timeout_seconds, signed_only, cosign } = &self.verification;
        let others = if *signed_only { Others::Refused } else { Others::Allowed };
        let signs = *signed_only || !cosign.is_empty();
        let signatures = signs.then(|| Signatures::new(cosign.clone(), others));
        let timeout = Duration::from_secs(*timeout_seconds);
        let is_on = !directory.as_os_str().is_empty();
        let verifiers = is_on.then(|| Verifiers::new(directory.clone(), timeout));
        Checks { signatures, verifiers }
    }

    /// The same, which was read from `path`, if the keys and certificates that it names can be used.
    ///
    /// # Errors
    /// Names the field and the file.
    pub fn with_files(self, path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH)).display().to_string();
        for policy in &self.verification.cosign {
            policy.trust().map_err(|unusable| {
                value("[verification.cosign]", unusable.field, unusable.what).of(&file)
            })?;
        }
        Ok(self)
    }

    /// How long leases are kept that nobody may want any more.
    pub fn grace(&self) -> Grace {
        // Checked when it was read.
        let time = |seconds| Ttl::from_seconds(seconds).unwrap_or(Ttl::SHORTEST);
        Grace { expired: time(self.leases.expired_grace_seconds), boot: time(self.leases.boot_grace_seconds) }
    }

    /// Deadline of one call to containerd.
    pub fn call_timeout(&self) -> Duration {
        Duration::from_secs(self.containerd.call_timeout_seconds)
    }
}

impl Gc {
    fn data_marks(&self) -> Result<Marks, MarksError> {
        Marks::new(self.data_low_percent, self.data_high_percent, self.data_emergency_percent)
    }

    fn metadata_marks(&self) -> Result<Marks, MarksError> {
        Marks::new(self.metadata_low_percent, self.metadata_high_percent, self.metadata_emergency_percent)
    }

    fn check(&self) -> Result<(), ConfigError> {
        self.data_marks().map_err(|e| value("gc", "data_high_percent", e.to_string()))?;
        self.metadata_marks().map_err(|e| value("gc", "metadata_high_percent", e.to_string()))?;
        if self.retention_seconds != 0 && self.retention_seconds < self.min_age_seconds {
            let what = format!(
                "{} is less than min_age_seconds, {}: nothing so young goes",
                self.retention_seconds, self.min_age_seconds
            );
            return Err(value("gc", "retention_seconds", what));
        }
        for (field, step) in [("data_step", self.data_step), ("metadata_step", self.metadata_step)] {
            if step.0 == 0 {
                return Err(value(
                    "gc",
                    field,
                    "it is 0: the pool would not grow; say grow = false".to_owned(),
                ));
            }
        }
        Ok(())
    }
}

fn value(section: &'static str, field: &'static str, what: String) -> ConfigError {
    ConfigError::Value { path: None, section, field, what }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_shipped_file_has_every_option_with_its_default() {
        let shipped = include_str!("../../deploy/cowshed.toml");
        assert_eq!(Config::parse(shipped, "shipped").unwrap(), Config::default());
        // What is commented out there is an option whose default is to be absent.
        let mut all = String::new();
        for line in shipped.lines() {
            let is_option =
                |rest: &&str| rest.starts_with("[[") || rest.contains(" = ") && !rest.contains(": ");
            let option = line.strip_prefix("# ").filter(is_option);
            all.push_str(option.unwrap_or(line));
            all.push('\n');
        }
        let with_all = Config::parse(&all, "shipped, all on").unwrap();
        assert!(with_all.server.tcp.is_some());
        assert_eq!(with_all.verification.cosign.len(), 2);
        assert_eq!((with_all.quota.len(), with_all.admission.overcommit_percent), (2, Some(100)));
        for field in FIELDS {
            let named = |l: &str| l.trim_start_matches("# ").starts_with(&format!("{field} = "));
            assert!(shipped.lines().any(named), "{field} is not in deploy/cowshed.toml");
        }
    }

    const FIELDS: &[&str] = &[
        "socket",
        "tcp",
        "stop_timeout_seconds",
        "directory",
        "listen",
        "address",
        "namespace",
        "snapshotter",
        "call_timeout_seconds",
        "unpack_timeout_seconds",
        "name",
        "data_headroom_percent",
        "metadata_headroom_percent",
        "allow_unzeroed",
        "overcommit_percent",
        "expected_bytes",
        "learn",
        "look_seconds",
        "tenant",
        "leases",
        "bytes",
        "trim",
        "trim_rate",
        "serve",
        "base_size",
        "heirs",
        "config_path",
        "unpacker",
        "image_size_max",
        "layer_size_max",
        "layer_members_max",
        "keep_layers",
        "revalidate_seconds",
        "concurrent_downloads",
        "connect_timeout_seconds",
        "read_timeout_seconds",
        "rate_min",
        "timeout_seconds",
        "signed_only",
        "images",
        "keys",
        "roots",
        "rekor_key",
        "identity",
        "identity_regex",
        "issuer",
        "warm_set",
        "expired_grace_seconds",
        "boot_grace_seconds",
        "retry_seconds",
        "interval_seconds",
        "enabled",
        "data_high_percent",
        "data_low_percent",
        "data_emergency_percent",
        "metadata_high_percent",
        "metadata_low_percent",
        "metadata_emergency_percent",
        "min_age_seconds",
        "young_in_emergency",
        "retention_seconds",
        "interval_seconds",
        "prefetched_seconds",
        "spares_first",
        "grow",
        "data_step",
        "metadata_step",
        "data_max",
        "format",
        "level",
    ];

    #[test]
    fn mistakes_are_named() {
        let table = [
            ("[server]\nsokcet = \"/x\"", "sokcet"),
            ("[server]\nsocket = 5", "socket"),
            ("[server]\nsocket = \"x.sock\"", "[server] socket"),
            ("[state]\ndirectory = \"\"", "[state] directory"),
            ("[containerd]\nnamespace = \"a b\"", "[containerd] namespace"),
            ("[containerd]\nsnapshotter = \"\"", "[containerd] snapshotter"),
            ("[containerd]\ncall_timeout_seconds = 0", "[containerd] call_timeout_seconds"),
            ("[registry]\nconcurrent_downloads = 0", "c.toml: [registry] concurrent_downloads"),
            ("[registry]\nconcurrent_downloads = 257", "257 is not between 1 and 256"),
            ("[registry]\nread_timeout_seconds = -1", "expected a number of at least 0"),
            ("[registry]\nread_timeout_seconds = -1", "read_timeout_seconds"),
            ("[pool]\ndata_headroom_percent = 300", "expected a number from 0 to 255"),
            ("[server]\ntcp = \"nonsense\"", "such as 127.0.0.1:9851"),
            ("[metrics]\nlisten = \"9850\"", "[metrics] listen"),
            ("[pool]\ndata_headroom_percent = 91", "[pool] data_headroom_percent"),
            ("[pool]\ntrim = \"daily\"", "daily"),
            ("[pool]\ntrim_rate = \"1KiB\"", "[pool] trim_rate"),
            ("[snapshotter]\nbase_size = \"1 cow\"", "1 cow"),
            ("[snapshotter]\nbase_size = \"1MiB\"", "[snapshotter] base_size"),
            ("[snapshotter]\nserve = \"perhaps\"", "perhaps"),
            ("[images]\nimage_size_max = \"0\"", "[images] image_size_max"),
            ("[images]\nlayer_size_max = \"0\"", "[images] layer_size_max"),
            ("[leases]\nboot_grace_seconds = 0", "[leases] boot_grace_seconds"),
            ("[verification]\ndirectory = \"v\"", "[verification] directory"),
            ("[[verification.cosign]]\nimages = [\"*\"]", "nobody is trusted"),
            ("[[verification.cosign]]\nkeys = [\"/k\"]", "images"),
            ("[[verification.cosign]]\nimages = [\"app:1\"]\nkeys = [\"/k\"]", "app:1"),
            ("[verification]\ncosign = true", "cosign"),
            ("[prefetch]\nwarm_set = \"warm.d\"", "[prefetch] warm_set"),
            ("[gc]\ndata_low_percent = 85", "[gc] data_high_percent"),
            ("[gc]\nmetadata_emergency_percent = 101", "[gc] metadata_high_percent"),
            ("[gc]\nretention_seconds = 599", "[gc] retention_seconds"),
            ("[gc]\ninterval_seconds = 0", "[gc] interval_seconds"),
            ("[gc]\ndata_step = \"0\"", "[gc] data_step"),
            ("[admission]\novercommit_percent = 0", "[admission] overcommit_percent"),
            ("[admission]\nlook_seconds = 0", "[admission] look_seconds"),
            ("[admission]\nexpected_bytes = \"much\"", "much"),
            ("[[quota]]\ntenant = \"red\"", "[[quota]] leases"),
            ("[[quota]]\nleases = 5", "tenant"),
            ("[[quota]]\ntenant = \"r d\"\nleases = 5", "[[quota]] tenant"),
            ("[[quota]]\ntenant = \"*\"\nleases = 5\n[[quota]]\ntenant = \"*\"\nleases = 6", "has two"),
            ("[[quota]]\ntenant = \"red\"\nsize = 5", "size"),
            ("[log]\nlevel = \"warning\"", "[log] level"),
            ("[log]\nformat = \"xml\"", "xml"),
            ("[registry", "line 1"),
        ];
        for (text, expected) in table {
            let error = Config::parse(text, "c.toml").unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn keys_that_cannot_be_used_are_named() {
        let text = "[[verification.cosign]]\nimages = [\"*\"]\nkeys = [\"/nonexistent/team.pub\"]";
        let error = Config::parse(text, "c.toml")
            .unwrap()
            .with_files(Some(Path::new("c.toml")))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("c.toml: [[verification.cosign]] keys is wrong: /nonexistent/team.pub"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_was_asked_for_must_be_there() {
        assert!(
            Config::read(Some(Path::new("/nonexistent/c.toml")))
                .unwrap_err()
                .to_string()
                .contains("/nonexistent")
        );
    }
}
