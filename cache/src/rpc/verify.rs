//! `VerifyDevice`: whether a device is, now, the one that a lease was granted.

use cowshed_leases::{DeviceIdentity, Grant, Lease, State};
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
    let device = match before.grant() {
        // Also of a lease that is released: its disk may be there still.
        Some(grant) => Some(acquirer.identify(&before, &grant.device).await?),
        None => None,
    };
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
    match (lease.grant(), device) {
        (Some(grant), Some(Ok(now))) => compare(request, grant, &now, &mut expect),
        (Some(grant), Some(Err(what))) => {
            expect("device", format!("{} as it was granted", grant.device.path), what);
        }
        (_, None) | (None, _) => {}
    }
    Ok((differences, lease))
}

/// What the caller has in hand with what is there.
fn compare(
    request: &v1::VerifyDeviceRequest,
    grant: &Grant,
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
    if let Some(digest) = &request.image_digest {
        expect("image_digest", grant.image_digest.clone(), digest.clone());
    }
}
