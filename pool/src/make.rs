//! Prepare and View, and the bases that they need: intent → effect → confirmation.
//!
//! What a thin device is made of must stand still while it is made: origins are inactive for almost all of their lives,
//! and the few that are not (a layer just committed) are closed, or suspended if somebody has them open.

use std::{
    sync::{PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use crate::{
    busy::Hold,
    device::{Activation, Deactivated, DeviceError, Filesystem},
    error::{Code, Error, Result},
    snapshotter::{Inner, Mount, now},
    tree::{Base, BasePlan, Change, Kind, Plan, Snapshot, SnapshotId, ThinId, Traces, UnixNanos, Wish},
};

/// A base that udevd looks at, although no rule sends it, is let go within this time.
const BASE_IN_USE: Duration = Duration::from_secs(3);

/// So many snapshots can be made in one pool, ever.
pub(crate) const CREATIONS: u32 = 1 << 24;

/// A making that failed.
pub(crate) struct Failed {
    error: Error,
    /// What it has left in the pool.
    traces: Traces,
    /// What it was to be made of is not in the pool any more.
    lost_origin: bool,
}

enum Intent {
    /// What is about to be made, of what; the reclaimer leaves both alone. So an origin that the pool has lost does not leave
    /// its thin id to somebody else's disk before all who wanted a snapshot of it know.
    Make { new: Box<Snapshot>, origin: Box<Snapshot>, hold: Hold },
    /// What was made ahead, and is the caller's now.
    Heir(Box<Snapshot>),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, traces: Traces::Maybe, lost_origin: false }
    }
}

impl Inner {
    /// Prepare and View. `is_wanted` says whether the caller still waits.
    pub(crate) async fn make(&self, mut wish: Wish, is_wanted: impl Fn() -> bool) -> Result<Mount> {
        self.pool()?;
        self.creations_are_left()?;
        let _making = self.traffic.making();
        self.await_heir(&wish).await;
        let mut remade = false;
        loop {
            let (new, origin, hold) = match self.intend(wish.clone()).await? {
                Intent::Make { new, origin, hold } => (new, origin, hold),
                Intent::Heir(heir) => match self.inherit(&heir, &is_wanted).await {
                    Ok(mount) => return Ok(mount),
                    Err(error) => {
                        let error = self.give_up(heir.id, error.into()).await;
                        // If it could not be written down that it is not to be, its name is taken.
                        if error.code == Code::Cancelled || self.abandoned().contains_key(&heir.id) {
                            return Err(error);
                        }
                        tracing::warn!(key = heir.key, heir = heir.id.0, %error, "what was made ahead cannot be used; it is made anew");
                        wish.anew = true;
                        continue;
                    }
                },
            };
            if new.layer {
                self.traffic.layer();
            }
            let failed = match self.make_of(&new, &origin, &is_wanted).await {
                Ok(mount) => return Ok(mount),
                Err(failed) => failed,
            };
            let lost_origin = failed.lost_origin;
            let error = self.give_up(new.id, failed).await;
            drop(hold);
            // A base can be made again. What else is gone is gone.
            if remade || !lost_origin || origin.kind.is_listed() {
                return Err(error);
            }
            remade = true;
            tracing::error!(base = origin.id.0, %error, "a base is not in the pool any more; it is made anew");
            self.write(move |tree| Ok((tree.give_up(origin.id, Traces::Maybe, now()), ()))).await?;
            self.wake.notify_one();
        }
    }

    async fn make_of(
        &self,
        new: &Snapshot,
        origin: &Snapshot,
        is_wanted: &impl Fn() -> bool,
    ) -> Result<Mount, Failed> {
        let begun = Instant::now();
        let mount = self.effect(new, Some(origin)).await?;
        let made = begun.elapsed();
        if !is_wanted() {
            // containerd has written down nothing, and would not look for it.
            return Err(Error::new(Code::Cancelled, "its caller has gone away").into());
        }
        let id = new.id;
        self.write(move |tree| Ok((vec![tree.confirm(id)?], ()))).await?;
        tracing::debug!(snapshot = id.0, ?made, confirmed = ?begun.elapsed().saturating_sub(made), "made");
        Ok(mount)
    }

    /// Writes down what is about to be made; makes the base first that it needs.
    async fn intend(&self, wish: Wish) -> Result<Intent> {
        loop {
            let (asked, busy, abandoned) = (wish.clone(), self.busy.clone(), self.abandoned().clone());
            let decided = self
                .write(move |tree| {
                    let plan = match tree.prepare(&asked)? {
                        // It is removed as soon as that can be written down.
                        Plan::Inherit(heir) if abandoned.contains_key(&heir.id) => {
                            tree.prepare(&Wish { anew: true, ..asked })?
                        }
                        plan => plan,
                    };
                    match plan {
                        Plan::Needs(base) => Ok((Vec::new(), Err(base))),
                        Plan::Make(new, origin) => {
                            let hold = busy.hold([new.id, origin.id]);
                            Ok((vec![Change::Put(new.clone())], Ok(Intent::Make { new, origin, hold })))
                        }
                        Plan::Inherit(heir) => Ok((vec![Change::Put(heir.clone())], Ok(Intent::Heir(heir)))),
                    }
                })
                .await?;
            match decided {
                Ok(intent) => return Ok(intent),
                Err(base) => self.make_base(base, wish.now).await?,
            }
        }
    }

