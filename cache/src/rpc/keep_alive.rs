//! `KeepAlive`: renews many leases over one stream.

use std::sync::Arc;

use cowshed_leases::{Lease, LeaseId};
use cowshed_proto::v1;
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
    if request.lease_ids.len() > MAX_LEASES {
        let message = format!(
            "lease_ids has {} entries, {MAX_LEASES} are allowed: send several requests",
            request.lease_ids.len()
        );
        return Err(Error::new(Reason::LeaseIdInvalid, message).with("field", "lease_ids"));
    }
    let ids = request.lease_ids.iter().map(|id| parse::lease_id(id)).collect::<Result<Vec<_>>>()?;
    let now = acquirer.clock.now();
    let mut outcomes = Vec::with_capacity(ids.len());
    let mut together = Vec::new();
    for id in &ids {
        // The disk of one that was doubtful is looked at before it counts again.
        let doubtful = acquirer.ledger.read(|book| book.get(id).is_some_and(|l| l.suspicion(&now).is_some()));
        if doubtful {
            outcomes.push(Some(acquirer.renew(id.clone(), None).await));
        } else {
            outcomes.push(None);
            together.push((id.clone(), None, None));
        }
    }
    let mut renewed = acquirer.ledger.renew_all(together, now).await?.into_iter();
    let outcomes = outcomes.into_iter().map(|outcome| match outcome {
        Some(outcome) => outcome,
        None => renewed.next().map_or_else(|| Err(super::stopping()), |outcome| outcome.map_err(Error::from)),
    });
    let renewals = ids.iter().zip(outcomes).map(|(id, outcome)| renewal(id, outcome, acquirer)).collect();
    Ok(v1::KeepAliveResponse { renewals })
}

fn renewal(id: &LeaseId, outcome: Result<Lease>, acquirer: &Acquirer) -> v1::Renewal {
    let (expires_in, failure) = match outcome {
        Ok(lease) => (convert::expires_in(&lease, &acquirer.clock.now()), None),
        Err(error) => (None, Some(convert::failure(error.reason().as_str(), &error.to_string(), None))),
    };
    v1::Renewal { lease_id: id.to_string(), expires_in, failure }
}
