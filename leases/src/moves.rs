//! Every move of a lease: whether it is legal now, and what to write down for it.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    Book, Change, Failure, Generation, Grant, Lease, LeaseId, Mode, Moment, RequestId, Revision, Seen, Spec,
    State, Suspicion, Tenant, Term, Ttl, VmId, draft::Draft,
};

/// So many failures that nobody has seen are kept, the latest ones.
const FAILURES_KEPT: usize = 1_000;

/// What a launcher asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// For which VM.
    pub vm: VmId,
    /// What.
    pub spec: Spec,
    /// For how long; `None`: as before, or without end.
    pub ttl: Option<Ttl>,
    /// A Suspect lease's disk is not wanted any more, but a new one.
    pub fresh: bool,
    /// What the VM is expected to write, in bytes.
    pub expects: u64,
    /// The client's name for this request.
    pub request: Option<RequestId>,
    /// What it is to share, once that is known: without it, nothing is.
    pub share: Option<Share>,
    /// The spare that it is to get, if it still is one: without it, a disk is made.
    pub spare: Option<Spare>,
}

/// A spare that was chosen for a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spare {
    /// Its lease.
    pub lease: LeaseId,
    /// Digest of the manifest that it has to be made of.
    pub image_digest: String,
    /// Its device as it is now.
    pub seen: Seen,
}

/// A device that VMs share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The image in whose name it is held.
    pub image: VmId,
    /// The lease that it gets if there is none.
    pub fresh: LeaseId,
}

/// What an acquire comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acquisition {
    /// The VM gets this new lease, to be prepared; that of the spare that was asked for is granted.
    New {
        /// The lease.
        lease: Box<Lease>,
        /// To be written down.
        changes: Vec<Change>,
    },
    /// The VM has, or is being made, this lease of the same spec. To be confirmed with [`Book::keep`].
    Existing(Box<Lease>),
}

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "named as the API's calls")]
pub enum Kind {
    Acquire,
    Release,
}

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// What was asked.
    pub kind: Kind,
    /// For which VM.
    pub vm: VmId,
    /// What it acquired or released; `None` if there was nothing to release.
    pub lease: Option<LeaseId>,
    /// When.
    pub revision: Revision,
}

/// What a launcher gives back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// Whose disk.
    pub vm: VmId,
    /// Only this lease.
    pub lease: Option<LeaseId>,
    /// Only this generation.
    pub generation: Option<Generation>,
    /// The client's name for this request.
    pub request: Option<RequestId>,
    /// Whether it is an operator who gives it up for the launcher.
    pub abandon: bool,
}

/// What a release comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Releasing {
    /// There is nothing to release.
    Nothing,
    /// It was released before.
    Again(Box<Lease>),
    /// It is released now.
    Now(Box<Lease>),
}

/// How long a Suspect lease is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grace {
    /// After it has expired.
    pub expired: Ttl,
    /// After the boot that has made it Suspect.
    pub boot: Ttl,
}

/// How a spec differs from that of the lease that the VM holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Field of the spec.
    pub field: &'static str,
    /// Its value in the lease.
    pub held: String,
    /// Its value in the request.
    pub asked: String,
}

