//! Images on a real GlusterFS: named in every way, made, served, mirrored under a writing client, while bricks die.
//!
//! One lab serves all of it, since setting one up takes ten seconds; so there is one test with a lab, which goes through
//! its parts in order, whatever becomes of those before, and fails in the end if one has failed.
//!
//! Needs root, and GlusterFS's server and client (tests/run installs them).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use common::gluster::{BRICKS, Lab, PLAIN, SOCKET, TWICE};
use common::image::{MIB, Scratch, assert_equal, content};
use common::writer::{Plan, Writer};
use common::{Process, event, run, tool};
use rustix::process::Signal;
use serde_json::Value;

const DISK_BYTES: u64 = 32 * MIB;

#[test]
fn images_on_a_real_glusterfs() {
    type Part = (&'static str, fn(&Lab));
    const PARTS: [Part; 13] = [
        ("every example opens", every_example_opens),
        ("what is wrong is said", what_is_wrong_is_said),
        ("images are made and measured", images_are_made_and_measured),
        ("qcow2 works on top", qcow2_works_on_top),
        ("layers are merged into a volume", layers_are_merged_into_a_volume),
        ("chains on a volume stay in their folder", chains_on_a_volume_stay_in_their_folder),
        ("the load generator finds nothing", the_load_generator_finds_nothing),
        ("holes stay holes", holes_stay_holes),
        ("a served image holds what was acknowledged", a_served_image_holds_what_was_acknowledged),
        ("mirrors under a writing client", mirrors_under_a_writing_client),
        ("one of two bricks dies", one_of_two_bricks_dies),
        ("the only brick dies", the_only_brick_dies),
        ("a hung brick does not keep the user", a_hung_brick_does_not_keep_the_user),
    ];
    let lab = Lab::start();
    let mut failed = Vec::new();
    for (name, part) in PARTS {
        println!("part: {name}");
        if catch_unwind(AssertUnwindSafe(|| part(&lab))).is_err() {
            failed.push(name);
        }
    }
    drop(lab);
    assert!(failed.is_empty(), "failed: {failed:?}");
    assert!(std::fs::symlink_metadata(SOCKET).is_err(), "the lab leaves nothing behind");
}

/// An image of its own on a volume, by its URI.
fn uri(volume: &str, path: &str) -> String {
    format!("gluster://1.2.3.4/{volume}/{path}")
}

/// Bytes on a volume, put there from outside.
fn put(lab: &Lab, volume: &str, path: &str, from: &str) {
    let seen = lab.seen(volume, path);
    if let Some(folder) = Path::new(&seen).parent() {
        std::fs::create_dir_all(folder).expect("a folder on the volume");
    }
    std::fs::copy(from, &seen).expect("a file on the volume");
    std::fs::File::open(&seen).and_then(|file| file.sync_all()).expect("a file on the bricks");
}

fn every_example_opens(lab: &Lab) {
    let full = Scratch::new();
    let (a, b) = (full.full("a.img", MIB), full.full("b.img", 2 * MIB));
    put(lab, PLAIN, "a.img", &a);
    put(lab, PLAIN, "dir/a.img", &b);
    let (on_top, in_dir) = ((MIB, &a), (2 * MIB, &b));
    let structured = |servers: &str| {
        format!(
            r#"json:{{"driver":"raw","file":{{"driver":"gluster","volume":"testvol","path":"a.img","logfile":"/dev/null","server":[{servers}]}}}}"#
        )
    };
    let alone = structured(r#"{"type":"inet","host":"1.2.3.4","port":"24007"}"#);
    // The first one answers nobody, the second one does.
    let second = structured(
        r#"{"type":"tcp","host":"1.2.3.4","port":24008},{"type":"tcp","host":"1:2:3:4:5:6:7:8","port":24007}"#,
    );
    for (name, (len, bytes)) in [
        ("gluster://1.2.3.4/testvol/a.img", on_top),
        ("gluster+tcp://1.2.3.4/testvol/a.img", on_top),
        ("gluster+tcp://1.2.3.4:24007/testvol/dir/a.img", in_dir),
        ("gluster+tcp://[1:2:3:4:5:6:7:8]/testvol/dir/a.img", in_dir),
        ("gluster+tcp://[1:2:3:4:5:6:7:8]:24007/testvol/dir/a.img", in_dir),
        ("gluster+tcp://server.domain.com:24007/testvol/dir/a.img", in_dir),
        ("gluster+unix:///testvol/dir/a.img?socket=/tmp/glusterd.socket", in_dir),
        ("gluster+rdma://1.2.3.4:24007/testvol/a.img", on_top),
        (
            "driver=gluster,volume=testvol,path=/a.img,server.0.type=unix,server.0.socket=/tmp/glusterd.socket",
            on_top,
        ),
        (&alone, on_top),
        (&second, on_top),
    ] {
        let info = lab.run_json(&["info", "-f", "raw", name]).pop().expect("information");
        assert_eq!(info["virtual-size"].as_u64(), Some(len), "{name}: {info:#}");
        let compared = lab.run(&["compare", "-f", "raw", name, bytes]);
        assert_eq!(compared.code, Some(0), "{name}: {compared}");
        let warnings = usize::from(name.starts_with("gluster+rdma"));
        assert_eq!(compared.err.matches("tcp is used").count(), warnings, "{name}: {compared}");
    }
    // Without this one process in two thousand crashes when all is done and it ends.
    let said = lab.run(&["-vv", "info", "-f", "raw", "gluster://1.2.3.4/testvol/a.img"]);
    assert!(said.err.contains("keep what it has at exit (agreed true)"), "{said}");
}

fn what_is_wrong_is_said(lab: &Lab) {
    let quiet = "logfile=/dev/null";
    let missing = format!("driver=gluster,{quiet},filename=gluster://1.2.3.4/novolume/a.img");
    let nobody = format!("driver=gluster,{quiet},filename=gluster://1.2.3.4:24999/testvol/a.img");
    let no_socket = format!("driver=gluster,{quiet},filename=gluster+unix:///testvol/a.img?socket=/nowhere");
    for (name, words) in [
        ("gluster://1.2.3.4/testvol/none.img", &["'none.img' on the volume 'testvol'"][..]),
        ("gluster://1.2.3.4/testvol/dir", &["regular file"]),
        ("gluster://1.2.3.4/testvol", &["Invalid URI", "no image", "Usage"]),
        ("gluster+tcp://1.2.3.4/testvol/a.img?socket=/s", &["only the transport unix"]),
        (&missing, &["'novolume'", "'a.img'", "host 1.2.3.4 and port 24007"]),
        (&nobody, &["'testvol'", "host 1.2.3.4 and port 24999"]),
        (&no_socket, &["'testvol'", "socket /nowhere"]),
        ("driver=gluster,volume=v,path=a", &["Parameter 'server' is missing"]),
    ] {
        let ended = lab.run(&["info", "-f", "raw", name]);
        assert_eq!(ended.code, Some(1), "{name}: {ended}");
        for word in words {
            assert!(ended.err.contains(word), "{name} lacks {word}: {ended}");
        }
    }
    let source = lab.path("tiny.img");
    std::fs::write(&source, [1; 4096]).unwrap();
    let before = content(&lab.seen(PLAIN, "a.img"));
    for arguments in [
        &["create", "gluster://1.2.3.4/testvol/a.img", "1M"][..],
        &["convert", "-f", "raw", "-O", "raw", &source, "gluster://1.2.3.4/testvol/a.img"],
        &["mirror", "-f", "raw", &source, "gluster://1.2.3.4/testvol/a.img"],
    ] {
        let ended = lab.run(arguments);
        assert_eq!(ended.code, Some(1), "{ended}");
        assert!(ended.err.contains("exists and is left alone"), "{ended}");
    }
    assert_eq!(content(&lab.seen(PLAIN, "a.img")), before);
    // One disk under two names is still one disk.
    let same = "gluster+tcp://[1:2:3:4:5:6:7:8]/testvol/a.img";
    let ended = lab.run(&["mirror", "-f", "raw", "--force", "gluster://1.2.3.4/testvol/a.img", same]);
    assert_eq!(ended.code, Some(1), "{ended}");
    assert_eq!(content(&lab.seen(PLAIN, "a.img")), before);
    // What is not there is not made with -n.
    let ended = lab.run(&["convert", "-n", "-f", "raw", "-O", "raw", &source, &uri(PLAIN, "none.img")]);
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(!Path::new(&lab.seen(PLAIN, "none.img")).exists());
}

fn images_are_made_and_measured(lab: &Lab) {
    for (mode, occupied) in [("off", 0), ("falloc", 8 * MIB), ("full", 8 * MIB)] {
        let (name, seen) = (uri(PLAIN, mode), lab.seen(PLAIN, mode));
        let preallocation = format!("preallocation={mode}");
        lab.run_json(&["create", "-o", &preallocation, &name, "8M"]);
        assert_eq!(std::fs::metadata(&seen).unwrap().len(), 8 * MIB);
        assert!(content(&seen).iter().all(|byte| *byte == 0));
        let on_brick = common::image::allocated(&lab.path(&format!("{}/{mode}", BRICKS[0])));
        assert!(on_brick >= occupied && on_brick < occupied + MIB, "{mode}: {on_brick}");
    }
    // The client behind FUSE keeps what it knows of a file for a second; the brick is asked.
    let (name, on_brick) = (uri(PLAIN, "off"), lab.path(&format!("{}/off", BRICKS[0])));
    lab.run_json(&["resize", "-f", "raw", &name, "+1M"]);
    assert_eq!(std::fs::metadata(&on_brick).unwrap().len(), 9 * MIB);
    lab.run_json(&["create", "--force", &name, "5M"]);
    assert_eq!(std::fs::metadata(&on_brick).unwrap().len(), 5 * MIB);
    // What is beside the tables there would have to be made there, too.
    let data = ["create", "-f", "qcow2", "-o", "data_file=d.raw", &uri(PLAIN, "over"), "1M"];
    let refused = lab.run(&data);
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(refused.err.contains("data file") && !Path::new(&lab.seen(PLAIN, "over")).exists(), "{refused}");
}

fn qcow2_works_on_top(lab: &Lab) {
    let scratch = Scratch::new();
    let source = scratch.holey("source.img", DISK_BYTES, &[(0, 3 * MIB), (9 * MIB, MIB)]);
    let (name, seen) = (uri(TWICE, "q.qcow2"), lab.seen(TWICE, "q.qcow2"));
    lab.run_json(&["convert", "-f", "raw", "-O", "qcow2", "--verify", &source, &name]);
    // By QEMU, which sees the file through FUSE.
    tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &source, &seen]);
    tool("qemu-img", &["check", "-f", "qcow2", &seen]);
    lab.run_json(&["check", &name]);
    let file = r#"{"driver":"gluster","volume":"twovol","path":"q.qcow2","server":[{"type":"unix","path":"/tmp/glusterd.socket"}]}"#;
    let structured = format!(r#"json:{{"driver":"qcow2","file":{file}}}"#);
    let compared = lab.run(&["compare", "-F", "raw", &structured, &source]);
    assert_eq!(compared.code, Some(0), "{compared}");
    let back = scratch.path("back.img");
    lab.run_json(&["mirror", "-f", "qcow2", "-F", "raw", &name, &back, "--verify"]);
    assert_equal(&source, &back);
    // Anew, over what is there.
    let other = scratch.full("other.img", 4 * MIB);
    lab.run_json(&["convert", "-f", "raw", "-O", "qcow2", "--force", &other, &name]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &other, &seen]);
}

