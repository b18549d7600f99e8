//! The limits of the process, as far as they are known at the start: open files and address space.
//!
//! A limit that is met in the midst of a service is an error of one request where the kernel says so (files that may not
//! grow, descriptors), and the end of the process where it is memory: an allocation that fails ends it. So address space is
//! looked at before anything is opened: what is not enough is refused in one sentence, and what is scarce makes the memory for
//! I/O smaller. Descriptors are kept back from clients, so that a client that opens connections without end takes none from
//! the disks, and from those who are connected.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::exit::Failure;
use crate::base::limits::{ADDRESS_BYTES_MIN, FILES_KEPT_BACK, FILES_MIN};
use crate::base::units::fmt_bytes;

/// Takes what the limits allow, and refuses what is too little to work with.
pub fn prepare() -> Result<(), Failure> {
    let files = getrlimit(Resource::Nofile);
    if files.current < files.maximum {
        // As many as an ordinary user may have; where that fails, it stays as it is.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum });
    }
    match getrlimit(Resource::Nofile).current {
        Some(files) if files < FILES_MIN => {
            return Err(Failure::text(format!(
                "The process may have {files} open files (`ulimit -n`, LimitNOFILE); it needs {FILES_MIN}"
            )));
        }
        _ => {}
    }
    match address_room() {
        Some(room) if room < ADDRESS_BYTES_MIN => Err(Failure::text(format!(
            "The process may have {} more address space (`ulimit -v`, LimitAS); it needs {}",
            fmt_bytes(room),
            fmt_bytes(ADDRESS_BYTES_MIN)
        ))),
        _ => Ok(()),
    }
}

/// Memory for I/O: as much as is wanted, or a part of what there is room for.
pub fn arena_bytes(wanted: usize) -> usize {
    arena_within(wanted, address_room())
}

fn arena_within(wanted: usize, room: Option<u64>) -> usize {
    match room.and_then(|room| usize::try_from(room).ok()) {
        Some(room) => wanted.min(room / 4),
        None => wanted,
    }
}

/// Clients that may be connected at once: as many as are wanted, or half of the descriptors that are not kept back.
pub fn clients_max(wanted: usize) -> usize {
    clients_within(wanted, getrlimit(Resource::Nofile).current)
}

fn clients_within(wanted: usize, files: Option<u64>) -> usize {
    match files {
        Some(files) => wanted.min((files.saturating_sub(FILES_KEPT_BACK) / 2).max(1) as usize),
        None => wanted,
    }
}

/// Address space that is left, if it is limited.
fn address_room() -> Option<u64> {
    let limit = getrlimit(Resource::As).current?;
    let used = used_kib(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
    Some(limit.saturating_sub(used << 10))
}

/// Address space in use, in KiB, as the kernel tells it of a process.
fn used_kib(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    line.and_then(|size| size.trim().strip_suffix("kB")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_scarce_is_shared() {
        assert_eq!(
            (arena_within(100, None), arena_within(100, Some(4000)), arena_within(100, Some(40))),
            (100, 100, 10)
        );
        for (files, clients) in
            [(1 << 20, 128), (FILES_KEPT_BACK + 100, 50), (FILES_KEPT_BACK + 1, 1), (3, 1)]
        {
            assert_eq!(clients_within(128, Some(files)), clients, "{files}");
        }
        assert_eq!(clients_within(128, None), 128);
        assert_eq!((used_kib("VmPeak:\t 9 kB\nVmSize:\t    4242 kB\n"), used_kib("Name:\tx")), (4242, 0));
    }
}
