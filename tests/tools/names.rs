//! Names of images, however they are said: absolutely, relatively, through links, in bytes that are no text.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use common::image::{MIB, Scratch, assert_equal};
use common::{Ended, Process, blockferry, tool};

/// Runs a command in a folder, with words that need not be UTF-8.
fn run_in(dir: &Path, program: Option<&str>, words: &[&OsStr]) -> Ended {
    let mut command = program.map_or_else(|| blockferry(&[]), Command::new);
    command.current_dir(dir).args(words);
    Process::spawn(command).end()
}

#[track_caller]
fn done(dir: &Path, line: &str) -> Ended {
    let words: Vec<&OsStr> = line.split(' ').map(OsStr::new).collect();
    let ended = run_in(dir, None, &words);
    assert_eq!(ended.code, Some(0), "{line}: {ended}");
    ended
}

/// `vm/base.raw` <- `vm/top.qcow2`, which names it absolutely; `to-vm` leads to `vm`, `top` to the image.
fn chain() -> Scratch {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.path("vm")).expect("a folder");
    std::fs::create_dir(scratch.path("elsewhere")).expect("a folder");
    let base = scratch.full("vm/base.raw", MIB);
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &scratch.path("vm/top.qcow2")],
    );
    symlink("vm", scratch.path("to-vm")).expect("a link");
    symlink("vm/top.qcow2", scratch.path("top")).expect("a link");
    scratch
}

#[test]
fn a_backing_file_is_in_the_image_s_own_directory_however_that_is_named() {
    let scratch = chain();
    let (dir, vm) = (scratch.dir(), scratch.dir().join("vm"));
    let full = scratch.path("vm/top.qcow2");
    for (dir, name) in [
        (dir, "vm/top.qcow2"),
        (dir, "./vm/../vm/top.qcow2"),
        (dir, "to-vm/top.qcow2"),
        (dir, "top"),
        (&vm, "top.qcow2"),
        (&vm, "./top.qcow2"),
        (&vm, "../to-vm/top.qcow2"),
        (&vm, &full),
    ] {
        for line in ["info --backing-chain NAME", "map NAME", "compare -F raw NAME NAME2"] {
            let base = scratch.path("vm/base.raw");
            done(dir, &line.replace("NAME2", &base).replace("NAME", name));
        }
    }
    // The name in the image may lead through a link, too.
    let through = scratch.path("to-vm/base.raw");
    done(&vm, &format!("rebase -u -b {through} -F raw top.qcow2"));
    done(&vm, "map top.qcow2");
    // By whatever way the directory is allowed.
    std::fs::copy(scratch.path("vm/top.qcow2"), scratch.path("elsewhere/top.qcow2")).expect("a copy");
    let moved = scratch.dir().join("elsewhere");
    let refused = run_in(&moved, None, &["map", "top.qcow2"].map(OsStr::new));
    assert!(refused.code == Some(1) && refused.err.contains("not in its own directory"), "{refused}");
    for allowed in ["../vm", "../to-vm", &scratch.path("to-vm")] {
        done(&moved, &format!("map --allow-dir {allowed} top.qcow2"));
    }
}

