//! stub
use crate::block::*;
use crate::job::mirror::Marker;
use blockferry_ring::Ring;
use std::path::{Path, PathBuf};
use std::rc::Rc;
#[derive(Clone, Debug, serde::Serialize)]
pub struct MarkInfo {
    pub state: String,
    pub job: String,
    pub source: String,
}
impl MarkInfo {
    pub fn incomplete(job: &str, source: &str) -> MarkInfo {
        MarkInfo { state: "incomplete".into(), job: job.into(), source: source.into() }
    }
}
impl std::fmt::Display for MarkInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {}", self.job, self.source)
    }
}
#[derive(Debug)]
pub struct TargetMark {
    ring: Ring,
    d: Rc<dyn Driver>,
    i: MarkInfo,
}
const N: &str = "user.blockferry.state";
impl TargetMark {
    pub fn new(ring: &Ring, d: Rc<dyn Driver>, _s: Option<PathBuf>, i: MarkInfo) -> TargetMark {
        TargetMark { ring: ring.clone(), d, i }
    }
    pub async fn read(
        ring: &Ring,
        d: &Rc<dyn Driver>,
        _s: Option<&Path>,
    ) -> Result<Option<MarkInfo>, BlockError> {
        Ok(d.local_file()
            .and_then(|f| ring.get_attribute(&f, N).ok().flatten())
            .map(|_| MarkInfo::incomplete("x", "y")))
    }
}
impl Marker for TargetMark {
    fn mark(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            if let Some(f) = self.d.local_file() {
                let _ = self.ring.set_attribute(&f, N, Some(self.i.state.as_bytes()));
                let _ = self.ring.sync(&f, false).await;
            }
            Ok(())
        })
    }
    fn unmark(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            if let Some(f) = self.d.local_file() {
                let _ = self.ring.set_attribute(&f, N, None);
                let _ = self.ring.sync(&f, false).await;
            }
            Ok(())
        })
    }
}
