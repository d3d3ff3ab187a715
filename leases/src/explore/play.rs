//! What every step does, and what it must not do to what somebody was promised.

use super::{
    asks::{Return, Which, Wish},
    desk::{Answer, BOOT_GRACE_STEPS, Clock, Desk, EXPIRED_GRACE_STEPS, Op, TTL_STEPS},
    flaws::Flaw,
    reclaiming::is_left_half_made,
    view::{LeaseView, Stand},
    world::{CLIENTS, Call, Disk, Flight, MOST_FLIGHTS, Promise, Reclaimer, Refiller, Step, World},
};

impl World {
    /// The world after the step. Fails if somebody was promised otherwise.
    pub(super) fn after(mut self, desk: &mut Desk, step: Step, flaw: Option<Flaw>) -> Result<Self, String> {
        match step {
            Step::Acquire(wish) => self.acquire(desk, wish)?,
            Step::Choose(wish, spare) => self.choose(desk, wish, spare)?,
            Step::Proceed(client) => self.calls[client] = self.proceed(desk, self.calls[client], flaw)?,
            Step::Fail(client) => {
                let call = std::mem::replace(&mut self.calls[client], Call::None);
                call.makes().into_iter().try_for_each(|(_, lease)| self.fail(desk, lease))?;
            }
            Step::Provide(n) => self.flights[n] = self.provide(desk, self.flights[n], flaw)?,
            Step::FailToProvide(n) => {
                if let Some(shared) = self.flights[n].provides() {
                    self.flights[n] = self.fail_to_provide(desk, shared)?;
                }
            }
            Step::MakeSpare => self.make_spare(desk)?,
            Step::LookAtSpare(lease) => self.look_at_spare(desk, lease),
            Step::Refill => self.refiller = self.refill(desk, flaw)?,
            Step::FailToRefill => self.fail_to_refill(desk)?,
            Step::DropSpare(lease) => self.drop_spare(desk, lease)?,
            Step::Release(back) => self.release(desk, back)?,
            Step::Renew(lease) => self.renew(desk, lease)?,
            Step::Open(vm, device) => self.open(vm, device),
            Step::Close(vm) => self.launchers[vm].open = None,
            Step::TimePasses => self.clock.up += 1,
            Step::Crash => self.crash(desk, flaw)?,
            Step::PowerCut => {
                self.clock = Clock { boot: self.clock.boot + 1, up: 0 };
                self.launchers.iter_mut().for_each(|launcher| launcher.open = None);
                self.crash(desk, flaw)?;
            }
            Step::Suspect => drop(self.ask(desk, Op::Suspect)?),
            Step::Look(lease) => self.look(desk, lease, flaw)?,
            Step::Reclaim => self.reclaimer = self.reclaim(desk, flaw)?,
        }
        // It does not matter which client is which, nor which flight.
        self.calls.sort_unstable();
        self.flights.sort_unstable();
        Ok(self)
    }

    pub(super) fn ask(&mut self, desk: &mut Desk, op: Op) -> Result<Answer, String> {
        let (book, answer) = desk.ask(self.book, op, self.clock)?;
        self.book = book;
        Ok(answer)
    }

    /// And starts again: what was half made is given up before anything is served.
    fn crash(&mut self, desk: &mut Desk, flaw: Option<Flaw>) -> Result<(), String> {
        self.calls = [Call::None; CLIENTS];
        self.flights = [Flight::None; MOST_FLIGHTS];
        self.refiller = Refiller::Idle;
        self.reclaimer = Reclaimer::Idle;
        self.ask(desk, Op::Load)?;
        let leases = desk.view(self.book).leases.iter();
        let half_made: Vec<u8> =
            leases.filter(|lease| is_left_half_made(lease, flaw)).map(|lease| lease.lease).collect();
        let mut backwards = *self;
        half_made.iter().rev().try_for_each(|lease| backwards.fail(desk, *lease))?;
        half_made.iter().try_for_each(|lease| self.fail(desk, *lease))?;
        if *self == backwards { Ok(()) } else { Err("it matters what is given up first".into()) }
    }

    fn open(&mut self, vm: usize, device: u8) {
        let Some(disk) = &mut self.disks[usize::from(device)] else { return };
        self.launchers[vm].open = Some(device);
        if disk.read_only {
            return;
        }
        disk.marks |= 1 << vm;
        if let Some(promise) = self.promises[vm].as_mut().filter(|promise| promise.lease == disk.lease) {
            promise.written = true;
        }
    }

