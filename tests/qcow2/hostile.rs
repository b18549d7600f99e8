//! qcow2 images that are damaged, out of the ordinary, or made to do harm.

use std::os::unix::fs::FileExt;

use blockferry::block::{Driver, WriteFlags};
use blockferry::engine::ImageOptions;
use blockferry::engine::open::open_qcow2;
use blockferry::format::qcow2::{CheckReport, CreateOptions, Reach, Repair};
use common::image::{Dice, Scratch};
use common::qcow2::{
    assert_bytes, check_by_qemu, content, content_by_qemu, create, options, ring, storm, with,
};
use common::{Process, tool};

fn of_size(size: u64) -> CreateOptions {
    CreateOptions { size, ..CreateOptions::default() }
}

fn patch(path: &str, at: u64, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(path).expect("an image");
    file.write_all_at(bytes, at).expect("a write");
}

fn peek(path: &str, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    std::fs::File::open(path).expect("an image").read_exact_at(&mut bytes, at).expect("a read");
    bytes
}

fn for_check(read_only: bool) -> ImageOptions {
    ImageOptions { for_check: true, no_backing: true, ..options(read_only) }
}

fn check(ring: &blockferry_ring::Ring, path: &str, repair: Repair) -> CheckReport {
    let how = for_check(repair == Repair::None);
    with(ring, path, &how, async move |image| image.check(repair).await.expect("a check"))
}

/// What opening says.
fn refusal(ring: &blockferry_ring::Ring, path: &str, options: ImageOptions) -> String {
    let (r, path) = (ring.clone(), path.to_owned());
    ring.block_on(async move {
        open_qcow2(&r, &path, &options).await.err().map_or(String::new(), |e| e.to_string())
    })
}

fn qemu_check(path: &str) -> (u64, u64) {
    let mut command = std::process::Command::new("qemu-img");
    command.args(["check", "-f", "qcow2", "--output=json", path]);
    let ended = Process::spawn(command).end();
    let found: serde_json::Value = serde_json::from_str(&ended.out).unwrap_or_default();
    (found["corruptions"].as_u64().unwrap_or(0), found["leaks"].as_u64().unwrap_or(0))
}

/// An image with data, and what it reads as.
fn sample(
    scratch: &Scratch,
    ring: &blockferry_ring::Ring,
    options_of: &CreateOptions,
    seed: u64,
) -> (String, Vec<u8>) {
    let path = scratch.path("image");
    create(ring, &path, options_of);
    let (r, len) = (ring.clone(), options_of.size as usize);
    let model = with(ring, &path, &options(false), async move |image| {
        let mut model = vec![0; len];
        storm(&r, &image, &mut model, seed, 20).await;
        model
    });
    (path, model)
}

