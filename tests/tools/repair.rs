//! `check` and its repairs, beside those of `qemu-img`, on images that are damaged in each way that there is.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use serde_json::Value;

use super::{assert_same_json, our_json, ours, qemu, qemu_json};
use common::image::{KIB, MIB, Scratch, allocated, content};
use common::{run, tool};

/// Where an entry of a table leads.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The mark of a sole reference.
const COPIED: u64 = 1 << 63;

/// An image to be damaged, with clusters of 64 KiB unless its options say otherwise.
struct Image {
    path: String,
}

impl Image {
    /// With data in its first mebibyte and at 32 MiB, and what `more` does to it.
    fn new(scratch: &Scratch, options: &str, size: &str, more: &[&[&str]]) -> Image {
        let path = scratch.path("image");
        let _ = std::fs::remove_file(&path);
        let options = options.replace("DATA", &scratch.path("data"));
        let mut create = vec!["create", "-q", "-f", "qcow2", &path, size];
        if !options.is_empty() {
            create.splice(4..4, ["-o", options.as_str()]);
        }
        tool("qemu-img", &create);
        let write = ["-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -P 2 32M 128k", &path];
        tool("qemu-io", &write);
        for command in more {
            tool(command[0], &[&command[1..], &[path.as_str()]].concat());
        }
        Image { path }
    }

    fn u64(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        File::open(&self.path).expect("an image").read_exact_at(&mut bytes, at).expect("a read");
        u64::from_be_bytes(bytes)
    }

    fn u32(&self, at: u64) -> u32 {
        (self.u64(at) >> 32) as u32
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = content(&self.path);
        bytes.resize(bytes.len().max(at as usize + len), 0);
        bytes[at as usize..at as usize + len].to_vec()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(&self.path).expect("an image");
        file.write_all_at(bytes, at).expect("a write");
    }

