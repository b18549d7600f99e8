//! Several disks as one that is read, one behind the other; or a part of one.
//!
//! Of several, each begins at a sector: where one ends within one, the rest of that sector reads as zeroes. The disks
//! belong to whoever has opened them, and holds their locks for as long as this one is used.

use std::rc::Rc;

use blockferry_ring::{Buf, Errno, Ring, SharedBuf};

use crate::block::{
    BlockError, Capabilities, Child, Driver, Extent, IoFuture, IoResult, Limits, Node, Operation,
    Permissions, Resolved, Role, WriteFlags, ZeroFlags,
};

const SECTOR_BYTES: u64 = 512;

/// Disks in a row.
#[derive(Debug)]
pub struct JoinedDriver {
    ring: Ring,
    name: String,
    parts: Vec<Part>,
    len: u64,
}

/// One of them: where it begins, and which of its bytes are shown.
#[derive(Debug)]
struct Part {
    start: u64,
    disk: Rc<Child>,
    from: u64,
    len: u64,
}

impl JoinedDriver {
    /// These disks, in this order. `None`: together they are longer than a disk can be.
    pub fn new(ring: &Ring, disks: &[Rc<Node>]) -> Option<JoinedDriver> {
        let name = disks.iter().map(|disk| disk.driver().name()).collect::<Vec<_>>().join("' and '");
        let (mut parts, mut len) = (Vec::new(), 0u64);
        for disk in disks {
            let end = len.checked_add(disk.len().checked_next_multiple_of(SECTOR_BYTES)?)?;
            let (start, held) = (std::mem::replace(&mut len, end), disk.len());
            let disk = Child::inner(disk, Role::Filtered, name.as_str());
            parts.push(Part { start, disk, from: 0, len: held });
        }
        (len <= crate::base::limits::DISK_LEN_MAX).then(|| JoinedDriver {
            ring: ring.clone(),
            name,
            parts,
            len,
        })
    }

    /// The bytes of `disk` from `from` on, `len` of them; as many as there are.
    pub fn part(ring: &Ring, disk: &Rc<Node>, from: u64, len: u64) -> JoinedDriver {
        let from = from.min(disk.len());
        let len = len.min(disk.len() - from);
        let name = disk.driver().name().to_owned();
        let disk = Child::inner(disk, Role::Filtered, name.as_str());
        JoinedDriver { ring: ring.clone(), name, parts: vec![Part { start: 0, disk, from, len }], len }
    }

    /// Where `offset` lies: the disk, the offset there, the bytes that it has from there on, and those up to where the next
    /// one begins.
    fn at(&self, offset: u64) -> Option<(Rc<Node>, u64, u64, u64)> {
        let next = self.parts.partition_point(|part| part.start <= offset);
        // Of those that begin there, all but the last are empty.
        let part = self.parts.get(next.checked_sub(1)?)?;
        let end = self.parts.get(next).map_or(self.len, |part| part.start);
        let inside = offset - part.start;
        (offset < end)
            .then(|| (part.disk.node(), part.from + inside, part.len.saturating_sub(inside), end - offset))
    }

    async fn read_across(&self, offset: u64, buf: Buf) -> (Buf, IoResult) {
        let (mut at, mut rest, mut outcome) = (offset, Some(buf), Ok(()));
        let mut whole: Option<Buf> = None;
        while let Some(mut piece) = rest.take() {
            let Some((disk, inside, held, room)) = self.at(at) else {
                outcome = outcome.and(Err(self.refusal(Operation::Read)));
                whole = joined(whole, piece);
                break;
            };
            let n = if held > 0 { held } else { room };
            if (piece.len() as u64) > n {
                let (front, back) = piece.split_at(n as usize);
                (piece, rest) = (front, Some(back));
            }
            at += piece.len() as u64;
            if held > 0 {
                let (back, result) = disk.read(inside, piece).await;
                (piece, outcome) = (back, outcome.and(result));
            } else {
                piece.fill_zero();
            }
            whole = joined(whole, piece);
        }
        match whole {
            Some(buf) => (buf, outcome),
            None => unreachable!("there was a buffer"),
        }
    }

    fn refusal(&self, operation: Operation) -> BlockError {
        BlockError::new(operation, self.name.clone(), Errno::EROFS).because("Disks in a row are only read.")
    }

    fn refused(&self, operation: Operation) -> IoFuture<'_, IoResult> {
        let error = self.refusal(operation);
        self.ring.boxed(async move { Err(error) })
    }
}

fn joined(front: Option<Buf>, back: Buf) -> Option<Buf> {
    match front {
        None => Some(back),
        Some(front) => match front.unsplit(back) {
            Ok(buf) => Some(buf),
            Err(_) => unreachable!("the parts of one buffer join again"),
        },
    }
}

