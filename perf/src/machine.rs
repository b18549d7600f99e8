//! What was measured on: kernel, CPU, memory, the disk under the scratch folder, and the versions of who took part.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::result::Machine;

fn line_of(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// First line of what a program prints.
fn says(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.ok()
        .and_then(|text| Some(text.lines().next()?.trim().to_owned()))
        .unwrap_or_else(|| "not there".into())
}

/// The mount that holds `path`, as `/proc/mounts` has it: device, place, type and options.
pub fn mount_of(path: &Path, mounts: &str) -> Option<(String, String, String)> {
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut best: Option<(String, String, String)> = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let (Some(device), Some(place), Some(kind), Some(options)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let longer = best.as_ref().is_none_or(|(_, other, _)| place.len() >= other.len());
        if path.starts_with(place) && longer {
            best = Some((device.to_owned(), place.to_owned(), format!("{kind} ({options})")));
        }
    }
    best
}

fn scratch_disk(scratch: &Path) -> String {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let Some((device, _, kind)) = mount_of(scratch, &mounts) else { return "unknown".into() };
    let name = device.trim_start_matches("/dev/");
    let queue = |what: &str| line_of(&format!("/sys/block/{name}/queue/{what}"));
    let scheduler = queue("scheduler");
    if scheduler.is_empty() {
        return format!("{kind} on {device}");
    }
    format!(
        "{kind} on {device}, scheduler {scheduler}, rotational {}, write cache '{}'",
        queue("rotational"),
        queue("write_cache")
    )
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let flags = info.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let virtual_machine = flags.split_whitespace().any(|flag| flag == "hypervisor");
    format!(
        "{} × {}{}",
        std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        model.map_or("unknown", |(_, model)| model.trim()),
        if virtual_machine { ", a virtual machine" } else { "" }
    )
}

fn memory() -> String {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    format!("{:.1} GiB", kib.unwrap_or(0.0) / f64::from(1 << 20))
}

/// Describes this machine.
pub fn describe(scratch: &Path, blockferry: &str, counted: bool) -> Machine {
    let fact = |name: &str, value: String| (name.to_owned(), value);
    Machine {
        facts: vec![
            fact("date", says("date", &["-u", "+%Y-%m-%d"])),
            fact("kernel", format!("Linux {}", line_of("/proc/sys/kernel/osrelease"))),
            fact("CPU", cpu()),
            fact("memory", memory()),
            fact("scratch folder", scratch_disk(scratch)),
            fact("blockferry", says(blockferry, &["--version"])),
            fact("qemu-img", says("qemu-img", &["--version"])),
            fact("qemu-storage-daemon", says("qemu-storage-daemon", &["--version"])),
            fact("qemu-nbd", says("qemu-nbd", &["--version"])),
            fact("nbdcopy", says("nbdcopy", &["--version"])),
            fact("nbdkit", says("nbdkit", &["--version"])),
            fact("fio", says("fio", &["--version"])),
            fact("dd", says("dd", &["--version"])),
            fact(
                "system calls",
                if counted { "counted by perf stat" } else { "not counted: no perf here" }.to_owned(),
            ),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_holds_a_path() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /proc/x tmpfs rw 0 0\n/dev/b /proc xfs rw 0 0\n";
        let found = mount_of(Path::new("/proc"), mounts).unwrap();
        assert_eq!(found, ("/dev/b".into(), "/proc".into(), "xfs (rw)".into()));
        assert_eq!(mount_of(Path::new("/"), mounts).unwrap().0, "/dev/a");
        assert_eq!(mount_of(Path::new("/"), ""), None);
    }
}