/// A move that is not legal.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BookError {
    /// The VM holds a lease of another spec.
    #[error("VM {vm} holds lease {lease} with another spec")]
    Conflict {
        /// The VM.
        vm: VmId,
        /// What it holds.
        lease: LeaseId,
        /// Every field that differs; at least one.
        differences: Vec<Difference>,
    },
    /// The lease is not, or no longer, in the state that the move starts from.
    #[error("lease {0} is not being prepared any more")]
    NotPreparing(LeaseId),
    /// The lease may be held still, so it cannot be forgotten.
    #[error("lease {0} is held: only a released lease can be removed")]
    NotReleasing(LeaseId),
    /// The device is that of another lease.
    #[error("device {device} of lease {asked} is that of lease {owner}")]
    DeviceTaken {
        /// Its device-mapper name.
        device: String,
        /// Whose it is.
        owner: LeaseId,
        /// Who was to get it.
        asked: LeaseId,
    },
    /// It is no spare of that manifest (any more).
    #[error("lease {0} is not the spare that it was")]
    NoSpare(LeaseId),
    /// The same random id came twice, or a stored id is used again.
    #[error("lease {0} exists already")]
    Reused(LeaseId),
    /// There is no such lease (any more).
    #[error("there is no lease {0}")]
    Gone(LeaseId),
    /// It was released, or has failed: it cannot be renewed.
    #[error("lease {0} has been released")]
    Released(LeaseId),
    /// It is not granted yet.
    #[error("lease {0} is still being made")]
    StillPreparing(LeaseId),
    /// It has become Suspect.
    #[error("lease {0} has become suspect")]
    Doubtful(LeaseId),
    /// An operator has given it up.
    #[error("lease {0} was given up by an operator (release --abandon)")]
    Abandoned(LeaseId),
    /// The device is not what the lease was to share.
    #[error("device {device} is not held by what lease {asked} shares")]
    NotShared {
        /// The device.
        device: String,
        /// Who was to be granted it.
        asked: LeaseId,
    },
    /// The lease that this request has acquired was released since.
    #[error("request {request} acquired lease {lease}, which has been released since")]
    RequestOver {
        /// The request.
        request: RequestId,
        /// What it had acquired.
        lease: LeaseId,
    },
    /// The request id was used for something else.
    #[error("request id {request} was used before, for another {what}")]
    RequestReused {
        /// The id.
        request: RequestId,
        /// In what it differs.
        what: &'static str,
    },
}

impl Book {
    /// Decides an acquire. `id` is fresh and is used if a lease is to be made.
    ///
    /// # Errors
    /// If the VM holds a lease of another spec, or the request id was used for something else or is over.
    pub fn acquire(&self, ask: &Ask, id: LeaseId, now: &Moment) -> Result<Acquisition, BookError> {
        self.expect_open(ask)?;
        let mut draft = Draft::on(self);
        // What a request has acquired is as fresh as it wanted it.
        let fresh = ask.fresh && ask.request.as_ref().is_none_or(|request| self.request(request).is_none());
        if let Some(held) = self.held_by(&ask.vm) {
            if !fresh || held.suspicion(now).is_none() {
                let differences = differences(&held.spec, &ask.spec);
                if differences.is_empty() {
                    return Ok(Acquisition::Existing(Box::new(held.clone())));
                }
                return Err(BookError::Conflict { vm: ask.vm.clone(), lease: held.id.clone(), differences });
            }
            draft.release(held, false, now);
        }
        let fresh = [Some(&id), ask.share.as_ref().map(|share| &share.fresh)];
        if let Some(used) = fresh.into_iter().flatten().find(|id| self.get(id).is_some()) {
            return Err(BookError::Reused(used.clone()));
        }
        if let Some(failed) = self.failed_of(&ask.vm) {
            draft.see(failed, now);
        }
        if let Some(spare) = &ask.spare {
            let lease = self
                .spare(spare, &ask.spec, now)
                .and_then(|lease| draft.hand_out(lease, ask, &spare.seen, now));
            let lease = lease.ok_or_else(|| BookError::NoSpare(spare.lease.clone()))?;
            draft.answer(ask.request.as_ref(), Kind::Acquire, &ask.vm, Some(&lease.id));
            return Ok(Acquisition::New { lease: Box::new(lease), changes: draft.changes });
        }
        let shares = ask.share.as_ref().map(|share| draft.share(share, &ask.spec, now));
        let lease = draft.intend(id, ask.vm.clone(), (ask.spec.clone(), ask.ttl, ask.expects), shares, now);
        draft.answer(ask.request.as_ref(), Kind::Acquire, &ask.vm, Some(&lease.id));
        Ok(Acquisition::New { lease: Box::new(lease), changes: draft.changes })
    }

