//! Walks over an image's tables let others have their turn.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use blockferry::engine::ImageOptions;
use blockferry::engine::open::open_qcow2;
use blockferry::format::qcow2::{CreateOptions, Preallocation, Qcow2, Repair};
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::sim::{FileModel, World, WorldConfig};
use blockferry_ring::{Config, Ring};

/// Clusters of an image whose tables are walked: all of them in one table of 2 MiB.
const CLUSTERS: u64 = 20_000;

/// Makes an image in the world whose tables are full, and holds no data.
async fn full_image(ring: &Ring) -> Rc<Qcow2> {
    let file = open(ring, Path::new("/image"), &OpenOptions::default()).unwrap();
    let options = CreateOptions {
        size: CLUSTERS << 21,
        cluster_size: 2 << 20,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::default()
    };
    Qcow2::create(ring, &file, None, &options).await.unwrap();
    drop(file);
    open_qcow2(ring, "/image", &ImageOptions::default()).await.unwrap()
}

/// How often others had their turn while `work` was done.
async fn turns_meanwhile<T>(ring: &Ring, work: impl Future<Output = T>) -> (T, u64) {
    let (over, turns) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
    let other = ring.spawn_with_result({
        let (ring, over, turns) = (ring.clone(), over.clone(), turns.clone());
        async move {
            while !over.get() {
                turns.set(turns.get() + 1);
                ring.yield_now().await;
            }
        }
    });
    let done = work.await;
    over.set(true);
    other.take().await;
    (done, turns.get())
}

/// One yields after so many entries at the latest, and everything is looked at once or more.
const TURNS_MIN: u64 = CLUSTERS / 256;

#[test]
fn walks_over_the_tables_of_an_image_let_others_have_their_turn() {
    let world = World::new(WorldConfig::new(3));
    world.add_file("/image", FileModel::regular(0));
    let ring = Ring::with_backend(world.backend(), &Config::default()).unwrap();
    let inside = ring.clone();
    ring.block_on(async move {
        let ring = inside;
        let image = full_image(&ring).await;
        // What waits for the disk gives turns, too: so much as is certainly not due to that.
        let (id, turns) = turns_meanwhile(&ring, image.snapshot_create("one", (1, 2))).await;
        assert!(turns >= 3 * TURNS_MIN, "{turns} turns during a snapshot");
        let (report, turns) = turns_meanwhile(&ring, image.check(Repair::None)).await;
        let report = report.unwrap();
        assert_eq!((report.corruptions, report.leaks, report.allocated_clusters), (0, 0, CLUSTERS));
        assert!(turns >= 3 * TURNS_MIN, "{turns} turns during a check");
        let (deleted, turns) = turns_meanwhile(&ring, image.snapshot_delete(&id.unwrap())).await;
        deleted.unwrap();
        assert!(turns >= 3 * TURNS_MIN, "{turns} turns during the end of a snapshot");
    });
    assert_eq!(ring.shutdown(1_000_000_000).leaked, 0);
}
