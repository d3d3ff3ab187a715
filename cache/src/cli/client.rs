//! The commands that ask a running service.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use cowshed_proto::v1::{self, cowshed_client::CowshedClient};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use super::{
    Claim, Command, DiskMode, Failure, Output, PullPolicy, Reach, Who, gc, images, prefetch, print, pull,
    show, status, top, warn,
};
use crate::exit;

/// The API's largest page is far below this, in bytes.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// What only looks, or only marks, is answered at once or not at all.
const LIMIT: Duration = Duration::from_secs(60);

/// Asks the service.
pub(super) async fn run(command: Command) -> Result<(), Failure> {
    let at_leisure = matches!(
        command,
        Command::Acquire { .. }
            | Command::Pull { .. }
            | Command::Prefetch { .. }
            | Command::Prefetches { wait: true, .. }
            | Command::RemoveImage { .. }
            | Command::Gc { .. }
            | Command::Watch { .. }
            | Command::Drain { .. }
            | Command::Top { .. }
            | Command::Release { wait: Some(_), .. }
    );
    if at_leisure {
        return ask(command).await;
    }
    tokio::time::timeout(LIMIT, ask(command)).await.unwrap_or_else(|_| {
        let message =
            format!("the service has not answered within {LIMIT:?}: it hangs or is overloaded, see its log");
        Err(Failure { message, status: exit::for_code(tonic::Code::DeadlineExceeded) })
    })
}

