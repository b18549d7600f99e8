//! Tools that look, on raw images.

use super::{assert_has_all, assert_same_json, our_json, ours, qemu, qemu_json};
use common::image::{KIB, MIB, Scratch, scribble};
use common::run;

#[test]
fn info_map_and_measure_say_what_qemu_img_says() {
    let scratch = Scratch::new();
    let image = scratch.holey("a.img", 3 * MIB + 512, &[(64 * KIB, 128 * KIB), (2 * MIB, 4096)]);
    let empty = scratch.holey("b.img", MIB, &[]);
    for image in [&image, &empty] {
        let arguments = ["info", "--output=json", image];
        let (a, b) = (our_json(&arguments), qemu_json(&arguments));
        assert_has_all(&a, &b, "");
        assert_eq!(a["state"], "unmarked");
        let chain = ["info", "--output=json", "--backing-chain", "-U", "-f", "raw", image];
        assert_has_all(&our_json(&chain), &qemu_json(&chain), "");
        let arguments = ["map", "--output=json", "-f", "raw", image];
        assert_same_json(&our_json(&arguments), &qemu_json(&arguments));
        let part = ["map", "--output=json", "-f", "raw", "-s", "100k", "-l", "1M", image];
        assert_same_json(&our_json(&part), &qemu_json(&part));
        let arguments = ["map", "-f", "raw", image];
        assert_eq!(ours(&arguments), qemu(&arguments).out);
        let arguments = ["measure", "--output=json", "-f", "raw", "-O", "raw", image];
        assert_same_json(&our_json(&arguments), &qemu_json(&arguments));
        let arguments = ["measure", "-f", "raw", "-O", "raw", image];
        assert_eq!(ours(&arguments), qemu(&arguments).out);
    }
    let arguments = ["measure", "--output=json", "-O", "raw", "--size", "5G"];
    assert_same_json(&our_json(&arguments), &qemu_json(&arguments));
}

#[test]
fn compare_ends_with_the_codes_of_qemu_img() {
    let scratch = Scratch::new();
    let a = scratch.holey("a", 4 * MIB, &[(MIB, MIB)]);
    let b = scratch.holey("b", 4 * MIB, &[(MIB, MIB)]);
    let longer = scratch.holey("longer", 6 * MIB, &[(MIB, MIB)]);
    let differs = scratch.holey("differs", 4 * MIB, &[(MIB, MIB)]);
    scribble(&differs, 3 * MIB + 5, &[9]);
    let tail = scratch.holey("tail", 6 * MIB, &[(MIB, MIB)]);
    scribble(&tail, 5 * MIB + 77, &[9]);
    let full = scratch.holey("full", 4 * MIB, &[(MIB, MIB)]);
    scribble(&full, 0, &[0; 65_536]);
    let missing = scratch.path("missing");
    for (strict, x, y, wanted) in [
        (false, &a, &b, 0),
        (false, &a, &longer, 0),
        (false, &longer, &a, 0),
        (false, &a, &full, 0),
        (false, &a, &differs, 1),
        (false, &a, &tail, 1),
        (false, &tail, &a, 1),
        (true, &a, &b, 0),
        (true, &a, &longer, 1),
        (true, &a, &full, 1),
        (false, &a, &missing, 2),
    ] {
        let mut arguments = vec!["compare", "-f", "raw", "-F", "raw", x, y];
        if strict {
            arguments.insert(1, "-s");
        }
        let (ours, theirs) = (run(&arguments), qemu(&arguments));
        assert_eq!((ours.code, theirs.code), (Some(wanted), Some(wanted)), "{arguments:?} {ours} {theirs}");
        if wanted == 1 && !strict {
            // The text ends with the first offset that differs; QEMU's is that of the piece it compared.
            let at = |text: &str| -> u64 {
                let text = text.lines().last().unwrap_or_default();
                text.trim_matches(|c: char| !c.is_ascii_digit()).parse().expect("an offset")
            };
            assert_eq!(at(&ours.out) / 512, at(&theirs.out) / 512, "{ours} {theirs}");
        } else {
            assert_eq!(ours.out, theirs.out);
        }
    }
}

#[test]
fn create_and_resize_make_what_qemu_img_makes() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.path("a"), scratch.path("b"));
    for preallocation in ["off", "falloc", "full"] {
        let options = format!("preallocation={preallocation}");
        ours(&["create", "--force", "-f", "raw", "-o", &options, &a, "3M"]);
        qemu(&["create", "-f", "raw", "-o", &options, &b, "3M"]);
        let arguments = |file| ["info", "--output=json", "-f", "raw", file];
        let (x, y) = (qemu_json(&arguments(&a)), qemu_json(&arguments(&b)));
        assert_eq!(x["virtual-size"], y["virtual-size"]);
        let (x, y) = (x["actual-size"].as_u64(), y["actual-size"].as_u64());
        // QEMU allocates the first block of a new image in any case.
        assert!(x == y || preallocation == "off" && x == Some(0) && y <= Some(4096), "{x:?} {y:?}");
    }
    let refused = run(&["create", &a, "1M"]);
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(refused.err.contains("exists and is left alone"), "{refused}");
    assert_eq!(run(&["create", &scratch.path("c")]).code, Some(2));
    for (change, len, code) in
        [("+1M", 4 * MIB, 0), ("-2M", 4 * MIB, 1), ("8M", 8 * MIB, 0), ("-100M", 8 * MIB, 1)]
    {
        let (x, y) = (run(&["resize", "-f", "raw", &a, change]), qemu(&["resize", "-f", "raw", &b, change]));
        assert_eq!((x.code, y.code), (Some(code), Some(code)), "{x} {y}");
        assert_eq!(std::fs::metadata(&a).expect("a file").len(), len);
        assert_eq!(std::fs::metadata(&b).expect("a file").len(), len);
    }
    ours(&["resize", "-f", "raw", "--shrink", &a, "-7M"]);
    assert_eq!(std::fs::metadata(&a).expect("a file").len(), MIB);
    ours(&["resize", "-f", "raw", "--preallocation=falloc", &a, "+1M"]);
    assert!(common::image::allocated(&a) >= MIB);
    let unsaid = run(&["resize", &a, "1M"]);
    assert!(unsaid.code == Some(1) && unsaid.err.contains("-f raw"), "{unsaid}");
}

#[test]
fn raw_images_have_nothing_to_check_and_no_snapshots() {
    let scratch = Scratch::new();
    let image = scratch.full("a", MIB);
    for arguments in [vec!["check", image.as_str()], vec!["check", "-r", "all", &image]] {
        assert_eq!((run(&arguments).code, qemu(&arguments).code), (Some(63), Some(63)), "{arguments:?}");
    }
    assert_eq!(
        (ours(&["snapshot", "-l", &image]), qemu(&["snapshot", "-l", &image]).out),
        Default::default()
    );
    assert_eq!(run(&["snapshot", "-c", "x", &image]).code, Some(1));
    let refused = run(&["rebase", "-f", "raw", "-b", "b", "-F", "raw", &image]);
    assert!(refused.code == Some(1) && refused.err.contains("no backing files"), "{refused}");
}
