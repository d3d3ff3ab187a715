//! Requests that cannot be granted: each refused with a reason of its own that names the thing, leaving nothing behind.

use tonic::Code;

use crate::{
    Test,
    support::{
        Outcome,
        api::{acquire_request, block_on, client, refusal},
        audit::nothing_left,
        check,
        command::run,
        containerd,
        cow::{acquire, cowshed, host, image, refused, release, service_pid},
        fake_registry::{FakeRegistry, Hosts},
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("unknown_image_and_tag", unknown_image_and_tag),
    ("bad_reference", bad_reference),
    ("bad_vm_id", bad_vm_id),
    ("bad_platform", bad_platform),
    ("platform_that_the_image_has_not", platform_that_the_image_has_not),
    ("unreachable_registry", unreachable_registry),
    ("no_plain_http_without_hosts_toml", no_plain_http_without_hosts_toml),
    ("broken_hosts_toml", broken_hosts_toml),
    ("containerd_stopped", containerd_stopped),
    ("no_service", no_service),
    ("wrong_command_line", wrong_command_line),
];

/// The next good request works.
fn still_serves() -> Outcome {
    nothing_left()?;
    acquire("bad-then-good", &image("tiny:1"))?;
    release("bad-then-good")
}

fn unknown_image_and_tag() -> Outcome {
    for name in ["nowhere:1", "tiny:no-such-tag"].map(image) {
        refused("bad-1", &name, 3, "IMAGE_NOT_FOUND", &[&name, "127.0.0.1:5000"])?;
        check!(!containerd::images()?.contains(&name), "{name} is listed");
        let pulled = cowshed(&["pull", &name])?;
        pulled.fails(3, &["[IMAGE_NOT_FOUND]", &name])?;
    }
    let absent = format!("{}@sha256:{}", image("tiny"), "0".repeat(64));
    refused("bad-1", &absent, 3, "IMAGE_NOT_FOUND", &[&absent])?;
    still_serves()
}

fn bad_reference() -> Outcome {
    for name in ["", "UPPER/case:1", "a b", "x@sha256:12", "http://127.0.0.1:5000/cowshed/tiny:1", "a:b:c"] {
        refused("bad-2", name, 2, "IMAGE_REFERENCE_INVALID", &[&format!("{name:?}")])?;
        let error =
            block_on(async { refusal(client().await?.acquire(acquire_request("bad-2", name)).await) })?;
        same!(error.code, Code::InvalidArgument, "{error:?}");
        same!(error.metadata.get("field").map(String::as_str), Some("image"), "the field of {error:?}");
    }
    still_serves()
}

fn bad_vm_id() -> Outcome {
    let long = "x".repeat(129);
    for vm in ["", &long, "a\u{1}b", "..", "a..b", "a/b", "a b", ".hidden", "vmé"] {
        refused(vm, &image("tiny:1"), 2, "VM_ID_INVALID", &["vm_id"])?;
        let error = block_on(async {
            refusal(client().await?.acquire(acquire_request(vm, &image("tiny:1"))).await)
        })?;
        same!((error.code, error.reason.as_str()), (Code::InvalidArgument, "VM_ID_INVALID"), "{error:?}");
        same!(error.metadata.get("field").map(String::as_str), Some("vm_id"), "the field of {error:?}");
        check!(!error.message.contains('\u{1}'), "a control character in {error:?}");
        cowshed(&["release", "--", vm])?.fails(2, &["[VM_ID_INVALID]"])?;
    }
    let longest = "x".repeat(128);
    acquire(&longest, &image("tiny:1"))?;
    release(&longest)
}

fn bad_platform() -> Outcome {
    for platform in ["linux", "linux/amd64/v1/more", "linux/", "Linux/AMD 64", "/"] {
        let ran = cowshed(&["acquire", "bad-3", &image("tiny:1"), "--platform", platform])?;
        ran.fails(2, &["[PLATFORM_INVALID]", platform])?;
    }
    still_serves()
}

fn platform_that_the_image_has_not() -> Outcome {
    let name = image("tiny:arm64only");
    refused("bad-4", &name, 3, "PLATFORM_NOT_FOUND", &[&name, "linux/amd64", "linux/arm64"])?;
    let error = block_on(async { refusal(client().await?.acquire(acquire_request("bad-4", &name)).await) })?;
    same!(error.code, Code::NotFound, "{error:?}");
    check!(error.metadata.values().any(|value| value.contains("linux/arm64")), "the metadata of {error:?}");
    let ran = cowshed(&["acquire", "bad-4", &image("tiny:1"), "--platform", "linux/arm64"])?;
    ran.fails(3, &["[PLATFORM_NOT_FOUND]", "linux/arm64", "linux/amd64"])?;
    still_serves()
}

fn unreachable_registry() -> Outcome {
    let name = "127.0.0.1:1/cowshed/tiny:1";
    refused("bad-5", name, 8, "REGISTRY_UNAVAILABLE", &[name, "refused"])?;
    still_serves()
}

fn no_plain_http_without_hosts_toml() -> Outcome {
    let registry = FakeRegistry::start(Hosts::Absent)?;
    let name = registry.image("1");
    refused("bad-6", &name, 8, "REGISTRY_UNAVAILABLE", &[&name, "plain HTTP", "/hosts.toml"])?;
    let plain: Vec<_> =
        registry.requests("").into_iter().filter(|r| !r.line.starts_with("not HTTP")).collect();
    check!(plain.is_empty(), "it was spoken to in plain HTTP: {plain:?}");
    check!(!registry.requests("not HTTP").is_empty(), "nobody tried TLS");
    still_serves()
}

fn broken_hosts_toml() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let file = format!("/etc/containerd/certs.d/{}/hosts.toml", registry.authority);
    std::fs::write(&file, "server = [")?;
    refused("bad-7", &registry.image("1"), 6, "REGISTRY_CONFIGURATION", &[&file])?;
    check!(registry.requests("").is_empty(), "it was asked all the same");
    still_serves()
}

