//! How spares are made, looked at, handed out and dropped.
//!
//! ```text
//!  make: intended ─► containerd lease ─► Prepare ─► verify, confirm ─► a spare ◄─ look, adopt: of an earlier run
//!  acquire: choose, look ─► hand out: the VM's, if it is a spare still       └──► drop
//! ```

use super::{
    asks::Wish,
    desk::{Answer, Desk, Op},
    flaws::Flaw,
    view::LeaseView,
    world::{Bounds, Call, Disk, Refiller, Step, World},
};

/// The image that spares are made of.
const IMAGE: u8 = 0;

impl World {
    pub(super) fn refillers_steps(&self, desk: &Desk, bounds: Bounds, steps: &mut Vec<Step>) {
        if bounds.spares == 0 {
            return;
        }
        let leases = &desk.view(self.book).leases;
        let spares = || leases.iter().filter(|lease| lease.is_spare() && lease.is_held());
        match self.refiller {
            Refiller::Idle => {
                if spares().count() < usize::from(bounds.spares) {
                    steps.push(Step::MakeSpare);
                }
                steps.extend(spares().map(|lease| Step::LookAtSpare(lease.lease)));
            }
            Refiller::Seen(_) => steps.push(Step::Refill),
            Refiller::Intended(_) | Refiller::Leased(_) | Refiller::Prepared(_) => {
                steps.extend([Step::Refill, Step::FailToRefill]);
            }
        }
        steps.extend(leases.iter().map(|lease| Step::DropSpare(lease.lease)));
    }

    /// Those that nobody has looked at since the boot. What finds them does so by itself.
    pub(super) fn spares_to_look_at(&self, desk: &Desk) -> Vec<Step> {
        let leases = desk.view(self.book).leases.iter();
        let unseen = leases.filter(|lease| lease.is_spare() && !self.is_seen(lease));
        unseen.map(|lease| Step::LookAtSpare(lease.lease)).collect()
    }

    /// Whether the numbers of its device are those of this boot.
    fn is_seen(&self, spare: &LeaseView) -> bool {
        spare.granted().is_some_and(|granted| granted.numbers == self.clock.boot)
    }

    pub(super) fn make_spare(&mut self, desk: &mut Desk) -> Result<(), String> {
        let lease = self.made;
        if self.ask(desk, Op::IntendSpare(lease))? != Answer::Done {
            return Err("a spare cannot be made".into());
        }
        self.made += 1;
        self.refiller = Refiller::Intended(lease);
        Ok(())
    }

    pub(super) fn look_at_spare(&mut self, desk: &Desk, lease: u8) {
        let is_there = desk.view(self.book).get(lease).is_some_and(LeaseView::is_granted);
        if self.refiller == Refiller::Idle && is_there && self.device_of(lease).is_some() {
            self.refiller = Refiller::Seen(lease);
        }
    }

    pub(super) fn refill(&mut self, desk: &mut Desk, flaw: Option<Flaw>) -> Result<Refiller, String> {
        match self.refiller {
            Refiller::Idle => {}
            Refiller::Intended(lease) => {
                self.containerd_leases |= 1 << lease;
                return Ok(Refiller::Leased(lease));
            }
            Refiller::Leased(lease) => {
                let disk = Disk { lease, image: IMAGE, marks: 0, read_only: false };
                self.disks[usize::from(lease)] = Some(disk);
                return Ok(Refiller::Prepared(lease));
            }
            Refiller::Prepared(lease) => self.confirm_spare(desk, lease)?,
            Refiller::Seen(lease) => self.adopt(desk, lease, flaw)?,
        }
        Ok(Refiller::Idle)
    }

    fn confirm_spare(&mut self, desk: &mut Desk, lease: u8) -> Result<(), String> {
        let Some((device, disk)) = self.disk_of(lease) else {
            return Err("what is being made is removed".into());
        };
        let grant = Op::Grant { lease, device, image: disk.image, scratch: None };
        if self.ask(desk, grant)? != Answer::Done {
            return Err("a spare that is made is refused".into());
        }
        Ok(())
    }

    fn adopt(&mut self, desk: &mut Desk, lease: u8, flaw: Option<Flaw>) -> Result<(), String> {
        let is_spare = desk.view(self.book).get(lease).is_some_and(LeaseView::is_spare);
        // Its device may be gone with it.
        let device = self.device_of(lease).unwrap_or(lease);
        let op = if flaw == Some(Flaw::RenewsWhatItAdopts) {
            Op::Renew(lease)
        } else {
            Op::Adopt { lease, device }
        };
        if self.ask(desk, op)? == Answer::Done && !is_spare {
            return Err("the lease of a VM is renewed by somebody who looks for spares".into());
        }
        Ok(())
    }

    pub(super) fn fail_to_refill(&mut self, desk: &mut Desk) -> Result<(), String> {
        let made = self.refiller.makes();
        self.refiller = Refiller::Idle;
        made.into_iter().try_for_each(|lease| self.fail(desk, lease))
    }

    /// An acquire that would have a disk made takes whatever there is instead, if its device is there.
    pub(super) fn choose(&mut self, desk: &mut Desk, wish: Wish, lease: u8) -> Result<(), String> {
        let is_there = desk.view(self.book).get(lease).is_some_and(|lease| lease.granted().is_some());
        if !is_there || self.device_of(lease).is_none() {
            return Ok(());
        }
        if let Answer::New(_) = desk.ask(self.book, Op::Acquire(wish, self.made), self.clock)?.1
            && let Some(client) = self.calls.iter_mut().find(|call| **call == Call::None)
        {
            *client = Call::Chosen(wish, lease);
        }
        Ok(())
    }

    pub(super) fn hand_out(
        &mut self,
        desk: &mut Desk,
        (wish, lease): (Wish, u8),
        flaw: Option<Flaw>,
    ) -> Result<(), String> {
        let device = self.device_of(lease).unwrap_or(lease);
        let is_seen = desk.view(self.book).get(lease).is_some_and(|spare| self.is_seen(spare));
        let unasked = flaw == Some(Flaw::HandsOutUnasked);
        if !unasked && self.ask(desk, Op::HandOut { wish, lease, device })? != Answer::New(lease) {
            return Ok(());
        }
        if !is_seen {
            return Err("a spare is handed out that nobody has looked at in this boot".into());
        }
        self.expect_unused(lease)?;
        self.get(wish, lease)?;
        self.launchers[usize::from(wish.vm)].given |= 1 << device;
        self.promise(wish.vm, lease)
    }

    fn expect_unused(&self, lease: u8) -> Result<(), String> {
        let Some((device, disk)) = self.disk_of(lease) else {
            return Err("a spare is handed out that is not there".into());
        };
        if self.launchers.iter().any(|launcher| launcher.given & (1 << device) != 0) {
            return Err("a spare is handed out twice".into());
        }
        if disk.marks == 0 { Ok(()) } else { Err("a spare is handed out that was written on".into()) }
    }

    pub(super) fn drop_spare(&mut self, desk: &mut Desk, lease: u8) -> Result<(), String> {
        self.ask(desk, Op::DropSpare(lease)).map(drop)
    }
}

impl Refiller {
    pub(super) fn makes(self) -> Option<u8> {
        match self {
            Self::Idle | Self::Seen(_) => None,
            Self::Intended(lease) | Self::Leased(lease) | Self::Prepared(lease) => Some(lease),
        }
    }
}
