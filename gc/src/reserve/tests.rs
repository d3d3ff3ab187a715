//! Sums against a naive oracle, and what is refused.

use std::collections::BTreeMap;

use cowshed_leases::{LeaseId, Tenant};
use proptest::prelude::*;

use super::*;

fn id(n: u8) -> LeaseId {
    LeaseId::from_random(u128::from(n))
}

fn tenant(name: &str) -> Tenant {
    name.parse().unwrap_or_default()
}

fn claim(name: &str, expected: u64) -> Claim {
    Claim { tenant: tenant(name), expected: Bytes(expected) }
}

fn asked(claim: &Claim, free: u64) -> Asked<'_> {
    Asked { claim, instead_of: None, free: Some(Bytes(free)) }
}

fn policy(overcommit_percent: Option<u32>, quotas: &[(&str, Option<u64>, Option<u64>)]) -> Policy {
    let quota = |leases, bytes: Option<u64>| Quota { leases, bytes: bytes.map(Bytes) };
    let own = quotas.iter().filter(|(name, ..)| *name != "*");
    let any = quotas.iter().find(|(name, ..)| *name == "*");
    let quotas = Quotas {
        own: own.map(|(name, leases, bytes)| (tenant(name), quota(*leases, *bytes))).collect(),
        any_other: any.map(|(_, leases, bytes)| quota(*leases, *bytes)),
    };
    Policy { expected: Bytes(0), learns: false, overcommit_percent, quotas }
}

#[test]
fn as_many_as_fit_are_promised_and_those_that_have_written_need_less() {
    let policy = policy(Some(100), &[]);
    let mut reserve = Reserve::default();
    let one = claim("a", 10);
    for n in 0..5 {
        assert_eq!(policy.admit(&reserve, &asked(&one, 59)), Ok(()), "{n}");
        reserve.set(&id(n), Some(one.clone()));
    }
    let full = Refusal::Pool { free: Bytes(59), reserved: Bytes(50), expected: Bytes(10), needed: Bytes(60) };
    assert_eq!(policy.admit(&reserve, &asked(&one, 59)), Err(full));
    assert_eq!(policy.admit(&reserve, &asked(&claim("a", 0), 0)), Ok(()), "it takes nothing");
    assert_eq!(policy.admit(&reserve, &Asked { free: None, ..asked(&one, 0) }), Ok(()), "nobody knows");
    // One writes: what is free and what is reserved become less alike.
    reserve.wrote(&id(0), Bytes(8));
    assert_eq!(reserve.reserved(), Bytes(42));
    assert!(policy.admit(&reserve, &asked(&one, 51)).is_err());
    // More than was expected is no room for others.
    reserve.wrote(&id(0), Bytes(30));
    assert_eq!((reserve.reserved(), reserve.of(&tenant("a")).bytes), (Bytes(40), Bytes(70)));
    // Given back.
    assert_eq!(reserve.set(&id(0), None), Some(Bytes(30)));
    assert_eq!(reserve.set(&id(1), None), None, "nobody has looked");
    assert_eq!(reserve.reserved(), Bytes(30));
    assert_eq!(policy.admit(&reserve, &asked(&one, 59)), Ok(()));
}

#[test]
fn overcommitted_the_same_is_promised_more_than_once() {
    for (percent, fits) in [(50, 2), (100, 5), (150, 7), (1_000, 50)] {
        let policy = policy(Some(percent), &[]);
        let mut reserve = Reserve::default();
        let one = claim("a", 10);
        let mut count = 0;
        while policy.admit(&reserve, &asked(&one, 50)).is_ok() {
            reserve.set(&id(count), Some(one.clone()));
            count += 1;
        }
        assert_eq!(count, fits, "{percent} %");
    }
    assert_eq!(policy(None, &[]).admit(&Reserve::default(), &asked(&claim("a", u64::MAX), 0)), Ok(()));
}

#[test]
fn quotas_are_by_tenant_and_any_other_has_its_own() {
    let policy = policy(Some(100), &[("red", Some(2), None), ("blue", None, Some(25)), ("*", Some(1), None)]);
    let mut reserve = Reserve::default();
    let mut take = |n: u8, name: &str, expected: u64| {
        let claim = claim(name, expected);
        let admitted = policy.admit(&reserve, &asked(&claim, 1_000));
        if admitted.is_ok() {
            reserve.set(&id(n), Some(claim));
        }
        admitted
    };
    assert!(take(1, "red", 10).is_ok() && take(2, "red", 10).is_ok());
    let red = Refusal::Leases { whose: Whose::Own, tenant: tenant("red"), has: 2, limit: 2 };
    assert_eq!(take(3, "red", 0), Err(red));
    assert!(take(4, "blue", 10).is_ok() && take(5, "blue", 15).is_ok() && take(6, "blue", 0).is_ok());
    let (has, expected, limit) = (Bytes(25), Bytes(1), Bytes(25));
    let blue = Refusal::Bytes { whose: Whose::Own, tenant: tenant("blue"), has, expected, limit };
    assert_eq!(take(7, "blue", 1), Err(blue));
    assert!(take(8, "green", 10).is_ok() && take(9, "white", 10).is_ok(), "each by itself");
    let green = Refusal::Leases { whose: Whose::AnyOther, tenant: tenant("green"), has: 1, limit: 1 };
    assert_eq!(take(10, "green", 10), Err(green));
    // What has written more than was expected counts for what it has.
    reserve.wrote(&id(6), Bytes(40));
    assert_eq!(reserve.of(&tenant("blue")), Use { leases: 3, bytes: Bytes(65) });
    assert_eq!(reserve.largest(&tenant("blue")), Some((&id(6), Bytes(40))));
}

