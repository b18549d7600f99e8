//! One ring's view of the world: the [`Backend`] of the simulator.
//!
//! When the power goes, the rings of that time are dead: what they had in flight ends with `EIO`, every
//! call fails with `EIO`, and their clocks run on by themselves so that their tasks can end.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::World;
use super::faults::OpKind;
use super::flight::{Port, Queued, Target};
use super::inner::Inner;
use super::trace::{Entry, Hash};
use crate::Nanos;
use crate::backend::{
    Backend, CopyRange, CopyWork, DeviceIdentity, FileInfo, FileKind, LockRange, OpenHow, Place, PlaceWork,
    RemoteWaker, SocketAddress, Wait, Work,
};
use crate::errno::Errno;
use crate::external::{Completer, Inbox};
use crate::op::{CopyHow, FileId, Op};

/// When a world begins, in seconds since 1970.
const EPOCH_SECS: u64 = 1_700_000_000;
/// What looking at the clock costs.
const LOOK_NANOS: Nanos = 1_000;

/// A ring's backend in a simulated [`World`].
#[derive(Debug)]
pub struct SimBackend {
    world: World,
    port: u32,
    woken: Arc<AtomicBool>,
    inbox: Arc<Inbox>,
}

impl SimBackend {
    pub(super) fn new(world: World) -> SimBackend {
        let woken = Arc::new(AtomicBool::new(false));
        let inbox = Inbox::new(waker(&woken));
        let port = {
            let mut inner = world.0.borrow_mut();
            let port = inner.next() as u32;
            let state = Port {
                queue: Vec::new(),
                ended: Default::default(),
                inbox: inbox.clone(),
                dead: None,
                memory: Vec::new(),
            };
            inner.ports.insert(port, state);
            port
        };
        SimBackend { world, port, woken, inbox }
    }

    /// Runs a control call that faults of `kind` may fail, on what goes by the name that `label` gives.
    fn control<T>(
        &mut self,
        kind: OpKind,
        label: impl FnOnce(&Inner) -> Option<String>,
        call: impl FnOnce(&mut Inner, u32) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut inner = self.world.0.borrow_mut();
        let inner = &mut *inner;
        if inner.is_dead(self.port) {
            return Err(Errno::EIO);
        }
        let label = label(inner).ok_or(Errno::EBADF)?;
        let verdict = inner.faults.decide(kind, &label, &mut inner.fault_rand);
        let result = match verdict.error {
            Some(errno) => Err(errno),
            None => call(inner, self.port),
        };
        let number = result.as_ref().map_or_else(|errno| -i64::from(errno.0), |_| 0);
        let content = Hash::of(label.as_bytes());
        let file = u64::from(self.port);
        inner.note(Entry { what: "control", file, offset: kind as u64, len: 0, result: number, content });
        result
    }

    fn control_file<T>(
        &mut self,
        kind: OpKind,
        file: FileId,
        call: impl FnOnce(&mut Inner, u64) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.control(
            kind,
            |inner| inner.files.get(&file.0).map(|open| open.label.to_string()),
            |inner, _| match inner.files.get(&file.0).map(|open| open.target) {
                Some(Target::Disk(number)) => call(inner, number),
                _ => Err(Errno::EINVAL),
            },
        )
    }
}

impl Drop for SimBackend {
    fn drop(&mut self) {
        // A world that is borrowed is one that panics already.
        if let Ok(mut inner) = self.world.0.try_borrow_mut() {
            inner.end_port(self.port);
        }
    }
}

fn waker(woken: &Arc<AtomicBool>) -> RemoteWaker {
    let woken = woken.clone();
    RemoteWaker::new(move || woken.store(true, Ordering::Release))
}

fn shown(path: &Path) -> Option<String> {
    Some(path.display().to_string())
}

impl Inner {
    fn is_dead(&self, port: u32) -> bool {
        self.ports.get(&port).is_none_or(|p| p.dead.is_some())
    }

    fn ended(&self, port: u32) -> usize {
        self.ports.get(&port).map_or(0, |p| p.ended.len() + usize::from(!p.inbox.is_empty()))
    }

