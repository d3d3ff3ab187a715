//! Cowshed's snapshotter as containerd's other clients use it. Only where that is the host's snapshotter.

mod pool;

use std::{
    fs::{self, File},
    path::Path,
    time::Duration,
};

use tonic::{Code, Status};

use crate::{
    Test,
    support::{
        Outcome,
        api::block_on,
        check,
        command::{lines, run, sh},
        cow::{
            acquire, collect, evict_all, heirs, host, image, release_fully, service_pid, snapshotter,
            thin_devices, wait_serving,
        },
        same,
        snapshots::{CONTAINERD, Snapshots},
        wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("by_hand", by_hand),
    ("starts_no_process", starts_no_process),
    ("sizes", sizes),
    ("what_is_asked_for_again_is_made_ahead", what_is_asked_for_again_is_made_ahead),
    ("what_containerd_has_forgotten_goes_when_it_comes_back", forgotten_by_containerd),
    ("an_open_device_outlives_its_snapshot", an_open_device_outlives_its_snapshot),
    ("views_of_what_was_not_unmounted", views_of_what_was_not_unmounted),
    ("what_is_not_ours_stays", what_is_not_ours_stays),
    ("pool_that_does_not_write", pool_that_does_not_write),
    ("pool_with_io_errors", pool_with_io_errors),
    ("pool_taken_away_for_a_moment", pool_taken_away_for_a_moment),
    ("damaged_pool_metadata", damaged_pool_metadata),
    ("extended_while_used", pool::extended_while_used),
    ("a_pool_of_another_uuid", pool::a_pool_of_another_uuid),
    ("leaked_blocks_do_not_keep_a_pool_down", pool::leaked_blocks_do_not_keep_a_pool_down),
    ("what_is_told_is_so", what_is_told_is_so),
    ("alone", alone),
    ("state_full_and_free_again", state_full_and_free_again),
    ("damaged_store_is_left_alone", damaged_store_is_left_alone),
];

const STATE: &str = "/var/lib/cowshed";
const SIZE_LABEL: &str = "containerd.io/snapshot/cowshed.size";
/// What an unpacker sets on what it unpacks a layer into.
const LAYER: (&str, &str) = ("containerd.io/snapshot.ref", "e2e");

fn client() -> Outcome<Snapshots> {
    let channel = block_on(containerd_client::connect(CONTAINERD))?;
    Ok(Snapshots::new(channel, snapshotter(), "e2e"))
}

/// Removes what the test has made, and waits until its devices are gone.
fn remove_all(client: &Snapshots) -> Outcome {
    // Children first: what still has some is taken in a later round.
    while let left @ [_, ..] = &block_on(client.list())?[..] {
        let before = left.len();
        for info in left {
            let has_child = left.iter().any(|other| other.parent == info.name);
            if !has_child {
                block_on(client.remove(&info.name))?;
            }
        }
        check!(block_on(client.list())?.len() < before, "nothing can be removed of {left:?}");
    }
    wait_for("the devices to go", || {
        collect()?;
        let left = thin_devices()?;
        check!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

fn refused<T: std::fmt::Debug>(reply: Result<T, Status>, code: Code, words: &[&str]) -> Outcome {
    failed(reply, &[code], words)
}

/// The same, with one of these codes.
fn failed<T: std::fmt::Debug>(reply: Result<T, Status>, codes: &[Code], words: &[&str]) -> Outcome {
    let status = match reply {
        Ok(reply) => return Err(format!("it succeeded: {reply:?}").into()),
        Err(status) => status,
    };
    check!(codes.contains(&status.code()), "the code of {status:?} is none of {codes:?}");
    for word in words {
        check!(status.message().contains(word), "{word:?} is not said: {}", status.message());
    }
    Ok(())
}

fn bytes_of(device: &str) -> Outcome<u64> {
    Ok(sh(&format!("blockdev --getsize64 {device}"))?.trim().parse()?)
}

/// Of the filesystem on it.
fn filesystem_bytes_of(device: &str) -> Outcome<u64> {
    let script = format!(
        "dumpe2fs -h {device} 2>/dev/null | awk '/^Block count:/ {{ n = $3 }} /^Block size:/ {{ print n * $3 }}'"
    );
    Ok(sh(&script)?.trim().parse()?)
}

/// As somebody does who knows `ctr` and nothing of Cowshed.
fn by_hand() -> Outcome {
    evict_all()?;
    let (tiny, ctr) = (image("tiny:1"), "ctr snapshots --snapshotter cowshed");
    sh(&format!("ctr images pull --snapshotter cowshed --hosts-dir /etc/containerd/certs.d {tiny}"))?;
    let ran = sh(&format!("ctr run --rm --snapshotter cowshed {tiny} e2e-run /bin/busybox cat /etc/tiny"))?;
    same!(ran.trim(), "a tiny image", "what a container says");
    let top = lines(&format!("{ctr} ls | awk '$NF == \"Committed\" {{ print $1 }}'"))?;
    let parent = top.first().ok_or("the pull has left no committed snapshot")?;
    // ctr marks what it prepares and commits as wanted, but not its views: containerd may have collected that one.
    let script = format!(
        "mkdir -p /tmp/e2e-mnt
         {ctr} prepare e2e-a {parent} > /dev/null
         mount $({ctr} mounts /tmp/e2e-mnt e2e-a | grep -o '/dev/mapper/[^ ]*') /tmp/e2e-mnt
         echo moo > /tmp/e2e-mnt/cow; umount /tmp/e2e-mnt
         {ctr} commit e2e-c e2e-a
         for n in 1 2 3; do
           {ctr} view e2e-v$n e2e-c > /dev/null
           ! mount -o ro $({ctr} mounts /tmp/e2e-mnt e2e-v$n | grep -o '/dev/mapper/[^ ]*') /tmp/e2e-mnt || break
         done
         cat /tmp/e2e-mnt/cow; umount /tmp/e2e-mnt
         {ctr} usage e2e-c | tail -1 | awk '{{ print ($2 > 0) ? \"used\" : $0 }}'
         for view in $({ctr} ls | awk '/^e2e-v/ {{ print $1 }}'); do {ctr} rm $view || true; done
         {ctr} rm e2e-c || {ctr} label e2e-c containerd.io/gc.root="
    );
    let printed = sh(&script)?;
    check!(printed.starts_with("moo\n"), "{printed}");
    // A view that was collected is its parent's child in containerd's records still: then that goes by a collection, too.
    evict_all()
}

/// A layer's next, and the third disk of one parent, are there before they are asked for, and have what their parent has.
fn what_is_asked_for_again_is_made_ahead() -> Outcome {
    let client = client()?;
    let others = heirs()?;
    let made_ahead = || {
        wait_for("what is made ahead", || {
            let heirs: Vec<_> = heirs()?.difference(&others).cloned().collect();
            let there = thin_devices()?;
            match &heirs[..] {
                [heir] if Path::new("/dev/mapper").join(heir).exists() => Ok(format!("/dev/mapper/{heir}")),
                _ => Err(format!("made ahead: {heirs:?}; other devices: {there:?}").into()),
            }
        })
    };
    let write = |device: &str, word: &str| {
        sh(&format!(
            "echo {word} | dd of={device} bs=64k seek=1000 conv=sync,fsync oflag=direct iflag=fullblock status=none"
        ))
    };
    let written = |device: &str| {
        Outcome::Ok(
            sh(&format!("dd if={device} bs=64k skip=1000 count=1 iflag=direct status=none | head -1"))?
                .trim()
                .to_owned(),
        )
    };
    let layer = block_on(client.prepare("heir-layer", "", &[LAYER]))?.path;
    write(&layer, "layer")?;
    block_on(client.commit("heir-base", "heir-layer", &[]))?;
    let first = made_ahead()?;
    same!(block_on(client.prepare("heir-1", "heir-base", &[]))?.path, first, "the first disk of a layer");
    same!(written(&first)?, "layer", "what the first disk has");
    write(&first, "first")?;
    let second = block_on(client.prepare("heir-2", "heir-base", &[]))?.path;
    let third = made_ahead()?;
    let disk = block_on(client.prepare("heir-3", "heir-base", &[]))?.path;
    check!(disk == third && disk != second, "the third disk is {disk}, made ahead was {third}");
    same!(written(&disk)?, "layer", "what the third disk has");
    made_ahead()?;
    // Whoever would have come has gone.
    host("restart", "cowshed")?;
    wait_serving()?;
    wait_for("those of before to go", || {
        let left = heirs()?;
        check!(left.is_empty(), "{left:?}");
        Ok(())
    })?;
    same!(written(&first)?, "first", "what the first disk has after a restart");
    remove_all(&client)
}

/// As if containerd had ended between the snapshotter's answer and writing it down.
fn forgotten_by_containerd() -> Outcome {
    let known = client()?;
    block_on(known.prepare("known", "", &[]))?;
    let plugin = block_on(containerd_client::connect("/run/cowshed/snapshotter.sock"))?;
    let disk =
        block_on(Snapshots::new(plugin, snapshotter(), "e2e").prepare("e2e/1000000/forgotten", "", &[]))?;
    let device = disk.path.trim_start_matches("/dev/mapper/").to_owned();
    check!(thin_devices()?.contains(&device), "it is not there");
    host("kill", "containerd")?;
    wait_for("what containerd does not know to go", || {
        check!(!thin_devices()?.contains(&device), "{device} is still there");
        Ok(())
    })?;
    same!(block_on(known.list())?.len(), 1, "what containerd knows");
    remove_all(&known)
}

/// Counted on the whole machine, by the kernel.
fn starts_no_process() -> Outcome {
    let client = client()?;
    block_on(client.prepare("np-first", "", &[]))?;
    block_on(client.commit("np-parent", "np-first", &[]))?;
    let traced = "/sys/kernel/tracing/instances/e2e";
    sh(&format!(
        "mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
         udevadm settle; mkdir -p {traced}; echo 1 > {traced}/events/sched/sched_process_exec/enable; true"
    ))?;
    let trace = Path::new(traced).join("trace");
    let count = || -> Outcome<Vec<String>> {
        let text = fs::read_to_string(&trace)?;
        Ok(text.lines().filter(|line| line.contains("filename=")).map(str::to_owned).collect())
    };
    sh("true")?;
    check!(!count()?.is_empty(), "the tracepoint does not see what is started");
    fs::write(&trace, "")?;
    let seen = block_on(async {
        for n in 0..10 {
            let made = client.prepare(&format!("np-{n}"), "np-parent", &[]).await?;
            File::open(&made.path)?;
            client.view(&format!("np-v-{n}"), "np-parent").await?;
            client.commit(&format!("np-c-{n}"), &format!("np-{n}"), &[]).await?;
            client.remove(&format!("np-v-{n}")).await?;
            client.remove(&format!("np-c-{n}")).await?;
        }
        client.collect().await?;
        Outcome::Ok(())
    });
    let gone = wait_for("the devices to go", || {
        let links: Vec<String> = fs::read_dir("/dev/mapper")?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Outcome<_>>()?;
        let left = links.iter().filter(|link| link.starts_with("cowshed-")).count();
        check!(left < 2, "{left} are left: {links:?}");
        Ok(())
    });
    // udevd has time to do what it would do.
    block_on(async { tokio::time::sleep(Duration::from_secs(2)).await });
    let started = count()?;
    sh(&format!("echo 0 > {traced}/events/sched/sched_process_exec/enable; rmdir {traced}"))?;
    seen.and(gone)?;
    // The supervisor's own, of the host, are not ours or udev's.
    let ours: Vec<&String> =
        started.iter().filter(|line| !line.contains("filename=/usr/bin/sleep")).collect();
    check!(ours.is_empty(), "programs were started: {ours:?}");
    remove_all(&client)
}

fn sizes() -> Outcome {
    let client = client()?;
    let three = [(SIZE_LABEL, "3GiB")];
    let big = block_on(client.prepare("size-big", "", &three))?;
    same!(bytes_of(&big.path)?, 3 << 30, "the size of the device");
    same!(filesystem_bytes_of(&big.path)?, 3 << 30, "the size of its filesystem");
    // Of a layer: device and filesystem grow.
    block_on(client.prepare("size-layer", "", &[LAYER]))?;
    block_on(client.commit("size-base", "size-layer", &[LAYER]))?;
    let grown = block_on(client.prepare("size-grown", "size-base", &three))?;
    same!(bytes_of(&grown.path)?, 3 << 30, "the size of the grown device");
    same!(filesystem_bytes_of(&grown.path)?, 3 << 30, "the size of the grown filesystem");
    let plain = block_on(client.prepare("size-plain", "size-base", &[]))?;
    check!(bytes_of(&plain.path)? < 3 << 30, "a disk without the label has the label's size");
    // Of what a guest may have written: only the device.
    block_on(client.commit("size-guest", "size-plain", &[]))?;
    let own = block_on(client.prepare("size-own", "size-guest", &three))?;
    same!(bytes_of(&own.path)?, 3 << 30, "the size of the guest's new device");
    check!(filesystem_bytes_of(&own.path)? < 3 << 30, "a guest's filesystem was grown");
    let smaller = block_on(client.prepare("size-small", "size-base", &[(SIZE_LABEL, "512MiB")]));
    refused(smaller, Code::InvalidArgument, &["size-small", "size-base"])?;
    let odd = block_on(client.prepare("size-odd", "", &[(SIZE_LABEL, "much")]));
    refused(odd, Code::InvalidArgument, &[SIZE_LABEL, "much"])?;
    remove_all(&client)
}

fn an_open_device_outlives_its_snapshot() -> Outcome {
    let client = client()?;
    let made = block_on(client.prepare("open-a", "", &[]))?;
    let held = File::open(&made.path)?;
    block_on(client.remove("open-a"))?;
    collect()?;
    // The name is free at once, for another disk.
    let again = block_on(client.prepare("open-a", "", &[]))?;
    check!(again.path != made.path, "the name's new disk is the old one, {}", made.path);
    let mut there = thin_devices()?;
    check!(
        there.iter().any(|name| made.path.ends_with(name)),
        "the open device is gone; there are {there:?}"
    );
    // Also over a restart.
    host("restart", "cowshed")?;
    wait_serving()?;
    there = thin_devices()?;
    check!(there.iter().any(|name| made.path.ends_with(name)), "the restart took it; there are {there:?}");
    drop(held);
    wait_for("it to go", || {
        let there = thin_devices()?;
        check!(!there.iter().any(|name| made.path.ends_with(name)), "there are {there:?}");
        Ok(())
    })?;
    remove_all(&client)
}

fn views_of_what_was_not_unmounted() -> Outcome {
    let client = client()?;
    let made = block_on(client.prepare("dirty-a", "", &[]))?;
    sh(&format!(
        "mkdir -p /tmp/e2e-mnt; mount {} /tmp/e2e-mnt; echo moo > /tmp/e2e-mnt/cow; sync -f /tmp/e2e-mnt; \
         echo more > /tmp/e2e-mnt/cow2; sync /tmp/e2e-mnt/cow2",
        made.path
    ))?;
    // Committed while it is mounted: its journal has to be replayed, and a view cannot.
    block_on(client.commit("dirty-c", "dirty-a", &[]))?;
    let view = block_on(client.view("dirty-v", "dirty-c"))?;
    let child = block_on(client.prepare("dirty-b", "dirty-c", &[]))?;
    let layer = block_on(client.prepare("dirty-l", "dirty-c", &[("containerd.io/snapshot.ref", "moo")]))?;
    let seen = sh(&format!(
        "umount /tmp/e2e-mnt
         mount -o {} {} /tmp/e2e-mnt; cat /tmp/e2e-mnt/cow; umount /tmp/e2e-mnt
         mount {} /tmp/e2e-mnt; cat /tmp/e2e-mnt/cow /tmp/e2e-mnt/cow2; umount /tmp/e2e-mnt
         mount -o {} {} /tmp/e2e-mnt; cat /tmp/e2e-mnt/cow2; touch /tmp/e2e-mnt/cow3; umount /tmp/e2e-mnt
         e2fsck -fn {} > /dev/null 2>&1 && echo clean",
        view.options.join(","),
        view.path,
        child.path,
        layer.options.join(","),
        layer.path,
        layer.path
    ))?;
    same!(seen, "moo\nmoo\nmore\nmore\nclean\n", "what view, child and layer show");
    same!(
        sh(&format!("blockdev --getro {}", view.path))?.trim(),
        "1",
        "whether the view is read-only in the kernel"
    );
    remove_all(&client)
}

/// A thin device that somebody else has made, with the id that would be next.
fn what_is_not_ours_stays() -> Outcome {
    let client = client()?;
    let first = block_on(client.prepare("foreign-a", "", &[]))?;
    // The next id, which is the snapshotter's next choice, unless what has gone before still has it.
    let free = sh(&format!(
        "n=$(dmsetup table {} | awk '{{ print $5 + 1 }}'); last=$((n + 50))
         until dmsetup message vg-pool 0 \"create_thin $n\" 2> /dev/null; do n=$((n + 1)); [ $n -lt $last ]; done; echo $n",
        first.path
    ))?;
    let free = free.trim();
    let second = block_on(client.prepare("foreign-b", "", &[]));
    host("restart", "cowshed")?;
    wait_serving()?;
    let third = block_on(client.prepare("foreign-c", "", &[]));
    let left = remove_all(&client);
    // It deletes only if it is there still.
    sh(&format!("dmsetup message vg-pool 0 'delete {free}'"))?;
    left?;
    let told = sh("cowshed-host log cowshed")?;
    check!(told.contains("left alone"), "the log does not speak of what is not ours");
    check!(second.is_ok() && third.is_ok(), "{second:?} {third:?}");
    Ok(())
}

fn pool_that_does_not_write() -> Outcome {
    let client = client()?;
    let table = sh("dmsetup table vg-pool")?;
    let words: Vec<&str> = table.split_whitespace().collect();
    // … thin-pool META DATA BLOCK LOW_WATER COUNT FEATURE…
    let count: usize = words.get(7).ok_or("a short table")?.parse()?;
    let (head, features) = (words[..7].join(" "), words[8..].join(" "));
    let read_only = format!("{head} {} {features} read_only", count + 1);
    let reload = |table: &str| {
        sh(&format!(
            "dmsetup suspend vg-pool; dmsetup reload vg-pool --table '{table}'; dmsetup resume vg-pool"
        ))
    };
    reload(&read_only)?;
    let refusal = block_on(client.prepare("ro-a", "", &[]));
    let status = run("cowshed", &["status"]);
    reload(table.trim())?;
    refused(refusal, Code::FailedPrecondition, &["vg-pool", "read-only"])?;
    status?.fails(8, &["vg-pool"])?;
    check!(block_on(client.list())?.is_empty(), "what was refused is listed");
    block_on(client.prepare("ro-a", "", &[]))?;
    remove_all(&client)
}

/// First the pool's data cannot be read nor written for a while, then its metadata: the kernel then stops the pool until
/// it was repaired, as the refusal says.
fn pool_with_io_errors() -> Outcome {
    let client = client()?;
    let listed =
        || Outcome::Ok(block_on(client.list())?.into_iter().map(|info| info.name).collect::<Vec<_>>());
    block_on(client.prepare("io-a", "", &[]))?;
    block_on(client.commit("io-c", "io-a", &[]))?;
    let layer = block_on(client.prepare("io-l", "", &[LAYER]))?;
    let there = listed()?;

    let data = Broken::new("vg-pool_tdata")?;
    sh(&format!("dd if=/dev/urandom of={} bs=64k seek=1000 count=16 status=none", layer.path))?;
    let formatted = block_on(client.prepare("io-b", "", &[(SIZE_LABEL, "11GiB")]));
    let committed = block_on(client.commit("io-lc", "io-l", &[]));
    data.mend()?;
    // containerd 1.7 has no words for Internal and DataLoss, and passes them on as Unknown.
    failed(formatted, &[Code::Internal, Code::Unknown], &["mkfs", "11 GiB"])?;
    failed(committed, &[Code::Internal, Code::Unknown], &["flushing", &layer.path])?;
    same!(listed()?, there, "what is listed after errors of the data");
    // What was lost is not forgotten because the disk is back.
    let again = block_on(client.commit("io-lc", "io-l", &[]));
    failed(again, &[Code::DataLoss, Code::Unknown], &["io-l", "unpack it again"])?;
    block_on(client.prepare("io-b", "", &[(SIZE_LABEL, "11GiB")]))?;

    let there = listed()?;
    // The first time the service learns of it by the way, the second time at its start. It is not restarted for the repair.
    for restart in [false, true] {
        let metadata = Broken::new("vg-pool_tmeta")?;
        let made = block_on(client.prepare("io-d", "io-c", &[]));
        let left = listed();
        let refusing = if restart { host("restart", "cowshed").map(drop) } else { Ok(()) }.and_then(|()| {
            wait_for("a refusal that says what to do", || {
                let made = block_on(client.prepare("io-d", "io-c", &[]));
                refused(made, Code::FailedPrecondition, &["vg-pool", "lvconvert --repair"])
            })?;
            wait_for("a status that says so", || {
                run("cowshed", &["status"])?.fails(8, &["vg-pool", "systemctl stop cowshed", "cowshed pool repair"])
            })?;
            wait_for("a metric that says so", || {
                sh("curl -sf http://127.0.0.1:9850/metrics | grep -E '^cowshed_rescue.cause=.(pool|snapshotter).. 1$'")
            })?;
            listed()
        });
        metadata.mend()?;
        // vg/pool_meta0 is what LVM2 keeps of the old metadata.
        sh("dmsetup ls --target thin | awk '/^cowshed-/ { print $1 }' | xargs -r -n 1 dmsetup remove
            lvchange -an vg/pool; lvconvert -y --repair vg/pool 2>&1; lvremove -y vg/pool_meta0 2>&1; lvchange -ay vg/pool")?;
        wait_serving()?;
        refused(made, Code::FailedPrecondition, &["vg-pool", "lvconvert --repair"])?;
        same!(left?, there, "what is listed after errors of the metadata");
        same!(refusing?, there, "what is listed by a service that changes nothing");
        wait_for("a snapshot", || Ok(block_on(client.prepare("io-d", "io-c", &[])).map(drop)?))?;
        // What was active is active again.
        wait_for("the layer's device", || {
            sh(&format!("dd if={} of=/dev/null bs=64k count=1 status=none", layer.path)).map(drop)
        })?;
        block_on(client.remove("io-d"))?;
    }
    remove_all(&client)
}

/// Too short to be seen by who looks now and then: what is seen is that all devices have gone.
fn pool_taken_away_for_a_moment() -> Outcome {
    let client = client()?;
    let disk = block_on(client.prepare("away-a", "", &[]))?;
    let read = || sh(&format!("dd if={} of=/dev/null bs=64k count=1 status=none", disk.path)).map(drop);
    read()?;
    // It is looked for every two seconds, and has to be seen to be there once: nothing tells when that was.
    block_on(async { tokio::time::sleep(Duration::from_secs(5)).await });
    let pid = service_pid()?;
    sh(
        "dmsetup table vg-pool > /tmp/pool-table; dmsetup info -c --noheadings -o uuid vg-pool > /tmp/pool-uuid",
    )?;
    // The service brings back what it finds missing, and udev looks at what comes and goes.
    wait_for("the pool to be taken away", || {
        sh("dmsetup ls --target thin | awk '/^cowshed-/ { print $1 }' | xargs -r -n 1 dmsetup remove
            dmsetup remove vg-pool")
    })?;
    sh("dmsetup create vg-pool --uuid $(cat /tmp/pool-uuid) --table \"$(cat /tmp/pool-table)\"")?;
    wait_for("the disk's device", read)?;
    same!(service_pid()?, pid, "the service's process");
    wait_serving()?;
    block_on(client.prepare("away-b", "", &[]))?;
    remove_all(&client)
}

/// A part of the pool, with the table that it had; each access to it fails.
struct Broken {
    device: &'static str,
    table: String,
}

impl Broken {
    fn new(device: &'static str) -> Outcome<Self> {
        let table = sh(&format!("dmsetup table {device}"))?.trim().to_owned();
        let broken = Self { device, table };
        let sectors = broken.table.split_whitespace().nth(1).ok_or("a short table")?;
        broken.reload(&format!("0 {sectors} error"))?;
        Ok(broken)
    }

    fn mend(&self) -> Outcome {
        self.reload(&self.table)
    }

    fn reload(&self, table: &str) -> Outcome {
        let device = self.device;
        sh(&format!(
            "dmsetup suspend --nolockfs {device}; dmsetup reload {device} --table '{table}'; dmsetup resume {device}"
        ))
        .map(drop)
    }
}

/// A block of the pool's metadata is not what it was, and nobody has noticed yet.
fn damaged_pool_metadata() -> Outcome {
    let client = client()?;
    let path = block_on(client.prepare("meta-a", "", &[]))?.path;
    host("stop", "cowshed")?;
    // Byte 328 of the superblock: where the tree of thin devices begins.
    let metadata = "/dev/mapper/vg-pool_tmeta";
    let root =
        sh(&format!("dd if={metadata} bs=4k count=1 iflag=direct status=none | od -An -tu8 -j328 -N8"))?;
    let root = root.trim();
    sh(&format!("dd if={metadata} bs=4k skip={root} count=1 iflag=direct of=/tmp/e2e-block status=none"))?;
    let write = |from: &str| {
        sh(&format!(
            "dd if={from} of={metadata} bs=4k seek={root} count=1 oflag=direct conv=notrunc status=none"
        ))
    };
    write("/dev/urandom")?;
    let creations = || sh("dmsetup status vg-pool");
    let before = creations()?;
    let tested = host("start", "cowshed").and_then(|()| {
        wait_for("a refusal that says what to do", || {
            let made = block_on(client.prepare("meta-b", "", &[]));
            refused(
                made,
                Code::FailedPrecondition,
                &["vg-pool", "damaged", "thin_check says", "lvconvert --repair"],
            )
        })?;
        same!(block_on(client.list())?.len(), 1, "snapshots listed");
        same!(block_on(client.mounts("meta-a"))?.path, path, "the device of what is active");
        same!(creations()?, before, "the pool's status");
        Ok(())
    });
    let stopped = host("stop", "cowshed");
    write("/tmp/e2e-block")?;
    stopped?;
    host("start", "cowshed")?;
    wait_serving()?;
    tested?;
    wait_for("a snapshot", || Ok(block_on(client.prepare("meta-b", "", &[])).map(drop)?))?;
    remove_all(&client)
}

/// Metrics, against what the pool and the kernel say.
fn what_is_told_is_so() -> Outcome {
    let client = client()?;
    let told = |metric: &str| -> Outcome<f64> {
        let all = sh("curl -sf http://127.0.0.1:9850/metrics")?;
        let line = all.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
        Ok(line.ok_or_else(|| format!("there is no {metric}"))?.trim().parse()?)
    };
    let operations = |operation: &str| {
        told(&format!("cowshed_snapshotter_operations_total{{operation=\"{operation}\",result=\"ok\"}}"))
    };
    let of_kind = |kind: &str| told(&format!("cowshed_snapshotter_snapshots{{kind=\"{kind}\"}}"));
    let (committed, views) = (of_kind("committed")?, of_kind("view")?);
    let device = block_on(client.prepare("told-a", "", &[]))?.path;
    sh(&format!("dd if=/dev/urandom of={device} bs=1M seek=64 count=8 conv=fsync status=none"))?;
    block_on(client.commit("told-c", "told-a", &[]))?;
    block_on(client.view("told-v", "told-c"))?;
    block_on(client.list())?;
    // The pool's own word for it, from its metadata.
    let creations = "cowshed_snapshotter_pool_creation_time";
    let in_pool = sh("dmsetup message vg-pool 0 reserve_metadata_snap
         thin_dump -m /dev/mapper/vg-pool_tmeta | grep -o ' time=\"[0-9]*\"' | head -1 | tr -dc 0-9
         dmsetup message vg-pool 0 release_metadata_snap")?;
    same!(told(creations)?, in_pool.trim().parse::<f64>()?, "{creations} before a restart");
    host("restart", "cowshed")?;
    wait_serving()?;
    check!(told(creations)? >= in_pool.trim().parse::<f64>()?, "{creations} after a restart");
    same!((of_kind("committed")?, of_kind("view")?), (committed + 1.0, views + 1.0), "snapshots");
    same!(told("cowshed_snapshotter_up")?, 1.0, "cowshed_snapshotter_up");
    let before = told("cowshed_snapshotter_deleted_bytes_total")?;
    let removed = operations("remove")?;
    remove_all(&client)?;
    check!(operations("remove")? >= removed + 2.0, "removals are not counted");
    wait_for("all to be gone", || {
        // Both map the eight megabytes that were written.
        let gone = told("cowshed_snapshotter_deleted_bytes_total")? - before;
        check!(gone >= f64::from(16 << 20), "{gone} bytes are said to have gone");
        same!(told("cowshed_snapshotter_reclaim_backlog")?, 0.0, "the backlog");
        Ok(())
    })
}

/// `cowshed snapshotter`, for containerd's other clients, and nothing else of Cowshed.
fn alone() -> Outcome {
    let client = client()?;
    block_on(client.prepare("alone-a", "", &[]))?;
    block_on(client.commit("alone-c", "alone-a", &[]))?;
    host("stop", "cowshed")?;
    sh("cowshed snapshotter > /tmp/e2e-alone.log 2>&1 & echo $! > /tmp/e2e-alone.pid")?;
    let tested =
        wait_for("a view", || Ok(block_on(client.view("alone-v", "alone-c")).map(drop)?)).and_then(|()| {
            block_on(client.prepare("alone-b", "alone-c", &[]))?;
            check!(run("cowshed", &["status"])?.ok().is_err(), "the rest of Cowshed answers as well");
            remove_all(&client)
        });
    let stopped = sh("kill $(cat /tmp/e2e-alone.pid)
        timeout 60 tail --pid=$(cat /tmp/e2e-alone.pid) -f /dev/null; cat /tmp/e2e-alone.log");
    host("start", "cowshed")?;
    wait_serving()?;
    tested.map_err(|error| format!("{error:?}; it said: {stopped:?}"))?;
    stopped?;
    wait_for("a snapshot", || Ok(block_on(client.prepare("alone-d", "", &[])).map(drop)?))?;
    remove_all(&client)
}

/// The service's state in a small filesystem of its own meanwhile.
fn state_full_and_free_again() -> Outcome {
    let client = client()?;
    host("stop", "cowshed")?;
    // Some room beyond what is there.
    let moved = sh(&format!(
        "cp -a {STATE} /tmp/e2e-state && used=$(du -sk {STATE} | cut -f1) &&
         mount -t tmpfs -o size=$((used + 6144))k e2e {STATE} && cp -a /tmp/e2e-state/. {STATE}/"
    ));
    let tested = moved.and_then(|_| {
        host("start", "cowshed")?;
        wait_serving()?;
        fill_and_free(&client)
    });
    // Its state of now is what counts.
    host("stop", "cowshed")?;
    sh(&format!(
        "rm -f {STATE}/filler; rm -rf /tmp/e2e-state; cp -a {STATE} /tmp/e2e-state; umount {STATE}
         find {STATE} -mindepth 1 -delete; cp -a /tmp/e2e-state/. {STATE}/; rm -rf /tmp/e2e-state; sync -f {STATE}"
    ))?;
    host("start", "cowshed")?;
    wait_serving()?;
    tested
}

fn fill_and_free(client: &Snapshots) -> Outcome {
    block_on(client.prepare("full-0", "", &[]))?;
    let mut refusal = None;
    // So that it takes few.
    let (names, text) =
        ((0..8).map(|n| format!("containerd.io/snapshot/e2e-{n}")).collect::<Vec<_>>(), "x".repeat(4000));
    let labels: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), text.as_str())).collect();
    for n in 1..200 {
        sh(&format!("dd if=/dev/zero bs=1k status=none >> {STATE}/filler 2>/dev/null || true"))?;
        // The write-ahead log may have room for some more.
        if let Err(status) = block_on(client.prepare(&format!("full-{n}"), "", &labels)) {
            refusal = Some(status);
            break;
        }
    }
    let refusal = refusal.ok_or("no Prepare was refused with a full state directory")?;
    // containerd 1.7 has no word for ResourceExhausted, and passes it on as Unknown.
    let codes = [Code::ResourceExhausted, Code::Unknown];
    failed::<()>(Err(refusal), &codes, &["state directory is full", "snapshots.db"])?;
    fs::remove_file(format!("{STATE}/filler"))?;
    // What was given up meanwhile goes without a restart.
    wait_for("the devices of what was refused to go", || {
        let (there, listed) = (thin_devices()?, block_on(client.list())?);
        same!(there.len(), listed.len(), "devices {there:?}, snapshots {listed:?}");
        Ok(())
    })?;
    let image = image("tiny:1");
    acquire("full-vm", &image)?;
    release_fully("full-vm")?;
    remove_all(client)
}

fn damaged_store_is_left_alone() -> Outcome {
    let client = client()?;
    block_on(client.prepare("damaged-a", "", &[]))?;
    block_on(client.commit("damaged-c", "damaged-a", &[]))?;
    host("stop", "cowshed")?;
    let store = format!("{STATE}/snapshots.db");
    sh(&format!(
        "cp -a {store} /tmp/e2e-store; printf 'xxxxxxxxxxxxxxxx' | dd of={store} conv=notrunc status=none"
    ))?;
    let damaged = fs::read(&store)?;
    host("start", "cowshed")?;
    let said = wait_for("a refusal", || {
        let made = block_on(client.prepare("damaged-b", "", &[]));
        check!(made.is_err(), "a snapshot was made with a damaged store");
        let log = sh("cowshed-host log cowshed | tail -30")?;
        check!(log.contains("snapshots.db") && log.contains("damaged"), "{made:?}; the log: {log}");
        Ok(log)
    });
    host("stop", "cowshed")?;
    let now = fs::read(&store)?;
    sh(&format!("cp -a /tmp/e2e-store {store}; rm /tmp/e2e-store"))?;
    // A supervisor that was about to restart it may not have heard the first word.
    wait_for("cowshed to start", || {
        host("start", "cowshed")?;
        sh("cowshed status").map(drop)
    })?;
    said?;
    check!(now == damaged, "the damaged store was changed");
    // containerd waits before it connects again.
    wait_for("a view", || Ok(block_on(client.view("damaged-v", "damaged-c")).map(drop)?))?;
    remove_all(&client)
}
