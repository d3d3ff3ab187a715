//! Which devices are active: those of Active snapshots and Views are; a committed one is put to rest.

use std::time::{Duration, Instant};

use crate::{
    device::{Access, Activation, Deactivated, DeviceError, DeviceName, Live, Pool, PoolEvents},
    error::{Code, Error, Result},
    snapshotter::Inner,
    tree::{Change, Kind, Snapshot, SnapshotId, State},
};

/// Within this time an image's next layer is made of the one just committed, or committed, and need not wait for
/// deactivations; one that takes longer has time for them.
const NEXT_LAYER: Duration = Duration::from_secs(1);
/// So long at the most deactivations wait for the end of unpacks.
const UNPACK: Duration = Duration::from_secs(60);

impl Inner {
    /// What activates a snapshot that is not committed.
    pub(crate) fn activation(&self, snapshot: &Snapshot) -> Activation {
        let access = if snapshot.kind == Kind::View { Access::ReadOnly } else { Access::ReadWrite };
        Activation { name: self.name(snapshot.id), thin: snapshot.thin, bytes: snapshot.bytes, access }
    }

    /// Activates a snapshot that should be active: after a start, or if somebody has removed its device by hand. One
    /// that was half activated when the service was killed is completed.
    pub(crate) async fn ensure_active(&self, id: SnapshotId) -> Result<()> {
        let _alone = self.device_lock(id).lock().await;
        // As it is now: its thin id is another's once it was removed.
        let is_active = |s: &&Snapshot| s.state == State::Ready && s.kind.is_active();
        let snapshot = self.store.read(|tree| tree.get(id).filter(is_active).cloned());
        let Some(snapshot) = snapshot else {
            let what =
                format!("the snapshot of {} was removed or committed in the meantime", self.name(id).path());
            return Err(Error::new(Code::NotFound, what));
        };
        let activation = self.activation(&snapshot);
        self.on_pool(move |pool| {
            let is_whole = |live: Live| live.mapped.is_some() && !live.suspended;
            // To make it and find it there would cost the kernel a device.
            if activation.name.is_linked() && pool.look(&activation.name)?.is_some_and(is_whole) {
                return Ok(());
            }
            pool.activate(&activation)
        })
        .await
    }

    /// Makes what was written to a snapshot durable: a layer was mounted with neither journal nor barriers, and the last
    /// close of a disk flushes nothing. What is lost is torn for good: what could not be flushed, and a layer that was
    /// unpacked while the pool did not write.
    pub(crate) async fn flush(&self, snapshot: &Snapshot) -> Result<()> {
        let (id, is_layer) = (snapshot.id, snapshot.layer);
        // One that was begun before this process was may have seen all that the pool has told.
        let begun = self.unpacking().get(&id).copied().unwrap_or(PoolEvents::NONE);
        // The inner result is that of the flush; none without a device.
        let flush = |name: DeviceName| {
            self.on_pool(move |pool| {
                let Some(live) = pool.look(&name)? else { return Ok(None) };
                Ok(Some(if is_layer { flush_layer(pool, &name, live, begun) } else { pool.flush(&name) }))
            })
        };
        let flushed = match flush(self.name(id)).await? {
            Some(flushed) => flushed,
            None => {
                self.ensure_active(id).await?;
                let gone =
                    || Error::new(Code::Unavailable, format!("{} has gone away", self.name(id).path()));
                flush(self.name(id)).await?.ok_or_else(gone)?
            }
        };
        let Err(error) = flushed else { return Ok(()) };
        let is_lost = matches!(error, DeviceError::NotFlushed { .. } | DeviceError::PoolStopped { .. });
        let error = Error::from(error);
        if !is_lost {
            return Err(error);
        }
        self.torn().insert(id);
        self.unpacking().remove(&id);
        match self.write(move |tree| Ok((tree.tear(id).into_iter().collect(), ()))).await {
            Ok(()) => Err(error),
            Err(second) => Err(error.and(second)),
        }
    }

    /// Bytes of the blocks that it maps.
    pub(crate) async fn mapped(&self, snapshot: &Snapshot) -> Result<u64> {
        if let Some(mapped) = snapshot.mapped {
            return Ok(mapped);
        }
        let name = self.name(snapshot.id);
        if let Some(mapped) = self.on_pool(move |pool| pool.look(&name)).await?.and_then(|live| live.mapped) {
            return Ok(mapped);
        }
        self.active_origins().entry(snapshot.id).or_default();
        self.rest_once(snapshot.id).await?;
        let known = self.store.read(|tree| tree.get(snapshot.id).and_then(|s| s.mapped));
        let unknown =
            || Error::new(Code::Unavailable, format!("what {:?} maps is not known yet", snapshot.key));
        known.ok_or_else(unknown)
    }

