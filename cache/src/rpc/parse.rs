//! Fields of requests, parsed: what comes out of here is valid.

use std::time::Duration;

use cowshed_leases::{LeaseId, Mode, RequestId, Scratch, Tenant, Ttl, VmId};
use cowshed_pool::Bytes;
use cowshed_proto::v1;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;

use crate::{
    acquire::Wish,
    error::{Error, Reason, Result},
    evict,
    image::{Access, ImageRef, Platform, PullPolicy},
    registry::Credential,
};

/// So much of a wrong value is shown, in characters.
const SHOWN: usize = 140;
/// More is no credential, in bytes.
const CREDENTIAL_MAX_BYTES: usize = 64 << 10;

pub(super) fn wish(request: v1::AcquireRequest) -> Result<Wish> {
    let spec = request.spec.unwrap_or_default();
    let mode = mode(spec.mode)?;
    Ok(Wish {
        vm: vm_id(&request.vm_id)?,
        image: image_reference(&spec.image)?,
        platform: platform(spec.platform.as_deref())?,
        access: Access {
            policy: pull_policy(request.pull_policy)?,
            ..access(&request.tenant, request.credentials)?
        },
        mode,
        scratch: spec.scratch.map(|wanted| scratch(wanted, mode)).transpose()?,
        ttl: request.ttl.as_ref().map(ttl).transpose()?,
        fresh: request.fresh,
        request: request.request_id.as_deref().map(request_id).transpose()?,
        until: None,
    })
}

/// When a caller that says how long it waits is to be told at the latest that there is no room.
pub(super) fn until(metadata: &MetadataMap) -> Option<Instant> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    patience(text).map(evict::deadline)
}

/// gRPC's way to write a time: digits and a unit.
fn patience(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(count.saturating_mul(3600))),
        'M' => Some(Duration::from_secs(count.saturating_mul(60))),
        'S' => Some(Duration::from_secs(count)),
        'm' => Some(Duration::from_millis(count)),
        'u' => Some(Duration::from_micros(count)),
        'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// What a VM would ask for; which one does not matter.
pub(super) fn offer(request: v1::OfferRequest) -> Result<Wish> {
    let v1::OfferRequest { spec, tenant } = request;
    wish(v1::AcquireRequest { vm_id: "offer".to_owned(), spec, tenant, ..v1::AcquireRequest::default() })
}

/// Who asks for an image.
pub(super) fn access(tenant: &str, credentials: Option<v1::RegistryCredentials>) -> Result<Access> {
    let tenant = match tenant {
        "" => Tenant::default(),
        text => {
            text.parse().map_err(|error| wrong(Reason::TenantInvalid, "tenant", text, "tenant", &error))?
        }
    };
    let credential = credentials.map(credential).transpose()?;
    Ok(Access { tenant, credential, policy: PullPolicy::default() })
}

/// Its values are shown to nobody.
fn credential(credentials: v1::RegistryCredentials) -> Result<Credential> {
    use v1::registry_credentials::Secret;
    let bad = |what: &str| {
        let message = format!("credentials are wrong: {what}");
        Error::new(Reason::CredentialsInvalid, message).with("field", "credentials")
    };
    let is_long = |text: &str| text.len() > CREDENTIAL_MAX_BYTES;
    let too_long = || bad(&format!("more than {CREDENTIAL_MAX_BYTES} bytes are no name, password or token"));
    match credentials.secret {
        Some(Secret::Password(v1::Password { username, password })) => {
            if username.is_empty() || username.contains(':') {
                return Err(bad("password.username is empty or has a colon, which no registry can take"));
            }
            if is_long(&username) || is_long(&password) {
                return Err(too_long());
            }
            Ok(Credential::Password { user: username, password })
        }
        Some(Secret::IdentityToken(token)) if token.is_empty() => Err(bad("identity_token is empty")),
        Some(Secret::IdentityToken(token)) if is_long(&token) => Err(too_long()),
        Some(Secret::IdentityToken(token)) => Ok(Credential::Identity(token)),
        None => Err(bad("give a password or an identity_token, or none of it for the host's own")),
    }
}

fn pull_policy(policy: i32) -> Result<PullPolicy> {
    match v1::PullPolicy::try_from(policy) {
        Ok(v1::PullPolicy::Unspecified | v1::PullPolicy::IfNotPresent) => Ok(PullPolicy::IfNotPresent),
        Ok(v1::PullPolicy::Always) => Ok(PullPolicy::Always),
        Ok(v1::PullPolicy::Never) => Ok(PullPolicy::Never),
        Err(_) => {
            let message = format!(
                "pull_policy {policy} is not known to this version: IF_NOT_PRESENT is 1, ALWAYS 2, NEVER 3"
            );
            Err(Error::new(Reason::PullPolicyInvalid, message).with("field", "pull_policy"))
        }
    }
}

