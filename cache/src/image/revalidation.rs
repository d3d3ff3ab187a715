//! Whether a tag still means what is here: its registry is asked once in a while, and not by each who wants to know.
//!
//! ```text
//!  nothing known ─► asked ─► the same: counts for the interval
//!                     │  └─► another, or no answer: counts for a pause
//!                     └ who comes meanwhile waits with the first; from PATIENCE on, what is here is taken
//! ```
//!
//! A question goes on when nobody waits for it any more, and what it comes to is there for the next one.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt as _, future};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout, timeout_at},
};

use super::{ACCEPTED, Access, DOCUMENT_MAX_BYTES, Digest, ImageRef};
use crate::{
    error::{Error, Reason, Result},
    registry::{Credential, Registries},
};

/// So many answers are remembered.
const REMEMBERED: usize = 10_000;
/// What is here is not held up longer than this by a registry …
const PATIENCE: Duration = Duration::from_secs(3);
/// … which may answer the question until then.
const DEADLINE: Duration = Duration::from_secs(10);
/// After no answer nobody asks again for so long; and so long a tag that has moved need not be asked about until it is pulled.
const PAUSE: Duration = Duration::from_secs(30);

/// An image, and who asks for it: a hash of it, for it may have a password in it.
type Key = (ImageRef, u64);

/// What a registry says that a tag means; `None`: it does not.
type Answer = Option<Digest>;

#[derive(Debug)]
enum Question {
    /// It is being asked.
    Open { since: Instant, answer: future::Shared<oneshot::Receiver<Answer>> },
    /// It was asked when that was `here`.
    Settled { answer: Answer, here: Digest, at: Instant, counts_for: Duration },
}

impl Question {
    fn counts(&self, now: Instant) -> bool {
        match self {
            // One that is older has ended by a panic.
            Self::Open { since, .. } => now < *since + 2 * DEADLINE,
            Self::Settled { at, counts_for, .. } => now.duration_since(*at) < *counts_for,
        }
    }
}

/// All that were asked lately. Clones share them. The lock is held for look-ups only, never across an await.
#[derive(Clone, Debug, Default)]
pub(super) struct Questions {
    hash: RandomState,
    all: Arc<Mutex<HashMap<Key, Question>>>,
}

impl Questions {
    /// Whether the tag means something else than `here`, as far as that is to be learnt now; `asking` asks, if it is time to. What
    /// a registry has said counts for `interval`.
    pub(super) async fn has_moved(
        &self,
        (image, access): (&ImageRef, &Access),
        here: &Digest,
        interval: Duration,
        asking: impl Future<Output = Result<Digest>> + Send + 'static,
    ) -> bool {
        let key = (image.clone(), self.hash.hash_one(access));
        let (since, answer) = {
            let (mut all, now) = (self.all(), Instant::now());
            match all.get(&key).filter(|question| question.counts(now)) {
                Some(Question::Open { since, answer }) => (*since, answer.clone()),
                Some(Question::Settled { answer: None, .. }) => return false,
                Some(Question::Settled { answer: Some(means), .. }) if means == here => return false,
                Some(Question::Settled { here: then, .. }) if then == here => return true,
                // What is here has changed since, and not to what was said.
                Some(Question::Settled { .. }) | None => {
                    all.retain(|_, question| question.counts(now));
                    if all.len() >= REMEMBERED {
                        all.clear();
                    }
                    let (sender, receiver) = oneshot::channel();
                    let answer = receiver.shared();
                    all.insert(key.clone(), Question::Open { since: now, answer: answer.clone() });
                    tokio::spawn(self.clone().settle(key, here.clone(), interval, asking, sender));
                    (now, answer)
                }
            }
        };
        match timeout_at(since + PATIENCE, answer).await {
            Ok(Ok(Some(means))) => means != *here,
            Ok(Ok(None) | Err(_)) | Err(_) => false,
        }
    }

    async fn settle(
        self,
        key: Key,
        here: Digest,
        interval: Duration,
        asking: impl Future<Output = Result<Digest>>,
        sender: oneshot::Sender<Answer>,
    ) {
        let late = || Error::new(Reason::RegistryUnavailable, format!("no answer within {DEADLINE:?}"));
        let answer = match timeout(DEADLINE, asking).await.unwrap_or_else(|_| Err(late())) {
            Ok(means) => Some(means),
            Err(error) => {
                tracing::warn!(image = %key.0, %error, "what the tag means is not to be learnt now; going on with what is there");
                None
            }
        };
        let counts_for = if answer.as_ref() == Some(&here) { interval } else { PAUSE };
        let settled = Question::Settled { answer: answer.clone(), here, at: Instant::now(), counts_for };
        self.all().insert(key, settled);
        let _everyone_left = sender.send(answer);
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Key, Question>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the registry says that the image's tag means.
pub(super) async fn meaning(
    registries: Registries,
    image: ImageRef,
    credential: Option<Credential>,
) -> Result<Digest> {
    let source = registries.source(&image, credential.as_ref()).await?;
    Ok(source.document(None, &ACCEPTED, DOCUMENT_MAX_BYTES).await?.1)
}

#[cfg(test)]
#[path = "revalidation_tests.rs"]
mod tests;