/// A base that was opened to be read is opened to be written while layers over it are merged into it.
fn layers_are_merged_into_a_volume(lab: &Lab) {
    let scratch = Scratch::new();
    let base = scratch.full("base.img", DISK_BYTES);
    put(lab, PLAIN, "base.img", &base);
    // An overlay that changes some of it, and an empty one above.
    let changed = scratch.holey("changed.img", DISK_BYTES, &[]);
    let (mid, top) = (scratch.path("mid.qcow2"), scratch.path("top.qcow2"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &mid, &DISK_BYTES.to_string()]);
    let below = uri(PLAIN, "base.img");
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 3M", "-c", "write -P 9 20M 64k", &mid]);
    tool("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", &below, "-F", "raw", &mid]);
    tool("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", &top, "32M"]);
    let mut wanted = content(&base);
    wanted[MIB as usize..4 * MIB as usize].fill(7);
    wanted[20 * MIB as usize..][..64 << 10].fill(9);
    std::fs::write(&changed, &wanted).expect("what is wanted");
    let same = lab.run(&["compare", "-F", "raw", "--allow-servers", &top, &changed]);
    assert_eq!(same.code, Some(0), "{same}");
    lab.run_json(&["commit", "--allow-servers", "--top", &mid, &top]);
    assert_equal(&changed, &lab.seen(PLAIN, "base.img"));
    let info = lab.run_json(&["info", "--allow-servers", &top]).pop().expect("information");
    assert_eq!(info["backing-filename"].as_str(), Some(below.as_str()), "{info:#}");
    let same = lab.run(&["compare", "-F", "raw", "--allow-servers", &top, &changed]);
    assert_eq!(same.code, Some(0), "{same}");
}

