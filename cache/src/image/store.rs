//! Gets documents and blobs into containerd's content store, each once, held by the pull's lease.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;

use super::{
    Access, Cache, Digest, ImageRef, Shared,
    access::Owners,
    brake::Brake,
    gate::{Class, Gate},
    labels::{self, Labels},
    locks::Turn,
    manifest::Descriptor,
    pull::Asker,
    tap::{Room, Tap},
};
use crate::{
    containerd::{CallError, ContentWriter},
    error::{Error, Reason, Result},
    registry::{Kind, Source},
};

/// Bytes per message to containerd.
const PIECE: usize = 1 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// So long a registry is kept waiting while others come first; then the connection is given up, and made anew later.
const STANDSTILL: Duration = Duration::from_secs(5);

/// A pull's access to the content store.
pub(super) struct Store<'a> {
    pub(super) shared: &'a Shared,
    /// containerd lease that holds everything.
    pub(super) lease: &'a str,
    pub(super) image: &'a ImageRef,
    pub(super) source: &'a Source,
    pub(super) access: &'a Access,
    /// Whose the snapshots are that this pull has made, by chain id.
    pub(super) unpacked: Owners,
    /// Layers that were applied, and what they are when they are inflated.
    pub(super) applied: Mutex<Vec<(Digest, Digest)>>,
    /// Pulled when the pull has failed elsewhere.
    pub(super) brake: Brake,
    /// Where it gives way to others.
    pub(super) gate: &'a Arc<Gate>,
}

/// A blob to fetch.
struct Errand<'a> {
    blob: &'a Descriptor,
    labels: Labels,
    /// The name under which it is written.
    reference: String,
    /// Who gets the bytes while they arrive.
    tap: Option<&'a Tap>,
    /// Whether a registry has sent it to its end, or shown that it hands it out.
    is_shown: AtomicBool,
}

impl Errand<'_> {
    /// Whether that which is written is all of it, and nobody has shown that it may be had: it may be of another namespace of
    /// containerd's, for example.
    fn wants_proof(&self, written: u64) -> bool {
        self.blob.size > 0 && written == self.blob.size && !self.is_shown.load(Ordering::Relaxed)
    }

    fn note_shown(&self, is_shown: bool) {
        self.is_shown.store(is_shown, Ordering::Relaxed);
    }

    /// What was poured is nobody's word for what is there.
    fn spoil(&self) {
        self.tap.inspect(|tap| tap.spoil());
    }
}

