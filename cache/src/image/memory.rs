//! The memory of layers that are inflated, of all pulls together.
//!
//! ```text
//!  while the bytes arrive, or ahead ─► what is left of one part, or not yet
//!                                         └─► its turn has come, and its blob is stored ─► in line for the other part,
//!                                                ▲                                        │ as usual, or as large
//!                                                └─── a pull of a higher class is under way ◄─┘
//! ```
//!
//! Who has of the first part may be waiting for anybody (a registry, a pull that comes first, the layer below), and nobody
//! waits for it. Who has of the other part waits for nobody, so that whoever is in line for it gets it. A layer has its memory
//! until the last of what was inflated has been read.

use std::{io, sync::Arc};

use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};

use super::{
    gate::{Class, Gate},
    tap::Arrival,
    waits::Waits,
};
use crate::layer::{LEAST_MEMORY, LayerError, Warden};

type Result<T> = std::result::Result<T, LayerError>;

/// In MiB. Of those that are inflated while they arrive: of pulls that never wait for others, and of those that may.
const ARRIVING: usize = 192;
const ARRIVING_ASIDE: usize = 64;
/// Of those that are inflated from the store: some that are usual, and one with the largest window. Each kind has a line of its
/// own, so that neither stands behind the other.
const STORED_USUAL: usize = 27;
const STORED_LARGE: usize = 133;
/// What one that is usual takes at the most: zstd's window is of 8 MiB up to its level 19.
const USUAL: u32 = 13;

/// What there is of it.
#[derive(Debug)]
pub(super) struct Memory {
    arriving: Arc<Semaphore>,
    aside: Arc<Semaphore>,
    usual: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

impl Default for Memory {
    fn default() -> Self {
        let of = |mib| Arc::new(Semaphore::new(mib));
        Self {
            arriving: of(ARRIVING),
            aside: of(ARRIVING_ASIDE),
            usual: of(STORED_USUAL),
            large: of(STORED_LARGE),
        }
    }
}

impl Memory {
    fn stored(&self, mib: u32) -> &Arc<Semaphore> {
        if mib <= USUAL { &self.usual } else { &self.large }
    }
}

/// Bytes as MiB, which permits are.
fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)
}

/// What a layer has of it, asked on the thread that inflates it.
#[derive(Debug)]
pub(super) struct Account {
    memory: Arc<Memory>,
    gate: Arc<Gate>,
    arrival: Arrival,
    /// Whether it is the layer's turn; nobody wants it any more if the sender is gone.
    turn: watch::Receiver<bool>,
    handle: Handle,
    in_line: Arc<Waits>,
    has: Option<(OwnedSemaphorePermit, Part)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Arriving,
    Stored,
}

impl Account {
    /// Of a layer of the pull of `gate`. To be called in the runtime.
    pub(super) fn new(
        memory: &Arc<Memory>,
        gate: &Arc<Gate>,
        arrival: Arrival,
        turn: watch::Receiver<bool>,
    ) -> Self {
        let (memory, gate) = (memory.clone(), gate.clone());
        let (handle, in_line) = (Handle::current(), Arc::default());
        Self { memory, gate, arrival, turn, handle, in_line, has: None }
    }

    /// How long it has been in line, or has let others go first there.
    pub(super) fn in_line(&self) -> Arc<Waits> {
        self.in_line.clone()
    }

    /// `work`, unless and until nobody wants the layer any more.
    fn wait<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut turn = self.turn.clone();
        let unwanted = async move { while turn.changed().await.is_ok() {} };
        self.handle.block_on(async {
            tokio::select! {
                done = work => done,
                () = unwanted => Err(LayerError::Stopped),
            }
        })
    }

    /// From the store. Who has to give way leaves the line, and who does not any more, by whoever's class, joins it.
    async fn stored(&self, mib: u32) -> Result<OwnedSemaphorePermit> {
        let stopped = |_| LayerError::Stopped;
        self.turn.clone().wait_for(|is_here| *is_here).await.map_err(stopped)?;
        if !self.arrival.stored().await {
            return Err(LayerError::Source(io::Error::other("it was not fetched")));
        }
        let _waits = self.in_line.begin();
        loop {
            // A pull that is given up ends by itself.
            self.gate.pass().await.map_err(|_| LayerError::Stopped)?;
            tokio::select! {
                biased;
                permit = self.memory.stored(mib).clone().acquire_many_owned(mib) => {
                    return permit.map_err(|_| LayerError::Stopped);
                }
                _closed = self.gate.closes() => {}
            }
        }
    }
}