/// A chain that lies on a volume as a whole: its names are relative, as if it lay in a folder.
fn chains_on_a_volume_stay_in_their_folder(lab: &Lab) {
    let scratch = Scratch::new();
    let base = scratch.full("base.img", DISK_BYTES);
    let seen = |name: &str| lab.seen(TWICE, &format!("chain/{name}"));
    let there = |name: &str| uri(TWICE, &format!("chain/{name}"));
    put(lab, TWICE, "chain/base.img", &base);
    // One layer by QEMU, through FUSE; two by us.
    let create = ["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw"];
    tool("qemu-img", &[&create[..], &[&seen("one.qcow2")]].concat());
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 3M", &seen("one.qcow2")]);
    for (below, name) in [("one.qcow2", "two.qcow2"), ("two.qcow2", "top.qcow2")] {
        let made = lab.run(&["create", "-f", "qcow2", "-b", below, "-F", "qcow2", &there(name)]);
        assert_eq!(made.code, Some(0), "{made}");
    }
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 2 2M 3M", &seen("two.qcow2")]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 3 20M 64k", &seen("top.qcow2")]);
    let model = scratch.path("model.img");
    tool("qemu-img", &["convert", "-O", "raw", &seen("top.qcow2"), &model]);
    let same = || {
        let same = lab.run(&["compare", "-F", "raw", &there("top.qcow2"), &model]);
        assert_eq!(same.code, Some(0), "{same}");
        // On the bricks: the client behind FUSE keeps what it has read for a second.
        for brick in &BRICKS[1..] {
            let on_brick = |name: &str| lab.path(&format!("{brick}/chain/{name}"));
            tool("qemu-img", &["compare", "-q", "-U", "-F", "raw", &on_brick("top.qcow2"), &model]);
            for name in ["one.qcow2", "two.qcow2", "top.qcow2"] {
                tool("qemu-img", &["check", "-q", "-U", &on_brick(name)]);
            }
        }
    };
    same();
    let chain = lab.run_json(&["info", "--backing-chain", &there("top.qcow2")]);
    let chain = chain.last().and_then(Value::as_array).expect("a list of layers").clone();
    assert_eq!(chain.len(), 4, "{chain:#?}");
    assert_eq!(chain[0]["full-backing-filename"].as_str(), Some(there("two.qcow2").as_str()), "{chain:#?}");
    // Layers are named as they are recorded. What is recorded afterwards is relative still.
    lab.run_json(&["commit", "--top", "two.qcow2", "--base", "one.qcow2", &there("top.qcow2")]);
    same();
    let info = lab.run_json(&["info", &there("top.qcow2")]).pop().expect("information");
    assert_eq!(info["backing-filename"].as_str(), Some("one.qcow2"), "{info:#}");
    lab.run_json(&["stream", "--base", "base.img", &there("top.qcow2")]);
    same();
    let info = lab.run_json(&["info", &there("top.qcow2")]).pop().expect("information");
    assert_eq!(info["backing-filename"].as_str(), Some("base.img"), "{info:#}");
    // An overlay of the same backing file is made beside it.
    lab.run_json(&["mirror", "--sync", "top", "-F", "qcow2", &there("top.qcow2"), &there("copy.qcow2")]);
    let same_copy = lab.run(&["compare", "-F", "raw", &there("copy.qcow2"), &model]);
    assert_eq!(same_copy.code, Some(0), "{same_copy}");

    // What leads out of the folder is not followed unless the user allows it.
    put(lab, TWICE, "secret.img", &base);
    let over = seen("over.qcow2");
    for name in ["../secret.img", &uri(TWICE, "secret.img"), &uri(PLAIN, "a.img")] {
        tool("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", &over, "1M"]);
        let refused = lab.run(&["info", "--backing-chain", &there("over.qcow2")]);
        assert_eq!(refused.code, Some(1), "{name}: {refused}");
        let refused = lab.run(&["compare", &there("over.qcow2"), &there("over.qcow2")]);
        assert!(refused.code != Some(0) && refused.err.contains("--allow-servers"), "{name}: {refused}");
        let over = there("over.qcow2");
        let allowed = lab.run(&["compare", "--allow-servers", &over, &over]);
        assert_eq!(allowed.code, Some(0), "{name}: {allowed}");
    }
    tool("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", &model, "-F", "raw", &over, "1M"]);
    let refused = lab.run(&["compare", "--allow-servers", &there("over.qcow2"), &there("over.qcow2")]);
    assert!(refused.code != Some(0) && refused.err.contains("--allow-dir"), "{refused}");
}