    /// Lets time pass until there is what `wait` asks for.
    fn wait(&mut self, port: u32, wait: Wait) {
        let content_at = match wait.min_wait_usec {
            0 => Nanos::MAX,
            usec => self.now + Nanos::from(usec) * 1_000,
        };
        loop {
            let ended = self.ended(port);
            if ended >= wait.want || (ended > 0 && self.now >= content_at) {
                return;
            }
            let mut until = wait.deadline;
            if ended > 0 && content_at < Nanos::MAX {
                until = Some(until.map_or(content_at, |deadline| deadline.min(content_at)));
            }
            match (self.next_event(), until) {
                (Some(time), until) if until.is_none_or(|until| time <= until) => self.step(),
                (_, Some(until)) => {
                    self.now = self.now.max(until);
                    return;
                }
                (_, None) => return,
            }
        }
    }

    /// What a ring sees after its power went.
    fn enter_dead(&mut self, port: u32, wait: Wait) {
        let Some(port) = self.ports.get_mut(&port) else { return };
        for queued in std::mem::take(&mut port.queue) {
            if let Queued::Op(user_data, _) = queued {
                port.ended.push_back((user_data, -libc::EIO));
            }
        }
        if let Some(now) = &mut port.dead {
            *now += 1_000;
            if wait.want > 0 && port.ended.is_empty() {
                *now = wait.deadline.map_or(*now, |deadline| deadline.max(*now));
            }
        }
    }
}

impl Backend for SimBackend {
    fn describe(&self) -> Vec<String> {
        vec![format!("simulated world, seed {}", self.world.0.borrow().config.seed)]
    }

    fn now(&self) -> Nanos {
        let mut inner = self.world.0.borrow_mut();
        // A look takes time, so that a turn whose tasks never stop yielding meets its bound.
        match inner.ports.get_mut(&self.port).and_then(|p| p.dead.as_mut()) {
            Some(now) => {
                *now += LOOK_NANOS;
                *now
            }
            None => {
                inner.now += LOOK_NANOS;
                inner.now
            }
        }
    }

    fn unix_secs(&self) -> u64 {
        EPOCH_SECS + self.world.0.borrow().now / 1_000_000_000
    }

    fn random(&mut self) -> u64 {
        self.world.0.borrow_mut().user_rand.next_u64()
    }

    fn push(&mut self, user_data: u64, op: &Op) -> bool {
        let mut inner = self.world.0.borrow_mut();
        let entries = inner.config.queue_entries;
        let Some(port) = inner.ports.get_mut(&self.port).filter(|p| p.queue.len() < entries) else {
            return false;
        };
        port.queue.push(Queued::Op(user_data, *op));
        true
    }

    fn cancel(&mut self, user_data: u64) {
        let mut inner = self.world.0.borrow_mut();
        if let Some(port) = inner.ports.get_mut(&self.port) {
            port.queue.push(Queued::Cancel(user_data));
        }
    }

    fn enter(&mut self, wait: Wait) -> Result<bool, Errno> {
        let mut inner = self.world.0.borrow_mut();
        if inner.is_dead(self.port) {
            inner.enter_dead(self.port, wait);
            return Ok(true);
        }
        inner.submit_queue(self.port);
        inner.run_due();
        let woken = self.woken.swap(false, Ordering::AcqRel);
        if wait.want > 0 && !woken {
            if inner.ended(self.port) == 0 {
                inner.wait(self.port, wait);
            }
        } else {
            let span_max = inner.config.turn_nanos_max;
            let span = inner.rand.below(span_max + 1);
            inner.now += span;
            inner.run_due();
        }
        Ok(true)
    }

    fn has_completions(&mut self) -> bool {
        self.world.0.borrow().ended(self.port) > 0
    }

    fn reap(&mut self, max: usize, out: &mut Vec<(u64, i32)>) {
        let mut inner = self.world.0.borrow_mut();
        if let Some(port) = inner.ports.get_mut(&self.port) {
            let n = port.ended.len().min(max.saturating_sub(out.len()));
            out.extend(port.ended.drain(..n));
        }
        // What ends outside ends in a world without time: at the next look.
        self.inbox.take(max, out);
    }

    fn offload(&mut self, user_data: u64, work: Work) -> Result<(), Errno> {
        let mut inner = self.world.0.borrow_mut();
        if inner.is_dead(self.port) {
            return Err(Errno::EIO);
        }
        inner.offload(self.port, user_data, work);
        Ok(())
    }

    fn completer(&mut self, user_data: u64) -> Completer {
        Completer::new(user_data, self.inbox.clone())
    }

    fn copy_work(&mut self, _: FileId, _: FileId, _: CopyRange, _: CopyHow) -> Result<CopyWork, Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn offload_threads(&self) -> usize {
        0
    }

