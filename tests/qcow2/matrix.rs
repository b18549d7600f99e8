//! Every pair of options of qcow2 meets in some image here, and each image goes through both programs' hands:
//! made by one, written by both in turns, grown, cut, compressed, with snapshots; after every turn both find it
//! whole and read the same bytes.
//!
//! The list is printed (`cargo test --test qcow2 matrix:: -- --nocapture`).

use blockferry::format::qcow2::{Compat, CompressionType, CreateOptions, Preallocation, Repair};
use common::image::{Dice, Scratch};
use common::qcow2::{
    assert_bytes, check_by_qemu, content, content_by_qemu, create, options, ring, storm, storm_by_qemu, with,
};
use common::tool;

/// The dimensions, each with the number of its values.
const DIMENSIONS: [(&str, &[&str]); 11] = [
    ("made-by", &["us", "qemu"]),
    ("compat", &["1.1", "0.10"]),
    (
        "cluster_size",
        &[
            "512", "1024", "2048", "4096", "8192", "16384", "32768", "65536", "131072", "262144", "524288",
            "1048576", "2097152",
        ],
    ),
    ("refcount_bits", &["16", "1", "2", "4", "8", "32", "64"]),
    ("lazy_refcounts", &["off", "on"]),
    ("extended_l2", &["off", "on"]),
    ("compression_type", &["zlib", "zstd"]),
    ("backing", &["none", "raw", "qcow2-shorter", "qcow2-longer"]),
    ("data_file", &["none", "plain", "raw"]),
    ("preallocation", &["off", "metadata", "falloc", "full"]),
    ("then", &["storm", "compressed", "snapshots", "resizes"]),
];

/// One image: the value of each dimension, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Combination([usize; DIMENSIONS.len()]);

impl Combination {
    fn get(&self, name: &str) -> &'static str {
        let at = DIMENSIONS.iter().position(|(n, _)| *n == name).expect("a dimension");
        DIMENSIONS[at].1[self.0[at]]
    }

    /// Whether the format allows it.
    fn is_legal(&self) -> bool {
        let v2 = self.get("compat") == "0.10";
        let is = |name: &str, value: &str| self.get(name) == value;
        let cluster: u64 = self.get("cluster_size").parse().expect("a number");
        let refcount_bits: u32 = self.get("refcount_bits").parse().expect("a number");
        let data_file = !is("data_file", "none");
        let v3_only = !is("refcount_bits", "16")
            || is("lazy_refcounts", "on")
            || is("extended_l2", "on")
            || is("compression_type", "zstd")
            || data_file;
        let (backed, preallocated) = (!is("backing", "none"), !is("preallocation", "off"));
        let forbidden = [
            v2 && v3_only,
            // QEMU cannot zero what it lets the disk grow by.
            v2 && is("backing", "qcow2-longer") && is("then", "resizes"),
            is("extended_l2", "on") && cluster < 16_384,
            is("data_file", "raw") && backed,
            data_file && (is("then", "compressed") || is("then", "snapshots")),
            // Two layers of snapshots and the disk itself are more references than these count.
            refcount_bits <= 2 && is("then", "snapshots"),
            backed && preallocated && !is("extended_l2", "on"),
        ];
        !forbidden.contains(&true)
    }

    fn text(&self) -> String {
        let words =
            DIMENSIONS.iter().zip(self.0).map(|((name, values), at)| format!("{name}={}", values[at]));
        words.collect::<Vec<_>>().join(" ")
    }

    fn options(&self, size: u64) -> CreateOptions {
        CreateOptions {
            size,
            cluster_size: self.get("cluster_size").parse().expect("a number"),
            compat: if self.get("compat") == "1.1" { Compat::V3 } else { Compat::V2 },
            refcount_bits: self.get("refcount_bits").parse().expect("a number"),
            lazy_refcounts: self.get("lazy_refcounts") == "on",
            extended_l2: self.get("extended_l2") == "on",
            compression_type: if self.get("compression_type") == "zstd" {
                CompressionType::Zstd
            } else {
                CompressionType::Zlib
            },
            preallocation: match self.get("preallocation") {
                "metadata" => Preallocation::Metadata,
                "falloc" => Preallocation::Falloc,
                "full" => Preallocation::Full,
                _ => Preallocation::Off,
            },
            data_file: (self.get("data_file") != "none").then(|| "image.data".into()),
            data_file_raw: self.get("data_file") == "raw",
            backing_file: (self.get("backing") != "none").then(|| "base".into()),
            backing_fmt: (self.get("backing") != "none")
                .then(|| if self.get("backing") == "raw" { "raw" } else { "qcow2" }.into()),
            ..CreateOptions::default()
        }
    }
}