#[test]
fn checks_agree_on_damaged_refcounts_and_repairs_mend_them() {
    let (scratch, ring) = (Scratch::new(), ring());
    let mut both = [0, 0];
    for seed in 0..30u64 {
        let mut dice = Dice::new(seed);
        let cluster_size = [4096, 16_384, 65_536][dice.below(3) as usize];
        let (path, model) =
            sample(&scratch, &ring, &CreateOptions { cluster_size, ..of_size(3 << 20) }, seed);
        // The first refcount block; 16 bits a cluster.
        let block =
            u64::from_be_bytes(peek(&path, u64::from(cluster_size), 8).try_into().expect("eight bytes"));
        let clusters = std::fs::metadata(&path).expect("an image").len() / u64::from(cluster_size);
        let leaks_only = seed % 2 == 0;
        for _ in 0..1 + dice.below(6) {
            let at = block + dice.below(clusters) * 2;
            let now = u16::from_be_bytes(peek(&path, at, 2).try_into().expect("two bytes"));
            let new = if leaks_only || dice.below(2) == 0 { now + 1 } else { 0 };
            // A sole reference that is counted twice would be marked wrongly: that is more than a leak.
            if leaks_only && now > 0 {
                continue;
            }
            patch(&path, at, &new.to_be_bytes());
        }
        let by_us = check(&ring, &path, Repair::None);
        let by_qemu = qemu_check(&path);
        assert_eq!((by_us.corruptions, by_us.leaks), by_qemu, "seed {seed}: {:?}", by_us.messages);
        let repair = if leaks_only { Repair::Leaks } else { Repair::All };
        let mended = check(&ring, &path, repair);
        assert!(mended.is_clean(), "seed {seed}: {mended:?}");
        assert_eq!((mended.corruptions_fixed, mended.leaks_fixed), by_qemu, "seed {seed}");
        check_by_qemu(&path);
        assert_bytes("mended", &content_by_qemu(&path), &model);
        both[usize::from(leaks_only)] += mended.leaks_fixed + mended.corruptions_fixed;
    }
    assert!(both[0] > 0 && both[1] > 0, "{both:?}");
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_to_be_written() {
    let (scratch, ring) = (Scratch::new(), ring());
    let (path, model) =
        sample(&scratch, &ring, &CreateOptions { lazy_refcounts: true, ..of_size(2 << 20) }, 1);
    // As QEMU leaves it with lazy refcounts when it is killed: the mark, and refcounts that were never written.
    patch(&path, 79, &[1]);
    patch(&path, 131_072 + 2 * 6, &[0; 8]);
    assert_bytes("read only", &content(&ring, &path), &model);
    assert!(with(&ring, &path, &options(true), async |image| image.info().await.unwrap()).dirty);
    with(&ring, &path, &options(false), async |image| assert!(!image.info().await.unwrap().dirty));
    check_by_qemu(&path);
    assert_eq!(peek(&path, 79, 1), [0]);
    assert_bytes("afterwards", &content(&ring, &path), &model);
}

#[test]
fn a_corrupt_image_is_read_and_not_written() {
    let (scratch, ring) = (Scratch::new(), ring());
    let (path, model) = sample(&scratch, &ring, &of_size(2 << 20), 2);
    patch(&path, 79, &[2]);
    assert!(refusal(&ring, &path, options(false)).contains("marked as damaged"));
    assert_bytes("read only", &content(&ring, &path), &model);
    let report = check(&ring, &path, Repair::All);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(peek(&path, 79, 1), [0]);
    assert_eq!(refusal(&ring, &path, options(false)), "");
}

#[test]
fn damage_that_is_met_is_marked_and_stops_all_writing() {
    let (scratch, ring) = (Scratch::new(), ring());
    let path = scratch.path("image");
    create(&ring, &path, &of_size(2 << 20));
    let r = ring.clone();
    with(&ring, &path, &options(false), async move |image| {
        let mut buf = r.alloc(65_536).await;
        buf.as_mut_slice().fill(1);
        image.write(0, buf.freeze(), WriteFlags::default()).await.unwrap();
    });
    // The guest's first cluster is said to lie on the L1 table.
    let l1 = u64::from_be_bytes(peek(&path, 40, 8).try_into().expect("eight bytes"));
    let l2 = u64::from_be_bytes(peek(&path, l1, 8).try_into().expect("eight bytes")) & 0x00ff_ffff_ffff_fe00;
    patch(&path, l2, &(l1 | 1 << 63).to_be_bytes());
    let before = peek(&path, l1, 512);
    let (r, p) = (ring.clone(), path.clone());
    ring.block_on(async move {
        let image = open_qcow2(&r, &p, &options(false)).await.unwrap();
        for _ in 0..2 {
            let mut buf = r.alloc(4096).await;
            buf.as_mut_slice().fill(7);
            let error = image.write(0, buf.freeze(), WriteFlags::default()).await.unwrap_err();
            assert!(error.to_string().contains("damaged"), "{error}");
        }
    });
    assert_eq!(peek(&path, l1, 512), before);
    assert_eq!(peek(&path, 79, 1), [2]);
}

#[test]
fn features_that_are_unknown_or_unsupported() {
    let (scratch, ring) = (Scratch::new(), ring());
    let (path, _) = sample(&scratch, &ring, &of_size(2 << 20), 3);
    patch(&path, 72, &[0x80]);
    let why = refusal(&ring, &path, options(true));
    assert!(why.contains("incompatible feature bit 63"), "{why}");
    patch(&path, 72, &[0]);
    // Unknown features that clear themselves: kept by readers, cleared by the first writer.
    patch(&path, 88, &[0x40]);
    content(&ring, &path);
    assert_eq!(peek(&path, 88, 1), [0x40]);
    with(&ring, &path, &options(false), async |_| ());
    assert_eq!(peek(&path, 88, 1), [0]);
    // Unknown compatible ones stay.
    patch(&path, 80, &[0x20]);
    with(&ring, &path, &options(false), async |_| ());
    assert_eq!(peek(&path, 80, 1), [0x20]);
    for (format, shown) in [("luks", "encrypted (LUKS)"), ("aes", "encrypted (AES)")] {
        let image = scratch.path(format);
        let mut encrypt = format!("encrypt.format={format},encrypt.key-secret=s");
        if format == "luks" {
            encrypt += ",encrypt.iter-time=10";
        }
        let secret = ["--object", "secret,id=s,data=abc"];
        tool(
            "qemu-img",
            &[&["create", "-q"], &secret[..], &["-f", "qcow2", "-o", &encrypt, &image, "1M"]].concat(),
        );
        let why = refusal(&ring, &image, options(true));
        assert!(why.contains(shown), "{why}");
    }
}

#[test]
fn bitmaps_are_kept_and_never_believed_wrongly() {
    let (scratch, ring) = (Scratch::new(), ring());
    let path = scratch.path("image");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "4M"]);
    for name in ["recording", "resting"] {
        tool("qemu-img", &["bitmap", "--add", "-g", "65536", &path, name]);
    }
    tool("qemu-io", &["-f", "qcow2", "-c", "write -q 1M 128k", &path]);
    tool("qemu-img", &["bitmap", "--disable", &path, "resting"]);
    let facts = |read_only: bool| {
        with(&ring, &path, &options(read_only), async |image| image.info().await.expect("facts"))
    };
    let names = |info: &blockferry::format::qcow2::Info| {
        info.bitmaps.iter().map(|b| (b.name.clone(), b.auto, b.in_use, b.granularity)).collect::<Vec<_>>()
    };
    // Looking, and opening to write without a write, changes nothing.
    for read_only in [true, false] {
        let info = facts(read_only);
        assert!(!info.bitmaps_inconsistent);
        assert_eq!(
            names(&info),
            [("recording".into(), true, false, 65_536), ("resting".into(), false, false, 65_536)]
        );
    }
    let r = ring.clone();
    with(&ring, &path, &options(false), async move |image| {
        image.write(0, r.alloc(512).await.freeze(), WriteFlags::default()).await.unwrap();
    });
    assert_eq!(
        names(&facts(true)),
        [("recording".into(), true, true, 65_536), ("resting".into(), false, false, 65_536)]
    );
    check_by_qemu(&path);
    let report = check(&ring, &path, Repair::None);
    assert!(report.is_clean(), "{report:?}");
    let by_qemu = tool("qemu-img", &["info", &path]);
    assert!(by_qemu.contains("in-use") && by_qemu.contains("resting"), "{by_qemu}");
}

