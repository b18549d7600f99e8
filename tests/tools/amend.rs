//! `amend`: an image becomes another kind of image in place, shows what it showed, and is sound for QEMU.

use super::{ours, qemu, qemu_json};
use common::image::{Scratch, content};
use common::{run, tool};

/// What the disk shows, and each of its snapshots.
fn shown(scratch: &Scratch, path: &str, snapshots: &[&str]) -> Vec<Vec<u8>> {
    let raw = scratch.path("shown.raw");
    let mut all = Vec::new();
    for snapshot in [None].into_iter().chain(snapshots.iter().map(Some)) {
        let mut line = vec!["convert", "-f", "qcow2", "-O", "raw"];
        line.extend(snapshot.iter().flat_map(|name| ["-l", **name]));
        tool("qemu-img", &[&line[..], &[path, raw.as_str()]].concat());
        all.push(content(&raw));
    }
    all
}

fn check(path: &str) -> Option<i32> {
    qemu(&["check", "-f", "qcow2", path]).code
}

fn facts(path: &str) -> serde_json::Value {
    qemu_json(&["info", "--output=json", path])["format-specific"]["data"].clone()
}

/// An image with data, zeroes and compressed clusters, some of them behind snapshots.
fn image(scratch: &Scratch, options: &str, snapshots: &[&str]) -> String {
    let path = scratch.path("image.qcow2");
    let _ = std::fs::remove_file(&path);
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        create.extend(["-o", options]);
    }
    tool("qemu-img", &[&create[..], &[path.as_str(), "8M"]].concat());
    let io = |line: &str| tool("qemu-io", &["-f", "qcow2", "-c", line, &path]);
    io("write -P 1 0 1M");
    if !options.contains("data_file") && !options.contains("preallocation") {
        io("write -c -P 2 2M 128k");
    }
    for (number, name) in snapshots.iter().enumerate() {
        tool("qemu-img", &["snapshot", "-c", name, &path]);
        io(&format!("write -P {} 512k 300k", number + 3));
        io(&format!("write -z {}M 128k", number + 4));
    }
    path
}

#[test]
fn reference_counts_of_every_width() {
    let scratch = Scratch::new();
    let kinds: [(&str, &[&str]); 5] = [
        ("", &[]),
        ("cluster_size=512", &[]),
        ("cluster_size=4k,refcount_bits=64", &["one", "two"]),
        ("extended_l2=on,refcount_bits=32", &["one"]),
        ("lazy_refcounts=on,refcount_bits=4", &["one", "two"]),
    ];
    for (options, snapshots) in kinds {
        let path = image(&scratch, options, snapshots);
        if !options.contains("cluster_size") {
            tool("qemu-img", &["bitmap", "--add", &path, "kept"]);
        }
        let before = shown(&scratch, &path, snapshots);
        for bits in ["8", "1", "64", "2", "16"] {
            let case = format!("{options}, {bits} bits");
            let (was, said) =
                (content(&path), run(&["amend", "-o", &format!("refcount_bits={bits}"), &path]));
            // Each snapshot is one more reference, and compressed clusters share theirs.
            if said.code == Some(1) {
                assert!(content(&path) == was, "{case}: a refusal changes nothing");
                let copy = scratch.path("copy.qcow2");
                std::fs::copy(&path, &copy).expect("a copy");
                let by_qemu = qemu(&["amend", "-o", &format!("refcount_bits={bits}"), &copy]);
                assert_eq!(by_qemu.code, Some(1), "{case}: {said} {by_qemu}");
                assert!(said.err.contains(&format!("Refcounts of {bits} bits")), "{case}: {said}");
                continue;
            }
            assert_eq!(said.code, Some(0), "{case}: {said}");
            assert_eq!(check(&path), Some(0), "{case}");
            assert_eq!(facts(&path)["refcount-bits"].to_string(), bits, "{case}");
            assert_eq!(ours(&["check", "-q", &path]), "", "{case}");
            assert!(shown(&scratch, &path, snapshots) == before, "{case}: it shows something else");
        }
        // What is written next finds its way.
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 9 6M 1M", &path]);
        ours(&["snapshot", "-q", "-c", "last", &path]);
        assert_eq!(check(&path), Some(0), "{options}");
    }
}