#[test]
fn who_comes_instead_of_another_does_not_count_twice() {
    let policy = policy(Some(100), &[("red", Some(1), Some(10))]);
    let mut reserve = Reserve::default();
    let one = claim("red", 10);
    reserve.set(&id(1), Some(one.clone()));
    assert!(policy.admit(&reserve, &asked(&one, 10)).is_err());
    let (old, unknown) = (id(1), id(9));
    assert_eq!(policy.admit(&reserve, &Asked { instead_of: Some(&old), ..asked(&one, 10) }), Ok(()));
    assert!(policy.admit(&reserve, &Asked { instead_of: Some(&unknown), ..asked(&one, 10) }).is_err());
}

#[derive(Clone, Debug)]
enum Event {
    Set(u8, Option<(u8, u64)>),
    Wrote(u8, u64),
}

fn event() -> impl Strategy<Value = Event> {
    let bytes = || prop_oneof![0..1_000_u64, Just(0)];
    prop_oneof![
        (0..12_u8, proptest::option::of((0..3_u8, bytes()))).prop_map(|(n, claim)| Event::Set(n, claim)),
        (0..12_u8, bytes()).prop_map(|(n, written)| Event::Wrote(n, written)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Sums are those of what is held, whatever has happened; and what is admitted fits.
    #[test]
    fn sums_are_right(events in proptest::collection::vec(event(), 0..200), free in 0..5_000_u64, percent in 1..300_u32) {
        let names = ["red", "blue", "green"];
        let policy = policy(Some(percent), &[("red", Some(3), Some(1_500)), ("*", Some(4), None)]);
        let mut reserve = Reserve::default();
        let mut oracle: BTreeMap<u8, (Claim, Option<u64>)> = BTreeMap::new();
        for event in events {
            match event {
                Event::Set(n, Some((who, expected))) => {
                    let claim = claim(names[usize::from(who)], expected);
                    let admitted = policy.admit(&reserve, &asked(&claim, free));
                    let sum: u128 = oracle.values().map(|(c, w)| u128::from(c.expected.0.saturating_sub(w.unwrap_or(0)))).sum();
                    if admitted.is_ok() && expected > 0 {
                        prop_assert!((sum + u128::from(expected)) * 100 <= u128::from(free) * u128::from(percent));
                    }
                    let has = oracle.values().filter(|(c, _)| c.tenant == claim.tenant).count();
                    if admitted.is_ok() {
                        let most = if who == 0 { 3 } else { 4 };
                        prop_assert!(has < most);
                        let written = oracle.get(&n).and_then(|(_, written)| *written);
                        prop_assert_eq!(reserve.set(&id(n), Some(claim.clone())), written.map(Bytes));
                        oracle.insert(n, (claim, written));
                    }
                }
                Event::Set(n, None) => {
                    let written = oracle.remove(&n).and_then(|(_, written)| written);
                    prop_assert_eq!(reserve.set(&id(n), None), written.map(Bytes));
                }
                Event::Wrote(n, written) => {
                    reserve.wrote(&id(n), Bytes(written));
                    if let Some((_, before)) = oracle.get_mut(&n) {
                        *before = Some(written);
                    }
                }
            }
            let reserved: u64 = oracle.values().map(|(c, w)| c.expected.0.saturating_sub(w.unwrap_or(0))).sum();
            prop_assert_eq!(reserve.reserved(), Bytes(reserved));
            for name in names {
                let of_it = || oracle.values().filter(|(c, _)| c.tenant == tenant(name));
                let bytes = of_it().map(|(c, w)| c.expected.0.max(w.unwrap_or(0))).sum();
                let leases = u64::try_from(of_it().count()).unwrap_or(u64::MAX);
                prop_assert_eq!(reserve.of(&tenant(name)), Use { leases, bytes: Bytes(bytes) });
            }
            prop_assert_eq!(reserve.leases().count(), oracle.len());
        }
        for n in 0..12 {
            reserve.set(&id(n), None);
        }
        prop_assert_eq!(reserve, Reserve::default(), "nothing is left");
    }
}