    /// The spare, if it can be handed out for this.
    fn spare(&self, spare: &Spare, spec: &Spec, now: &Moment) -> Option<&Lease> {
        let lease = self.get(&spare.lease).filter(|lease| lease.is_ready_spare(now))?;
        // A manifest is for one platform, by whatever name.
        let is_alike = lease.spec.mode == spec.mode && spec.scratch.is_none();
        let grant = lease.grant().filter(|grant| grant.image_digest == spare.image_digest);
        grant.filter(|grant| is_alike && grant.device.dm_name == spare.seen.root.dm_name).map(|_| lease)
    }

    /// A spare is to be made; `id` is fresh.
    ///
    /// # Errors
    /// If the id was used before.
    pub fn intend_spare(
        &self,
        id: LeaseId,
        spec: Spec,
        now: &Moment,
    ) -> Result<(Lease, Vec<Change>), BookError> {
        if self.get(&id).is_some() {
            return Err(BookError::Reused(id));
        }
        let mut draft = Draft::on(self);
        let vm = VmId::of_spare(&id);
        let lease = draft.intend(id, vm, (spec, None, 0), None, now);
        Ok((lease, draft.changes))
    }

    /// A spare was looked at, and is what it was: it can be handed out in this boot, with `seen`, its device as it is now.
    /// Nothing is to be written if all is so already.
    ///
    /// # Errors
    /// If it was handed out or dropped meanwhile. What is a VM's is for its launcher to renew.
    pub fn adopt_spare(
        &self,
        id: &LeaseId,
        seen: &Seen,
        now: &Moment,
    ) -> Result<(Lease, Vec<Change>), BookError> {
        if !self.get(id).is_some_and(Lease::is_spare) {
            return Err(BookError::NoSpare(id.clone()));
        }
        self.renew(id, None, Some(seen), now)
    }

    /// A spare is not wanted any more: Granted → Releasing. Nothing if it was handed out, or is not there yet.
    pub fn drop_spare(&self, id: &LeaseId, now: &Moment) -> Vec<Change> {
        let mut draft = Draft::on(self);
        if let Some(lease) = self.get(id).filter(|lease| lease.is_spare()) {
            draft.release(lease, false, now);
        }
        draft.changes
    }

    /// A request that came before: whether it may be answered as if it came for the first time.
    fn expect_open(&self, ask: &Ask) -> Result<(), BookError> {
        let Some((id, known)) = ask.request.as_ref().and_then(|id| Some((id, self.request(id)?))) else {
            return Ok(());
        };
        let reused = |what| Err(BookError::RequestReused { request: id.clone(), what });
        if known.kind != Kind::Acquire {
            return reused("call");
        }
        if known.vm != ask.vm {
            return reused("VM");
        }
        let Some(lease) = &known.lease else { return Ok(()) };
        match self.get(lease) {
            Some(lease) if lease.is_held() && lease.spec != ask.spec => reused("spec"),
            Some(lease) if lease.is_held() => Ok(()),
            _ => Err(BookError::RequestOver { request: id.clone(), lease: lease.clone() }),
        }
    }

    /// Confirms that the VM has the lease that it was found to hold, with `seen`, its devices as they are now: a Suspect one is
    /// Granted again, its time begins anew, the request is remembered. Nothing is to be written if all is so already.
    ///
    /// # Errors
    /// If it was released meanwhile, or is not granted yet.
    pub fn keep(
        &self,
        ask: &Ask,
        id: &LeaseId,
        seen: Option<&Seen>,
        now: &Moment,
    ) -> Result<(Lease, Vec<Change>), BookError> {
        self.expect_open(ask)?;
        let mut draft = Draft::on(self);
        let lease = self.renewed(&mut draft, id, ask.ttl, seen, now)?;
        let known = ask.request.as_ref().is_none_or(|request| self.request(request).is_some());
        if !known {
            draft.answer(ask.request.as_ref(), Kind::Acquire, &ask.vm, Some(id));
        }
        Ok((lease, draft.changes))
    }

