//! How fast a place is, found out in a moment on a small file of its own.
//!
//! The demo should end within a minute on any disk, and its job has to catch up with its client. Two things decide that:
//! how many bytes a second go to the disk one after the other, and how many small writes a second go to any places. What
//! is found is flattered by caches; the margins below leave room for that.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::{Nanos, Ring};

use super::client::BLOCK_BYTES;
use super::disk::Disk;
use super::scratch::DISK_BYTES_MIN;
use crate::base::rng::Rng;
use crate::base::units::NS_PER_SEC;
use crate::block::{BlockError, Driver, WriteFlags};

/// Bytes of the file.
const BYTES: u64 = 48 << 20;
/// How long small writes are tried.
const SMALL_NS: Nanos = 250_000_000;
/// Small writes in flight.
const WRITERS: u64 = 8;
/// Filling the disk should not take longer than this.
const FILL_NS_MAX: Nanos = 5 * NS_PER_SEC;
/// Writes a second of the client where nothing stands against it.
const RATE: u64 = 2000;
/// Each small write may have the job copy 64 KiB anew. Four times as much should go to the disk in that time.
const BYTES_PER_WRITE: u64 = 4 * (64 << 10);
/// Of the small writes that the place can take, this part is the client's.
const WRITES_DIVISOR: u64 = 4;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speed {
    /// Bytes a second, written in order.
    pub bytes_per_sec: u64,
    /// Small writes a second, to any places.
    pub writes_per_sec: u64,
}

/// Bytes of the probe's file, where a disk of `disk_bytes` is possible.
pub fn bytes(disk_bytes: u64) -> u64 {
    BYTES.min(disk_bytes)
}

/// Writes to all of `driver`, then here and there.
pub async fn measure(ring: &Ring, driver: &Rc<dyn Driver>) -> Result<Speed, BlockError> {
    let file = Disk { bytes: driver.len(), seed: 0 };
    let began = ring.clock();
    file.fill(ring, driver, file.bytes).await?;
    let bytes_per_sec = per_sec(file.data_bytes(), ring.clock() - began);
    let (began, written) = (ring.clock(), Rc::new(Cell::new(0)));
    let writers: Vec<_> = (0..WRITERS)
        .map(|lane| {
            let (r, driver, written) = (ring.clone(), driver.clone(), written.clone());
            ring.spawn_with_result(async move {
                let mut rng = Rng::new(lane);
                let mut buf = r.alloc(BLOCK_BYTES as usize).await;
                rng.fill(buf.as_mut_slice());
                let buf = buf.freeze();
                while r.clock() < began + SMALL_NS {
                    let block = rng.below(driver.len() / u64::from(BLOCK_BYTES));
                    driver.write(block * u64::from(BLOCK_BYTES), buf.clone(), WriteFlags::default()).await?;
                    written.set(written.get() + 1);
                }
                Ok(())
            })
        })
        .collect();
    for writer in writers {
        writer.take().await?;
    }
    Ok(Speed { bytes_per_sec, writes_per_sec: per_sec(written.get(), ring.clock() - began) })
}

fn per_sec(count: u64, took_ns: Nanos) -> u64 {
    let rate = u128::from(count) * u128::from(NS_PER_SEC) / u128::from(took_ns.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

impl Speed {
    /// The disk that can be filled in good time, where there is room for `room` bytes.
    pub fn disk_bytes(&self, room: u64) -> u64 {
        let possible = u128::from(self.bytes_per_sec) * u128::from(FILL_NS_MAX) / u128::from(NS_PER_SEC);
        let steps = u64::try_from(possible).unwrap_or(u64::MAX) / DISK_BYTES_MIN;
        room.min(steps.max(1).saturating_mul(DISK_BYTES_MIN))
    }

    /// The client's writes a second.
    pub fn rate(&self) -> u64 {
        RATE.min(self.bytes_per_sec / BYTES_PER_WRITE).min(self.writes_per_sec / WRITES_DIVISOR).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn slow_places_get_less() {
        let ssd = Speed { bytes_per_sec: 1000 * MIB, writes_per_sec: 50_000 };
        assert_eq!((ssd.disk_bytes(1024 * MIB), ssd.rate()), (1024 * MIB, 2000));
        let hdd = Speed { bytes_per_sec: 120 * MIB, writes_per_sec: 200 };
        assert_eq!((hdd.disk_bytes(1024 * MIB), hdd.rate()), (592 * MIB, 50));
        let cloud = Speed { bytes_per_sec: 125 * MIB, writes_per_sec: 3000 };
        assert_eq!((cloud.disk_bytes(1024 * MIB), cloud.rate()), (624 * MIB, 500));
        let stone = Speed { bytes_per_sec: 0, writes_per_sec: 0 };
        assert_eq!((stone.disk_bytes(1024 * MIB), stone.rate()), (DISK_BYTES_MIN, 1));
        assert_eq!(Speed { bytes_per_sec: u64::MAX, ..ssd }.disk_bytes(77 * MIB), 77 * MIB);
    }

    #[test]
    fn a_disk_in_memory_is_measured() {
        let ring = Ring::new(&blockferry_ring::Config::default()).unwrap();
        let driver =
            crate::engine::open::open_as_said(&ring, "mem:16MiB", &crate::engine::ImageOptions::raw());
        let (r, driver) = (ring.clone(), driver.unwrap());
        let speed = ring.block_on(async move { measure(&r, driver.driver()).await }).unwrap();
        assert!(speed.bytes_per_sec > 0 && speed.writes_per_sec > 0, "{speed:?}");
        assert_eq!(ring.shutdown(NS_PER_SEC).leaked, 0);
    }
}
