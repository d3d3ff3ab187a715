//! `VerifyDevice`: whether a device is, now, the one that a lease was granted.

use cowshed_leases::{DeviceIdentity, Lease, LeaseId, State};
use cowshed_proto::v1;

use super::parse;
use crate::{
    acquire::Acquirer,
    error::{Error, Reason, Result},
};

/// All that differs, and the lease.
pub(super) async fn verify(
    acquirer: &Acquirer,
    request: &v1::VerifyDeviceRequest,
) -> Result<(Vec<v1::Difference>, Lease)> {
    let id = parse::lease_id(&request.lease_id)?;
    if request.major.is_some() != request.minor.is_some() {
        return Err(Error::new(Reason::DeviceInvalid, "major and minor go together: give both or none")
            .with("field", "minor"));
    }
    let missing =
        || Error::new(Reason::LeaseNotFound, format!("there is no lease {id}")).with("lease_id", &id);
    let read = || acquirer.ledger.read(|book| book.get(&id).cloned()).ok_or_else(missing);
    let before = read()?;
    // Also of a lease that is released: its disk may be there still.
    let mut looked = Vec::new();
    for part in parts(&before) {
        looked.push(acquirer.identify(&before, part.snapshot, part.granted).await?);
    }
    // As it is now: it may have been released meanwhile.
    let lease = read()?;
    let mut differences = Vec::new();
    let mut expect = |field: &str, expected: String, found: String| {
        if expected != found {
            differences.push(v1::Difference { field: field.to_owned(), expected, found });
        }
    };
    let stands = match (&lease.state, lease.suspicion(&acquirer.clock.now())) {
        (State::Granted(_), Some(_)) => "suspect",
        (state, _) => crate::ledger::state_name(state),
    };
    expect("state", "granted".to_owned(), stands.to_owned());
    if let Some(generation) = request.generation {
        expect("generation", lease.generation.0.to_string(), generation.to_string());
    }
    for (part, now) in parts(&before).into_iter().zip(looked) {
        match now {
            Ok(now) if part.is_scratch == request.scratch => compare(request, &now, &mut expect),
            Ok(_) => {}
            Err(what) => expect(part.name(), format!("{} as it was granted", part.granted.path), what),
        }
    }
    if let (Some(grant), Some(digest)) = (before.grant(), &request.image_digest) {
        expect("image_digest", grant.image_digest.clone(), digest.clone());
    }
    if request.scratch && before.grant().is_some_and(|grant| grant.scratch.is_none()) {
        expect("scratch", "none".to_owned(), "a scratch device".to_owned());
    }
    Ok((differences, lease))
}

/// A device of a lease.
struct Part<'a> {
    /// Whose snapshot it is.
    snapshot: &'a LeaseId,
    granted: &'a DeviceIdentity,
    is_scratch: bool,
}

impl Part<'_> {
    fn name(&self) -> &'static str {
        if self.is_scratch { "scratch" } else { "device" }
    }
}

fn parts(lease: &Lease) -> Vec<Part<'_>> {
    let Some(grant) = lease.grant() else { return Vec::new() };
    let root = Part { snapshot: lease.root(), granted: &grant.device, is_scratch: false };
    let scratch = grant.scratch.as_ref().map(|scratch| &scratch.device);
    let scratch = scratch.map(|granted| Part { snapshot: &lease.id, granted, is_scratch: true });
    [root].into_iter().chain(scratch).collect()
}

/// What the caller has in hand with what is there.
fn compare(
    request: &v1::VerifyDeviceRequest,
    now: &DeviceIdentity,
    expect: &mut impl FnMut(&str, String, String),
) {
    if let Some(path) = &request.path {
        expect("path", now.path.clone(), path.clone());
    }
    if let (Some(major), Some(minor)) = (request.major, request.minor) {
        expect("major:minor", now.number.to_string(), format!("{major}:{minor}"));
    }
    if let Some(uuid) = &request.dm_uuid {
        expect("dm_uuid", now.dm_uuid.clone().unwrap_or_default(), uuid.clone());
    }
    if let Some(thin) = request.thin_id {
        expect("thin_id", now.thin_id.to_string(), thin.to_string());
    }
}
