//! What there is when nobody has anything: it must not become more.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use crate::{Outcome, shell::sh};

/// Until all is at rest.
const PATIENCE: Duration = Duration::from_secs(600);
/// How much more of memory cowshed may have than after a warm-up, in KiB: it remembers the latest 10,000 requests and as many
/// leases that have gone.
const MEMORY: u64 = 16 << 10;

/// Figures of the host, which have to be the same, and of cowshed's process.
pub(crate) struct Figures {
    host: BTreeMap<String, u64>,
    pid: u64,
    descriptors: u64,
    /// What they are.
    kinds: String,
    resident: u64,
}

/// Everything is released and every image removed; fails as long as something is under way.
const REST: &str = r#"
for n in $(seq 0 $((VMS - 1))); do echo soak-$n; done | xargs -P 4 -I{} cowshed release {} > /dev/null
[ "$(cowshed leases --shared -o json | jq '.leases | length')" = 0 ] || { cowshed leases; exit 1; }
ctr images ls -q | xargs -r ctr images rm --sync > /dev/null
ctr leases create --id soak-nudge > /dev/null; ctr leases delete --sync soak-nudge > /dev/null
[ "$(sqlite3 -readonly /var/lib/cowshed/snapshots.db "select count(*) from snapshots where state != 'ready'")" = 0 ] || { echo "the snapshotter is busy"; exit 1; }
busy=$(ctr content ls -q; ctr content active | sed 1d; ctr leases ls -q; ctr snapshots --snapshotter cowshed ls | sed 1d; dmsetup ls --target thin | grep cowshed || true)
[ -z "$busy" ] || { echo "$busy" | head -20; exit 1; }
"#;

/// NAME NUMBER, a line each.
const COUNT: &str = r#"
store=/var/lib/cowshed/snapshots.db
dmsetup message vg-pool 0 reserve_metadata_snap
echo "thin-ids $(thin_ls -m --no-headers -o DEV /dev/mapper/vg-pool_tmeta | wc -l)"
thin_check -q -m /dev/mapper/vg-pool_tmeta || { dmsetup message vg-pool 0 release_metadata_snap; echo "thin_check is not content" >&2; exit 1; }
dmsetup message vg-pool 0 release_metadata_snap
dmsetup status vg-pool | awk '{ split($5, m, "/"); split($6, d, "/"); print "data-blocks " d[1]; print "metadata-blocks " m[1] }'
echo "snapshotter-records $(sqlite3 -readonly $store 'select count(*) from snapshots')"
echo "ledger-leases $(cowshed leases --shared -o json | jq '.leases | length')"
echo "containerd-leases $(ctr leases ls -q | wc -l)"
echo "containerd-snapshots $(ctr snapshots --snapshotter cowshed ls | sed 1d | wc -l)"
echo "containerd-images $(ctr images ls -q | wc -l)"
echo "containerd-blobs $(ctr content ls -q | wc -l)"
echo "thin-devices $(dmsetup ls --target thin | grep -c ':' || true)"
echo "mounts $(grep -c /dev/mapper/cowshed- /proc/mounts || true)"
"#;

/// PID DESCRIPTORS RESIDENT-KIB, and what the descriptors are. The least of two minutes: connections that have been idle for
/// so long are closed, and a call that is under way has descriptors of its own.
const PROCESS: &str = r#"
pid=$(cat /var/lib/cowshed/lock) fds=1000000 rss=1000000000
for _ in $(seq 60); do
  open=$(find /proc/$pid/fd -type l -printf '%l\n' | sed -E 's/[0-9]+//g')
  n=$(wc -l <<< "$open")
  r=$(awk '/^VmRSS/ { print $2 }' /proc/$pid/status)
  [ "$n" -ge "$fds" ] || { fds=$n; what=$(sort <<< "$open" | uniq -c | xargs); tcp=$(ss -tnpH | grep -c "pid=$pid," || true); }
  [ "$r" -ge "$rss" ] || rss=$r
  sleep 2
done
echo "$pid $fds $rss $what; TCP $tcp"
"#;

/// Releases everything, waits until all is at rest, and counts.
pub(crate) async fn at_rest(vms: usize) -> Outcome<Figures> {
    let deadline = Instant::now() + PATIENCE;
    while let Err(busy) = sh(&format!("VMS={vms}\n{REST}")).await {
        if Instant::now() > deadline {
            let busy = busy.to_string();
            return Err(format!("it does not come to rest: {}", busy.replace(REST, "…")).into());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    sh("cowshed audit").await?;
    let mut host = BTreeMap::new();
    for line in sh(COUNT).await?.lines() {
        let (name, number) = line.split_once(' ').ok_or_else(|| format!("{line:?} is no figure"))?;
        host.insert(name.to_owned(), number.trim().parse()?);
    }
    let process = sh(PROCESS).await?;
    let [pid, descriptors, resident, kinds] = process.trim().splitn(4, ' ').collect::<Vec<_>>()[..] else {
        return Err(format!("{process:?} are no figures of a process").into());
    };
    let (pid, descriptors, resident) = (pid.parse()?, descriptors.parse()?, resident.parse()?);
    Ok(Figures { host, pid, descriptors, kinds: kinds.to_owned(), resident })
}

impl Figures {
    /// Of the host: none may differ.
    pub(crate) fn differences(&self, before: &Self) -> Vec<String> {
        let differs = self.host.iter().filter(|(name, now)| before.host.get(*name) != Some(now));
        let told = differs.map(|(name, now)| format!("{name}: {:?} became {now}", before.host.get(name)));
        told.collect()
    }

    /// Of cowshed's process, which has to be the same one.
    pub(crate) fn differences_of_process(&self, before: &Self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.pid != before.pid {
            problems.push(format!("cowshed was process {}, and is {}", before.pid, self.pid));
        }
        if self.descriptors > before.descriptors {
            let (was, is) = (&before.kinds, &self.kinds);
            problems.push(format!(
                "file descriptors: {} ({was}) became {} ({is})",
                before.descriptors, self.descriptors
            ));
        }
        if self.resident > before.resident + MEMORY {
            problems.push(format!("resident memory: {} KiB became {}", before.resident, self.resident));
        }
        problems
    }

    /// What was, and what is, in a line.
    pub(crate) fn since(&self, before: &Self, process: &Self) -> String {
        let pairs = self.host.iter().map(|(name, now)| {
            format!("{name} {} → {now}", before.host.get(name).map(u64::to_string).unwrap_or_default())
        });
        format!(
            "{}, descriptors {} → {}, resident KiB {} → {}",
            pairs.collect::<Vec<_>>().join(", "),
            process.descriptors,
            self.descriptors,
            process.resident,
            self.resident
        )
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.host.iter().try_for_each(|(name, number)| write!(f, "{name} {number}, "))?;
        write!(
            f,
            "cowshed is process {}, descriptors {} ({}), resident KiB {}",
            self.pid, self.descriptors, self.kinds, self.resident
        )
    }
}
