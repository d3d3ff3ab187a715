//! Offer: looks at what is in memory, and says what an Acquire would find.

use cowshed_leases::Mode;
use cowshed_proto::v1;

use super::{Api, convert, parse};
use crate::{
    acquire::Wish,
    error::Result,
    image::Glance,
    offer::{Expected, Warmth},
};

/// Answers it.
///
/// # Errors
/// If the request is none that Acquire would understand.
pub(super) async fn offer(api: &Api, request: v1::OfferRequest) -> Result<v1::OfferResponse> {
    let wish = parse::offer(request)?;
    let pool = api.kernel.pool_lately().await;
    let refused = api.acquirer.drain.admit().and_then(|()| api.admission.judge(&pool));
    let refused = refused.and_then(|()| api.admission.hindrances.admit()).err();
    let found = found(api, &wish);
    let expected = api.latencies.expected(match found.warmth {
        v1::Warmth::Spare => Warmth::Spare,
        v1::Warmth::Base => Warmth::Base,
        v1::Warmth::Partial | v1::Warmth::Cold | v1::Warmth::Unspecified => Warmth::Cold,
    });
    let (data, metadata) = pool.map(|pool| api.admission.free(&pool)).unwrap_or_default();
    let time = |time: fn(&Expected) -> std::time::Duration| {
        expected.as_ref().map(time).map(|time| convert::duration(convert::micros(time)))
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
    })
}

struct Found {
    warmth: v1::Warmth,
    missing: Option<u64>,
    spares: u32,
}

fn found(api: &Api, wish: &Wish) -> Found {
    match api.images.glance(&wish.image, &wish.platform, &wish.access) {
        Glance::Unpacked(manifest) => {
            let spares = if wish.mode == Mode::CopyOnWrite { api.spares.count(&manifest).ready } else { 0 };
            let warmth = if spares > 0 { v1::Warmth::Spare } else { v1::Warmth::Base };
            Found { warmth, missing: Some(0), spares }
        }
        Glance::Pulled(missing) => Found { warmth: v1::Warmth::Partial, missing, spares: 0 },
        Glance::Nothing => Found { warmth: v1::Warmth::Cold, missing: None, spares: 0 },
    }
}
