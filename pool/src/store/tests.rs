#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    sync::{
        Mutex,
        mpsc::{Receiver, Sender, channel},
    },
};

use futures_util::FutureExt as _;

use super::*;

/// Names of cows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Herd(BTreeSet<String>);

#[derive(Clone)]
enum Change {
    Buy(String),
    Sell(String),
    /// Changes nothing, and keeps the disk busy until it is told to go on.
    Wait(Arc<Mutex<(Sender<()>, Receiver<()>)>>),
    /// Is more than the disk can take.
    BuyTooMany,
}
use Change::{Buy, BuyTooMany, Sell, Wait};

impl Stored for Herd {
    type Change = Change;

    fn apply(&mut self, change: Change) -> Change {
        match change {
            Buy(cow) if self.0.insert(cow.clone()) => Sell(cow),
            Sell(cow) if self.0.remove(&cow) => Buy(cow),
            other => other,
        }
    }

    fn write(connection: &Connection, change: &Change) -> rusqlite::Result<()> {
        match change {
            Buy(cow) => connection.execute("INSERT INTO cows VALUES (?)", [cow]).map(drop),
            Sell(cow) => connection.execute("DELETE FROM cows WHERE name = ?", [cow]).map(drop),
            Wait(gate) => {
                let gate = gate.lock().unwrap();
                gate.0.send(()).unwrap();
                gate.1.recv().unwrap();
                Ok(())
            }
            BuyTooMany => connection.execute("INSERT INTO cows VALUES (zeroblob(1 << 20))", []).map(drop),
        }
    }
}

fn herd() -> Store<Herd> {
    let connection = Connection::open_in_memory().unwrap();
    connection.execute_batch("CREATE TABLE cows (name); PRAGMA max_page_count = 20").unwrap();
    Store::start(connection, Herd::default(), PathBuf::from("herd.db")).unwrap()
}

async fn write(store: &Store<Herd>, change: Change) -> Result<(), WriteError> {
    let decide = |batch: &mut Batch<'_, Herd>| {
        batch.change(change);
        Ok(())
    };
    store.write(decide).await
}

/// Writes behind; the answer comes when it is written.
fn behind(store: &Store<Herd>, change: Change) -> oneshot::Receiver<Result<(), WriteError>> {
    let (told, written) = oneshot::channel();
    let decide = |batch: &mut Batch<'_, Herd>| {
        batch.change(change);
        Ok::<_, WriteError>(())
    };
    store.write_behind(decide, |(), outcome| told.send(outcome).unwrap()).unwrap();
    written
}

fn cows(store: &Store<Herd>) -> Vec<String> {
    store.read(|herd| herd.0.iter().cloned().collect())
}

/// A write that is being committed until the sender is told so.
async fn busy(store: &Store<Herd>) -> (tokio::task::JoinHandle<Result<(), WriteError>>, Sender<()>) {
    let ((begun, has_begun), (go_on, may_go_on)) = (channel(), channel());
    let writer = store.clone();
    let writing = tokio::spawn(async move {
        let gate = Wait(Arc::new(Mutex::new((begun, may_go_on))));
        let decide = |batch: &mut Batch<'_, Herd>| {
            batch.change(gate);
            batch.change(Buy("Alma".into()));
            Ok(())
        };
        writer.write(decide).await
    });
    tokio::task::spawn_blocking(move || has_begun.recv().unwrap()).await.unwrap();
    (writing, go_on)
}

#[tokio::test]
async fn what_is_written_behind_shows_at_once_and_stays_above_what_was_before() {
    let store = herd();
    let (first, go_on) = busy(&store).await;
    // Alma is decided, and not durable; she is sold before anybody has seen her.
    let mut sold = behind(&store, Sell("Alma".into()));
    let bertha = behind(&store, Buy("Bertha".into()));
    assert_eq!(cows(&store), ["Bertha"]);
    assert!(sold.try_recv().is_err(), "told before the disk was");
    go_on.send(()).unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(cows(&store), ["Bertha"]);
    assert_eq!((sold.await.unwrap(), bertha.await.unwrap()), (Ok(()), Ok(())));
    assert_eq!(cows(&store), ["Bertha"]);
}

fn here(store: &Store<Herd>, change: Change) -> impl Future<Output = Result<(), WriteError>> + use<> {
    store.write_here(|batch: &mut Batch<'_, Herd>| {
        batch.change(change);
        Ok(())
    })
}

#[tokio::test]
async fn who_may_wait_for_the_disk_writes_by_itself() {
    let store = herd();
    let bertha = here(&store, Buy("Bertha".into()));
    assert_eq!(cows(&store), ["Bertha"], "nobody else had to have a turn");
    assert_eq!(bertha.now_or_never(), Some(Ok(())));
    // What is queued up before goes before.
    let sold = behind(&store, Sell("Bertha".into()));
    assert_eq!(here(&store, Buy("Bertha".into())).now_or_never(), Some(Ok(())));
    assert_eq!(sold.now_or_never(), Some(Ok(Ok(()))));
    assert_eq!(cows(&store), ["Bertha"]);
}

