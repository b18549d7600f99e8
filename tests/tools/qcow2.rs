//! The tools on qcow2 images, in both directions: made by `qemu-img` and looked at here, and the reverse.

use std::time::Instant;

use serde_json::Value;

use super::{assert_has_all, assert_same_json, our_json, ours, qemu, qemu_json};
use common::image::{KIB, MIB, Scratch, allocated, assert_equal, content, scribble};
use common::{PATIENCE, Process, is_marked, run, tool};

/// Writes patterns into an image, as a guest would.
fn write(image: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    tool("qemu-io", &arguments);
}

/// A chain of two: `base.qcow2` and `top.qcow2` over it, with zero clusters, and data that hides data.
fn chain(scratch: &Scratch, options: &str) -> (String, String) {
    let (base, top) = (scratch.path("base.qcow2"), scratch.path("top.qcow2"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &base, "24M"]);
    write(&base, &["write -P 1 64k 1M", "write -P 2 5M 3M", "write -P 3 23M 1M"]);
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", options, "-b", "base.qcow2", "-F", "qcow2", &top, "32M"],
    );
    write(&top, &["write -P 4 6M 512k", "write -z 7M 1M", "write -P 5 30M 64k", "write -P 6 100k 5k"]);
    (base, top)
}

const OPTIONS: [&str; 4] = [
    "cluster_size=64k",
    "compat=0.10",
    "cluster_size=4k,refcount_bits=8",
    "cluster_size=128k,extended_l2=on,lazy_refcounts=on",
];

fn same(a: &str, b: &str) {
    let ended = qemu(&["compare", a, b]);
    assert_eq!(ended.code, Some(0), "{ended}");
}

/// Sound, by QEMU's judgement and by ours.
#[track_caller]
fn sound(image: &str) {
    let theirs = qemu(&["check", "-f", "qcow2", image]);
    assert_eq!(theirs.code, Some(0), "{theirs}");
    let ours = run(&["check", "-f", "qcow2", image]);
    assert_eq!(ours.code, Some(0), "{ours}");
}

#[test]
fn what_is_told_of_a_chain_is_what_qemu_img_tells() {
    for options in OPTIONS {
        let scratch = Scratch::new();
        let (base, top) = chain(&scratch, options);
        tool("qemu-img", &["snapshot", "-c", "one", &base]);
        tool("qemu-img", &["snapshot", "-c", "two", &top]);
        for image in [&base, &top] {
            for more in [&["--backing-chain"][..], &[]] {
                let arguments = [&["info", "--output=json"][..], more, &[image]].concat();
                assert_has_all(&our_json(&arguments), &qemu_json(&arguments), options);
            }
            let arguments = ["map", "--output=json", image];
            let (mut mine, mut theirs) = (our_json(&arguments), qemu_json(&arguments));
            if options.contains("extended_l2") {
                // QEMU tells where subclusters that hold nothing would be, and so cuts holes in two.
                for map in [&mut mine, &mut theirs] {
                    map.as_array_mut().expect("a list").retain(|extent| extent["data"] == true);
                }
            }
            assert_same_json(&mine, &theirs);
            let arguments = ["map", image];
            assert_eq!(ours(&arguments), qemu(&arguments).out, "{options}");
            let arguments = ["check", "--output=json", image];
            assert_has_all(&our_json(&arguments), &qemu_json(&arguments), options);
            let list = our_json(&["snapshot", "-l", "--output=json", image]);
            let info = qemu_json(&["info", "--output=json", image]);
            assert_same_json(&list, &info["snapshots"]);
        }
        for arguments in [
            ["measure", "--output=json", "-O", "qcow2", &top],
            ["measure", "--output=json", "-O", "raw", &top],
            ["measure", "--output=json", "-O", "qcow2", "--size=3T"],
        ] {
            assert_same_json(&our_json(&arguments), &qemu_json(&arguments));
        }
        let arguments = ["measure", "--output=json", "-O", "qcow2", "-o", "cluster_size=4k", &top];
        assert_same_json(&our_json(&arguments), &qemu_json(&arguments));
    }
}

