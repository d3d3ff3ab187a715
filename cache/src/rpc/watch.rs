//! `Watch`: every change of a lease and of an image, so that others can mirror them.
//!
//! Leases are told by their last change: who reads slowly, or comes back after a while, skips what was in between. What
//! is told is durable, so a revision that somebody was told is never given to another change.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use cowshed_leases::{Book, Revision};
use cowshed_proto::v1::{self, watch_response::Event};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::convert;
use crate::{
    clock::Clock,
    containerd::Containerd,
    error::{Error, Reason},
    image::{ImageInfo, Images, Platform},
    keeping,
    ledger::Ledger,
};

pub(super) type Stream = ReceiverStream<Result<v1::WatchResponse, Status>>;
type Sender = mpsc::Sender<Result<v1::WatchResponse, Status>>;

/// Messages that a slow reader may leave lying.
const BUFFER: usize = 64;
/// Changes that are taken from the book at a time.
const AT_ONCE: usize = 256;
/// containerd is asked for its images again after this pause if it did not answer,
const RETRY: Duration = Duration::from_secs(2);
/// and after this one if it has told of no change: it may have told nobody.
const LOOK: Duration = Duration::from_secs(30);

/// What is watched.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) ledger: Ledger,
    pub(super) images: Images,
    pub(super) containerd: Containerd,
    pub(super) clock: Clock,
    pub(super) stopped: watch::Receiver<bool>,
}

/// The stream of what changes after `after`; `None`: all that there is, first.
pub(super) fn stream(source: Source, after: Option<Revision>) -> Stream {
    let (sender, receiver) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        let mut stopped = source.stopped.clone();
        // Up to which leases have been told: what is told of images must not say more.
        let told = AtomicU64::new(after.unwrap_or_default().0);
        let end = tokio::select! {
            end = leases(&source.ledger, &source.clock, after, &told, &sender) => end,
            () = images(&source, &told, &sender) => None,
            () = sender.closed() => None,
            () = super::until_stopped(&mut stopped) => Some(super::stopping()),
        };
        if let Some(error) = end {
            // It may have gone as well.
            let _told = sender.send(Err(error.into())).await;
        }
    });
    ReceiverStream::new(receiver)
}

/// What has changed after a revision, the earliest first, and whether that is all.
struct News {
    events: Vec<(Revision, Event)>,
    complete: bool,
    /// The greatest revision that there was then.
    settled: Revision,
}

/// Returns why it ends; `None` if nobody listens any more.
async fn leases(
    ledger: &Ledger,
    clock: &Clock,
    after: Option<Revision>,
    so_far: &AtomicU64,
    sender: &Sender,
) -> Option<Error> {
    let mut changes = ledger.changes();
    // What goes after `begun` has, or may have, been told of before.
    let (mut told, mut synced, mut begun) = (after.unwrap_or_default(), false, after);
    loop {
        changes.borrow_and_update();
        let settled = loop {
            let news = ledger.read(|book| news(book, told, begun, clock));
            let Some(news) = news else { return Some(compacted(told)) };
            begun.get_or_insert(news.settled);
            for (revision, event) in news.events {
                told = revision;
                send(sender, event, revision).await?;
                so_far.store(told.0, Ordering::SeqCst);
            }
            if news.complete {
                break news.settled;
            }
        };
        if !synced {
            synced = true;
            told = told.max(settled);
            so_far.store(told.0, Ordering::SeqCst);
            send(sender, Event::Synced(v1::Synced { leases: true, images: false }), told).await?;
        }
        if changes.changed().await.is_err() {
            return Some(super::stopping());
        }
    }
}

/// `None` if what has gone since is not known any more to one who has a mirror.
fn news(book: &Book, after: Revision, begun: Option<Revision>, clock: &Clock) -> Option<News> {
    let mirrored = begun.map(|begun| begun.max(after));
    if mirrored.is_some_and(|mirrored| !book.remembers(mirrored)) {
        return None;
    }
    let now = clock.now();
    let mut events: Vec<(Revision, Event)> = book
        .changed_after(after)
        .filter(|lease| lease.vm.is_vm())
        .take(AT_ONCE)
        .map(|lease| (lease.revision, Event::Lease(convert::lease(lease, None, &now))))
        .collect();
    let complete_changes = events.len() < AT_ONCE;
    if let Some(mirrored) = mirrored {
        let gone = book.gone_after(mirrored).filter(|gone| gone.vm.is_vm()).take(AT_ONCE).map(|gone| {
            let event = v1::LeaseGone {
                lease_id: gone.id.to_string(),
                vm_id: gone.vm.to_string(),
                generation: gone.generation.0,
            };
            (gone.revision, Event::LeaseGone(event))
        });
        events.extend(gone);
    }
    events.sort_by_key(|(revision, _)| *revision);
    let complete = complete_changes && events.len() < AT_ONCE;
    events.truncate(AT_ONCE);
    Some(News { events, complete, settled: book.settled() })
}

