//! Metadata that are damaged, and what `cowshed pool repair` makes of them.

use std::{fs, path::Path};

use serde_json::Value;

use super::{GROUP, pool, pool_json, small_pool, thin, with_group};
use crate::support::{
    Outcome, check,
    command::{run, sh, text},
    same,
    thin_metadata::{leak_a_block, smash_the_bitmap},
};

const METADATA: &str = "/dev/mapper/e2e-metadata";
const CONFIG: &str = "/tmp/e2e-repair-config";

/// Sound, with a block that nobody has, and with a map that cannot be read.
pub(super) fn repaired() -> Outcome {
    let directory = tempfile::Builder::new().prefix("e2e").tempdir_in("/tmp")?;
    fs::write(CONFIG, format!("[state]\ndirectory = {:?}\n", directory.path()))?;
    with_group(|| {
        small_pool(300, 64)?;
        let disk = thin("cowshed-e2e-1", 1, 32)?;
        sh(&format!("dd if=/dev/urandom of={disk} bs=1M count=8 oflag=direct status=none"))?;
        let sum = || sh(&format!("dd if={disk} bs=1M iflag=direct status=none | sha256sum"));
        let written = sum()?;
        while_open(&disk)?;
        let mut kept = Vec::new();
        for (damage, result) in
            [(None, "sound"), (Some(Damage::Leak), "freed"), (Some(Damage::Smash), "rebuilt")]
        {
            if let Some(damage) = damage {
                damage.inflict()?;
            }
            let backup = directory.path().join(result).display().to_string();
            let named = ["repair", "e2e-lvm/pool", "--config", CONFIG, "--backup", &backup];
            let told = pool(&[&named[..], &["--dry-run"]].concat())?.ok()?;
            check!(told.contains("thin_check") && !Path::new(&backup).exists(), "a dry run: {told}");
            let repaired = pool_json(&named)?;
            same!(text(&repaired, "/result")?, result, "what was done: {repaired}");
            same!(text(&repaired, "/backup")?, backup, "where the metadata were kept");
            same!(fs::metadata(&backup)?.len(), 4 << 20, "bytes of what was kept");
            kept.push(backup);
            // The device went with the repair.
            sh(
                "dmsetup create cowshed-e2e-1 --table '0 65536 thin /dev/mapper/e2e--lvm-pool 1'; udevadm settle",
            )?;
            same!(sum()?, written, "what was written to the disk, after {result}");
            same!(
                pool_json(&["check", "e2e-lvm/pool"])?["sound"],
                Value::Bool(true),
                "soundness after {result}"
            );
        }
        // What was kept is what was there: the first sound, the others not.
        for (n, backup) in kept.iter().enumerate() {
            same!(
                run("thin_check", &["-q", backup])?.status == 0,
                n == 0,
                "whether thin_check is content with {backup}"
            );
        }
        // What was kept before is not replaced.
        pool(&["repair", "e2e-lvm/pool", "--config", CONFIG, "--backup", &kept[0]])?.fails(1, &["--backup"])
    })?;
    fs::remove_file(CONFIG).map_err(Into::into)
}

fn while_open(disk: &str) -> Outcome {
    sh(&format!(
        "exec 9< {disk}; ! cowshed pool repair {GROUP}/pool --config {CONFIG} 2> /tmp/e2e-lvm-said"
    ))?;
    let said = fs::read_to_string("/tmp/e2e-lvm-said")?;
    check!(said.contains("cowshed-e2e-1") && said.contains("open"), "with an open disk: {said}");
    sh(&format!("dd if={disk} of=/dev/null bs=64k count=1 iflag=direct status=none")).map(drop)
}

#[derive(Clone, Copy)]
enum Damage {
    Leak,
    Smash,
}

impl Damage {
    fn inflict(self) -> Outcome {
        sh(&format!(
            "dmsetup remove --retry cowshed-e2e-1; table=$(dmsetup table e2e--lvm-pool_tmeta)
             vgchange -an {GROUP} 2>&1; dmsetup create e2e-metadata --table \"$table\"; udevadm settle"
        ))?;
        let path = Path::new(METADATA);
        let done = match self {
            Self::Leak => leak_a_block(path),
            Self::Smash => smash_the_bitmap(path),
        };
        sh("dmsetup remove --retry e2e-metadata")?;
        done
    }
}

/// Whoever serves the pool would activate disks in it meanwhile.
pub(super) fn refused() -> Outcome {
    pool(&["repair", "vg/pool"])?.fails(22, &["systemctl stop", "/var/lib/cowshed"])?;
    let status = pool_json(&["status"])?;
    same!(status["active"]["mode"], Value::String("rw".to_owned()), "the pool's mode");
    let told = pool(&["repair", "vg/pool", "--dry-run"])?.ok()?;
    check!(told.contains("lvchange --activate n vg/pool") && told.contains("lvconvert"), "{told}");
    Ok(())
}