async fn ask(command: Command) -> Result<(), Failure> {
    match command {
        Command::Offer { image, platform, tenant, mode, reach } => {
            let mode = disk_mode(mode).into();
            let spec = Some(v1::DiskSpec { image: image.clone(), platform, mode, scratch: None });
            let request = v1::OfferRequest { spec, tenant };
            let reply = connect(&reach.socket).await?.offer(request).await.map_err(|s| refused(&s))?;
            print(&show::offer(&image, &reply.into_inner(), reach.output))
        }
        Command::Acquire {
            vm,
            image,
            platform,
            who,
            pull,
            mode,
            scratch,
            scratch_raw,
            ttl,
            fresh,
            request_id,
            reach,
        } => {
            let scratch = scratch.map(|size| v1::ScratchSpec { size_bytes: size.0, raw: scratch_raw });
            let spec = Some(v1::DiskSpec { image, platform, mode: disk_mode(mode).into(), scratch });
            let request = v1::AcquireRequest {
                vm_id: vm,
                spec,
                request_id,
                ttl: ttl.map(seconds),
                fresh,
                credentials: who.credentials()?,
                tenant: who.tenant,
                pull_policy: pull_policy(pull).into(),
            };
            let reply = connect(&reach.socket).await?.acquire(request).await.map_err(|s| refused(&s))?;
            print(&show::acquired(&reply.into_inner(), reach.output))
        }
        Command::Release { vm, lease, generation, request_id, wait, abandon, reach } => {
            let request = v1::ReleaseRequest {
                vm_id: vm,
                lease_id: lease,
                generation,
                request_id,
                wait: wait.is_some(),
                abandon,
            };
            release(request, wait.map(Duration::from_secs), &reach).await
        }
        Command::Renew { lease, ttl, reach } => {
            let request = v1::RenewRequest { lease_id: lease, ttl: ttl.map(seconds) };
            let reply = connect(&reach.socket).await?.renew(request).await.map_err(|s| refused(&s))?;
            print(&show::lease(&reply.into_inner().lease.unwrap_or_default(), reach.output))
        }
        Command::Verify { claim, reach } => {
            let reply = verify(claim, &reach.socket).await?;
            print(&show::verified(&reply, reach.output))?;
            expect_verified(&reply)
        }
        Command::ExecVerified { claim, socket, command } => {
            expect_verified(&verify(claim, &socket).await?)?;
            Err(become_command(&command))
        }
        Command::Watch { after, reach } => watch(after, &reach).await,
        Command::Audit { repair, reach } => audit(repair, &reach).await,
        Command::Drain { leases, undo, reach } => drain(v1::DrainRequest { undo, leases }, &reach).await,
        Command::Leases { vm: Some(vm), shared: _, reach } => {
            let request = v1::GetLeaseRequest { by: Some(v1::get_lease_request::By::VmId(vm)) };
            let reply = connect(&reach.socket).await?.get_lease(request).await.map_err(|s| refused(&s))?;
            print(&show::lease(&reply.into_inner().lease.unwrap_or_default(), reach.output))
        }
        Command::Leases { vm: None, shared, reach } => {
            print(&show::leases(&all_leases(shared, &reach).await?, reach.output))
        }
        Command::Pull { image, platform, who, reach } => {
            let credentials = who.credentials()?;
            let request =
                v1::PullImageRequest { image: image.clone(), platform, tenant: who.tenant, credentials };
            let stream = connect(&reach.socket).await?.pull_image(request).await.map_err(|s| refused(&s))?;
            pull::follow(&image, stream.into_inner(), reach.output).await
        }
        Command::Prefetch { wish, reach } => {
            let wait = wish.wait;
            let mut client = connect(&reach.socket).await?;
            let created = client.create_prefetch(wish.request()?).await.map_err(|s| refused(&s))?;
            let job = created.into_inner().job.unwrap_or_default();
            // First of all, so that it can be found again whatever becomes of this command.
            if !wait || reach.output == Output::Text {
                print(&prefetch::brief(&job, reach.output))?;
            }
            if wait { follow_prefetch(&mut client, job.job_id, &reach).await } else { Ok(()) }
        }
        Command::Prefetches { job: Some(job_id), wait: true, reach } => {
            follow_prefetch(&mut connect(&reach.socket).await?, job_id, &reach).await
        }
        Command::Prefetches { job: Some(job_id), wait: false, reach } => {
            let request = v1::GetPrefetchRequest { job_id };
            let reply = connect(&reach.socket).await?.get_prefetch(request).await.map_err(|s| refused(&s))?;
            print(&prefetch::one(&reply.into_inner().job.unwrap_or_default(), reach.output))
        }
        Command::Prefetches { job: None, wait: _, reach } => {
            print(&prefetch::all(&all_prefetches(&reach).await?, reach.output))
        }
        Command::CancelPrefetch { job: job_id, reach } => {
            let request = v1::CancelPrefetchRequest { job_id };
            let reply =
                connect(&reach.socket).await?.cancel_prefetch(request).await.map_err(|s| refused(&s))?;
            print(&prefetch::brief(&reply.into_inner().job.unwrap_or_default(), reach.output))
        }
        Command::Images { reach } => {
            let request = v1::ListImagesRequest::default();
            let reply = connect(&reach.socket).await?.list_images(request).await.map_err(|s| refused(&s))?;
            print(&images::images(&reply.into_inner().images, reach.output))
        }
        Command::Pin { image, hold_for, spares, reach } => {
            let hold_for = hold_for.map(seconds);
            let request = v1::PinImageRequest { image: image.clone(), platform: None, hold_for, spares };
            let reply = connect(&reach.socket).await?.pin_image(request).await.map_err(|s| refused(&s))?;
            let reply = reply.into_inner();
            if let Some(why) = &reply.spares_limited {
                let (kept, asked) = (reply.spares, spares.unwrap_or_default());
                let fewer = (kept < asked).then(|| format!("{kept} spares are kept for {asked}: "));
                warn(&format!("{image}: {}{why}", fewer.unwrap_or_default()));
            }
            print(&images::pinned(&reply, reach.output))
        }
        Command::Unpin { image, reach } => {
            let request = v1::UnpinImageRequest { image: image.clone() };
            let reply = connect(&reach.socket).await?.unpin_image(request).await.map_err(|s| refused(&s))?;
            print(&images::unpinned(&image, reply.into_inner(), reach.output))
        }
        Command::RemoveImage { images: names, reach } => remove_images(names, &reach).await,
        Command::Gc { dry_run, free, reach } => make_room(dry_run, free.map(|size| size.0), &reach).await,
        Command::Status { top, reach } => status(top, &reach).await,
        Command::Top { by, interval, vms, once, reach } => {
            let asked =
                top::Asked { by, interval: Duration::from_secs(interval), vms, once, output: reach.output };
            top::run(&mut connect(&reach.socket).await?, asked).await
        }
        // Answered without a service, by the caller.
        Command::Serve { .. }
        | Command::Snapshotter { .. }
        | Command::Ledger { .. }
        | Command::Pool { .. }
        | Command::LvmChild { .. }
        | Command::Version { .. } => Ok(()),
    }
}

