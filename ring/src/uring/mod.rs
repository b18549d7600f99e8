//! The kernel backend: one io_uring, its registered files and buffers, and the offload pool.
//!
//! # Set-up
//! Flags are tried from the best down: `SINGLE_ISSUER | DEFER_TASKRUN | TASKRUN_FLAG | SUBMIT_ALL`,
//! then `COOP_TASKRUN | TASKRUN_FLAG`, then none. What was refused is remembered with its reason, and
//! is one line in the log and in `blockferry doctor`. `NODROP` and `EXT_ARG` are required.
//!
//! # The fd to poll
//! An embedder polls an eventfd that is registered with the ring. The ring's own fd will not do: with
//! DEFER_TASKRUN it *is* readable when deferred completions wait, but a poller that sleeps already is
//! not woken by them (measured on Linux 6.18: `poll` slept through to its time-out).
//!
//! # Completions
//! `user_data` below `1 << 32` (sequence 0) is this module's own: the wake-up eventfd and cancel
//! requests. Everything else is passed on. What ends outside (offloaded calls, a library's own threads) comes
//! through a list that the eventfd announces ([`crate::external`]).

#![allow(unsafe_code)]

mod encode;
mod offload;
pub(crate) mod sys;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slab::Slab;

use crate::Nanos;
use crate::backend::{
    Backend, CopyRange, CopyWork, DeviceIdentity, FileInfo, FileKind, LockRange, OpenHow, PlaceWork,
    RemoteWaker, SocketAddress, Wait, Work,
};
use crate::config::{Config, SetupError};
use crate::errno::Errno;
use crate::external::{Completer, Inbox};
use crate::limits;
use crate::op::{CopyHow, FileId, Op};
use encode::Messages;
use offload::Offload;

const WAKE: u64 = 1;
const CANCEL: u64 = 2;

/// The set-up flags, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flavour {
    Deferred,
    Cooperative,
    Plain,
}

impl Flavour {
    const ALL: [Flavour; 3] = [Flavour::Deferred, Flavour::Cooperative, Flavour::Plain];

    fn name(self) -> &'static str {
        match self {
            Flavour::Deferred => "SINGLE_ISSUER | DEFER_TASKRUN | TASKRUN_FLAG | SUBMIT_ALL",
            Flavour::Cooperative => "COOP_TASKRUN | TASKRUN_FLAG",
            Flavour::Plain => "no flags",
        }
    }

    fn build(self, restrict: bool) -> std::io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(limits::CQ_ENTRIES).setup_clamp();
        match self {
            Flavour::Deferred => {
                builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
            }
            Flavour::Cooperative => {
                builder.setup_coop_taskrun().setup_taskrun_flag();
            }
            Flavour::Plain => {}
        }
        if restrict {
            builder.setup_r_disabled();
        }
        builder.build(limits::SQ_ENTRIES)
    }
}

/// One open file.
struct Entry {
    fd: Arc<OwnedFd>,
    /// In the registered table, under the index of this entry.
    fixed: bool,
    /// Locks were taken through it.
    locked: bool,
    /// Where a socket is to be connected to. The kernel reads it when it takes the operation in.
    peer: Option<Box<rustix::net::SocketAddrAny>>,
}

/// The kernel backend.
pub struct Uring {
    ring: IoUring,
    notes: Vec<String>,
    min_wait: bool,
    files: Slab<Entry>,
    fixed_files: bool,
    fixed_buffers: u32,
    buffers_used: Vec<bool>,
    messages: Messages,
    accepts: Vec<u64>,
    offload: Offload,
    inbox: Arc<Inbox>,
    wake: Arc<OwnedFd>,
    wake_armed: bool,
    /// What an embedder polls; registered with the ring when it is first asked for.
    event: std::cell::OnceCell<OwnedFd>,
    started: Instant,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("files", &self.files.len()).finish_non_exhaustive()
    }
}