/// QEMU's options name files, too, with a format above them or not; and parts of raw files, around which nothing changes.
#[test]
fn files_are_named_by_options() {
    let scratch = chain();
    let dir = scratch.dir();
    let run = |words: &[&str]| run_in(dir, None, &words.iter().map(OsStr::new).collect::<Vec<_>>());
    let length = |name: &str| {
        let ended = run(&["info", "--output=json", name]);
        assert_eq!(ended.code, Some(0), "{name}: {ended}");
        let json: serde_json::Value = serde_json::from_str(&ended.out).expect("JSON");
        (json["format"].as_str().map(str::to_owned), json["virtual-size"].as_u64())
    };
    let is = |format: &str, len| (Some(format.to_owned()), Some(len));
    for (name, format) in [
        (r#"json:{"driver":"file","filename":"vm/base.raw"}"#, "raw"),
        ("json:{'driver':'qcow2','file.filename':'vm/top.qcow2'}", "qcow2"),
        (r#"json:{"driver":"raw","file":{"driver":"file","filename":"vm/base.raw"}}"#, "raw"),
        ("driver=qcow2,file.driver=file,file.filename=vm/top.qcow2", "qcow2"),
        ("delay:1us:driver=qcow2,file.filename=vm/top.qcow2", "qcow2"),
    ] {
        assert_eq!(length(name), is(format, MIB), "{name}");
    }
    let part = "driver=raw,offset=4096,size=8192,file.filename=vm/base.raw";
    assert_eq!(length(part), is("raw", 8192));
    let before = std::fs::read(scratch.path("vm/base.raw")).expect("bytes");
    let ended = run(&["convert", part, "part"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(std::fs::read(scratch.path("part")).expect("bytes") == before[4096..12288]);
    // A part is written where it is, and never made anew; nor is what is only to be read written.
    std::fs::write(scratch.path("zeroes"), vec![0; 8192]).expect("a file");
    let read_only = "driver=raw,read-only=on,file.filename=vm/base.raw";
    for (line, word) in [
        (vec!["convert", "--force", "zeroes", part], "the rest of it"),
        (vec!["mirror", "--force", "-f", "raw", "-F", "raw", "zeroes", read_only], "read-only"),
        (vec!["convert", "-n", "-O", "qcow2", "zeroes", part], "qcow2"),
        (vec!["info", "-f", "qcow2", part], "qcow2"),
        (vec!["convert", "zeroes", "driver=raw,offset=512,file.filename=new"], "does not exist"),
        (vec!["info", "--image-opts", "driver=qcow2,file.filename=vm/top.qcow2,colour=red"], "'colour'"),
    ] {
        let ended = run(&line);
        assert!(ended.code == Some(1) && ended.err.contains(word), "{line:?}: {ended}");
    }
    assert!(std::fs::read(scratch.path("vm/base.raw")).expect("bytes") == before);
    assert!(!Path::new(&scratch.path("new")).exists());
    let ended = run(&["convert", "-n", "zeroes", part]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let after = std::fs::read(scratch.path("vm/base.raw")).expect("bytes");
    assert!(after[..4096] == before[..4096] && after[12288..] == before[12288..]);
    assert!(after[4096..12288].iter().all(|byte| *byte == 0));
}

/// What is judged is a directory, not the beginning of a name.
#[test]
fn what_lies_elsewhere_stays_outside() {
    let scratch = chain();
    scratch.full("base.raw", MIB);
    scratch.full("elsewhere/base.raw", MIB);
    symlink("../elsewhere", scratch.path("vm/out")).expect("a link");
    for (n, name) in
        ["../base.raw", "/etc/hostname", "../elsewhere/base.raw", "../vm/out/base.raw", "../none/base.raw"]
            .into_iter()
            .enumerate()
    {
        let image = format!("vm/i{n}.qcow2");
        tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw", &scratch.path(&image), "1M"],
        );
        let ended = run_in(scratch.dir(), None, &["map", &image].map(OsStr::new));
        // A link that somebody has put into the directory is followed by its name there.
        let follows = name.starts_with("../vm/");
        assert_eq!(ended.code, Some(i32::from(!follows)), "{name}: {ended}");
    }
}

#[test]
fn who_makes_an_image_is_told_that_it_needs_a_word() {
    let scratch = chain();
    let base = scratch.path("vm/base.raw");
    let warned = |ended: &Ended| ended.err.contains("--allow-dir");
    for line in [
        format!("create -f qcow2 -b {base} -F raw DIR/new1.qcow2"),
        format!("convert -f raw -O qcow2 -B {base} -F raw {base} DIR/new2.qcow2"),
        format!("rebase -b {base} -F raw DIR/new3.qcow2"),
    ] {
        for dir in ["vm", "elsewhere"] {
            let three = scratch.path(&format!("{dir}/new3.qcow2"));
            tool("qemu-img", &["create", "-q", "-f", "qcow2", &three, "1M"]);
            let ended = done(scratch.dir(), &line.replace("DIR", dir));
            assert_eq!(warned(&ended), dir == "elsewhere", "{line} in {dir}: {ended}");
        }
    }
    // Named relatively, all in one directory: what is recorded is opened.
    let vm = scratch.dir().join("vm");
    done(&vm, "mirror -q --sync top -f qcow2 -F qcow2 top.qcow2 copy.qcow2");
    done(&vm, "compare top.qcow2 copy.qcow2");
}

#[test]
fn a_link_to_nothing_stands_for_what_it_leads_to() {
    let scratch = chain();
    let source = scratch.path("vm/base.raw");
    for (n, line) in [
        "create -q -f raw LINK 1M",
        "create -q -f qcow2 LINK 1M",
        "convert -q -f raw -O raw SOURCE LINK",
        "convert -q -f raw -O qcow2 SOURCE LINK",
        "mirror -q -f raw SOURCE LINK",
        "dd -f raw -O qcow2 if=SOURCE of=LINK",
    ]
    .into_iter()
    .enumerate()
    {
        let (link, file) = (format!("link{n}"), scratch.path(&format!("elsewhere/file{n}")));
        symlink(format!("elsewhere/file{n}"), scratch.path(&link)).expect("a link");
        done(scratch.dir(), &line.replace("LINK", &link).replace("SOURCE", &source));
        assert!(std::fs::symlink_metadata(scratch.path(&link)).expect("it is there").is_symlink(), "{line}");
        assert!(std::fs::symlink_metadata(&file).expect("it was made").is_file(), "{line}");
        let left: Vec<_> =
            std::fs::read_dir(scratch.path("elsewhere")).expect("a folder").flatten().collect();
        assert_eq!(left.len(), n + 1, "{line}: {left:?}");
    }
    symlink("no/folder", scratch.path("nowhere")).expect("a link");
    symlink("around", scratch.path("around")).expect("a link");
    for link in ["nowhere", "around"] {
        let ended = run_in(scratch.dir(), None, &["create", "-q", link, "1M"].map(OsStr::new));
        assert_eq!(ended.code, Some(1), "{ended}");
    }
}

#[test]
fn names_are_bytes() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let name = |end: &str| -> OsString {
        let mut name = OsStr::from_bytes(b"x\xff\xfe-").to_owned();
        name.push(end);
        name
    };
    let (base, top, raw, linked) = (name("base.raw"), name("top.qcow2"), name("copy.raw"), name("linked"));
    std::fs::copy(&source, scratch.dir().join(&base)).expect("a copy");
    let run = |program: Option<&str>, line: &str| {
        let words: Vec<OsString> = line
            .split(' ')
            .map(|word| match word {
                "BASE" => base.clone(),
                "TOP" => top.clone(),
                "RAW" => raw.clone(),
                "LINK" => linked.clone(),
                "if=TOP" | "of=RAW" => {
                    let mut operand = OsString::from(&word[..3]);
                    operand.push(if word == "if=TOP" { &top } else { &raw });
                    operand
                }
                "''" => OsString::new(),
                word => word.into(),
            })
            .collect();
        let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
        let ended = run_in(scratch.dir(), program, &words);
        assert_eq!(ended.code, Some(0), "{line}: {ended}");
        ended
    };
    run(None, "create -q -f qcow2 -b BASE -F raw TOP");
    run(Some("qemu-img"), "compare -f raw -F qcow2 BASE TOP");
    let said = run(None, "info TOP");
    assert!(
        said.out.contains("x\\xff\\xfe-top.qcow2") && said.out.contains("x\\xff\\xfe-base.raw"),
        "{said}"
    );
    let json: serde_json::Value =
        serde_json::from_str(&run(None, "info --output=json TOP").out).expect("JSON");
    assert_eq!(json["backing-filename"], "x\\xff\\xfe-base.raw");
    for line in [
        "info --backing-chain TOP",
        "map --output=json TOP",
        "check TOP",
        "compare BASE TOP",
        "measure -O qcow2 TOP",
        "snapshot -c one TOP",
        "snapshot -d one TOP",
        "convert -q -O raw TOP RAW",
        "convert -q --force -O raw TOP RAW",
        "dd --force if=TOP of=RAW",
        "resize -q -f raw RAW +1M",
        "rebase -q -b RAW -F raw TOP",
        "rebase -q -b '' TOP",
        "rebase -q -b BASE -F raw TOP",
        "amend -q -o lazy_refcounts=on TOP",
        "commit -q TOP",
        "mirror -q --force --allow-larger-target -f qcow2 -F raw TOP RAW",
    ] {
        run(None, line);
    }
    run(Some("qemu-img"), "check -q TOP");
    run(Some("qemu-img"), "compare -f raw -F qcow2 BASE TOP");
    let plain = scratch.path("plain");
    std::fs::copy(scratch.dir().join(&base), &plain).expect("a copy");
    assert_equal(&source, &plain);
    symlink(name("made"), scratch.dir().join(&linked)).expect("a link");
    run(None, "create -q LINK 1M");
    assert!(scratch.dir().join(name("made")).is_file());
}
