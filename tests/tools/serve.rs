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
