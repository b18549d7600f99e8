//! What is refused is refused before anything has changed: every command, every way to name the same image. A dry run says
//! what the real one would do.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use blockferry::base::planted::{Bug, VARIABLE};

use super::{our_json, ours, qemu};
use common::image::{KIB, MIB, Scratch, assert_equal, content, scribble};
use common::{LoopDevice, Process, blockferry, is_root};

/// Every file of a folder: its name, its bytes, its permission bits.
fn all(scratch: &Scratch) -> BTreeMap<String, (Vec<u8>, u32)> {
    let entries = std::fs::read_dir(scratch.dir()).expect("a folder").flatten();
    let files = entries.filter(|entry| entry.path().is_file());
    files
        .map(|entry| {
            let path = entry.path().display().to_string();
            let mode = entry.metadata().expect("a file").permissions().mode();
            (path.clone(), (content(&path), mode))
        })
        .collect()
}

/// A chain `base.raw` <- `mid.qcow2` <- `top.qcow2` (which holds something itself), other files, and other names of them.
fn chain() -> Scratch {
    let scratch = Scratch::new();
    let base = scratch.full("base.raw", MIB);
    let (mid, top) = (scratch.path("mid.qcow2"), scratch.path("top.qcow2"));
    qemu(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &mid]);
    qemu(&["create", "-q", "-f", "qcow2", "-b", &mid, "-F", "qcow2", &top]);
    common::tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 64k 64k", &top]);
    scratch.full("other.raw", MIB);
    scratch.full("precious.raw", 2 * MIB);
    scratch.holey("third.raw", MIB, &[(0, 4 * KIB)]);
    std::fs::hard_link(&base, scratch.path("hard")).expect("a link");
    std::os::unix::fs::symlink("base.raw", scratch.path("soft")).expect("a link");
    scratch
}

/// Runs a command that has to be refused, once dry and once for good: nothing changes.
#[track_caller]
fn refused(scratch: &Scratch, line: &str) -> String {
    judge(scratch, line, None).unwrap_or_else(|why| panic!("{line}: {why}"))
}

/// What a command says that is refused as it should be, with a bug planted in it or none; or what is wrong with that.
fn judge(scratch: &Scratch, line: &str, bug: Option<Bug>) -> Result<String, String> {
    let path = |word: &str| word.replace("D/", &format!("{}/", scratch.dir().display()));
    let words: Vec<String> = line.split(' ').map(path).collect();
    let before = all(scratch);
    let mut said = String::new();
    for dry in [true, false] {
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        if dry {
            words.push("--dry-run");
        }
        let mut command = blockferry(&words);
        command.envs(bug.map(|bug| (VARIABLE, format!("{bug:?}"))));
        let ended = Process::spawn(command).end();
        // Not by clap: the words are all known, and what they ask for is refused.
        if !matches!(ended.code, Some(1 | 2)) || ended.err.contains("Usage:") {
            return Err(format!("not refused (dry: {dry}): {ended}"));
        }
        let after = all(scratch);
        let changed = before.iter().find(|(name, was)| after.get(*name) != Some(was)).map(|(name, _)| name);
        if let Some(changed) = changed {
            return Err(format!("{changed} was changed (dry: {dry}): {ended}"));
        }
        if before.len() != after.len() {
            return Err(format!("something is left behind (dry: {dry}): {ended}"));
        }
        if !dry {
            // Room comes and goes meanwhile.
            let words = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
            if words(&said) != words(&ended.err) {
                return Err(format!("a dry run does not say the same, but {said}: {ended}"));
            }
        }
        said = ended.err;
    }
    Ok(said)
}

