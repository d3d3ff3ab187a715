//! Spares: disks that are made ahead of need, and handed out by one write.
//!
//! ```text
//!  Acquire ─► take ─► look at its device ─► the ledger makes it the VM's ─► reply
//!     └─► demand ─► policy ─► refill: intent ─► containerd lease ─► Prepare ─► verify ─► confirm ─► shelf
//! ```
//!
//! A spare is a lease in the ledger, held in its own name: recovery, audit and reclaimer know it as any other disk. Which can be
//! handed out is remembered here, and no more than that: the ledger decides, in the write that hands one out, whether it is one
//! still.

pub mod policy;
pub mod refill;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cowshed_leases::LeaseId;
use policy::{Demand, Limits, Want};
use tokio::sync::Notify;

use crate::image::{Digest, ImageRef, Platform, ResolvedImage};

/// How long one is thought to take to make before one was made.
const FIRST_GUESS: Duration = Duration::from_secs(1);
/// New ones are made when none was taken for so long …
const QUIET: Duration = Duration::from_millis(50);
/// … or takers have not been quiet for this time.
const LONGEST_QUIET: Duration = Duration::from_millis(500);
/// After a failure the next try waits so long, and twice as long after each further one, up to the longest pause.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// `[spares]`, as far as it is not policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Whether there are any.
    pub enabled: bool,
    /// How many there should be.
    pub limits: Limits,
    /// So many are made at a time.
    pub concurrency: u32,
    /// None are made while the pool's data is fuller than this, in percent …
    pub data_max_percent: u8,
    /// … or its metadata than this.
    pub metadata_max_percent: u8,
}

impl Settings {
    /// How many a pin of so many, one of `pins`, keeps ready of the image; and why they are fewer, or another one's are.
    fn pinned(&self, image: &ImageRef, asked: u32, pins: &Pins) -> (u32, Option<String>) {
        let Limits { image_max, total_max, .. } = self.limits;
        let (name, most) =
            if total_max < image_max { ("total_max", total_max) } else { ("image_max", image_max) };
        if asked == 0 {
            return (0, None);
        }
        if !self.enabled {
            return (0, Some("no spares are made here ([spares] enabled = false)".to_owned()));
        }
        let Some((meant, _)) = pins.here.iter().find(|(here, _)| here.name == *image) else {
            let host = Platform::host();
            return (
                0,
                Some(format!("none are made before it is here, unpacked, for the host's platform ({host})")),
            );
        };
        let wants = pins.wants();
        let allotted = policy::allot(&wants.values().copied().collect::<Vec<_>>(), &self.limits);
        let own =
            wants.keys().zip(allotted).find_map(|(key, count)| (**key == meant.manifest).then_some(count));
        let kept = own.unwrap_or_default().min(asked);
        let sum: u64 = wants.values().map(|want| u64::from(want.pinned.min(image_max))).sum();
        let all = || {
            format!("pins ask for {sum} together, and {total_max} are kept at the most ([spares] total_max)")
        };
        let why = if kept < asked.min(most) {
            Some(all())
        } else if kept < asked {
            Some(format!("{most} are kept at the most ([spares] {name})"))
        } else {
            (sum > total_max.into())
                .then(|| format!("other images' spares are fewer than their pins ask for: {}", all()))
        };
        (kept, why)
    }
}

/// What is pinned.
#[derive(Debug, Default)]
struct Pins {
    /// What the names mean, and how many spares of each are wanted.
    here: Vec<(ResolvedImage, u32)>,
    /// Names of which it cannot be learnt now what they mean.
    unknown: Vec<(ImageRef, u32)>,
}

impl Pins {
    /// Of each manifest. Two names of one image do not add up.
    fn wants(&self) -> BTreeMap<&Key, Want> {
        let mut wants: BTreeMap<&Key, Want> = BTreeMap::new();
        for (image, count) in &self.here {
            let want = wants.entry(&image.manifest).or_default();
            want.pinned = want.pinned.max(*count);
        }
        wants
    }
}

/// Of what a spare is made: a manifest, and so a platform.
pub type Key = Digest;

/// What is ready, what is asked for. Clones share it.
#[derive(Clone, Debug)]
pub struct Spares(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: Settings,
    state: Mutex<State>,
    /// Something was handed out, or asked for.
    wake: Notify,
    /// What times are measured from.
    origin: Instant,
}