fn be64(path: &str, at: u64) -> u64 {
    u64::from_be_bytes(peek(path, at, 8).try_into().expect("eight bytes"))
}

/// Tables that are said to lie far beyond the end of the file: nothing is read there, nothing written, and whoever
/// asks is told.
#[test]
fn tables_in_the_void_are_refused_and_reported() {
    let (scratch, ring) = (Scratch::new(), ring());
    let path = scratch.path("image");
    let void = 1u64 << 55;
    let offset = 0x00ff_ffff_ffff_fe00;
    for case in [
        "L1 table",
        "refcount table",
        "L2 table",
        "refcount block",
        "guest data",
        "snapshots",
        "L1 of a snapshot",
    ] {
        let (_, model) = sample(&scratch, &ring, &of_size(2 << 20), 4);
        with(&ring, &path, &options(false), async |image| image.snapshot_create("s", (0, 0)).await.unwrap());
        let (l1, refs, snapshots) = (be64(&path, 40), be64(&path, 48), be64(&path, 64));
        let l2 = be64(&path, l1) & offset;
        let first = (0..8192).find(|i| be64(&path, l2 + i * 8) & offset != 0).expect("a cluster of data") * 8;
        let (at, what) = match case {
            "L1 table" => (40, "its L1 table at"),
            "refcount table" => (48, "its refcount table at"),
            "L2 table" => (l1, "an L2 table at"),
            "refcount block" => (refs, "a refcount block at"),
            "guest data" => (l2 + first, "guest data at"),
            "snapshots" => (64, "its table of snapshots at"),
            _ => (snapshots, "the L1 table of a snapshot at"),
        };
        let marks = be64(&path, at) & 1 << 63;
        let marks = if case == "guest data" { 1 << 63 } else { marks };
        if case == "guest data" {
            // It is not shared any more.
            patch(&path, l1, &(l2 | 1 << 63).to_be_bytes());
        }
        patch(&path, at, &(void | marks).to_be_bytes());
        let len = std::fs::metadata(&path).expect("an image").len();
        let (r, p) = (ring.clone(), path.clone());
        let said = ring.block_on(async move {
            let mut said = Vec::new();
            let image = match open_qcow2(&r, &p, &options(false)).await {
                Ok(image) => image,
                Err(error) => return error.to_string(),
            };
            let write = |image: std::rc::Rc<blockferry::format::qcow2::Qcow2>, at: u64| {
                let r = r.clone();
                async move { image.write(at, r.alloc(65_536).await.freeze(), WriteFlags::default()).await }
            };
            said.push(image.snapshot_apply("s").await.err());
            said.push(write(image.clone(), first / 8 * 65_536).await.err());
            said.push(image.snapshot_delete("s").await.err());
            said.push(image.flush().await.err());
            said.into_iter().flatten().map(|error| error.to_string()).collect::<Vec<_>>().join("\n")
        });
        assert!(said.contains(what) && said.contains("beyond the end of the file"), "{case}: {said}");
        let report = check(&ring, &path, Repair::None);
        let there = report.messages.iter().any(|line| line.contains("beyond the end of the file"));
        assert!(there && report.corruptions > 0, "{case}: {:?}", report.messages);
        // What repairs can do differs; they come to an end, and the file stays as long as it can be.
        check(&ring, &path, Repair::All);
        let after = std::fs::metadata(&path).expect("an image").len();
        assert!(after < len + (4 << 20), "{case}: the file has grown from {len} to {after}");
        if case == "refcount block" || case == "refcount table" {
            assert!(check(&ring, &path, Repair::None).is_clean(), "{case}");
            assert_bytes(case, &content(&ring, &path), &model);
        }
    }
}

