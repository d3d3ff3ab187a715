//! What the ledger keeps of images, for whoever decides which of them go: which names are pinned, and when disks were last
//! made of which manifests.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use cowshed_leases::{Moment, UnixMicros};
use cowshed_pool::store::file::OpenError;
use rusqlite::{Connection, params};

use super::schema::FORMAT;
use crate::image::ImageRef;

/// Which version of the format has brought the tables, and the spares.
const SINCE: i64 = 3;
const SPARES_SINCE: i64 = 5;

/// Last uses of so many manifests are remembered, those of the latest: more than a host has images.
const REMEMBERED: usize = 10_000;
/// A use so soon after the last one is not written down, in microseconds: many VMs of one image are.
const SOON: u64 = 60_000_000;

/// A pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Until when; `None`: until it is taken off. By the wall clock, for it has to outlive boots: one that jumps ends a pin
    /// early or late.
    pub until: Option<UnixMicros>,
    /// So many spares of it are kept ready, at least.
    pub spares: u32,
}

impl Pin {
    fn holds(&self, now: &Moment) -> bool {
        self.until.is_none_or(|until| until > now.wall)
    }
}

/// All pins and last uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    pins: BTreeMap<String, Pin>,
    uses: BTreeMap<String, UnixMicros>,
}

/// What is so from now on of one name or manifest; `None`: nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Pin(String, Option<Pin>),
    Use(String, Option<UnixMicros>),
}

impl Marks {
    /// The pin that the image of this name has now.
    pub fn pin(&self, image: &str, now: &Moment) -> Option<Pin> {
        self.pins.get(image).copied().filter(|pin| pin.holds(now))
    }

    /// The names of which spares are pinned, and how many.
    pub fn pinned_spares(&self, now: &Moment) -> Vec<(String, u32)> {
        let pinned = self.pins.iter().filter(|(_, pin)| pin.spares > 0 && pin.holds(now));
        pinned.map(|(name, pin)| (name.clone(), pin.spares)).collect()
    }

    /// How many pins there are, those that have ended since the last change included.
    pub fn pins(&self) -> usize {
        self.pins.len()
    }

    /// When a disk was last made of the manifest, to the minute.
    pub fn last_use(&self, manifest: &str) -> Option<UnixMicros> {
        self.uses.get(manifest).copied()
    }

    /// The image gets this pin; of one that it has, each part stays that asks for more.
    pub(super) fn prolong_pin(&self, image: &str, pin: Pin, now: &Moment) -> Vec<Mark> {
        let both = self.pin(image, now).map_or(pin, |present| Pin {
            until: present.until.zip(pin.until).map(|(present, until)| present.max(until)),
            spares: present.spares.max(pin.spares),
        });
        self.set_pin(image, Some(both), now)
    }

    /// The image gets this pin, or none. What has ended is forgotten.
    pub(super) fn set_pin(&self, image: &str, pin: Option<Pin>, now: &Moment) -> Vec<Mark> {
        let ended = self.pins.iter().filter(|(name, pin)| *name != image && !pin.holds(now));
        let mut marks: Vec<Mark> = ended.map(|(name, _)| Mark::Pin(name.clone(), None)).collect();
        if self.pins.get(image).copied() != pin {
            marks.push(Mark::Pin(image.to_owned(), pin));
        }
        marks
    }

    /// A disk is made of the manifest.
    pub(super) fn used(&self, manifest: &str, at: UnixMicros) -> Vec<Mark> {
        let before = self.last_use(manifest);
        if before.is_some_and(|before| before.0.abs_diff(at.0) < SOON) {
            return Vec::new();
        }
        let mut marks = vec![Mark::Use(manifest.to_owned(), Some(at))];
        if before.is_none() && self.uses.len() >= REMEMBERED {
            let oldest = self.uses.iter().min_by_key(|(_, at)| **at);
            marks.extend(oldest.map(|(oldest, _)| Mark::Use(oldest.clone(), None)));
        }
        marks
    }

    /// What of last uses goes with manifests that are gone since.
    pub(super) fn forget(&self, manifests: &BTreeSet<String>, since: UnixMicros) -> Vec<Mark> {
        let is_past = |manifest: &&String| self.last_use(manifest).is_some_and(|at| at <= since);
        manifests.iter().filter(is_past).map(|manifest| Mark::Use(manifest.clone(), None)).collect()
    }

    /// Makes the change; gives back the one that takes it back.
    pub(super) fn apply(&mut self, mark: Mark) -> Mark {
        match mark {
            Mark::Pin(image, pin) => {
                let before = set(&mut self.pins, &image, pin);
                Mark::Pin(image, before)
            }
            Mark::Use(manifest, at) => {
                let before = set(&mut self.uses, &manifest, at);
                Mark::Use(manifest, before)
            }
        }
    }