impl Uring {
    /// Sets up a ring as the kernel allows.
    pub fn new(config: &Config) -> Result<Uring, SetupError> {
        let mut notes = Vec::new();
        let ring = build(config.restrict, &mut notes)?;
        let params = ring.params();
        if !params.is_feature_nodrop() || !params.is_feature_ext_arg() {
            return Err(SetupError::Forbidden {
                reason: "the kernel is too old (no IORING_FEAT_NODROP or IORING_FEAT_EXT_ARG)".into(),
                cure: "Linux 5.11 or newer is needed, 6.1 or newer is recommended.".into(),
            });
        }
        let min_wait = params.is_feature_min_timeout();
        notes.push(format!("minimum wait (MIN_TIMEOUT): {}", if min_wait { "yes" } else { "no" }));

        let submitter = ring.submitter();
        let fixed_files = match submitter.register_files_sparse(limits::FIXED_FILES) {
            Ok(()) => true,
            Err(error) => {
                notes.push(format!("registered files: no ({error})"));
                false
            }
        };
        let fixed_buffers = match submitter.register_buffers_sparse(limits::FIXED_BUFFERS) {
            Ok(()) => limits::FIXED_BUFFERS,
            Err(error) => {
                notes.push(format!("registered buffers: no ({error})"));
                0
            }
        };
        let mut workers = [limits::IOWQ_BOUNDED_WORKERS, limits::IOWQ_UNBOUNDED_WORKERS];
        if let Err(error) = submitter.register_iowq_max_workers(&mut workers) {
            notes.push(format!("limit of io-wq workers: not set ({error})"));
        }
        if config.restrict {
            restrict(&ring).map_err(|errno| SetupError::Failed { doing: "restricting it", errno })?;
            notes.push("restricted to the operations in use".into());
        }
        // A filter may let the set-up through and stop this: nothing would ever be submitted or complete.
        submitter.submit().map_err(|error| forbidden("io_uring_enter", &error))?;
        let wake =
            sys::eventfd().map_err(|errno| SetupError::Failed { doing: "making its eventfd", errno })?;
        let wake = Arc::new(wake);
        let inbox = Inbox::new(waker(&wake));
        let mut uring = Uring {
            ring,
            notes,
            min_wait,
            files: Slab::with_capacity(64),
            fixed_files,
            fixed_buffers,
            buffers_used: vec![false; fixed_buffers as usize],
            messages: Messages::default(),
            accepts: Vec::new(),
            offload: Offload::new(config.offload, config.offload_threads, inbox.clone()),
            inbox,
            wake,
            wake_armed: false,
            event: std::cell::OnceCell::new(),
            started: Instant::now(),
        };
        uring.arm_wake();
        for note in &uring.notes {
            tracing::debug!("ring: {note}");
        }
        Ok(uring)
    }

    fn arm_wake(&mut self) {
        let entry = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), libc::POLLIN as u32)
            .build()
            .user_data(WAKE);
        self.wake_armed = self.push_entry(&entry);
    }

    fn push_entry(&mut self, entry: &squeue::Entry) -> bool {
        let mut queue = self.ring.submission();
        // SAFETY: every pointer in the entry leads to memory that outlives the operation: buffers
        // belong to its slot until the terminal completion (crate::ring), message headers to
        // `messages` until the same moment, and the wake-up poll has no memory.
        unsafe { queue.push(entry) }.is_ok()
    }

    fn add_file(&mut self, fd: OwnedFd) -> FileId {
        let raw = fd.as_raw_fd();
        let index = self.files.insert(Entry { fd: Arc::new(fd), fixed: false, locked: false, peer: None });
        if self.fixed_files
            && (index as u32) < limits::FIXED_FILES
            && self.ring.submitter().register_files_update(index as u32, &[raw]).is_ok()
        {
            self.files[index].fixed = true;
        }
        FileId(index as u32)
    }

    fn fd(&self, file: FileId) -> Result<&OwnedFd, Errno> {
        self.files.get(file.0 as usize).map(|entry| &*entry.fd).ok_or(Errno::EBADF)
    }
}