#[derive(Debug)]
struct State {
    shelves: BTreeMap<Key, Shelf>,
    /// Taken, and not handed out yet.
    in_hand: HashSet<LeaseId>,
    /// How long one takes to make.
    refill: Duration,
    /// What each name meant when it was last asked for.
    names: HashMap<ImageRef, Key>,
    /// Whether it is known what is pinned.
    pins_known: bool,
    /// Whether somebody has found one that is to be looked at again.
    look_again: bool,
    /// When one was last taken.
    taken: Option<Instant>,
}

/// Of one image.
#[derive(Debug, Default)]
struct Shelf {
    ready: VecDeque<LeaseId>,
    making: u32,
    demand: Demand,
    pinned: u32,
    wanted: u32,
    /// What to make them of; `None` until somebody has asked since the start.
    source: Option<Arc<ResolvedImage>>,
    /// Of the last failures, one after the other.
    pause: Option<(Instant, Duration)>,
}

/// How many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// To be handed out.
    pub ready: u32,
    /// Being made.
    pub making: u32,
    /// That there should be.
    pub wanted: u32,
}

impl Spares {
    /// None yet.
    pub fn new(settings: Settings) -> Self {
        let state = State {
            shelves: BTreeMap::new(),
            in_hand: HashSet::new(),
            refill: FIRST_GUESS,
            names: HashMap::new(),
            pins_known: false,
            look_again: false,
            taken: None,
        };
        Self(Arc::new(Inner {
            settings,
            state: Mutex::new(state),
            wake: Notify::new(),
            origin: Instant::now(),
        }))
    }

    /// A disk of this image was given to a VM.
    pub fn asked(&self, image: &ResolvedImage) {
        if !self.0.settings.enabled {
            return;
        }
        let (now, half_life) = (self.0.origin.elapsed(), self.0.settings.limits.half_life);
        let mut state = self.state();
        state.mean(&image.name, &image.manifest);
        let shelf = state.shelves.entry(image.manifest.clone()).or_default();
        shelf.demand.asked(now, half_life);
        if shelf.source.is_none() {
            shelf.source = Some(Arc::new(image.clone()));
        }
        drop(state);
        self.0.wake.notify_one();
    }

    /// Whether there are any at all.
    pub fn are_kept(&self) -> bool {
        self.0.settings.enabled
    }

    /// One is not on the shelf any more, and may come back.
    pub(crate) fn look_again(&self) {
        self.state().look_again = true;
        self.0.wake.notify_one();
    }

    /// The one that is ready for the longest time. It is put back if it is dropped.
    pub fn take(&self, key: &Key) -> Option<Taken> {
        let mut state = self.state();
        let lease = state.shelves.get_mut(key)?.ready.pop_front()?;
        state.in_hand.insert(lease.clone());
        state.taken = Some(Instant::now());
        Some(Taken { spares: self.clone(), key: key.clone(), lease, is_gone: false })
    }

    /// How many there are of the manifest.
    pub fn count(&self, manifest: &Key) -> Count {
        self.state().shelves.get(manifest).map(Shelf::count).unwrap_or_default()
    }

    /// How many there should be of each manifest that is asked for, or pinned.
    pub(crate) fn wanted(&self) -> HashMap<String, u32> {
        self.state().shelves.iter().map(|(key, shelf)| (key.to_string(), shelf.wanted)).collect()
    }

    /// Those that somebody is about to hand out.
    pub(crate) fn in_hand(&self) -> HashSet<LeaseId> {
        self.state().in_hand.clone()
    }

    /// Takes these off: they are given up.
    pub(crate) fn take_off(&self, leases: &[LeaseId]) {
        for shelf in self.state().shelves.values_mut() {
            shelf.ready.retain(|lease| !leases.contains(lease));
        }
    }

    /// How many there are of all.
    pub fn total(&self) -> Count {
        self.state().shelves.values().fold(Count::default(), |sum, shelf| {
            let Count { ready, making, wanted } = shelf.count();
            Count { ready: sum.ready + ready, making: sum.making + making, wanted: sum.wanted + wanted }
        })
    }