#[tokio::test]
async fn who_finds_somebody_writing_waits_for_nothing_and_is_written_next() {
    let store = herd();
    let (first, go_on) = busy(&store).await;
    let mut bertha = std::pin::pin!(here(&store, Buy("Bertha".into())));
    assert_eq!(bertha.as_mut().now_or_never(), None);
    go_on.send(()).unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(bertha.await, Ok(()));
    assert_eq!(cows(&store), ["Alma", "Bertha"]);
    store.close().await;
    assert_eq!(here(&store, Buy("Cora".into())).await, Err(WriteError::Stopping));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn all_who_write_at_once_are_answered_and_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("herd.db");
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch("CREATE TABLE cows (name)").unwrap();
    let store = Store::start(connection, Herd::default(), path.clone()).unwrap();
    let writes = (0..200).map(|n| {
        let store = store.clone();
        tokio::spawn(async move {
            let cow = Buy(format!("cow {n:03}"));
            match n % 3 {
                0 => here(&store, cow).await,
                1 => write(&store, cow).await,
                _ => behind(&store, cow).await.unwrap(),
            }
        })
    });
    for write in writes.collect::<Vec<_>>() {
        assert_eq!(write.await.unwrap(), Ok(()));
    }
    assert_eq!(cows(&store).len(), 200);
    let count = Connection::open(&path).unwrap().query_row("SELECT count(*) FROM cows", [], |row| row.get(0));
    assert_eq!(count, Ok(200));
}

#[tokio::test]
async fn others_show_when_they_are_durable() {
    let store = herd();
    let (first, go_on) = busy(&store).await;
    assert_eq!(cows(&store), [""; 0]);
    let again = store.clone();
    // It decides on what the first one has decided, and waits for it although it changes nothing.
    let seen = tokio::spawn(async move {
        again.write(|batch| Ok::<_, WriteError>(batch.state().0.contains("Alma"))).await
    });
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    assert!(!seen.is_finished());
    go_on.send(()).unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(seen.await.unwrap(), Ok(true));
    assert_eq!(cows(&store), ["Alma"]);
}

#[tokio::test]
async fn a_commit_that_fails_takes_back_all_that_came_after() {
    let store = herd();
    write(&store, Buy("Clara".into())).await.unwrap();
    let (first, go_on) = busy(&store).await;
    let asked = store.clone();
    let second = tokio::spawn(async move { write(&asked, BuyTooMany).await });
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    let third = behind(&store, Sell("Clara".into()));
    assert_eq!(cows(&store), [""; 0]);
    go_on.send(()).unwrap();
    first.await.unwrap().unwrap();
    let full = Err(WriteError::Full("herd.db".into()));
    assert_eq!((second.await.unwrap(), third.await.unwrap()), (full.clone(), full));
    assert_eq!(cows(&store), ["Alma", "Clara"]);
    // And it goes on.
    write(&store, Sell("Alma".into())).await.unwrap();
    assert_eq!(cows(&store), ["Clara"]);
}

#[tokio::test]
async fn closed_it_has_written_all_and_takes_no_more() {
    let store = herd();
    let (first, go_on) = busy(&store).await;
    let sold = behind(&store, Sell("Alma".into()));
    let closing = store.clone();
    let closed = tokio::spawn(async move { closing.close().await });
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    assert_eq!(write(&store, Buy("Dora".into())).await, Err(WriteError::Stopping));
    assert!(!closed.is_finished());
    go_on.send(()).unwrap();
    closed.await.unwrap();
    assert_eq!((first.await.unwrap(), sold.await.unwrap()), (Ok(()), Ok(())));
    // Once more does no harm.
    store.close().await;
}

#[tokio::test]
async fn after_a_panic_nobody_waits_for_ever() {
    let store = herd();
    let (first, go_on) = busy(&store).await;
    let asked = store.clone();
    let queued = tokio::spawn(async move { write(&asked, Buy("Bertha".into())).await });
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    let asked = store.clone();
    let panics = tokio::spawn(async move {
        asked.write::<(), WriteError>(|_| panic!("a decision that panics, as the test wants it")).await
    });
    assert!(panics.await.unwrap_err().is_panic());
    go_on.send(()).unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(queued.await.unwrap(), Err(WriteError::Stopping));
    assert_eq!(write(&store, Buy("Clara".into())).await, Err(WriteError::Stopping));
    store.close().await;
}

/// containerd's collection ends at the first error of a removal.
#[tokio::test]
async fn what_is_written_behind_is_never_refused_for_the_crowd() {
    let store = herd();
    let (first, go_on) = busy(&store).await;
    let written: Vec<_> = (0..QUEUE).map(|_| behind(&store, Sell("Alma".into()))).collect();
    assert_eq!(write(&store, Buy("Clara".into())).await, Err(WriteError::Busy));
    let last = behind(&store, Buy("Bertha".into()));
    // What changes nothing does not even wait.
    let (told, nothing) = oneshot::channel();
    store.write_behind(|_| Ok::<_, WriteError>(()), |(), outcome| told.send(outcome).unwrap()).unwrap();
    assert_eq!(nothing.await.unwrap(), Ok(()));
    go_on.send(()).unwrap();
    first.await.unwrap().unwrap();
    for one in written.into_iter().chain([last]) {
        assert_eq!(one.await.unwrap(), Ok(()));
    }
    assert_eq!(cows(&store), ["Bertha"]);
}