#[test]
fn the_same_image_by_any_name_is_left_alone() {
    let scratch = chain();
    let device = is_root().then(|| LoopDevice::new(&scratch.path("base.raw"), 512));
    let mut names =
        vec!["D/base.raw", "D/./base.raw", "D/hard", "D/soft", "file:D/base.raw", "delay:1us:D/base.raw"];
    names.extend(device.iter().map(|device| device.0.as_str()));
    for name in &names {
        for line in [
            "convert -q --force -f raw -O raw D/base.raw NAME",
            "convert -q --force -f qcow2 -O raw D/top.qcow2 NAME",
            "mirror -q --force -f qcow2 -F raw D/top.qcow2 NAME",
            "create -q --force -f qcow2 -b D/mid.qcow2 -F qcow2 NAME",
        ] {
            // A qcow2 image on a device is another matter.
            if !(name.starts_with("/dev") && line.starts_with("create")) {
                refused(&scratch, &line.replace("NAME", name));
            }
        }
    }
    for line in [
        "convert -q -n -f raw -O raw D/base.raw D/hard",
        "convert -q --force -f raw -O raw D/other.raw D/base.raw D/hard",
        "convert -q --force -O qcow2 D/other.raw D/top.qcow2 D/soft",
        "dd --force -f raw bs=4k skip=1 if=D/base.raw of=D/soft",
        "dd --force -f qcow2 count=1 if=D/top.qcow2 of=D/hard",
        "convert -q --force -f raw -O qcow2 D/base.raw D/soft",
        "convert -q --force -f qcow2 -O qcow2 D/top.qcow2 D/mid.qcow2",
        "convert -q --force -f raw -O qcow2 -B D/mid.qcow2 -F qcow2 D/other.raw D/base.raw",
        "convert -q --force -f raw -O qcow2 -o data_file=D/base.raw D/other.raw D/base.raw",
        "convert -q --force -f raw -O qcow2 -o data_file=D/hard,data_file_raw=on D/base.raw D/new.qcow2",
        "convert -q --force -f qcow2 -O qcow2 -o data_file=D/soft D/top.qcow2 D/new.qcow2",
        "convert -q -f raw -O qcow2 -o data_file=D/new.qcow2 D/other.raw D/new.qcow2",
        "mirror -q --force -f raw -F raw D/base.raw D/soft",
        "mirror -q --force -f qcow2 -F qcow2 D/top.qcow2 D/mid.qcow2",
        "create -q --force -f qcow2 -b base.raw -F raw D/hard",
        "create -q --force -f qcow2 -u -b base.raw -F raw D/base.raw 1M",
        "create -q --force -f qcow2 -o data_file=D/base.raw -b D/mid.qcow2 -F qcow2 D/new.qcow2",
        "create -q --force -f qcow2 -o data_file=base.raw D/base.raw 1M",
        "rebase -b top.qcow2 -F qcow2 D/mid.qcow2",
        "rebase -u -b ./mid.qcow2 -F qcow2 D/mid.qcow2",
        "bench -q -n 1 --overwrite -f raw --log D/hard D/base.raw",
        "bench -q -n 1 --overwrite -f qcow2 --log D/base.raw D/top.qcow2",
        "bench -q -n 1 -f raw --read-percent 100 --histogram D/soft D/base.raw",
    ] {
        refused(&scratch, line);
    }
}

/// Locks alone would not do: what an image only names is not locked.
#[test]
fn an_image_that_is_not_compared_by_identity_is_found() {
    for (line, found) in [
        ("create -q --force -f qcow2 -b base.raw -F raw D/hard", true),
        ("convert -q --force -f raw -O qcow2 -o data_file=D/new.qcow2 D/other.raw D/new.qcow2", true),
        ("convert -q -f raw -O raw D/other.raw D/precious.raw", false),
    ] {
        let judged = judge(&chain(), line, Some(Bug::SameImageNotLookedFor));
        assert_eq!(judged.is_err(), found, "{line}: {judged:?}");
    }
}

/// Also where only the name is recorded: a chain that leads back to itself opens no more.
#[test]
fn no_image_lies_below_itself() {
    let scratch = chain();
    let said = refused(&scratch, "rebase -u -b D/top.qcow2 -F qcow2 D/mid.qcow2");
    assert!(said.contains("own new backing"), "{said}");
    refused(&scratch, "rebase -b D/top.qcow2 -F qcow2 D/mid.qcow2");
    refused(&scratch, "rebase -u -b D/mid.qcow2 -F qcow2 D/mid.qcow2");
}