    /// Takes all of these manifests off, and makes no more before somebody asks: the image is to go.
    pub fn clear(&self, manifests: impl IntoIterator<Item = Key>) -> Vec<LeaseId> {
        let mut state = self.state();
        manifests
            .into_iter()
            .filter_map(|key| state.shelves.remove(&key))
            .flat_map(|shelf| shelf.ready)
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that is ready. Not if it is known already.
    pub(crate) fn put(&self, key: &Key, lease: LeaseId) {
        let mut state = self.state();
        if !state.in_hand.contains(&lease) {
            let shelf = state.shelves.entry(key.clone()).or_default();
            if !shelf.ready.contains(&lease) {
                shelf.ready.push_back(lease);
            }
        }
    }

    /// Those on shelves and in hands.
    fn known(&self) -> HashSet<LeaseId> {
        let state = self.state();
        let ready = state.shelves.values().flat_map(|shelf| &shelf.ready);
        ready.chain(&state.in_hand).cloned().collect()
    }

    /// So many of the manifest are there of a run before: they are wanted as if they had been asked for.
    fn inherit(&self, key: &Key, count: u32) {
        let (now, half_life) = (self.0.origin.elapsed(), self.0.settings.limits.half_life);
        self.state().shelves.entry(key.clone()).or_default().demand.inherited(count, now, half_life);
    }

    /// Waits until nobody has taken one for a moment, or for long enough: who makes new ones holds up those who are being
    /// answered.
    async fn quiet(&self) {
        let begun = Instant::now();
        loop {
            let taken = self.state().taken;
            let Some(taken) = taken else { return };
            let rest = QUIET.saturating_sub(taken.elapsed());
            if rest.is_zero() || begun.elapsed() >= LONGEST_QUIET {
                return;
            }
            tokio::time::sleep(rest).await;
        }
    }

    /// Whether somebody has found one that is to be looked at again; asked once.
    fn is_to_look_again(&self) -> bool {
        std::mem::take(&mut self.state().look_again)
    }

    /// Whether anybody has asked for the manifest, or pinned it, lately.
    fn has_shelf(&self, key: &Key) -> bool {
        self.state().shelves.contains_key(key)
    }

    /// So many are pinned of these, and of what the `unknown` names meant when they were last known, and of no others.
    fn pin(&self, Pins { here, unknown }: Pins) {
        let mut state = self.state();
        state.pins_known |= unknown.is_empty();
        state.shelves.values_mut().for_each(|shelf| shelf.pinned = 0);
        let State { names, shelves, .. } = &mut *state;
        for (name, count) in unknown {
            if let Some(shelf) = names.get(&name).and_then(|key| shelves.get_mut(key)) {
                shelf.pinned = shelf.pinned.max(count);
            }
        }
        for (image, count) in here {
            state.mean(&image.name, &image.manifest);
            let shelf = state.shelves.entry(image.manifest.clone()).or_default();
            // Two names of one image do not add up.
            shelf.pinned = shelf.pinned.max(count);
            shelf.source = Some(Arc::new(image));
        }
    }

    /// What to do now. `room`: whether any may be made; `at_once`: how many at a time.
    fn plan(&self, room: Room, at_once: u32) -> Plan {
        let Settings { limits, enabled, .. } = self.0.settings;
        let (now, instant) = (self.0.origin.elapsed(), Instant::now());
        let mut state = self.state();
        let refill = state.refill;
        state.shelves.retain(|_, shelf| !shelf.is_over(now, &limits));
        let State { names, shelves, .. } = &mut *state;
        names.retain(|_, key| shelves.contains_key(key));
        // What there is of the run before may be pinned.
        let may_drop = !enabled || room == Room::Short || (room == Room::Ample && state.pins_known);
        let wants: Vec<Want> = state.shelves.values().map(|shelf| shelf.want(now, refill, &limits)).collect();
        let none = !enabled || room == Room::Short;
        let allotted = if none { vec![0; wants.len()] } else { policy::allot(&wants, &limits) };
        let mut free = at_once.saturating_sub(state.shelves.values().map(|shelf| shelf.making).sum());
        let mut plan = Plan::default();
        for (shelf, wanted) in state.shelves.values_mut().zip(allotted) {
            shelf.wanted = wanted;
            if !may_drop {
                continue;
            }
            let surplus = policy::surplus(shelf.count().ready, wanted);
            plan.drop.extend((0..surplus).filter_map(|_| shelf.ready.pop_back()));
        }
        if room != Room::Ample {
            return plan;
        }
        // One of each in turn, so that no image waits for another's crowd.
        loop {
            let before = free;
            for (key, shelf) in &mut state.shelves {
                let Count { ready, making, wanted } = shelf.count();
                let waits = shelf.pause.is_some_and(|(until, _)| until > instant);
                if let (true, Some(source)) = (ready + making < wanted && !waits && free > 0, &shelf.source) {
                    plan.make.push((key.clone(), source.clone()));
                    shelf.making += 1;
                    free -= 1;
                }
            }
            if free == before {
                return plan;
            }
        }
    }

    /// What has become of one that was made in this time.
    fn made(&self, key: &Key, outcome: Result<(LeaseId, Duration), MakeError>) {
        let later = |pause: Option<(Instant, Duration)>| {
            let last = pause.map_or(Duration::ZERO, |(_, pause)| pause);
            let pause = (last * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            Some((Instant::now() + pause, pause))
        };
        let mut state = self.state();
        if let Ok((_, took)) = &outcome {
            state.refill = (state.refill * 7 + *took) / 8;
        }
        // If the image was given up meanwhile, what is ready is known to the ledger, and comes here for nobody.
        if let Some(shelf) = state.shelves.get_mut(key) {
            shelf.making = shelf.making.saturating_sub(1);
            match outcome {
                Ok((lease, _)) => {
                    shelf.pause = None;
                    if !shelf.ready.contains(&lease) {
                        shelf.ready.push_back(lease);
                    }
                }
                Err(MakeError::NoImage) => {
                    shelf.source = None;
                    shelf.pause = later(shelf.pause);
                }
                Err(MakeError::Other) => shelf.pause = later(shelf.pause),
            }
        }
        drop(state);
        self.0.wake.notify_one();
    }
}

impl State {
    /// The name means this from now on: what it meant before is not wanted any more, unless another name means it.
    fn mean(&mut self, name: &ImageRef, key: &Key) {
        let Some(before) = self.names.insert(name.clone(), key.clone()).filter(|before| before != key) else {
            return;
        };
        if !self.names.values().any(|other| *other == before)
            && let Some(shelf) = self.shelves.get_mut(&before)
        {
            shelf.demand = Demand::default();
        }
    }
}

/// Why one could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MakeError {
    /// The image has gone.
    NoImage,
    /// Something else, which may pass.
    Other,
}

/// Whether there is room for spares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Ample,
    /// For those that there are.
    Tight,
    /// For VMs only.
    Short,
}