fn mode(mode: i32) -> Result<Mode> {
    match v1::DiskMode::try_from(mode) {
        Ok(v1::DiskMode::Unspecified | v1::DiskMode::CopyOnWrite) => Ok(Mode::CopyOnWrite),
        Ok(v1::DiskMode::SharedReadOnly) => Ok(Mode::SharedReadOnly),
        Err(_) => {
            let message =
                format!("mode {mode} is not known to this version: COPY_ON_WRITE is 1, SHARED_READ_ONLY 2");
            Err(Error::new(Reason::ModeInvalid, message).with("field", "spec.mode"))
        }
    }
}

fn scratch(wanted: v1::ScratchSpec, mode: Mode) -> Result<Scratch> {
    let bad = |what: String| Error::new(Reason::ScratchInvalid, what).with("field", "spec.scratch");
    if mode == Mode::CopyOnWrite {
        let what = "a scratch disk goes with mode SHARED_READ_ONLY: a COPY_ON_WRITE disk is writable itself";
        return Err(bad(what.to_owned()));
    }
    let bytes = Bytes(wanted.size_bytes)
        .of_disk()
        .map_err(|error| bad(format!("the scratch disk's size_bytes: {error}")))?;
    Ok(Scratch { size_bytes: bytes.0, raw: wanted.raw })
}

pub(super) fn vm_id(text: &str) -> Result<VmId> {
    text.parse().map_err(|error| wrong(Reason::VmIdInvalid, "vm_id", text, "VM id", &error))
}

pub(super) fn lease_id(text: &str) -> Result<LeaseId> {
    text.parse().map_err(|error| wrong(Reason::LeaseIdInvalid, "lease_id", text, "lease id", &error))
}

pub(super) fn request_id(text: &str) -> Result<RequestId> {
    text.parse().map_err(|error| wrong(Reason::RequestIdInvalid, "request_id", text, "request id", &error))
}

pub(super) fn ttl(duration: &prost_types::Duration) -> Result<Ttl> {
    time("ttl", "--ttl", duration)
}

pub(super) fn hold_for(duration: &prost_types::Duration) -> Result<Ttl> {
    time("hold_for", "--for", duration)
}

pub(super) fn deadline(duration: &prost_types::Duration) -> Result<Ttl> {
    time("deadline", "--deadline", duration)
}

pub(super) fn pin_for(duration: &prost_types::Duration) -> Result<Ttl> {
    time("pin_for", "--pin-for", duration)
}

fn time(field: &'static str, option: &str, duration: &prost_types::Duration) -> Result<Ttl> {
    let micros = u64::try_from(duration.seconds).ok().zip(u64::try_from(duration.nanos).ok());
    let micros = micros.and_then(|(s, n)| s.checked_mul(1_000_000)?.checked_add(n / 1000));
    micros.and_then(|micros| Ttl::from_micros(micros).ok()).ok_or_else(|| {
        let seconds = duration.seconds as f64 + f64::from(duration.nanos) / 1e9;
        let message = format!(
            "{field} ({option}) is {seconds} s: it has to be at least 1 s, at most 100 years, or absent for no limit"
        );
        Error::new(Reason::TtlInvalid, message).with("field", field)
    })
}

pub(super) fn image_reference(text: &str) -> Result<ImageRef> {
    ImageRef::parse(text).map_err(|error| error.with("field", "image"))
}

pub(super) fn platform(text: Option<&str>) -> Result<Platform> {
    match text {
        None | Some("") => Ok(Platform::host()),
        Some(text) => Platform::parse(text).map_err(|error| error.with("field", "platform")),
    }
}

