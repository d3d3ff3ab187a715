//! Reads dm-thin's table and status lines (kernel: Documentation/admin-guide/device-mapper/thin-provisioning.rst).

use std::fmt;

/// A device's numbers in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Of its driver.
    pub major: u32,
    /// Of the device.
    pub minor: u32,
}

const SECTOR_BYTES: u64 = 512;
/// dm-thin's metadata blocks have this size, whatever the pool's.
const METADATA_BLOCK_BYTES: u64 = 4096;

/// How full a thin pool is, and whether it works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolUsage {
    /// Its device-mapper name.
    pub name: String,
    /// Bytes of data in use.
    pub data_used: u64,
    /// Bytes of data in all.
    pub data_total: u64,
    /// Bytes of metadata in use.
    pub metadata_used: u64,
    /// Bytes of metadata in all.
    pub metadata_total: u64,
    /// Bytes of a block of data; 0 if it does not tell.
    pub block_bytes: u64,
    /// Whether it works.
    pub mode: PoolMode,
    /// Whether new blocks are zeroed before a disk reads them.
    pub zeroing: bool,
}

/// The state of a thin pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PoolMode {
    /// It reads and writes.
    #[default]
    ReadWrite,
    /// It only reads.
    ReadOnly,
    /// New blocks cannot be had.
    OutOfDataSpace,
    /// Its metadata has to be checked, offline, before it writes again.
    NeedsCheck,
    /// It does nothing any more.
    Failed,
}

impl fmt::Display for PoolMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadWrite => "rw",
            Self::ReadOnly => "ro",
            Self::OutOfDataSpace => "out_of_data_space",
            Self::NeedsCheck => "needs_check",
            Self::Failed => "fail",
        })
    }
}

/// What the table of a thin device says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thin {
    /// Its pool.
    pub pool: DeviceNumber,
    /// Its id there.
    pub id: u32,
    /// Its size.
    pub size_bytes: u64,
}

/// Start and length in sectors, kind, parameters: as device-mapper gives a target.
pub type Target = (u64, u64, String, String);

/// Reads a `thin` table: `POOL-DEVICE DEVICE-ID [ORIGIN-DEVICE]`.
///
/// # Errors
/// Says what it is instead.
pub fn parse_thin(targets: &[Target]) -> Result<Thin, String> {
    let [(_, sectors, kind, params)] = targets else {
        return Err(format!("its table has {} targets", targets.len()));
    };
    if kind != "thin" {
        return Err(format!("its target is {kind:?}"));
    }
    let mut words = params.split_ascii_whitespace();
    let pool = words.next().and_then(device_number);
    let id = words.next().and_then(|id| id.parse().ok());
    match (pool, id) {
        (Some(pool), Some(id)) => Ok(Thin { pool, id, size_bytes: sectors * SECTOR_BYTES }),
        _ => Err(format!("its table is {params:?}")),
    }
}

/// Reads a `thin-pool`'s table: `METADATA-DEVICE DATA-DEVICE BLOCK-SECTORS …`; status: `TRANSACTION META-USED/META-TOTAL
/// DATA-USED/DATA-TOTAL HELD-ROOT MODE … NEEDS-CHECK …`, or `Fail`, with no numbers then.
///
/// # Errors
/// Says what it is instead.
pub fn parse_pool(name: &str, tables: &[Target], status: &[Target]) -> Result<PoolUsage, String> {
    let ([(_, _, kind, table)], [(_, _, _, status)]) = (tables, status) else {
        return Err(format!("its table has {} targets", tables.len()));
    };
    if kind != "thin-pool" {
        return Err(format!("its target is {kind:?}"));
    }
    let unreadable = || format!("its table is {table:?} and its status {status:?}");
    let block =
        table.split_ascii_whitespace().nth(2).and_then(|n| n.parse::<u64>().ok()).ok_or_else(unreadable)?;
    let words: Vec<&str> = status.split_ascii_whitespace().collect();
    let zeroing = !table.split_ascii_whitespace().any(|word| word == "skip_block_zeroing");
    if matches!(words.first(), Some(&"Fail" | &"Error")) {
        // It tells nothing else any more.
        let (name, mode) = (name.to_owned(), PoolMode::Failed);
        return Ok(PoolUsage {
            name,
            data_used: 0,
            data_total: 0,
            metadata_used: 0,
            metadata_total: 0,
            block_bytes: block * SECTOR_BYTES,
            mode,
            zeroing,
        });
    }
    let pair = |at: usize| words.get(at).and_then(|word| fraction(word)).ok_or_else(unreadable);
    let ((metadata_used, metadata_total), (data_used, data_total)) = (pair(1)?, pair(2)?);
    Ok(PoolUsage {
        name: name.to_owned(),
        data_used: data_used * block * SECTOR_BYTES,
        data_total: data_total * block * SECTOR_BYTES,
        metadata_used: metadata_used * METADATA_BLOCK_BYTES,
        metadata_total: metadata_total * METADATA_BLOCK_BYTES,
        block_bytes: block * SECTOR_BYTES,
        mode: mode(&words[3..]),
        zeroing,
    })
}

