//! Fields of requests, parsed: what comes out of here is valid.

use cowshed_leases::{LeaseId, Mode, RequestId, Scratch, Ttl, VmId};
use cowshed_pool::Bytes;
use cowshed_proto::v1;

use crate::{
    acquire::Wish,
    error::{Error, Reason, Result},
    image::{ImageRef, Platform},
};

/// So much of a wrong value is shown, in characters.
const SHOWN: usize = 140;

pub(super) fn wish(request: v1::AcquireRequest) -> Result<Wish> {
    let spec = request.spec.unwrap_or_default();
    let mode = mode(spec.mode)?;
    Ok(Wish {
        vm: vm_id(&request.vm_id)?,
        image: image_reference(&spec.image)?,
        platform: platform(spec.platform.as_deref())?,
        mode,
        scratch: spec.scratch.map(|wanted| scratch(wanted, mode)).transpose()?,
        ttl: request.ttl.as_ref().map(ttl).transpose()?,
        fresh: request.fresh,
        request: request.request_id.as_deref().map(request_id).transpose()?,
    })
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
    time("ttl", duration)
}

pub(super) fn hold_for(duration: &prost_types::Duration) -> Result<Ttl> {
    time("hold_for", duration)
}

fn time(field: &'static str, duration: &prost_types::Duration) -> Result<Ttl> {
    let micros = u64::try_from(duration.seconds).ok().zip(u64::try_from(duration.nanos).ok());
    let micros = micros.and_then(|(s, n)| s.checked_mul(1_000_000)?.checked_add(n / 1000));
    micros.and_then(|micros| Ttl::from_micros(micros).ok()).ok_or_else(|| {
        let prost_types::Duration { seconds, nanos } = duration;
        let what = "it is a time of 1 s to 100 years, or absent for no limit";
        let message = format!("{field} of {seconds} s and {nanos} ns is wrong: {what}");
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
}