/// A file that claims to be very long costs a check what it occupies, and so do tables that lead to one place often.
#[test]
fn checks_take_as_long_as_a_file_is_large() {
    let (scratch, ring) = (Scratch::new(), ring());
    let path = scratch.path("image");
    // An L1 table of 32 MiB whose entries all lead to one L2 table, in a file of 8 TiB.
    let disk = 128u64 << 30;
    create(&ring, &path, &CreateOptions { cluster_size: 512, ..of_size(disk) });
    let r = ring.clone();
    with(&ring, &path, &options(false), async move |image| {
        let mut buf = r.alloc(32 << 10).await;
        buf.as_mut_slice().fill(1);
        image.write(0, buf.freeze(), WriteFlags::default()).await.unwrap();
    });
    let l1 = be64(&path, 40);
    let entry = be64(&path, l1);
    let entries = u64::from(u32::from_be_bytes(peek(&path, 36, 4).try_into().expect("four bytes")));
    assert_eq!(entries, 4 << 20);
    let all: Vec<u8> = (0..entries).flat_map(|_| entry.to_be_bytes()).collect();
    patch(&path, l1, &all);
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("an image")
        .set_len(8 << 40)
        .expect("a length");
    let why = refusal(&ring, &path, options(false));
    assert!(why.contains("two entries of its L1 table lead to"), "{why}");
    let report = check(&ring, &path, Repair::None);
    assert!(report.corruptions >= 64, "{:?}", report.messages.first());
}

#[test]
fn chains_have_an_end() {
    let (scratch, ring) = (Scratch::new(), ring());
    let (a, b) = (scratch.path("a"), scratch.path("b"));
    for (path, below) in [(&a, "b"), (&b, "a")] {
        let over = CreateOptions {
            backing_file: Some(below.into()),
            backing_fmt: Some("qcow2".into()),
            ..of_size(1 << 20)
        };
        create(&ring, path, &over);
    }
    let why = refusal(&ring, &a, options(true));
    assert!(why.contains("leads back"), "{why}");
    let itself = CreateOptions {
        backing_file: Some("a".into()),
        backing_fmt: Some("qcow2".into()),
        ..of_size(1 << 20)
    };
    create(&ring, &a, &itself);
    assert!(refusal(&ring, &a, options(false)).contains("leads back"));
    // As long as 64, one byte of each layer shows through all that are above.
    let mut model = vec![0; 65_536 * 64];
    for layer in 0..64usize {
        let path = scratch.path(&format!("layer{layer}"));
        let over = CreateOptions {
            backing_file: (layer > 0).then(|| format!("layer{}", layer - 1)),
            backing_fmt: (layer > 0).then(|| "qcow2".into()),
            cluster_size: 4096,
            ..of_size(model.len() as u64)
        };
        create(&ring, &path, &over);
        model[layer * 65_536] = layer as u8 + 1;
        let r = ring.clone();
        with(&ring, &path, &options(false), async move |image| {
            let mut buf = r.alloc(1).await;
            buf.as_mut_slice()[0] = layer as u8 + 1;
            image.write(layer as u64 * 65_536, buf.freeze(), WriteFlags::default()).await.unwrap();
        });
    }
    let top = scratch.path("layer63");
    assert_bytes("64 layers", &content(&ring, &top), &model);
    assert_bytes("64 layers by QEMU", &content_by_qemu(&top), &model);
}