fn the_load_generator_finds_nothing(lab: &Lab) {
    lab.run_json(&["create", &uri(PLAIN, "bench"), "16M"]);
    for (depth, block, pattern) in
        [("1", "4KiB", "random"), ("16", "4KiB", "random"), ("4", "1MiB", "sequential")]
    {
        let load = ["-d", depth, "-b", block, "--pattern", pattern, "-p", "40", "--flush-every", "50"];
        let how = ["bench", "--overwrite", "--verify", "-n", "400", "--seed", depth];
        let lines = lab.run_json(&[&how[..], &load, &[&uri(PLAIN, "bench")]].concat());
        assert!(!lines.is_empty(), "a report");
    }
    // Parts of sectors, and the end of an image that is no whole block.
    let odd = lab.path("odd.img");
    std::fs::write(&odd, &content(&lab.seen(PLAIN, "dir/a.img"))[..1_000_003]).unwrap();
    let name = uri(PLAIN, "odd.img");
    lab.run_json(&["convert", "-f", "raw", "-O", "raw", "--verify", &odd, &name]);
    assert_equal(&odd, &lab.seen(PLAIN, "odd.img"));
}

/// The extents of an image, as the command maps them: (start, length, whether it is data).
fn extents(lines: &[Value]) -> Vec<(u64, u64, bool)> {
    let all = lines.last().and_then(Value::as_array).expect("a list of extents");
    let number = |extent: &Value, name: &str| extent[name].as_u64().expect("a number");
    all.iter().map(|e| (number(e, "start"), number(e, "length"), e["data"] == true)).collect()
}