    /// Puts a snapshot just committed to rest, when the image's next layers were unpacked.
    pub(crate) async fn rest_later(&self, id: SnapshotId) {
        tokio::time::sleep(NEXT_LAYER).await;
        let until = Instant::now() + UNPACK;
        while !self.traffic.has_no_layer_for(NEXT_LAYER) && Instant::now() < until {
            tokio::time::sleep(NEXT_LAYER / 4).await;
        }
        self.put_to_rest(id).await;
    }

    /// Deactivates a committed snapshot as soon as nobody has it open, and writes down what it maps.
    pub(crate) async fn put_to_rest(&self, id: SnapshotId) {
        let mut pause = Duration::from_millis(20);
        while !self.is_retired() {
            match self.rest_once(id).await {
                Ok(Deactivated::Gone) => return,
                Ok(Deactivated::InUse) => {}
                Err(error) if error.code == Code::DataLoss => {
                    tracing::error!(snapshot = id.0, %error, "a committed snapshot is not in the pool");
                    return;
                }
                Err(error) => tracing::warn!(snapshot = id.0, %error, "a committed snapshot stays active"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }

    async fn rest_once(&self, id: SnapshotId) -> Result<Deactivated> {
        let Some(lock) = self.active_origins().get(&id).cloned() else { return Ok(Deactivated::Gone) };
        let _still = lock.lock().await;
        let _alone = self.device_lock(id).lock().await;
        let rests = |s: &&Snapshot| s.state == State::Ready && !s.kind.is_active();
        let Some(snapshot) = self.store.read(|tree| tree.get(id).filter(rests).cloned()) else {
            // The commit was not made durable, or it is removed by now, and the reclaimer's.
            self.active_origins().remove(&id);
            return Ok(Deactivated::Gone);
        };
        let name = self.name(id);
        let (thin, bytes, unknown) = (snapshot.thin, snapshot.bytes, snapshot.mapped.is_none());
        let (done, mapped) = self
            .on_pool(move |pool| {
                let mut live = pool.look(&name)?;
                // The snapshot that it was suspended for was made, and it could not be resumed.
                if live.is_some_and(Live::stands_still) {
                    pool.resume(&name)?;
                }
                if unknown && live.and_then(|live| live.mapped).is_none() {
                    pool.activate(&Activation { name: name.clone(), thin, bytes, access: Access::ReadOnly })?;
                    live = pool.look(&name)?;
                }
                Ok((pool.deactivate(&name)?, live.and_then(|live| live.mapped)))
            })
            .await?;
        if done == Deactivated::Gone {
            self.active_origins().remove(&id);
            self.write(move |tree| {
                let known = tree.get(id).filter(|s| s.mapped.is_none() && mapped.is_some());
                let change = known.map(|s| Change::Put(Box::new(Snapshot { mapped, ..s.clone() })));
                Ok((change.into_iter().collect(), ()))
            })
            .await?;
        }
        Ok(done)
    }
}

/// Whoever has it mounted still has what a last unmount writes back; freezing it does so too. What was written to files
/// while the pool was full may be lost, and neither the filesystem's end nor a flush of its device tells so.
fn flush_layer(pool: &dyn Pool, name: &DeviceName, live: Live, begun: PoolEvents) -> Result<(), DeviceError> {
    expect_written(pool, name, begun)?;
    // Not in a pool that is full, where it would wait, and keep from being extended what it waits for.
    if live.open > 0 {
        pool.suspend(name)?;
        pool.resume(name)?;
    }
    pool.flush(name)?;
    expect_written(pool, name, begun)
}

fn expect_written(pool: &dyn Pool, name: &DeviceName, begun: PoolEvents) -> Result<(), DeviceError> {
    let now = pool.events()?;
    if now.has_written_since(begun) {
        return Ok(());
    }
    let error = format!(
        "the pool may have been full, or stopped, while it was unpacked: it is in mode {} and has told {} events, {} when \
         that began; see that data and metadata have room, and unpack it again",
        now.mode, now.count, begun.count
    );
    Err(DeviceError::NotFlushed { path: name.path(), error })
}
