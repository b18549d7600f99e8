//! Zeroes, thin targets, shared blocks, and disks of unusual shape, on the real kernel.

use std::os::unix::fs::MetadataExt;

use common::filesystem::Mounted;
use common::image::{MIB, Scratch, allocated, assert_equal, content};
use common::{LoopDevice, Process, assert_same, event, run_json, tool};
use serde_json::Value;

fn mirror(arguments: &[&str]) -> Value {
    let lines = run_json(&[&["mirror"], arguments].concat());
    event(&lines, "end").clone()
}

fn bytes(end: &Value, name: &str) -> u64 {
    end["details"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {end:#}"))
}

#[test]
fn a_loop_device_that_loses_punch_hole_on_the_way_is_no_error() {
    let scratch = Scratch::new();
    let tmpfs = Mounted::tmpfs(scratch.dir(), 64 * MIB);
    let backing = tmpfs.path("device.img");
    std::fs::write(&backing, vec![0xa5; 16 << 20]).unwrap();
    let device = LoopDevice::new(&backing, 512);
    let source = scratch.holey("source.img", 16 * MIB, &[(MIB, MIB), (9 * MIB, 64 << 10)]);
    let end = mirror(&[&source, &device.0, "-F", "raw", "--force", "--verify"]);
    assert!(bytes(&end, "bytes-zeroed") > 0, "{end:#}");
    assert_eq!(content(&source), content(&device.0));
    // The device has lost a capability by now, or loses it here.
    tool("fallocate", &["-z", "-o", "0", "-l", "1048576", &device.0]);
    let end = mirror(&[&source, &device.0, "-F", "raw", "--force", "--verify"]);
    assert_eq!(end["ending"], "completed");
    assert_eq!(content(&source), content(&device.0));
}

#[test]
fn what_is_known_to_be_zero_is_not_zeroed_again() {
    let scratch = Scratch::new();
    let source = scratch.holey("source.img", 32 * MIB, &[(3 * MIB, MIB)]);
    // A new file is known to be holes.
    let target = scratch.path("new.img");
    let end = mirror(&[&source, &target]);
    assert_eq!(bytes(&end, "bytes-zeroed"), 0);
    assert_eq!(bytes(&end, "bytes-copied"), MIB);
    assert_eq!(bytes(&end, "bytes-skipped"), 31 * MIB);
    assert!(
        end["target-allocated-bytes"].as_u64().is_some_and(|bytes| (MIB..2 * MIB).contains(&bytes)),
        "{end:#}"
    );
    // A full one is zeroed once, and thin then.
    let full = scratch.full("full.img", 32 * MIB);
    let end = mirror(&[&source, &full, "-F", "raw", "--force"]);
    assert_eq!(bytes(&end, "bytes-zeroed"), 31 * MIB);
    assert_equal(&source, &full);
    assert!(allocated(&full) < 2 * MIB, "{}", allocated(&full));
    // A user who says so is believed.
    let zero = scratch.path("zero.img");
    std::fs::write(&zero, vec![0; 32 << 20]).unwrap();
    let end = mirror(&[&source, &zero, "-F", "raw", "--force", "--target-is-zero"]);
    assert_eq!((bytes(&end, "bytes-zeroed"), bytes(&end, "bytes-skipped")), (0, 31 * MIB));
    assert_equal(&source, &zero);
}

#[test]
fn zeroes_in_data_are_kept_out_or_in_as_the_user_says() {
    let scratch = Scratch::new();
    let source = scratch.full("source.img", 8 * MIB);
    let file = std::fs::OpenOptions::new().write(true).open(&source).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 4 << 20], 2 * MIB).unwrap();
    drop(file);
    let thin = scratch.path("thin.img");
    mirror(&[&source, &thin]);
    assert!(allocated(&thin) < 5 * MIB);
    let thick = scratch.path("thick.img");
    let end = mirror(&[&source, &thick, "--detect-zeroes", "off"]);
    assert_eq!(bytes(&end, "bytes-copied"), 8 * MIB);
    assert!(allocated(&thick) >= 8 * MIB);
    let kept = scratch.full("kept.img", 8 * MIB);
    let end = mirror(&[&source, &kept, "-F", "raw", "--force", "--detect-zeroes", "on"]);
    assert_eq!(bytes(&end, "bytes-zeroed"), 4 * MIB);
    assert!(allocated(&kept) >= 8 * MIB, "its space stays its own");
    for copy in [&thin, &thick, &kept] {
        assert_same(&source, copy);
    }
}