/// The mode in the status of a `thin-pool`.
///
/// # Errors
/// Says what it is instead.
pub fn parse_pool_mode(status: &[Target]) -> Result<PoolMode, String> {
    let [(_, _, kind, status)] = status else {
        return Err(format!("its table has {} targets", status.len()));
    };
    let words: Vec<&str> = status.split_ascii_whitespace().collect();
    match words.get(3..) {
        Some(rest) if kind == "thin-pool" => Ok(mode(rest)),
        None if kind == "thin-pool" && matches!(words.first(), Some(&"Fail" | &"Error")) => {
            Ok(PoolMode::Failed)
        }
        _ => Err(format!("its status is {kind:?} {status:?}")),
    }
}

/// Whether a `thin-pool`'s status says that it passes discards on. It does not if the disk below takes none, or none as small.
pub fn passes_discards(status: &[Target]) -> bool {
    let words = |(_, _, kind, status): &Target| {
        kind == "thin-pool" && status.split_ascii_whitespace().any(|word| word == "discard_passdown")
    };
    status.first().is_some_and(words)
}

fn mode(words: &[&str]) -> PoolMode {
    if words.contains(&"needs_check") {
        PoolMode::NeedsCheck
    } else if words.contains(&"out_of_data_space") {
        PoolMode::OutOfDataSpace
    } else if words.contains(&"ro") {
        PoolMode::ReadOnly
    } else if words.contains(&"rw") {
        PoolMode::ReadWrite
    } else {
        PoolMode::Failed
    }
}

/// The metadata device of a `thin-pool` table.
///
/// # Errors
/// Says what it is instead.
pub fn parse_pool_table(targets: &[Target]) -> Result<DeviceNumber, String> {
    let [(_, _, kind, table)] = targets else {
        return Err(format!("its table has {} targets", targets.len()));
    };
    let metadata = table.split_ascii_whitespace().next().and_then(device_number);
    match metadata {
        Some(metadata) if kind == "thin-pool" => Ok(metadata),
        _ => Err(format!("its target is {kind:?} {table:?}")),
    }
}

/// The mapped bytes in a `thin` status: `MAPPED-SECTORS HIGHEST-MAPPED-SECTOR`.
///
/// # Errors
/// Says what it is instead.
pub fn parse_thin_status(targets: &[Target]) -> Result<u64, String> {
    let [(_, _, kind, status)] = targets else {
        return Err(format!("its table has {} targets", targets.len()));
    };
    let mapped = status.split_ascii_whitespace().next().and_then(|n| n.parse::<u64>().ok());
    match mapped {
        Some(mapped) if kind == "thin" => Ok(mapped * SECTOR_BYTES),
        _ => Err(format!("its status is {kind:?} {status:?}")),
    }
}

fn device_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

