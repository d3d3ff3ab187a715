//! Fields of requests, parsed: what comes out of here is valid.

use cowshed_leases::{LeaseId, RequestId, Ttl, VmId};
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
    Ok(Wish {
        vm: vm_id(&request.vm_id)?,
        image: image_reference(&spec.image)?,
        platform: platform(spec.platform.as_deref())?,
        ttl: request.ttl.as_ref().map(ttl).transpose()?,
        fresh: request.fresh,
        request: request.request_id.as_deref().map(request_id).transpose()?,
    })
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
    let micros = u64::try_from(duration.seconds).ok().zip(u64::try_from(duration.nanos).ok());
    let micros = micros.and_then(|(s, n)| s.checked_mul(1_000_000)?.checked_add(n / 1000));
    micros.and_then(|micros| Ttl::from_micros(micros).ok()).ok_or_else(|| {
        let prost_types::Duration { seconds, nanos } = duration;
        let what = "it is a time of 1 s to 100 years, or absent for no limit";
        let message = format!("ttl of {seconds} s and {nanos} ns is wrong: {what}");
        Error::new(Reason::TtlInvalid, message).with("field", "ttl")
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
    }
}
