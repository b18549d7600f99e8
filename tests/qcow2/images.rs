//! qcow2 images of this program in QEMU's hands, and the reverse: the common cases, one by one.

use blockferry::format::qcow2::{CreateOptions, Repair};
use common::image::Scratch;
use common::qcow2::{
    assert_bytes, check_by_qemu, content, content_by_qemu, create, options, ring, storm, storm_by_qemu, with,
};
use common::tool;

fn of_size(size: u64) -> CreateOptions {
    CreateOptions { size, ..CreateOptions::default() }
}

#[test]
fn an_empty_image_is_an_image() {
    let (scratch, ring) = (Scratch::new(), ring());
    for size in [0, 512, 1 << 20, 3 << 40] {
        let path = scratch.path("a");
        create(&ring, &path, &of_size(size));
        check_by_qemu(&path);
        let info = tool("qemu-img", &["info", "-f", "qcow2", "--output=json", &path]);
        assert!(info.contains(&format!("\"virtual-size\": {size}")), "{info}");
        let report =
            with(&ring, &path, &options(true), async |image| image.check(Repair::None).await.unwrap());
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn storms_of_both_sides_leave_the_same_bytes() {
    let (scratch, ring) = (Scratch::new(), ring());
    for seed in 0..4 {
        let path = scratch.path("a");
        let size = 8 << 20;
        create(&ring, &path, &of_size(size));
        let mut model = vec![0; size as usize];
        for round in 0..3 {
            let (r, m) = (ring.clone(), model.clone());
            model = with(&ring, &path, &options(false), async move |image| {
                let mut model = m;
                storm(&r, &image, &mut model, seed * 10 + round, 40).await;
                model
            });
            check_by_qemu(&path);
            assert_bytes("read by QEMU", &content_by_qemu(&path), &model);
            storm_by_qemu(&path, &mut model, seed * 10 + round, 20);
            assert_bytes("read by us", &content(&ring, &path), &model);
            let report =
                with(&ring, &path, &options(true), async |image| image.check(Repair::None).await.unwrap());
            assert!(report.is_clean(), "{report:?}");
        }
    }
}

#[test]
fn a_chain_of_layers() {
    let (scratch, ring) = (Scratch::new(), ring());
    let size = 6u64 << 20;
    let base = scratch.holey("base.raw", size - 70_000, &[(100_000, 3 << 20)]);
    let mut model = std::fs::read(&base).expect("the base");
    model.resize(size as usize, 0);
    let mut below = ("base.raw".to_owned(), "raw");
    for layer in 0..5u64 {
        let name = format!("layer{layer}");
        let path = scratch.path(&name);
        let options_of = CreateOptions {
            backing_file: Some(below.0.clone()),
            backing_fmt: Some(below.1.into()),
            cluster_size: 4096 << (layer * 2),
            ..of_size(size)
        };
        create(&ring, &path, &options_of);
        let (r, m) = (ring.clone(), model.clone());
        model = with(&ring, &path, &options(false), async move |image| {
            let mut model = m;
            storm(&r, &image, &mut model, layer, 12).await;
            model
        });
        check_by_qemu(&path);
        assert_bytes("read by QEMU", &content_by_qemu(&path), &model);
        assert_bytes("read by us", &content(&ring, &path), &model);
        below = (name, "qcow2");
    }
}

#[test]
fn snapshots_of_both_sides() {
    let (scratch, ring) = (Scratch::new(), ring());
    let path = scratch.path("a");
    let size = 4u64 << 20;
    create(&ring, &path, &CreateOptions { cluster_size: 4096, ..of_size(size) });
    let mut model = vec![0; size as usize];
    let mut taken: Vec<(String, Vec<u8>)> = Vec::new();
    let check = || {
        check_by_qemu(&path);
        let report =
            with(&ring, &path, &options(true), async |image| image.check(Repair::None).await.unwrap());
        assert!(report.is_clean(), "{report:?}");
    };
    for round in 0..6u64 {
        let name = format!("s{round}");
        let (r, m, n) = (ring.clone(), model.clone(), name.clone());
        model = with(&ring, &path, &options(false), async move |image| {
            let mut model = m;
            storm(&r, &image, &mut model, round, 10).await;
            if n != "s3" {
                let id = image.snapshot_create(&n, (7, 8)).await.expect("a snapshot");
                assert_eq!(id, (n[1..].parse::<u64>().unwrap() + 1).to_string());
            }
            let before = model.clone();
            storm(&r, &image, &mut model, round + 100, 6).await;
            drop(before);
            model
        });
        if round == 3 {
            tool("qemu-img", &["snapshot", "-c", &name, &path]);
        }
        check();
        assert_bytes("read by QEMU", &content_by_qemu(&path), &model);
        taken.push((name, Vec::new()));
    }
    let list = tool("qemu-img", &["snapshot", "-l", &path]);
    assert!(taken.iter().all(|(name, _)| list.contains(name.as_str())), "{list}");
    // Going back, on either side, shows the same bytes, and leaves nothing behind.
    for (round, name) in ["s4", "s1", "s3", "s0"].into_iter().enumerate() {
        let n = name.to_owned();
        if round % 2 == 0 {
            with(&ring, &path, &options(false), async move |image| image.snapshot_apply(&n).await.unwrap());
        } else {
            tool("qemu-img", &["snapshot", "-a", name, &path]);
        }
        check();
        let by_qemu = content_by_qemu(&path);
        assert_bytes(name, &content(&ring, &path), &by_qemu);
        assert!(by_qemu.iter().any(|b| *b != 0));
        storm_by_qemu(&path, &mut by_qemu.clone(), round as u64, 5);
        let (r, m) = (ring.clone(), content_by_qemu(&path));
        model = with(&ring, &path, &options(false), async move |image| {
            let mut model = m;
            storm(&r, &image, &mut model, 7, 6).await;
            model
        });
        check();
        assert_bytes("read by QEMU", &content_by_qemu(&path), &model);
    }
    for (round, name) in ["s2", "s4", "s0", "s1", "s3", "s5"].into_iter().enumerate() {
        if round % 2 == 0 {
            let n = name.to_owned();
            with(&ring, &path, &options(false), async move |image| image.snapshot_delete(&n).await.unwrap());
        } else {
            tool("qemu-img", &["snapshot", "-d", name, &path]);
        }
        check();
        assert_bytes(name, &content_by_qemu(&path), &model);
    }
    let missing = with(&ring, &path, &options(false), async |image| image.snapshot_apply("s9").await);
    assert!(missing.unwrap_err().to_string().contains("no snapshot 's9'"));
}

#[test]
fn the_backing_file_is_written_into_the_header() {
    let (scratch, ring) = (Scratch::new(), ring());
    let path = scratch.path("a");
    for cluster_size in [512, 65_536] {
        create(&ring, &path, &CreateOptions { cluster_size, ..of_size(1 << 20) });
        for (name, format) in [("b", Some("raw")), ("a-longer-name.qcow2", None), ("c", Some("qcow2"))] {
            let none = blockferry::engine::ImageOptions { no_backing: true, ..options(false) };
            with(&ring, &path, &none, async move |image| {
                image.set_backing(Some((name, format))).await.unwrap()
            });
            let info = tool("qemu-img", &["info", "-f", "qcow2", "--output=json", &path]);
            assert!(info.contains(&format!("\"backing-filename\": \"{name}\"")), "{info}");
            assert_eq!(info.contains("backing-filename-format"), format.is_some(), "{info}");
        }
        let none = blockferry::engine::ImageOptions { no_backing: true, ..options(false) };
        with(&ring, &path, &none, async |image| image.set_backing(None).await.unwrap());
        let info = tool("qemu-img", &["info", "-f", "qcow2", "--output=json", &path]);
        assert!(!info.contains("backing"), "{info}");
        check_by_qemu(&path);
    }
}

#[test]
fn the_disk_grows_and_shrinks() {
    let (scratch, ring) = (Scratch::new(), ring());
    let path = scratch.path("a");
    let base = scratch.full("base.raw", 3 << 20);
    assert!(base.ends_with("base.raw"));
    for backing in [false, true] {
        let over = CreateOptions {
            cluster_size: 4096,
            backing_file: backing.then(|| "base.raw".into()),
            backing_fmt: backing.then(|| "raw".into()),
            ..of_size(1 << 20)
        };
        create(&ring, &path, &over);
        let mut model = content(&ring, &path);
        for (round, len) in [1_500_160u64, 700_416, 4 << 20, 2 << 20, 40 << 20].into_iter().enumerate() {
            let (r, m) = (ring.clone(), model.clone());
            model = with(&ring, &path, &options(false), async move |image| {
                let mut model = m;
                storm(&r, &image, &mut model, round as u64, 8).await;
                image.resize(len, blockferry::format::qcow2::Preallocation::Off).await.expect("a resize");
                model.resize(len as usize, 0);
                storm(&r, &image, &mut model, round as u64 + 50, 8).await;
                model
            });
            check_by_qemu(&path);
            assert_bytes("read by QEMU", &content_by_qemu(&path), &model);
            assert_bytes("read by us", &content(&ring, &path), &model);
        }
    }
}
