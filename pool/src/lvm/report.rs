//! Reads LVM2's reports (`--reportformat json --units b --nosuffix`): all values are texts, in any of its versions.

use serde::Deserialize;

use super::error::LvmError;
use crate::device::Access;

/// What `vgs` is asked for.
pub(super) const GROUP_FIELDS: &str =
    "vg_name,vg_uuid,vg_size,vg_free,vg_extent_size,vg_missing_pv_count,vg_permissions,pv_count,lv_count";
/// What `lvs` is asked for.
pub(super) const POOL_FIELDS: &str = "vg_name,vg_uuid,lv_name,lv_uuid,segtype,lv_size,lv_metadata_size,chunk_size,zero,discards,\
     transaction_id,lv_when_full,thin_count,seg_monitor,lv_active,lv_health_status,\
     metadata_lv";
/// What `pvs` is asked for.
pub(super) const DISK_FIELDS: &str = "pv_name,vg_name";

/// A volume group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// Its uuid.
    pub uuid: String,
    /// Bytes in all.
    pub size_bytes: u64,
    /// Bytes that no volume has.
    pub free_bytes: u64,
    /// Bytes that are given out at a time.
    pub extent_bytes: u64,
    /// Disks that are missing.
    pub missing: u64,
    /// Whether LVM2 may change it.
    pub access: Access,
    /// Its disks.
    pub disks: u64,
    /// Its volumes, hidden ones not counted.
    pub volumes: u64,
}

/// A thin pool, as LVM2 has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolVolume {
    /// Name of its volume group.
    pub group: String,
    /// Its name there.
    pub name: String,
    /// What its device-mapper uuid begins with.
    pub dm_uuid: String,
    /// Bytes of data.
    pub data_bytes: u64,
    /// Bytes of metadata.
    pub metadata_bytes: u64,
    /// Bytes of a block.
    pub chunk_bytes: u64,
    /// Whether new blocks are zeroed.
    pub zeroing: bool,
    /// "passdown", "nopassdown" or "ignore".
    pub discards: String,
    /// LVM2's count of changes; 0 for a pool that it has made no thin volumes in.
    pub transaction_id: u64,
    /// "queue" or "error": what becomes of writes when it is full.
    pub when_full: String,
    /// Thin volumes of LVM2's own.
    pub volumes: u64,
    /// Whether dmeventd looks after it.
    pub monitored: bool,
    /// Whether it is active.
    pub active: bool,
    /// What LVM2 has against it; "" if nothing.
    pub health: String,
    /// Name of the hidden volume that has its metadata.
    pub metadata_volume: String,
}

/// A disk of LVM2's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its path, as LVM2 knows it.
    pub path: String,
    /// Name of the volume group that it is in; "" if none.
    pub group: String,
}