impl Who {
    pub(super) fn credentials(&self) -> Result<Option<v1::RegistryCredentials>, Failure> {
        use v1::registry_credentials::Secret;
        let Some(path) = &self.credentials else { return Ok(None) };
        // Not the parser's words: they may be those of a password.
        let bad = |what: &str| {
            let path = path.display();
            let message = format!(
                "--credentials {path}: {what}; it has to be {{\"username\": …, \"password\": …}} or {{\"identity_token\": …}}"
            );
            Failure { message, status: exit::for_code(tonic::Code::InvalidArgument) }
        };
        let read = if path.as_os_str() == "-" {
            std::io::read_to_string(std::io::stdin())
        } else {
            std::fs::read_to_string(path)
        };
        let text = read.map_err(|error| bad(&error.to_string()))?;
        let fields: HashMap<String, String> =
            serde_json::from_str(&text).map_err(|_| bad("it is no JSON object of strings"))?;
        let mut names: Vec<&str> = fields.keys().map(String::as_str).collect();
        names.sort_unstable();
        let of = |name: &str| fields.get(name).cloned().unwrap_or_default();
        let secret = match names[..] {
            ["password", "username"] => {
                Secret::Password(v1::Password { username: of("username"), password: of("password") })
            }
            ["identity_token"] => Secret::IdentityToken(of("identity_token")),
            _ => return Err(bad("it has other fields")),
        };
        Ok(Some(v1::RegistryCredentials { secret: Some(secret) }))
    }
}

fn pull_policy(policy: PullPolicy) -> v1::PullPolicy {
    match policy {
        PullPolicy::IfNotPresent => v1::PullPolicy::IfNotPresent,
        PullPolicy::Always => v1::PullPolicy::Always,
        PullPolicy::Never => v1::PullPolicy::Never,
    }
}

fn disk_mode(mode: DiskMode) -> v1::DiskMode {
    match mode {
        DiskMode::CopyOnWrite => v1::DiskMode::CopyOnWrite,
        DiskMode::SharedReadOnly => v1::DiskMode::SharedReadOnly,
    }
}

pub(super) fn seconds(seconds: u64) -> prost_types::Duration {
    prost_types::Duration { seconds: i64::try_from(seconds).unwrap_or(i64::MAX), nanos: 0 }
}

async fn release(request: v1::ReleaseRequest, wait: Option<Duration>, reach: &Reach) -> Result<(), Failure> {
    let (vm, lease) = (request.vm_id.clone(), request.lease_id.clone());
    let mut client = connect(&reach.socket).await?;
    let released = client.release(request);
    let reply = match wait {
        None => released.await,
        Some(limit) => tokio::time::timeout(limit, released).await.unwrap_or_else(|_| {
            let why = format!(
                "the disk of VM {vm} is released, and was still there after {} s: `cowshed leases {vm}` says why",
                limit.as_secs()
            );
            Err(Status::deadline_exceeded(why))
        }),
    };
    let reply = reply.map_err(|s| refused(&s))?.into_inner();
    match (wait, &reply.lease, reach.output) {
        (Some(_), None, Output::Text) => print(&format!("VM {vm} has no disk any more\n")),
        _ => print(&show::released(&vm, lease.as_deref(), &reply, reach.output)),
    }
}