#[test]
fn conversions_are_equal_in_every_direction() {
    for options in OPTIONS {
        let scratch = Scratch::new();
        let (_, top) = chain(&scratch, options);
        let raw = scratch.path("raw");
        ours(&["convert", "-q", "--verify", "-O", "raw", &top, &raw]);
        same(&top, &raw);
        let flat = scratch.path("flat.qcow2");
        ours(&["convert", "-q", "--verify", "-O", "qcow2", "-o", options, &top, &flat]);
        same(&top, &flat);
        sound(&flat);
        let from_raw = scratch.path("from-raw.qcow2");
        ours(&["convert", "-q", "--verify", "-f", "raw", "-O", "qcow2", "-o", options, &raw, &from_raw]);
        same(&raw, &from_raw);
        sound(&from_raw);
        // As thin as QEMU makes it.
        let theirs = scratch.path("theirs.qcow2");
        tool("qemu-img", &["convert", "-O", "qcow2", "-o", options, &top, &theirs]);
        let clusters = |image| qemu_json(&["check", "--output=json", image])["allocated-clusters"].clone();
        assert_eq!(clusters(&flat), clusters(&theirs), "{options}");
        assert_eq!(ours(&["compare", &flat, &theirs]), "Images are identical.\n");
        // An overlay of its own over the same base.
        let overlay = scratch.path("overlay.qcow2");
        ours(&[
            "convert",
            "-q",
            "--verify",
            "-O",
            "qcow2",
            "-o",
            options,
            "-B",
            "base.qcow2",
            "-F",
            "qcow2",
            &top,
            &overlay,
        ]);
        same(&top, &overlay);
        sound(&overlay);
        assert!(allocated(&overlay) < allocated(&flat), "{options}");
    }
}

#[test]
fn compressed_images_are_read_by_qemu() {
    let scratch = Scratch::new();
    let raw = scratch.holey("raw", 20 * MIB + 512, &[(0, MIB)]);
    let text = "it was a dark and stormy night. ".repeat(100_000);
    scribble(&raw, 3 * MIB + 5, text.as_bytes());
    for options in ["compression_type=zlib", "compression_type=zstd", "cluster_size=4k", "cluster_size=2M"] {
        for threads in ["1", "8"] {
            let image = scratch.path(&format!("{options}-{threads}"));
            ours(&[
                "convert",
                "-q",
                "-c",
                "--threads",
                threads,
                "--verify",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                options,
                &raw,
                &image,
            ]);
            same(&raw, &image);
            sound(&image);
            let compressed = &qemu_json(&["check", "--output=json", &image])["compressed-clusters"];
            let (clusters, bytes) = if options.ends_with("2M") { (2, 14 * MIB) } else { (40, 2 * MIB) };
            assert!(compressed.as_u64() >= Some(clusters), "{compressed}");
            assert!(allocated(&image) < bytes, "{}", allocated(&image));
            let back = scratch.path("back");
            ours(&["convert", "-q", "--force", "-O", "raw", &image, &back]);
            assert_equal(&raw, &back);
        }
    }
}

#[test]
fn an_image_that_is_cut_off_says_so() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.full("a", 32 * MIB), scratch.path("b"));
    let mut process = Process::json(&["convert", "-f", "raw", "-O", "qcow2", "-r", "4M", &a, &b]);
    process.wait_for(|e| e["event"] == "progress" && e["offset"].as_u64() > Some(0));
    process.kill();
    assert!(is_marked(&b));
    // What was killed may hold its locks for a moment longer.
    let end = Instant::now() + PATIENCE;
    loop {
        let ended = run(&["convert", "-q", "-f", "raw", "-O", "qcow2", "--force", &a, &b]);
        if ended.code == Some(0) {
            break;
        }
        assert!(ended.err.contains("in use") && Instant::now() < end, "{ended}");
    }
    assert!(!is_marked(&b));
    same(&a, &b);
    sound(&b);
}

