//! The control calls: everything that is not an operation of the ring.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::aside::{FileExtent, look};
use crate::backend::{
    CopyRange, DeviceIdentity, FileInfo, FileKind, LockRange, OpenHow, Place, SocketAddress,
};
use crate::errno::Errno;
use crate::limits::{
    EXTENTS_CALL_NANOS, KEEPALIVE_IDLE_SECS, KEEPALIVE_INTERVAL_SECS, KEEPALIVE_PROBES, LOCK_HOLDERS_NANOS,
};
use crate::op::CopyHow;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// Bytes that one call of `copy_file_range` is asked for: the kernel takes no more than 2 GiB.
const COPY_CALL_BYTES_MAX: usize = 1 << 30;
/// The call that makes a ring, as [`why_forbidden`] names it.
pub(crate) const SETUP_CALL: &str = "io_uring_setup";

pub(crate) fn eventfd() -> Result<OwnedFd, Errno> {
    use rustix::event::EventfdFlags;
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

pub(crate) fn ring_eventfd(fd: &OwnedFd) {
    // EAGAIN means that the counter is full: it is readable, which is all that matters.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

pub(crate) fn drain_eventfd(fd: &OwnedFd) {
    let mut counter = [0u8; 8];
    let _ = rustix::io::read(fd, &mut counter);
}

/// Takes ownership of a descriptor that the kernel has just returned.
pub(crate) fn own(fd: i32) -> OwnedFd {
    // SAFETY: the kernel made this descriptor for the accept that just completed; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

pub(crate) fn random() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is eight writable bytes.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n != 8 {
        // Never seen for eight bytes on a booted kernel; time is random enough for what this is used for.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        return now.map_or(0, |d| d.as_nanos() as u64);
    }
    u64::from_ne_bytes(bytes)
}

pub(crate) fn why_forbidden(call: &str, error: &std::io::Error) -> (String, String) {
    let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if call == SETUP_CALL && matches!(sysctl.trim(), "1" | "2") => (
            format!("the sysctl kernel.io_uring_disabled is {}", sysctl.trim()),
            "Set it to 0 (`sysctl kernel.io_uring_disabled=0`), or, where it is 1, run as a member of the \
             group in kernel.io_uring_group or with CAP_SYS_ADMIN."
                .into(),
        ),
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => (
            format!("{call} was refused ({error})"),
            "A seccomp filter forbids it, as the default profiles of Docker, Podman and systemd services \
             with SystemCallFilter do: allow io_uring_setup, io_uring_enter and io_uring_register (for \
             Docker: --security-opt seccomp=PROFILE.json with these added, or seccomp=unconfined). A kernel \
             built without CONFIG_IO_URING answers the same."
                .into(),
        ),
        Some(libc::ENOMEM) => (
            format!("{call} found no memory ({error})"),
            "Raise RLIMIT_MEMLOCK (`ulimit -l`) or the memory limit of the control group.".into(),
        ),
        _ => (format!("{call} failed ({error})"), "`blockferry doctor` tells what the kernel offers.".into()),
    }
}

pub(crate) fn open(path: &Path, how: &OpenHow) -> Result<OwnedFd, Errno> {
    let mut flags = OFlags::CLOEXEC | if how.write { OFlags::RDWR } else { OFlags::RDONLY };
    if how.direct {
        flags |= OFlags::DIRECT;
    }
    if how.create_new {
        flags |= OFlags::CREATE | OFlags::EXCL;
    } else if how.exclusive_device {
        flags |= OFlags::EXCL;
    }
    let mode = Mode::from_raw_mode(how.mode.unwrap_or(0o644));
    // A FIFO would block here; images are files and devices.
    let fd = rustix::fs::open(path, flags | OFlags::NONBLOCK | OFlags::NOCTTY, mode)?;
    // The kernel lets root open a device for writing that refuses every write.
    if how.write && how.exclusive_device && is_read_only_device(&fd) {
        return Err(Errno::EROFS);
    }
    Ok(fd)
}

/// Whether the kernel says of a block device that nobody writes it.
fn is_read_only_device(fd: &OwnedFd) -> bool {
    let Ok(stat) = rustix::fs::fstat(fd) else { return false };
    let number = stat.st_rdev;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro")).is_ok_and(|ro| ro.trim() == "1")
}

pub(crate) fn rename(from: &Path, to: &Path, replace: bool) -> Result<(), Errno> {
    use rustix::fs::{CWD, RenameFlags, link, renameat_with, unlink};
    if replace {
        return Ok(rustix::fs::rename(from, to)?);
    }
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Some filesystems cannot; but a second name is refused, too, where there is one already.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
            link(from, to)?;
            Ok(unlink(from)?)
        }
        result => Ok(result?),
    }
}