    /// Writes down that it is not to be; the reclaimer does so later if that is not possible now.
    pub(crate) async fn give_up(&self, id: SnapshotId, failed: Failed) -> Error {
        let traces = failed.traces;
        let given_up = self.write(move |tree| Ok((tree.give_up(id, traces, now()), ()))).await;
        let error = match given_up {
            Ok(()) => failed.error,
            Err(second) => {
                self.abandoned().insert(id, traces);
                failed.error.and(second)
            }
        };
        self.wake.notify_one();
        error
    }

    /// Makes the thin device of a record that is written, and activates it; returns how it is mounted.
    pub(crate) async fn effect(&self, new: &Snapshot, origin: Option<&Snapshot>) -> Result<Mount, Failed> {
        let (mut thin, begun) = (new.thin, Instant::now());
        loop {
            let made = match origin {
                Some(origin) => self.snap(thin, origin).await,
                None => self.on_pool(move |pool| Ok(pool.create_thin(thin))).await,
            };
            match made {
                Ok(Ok(())) => break,
                Ok(Err(DeviceError::ThinExists(_))) => {
                    let another = self.another_thin(new.id, thin).await;
                    thin = another.map_err(|error| Failed { traces: Traces::None, ..error.into() })?;
                }
                Ok(Err(error)) => {
                    let traces = if error.may_have_made() { Traces::Maybe } else { Traces::None };
                    let lost_origin = matches!(&error, DeviceError::ThinMissing(lost) if origin.is_some_and(|o| o.thin == *lost));
                    return Err(Failed { error: error.into(), traces, lost_origin });
                }
                Err(error) => return Err(error.into()),
            }
        }
        if origin.is_some() {
            self.count_creation();
        }
        let activation = Activation { thin, ..self.activation(new) };
        let in_pool = begun.elapsed();
        let (snapshot, filesystem) = (new.clone(), self.filesystem.clone());
        let (mount, events) = self
            .on_pool(move |pool| {
                pool.activate(&activation)?;
                let events = if snapshot.layer { Some(pool.events()?) } else { None };
                Ok((mount(&*filesystem, &snapshot, activation.name.path())?, events))
            })
            .await?;
        if let Some(events) = events {
            self.unpacking().insert(new.id, events);
        }
        let activated = begun.elapsed().saturating_sub(in_pool);
        tracing::debug!(snapshot = new.id.0, ?in_pool, ?activated, "its device is there");
        Ok(mount)
    }

    /// Somebody else has made a thin device in our pool.
    async fn another_thin(&self, id: SnapshotId, taken: ThinId) -> Result<ThinId> {
        tracing::warn!(thin = taken.0, "a thin device that is not ours is in the pool; it is left alone");
        let thin = self
            .write(move |tree| {
                let change = tree.another_thin(id)?;
                let Change::Put(snapshot) = &change else { return Ok((Vec::new(), taken)) };
                let thin = snapshot.thin;
                Ok((vec![change], thin))
            })
            .await?;
        self.store.note(move |tree| tree.avoid(taken))?;
        Ok(thin)
    }

    /// Makes a snapshot of an origin that stands still meanwhile. The inner result is the pool's own answer.
    async fn snap(&self, thin: ThinId, origin: &Snapshot) -> Result<Result<(), DeviceError>> {
        let origin_thin = origin.thin;
        let lock = self.active_origins().get(&origin.id).cloned();
        let Some(lock) = lock else {
            return self.on_pool(move |pool| Ok(pool.create_snap(thin, origin_thin))).await;
        };
        let _still = lock.lock().await;
        let name = self.name(origin.id);
        let (gone, made) = self
            .on_pool(move |pool| {
                let live = pool.look(&name)?;
                // What nobody has open has nothing under way: its last close has waited for that.
                if live.as_ref().is_none_or(|live| live.open == 0) {
                    return Ok((live.is_none(), pool.create_snap(thin, origin_thin)));
                }
                pool.suspend(&name)?;
                let made = pool.create_snap(thin, origin_thin);
                // If it does not go on now, it does when it is put to rest.
                let resumed = pool.resume(&name);
                Ok((false, made.and(resumed)))
            })
            .await?;
        if gone {
            self.active_origins().remove(&origin.id);
        }
        Ok(made)
    }