fn wrong(
    reason: Reason,
    field: &'static str,
    text: &str,
    noun: &str,
    error: &dyn std::fmt::Display,
) -> Error {
    let shown: String = text.chars().take(SHOWN).collect();
    Error::new(reason, format!("{field} {shown:?} is no {noun}: {error}")).with("field", field)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_time_that_is_none_is_named_as_it_was_given() {
        for (seconds, nanos, says) in [
            (0, 0, "hold_for (--for) is 0 s: it has to be at least 1 s"),
            (0, 500_000_000, "is 0.5 s"),
            (-1, 0, "is -1 s"),
        ] {
            let error = hold_for(&prost_types::Duration { seconds, nanos }).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        assert!(hold_for(&prost_types::Duration { seconds: 1, nanos: 0 }).is_ok());
    }

    #[test]
    fn grpc_says_how_long_somebody_waits() {
        let table = [
            ("2H", Some(Duration::from_secs(7200))),
            ("1M", Some(Duration::from_secs(60))),
            ("30S", Some(Duration::from_secs(30))),
            ("1500m", Some(Duration::from_millis(1500))),
            ("7u", Some(Duration::from_micros(7))),
            ("7n", Some(Duration::from_nanos(7))),
            ("", None),
            ("S", None),
            ("5", None),
            ("-1S", None),
        ];
        for (text, expected) in table {
            assert_eq!(patience(text), expected, "{text:?}");
        }
    }

    #[test]
    fn what_a_vm_wants_is_checked_and_named() {
        let spec = |mode: i32, scratch: Option<u64>| v1::AcquireRequest {
            vm_id: "vm-1".into(),
            spec: Some(v1::DiskSpec {
                image: "app".into(),
                mode,
                scratch: scratch.map(|size_bytes| v1::ScratchSpec { size_bytes, raw: true }),
                ..v1::DiskSpec::default()
            }),
            ..v1::AcquireRequest::default()
        };
        assert_eq!(wish(spec(0, None)).unwrap().mode, Mode::CopyOnWrite);
        let wanted = wish(spec(2, Some((16 << 20) + 1))).unwrap().scratch;
        assert_eq!(wanted, Some(Scratch { size_bytes: 17 << 20, raw: true }));
        for (request, reason) in [
            (spec(3, None), Reason::ModeInvalid),
            (spec(1, Some(1 << 30)), Reason::ScratchInvalid),
            (spec(2, Some(0)), Reason::ScratchInvalid),
            (spec(2, Some(u64::MAX)), Reason::ScratchInvalid),
        ] {
            assert_eq!(wish(request.clone()).unwrap_err().reason(), reason, "{request:?}");
        }
    }

    #[test]
    fn times_are_checked_and_named() {
        let table = [
            (1, 0, Some(1_000_000)),
            (30, 500_000_000, Some(30_500_000)),
            (0, 999_999_999, None),
            (0, 0, None),
            (-5, 0, None),
            (5, -1, None),
            (i64::MAX, 0, None),
            (i64::MIN, 0, None),
        ];
        for (seconds, nanos, expected) in table {
            let parsed = ttl(&prost_types::Duration { seconds, nanos });
            match expected {
                Some(micros) => assert_eq!(parsed.unwrap().micros(), micros),
                None => assert_eq!(parsed.unwrap_err().reason(), Reason::TtlInvalid, "{seconds} {nanos}"),
            }
        }
        let refused = hold_for(&prost_types::Duration::default()).unwrap_err().to_string();
        assert!(refused.contains("hold_for"), "{refused}");
    }

    #[test]
    fn who_asks_is_checked_and_shown_to_nobody() {
        use v1::registry_credentials::Secret;
        let password = |username: &str, password: &str| {
            Some(v1::RegistryCredentials {
                secret: Some(Secret::Password(v1::Password {
                    username: username.to_owned(),
                    password: password.to_owned(),
                })),
            })
        };
        let token = |token: &str| {
            Some(v1::RegistryCredentials { secret: Some(Secret::IdentityToken(token.to_owned())) })
        };
        assert_eq!(access("", None).unwrap(), Access::default());
        assert_eq!(access("default", None).unwrap(), Access::default());
        assert_eq!(
            access("a", token("geheim")).unwrap().credential,
            Some(Credential::Identity("geheim".into()))
        );
        let long = "geheim".repeat(CREDENTIAL_MAX_BYTES);
        let table = [
            ("../a", None, Reason::TenantInvalid, "tenant"),
            ("a b", None, Reason::TenantInvalid, "tenant"),
            ("a", password("", "geheim"), Reason::CredentialsInvalid, "username"),
            ("a", password("c:ow", "geheim"), Reason::CredentialsInvalid, "username"),
            ("a", password("cow", &long), Reason::CredentialsInvalid, "bytes"),
            ("a", token(""), Reason::CredentialsInvalid, "identity_token"),
            ("a", token(&long), Reason::CredentialsInvalid, "bytes"),
            ("a", Some(v1::RegistryCredentials { secret: None }), Reason::CredentialsInvalid, "password"),
        ];
        for (tenant, credentials, reason, says) in table {
            let error = access(tenant, credentials).unwrap_err();
            assert_eq!(error.reason(), reason, "{error}");
            assert!(error.to_string().contains(says) && !error.to_string().contains("geheim"), "{error}");
        }
        assert_eq!(pull_policy(2).unwrap(), PullPolicy::Always);
        assert_eq!(pull_policy(9).unwrap_err().reason(), Reason::PullPolicyInvalid);
    }
}