#[test]
fn rebased_images_show_what_they_showed() {
    for options in OPTIONS {
        let scratch = Scratch::new();
        let (_, top) = chain(&scratch, options);
        let before = scratch.path("before");
        tool("qemu-img", &["convert", "-O", "raw", &top, &before]);
        // To another base: shorter, and different in places.
        let other = scratch.path("other.qcow2");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &other, "8M"]);
        write(&other, &["write -P 1 64k 512k", "write -P 9 5M 1M", "write -P 2 6M 2M"]);
        ours(&["rebase", "-q", "-b", "other.qcow2", "-F", "qcow2", &top]);
        same(&before, &top);
        sound(&top);
        let info = qemu_json(&["info", "--output=json", &top]);
        assert_eq!(
            (&info["backing-filename"], &info["backing-filename-format"]),
            (&"other.qcow2".into(), &"qcow2".into())
        );
        // To none.
        ours(&["rebase", "-q", "-b", "", &top]);
        assert_eq!(qemu_json(&["info", "--output=json", &top])["backing-filename"], Value::Null);
        same(&before, &top);
        sound(&top);
    }
}

#[test]
fn an_unsafe_rebase_changes_only_the_name() {
    let scratch = Scratch::new();
    let (base, top) = chain(&scratch, OPTIONS[0]);
    std::fs::rename(&base, scratch.path("moved.qcow2")).expect("a rename");
    assert_eq!(run(&["compare", &top, &top]).code, Some(2));
    ours(&["rebase", "-q", "-u", "-b", "moved.qcow2", "-F", "qcow2", &top]);
    sound(&top);
    assert_eq!(run(&["compare", &top, &top]).code, Some(0));
    let unsaid = run(&["rebase", "-u", "-b", "moved.qcow2", &top]);
    assert!(unsaid.code == Some(2) && unsaid.err.contains("-F"), "{unsaid}");
}

#[test]
fn snapshots_are_taken_applied_and_deleted_on_both_sides() {
    let scratch = Scratch::new();
    let (_, top) = chain(&scratch, OPTIONS[0]);
    let (first, second) = (scratch.path("first"), scratch.path("second"));
    tool("qemu-img", &["convert", "-O", "raw", &top, &first]);
    ours(&["snapshot", "-c", "one", &top]);
    write(&top, &["write -P 77 6M 2M", "write -P 78 0 64k"]);
    tool("qemu-img", &["convert", "-O", "raw", &top, &second]);
    tool("qemu-img", &["snapshot", "-c", "two", &top]);
    sound(&top);
    let names = |list: &Value| -> Vec<String> {
        list.as_array().expect("a list").iter().map(|s| s["name"].as_str().expect("a name").into()).collect()
    };
    assert_eq!(names(&qemu_json(&["info", "--output=json", &top])["snapshots"]), ["one", "two"]);
    ours(&["snapshot", "-a", "one", &top]);
    same(&first, &top);
    sound(&top);
    tool("qemu-img", &["snapshot", "-a", "two", &top]);
    same(&second, &top);
    ours(&["snapshot", "-d", "one", &top]);
    sound(&top);
    same(&second, &top);
    ours(&["snapshot", "-d", "two", &top]);
    sound(&top);
    same(&second, &top);
    assert_eq!(run(&["snapshot", "-a", "three", &top]).code, Some(1));
    assert_eq!(ours(&["snapshot", "-l", &top]), "");
}

#[test]
fn damage_is_found_and_repaired() {
    let scratch = Scratch::new();
    let image = scratch.path("image");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "16M"]);
    write(&image, &["write -P 1 0 4M"]);
    let good = content(&image);
    let number = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().expect("eight bytes"));
    let block = number(number(48) as usize) as usize;
    // A cluster that is counted and not used: a leak.
    let last = good.len() / (64 * KIB as usize);
    let mut leaked = good.clone();
    leaked.resize((last + 1) * 64 * KIB as usize, 0);
    leaked[block + 2 * last + 1] = 1;
    // A cluster that is used and not counted: corruption.
    let mut corrupt = good.clone();
    corrupt[block + 2 * (last - 1) + 1] = 0;
    for (bytes, code, repair) in [(&leaked, 3, "leaks"), (&corrupt, 2, "all")] {
        std::fs::write(&image, bytes).expect("an image");
        let arguments = ["check", "--output=json", &image];
        let (mine, theirs) = (run(&arguments), qemu(&arguments));
        assert_eq!((mine.code, theirs.code), (Some(code), Some(code)), "{mine} {theirs}");
        let theirs = serde_json::from_str(&theirs.out).expect("JSON");
        assert_has_all(&serde_json::from_str(&mine.out).expect("JSON"), &theirs, "");
        let repaired = run(&["check", "-r", repair, &image]);
        assert_eq!(repaired.code, Some(0), "{repaired}");
        sound(&image);
        let read = tool("qemu-io", &["-f", "qcow2", "-c", "read -P 1 0 4M", &image]);
        assert!(!read.contains("failed"), "{read}");
    }
}