pub(crate) fn info(fd: &OwnedFd) -> Result<FileInfo, Errno> {
    let want = StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN;
    let stat = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, want)?;
    let kind = match FileType::from_raw_mode(u32::from(stat.stx_mode)) {
        FileType::RegularFile => FileKind::Regular,
        FileType::BlockDevice => FileKind::Block,
        _ => FileKind::Other,
    };
    let direct = rustix::fs::fcntl_getfl(fd)?.contains(OFlags::DIRECT);
    let known = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_offset_align != 0;
    let (mut mem_align, mut offset_align) = match (direct, known) {
        (false, _) => (1, 1),
        (true, true) => (stat.stx_dio_mem_align, stat.stx_dio_offset_align),
        // A filesystem that does not say: 4096 is right everywhere.
        (true, false) => (4096, 4096),
    };
    let mut len = stat.stx_size;
    let mut allocated = stat.stx_blocks * 512;
    let mut device = None;
    if kind == FileKind::Block {
        len = rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0))?;
        allocated = len;
        device = Some((stat.stx_rdev_major, stat.stx_rdev_minor));
        if direct && !known {
            let sector = rustix::fs::ioctl_blksszget(fd).unwrap_or(4096);
            (mem_align, offset_align) = (sector.min(4096), sector);
        }
    }
    let identity = (u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor), stat.stx_ino);
    let (mode, group) = (u32::from(stat.stx_mode) & 0o7777, stat.stx_gid);
    let links = stat.stx_nlink.into();
    let is_local = rustix::fs::fstatfs(fd).is_ok_and(|found| is_local(found.f_type));
    Ok(FileInfo {
        kind,
        len,
        allocated,
        mem_align,
        offset_align,
        identity,
        is_local,
        device,
        mode,
        group,
        links,
    })
}

pub(crate) fn place(fd: &OwnedFd, path: &Path) -> Result<Place, Errno> {
    let named = match rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS) {
        Ok(stat) => Some((u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor), stat.stx_ino)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => None,
        Err(errno) => return Err(errno.into()),
    };
    Ok(Place { open: info(fd)?, named })
}

/// What sysfs tells of a block device. A partition has no number of its own; its disk's are taken.
pub(crate) fn device_identity((major, minor): (u32, u32)) -> DeviceIdentity {
    let own = std::path::PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let read = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let partition = read(own.join("partition"));
    // The link leads to the partition's place below its disk.
    let disk = match (&partition, std::fs::canonicalize(&own)) {
        (Some(_), Ok(place)) => place.parent().map_or(own.clone(), Path::to_path_buf),
        _ => own,
    };
    let said = ["wwid", "device/wwid", "serial", "device/serial", "dm/uuid", "md/uuid"];
    let serial = said.into_iter().find_map(|name| read(disk.join(name)));
    DeviceIdentity {
        sequence: read(disk.join("diskseq")).and_then(|text| text.parse().ok()),
        serial: serial.map(|serial| match partition {
            Some(number) => format!("{serial}-part{number}"),
            None => serial,
        }),
    }
}

/// Whether a filesystem of this type is one whose holes are the kernel's own knowledge. What is not known counts as not.
fn is_local(filesystem: rustix::fs::FsWord) -> bool {
    const EXT: rustix::fs::FsWord = 0xef53;
    const XFS: rustix::fs::FsWord = 0x5846_5342;
    const BTRFS: rustix::fs::FsWord = 0x9123_683e;
    const BCACHEFS: rustix::fs::FsWord = 0xca45_1a4e;
    const F2FS: rustix::fs::FsWord = 0xf2f5_2010;
    const ZFS: rustix::fs::FsWord = 0x2fc1_2fc1;
    const TMPFS: rustix::fs::FsWord = 0x0102_1994;
    // Some machines show these as negative numbers of 32 bits.
    let filesystem = filesystem & 0xffff_ffff;
    matches!(filesystem, EXT | XFS | BTRFS | BCACHEFS | F2FS | ZFS | TMPFS)
}

pub(crate) fn set_len(fd: &OwnedFd, len: u64) -> Result<(), Errno> {
    Ok(rustix::fs::ftruncate(fd, len)?)
}

pub(crate) fn seek(fd: &OwnedFd, offset: u64, data: bool) -> Result<u64, Errno> {
    let from = if data { rustix::fs::SeekFrom::Data(offset) } else { rustix::fs::SeekFrom::Hole(offset) };
    Ok(rustix::fs::seek(fd, from)?)
}