    fn acquire(&mut self, desk: &mut Desk, wish: Wish) -> Result<(), String> {
        let (known, replaces) = (self.known(wish), self.replaces(wish));
        let call = match self.ask(desk, Op::Acquire(wish, self.made))? {
            Answer::New(lease) => {
                self.made = lease + 1;
                self.get(wish, lease)?;
                Call::Intended(wish, lease)
            }
            Answer::Existing(_) if replaces => return Err("a fresh disk is asked for, and not made".into()),
            Answer::Existing(lease) if known.is_some_and(|known| known != lease) => {
                return Err("a request that came again gets another lease".into());
            }
            Answer::Existing(lease) => Call::Found(wish, lease),
            Answer::Refused if known.is_none() && !desk.view(self.book).holds(wish.vm) => {
                return Err("a VM that has nothing is refused a disk".into());
            }
            Answer::Done | Answer::Refused => return Ok(()),
        };
        if let Some(client) = self.calls.iter_mut().find(|call| **call == Call::None) {
            *client = call;
        }
        Ok(())
    }

    /// What this request has got before.
    fn known(&self, wish: Wish) -> Option<u8> {
        self.acquired[usize::from(wish.vm)].filter(|_| wish.named)
    }

    /// Whether what the VM has is replaced by this.
    fn replaces(&self, wish: Wish) -> bool {
        let doubtful =
            self.promises[usize::from(wish.vm)].is_some_and(|promise| promise.is_doubtful(self.clock));
        wish.fresh && self.known(wish).is_none() && doubtful
    }

    /// The wish gets a lease that the VM did not have.
    pub(super) fn get(&mut self, wish: Wish, lease: u8) -> Result<(), String> {
        let vm = usize::from(wish.vm);
        if self.known(wish).is_some() {
            return Err("a request that came again makes a lease".into());
        }
        if self.promises[vm].is_some() && !self.replaces(wish) {
            return Err("a VM gets a second lease".into());
        }
        self.promises[vm] = None;
        if wish.named {
            self.acquired[vm] = Some(lease);
        }
        Ok(())
    }

    fn proceed(&mut self, desk: &mut Desk, call: Call, flaw: Option<Flaw>) -> Result<Call, String> {
        let unleased = flaw == Some(Flaw::PreparesUnleased);
        match call {
            Call::None => {}
            Call::Intended(wish, _) if wish.shares() => return Ok(self.join(desk, call)),
            Call::Waiting(..) => return Ok(self.wait(call, flaw)),
            Call::Shared(wish, lease) if !wish.has_scratch() => self.confirm(desk, wish, lease)?,
            Call::Unshared(_, lease) => self.fail(desk, lease)?,
            Call::Intended(wish, lease) | Call::Shared(wish, lease) => {
                if unleased {
                    self.prepare(wish, lease, flaw);
                } else {
                    self.containerd_leases |= 1 << lease;
                }
                return Ok(Call::Leased(wish, lease));
            }
            Call::Leased(wish, lease) => {
                if unleased {
                    self.containerd_leases |= 1 << lease;
                } else {
                    self.prepare(wish, lease, flaw);
                }
                return Ok(Call::Prepared(wish, lease));
            }
            Call::Prepared(wish, lease) if flaw == Some(Flaw::AnswersBeforeItWrites) => {
                self.promise(wish.vm, lease)?;
            }
            Call::Prepared(wish, lease) => self.confirm(desk, wish, lease)?,
            Call::Chosen(wish, spare) => self.hand_out(desk, (wish, spare), flaw)?,
            Call::Found(wish, lease) if flaw == Some(Flaw::AnswersWhatItFound) => {
                self.promise(wish.vm, lease)?;
            }
            Call::Found(wish, lease) => self.keep(desk, wish, lease)?,
        }
        Ok(Call::None)
    }

    fn prepare(&mut self, wish: Wish, lease: u8, flaw: Option<Flaw>) {
        let free = self.disks.iter().position(Option::is_none);
        let name = if flaw == Some(Flaw::UsesNamesAgain) { free } else { Some(usize::from(lease)) };
        let disk = Disk { lease, image: wish.image(), marks: 0, read_only: false };
        name.into_iter().for_each(|name| self.disks[name] = Some(disk));
    }

