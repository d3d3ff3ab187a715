//! Why an image stays.

use std::{fmt, time::Duration};

use cowshed_leases::UnixMicros;

use super::{
    Fetch, Image, Occupancy, Pin, Policy,
    tally::{At, Tally, What},
};

/// Why an image stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Disks are made of it: so many.
    Leased(u32),
    /// Spares of it are being made or handed out: so many.
    SparesInHand(u32),
    /// Other clients' snapshots, or pulls, hold its top layer: so many.
    Others(u32),
    /// It is being pulled.
    Pulled,
    /// A prefetch job that runs waits for it.
    Awaited,
    /// It is pinned; for so long, if it has an end.
    Pinned(Option<Duration>),
    /// It was fetched for later, and stays for so long.
    Prefetched(Duration),
    /// It was used, or came, a short time ago, and stays for so long.
    Young(Duration),
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leased(1) => f.write_str("a disk is made of it"),
            Self::Leased(n) => write!(f, "{n} disks are made of it"),
            Self::SparesInHand(1) => f.write_str("a spare of it is at work"),
            Self::SparesInHand(n) => write!(f, "{n} spares of it are at work"),
            Self::Others(_) => f.write_str("others hold its layers"),
            Self::Pulled => f.write_str("it is being pulled"),
            Self::Awaited => f.write_str("a prefetch job waits for it"),
            Self::Pinned(None) => f.write_str("pinned"),
            Self::Pinned(Some(left)) => write!(f, "pinned for {}", Span(*left)),
            Self::Prefetched(left) => write!(f, "fetched for later, kept for {}", Span(*left)),
            Self::Young(left) => write!(f, "used a short time ago, kept for {}", Span(*left)),
        }
    }
}

/// Everything for which the image stays.
pub(super) fn of(
    tally: &Tally<'_>,
    occupancy: &Occupancy,
    policy: &Policy,
    now: UnixMicros,
    at: At,
    image: &Image,
) -> Vec<Protection> {
    let count = |is: fn(What<'_>) -> bool| {
        let count = tally.kin(at).filter(|disk| is(tally.what(*disk))).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    };
    let leases = count(|what| matches!(what, What::Lease(..)));
    let spares =
        count(|what| matches!(what, What::Spare(_, spare) if spare.state == super::SpareState::Busy));
    let others = others(occupancy, image);
    let left = policy.min_age.saturating_sub(unused(image, now));
    [
        (leases > 0).then_some(Protection::Leased(leases)),
        (spares > 0).then_some(Protection::SparesInHand(spares)),
        (others > 0).then_some(Protection::Others(others)),
        is_at(image, Fetch::Pulled).then_some(Protection::Pulled),
        is_at(image, Fetch::Awaited).then_some(Protection::Awaited),
        pinned(image, now),
        prefetched(image, now),
        (!left.is_zero()).then_some(Protection::Young(left)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// How long no disk was made of it, or how long it has been here; nothing, if the clock was set back.
pub(super) fn unused(image: &Image, now: UnixMicros) -> Duration {
    since(image.last_use.map_or(image.since, |last_use| last_use.max(image.since)), now)
}

fn since(then: UnixMicros, now: UnixMicros) -> Duration {
    if then < now { Duration::from_micros(now.0.abs_diff(then.0)) } else { Duration::ZERO }
}

fn others(occupancy: &Occupancy, image: &Image) -> u32 {
    let tops = image.manifests.values().flatten().filter_map(|top| occupancy.layers.get(top));
    tops.map(|top| top.others).max().unwrap_or_default()
}

fn is_at(image: &Image, fetch: Fetch) -> bool {
    image.names.iter().any(|name| name.fetch == fetch)
}

/// By the pin that holds longest.
fn pinned(image: &Image, now: UnixMicros) -> Option<Protection> {
    let pins = || image.names.iter().filter_map(|name| name.pin);
    if pins().any(|pin| pin == Pin::ForGood) {
        return Some(Protection::Pinned(None));
    }
    let until = pins().filter_map(|pin| match pin {
        Pin::Until(until) if until > now => Some(until),
        Pin::Until(_) | Pin::ForGood => None,
    });
    until.max().map(|until| Protection::Pinned(Some(since(now, until))))
}

fn prefetched(image: &Image, now: UnixMicros) -> Option<Protection> {
    let until = image.names.iter().filter_map(|name| name.prefetched_until).max();
    until.filter(|until| *until > now).map(|until| Protection::Prefetched(since(now, until)))
}

/// How long something lasts, roughly, as people write it.
pub(super) struct Span(pub(super) Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 3] = [("d", 86_400), ("h", 3600), ("m", 60)];
        let seconds = self.0.as_secs();
        match UNITS.iter().find(|(_, unit)| seconds >= 2 * unit) {
            Some((name, unit)) => write!(f, "{}{name}", seconds / unit),
            None => write!(f, "{seconds}s"),
        }
    }
}
