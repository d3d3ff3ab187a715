//! Offer: looks at what is in memory, and says what an Acquire would find.

use std::{sync::Arc, time::Duration};

use cowshed_gc::{evict::Room, reserve::Asked};
use cowshed_leases::{LeaseId, Mode};
use cowshed_proto::v1;

use super::{Api, convert, parse};
use crate::{
    acquire::{Acquired, Acquirer, Wish},
    disks::fits_the_pool,
    error::{Error, Reason, Result},
    image::Glance,
    kernel::{KernelError, PoolUsage},
    metrics::Metrics,
    offer::{Expected, Got, Latencies, Offered, Shareable, Warmth},
    promises,
};

/// Answers it.
///
/// # Errors
/// If the request is none that Acquire would understand.
pub(super) async fn offer(api: &Api, request: v1::OfferRequest) -> Result<v1::OfferResponse> {
    let wish = parse::offer(request)?;
    let pool = match api.kernel.pool_at_hand() {
        Some(pool) => Ok(pool),
        None => api.kernel.pool().await,
    };
    let Answer { refused, before, found } = answer(api, &wish, &pool, || api.evictor.could_free());
    let expected = api.latencies.expected(found.pace());
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

/// What an Acquire is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Foreseen {
    offered: Offered,
    /// How long it takes then, mostly.
    takes: Option<Duration>,
}

/// What Offer would say of the wish, without anything coming of it; `None` if it would have to look first, or is not asked such
/// things.
pub(super) fn foresee(api: &Api, wish: &Wish) -> Option<Foreseen> {
    if wish.fresh {
        return None;
    }
    let pool = api.kernel.pool_at_hand()?;
    let room = api.evictor.known_to_free();
    let Answer { refused, before, found } = answer(api, wish, &Ok(pool), || room);
    let offered = match refused {
        Some(error) if error.reason() == Reason::PoolFull && room.is_none() => return None,
        Some(_) => return Some(Foreseen { offered: Offered::Refused, takes: None }),
        None => found.offered(),
    };
    let expected = api.latencies.expected(found.pace());
    Some(Foreseen { offered, takes: expected.map(|expected| expected.p50 + before.takes()) })
}

/// What was to be expected of an Acquire, and what it has come to.
pub(super) fn compare(
    metrics: &Metrics,
    latencies: &Latencies,
    foreseen: Option<Foreseen>,
    outcome: &Result<Arc<Acquired>>,
    took: Duration,
) {
    let Some(got) = Got::of(outcome) else { return };
    if let Got::Disk(warmth) = got {
        latencies.note(warmth, took);
    }
    let Some(Foreseen { offered, takes }) = foreseen else { return };
    metrics.offered(offered, got);
    if let (Got::Disk(_), Some(expected)) = (got, takes) {
        metrics.expected(offered, took.as_secs_f64() / expected.as_secs_f64().max(1e-6));
    }
}

struct Answer {
    refused: Option<Error>,
    before: Before,
    found: Found,
}