    fn set(&self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    fn or(&self, at: u64, bits: u64) {
        self.set(at, self.u64(at) | bits);
    }

    fn len(&self) -> u64 {
        std::fs::metadata(&self.path).expect("an image").len()
    }

    /// Where the L1 table begins.
    fn l1(&self) -> u64 {
        self.u64(40)
    }

    /// Where entry `index` of the first L2 table is.
    fn l2(&self, index: u64) -> u64 {
        (self.u64(self.l1()) & OFFSET) + index * 8
    }

    /// The same where entries have subclusters.
    fn l2_extended(&self, index: u64) -> u64 {
        (self.u64(self.l1()) & OFFSET) + index * 16
    }

    /// Sets the refcount (16 bits) of the cluster at an offset.
    fn count(&self, at: u64, refcount: u16) {
        let block = self.u64(self.u64(48));
        self.put(block + (at / (64 * KIB)) * 2, &refcount.to_be_bytes());
    }

    /// A cluster that is counted and not used.
    fn leak(&self) {
        let at = self.len().next_multiple_of(64 * KIB);
        self.put(at + 64 * KIB - 1, &[0]);
        self.count(at, 1);
    }

    /// Where the data of the header extension for bitmaps begins.
    fn bitmaps(&self) -> u64 {
        let mut at = u64::from(self.u32(100));
        while self.u32(at) != 0x2385_2875 {
            assert_ne!(self.u32(at), 0, "there are bitmaps");
            at += 8 + u64::from(self.u32(at + 4)).next_multiple_of(8);
        }
        at + 8
    }
}

fn by_qemu(path: &str) -> Option<i32> {
    qemu(&["check", "-f", "qcow2", path]).code
}

/// What QEMU shows of the disk, as a raw image; `None` if it does not open it.
fn shown(scratch: &Scratch, path: &str) -> Option<String> {
    let raw = scratch.path("raw");
    let ended = qemu(&["convert", "-f", "qcow2", "-O", "raw", path, &raw]);
    (ended.code == Some(0)).then_some(raw)
}

/// A kind of damage: its name, the options of the image, and what is done to it.
type Damage = (&'static str, &'static str, fn(&Image));

const DAMAGES: [Damage; 31] = [
    ("no damage", "", |_| ()),
    ("a reserved bit in an L1 entry", "", |i| i.or(i.l1(), 1 << 57)),
    ("a low reserved bit in an L1 entry", "", |i| i.or(i.l1(), 1)),
    ("a reserved bit in an L2 entry", "", |i| i.or(i.l2(0), 1 << 56)),
    ("a reserved bit in version 2", "compat=0.10", |i| i.or(i.l2(0), 4)),
    ("a reserved bit in an empty L2 entry", "", |i| i.set(i.l2(100), 1 << 61)),
    ("a reserved bit beside subclusters", "extended_l2=on", |i| i.or(i.l2_extended(0), 1 << 58)),
    ("a reserved bit with a data file", "data_file=DATA", |i| i.or(i.l2(1), 1 << 60)),
    ("a leak", "", Image::leak),
    ("a leak, counted thrice", "", |i| {
        i.leak();
        i.count(i.len() - 1, 3);
    }),
    ("a leak, and a reserved bit", "", |i| {
        i.leak();
        i.or(i.l2(0), 2);
    }),
    ("a leak, and a refcount that is too low", "", |i| {
        i.leak();
        i.count(i.u64(i.l2(0)) & OFFSET, 0);
    }),
    ("counted twice, and rightly not marked", "", |i| {
        let data = i.u64(i.l2(0)) & OFFSET;
        i.set(i.l2(0), data);
        i.count(data, 2);
    }),
    ("a table counted twice, and rightly not marked", "", |i| {
        let table = i.l2(0);
        i.set(i.l1(), table);
        i.count(table, 2);
    }),
    ("a mark is missing", "", |i| i.set(i.l2(0), i.u64(i.l2(0)) & OFFSET)),
    ("a table's mark is missing", "", |i| i.set(i.l1(), i.l2(0))),
    ("counted twice, and marked", "", |i| i.count(i.u64(i.l2(0)) & OFFSET, 2)),
    ("two L1 entries, one table", "", |i| i.set(i.l1() + 8, i.u64(i.l1()))),
    ("two L1 entries, one table, and a leak", "", |i| {
        i.leak();
        i.set(i.l1() + 16, i.u64(i.l1()));
    }),
    ("two entries, one cluster", "", |i| i.set(i.l2(1), i.u64(i.l2(0)))),
    ("data on its own table", "", |i| i.set(i.l2(0), i.l2(0) | COPIED)),
    ("data on a refcount block", "", |i| i.set(i.l2(0), i.u64(i.u64(48)) | COPIED)),
    ("refcounts all 0", "", |i| i.put(i.u64(i.u64(48)), &[0; 65_536])),
    ("no refcount block", "", |i| i.set(i.u64(48), 0)),
    ("a refcount block beyond the end", "", |i| i.set(i.u64(48), 1 << 40)),
    ("a refcount table beyond the end", "", |i| i.set(48, 1 << 40)),
    ("no refcount table", "", |i| i.set(48, 0)),
    ("a refcount table of no clusters", "", |i| i.put(56, &[0; 4])),
    ("zeroes with a place that is no cluster", "", |i| i.set(i.l2(100), 0x50201)),
    ("zeroes in subclusters, and no cluster", "extended_l2=on", |i| {
        i.set(i.l2_extended(100), 0x50200);
        i.set(i.l2_extended(100) + 8, 0xffff_ffff << 32);
    }),
    ("the dirty bit", "", |i| i.set(72, 1)),
];

#[test]
fn checks_see_and_repair_what_qemu_sees_and_repairs() {
    let scratch = Scratch::new();
    for (name, options, damage) in DAMAGES {
        let size = if name.contains("two L1 entries") { "2G" } else { "64M" };
        let image = Image::new(&scratch, options, size, &[]);
        damage(&image);
        let before = shown(&scratch, &image.path);
        let looked = run(&["check", "-f", "qcow2", &image.path]);
        assert_eq!(looked.code, by_qemu(&image.path), "{name}: {looked}");
        for what in ["leaks", "all"] {
            let (a, b) = (scratch.path("a"), scratch.path("b"));
            std::fs::copy(&image.path, &a).expect("a copy");
            std::fs::copy(&image.path, &b).expect("a copy");
            let repaired = run(&["check", "-f", "qcow2", "-r", what, &a]);
            qemu(&["check", "-f", "qcow2", "-r", what, &b]);
            let (mine, theirs) = (by_qemu(&a), by_qemu(&b));
            // What is said is true, and not worse than what QEMU's repair leaves.
            assert_eq!(repaired.code, mine, "{name}, -r {what}: {repaired}");
            assert!(
                mine == theirs || mine == Some(0),
                "{name}, -r {what}: {mine:?} and {theirs:?}: {repaired}"
            );
            let again = run(&["check", "-f", "qcow2", &a]);
            assert_eq!(again.code, mine, "{name}, -r {what}: {again}");
            // Where the disk shows a table, it shows what was repaired there.
            if let Some(before) = before.as_ref().filter(|_| name != "data on its own table") {
                let same = qemu(&["compare", "-f", "qcow2", "-F", "raw", &a, before]);
                assert_eq!(same.code, Some(0), "{name}, -r {what}: {same}");
            }
        }
    }
}

/// Features that nobody need know belong to whoever keeps them up: a repair may free what only they know of, and so
/// switches them off, as every program does that writes the image. A look leaves them.
#[test]
fn a_repair_switches_off_features_that_it_does_not_know() {
    /// Where the header has them.
    const AUTOCLEAR: u64 = 88;
    let scratch = Scratch::new();
    for damage in [|_: &Image| (), Image::leak] {
        let image = Image::new(&scratch, "", "64M", &[]);
        image.set(AUTOCLEAR, 1 << 63);
        damage(&image);
        run(&["check", "-f", "qcow2", &image.path]);
        assert_eq!(image.u64(AUTOCLEAR), 1 << 63, "a look changes nothing");
        for what in ["leaks", "all"] {
            image.set(AUTOCLEAR, 1 << 63);
            ours(&["check", "-f", "qcow2", "-r", what, &image.path]);
            assert_eq!(image.u64(AUTOCLEAR), 0, "-r {what}");
            assert_eq!(by_qemu(&image.path), Some(0));
        }
    }
}

/// The table of snapshots or the directory of bitmaps cannot be read: what they lead to is there when they can be read
/// again, whatever was repaired meanwhile.
#[test]
fn nothing_is_freed_that_could_not_be_read() {
    let scratch = Scratch::new();
    let snapshot = ["qemu-img", "snapshot", "-c", "keep"];
    let change = ["qemu-io", "-f", "qcow2", "-c", "write -P 3 0 1M"];
    let bitmap: [&[&str]; 3] =
        [&["qemu-img", "bitmap", "--add", "-g", "64k"], &change, &["qemu-img", "bitmap", "--disable"]];
    /// Where something is made unreadable, with which bytes.
    type Hide = fn(&Image) -> (u64, Vec<u8>);
    let hidden: [(&str, Hide); 10] = [
        ("an entry that was wiped", |i| (i.u64(64), vec![0; 72])),
        ("a bitmap without a table", |i| (i.u64(i.bitmaps() + 16), vec![0; 12])),
        ("extra data without end", |i| (i.u64(64) + 36, vec![0xff; 4])),
        ("a table of snapshots beyond the end", |i| {
            (64, (i.len() + (1 << 30)).next_multiple_of(65_536).to_be_bytes().into())
        }),
        ("a snapshot's L1 table that is no cluster", |i| {
            (i.u64(64), (i.u64(i.u64(64)) + 512).to_be_bytes().into())
        }),
        ("a snapshot's L1 table that is too large", |i| (i.u64(64) + 8, vec![0x10, 0, 0, 0])),
        ("a bitmap without a name", |i| (i.u64(i.bitmaps() + 16) + 18, vec![0, 0])),
        ("too few bitmaps", |i| (i.bitmaps(), vec![0, 0, 0, 2])),
        ("a bitmap's table beyond the end", |i| (i.u64(i.bitmaps() + 16), (1u64 << 40).to_be_bytes().into())),
        ("a bitmap's table that is no cluster", |i| {
            let at = i.u64(i.bitmaps() + 16);
            (at, (i.u64(at) + 512).to_be_bytes().into())
        }),
    ];
    for (name, hide) in hidden {
        let is_bitmap = name.contains("bitmap");
        let image = if is_bitmap {
            let image = Image::new(&scratch, "", "64M", &[]);
            for command in bitmap {
                let mut command = command.to_vec();
                command.push(&image.path);
                if command.contains(&"bitmap") {
                    command.push("b");
                }
                tool(command[0], &command[1..]);
            }
            image
        } else {
            Image::new(&scratch, "", "64M", &[&snapshot, &change])
        };
        image.leak();
        // The last cluster of data: its refcount is lost, so that all of them have to be made anew.
        let data = image.u64(image.l2(512)) & OFFSET;
        for lost in [false, true] {
            let path = scratch.path("copy");
            std::fs::copy(&image.path, &path).expect("a copy");
            let copy = Image { path };
            if lost {
                copy.count(data, 0);
            }
            let (at, bytes) = hide(&copy);
            let before = copy.bytes(at, bytes.len());
            copy.put(at, &bytes);
            for what in ["leaks", "all"] {
                let ended = run(&["check", "-f", "qcow2", "-r", what, &copy.path]);
                // What is too large keeps a repair of leaks from coming to its end, as QEMU's, and the look that follows
                // when something else was repaired.
                let is_too_large = name == "extra data without end";
                let is_kept_off = is_too_large && what == "leaks";
                let wanted = if is_kept_off || (is_too_large && lost) { 1 } else { 2 };
                assert_eq!(ended.code, Some(wanted), "{name}, {what}, {lost}: {ended}");
                let told = ended.to_string();
                let says = ["not freed", "Nothing was freed"].iter().any(|text| told.contains(text));
                assert!(is_kept_off || says, "{name}, {what}, {lost}: {ended}");
            }
            // Who knows that nobody will read it has it dropped: the rest is whole then.
            let dropped = Image { path: scratch.path("dropped") };
            std::fs::copy(&copy.path, &dropped.path).expect("a copy");
            let ended = run(&["check", "-f", "qcow2", "-r", "drop-unreadable", &dropped.path]);
            assert_eq!(ended.code, Some(0), "{name}, {lost}: {ended}");
            assert_eq!(by_qemu(&dropped.path), Some(0), "{name}, {lost}");
            let read = tool("qemu-io", &["-f", "qcow2", "-c", "read -P 2 32M 128k", &dropped.path]);
            assert!(!read.contains("failed"), "{name}, {lost}: {read}");
            copy.put(at, &before);
            // Readable again: all of it is there, and only what leaked before is a leak.
            let found = qemu(&["check", "-f", "qcow2", &copy.path]);
            assert_eq!(found.code, Some(3), "{name}, {lost}: {found}");
            if !is_bitmap {
                tool("qemu-img", &["snapshot", "-a", "keep", &copy.path]);
                let read = tool("qemu-io", &["-f", "qcow2", "-c", "read -P 1 0 1M", &copy.path]);
                assert!(!read.contains("failed"), "{name}, {lost}: {read}");
            }
        }
    }
}

/// Gives the first entry of the table of snapshots this much extra data.
fn with_extra(i: &Image, extra: usize) {
    let at = i.u64(64);
    let old = i.bytes(at, 4096);
    let had = u32::from_be_bytes(old[36..40].try_into().expect("four bytes")) as usize;
    let mut new = old[..36].to_vec();
    new.extend((extra as u32).to_be_bytes());
    new.extend(&old[40..40 + had.min(extra)]);
    new.resize(40 + extra, 0);
    new.extend(&old[40 + had..40 + had + 4]);
    let rest = (40 + had + 4).next_multiple_of(8);
    new.resize(new.len().next_multiple_of(8), 0);
    new.extend(&old[rest..rest + 100]);
    i.put(at, &new);
}

/// Version 2 cannot be resized with snapshots, and version 3 can: one command does both, and a snapshot whose old program
/// did not write down how long its disk was is still as long as it was then.
#[test]
fn an_old_image_with_snapshots_grows_by_way_of_version_3() {
    let scratch = Scratch::new();
    for extra in [None, Some(8), Some(0)] {
        let image = Image::new(&scratch, "compat=0.10", "64M", &[&["qemu-img", "snapshot", "-c", "one"]]);
        if let Some(extra) = extra {
            with_extra(&image, extra);
        }
        let before = content(&image.path);
        let refused = run(&["amend", "-o", "size=128M", &image.path]);
        assert_eq!(refused.code, Some(1), "{refused}");
        assert!(refused.err.contains("amend -o compat=1.1"), "{refused}");
        assert_eq!(content(&image.path), before, "{extra:?}: nothing has changed");
        ours(&["amend", "-o", "compat=1.1,size=128M", &image.path]);
        let shows = |size: u64| {
            let info = qemu_json(&["info", "--output=json", &image.path]);
            assert_eq!(info["virtual-size"], size, "{extra:?}");
            assert_eq!(info["format-specific"]["data"]["compat"], "1.1", "{extra:?}");
            assert_eq!(by_qemu(&image.path), Some(0), "{extra:?}");
        };
        shows(128 * MIB);
        tool("qemu-img", &["snapshot", "-a", "one", &image.path]);
        shows(64 * MIB);
        let read = tool("qemu-io", &["-f", "qcow2", "-c", "read -P 1 0 1M", &image.path]);
        assert!(!read.contains("failed"), "{extra:?}: {read}");
    }
}

/// How QEMU's repair of leaks ends, of a copy.
fn qemu_repairs_leaks(scratch: &Scratch, path: &str) -> Option<i32> {
    let copy = scratch.path("copy");
    std::fs::copy(path, &copy).expect("a copy");
    qemu(&["check", "-r", "leaks", "-f", "qcow2", &copy]).code
}

#[test]
fn tables_of_snapshots_are_repaired() {
    let scratch = Scratch::new();
    let snapshots: [&[&str]; 2] =
        [&["qemu-img", "snapshot", "-c", "one"], &["qemu-img", "snapshot", "-c", "two"]];
    let damages: [Damage; 4] = [
        ("too much extra data", "", |i| with_extra(i, 1100)),
        ("no disk size", "", |i| with_extra(i, 8)),
        ("no extra data", "", |i| with_extra(i, 0)),
        ("an entry that is not there", "", |i| i.put(60, &[0, 0, 0, 3])),
    ];
    for (name, options, damage) in damages {
        let image = Image::new(&scratch, options, "64M", &snapshots);
        damage(&image);
        // A table that nobody uses keeps the check from coming to its end; repaired it can be.
        assert_eq!(run(&["check", &image.path]).code, by_qemu(&image.path), "{name}");
        assert_eq!(
            run(&["check", "-r", "leaks", &image.path]).code,
            qemu_repairs_leaks(&scratch, &image.path),
            "{name}"
        );
        let repaired = run(&["check", "-r", "all", &image.path]);
        assert_eq!(repaired.code, Some(0), "{name}: {repaired}");
        assert_eq!(by_qemu(&image.path), Some(0), "{name}");
        let list = qemu_json(&["info", "--output=json", &image.path])["snapshots"].clone();
        let names: Vec<&Value> = list.as_array().expect("a list").iter().map(|s| &s["name"]).collect();
        assert_eq!(names, ["one", "two"], "{name}");
        tool("qemu-img", &["snapshot", "-a", "one", &image.path]);
        tool("qemu-img", &["snapshot", "-d", "two", &image.path]);
        assert_eq!(by_qemu(&image.path), Some(0), "{name}");
    }
}

#[test]
fn snapshots_of_small_clusters_and_long_tables() {
    let scratch = Scratch::new();
    for options in
        ["cluster_size=512", "cluster_size=512,refcount_bits=64", "cluster_size=4k,refcount_bits=64"]
    {
        let path = scratch.path("image");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &path, "4G"]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 3 16M 512", "-c", "write -P 4 3G 64k", &path]);
        let mut longest = 0;
        for name in ["one", "two", "three"] {
            ours(&["snapshot", "-c", name, &path]);
            assert_eq!(by_qemu(&path), Some(0), "{options}");
            ours(&["snapshot", "-d", name, &path]);
            assert_eq!(by_qemu(&path), Some(0), "{options}");
            // What one had is there for the next.
            let len = std::fs::metadata(&path).expect("an image").len();
            assert!(longest == 0 || len <= longest + MIB, "{options}: {longest} and {len}");
            longest = longest.max(len);
        }
        let read =
            tool("qemu-io", &["-f", "qcow2", "-c", "read -P 3 16M 512", "-c", "read -P 4 3G 64k", &path]);
        assert!(!read.contains("failed"), "{read}");
    }
}

