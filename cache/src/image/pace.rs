//! How slow a registry may be before its download counts as broken off.

use std::time::Duration;

/// Time spent waiting for a registry over which it has to bring [`BYTES`].
const WINDOW: Duration = Duration::from_secs(60);
/// About 1 KiB a second: no network that images are pulled over is so slow, and a registry that is, or that means to
/// hold up whoever waits for the same blob, is left for another try.
const BYTES: u64 = 64 << 10;

/// One download's. What the host takes to store the bytes does not count.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// So many bytes have come, after this time. Says whether that is enough.
    pub(crate) fn keeps(&mut self, bytes: usize, waited: Duration) -> bool {
        self.waited += waited;
        self.bytes += bytes as u64;
        if self.waited < WINDOW {
            return true;
        }
        let enough = self.bytes >= BYTES;
        *self = Self::default();
        enough
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
            (&[(65_536, 60), (1, 59)], None),
            (&[(65_536, 60), (1, 59), (1, 1)], Some(2)),
            (&[(65_535, 60)], Some(0)),
            (&[(1 << 20, 1), (1, 58), (1, 2), (1, 59), (65_536, 1)], None),
        ];
        for (parts, slow_at) in table {
            let mut pace = Pace::default();
            let slow = parts.iter().position(|(bytes, s)| !pace.keeps(*bytes, Duration::from_secs(*s)));
            assert_eq!(slow, slow_at, "{parts:?}");
        }
    }
}
