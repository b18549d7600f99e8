//! Safe rebases in the simulated world: the layer below is swapped for one of another length, with data where the old one
//! had none. Whatever ends the rebase, the image shows what it showed, over whichever backing file its header names.

use std::rc::Rc;

use blockferry::base::planted::{Bug, plant};
use blockferry::base::rng::Rng;
use blockferry::block::{BlockError, Driver, Layer, Permissions, WriteFlags, ZeroFlags};
use blockferry::engine::rebase::Rebase;
use blockferry::format::qcow2::{Backing, Compat, CreateOptions, OpenOptions, Qcow2, Repair};
use blockferry_ring::Ring;
use blockferry_ring::sim::{FileModel, World, WorldConfig};

use super::{DISK, NoFiles, SECTOR, file, read_all, ring, stamp};

/// A file below the image: its length in sectors, and pieces of data in it. `None`: there is none.
type Below = Option<(u64, Vec<(u64, u64)>)>;

#[derive(Debug)]
struct Story {
    seed: u64,
    create: CreateOptions,
    old: Below,
    new: Below,
    /// First sector, sectors, zeroes.
    writes: Vec<(u64, u64, bool)>,
}

impl Story {
    fn draw(seed: u64) -> Story {
        let mut rng = Rng::new(seed ^ 0x7eba5e);
        let mut one = |of: &[u32]| of[rng.below(of.len() as u64) as usize];
        let cluster_size = one(&[512, 4096, 16_384, 65_536]);
        let extended_l2 = cluster_size >= 16_384 && one(&[0, 1]) == 1;
        let compat = if !extended_l2 && one(&[0, 0, 1]) == 1 { Compat::V2 } else { Compat::V3 };
        let sectors = u64::from(one(&[1, 40, 300])) + rng.below(200);
        let mut pieces = |len: u64, most: u64| -> Vec<(u64, u64)> {
            let count = rng.below(most + 1);
            (0..count)
                .map(|_| {
                    let first = rng.below(len);
                    (first, 1 + rng.below((len - first).min(64)))
                })
                .collect()
        };
        let writes = pieces(sectors, 3).into_iter().map(|(first, n)| (first, n, n % 3 == 0)).collect();
        let mut below = |shorter: u64| {
            let len = [sectors, sectors + 50, 1 + shorter % sectors][(shorter % 3) as usize];
            (!shorter.is_multiple_of(7)).then(|| (len, pieces(len, 4)))
        };
        let (old, new) = (below(seed / 3 + 1), below(seed * 31 + 5));
        let size = sectors * SECTOR as u64;
        let backing_file = old.is_some().then(|| "old".to_owned());
        let backing_fmt = old.is_some().then(|| "raw".to_owned());
        let create = CreateOptions {
            size,
            cluster_size,
            extended_l2,
            compat,
            backing_file,
            backing_fmt,
            ..CreateOptions::default()
        };
        Story { seed, create, old, new, writes }
    }
}

fn lay_out(world: &World, name: &str, below: &Below, tag: u32) {
    let Some((len, pieces)) = below else { return };
    world.add_file(name, FileModel::regular(len * SECTOR as u64));
    for (first, n) in pieces {
        let mut bytes = vec![0; (n * SECTOR as u64) as usize];
        bytes.chunks_exact_mut(SECTOR).enumerate().for_each(|(i, sector)| stamp(sector, tag + i as u32));
        world.write_raw(name, first * SECTOR as u64, &bytes);
    }
}

async fn open(ring: &Ring, backing: Option<&str>, for_check: bool) -> Result<Rc<Qcow2>, BlockError> {
    let backing = match backing {
        Some(name) => Backing::Given(file(ring, &format!("/{name}"), true)),
        None => Backing::None,
    };
    let options = OpenOptions { read_only: for_check, backing, for_check, data_file: None, snapshot: None };
    Qcow2::open(ring, &file(ring, DISK, for_check), &NoFiles, options).await
}

