//! Looks every few seconds whether all of the work can be done, and says so: health, metric, log.

use std::{sync::Arc, time::Duration};

use cowshed_proto::v1::cowshed_server::CowshedServer;
use tokio::sync::watch;
use tonic::server::NamedService as _;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    error::Reason,
    metrics::Metrics,
    rescue::{Cause, Mode, Verdict},
    rpc::Api,
    status::{Look, StatusSource},
};

/// Pause between two looks.
const PAUSE: Duration = Duration::from_secs(2);

/// Whether the API serves, as health checks are told. Of the process (the service ""), only that it answers.
#[derive(Clone)]
pub(super) struct Reporter(pub(super) HealthReporter);

impl Reporter {
    pub(super) async fn say(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.0.set_service_status(CowshedServer::<Api>::NAME, status).await;
    }
}

/// Runs until `stopped`.
pub(super) async fn run(
    source: Arc<StatusSource>,
    reporter: Reporter,
    metrics: Metrics,
    mut stopped: watch::Receiver<bool>,
) {
    let mut mode = Mode::default();
    // What is known at once is not waited for.
    let (mut ledger, mut drain) = (source.ledger.changes(), source.drain.changes());
    loop {
        let look = source.ask().await;
        let verdict = mode.look(&look.problems);
        source.admission.hindrances.set_hung(hung(&look, &mode));
        for cause in Cause::ALL {
            metrics.rescue(cause, mode.causes().contains(&cause));
        }
        log(&verdict, &mode);
        reporter.say(verdict.serving).await;
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            _ = ledger.changed() => {}
            _ = drain.changed() => {}
            _ = stopped.wait_for(|stopped| *stopped) => return,
        }
    }
}

/// That containerd has not answered in time, and not only once.
fn hung<'a>(look: &'a Look, mode: &Mode) -> Option<&'a crate::error::Error> {
    let late = look.problems.iter().find(|error| error.reason() == Reason::ContainerdTimeout);
    late.filter(|_| mode.causes().contains(&Cause::Containerd))
}

fn log(verdict: &Verdict, mode: &Mode) {
    for (cause, why) in &verdict.entered {
        tracing::error!(cause = cause.as_str(), why, "rescue mode: not all of the work can be done");
    }
    for cause in &verdict.left {
        let left = mode.causes().len();
        tracing::info!(cause = cause.as_str(), left, "this cause of rescue mode is gone");
    }
}