#[test]
fn measures_are_those_of_qemu_img() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.path(name);
    let mut sources: Vec<Vec<String>> =
        ["0", "1", "1M", "1G", "3T", "3P"].map(|size| vec!["--size".into(), size.into()]).into();
    for mode in ["off", "metadata", "falloc", "full"] {
        let image = path(mode);
        let option = format!("preallocation={mode}");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, &image, "100M"]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 3M 1M", "-c", "write -z 10M 5M", &image]);
        sources.push(vec![image]);
    }
    tool("qemu-img", &["bitmap", "--add", "-g", "512", &path("off"), "a longer name"]);
    tool("qemu-img", &["bitmap", "--add", &path("off"), "b"]);
    for options in [
        "preallocation=off",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "cluster_size=4k",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=2M",
        "extended_l2=on",
        "compat=0.10",
        "data_file=elsewhere",
        "backing_file=below,backing_fmt=raw",
        "size=5G",
        "cluster_size=3k",
    ] {
        for source in &sources {
            let mut arguments = vec!["measure", "--output=json", "-O", "qcow2", "-o", options];
            arguments.extend(source.iter().map(String::as_str));
            let (mine, theirs) = (run(&arguments), qemu(&arguments));
            assert_eq!(mine.code, theirs.code, "{arguments:?}: {mine} {theirs}");
            if theirs.code == Some(0) {
                let document = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
                assert_same_json(&document(&mine.out), &document(&theirs.out));
            }
        }
    }
}

