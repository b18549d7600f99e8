//! What `serve` has of `qemu-nbd`: a window of a raw image, an internal snapshot, a description, a list.

use common::image::{MIB, Scratch, content};
use common::{Process, run, tool};

/// Serves an image at a socket, until the guard goes.
fn serve(scratch: &Scratch, words: &[&str]) -> (Process, String) {
    let uri = format!("nbd+unix:///disk?socket={}", scratch.path("socket"));
    let mut server = Process::json(&[&["serve", "--export", &uri], words].concat());
    server.wait_event("listening");
    (server, uri)
}

fn end(server: Process) {
    server.interrupt();
    assert_eq!(server.end().code, Some(0));
}

#[test]
fn a_window_of_a_raw_image() {
    let scratch = Scratch::new();
    let disk = scratch.full("disk", MIB);
    let part = scratch.path("part");
    tool(
        "dd",
        &[&format!("if={disk}"), &format!("of={part}"), "bs=1k", "skip=100", "count=200", "status=none"],
    );
    let (server, uri) = serve(&scratch, &["-f", "raw", "-r", "-o", "100k", "--size", "200k", &disk]);
    tool("qemu-img", &["compare", "-s", "-f", "raw", "-F", "raw", &part, &uri]);
    end(server);
    for wrong in [["-o", "2M"], ["--size", "2M"]] {
        let uri = format!("nbd+unix:///disk?socket={}", scratch.path("socket"));
        let ended = run(&[&["serve", "-r", "-f", "raw", "--export", &uri], &wrong[..], &[&disk]].concat());
        assert_eq!(ended.code, Some(1), "{ended}");
    }
}