    /// Makes a base: a blank by mkfs, unless it is to be raw, or a grown copy by resize2fs.
    async fn make_base(&self, base: Base, now: UnixNanos) -> Result<()> {
        let lock = self.bases.lock().unwrap_or_else(PoisonError::into_inner).entry(base).or_default().clone();
        let _alone = lock.lock().await;
        let (busy, abandoned) = (self.busy.clone(), self.abandoned().clone());
        let intent = self
            .write(move |tree| {
                let Some(plan) = tree.make_base(base, now)? else { return Ok((Vec::new(), None)) };
                let hold = busy.hold([plan.new.id].into_iter().chain(base.of));
                Ok((plan.changes(&abandoned), Some((plan, hold))))
            })
            .await?;
        let Some((BasePlan { new, origin, .. }, _hold)) = intent else { return Ok(()) };
        match self.make_base_of(&new, origin.as_deref()).await {
            Ok(()) => Ok(()),
            Err(failed) => {
                let what = format!("making the {} of {}", new.kind.as_str(), new.bytes);
                let failed = Failed { error: failed.error.context(what), ..failed };
                Err(self.give_up(new.id, failed).await)
            }
        }
    }

    async fn make_base_of(&self, new: &Snapshot, origin: Option<&Snapshot>) -> Result<(), Failed> {
        self.effect(new, origin).await?;
        let (name, filesystem, kind) = (self.name(new.id), self.filesystem.clone(), new.kind);
        let mapped = self
            .on_pool(move |pool| {
                match kind {
                    Kind::Raw => {}
                    Kind::Grown => filesystem.grow(&name.path())?,
                    _ => filesystem.make(&name.path(), pool.facts()?.usage.zeroing)?,
                }
                Ok(pool.look(&name)?.and_then(|live| live.mapped))
            })
            .await?;
        let name = self.name(new.id);
        let until = Instant::now() + BASE_IN_USE;
        loop {
            let name = name.clone();
            match self.on_pool(move |pool| pool.deactivate(&name)).await? {
                Deactivated::Gone => break,
                Deactivated::InUse if Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Deactivated::InUse => {
                    let what = format!("somebody has opened {}", self.name(new.id).path());
                    return Err(Error::new(Code::Unavailable, what).into());
                }
            }
        }
        let (id, base_size) = (new.id, self.settings.base_size);
        Ok(self
            .write(move |tree| {
                let Change::Put(snapshot) = tree.confirm(id)? else { return Ok((Vec::new(), ())) };
                let mut changes = vec![Change::Put(Box::new(Snapshot { mapped, ..*snapshot }))];
                changes.extend(tree.surplus_blanks(id, base_size, now()));
                Ok((changes, ()))
            })
            .await?)
    }

    /// How a snapshot that is there is mounted.
    pub(crate) async fn mount_of(&self, snapshot: &Snapshot) -> Result<Mount> {
        let (path, snapshot) = (self.name(snapshot.id).path(), snapshot.clone());
        let filesystem = self.filesystem.clone();
        self.blocking(move || mount(&*filesystem, &snapshot, path)).await
    }

    /// The pool's count of snapshots ever made has 24 bits, and dm-thin corrupts its mappings beyond.
    fn creations_are_left(&self) -> Result<()> {
        let made = self.creations.load(Ordering::Relaxed);
        if made < CREATIONS / 10 * 9 {
            return Ok(());
        }
        let what = format!(
            "{made} snapshots were made in this pool, and it corrupts itself at {CREATIONS}: make a new pool, let \
             Cowshed pull its images into that, and delete this one when its last VM is gone"
        );
        Err(Error::new(Code::ResourceExhausted, what))
    }

    /// Counts a snapshot that was made in the pool.
    fn count_creation(&self) {
        let before = self.creations.fetch_add(1, Ordering::Relaxed);
        self.tell_creations(before, before + 1);
    }

    /// What the pool's metadata says of it.
    pub(crate) fn know_creations(&self, made: u32) {
        let before = self.creations.swap(made, Ordering::Relaxed);
        self.tell_creations(before, made);
    }

    fn tell_creations(&self, before: u32, made: u32) {
        self.metrics.creations(made);
        if before < CREATIONS / 2 && made >= CREATIONS / 2 {
            tracing::warn!(
                made,
                "half of all snapshots that this pool can ever make were made: plan for a new pool"
            );
        }
    }
}

fn mount(filesystem: &dyn Filesystem, snapshot: &Snapshot, path: String) -> Result<Mount, DeviceError> {
    let is_view = snapshot.kind == Kind::View;
    let mut options = vec![if is_view { "ro" } else { "rw" }.to_owned()];
    if is_view || snapshot.layer {
        let needs_recovery = filesystem.needs_recovery(&path)?;
        if is_view && needs_recovery {
            // Its journal cannot be replayed on a device that is read-only.
            options.push("noload".to_owned());
        } else if !is_view && !needs_recovery {
            // Thrown away unless it is unpacked to its end, unmounted and committed, which flushes it: until then
            // there is nothing to save, and in no order.
            options.extend(["noload", "nobarrier"].map(str::to_owned));
        }
    }
    Ok(Mount { kind: if snapshot.is_raw() { "raw" } else { filesystem.name() }, source: path, options })
}
