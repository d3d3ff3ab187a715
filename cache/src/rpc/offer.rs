//! Offer: looks at what is in memory, and says what an Acquire would find.

use std::time::Duration;

use cowshed_gc::{evict::Room, reserve::Asked};
use cowshed_leases::{LeaseId, Mode};
use cowshed_proto::v1;

use super::{Api, convert, parse};
use crate::{
    acquire::Wish,
    error::{Error, Reason, Result},
    image::Glance,
    kernel::{KernelError, PoolUsage},
    offer::{Expected, Warmth},
    promises,
};

/// Answers it.
///
/// # Errors
/// If the request is none that Acquire would understand.
pub(super) async fn offer(api: &Api, request: v1::OfferRequest) -> Result<v1::OfferResponse> {
    let wish = parse::offer(request)?;
    let pool = api.kernel.pool_lately().await;
    let (refused, before) = match admits(api, &wish, &pool) {
        Ok(()) => (None, Before::Nothing),
        Err(full) if full.reason() == Reason::PoolFull => admits_with_room(api, &wish, full, &pool),
        Err(error) => (Some(error), Before::Nothing),
    };
    let found = found(api, &wish, before);
    let expected = api.latencies.expected(match found.warmth {
        v1::Warmth::Spare => Warmth::Spare,
        v1::Warmth::Base => Warmth::Base,
        v1::Warmth::Partial | v1::Warmth::Cold | v1::Warmth::Unspecified => Warmth::Cold,
    });
    let (data, metadata) = pool.map(|pool| api.admission.free(&pool)).unwrap_or_default();
    let time = |time: fn(&Expected) -> Duration| {
        expected.as_ref().map(time).map(|time| convert::duration(convert::micros(time + before.takes())))
    };
    Ok(v1::OfferResponse {
        accepted: refused.is_none(),
        refusal: refused.map(|error| v1::Failure {
            reason: error.reason().as_str().to_owned(),
            message: error.to_string(),
            at: None,
        }),
        warmth: found.warmth.into(),
        missing_bytes: found.missing,
        expected: time(|expected| expected.p50),
        expected_p99: time(|expected| expected.p99),
        samples: expected.map_or(0, |expected| u32::try_from(expected.samples).unwrap_or(u32::MAX)),
        data_free_bytes: data,
        metadata_free_bytes: metadata,
        spares: found.spares,
        data_reserved_bytes: api.ledger.promises().reserved().0,
    })
}

/// What an Acquire would have to wait for before anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Nothing,
    /// Room that is made, in this time: spares go for it.
    Room(Duration),
}

impl Before {
    fn takes(self) -> Duration {
        match self {
            Self::Nothing => Duration::ZERO,
            Self::Room(takes) => takes,
        }
    }
}

/// Whether Acquire would take it on, if the pool is like this.
fn admits(api: &Api, wish: &Wish, pool: &Result<PoolUsage, KernelError>) -> Result<()> {
    api.acquirer.drain.admit()?;
    // In the order of Acquire: room does not help whose quota is used up.
    promised(api, wish, None)?;
    api.admission.judge(pool)?;
    api.admission.hindrances.admit()?;
    api.ledger.promises().ready(&api.admission.limits)?;
    promised(api, wish, pool.as_ref().ok())
}

/// The same when all has gone that could go, as far as that is known.
fn admits_with_room(
    api: &Api,
    wish: &Wish,
    full: Error,
    pool: &Result<PoolUsage, KernelError>,
) -> (Option<Error>, Before) {
    let (Ok(pool), Some((could, takes))) = (pool, api.evictor.could_free()) else {
        return (Some(full), Before::Nothing);
    };
    match admits(api, wish, &Ok(without(pool, could))) {
        Ok(()) => (None, Before::Room(takes)),
        Err(_) => (Some(full), Before::Nothing),
    }
}

fn without(pool: &PoolUsage, room: Room) -> PoolUsage {
    PoolUsage {
        data_used: pool.data_used.saturating_sub(room.data.0),
        metadata_used: pool.metadata_used.saturating_sub(room.metadata.0),
        ..pool.clone()
    }
}

/// Whether its room could be promised.
fn promised(api: &Api, wish: &Wish, pool: Option<&PoolUsage>) -> Result<()> {
    let (promises, limits) = (api.ledger.promises(), &api.admission.limits);
    let claim = wish.claim(promises, limits);
    let free = pool.map(|pool| api.admission.to_promise(pool));
    promises.would(limits, &Asked { claim: &claim, instead_of: None, free }).map_err(|refusal| {
        let vm_of = |id: &LeaseId| api.ledger.read(|book| book.get(id).map(|lease| lease.vm.to_string()));
        promises::refused(&refusal, limits, promises, vm_of)
    })
}

struct Found {
    warmth: v1::Warmth,
    missing: Option<u64>,
    spares: u32,
}

fn found(api: &Api, wish: &Wish, before: Before) -> Found {
    match api.images.glance(&wish.image, &wish.platform, &wish.access) {
        Glance::Unpacked(manifest) => {
            let has_spares = wish.mode == Mode::CopyOnWrite && before == Before::Nothing;
            let spares = if has_spares { api.spares.count(&manifest).ready } else { 0 };
            let warmth = if spares > 0 { v1::Warmth::Spare } else { v1::Warmth::Base };
            Found { warmth, missing: Some(0), spares }
        }
        Glance::Partial(missing) => Found { warmth: v1::Warmth::Partial, missing, spares: 0 },
        Glance::Nothing => Found { warmth: v1::Warmth::Cold, missing: None, spares: 0 },
    }
}