fn holes_stay_holes(lab: &Lab) {
    let scratch = Scratch::new();
    let source = scratch.holey("source.img", DISK_BYTES, &[(MIB, 2 * MIB), (20 * MIB, MIB)]);
    let name = uri(PLAIN, "holey.img");
    lab.run_json(&["mirror", "-f", "raw", &source, &name, "--verify"]);
    let on_brick = lab.path(&format!("{}/holey.img", BRICKS[0]));
    assert!(common::image::allocated(&on_brick) < 4 * MIB, "the copy is as thin");
    let found = extents(&lab.run_json(&["map", "-f", "raw", &name]));
    let wanted = [
        (0, MIB, false),
        (MIB, 2 * MIB, true),
        (3 * MIB, 17 * MIB, false),
        (20 * MIB, MIB, true),
        (21 * MIB, 11 * MIB, false),
    ];
    assert_eq!(found, wanted);
    let back = scratch.path("back.img");
    lab.run_json(&["convert", "-f", "raw", "-O", "raw", &name, &back]);
    assert_equal(&source, &back);
    assert!(common::image::allocated(&back) < 4 * MIB, "and so is the copy of the copy");
    // Over data, zeroes are zeroes, whether space is given back or not.
    let full = scratch.full("full.img", DISK_BYTES);
    lab.run_json(&["mirror", "-f", "raw", "-F", "raw", "--force", &full, &name, "--verify"]);
    assert_equal(&full, &lab.seen(PLAIN, "holey.img"));
    let over = ["mirror", "-f", "raw", "-F", "raw", "--force"];
    lab.run_json(&[&over[..], &["--detect-zeroes", "unmap", &source, &name, "--verify"]].concat());
    assert_equal(&source, &lab.seen(PLAIN, "holey.img"));
    assert!(common::image::allocated(&on_brick) < 4 * MIB, "space is given back");
}

