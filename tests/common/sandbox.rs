//! Takes io_uring away from one thread and from the programs that it starts, as a container's seccomp profile
//! does.
//!
//! A filter belongs to the thread that asks for it and is inherited by its children, so nothing has to run
//! between fork and exec. There is no way back, which is why the thread is made for it.

#![allow(unsafe_code)]

use std::io::{Error, Result};

/// The system calls of io_uring; new calls have the same numbers on every architecture.
pub const SETUP: u32 = libc::SYS_io_uring_setup as u32;
/// See [`SETUP`].
pub const ENTER: u32 = libc::SYS_io_uring_enter as u32;
/// See [`SETUP`].
pub const REGISTER: u32 = libc::SYS_io_uring_register as u32;

/// Runs `work` on a thread, for which and for whose children these system calls fail with `errno`.
pub fn without<T: Send>(calls: &[u32], errno: i32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            forbid(calls, errno).expect("a seccomp filter");
            work()
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// From now on these calls of this thread fail.
fn forbid(calls: &[u32], errno: i32) -> Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    // The first word of what a filter sees is the number of the call.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for &call in calls {
        let is_it = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        program.push(libc::sock_filter { code: is_it, jt: 0, jf: 1, k: call });
        program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls change only what this thread may do. The second reads `filter` and the program to
    // which it points; both live in this frame until it returns, and the kernel keeps a copy of its own.
    let results = unsafe {
        [
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter),
        ]
    };
    if results.contains(&-1) { Err(Error::last_os_error()) } else { Ok(()) }
}