/// QEMU sets room aside behind the end of the file, and fails where that lies behind the end of what is used of it.
#[test]
fn qemu_sets_room_aside_in_what_was_converted_or_resized_here() {
    let scratch = Scratch::new();
    let (source, target) = (scratch.path("source"), scratch.path("target"));
    tool("qemu-img", &["create", "-q", "-f", "raw", &source, "4M"]);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 1 64k 200k", "-c", "write -P 2 3M 8k", &source]);
    let grow = |how: &str| {
        tool("qemu-img", &["resize", "-q", "-f", "qcow2", "--preallocation=falloc", &target, "+1M"]);
        assert_eq!(by_qemu(&target), Some(0), "{how}");
    };
    for how in ["", "-c"] {
        let convert = ["convert", "--force", "-q", "-f", "raw", "-O", "qcow2", how, &source, &target];
        ours(&convert.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>());
        assert!(
            std::fs::metadata(&target).expect("an image").len() < MIB,
            "{how}: what is used, and no more"
        );
        ours(&["compare", "-f", "raw", "-F", "qcow2", &source, &target]);
        grow(how);
    }
    for mode in ["metadata", "falloc", "full"] {
        let _ = std::fs::remove_file(&target);
        ours(&["create", "-q", "-f", "qcow2", &target, "1M"]);
        ours(&["resize", "-q", "-f", "qcow2", &format!("--preallocation={mode}"), &target, "+2M"]);
        grow(mode);
    }
}