fn fraction(text: &str) -> Option<(u64, u64)> {
    let (used, total) = text.split_once('/')?;
    Some((used.parse().ok()?, total.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn target(sectors: u64, kind: &str, params: &str) -> Vec<Target> {
        vec![(0, sectors, kind.to_owned(), params.to_owned())]
    }

    #[test]
    fn thin_tables() {
        let thin = parse_thin(&target(2_097_152, "thin", "252:3 17")).unwrap();
        let pool = DeviceNumber { major: 252, minor: 3 };
        assert_eq!(thin, Thin { pool, id: 17, size_bytes: 1 << 30 });
        assert_eq!(parse_thin(&target(8, "thin", "252:3 1 7:0")).unwrap().id, 1);
        for (kind, params) in
            [("linear", "8:0 0"), ("thin", ""), ("thin", "252:3"), ("thin", "x 1"), ("thin", "252:3 -1")]
        {
            assert!(parse_thin(&target(8, kind, params)).is_err(), "{kind} {params}");
        }
        assert!(parse_thin(&[]).is_err());
    }

    #[test]
    fn pool_tables_and_thin_status() {
        let pool = |params: &str| parse_pool_table(&target(8, "thin-pool", params));
        let metadata = DeviceNumber { major: 252, minor: 1 };
        assert_eq!(pool("252:1 252:2 128 0 0 "), Ok(metadata));
        assert_eq!(pool("252:1 252:2 128 0 1 skip_block_zeroing"), Ok(metadata));
        assert!(pool("").is_err());
        assert_eq!(parse_thin_status(&target(8, "thin", "2048 2047")), Ok(1 << 20));
        assert_eq!(parse_thin_status(&target(8, "thin", "0 -")), Ok(0));
        assert!(parse_thin_status(&target(8, "thin", "Fail")).is_err());
    }

    #[test]
    fn pool_status() {
        let table = target(20_971_520, "thin-pool", "252:1 252:2 128 0 0 ");
        let status = |text: &str| parse_pool("vg-pool", &table, &target(20_971_520, "thin-pool", text));
        let usage = status("0 40/32768 1200/163840 - rw discard_passdown queue_if_no_space - 1024 ").unwrap();
        assert_eq!(usage.data_used, 1200 * 65536);
        assert_eq!(usage.data_total, 10 << 30);
        assert_eq!((usage.metadata_used, usage.metadata_total), (40 * 4096, 128 << 20));
        assert_eq!(usage.block_bytes, 64 << 10);
        assert!(usage.zeroing);
        let careless =
            target(20_971_520, "thin-pool", "252:1 252:2 128 0 2 skip_block_zeroing ignore_discard ");
        let usage = parse_pool("vg-pool", &careless, &target(8, "thin-pool", "0 1/2 3/4 - rw - -")).unwrap();
        assert!(!usage.zeroing);
        let modes = [
            ("- rw discard_passdown queue_if_no_space - 1024", PoolMode::ReadWrite),
            ("- ro no_discard_passdown queue_if_no_space - 1024", PoolMode::ReadOnly),
            ("- ro discard_passdown queue_if_no_space needs_check 1024", PoolMode::NeedsCheck),
            ("- out_of_data_space discard_passdown error_if_no_space - 1024", PoolMode::OutOfDataSpace),
        ];
        for (rest, mode) in modes {
            assert_eq!(status(&format!("0 1/2 3/4 {rest}")).unwrap().mode, mode, "{rest}");
            assert_eq!(parse_pool_mode(&target(8, "thin-pool", &format!("0 1/2 3/4 {rest}"))), Ok(mode));
        }
        for (text, passes) in [
            ("0 1/2 3/4 - rw discard_passdown queue_if_no_space - 1024", true),
            ("0 1/2 3/4 - rw no_discard_passdown queue_if_no_space - 1024", false),
            ("0 1/2 3/4 - rw ignore_discard queue_if_no_space - 1024", false),
            ("Fail", false),
        ] {
            assert_eq!(passes_discards(&target(8, "thin-pool", text)), passes, "{text}");
        }
        for failed in ["Fail", "Error"] {
            assert_eq!(status(failed).unwrap().mode, PoolMode::Failed, "{failed}");
            assert_eq!(parse_pool_mode(&target(8, "thin-pool", failed)), Ok(PoolMode::Failed));
        }
        for bad in ["", "0 1/2", "0 1/2 x/4 - rw"] {
            assert!(status(bad).is_err(), "{bad:?}");
        }
        assert!(parse_pool_mode(&target(8, "linear", "")).is_err());
        assert!(parse_pool("x", &target(8, "linear", "8:0 0"), &target(8, "linear", "")).is_err());
    }
}