impl Store<'_> {
    pub(super) fn asker(&self) -> Asker<'_> {
        let Self { shared, image, source, access, .. } = *self;
        Asker { shared, image, source, access }
    }

    /// Writes a document, or finds it; labels it either way.
    pub(super) async fn put(&self, digest: &Digest, bytes: &[u8], labels: Labels) -> Result<Cache> {
        let turn = self.turn(digest).await;
        if self.is_held(digest).await? {
            self.label(digest, labels).await?;
            return Ok(Cache::Hit);
        }
        let size = bytes.len() as u64;
        let reference = self.reference(digest, &turn);
        let written = async {
            let mut writer = self.writer(&reference, digest, size).await?;
            writer.restart();
            let (pieces, rest) = bytes.split_at(bytes.len().saturating_sub(PIECE));
            for piece in pieces.chunks(PIECE) {
                writer.write(piece.to_vec()).await?;
            }
            self.commit(writer, rest.to_vec(), digest, labels.clone()).await
        };
        match written.await {
            Ok(()) => Ok(Cache::Miss),
            Err(error) if error.is_already_exists() => {
                self.adopt(digest, labels).await?;
                Ok(Cache::Hit)
            }
            Err(error) => Err(self.abort(&reference, self.explain(error)).await),
        }
    }

    /// Fetches a blob, or finds it; calls `progress`, if it is to be fetched, with the bytes that are there, and gives those that
    /// arrive to `tap`.
    pub(super) async fn fetch(
        &self,
        blob: &Descriptor,
        labels: Labels,
        tap: Option<&Tap>,
        progress: impl Fn(u64) + Send + Sync,
    ) -> Result<Cache> {
        self.pass().await?;
        let turn = self.brake.or(self.turn(&blob.digest)).await?;
        if self.is_held(&blob.digest).await? {
            self.brake.or(self.asker().expect_access(Kind::Blob(blob.size), &blob.digest)).await??;
            self.label(&blob.digest, labels).await?;
            return Ok(Cache::Hit);
        }
        progress(0);
        let reference = self.reference(&blob.digest, &turn);
        let errand = Errand { blob, labels, reference, tap, is_shown: AtomicBool::new(false) };
        let mut pause = FIRST_PAUSE;
        let mut tries = Tries {
            limit: self.shared.limits.attempts,
            endpoints: self.source.endpoints(),
            ..Tries::default()
        };
        loop {
            let tried = self.brake.or(Box::pin(self.try_fetch(&errand, tries.failed, &progress))).await;
            let broken = match tried.unwrap_or_else(|stopped| Err(Broken::ForGood(stopped))) {
                Ok(()) => return Ok(Cache::Miss),
                Err(Broken::GaveWay) => match self.ready().await {
                    Ok(()) => continue,
                    Err(stopped) => Broken::ForGood(stopped),
                },
                Err(broken) => broken,
            };
            let again = tries.count(&broken);
            let Some(error) = broken.error() else { continue };
            if !again {
                return Err(self.abort(&errand.reference, error.clone()).await);
            }
            tracing::warn!(digest = %blob.digest, ?tries, %error, "fetching goes on where it broke off");
            if let Broken::Wrong(error) = &broken {
                errand.spoil();
                errand.note_shown(false);
                self.abort_or(&errand.reference, error).await?;
            }
            // If the brake is pulled, the next try says so.
            let _stopped = self.brake.or(tokio::time::sleep(pause)).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    async fn try_fetch(
        &self,
        errand: &Errand<'_>,
        failed: u32,
        progress: &(impl Fn(u64) + Send + Sync),
    ) -> Result<(), Broken> {
        let Errand { blob, labels, reference, .. } = errand;
        let mut writer = match self.writer(reference, &blob.digest, blob.size).await {
            Ok(writer) => writer,
            Err(error) if error.is_already_exists() => {
                return self.take_over(errand).await.map_err(Broken::ForGood);
            }
            Err(error) => return Err(self.broken(error)),
        };
        if writer.offset() > blob.size {
            errand.spoil();
            writer.restart();
        }
        if errand.wants_proof(writer.offset()) {
            self.asker().expect_proof(Kind::Blob(blob.size), &blob.digest).await?;
            errand.note_shown(true);
        }
        let rest = if writer.offset() < blob.size || blob.size == 0 {
            self.copy(errand, failed, &mut writer, progress).await?
        } else {
            Vec::new()
        };
        match self.commit(writer, rest, &blob.digest, labels.clone()).await {
            // containerd says so before it looks at what was written.
            Err(error) if error.is_already_exists() => self.take_over(errand).await.map_err(Broken::ForGood),
            committed => committed.map_err(|error| self.refused(blob, error)),
        }
    }

    /// Takes the blob that somebody else has finished meanwhile, if who asks may have it.
    async fn take_over(&self, errand: &Errand<'_>) -> Result<()> {
        let Errand { blob, labels, reference, .. } = errand;
        errand.spoil();
        self.forget(reference).await;
        self.asker().expect_access(Kind::Blob(blob.size), &blob.digest).await?;
        self.adopt(&blob.digest, labels.clone()).await
    }

    /// Copies what is missing from the registry to containerd, but for the last piece, which it returns: that goes with the
    /// commit, so that a small blob is one message.
    async fn copy(
        &self,
        errand: &Errand<'_>,
        failed: u32,
        writer: &mut ContentWriter,
        progress: &(impl Fn(u64) + Send + Sync),
    ) -> Result<Vec<u8>, Broken> {
        let Errand { blob, tap, .. } = *errand;
        let source = self.source.blob(&blob.digest, writer.offset(), failed).await.map_err(Broken::from)?;
        if source.offset != writer.offset() {
            errand.spoil();
            writer.restart();
        }
        let mut bytes = source.bytes;
        let missing = usize::try_from(blob.size.saturating_sub(writer.offset())).unwrap_or(PIECE);
        let (mut piece, mut pace) = (Vec::with_capacity(missing.min(PIECE)), self.source.pace());
        loop {
            let asked = Instant::now();
            let Some(part) = bytes.next().await else { break };
            let part = part.map_err(|error| {
                Broken::ForNow(self.interrupted(blob, &source.endpoint, &error.to_string()))
            })?;
            if !pace.keeps(part.len(), asked.elapsed()) {
                return Err(Broken::ForNow(self.interrupted(blob, &source.endpoint, "it is too slow")));
            }
            self.shared.observer.fetched(part.len() as u64);
            piece.extend_from_slice(&part);
            let gave_way = self.give_way(part.len() as u64).await;
            let there = writer.offset() + piece.len() as u64;
            if there > blob.size {
                return Err(Broken::Wrong(
                    self.corrupt(blob, "the registry serves more bytes than its manifest says"),
                ));
            }
            match gave_way {
                // Nothing is left to wait for.
                Ok(()) | Err(Broken::GaveWay) if there == blob.size => {}
                gave_way => {
                    if piece.len() >= PIECE || gave_way.is_err() {
                        self.flush(writer, &mut piece, tap, progress).await?;
                    }
                    gave_way?;
                }
            }
        }
        let whole = writer.offset() + piece.len() as u64 == blob.size;
        errand.note_shown(whole);
        if !whole || piece.len() > PIECE {
            self.flush(writer, &mut piece, tap, progress).await?;
        }
        if !whole {
            return Err(Broken::ForNow(self.interrupted(
                blob,
                &source.endpoint,
                "the connection was closed",
            )));
        }
        if !piece.is_empty() {
            tap.inspect(|tap| tap.pour(writer.offset(), &piece));
        }
        progress(blob.size);
        Ok(piece)
    }

    /// Waits until it may go on.
    pub(super) async fn pass(&self) -> Result<()> {
        self.brake.or(self.gate.pass()).await?
    }

    /// The same, and it owes its budget nothing.
    async fn ready(&self) -> Result<()> {
        self.brake.or(self.gate.spend(0)).await??;
        self.pass().await
    }

    /// So many bytes have come: lets others go first, and keeps to its budget.
    async fn give_way(&self, bytes: u64) -> Result<(), Broken> {
        let go_on = async {
            self.gate.spend(bytes).await?;
            self.gate.pass().await
        };
        match tokio::time::timeout(STANDSTILL, go_on).await {
            Ok(passed) => passed.map_err(Broken::ForGood),
            Err(_) => Err(Broken::GaveWay),
        }
    }

    /// Where bytes wait between fetching and unpacking: who may have to wait takes no room from who does not.
    pub(super) fn room(&self) -> &Arc<Room> {
        let is_first = self.gate.own_class() == Class::Urgent;
        if is_first { &self.shared.room } else { &self.shared.side_room }
    }

    async fn flush(
        &self,
        writer: &mut ContentWriter,
        piece: &mut Vec<u8>,
        tap: Option<&Tap>,
        progress: &(impl Fn(u64) + Send + Sync),
    ) -> Result<(), Broken> {
        // What arrives in large parts still goes on in pieces that containerd takes.
        for message in piece.chunks(PIECE) {
            tap.inspect(|tap| tap.pour(writer.offset(), message));
            writer.write(message.to_vec()).await.map_err(|e| self.broken(e))?;
            progress(writer.offset());
        }
        piece.clear();
        Ok(())
    }

    /// Whether the blob is there, and from now on held.
    async fn is_held(&self, digest: &Digest) -> Result<bool> {
        let containerd = &self.shared.containerd;
        // What is written is held by itself: to hold what is not there is a transaction of containerd's for nothing.
        if containerd.blob(digest.as_str()).await.map_err(|e| self.explain(e))?.is_none() {
            return Ok(false);
        }
        containerd.hold_blob(self.lease, digest.as_str()).await.map_err(|e| self.explain(e))?;
        Ok(containerd.blob(digest.as_str()).await.map_err(|e| self.explain(e))?.is_some())
    }

    /// Takes the blob that somebody else has finished first.
    async fn adopt(&self, digest: &Digest, labels: Labels) -> Result<()> {
        self.is_held(digest).await?;
        self.label(digest, labels).await
    }

    /// Removes what was written of a blob that is there by now. What stays goes with the lease.
    async fn forget(&self, reference: &str) {
        if let Err(error) = self.shared.containerd.abort_write(reference).await {
            tracing::warn!(reference, %error, "what was written of a blob is collected later");
        }
    }

    /// Labels a blob that this pull has written, or seen to be there.
    pub(super) async fn label_anew(&self, digest: &Digest, labels: Labels) -> Result<()> {
        let labelled = self.shared.containerd.label_blob(digest.as_str(), labels).await;
        labelled.map_err(|e| self.explain(e))
    }

    /// Labels a blob that is there; each change is a write of containerd's, so only if something changes.
    pub(super) async fn label(&self, digest: &Digest, labels: Labels) -> Result<()> {
        let containerd = &self.shared.containerd;
        let present = containerd.blob(digest.as_str()).await.map_err(|e| self.explain(e))?;
        let missing = labels::missing(&present.map(|(_, labels)| labels).unwrap_or_default(), labels);
        if missing.is_empty() {
            return Ok(());
        }
        self.label_anew(digest, missing).await
    }

    /// Those who pull from the same registry are kin.
    async fn turn(&self, digest: &Digest) -> Turn {
        self.shared.locks.turn(digest.as_str(), self.image.registry(), Some(self.gate)).await
    }

    /// The name under which a blob is written; the same after a restart, so that it goes on. Nobody else writes under
    /// it while the turn lasts.
    fn reference(&self, digest: &Digest, turn: &Turn) -> String {
        let mut reference = format!("cowshed-{digest}");
        if turn.is_beside_another() {
            reference = format!("{reference}-{}", self.image.registry());
        }
        // Who goes on with what another has begun has not shown that it may have the beginning.
        if self.access.credential.is_some() {
            reference = format!("{reference}@{}", self.access.tenant);
        }
        reference
    }

    async fn writer(&self, reference: &str, digest: &Digest, size: u64) -> Result<ContentWriter, CallError> {
        let reference = reference.to_owned();
        self.shared.containerd.write_blob(self.lease, reference, digest.to_string(), size).await
    }

    /// Forgets what was written, so that the next try begins anew.
    async fn abort_or(&self, reference: &str, error: &Error) -> Result<()> {
        let aborted = self.shared.containerd.abort_write(reference).await;
        aborted.map_err(|second| error.clone().context(format!("(and the next try cannot begin: {second})")))
    }

    /// Leaves nothing half written behind.
    async fn abort(&self, reference: &str, error: Error) -> Error {
        match self.shared.containerd.abort_write(reference).await {
            Ok(()) => error,
            Err(second) => {
                error.context(format!("(and the unfinished write {reference} stays in containerd: {second})"))
            }
        }
    }

    fn explain(&self, error: CallError) -> Error {
        self.shared.containerd.explain(error)
    }

    /// "Unavailable" is also containerd's word for a write that another client, or our own last try, has not let go of yet.
    fn broken(&self, error: CallError) -> Broken {
        let again = error.is_unavailable();
        let error = self.explain(error);
        if again { Broken::Busy(error) } else { Broken::ForGood(error) }
    }

    /// containerd checks size and digest at the commit.
    fn refused(&self, blob: &Descriptor, error: CallError) -> Broken {
        let message = error.message();
        if message.contains("unexpected commit digest") || message.contains("unexpected commit size") {
            return Broken::Wrong(self.corrupt(blob, message));
        }
        self.broken(error)
    }

    fn corrupt(&self, blob: &Descriptor, what: &str) -> Error {
        let message = format!(
            "blob {} of {} is not what its manifest says: {what}; the registry's copy is damaged, push the image again",
            blob.digest, self.image
        );
        Error::new(Reason::ImageCorrupt, message).with("digest", &blob.digest)
    }

    fn interrupted(&self, blob: &Descriptor, endpoint: &str, what: &str) -> Error {
        let message = format!(
            "registry {endpoint} broke off while serving blob {} of {}: {what}; repeat when it is well",
            blob.digest, self.image
        );
        Error::new(Reason::RegistryUnavailable, message).with("digest", &blob.digest)
    }
}

/// Whether it is worth another try.
#[derive(Debug)]
enum Broken {
    /// Others came first, for so long that the connection was given up.
    GaveWay,
    /// containerd could not take it; no endpoint is to blame.
    Busy(Error),
    /// What has arrived is good.
    ForNow(Error),
    /// What has arrived is not what was asked for; another endpoint, or a whole download, may serve the right thing.
    Wrong(Error),
    /// No.
    ForGood(Error),
}

impl Broken {
    fn error(&self) -> Option<&Error> {
        match self {
            Self::GaveWay => None,
            Self::Busy(error) | Self::ForNow(error) | Self::Wrong(error) | Self::ForGood(error) => {
                Some(error)
            }
        }
    }
}

/// How often fetching a blob was tried.
#[derive(Debug, Default)]
struct Tries {
    /// How often at the most, for each kind of failure.
    limit: u32,
    endpoints: u32,
    /// How often containerd could not take it.
    busy: u32,
    /// How many downloads have failed, in whatever way: the next begins with another endpoint.
    failed: u32,
    /// How many of them had brought something else.
    wrong: u32,
}

impl Tries {
    /// Counts one. Returns whether there is to be another; every endpoint gets one.
    fn count(&mut self, broken: &Broken) -> bool {
        let counts = match broken {
            Broken::GaveWay => return true,
            Broken::Busy(_) => [1, 0, 0],
            Broken::ForNow(_) => [0, 1, 0],
            Broken::Wrong(_) => [0, 1, 1],
            Broken::ForGood(_) => return false,
        };
        self.busy += counts[0];
        self.failed += counts[1];
        self.wrong += counts[2];
        match broken {
            // It is over soon, or containerd is not well.
            Broken::Busy(_) => self.busy < 2 * self.limit,
            Broken::Wrong(_) => self.wrong < self.endpoints.max(2),
            Broken::GaveWay | Broken::ForNow(_) | Broken::ForGood(_) => {
                self.failed < self.limit.max(self.endpoints)
            }
        }
    }
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        if error.reason() == Reason::RegistryUnavailable { Self::ForNow(error) } else { Self::ForGood(error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_before_is_proved_however_often_it_is_tried() {
        let blob =
            |size| Descriptor { media_type: String::new(), digest: Digest::of(b"x"), size, platform: None };
        let (empty, blob) = (blob(0), blob(10));
        let errand = |blob| Errand {
            blob,
            labels: Labels::new(),
            reference: String::new(),
            tap: None,
            is_shown: AtomicBool::new(false),
        };
        assert!(!errand(&empty).wants_proof(0), "there is nothing to be had");
        let errand = errand(&blob);
        for (written, wants) in [(0, false), (9, false), (10, true), (10, true), (11, false)] {
            assert_eq!(errand.wants_proof(written), wants, "{written}");
        }
        errand.note_shown(true);
        assert!(!errand.wants_proof(10));
        // It was something else.
        errand.note_shown(false);
        assert!(errand.wants_proof(10));
    }

    #[test]
    fn how_often_it_is_tried() {
        let error = || Error::new(Reason::RegistryUnavailable, "x");
        let (busy, for_now) = (|| Broken::Busy(error()), || Broken::ForNow(error()));
        let (wrong, for_good) = (|| Broken::Wrong(error()), || Broken::ForGood(error()));
        // Endpoints, what happens, how often that is tried, beginning with which endpoint the next time.
        let table: [(u32, Vec<Broken>, usize, u32); 8] = [
            (1, vec![for_now(), for_now(), for_now(), for_now()], 4, 4),
            (6, (0..9).map(|_| for_now()).collect(), 6, 6),
            (1, vec![wrong(), wrong(), wrong()], 2, 2),
            (3, vec![wrong(), wrong(), wrong()], 3, 3),
            (1, vec![for_good(), for_good()], 1, 0),
            (1, (0..9).map(|_| busy()).collect(), 8, 0),
            // Neither takes another's tries.
            (2, vec![wrong(), busy(), busy(), for_now(), wrong()], 5, 3),
            (2, vec![for_now(), for_now(), wrong(), for_now()], 4, 4),
        ];
        for (endpoints, happens, tried, next) in table {
            let mut tries = Tries { limit: 4, endpoints, ..Tries::default() };
            let again = happens.iter().take_while(|broken| tries.count(broken)).count();
            assert_eq!((again + 1, tries.failed), (tried, next), "{endpoints} {happens:?}");
        }
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod races;