/// Combinations in which every legal pair of values meets, drawn greedily; always the same ones.
fn combinations() -> Vec<Combination> {
    let pairs_of = |c: &Combination| {
        let mut pairs = Vec::new();
        for a in 0..DIMENSIONS.len() {
            pairs.extend((a + 1..DIMENSIONS.len()).map(|b| (a, c.0[a], b, c.0[b])));
        }
        pairs
    };
    let mut dice = Dice::new(2);
    let draw = |dice: &mut Dice| {
        Combination(std::array::from_fn(|i| dice.below(DIMENSIONS[i].1.len() as u64) as usize))
    };
    let mut covered = std::collections::BTreeSet::new();
    let mut found = Vec::new();
    let mut idle = 0;
    while idle < 40 || found.len() < 210 {
        let best = (0..400)
            .map(|_| draw(&mut dice))
            .filter(Combination::is_legal)
            .max_by_key(|c| pairs_of(c).iter().filter(|pair| !covered.contains(*pair)).count());
        let Some(best) = best else { continue };
        let new = pairs_of(&best).into_iter().filter(|pair| covered.insert(*pair)).count();
        idle = if new == 0 { idle + 1 } else { 0 };
        if (new > 0 || found.len() < 210) && !found.contains(&best) {
            found.push(best);
        }
    }
    found
}

/// Looks at an image from both sides.
fn agree(ring: &blockferry_ring::Ring, path: &str, model: &[u8], what: &str) {
    check_by_qemu(path);
    let report = with(ring, path, &options(true), async |image| image.check(Repair::None).await.unwrap());
    assert!(report.is_clean(), "{what}: {report:?}");
    let by_qemu: serde_json::Value =
        serde_json::from_str(&tool("qemu-img", &["check", "-f", "qcow2", "--output=json", path]))
            .expect("JSON");
    let number = |name: &str| by_qemu[name].as_u64().unwrap_or(0);
    assert_eq!(
        (
            report.total_clusters,
            report.allocated_clusters,
            report.compressed_clusters,
            report.image_end_offset
        ),
        (
            number("total-clusters"),
            number("allocated-clusters"),
            number("compressed-clusters"),
            number("image-end-offset")
        ),
        "{what}"
    );
    assert_bytes(&format!("{what}: read by QEMU"), &content_by_qemu(path), model);
    assert_bytes(&format!("{what}: read by us"), &content(ring, path), model);
}

fn live(combination: &Combination, seed: u64) {
    let (scratch, ring) = (Scratch::new(), ring());
    let cluster: u64 = combination.get("cluster_size").parse().expect("a number");
    let mut size = (cluster * 24).clamp(256 << 10, 10 << 20) + 512 * (seed % 3) * 5;
    let path = scratch.path("image");
    let mut model = vec![0; size as usize];
    if combination.get("backing") != "none" {
        let raw = scratch.holey("base", size - 10_240, &[(4096, size / 2), (size - 50_000, 30_000)]);
        let bytes = std::fs::read(&raw).expect("the base");
        model[..bytes.len()].copy_from_slice(&bytes);
        if combination.get("backing").starts_with("qcow2") {
            let over = scratch.path("over");
            tool("qemu-img", &["convert", "-O", "qcow2", &raw, &over]);
            if combination.get("backing") == "qcow2-longer" {
                tool("qemu-img", &["resize", "-f", "qcow2", &over, &(size + 1_000_448).to_string()]);
                let place = format!("write -q -P 77 {} 800k", size.next_multiple_of(512));
                tool("qemu-io", &["-f", "qcow2", "-c", &place, &over]);
            }
            std::fs::rename(&over, &raw).expect("it is there");
        }
    }
    let mut wanted = combination.options(size);
    // QEMU takes the name of a data file as it is, whatever folder the image is in.
    wanted.data_file = wanted.data_file.map(|name| scratch.path(&name));
    if combination.get("made-by") == "us" {
        create(&ring, &path, &wanted);
    } else {
        create_by_qemu(&path, &wanted);
    }
    let what = combination.text();
    agree(&ring, &path, &model, &format!("{what}, new"));
    for round in 0..2u64 {
        let (r, m, c) = (ring.clone(), model.clone(), *combination);
        model = with(&ring, &path, &options(false), async move |image| {
            let mut model = m;
            storm(&r, &image, &mut model, seed * 8 + round, 10).await;
            if c.get("then") == "compressed" {
                compress_some(&r, &image, &mut model, seed + round).await;
                storm(&r, &image, &mut model, seed * 8 + round + 4, 4).await;
            }
            if c.get("then") == "snapshots" {
                image.snapshot_create(&format!("s{round}"), (1, 2)).await.expect("a snapshot");
                storm(&r, &image, &mut model, seed * 8 + round + 4, 4).await;
            }
            if c.get("then") == "resizes" {
                let len =
                    if round == 0 { model.len() as u64 + 3 * cluster + 512 } else { model.len() as u64 / 2 };
                let len = len - len % 512;
                image.resize(len, Preallocation::Off).await.expect("a resize");
                model.resize(len as usize, 0);
                storm(&r, &image, &mut model, seed * 8 + round + 4, 4).await;
            }
            model
        });
        agree(&ring, &path, &model, &format!("{what}, after our round {round}"));
        storm_by_qemu(&path, &mut model, seed * 8 + round, 8);
        match combination.get("then") {
            "snapshots" => {
                tool("qemu-img", &["snapshot", "-c", &format!("q{round}"), &path]);
                storm_by_qemu(&path, &mut model, seed * 8 + round + 1, 4);
            }
            "resizes" => {
                size = model.len() as u64 + 70_656;
                tool("qemu-img", &["resize", "-q", "-f", "qcow2", &path, &size.to_string()]);
                model.resize(size as usize, 0);
            }
            _ => {}
        }
        agree(&ring, &path, &model, &format!("{what}, after QEMU's round {round}"));
    }
}