#[test]
fn images_made_here_are_used_by_qemu() {
    for options in OPTIONS {
        let scratch = Scratch::new();
        let (a, b) = (scratch.path("a"), scratch.path("b"));
        ours(&["create", "-q", "-f", "qcow2", "-o", options, &a, "20M"]);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &b, "20M"]);
        let info = |image| {
            let mut info = qemu_json(&["info", "--output=json", image]);
            for field in ["filename", "children", "actual-size"] {
                info.as_object_mut().expect("an object").remove(field);
            }
            info
        };
        assert_same_json(&info(&a), &info(&b));
        write(&a, &["write -P 1 1M 1M"]);
        sound(&a);
        for (change, len) in [("+10M", 30), ("40M", 40)] {
            ours(&["resize", "-q", &a, change]);
            assert_eq!(info(&a)["virtual-size"], len * MIB);
            sound(&a);
        }
        assert_eq!(run(&["resize", "-q", &a, "1M"]).code, Some(1));
        ours(&["resize", "-q", "--shrink", &a, "1536k"]);
        assert_eq!(info(&a)["virtual-size"], 3 * MIB / 2);
        sound(&a);
        write(&a, &["read -P 1 1M 512k"]);
        // Over a backing file, whose length it takes.
        let top = scratch.path("top");
        ours(&["create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "-o", options, &top]);
        same(&a, &top);
        sound(&top);
        let missing = run(&["create", "-f", "qcow2", "-b", "nothing", "-F", "raw", &scratch.path("x")]);
        assert_eq!(missing.code, Some(1), "{missing}");
        ours(&["create", "-q", "-u", "-f", "qcow2", "-b", "nothing", "-F", "raw", &scratch.path("x"), "1M"]);
    }
}

#[test]
fn an_image_opens_no_other_file_without_leave() {
    let scratch = Scratch::new();
    let elsewhere = Scratch::new();
    let secret = elsewhere.full("secret", MIB);
    let image = scratch.path("image");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &secret, "-F", "raw", &image]);
    let refused = run(&["convert", "-O", "raw", &image, &scratch.path("out")]);
    assert!(refused.code == Some(1) && refused.err.contains("--allow-dir"), "{refused}");
    assert!(!std::path::Path::new(&scratch.path("out")).exists());
    let dir = elsewhere.dir().to_str().expect("a path in UTF-8");
    ours(&["convert", "-q", "--allow-dir", dir, "-O", "raw", &image, &scratch.path("out")]);
    ours(&["convert", "-q", "--allow-any-file", "-O", "raw", &image, &scratch.path("out2")]);
    assert_equal(&secret, &scratch.path("out"));
    // What is looked at without its backing file needs no leave.
    assert_eq!(our_json(&["info", "--output=json", &image])["backing-filename"], secret);
}

#[test]
fn a_loop_of_backing_files_is_refused() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.path("a"), scratch.path("b"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &a, "1M"]);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", &b]);
    tool("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", "b", "-F", "qcow2", &a]);
    for arguments in [vec!["compare", &a, &a], vec!["info", "--backing-chain", &a], vec!["map", &b]] {
        let ended = run(&arguments);
        assert!(ended.code != Some(0) && !ended.err.contains("panicked"), "{arguments:?}: {ended}");
    }
}
