//! One speed limit for several jobs: what they copy together stays below it, and each gets a fair share.
//!
//! Each job keeps the limit of its own, too. A job that is over leaves by itself.

use std::cell::RefCell;

use blockferry_ring::Ring;

use super::error::JobError;
use super::lifecycle::parse_speed;
use super::runner::Job;
use crate::base::bucket::{BucketGroup, GroupFull};

/// Jobs under one limit.
#[derive(Debug)]
pub struct LimitGroup {
    ring: Ring,
    bucket: BucketGroup,
    members: RefCell<Vec<Job>>,
}

impl LimitGroup {
    /// A group without members. `speed` is in bytes a second, 0 for no limit.
    ///
    /// # Errors
    /// [`JobError::NegativeSpeed`].
    pub fn new(ring: &Ring, speed: i64) -> Result<LimitGroup, JobError> {
        let bucket = BucketGroup::new(ring.now(), parse_speed(speed)?);
        Ok(LimitGroup { ring: ring.clone(), bucket, members: RefCell::default() })
    }

    /// Bytes a second of all members together, 0 for no limit.
    pub fn speed(&self) -> u64 {
        self.bucket.speed()
    }

    /// Adds a job, which leaves the group it was in.
    ///
    /// # Errors
    /// The group has as many members as it may have.
    pub fn add(&self, job: &Job) -> Result<(), GroupFull> {
        job.join(&self.bucket)?;
        let mut members = self.members.borrow_mut();
        members.retain(|member| member.ending().is_none() && !member.is_same(job));
        members.push(job.clone());
        Ok(())
    }

    /// Changes the limit, for all members from this turn on.
    ///
    /// # Errors
    /// [`JobError::NegativeSpeed`].
    pub fn set_speed(&self, speed: i64) -> Result<(), JobError> {
        self.bucket.set_speed(self.ring.now(), parse_speed(speed)?);
        let mut members = self.members.borrow_mut();
        members.retain(|member| member.ending().is_none());
        members.iter().for_each(Job::look_again);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::graph::node::Node;
    use crate::job::convert::{self, ConvertOptions};
    use crate::protocol::{MemDriver, NullDriver};
    use blockferry_ring::sim::{World, WorldConfig};
    use blockferry_ring::{Config, SharedBuf};

    const MIB: u64 = 1 << 20;

    fn node(ring: &Ring, name: &str) -> Rc<Node> {
        Node::new(ring, name, Rc::new(NullDriver::new(ring, name, 64 * MIB, false)))
    }

    async fn full(ring: &Ring, name: &str) -> Rc<Node> {
        let driver = Rc::new(MemDriver::new(ring, name, 64 * MIB, false));
        let mut buf = ring.alloc(MIB as usize).await;
        buf.as_mut_slice().fill(1);
        let buf: SharedBuf = buf.freeze();
        for at in 0..64 {
            use crate::block::{Driver, WriteFlags};
            driver.write(at * MIB, buf.clone(), WriteFlags::default()).await.expect("memory");
        }
        Node::new(ring, name, driver)
    }

    /// Two jobs of 64 MiB under 16 MiB a second take eight seconds together, less what may be saved up; and what is left
    /// takes no time once the limit is gone, however long they had meant to sleep.
    #[test]
    fn members_share_one_limit_and_hear_of_its_change() {
        let world = World::new(WorldConfig::new(1));
        let ring = Ring::with_backend(world.backend(), &Config { arena_bytes: 8 << 20, ..Config::default() })
            .expect("a simulated ring");
        let r = ring.clone();
        ring.block_on(async move {
            let group = LimitGroup::new(&r, 16 << 20).unwrap();
            let mut jobs = Vec::new();
            for i in 0..2 {
                let (from, to) = (full(&r, &format!("s{i}")).await, node(&r, &format!("t{i}")));
                let options = ConvertOptions::new(format!("j{i}"));
                let (job, _) = convert::start(&r, &from, &to, options).await.unwrap();
                group.add(&job).unwrap();
                jobs.push(job);
            }
            let began = r.now();
            r.sleep(4_000_000_000).await;
            let done: u64 = jobs.iter().map(|job| job.progress().offset()).sum();
            assert!((48 * MIB..72 * MIB).contains(&done), "{done}");
            let shares: Vec<u64> = jobs.iter().map(|job| job.progress().offset() / MIB).collect();
            assert!(shares[0].abs_diff(shares[1]) <= 10, "{shares:?}");
            assert!(group.set_speed(-1).is_err());
            group.set_speed(1024).unwrap();
            r.sleep(1_000_000_000).await;
            group.set_speed(0).unwrap();
            for job in &jobs {
                job.until_over().await;
            }
            assert!(r.now() - began < 6_000_000_000, "{}", r.now() - began);
        });
    }
}
