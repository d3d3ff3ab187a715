//! Whether a pool can be Cowshed's, and what is wrong with how it behaves: decided over what kernel and LVM2 have said.

use cowshed_pool::{
    device::{
        Access, PREFIX, PoolMode,
        behaviour::{Behaviour, Discards, WhenFull},
        stack::{ActivePool, ActiveThin},
    },
    lvm::{Group, PoolVolume, Room},
};

/// Where the module's patience is set for good.
const MODPROBE: &str = "/etc/modprobe.d/cowshed.conf: options dm_thin_pool no_space_timeout=0";

/// What keeps a pool from being Cowshed's, each with the way out; nothing if it is fit. `thins` are the devices that are
/// active of it.
pub fn unfit(
    group: &Group,
    pool: &PoolVolume,
    active: Option<&ActivePool>,
    thins: &[ActiveThin],
) -> Vec<String> {
    let (path, name) = (pool.path(), &group.name);
    let mut unfit = Vec::new();
    if pool.volumes > 0 {
        unfit.push(format!(
            "it has {} thin volumes of LVM2's own, and Cowshed's pool is nobody else's: lvremove them, or make another pool",
            pool.volumes
        ));
    } else if pool.transaction_id > 0 {
        unfit.push(format!(
            "its transaction id is {}, so LVM2 has made thin volumes in it: make another pool (or lvremove {path}, and this one \
             anew)",
            pool.transaction_id
        ));
    }
    if let Some(thin) = thins.iter().find(|thin| !thin.name.starts_with(PREFIX)) {
        unfit.push(format!(
            "{} is a disk in it that is not Cowshed's: a pool belongs to one owner",
            thin.name
        ));
    }
    if !pool.zeroing {
        unfit.push(format!(
            "it does not zero new blocks, so bytes of one VM could be read by another: lvchange --zero y {path}"
        ));
    }
    if pool.when_full == "error" {
        unfit.push(format!(
            "it fails writes when it is full, instead of having them wait: lvchange --errorwhenfull n {path}"
        ));
    }
    if let Some(ActivePool { usage, .. }) = active
        && !matches!(usage.mode, PoolMode::ReadWrite | PoolMode::OutOfDataSpace)
    {
        unfit.push(format!(
            "it does not write (its state is {}): cowshed pool repair {}",
            usage.mode, usage.name
        ));
    }
    if group.missing > 0 {
        unfit.push(format!(
            "its volume group {name} lacks {} of {} disks: attach them",
            group.missing, group.disks
        ));
    }
    if group.access == Access::ReadOnly {
        unfit.push(format!("its volume group {name} is read-only: vgchange --permission rw {name}"));
    }
    unfit
}

/// What is wrong with what a pool does when it is full, and with discards. `timeout` is the module's patience, in seconds.
pub fn of_behaviour(name: &str, behaviour: Option<Behaviour>, timeout: Option<u64>) -> Vec<String> {
    let mut wrong = Vec::new();
    match behaviour {
        Some(Behaviour { when_full: WhenFull::Error, .. }) => wrong.push(format!(
            "the thin pool {name} fails writes when it is full, instead of having them wait: lvchange --errorwhenfull n VG/POOL"
        )),
        Some(Behaviour { when_full: WhenFull::Queue, .. }) | None => {}
    }
    match timeout {
        Some(0) | None => {}
        Some(seconds) => wrong.push(format!(
            "writes to a full pool fail after {seconds} s (no_space_timeout of dm_thin_pool): {MODPROBE}; and now, echo 0 > {}",
            cowshed_pool::device::behaviour::NO_SPACE_TIMEOUT
        )),
    }
    if let Some(Behaviour { discards: Discards::Ignored, .. }) = behaviour {
        wrong.push(format!(
            "the thin pool {name} ignores discards, so what guests delete stays allocated: lvchange --discards passdown VG/POOL, \
             while it is inactive"
        ));
    }
    wrong
}

