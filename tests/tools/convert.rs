//! `convert` from raw to raw: thin copies, marks, limits, what it refuses.

use super::{our_json, ours, qemu};
use common::image::{KIB, MIB, Scratch, allocated, assert_equal, content, is_all_hole, scribble};
use common::{LoopDevice, Process, is_marked, is_root, run, run_json, tool};

#[test]
fn a_copy_is_equal_and_thin() {
    let scratch = Scratch::new();
    let a =
        scratch.holey("a", 20 * MIB + 512, &[(MIB, 100 * KIB), (5 * MIB + 4096, 3 * MIB), (20 * MIB, 512)]);
    // Zeroes that are stored as data.
    scribble(&a, 10 * MIB, &vec![0; 2 * MIB as usize]);
    let (b, c) = (scratch.path("b"), scratch.path("c"));
    let end = our_json(&["convert", "-f", "raw", "-O", "raw", "--verify", "--output=json", &a, &b]);
    assert_eq!((&end["ending"], &end["exit-code"]), (&"completed".into(), &0.into()));
    assert!(end["bytes-compared"].as_u64() >= Some(20 * MIB), "{end:#}");
    // Data was read; local holes were not, and nobody else was trusted.
    let known = |how: &str| end["compared"][how].as_u64().expect("a number");
    assert!((3 * MIB..12 * MIB).contains(&known("bytes-read")), "{end:#}");
    assert!(known("bytes-by-filesystem") > 8 * MIB && known("bytes-on-trust") == 0, "{end:#}");
    assert_equal(&a, &b);
    assert!(!is_marked(&b));
    qemu(&["convert", "-f", "raw", "-O", "raw", &a, &c]);
    assert!(allocated(&b) <= allocated(&c), "{} and {}", allocated(&b), allocated(&c));
    // -S 0 takes all the room there is to take.
    let full = scratch.path("full");
    ours(&["convert", "-q", "-f", "raw", "-S", "0", &a, &full]);
    assert_equal(&a, &full);
    assert!(allocated(&full) >= 20 * MIB);
    // The options of others are understood.
    let d = scratch.path("d");
    let words =
        "convert -p -q -W -m 16 -t none -T writeback -C -U -f raw -O raw -r 1G -o preallocation=falloc";
    let mut arguments: Vec<&str> = words.split(' ').collect();
    arguments.extend([a.as_str(), d.as_str()]);
    ours(&arguments);
    assert_equal(&a, &d);
    assert!(allocated(&d) >= 20 * MIB);
}

#[test]
fn what_exists_is_left_alone_unless_it_is_said() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.full("a", MIB), scratch.full("b", 3 * MIB));
    let before = content(&b);
    let refused = run(&["convert", "-f", "raw", &a, &b]);
    assert!(refused.code == Some(1) && refused.err.contains("--force"), "{refused}");
    assert!(content(&b) == before);
    ours(&["convert", "-q", "-f", "raw", "--force", &a, &b]);
    assert_equal(&a, &b);
    // Into an image that is there, and longer: what lies behind stays.
    let mut longer = vec![3; 2 * MIB as usize];
    std::fs::write(&b, &longer).expect("a file");
    let zeroes = scratch.holey("z", MIB, &[(0, 4096)]);
    ours(&["convert", "-q", "-n", "-f", "raw", &zeroes, &b]);
    longer[..MIB as usize].copy_from_slice(&content(&zeroes));
    assert!(content(&b) == longer);
    // Whoever says that the target is zero is believed.
    std::fs::write(&b, vec![3; MIB as usize]).expect("a file");
    ours(&["convert", "-q", "-n", "--target-is-zero", "-f", "raw", &zeroes, &b]);
    assert_eq!(content(&b)[4096..], vec![3; MIB as usize - 4096]);
    let small = scratch.full("small", 4096);
    let refused = run(&["convert", "-n", "-f", "raw", &a, &small]);
    assert!(refused.code == Some(1) && refused.err.contains("smaller"), "{refused}");
    let refused = run(&["convert", "-n", "-f", "raw", &a, &scratch.path("nothing")]);
    assert!(refused.code == Some(1) && refused.err.contains("does not exist"), "{refused}");
    let refused = run(&["convert", "-f", "raw", "--force", &a, &a]);
    assert!(refused.code == Some(1), "{refused}");
    let refused = run(&["convert", "-f", "raw", "-c", &a, &scratch.path("new")]);
    assert!(refused.code == Some(2) && refused.err.contains("cannot be compressed"), "{refused}");
    assert!(!std::path::Path::new(&scratch.path("new")).exists());
}