/// A disk, and somebody who writes to it over NBD while a command runs.
struct Served<'a> {
    lab: &'a Lab,
    process: Process,
    writer: Writer,
}

impl<'a> Served<'a> {
    fn start(lab: &'a Lab, command: &[&str]) -> Served<'a> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let socket = lab.dir().join(format!("s{number}"));
        let export = format!("nbd+unix:///disk?socket={}", socket.display());
        let mut process = lab.json(&[command, &["--export", &export]].concat());
        process.wait_event("listening");
        let writer = Writer::start(&Plan::anywhere(&socket, DISK_BYTES, u64::from(number)), false);
        Served { lab, process, writer }
    }

    /// Ends the writer, then the command by Ctrl-C; the image holds all that was acknowledged.
    fn end(self, base: &[u8], seen: &str) {
        let history = self.writer.stop();
        assert!(history.acked() > 100, "{} writes", history.acked());
        self.process.interrupt();
        let ended = self.process.end();
        assert_eq!(ended.code, Some(0), "{ended}");
        history.check(base, &content(seen)).unwrap_or_else(|why| panic!("{seen} {why}"));
        let _ = self.lab;
    }
}

fn a_served_image_holds_what_was_acknowledged(lab: &Lab) {
    let scratch = Scratch::new();
    let base = scratch.holey("base.img", DISK_BYTES, &[(0, 9 * MIB)]);
    for volume in [PLAIN, TWICE] {
        put(lab, volume, "served.img", &base);
        let served = Served::start(lab, &["serve", "-f", "raw", &uri(volume, "served.img")]);
        served.writer.wait_more(2000);
        served.end(&content(&base), &lab.seen(volume, "served.img"));
    }
}

