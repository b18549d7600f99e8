//! Servers that fall silent: what is in flight, for how long nothing has come, and what follows from that.
//!
//! A connection that ends is an answer of a kind. A server that hangs gives none, and the kernel does not notice for as
//! long as its host acknowledges what is sent. So whoever waits is told of: after ten seconds without a byte a line says
//! what is waited for and since when, then one a minute. And what is not a guest's is given up in the end: after
//! [`Patience::job_ns`] without a byte on any connection. Flushes, and zeroes and discards of long ranges, may take long
//! on a server that is well, and so may what is asked beside them: all of it has [`Patience::flush_ns`].

use blockferry_ring::Nanos;

use super::constants::Command;
use super::transmission::RequestHeader;
use crate::base::limits::{NBD_FLUSH_TIMEOUT_NS, NBD_IO_TIMEOUT_NS, NBD_LONG_RANGE_BYTES};
use crate::base::units::fmt_duration;

/// How long a server may be silent. 0: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Until a job's requests fail.
    pub job_ns: Nanos,
    /// Until guests' requests fail.
    pub guest_ns: Nanos,
    /// Until flushes fail, of those who do not wait for ever.
    pub flush_ns: Nanos,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { job_ns: NBD_IO_TIMEOUT_NS, guest_ns: 0, flush_ns: NBD_FLUSH_TIMEOUT_NS }
    }
}

impl Patience {
    /// How long this request waits for a silent server; 0: for ever.
    pub(super) fn of(&self, request: &RequestHeader, for_job: bool) -> Nanos {
        let patience = if for_job { self.job_ns } else { self.guest_ns };
        if patience > 0 && takes_long(request) { patience.max(self.flush_ns) } else { patience }
    }
}

/// Whether a server that is well may take long to answer it.
pub(super) fn takes_long(request: &RequestHeader) -> bool {
    match request.command {
        Command::Flush => true,
        Command::WriteZeroes | Command::Trim => request.length > NBD_LONG_RANGE_BYTES,
        _ => false,
    }
}

/// What is in flight on one connection, or on all of them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Waiting {
    pub(super) count: usize,
    /// The one that has waited longest, and since when.
    pub(super) oldest: Option<(Nanos, RequestHeader)>,
    /// The longest patience of those that may take long.
    pub(super) long_ns: Nanos,
}

impl Waiting {
    pub(super) fn add(&mut self, since: Nanos, patience_ns: Nanos, request: &RequestHeader) {
        self.count += 1;
        if self.oldest.is_none_or(|(before, _)| since < before) {
            self.oldest = Some((since, *request));
        }
        if takes_long(request) {
            self.long_ns = self.long_ns.max(patience_ns);
        }
    }

    pub(super) fn join(&mut self, other: Waiting) {
        self.count += other.count;
        self.long_ns = self.long_ns.max(other.long_ns);
        self.oldest = match (self.oldest, other.oldest) {
            (Some(one), Some(other)) => Some(if other.0 < one.0 { other } else { one }),
            (one, other) => one.or(other),
        };
    }

    /// Whether a request that began at `since` with `patience_ns` has waited long enough, when the server said
    /// something for the last time at `heard`.
    pub(super) fn is_overdue(&self, now: Nanos, heard: Nanos, since: Nanos, patience_ns: Nanos) -> bool {
        let patience_ns = if patience_ns > 0 { patience_ns.max(self.long_ns) } else { 0 };
        patience_ns > 0 && now >= since.max(heard).saturating_add(patience_ns)
    }

    /// What is waited for, and for how long nothing has come.
    pub(super) fn tell(&self, now: Nanos, heard: Nanos) -> String {
        let Some((since, request)) = self.oldest else { return String::new() };
        let silent = fmt_duration(now.saturating_sub(since.max(heard)));
        let place = match request.command {
            Command::Flush => String::new(),
            _ => format!(" at offset {} ({} bytes)", request.offset, request.length),
        };
        format!(
            "the server has not sent a byte for {silent}; waiting for {} answers, the oldest to a {:?}{place}, for {}",
            self.count,
            request.command,
            fmt_duration(now.saturating_sub(since)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::nbd::CommandFlags;

    const SECOND: Nanos = 1_000_000_000;

    fn request(command: Command, length: u64) -> RequestHeader {
        RequestHeader { flags: CommandFlags::EMPTY, command, cookie: 0, offset: 4096, length }
    }

    #[test]
    fn guests_wait_for_ever_and_flushes_longer() {
        let patience = Patience { job_ns: 60 * SECOND, guest_ns: 0, flush_ns: 600 * SECOND };
        let (read, flush) = (request(Command::Read, 512), request(Command::Flush, 0));
        assert_eq!((patience.of(&read, true), patience.of(&read, false)), (60 * SECOND, 0));
        assert_eq!((patience.of(&flush, true), patience.of(&flush, false)), (600 * SECOND, 0));
        let zeroes = |length| patience.of(&request(Command::WriteZeroes, length), true);
        assert_eq!((zeroes(4096), zeroes(1 << 30)), (60 * SECOND, 600 * SECOND));
        let said = Patience { guest_ns: 5 * SECOND, ..patience };
        assert_eq!(said.of(&read, false), 5 * SECOND);
    }

    #[test]
    fn silence_counts_from_the_last_byte_and_from_the_question() {
        let mut waiting = Waiting::default();
        waiting.add(3 * SECOND, 60 * SECOND, &request(Command::Read, 512));
        waiting.add(2 * SECOND, 0, &request(Command::Write, 512));
        assert_eq!(
            waiting.oldest.map(|(since, request)| (since, request.command)),
            Some((2 * SECOND, Command::Write))
        );
        let overdue =
            |now, heard, since| waiting.is_overdue(now * SECOND, heard * SECOND, since * SECOND, 60 * SECOND);
        assert!(!overdue(62, 0, 3) && overdue(63, 0, 3) && !overdue(63, 9, 3) && overdue(69, 9, 3));
        assert!(!waiting.is_overdue(Nanos::MAX, 0, 0, 0), "for ever");
        let text = waiting.tell(14 * SECOND, 4 * SECOND);
        assert!(
            text.contains("10 s") && text.contains("12 s") && text.contains("Write at offset 4096"),
            "{text}"
        );
        // Beside a flush everything may take as long as that.
        waiting.add(3 * SECOND, 600 * SECOND, &request(Command::Flush, 0));
        assert!(!waiting.is_overdue(100 * SECOND, 0, 3 * SECOND, 60 * SECOND));
        assert!(waiting.is_overdue(603 * SECOND, 0, 3 * SECOND, 60 * SECOND));
    }
}