    /// Reads all.
    pub(super) fn load(connection: &Connection, path: &Path) -> Result<Self, OpenError> {
        let sqlite = |e: rusqlite::Error| FORMAT.sqlite(path, &e);
        let format = connection.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0));
        let format = format.map_err(sqlite)?;
        if format < SINCE {
            return Ok(Self::default());
        }
        let spares: Vec<(String, u32)> = if format < SPARES_SINCE {
            Vec::new()
        } else {
            rows(connection, "SELECT image, count FROM pinned_spares").map_err(sqlite)?
        };
        let spares: BTreeMap<String, u32> = spares.into_iter().collect();
        let pins = rows(connection, "SELECT image, until FROM pins").map_err(sqlite)?;
        if let Some(error) = pins.iter().find_map(|(image, _)| ImageRef::parse(image).err()) {
            return Err(FORMAT.damaged(path, format!("a pin: {error}")));
        }
        let pins = pins.into_iter().map(|(image, until): (_, Option<i64>)| {
            let spares = spares.get(&image).copied().unwrap_or_default();
            let pin = Pin { until: until.map(UnixMicros), spares };
            (image, pin)
        });
        let uses = rows(connection, "SELECT manifest, at FROM uses").map_err(sqlite)?;
        let uses = uses.into_iter().map(|(manifest, at)| (manifest, UnixMicros(at)));
        Ok(Self { pins: pins.collect(), uses: uses.collect() })
    }
}

/// Makes the change in the file.
pub(super) fn write(connection: &Connection, mark: &Mark) -> rusqlite::Result<()> {
    let execute = |sql: &str, values: &[&dyn rusqlite::ToSql]| {
        connection.prepare_cached(sql)?.execute(values).map(drop)
    };
    match mark {
        Mark::Pin(image, Some(pin)) => {
            execute(
                "INSERT OR REPLACE INTO pins VALUES (?, ?)",
                params![image, pin.until.map(|until| until.0)],
            )?;
            execute("INSERT OR REPLACE INTO pinned_spares VALUES (?, ?)", params![image, pin.spares])
        }
        Mark::Pin(image, None) => {
            execute("DELETE FROM pinned_spares WHERE image = ?", params![image])?;
            execute("DELETE FROM pins WHERE image = ?", params![image])
        }
        Mark::Use(manifest, Some(at)) => {
            execute("INSERT OR REPLACE INTO uses VALUES (?, ?)", params![manifest, at.0])
        }
        Mark::Use(manifest, None) => execute("DELETE FROM uses WHERE manifest = ?", params![manifest]),
    }
}

fn set<T>(map: &mut BTreeMap<String, T>, key: &str, value: Option<T>) -> Option<T> {
    match value {
        Some(value) => map.insert(key.to_owned(), value),
        None => map.remove(key),
    }
}