#[derive(Debug, Default)]
struct Plan {
    make: Vec<(Key, Arc<ResolvedImage>)>,
    drop: Vec<LeaseId>,
}

impl Shelf {
    fn count(&self) -> Count {
        let ready = u32::try_from(self.ready.len()).unwrap_or(u32::MAX);
        Count { ready, making: self.making, wanted: self.wanted }
    }

    fn want(&self, now: Duration, refill: Duration, limits: &Limits) -> Want {
        Want { pinned: self.pinned, demanded: self.demand.wants(now, refill, limits) }
    }

    fn is_over(&self, now: Duration, limits: &Limits) -> bool {
        let is_empty = self.ready.is_empty() && self.making == 0 && self.pinned == 0;
        is_empty && self.demand.is_over(now, limits.half_life)
    }
}

/// A spare that somebody is about to hand out.
#[derive(Debug)]
pub struct Taken {
    spares: Spares,
    key: Key,
    lease: LeaseId,
    is_gone: bool,
}

impl Taken {
    /// Which.
    pub fn lease(&self) -> &LeaseId {
        &self.lease
    }

    /// It is a spare no more.
    pub fn gone(mut self) {
        self.is_gone = true;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut state = self.spares.state();
        state.in_hand.remove(&self.lease);
        if !self.is_gone
            && let Some(shelf) = state.shelves.get_mut(&self.key)
        {
            shelf.ready.push_front(self.lease.clone());
        }
        drop(state);
        self.spares.0.wake.notify_one();
    }
}

#[cfg(test)]
mod tests;