    /// Granted or Suspect → Granted, with `ttl` (the one that it has, if `None`) from now on, and with `seen`, its devices as
    /// they are now. Nothing is to be written if nothing changes by it, nor of a spare that nobody has looked at.
    ///
    /// # Errors
    /// If it is gone, was released, has failed, or is not granted yet.
    pub fn renew(
        &self,
        id: &LeaseId,
        ttl: Option<Ttl>,
        seen: Option<&Seen>,
        now: &Moment,
    ) -> Result<(Lease, Vec<Change>), BookError> {
        let mut draft = Draft::on(self);
        let lease = self.renewed(&mut draft, id, ttl, seen, now)?;
        Ok((lease, draft.changes))
    }

    fn renewed(
        &self,
        draft: &mut Draft<'_>,
        id: &LeaseId,
        ttl: Option<Ttl>,
        seen: Option<&Seen>,
        now: &Moment,
    ) -> Result<Lease, BookError> {
        let lease = self.get(id).ok_or_else(|| BookError::Gone(id.clone()))?;
        let mut grant = match &lease.state {
            State::Preparing => return Err(BookError::StillPreparing(id.clone())),
            State::Releasing { abandoned: true, .. } => return Err(BookError::Abandoned(id.clone())),
            State::Releasing { .. } | State::Failed { .. } => return Err(BookError::Released(id.clone())),
            State::Granted(grant) | State::Suspect { grant, .. } => grant.clone(),
        };
        // Who has not looked at a spare cannot say that it is one in this boot.
        if lease.vm.is_spare() && seen.is_none() {
            return Ok(lease.clone());
        }
        let ttl = ttl.or(lease.term.ttl).filter(|_| lease.vm.is_vm());
        let term = Term { ttl, boot: now.boot, until: None }.begun(now);
        // Numbers change when a device is activated again.
        if let Some(seen) = seen {
            grant.device = seen.root.clone();
            if let (Some(scratch), Some(seen)) = (&mut grant.scratch, &seen.scratch) {
                scratch.device = seen.clone();
            }
        }
        let state = State::Granted(grant);
        if state == lease.state && term == lease.term {
            return Ok(lease.clone());
        }
        Ok(draft.put(&Lease { term, ..lease.clone() }, state))
    }

    /// Preparing → Granted. Not if it was released meanwhile, nor if a device is another lease's and not shared, or not the
    /// one that is.
    ///
    /// # Errors
    /// In these cases.
    pub fn grant(&self, id: &LeaseId, grant: Grant, now: &Moment) -> Result<(Lease, Vec<Change>), BookError> {
        let preparing = self.get(id).filter(|lease| lease.state == State::Preparing);
        let lease = preparing.ok_or_else(|| BookError::NotPreparing(id.clone()))?;
        let root = Some((&grant.device.dm_name, lease.root()));
        let scratch = grant.scratch.as_ref().map(|scratch| (&scratch.device.dm_name, id));
        for (device, whose) in root.into_iter().chain(scratch) {
            let owner = self.owner_of(device);
            let is_shared = || owner.is_some() && self.get(whose).is_some_and(Lease::is_held);
            if whose != id && !is_shared() {
                return Err(BookError::NotShared { device: device.clone(), asked: id.clone() });
            }
            if let Some(owner) = owner.filter(|owner| *owner != whose) {
                let (device, owner, asked) = (device.clone(), owner.clone(), id.clone());
                return Err(BookError::DeviceTaken { device, owner, asked });
            }
        }
        let mut draft = Draft::on(self);
        let begun = Lease { term: lease.term.begun(now), ..lease.clone() };
        let lease = draft.put(&begun, State::Granted(Box::new(grant)));
        Ok((lease, draft.changes))
    }