#[test]
fn names_in_images_are_not_followed_just_like_that() {
    let (scratch, ring) = (Scratch::new(), ring());
    std::fs::create_dir(scratch.path("in")).expect("a folder");
    let secret = scratch.full("secret", 1 << 20);
    let path = scratch.path("in/image");
    for name in [
        secret.clone(),
        "../secret".into(),
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{secret}\"}}}}"),
    ] {
        let over = CreateOptions {
            backing_file: Some(name.clone()),
            backing_fmt: (!name.starts_with("json:")).then(|| "raw".into()),
            ..of_size(1 << 20)
        };
        create(&ring, &path, &over);
        let why = refusal(&ring, &path, options(true));
        assert!(why.contains("not in its own directory"), "{why}");
        let more =
            ImageOptions { gate: Reach::Directories(vec![scratch.dir().into()]).into(), ..options(true) };
        assert_eq!(refusal(&ring, &path, more), "", "{name}");
    }
    // A raw disk that looks like an image stays raw, or is not opened.
    let forged = scratch.path("in/forged");
    create(&ring, &forged, &of_size(1 << 20));
    let over = |format: Option<&str>| CreateOptions {
        backing_file: Some("forged".into()),
        backing_fmt: format.map(str::to_owned),
        ..of_size(1 << 20)
    };
    create(&ring, &path, &over(None));
    let why = refusal(&ring, &path, options(true));
    assert!(why.contains("does not record the format"), "{why}");
    create(&ring, &path, &over(Some("raw")));
    assert_eq!(&content(&ring, &path)[..4], b"QFI\xfb");
}

/// Whatever bytes tables are made of: no crash, no endless loop, no memory without bound.
#[test]
fn random_damage_does_no_harm() {
    let (scratch, ring) = (Scratch::new(), ring());
    let path = scratch.path("image");
    let mut opened = 0;
    for seed in 0..150u64 {
        let mut dice = Dice::new(seed + 1000);
        let options_of = CreateOptions {
            cluster_size: [512, 4096, 65_536][dice.below(3) as usize],
            refcount_bits: [1, 16, 64][dice.below(3) as usize],
            ..of_size(1 << 20)
        };
        create(&ring, &path, &options_of);
        let r = ring.clone();
        with(&ring, &path, &options(false), async move |image| {
            let mut model = vec![0; 1 << 20];
            storm(&r, &image, &mut model, seed, 5).await;
            if seed % 3 == 0 && image.info().await.expect("facts").refcount_bits > 1 {
                image.snapshot_create("s", (0, 0)).await.expect("a snapshot");
            }
        });
        let len = std::fs::metadata(&path).expect("an image").len();
        for _ in 0..1 + dice.below(8) {
            // Mostly where tables are: the first clusters.
            let reach =
                if dice.below(3) == 0 { len } else { len.min(u64::from(options_of.cluster_size) * 6) };
            let at = if dice.below(4) == 0 { dice.below(112) } else { dice.below(reach / 8) * 8 };
            let bytes = match dice.below(4) {
                0 => vec![dice.next() as u8],
                1 => vec![0xff; 8],
                2 => dice.below(len).to_be_bytes().to_vec(),
                _ => (dice.below(len) & !511 | 1 << 63).to_be_bytes().to_vec(),
            };
            patch(&path, at, &bytes[..bytes.len().min((len - at) as usize)]);
        }
        let (r, p) = (ring.clone(), path.clone());
        opened += ring.block_on(async move {
            let mut opened = 0;
            for how in [for_check(true), options(true), options(false), for_check(false)] {
                let Ok(image) = open_qcow2(&r, &p, &how).await else { continue };
                opened += 1;
                let len = image.len().min(4 << 20);
                let mut at = 0;
                while at < len {
                    let n = (len - at).min(128 << 10) as usize;
                    let _ = image.read(at, r.alloc(n).await).await;
                    let _ = image.block_status(at, n as u64).await;
                    let _ = image.map(at, n as u64).await;
                    at += n as u64;
                }
                let _ = image.info().await;
                if how.for_check {
                    let repair = if how.read_only { Repair::None } else { Repair::All };
                    let _ = image.check(repair).await;
                } else if !how.read_only && len > 0 {
                    let mut buf = r.alloc(len.min(70_000) as usize).await;
                    buf.as_mut_slice().fill(3);
                    let _ = image.write(0, buf.freeze(), WriteFlags::default()).await;
                    let _ = image.write_zeroes(0, len, Default::default()).await;
                    let _ = image.discard(0, len).await;
                    let _ = image.snapshot_create("t", (0, 0)).await;
                    let _ = image.snapshot_delete("s").await;
                    let _ = image.flush().await;
                }
            }
            opened
        });
    }
    assert!(opened > 150, "{opened}");
}
