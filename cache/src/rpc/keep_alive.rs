//! `KeepAlive`: renews many leases over one stream.

use std::{collections::HashMap, sync::Arc};

use cowshed_leases::{BookError, Lease, LeaseId};
use cowshed_proto::v1;
use futures_util::stream::{self, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{convert, parse};
use crate::{
    acquire::Acquirer,
    error::{Error, Reason, Result},
};

pub(super) type Stream = ReceiverStream<Result<v1::KeepAliveResponse, Status>>;

/// Leases of one request at the most: they are renewed with one write.
const MAX_LEASES: usize = 1000;
/// So many doubtful ones are looked at side by side.
const AT_ONCE: usize = 16;
/// Answers that a slow reader may leave lying; then its requests wait.
const BUFFER: usize = 4;

pub(super) fn stream(
    acquirer: Arc<Acquirer>,
    mut requests: Streaming<v1::KeepAliveRequest>,
    mut stopped: watch::Receiver<bool>,
) -> Stream {
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        loop {
            let answer = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => renew_all(&acquirer, request).await.map_err(Status::from),
                    // It has said all it had to, or has gone.
                    Ok(None) | Err(_) => return,
                },
                () = sender.closed() => return,
                () = super::until_stopped(&mut stopped) => Err(Status::from(super::stopping())),
            };
            let last = answer.is_err();
            if sender.send(answer).await.is_err() || last {
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
}

async fn renew_all(acquirer: &Acquirer, request: v1::KeepAliveRequest) -> Result<v1::KeepAliveResponse> {
    let ids = request.lease_ids;
    if ids.len() > MAX_LEASES {
        let message =
            format!("lease_ids has {} entries, {MAX_LEASES} are allowed: send several requests", ids.len());
        return Err(Error::new(Reason::LeaseIdInvalid, message).with("field", "lease_ids"));
    }
    let mut outcomes: HashMap<LeaseId, Result<Lease>> = HashMap::new();
    let valid: Vec<LeaseId> = ids.iter().filter_map(|id| parse::lease_id(id).ok()).collect();
    let is_spare = |id: &LeaseId| acquirer.ledger.read(|book| book.get(id).is_some_and(|l| l.vm.is_spare()));
    let (spares, valid): (Vec<LeaseId>, Vec<LeaseId>) = valid.into_iter().partition(is_spare);
    // Nobody has them.
    outcomes.extend(spares.into_iter().map(|id| (id.clone(), Err(Error::from(BookError::Gone(id))))));
    // The disk of one that was doubtful is looked at before it counts again; the others do not wait for that.
    let now = acquirer.clock.now();
    let (doubtful, sure): (Vec<LeaseId>, Vec<LeaseId>) = acquirer.ledger.read(|book| {
        valid.into_iter().partition(|id| book.get(id).is_some_and(|lease| lease.suspicion(&now).is_some()))
    });
    let together = sure.iter().map(|id| (id.clone(), None, None)).collect();
    let renewed = acquirer.ledger.renew_all(together, now).await?;
    outcomes.extend(sure.into_iter().zip(renewed.into_iter().map(|outcome| outcome.map_err(Error::from))));
    let looked_at = stream::iter(doubtful).map(|id| async move {
        let outcome = acquirer.renew(id.clone(), None).await;
        (id, outcome)
    });
    outcomes.extend(looked_at.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await);
    let renewals = ids.iter().map(|id| {
        let outcome = parse::lease_id(id)
            .and_then(|id| outcomes.get(&id).cloned().unwrap_or_else(|| Err(super::stopping())));
        renewal(id, outcome, acquirer)
    });
    Ok(v1::KeepAliveResponse { renewals: renewals.collect() })
}

fn renewal(id: &str, outcome: Result<Lease>, acquirer: &Acquirer) -> v1::Renewal {
    let (expires_in, failure) = match outcome {
        Ok(lease) => (convert::expires_in(&lease, &acquirer.clock.now()), None),
        Err(error) => (None, Some(convert::failure(error.reason().as_str(), &error.to_string(), None))),
    };
    v1::Renewal { lease_id: id.to_owned(), expires_in, failure }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use cowshed_leases::Ttl;

    use super::*;
    use crate::{
        acquire::Wish,
        fakes::{Sight, start, wish, world},
    };

    #[tokio::test]
    async fn each_lease_is_answered_for_and_a_doubtful_one_is_looked_at_first() {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let process = start(&world, directory.path());
        let wish = |vm: &str, seconds| Wish { ttl: Ttl::from_seconds(seconds).ok(), ..wish(vm) };
        let sure = process.acquirer.acquire(wish("sure", 1000)).await.unwrap().lease.id.to_string();
        let doubtful = process.acquirer.acquire(wish("doubtful", 5)).await.unwrap().lease.id.to_string();
        *world.time.lock().unwrap() = (0, 10);
        let ids = vec![doubtful, "nonsense".to_owned(), sure];
        let request = v1::KeepAliveRequest { lease_ids: ids.clone() };
        let reasons = async || {
            let renewals = renew_all(&process.acquirer, request.clone()).await.unwrap().renewals;
            assert!(renewals.iter().map(|renewal| &renewal.lease_id).eq(&ids));
            assert_eq!(renewals[2].expires_in.map(|time| time.seconds), Some(1000));
            renewals.into_iter().map(|renewal| renewal.failure.map(|f| f.reason)).collect::<Vec<_>>()
        };
        let expected =
            |doubtful: Option<&str>| [doubtful, Some("LEASE_ID_INVALID"), None].map(|r| r.map(str::to_owned));
        world.state.lock().unwrap().sight = Sight::NotThin;
        assert_eq!(reasons().await, expected(Some("DEVICE_MISMATCH")));
        world.state.lock().unwrap().sight = Sight::Clear;
        assert_eq!(reasons().await, expected(None));
        let many = v1::KeepAliveRequest { lease_ids: vec![String::new(); MAX_LEASES + 1] };
        assert_eq!(renew_all(&process.acquirer, many).await.unwrap_err().reason(), Reason::LeaseIdInvalid);
    }
}