/// Follows a mirror to its ready state, lets the clients go over to the target, and looks at that.
fn pivot(mut served: Served<'_>, base: &[u8], seen: &str) {
    served.process.wait_event("BLOCK_JOB_READY");
    served.process.wait_event("BLOCK_JOB_COMPLETED");
    served.writer.wait_more(500);
    served.end(base, seen);
}

fn mirrors_under_a_writing_client(lab: &Lab) {
    let scratch = Scratch::new();
    let base = scratch.holey("base.img", DISK_BYTES, &[(0, 9 * MIB), (16 * MIB, 4 * MIB)]);
    let bytes = content(&base);
    let state = lab.path("state");
    // To GlusterFS.
    let local = scratch.path("local.img");
    std::fs::copy(&base, &local).unwrap();
    let target = uri(PLAIN, "to.img");
    let served =
        Served::start(lab, &["mirror", "-f", "raw", "--pivot", "--state-dir", &state, &local, &target]);
    pivot(served, &bytes, &lab.seen(PLAIN, "to.img"));
    // From one volume to another, which are two connections.
    put(lab, PLAIN, "from.img", &base);
    let (from, across) = (uri(PLAIN, "from.img"), uri(TWICE, "across.img"));
    let blocking = ["--copy-mode", "write-blocking", "--state-dir", &state];
    let command = [&["mirror", "-f", "raw", "--pivot"][..], &blocking, &[&from, &across]].concat();
    pivot(Served::start(lab, &command), &bytes, &lab.seen(TWICE, "across.img"));
    // From GlusterFS, while holes and data change: what is in the client's cache counts as data.
    put(lab, PLAIN, "from.img", &base);
    let copy = scratch.path("copy.img");
    pivot(Served::start(lab, &["mirror", "-f", "raw", "--pivot", &from, &copy]), &bytes, &copy);
}

fn one_of_two_bricks_dies(lab: &Lab) {
    let scratch = Scratch::new();
    let base = scratch.full("base.img", DISK_BYTES);
    let (local, bytes) = (scratch.path("local.img"), content(&base));
    std::fs::copy(&base, &local).unwrap();
    let (state, target) = (lab.path("state"), uri(TWICE, "survivor.img"));
    let slow = ["--speed", "8MiB", "--state-dir", &state];
    let command = [&["mirror", "-f", "raw", "--pivot"][..], &slow, &[&local, &target]].concat();
    let served = Served::start(lab, &command);
    served.writer.wait_more(200);
    lab.kill_brick(BRICKS[1]);
    served.writer.wait_more(200);
    pivot(served, &bytes, &lab.seen(TWICE, "survivor.img"));
    lab.restart_bricks(TWICE);
}

fn is_status(event: &Value, status: &str) -> bool {
    event["event"] == "JOB_STATUS_CHANGE" && event["data"]["status"] == status
}

