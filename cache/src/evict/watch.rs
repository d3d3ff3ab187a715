//! Watches how full the pool is, and runs when it is time.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use cowshed_gc::evict::{Kind, Marks, Pool, Room, Share, Trigger};
use tokio::{sync::watch, time::Instant};

use super::{
    Evictor, Outlook, Trend,
    inventory::used,
    pace::{LONGEST, Pace, SHORTEST},
};
use crate::kernel::Events;

impl Evictor {
    /// Until `stopped` changes. Without `[gc] enabled` it only measures.
    pub async fn watch(self: Arc<Self>, events: Events, mut stopped: watch::Receiver<bool>) {
        let mut pace = Pace::default();
        let mut scheduled = Instant::now() + self.settings.interval;
        // After runs that came to nothing the next one waits longer and longer.
        let (mut rest, mut not_before) = (Duration::ZERO, Instant::now());
        let mut was_emergency = false;
        loop {
            let pause = match self.pool().await {
                Ok((pool, usage)) => {
                    let is_emergency = self.is_emergency(&pool);
                    if is_emergency && !was_emergency {
                        // Now more may go.
                        (rest, not_before) = (Duration::ZERO, Instant::now());
                    }
                    was_emergency = is_emergency;
                    pace.look(used(&usage), self.elapsed());
                    // LVM2 is asked meanwhile, so that it is known when the first one would be refused.
                    self.tell_pace(&pace, &pool);
                    if let Some(trigger) = self.is_time(&pool, scheduled, not_before) {
                        if trigger == Trigger::Schedule {
                            scheduled = Instant::now() + self.settings.interval;
                        }
                        let ran = self.run(trigger).await;
                        if trigger == Trigger::Pressure {
                            ran.iter().filter(|_| is_emergency).for_each(|report| self.remember(report));
                        }
                        let is_idle = ran.as_ref().map_or(true, |report| !report.did_something());
                        rest = if is_idle { (rest * 2).clamp(SHORTEST, LONGEST) } else { Duration::ZERO };
                        not_before = Instant::now() + rest;
                    } else if !self.is_high(&pool) {
                        rest = Duration::ZERO;
                    }
                    pace.pause(pool.total, &self.policy)
                }
                // It does not write, or does not tell: there is nothing to be done about it here.
                Err(error) => {
                    tracing::debug!(%error, "how full the pool is cannot be told");
                    SHORTEST * 5
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // Most are of devices, and come in crowds.
                () = async { tokio::time::sleep(SHORTEST).await; events.next().await } => {}
                _ = stopped.wait_for(|stopped| *stopped) => return,
            }
        }
    }

    fn is_time(&self, pool: &Pool, scheduled: Instant, not_before: Instant) -> Option<Trigger> {
        let now = Instant::now();
        if !self.settings.enabled {
            return None;
        }
        if self.policy.retention.is_some() && now >= scheduled {
            return Some(Trigger::Schedule);
        }
        (self.is_high(pool) && now >= not_before).then_some(Trigger::Pressure)
    }

    fn is_high(&self, pool: &Pool) -> bool {
        self.has_reached(pool, pool.settled().used, Marks::high)
    }

    pub(super) fn is_emergency(&self, pool: &Pool) -> bool {
        self.has_reached(pool, pool.used, Marks::emergency)
    }

    fn has_reached(&self, pool: &Pool, used: Room, mark: impl Fn(Marks) -> Share) -> bool {
        let is_reached = |kind| used.of(kind) >= mark(self.policy.limits(kind).marks).of(pool.total.of(kind));
        Kind::ALL.into_iter().any(is_reached)
    }

    fn tell_pace(&self, pace: &Pace, pool: &Pool) {
        let trend = |kind| {
            let full_in = pace.time_to(kind, pool.total.of(kind));
            self.metrics.pool_full_in(kind, full_in);
            Trend { rate: pace.known_rate(kind), full_in }
        };
        let (data, metadata) = (trend(Kind::Data), trend(Kind::Metadata));
        let group_free = self.group_free();
        self.metrics.group_free(group_free);
        let outlook = Outlook { data, metadata, group_free };
        *self.outlook.lock().unwrap_or_else(PoisonError::into_inner) = outlook;
    }
}
