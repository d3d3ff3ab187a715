//! The command line: what can be asked, and what the exit status says.

mod client;
mod gc;
mod images;
mod ledger;
mod pool;
mod prefetch;
mod progress;
mod pull;
mod show;
mod status;
mod top;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::{
    config::{Config, DEFAULT_PATH, DEFAULT_SOCKET, LogFormat},
    exit,
    serve::{self, ServeError},
    time,
};

const EXIT_HELP: &str = "\
Exit status: 0 done; 1 failure; 2 wrong command line or invalid argument; 3 not found; 4 exists with another spec; \
5 denied; 6 failed precondition; 7 full; 8 unavailable, try again; 9 timeout; 10 corrupt image; 20 no service on the \
socket; serve, snapshotter, ledger, pool: 21 configuration, 22 state directory in use; snapshotter, ledger: 23 state directory \
unusable; ledger: 24 ledger damaged; serve, snapshotter: 25 the state directory's disk failed, 26 cannot listen; \
pool: 27 its metadata damaged.";

/// How long the end waits for threads that are in a call of the system's.
const GOODBYE: Duration = Duration::from_secs(5);
/// So long a thread stays that has nothing to do: to start one is a good part of what a request takes that comes after a pause.
const IDLE_THREAD: Duration = Duration::from_secs(300);

/// Root disks for microVMs: images pulled once, a copy-on-write snapshot per VM, under a lease.
#[derive(Debug, Parser)]
#[command(name = "cowshed", version, after_help = EXIT_HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// How to reach the service, and how to print what it says.
#[derive(Clone, Debug, Args)]
struct Reach {
    /// The service's Unix socket.
    #[arg(long, env = "COWSHED_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// How to print the result.
    #[arg(long, short, value_enum, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs: one JSON document, or one a line for a stream.
    Json,
}

/// What is said of a device; whatever is given is compared.
#[derive(Clone, Debug, Args)]
struct Claim {
    /// The lease's id.
    lease: String,
    /// Path of its node.
    #[arg(long)]
    path: Option<String>,
    /// Its number.
    #[arg(long, value_name = "MAJOR:MINOR", value_parser = number)]
    number: Option<(u32, u32)>,
    /// Its device-mapper uuid.
    #[arg(long)]
    dm_uuid: Option<String>,
    /// Its id in the thin pool.
    #[arg(long)]
    thin_id: Option<u32>,
    /// The lease's generation.
    #[arg(long)]
    generation: Option<u64>,
    /// The image's digest.
    #[arg(long)]
    image_digest: Option<String>,
    /// What is said is said of its scratch device.
    #[arg(long)]
    scratch: bool,
}

/// What a VM may do with its image's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DiskMode {
    /// It has a writable snapshot of its own.
    CopyOnWrite,
    /// All such VMs of the image have one device, which the kernel keeps read-only.
    SharedReadOnly,
}

/// What is asked of an image's registry. A reference with a digest means the same for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PullPolicy {
    /// Nothing, if the image is there.
    IfNotPresent,
    /// What the tag means now.
    Always,
    /// Nothing.
    Never,
}

/// By what VMs are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// By what they write a second.
    Rate,
    /// By what their disks have of their own.
    Own,
    /// By what they have written.
    Written,
}

/// To whom the pulls of a prefetch job give way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PrefetchClass {
    /// To all others.
    Background,
    /// To launchers.
    Normal,
    /// To nobody.
    Urgent,
}

/// Who asks for an image.
#[derive(Args, Debug)]
struct Who {
    /// Whose VM it is. What one tenant pulled with credentials of its own, another gets only if the registry lets it.
    #[arg(long, default_value = "default")]
    tenant: String,
    /// Who the tenant is to the registry, for this call only, instead of what the host is: a file, or - for standard input, with
    /// {"username": …, "password": …} or {"identity_token": …}.
    #[arg(long, value_name = "FILE")]
    credentials: Option<PathBuf>,
}

