//! The kernel, asked from async code: a call that hangs holds up its caller for a while, and no thread of the runtime.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cowshed_leases::DeviceIdentity;
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout_at};

use super::{Holder, Kernel, KernelError, Load, PoolUsage};

/// dm-thin tells of a pool when it gets the pool's metadata lock, which the deletion of a large disk can hold for long.
const POOL_LIMIT: Duration = Duration::from_secs(2);
/// A device is looked up under device-mapper's own lock, which each removal of a device holds for milliseconds.
const DEVICE_LIMIT: Duration = Duration::from_secs(10);
/// Every open file of every process is looked at for it, and one of those may be on a filesystem that hangs.
const HOLDERS_LIMIT: Duration = Duration::from_secs(1);
/// From this age on, what was learnt of the pool is learnt again, behind the answer; and from that on before it.
const FRESH: Duration = Duration::from_secs(1);
const STALE: Duration = Duration::from_secs(5);
/// Who would rather not wait takes it up to this age.
const AT_HAND: Duration = Duration::from_secs(30);
/// So many devices are asked for what they count in one turn.
const LOADS: usize = 64;
/// So many threads may be stuck in the kernel.
const PARALLEL: usize = 64;

/// Asks the kernel. Clones share the turns.
#[derive(Clone)]
pub struct Devices {
    kernel: Arc<dyn Kernel>,
    turns: Arc<Semaphore>,
    /// The pool is asked by one at a time: if it hangs, it holds one thread.
    pool_turn: Arc<Semaphore>,
    /// So is who has a device open.
    holders_turn: Arc<Semaphore>,
    /// And what devices map, for which the pool's metadata lock is waited for as well.
    mapped_turn: Arc<Semaphore>,
    /// What the pool was like when it was last asked, and whether it is being asked again.
    lately: Arc<Mutex<Lately>>,
}

#[derive(Debug, Default)]
struct Lately {
    known: Option<(Instant, PoolUsage)>,
    asking: bool,
}

impl Devices {
    /// Asks this kernel.
    pub fn new(kernel: Arc<dyn Kernel>) -> Self {
        let turns = |count| Arc::new(Semaphore::new(count));
        Self {
            kernel,
            turns: turns(PARALLEL),
            pool_turn: turns(1),
            holders_turn: turns(1),
            mapped_turn: turns(1),
            lately: Arc::default(),
        }
    }

    /// See [`Kernel::inspect`].
    ///
    /// # Errors
    /// See [`KernelError`].
    pub async fn inspect(&self, path: &str) -> Result<DeviceIdentity, KernelError> {
        self.inspect_then(path, |seen| seen).await?
    }

