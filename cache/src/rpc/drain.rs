//! `Drain`: takes on nothing new, and tells how much of the rest is left.

use std::sync::Arc;

use cowshed_proto::v1;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::changes;
use crate::{acquire::Acquirer, image::Images};

pub(super) type Stream = ReceiverStream<Result<v1::DrainResponse, Status>>;

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
            .read(|book| book.after(None).filter(|l| l.is_held() && l.vm.is_vm()).count());
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
pub(super) fn stream(rest: Rest, stopped: watch::Receiver<bool>) -> Stream {
    let look = move || {
        let now = rest.look();
        Ok((now, now.done))
    };
    changes::stream(look, stopped)
}
