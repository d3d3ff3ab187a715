//! Growing the pool from its volume group: the seam; who does it is told when the service is put together.

use std::{num::NonZeroU64, sync::Arc, time::Duration};

use cowshed_gc::evict::{Bytes, Growth, Kind, VolumeGroup};
use futures_util::future::{BoxFuture, Either, select};
use tokio::{sync::watch, time::Instant};

use crate::{
    error::{Error, Reason, Result},
    provision::grow::{self, Part},
};

/// LVM2's own default, in bytes; where nothing is free it does not matter.
const EXTENT: NonZeroU64 = NonZeroU64::MIN.saturating_add((4 << 20) - 1);

/// Extends the pool.
#[async_trait::async_trait]
pub trait Grower: Send + Sync {
    /// How this kind of room may grow.
    fn growth(&self, kind: Kind) -> Growth;
    /// What the volume group has; asked before each plan, so it must not hang.
    ///
    /// # Errors
    /// If it cannot be told; then nothing is taken for free.
    async fn group(&self) -> Result<VolumeGroup>;
    /// The same as far as it is known, without waiting; what is not known is asked for behind the answer.
    fn group_lately(&self) -> Option<VolumeGroup>;
    /// Extends this kind of room to so much in all, which is more than it has. Done when this returns; it is not waited for any more
    /// when `hurry` is ready.
    ///
    /// # Errors
    /// Why not; what there was is there, and may become more yet.
    async fn extend(&self, kind: Kind, to: Bytes, hurry: Hurry<'_>) -> Result<()>;
}

/// Ready when something else has to be done.
pub type Hurry<'a> = BoxFuture<'a, ()>;

/// Of a service that cannot grow its pool.
pub struct NoGrower;

#[async_trait::async_trait]
impl Grower for NoGrower {
    fn growth(&self, _kind: Kind) -> Growth {
        Growth::Never
    }

    async fn group(&self) -> Result<VolumeGroup> {
        Ok(nothing_free())
    }

    fn group_lately(&self) -> Option<VolumeGroup> {
        None
    }

    async fn extend(&self, kind: Kind, to: Bytes, _hurry: Hurry<'_>) -> Result<()> {
        let message =
            format!("the pool's {kind} does not grow by itself: extend it to {to} (cowshed pool extend)");
        Err(Error::new(Reason::PoolFull, message))
    }
}

/// From this age on, what was learnt of the volume group is learnt again, behind the answer: LVM2 takes its time. What it failed in
/// counts for as long, so that nobody waits again for an LVM2 that hangs.
const FRESH: Duration = Duration::from_secs(30);
/// Where nothing is known LVM2 is waited for so long …
const SOON: Duration = Duration::from_secs(2);

/// How the pool may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// Of its data.
    pub data: Growth,
    /// Of its metadata.
    pub metadata: Growth,
}

/// By LVM2. Clones share what is known of the volume group.
#[derive(Clone)]
pub struct ByLvm {
    lvm: Arc<dyn grow::Grower>,
    steps: Steps,
    lately: Arc<watch::Sender<Lately>>,
}

/// What LVM2 said when it was last asked, and what it is at.
#[derive(Default)]
struct Lately {
    known: Option<(Instant, Result<VolumeGroup>)>,
    is_asked: bool,
    is_extending: bool,
    /// How many extensions have ended: what was asked before the last is over.
    extended: u64,
}

impl Lately {
    fn learn(&mut self, group: Result<VolumeGroup>) {
        self.known = Some((Instant::now(), group));
    }
}

impl ByLvm {
    /// Grows it so.
    pub fn new(lvm: Arc<dyn grow::Grower>, steps: Steps) -> Self {
        Self { lvm, steps, lately: Arc::default() }
    }

    /// Has LVM2 asked in a task of its own, if what is known is old, and it is not being asked.
    fn refresh(&self) {
        let begins = self.lately.send_if_modified(|lately| {
            let is_old = lately.known.as_ref().is_none_or(|(at, _)| at.elapsed() >= FRESH);
            let begins = is_old && !lately.is_asked;
            lately.is_asked |= begins;
            begins
        });
        if begins {
            let this = self.clone();
            tokio::spawn(async move { while !this.ask().await {} });
        }
    }

    /// Asks LVM2; says whether the answer still counts.
    async fn ask(&self) -> bool {
        let before = self.lately.borrow().extended;
        let room = self.lvm.room().await;
        if let Err(error) = &room {
            tracing::warn!(%error, "the volume group cannot be asked: nothing of it is taken for free");
        }
        let group = room.map(|room| {
            let extent = NonZeroU64::new(room.group.extent_bytes).unwrap_or(EXTENT);
            VolumeGroup { free: Bytes(room.group.free_bytes), extent }
        });
        self.lately.send_if_modified(|lately| {
            let counts = lately.extended == before;
            if counts {
                lately.is_asked = false;
                lately.learn(group);
            }
            counts
        })
    }