impl Warden for Account {
    fn memory(&mut self, bytes: u64) -> Result<()> {
        let mib = mib(bytes);
        // What was inflated may still have to be read. Of the other part it has none while it waits for more.
        self.keep(LEAST_MEMORY);
        self.has.take_if(|(_, part)| *part == Part::Stored);
        let arriving =
            if self.gate.own_class() == Class::Urgent { &self.memory.arriving } else { &self.memory.aside };
        let has = match arriving.clone().try_acquire_many_owned(mib) {
            Ok(permit) => (permit, Part::Arriving),
            Err(_) => (self.wait(self.stored(mib))?, Part::Stored),
        };
        self.has = Some(has);
        Ok(())
    }

    fn go_on(&mut self) -> Result<()> {
        let is_waited_for = matches!(self.has, Some((_, Part::Stored)));
        if is_waited_for || self.gate.is_open() {
            return Ok(());
        }
        // A pull that is given up ends by itself.
        self.wait(async { self.gate.pass().await.map_err(|_| LayerError::Stopped) })
    }

    fn keep(&mut self, bytes: u64) {
        if let Some((permit, _)) = &mut self.has {
            let more = permit.num_permits().saturating_sub(mib(bytes) as usize);
            drop(permit.split(more));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{pin::Pin, thread::JoinHandle, time::Duration};

    use futures_util::FutureExt as _;

    use super::*;
    use crate::image::{
        gate::{ClaimId, Terms, Traffic},
        tap::{Outlet, Room, Tap, tap},
    };

    /// As the largest window.
    const LARGEST: u64 = 133 << 20;

    struct Bench {
        memory: Arc<Memory>,
        traffic: Traffic,
    }

    /// A layer of a pull of its own.
    struct Layer {
        gate: Arc<Gate>,
        tap: Option<Tap>,
        outlet: Outlet,
        turn: watch::Sender<bool>,
    }

    impl Bench {
        fn new() -> Self {
            Self { memory: Arc::default(), traffic: Traffic::default() }
        }

        fn layer(&self, class: Class) -> Layer {
            let (gate, _) = Gate::new(&self.traffic, &Terms { class, ..Terms::LAUNCHER });
            let (tap, outlet) = tap(&Arc::new(Room::of(1)));
            Layer { gate, tap: Some(tap), outlet, turn: watch::Sender::new(false) }
        }

        /// One whose turn it is, and whose blob is stored.
        fn ready(&self, class: Class) -> Layer {
            let mut layer = self.layer(class);
            layer.tap.take().unwrap().stored(0);
            layer.turn.send_replace(true);
            layer
        }

        fn account(&self, layer: &Layer) -> Account {
            Account::new(&self.memory, &layer.gate, layer.outlet.arrival(), layer.turn.subscribe())
        }

        /// One that asks for so much.
        fn asks(&self, layer: &Layer, bytes: u64) -> JoinHandle<Result<Account>> {
            let mut account = self.account(layer);
            std::thread::spawn(move || account.memory(bytes).map(|()| account))
        }
    }

    type Standing<'a> = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit>> + 'a>>;

    /// In line for so many MiB.
    fn stands(account: &Account, mib: u32) -> Standing<'_> {
        Box::pin(account.stored(mib))
    }

    /// What it has got by now.
    fn got(standing: &mut Standing<'_>) -> Option<OwnedSemaphorePermit> {
        standing.as_mut().now_or_never().map(Result::unwrap)
    }

    /// Whether it has waited, and still does.
    async fn waits<T>(thread: &JoinHandle<T>) -> bool {
        tokio::time::sleep(Duration::from_millis(50)).await;
        !thread.is_finished()
    }

    async fn end<T: Send + 'static>(thread: JoinHandle<T>) -> T {
        tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap()
    }

    fn part(account: &Account) -> Part {
        account.has.as_ref().unwrap().1
    }

    #[tokio::test]
    async fn who_has_his_turn_and_his_bytes_gets_memory_whoever_holds_it() {
        let bench = Bench::new();
        // The first part is taken for good.
        let dripping = bench.layer(Class::Urgent);
        let held = end(bench.asks(&dripping, LARGEST)).await.unwrap();
        assert_eq!(part(&held), Part::Arriving);
        // Ahead, and with all of its bytes: not yet.
        let mut ahead = bench.layer(Class::Urgent);
        let asks_ahead = bench.asks(&ahead, LARGEST);
        ahead.tap.take().unwrap().stored(0);
        // In turn, and without its bytes.
        let mut first = bench.layer(Class::Urgent);
        let asks_first = bench.asks(&first, LARGEST);
        first.turn.send_replace(true);
        assert!(waits(&asks_ahead).await && waits(&asks_first).await);
        first.tap.take().unwrap().stored(0);
        let has_first = end(asks_first).await.unwrap();
        assert_eq!(part(&has_first), Part::Stored);
        // The next in turn gets it after it.
        ahead.turn.send_replace(true);
        assert!(waits(&asks_ahead).await);
        drop(has_first);
        assert_eq!(part(&end(asks_ahead).await.unwrap()), Part::Stored);
        // What takes little still arrives and is inflated at once.
        assert_eq!(part(&end(bench.asks(&first, 5 << 20)).await.unwrap()), Part::Arriving);
        // Pulls that may have to wait have a part of their own.
        let aside = bench.layer(Class::Normal);
        assert_eq!(part(&end(bench.asks(&aside, 13 << 20)).await.unwrap()), Part::Arriving);
        assert_eq!(bench.memory.aside.available_permits(), ARRIVING_ASIDE);
    }