#[test]
fn a_request_that_makes_no_sense_is_refused_before_the_target_is_emptied() {
    let scratch = chain();
    for (line, says) in [
        ("convert --force -c -f raw -O raw D/base.raw D/other.raw", "cannot be compressed"),
        ("convert --force -c -f raw -O qcow2 -o data_file=d D/base.raw D/other.raw", "data file"),
        ("convert --force -f raw -O qcow2 -o cluster_size=3 D/base.raw D/other.raw", "Cluster size"),
        ("convert --force -f raw -O qcow2 -o refcount_bits=3 D/base.raw D/other.raw", "Refcount width"),
        ("convert --force -f raw -O qcow2 -o data_file_raw=on D/base.raw D/other.raw", "data_file_raw"),
        ("convert --force -f raw -O qcow2 -o size=4k D/base.raw D/other.raw", "smaller"),
        ("convert --force -f raw -O raw -o size=4k D/base.raw D/other.raw", "smaller"),
        ("convert --force -f raw -O qcow2 -o cluster_size=512,size=8E D/base.raw D/other.raw", "at most"),
        ("convert --force -f raw -r 15E -O raw D/base.raw D/other.raw", "too large"),
        ("convert --force -f raw -O qcow2 -B none.raw -F raw D/base.raw D/other.raw", "No such file"),
        ("convert -f raw -O raw D/base.raw D/no/folder.raw", "does not exist"),
        ("create --force -f qcow2 -o cluster_size=4M D/other.raw 1M", "Cluster size"),
        ("create --force -f qcow2 -o compat=v2,data_file=d D/other.raw 1M", "compat"),
        ("create --force -f qcow2 D/other.raw", "How large"),
        ("create --force -f raw D/other.raw 15E", "at most"),
        ("create --force -f raw -o preallocation=falloc D/other.raw 1000T", "free"),
        ("mirror --force --granularity 1000 -f raw -F raw D/base.raw D/other.raw", "power of 2"),
        ("mirror --force -f raw -F raw D/base.raw D/precious.raw", "different sizes"),
        ("mirror -f raw -F qcow2 -o size=4k D/base.raw D/new.qcow2", "smaller"),
        ("create --force -f qcow2 -o size=1M D/other.raw 2M", "twice"),
        ("convert --force -l one -f raw -O raw D/base.raw D/other.raw", "no snapshots"),
        (
            "convert --force -B D/mid.qcow2 -F qcow2 -O qcow2 D/top.qcow2 D/base.raw D/other.raw",
            "several images",
        ),
        ("amend -o refcount_bits=8,compat=0.10 D/top.qcow2", "compat=1.1"),
        ("amend -o compat=0.10,size=4k D/top.qcow2", "resize"),
        ("amend -o lazy_refcounts=on,backing_file=x D/top.qcow2", "rebase"),
        ("amend -f raw -o size=2M D/other.raw", "raw image"),
        ("rebase D/top.qcow2", "-b NAME"),
        ("resize -f raw --shrink D/other.raw 0", "at least one byte"),
        ("resize -f raw D/other.raw 4k", "--shrink"),
        ("resize -f raw --preallocation falloc D/other.raw 1000T", "free"),
        ("snapshot -a nothing D/top.qcow2", "nothing"),
        ("snapshot -d nothing D/top.qcow2", "nothing"),
        ("commit D/base.raw -f raw", "no backing file"),
        ("commit D/top.qcow2 --backing-file x", "active layer"),
        ("stream D/mid.qcow2 --base D/mid.qcow2", "not in the backing"),
        ("rebase -b base.raw D/top.qcow2", "has to be said"),
    ] {
        let said = refused(&scratch, line);
        assert!(said.contains(says), "{line}: {said}");
    }
}