    fn remote_waker(&self) -> RemoteWaker {
        waker(&self.woken)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn register_memory(&mut self, base: NonNull<u8>, bytes: usize) -> Result<u16, Errno> {
        let mut inner = self.world.0.borrow_mut();
        let bytes_max = inner.config.registered_bytes_max;
        let port = inner.ports.get_mut(&self.port).ok_or(Errno::EIO)?;
        let used: usize = port.memory.iter().flatten().map(|(_, bytes)| bytes).sum();
        if bytes_max.is_some_and(|max| used + bytes > max) {
            return Err(Errno::ENOMEM);
        }
        let index = port.memory.iter().position(Option::is_none).unwrap_or(port.memory.len());
        if index >= crate::limits::FIXED_BUFFERS as usize {
            return Err(Errno::ENOMEM);
        }
        if index == port.memory.len() {
            port.memory.push(None);
        }
        port.memory[index] = Some((base.as_ptr().addr(), bytes));
        Ok(index as u16)
    }

    fn unregister_memory(&mut self, index: u16) {
        let mut inner = self.world.0.borrow_mut();
        if let Some(place) = inner.ports.get_mut(&self.port).and_then(|p| p.memory.get_mut(index as usize)) {
            *place = None;
        }
    }

    fn open(&mut self, path: &Path, how: &OpenHow) -> Result<FileId, Errno> {
        self.control(OpKind::Open, |_| shown(path), |inner, port| inner.open(port, path, how))
    }

    fn adopt(&mut self, _: OwnedFd) -> Result<FileId, Errno> {
        Err(Errno::ENOSYS)
    }

    fn close(&mut self, file: FileId) {
        self.world.0.borrow_mut().close(file.0);
    }

    fn is_fixed_file(&self, _: FileId) -> bool {
        true
    }

    fn info(&mut self, file: FileId) -> Result<FileInfo, Errno> {
        self.control_file(OpKind::Info, file, |inner, number| {
            let direct = inner.files.get(&file.0).is_some_and(|open| open.direct);
            let inode = inner.fs.inodes.get(&number).ok_or(Errno::EBADF)?;
            Ok(inode.info(number, direct))
        })
    }

    fn place_work(&mut self, file: FileId, path: &Path) -> Result<PlaceWork, Errno> {
        let place = self.control_file(OpKind::Info, file, |inner, number| {
            let direct = inner.files.get(&file.0).is_some_and(|open| open.direct);
            let inode = inner.fs.inodes.get(&number).ok_or(Errno::EBADF)?;
            let links = inner.fs.names.live().values().filter(|named| **named == number).count() as u64;
            let named = inner.fs.find(path).map(|named| (1, named));
            Ok(Place { open: FileInfo { links, ..inode.info(number, direct) }, named })
        })?;
        Ok(Box::new(move || Ok(place)))
    }

    fn device_identity(&mut self, file: FileId) -> Result<DeviceIdentity, Errno> {
        let device = self.info(file)?.device;
        Ok(DeviceIdentity { sequence: device.map(|(_, minor)| minor.into()), serial: None })
    }

    fn set_len(&mut self, file: FileId, len: u64) -> Result<(), Errno> {
        self.control_file(OpKind::SetLen, file, |inner, number| inner.set_len(file, number, len))
    }

    fn seek(&mut self, file: FileId, offset: u64, data: bool) -> Result<u64, Errno> {
        self.control_file(OpKind::Seek, file, |inner, number| inner.seek(number, offset, data))
    }

    fn lock_shared(&mut self, file: FileId, range: LockRange) -> Result<(), Errno> {
        self.control_file(OpKind::Lock, file, |inner, number| {
            let inode = inner.fs.inodes.get_mut(&number).ok_or(Errno::EBADF)?;
            inode.lock(file.0, range);
            Ok(())
        })
    }

    fn unlock(&mut self, file: FileId, range: LockRange) -> Result<(), Errno> {
        self.control_file(OpKind::Lock, file, |inner, number| {
            let inode = inner.fs.inodes.get_mut(&number).ok_or(Errno::EBADF)?;
            inode.unlock(file.0, range);
            Ok(())
        })
    }

    fn lock_conflict(&mut self, file: FileId, range: LockRange) -> Result<bool, Errno> {
        self.control_file(OpKind::Lock, file, |inner, number| {
            let inode = inner.fs.inodes.get(&number).ok_or(Errno::EBADF)?;
            Ok(inode.lock_conflict(file.0, range))
        })
    }

    fn lock_holders(&mut self, file: FileId, range: LockRange) -> Option<Vec<(u32, String)>> {
        Some(match self.lock_conflict(file, range) {
            Ok(true) => vec![(0, "simulated".into())],
            _ => Vec::new(),
        })
    }

    fn get_attribute(&mut self, file: FileId, name: &str) -> Result<Option<Vec<u8>>, Errno> {
        self.control_file(OpKind::GetAttribute, file, |inner, number| {
            let inode = inner.fs.inodes.get(&number).ok_or(Errno::EBADF)?;
            if !inode.model.attributes {
                return Err(Errno::EOPNOTSUPP);
            }
            Ok(inode.attributes.live().get(name).cloned())
        })
    }

    fn set_attribute(&mut self, file: FileId, name: &str, value: Option<&[u8]>) -> Result<(), Errno> {
        self.control_file(OpKind::SetAttribute, file, |inner, number| {
            let now = inner.next();
            let inode = inner.fs.inodes.get_mut(&number).ok_or(Errno::EBADF)?;
            if !inode.model.attributes {
                return Err(Errno::EOPNOTSUPP);
            }
            inode.attributes.change(now, vec![(name.to_owned(), value.map(<[u8]>::to_vec))]);
            Ok(())
        })
    }

    fn unlink(&mut self, path: &Path) -> Result<(), Errno> {
        self.control(
            OpKind::Unlink,
            |_| shown(path),
            |inner, _| {
                inner.fs.find(path).ok_or(Errno::ENOENT)?;
                let now = inner.next();
                inner.fs.names.change(now, vec![(path.to_path_buf(), None)]);
                Ok(())
            },
        )
    }

    fn rename(&mut self, from: &Path, to: &Path, replace: bool) -> Result<(), Errno> {
        self.control(
            OpKind::Rename,
            |_| shown(from),
            |inner, _| {
                let number = inner.fs.find(from).ok_or(Errno::ENOENT)?;
                if !inner.fs.has_directory(to.parent().unwrap_or(Path::new(""))) {
                    return Err(Errno::ENOENT);
                }
                if !replace && inner.fs.find(to).is_some() {
                    return Err(Errno::EEXIST);
                }
                if inner.fs.find(to) != Some(number) {
                    let now = inner.next();
                    let changes = vec![(from.to_path_buf(), None), (to.to_path_buf(), Some(number))];
                    inner.fs.names.change(now, changes);
                }
                Ok(())
            },
        )
    }

    fn sync_directory(&mut self, path: &Path) -> Result<(), Errno> {
        self.control(
            OpKind::SyncDirectory,
            |_| shown(path),
            |inner, _| {
                if !inner.fs.has_directory(path) {
                    return Err(Errno::ENOENT);
                }
                inner.fs.sync_directory(path);
                Ok(())
            },
        )
    }

    fn lookup(&mut self, path: &Path) -> Result<Option<FileKind>, Errno> {
        self.control(
            OpKind::Lookup,
            |_| shown(path),
            |inner, _| {
                let kind = inner.fs.inode(path).map(|inode| inode.model.kind);
                Ok(kind.or(inner.fs.has_directory(path).then_some(FileKind::Other)))
            },
        )
    }

    fn listen(&mut self, address: &SocketAddress) -> Result<(FileId, SocketAddress), Errno> {
        let label = address.to_string();
        self.control(OpKind::Listen, |_| Some(label), |inner, port| inner.listen(port, address))
    }

    fn connect(&mut self, address: &SocketAddress) -> Result<FileId, Errno> {
        let label = address.to_string();
        self.control(OpKind::Connect, |_| Some(label), |inner, port| inner.connect(port, address))
    }

    fn socket(&mut self, address: &SocketAddress) -> Result<FileId, Errno> {
        let mut inner = self.world.0.borrow_mut();
        if inner.is_dead(self.port) {
            return Err(Errno::EIO);
        }
        Ok(inner.socket(self.port, address))
    }

    fn shutdown_stream(&mut self, file: FileId) {
        let mut inner = self.world.0.borrow_mut();
        if let Some(target) = inner.files.get(&file.0).map(|open| open.target) {
            inner.shutdown(target);
        }
    }

    fn is_peer_gone(&self, file: FileId) -> bool {
        let inner = self.world.0.borrow();
        inner.files.get(&file.0).is_none_or(|open| inner.is_peer_gone(open.target))
    }
}