/// Tells of images until nobody listens.
async fn images(source: &Source, so_far: &AtomicU64, sender: &Sender) {
    let events = source.containerd.image_events();
    let mut told: BTreeMap<String, ImageInfo> = BTreeMap::new();
    let mut synced = false;
    loop {
        let mut pause = RETRY;
        if let Ok(now) = source.images.list(&Platform::host()).await {
            pause = LOOK;
            if tell(source, &mut told, now, sender, so_far).await.is_none() {
                return;
            }
            if !synced {
                synced = true;
                let event = Event::Synced(v1::Synced { leases: false, images: true });
                if send(sender, event, Revision(so_far.load(Ordering::SeqCst))).await.is_none() {
                    return;
                }
            }
        }
        tokio::select! {
            () = events.next() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn tell(
    source: &Source,
    told: &mut BTreeMap<String, ImageInfo>,
    now: Vec<ImageInfo>,
    sender: &Sender,
    so_far: &AtomicU64,
) -> Option<()> {
    let revision = Revision(so_far.load(Ordering::SeqCst));
    let now: BTreeMap<String, ImageInfo> = now.into_iter().map(|image| (image.name.clone(), image)).collect();
    for name in told.keys().filter(|name| !now.contains_key(*name)) {
        send(sender, Event::ImageGone(name.clone()), revision).await?;
    }
    let changed = now.iter().filter(|(name, image)| told.get(*name) != Some(*image));
    let changed: Vec<ImageInfo> = changed.map(|(_, image)| image.clone()).collect();
    for image in keeping::kept(&source.ledger, changed, &source.clock.now()) {
        tracing::trace!(name = image.0.name, "an image has changed");
        send(sender, Event::Image(convert::image(image)), revision).await?;
    }
    *told = now;
    Some(())
}

async fn send(sender: &Sender, event: Event, revision: Revision) -> Option<()> {
    sender.send(Ok(v1::WatchResponse { event: Some(event), revision: revision.0 })).await.ok()
}

fn compacted(revision: Revision) -> Error {
    let message = format!(
        "what has gone since revision {} is not known any more, or it is none of this ledger's: watch without \
         after_revision (--after), which begins with all that there is",
        revision.0
    );
    Error::new(Reason::RevisionCompacted, message).with("field", "after_revision")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::fakes::book::{acquire, back, id, now};

    async fn forget(ledger: &Ledger, n: u32) {
        ledger.release(back(n), now()).await.unwrap();
        ledger.remove_all(vec![id(n)], now()).await.unwrap();
    }

    /// A watch whose reader takes one message after the other, and what it was told by then.
    struct Reader {
        events: mpsc::Receiver<Result<v1::WatchResponse, Status>>,
        mirror: BTreeMap<String, Revision>,
        revision: u64,
        _directory: tempfile::TempDir,
    }

    impl Reader {
        /// The next message; what it says is in the mirror.
        async fn next(&mut self) -> Event {
            let patience = Duration::from_secs(30);
            let received = tokio::time::timeout(patience, self.events.recv()).await;
            let message = received.expect("what is waited for is never told").unwrap().unwrap();
            assert!(message.revision >= self.revision, "{} after {}", message.revision, self.revision);
            self.revision = message.revision;
            let event = message.event.unwrap();
            match &event {
                Event::Lease(lease) => {
                    self.mirror.insert(lease.vm_id.clone(), Revision(message.revision));
                }
                Event::LeaseGone(gone) => drop(self.mirror.remove(&gone.vm_id)),
                _ => {}
            }
            event
        }

        /// Until the mirror has as many leases as the ledger, and these VMs' as well.
        async fn catch_up(&mut self, ledger: &Ledger, vms: &[u32]) {
            let count = ledger.read(|book| book.after(None).count());
            while self.mirror.len() != count
                || !vms.iter().all(|n| self.mirror.contains_key(&format!("vm-{n}")))
            {
                self.next().await;
            }
        }
    }

    async fn watched(leases_there: u32) -> (Ledger, Reader) {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(directory.path()).unwrap();
        for n in 0..leases_there {
            acquire(&ledger, n).await;
        }
        // A single place: the watch is held up by its reader.
        let (sender, events) = mpsc::channel(1);
        let watching = ledger.clone();
        tokio::spawn(async move {
            let end = leases(&watching, &Clock::of(now), None, &AtomicU64::new(0), &sender).await;
            assert!(end.is_none(), "{end:?}");
        });
        (ledger, Reader { events, mirror: BTreeMap::new(), revision: 0, _directory: directory })
    }

    #[tokio::test]
    async fn what_changes_while_a_slow_reader_is_told_is_told_after_it() {
        let (ledger, mut reader) = watched(2).await;
        // The watch has read both, and waits with the second.
        reader.next().await;
        acquire(&ledger, 2).await;
        reader.catch_up(&ledger, &[0, 1, 2]).await;
    }

    #[tokio::test]
    async fn what_goes_while_all_that_there_is_is_told_goes_from_the_mirror() {
        let count = u32::try_from(AT_ONCE).unwrap() + 40;
        let (ledger, mut reader) = watched(count).await;
        for _ in 0..10 {
            reader.next().await;
        }
        assert!(reader.mirror.contains_key("vm-3"));
        forget(&ledger, 3).await;
        while !matches!(reader.next().await, Event::Synced(_)) {}
        acquire(&ledger, count).await;
        reader.catch_up(&ledger, &[count]).await;
        assert!(!reader.mirror.contains_key("vm-3"), "it has gone, and nobody said so");
    }
}
