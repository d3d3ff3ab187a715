//! On a containerd, a kernel and a ledger in memory.

#![allow(clippy::unwrap_used)]

use cowshed_leases::Generation;

use super::*;
use crate::{
    evict::tests::{GIB, Host, host},
    fakes::book,
    kernel::Load,
};

fn usage(host: &Host) -> Usage {
    let ledger = host.evictor.keeper.ledger.clone();
    let kernel = host.process.acquirer.kernel.clone();
    Usage::new(ledger, kernel, host.evictor.clone(), Metrics::new().unwrap())
}

/// VM `n` has a disk, which counts so much.
async fn granted(host: &Host, n: u32, load: Load) {
    let ledger = &host.evictor.keeper.ledger;
    let lease = book::acquire(ledger, n).await;
    assert!(lease.generation >= Generation(1));
    let grant = book::grant(n);
    host.world.state.lock().unwrap().devices.insert(grant.device.dm_name.clone(), 0);
    ledger.grant(lease.id, grant, book::now()).await.unwrap();
    counts(host, n, load);
}

fn counts(host: &Host, n: u32, load: Load) {
    host.world.state.lock().unwrap().loads.insert(book::grant(n).device.dm_name, load);
}

fn gib(mapped: u64, written: u64) -> Load {
    Load { mapped: mapped * GIB, written: written * GIB, read: 0 }
}

#[tokio::test(start_paused = true)]
async fn disks_have_what_they_map_beyond_their_origin() {
    let host = host();
    let usage = usage(&host);
    assert!(usage.disks().await.unwrap().all().is_empty());
    tokio::time::advance(DISKS_FRESH).await;
    // The fake containerd says that each has a GiB of its own.
    granted(&host, 1, gib(3, 1)).await;
    let first = usage.disks().await.unwrap();
    assert_eq!((first.all()[0].own, first.own(), first.all()[0].rate), (Some(GIB), GIB, None));
    granted(&host, 2, gib(2, 0)).await;
    counts(&host, 1, gib(6, 9));
    assert_eq!(usage.disks().await.unwrap().all().len(), 1, "that was a moment ago");
    tokio::time::advance(DISKS_FRESH * 2).await;
    let second = usage.disks().await.unwrap();
    assert_eq!(second.over, Some(DISKS_FRESH * 2));
    let most = second.first(Order::Own, 9);
    let told: Vec<_> = most.iter().map(|disk| (disk.lease.vm.to_string(), disk.own)).collect();
    // The second has nothing that its origin does not have; nobody had to be asked.
    assert_eq!(told, [("vm-1".to_owned(), Some(4 * GIB)), ("vm-2".to_owned(), Some(0))]);
    assert_eq!(most[0].rate, Some(Rate { written: 4.0 * GIB as f64, grown: 1.5 * GIB as f64 }));
    // A device that is not active any more is none.
    host.world.state.lock().unwrap().devices.clear();
    tokio::time::advance(DISKS_FRESH).await;
    assert!(usage.disks().await.unwrap().all().is_empty());
}

#[tokio::test(start_paused = true)]
async fn images_take_what_their_layers_have() {
    let host = host();
    let usage = usage(&host);
    host.store.put("app", 3, 0);
    host.store.put("old", 5, 0);
    host.spare(7).await;
    let taken = usage.images().await.unwrap();
    let of =
        |image: &crate::evict::Taken| (image.names[0].clone(), image.takes.alone.data.0, image.takes.disks);
    let told: Vec<_> = taken.images.iter().map(of).collect();
    assert_eq!(
        told,
        [("r.example/old:1".to_owned(), 5 * GIB, 0), ("r.example/app:1".to_owned(), 3 * GIB, 1)]
    );
    assert_eq!((taken.layers, taken.layer_bytes, taken.disks), (2, 8 * GIB, 1));
    host.store.put("new", 1, 0);
    assert_eq!(usage.images().await.unwrap().images.len(), 2, "that was a moment ago");
    tokio::time::advance(IMAGES_FRESH).await;
    assert_eq!(usage.images().await.unwrap().images.len(), 3);
}
