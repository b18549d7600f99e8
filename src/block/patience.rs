//! On whose behalf a request is made, for disks whose server may fall silent.
//!
//! A guest waits for its disk for ever, as for a real one. A job has an error policy, and nobody is served by a job that waits
//! for a server that hangs: its requests fail when the server has been silent for long enough. The driver cannot tell the two
//! apart by what is asked. So a job's requests are made inside [`for_job`], and drivers that know such a limit look at
//! [`is_for_job`] when a request begins. The mark belongs to the future, not to the task: a guest's write that goes to
//! both sides of a mirror waits for its own disk as a guest and for the target as the job.

use std::cell::Cell;
use std::future::Future;
use std::task::Poll;

thread_local! {
    static FOR_JOB: Cell<bool> = const { Cell::new(false) };
}

/// Whether what is being polled is a job's request.
pub fn is_for_job() -> bool {
    FOR_JOB.get()
}

/// What `work` asks of disks, it asks for a job.
pub async fn for_job<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|cx| {
        let before = FOR_JOB.replace(true);
        let poll: Poll<T> = work.as_mut().poll(cx);
        FOR_JOB.set(before);
        poll
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockferry_ring::{Config, Ring};

    #[test]
    fn the_mark_belongs_to_the_future() {
        let ring = Ring::new(&Config::default()).unwrap();
        let r = ring.clone();
        ring.block_on(async move {
            assert!(!is_for_job());
            let other = r.spawn_with_result(async { is_for_job() });
            let inside = for_job(async {
                let other = r.spawn_with_result(async { is_for_job() });
                r.yield_now().await;
                (is_for_job(), other.take().await)
            });
            assert_eq!((inside.await, other.take().await), ((true, false), false));
            assert!(!is_for_job());
        });
    }
}