    fn confirm(&mut self, desk: &mut Desk, wish: Wish, lease: u8) -> Result<(), String> {
        let root = if wish.shares() { desk.shared_by(self.book, lease) } else { Some(lease) };
        // Who has failed meanwhile shares nothing any more.
        let Some(root) = root else { return self.fail(desk, lease) };
        let Some((device, disk)) = self.disk_of(root) else {
            return Err("what is being made is removed".into());
        };
        let scratch = self.device_of(lease).filter(|_| wish.has_scratch());
        if wish.has_scratch() && scratch.is_none() {
            return Err("what is being made is removed".into());
        }
        if self.ask(desk, Op::Grant { lease, device, image: disk.image, scratch })? == Answer::Done {
            let given = [Some(device), scratch].into_iter().flatten().fold(0, |bits, n| bits | 1 << n);
            self.launchers[usize::from(wish.vm)].given |= given;
            return self.promise(wish.vm, lease);
        }
        // It was released meanwhile, or the device is another's.
        self.fail(desk, lease)
    }

    fn keep(&mut self, desk: &mut Desk, wish: Wish, lease: u8) -> Result<(), String> {
        if self.ask(desk, Op::Keep(wish, lease))? == Answer::Done {
            if wish.named {
                self.acquired[usize::from(wish.vm)].get_or_insert(lease);
            }
            self.promise(wish.vm, lease)?;
        }
        Ok(())
    }

    /// From now on, its VM has it.
    pub(super) fn promise(&mut self, vm: u8, lease: u8) -> Result<(), String> {
        let before = self.promises[usize::from(vm)];
        if before.is_some_and(|before| before.lease != lease) {
            return Err("a VM has two leases".into());
        }
        self.promises[usize::from(vm)] = Some(Promise {
            lease,
            boot: self.clock.boot,
            until: (vm == 0).then_some(self.clock.up + TTL_STEPS),
            written: before.is_some_and(|before| before.written),
        });
        Ok(())
    }

    pub(super) fn fail(&mut self, desk: &mut Desk, lease: u8) -> Result<(), String> {
        self.ask(desk, Op::Fail(lease))?;
        let failed = desk.view(self.book).get(lease).is_some_and(|l| matches!(l.stand, Stand::Failed { .. }));
        for acquired in self.acquired.iter_mut().filter(|acquired| failed && **acquired == Some(lease)) {
            // It may be made again.
            *acquired = None;
        }
        Ok(())
    }

    fn release(&mut self, desk: &mut Desk, back: Return) -> Result<(), String> {
        let (vm, book) = (usize::from(back.vm), self.book);
        self.ask(desk, Op::Release(back))?;
        if back.named && std::mem::replace(&mut self.given_back[vm], true) {
            let same = self.book == book;
            return if same { Ok(()) } else { Err("a release that came again changes something".into()) };
        }
        let meant = |lease: &LeaseView| match back.which {
            Which::Any => lease.vm == back.vm,
            Which::Lease(only) => lease.vm == back.vm && lease.lease == only,
            Which::Generation(only) => lease.vm == back.vm && lease.generation == u64::from(only),
        };
        for before in desk.view(book).leases.iter().filter(|lease| lease.is_held()) {
            let held = desk.view(self.book).get(before.lease).is_some_and(|lease| lease.is_held());
            match (meant(before), held) {
                (true, true) => return Err(format!("lease {} was released and is held", before.lease)),
                (false, false) => return Err(format!("lease {} goes with another's release", before.lease)),
                _ => {}
            }
        }
        self.promises[vm].take_if(|promise| desk.view(book).get(promise.lease).is_some_and(meant));
        Ok(())
    }

    fn renew(&mut self, desk: &mut Desk, lease: u8) -> Result<(), String> {
        let whose = self.promises.iter().position(|promise| promise.is_some_and(|p| p.lease == lease));
        let of_no_vm =
            desk.view(self.book).get(lease).is_some_and(|lease| lease.is_of_image() || lease.is_spare());
        match (self.ask(desk, Op::Renew(lease))?, whose) {
            (Answer::Done, Some(vm)) => self.promise(vm as u8, lease),
            (Answer::Done, None) if !of_no_vm => Err("a lease is renewed that is nobody's any more".into()),
            (Answer::Done, None) => Ok(()),
            (_, Some(_)) => Err("a lease that was promised cannot be renewed".into()),
            (_, None) => Ok(()),
        }
    }
}

impl Promise {
    /// Whether its VM may ask for another disk instead.
    fn is_doubtful(&self, now: Clock) -> bool {
        self.boot != now.boot || self.until.is_some_and(|until| until <= now.up)
    }

    /// Whether it has to be kept no longer, if the device is closed.
    pub(super) fn is_over(&self, now: Clock) -> bool {
        if self.boot == now.boot {
            self.until.is_some_and(|until| until + EXPIRED_GRACE_STEPS <= now.up)
        } else {
            BOOT_GRACE_STEPS <= now.up
        }
    }
}