    /// Preparing → a spare that is Granted: nobody is there any more to be told of it. Its request may be made again.
    ///
    /// # Errors
    /// As [`Self::grant`]; and if it is no disk that could be anybody's.
    pub fn shelve(
        &self,
        id: &LeaseId,
        grant: Grant,
        now: &Moment,
    ) -> Result<(Lease, Vec<Change>), BookError> {
        let (granted, _) = self.grant(id, grant, now)?;
        let is_plain =
            granted.vm.is_vm() && granted.shares.is_none() && granted.spec.mode == Mode::CopyOnWrite;
        if !is_plain {
            return Err(BookError::NoSpare(id.clone()));
        }
        let mut draft = Draft::on(self);
        // To whoever knows it as the VM's, it has gone.
        draft.bury(self.get(id).unwrap_or(&granted));
        let spec = Spec { tenant: Tenant::default(), ..granted.spec.clone() };
        let term = Term { ttl: None, boot: now.boot, until: None };
        let spare = Lease { vm: VmId::of_spare(id), spec, term, ..granted.clone() };
        let lease = draft.put(&spare, granted.state.clone());
        if let Some(request) = self.request_of(id) {
            draft.changes.push(Change::Request(request.clone(), None));
        }
        Ok((lease, draft.changes))
    }

    /// Preparing → Failed, and its request may be made again; what was to be shared, or a spare, is released, for nobody asks
    /// after it.
    /// Nothing if it was released meanwhile, or is gone.
    pub fn fail(&self, id: &LeaseId, failure: Failure, now: &Moment) -> Vec<Change> {
        let Some(lease) = self.get(id).filter(|lease| lease.state == State::Preparing) else {
            return Vec::new();
        };
        let mut draft = Draft::on(self);
        if !lease.vm.is_vm() {
            draft.release(lease, false, now);
            return draft.changes;
        }
        if let (Some(oldest), FAILURES_KEPT..) = self.failures() {
            draft.see(oldest, now);
        }
        draft.unshare(lease, now);
        let alone = Lease { shares: None, ..lease.clone() };
        draft.put(&alone, State::Failed { failure, since: now.wall, cleared: false });
        if let Some(request) = self.request_of(id) {
            draft.changes.push(Change::Request(request.clone(), None));
        }
        draft.changes
    }

    /// What is shared is not what it was: Granted → Releasing, so that the next to ask has it made anew. It stays as long as
    /// others name it. Nothing if it is no such lease, or not granted.
    pub fn retire(&self, id: &LeaseId, now: &Moment) -> Vec<Change> {
        let mut draft = Draft::on(self);
        let shared = |lease: &&Lease| lease.vm.is_image() && matches!(lease.state, State::Granted(_));
        if let Some(lease) = self.get(id).filter(shared) {
            draft.release(lease, false, now);
        }
        draft.changes
    }

    /// Failed → gone: somebody has been told why.
    pub fn see(&self, id: &LeaseId, now: &Moment) -> Vec<Change> {
        let mut draft = Draft::on(self);
        if let Some(lease) = self.get(id) {
            draft.see(lease, now);
        }
        draft.changes
    }

    /// What a launcher gives back → Releasing; what has failed is seen. A request that came before changes nothing.
    ///
    /// # Errors
    /// If the request id was used for something else.
    pub fn release(&self, ask: &Release, now: &Moment) -> Result<(Releasing, Vec<Change>), BookError> {
        if let Some((id, known)) = ask.request.as_ref().and_then(|id| Some((id, self.request(id)?))) {
            let reused = |what| Err(BookError::RequestReused { request: id.clone(), what });
            if known.kind != Kind::Release {
                return reused("call");
            }
            if known.vm != ask.vm {
                return reused("VM");
            }
            let lease = known.lease.as_ref().and_then(|lease| self.get(lease));
            let again = lease.map_or(Releasing::Nothing, |lease| Releasing::Again(Box::new(lease.clone())));
            return Ok((again, Vec::new()));
        }
        let found = match &ask.lease {
            Some(id) => self.get(id).filter(|lease| lease.vm == ask.vm),
            None => self.of_vm(&ask.vm),
        };
        let found =
            found.filter(|lease| ask.generation.is_none_or(|generation| lease.generation == generation));
        let mut draft = Draft::on(self);
        let outcome = match found {
            None => Releasing::Nothing,
            Some(lease) if lease.is_held() => {
                Releasing::Now(Box::new(draft.release(lease, ask.abandon, now)))
            }
            Some(lease) => {
                draft.see(lease, now);
                if let (true, State::Releasing { grant, since, abandoned: false }) =
                    (ask.abandon, &lease.state)
                {
                    let (grant, since) = (grant.clone(), *since);
                    draft.put(lease, State::Releasing { grant, since, abandoned: true });
                }
                Releasing::Again(Box::new(lease.clone()))
            }
        };
        draft.answer(ask.request.as_ref(), Kind::Release, &ask.vm, found.map(|lease| &lease.id));
        Ok((outcome, draft.changes))
    }