#[test]
fn what_is_in_use_is_refused_before_it_is_emptied() {
    let scratch = chain();
    let (other, precious) = (scratch.path("other.raw"), scratch.path("precious.raw"));
    let (copy, data) = (scratch.full("copy.raw", 2 * MIB), scratch.path("data.qcow2"));
    let mut holder =
        Process::json(&["mirror", "--follow", "--force", "-f", "raw", "-F", "raw", &precious, &copy]);
    holder.wait_event("BLOCK_JOB_READY");
    for line in [
        "convert -q --force -f raw -O raw D/other.raw D/copy.raw",
        "convert -q --force -f raw -O qcow2 D/other.raw D/copy.raw",
        // Its source is what nobody may read now.
        "convert -q --force --allow-incomplete -f raw -O raw D/copy.raw D/other.raw",
        "convert -q --force -f raw -O qcow2 -o data_file=copy.raw D/other.raw D/new.qcow2",
        "create -q --force -f raw D/copy.raw 1M",
        "create -q --force -f qcow2 -o data_file=copy.raw D/new.qcow2 1M",
        "mirror -q --force --allow-larger-target -f raw -F raw D/other.raw D/copy.raw",
        "resize -q -f raw D/copy.raw 4M",
    ] {
        let said = refused(&scratch, line);
        assert!(said.contains("in use"), "{line}: {said}");
    }
    holder.interrupt();
    assert_eq!(holder.end().code, Some(0));
    ours(&[
        "convert",
        "-q",
        "--force",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "data_file=copy.raw",
        &other,
        &data,
    ]);
    assert_equal(&other, &copy);
}

#[test]
fn a_data_file_is_left_alone_or_emptied() {
    let scratch = chain();
    for command in [
        "create -q -f qcow2 OPTIONS D/new.qcow2 1M",
        "convert -q -f raw -O qcow2 OPTIONS D/other.raw D/new.qcow2",
    ] {
        for options in ["-o data_file=precious.raw", "-o data_file=D/precious.raw,data_file_raw=on"] {
            let said = refused(&scratch, &command.replace("OPTIONS", options));
            assert!(said.contains("data file"), "{said}");
        }
    }
    // With --force nothing of what was in it is left; also where the source has holes.
    let holes = scratch.holey("holes.raw", MIB, &[(256 * KIB, 4 * KIB)]);
    for (n, raw) in ["", ",data_file_raw=on", ",preallocation=metadata"].into_iter().enumerate() {
        let data = scratch.full(&format!("d{n}"), 2 * MIB);
        let image = scratch.path(&format!("i{n}.qcow2"));
        let option = format!("data_file={data}{raw}");
        ours(&["create", "-q", "--force", "-f", "qcow2", "-o", &option, &image, "1M"]);
        assert!(content(&data).iter().all(|byte| *byte == 0), "{option}");
        common::tool("qemu-io", &["-f", "qcow2", "-c", "read -P 0 0 1M", &image]);
        scribble(&data, 0, &vec![9; 2 * MIB as usize]);
        ours(&["convert", "-q", "--force", "-f", "raw", "-O", "qcow2", "-o", &option, &holes, &image]);
        common::tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &holes, &image]);
        if raw.contains("raw") {
            assert_equal(&holes, &data);
        }
    }
    if is_root() {
        // A device keeps its length, and nothing else.
        let under = scratch.full("under", 2 * MIB);
        let device = LoopDevice::new(&under, 512);
        let image = scratch.path("on.qcow2");
        let option = format!("data_file={},data_file_raw=on", device.0);
        let words = ["convert", "-q", "--force", "-f", "raw", "-O", "qcow2", "-o", &option, &holes, &image];
        ours(&words);
        common::tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &holes, &image]);
        assert!(content(&device.0)[..MIB as usize] == content(&holes)[..]);
    }
}