    #[tokio::test]
    async fn nobody_holds_some_while_he_waits_for_more() {
        let bench = Bench::new();
        bench.memory.arriving.forget_permits(ARRIVING);
        let mut threads = Vec::new();
        for _ in 0..20 {
            let mut layer = bench.layer(Class::Urgent);
            layer.tap.take().unwrap().stored(0);
            layer.turn.send_replace(true);
            let mut account = bench.account(&layer);
            let work = move || {
                [5, 13, 133, 133, 5].iter().try_for_each(|mib| account.memory(mib << 20))?;
                drop(layer);
                Ok::<_, LayerError>(())
            };
            threads.push(std::thread::spawn(work));
        }
        for thread in threads {
            end(thread).await.unwrap();
        }
        let Memory { usual, large, .. } = &*bench.memory;
        assert_eq!((usual.available_permits(), large.available_permits()), (STORED_USUAL, STORED_LARGE));
    }

    #[tokio::test]
    async fn whose_bytes_do_not_come_or_whom_nobody_wants_is_told() {
        let bench = Bench::new();
        bench.memory.arriving.forget_permits(ARRIVING);
        let mut failed = bench.layer(Class::Urgent);
        failed.turn.send_replace(true);
        let asks = bench.asks(&failed, 1);
        drop(failed.tap.take());
        assert!(matches!(end(asks).await, Err(LayerError::Source(_))));
        for is_its_turn in [false, true] {
            let layer = bench.layer(Class::Urgent);
            layer.turn.send_replace(is_its_turn);
            let asks = bench.asks(&layer, 1);
            assert!(waits(&asks).await);
            drop(layer.turn);
            assert!(matches!(end(asks).await, Err(LayerError::Stopped)));
        }
    }

    #[tokio::test]
    async fn a_layer_stands_still_while_its_pull_gives_way_unless_it_is_waited_for() {
        let bench = Bench::new();
        let (arriving, mut stored) = (bench.layer(Class::Normal), bench.layer(Class::Normal));
        let mut has_arriving = end(bench.asks(&arriving, 5 << 20)).await.unwrap();
        stored.tap.take().unwrap().stored(0);
        stored.turn.send_replace(true);
        // More than there is for those who may have to wait.
        let mut has_stored = end(bench.asks(&stored, LARGEST)).await.unwrap();
        let launcher = bench.layer(Class::Urgent);
        let goes_on = std::thread::spawn(move || has_arriving.go_on().map(|()| has_arriving));
        assert!(waits(&goes_on).await);
        assert!(end(std::thread::spawn(move || has_stored.go_on())).await.is_ok());
        launcher.gate.end();
        let mut has_arriving = end(goes_on).await.unwrap();
        let _launcher = bench.layer(Class::Urgent);
        let goes_on = std::thread::spawn(move || has_arriving.go_on());
        assert!(waits(&goes_on).await);
        drop(arriving.turn);
        assert!(matches!(end(goes_on).await, Err(LayerError::Stopped)));
    }

    #[tokio::test]
    async fn usual_ones_and_large_ones_do_not_stand_behind_each_other() {
        let bench = Bench::new();
        let layers: Vec<_> = (0..5).map(|_| bench.ready(Class::Urgent)).collect();
        let accounts: Vec<_> = layers.iter().map(|layer| bench.account(layer)).collect();
        let has_large = got(&mut stands(&accounts[0], mib(LARGEST))).unwrap();
        let mut next_large = stands(&accounts[1], mib(LARGEST));
        assert!(got(&mut next_large).is_none());
        let usual: Vec<_> = (2..4).map(|at| got(&mut stands(&accounts[at], USUAL)).unwrap()).collect();
        let mut next_usual = stands(&accounts[4], USUAL);
        assert!(got(&mut next_usual).is_none());
        drop(has_large);
        assert!(got(&mut next_large).is_some() && got(&mut next_usual).is_none());
        drop(usual);
        assert!(got(&mut next_usual).is_some());
    }

