//! Every example of every command's help does what is said: it is run as it stands there, in a folder that has the files it
//! names. Only places that belong to a machine (addresses, folders) are replaced, and loads are cut short.

use std::process::{Command, Stdio};

use common::image::{MIB, Scratch};
use common::{Process, run, tool};

/// The subcommands, as the help lists them.
fn subcommands() -> Vec<String> {
    let help = run(&["--help"]).out;
    let list = help.split("Commands:\n").nth(1).expect("a list of commands");
    let lines = list.lines().take_while(|line| !line.is_empty());
    // What goes on from the line above stands further in.
    let first = lines.filter_map(|line| line.strip_prefix("  ")).filter(|line| !line.starts_with(' '));
    let names = first.filter_map(|line| line.split_whitespace().next()).map(str::to_owned);
    names.filter(|name| name != "help").collect()
}

/// The command lines among the examples of a help.
fn examples(help: &str) -> Vec<String> {
    let after = help.split("Examples:\n").nth(1).unwrap_or_default().replace("\\\n", " ");
    let lines = after.lines().take_while(|line| line.is_empty() || line.starts_with("  "));
    lines.map(str::trim).filter(|line| line.starts_with("blockferry ")).map(str::to_owned).collect()
}

/// The files that examples name.
fn furnished() -> Scratch {
    let scratch = Scratch::new();
    for name in ["old.img", "disk.img", "base.img"] {
        scratch.full(name, 2 * MIB);
    }
    for (name, below, format) in [
        ("one.qcow2", "base.img", "raw"),
        ("two.qcow2", "one.qcow2", "qcow2"),
        ("top.qcow2", "two.qcow2", "qcow2"),
    ] {
        let path = scratch.path(name);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", below, "-F", format, &path]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 64k 64k", &path]);
    }
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &scratch.path("disk.qcow2"), "4M"]);
    std::fs::create_dir(scratch.path("images")).unwrap();
    std::fs::copy(scratch.path("base.img"), scratch.path("images/base.img")).unwrap();
    std::fs::create_dir_all(scratch.path("vg")).unwrap();
    std::fs::write(scratch.path("vg/new"), vec![0; 2 << 20]).unwrap();
    scratch
}

/// The example with places of this test instead of the machine's. `socket`: where the disk that it names is, or is to be.
fn placed(line: &str, scratch: &Scratch, socket: &str) -> String {
    let mut line = line.to_owned();
    for uri in ["nbd://127.0.0.1:10809/disk", "nbd://127.0.0.1/disk"] {
        line = line.replace(uri, &format!("'nbd+unix:///disk?socket={socket}'"));
    }
    line = line.replace("/run/disk.sock", socket).replace("/dev/vg/", "vg/");
    line = line.replace("/images/", &format!("{}/", scratch.path("images")));
    if line.starts_with("blockferry bench") && !line.contains("--check-log") {
        line += " -n 200";
    }
    line
}

#[test]
fn all_examples_do_what_they_say() {
    for name in subcommands() {
        let lines = examples(&run(&[&name, "--help"]).out);
        assert!(!lines.is_empty(), "{name} has no example");
        // Those of one command follow one another; those that copy or change a chain begin anew.
        let goes_on = ["snapshot", "bench"].contains(&name.as_str());
        let mut scratch = furnished();
        for line in lines {
            if !goes_on {
                scratch = furnished();
            }
            let socket = scratch.path("disk.sock");
            let is_server = line.contains("--export");
            let is_client = !is_server && (line.contains("nbd://") || line.contains("nbd+unix"));
            let server = is_client.then(|| {
                let uri = format!("nbd+unix:///disk?socket={socket}");
                let mut server =
                    Process::json(&["serve", "-f", "raw", &scratch.path("disk.img"), "--export", &uri]);
                server.wait_event("listening");
                server
            });
            let copy = scratch.path("copy.img");
            if line.contains("copy.img") && line.contains("--check-log") {
                std::fs::copy(scratch.path("disk.img"), &copy).unwrap();
            }
            let line = placed(&line, &scratch, &socket);
            let (code, said) = in_shell(&line, &scratch, is_server.then_some(socket.as_str()));
            // Whoever serves is ended by a signal, in the midst of its job or after it.
            let good: &[i32] = if is_server { &[0, 3] } else { &[0] };
            assert!(good.contains(&code), "{line}: {code}\n{said}");
            drop(server);
            let _ = std::fs::remove_file(&socket);
        }
    }
}

/// Runs a line as a person would; a server is ended once it listens at `socket`.
fn in_shell(line: &str, scratch: &Scratch, socket: Option<&str>) -> (i32, String) {
    let line = line.strip_prefix("blockferry").unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec \"$0\" {line}"), env!("CARGO_BIN_EXE_blockferry")]);
    command.current_dir(scratch.dir()).env("TMPDIR", scratch.dir()).stdin(Stdio::null());
    let Some(socket) = socket else {
        let ended = command.output().unwrap();
        let said =
            String::from_utf8_lossy(&ended.stdout).into_owned() + &String::from_utf8_lossy(&ended.stderr);
        return (ended.status.code().unwrap_or(-1), said);
    };
    let mut process = Process::spawn(command);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !std::path::Path::new(socket).exists() && !process.has_ended() {
        assert!(std::time::Instant::now() < end, "{line}: it does not listen");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // One that has ended by itself was short of clients.
    if !process.has_ended() {
        process.signal(rustix::process::Signal::TERM);
    }
    let ended = process.end();
    (ended.code.unwrap_or(-1), ended.to_string())
}