fn waker(wake: &Arc<OwnedFd>) -> RemoteWaker {
    let wake = wake.clone();
    RemoteWaker::new(move || sys::ring_eventfd(&wake))
}

/// Tries the flavours in turn.
fn build(restrict: bool, notes: &mut Vec<String>) -> Result<IoUring, SetupError> {
    let mut last = None;
    for flavour in Flavour::ALL {
        match flavour.build(restrict) {
            Ok(ring) => {
                notes.insert(0, format!("set-up flags: {}", flavour.name()));
                return Ok(ring);
            }
            Err(error) => {
                if error.raw_os_error() == Some(libc::EINVAL) {
                    notes.push(format!("set-up flags {}: refused ({error})", flavour.name()));
                }
                last = Some(error);
            }
        }
    }
    let error = last.unwrap_or_else(|| std::io::Error::from_raw_os_error(libc::ENOSYS));
    Err(forbidden(sys::SETUP_CALL, &error))
}

fn forbidden(call: &str, error: &std::io::Error) -> SetupError {
    let (reason, cure) = sys::why_forbidden(call, error);
    SetupError::Forbidden { reason, cure }
}

/// Restricts a disabled ring to the operations in use, and enables it.
fn restrict(ring: &IoUring) -> Result<(), Errno> {
    const OPERATIONS: [u8; 16] = [
        opcode::Read::CODE,
        opcode::ReadFixed::CODE,
        opcode::Write::CODE,
        opcode::WriteFixed::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::UringCmd16::CODE,
        opcode::Accept::CODE,
        opcode::Connect::CODE,
        opcode::Recv::CODE,
        opcode::Send::CODE,
        opcode::SendMsg::CODE,
        opcode::PollAdd::CODE,
        opcode::AsyncCancel::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
    ];
    // io_uring_register operations that are needed later: IORING_REGISTER_EVENTFD,
    // IORING_REGISTER_FILES_UPDATE and IORING_REGISTER_BUFFERS_UPDATE.
    const REGISTER_OPERATIONS: [u8; 3] = [4, 6, 16];
    let mut list: Vec<Restriction> = OPERATIONS.iter().map(|&code| Restriction::sqe_op(code)).collect();
    list.extend(REGISTER_OPERATIONS.iter().map(|&code| Restriction::register_op(code)));
    list.push(Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits()));
    let submitter = ring.submitter();
    submitter.register_restrictions(&mut list).map_err(|e| Errno::from_io(&e))?;
    submitter.register_enable_rings().map_err(|e| Errno::from_io(&e))
}

/// What the kernel offers, a line each, for `blockferry doctor`.
pub fn probe() -> Result<Vec<String>, SetupError> {
    let mut notes = Vec::new();
    let ring = build(false, &mut notes)?;
    let mut probe = Probe::new();
    if ring.submitter().register_probe(&mut probe).is_ok() {
        let wanted = [
            ("READ_FIXED", opcode::ReadFixed::CODE),
            ("WRITE_FIXED", opcode::WriteFixed::CODE),
            ("FALLOCATE", opcode::Fallocate::CODE),
            ("URING_CMD (block discard)", opcode::UringCmd16::CODE),
            ("SENDMSG", opcode::SendMsg::CODE),
            ("READV_FIXED", opcode::ReadvFixed::CODE),
            ("SEND_ZC", opcode::SendZc::CODE),
        ];
        for (name, code) in wanted {
            let answer = if probe.is_supported(code) { "yes" } else { "no" };
            notes.push(format!("operation {name}: {answer}"));
        }
    }
    let params = ring.params();
    notes.push(format!(
        "minimum wait (MIN_TIMEOUT): {}",
        if params.is_feature_min_timeout() { "yes" } else { "no" }
    ));
    Ok(notes)
}