#[test]
fn what_reference_counts_cannot_be() {
    let scratch = Scratch::new();
    let path = image(&scratch, "compat=0.10", &[]);
    for (options, why) in [
        ("refcount_bits=8", "compat=1.1"),
        ("refcount_bits=8,compat=0.10", "compat=1.1"),
        ("refcount_bits=7", "Refcounts have"),
        ("refcount_bits=128", "Refcounts have"),
    ] {
        let before = content(&path);
        let refused = run(&["amend", "-o", options, &path]);
        assert!(refused.code != Some(0) && refused.err.contains(why), "{options}: {refused}");
        assert_eq!(qemu(&["amend", "-o", options, &path]).code, Some(1), "{options}");
        assert!(content(&path) == before, "{options}: a refusal changes nothing");
    }
    // Version and width at once, there and back.
    for (options, compat, bits) in
        [("compat=1.1,refcount_bits=8", "1.1", 8), ("refcount_bits=16,compat=0.10", "0.10", 16)]
    {
        ours(&["amend", "-o", options, &path]);
        let facts = facts(&path);
        assert_eq!((facts["compat"].as_str(), facts["refcount-bits"].as_u64()), (Some(compat), Some(bits)));
        assert_eq!(check(&path), Some(0), "{options}");
    }
}

/// A count that is higher than what is known to refer to the cluster may mean something to somebody: it is kept, and a
/// width that cannot hold it is refused by name.
#[test]
fn counts_without_references_are_kept() {
    use std::os::unix::fs::FileExt;
    let scratch = Scratch::new();
    let path = image(&scratch, "", &[]);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("an image");
    let at = |offset: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).expect("a read");
        u64::from_be_bytes(bytes)
    };
    let block = at(at(48));
    let unused = file.metadata().expect("a file").len() >> 16;
    file.set_len((unused + 1) << 16).expect("a longer file");
    file.write_all_at(&300u16.to_be_bytes(), block + 2 * unused).expect("a write");
    let refused = run(&["amend", "-o", "refcount_bits=8", &path]);
    assert!(
        refused.code == Some(1) && refused.err.contains(&format!("that of cluster {unused} is 300")),
        "{refused}"
    );
    ours(&["amend", "-o", "refcount_bits=32", &path]);
    assert_eq!(check(&path), Some(3), "it leaks as before, and nothing is worse");
    tool("qemu-img", &["amend", "-o", "refcount_bits=16", &path]);
    assert_eq!(check(&path), Some(3));
}

#[test]
fn another_name_of_the_data_file_and_no_raw_one() {
    let scratch = Scratch::new();
    let data = scratch.path("data.raw");
    let path = image(&scratch, &format!("data_file={data},data_file_raw=on"), &[]);
    let before = content(&data);
    let other = scratch.path("other.raw");
    std::fs::copy(&data, &other).expect("a copy");
    let other_name = format!("data_file={other}");
    for (options, name, is_raw) in [
        ("data_file_raw=on", Some(data.as_str()), true),
        ("data_file_raw=off", Some(data.as_str()), false),
        (other_name.as_str(), Some(other.as_str()), false),
    ] {
        let copy = scratch.path("copy.qcow2");
        std::fs::copy(&path, &copy).expect("a copy");
        ours(&["amend", "-q", "-o", options, &copy]);
        tool("qemu-img", &["amend", "-o", options, &path]);
        let (here, there) = (facts(&copy), facts(&path));
        assert_eq!(here, there, "{options}");
        assert_eq!((here["data-file"].as_str(), here["data-file-raw"].as_bool()), (name, Some(is_raw)));
        assert!(content(&data) == before, "{options}: the data stays where it is");
    }
    let plain = image(&scratch, "", &[]);
    for options in ["data_file=x.raw", "data_file_raw=on"] {
        let codes = [run(&["amend", "-o", options, &plain]), qemu(&["amend", "-o", options, &plain])];
        assert!(codes.iter().all(|ended| ended.code != Some(0)), "{options}: {codes:?}");
    }
}