    /// The same; what is seen is given to `then`, in the thread that has looked, which may wait for a disk: whoever writes down
    /// what comes of it saves two turns of the processor. Not called if that comes too late.
    ///
    /// # Errors
    /// If it comes too late.
    pub(crate) async fn inspect_then<T: Send + 'static>(
        &self,
        path: &str,
        then: impl FnOnce(Result<DeviceIdentity, KernelError>) -> T + Send + 'static,
    ) -> Result<T, KernelError> {
        let (what, path) = (format!("looking at {path}"), path.to_owned());
        self.ask_then(&self.turns, DEVICE_LIMIT, what, move |kernel| kernel.inspect(&path), then).await
    }

    /// See [`Kernel::open_count`].
    ///
    /// # Errors
    /// See [`KernelError`].
    pub async fn open_count(&self, name: &str) -> Result<Option<u32>, KernelError> {
        let (what, name) = (format!("looking at {name}"), name.to_owned());
        self.ask(&self.turns, DEVICE_LIMIT, what, move |kernel| kernel.open_count(&name)).await
    }

    /// See [`Kernel::holders`].
    ///
    /// # Errors
    /// See [`KernelError`].
    pub async fn holders(&self, path: &str) -> Result<Vec<Holder>, KernelError> {
        let (what, path) = (format!("looking who has {path} open"), path.to_owned());
        self.ask(&self.holders_turn, HOLDERS_LIMIT, what, move |kernel| kernel.holders(&path)).await
    }

    /// See [`Kernel::mapped`]: of each of these, one after the other; `None` also where it is not told.
    ///
    /// # Errors
    /// If that takes too long.
    pub async fn mapped(&self, names: Vec<String>) -> Result<Vec<Option<u64>>, KernelError> {
        let what = "looking at what devices map".to_owned();
        self.ask(&self.mapped_turn, DEVICE_LIMIT, what, move |kernel| {
            Ok(names.iter().map(|name| kernel.mapped(name).ok().flatten()).collect())
        })
        .await
    }

    /// See [`Kernel::load`]; of many, in their order. Some at a time, so that others come in between.
    ///
    /// # Errors
    /// See [`KernelError`].
    pub async fn loads(&self, names: Vec<String>) -> Result<Vec<Option<Load>>, KernelError> {
        let mut loads = Vec::with_capacity(names.len());
        for some in names.chunks(LOADS) {
            let (what, some) = (format!("looking at {} devices", some.len()), some.to_vec());
            // One that does not tell keeps no other from it.
            let load = |kernel: &dyn Kernel, name: &String| kernel.load(name).unwrap_or_default();
            let look =
                move |kernel: &dyn Kernel| Ok(some.iter().map(|name| load(kernel, name)).collect::<Vec<_>>());
            loads.extend(self.ask(&self.turns, DEVICE_LIMIT, what, look).await?);
        }
        Ok(loads)
    }

    /// See [`Kernel::pool`].
    ///
    /// # Errors
    /// See [`KernelError`].
    pub async fn pool(&self) -> Result<PoolUsage, KernelError> {
        let (what, asked, lately) =
            ("looking at the thin pool".to_owned(), Instant::now(), self.lately.clone());
        let usage = self.ask(&self.pool_turn, POOL_LIMIT, what, move |kernel| {
            let lately = || lately.lock().unwrap_or_else(PoisonError::into_inner);
            // Of all who have waited for the same look, one takes it.
            if let Some((_, usage)) = lately().known.clone().filter(|(at, _)| *at >= asked) {
                return Ok(usage);
            }
            let begun = Instant::now();
            let usage = kernel.pool()?;
            lately().known = Some((begun, usage.clone()));
            Ok(usage)
        });
        let usage = usage.await;
        // One that is busy is hardly another one than a moment ago.
        if let Err(error) = &usage
            && !matches!(error, KernelError::Slow { .. })
        {
            self.lately().known = None;
        }
        usage
    }

    /// The same, as it was a few seconds ago at the most: for who must not wait for the pool's metadata lock.
    ///
    /// # Errors
    /// See [`KernelError`].
    pub async fn pool_lately(&self) -> Result<PoolUsage, KernelError> {
        match self.known(STALE) {
            Some(usage) => Ok(usage),
            None => self.pool().await,
        }
    }

    /// The same, as it was half a minute ago at the most, if that is known: for who must not wait at all.
    pub fn pool_at_hand(&self) -> Option<PoolUsage> {
        self.known(AT_HAND)
    }

    fn known(&self, oldest: Duration) -> Option<PoolUsage> {
        let known = self.lately().known.clone();
        let (at, usage) = known.filter(|(at, _)| at.elapsed() < oldest)?;
        if at.elapsed() >= FRESH && !std::mem::replace(&mut self.lately().asking, true) {
            let this = self.clone();
            tokio::spawn(async move {
                let _known = this.pool().await;
                this.lately().asking = false;
            });
        }
        Some(usage)
    }

    fn lately(&self) -> MutexGuard<'_, Lately> {
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask<T: Send + 'static>(
        &self,
        turns: &Arc<Semaphore>,
        limit: Duration,
        what: String,
        look: impl FnOnce(&dyn Kernel) -> Result<T, KernelError> + Send + 'static,
    ) -> Result<T, KernelError> {
        self.ask_then(turns, limit, what, look, |seen| seen).await?
    }

    async fn ask_then<T: Send + 'static, U: Send + 'static>(
        &self,
        turns: &Arc<Semaphore>,
        limit: Duration,
        what: String,
        look: impl FnOnce(&dyn Kernel) -> Result<T, KernelError> + Send + 'static,
        then: impl FnOnce(Result<T, KernelError>) -> U + Send + 'static,
    ) -> Result<U, KernelError> {
        let until = tokio::time::Instant::now() + limit;
        // Fails only if the semaphore is closed, which it never is.
        let turn = match timeout_at(until, turns.clone().acquire_owned()).await {
            Ok(Ok(turn)) => turn,
            Ok(Err(error)) => return Err(KernelError::Refused { what, error: error.to_string() }),
            Err(_) => return Err(KernelError::Slow { what, after: limit }),
        };
        let kernel = self.kernel.clone();
        let settled = Arc::new(AtomicBool::new(false));
        let seen_in_time = settled.clone();
        let mut asked = spawn_blocking(move || {
            let seen = look(&*kernel);
            // Held until the kernel answers, however long that takes.
            drop(turn);
            (!seen_in_time.swap(true, Ordering::SeqCst)).then(|| then(seen))
        });
        let answer = match timeout_at(until, &mut asked).await {
            Ok(answer) => answer,
            // It was seen just in time: what comes of it is waited for.
            Err(_) if settled.swap(true, Ordering::SeqCst) => asked.await,
            Err(_) => Ok(None),
        };
        match answer {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(KernelError::Slow { what, after: limit }),
            Err(error) => Err(KernelError::Refused { what, error: error.to_string() }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    /// A kernel whose pool hangs for as long as the test has its lock.
    #[derive(Default)]
    struct Hung {
        pool: Mutex<()>,
        asked: AtomicUsize,
        /// What it answers in the end.
        usage: Option<PoolUsage>,
    }

    impl Kernel for Hung {
        fn inspect(&self, path: &str) -> Result<DeviceIdentity, KernelError> {
            panic!("{path}")
        }

        fn open_count(&self, _name: &str) -> Result<Option<u32>, KernelError> {
            Ok(Some(3))
        }

        fn mapped(&self, _name: &str) -> Result<Option<u64>, KernelError> {
            Ok(None)
        }

        fn holders(&self, _path: &str) -> Result<Vec<Holder>, KernelError> {
            Ok(Vec::new())
        }

        fn load(&self, _name: &str) -> Result<Option<Load>, KernelError> {
            Ok(None)
        }

        fn pool(&self) -> Result<PoolUsage, KernelError> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            let _pool = self.pool.lock().unwrap();
            self.usage.clone().ok_or_else(|| KernelError::NoPool("it answers".into()))
        }
    }

    #[tokio::test]
    async fn what_comes_too_late_has_no_consequences_and_what_was_begun_in_time_is_waited_for() {
        let devices = Devices::new(Arc::new(Hung::default()));
        let limit = Duration::from_millis(50);
        let (answer, answers) = std::sync::mpsc::channel::<()>();
        let (looked, called) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (has_looked, is_called) = (looked.clone(), called.clone());
        let look = move |_: &dyn Kernel| {
            answers.recv().unwrap();
            has_looked.store(true, Ordering::SeqCst);
            Ok(())
        };
        let then = move |_| is_called.store(true, Ordering::SeqCst);
        let late = devices.ask_then(&devices.turns, limit, "late".into(), look, then).await;
        assert!(matches!(late, Err(KernelError::Slow { .. })), "{late:?}");
        answer.send(()).unwrap();
        // All turns are there again: its thread has seen what it was to see.
        let all = u32::try_from(PARALLEL).unwrap();
        let all = devices.turns.clone().acquire_many_owned(all).await.unwrap();
        assert!(looked.load(Ordering::SeqCst));
        drop(all);
        let slow_disk = |seen: Result<u8, KernelError>| {
            let (_nobody_sends, waits) = std::sync::mpsc::channel::<()>();
            let _limit_is_over = waits.recv_timeout(Duration::from_millis(200));
            seen.unwrap() + 1
        };
        let done = devices.ask_then(&devices.turns, limit, "in time".into(), |_| Ok(1), slow_disk).await;
        assert_eq!(done, Ok(2));
        assert!(!called.load(Ordering::SeqCst), "what came too late was acted upon");
    }

    #[tokio::test]
    async fn a_pool_that_hangs_holds_one_thread_and_nobody_for_long() {
        let kernel = Arc::new(Hung::default());
        let devices = Devices::new(kernel.clone());
        // In a thread of its own: a guard must not be held across an await.
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (held, holds) = std::sync::mpsc::channel();
        let hanging = kernel.clone();
        let holder = std::thread::spawn(move || {
            let _pool = hanging.pool.lock().unwrap();
            held.send(()).unwrap();
            let _end = released.recv();
        });
        holds.recv().unwrap();
        let slow = |answer| matches!(answer, Err(KernelError::Slow { .. }));
        let (a, b, open) = tokio::join!(devices.pool(), devices.pool(), devices.open_count("x"));
        assert!(slow(a) && slow(b));
        assert_eq!(open, Ok(Some(3)), "other questions are answered meanwhile");
        assert_eq!(kernel.asked.load(Ordering::SeqCst), 1);
        drop(release);
        holder.join().unwrap();
        assert_eq!(devices.pool().await, Err(KernelError::NoPool("it answers".into())));
        assert!(matches!(devices.inspect("/dev/x").await, Err(KernelError::Refused { .. })), "a panic");
    }

    fn usage(data_used: u64) -> PoolUsage {
        PoolUsage {
            name: "pool".into(),
            data_used,
            data_total: 2,
            metadata_used: 1,
            metadata_total: 2,
            block_bytes: 1,
            mode: super::super::PoolMode::ReadWrite,
            zeroing: true,
        }
    }

    #[tokio::test]
    async fn who_must_not_wait_takes_what_is_at_hand_and_it_is_learnt_again_behind_that() {
        let kernel = Arc::new(Hung { usage: Some(usage(2)), ..Hung::default() });
        let devices = Devices::new(kernel.clone());
        assert_eq!(devices.pool_at_hand(), None, "nothing is known yet");
        let since = |age| devices.lately().known = Some((Instant::now().checked_sub(age).unwrap(), usage(1)));
        since(AT_HAND);
        assert_eq!(devices.pool_at_hand(), None, "too old");
        assert_eq!(kernel.asked.load(Ordering::SeqCst), 0);
        since(STALE);
        assert_eq!(devices.pool_at_hand(), Some(usage(1)));
        while devices.pool_at_hand() != Some(usage(2)) {
            tokio::task::yield_now().await;
        }
        assert_eq!(kernel.asked.load(Ordering::SeqCst), 1);
        since(STALE);
        assert_eq!(devices.pool_lately().await, Ok(usage(2)), "who may wait is told what is now");
    }

    #[tokio::test]
    async fn a_crowd_that_waits_for_the_pool_has_one_look_at_it() {
        let usage = usage(1);
        let kernel = Arc::new(Hung { usage: Some(usage.clone()), ..Hung::default() });
        let devices = Devices::new(kernel.clone());
        let busy = futures_util::future::join_all((0..50).map(|_| devices.pool())).await;
        assert!(busy.iter().all(|one| one.as_ref() == Ok(&usage)));
        let looks = kernel.asked.load(Ordering::SeqCst);
        assert!(looks <= 3, "{looks} looks for fifty");
        // Who comes later is told what is then.
        assert_eq!(devices.pool().await, Ok(usage));
        assert_eq!(kernel.asked.load(Ordering::SeqCst), looks + 1);
    }
}
