//! Emptying an image, so that it shows its backing file: what `commit` does with an overlay whose data has gone down.
//!
//! One write of the header switches over to an L1 table without entries; then the references of the old one are dropped. A
//! power cut leaves the image as it was or empty, and at worst clusters that nobody uses.

use super::count::Counts;
use super::entry::OFFSET_MASK;
use super::image::{Fault, Qcow2};
use crate::base::range::ByteRange;
use crate::block::serial::LockKind;

impl Qcow2 {
    pub(super) async fn make_empty_image(&self) -> Result<(), Fault> {
        self.check_writable()?;
        self.mark_bitmaps().await?;
        let _claim = self.claims.enter(ByteRange::ALL, LockKind::Exclusive).await;
        self.write_back().await?;
        let now = self.meta.borrow().l1.entries.clone();
        if now.iter().all(|entry| entry & OFFSET_MASK == 0) {
            return Ok(());
        }
        let old = match &self.data_file {
            None => self.references(&now).await?,
            // What lies in a data file is not counted.
            Some(_) => self.tables_of(&now)?,
        };
        self.move_l1(vec![0; now.len()], None).await?;
        {
            let mut meta = self.meta.borrow_mut();
            meta.l2.forget(0, u64::MAX);
            meta.l2_tables.clear();
        }
        self.packing.reset();
        self.drop_references(&old).await
    }

    fn tables_of(&self, l1: &[u64]) -> Result<Counts, Fault> {
        let mut counts = Counts::default();
        for host in l1.iter().map(|entry| entry & OFFSET_MASK).filter(|host| *host != 0) {
            if !counts.add(host >> self.g.cluster_bits) {
                return Err(Fault::Damage("its tables are scattered too widely".into()));
            }
        }
        Ok(counts)
    }
}
