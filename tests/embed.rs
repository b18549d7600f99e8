//! The example for embedders, as built: a foreign epoll loop owns the engine, a mirror pivots under the guest,
//! and no thread is started.

mod common;

use std::process::Command;

use common::Process;
use common::image::Scratch;

#[test]
fn the_example_pivots_on_one_thread() {
    // Tests live in `target/PROFILE/deps`, examples next to that folder.
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(|deps| deps.parent()).unwrap();
    let example = profile.join("examples/embed");
    assert!(
        example.exists(),
        "{} is not built; run `cargo test` or `cargo build --examples`",
        example.display()
    );
    let scratch = Scratch::new();
    let mut command = Command::new(&example);
    command.arg(scratch.dir());
    let ended = Process::spawn(command).end();
    assert_eq!(ended.code, Some(0), "{ended}");
    for text in ["pivoted", "every block found on the copy", "threads: 1;"] {
        assert!(ended.out.contains(text), "no `{text}` in: {ended}");
    }
    let writes = ended.out.split(' ').next().and_then(|number| number.parse::<u64>().ok());
    assert!(writes > Some(10_000), "{ended}");
}
