//! How long launchers wait for answers, and which calls may fail.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tonic::{Request, Response, Status};

use crate::Outcome;

/// What a launcher tells the service with each call: by then it wants an answer.
const DEADLINE: Duration = Duration::from_secs(30);
/// How much later the answer may come on an emulated host.
const SLACK: Duration = Duration::from_secs(10);

/// What is asked. Only an acquire needs containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Acquire,
    Release,
    Renew,
    Verify,
}

#[derive(Default)]
struct Told {
    calls: u64,
    failed: u64,
    slowest: BTreeMap<Kind, Duration>,
}

/// What was answered to all launchers together.
#[derive(Clone)]
pub(crate) struct Answers {
    /// Cowshed is there all the time.
    stays: bool,
    told: Arc<Mutex<Told>>,
}

impl Answers {
    pub(crate) fn new(stays: bool) -> Self {
        Self { stays, told: Arc::default() }
    }

    /// With the deadline, if there is one.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if self.stays {
            request.set_timeout(DEADLINE);
        }
        request
    }

    /// Waits for the answer. One that is late, or a failure of what cannot fail, is an error that is tolerated by nobody.
    pub(crate) async fn to<T>(
        &self,
        kind: Kind,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Outcome<T> {
        let began = Instant::now();
        let answer = if self.stays {
            let late = |_| format!("no answer to a call ({kind:?}) with a deadline of {DEADLINE:?}");
            tokio::time::timeout(DEADLINE + SLACK, call).await.map_err(late)?
        } else {
            call.await
        };
        let took = began.elapsed();
        self.count(kind, took, answer.is_ok());
        match answer {
            Ok(reply) => Ok(reply.into_inner()),
            Err(status) if self.stays && kind != Kind::Acquire => {
                Err(format!("{kind:?} refused after {took:?}, though containerd is not needed: {status}")
                    .into())
            }
            Err(status) => Err(status.into()),
        }
    }

    fn count(&self, kind: Kind, took: Duration, succeeded: bool) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.calls += 1;
        told.failed += u64::from(!succeeded);
        let slowest = told.slowest.entry(kind).or_default();
        *slowest = took.max(*slowest);
    }
}

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        write!(f, "{} calls of launchers, {} failed, slowest answers:", told.calls, told.failed)?;
        told.slowest.iter().try_for_each(|(kind, took)| write!(f, " {kind:?} {:.1} s", took.as_secs_f32()))
    }
}