fn create_by_qemu(path: &str, wanted: &CreateOptions) {
    let on = |flag: bool| if flag { "on" } else { "off" };
    let mut said = vec![
        format!("cluster_size={}", wanted.cluster_size),
        format!("compat={}", wanted.compat.name()),
        format!("preallocation={}", wanted.preallocation.name()),
    ];
    if wanted.compat == Compat::V3 {
        said.push(format!("refcount_bits={}", wanted.refcount_bits));
        said.push(format!("lazy_refcounts={}", on(wanted.lazy_refcounts)));
        said.push(format!("extended_l2={}", on(wanted.extended_l2)));
        said.push(format!("compression_type={}", wanted.compression_type.name()));
    }
    if let Some(name) = &wanted.data_file {
        said.push(format!("data_file={name}"));
        said.push(format!("data_file_raw={}", on(wanted.data_file_raw)));
    }
    if let Some(name) = &wanted.backing_file {
        said.push(format!("backing_file={name}"));
    }
    if let Some(name) = &wanted.backing_fmt {
        said.push(format!("backing_fmt={name}"));
    }
    let size = wanted.size.to_string();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &said.join(","), path, &size]);
}

/// Compresses what clusters there are that nothing is in yet.
async fn compress_some(
    ring: &blockferry_ring::Ring,
    image: &std::rc::Rc<blockferry::format::qcow2::Qcow2>,
    model: &mut [u8],
    seed: u64,
) {
    use blockferry::block::Driver;
    let cluster = image.info().await.expect("facts").cluster_size as usize;
    let mut running = Vec::new();
    for (i, bytes) in model.chunks_mut(cluster).enumerate() {
        let at = (i * cluster) as u64;
        let extent = image.block_status(at, bytes.len() as u64).await.expect("a status");
        if extent.allocated || extent.len < bytes.len() as u64 {
            continue;
        }
        bytes.fill((seed % 250) as u8 + 1);
        bytes[0] = i as u8;
        let (image, bytes) = (image.clone(), bytes.to_vec());
        running.push(ring.spawn_with_result(async move { image.write_compressed_bytes(at, bytes).await }));
        if running.len() >= 8 {
            running.remove(0).take().await.expect("a compressed cluster");
        }
    }
    for result in running {
        result.take().await.expect("a compressed cluster");
    }
}

#[test]
fn every_pair_of_options() {
    let all = combinations();
    assert!(all.len() >= 200, "{}", all.len());
    let next = std::sync::atomic::AtomicUsize::new(0);
    let failed = std::sync::Mutex::new(Vec::new());
    // Most of the time goes by in other programs.
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(combination) = all.get(i) else { break };
                    println!("{i:3}: {}", combination.text());
                    if std::panic::catch_unwind(|| live(combination, i as u64)).is_err() {
                        failed.lock().expect("a list").push(combination.text());
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("a list");
    assert!(failed.is_empty(), "{} of {} failed:\n{}", failed.len(), all.len(), failed.join("\n"));
}
