//! What the kernel knows of a process and no safe crate in use tells: what a child used when it ended, and the CPU
//! time of a process that still runs.
//!
//! Both count threads that have ended (workers of io_uring come and go), which a walk over `/proc/PID/task` would
//! miss, and both are exact, where `/proc/PID/stat` counts in ticks of 10 ms.

#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// What a child, and the children that it waited for, used in their lives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time in user mode, in seconds.
    pub user_secs: f64,
    /// CPU time in the kernel, in seconds.
    pub sys_secs: f64,
    /// Peak resident memory, in KiB; of the largest process, not of their sum.
    pub rss_kib_max: u64,
    /// Context switches, voluntary and not.
    pub switches: u64,
}

fn seconds(time: libc::timeval) -> f64 {
    time.tv_sec as f64 + time.tv_usec as f64 / 1e6
}

/// Takes leave of a child that has ended, or waits until it has.
pub fn reap(pid: i32) -> io::Result<(ExitStatus, Usage)> {
    let mut status = 0;
    // SAFETY: rusage is made of integers, for which zeroes are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers lead to live values of the types that the call writes.
        let ended = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
        if ended == pid {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let used = Usage {
        user_secs: seconds(usage.ru_utime),
        sys_secs: seconds(usage.ru_stime),
        rss_kib_max: u64::try_from(usage.ru_maxrss).unwrap_or(0),
        switches: u64::try_from(usage.ru_nvcsw + usage.ru_nivcsw).unwrap_or(0),
    };
    Ok((ExitStatus::from_raw(status), used))
}

/// CPU time that a process has used so far, all its threads together, in seconds.
pub fn cpu_secs(pid: i32) -> io::Result<f64> {
    let mut clock = 0;
    // SAFETY: the pointer leads to a live clock id.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer leads to a live timespec.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::zombie_processes, reason = "`reap` waits for it")]
    fn a_child_that_worked_has_used_something() {
        let work = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exit 3";
        let child = std::process::Command::new("sh").args(["-c", work]).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let (status, used) = reap(pid).unwrap();
        assert_eq!(status.code(), Some(3));
        assert!(used.user_secs + used.sys_secs > 0.0 && used.rss_kib_max > 0, "{used:?}");
        assert!(cpu_secs(pid).is_err(), "it is gone");
        assert!(cpu_secs(i32::try_from(std::process::id()).unwrap()).unwrap() > 0.0);
    }
}