fn containerd_stopped() -> Outcome {
    let pid = service_pid()?;
    let held = acquire("bad-held", &image("tiny:1"))?;
    host("stop", "containerd")?;
    refused("bad-8", &image("tiny:1"), 8, "CONTAINERD_UNAVAILABLE", &["containerd.sock"])?;
    cowshed(&["status"])?.fails(8, &["containerd"])?;
    cowshed(&["images"])?.fails(8, &["[CONTAINERD_UNAVAILABLE]"])?;
    // Who has a disk keeps it, and learns so; who gives it back need not wait for containerd.
    same!(acquire("bad-held", &image("tiny:1"))?, held, "the disk");
    release("bad-held")?;
    host("start", "containerd")?;
    wait_for("containerd", || containerd::version().map(drop))?;
    wait_for("cowshed to serve", || cowshed(&["status"])?.ok().map(drop))?;
    still_serves()?;
    same!(service_pid()?, pid, "the service's process: it was restarted");
    Ok(())
}

fn no_service() -> Outcome {
    for arguments in
        [&["status"][..], &["leases"], &["release", "x"], &["acquire", "x", "y"], &["pull", "y"], &["images"]]
    {
        let ran = run("cowshed", &[arguments, &["--socket", "/nowhere/cowshed.sock"]].concat())?;
        ran.fails(20, &["/nowhere/cowshed.sock", "--socket"])?;
    }
    cowshed(&["version"])?.ok().map(drop)
}

fn wrong_command_line() -> Outcome {
    for arguments in [&["acquire"][..], &["acquire", "vm"], &["frobnicate"], &["leases", "--nope"], &[]] {
        let ran = cowshed(arguments)?;
        same!(ran.status, 2, "the status of {ran:?}");
        check!(ran.stderr.contains("Usage"), "no usage in {ran:?}");
    }
    check!(cowshed(&["--help"])?.ok()?.contains("Exit status"), "the help does not tell the exit statuses");
    Ok(())
}