/// Room is set aside for all of the part that is added, also where it begins inside a cluster that is there already.
#[test]
fn a_disk_that_grows_inside_a_cluster_has_the_room_that_was_asked_for() {
    let scratch = Scratch::new();
    for options in ["preallocation=metadata", "preallocation=metadata,extended_l2=on", "data_file=DATA"] {
        for mode in ["falloc", "full"] {
            let (path, data) = (scratch.path("image"), scratch.path("data"));
            let options = options.replace("DATA", &data);
            ours(&["create", "--force", "-q", "-f", "qcow2", "-o", &options, &path, "2000k"]);
            tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1984k 4k", &path]);
            ours(&["resize", "-q", "-f", "qcow2", &format!("--preallocation={mode}"), &path, "+16k"]);
            let file = if options.contains("data_file") { &data } else { &path };
            let before = allocated(file);
            tool(
                "qemu-io",
                &["-f", "qcow2", "-c", "read -P 0 1988k 28k", "-c", "write -P 3 2000k 16k", &path],
            );
            assert_eq!(allocated(file), before, "{options}, {mode}: there is room for what is written");
            let read = ["read -P 1 1984k 4k", "read -P 0 1988k 12k", "read -P 3 2000k 16k"];
            for what in read {
                let said = tool("qemu-io", &["-f", "qcow2", "-c", what, &path]);
                assert!(!said.contains("failed"), "{options}, {mode}: {said}");
            }
            assert_eq!(by_qemu(&path), Some(0), "{options}, {mode}");
        }
    }
}