    /// Extends it, and takes down what came of it.
    async fn extend_now(self, part: Part, to: Bytes) -> Result<()> {
        let extended = self.lvm.extend(part, to.0).await.map(drop);
        self.lately.send_modify(|lately| {
            lately.is_extending = false;
            lately.extended += 1;
            // Whatever came of it, the group is not what it was.
            lately.known = None;
            if let Err(error) = &extended {
                lately.learn(Err(error.clone()));
            }
        });
        extended
    }
}

#[async_trait::async_trait]
impl Grower for ByLvm {
    fn growth(&self, kind: Kind) -> Growth {
        match kind {
            Kind::Data => self.steps.data,
            Kind::Metadata => self.steps.metadata,
        }
    }

    async fn group(&self) -> Result<VolumeGroup> {
        self.refresh();
        let mut told = self.lately.subscribe();
        let telling = told.wait_for(|lately| lately.known.is_some());
        let known = match tokio::time::timeout(SOON, telling).await {
            Ok(Ok(lately)) => lately.known.clone(),
            Ok(Err(_)) | Err(_) => None,
        };
        if let Some((_, group)) = known {
            return group;
        }
        let error = slow("has not told what is free in the volume group", SOON);
        self.lately.send_if_modified(|lately| {
            let is_untold = lately.known.is_none();
            if is_untold {
                lately.learn(Err(error.clone()));
            }
            is_untold
        });
        Err(error)
    }

    fn group_lately(&self) -> Option<VolumeGroup> {
        self.refresh();
        self.lately.borrow().known.as_ref().and_then(|(_, group)| group.as_ref().ok().copied())
    }

    async fn extend(&self, kind: Kind, to: Bytes, hurry: Hurry<'_>) -> Result<()> {
        let part = match kind {
            Kind::Data => Part::Data,
            Kind::Metadata => Part::Metadata,
        };
        let begins =
            self.lately.send_if_modified(|lately| !std::mem::replace(&mut lately.is_extending, true));
        if !begins {
            let message =
                format!("LVM2 is at an extension of the pool already: its {kind} is extended after that");
            return Err(Error::new(Reason::LvmUnusable, message));
        }
        // What has begun is done to its end, whoever waits.
        let (extending, begun) = (tokio::spawn(self.clone().extend_now(part, to)), Instant::now());
        match select(extending, hurry).await {
            Either::Left((ended, _)) => ended.unwrap_or_else(|error| {
                // It has panicked: nobody else says that it is over.
                self.lately.send_modify(|lately| lately.is_extending = false);
                Err(Error::new(Reason::InternalError, format!("extending the pool's {kind}: {error}")))
            }),
            Either::Right(_) => {
                let error = slow(&format!("has not extended the pool's {kind}"), begun.elapsed());
                self.lately.send_if_modified(|lately| {
                    if lately.is_extending {
                        lately.learn(Err(error.clone()));
                    }
                    lately.is_extending
                });
                Err(error)
            }
        }
    }
}

/// As it is told when LVM2 takes too long to wait for it.
fn slow(what: &str, after: Duration) -> Error {
    let message = format!(
        "LVM2 {what} within {} s: a disk of the group hangs, or another of its commands has it locked; see the kernel's log",
        after.as_secs()
    );
    Error::new(Reason::LvmUnusable, message)
}

