//! Locks that others hold: how long one is waited for that nobody living seems to hold, and what is said of those who do.

use std::rc::Rc;

use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Errno, Ring};

use super::{BlockError, Operation};
use crate::base::limits;

/// Tries until it is done or refused for good: a lock that no living process is seen to hold is waited for.
pub async fn in_time<T>(
    ring: &Ring,
    mut attempt: impl FnMut() -> Result<T, BlockError>,
) -> Result<T, BlockError> {
    let latest = ring.now().saturating_add(limits::ORPHANED_LOCK_NANOS_MAX);
    loop {
        let mut error = match attempt() {
            Err(error) => error,
            Ok(done) => return Ok(done),
        };
        if let Some(conflict) = error.conflict.take() {
            let aside = ring.aside();
            let asked = aside.lock_holders(&conflict.file, conflict.range);
            let holders = match either(asked, ring.sleep(limits::LOCK_HOLDERS_NANOS_MAX)).await {
                Either::First(holders) => holders,
                Either::Second(()) => None,
            };
            error = refusal(error.name, &conflict.what, holders.as_deref(), conflict.without);
        }
        if !error.is_orphaned || ring.now() >= latest {
            return Err(error);
        }
        tracing::debug!(%error, "waiting for a lock that nobody seems to hold");
        ring.sleep(limits::ORPHANED_LOCK_PAUSE_NANOS).await;
    }
}

/// What a lock refuses, and by whom it is held; `None`: there was no time to look at all of them.
pub fn refusal(
    name: Rc<str>,
    what: &str,
    holders: Option<&[(u32, String)]>,
    without: Option<&'static str>,
) -> BlockError {
    let who = match holders {
        None => "another program, which was not found in time".to_owned(),
        Some([]) => "a program that cannot be named (another user's, one in a container or on another machine, or one \
                     that was killed and whose writes the kernel has not ended yet)"
            .to_owned(),
        Some(holders) => {
            let name = |(pid, name): &(u32, String)| match *pid == std::process::id() {
                true => "this program itself".to_owned(),
                false => format!("{name} (pid {pid})"),
            };
            holders.iter().map(name).collect::<Vec<_>>().join(", ")
        }
    };
    let error = BlockError::new(Operation::Lock, name, Errno::EBUSY)
        .hint(format!("The image is in use: {what} by {who}. {}", cure(without)));
    BlockError { is_orphaned: holders.is_some_and(<[_]>::is_empty), ..error }
}

/// What can be done about somebody else's lock.
pub fn cure(without: Option<&'static str>) -> String {
    let more = without.map(|option| format!(" If you know that no harm can come of it, say {option}."));
    format!("Stop using it there first.{}", more.unwrap_or_default())
}