/// A preallocated file is as long as QEMU makes it, and as `measure` tells.
#[test]
fn preallocated_images_are_as_long_as_measured() {
    let scratch = Scratch::new();
    for mode in ["metadata", "falloc", "full"] {
        for more in ["", "cluster_size=4k", "cluster_size=2M", "extended_l2=on", "data_file=DATA"] {
            let (a, b, data) = (scratch.path("a"), scratch.path("b"), scratch.path("data"));
            let options = format!("preallocation={mode},{more}").replace("DATA", &data);
            let options = options.trim_end_matches(',');
            ours(&["create", "--force", "-q", "-f", "qcow2", "-o", options, &a, "10M"]);
            tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &b, "10M"]);
            let len = |path: &str| std::fs::metadata(path).expect("an image").len();
            assert_eq!(len(&a), len(&b), "{options}");
            if !more.starts_with("data_file") {
                let measure = ["measure", "--output=json", "-O", "qcow2", "-o", options, "--size", "10M"];
                assert_eq!(our_json(&measure)["fully-allocated"], len(&a), "{options}");
            }
            assert_eq!(by_qemu(&a), Some(0), "{options}");
        }
    }
}

#[test]
fn preallocated_and_compressed_zeroes_are_known() {
    let scratch = Scratch::new();
    for options in
        ["preallocation=metadata", "preallocation=metadata,cluster_size=4k", "preallocation=falloc"]
    {
        let image = scratch.path("image");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &image, "4M"]);
        let arguments = ["map", "--output=json", &image];
        assert_same_json(&our_json(&arguments), &qemu_json(&arguments));
        let write = ["-c", "write -P 1 1M 64k", "-c", "write -z 2M 64k", "-c", "write -z -u 3M 64k"];
        tool("qemu-io", &[&["-f", "qcow2"], &write[..], &[&image]].concat());
        assert_same_json(&our_json(&arguments), &qemu_json(&arguments));
        assert_eq!(ours(&["map", &image]), qemu(&["map", &image]).out, "{options}");
        // A copy is as thin as the source says it is.
        let copy = scratch.path("copy");
        let _ = std::fs::remove_file(&copy);
        ours(&["convert", "-q", "-O", "raw", &image, &copy]);
        assert_eq!(ours(&["compare", &image, &copy]), "Images are identical.\n");
    }
    let source = scratch.holey("source", 16 * MIB, &[(MIB, 64 * KIB)]);
    for how in [&["-c", "-S", "0"][..], &["-c", "-S", "0", "-o", "cluster_size=4k"], &["-c", "-S", "64k"]] {
        let target = scratch.path("target");
        let (a, b) = (["convert", "-q"], ["--force", "-f", "raw", "-O", "qcow2", &source, &target]);
        ours(&[&a[..], how, &b[..]].concat());
        assert!(allocated(&target) < 2 * MIB, "{how:?}: {}", allocated(&target));
        assert_eq!(by_qemu(&target), Some(0), "{how:?}");
        assert_eq!(
            ours(&["compare", "-f", "raw", "-F", "qcow2", &source, &target]),
            "Images are identical.\n"
        );
        let check = qemu_json(&["check", "--output=json", &target]);
        // Without a look for zeroes, each cluster of the disk is there.
        let is_whole = how.contains(&"0");
        assert_eq!(check["allocated-clusters"] == check["total-clusters"], is_whole, "{how:?}: {check}");
    }
}