/// Blocks, but not for long, unless a single look at the disk takes long.
pub(crate) fn extents(fd: &OwnedFd, from: u64, to: u64, max: usize) -> Result<Vec<FileExtent>, Errno> {
    let end = Instant::now() + Duration::from_nanos(EXTENTS_CALL_NANOS);
    look(from, to, max, |at, data| seek(fd, at, data), || Instant::now() >= end)
}

pub(crate) fn unlink(path: &Path) -> Result<(), Errno> {
    Ok(rustix::fs::unlink(path)?)
}

pub(crate) fn duplicate(fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 0)?)
}

/// Blocks. A reflink is done whole or not at all; an offloaded copy may end early, where the file that is read ends.
pub(crate) fn copy_range(from: &OwnedFd, to: &OwnedFd, range: CopyRange, how: CopyHow) -> Result<u64, Errno> {
    match how {
        CopyHow::Reflink => {
            let clone = libc::file_clone_range {
                src_fd: from.as_raw_fd().into(),
                src_offset: range.from_offset,
                src_length: range.len,
                dest_offset: range.to_offset,
            };
            // SAFETY: both descriptors are open, and the structure is only read, during the call.
            let result = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const clone) };
            if result < 0 { Err(Errno::from_io(&std::io::Error::last_os_error())) } else { Ok(range.len) }
        }
        CopyHow::Offload => {
            let (mut from_offset, mut to_offset) = (range.from_offset, range.to_offset);
            let mut left = range.len;
            while left > 0 {
                let most = usize::try_from(left).unwrap_or(usize::MAX).min(COPY_CALL_BYTES_MAX);
                match rustix::fs::copy_file_range(
                    from,
                    Some(&mut from_offset),
                    to,
                    Some(&mut to_offset),
                    most,
                ) {
                    Ok(0) => break,
                    Ok(n) => left -= (n as u64).min(left),
                    Err(rustix::io::Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            Ok(range.len - left)
        }
    }
}

fn flock(range: LockRange, kind: libc::c_int) -> libc::flock {
    // SAFETY: plain data for which all zeroes is valid; OFD locks want `l_pid` to be 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = range.start as libc::off_t;
    lock.l_len = range.len as libc::off_t;
    lock
}

pub(crate) fn lock(fd: BorrowedFd<'_>, range: LockRange, kind: libc::c_int) -> Result<(), Errno> {
    let lock = flock(range, kind);
    // SAFETY: the descriptor is open, and the structure is read only.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    if result < 0 { Err(Errno::from_io(&std::io::Error::last_os_error())) } else { Ok(()) }
}

pub(crate) fn lock_conflict(fd: BorrowedFd<'_>, range: LockRange) -> Result<bool, Errno> {
    let mut lock = flock(range, libc::F_WRLCK);
    // SAFETY: the descriptor is open, and the kernel writes one `flock` to a valid place.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
    if result < 0 {
        return Err(Errno::from_io(&std::io::Error::last_os_error()));
    }
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Looks through /proc/PID/fdinfo: /proc/locks itself shows no pid for open file description locks. Processes that were
/// killed do not count, nor does the descriptor `besides` of this one. On a machine with very many processes that takes long:
/// after a while it is left at those that were found, or at `None`.
pub(crate) fn lock_holders(
    identity: (u64, u64),
    range: LockRange,
    besides: RawFd,
) -> Option<Vec<(u32, String)>> {
    let (own, besides) = (std::process::id(), besides.to_string());
    let mut holders = Vec::new();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Some(holders) };
    let began = Instant::now();
    for process in processes.flatten() {
        if began.elapsed() > Duration::from_nanos(LOCK_HOLDERS_NANOS) {
            return Some(holders).filter(|holders| !holders.is_empty());
        }
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Ok(entries) = std::fs::read_dir(process.path().join("fdinfo")) else { continue };
        let holds = entries.flatten().any(|entry| {
            let is_asking = pid == own && entry.file_name().to_str() == Some(besides.as_str());
            !is_asking
                && std::fs::read_to_string(entry.path())
                    .is_ok_and(|text| text.lines().any(|line| is_lock_on(line, identity, range)))
        });
        if holds && !is_dying(&process.path()) {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            holders.push((pid, name.trim().to_owned()));
        }
    }
    holders.sort();
    Some(holders)
}

/// The process has been killed, whether it is gone yet or not.
fn is_dying(process: &Path) -> bool {
    let read = |name: &str| std::fs::read_to_string(process.join(name)).unwrap_or_default();
    is_exiting(&read("stat")) || read("status").lines().any(is_kill_pending)
}

/// `PF_EXITING` in the flags of /proc/PID/stat. The name before them may hold anything, even brackets.
fn is_exiting(stat: &str) -> bool {
    const EXITING: u64 = 0x4;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let flags = after_name.split_whitespace().nth(6).and_then(|word| word.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & EXITING != 0)
}

/// A line of /proc/PID/status that shows SIGKILL waiting to be taken.
fn is_kill_pending(line: &str) -> bool {
    let set = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"));
    let set = set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    set.is_some_and(|set| set & 1 << (libc::SIGKILL - 1) != 0)
}

/// A line such as `lock: 1: OFDLCK  ADVISORY  READ -1 fd:00:3412 100 101`.
fn is_lock_on(line: &str, identity: (u64, u64), range: LockRange) -> bool {
    let Some(rest) = line.strip_prefix("lock:") else { return false };
    let words: Vec<&str> = rest.split_whitespace().collect();
    let [.., place, first, last] = words.as_slice() else { return false };
    let mut parts = place.split(':');
    let (Some(major), Some(minor), Some(inode)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    let device = match (u64::from_str_radix(major, 16), u64::from_str_radix(minor, 16)) {
        (Ok(major), Ok(minor)) => major << 32 | minor,
        _ => return false,
    };
    let first: u64 = first.parse().unwrap_or(u64::MAX);
    let last: u64 = if *last == "EOF" { u64::MAX } else { last.parse().unwrap_or(0) };
    inode.parse() == Ok(identity.1)
        && device == identity.0
        && first < range.start.saturating_add(range.len)
        && last >= range.start
}

fn attribute_name(name: &str) -> Result<CString, Errno> {
    CString::new(name).map_err(|_| Errno::EINVAL)
}

pub(crate) fn get_attribute(fd: &OwnedFd, name: &str) -> Result<Option<Vec<u8>>, Errno> {
    let name = attribute_name(name)?;
    let mut value = vec![0u8; 4096];
    match rustix::fs::fgetxattr(fd, name, value.as_mut_slice()) {
        Ok(n) => {
            value.truncate(n);
            Ok(Some(value))
        }
        Err(rustix::io::Errno::NODATA) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

pub(crate) fn set_attribute(fd: &OwnedFd, name: &str, value: Option<&[u8]>) -> Result<(), Errno> {
    let name = attribute_name(name)?;
    let result = match value {
        Some(value) => rustix::fs::fsetxattr(fd, name, value, rustix::fs::XattrFlags::empty()),
        None => rustix::fs::fremovexattr(fd, name),
    };
    match result {
        Err(rustix::io::Errno::NODATA) if value.is_none() => Ok(()),
        other => Ok(other?),
    }
}

pub(crate) fn sync_directory(path: &Path) -> Result<(), Errno> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(rustix::fs::fsync(fd)?)
}

pub(crate) fn lookup(path: &Path) -> Result<Option<FileKind>, Errno> {
    match rustix::fs::stat(path) {
        Ok(stat) => Ok(Some(match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => FileKind::Regular,
            FileType::BlockDevice => FileKind::Block,
            FileType::Socket => FileKind::Socket,
            _ => FileKind::Other,
        })),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// What every connection gets. Unix sockets refuse it: they have no such delay, and their peers do not vanish unseen.
pub(crate) fn set_stream_options(fd: &OwnedFd) {
    use rustix::net::sockopt;
    if sockopt::set_tcp_nodelay(fd, true).is_err() {
        return;
    }
    // A machine that is gone says nothing: ask it, so that its end does not stay half-open for ever. A peer that is there
    // and merely does not read answers the kernel, and stays.
    let _ = sockopt::set_socket_keepalive(fd, true);
    let _ = sockopt::set_tcp_keepidle(fd, Duration::from_secs(KEEPALIVE_IDLE_SECS));
    let _ = sockopt::set_tcp_keepintvl(fd, Duration::from_secs(KEEPALIVE_INTERVAL_SECS));
    let _ = sockopt::set_tcp_keepcnt(fd, KEEPALIVE_PROBES);
}

fn socket(family: AddressFamily) -> Result<OwnedFd, Errno> {
    Ok(rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

fn family(address: &std::net::SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn unix_address(path: &Path) -> Result<rustix::net::SocketAddrUnix, Errno> {
    if path.as_os_str().as_bytes().len() > 107 {
        return Err(Errno::ENAMETOOLONG);
    }
    Ok(rustix::net::SocketAddrUnix::new(path)?)
}

pub(crate) fn listen(address: &SocketAddress) -> Result<(OwnedFd, SocketAddress), Errno> {
    let (fd, address) = match address {
        SocketAddress::Unix(path) => {
            let fd = socket(AddressFamily::UNIX)?;
            listen_unix(&fd, path)?;
            return Ok((fd, address.clone()));
        }
        SocketAddress::Tcp(tcp) => {
            let fd = socket(family(tcp))?;
            rustix::net::sockopt::set_socket_reuseaddr(&fd, true)?;
            rustix::net::bind(&fd, tcp)?;
            let bound = std::net::SocketAddr::try_from(rustix::net::getsockname(&fd)?)?;
            (fd, SocketAddress::Tcp(bound))
        }
    };
    rustix::net::listen(&fd, BACKLOG)?;
    Ok((fd, address))
}

/// The name appears when somebody listens, not before: who finds it can connect. So the socket is bound to another name
/// beside it, where that is not too long, and renamed; unless the name is taken.
fn listen_unix(fd: &OwnedFd, path: &Path) -> Result<(), Errno> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let hidden = format!(".nbd-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let hidden = path.with_file_name(hidden);
    let full = unix_address(path)?;
    let Ok(address) = unix_address(&hidden) else {
        rustix::net::bind(fd, &full)?;
        return Ok(rustix::net::listen(fd, BACKLOG)?);
    };
    rustix::net::bind(fd, &address)?;
    let listening = rustix::net::listen(fd, BACKLOG).map_err(Errno::from);
    let named = listening.and_then(|()| rename(&hidden, path, false));
    named.map_err(|errno| {
        let _ = rustix::fs::unlink(&hidden);
        if errno == Errno::EEXIST { Errno::EADDRINUSE } else { errno }
    })
}

/// A socket, and the address that it is to be connected to.
pub(crate) fn socket_for(address: &SocketAddress) -> Result<(OwnedFd, rustix::net::SocketAddrAny), Errno> {
    match address {
        SocketAddress::Unix(path) => Ok((socket(AddressFamily::UNIX)?, unix_address(path)?.into())),
        SocketAddress::Tcp(tcp) => Ok((socket(family(tcp))?, (*tcp).into())),
    }
}

pub(crate) fn connect(address: &SocketAddress) -> Result<OwnedFd, Errno> {
    match address {
        SocketAddress::Unix(path) => {
            let fd = socket(AddressFamily::UNIX)?;
            rustix::net::connect(fd.as_fd(), &unix_address(path)?)?;
            Ok(fd)
        }
        SocketAddress::Tcp(tcp) => {
            let fd = socket(family(tcp))?;
            rustix::net::connect(fd.as_fd(), tcp)?;
            Ok(fd)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_are_understood() {
        let line = "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:3412 100 101";
        let range = LockRange { start: 101, len: 1 };
        assert!(is_lock_on(line, (0xfe << 32, 3412), range));
        assert!(!is_lock_on(line, (0xfe << 32, 3413), range));
        assert!(!is_lock_on(line, (0xfe << 32, 3412), LockRange { start: 102, len: 5 }));
        assert!(!is_lock_on("pos:\t0", (0, 0), range));
    }

    #[test]
    fn whoever_was_killed_is_known_by_flags_and_signals() {
        let alive = "12 (a) b) S 1 12 12 0 -1 4194560 100 0 0 0";
        let exiting = "12 (a) b) D 1 12 12 0 -1 4194564 100 0 0 0";
        assert!(!is_exiting(alive) && is_exiting(exiting) && !is_exiting(""));
        assert!(is_kill_pending("ShdPnd:\t0000000000000100") && is_kill_pending("SigPnd:\t0000000000000100"));
        assert!(
            !is_kill_pending("ShdPnd:\t0000000000004000") && !is_kill_pending("SigBlk:\t0000000000000100")
        );
    }

    #[test]
    fn a_socket_has_its_name_when_somebody_listens_and_takes_nobody_elses() {
        let folder = std::env::temp_dir().join(format!("blockferry-listen-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let address = SocketAddress::Unix(folder.join("socket"));
        let (first, _) = listen(&address).unwrap();
        assert!(connect(&address).is_ok());
        assert_eq!(listen(&address).map(drop), Err(Errno::EADDRINUSE));
        let names: Vec<_> = std::fs::read_dir(&folder).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["socket"], "nothing else is left beside it");
        drop(first);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
