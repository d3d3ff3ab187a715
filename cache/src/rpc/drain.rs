//! `Drain`: takes on nothing new, and tells how much of the rest is left.

use std::{sync::Arc, time::Duration};

use cowshed_proto::v1;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::{acquire::Acquirer, image::Images};

pub(super) type Stream = ReceiverStream<Result<v1::DrainResponse, Status>>;

/// How often the rest is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// What may be left.
pub(super) struct Rest {
    pub(super) acquirer: Arc<Acquirer>,
    pub(super) images: Images,
    /// Whether leases that are held count.
    pub(super) leases: bool,
    /// Whether it is only told what there is.
    pub(super) once: bool,
}

impl Rest {
    fn look(&self) -> v1::DrainResponse {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let leases = self
            .acquirer
            .ledger
            .read(|book| book.after(None).filter(|l| l.is_held() && !l.vm.is_image()).count());
        let (acquires, pulls) = (self.acquirer.under_way(), self.images.pulls_in_flight());
        v1::DrainResponse {
            acquires: count(acquires),
            pulls: count(pulls),
            leases: count(leases),
            done: self.once || (acquires == 0 && pulls == 0 && (leases == 0 || !self.leases)),
        }
    }
}

/// Each change of the rest, until there is none.
pub(super) fn stream(rest: Rest, mut stopped: watch::Receiver<bool>) -> Stream {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut told = None;
        loop {
            let now = rest.look();
            if told != Some(now) {
                told = Some(now);
                if sender.send(Ok(now)).await.is_err() || now.done {
                    return;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = sender.closed() => return,
                () = super::until_stopped(&mut stopped) => {
                    let _told = sender.send(Err(super::stopping().into())).await;
                    return;
                }
            }
        }
    });
    ReceiverStream::new(receiver)
}
