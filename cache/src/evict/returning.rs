//! What was removed and has not come back yet.

use std::{collections::VecDeque, time::Duration};

use cowshed_gc::evict::{Kind, Room};

/// What has not come back by then is not waited for any more: somebody else has it, or it was less than promised.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where room is pressing it does not count from then on: what is written anew as fast as it comes back is never seen to come.
const PRESSING: Duration = Duration::from_secs(5);

/// Promises, the oldest first; times are since whatever moment.
#[derive(Debug, Default)]
pub(super) struct Returning {
    promised: VecDeque<(Duration, Room)>,
    /// What was in use at the last look.
    used: Option<Room>,
}

impl Returning {
    /// So much is to come back.
    pub(super) fn promise(&mut self, room: Room, now: Duration) {
        if !room.is_none() {
            self.promised.push_back((now, room));
        }
    }

    /// So much is in use now: what that is less than before has come back. Returns what is to come yet.
    pub(super) fn look(&mut self, used: Room, now: Duration) -> Room {
        let mut came = self.used.replace(used).map_or(Room::NONE, |before| before.less(used));
        self.promised.retain(|(at, _)| now.saturating_sub(*at) < PATIENCE);
        for (_, room) in &mut self.promised {
            let left = room.less(came);
            came = came.less(*room);
            *room = left;
        }
        self.promised.retain(|(_, room)| !room.is_none());
        self.outstanding()
    }

    /// What is to come yet, as of the last look.
    pub(super) fn outstanding(&self) -> Room {
        self.promised.iter().map(|(_, room)| *room).sum()
    }

    /// The same as far as it can be relied on, if room of some kinds is pressing.
    pub(super) fn reliable(&self, is_pressing: impl Fn(Kind) -> bool, now: Duration) -> Room {
        let of_late = self.promised.iter().filter(|(at, _)| now.saturating_sub(*at) < PRESSING);
        let (all, of_late) = (self.outstanding(), of_late.map(|(_, room)| *room).sum::<Room>());
        Room::each(|kind| if is_pressing(kind) { of_late.of(kind) } else { all.of(kind) })
    }
}

#[cfg(test)]
mod tests {
    use cowshed_gc::evict::Bytes;

    use super::*;

    fn room(data: u64, metadata: u64) -> Room {
        Room { data: Bytes(data), metadata: Bytes(metadata) }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_the_kernel_shows_has_come_back() {
        let mut returning = Returning::default();
        assert_eq!(returning.look(room(100, 10), at(0)), Room::NONE);
        returning.promise(room(30, 3), at(0));
        returning.promise(room(20, 0), at(1));
        assert_eq!(returning.look(room(100, 10), at(2)), room(50, 3));
        // Somebody writes meanwhile, and nothing is seen.
        assert_eq!(returning.look(room(120, 10), at(3)), room(50, 3));
        assert_eq!(returning.look(room(85, 9), at(4)), room(15, 2));
        assert_eq!(returning.look(room(60, 0), at(5)), Room::NONE, "more has come than was promised");
        assert_eq!(returning.look(room(60, 0), at(6)), Room::NONE);
    }

    #[test]
    fn what_is_promised_for_long_does_not_count_where_room_is_pressing() {
        let mut returning = Returning::default();
        returning.look(room(100, 10), at(0));
        returning.promise(room(30, 3), at(0));
        returning.promise(room(20, 2), at(3));
        for (now, data) in [(4, 50), (5, 20), (7, 20), (8, 0)] {
            assert_eq!(returning.look(room(100, 10), at(now)), room(50, 5));
            assert_eq!(returning.reliable(|kind| kind == Kind::Data, at(now)), room(data, 5), "{now}");
            assert_eq!(returning.reliable(|_| false, at(now)), room(50, 5), "{now}");
        }
    }

    #[test]
    fn what_does_not_come_is_not_waited_for_for_ever() {
        let mut returning = Returning::default();
        returning.look(room(100, 0), at(0));
        returning.promise(room(30, 0), at(0));
        returning.promise(room(20, 0), at(30));
        assert_eq!(returning.look(room(100, 0), at(59)), room(50, 0));
        assert_eq!(returning.look(room(100, 0), at(60)), room(20, 0));
        assert_eq!(returning.look(room(100, 0), at(90)), Room::NONE);
        returning.promise(Room::NONE, at(91));
        assert_eq!(returning.outstanding(), Room::NONE);
    }
}