async fn verify(claim: Claim, socket: &Path) -> Result<v1::VerifyDeviceResponse, Failure> {
    let request = v1::VerifyDeviceRequest {
        lease_id: claim.lease,
        path: claim.path,
        major: claim.number.map(|(major, _)| major),
        minor: claim.number.map(|(_, minor)| minor),
        dm_uuid: claim.dm_uuid,
        thin_id: claim.thin_id,
        generation: claim.generation,
        image_digest: claim.image_digest,
        scratch: claim.scratch,
    };
    let reply = connect(socket).await?.verify_device(request).await.map_err(|s| refused(&s))?;
    Ok(reply.into_inner())
}

fn expect_verified(reply: &v1::VerifyDeviceResponse) -> Result<(), Failure> {
    if reply.verified {
        return Ok(());
    }
    let message = format!("the device is not what the lease says: {}", show::differences(reply));
    Err(Failure { message, status: exit::for_code(tonic::Code::FailedPrecondition) })
}

/// Returns only if it cannot.
fn become_command(command: &[std::ffi::OsString]) -> Failure {
    use std::os::unix::process::CommandExt as _;
    let Some((program, arguments)) = command.split_first() else {
        return Failure { message: "there is no command to become".to_owned(), status: exit::USAGE };
    };
    let error = std::process::Command::new(program).args(arguments).exec();
    // As shells have it.
    let status = if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
    Failure { message: format!("{} cannot be started: {error}", program.display()), status }
}

async fn audit(repair: bool, reach: &Reach) -> Result<(), Failure> {
    let request = v1::AuditRequest { repair };
    let reply = connect(&reach.socket).await?.audit(request).await.map_err(|s| refused(&s))?.into_inner();
    print(&show::findings(&reply.findings, reach.output))?;
    let left = reply.findings.iter().filter(|finding| !finding.mended).count();
    if left == 0 {
        return Ok(());
    }
    let message = format!("findings left: {left}");
    Err(Failure { message, status: exit::for_code(tonic::Code::FailedPrecondition) })
}

async fn drain(request: v1::DrainRequest, reach: &Reach) -> Result<(), Failure> {
    let undo = request.undo;
    let mut stream =
        connect(&reach.socket).await?.drain(request).await.map_err(|s| refused(&s))?.into_inner();
    while let Some(rest) = stream.message().await.map_err(|s| refused(&s))? {
        print(&show::rest(&rest, reach.output))?;
    }
    if undo && reach.output == Output::Text {
        return print("no longer draining\n");
    }
    Ok(())
}

async fn watch(after: Option<u64>, reach: &Reach) -> Result<(), Failure> {
    let request = v1::WatchRequest { after_revision: after };
    let mut stream =
        connect(&reach.socket).await?.watch(request).await.map_err(|s| refused(&s))?.into_inner();
    while let Some(event) = stream.message().await.map_err(|s| refused(&s))? {
        print(&show::event(&event, reach.output))?;
    }
    Ok(())
}

/// Removes those that can be, and fails as the first that cannot has failed.
async fn remove_images(names: Vec<String>, reach: &Reach) -> Result<(), Failure> {
    let mut client = connect(&reach.socket).await?;
    let mut failures: Vec<Failure> = Vec::new();
    for image in names {
        let request = v1::RemoveImageRequest { image: image.clone() };
        match client.remove_image(request).await {
            Ok(reply) => print(&images::removed(&image, reply.into_inner(), reach.output))?,
            Err(status) => failures.push(refused(&status)),
        }
    }
    let Some(first) = failures.first() else { return Ok(()) };
    let status = first.status;
    let messages: Vec<String> = failures.into_iter().map(|failure| failure.message).collect();
    Err(Failure { message: messages.join("; "), status })
}

/// Exits with 7 (full) if something is lacking after it.
async fn make_room(dry_run: bool, free_bytes: Option<u64>, reach: &Reach) -> Result<(), Failure> {
    let mut client = connect(&reach.socket).await?;
    let report = if dry_run {
        let reply = client.plan_gc(v1::PlanGcRequest { free_bytes }).await.map_err(|s| refused(&s))?;
        reply.into_inner().report
    } else {
        let reply = client.run_gc(v1::RunGcRequest { free_bytes }).await.map_err(|s| refused(&s))?;
        reply.into_inner().report
    };
    let report = report.unwrap_or_default();
    print(&gc::report(&report, reach.output))?;
    if report.met {
        return Ok(());
    }
    let message = "not all that is lacking can be had".to_owned();
    Err(Failure { message, status: exit::for_code(tonic::Code::ResourceExhausted) })
}