impl Driver for JoinedDriver {
    fn kind(&self) -> &'static str {
        "joined"
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        let all = self.parts.iter().map(|part| part.disk.node().limits());
        let stricter = |a: Limits, b: Limits| Limits {
            request_align: a.request_align.max(b.request_align),
            mem_align: a.mem_align.max(b.mem_align),
            transfer_max: a.transfer_max.min(b.transfer_max),
            transfer_best: a.transfer_best.min(b.transfer_best),
            cluster_size: a.cluster_size.max(b.cluster_size),
            ..a
        };
        all.reduce(stricter).unwrap_or_default()
    }

    fn capabilities(&self) -> Capabilities {
        let status = self.parts.iter().any(|part| part.disk.node().capabilities().status);
        Capabilities { status, ..Capabilities::default() }
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        match self.at(offset) {
            Some((disk, inside, held, _)) if buf.len() as u64 <= held => {
                self.ring.boxed(async move { disk.read(inside, buf).await })
            }
            _ => self.ring.boxed(self.read_across(offset, buf)),
        }
    }

    fn write(&self, _offset: u64, _buf: SharedBuf, _flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.refused(Operation::Write)
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async { Ok(()) })
    }

    fn discard(&self, _offset: u64, _len: u64) -> IoFuture<'_, IoResult> {
        self.refused(Operation::Discard)
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.refused(Operation::WriteZeroes)
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        match self.at(offset) {
            Some((disk, inside, held, _)) if held > 0 => {
                self.ring.boxed(async move { disk.block_status(inside, len.min(held)).await })
            }
            Some((_, _, _, room)) => {
                let len = len.min(room);
                self.ring.boxed(async move { Ok(Extent::hole(len)) })
            }
            None => {
                let error = self.refusal(Operation::BlockStatus);
                self.ring.boxed(async move { Err(error) })
            }
        }
    }

    fn resolve(&self, offset: u64, len: u64) -> Resolved {
        match self.at(offset) {
            Some((disk, inside, held, _)) if len <= held => disk.resolve(inside, len),
            _ => Resolved::Ask,
        }
    }

    fn children(&self) -> Vec<Rc<Child>> {
        self.parts.iter().map(|part| part.disk.clone()).collect()
    }

    fn set_permissions(&self, _permissions: Permissions) -> IoResult {
        // Who has opened the disks holds their locks.
        Ok(())
    }

    fn set_len(&self, _len: u64) -> IoFuture<'_, IoResult> {
        self.refused(Operation::Resize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::mem::MemDriver;
    use blockferry_ring::Config;

    #[test]
    fn every_read_gives_what_lies_there() {
        let ring = Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring");
        let r = ring.clone();
        ring.block_on(async move {
            let (mut disks, mut all) = (Vec::new(), Vec::new());
            for (n, len) in [1000u64, 0, 512, 1, 2048].into_iter().enumerate() {
                let disk = Rc::new(MemDriver::new(&r, format!("d{n}"), len, false));
                if len > 0 {
                    let mut buf = r.alloc(len as usize).await;
                    let bytes = buf.as_mut_slice();
                    bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 7 + n * 31) as u8 | 1);
                    all.extend_from_slice(bytes);
                    disk.write(0, buf.freeze(), WriteFlags::default()).await.unwrap();
                }
                all.resize(all.len().next_multiple_of(512), 0);
                disks.push(Node::new(&r, format!("d{n}"), disk));
            }
            let whole = JoinedDriver::new(&r, &disks).unwrap();
            assert_eq!((whole.len(), whole.name()), (4096, "d0' and 'd1' and 'd2' and 'd3' and 'd4"));
            for at in (0..all.len()).step_by(97) {
                for len in [1, 24, 512, 1300, all.len() - at] {
                    let len = len.min(all.len() - at);
                    let (buf, result) = whole.read(at as u64, r.alloc(len).await).await;
                    result.unwrap();
                    let mut found = vec![0; len];
                    buf.copy_to(0, &mut found);
                    assert!(found == all[at..at + len], "{len} bytes at {at}");
                    let extent = whole.block_status(at as u64, len as u64).await.unwrap();
                    assert!(extent.len > 0 && extent.len <= len as u64);
                    if extent.zero {
                        assert!(all[at..at + extent.len as usize].iter().all(|byte| *byte == 0));
                    }
                }
            }
            let inner = JoinedDriver::part(&r, &Node::new(&r, "w", Rc::new(whole)), 1500, 700);
            let (buf, result) = inner.read(3, r.alloc(697).await).await;
            result.unwrap();
            let mut found = vec![0; 697];
            buf.copy_to(0, &mut found);
            assert!(inner.len() == 700 && found == all[1503..2200]);
            let whole = JoinedDriver::part(&r, &Node::new(&r, "i", Rc::new(inner)), 600, 5000);
            assert_eq!(
                (whole.len(), JoinedDriver::part(&r, &Node::new(&r, "w", Rc::new(whole)), 101, 1).len()),
                (100, 0)
            );
        });
        let r = ring.clone();
        ring.block_on(async move {
            let disk = Rc::new(MemDriver::new(&r, "m", 512, false));
            let whole = JoinedDriver::part(&r, &Node::new(&r, "m", disk), 0, 512);
            assert!(whole.write(0, r.alloc(1).await.freeze(), WriteFlags::default()).await.is_err());
        });
    }

    #[test]
    fn disks_that_are_too_long_together_are_refused() {
        let ring = Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring");
        let disk = |len| Node::new(&ring, "m", Rc::new(MemDriver::new(&ring, "m", len, true)));
        let max = crate::base::limits::DISK_LEN_MAX;
        assert!(JoinedDriver::new(&ring, &[disk(max), disk(1 << 20)]).is_none());
        assert!(JoinedDriver::new(&ring, &[disk(1 << 20), disk(1 << 20)]).is_some());
    }
}
