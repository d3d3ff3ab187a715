//! How what VMs share comes to be: who wants it first has it made, the others wait for that, and then each is granted it.
//!
//! ```text
//!  look ─► granted ───────────────────────────────────────────────────────► all who wait are told
//!    │ └─► being released ────────────────────────────────────────────────►
//!    └───► intended ─► containerd lease ─► View ─► verify, confirm ────────►
//! ```

use super::{
    asks::Wish,
    desk::{Answer, Desk, Op},
    flaws::{BookFlaw, Flaw},
    view::Stand,
    world::{Call, Disk, Flight, World},
};

impl World {
    /// Waits for what its lease shares.
    pub(super) fn join(&mut self, desk: &Desk, call: Call) -> Call {
        let Some((wish, lease)) = call.makes() else { return call };
        let Some(shared) = desk.shared_by(self.book, lease) else { return Call::Unshared(wish, lease) };
        if self.flights.iter().all(|flight| flight.provides() != Some(shared))
            && let Some(flight) = self.flights.iter_mut().find(|flight| **flight == Flight::None)
        {
            *flight = Flight::Begun(shared);
        }
        Call::Waiting(wish, lease, shared)
    }

    /// Who waits does nothing.
    pub(super) fn wait(&self, call: Call, flaw: Option<Flaw>) -> Call {
        let Call::Waiting(wish, lease, shared) = call else { return call };
        let hurries = flaw == Some(Flaw::Book(BookFlaw::GrantsWhatIsNotSharedYet));
        if hurries && self.device_of(shared).is_some() { Call::Shared(wish, lease) } else { call }
    }

    pub(super) fn provide(
        &mut self,
        desk: &mut Desk,
        flight: Flight,
        flaw: Option<Flaw>,
    ) -> Result<Flight, String> {
        match flight {
            Flight::None => Ok(Flight::None),
            Flight::Begun(shared) => Ok(self.look_at_what_is_shared(desk, shared)),
            Flight::Making(shared) => {
                self.containerd_leases |= 1 << shared;
                Ok(Flight::Leased(shared))
            }
            Flight::Leased(shared) => {
                self.view(desk, shared, flaw)?;
                Ok(Flight::Viewed(shared))
            }
            Flight::Viewed(shared) => self.confirm_what_is_shared(desk, shared),
        }
    }

    fn look_at_what_is_shared(&mut self, desk: &Desk, shared: u8) -> Flight {
        let lease = desk.view(self.book).get(shared);
        if lease.is_some_and(|lease| lease.stand == Stand::Preparing) {
            return Flight::Making(shared);
        }
        let is_granted = lease.is_some_and(|lease| lease.is_granted());
        self.land(shared, if is_granted { Call::Shared } else { Call::Unshared })
    }

    fn view(&mut self, desk: &Desk, shared: u8, flaw: Option<Flaw>) -> Result<(), String> {
        if self.device_of(shared).is_some() {
            return Err("what is to be shared is half made already".into());
        }
        let image = desk.view(self.book).get(shared).map_or(0, |lease| lease.image);
        let read_only = flaw != Some(Flaw::SharesWhatCanBeWritten);
        self.disks[usize::from(shared)] = Some(Disk { lease: shared, image, marks: 0, read_only });
        Ok(())
    }

    fn confirm_what_is_shared(&mut self, desk: &mut Desk, shared: u8) -> Result<Flight, String> {
        let Some((device, disk)) = self.disk_of(shared) else {
            return Err("what is being made is removed".into());
        };
        let grant = Op::Grant { lease: shared, device, image: disk.image, scratch: None };
        if self.ask(desk, grant)? == Answer::Done {
            return Ok(self.land(shared, Call::Shared));
        }
        // Nobody wanted it any more.
        self.fail_to_provide(desk, shared)
    }

    pub(super) fn fail_to_provide(&mut self, desk: &mut Desk, shared: u8) -> Result<Flight, String> {
        self.ask(desk, Op::Fail(shared))?;
        Ok(self.land(shared, Call::Unshared))
    }

    /// Tells all who wait for it what has become of it.
    fn land(&mut self, shared: u8, outcome: fn(Wish, u8) -> Call) -> Flight {
        for call in &mut self.calls {
            if let Call::Waiting(wish, lease, awaited) = *call
                && awaited == shared
            {
                *call = outcome(wish, lease);
            }
        }
        Flight::None
    }
}