#[test]
fn an_internal_snapshot_with_a_description_in_a_list() {
    let scratch = Scratch::new();
    let (image, then) = (scratch.path("image"), scratch.path("then"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 64k 128k", &image]);
    tool("qemu-img", &["snapshot", "-c", "then", &image]);
    tool("qemu-img", &["convert", "-O", "raw", &image, &then]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 2 0 512k", &image]);
    let (about, bytes) = ("the disk\nthen", content(&image));
    for which in ["then", "1", "snapshot.name=then"] {
        let (server, uri) = serve(&scratch, &["-l", which, "-D", about, &image]);
        tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &then, &uri]);
        // What was is not written, whoever asks.
        let info = tool("nbdinfo", &[&uri]);
        assert!(info.contains("is_read_only: true"), "{info}");
        let list = run(&["--json", "serve", "--list", &uri]);
        let list = &list.events()[0];
        assert_eq!(list["exports"][0]["name"], "disk", "{list}");
        let said = list["exports"][0]["description"].as_str().expect("a text");
        assert!(said.starts_with("the disk") && said.ends_with("then"), "{list}");
        let list = run(&["serve", "-L", &uri]);
        assert!(list.code == Some(0) && list.out.contains("exports available: 1"), "{list}");
        assert!(list.out.contains("size:  1048576") && list.out.contains("readonly"), "{list}");
        end(server);
    }
    let uri = format!("nbd+unix:///disk?socket={}", scratch.path("socket"));
    for words in [&["-l", "none", &image][..], &["-l", "then", "-f", "raw", &image]] {
        let ended = run(&[&["serve", "--export", &uri], words].concat());
        assert_eq!(ended.code, Some(1), "{ended}");
    }
    assert_eq!(run(&["serve", "--list", &uri]).code, Some(1), "nobody is there");
    assert!(content(&image) == bytes, "the image was changed");
}

/// A list says of every server what `qemu-nbd --list` says of it.
#[test]
fn a_list_is_that_of_qemu_nbd() {
    let scratch = Scratch::new();
    let (raw, odd, image) = (scratch.full("raw", MIB), scratch.full("odd", 1000), scratch.path("image"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]);
    let socket = scratch.path("socket");
    let both = |uri: &str, what: &str| {
        let theirs = tool("qemu-nbd", &["--list", "-k", &socket]);
        assert_eq!(run(&["serve", "--list", uri]).out, theirs, "{what}");
    };
    for words in [&["-f", "raw", &raw][..], &["-r", "-f", "raw", &odd], &["-D", "a disk", &image]] {
        let (server, uri) = serve(&scratch, words);
        both(&uri, &words.join(" "));
        end(server);
    }
    let (server, uri) = serve(&scratch, &["-r", "-f", "raw", &odd]);
    let list = run(&["--json", "serve", "--list", &uri]);
    let details = &list.events()[0]["exports"][0]["details"];
    assert_eq!(
        (details["bytes"].as_u64(), details["block-sizes"]["minimum"].as_u64()),
        (Some(1000), Some(1))
    );
    assert!(details["flags"].as_array().is_some_and(|flags| flags.contains(&"readonly".into())), "{list}");
    assert_eq!(details["transaction-size"], "64-bit", "{list}");
    assert_eq!(details["meta-contexts"][0], "base:allocation", "{list}");
    end(server);
    let uri = format!("nbd+unix:///?socket={socket}");
    let shell = format!(
        "qemu-nbd --list -k {socket}; echo --; '{}' serve --list '{uri}'",
        common::command_path().display()
    );
    for words in [&["memory", "1M"][..], &["--no-sr", "memory", "1M"], &["-e", "disk", "-r", "memory", "1M"]]
    {
        let said = tool("nbdkit", &[&["-U", &socket], words, &["--run", &shell]].concat());
        let (theirs, ours) = said.split_once("--\n").expect("both");
        assert_eq!(theirs, ours, "{words:?}");
        std::fs::remove_file(&socket).ok();
    }
}

/// Zeroes that take room are told as such, and what a disk has not behind its end.
#[test]
fn the_map_of_a_disk_on_a_server_is_that_of_qemu_img() {
    let scratch = Scratch::new();
    let (odd, image) = (scratch.holey("odd", 200_000, &[(70_000, 5000)]), scratch.path("image"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", &image, "1M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 64k 64k", "-c", "write -z 256k 64k", &image]);
    for words in [&["-r", "-f", "raw", &odd][..], &["-r", &image]] {
        let (server, uri) = serve(&scratch, words);
        let map = ["map", "-f", "raw", "--output=json", &uri];
        assert_eq!(super::our_json(&map), super::qemu_json(&map), "{words:?}");
        end(server);
    }
}

/// Each option of `qemu-nbd` is in the table of docs/serve.md, which names no other, and what it names here is here.
#[test]
fn the_page_has_every_option_of_qemu_nbd() {
    const PAGE: &str = include_str!("../../docs/serve.md");
    let named = |cell: &str| -> Vec<String> {
        let quoted = cell.split('`').skip(1).step_by(2).filter_map(|text| text.split([' ', '=']).next());
        quoted.filter(|word| word.starts_with('-')).map(str::to_owned).collect()
    };
    let table = PAGE.split("## For those who know qemu-nbd").nth(1).expect("a table");
    let rows: Vec<Vec<&str>> =
        table.lines().filter(|line| line.starts_with("| `-")).map(|line| line.split('|').collect()).collect();
    let help = tool("qemu-nbd", &["--help"]);
    let options = help.lines().filter(|line| line.trim_start().starts_with('-')).flat_map(|line| {
        line.split([' ', ',', '='])
            .filter(|word| word.starts_with('-') && word.len() > 1)
            .take(2)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    });
    let options: Vec<String> = options.collect();
    let listed: Vec<String> = rows.iter().flat_map(|row| named(row[1])).collect();
    assert!(options.len() > 40, "{options:?}");
    for option in &options {
        assert!(listed.contains(option), "{option} is not in docs/serve.md");
    }
    for option in &listed {
        assert!(options.contains(option), "{option} of docs/serve.md is not one of qemu-nbd");
    }
    let ours = run(&["serve", "--help"]).out;
    for option in rows.iter().flat_map(|row| named(row[2])) {
        let word = option.trim_end_matches("vv").to_owned() + if option == "-vv" { "v" } else { "" };
        assert!(
            ours.split([' ', ','])
                .any(|said| said.trim_end() == word || said.starts_with(&format!("{word}."))),
            "{option}"
        );
    }
}