/// What LVM2 has in mind with the pool that Cowshed does not. `threshold` is `activation/thin_pool_autoextend_threshold`, in
/// percent.
pub fn of_group(room: &Room, threshold: Option<u64>) -> Vec<String> {
    let Room { group, pool } = room;
    let mut wrong = Vec::new();
    if let Some(threshold) = threshold.filter(|threshold| pool.monitored && *threshold < 100) {
        wrong.push(format!(
            "dmeventd extends {} by itself when it is {threshold} % full, beside Cowshed: thin_pool_autoextend_threshold = 100 in \
             /etc/lvm/lvmlocal.conf, or lvchange --monitor n {}",
            pool.path(),
            pool.path()
        ));
    }
    if !pool.health.is_empty() {
        wrong.push(format!("LVM2 says of {}: {}", pool.path(), pool.health));
    }
    // What the kernel says instead may be the disks' doing: those that take no discards are passed none.
    if pool.discards == "nopassdown" {
        wrong.push(format!(
            "the thin pool {} passes no discards on, so the disks below it never learn what was deleted, and [pool] trim does \
             nothing: lvchange --discards passdown {}, which may be active meanwhile",
            pool.path(),
            pool.path()
        ));
    }
    if group.free_bytes < group.extent_bytes {
        wrong.push(format!(
            "the volume group {} is full, so the pool cannot grow: vgextend {} DISK",
            group.name, group.name
        ));
    }
    wrong
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::kernel::PoolUsage;

    const GIB: u64 = 1 << 30;

    pub(crate) fn room() -> Room {
        let group = Group {
            name: "vg".to_owned(),
            uuid: "u".to_owned(),
            size_bytes: 20 * GIB,
            free_bytes: 5 * GIB,
            extent_bytes: 4 << 20,
            missing: 0,
            access: Access::ReadWrite,
            disks: 1,
            volumes: 1,
        };
        let pool = PoolVolume {
            group: "vg".to_owned(),
            name: "pool".to_owned(),
            dm_uuid: "LVM-x".to_owned(),
            data_bytes: 10 * GIB,
            metadata_bytes: GIB / 8,
            chunk_bytes: 65_536,
            zeroing: true,
            discards: "passdown".to_owned(),
            transaction_id: 0,
            when_full: "queue".to_owned(),
            volumes: 0,
            monitored: false,
            active: true,
            health: String::new(),
            metadata_volume: "pool_tmeta".to_owned(),
        };
        Room { group, pool }
    }

    pub(crate) fn active(mode: PoolMode) -> ActivePool {
        let usage = PoolUsage {
            block_bytes: 64 << 10,
            name: "vg-pool".to_owned(),
            data_used: 0,
            data_total: 10 * GIB,
            metadata_used: 0,
            metadata_total: GIB / 8,
            mode,
            zeroing: true,
        };
        let behaviour = Behaviour { when_full: WhenFull::Queue, discards: Discards::PassedDown };
        ActivePool { uuid: "LVM-x".to_owned(), usage, behaviour: Some(behaviour), suspended: false }
    }

    #[test]
    fn a_pool_is_fit_or_it_is_said_why_not() {
        let Room { group, pool } = room();
        let writing = active(PoolMode::ReadWrite);
        let thin = |name: &str| ActiveThin { name: name.to_owned(), open: 0 };
        assert!(unfit(&group, &pool, Some(&writing), &[thin("cowshed-ab-1")]).is_empty());
        assert!(unfit(&group, &pool, None, &[]).is_empty());
        let with_pool = |change: fn(&mut PoolVolume)| {
            let mut pool = pool.clone();
            change(&mut pool);
            unfit(&group, &pool, Some(&writing), &[])
        };
        let with_group = |change: fn(&mut Group)| {
            let mut group = group.clone();
            change(&mut group);
            unfit(&group, &pool, Some(&writing), &[])
        };
        let table: [(Vec<String>, &str); 9] = [
            (with_pool(|p| p.volumes = 2), "2 thin volumes"),
            (with_pool(|p| p.transaction_id = 7), "transaction id is 7"),
            (with_pool(|p| p.zeroing = false), "--zero y vg/pool"),
            (with_pool(|p| p.when_full = "error".to_owned()), "--errorwhenfull n vg/pool"),
            (with_group(|g| g.missing = 1), "lacks 1 of 1"),
            (with_group(|g| g.access = Access::ReadOnly), "--permission rw vg"),
            (unfit(&group, &pool, Some(&active(PoolMode::NeedsCheck)), &[]), "needs_check"),
            (unfit(&group, &pool, Some(&active(PoolMode::Failed)), &[]), "pool repair vg-pool"),
            (unfit(&group, &pool, Some(&writing), &[thin("vg-pool-snap-1")]), "vg-pool-snap-1"),
        ];
        for (found, word) in table {
            assert!(found.len() == 1 && found[0].contains(word), "{word}: {found:?}");
        }
    }

    #[test]
    fn what_a_full_pool_does_is_looked_at() {
        let behaviour = |when_full, discards| Some(Behaviour { when_full, discards });
        let good = behaviour(WhenFull::Queue, Discards::PassedDown);
        assert!(of_behaviour("p", good, Some(0)).is_empty());
        assert!(of_behaviour("p", None, None).is_empty());
        for (behaviour, timeout, word) in [
            (good, Some(60), "fail after 60 s"),
            (behaviour(WhenFull::Error, Discards::Kept), Some(0), "--errorwhenfull n"),
            (behaviour(WhenFull::Queue, Discards::Ignored), Some(0), "--discards"),
        ] {
            let found = of_behaviour("p", behaviour, timeout);
            assert!(found.len() == 1 && found[0].contains(word), "{word}: {found:?}");
        }
    }

    #[test]
    fn dmeventd_is_not_fought() {
        let mut room = room();
        assert!(of_group(&room, Some(70)).is_empty());
        room.pool.monitored = true;
        assert!(of_group(&room, Some(100)).is_empty());
        assert!(of_group(&room, Some(70))[0].contains("70 % full"));
        room.group.free_bytes = 0;
        assert!(of_group(&room, None)[0].contains("vgextend vg"));
    }

    #[test]
    fn a_pool_that_is_told_to_keep_discards_is_found() {
        let mut room = room();
        for (discards, count) in [("passdown", 0), ("nopassdown", 1), ("ignore", 0)] {
            room.pool.discards = discards.to_owned();
            let found = of_group(&room, None);
            assert_eq!(found.len(), count, "{discards}: {found:?}");
            assert!(
                found.iter().all(|what| what.contains("lvchange --discards passdown vg/pool,")),
                "{found:?}"
            );
        }
    }
}