/// Exits with 8 (unavailable) if the service runs but cannot serve.
async fn status(top: u32, reach: &Reach) -> Result<(), Failure> {
    let mut client = connect(&reach.socket).await?;
    let reply = client.get_status(v1::GetStatusRequest {}).await.map_err(|s| refused(&s))?;
    let status = reply.into_inner();
    // A containerd that does not answer is not waited for once more.
    let images = if status.serving { top } else { 0 };
    let request = v1::GetUsageRequest { vms: top, images, order: v1::UsageOrder::Own.into() };
    // What keeps it from telling is told by the status itself.
    let usage = match top {
        0 => None,
        _ => client.get_usage(request).await.ok().map(tonic::Response::into_inner),
    };
    print(&status::status(&status, usage.as_ref(), status::Look::of_stdout(), reach.output))?;
    if status.serving {
        return Ok(());
    }
    let message = format!("not serving: {}", status.problems.join("; "));
    Err(Failure { message, status: exit::for_code(tonic::Code::Unavailable) })
}

async fn all_leases(shared: bool, reach: &Reach) -> Result<Vec<v1::Lease>, Failure> {
    let mut client = connect(&reach.socket).await?;
    let mut leases = Vec::new();
    let mut request = v1::ListLeasesRequest { shared, ..v1::ListLeasesRequest::default() };
    loop {
        let page = client.list_leases(request.clone()).await.map_err(|s| refused(&s))?.into_inner();
        leases.extend(page.leases);
        if page.next_page_token.is_empty() {
            return Ok(leases);
        }
        request.page_token = page.next_page_token;
    }
}

async fn follow_prefetch(
    client: &mut CowshedClient<Channel>,
    job_id: String,
    reach: &Reach,
) -> Result<(), Failure> {
    let request = v1::WatchPrefetchRequest { job_id: job_id.clone() };
    let stream = client.watch_prefetch(request).await.map_err(|s| refused(&s))?;
    prefetch::follow(&job_id, stream.into_inner(), reach.output).await
}

async fn all_prefetches(reach: &Reach) -> Result<Vec<v1::Prefetch>, Failure> {
    let (mut client, mut jobs) = (connect(&reach.socket).await?, Vec::new());
    let mut request = v1::ListPrefetchesRequest::default();
    loop {
        let page = client.list_prefetches(request.clone()).await.map_err(|s| refused(&s))?.into_inner();
        jobs.extend(page.jobs);
        if page.next_page_token.is_empty() {
            return Ok(jobs);
        }
        request.page_token = page.next_page_token;
    }
}

async fn connect(socket: &Path) -> Result<CowshedClient<Channel>, Failure> {
    let path: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The URI is not used by the connector, but has to be one.
    let channel = Endpoint::from_static("http://cowshed").connect_with_connector(connector).await;
    let channel = channel.map_err(|error| {
        let what = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        let message = format!(
            "no service answers on {}: {what}; start it (systemctl start cowshed), or name its socket with --socket",
            socket.display()
        );
        Failure { message, status: exit::NO_SERVICE }
    })?;
    Ok(CowshedClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

pub(super) fn refused(status: &Status) -> Failure {
    use tonic_types::StatusExt as _;
    let info = status.get_details_error_info();
    // What did not come from the service is about the connection to it.
    let broke = status.code() == tonic::Code::Unavailable || status.message() == "transport error";
    if broke && info.is_none() {
        let what = status.message();
        let message = format!(
            "the connection to the service broke ({what}): it stopped or crashed; repeat, it is safe"
        );
        return Failure { message, status: exit::for_code(tonic::Code::Unavailable) };
    }
    let reason = info.map(|info| format!(" [{}]", info.reason)).unwrap_or_default();
    Failure { message: format!("{}{reason}", status.message()), status: exit::for_code(status.code()) }
}