/// Clusters that read as zeroes, before and after snapshots, over a backing file and over none, with places and without.
#[test]
fn back_to_version_2_with_clusters_of_zeroes() {
    let scratch = Scratch::new();
    let base = scratch.path("base.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &base, "8M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 8M", &base]);
    let backed = format!("backing_file={base},backing_fmt=qcow2");
    let names: [&[&str]; 3] = [&[], &["one"], &["one", "two"]];
    for (options, snapshots) in ["", "cluster_size=4k", "lazy_refcounts=on,preallocation=metadata", &backed]
        .into_iter()
        .flat_map(|options| names.map(|snapshots| (options, snapshots)))
    {
        let case = format!("{options}, {snapshots:?}");
        let path = image(&scratch, options, &[]);
        let io = |line: &str| tool("qemu-io", &["-f", "qcow2", "-c", line, &path]);
        // Zeroes with a place and without, shared with snapshots or not, and in tables that are shared as a whole.
        io("write -z 64k 192k");
        io("write -z 3M 256k");
        for (number, name) in snapshots.iter().enumerate() {
            tool("qemu-img", &["snapshot", "-c", name, &path]);
            io(&format!("write -P {} {}k 64k", 3 + number, 64 + 64 * number));
            io(&format!("write -z -u {}k 128k", 512 * (number + 1)));
        }
        if snapshots.len() == 2 {
            tool("qemu-img", &["snapshot", "-a", "two", &path]);
        }
        let before = shown(&scratch, &path, snapshots);
        let copy = scratch.path("copy.qcow2");
        std::fs::copy(&path, &copy).expect("a copy");
        tool("qemu-img", &["amend", "-o", "compat=0.10", &copy]);
        assert!(shown(&scratch, &copy, snapshots) == before, "{case}: QEMU does it so");
        ours(&["amend", "-o", "compat=0.10", &path]);
        assert_eq!(facts(&path)["compat"], "0.10", "{case}");
        assert_eq!(check(&path), Some(0), "{case}");
        assert_eq!(ours(&["check", "-q", &path]), "", "{case}");
        assert!(shown(&scratch, &path, snapshots) == before, "{case}: it shows something else");
        for name in snapshots {
            tool("qemu-img", &["snapshot", "-a", name, &path]);
            tool("qemu-img", &["snapshot", "-d", name, &path]);
            assert_eq!(check(&path), Some(0), "{case}, after {name}");
        }
        ours(&["amend", "-o", "compat=1.1", &path]);
        assert_eq!(check(&path), Some(0), "{case}");
    }
}

#[test]
fn what_keeps_from_version_2() {
    let scratch = Scratch::new();
    let refuse = |path: &str, why: &str| {
        let before = content(path);
        let refused = run(&["amend", "-o", "compat=0.10", path]);
        assert!(refused.code == Some(1) && refused.err.contains(why), "{why}: {refused}");
        assert!(content(path) == before, "{why}: a refusal changes nothing");
        assert_eq!(qemu(&["amend", "-o", "compat=0.10", path]).code, Some(1), "{why}");
    };
    refuse(&image(&scratch, "extended_l2=on", &[]), "subclusters");
    refuse(&image(&scratch, "refcount_bits=8", &[]), "8 bits");
    refuse(&image(&scratch, "compression_type=zstd", &[]), "compression");
    let path = image(&scratch, "", &["one"]);
    tool("qemu-img", &["resize", "-q", "-f", "qcow2", &path, "16M"]);
    refuse(&path, "snapshots of another length");
}