/// A file that was cut off: new refcounts must not come to lie where guest data or tables are said to be.
#[test]
fn what_is_named_behind_the_end_is_kept_free() {
    let scratch = Scratch::new();
    for cut in ["the last data", "a table"] {
        let image = Image::new(&scratch, "", "1G", &[]);
        // Another table, and data behind it.
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 3 512M 256k", &image.path]);
        let table = image.u64(image.l1() + 8) & OFFSET;
        let data = image.u64(image.l2(512)) & OFFSET;
        image.count(data, 0);
        let file = OpenOptions::new().write(true).open(&image.path).expect("an image");
        file.set_len(if cut == "a table" { table } else { table + 128 * KIB }).expect("a cut");
        let (bytes, disk) = (content(&image.path), scratch.path("before"));
        std::fs::rename(shown(&scratch, &image.path).expect("a disk"), &disk).expect("another name");
        let ended = run(&["check", "-f", "qcow2", "-r", "all", &image.path]);
        if cut == "a table" {
            // Grown over it the image would say that there was nothing.
            assert!(ended.code == Some(2) && ended.err.contains("Nothing was repaired"), "{ended}");
            assert!(content(&image.path) == bytes, "{cut}");
        } else {
            assert_eq!((ended.code, by_qemu(&image.path)), (Some(0), Some(0)), "{ended}");
            tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &disk, &image.path]);
        }
    }
}