fn the_only_brick_dies(lab: &Lab) {
    let scratch = Scratch::new();
    let base = scratch.full("base.img", DISK_BYTES);
    let state = lab.path("state");
    let mirror = |path: &str, policy: &str| {
        let target = uri(PLAIN, path);
        let slow = ["--speed", "8MiB", "--state-dir", &state, "--on-target-error", policy];
        let mut process = lab.json(&[&["mirror", "-f", "raw"][..], &slow, &[&base, &target]].concat());
        process.wait_for(|event| is_status(event, "running"));
        lab.until("some of it is there", || {
            let on_brick = lab.path(&format!("{}/{path}", BRICKS[0]));
            Path::new(&on_brick).exists() && common::image::allocated(&on_brick) > MIB
        });
        lab.kill_brick(BRICKS[0]);
        process
    };
    // The job ends, says why, and the target is known to be incomplete.
    let ended = mirror("reported.img", "report").end();
    assert_eq!(ended.code, Some(1), "{ended}");
    let error = event(&ended.events(), "end")["message"].as_str().unwrap_or_default().to_owned();
    assert!(error.contains(&uri(PLAIN, "reported.img")) && error.contains("brick"), "{ended}");
    lab.restart_bricks(PLAIN);
    let name = uri(PLAIN, "reported.img");
    let info = lab.run_json(&["info", "-f", "raw", "--state-dir", &state, &name]).pop().unwrap();
    assert_eq!(info["state"], "incomplete", "{info:#}");
    // The job stops, and goes on when it is told to, once the brick is back.
    let mut process = mirror("stopped.img", "stop");
    process.wait_for(|event| event["event"] == "BLOCK_JOB_ERROR" && event["data"]["action"] == "stop");
    process.wait_for(|event| is_status(event, "paused"));
    lab.restart_bricks(PLAIN);
    lab.until("the job completes", || {
        // The client finds the brick again by itself, in its own time; until then the job stops anew.
        process.resume();
        let next = process.wait_for(|event| {
            is_status(event, "paused") || matches!(event["event"].as_str(), Some("BLOCK_JOB_READY" | "end"))
        });
        !is_status(&next, "paused")
    });
    let ended = process.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_equal(&base, &lab.seen(PLAIN, "stopped.img"));
}

#[test]
fn a_machine_without_the_library_says_what_to_install() {
    // A file that is no library, in its place, for this one command.
    let library = tool("sh", &["-c", "/sbin/ldconfig -p | sed -n 's/.*libgfapi.so.0 .*=> //p' | head -n 1"]);
    let script =
        r#"mount --bind /dev/null "$(readlink -f "$1")" && exec "$2" info gluster://1.2.3.4/testvol/a.img"#;
    let command = env!("CARGO_BIN_EXE_blockferry");
    let mut hidden = std::process::Command::new("unshare");
    hidden.args(["-m", "sh", "-c", script, "sh", library.trim(), command]);
    let ended = Process::spawn(hidden).end();
    assert_eq!(ended.code, Some(1), "{ended}");
    for word in ["gluster://1.2.3.4/testvol/a.img", "cannot be loaded", "libgfapi0", "glusterfs-common"] {
        assert!(ended.err.contains(word), "{ended}");
    }
    // And what needs no GlusterFS works without it, of course: nothing is linked.
    let linked = tool("sh", &["-c", &format!("ldd '{command}'")]);
    assert!(!linked.contains("gfapi"), "{linked}");
    let refused = run(&["info", "gluster+vsock://h/v/a"]);
    assert!(refused.code == Some(1) && refused.err.contains("Invalid URI"), "{refused}");
}

/// A brick that answers nothing any more keeps requests for the volume's ping-timeout, but not who gives up.
fn a_hung_brick_does_not_keep_the_user(lab: &Lab) {
    let scratch = Scratch::new();
    let base = scratch.full("base.img", DISK_BYTES);
    let state = lab.path("state");
    let target = uri(PLAIN, "hung.img");
    let arguments = ["mirror", "-f", "raw", "--speed", "8MiB", "--state-dir", &state, &base, &target];
    let mut process = lab.json(&arguments);
    process.wait_for(|event| is_status(event, "running"));
    let on_brick = lab.path(&format!("{}/hung.img", BRICKS[0]));
    lab.until("some of it is there", || {
        Path::new(&on_brick).exists() && common::image::allocated(&on_brick) > MIB
    });
    lab.signal_brick(BRICKS[0], Signal::STOP);
    std::thread::sleep(Duration::from_millis(500));
    let begin = Instant::now();
    process.interrupt();
    let ended = process.end();
    let took = begin.elapsed();
    lab.signal_brick(BRICKS[0], Signal::CONT);
    assert_eq!(ended.code, Some(3), "{ended}");
    // It waits 10 seconds for what is under way; the ping-timeout is 42.
    assert!(took < Duration::from_secs(30), "{took:?}: {ended}");
}