/// What is taken for free when the volume group cannot be asked.
pub(super) fn nothing_free() -> VolumeGroup {
    VolumeGroup { free: Bytes(0), extent: EXTENT }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use cowshed_pool::lvm::{Extended, Group, Room};

    use super::*;
    use crate::provision::fitness;

    /// Has so much less each time that it is asked.
    pub(crate) struct Fake {
        free: u64,
        gives: bool,
        asked: AtomicUsize,
        extended: Mutex<Vec<(Part, u64)>>,
        /// Who takes these keeps it from answering, and from extending anything.
        pub(crate) answers: tokio::sync::Mutex<()>,
        pub(crate) extends: tokio::sync::Mutex<()>,
    }

    impl Fake {
        pub(crate) fn new(free: u64, gives: bool) -> Arc<Self> {
            let (asked, extended) = (AtomicUsize::default(), Mutex::default());
            let (answers, extends) = Default::default();
            Arc::new(Self { free, gives, asked, extended, answers, extends })
        }

        fn asked(&self) -> usize {
            self.asked.load(Ordering::SeqCst)
        }
    }

    #[async_trait::async_trait]
    impl grow::Grower for Fake {
        async fn room(&self) -> Result<Room> {
            let asked = self.asked.fetch_add(1, Ordering::SeqCst) as u64;
            drop(self.answers.lock().await);
            Ok(room(self.free - asked))
        }

        async fn extend(&self, part: Part, to_bytes: u64) -> Result<Extended> {
            self.extended.lock().unwrap().push((part, to_bytes));
            drop(self.extends.lock().await);
            if !self.gives {
                return Err(Error::new(Reason::PoolFull, "no room"));
            }
            let (stall, took) = (Duration::ZERO, Duration::ZERO);
            Ok(Extended { part, from_bytes: 0, to_bytes, stall, took })
        }
    }

    fn room(free_bytes: u64) -> Room {
        let Room { group, pool } = fitness::tests::room();
        Room { group: Group { free_bytes, ..group }, pool }
    }

    fn free(group: Result<VolumeGroup>) -> Option<u64> {
        group.ok().map(|group| group.free.0)
    }

    const DATA: Growth = Growth::UpTo { step: Bytes(8), ceiling: Bytes(64) };

    fn grower(fake: &Arc<Fake>) -> ByLvm {
        ByLvm::new(fake.clone(), Steps { data: DATA, metadata: Growth::Never })
    }

    fn soon() -> Hurry<'static> {
        Box::pin(tokio::time::sleep(SOON))
    }

    /// Others do what they can do now.
    async fn settle() {
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_volume_group_is_asked_behind_the_answer_and_anew_after_an_extension() {
        let fake = Fake::new(100, true);
        let grower = grower(&fake);
        assert_eq!((grower.growth(Kind::Data), grower.growth(Kind::Metadata)), (DATA, Growth::Never));
        assert_eq!(grower.group_lately(), None, "it was waited for");
        for _ in 0..3 {
            assert_eq!(free(grower.group().await), Some(100));
        }
        tokio::time::advance(FRESH).await;
        assert_eq!(free(grower.group().await), Some(100), "it was waited for");
        settle().await;
        assert_eq!(grower.group_lately().map(|group| group.free), Some(Bytes(99)));
        grower.extend(Kind::Metadata, Bytes(12), soon()).await.unwrap();
        assert_eq!(*fake.extended.lock().unwrap(), [(Part::Metadata, 12)]);
        assert_eq!(free(grower.group().await), Some(98), "a group of before the extension");
        assert_eq!(fake.asked(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_remembered_and_asked_again_behind_the_answer() {
        let fake = Fake::new(100, false);
        let grower = grower(&fake);
        assert_eq!(free(grower.group().await), Some(100));
        assert_eq!(
            grower.extend(Kind::Data, Bytes(12), soon()).await.unwrap_err().reason(),
            Reason::PoolFull
        );
        for _ in 0..3 {
            assert_eq!(grower.group().await.unwrap_err().reason(), Reason::PoolFull);
        }
        assert_eq!((fake.asked(), grower.group_lately()), (1, None));
        tokio::time::advance(FRESH).await;
        assert_eq!(free(grower.group().await), None, "it was waited for");
        settle().await;
        assert_eq!(free(grower.group().await), Some(99));
    }

    #[tokio::test(start_paused = true)]
    async fn an_lvm2_that_does_not_answer_is_waited_for_once_and_counts_when_it_does() {
        let fake = Fake::new(100, true);
        let grower = grower(&fake);
        let hung = fake.answers.lock().await;
        let begun = Instant::now();
        let said = grower.group().await.unwrap_err().to_string();
        assert!(said.contains("LVM2 has not told") && begun.elapsed() <= SOON * 2, "{said}");
        let begun = Instant::now();
        for _ in 0..10 {
            assert_eq!(grower.group().await.unwrap_err().reason(), Reason::LvmUnusable);
            assert_eq!(grower.group_lately(), None);
        }
        tokio::time::advance(FRESH).await;
        assert_eq!(grower.group_lately(), None);
        assert!(begun.elapsed() <= FRESH, "it was waited for again");
        settle().await;
        assert_eq!(fake.asked(), 1, "it is asked by one at a time");
        drop(hung);
        settle().await;
        assert_eq!(free(grower.group().await), Some(100));
    }

    #[tokio::test(start_paused = true)]
    async fn an_extension_that_hangs_is_not_waited_for_and_goes_on() {
        let fake = Fake::new(100, true);
        let grower = grower(&fake);
        assert_eq!(free(grower.group().await), Some(100));
        let hung = fake.extends.lock().await;
        let begun = Instant::now();
        let said = grower.extend(Kind::Data, Bytes(12), soon()).await.unwrap_err().to_string();
        assert!(said.contains("has not extended the pool's data"), "{said}");
        assert!(begun.elapsed() <= SOON * 3, "{:?}", begun.elapsed());
        let begun = Instant::now();
        let said = grower.extend(Kind::Metadata, Bytes(12), soon()).await.unwrap_err().to_string();
        assert!(said.contains("at an extension"), "{said}");
        assert!(grower.group().await.is_err(), "what is free while it is being taken");
        assert_eq!(begun.elapsed(), Duration::ZERO);
        drop(hung);
        settle().await;
        assert_eq!(*fake.extended.lock().unwrap(), [(Part::Data, 12)]);
        assert_eq!(free(grower.group().await), Some(99));
        grower.extend(Kind::Metadata, Bytes(12), soon()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_asked_before_an_extension_is_asked_again() {
        let fake = Fake::new(100, true);
        let grower = grower(&fake);
        let slow = fake.answers.lock().await;
        assert_eq!(grower.group_lately(), None);
        settle().await;
        grower.extend(Kind::Data, Bytes(12), soon()).await.unwrap();
        drop(slow);
        assert_eq!(free(grower.group().await), Some(99));
        assert_eq!(fake.asked(), 2);
    }
}
