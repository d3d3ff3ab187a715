//! The bytes of a layer, from whoever fetches it to whoever inflates it, while they arrive.
//!
//! ```text
//!  registry ─► fetch ─► containerd's content store ───────┐ from where the tap was left, once the blob is whole
//!                └─► tap: so many bytes, or it is left ───┴─► flow ─► inflate
//! ```
//!
//! Fetching never waits for unpacking: what has no room is read from the store later. What flows is not verified yet; whoever
//! applies it commits nothing before the blob is in the store, and so has its digest.

use std::{
    collections::VecDeque,
    io::{self, Read},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{runtime::Handle, sync::watch};

use crate::containerd::{Containerd, ContentReader};

/// Bytes that wait in one tap at the most.
const SHARE: u64 = 6 << 20;

/// The room for bytes in flight.
#[derive(Debug)]
pub(super) struct Room {
    bytes: u64,
    taken: AtomicU64,
}

impl Room {
    /// For so many.
    pub(super) fn of(bytes: u64) -> Self {
        Self { bytes, taken: AtomicU64::new(0) }
    }

    fn take(&self, bytes: u64) -> bool {
        let taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            (taken + bytes <= self.bytes).then_some(taken + bytes)
        });
        taken.is_ok()
    }

    fn give(&self, bytes: u64) {
        self.taken.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What has become of the fetching of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fetching {
    UnderWay,
    Stored,
    Failed,
}

#[derive(Debug)]
struct State {
    waiting: VecDeque<Vec<u8>>,
    waiting_bytes: u64,
    /// Offset of what is to be poured next.
    next: u64,
    /// Whether what is poured is still passed on.
    is_open: bool,
    /// Whether something that was poured was wrong.
    is_spoiled: bool,
    /// Whether there is a flow that reads what is poured.
    has_flow: bool,
}

#[derive(Debug)]
struct Pipe {
    state: Mutex<State>,
    changed: Condvar,
    fetching: watch::Sender<Fetching>,
    room: Arc<Room>,
}

impl Pipe {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shut(&self, state: &mut State) {
        state.is_open = false;
        self.changed.notify_all();
    }

    fn empty(&self, state: &mut State) {
        state.waiting.clear();
        self.room.give(std::mem::take(&mut state.waiting_bytes));
    }

    fn tell(&self, fetching: Fetching) {
        let state = self.state();
        self.fetching.send_replace(fetching);
        self.changed.notify_all();
        drop(state);
    }

    /// Waits until the blob is in the store. False: it will not be.
    async fn stored(&self) -> bool {
        let mut fetching = self.fetching.subscribe();
        let over = fetching.wait_for(|fetching| *fetching != Fetching::UnderWay).await;
        over.is_ok_and(|fetching| *fetching == Fetching::Stored)
    }
}

/// The end of whoever fetches. If it goes before the blob is stored, the fetching has failed.
#[derive(Debug)]
pub(super) struct Tap(Arc<Pipe>);

/// The end of whoever unpacks.
#[derive(Debug)]
pub(super) struct Outlet(Arc<Pipe>);

pub(super) fn tap(room: &Arc<Room>) -> (Tap, Outlet) {
    let state = State {
        waiting: VecDeque::new(),
        waiting_bytes: 0,
        next: 0,
        is_open: true,
        is_spoiled: false,
        has_flow: false,
    };
    let pipe = Arc::new(Pipe {
        state: Mutex::new(state),
        changed: Condvar::new(),
        fetching: watch::Sender::new(Fetching::UnderWay),
        room: room.clone(),
    });
    (Tap(pipe.clone()), Outlet(pipe))
}

impl Tap {
    /// Passes on what was written at `offset`, if it is what comes next and there is room.
    pub(super) fn pour(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.0.state();
        if !state.is_open {
            return;
        }
        let length = bytes.len() as u64;
        let has_room = state.waiting_bytes + length <= SHARE;
        if offset != state.next || !has_room || !self.0.room.take(length) {
            return self.0.shut(&mut state);
        }
        state.next += length;
        state.waiting_bytes += length;
        state.waiting.push_back(bytes.to_vec());
        self.0.changed.notify_all();
    }

    /// What was poured is not what was asked for.
    pub(super) fn spoil(&self) {
        let mut state = self.0.state();
        if state.next > 0 {
            state.is_spoiled = true;
        }
        self.0.empty(&mut state);
        self.0.shut(&mut state);
    }

    /// The blob is in the store, whole, of this size, and verified.
    pub(super) fn stored(self, size: u64) {
        let mut state = self.0.state();
        if state.next != size {
            self.0.shut(&mut state);
        }
        drop(state);
        self.0.tell(Fetching::Stored);
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if *self.0.fetching.borrow() == Fetching::UnderWay {
            self.0.tell(Fetching::Failed);
        }
    }
}

/// Tells when the blob is there.
#[derive(Clone, Debug)]
pub(super) struct Arrival(Arc<Pipe>);

impl Arrival {
    /// Waits until the blob is in the store. False: it will not be.
    pub(super) async fn stored(&self) -> bool {
        self.0.stored().await
    }
}

impl Outlet {
    /// Waits until the blob is in the store. False: it will not be.
    pub(super) async fn stored(&self) -> bool {
        self.0.stored().await
    }

    pub(super) fn arrival(&self) -> Arrival {
        Arrival(self.0.clone())
    }

    /// Whether what has flowed was wrong, so that it has to be read again: said once.
    pub(super) fn take_spoiled(&self) -> bool {
        let mut state = self.0.state();
        std::mem::take(&mut state.is_spoiled)
    }

    /// The bytes from the beginning; the first flow has what is poured, later ones read the store.
    pub(super) fn flow(&self, containerd: &Containerd, digest: &str) -> Flow {
        let mut state = self.0.state();
        let from_tap = !state.has_flow && !state.is_spoiled;
        state.has_flow = true;
        drop(state);
        Flow {
            pipe: self.0.clone(),
            from_tap,
            at: 0,
            piece: Vec::new(),
            used: 0,
            containerd: containerd.clone(),
            digest: digest.to_owned(),
            store: None,
            handle: Handle::current(),
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        let mut state = self.0.state();
        self.0.empty(&mut state);
        self.0.shut(&mut state);
    }
}

/// A layer's compressed bytes, to be read on a thread that may wait.
pub(super) struct Flow {
    pipe: Arc<Pipe>,
    from_tap: bool,
    /// Offset of what is read next.
    at: u64,
    piece: Vec<u8>,
    used: usize,
    containerd: Containerd,
    digest: String,
    store: Option<ContentReader>,
    handle: Handle,
}

impl Flow {
    /// The next piece; empty at the end.
    fn next(&mut self) -> io::Result<Vec<u8>> {
        if self.from_tap {
            let mut state = self.pipe.state();
            loop {
                if state.is_spoiled {
                    return Err(io::Error::other("what has arrived of it was wrong"));
                }
                if let Some(piece) = state.waiting.pop_front() {
                    state.waiting_bytes -= piece.len() as u64;
                    self.pipe.room.give(piece.len() as u64);
                    return Ok(piece);
                }
                let fetching = *self.pipe.fetching.borrow();
                match (state.is_open, fetching) {
                    (_, Fetching::Failed) => return Err(io::Error::other("it was not fetched")),
                    (true, Fetching::Stored) => return Ok(Vec::new()),
                    (false, Fetching::Stored) => break,
                    _ => state = self.pipe.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            }
            self.from_tap = false;
        }
        let handle = self.handle.clone();
        handle.block_on(async {
            if self.store.is_none() {
                if !self.pipe.stored().await {
                    return Err(io::Error::other("it was not fetched"));
                }
                let opened = self.containerd.open_blob(&self.digest, self.at).await;
                self.store = Some(opened.map_err(|error| io::Error::other(error.to_string()))?);
            }
            match &mut self.store {
                Some(store) => store.next().await.map_err(|error| io::Error::other(error.to_string())),
                None => Ok(Vec::new()),
            }
        })
    }
}

impl Read for Flow {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.used == self.piece.len() {
            (self.piece, self.used) = (self.next()?, 0);
            self.at += self.piece.len() as u64;
        }
        let length = into.len().min(self.piece.len() - self.used);
        into[..length].copy_from_slice(&self.piece[self.used..self.used + length]);
        self.used += length;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn flow(outlet: &Outlet) -> Flow {
        let nowhere = "/nowhere/containerd.sock".into();
        let second = std::time::Duration::from_secs(1);
        outlet.flow(&Containerd::new(nowhere, "n".to_owned(), "s".to_owned(), second), "sha256:0")
    }

    async fn read(mut flow: Flow) -> io::Result<Vec<u8>> {
        let read = move || {
            let mut bytes = Vec::new();
            flow.read_to_end(&mut bytes).map(|_| bytes)
        };
        tokio::task::spawn_blocking(read).await.unwrap()
    }

    #[tokio::test]
    async fn what_is_poured_flows() {
        let room = Arc::new(Room::of(24 << 20));
        let (tap, outlet) = tap(&room);
        let reading = tokio::spawn(read(flow(&outlet)));
        tap.pour(0, b"ab");
        tap.pour(2, b"c");
        tap.stored(3);
        assert!(outlet.stored().await);
        assert_eq!(reading.await.unwrap().unwrap(), b"abc");
        assert_eq!(room.taken.load(Ordering::Relaxed), 0, "all room is given back");
    }

    #[tokio::test]
    async fn what_has_no_room_or_does_not_follow_is_read_from_the_store() {
        let room = Arc::new(Room::of(24 << 20));
        for (offset, length) in [(1, 1), (0, SHARE + 1)] {
            let (tap, outlet) = tap(&room);
            tap.pour(offset, &vec![0; length as usize]);
            tap.stored(length);
            let error = read(flow(&outlet)).await.unwrap_err().to_string();
            // There is no store here.
            assert!(error.contains("Content.Read"), "{error}");
        }
        assert_eq!(room.taken.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_failure_ends_the_flow_and_what_is_left_gives_its_room_back() {
        let room = Arc::new(Room::of(24 << 20));
        let (pouring, outlet) = tap(&room);
        pouring.pour(0, b"ab");
        let reading = tokio::spawn(read(flow(&outlet)));
        drop(pouring);
        assert!(!outlet.stored().await);
        assert!(reading.await.unwrap().is_err());
        let (pouring, outlet) = tap(&room);
        pouring.pour(0, b"ab");
        drop(outlet);
        pouring.pour(2, b"cd");
        assert_eq!(room.taken.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_was_wrong_is_read_again() {
        let room = Arc::new(Room::of(24 << 20));
        let (tap, outlet) = tap(&room);
        let reading = tokio::spawn(read(flow(&outlet)));
        tap.pour(0, b"wrong");
        tap.spoil();
        assert!(reading.await.unwrap().is_err());
        assert!(outlet.take_spoiled());
        assert!(!outlet.take_spoiled());
        tap.pour(0, b"right");
        tap.stored(5);
        let again = flow(&outlet);
        assert!(!again.from_tap);
        assert_eq!(room.taken.load(Ordering::Relaxed), 0);
    }
}