    /// Every lease whose time is over, or that an earlier boot has left, → Suspect, with its grace from now on.
    pub fn suspect(&self, grace: Grace, now: &Moment) -> Vec<Change> {
        let mut draft = Draft::on(self);
        for lease in self.after(None) {
            let Some(why) = lease.suspicion(now) else { continue };
            // The grace of an earlier boot is over with that boot, and begins anew.
            let why = match &lease.state {
                State::Suspect { boot, .. } if *boot == now.boot => continue,
                State::Suspect { .. } => Suspicion::EarlierBoot,
                _ => why,
            };
            let Some(grant) = lease.grant().cloned() else { continue };
            let since = match &lease.state {
                State::Suspect { since, .. } => *since,
                _ => now.wall,
            };
            let grace = match why {
                Suspicion::Expired => grace.expired,
                Suspicion::EarlierBoot => grace.boot,
            };
            let (boot, until) = (now.boot, now.up.after(grace));
            draft.put(lease, State::Suspect { grant: Box::new(grant), why, since, boot, until });
        }
        draft.changes
    }

    /// Suspect, with its grace over → Releasing. The caller has seen that its device is closed. Nothing if it was renewed
    /// meanwhile.
    pub fn give_up_on(&self, id: &LeaseId, now: &Moment) -> Vec<Change> {
        let mut draft = Draft::on(self);
        if let Some(lease) = self.get(id).filter(|lease| lease.is_overdue(now)) {
            draft.release(lease, false, now);
        }
        draft.changes
    }

    /// Its remains are cleared away: Releasing → gone; of a Failed one the record stays. Nothing if it is so already, or
    /// others share it still. What nobody shares any more is released.
    ///
    /// # Errors
    /// If it is held.
    pub fn remove(&self, id: &LeaseId, now: &Moment) -> Result<Vec<Change>, BookError> {
        let mut draft = Draft::on(self);
        let Some(lease) = self.get(id) else { return Ok(Vec::new()) };
        match &lease.state {
            // Those that share it name it until they are gone themselves.
            State::Releasing { .. } if self.sharers(id) > 0 => {}
            State::Releasing { .. } => draft.delete(lease, now),
            State::Failed { cleared: true, .. } => {}
            State::Failed { failure, since, cleared: false } => {
                draft.put(lease, State::Failed { failure: failure.clone(), since: *since, cleared: true });
            }
            State::Preparing | State::Granted(_) | State::Suspect { .. } => {
                return Err(BookError::NotReleasing(id.clone()));
            }
        }
        Ok(draft.changes)
    }
}

impl Term {
    /// From now on.
    pub(crate) fn begun(self, now: &Moment) -> Self {
        Self { ttl: self.ttl, boot: now.boot, until: self.ttl.map(|ttl| now.up.after(ttl)) }
    }
}

fn differences(held: &Spec, asked: &Spec) -> Vec<Difference> {
    let scratch = |spec: &Spec| spec.scratch.map_or_else(|| "none".to_owned(), |scratch| scratch.to_string());
    let fields = [
        ("image", held.image.clone(), asked.image.clone()),
        ("platform", held.platform.clone(), asked.platform.clone()),
        ("tenant", held.tenant.to_string(), asked.tenant.to_string()),
        ("mode", held.mode.as_str().to_owned(), asked.mode.as_str().to_owned()),
        ("scratch", scratch(held), scratch(asked)),
    ];
    fields
        .into_iter()
        .filter(|(_, held, asked)| held != asked)
        .map(|(field, held, asked)| Difference { field, held, asked })
        .collect()
}