/// What the image shows over the file that it names; the name.
fn look(world: &World) -> Result<(Option<String>, Vec<u8>), String> {
    let ring = ring(world);
    let r = ring.clone();
    ring.block_on(async move {
        let told = |error: BlockError| error.to_string();
        let image = open(&r, None, true).await.map_err(told)?;
        let report = image.check(Repair::None).await.map_err(told)?;
        if report.corruptions + report.check_errors > 0 {
            return Err(format!("{:?}", report.messages));
        }
        let name = image.recorded_backing().map(|(name, _)| name);
        image.set_permissions(Permissions::NONE).map_err(told)?;
        drop(image);
        let image = open(&r, name.as_deref(), false).await.map_err(told)?;
        let bytes = read_all(&r, &image).await.map_err(told)?;
        Ok((name, bytes))
    })
}

async fn rebase(ring: Ring, image: Rc<Qcow2>, has_new: bool) {
    let new = has_new.then(|| file(&ring, "/new", true));
    let work = Rebase::new(&ring, image.clone(), new);
    let mut at = 0;
    while at < image.len() {
        at = work.step(at).await.expect("a step").0;
    }
    image.flush().await.expect("a flush");
    image.set_backing(has_new.then_some(("new", Some("raw")))).await.expect("another name");
}

/// How many cuts were looked at.
fn run(story: &Story, every: u64) -> Result<u64, String> {
    let world = World::new(WorldConfig::new(story.seed));
    world.add_file(DISK, FileModel::regular(0));
    lay_out(&world, "/old", &story.old, 1 << 20);
    lay_out(&world, "/new", &story.new, 2 << 20);
    let ring = ring(&world);
    let (r, create, writes) = (ring.clone(), story.create.clone(), story.writes.clone());
    let image = ring.block_on(async move {
        Qcow2::create(&r, &file(&r, DISK, false), None, &create).await.expect("a new image");
        let image = open(&r, create.backing_file.as_deref(), false).await.expect("it opens");
        for (first, n, zero) in writes {
            let (at, len) = (first * SECTOR as u64, n * SECTOR as u64);
            if zero {
                image.write_zeroes(at, len, ZeroFlags::default()).await.expect("zeroes");
            } else {
                let mut buf = r.alloc(len as usize).await;
                stamp(buf.as_mut_slice(), 7);
                image.write(at, buf.freeze(), WriteFlags::default()).await.expect("a write");
            }
        }
        image.flush().await.expect("a flush");
        image
    });
    let told = |why: String| format!("seed {}: {why}\n{story:?}", story.seed);
    let (_, wanted) = look(&world.fork_after_power_cut(0)).map_err(told)?;
    let done = ring.spawn_with_result(rebase(ring.clone(), image, story.new.is_some()));
    let (mut seen, mut cuts, mut more) = (world.events(), 0, true);
    while more {
        more = !done.is_given();
        if more {
            let _ = ring.turn_blocking();
        }
        if more && world.events() < seen + every {
            continue;
        }
        seen = world.events();
        let (name, bytes) = look(&world.fork_after_power_cut(seen)).map_err(told)?;
        if bytes != wanted {
            let at = bytes.iter().zip(&wanted).position(|(a, b)| a != b);
            return Err(told(format!("over {name:?} it shows something else at {at:?}")));
        }
        cuts += 1;
    }
    Ok(cuts)
}

#[test]
fn an_image_shows_over_another_backing_file_what_it_showed() {
    let cuts: u64 = (0..150).map(|seed| run(&Story::draw(seed), 5).unwrap()).sum();
    assert!(cuts > 1000, "{cuts}");
}

#[test]
fn a_rebase_that_rests_on_what_is_below_now_is_found() {
    plant(Some(Bug::ZeroesRestOnBelow));
    let found = (0..150).find_map(|seed| run(&Story::draw(seed), 50).err());
    plant(None);
    assert!(found.is_some_and(|why| why.contains("shows something else")));
}
