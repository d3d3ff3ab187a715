//! One page of `ListLeases`: bounded by count and by bytes, for a reply has to fit a message.

use cowshed_leases::{Lease, LeaseId, Moment};
use cowshed_proto::v1;
use prost::Message as _;

use super::convert;

/// Leases in one page at the most.
const MAX_COUNT: usize = 1000;
/// Encoded bytes of the leases in one page at the most, unless a single one has more. Clients of gRPC take messages of
/// 4 MiB if they are told nothing else.
const MAX_BYTES: usize = 1 << 20;

/// A page, and the ids of its leases.
pub(super) struct Page {
    pub(super) ids: Vec<LeaseId>,
    pub(super) reply: v1::ListLeasesResponse,
}

/// The first of `leases`, `count` of them at the most (0: as many as a page may have), and a token if there are more.
pub(super) fn of<'a>(leases: impl Iterator<Item = &'a Lease>, count: u32, now: &Moment) -> Page {
    let count = match count as usize {
        0 => MAX_COUNT,
        count => count.min(MAX_COUNT),
    };
    let mut page = Page { ids: Vec::new(), reply: v1::ListLeasesResponse::default() };
    let mut bytes = 0;
    for lease in leases {
        let message = convert::lease(lease, None, now);
        bytes += message.encoded_len();
        if let Some(last) = page.ids.last()
            && (page.ids.len() == count || bytes > MAX_BYTES)
        {
            page.reply.next_page_token = last.to_string();
            break;
        }
        page.ids.push(lease.id.clone());
        page.reply.leases.push(message);
    }
    page
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use cowshed_leases::{BootId, Generation, Revision, Spec, State, Term, UnixMicros, Uptime};

    use super::*;

    /// The part of a lease that grows with its image is its process; the spec stands for it here.
    fn lease(n: u128, bytes: usize) -> Lease {
        Lease {
            id: LeaseId::from_random(n),
            vm: format!("vm-{n}").parse().unwrap(),
            generation: Generation(1),
            spec: Spec { image: "x".repeat(bytes), platform: String::new(), ..Spec::default() },
            created_at: UnixMicros(0),
            term: Term { ttl: None, boot: BootId::from_bits(0), until: None },
            revision: Revision(0),
            shares: None,
            expects: 0,
            state: State::Preparing,
        }
    }

    #[test]
    fn pages_are_bounded_by_count_and_by_bytes_and_leave_nothing_out() {
        // Leases, bytes of each, count asked for, leases in each page.
        let table: [(usize, usize, u32, &[usize]); 8] = [
            (0, 1, 0, &[0]),
            (3, 1, 0, &[3]),
            (3, 1, 2, &[2, 1]),
            (4, 1, 2, &[2, 2]),
            (1001, 1, 5000, &[1000, 1]),
            (20, 100_000, 0, &[10, 10]),
            (20, 100_000, 4, &[4, 4, 4, 4, 4]),
            (3, 2 << 20, 0, &[1, 1, 1]),
        ];
        for (leases, bytes, count, pages) in table {
            let all: Vec<Lease> = (1..=leases as u128).map(|n| lease(n, bytes)).collect();
            let mut left = all.as_slice();
            for (at, expected) in pages.iter().enumerate() {
                let now = Moment { wall: UnixMicros(0), boot: BootId::from_bits(0), up: Uptime(0) };
                let page = of(left.iter(), count, &now);
                let ids: Vec<&LeaseId> = left[..*expected].iter().map(|lease| &lease.id).collect();
                assert_eq!(page.ids.iter().collect::<Vec<_>>(), ids, "{leases} of {bytes}, page {at}");
                assert_eq!(page.reply.leases.len(), *expected);
                let last = ids.last().filter(|_| at + 1 < pages.len());
                assert_eq!(page.reply.next_page_token, last.map(|id| id.to_string()).unwrap_or_default());
                left = &left[*expected..];
            }
            assert!(left.is_empty());
        }
    }
}