#[test]
fn tables_at_impossible_places_are_made_anew_or_dropped() {
    let scratch = Scratch::new();
    let snapshot: [&[&str]; 2] =
        [&["qemu-img", "snapshot", "-c", "one"], &["qemu-io", "-f", "qcow2", "-c", "write -P 3 0 1M"]];
    for (field, what, is_repaired) in [(64, "snapshots", false), (48, "reference counts", true)] {
        let image = Image::new(&scratch, "", "64M", &snapshot);
        let disk = content(&shown(&scratch, &image.path).expect("a disk"));
        image.or(field, 0x1300);
        let refused = run(&["info", "-f", "qcow2", &image.path]);
        assert!(refused.code == Some(1) && refused.err.contains(what), "{refused}");
        let all = run(&["check", "-f", "qcow2", "-r", "all", &image.path]);
        assert_eq!(all.code, Some(if is_repaired { 0 } else { 2 }), "{all}");
        let dropped = run(&["check", "-f", "qcow2", "-r", "drop-unreadable", &image.path]);
        assert_eq!((dropped.code, by_qemu(&image.path)), (Some(0), Some(0)), "{dropped}");
        assert!(content(&shown(&scratch, &image.path).expect("a disk")) == disk);
    }
}

/// Small clusters leave offsets of compressed ones more bits than a file can be long.
#[test]
fn a_compressed_cluster_far_away_is_nowhere() {
    let scratch = Scratch::new();
    let image = Image::new(&scratch, "cluster_size=4k", "64M", &[]);
    image.set(image.l2(100), 0x7900_0000_0000_0000);
    for what in [&["check"][..], &["check", "-r", "all"]] {
        let ended = run(&[what, &["-f", "qcow2", &image.path]].concat());
        assert!(ended.code == Some(2) && ended.err.contains("beyond the end"), "{ended}");
    }
    assert_eq!(by_qemu(&image.path), Some(2));
}

/// Each entry leads twice as far behind the end as the one before it: a repair goes around them, not behind the last.
#[test]
fn what_is_named_far_behind_the_end_makes_no_file_long() {
    let scratch = Scratch::new();
    let image = Image::new(&scratch, "", "64M", &[]);
    let len = image.len();
    for step in 0..24 {
        image.set(image.l2(100 + step), (len.next_multiple_of(64 * KIB) + ((64 * KIB) << step)) | COPIED);
    }
    image.count(image.u64(image.l1()) & OFFSET, 0);
    let ended = run(&["check", "-f", "qcow2", "-r", "all", &image.path]);
    assert!(ended.code == Some(2) && ended.err.contains("beyond the end"), "{ended}");
    assert!(image.len() < len + 8 * MIB, "{len} bytes became {}", image.len());
    tool("qemu-io", &["-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 2 32M 128k", &image.path]);
}