impl PoolVolume {
    /// As LVM2's commands want it.
    pub fn path(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    /// Its device-mapper name: hyphens within a name are doubled.
    pub fn dm_name(&self) -> String {
        dm_name(&self.group, &self.name)
    }
}

/// The device-mapper name that LVM2 gives a volume.
pub fn dm_name(group: &str, volume: &str) -> String {
    format!("{}-{}", group.replace('-', "--"), volume.replace('-', "--"))
}

#[derive(Deserialize)]
struct Report<T> {
    report: Vec<T>,
}

#[derive(Deserialize)]
struct Groups {
    vg: Vec<GroupRow>,
}

#[derive(Deserialize)]
struct GroupRow {
    vg_name: String,
    vg_uuid: String,
    vg_size: String,
    vg_free: String,
    vg_extent_size: String,
    vg_missing_pv_count: String,
    vg_permissions: String,
    pv_count: String,
    lv_count: String,
}

#[derive(Deserialize)]
struct Volumes {
    lv: Vec<PoolRow>,
}

#[derive(Deserialize)]
struct PoolRow {
    vg_name: String,
    vg_uuid: String,
    lv_name: String,
    lv_uuid: String,
    segtype: String,
    lv_size: String,
    lv_metadata_size: String,
    chunk_size: String,
    zero: String,
    discards: String,
    transaction_id: String,
    lv_when_full: String,
    thin_count: String,
    seg_monitor: String,
    lv_active: String,
    lv_health_status: String,
    metadata_lv: String,
}

#[derive(Deserialize)]
struct Disks {
    pv: Vec<DiskRow>,
}

#[derive(Deserialize)]
struct DiskRow {
    pv_name: String,
    vg_name: String,
}

/// Reads a report of volume groups.
pub(super) fn groups(text: &str) -> Result<Vec<Group>, LvmError> {
    let report: Report<Groups> = read("vgs", text)?;
    let rows = report.report.into_iter().flat_map(|part| part.vg);
    rows.map(|row| {
        let number = |field: &str, text: &str| number("vgs", &row.vg_name, field, text);
        Ok(Group {
            size_bytes: number("vg_size", &row.vg_size)?,
            free_bytes: number("vg_free", &row.vg_free)?,
            extent_bytes: number("vg_extent_size", &row.vg_extent_size)?.max(1),
            missing: number("vg_missing_pv_count", &row.vg_missing_pv_count)?,
            access: if row.vg_permissions.starts_with("read-only") {
                Access::ReadOnly
            } else {
                Access::ReadWrite
            },
            disks: number("pv_count", &row.pv_count)?,
            volumes: number("lv_count", &row.lv_count)?,
            uuid: row.vg_uuid.clone(),
            name: row.vg_name.clone(),
        })
    })
    .collect()
}

/// Reads a report of volumes, and keeps the thin pools.
pub(super) fn pools(text: &str) -> Result<Vec<PoolVolume>, LvmError> {
    let report: Report<Volumes> = read("lvs", text)?;
    let rows = report.report.into_iter().flat_map(|part| part.lv).filter(|row| row.segtype == "thin-pool");
    rows.map(|row| {
        let number = |field: &str, text: &str| number("lvs", &row.lv_name, field, text);
        let bare = |uuid: &str| uuid.replace('-', "");
        // LVM2 hides names of hidden volumes in brackets.
        let name = row.lv_name.trim_matches(['[', ']']).to_owned();
        Ok(PoolVolume {
            dm_uuid: format!("LVM-{}{}", bare(&row.vg_uuid), bare(&row.lv_uuid)),
            data_bytes: number("lv_size", &row.lv_size)?,
            metadata_bytes: number("lv_metadata_size", &row.lv_metadata_size)?,
            chunk_bytes: number("chunk_size", &row.chunk_size)?,
            zeroing: row.zero == "zero",
            discards: row.discards.clone(),
            transaction_id: number("transaction_id", &row.transaction_id)?,
            when_full: row.lv_when_full.clone(),
            volumes: number("thin_count", &row.thin_count)?,
            monitored: row.seg_monitor == "monitored",
            active: !row.lv_active.is_empty(),
            health: row.lv_health_status.clone(),
            metadata_volume: row.metadata_lv.trim_matches(['[', ']']).to_owned(),
            group: row.vg_name.clone(),
            name,
        })
    })
    .collect()
}

/// Reads a report of disks.
pub(super) fn disks(text: &str) -> Result<Vec<Disk>, LvmError> {
    let report: Report<Disks> = read("pvs", text)?;
    let rows = report.report.into_iter().flat_map(|part| part.pv);
    Ok(rows.map(|row| Disk { path: row.pv_name, group: row.vg_name }).collect())
}

/// What LVM2 complains of in a report, a line each: then it says so nowhere else.
pub(super) fn complaints(text: &str) -> String {
    #[derive(Deserialize)]
    struct Logged {
        log: Vec<LogRow>,
    }
    #[derive(Deserialize)]
    struct LogRow {
        log_type: String,
        log_message: String,
    }
    let Ok(logged) = read::<Logged>("", text) else { return String::new() };
    let complains = |row: &LogRow| ["error", "warn"].contains(&row.log_type.as_str());
    logged.log.into_iter().filter(complains).map(|row| row.log_message + "\n").collect()
}

fn read<T: for<'de> Deserialize<'de>>(command: &str, text: &str) -> Result<T, LvmError> {
    // What LVM2 has to say to people comes before, on the same stream.
    let from = text.find('{').unwrap_or(0);
    serde_json::from_str(&text[from..])
        .map_err(|e| LvmError::Unreadable { command: command.to_owned(), what: e.to_string() })
}

fn number(command: &str, of: &str, field: &str, text: &str) -> Result<u64, LvmError> {
    let what =
        || LvmError::Unreadable { command: command.to_owned(), what: format!("{field} of {of} is {text:?}") };
    if text.is_empty() { Ok(0) } else { text.parse().map_err(|_| what()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const VGS: &str = r#"  {
      "report": [ { "vg": [
        {"vg_name":"vg", "vg_uuid":"gbLJXS-Y6mx-Vwa7", "vg_size":"21470642176", "vg_free":"6257901568",
         "vg_extent_size":"4194304", "vg_missing_pv_count":"0", "vg_permissions":"writeable", "pv_count":"1", "lv_count":"2"}
      ] } ] , "log": [] }"#;

    const LVS: &str = r#"  WARNING: something for people
    {"report":[{"lv":[
        {"vg_name":"vg","vg_uuid":"gbLJXS-Y6mx-Vwa7","lv_name":"pool","lv_uuid":"v6FG3y-eruU","segtype":"thin-pool",
         "lv_size":"10737418240","lv_metadata_size":"134217728","chunk_size":"65536","zero":"zero","discards":"passdown",
         "transaction_id":"0","lv_when_full":"queue","thin_count":"0","seg_monitor":"not monitored","lv_active":"active",
         "lv_health_status":"","metadata_lv":"[pool_tmeta]"},
        {"vg_name":"vg","vg_uuid":"gbLJXS-Y6mx-Vwa7","lv_name":"state","lv_uuid":"a","segtype":"linear","lv_size":"4294967296",
         "lv_metadata_size":"","chunk_size":"0","zero":"unknown","discards":"","transaction_id":"","lv_when_full":"",
         "thin_count":"","seg_monitor":"","lv_active":"active","lv_health_status":"","metadata_lv":""}]}]}"#;

    #[test]
    fn groups_and_pools() {
        let vg = groups(VGS).unwrap().remove(0);
        assert_eq!((vg.free_bytes, vg.extent_bytes, vg.access), (6_257_901_568, 4 << 20, Access::ReadWrite));
        let read_only = VGS.replace("writeable", "read-only");
        assert_eq!(groups(&read_only).unwrap()[0].access, Access::ReadOnly);
        let pools = pools(LVS).unwrap();
        assert_eq!(pools.len(), 1, "{pools:?}");
        let pool = &pools[0];
        assert_eq!(pool.dm_uuid, "LVM-gbLJXSY6mxVwa7v6FG3yeruU");
        assert_eq!((pool.data_bytes, pool.metadata_bytes, pool.chunk_bytes), (10 << 30, 128 << 20, 65536));
        assert!(pool.zeroing && pool.active && !pool.monitored, "{pool:?}");
        assert_eq!((pool.path().as_str(), pool.metadata_volume.as_str()), ("vg/pool", "pool_tmeta"));
        let found = disks("{\"report\":[{\"pv\":[{\"pv_name\":\"/dev/vdb\",\"vg_name\":\"vg\"}]}]}").unwrap();
        assert_eq!(found, [Disk { path: "/dev/vdb".to_owned(), group: "vg".to_owned() }]);
    }

    #[test]
    fn what_is_no_report_is_said_to_be_none() {
        for text in ["", "{}", "{\"report\":[{\"vg\":[{}]}]}"] {
            assert!(matches!(groups(text), Err(LvmError::Unreadable { .. })), "{text}");
        }
        let error = groups(&VGS.replace("6257901568", "6.2g")).unwrap_err().to_string();
        assert!(error.contains("vg_free of vg is \"6.2g\""), "{error}");
    }

    #[test]
    fn complaints_are_in_the_report() {
        let locked = r#" { "report": [ { "lv": [ ] } ] , "log": [
            {"log_seq_num":"1", "log_type":"error", "log_message":"/run/lock/lvm/V_vg: flock failed: Resource temporarily unavailable"},
            {"log_seq_num":"2", "log_type":"error", "log_message":"Can't get lock for vg."},
            {"log_seq_num":"4", "log_type":"status", "log_message":"failure"} ] }"#;
        let said = complaints(locked);
        assert_eq!(said.lines().last(), Some("Can't get lock for vg."));
        assert_eq!(said.lines().count(), 2);
        assert_eq!((complaints(LVS), complaints("no report")), (String::new(), String::new()));
    }

    #[test]
    fn device_mapper_doubles_hyphens() {
        assert_eq!(dm_name("vg", "pool"), "vg-pool");
        assert_eq!(dm_name("my-vg", "a-b-c"), "my--vg-a--b--c");
    }
}