    #[tokio::test]
    async fn who_has_to_give_way_leaves_the_line_unless_and_until_somebody_waits_for_him() {
        let bench = Bench::new();
        let take_all = || {
            let left = bench.memory.usual.available_permits();
            bench.memory.usual.clone().try_acquire_many_owned(left as u32).unwrap()
        };
        let held = take_all();
        let (job, job_beside) = (bench.ready(Class::Normal), bench.ready(Class::Normal));
        let (first, beside) = (bench.account(&job), bench.account(&job_beside));
        let (mut first, mut beside) = (stands(&first, 5), stands(&beside, 5));
        assert!(got(&mut first).is_none() && got(&mut beside).is_none());
        // It comes last, and gets it first.
        let launcher = bench.ready(Class::Urgent);
        let account = bench.account(&launcher);
        let mut last = stands(&account, USUAL);
        assert!(got(&mut first).is_none() && got(&mut beside).is_none() && got(&mut last).is_none());
        drop(held);
        assert!(got(&mut first).is_none() && got(&mut beside).is_none());
        let has_last = got(&mut last).unwrap();
        let rest = take_all();
        // It waits for what one of them is at.
        let loan = ClaimId::new();
        job.gate.lend(loan, &launcher.gate);
        assert!(got(&mut first).is_none() && got(&mut beside).is_none());
        drop((has_last, rest));
        assert!(got(&mut beside).is_none());
        assert!(got(&mut first).is_some());
        job.gate.leave(loan);
        // It does not any more, before it has come to anything.
        let held = take_all();
        job_beside.gate.lend(loan, &launcher.gate);
        assert!(got(&mut beside).is_none());
        job_beside.gate.leave(loan);
        assert!(got(&mut beside).is_none());
        drop(held);
        assert!(got(&mut beside).is_none());
        launcher.gate.end();
        assert!(got(&mut beside).is_some());
    }

    #[tokio::test]
    async fn whom_a_class_is_only_lent_takes_no_part_of_launchers() {
        let bench = Bench::new();
        let (job, launcher) = (bench.layer(Class::Background), bench.layer(Class::Urgent));
        let left = || (bench.memory.arriving.available_permits(), bench.memory.aside.available_permits());
        job.gate.lend(ClaimId::new(), &launcher.gate);
        let mut lent = bench.account(&job);
        lent.memory(5 << 20).unwrap();
        assert_eq!(left(), (ARRIVING, ARRIVING_ASIDE - 5));
        // A launcher that joins it stays.
        assert!(job.gate.join(&Terms::LAUNCHER).is_some());
        let mut joined = bench.account(&job);
        joined.memory(5 << 20).unwrap();
        assert_eq!(left(), (ARRIVING - 5, ARRIVING_ASIDE - 5));
    }

    #[tokio::test]
    async fn what_is_still_to_be_read_has_its_memory() {
        let bench = Bench::new();
        let left = || bench.memory.arriving.available_permits();
        let layer = bench.layer(Class::Urgent);
        let mut account = bench.account(&layer);
        account.memory(LARGEST).unwrap();
        assert_eq!(left(), ARRIVING - mib(LARGEST) as usize);
        account.keep(LEAST_MEMORY);
        assert_eq!(left(), ARRIVING - 5);
        account.keep(LARGEST);
        assert_eq!(left(), ARRIVING - 5, "it keeps what it has");
        // While it waits for more, and when that has come to nothing.
        bench.memory.arriving.forget_permits(ARRIVING - 5);
        drop(layer.turn);
        let asks = std::thread::spawn(move || (account.memory(LARGEST), account));
        let (got, account) = end(asks).await;
        assert!(matches!(got, Err(LayerError::Stopped)));
        assert_eq!((part(&account), left()), (Part::Arriving, 0));
        drop(account);
        assert_eq!(left(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_line_is_told_from_other_time() {
        let bench = Bench::new();
        let pass = async |seconds| tokio::time::advance(Duration::from_secs(seconds)).await;
        let held = bench.memory.usual.clone().try_acquire_many_owned(STORED_USUAL as u32).unwrap();
        let mut layer = bench.layer(Class::Urgent);
        let account = bench.account(&layer);
        let mut standing = stands(&account, 5);
        // Before its turn, and before its blob is stored, it is not in line.
        assert!(got(&mut standing).is_none());
        pass(1).await;
        layer.turn.send_replace(true);
        assert!(got(&mut standing).is_none());
        pass(2).await;
        layer.tap.take().unwrap().stored(0);
        assert!(got(&mut standing).is_none());
        pass(4).await;
        drop(held);
        let has = got(&mut standing).unwrap();
        pass(8).await;
        assert_eq!(account.in_line().total(), Duration::from_secs(4));
        drop(has);
    }
}