#[test]
fn a_copy_that_is_cut_off_says_so() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.full("a", 64 * MIB), scratch.path("b"));
    let mut process = Process::json(&["convert", "-f", "raw", "-r", "4M", "--reflink=never", &a, &b]);
    process.wait_for(|e| e["event"] == "progress" && e["offset"].as_u64() > Some(0));
    assert!(is_marked(&b));
    process.kill();
    assert!(is_marked(&b));
    let (b, mut process) = {
        let b = scratch.path("c");
        let process = Process::json(&["convert", "-f", "raw", "-r", "4M", "--reflink=never", &a, &b]);
        (b, process)
    };
    process.wait_event("progress");
    process.interrupt();
    let end = process.wait_event("end");
    assert_eq!(end["ending"], "cancelled");
    assert_eq!(process.end().code, Some(3));
    assert!(is_marked(&b));
    // Made anew, it is whole.
    ours(&["convert", "-q", "-f", "raw", "--force", &a, &b]);
    assert!(!is_marked(&b));
    assert_equal(&a, &b);
    let left: Vec<_> = std::fs::read_dir(scratch.dir()).expect("a folder").flatten().collect();
    assert!(!left.iter().any(|e| e.file_name().to_string_lossy().starts_with('.')), "{left:?}");
}

#[test]
fn a_device_is_a_target_and_a_source() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let a = scratch.holey("a", 8 * MIB, &[(MIB, MIB), (7 * MIB, MIB)]);
    let under = scratch.full("under", 8 * MIB);
    let state = scratch.path("state");
    let device = LoopDevice::new(&under, 512);
    let words = ["convert", "-q", "-n", "--verify", "-f", "raw", "-O", "raw", "--state-dir", &state];
    ours(&[&words[..], &[&a, &device.0]].concat());
    assert!(content(&device.0) == content(&a));
    // Zeroes gave their space back.
    assert!(allocated(&under) <= 3 * MIB, "{}", allocated(&under));
    let back = scratch.path("back");
    let end = run_json(&["convert", "-f", "raw", &device.0, &back]);
    assert_eq!(end.last().expect("an end")["ending"], "completed");
    assert_equal(&a, &back);
    assert!(allocated(&back) <= 3 * MIB);
}

#[test]
fn nothing_becomes_nothing() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.holey("a", 0, &[]), scratch.path("b"));
    ours(&["convert", "-q", "--verify", &a, &b]);
    assert_eq!(content(&b).len(), 0);
    let (a, b) = (scratch.holey("c", 1 << 40, &[]), scratch.path("d"));
    ours(&["convert", "-q", "--verify", &a, &b]);
    assert!(is_all_hole(&b));
    assert_eq!(std::fs::metadata(&b).expect("a file").len(), 1 << 40);
}