impl Backend for Uring {
    fn describe(&self) -> Vec<String> {
        self.notes.clone()
    }

    fn now(&self) -> Nanos {
        self.started.elapsed().as_nanos() as u64
    }

    fn unix_secs(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |since| since.as_secs())
    }

    fn random(&mut self) -> u64 {
        sys::random()
    }

    fn push(&mut self, user_data: u64, op: &Op) -> bool {
        let Some(file) = self.files.get(op.file().0 as usize) else { return false };
        let entry = encode::entry(op, file, op.file(), user_data, &mut self.messages);
        if self.push_entry(&entry) {
            if matches!(op, Op::Accept { .. }) {
                self.accepts.push(user_data);
            }
            return true;
        }
        self.messages.finish(user_data);
        false
    }

    fn cancel(&mut self, user_data: u64) {
        let entry = opcode::AsyncCancel::new(user_data).build().user_data(CANCEL);
        if !self.push_entry(&entry) {
            let _ = self.ring.submit();
            // A second refusal leaves the operation to end by itself: cancelling is only a request.
            let _ = self.push_entry(&entry);
        }
    }

    fn enter(&mut self, wait: Wait) -> Result<bool, Errno> {
        if !self.wake_armed {
            self.arm_wake();
        }
        let (queued, taskrun) = {
            let queue = self.ring.submission();
            (queue.len(), queue.taskrun() || queue.cq_overflow())
        };
        let waiting = wait.want > 0 && !self.has_completions();
        if !waiting && queued == 0 && !taskrun {
            return Ok(false);
        }
        let result = if waiting {
            let left =
                wait.deadline.map(|deadline| Duration::from_nanos(deadline.saturating_sub(self.now())));
            let timespec = left.map(types::Timespec::from);
            let mut args = types::SubmitArgs::new();
            if let Some(timespec) = &timespec {
                args = args.timespec(timespec);
            }
            let mut want = wait.want.min(limits::CQ_ENTRIES as usize);
            if wait.min_wait_usec > 0 {
                if self.min_wait {
                    args = args.min_wait_usec(wait.min_wait_usec);
                } else {
                    want = 1;
                }
            }
            self.ring.submitter().submit_with_args(want, &args)
        } else {
            self.ring.submit()
        };
        match result {
            Ok(_) => Ok(true),
            Err(error) => match error.raw_os_error() {
                // A passed deadline, a signal, or completions to reap first: the next turn sees to it.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(true),
                _ => Err(Errno::from_io(&error)),
            },
        }
    }

    fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty() || !self.inbox.is_empty()
    }

    fn reap(&mut self, max: usize, out: &mut Vec<(u64, i32)>) {
        // Before looking: what comes later rings again.
        if let Some(event) = self.event.get() {
            sys::drain_eventfd(event);
        }
        self.inbox.take(max, out);
        let mut woken = false;
        while out.len() < max {
            let Some(entry) = self.ring.completion().next() else { break };
            let (user_data, result) = (cqueue::Entry::user_data(&entry), entry.result());
            match user_data {
                WAKE => woken = true,
                CANCEL => {}
                _ => {
                    self.messages.finish(user_data);
                    let mut result = result;
                    if let Some(at) = self.accepts.iter().position(|&a| a == user_data) {
                        self.accepts.swap_remove(at);
                        if result >= 0 {
                            let fd = sys::own(result);
                            sys::set_stream_options(&fd);
                            result = self.add_file(fd).0 as i32;
                        }
                    }
                    out.push((user_data, result));
                }
            }
        }
        if woken {
            sys::drain_eventfd(&self.wake);
            self.arm_wake();
            // What was announced may have arrived after the list was looked at.
            self.inbox.take(max, out);
        }
    }

    fn offload(&mut self, user_data: u64, work: Work) -> Result<(), Errno> {
        self.offload.start(user_data, work)
    }

    fn completer(&mut self, user_data: u64) -> Completer {
        Completer::new(user_data, self.inbox.clone())
    }

    fn copy_work(
        &mut self,
        from: FileId,
        to: FileId,
        range: CopyRange,
        how: CopyHow,
    ) -> Result<CopyWork, Errno> {
        // Descriptors of its own: the call may outlive what the ring holds open.
        let (from, to) = (sys::duplicate(self.fd(from)?)?, sys::duplicate(self.fd(to)?)?);
        Ok(Box::new(move || sys::copy_range(&from, &to, range, how)))
    }

    fn offload_threads(&self) -> usize {
        self.offload.threads()
    }

    fn remote_waker(&self) -> RemoteWaker {
        waker(&self.wake)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        if self.event.get().is_none() {
            let event = sys::eventfd().ok()?;
            self.ring.submitter().register_eventfd(event.as_raw_fd()).ok()?;
            // What came before the registration rings no more: have the first poll return at once.
            sys::ring_eventfd(&event);
            let _ = self.event.set(event);
        }
        self.event.get().map(|event| event.as_fd())
    }

    fn register_memory(&mut self, base: NonNull<u8>, bytes: usize) -> Result<u16, Errno> {
        let index = self.buffers_used.iter().position(|used| !used).ok_or(Errno::ENOMEM)?;
        debug_assert!(index < self.fixed_buffers as usize);
        let iovec = libc::iovec { iov_base: base.as_ptr().cast(), iov_len: bytes };
        // SAFETY: the caller keeps the memory mapped until it is unregistered or the ring is gone;
        // the kernel pins its pages meanwhile.
        unsafe { self.ring.submitter().register_buffers_update(index as u32, &[iovec], None) }
            .map_err(|e| Errno::from_io(&e))?;
        self.buffers_used[index] = true;
        Ok(index as u16)
    }

    fn unregister_memory(&mut self, index: u16) {
        let iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: an empty entry takes the place of the registration; no memory is named.
        let result =
            unsafe { self.ring.submitter().register_buffers_update(u32::from(index), &[iovec], None) };
        if result.is_ok()
            && let Some(used) = self.buffers_used.get_mut(index as usize)
        {
            *used = false;
        }
    }

    fn open(&mut self, path: &Path, how: &OpenHow) -> Result<FileId, Errno> {
        let fd = sys::open(path, how)?;
        Ok(self.add_file(fd))
    }

    fn adopt(&mut self, fd: OwnedFd) -> Result<FileId, Errno> {
        Ok(self.add_file(fd))
    }

    fn is_kernel(&self) -> bool {
        true
    }

    fn handle(&self, file: FileId) -> Option<Arc<OwnedFd>> {
        self.files.get(file.0 as usize).map(|entry| entry.fd.clone())
    }

    fn close(&mut self, file: FileId) {
        let Some(entry) = self.files.try_remove(file.0 as usize) else { return };
        // Nothing is in flight on it any more, but the kernel may keep the open file for a while longer: a worker that
        // has told of its last operation's end has yet to let go of it. Locks must not last as long as that.
        if entry.locked {
            let _ = sys::lock(entry.fd.as_fd(), LockRange { start: 0, len: 0 }, libc::F_UNLCK);
        }
        if entry.fixed {
            let _ = self.ring.submitter().register_files_update(file.0, &[-1]);
        }
    }

    fn is_fixed_file(&self, file: FileId) -> bool {
        self.files.get(file.0 as usize).is_some_and(|entry| entry.fixed)
    }

    fn info(&mut self, file: FileId) -> Result<FileInfo, Errno> {
        sys::info(self.fd(file)?)
    }

    fn place_work(&mut self, file: FileId, path: &Path) -> Result<PlaceWork, Errno> {
        // A descriptor of its own, as for a copy.
        let (file, path) = (sys::duplicate(self.fd(file)?)?, path.to_path_buf());
        Ok(Box::new(move || sys::place(&file, &path)))
    }

    fn device_identity(&mut self, file: FileId) -> Result<DeviceIdentity, Errno> {
        Ok(sys::info(self.fd(file)?)?.device.map(sys::device_identity).unwrap_or_default())
    }

    fn set_len(&mut self, file: FileId, len: u64) -> Result<(), Errno> {
        sys::set_len(self.fd(file)?, len)
    }

    fn seek(&mut self, file: FileId, offset: u64, data: bool) -> Result<u64, Errno> {
        sys::seek(self.fd(file)?, offset, data)
    }

    fn lock_shared(&mut self, file: FileId, range: LockRange) -> Result<(), Errno> {
        sys::lock(self.fd(file)?.as_fd(), range, libc::F_RDLCK)?;
        if let Some(entry) = self.files.get_mut(file.0 as usize) {
            entry.locked = true;
        }
        Ok(())
    }

    fn unlock(&mut self, file: FileId, range: LockRange) -> Result<(), Errno> {
        sys::lock(self.fd(file)?.as_fd(), range, libc::F_UNLCK)
    }

    fn lock_conflict(&mut self, file: FileId, range: LockRange) -> Result<bool, Errno> {
        sys::lock_conflict(self.fd(file)?.as_fd(), range)
    }

    fn lock_holders(&mut self, file: FileId, range: LockRange) -> Option<Vec<(u32, String)>> {
        match (self.info(file), self.fd(file)) {
            (Ok(info), Ok(fd)) => sys::lock_holders(info.identity, range, fd.as_raw_fd()),
            _ => Some(Vec::new()),
        }
    }

    fn get_attribute(&mut self, file: FileId, name: &str) -> Result<Option<Vec<u8>>, Errno> {
        sys::get_attribute(self.fd(file)?, name)
    }

    fn set_attribute(&mut self, file: FileId, name: &str, value: Option<&[u8]>) -> Result<(), Errno> {
        sys::set_attribute(self.fd(file)?, name, value)
    }

    fn unlink(&mut self, path: &Path) -> Result<(), Errno> {
        sys::unlink(path)
    }

    fn rename(&mut self, from: &Path, to: &Path, replace: bool) -> Result<(), Errno> {
        sys::rename(from, to, replace)
    }

    fn sync_directory(&mut self, path: &Path) -> Result<(), Errno> {
        sys::sync_directory(path)
    }

    fn lookup(&mut self, path: &Path) -> Result<Option<FileKind>, Errno> {
        sys::lookup(path)
    }

    fn listen(&mut self, address: &SocketAddress) -> Result<(FileId, SocketAddress), Errno> {
        let (fd, address) = sys::listen(address)?;
        Ok((self.add_file(fd), address))
    }

    fn connect(&mut self, address: &SocketAddress) -> Result<FileId, Errno> {
        let fd = sys::connect(address)?;
        sys::set_stream_options(&fd);
        Ok(self.add_file(fd))
    }

    fn socket(&mut self, address: &SocketAddress) -> Result<FileId, Errno> {
        let (fd, peer) = sys::socket_for(address)?;
        sys::set_stream_options(&fd);
        let id = self.add_file(fd);
        if let Some(entry) = self.files.get_mut(id.0 as usize) {
            entry.peer = Some(Box::new(peer));
        }
        Ok(id)
    }

    fn shutdown_stream(&mut self, file: FileId) {
        if let Ok(fd) = self.fd(file) {
            let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
        }
    }

    fn is_peer_gone(&self, file: FileId) -> bool {
        let Ok(fd) = self.fd(file) else { return true };
        // Both are told without being asked for.
        let mut stream = [PollFd::new(&fd, PollFlags::empty())];
        let _ = poll(&mut stream, Some(&Timespec::default()));
        stream[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}