#[test]
fn a_copy_is_readable_by_no_more_people_than_its_source() {
    let scratch = chain();
    let mode =
        |name: &str| std::fs::metadata(scratch.path(name)).expect("a file").permissions().mode() & 0o777;
    let set = |name: &str, mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(scratch.path(name), permissions).expect("a file");
    };
    let (base, top) = (scratch.path("base.raw"), scratch.path("top.qcow2"));
    // What is below counts, too: the copy holds it.
    for (below, above) in [(0o600, 0o644), (0o644, 0o600), (0o644, 0o644)] {
        set("base.raw", below);
        set("top.qcow2", above);
        let copies = ["c.raw", "c.qcow2", "c.data", "m.raw", "m.qcow2"];
        ours(&["convert", "-q", "-f", "qcow2", "-O", "raw", &top, &scratch.path("c.raw")]);
        let words = ["convert", "-q", "-f", "qcow2", "-O", "qcow2", "-o", "data_file=c.data"];
        ours(&[&words[..], &[&top, &scratch.path("c.qcow2")]].concat());
        ours(&["mirror", "-q", "-f", "qcow2", "-F", "raw", &top, &scratch.path("m.raw")]);
        ours(&["mirror", "-q", "-f", "qcow2", "-F", "qcow2", &top, &scratch.path("m.qcow2")]);
        for name in copies {
            assert_eq!(
                mode(name) & !(below & above),
                0,
                "{name} of {below:o} and {above:o}: {:o}",
                mode(name)
            );
            std::fs::remove_file(scratch.path(name)).expect("a file");
        }
    }
    // What is replaced keeps its own.
    set("other.raw", 0o600);
    set("base.raw", 0o644);
    ours(&["convert", "-q", "--force", "-f", "raw", "-O", "raw", &base, &scratch.path("other.raw")]);
    assert_eq!(mode("other.raw"), 0o600);
}

#[test]
fn a_dry_run_changes_nothing_and_the_real_one_does_it() {
    let scratch = chain();
    let path = |word: &str| word.replace("D/", &format!("{}/", scratch.dir().display()));
    for (line, does) in [
        ("convert -q -f qcow2 -O raw D/top.qcow2 D/copy.raw", "make"),
        ("convert -q --force -f qcow2 -O qcow2 D/top.qcow2 D/copy.raw", "make-anew"),
        ("convert -q -n -f qcow2 -O raw D/top.qcow2 D/other.raw", "overwrite"),
        ("create -q -f qcow2 -b top.qcow2 -F qcow2 D/over.qcow2", "make"),
        ("mirror -q -f qcow2 -F qcow2 D/top.qcow2 D/mirror.qcow2", "make"),
        ("mirror -q --force -f qcow2 -F raw D/top.qcow2 D/third.raw", "overwrite"),
        ("snapshot -c one D/top.qcow2", "change"),
        ("snapshot -d one D/top.qcow2", "change"),
        ("resize -q -f qcow2 D/over.qcow2 2M", "change"),
        ("bench -q -n 10 --overwrite -f raw D/other.raw", "overwrite"),
        ("stream -q D/over.qcow2 --base D/mid.qcow2", "change"),
        ("rebase -q -b base.raw -F raw D/over.qcow2", "change"),
        ("commit -q D/top.qcow2 --base D/mid.qcow2", "change"),
        ("check -q -r leaks D/top.qcow2", "change"),
    ] {
        let words: Vec<String> = line.split(' ').map(path).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let before = all(&scratch);
        let plan = our_json(&[&words[..], &["--dry-run", "--json"]].concat());
        assert_eq!(plan["event"], "plan", "{line}: {plan:#}");
        assert_eq!(plan["would-begin"], true, "{line}: {plan:#}");
        let images = plan["images"].as_array().expect("a list");
        assert!(images.iter().any(|image| image["does"] == does), "{line}: {plan:#}");
        let text = ours(&[&words[..], &["--dry-run"]].concat());
        assert!(text.contains("Would ") && text.contains("nothing was changed"), "{line}: {text}");
        assert!(all(&scratch) == before, "{line}: something has changed");
        ours(&words);
        assert!(all(&scratch) != before || line.starts_with("check"), "{line}: nothing has changed");
    }
}