#[test]
fn a_disk_at_rest_is_shared_where_the_filesystem_can() {
    let scratch = Scratch::new();
    let xfs = Mounted::xfs(scratch.dir(), 440 * MIB);
    let source = xfs.path("source.img");
    std::fs::copy(scratch.full("origin.img", 150 * MIB + 512), &source).unwrap();
    let target = xfs.path("target.img");
    let end = mirror(&[&source, &target, "--verify"]);
    let shared = bytes(&end, "bytes-shared");
    assert!(shared >= 150 * MIB, "{end:#}");
    assert!(bytes(&end, "bytes-copied") <= MIB, "{end:#}");
    assert_same(&source, &target);
    // Three images of 150 MiB would not fit.
    let another = xfs.path("another.img");
    mirror(&[&source, &another]);
    assert_same(&source, &another);
    // With clients there is no sharing: what is under way has no order against it.
    let own = xfs.path("own.img");
    let socket = scratch.path("disk.sock");
    let uri = format!("nbd+unix:///disk?socket={socket}");
    std::fs::remove_file(&another).unwrap();
    std::fs::remove_file(&target).unwrap();
    let served = mirror(&[&source, &own, "-f", "raw", "--export", &uri]);
    assert_eq!(bytes(&served, "bytes-shared"), 0);
    let never = xfs.path("never.img");
    std::fs::remove_file(&own).unwrap();
    let end = mirror(&[&source, &never, "--reflink", "never"]);
    assert_eq!((bytes(&end, "bytes-shared"), bytes(&end, "bytes-copied")), (0, 150 * MIB + 512));
}

/// 64 TiB with a little data far apart: nothing is allocated for what is not there.
#[test]
fn a_huge_sparse_disk_costs_memory_for_what_is_dirty_only() {
    let scratch = Scratch::new();
    // A filesystem without a limit of 16 TiB for a file.
    let tmpfs = Mounted::tmpfs(scratch.dir(), 256 * MIB);
    let source = tmpfs.path("huge.img");
    let len = 64_u64 << 40;
    let file = std::fs::File::create(&source).unwrap();
    let result = file.set_len(len);
    assert!(result.is_ok(), "{result:?}");
    let places = [0, 5 << 40, (33 << 40) + 4096, len - 8192];
    for place in places {
        std::os::unix::fs::FileExt::write_all_at(&file, &[0x5a; 8192], place).unwrap();
    }
    drop(file);
    let target = tmpfs.path("copy.img");
    // A flat map of its chunks would be 128 MiB, and there are several maps.
    let mut command = std::process::Command::new("prlimit");
    command.args(["--as=268435456", env!("CARGO_BIN_EXE_blockferry"), "--json", "mirror", &source, &target]);
    let ended = Process::spawn(command).end();
    assert_eq!(ended.code, Some(0), "{ended}");
    let lines = ended.events();
    let end = event(&lines, "end");
    assert_eq!(bytes(end, "bytes-copied"), 4 * 65_536, "{end:#}");
    let (a, b) = (std::fs::File::open(&source).unwrap(), std::fs::File::open(&target).unwrap());
    for place in places {
        let (mut x, mut y) = ([0; 8192], [1; 8192]);
        std::os::unix::fs::FileExt::read_exact_at(&a, &mut x, place).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&b, &mut y, place).unwrap();
        assert!(x == y, "at {place}");
    }
    assert_eq!(b.metadata().unwrap().len(), len);
    assert!(b.metadata().unwrap().blocks() * 512 < MIB);
}