fn number(text: &str) -> Result<(u32, u32), String> {
    let parts =
        text.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parts.ok_or_else(|| format!("{text:?} is no MAJOR:MINOR"))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service.
    Serve {
        /// Configuration file; the default one need not exist.
        #[arg(long, short)]
        config: Option<PathBuf>,
        /// Only read the configuration and say whether it is right.
        #[arg(long)]
        check: bool,
    },
    /// Run only the snapshotter, for containerd's other clients.
    Snapshotter {
        /// Configuration file; the default one need not exist.
        #[arg(long, short)]
        config: Option<PathBuf>,
    },
    /// Say whether this host would give a VM a disk now, and how soon; changes nothing.
    Offer {
        /// Image reference, as in acquire.
        image: String,
        /// os/architecture[/variant]; the host's if absent.
        #[arg(long)]
        platform: Option<String>,
        /// Whose VM it would be; the default tenant's if absent.
        #[arg(long, default_value = "")]
        tenant: String,
        /// What the VM may do with the image's disk.
        #[arg(long, value_enum, default_value = "copy-on-write")]
        mode: DiskMode,
        #[command(flatten)]
        reach: Reach,
    },
    /// Give a VM a root disk, and print its device.
    Acquire {
        /// The VM's id.
        vm: String,
        /// Image reference, such as debian:12 or registry.example:5000/app@sha256:….
        image: String,
        /// os/architecture[/variant]; the host's if absent.
        #[arg(long)]
        platform: Option<String>,
        #[command(flatten)]
        who: Who,
        /// What is asked of the image's registry.
        #[arg(long, value_enum, default_value = "if-not-present")]
        pull: PullPolicy,
        /// What the VM may do with the image's disk.
        #[arg(long, value_enum, default_value = "copy-on-write")]
        mode: DiskMode,
        /// Beside a shared disk, an empty one of this size, such as 10GiB.
        #[arg(long, value_name = "SIZE")]
        scratch: Option<cowshed_pool::Bytes>,
        /// Without a filesystem.
        #[arg(long, requires = "scratch")]
        scratch_raw: bool,
        /// How long the lease holds unless it is renewed, in seconds; without limit if absent.
        #[arg(long, value_name = "SECONDS")]
        ttl: Option<u64>,
        /// Instead of the disk of a suspect lease (expired, or of an earlier boot), get a new one.
        #[arg(long)]
        fresh: bool,
        /// A name for this request, so that it is not made twice.
        #[arg(long, value_name = "ID")]
        request_id: Option<String>,
        #[command(flatten)]
        reach: Reach,
    },
    /// Give a VM's disk back. It goes when its device is closed.
    Release {
        /// The VM's id.
        vm: String,
        /// Only if the VM holds this very lease.
        #[arg(long)]
        lease: Option<String>,
        /// Only if the VM's lease is of this generation.
        #[arg(long)]
        generation: Option<u64>,
        /// A name for this request, so that it is not made twice.
        #[arg(long, value_name = "ID")]
        request_id: Option<String>,
        /// Return when the disk is gone, or fail (with status 9) after so many seconds; it is released all the same.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "86400")]
        wait: Option<u64>,
        /// Give the disk up for a launcher that does not give it back: whoever renews the lease is told so. Forces nothing.
        #[arg(long)]
        abandon: bool,
        #[command(flatten)]
        reach: Reach,
    },
    /// Let a lease hold for its time from now on.
    Renew {
        /// The lease's id.
        lease: String,
        /// For how long, in seconds; as before if absent.
        #[arg(long, value_name = "SECONDS")]
        ttl: Option<u64>,
        #[command(flatten)]
        reach: Reach,
    },
    /// Say whether a device is, now, the one that a lease was granted. Fails with status 6 if it is not.
    Verify {
        #[command(flatten)]
        claim: Claim,
        #[command(flatten)]
        reach: Reach,
    },
    /// Verify a device, and become the command if it is the one that the lease was granted.
    ExecVerified {
        #[command(flatten)]
        claim: Claim,
        /// The service's Unix socket.
        #[arg(long, env = "COWSHED_SOCKET", default_value = DEFAULT_SOCKET)]
        socket: PathBuf,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// Print every change of a lease and of an image, until interrupted.
    Watch {
        /// Begin after this revision instead of with all that there is.
        #[arg(long, value_name = "REVISION")]
        after: Option<u64>,
        #[command(flatten)]
        reach: Reach,
    },
    /// List leases, or show that of one VM.
    Leases {
        /// The VM's id.
        vm: Option<String>,
        /// List the leases of what VMs share, too.
        #[arg(long, conflicts_with = "vm")]
        shared: bool,
        #[command(flatten)]
        reach: Reach,
    },
    /// Take on nothing new, and wait for what is under way. A restarted service takes on new things again.
    Drain {
        /// Wait until no lease is held any more, too.
        #[arg(long)]
        leases: bool,
        /// Take on new things again.
        #[arg(long, conflicts_with = "leases")]
        undo: bool,
        #[command(flatten)]
        reach: Reach,
    },
    /// Compare ledger, containerd and kernel, and print what does not agree. Fails with status 6 if something is left.
    Audit {
        /// Do what loses nothing: make deleted containerd leases again, have devices activated, wake the reclaimer.
        #[arg(long)]
        repair: bool,
        #[command(flatten)]
        reach: Reach,
    },
    /// Fetch and unpack an image.
    Pull {
        /// Image reference.
        image: String,
        /// os/architecture[/variant]; the host's if absent.
        #[arg(long)]
        platform: Option<String>,
        #[command(flatten)]
        who: Who,
        #[command(flatten)]
        reach: Reach,
    },
    /// Have images pulled ahead of need by a job that survives restarts, and gives way to launchers.
    Prefetch {
        #[command(flatten)]
        wish: prefetch::Wish,
        #[command(flatten)]
        reach: Reach,
    },
    /// List prefetch jobs, or show what the images of one are at.
    Prefetches {
        /// The job's id.
        job: Option<String>,
        /// Follow the job to its end; fails if not all images are here then.
        #[arg(long, requires = "job")]
        wait: bool,
        #[command(flatten)]
        reach: Reach,
    },
    /// End a prefetch job. What it has pulled stays.
    CancelPrefetch {
        /// The job's id.
        job: String,
        #[command(flatten)]
        reach: Reach,
    },
    /// List images, with their pins and what uses them.
    Images {
        #[command(flatten)]
        reach: Reach,
    },
    /// Keep an image that is there: it is not removed while it is pinned. Pinned again, the new end counts.
    Pin {
        /// Image reference.
        image: String,
        /// How long, such as 90s, 15m, 12h, 7d or 4w; until it is unpinned if absent.
        #[arg(long = "for", value_name = "DURATION", value_parser = time::duration)]
        hold_for: Option<u64>,
        /// Keep at least so many disks of it ready as long as it is pinned.
        #[arg(long, value_name = "N")]
        spares: Option<u32>,
        #[command(flatten)]
        reach: Reach,
    },
    /// Let a pinned image go when nobody needs it.
    Unpin {
        /// Image reference.
        image: String,
        #[command(flatten)]
        reach: Reach,
    },
    /// Remove images of which no disk is made and that are not pinned; of one that has other names, only the name. Goes on
    /// after one that cannot be removed.
    #[command(visible_alias = "rmi")]
    RemoveImage {
        /// Image references.
        #[arg(required = true)]
        images: Vec<String>,
        #[command(flatten)]
        reach: Reach,
    },
    /// Make room in the pool: spares and images go that nobody needs, as far as something is lacking. Fails with status 7 if
    /// that is not enough.
    Gc {
        /// Only print what would go, and why.
        #[arg(long)]
        dry_run: bool,
        /// So much is to be free beside the head-room for new disks, such as 20GiB; otherwise what is above the high mark goes, and what
        /// was not used for longer than images are kept.
        #[arg(long, value_name = "SIZE")]
        free: Option<cowshed_pool::Bytes>,
        #[command(flatten)]
        reach: Reach,
    },
    /// Say whether the service can serve, how full the pool is and how soon it will be, and who takes most of it.
    Status {
        /// Of VMs and of images, so many: those that take most; 0 for none.
        #[arg(long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u32).range(..=1000))]
        top: u32,
        #[command(flatten)]
        reach: Reach,
    },
    /// Watch which VMs write, and what they and the images take, until interrupted.
    Top {
        /// By what VMs are ordered.
        #[arg(long, value_enum, default_value = "rate")]
        by: By,
        /// Time between two looks, in seconds.
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
        interval: u64,
        /// So many VMs; as many as the terminal has lines for if absent, 20 elsewhere.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
        vms: Option<u32>,
        /// Look twice, print once, and end; as it is where the output is no terminal, but for --output json.
        #[arg(long)]
        once: bool,
        #[command(flatten)]
        reach: Reach,
    },
    /// Check, back up or restore the ledger, which says which VM holds which disk.
    Ledger {
        #[command(subcommand)]
        command: ledger::LedgerCommand,
    },
    /// Make, extend, look at, check or repair the thin pool that the disks are in.
    Pool {
        #[command(subcommand)]
        command: pool::PoolCommand,
    },
    /// Run one command of LVM2's in a process that can be killed.
    #[command(name = cowshed_pool::lvm::CHILD, hide = true)]
    LvmChild {
        /// The kernel ends it after this time, in seconds.
        #[arg(long)]
        limit: u32,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Print the version.
    Version {
        /// How to print it.
        #[arg(long, short, value_enum, default_value = "text")]
        output: Output,
    },
}

impl Cli {
    /// Does what was asked.
    pub fn run(self) -> ExitCode {
        if let Command::LvmChild { limit, command } = &self.command {
            // Without a thread besides this one: what it locks and keeps is the process's.
            return ExitCode::from(cowshed_pool::lvm::run_child(*limit, command));
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().thread_keep_alive(IDLE_THREAD).enable_all().build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return fail(&format!("no threads can be had: {error}"), exit::FAILURE),
        };
        let status = match self.command {
            Command::Serve { config, check } => run_service(&runtime, config, check, serve::serve),
            Command::Snapshotter { config } => run_service(&runtime, config, false, serve::serve_snapshotter),
            Command::Ledger { command } => finish(ledger::run(command)),
            Command::Pool { command } => finish(runtime.block_on(pool::run(command))),
            Command::Version { output } => finish(print(&show::version(output))),
            command => finish(runtime.block_on(client::run(command))),
        };
        // A thread that is stuck in the kernel must not hold the end up.
        runtime.shutdown_timeout(GOODBYE);
        status
    }
}

fn run_service<F: Future<Output = Result<(), ServeError>>>(
    runtime: &tokio::runtime::Runtime,
    path: Option<PathBuf>,
    check: bool,
    serve: impl FnOnce(Config) -> F,
) -> ExitCode {
    let config = Config::read(path.as_deref()).and_then(|config| config.with_files(path.as_deref()));
    let config = match config {
        Ok(config) => config,
        Err(error) => return stopped(&ServeError::from(error)),
    };
    if let Err(error) = start_logging(&config) {
        return fail(&error, exit::CONFIGURATION);
    }
    if check {
        let read = path.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
        // Read has succeeded: only the default file can be absent.
        let which = if read.exists() { "" } else { " is absent, the defaults are in force" };
        return finish(print(&format!("{}{which}: the configuration is right\n", read.display())));
    }
    match runtime.block_on(serve(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => stopped(&error),
    }
}

fn start_logging(config: &Config) -> Result<(), String> {
    let filter = EnvFilter::try_new(&config.log.level)
        .map_err(|e| format!("the configuration's [log] level {:?} is wrong: {e}", config.log.level))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log.format {
        LogFormat::Human => subscriber.with_ansi(false).init(),
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
    Ok(())
}

/// What a client command could not do.
#[derive(Debug)]
struct Failure {
    message: String,
    status: u8,
}

fn stopped(error: &ServeError) -> ExitCode {
    fail(&error.to_string(), error.exit_status())
}

fn finish(outcome: Result<(), Failure>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => fail(&failure.message, failure.status),
    }
}

fn fail(message: &str, status: u8) -> ExitCode {
    // If stderr is gone as well, the status still tells.
    let _gone = writeln!(std::io::stderr(), "cowshed: {message}");
    ExitCode::from(status)
}

/// What is worth knowing of what has come to a good end.
fn warn(text: &str) {
    // The reply tells as well.
    let _gone = writeln!(std::io::stderr(), "warning: {text}");
}

/// Writes to stdout; a closed pipe is a failure like any other, and no panic.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| Failure { message: format!("cannot write to stdout: {e}"), status: exit::FAILURE })
}