/// A backing file that is not the source's need not hold what the source's holds: where it does not, that is copied.
#[test]
fn a_copy_over_another_backing_file_shows_the_same() {
    let scratch = Scratch::new();
    let base = scratch.full("base", MIB);
    let (top, third) = (scratch.path("top"), scratch.path("third"));
    qemu(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 4 64k 64k", "-c", "write -z 256k 64k", &top]);
    qemu(&["create", "-q", "-f", "qcow2", "-b", &top, "-F", "qcow2", &third]);
    let (other, short, twin) = (scratch.path("other"), scratch.path("short"), scratch.path("twin"));
    std::fs::write(&other, vec![9; MIB as usize]).unwrap();
    std::fs::write(&short, &content(&base)[..500 << 10]).unwrap();
    std::fs::copy(&base, &twin).unwrap();
    let copy = scratch.path("copy");
    for (source, below, format) in [
        (&top, &other, "raw"),
        (&top, &short, "raw"),
        (&top, &twin, "raw"),
        (&top, &base, "raw"),
        // The same file, seen otherwise.
        (&third, &top, "raw"),
        (&third, &base, "raw"),
        (&third, &top, "qcow2"),
    ] {
        for compress in [&[][..], &["-c"]] {
            ours(
                &[
                    &["convert", "-f", "qcow2", "-O", "qcow2"],
                    compress,
                    &["-B", below, "-F", format, source, &copy],
                ]
                .concat(),
            );
            qemu(&["compare", "-q", "-f", "qcow2", "-F", "qcow2", source, &copy]);
            qemu(&["check", "-q", "-f", "qcow2", &copy]);
            let size = allocated(&copy);
            let is_thin = [&twin, &base].contains(&below) && source == &top || format == "qcow2";
            assert!(
                !is_thin || size < 512 << 10,
                "{source} over {below}: {size} bytes, though most is below"
            );
            std::fs::remove_file(&copy).unwrap();
        }
    }
}

/// Whatever is in the image that is there, it shows the source afterwards; where it showed it before, through its backing
/// file, nothing is written.
#[test]
fn an_image_that_is_there_over_a_backing_file_becomes_the_source() {
    let scratch = Scratch::new();
    let (base, short) = (scratch.full("base", MIB), scratch.full("short", 500 << 10));
    let image = |name: &str, below: &str, writes: &[&str]| {
        let image = scratch.path(name);
        qemu(&["create", "-q", "-f", "qcow2", "-b", below, "-F", "raw", &image, "1M"]);
        let writes: Vec<&str> = writes.iter().flat_map(|write| ["-c", *write]).collect();
        tool("qemu-io", &[&["-f", "qcow2"], &*writes, &[&*image]].concat());
        image
    };
    let some = ["write -P 4 64k 64k", "write -z 256k 64k", "write -P 5 700000 5000"];
    let sources = [image("top", "base", &some), image("over", "short", &some), image("empty", "base", &[])];
    let own = ["write -P 6 0 200k", "write -z 300k 300k", "write -P 7 1000000 10000"];
    let targets = [image("t1", "base", &[]), image("t2", "base", &own), image("t3", "short", &own)];
    std::os::unix::fs::symlink("base", scratch.path("link")).unwrap();
    for source in &sources {
        for (target, below) in
            [(0, "base"), (0, &*base), (0, "link"), (1, "base"), (2, &*short), (2, "short")]
        {
            let copy = scratch.path("copy");
            std::fs::copy(&targets[target], &copy).unwrap();
            ours(&["convert", "-q", "-n", "-O", "qcow2", "-B", below, source, &copy]);
            assert_eq!(qemu(&["compare", "-f", "qcow2", "-F", "qcow2", source, &copy]).code, Some(0));
            assert_eq!(qemu(&["check", "-q", "-f", "qcow2", &copy]).code, Some(0));
            let is_over_same = target == 0 && source != &sources[1];
            let room = allocated(&copy);
            assert!(
                !is_over_same || room < 600 << 10,
                "{source} to {target}: {room} bytes, though most is below"
            );
        }
    }
}

#[test]
fn a_backing_file_that_the_image_does_not_have_is_refused_at_once() {
    let scratch = Scratch::new();
    let (base, other) = (scratch.full("base", MIB), scratch.full("other", MIB));
    let [source, target, alone] = ["source", "target", "alone"].map(|name| scratch.path(name));
    for image in [&source, &target] {
        qemu(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", image]);
    }
    qemu(&["create", "-q", "-f", "qcow2", &alone, "1M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 4 64k 64k", &source]);
    let raw = scratch.full("raw", MIB);
    for (words, said) in [
        ([&*other, "raw", "qcow2", &target], "has another backing file"),
        (["none", "raw", "qcow2", &target], "has another backing file"),
        ([&*base, "qcow2", "qcow2", &target], "-F says qcow2"),
        ([&*base, "raw", "qcow2", &alone], "has no backing file"),
        ([&*base, "raw", "raw", &raw], "taken as a raw image"),
    ] {
        let [below, format, target_format, target] = words;
        let before = content(target);
        let words = ["convert", "-n", "-B", below, "-F", format, "-O", target_format, &source, target];
        for dry_run in [&["--dry-run"][..], &[]] {
            let refused = run(&[&words[..], dry_run].concat());
            assert!(refused.code == Some(1) && refused.to_string().contains(said), "{refused}");
            assert!(content(target) == before && !is_marked(target), "{refused}");
        }
    }
}

/// "Equals" is said where `compare` says it.
#[test]
fn the_last_line_says_what_is_true() {
    let scratch = Scratch::new();
    let (image, larger, part) =
        (scratch.path("a.qcow2"), scratch.full("larger", 4 * MIB), scratch.path("part"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "2M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", &image]);
    tool("qemu-img", &["snapshot", "-c", "one", &image]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 2 0 1M", &image]);
    let room = allocated(&image);
    let last = |arguments: &[&str]| {
        let ended = run(arguments);
        assert_eq!(ended.code, Some(0), "{ended}");
        ended.err.lines().last().unwrap_or_default().to_owned()
    };
    let said = last(&["convert", "-l", "one", &image, &part]);
    assert!(said.ends_with(&format!("holds snapshot 'one' of '{image}' (qcow2, 2 MiB)")), "{said}");
    let said = last(&["convert", "-n", &image, "-f", "qcow2", "-O", "raw", &larger]);
    assert!(said.ends_with(&format!("holds '{image}' (qcow2, 2 MiB) in its first 2 MiB")), "{said}");
    let said = last(&["convert", "-n", &image, "-f", "qcow2", "-O", "raw", &part]);
    assert!(said.ends_with(&format!("equals '{image}' (qcow2, 2 MiB)")), "{said}");
    assert_eq!(run(&["compare", &image, &part]).code, Some(0));
    // What only a snapshot held is given back with it.
    ours(&["snapshot", "-d", "one", &image]);
    assert!(allocated(&image) + MIB <= room, "{room} and {}", allocated(&image));
}
