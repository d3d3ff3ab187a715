//! What the reclaimer does: it looks, and what follows from that it does in steps.

use super::{
    desk::{BOOT_GRACE_STEPS, Clock, Desk, EXPIRED_GRACE_STEPS, Op, moment},
    flaws::{BookFlaw, Flaw},
    view::{LeaseView, Stand},
    world::{Promise, Reclaimer, World},
};

/// Whether it is to be given up, if nobody makes it.
pub(super) fn is_left_half_made(lease: &LeaseView, flaw: Option<Flaw>) -> bool {
    let overlooked = match flaw {
        Some(Flaw::LeavesHalfMade) => true,
        Some(Flaw::LeavesSharedHalfMade) => lease.is_of_image(),
        Some(Flaw::LeavesSparesHalfMade) => lease.is_spare(),
        _ => false,
    };
    lease.stand == Stand::Preparing && !overlooked
}

impl World {
    pub(super) fn look(&mut self, desk: &Desk, lease: u8, flaw: Option<Flaw>) -> Result<(), String> {
        let Some(found) = desk.lease(self.book, lease) else { return Ok(()) };
        let open = self.looks_open(desk, lease, flaw);
        let ahead = EXPIRED_GRACE_STEPS.max(BOOT_GRACE_STEPS) * u8::from(flaw == Some(Flaw::GivesUpEarly));
        let now = moment(Clock { up: self.clock.up + ahead, ..self.clock });
        if found.is_overdue(&now) && (!open || flaw == Some(Flaw::GivesUpOnOpenDevices)) {
            if open {
                return Err("a lease is given up whose device is open".into());
            }
            self.reclaimer = Reclaimer::Overdue(lease);
        }
        let at_work = self.is_being_made(desk, lease, flaw) && flaw != Some(Flaw::RemovesWhatIsBeingMade);
        let view = desk.view(self.book).get(lease);
        if !at_work && view.is_some_and(|lease| is_left_half_made(lease, flaw)) {
            self.reclaimer = Reclaimer::HalfMade(lease);
        }
        let shared =
            desk.sharers(self.book, lease) > 0 && flaw != Some(Flaw::Book(BookFlaw::RemovesWhatIsShared));
        if found.is_to_be_reclaimed() && !at_work && !open && !shared {
            self.reclaimer = Reclaimer::ToReclaim(lease);
        }
        Ok(())
    }

    /// What is asked before anything of this lease goes. A VM that only shares something has nothing that could be open.
    fn looks_open(&self, desk: &Desk, lease: u8, flaw: Option<Flaw>) -> bool {
        let is_shared = desk.view(self.book).get(lease).is_some_and(LeaseView::is_of_image);
        self.is_open(lease) && !(is_shared && flaw == Some(Flaw::TakesWhatIsSharedForClosed))
    }

    pub(super) fn reclaim(&mut self, desk: &mut Desk, flaw: Option<Flaw>) -> Result<Reclaimer, String> {
        Ok(match self.reclaimer {
            Reclaimer::Idle => Reclaimer::Idle,
            Reclaimer::HalfMade(lease) => {
                self.fail(desk, lease)?;
                Reclaimer::Idle
            }
            Reclaimer::Overdue(lease) => {
                self.give_up_on(desk, lease, flaw)?;
                Reclaimer::Idle
            }
            Reclaimer::ToReclaim(lease) if flaw == Some(Flaw::StrikesOffFirst) => {
                self.ask(desk, Op::Remove(lease))?;
                Reclaimer::Idle
            }
            // Who removes the device sees whether it is open, and nobody opens it meanwhile.
            Reclaimer::ToReclaim(lease)
                if self.looks_open(desk, lease, flaw) && flaw != Some(Flaw::RemovesOpenDevices) =>
            {
                Reclaimer::Idle
            }
            Reclaimer::ToReclaim(lease) => {
                self.device_of(lease).into_iter().for_each(|device| self.disks[usize::from(device)] = None);
                Reclaimer::Unsnapshotted(lease)
            }
            Reclaimer::Unsnapshotted(lease) => {
                self.containerd_leases &= !(1 << lease);
                Reclaimer::Unleased(lease)
            }
            Reclaimer::Unleased(lease) => {
                self.ask(desk, Op::Remove(lease))?;
                Reclaimer::Idle
            }
        })
    }

    fn give_up_on(&mut self, desk: &mut Desk, lease: u8, flaw: Option<Flaw>) -> Result<(), String> {
        let now = self.clock;
        if flaw == Some(Flaw::GivesUpEarly) {
            self.clock.up += EXPIRED_GRACE_STEPS.max(BOOT_GRACE_STEPS);
        }
        self.ask(desk, Op::GiveUpOn(lease))?;
        self.clock = now;
        let held = desk.view(self.book).get(lease).is_some_and(|lease| lease.is_held());
        let promised =
            |promise: &&mut Option<Promise>| !held && promise.is_some_and(|promise| promise.lease == lease);
        for promise in self.promises.iter_mut().filter(promised) {
            if promise.is_some_and(|promise| !promise.is_over(now)) {
                return Err("a lease is given up before its grace is over".into());
            }
            *promise = None;
        }
        Ok(())
    }
}