/// What there is to say of the wish, if the pool is like this and so much room could be made.
fn answer(
    api: &Api,
    wish: &Wish,
    pool: &Result<PoolUsage, KernelError>,
    could_free: impl FnOnce() -> Option<(Room, Duration)>,
) -> Answer {
    let (host, found) = (&api.acquirer, found(api, wish));
    let full = match admits(host, &api.shareable, wish, pool, &found) {
        Ok(()) => return Answer { refused: None, before: Before::Nothing, found },
        Err(full) if full.reason() == Reason::PoolFull => full,
        Err(error) => return Answer { refused: Some(error), before: Before::Nothing, found },
    };
    let (Ok(pool), Some((could, takes))) = (pool, could_free()) else {
        return Answer { refused: Some(full), before: Before::Nothing, found };
    };
    // The same when all has gone that could go, as far as that is known.
    let left = found.without_spares();
    match admits(host, &api.shareable, wish, &Ok(without(pool, could)), &left) {
        Ok(()) => Answer { refused: None, before: Before::Room(takes), found: left },
        Err(error) => {
            let refused = if error.reason() == Reason::PoolFull { full } else { error };
            Answer { refused: Some(refused), before: Before::Nothing, found }
        }
    }
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
fn admits(
    host: &Acquirer,
    shareable: &Shareable,
    wish: &Wish,
    pool: &Result<PoolUsage, KernelError>,
    found: &Found,
) -> Result<()> {
    host.drain.admit()?;
    // In the order of Acquire: room does not help whose quota is used up.
    promised(host, wish, None)?;
    host.admission.judge(pool)?;
    host.admission.hindrances.admit()?;
    host.ledger.promises().ready(&host.admission.limits)?;
    promised(host, wish, pool.as_ref().ok())?;
    // Who is handed a spare waits in no line.
    if found.spares == 0
        && let Some(full) = host.crowd.is_full()
    {
        return Err(full);
    }
    shareable.admit(wish.mode)?;
    wish.scratch.map_or(Ok(()), |scratch| fits_the_pool(scratch, pool.as_ref().ok()))
}

fn without(pool: &PoolUsage, room: Room) -> PoolUsage {
    PoolUsage {
        data_used: pool.data_used.saturating_sub(room.data.0),
        metadata_used: pool.metadata_used.saturating_sub(room.metadata.0),
        ..pool.clone()
    }
}

/// Whether its room could be promised.
fn promised(host: &Acquirer, wish: &Wish, pool: Option<&PoolUsage>) -> Result<()> {
    let (promises, limits) = (host.ledger.promises(), &host.admission.limits);
    let claim = wish.claim(promises, limits);
    let free = pool.map(|pool| host.admission.to_promise(pool));
    promises.would(limits, &Asked { claim: &claim, instead_of: None, free }).map_err(|refusal| {
        let vm_of = |id: &LeaseId| host.ledger.read(|book| book.get(id).map(|lease| lease.vm.to_string()));
        promises::refused(&refusal, limits, promises, vm_of)
    })
}

#[derive(Clone, Copy, Debug)]
struct Found {
    warmth: v1::Warmth,
    missing: Option<u64>,
    spares: u32,
}

impl Found {
    fn without_spares(self) -> Self {
        let warmth = if self.warmth == v1::Warmth::Spare { v1::Warmth::Base } else { self.warmth };
        Self { warmth, spares: 0, ..self }
    }

    fn offered(self) -> Offered {
        match self.warmth {
            v1::Warmth::Spare => Offered::Spare,
            v1::Warmth::Base => Offered::Base,
            v1::Warmth::Partial => Offered::Partial,
            v1::Warmth::Cold | v1::Warmth::Unspecified => Offered::Cold,
        }
    }

    /// Whose times tell how long it takes.
    fn pace(self) -> Warmth {
        match self.warmth {
            v1::Warmth::Spare => Warmth::Spare,
            v1::Warmth::Base => Warmth::Base,
            v1::Warmth::Partial | v1::Warmth::Cold | v1::Warmth::Unspecified => Warmth::Cold,
        }
    }
}

fn found(api: &Api, wish: &Wish) -> Found {
    match api.images.glance(&wish.image, &wish.platform, &wish.access) {
        Glance::Unpacked(manifest) => {
            let has_spares = wish.mode == Mode::CopyOnWrite;
            let spares = if has_spares { api.spares.count(&manifest).ready } else { 0 };
            let warmth = if spares > 0 { v1::Warmth::Spare } else { v1::Warmth::Base };
            Found { warmth, missing: Some(0), spares }
        }
        Glance::Partial(missing) => Found { warmth: v1::Warmth::Partial, missing, spares: 0 },
        Glance::Nothing => Found { warmth: v1::Warmth::Cold, missing: None, spares: 0 },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use cowshed_leases::Scratch;
    use futures_util::FutureExt as _;

    use super::*;
    use crate::{
        crowd::Crowd,
        fakes::{start, wish, world},
    };

    fn cold() -> Found {
        Found { warmth: v1::Warmth::Cold, missing: None, spares: 0 }
    }

    #[tokio::test]
    async fn what_acquire_would_refuse_is_refused_for_the_same_reason() {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let mut process = start(&world, directory.path());
        let host = Arc::get_mut(&mut process.acquirer).unwrap();
        host.crowd = Crowd::new(1, 1);
        let host = &process.acquirer;
        let pool = host.kernel.pool().await;
        let shared = |scratch: Option<u64>| {
            let scratch = scratch.map(|size_bytes| Scratch { size_bytes, raw: false });
            Wish { mode: Mode::SharedReadOnly, scratch, ..wish("offer") }
        };
        let says = |wish: &Wish, shareable: &Shareable, found: &Found| {
            admits(host, shareable, wish, &pool, found).err().map(|error| error.reason())
        };
        let (fit, unfit) = (Shareable::of("cowshed"), Shareable::of("devmapper"));
        let (plain, spare) =
            (wish("offer"), Found { warmth: v1::Warmth::Spare, missing: Some(0), spares: 1 });
        assert_eq!(says(&plain, &unfit, &cold()), None);
        assert_eq!(says(&shared(Some(1 << 30)), &fit, &cold()), None);
        assert_eq!(says(&shared(Some(2 << 40)), &fit, &cold()), Some(Reason::ScratchInvalid));
        assert_eq!(says(&shared(None), &unfit, &cold()), Some(Reason::SnapshotterUnfit));

        let lane = || (String::new(), String::new());
        let callers = crate::flights::Callers::default();
        let _caller = callers.one();
        let seat = host.crowd.enter(lane(), callers.clone(), None).await.unwrap();
        assert_eq!(says(&plain, &fit, &cold()), None, "it would wait for its turn");
        let mut waits = Box::pin(host.crowd.enter(lane(), callers.clone(), None));
        assert!(waits.as_mut().now_or_never().is_none());
        assert_eq!(says(&plain, &fit, &cold()), Some(Reason::Overloaded));
        assert_eq!(says(&plain, &fit, &spare), None, "a spare is handed out beside the line");
        assert_eq!(says(&plain, &fit, &spare.without_spares()), Some(Reason::Overloaded));
        drop(seat);
        drop(waits.await);
        assert_eq!(says(&plain, &fit, &cold()), None);
    }

    #[tokio::test]
    async fn what_was_offered_is_held_against_what_was_got() {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let process = start(&world, directory.path());
        let (metrics, latencies) = (Metrics::new().unwrap(), Latencies::default());
        let ms = Duration::from_millis;
        let base = process.acquirer.acquire(wish("vm-1")).await;
        let existing = process.acquirer.acquire(wish("vm-1")).await;
        let refused = Err(Error::new(Reason::PoolFull, "full"));
        let foreseen = |offered, takes| Some(Foreseen { offered, takes });
        for (foreseen, outcome) in [
            (foreseen(Offered::Spare, Some(ms(1))), &base),
            (foreseen(Offered::Base, None), &base),
            (foreseen(Offered::Cold, Some(ms(1))), &refused),
            (foreseen(Offered::Refused, None), &refused),
            (foreseen(Offered::Refused, None), &base),
            (foreseen(Offered::Base, Some(ms(1))), &existing),
            (None, &base),
            (None, &refused),
        ] {
            compare(&metrics, &latencies, foreseen, outcome, ms(3));
        }
        let text = String::from_utf8(crate::metrics::encode(metrics.registry()).unwrap()).unwrap();
        let counted: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("cowshed_acquire_offered_total{got="))
            .filter(|line| !line.ends_with(" 0"))
            .collect();
        let expected = [
            r#""base",offered="base"} 1"#,
            r#""base",offered="refused"} 1"#,
            r#""base",offered="spare"} 1"#,
            r#""refused",offered="cold"} 1"#,
            r#""refused",offered="refused"} 1"#,
        ];
        assert_eq!(counted, expected);
        let ratios = "cowshed_acquire_expected_ratio_count";
        let ratios: Vec<&str> = text.lines().filter(|line| line.starts_with(ratios)).collect();
        assert_eq!(ratios, [r#"cowshed_acquire_expected_ratio_count{warmth="spare"} 1"#]);
        assert!(text.contains(r#"expected_ratio_sum{warmth="spare"} 3"#), "three times what was expected");
        let noted = latencies.expected(Warmth::Base).unwrap();
        assert_eq!((noted.samples, latencies.expected(Warmth::Spare)), (4, None), "by what was got");
    }
}
