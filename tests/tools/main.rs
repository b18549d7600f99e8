//! The image tools, against `qemu-img` on the same images: contents, JSON fields, exit codes.

use common::nbd_peers;

mod admit;
mod amend;
mod convert;
mod lengths;
mod lines;
mod names;
mod places;
mod qcow2;
mod raw;
mod rebase;
mod repair;
mod serve;
mod share;

use serde_json::Value;

use common::{Ended, tool};

/// Runs `qemu-img`, whatever it says.
fn qemu(arguments: &[&str]) -> Ended {
    let mut command = std::process::Command::new("qemu-img");
    command.args(arguments);
    common::Process::spawn(command).end()
}

/// The JSON document that `qemu-img` prints.
fn qemu_json(arguments: &[&str]) -> Value {
    serde_json::from_str(&tool("qemu-img", arguments)).expect("JSON")
}

/// The JSON document that the built command prints.
fn our_json(arguments: &[&str]) -> Value {
    let ended = common::run(arguments);
    serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {ended}"))
}

/// Runs the built command, which has to succeed: its output.
fn ours(arguments: &[&str]) -> String {
    let ended = common::run(arguments);
    assert_eq!(ended.code, Some(0), "{arguments:?}: {ended}");
    ended.out
}

/// Every field of `theirs` is in `ours`, with the same value; ours may have more.
#[track_caller]
fn assert_has_all(ours: &Value, theirs: &Value, path: &str) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            for (name, value) in b {
                let ours = a.get(name).unwrap_or_else(|| panic!("no field {path}/{name} in {ours:#}"));
                assert_has_all(ours, value, &format!("{path}/{name}"));
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{path}: {ours:#} and {theirs:#}");
            for (n, (ours, theirs)) in a.iter().zip(b).enumerate() {
                assert_has_all(ours, theirs, &format!("{path}/{n}"));
            }
        }
        _ => assert_eq!(ours, theirs, "{path}"),
    }
}

/// The same document, field by field and no field more.
#[track_caller]
fn assert_same_json(ours: &Value, theirs: &Value) {
    assert_has_all(ours, theirs, "");
    assert_has_all(theirs, ours, "");
}