fn rows<T: rusqlite::types::FromSql>(
    connection: &Connection,
    sql: &str,
) -> rusqlite::Result<Vec<(String, T)>> {
    let mut statement = connection.prepare(sql)?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::book;

    const SECOND: i64 = 1_000_000;

    fn at(seconds: i64) -> Moment {
        Moment { wall: UnixMicros(seconds * SECOND), ..book::now() }
    }

    fn until(seconds: i64) -> Option<Pin> {
        Some(Pin { until: Some(UnixMicros(seconds * SECOND)), spares: 0 })
    }

    /// Applies them, and sees that they can be taken back.
    fn apply(marks: &mut Marks, changes: Vec<Mark>) {
        let before = marks.clone();
        let mut undone = marks.clone();
        let undo: Vec<Mark> = changes.iter().map(|change| undone.apply(change.clone())).collect();
        changes.into_iter().for_each(|change| drop(marks.apply(change)));
        undo.into_iter().rev().for_each(|change| drop(undone.apply(change)));
        assert_eq!(undone, before);
    }

    #[test]
    fn uses_go_with_what_was_used_but_not_those_of_what_has_come_back() {
        let mut marks = Marks::default();
        for (manifest, seconds) in [("gone", 100), ("stays", 100), ("back", 300)] {
            let changes = marks.used(manifest, UnixMicros(seconds * SECOND));
            apply(&mut marks, changes);
        }
        let gone = ["gone", "back", "never"].map(str::to_owned).into();
        let changes = marks.forget(&gone, UnixMicros(200 * SECOND));
        apply(&mut marks, changes);
        let left: Vec<&str> = marks.uses.keys().map(String::as_str).collect();
        assert_eq!(left, ["back", "stays"]);
    }

    #[test]
    fn a_pin_holds_to_its_end_and_is_forgotten_after_it() {
        let mut marks = Marks::default();
        let set = |marks: &mut Marks, image: &str, pin: Option<Pin>, now: i64| {
            let changes = marks.set_pin(image, pin, &at(now));
            apply(marks, changes);
        };
        set(&mut marks, "r/short:1", until(10), 0);
        set(&mut marks, "r/for-good:1", Some(Pin { until: None, spares: 0 }), 0);
        let table = [(0, until(10)), (9, until(10)), (10, None), (11, None)];
        for (now, expected) in table {
            assert_eq!(marks.pin("r/short:1", &at(now)), expected, "{now}");
            assert_eq!(marks.pin("r/for-good:1", &at(now)), Some(Pin { until: None, spares: 0 }), "{now}");
        }
        // Its end is replaced, also by an earlier one or none.
        for pin in [until(30), until(20), Some(Pin { until: None, spares: 0 }), until(25)] {
            set(&mut marks, "r/short:1", pin, 5);
            assert_eq!(marks.pin("r/short:1", &at(6)), pin);
        }
        set(&mut marks, "r/other:1", until(99), 24);
        assert_eq!(marks.pins(), 3);
        set(&mut marks, "r/for-good:1", None, 25);
        assert_eq!(marks.pins(), 1, "one was taken off, one has ended: {marks:?}");
        assert_eq!(marks.set_pin("r/never:1", None, &at(25)), [], "nothing to take off");
    }

    #[test]
    fn of_two_pins_each_part_stays_that_asks_for_more() {
        let pin = |seconds: Option<i64>, spares| Pin {
            until: seconds.map(|seconds| UnixMicros(seconds * SECOND)),
            spares,
        };
        let table = [
            (None, pin(Some(20), 0), pin(Some(20), 0)),
            (None, pin(None, 3), pin(None, 3)),
            (Some(pin(Some(10), 0)), pin(Some(20), 0), pin(Some(20), 0)),
            (Some(pin(Some(30), 0)), pin(Some(20), 0), pin(Some(30), 0)),
            (Some(pin(None, 0)), pin(Some(20), 0), pin(None, 0)),
            (Some(pin(Some(30), 0)), pin(None, 0), pin(None, 0)),
            (Some(pin(Some(10), 20)), pin(Some(20), 0), pin(Some(20), 20)),
            (Some(pin(Some(10), 20)), pin(None, 3), pin(None, 20)),
            (Some(pin(Some(30), 0)), pin(Some(20), 3), pin(Some(30), 3)),
            (Some(pin(Some(30), 20)), pin(Some(20), 3), pin(Some(30), 20)),
            (Some(pin(None, 3)), pin(Some(20), 20), pin(None, 20)),
            // It has ended.
            (Some(pin(Some(4), 20)), pin(Some(20), 3), pin(Some(20), 3)),
        ];
        for (present, wanted, expected) in table {
            let mut marks = Marks::default();
            let changes = marks.set_pin("r/a:1", present, &at(0));
            apply(&mut marks, changes);
            let changes = marks.prolong_pin("r/a:1", wanted, &at(5));
            apply(&mut marks, changes);
            assert_eq!(marks.pin("r/a:1", &at(5)), Some(expected), "{present:?} {wanted:?}");
        }
    }

    #[test]
    fn a_use_is_written_down_once_a_minute() {
        let mut marks = Marks::default();
        let table = [
            (100, true),
            (100, false),
            (159, false),
            (160, true),
            (161, false),
            // The clock was set back.
            (110, false),
            (100, true),
        ];
        for (now, written) in table {
            let changes = marks.used("sha256:a", UnixMicros(now * SECOND));
            assert_eq!(!changes.is_empty(), written, "{now}");
            apply(&mut marks, changes);
        }
        assert_eq!(marks.last_use("sha256:a"), Some(UnixMicros(100 * SECOND)));
        assert_eq!(marks.last_use("sha256:b"), None);
    }

    #[test]
    fn of_many_uses_the_latest_are_remembered() {
        let mut marks = Marks::default();
        let count = i64::try_from(REMEMBERED).unwrap_or(i64::MAX);
        for n in 0..count {
            // Not in the order of their names.
            let name = format!("sha256:{:x}", (n * 7919) % count);
            marks.used(&name, UnixMicros(n * SECOND)).into_iter().for_each(|mark| drop(marks.apply(mark)));
        }
        assert_eq!(marks.uses.len(), REMEMBERED);
        let changes = marks.used("sha256:new", UnixMicros(count * SECOND));
        apply(&mut marks, changes);
        assert_eq!(marks.uses.len(), REMEMBERED);
        assert_eq!(marks.last_use("sha256:0"), None, "the oldest is still there");
        assert!(marks.last_use("sha256:new").is_some());
        // One that is known takes no room.
        let changes = marks.used("sha256:new", UnixMicros((count + 100) * SECOND));
        assert_eq!(changes.len(), 1);
    }
}
