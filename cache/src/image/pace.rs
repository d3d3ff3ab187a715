//! How slow a registry may be: before its download counts as broken off, and before a pull that waits for it holds up nobody.

use std::time::Duration;

/// Time spent waiting for a registry over which it has to bring its bytes.
const WINDOW: Duration = Duration::from_secs(60);

/// One download's. What the host takes to store the bytes does not count.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Bytes that are to come in a window.
    least: u64,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Of one that brings so many bytes a second at the least. A registry that is slower, or that means to hold up whoever
    /// waits for the same blob, is left for another try.
    pub(crate) fn of(bytes_per_second: u64) -> Self {
        let least = bytes_per_second.saturating_mul(WINDOW.as_secs());
        Self { least, waited: Duration::ZERO, bytes: 0 }
    }

    /// So many bytes have come, after this time. Says whether that is enough.
    pub(crate) fn keeps(&mut self, bytes: usize, waited: Duration) -> bool {
        self.waited += waited;
        self.bytes += bytes as u64;
        if self.waited < WINDOW {
            return true;
        }
        let enough = self.bytes >= self.least;
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        enough
    }
}

/// How often a pull's pulse is taken.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// So many beats a pull is looked at, and as many it then holds up nobody, if it has got less than that in the former. Then it is
/// looked at again, without those whom it had held up: beside them it may be slow for their sake.
const LOOK: u32 = 20;
const LENIENCE: u32 = 100;
/// 256 KiB a second, of all its downloads: what leaves so little of a network to others is no network for images.
const LEAST: u64 = (LOOK as u64) * (256 << 10);

/// Whether a whole pull does more than wait for its registry.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    is_slow: bool,
    beats: u32,
    /// What it had got when the beats began.
    had: u64,
}

impl Pulse {
    /// A beat later, it has got so many bytes in all. `is_excused`: it has been at something else than its registry, or gives
    /// way. Returns whether it is slow.
    pub(super) fn beat(&mut self, bytes: u64, is_excused: bool) -> bool {
        self.beats += 1;
        let (is_over, is_slow) = match self.is_slow {
            _ if is_excused => (true, false),
            true => (self.beats >= LENIENCE, false),
            false => (self.beats >= LOOK, bytes - self.had < LEAST),
        };
        if is_over {
            *self = Self { is_slow, beats: 0, had: bytes };
        }
        self.is_slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_is_less_than_so_many_bytes_in_a_window() {
        // Bytes and seconds of each part, and the part at which it is too slow.
        type Parts = &'static [(usize, u64)];
        let table: [(Parts, Option<usize>); 6] = [
            (&[(1, 59)], None),
            (&[(1, 30), (1, 30)], Some(1)),
            (&[(60_000, 60), (1, 59)], None),
            (&[(60_000, 60), (1, 59), (1, 1)], Some(2)),
            (&[(59_999, 60)], Some(0)),
            (&[(1 << 20, 1), (1, 58), (1, 2), (1, 59), (60_000, 1)], None),
        ];
        for (parts, slow_at) in table {
            let too_slow = |mut pace: Pace| {
                parts.iter().position(|(bytes, s)| !pace.keeps(*bytes, Duration::from_secs(*s)))
            };
            assert_eq!(too_slow(Pace::of(1000)), slow_at, "{parts:?}");
            assert_eq!(too_slow(Pace::of(0)), None, "{parts:?}");
        }
    }

    #[test]
    fn a_pull_is_slow_for_a_while() {
        // Seconds, bytes a second, whether it is excused, and whether it is slow at their end.
        let table = [
            (19, 0, false, false),
            (1, 0, false, true),
            // It is not looked at now, however fast it is.
            (99, 1 << 20, false, true),
            (1, 0, false, false),
            (20, 256 << 10, false, false),
            (19, 0, false, false),
            (1, 0, true, false),
            (19, 0, false, false),
            (1, 0, false, true),
            (1, 0, true, false),
            (20, (256 << 10) - 1, false, true),
        ];
        let (mut pulse, mut bytes) = (Pulse::default(), 0);
        for (at, (seconds, rate, is_excused, is_slow)) in table.into_iter().enumerate() {
            let mut last = false;
            for _ in 0..seconds {
                bytes += rate;
                last = pulse.beat(bytes, is_excused);
            }
            assert_eq!(last, is_slow, "{at}");
        }
    }
}
