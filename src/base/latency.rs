//! Latency histograms.
//!
//! An average hides the request that waited; so every node, job and benchmark records each latency in an HDR histogram
//! and reports percentiles. Values are nanoseconds. Up to 2 µs each nanosecond has its own counter, above that three
//! significant digits are kept, up to 100 s; what takes longer counts as 100 s. Recording is a few instructions and
//! never allocates: the counters (about 220 KiB of address space, of which only touched pages take memory) are made
//! with the histogram.
//!
//! Saved histograms are in the HDR V2 format, uncompressed, which other tools read. When one is read back it is a file
//! from somewhere: its shape must be this module's, and its counters are checked before they are believed.

use std::time::Duration;

use hdrhistogram::Histogram;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer, V2Serializer};
use serde::Serialize;

use super::limits::HISTOGRAM_BYTES_MAX;

/// Smallest step between two values, in nanoseconds.
const LOWEST_NS: u64 = 1;
/// Largest value kept, in nanoseconds: 100 s.
pub const LATENCY_NS_MAX: u64 = 100_000_000_000;
const SIGNIFICANT_DIGITS: u8 = 3;
/// Steps in which the requests missed behind one slow request are counted.
const MISSED_STEPS_MAX: u64 = 100_000;

/// Counters of latencies in nanoseconds.
#[derive(Debug, Clone, PartialEq)]
pub struct LatencyHistogram {
    counts: Histogram<u64>,
}

/// What a person or a metrics reader is told about a histogram. All zero when nothing was recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LatencySummary {
    /// Latencies recorded.
    pub count: u64,
    /// The shortest, in nanoseconds.
    pub min_ns: u64,
    /// Half were at most this long.
    pub p50_ns: u64,
    /// 90 % were at most this long.
    pub p90_ns: u64,
    /// 99 % were at most this long.
    pub p99_ns: u64,
    /// 99.9 % were at most this long.
    pub p99_9_ns: u64,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
    /// The average, in nanoseconds.
    pub mean_ns: u64,
}

/// Why bytes are no saved latency histogram.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistogramError {
    /// Not an uncompressed HDR V2 histogram.
    #[error("not a saved latency histogram (HDR V2, uncompressed)")]
    NotAHistogram,
    /// A histogram over other values.
    #[error("the histogram counts {low} to {high} with {digits} digits, not 1 ns to 100 s with 3")]
    OtherShape {
        /// Its smallest step.
        low: u64,
        /// Its largest value.
        high: u64,
        /// Its significant digits.
        digits: u32,
    },
    /// Cut short, longer than announced, or with counters that no recording leaves behind.
    #[error("the saved latency histogram is damaged")]
    Damaged,
    /// So many values were recorded that a counter does not fit the format.
    #[error("the latency histogram has a counter too large to be saved")]
    CounterTooLarge,
}

impl Default for LatencyHistogram {
    fn default() -> LatencyHistogram {
        LatencyHistogram::new()
    }
}

impl LatencyHistogram {
    /// An empty histogram.
    pub fn new() -> LatencyHistogram {
        let counts = Histogram::new_with_bounds(LOWEST_NS, LATENCY_NS_MAX, SIGNIFICANT_DIGITS);
        LatencyHistogram { counts: counts.expect("the bounds are constants that a test has tried") }
    }

    /// Counts one latency.
    #[inline]
    pub fn record(&mut self, latency_ns: u64) {
        self.counts.saturating_record(latency_ns.min(LATENCY_NS_MAX));
    }

    /// Counts one latency of a load that was meant to send a request every `interval_ns`, and with it the requests that
    /// could not be sent while this one was awaited: they would have seen the rest of its wait.
    pub fn record_with_interval(&mut self, latency_ns: u64, interval_ns: u64) {
        self.record(latency_ns);
        let latency_ns = latency_ns.min(LATENCY_NS_MAX);
        let missed = latency_ns.checked_div(interval_ns).unwrap_or(0).saturating_sub(1);
        // Beyond the limit several missed requests are counted with the longest wait among them.
        let stride = missed.div_ceil(MISSED_STEPS_MAX).max(1);
        let mut index = 1;
        while index <= missed {
            let count = stride.min(missed + 1 - index);
            self.counts.saturating_record_n(latency_ns - index * interval_ns, count);
            index += count;
        }
    }

    /// Adds all that `other` counted.
    pub fn merge(&mut self, other: &LatencyHistogram) {
        // Both have the same bounds, so nothing is out of range.
        let added = self.counts.add(&other.counts);
        debug_assert!(added.is_ok(), "all latency histograms have one shape");
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.counts.reset();
    }

    /// Latencies recorded.
    pub fn count(&self) -> u64 {
        self.counts.len()
    }

    /// The latency in nanoseconds that the given part (0.0 to 1.0) of the recorded ones do not exceed; 0 when empty.
    pub fn quantile(&self, part: f64) -> u64 {
        self.counts.value_at_quantile(part).min(self.counts.max()).min(LATENCY_NS_MAX)
    }

    /// The usual figures.
    pub fn summary(&self) -> LatencySummary {
        if self.counts.is_empty() {
            return LatencySummary::default();
        }
        LatencySummary {
            count: self.counts.len(),
            min_ns: self.counts.min(),
            p50_ns: self.quantile(0.5),
            p90_ns: self.quantile(0.9),
            p99_ns: self.quantile(0.99),
            p99_9_ns: self.quantile(0.999),
            max_ns: self.counts.max().min(LATENCY_NS_MAX),
            mean_ns: self.counts.mean().round() as u64,
        }
    }

    /// The histogram in the HDR V2 format, uncompressed.
    pub fn to_bytes(&self) -> Result<Vec<u8>, HistogramError> {
        let mut bytes = Vec::new();
        match V2Serializer::new().serialize(&self.counts, &mut bytes) {
            Ok(_) => Ok(bytes),
            Err(_) => Err(HistogramError::CounterTooLarge),
        }
    }

    /// Reads what [`LatencyHistogram::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<LatencyHistogram, HistogramError> {
        check_encoding(bytes)?;
        let counts = Deserializer::new().deserialize(&mut &*bytes).map_err(|_| HistogramError::Damaged)?;
        Ok(LatencyHistogram { counts })
    }
}

/// Histograms of several kinds as a log that the tools for HDR histograms read: a line of text for each, with the kind as
/// its tag. They were recorded in `elapsed_ns`.
pub fn to_log(kinds: &[(&str, LatencyHistogram)], elapsed_ns: u64) -> Result<Vec<u8>, HistogramError> {
    let (mut log, mut serializer) = (Vec::new(), V2DeflateSerializer::new());
    // What is written to memory fails for no other reason than a counter.
    let too_large = |_| HistogramError::CounterTooLarge;
    let mut writer = IntervalLogWriterBuilder::new()
        .add_comment("[Latencies in nanoseconds, by blockferry bench]")
        .with_max_value_divisor(1e6)
        .begin_log_with(&mut log, &mut serializer)
        .map_err(|_| HistogramError::CounterTooLarge)?;
    for (kind, histogram) in kinds {
        let (start, lasted) = (Duration::ZERO, Duration::from_nanos(elapsed_ns));
        let written = writer.write_histogram(&histogram.counts, start, lasted, Tag::new(kind));
        written.map_err(too_large)?;
    }
    Ok(log)
}

const V2_COOKIE: u32 = 0x1c84_9303 | 0x10;
const HEADER_BYTES: usize = 40;

/// Makes sure that the decoder, which trusts its input, is given this module's shape and nothing that overflows it.
/// HDR V2, big-endian: cookie u32, payload bytes u32, offset u32 (0), digits u32, lowest u64, highest u64, ratio f64 (1.0);
/// then zigzag LEB128 numbers of at most 9 bytes, where n >= 0 is the next counter and n < 0 stands for -n empty counters.
fn check_encoding(bytes: &[u8]) -> Result<(), HistogramError> {
    let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(HistogramError::NotAHistogram)?;
    let u32_at = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| header[at + i]));
    let u64_at = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| header[at + i]));
    if u32_at(0) != V2_COOKIE {
        return Err(HistogramError::NotAHistogram);
    }
    let (digits, low, high) = (u32_at(12), u64_at(16), u64_at(24));
    if (digits, low, high) != (u32::from(SIGNIFICANT_DIGITS), LOWEST_NS, LATENCY_NS_MAX) {
        return Err(HistogramError::OtherShape { low, high, digits });
    }
    let plain = u32_at(8) == 0 && f64::from_bits(u64_at(32)) == 1.0;
    if !plain || bytes.len() > HISTOGRAM_BYTES_MAX || u32_at(4) as usize != payload.len() {
        return Err(HistogramError::Damaged);
    }
    let mut rest = payload;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let number = take_zigzag(&mut rest).ok_or(HistogramError::Damaged)?;
        match u64::try_from(number) {
            Ok(count) => total = total.checked_add(count).ok_or(HistogramError::Damaged)?,
            Err(_) if number.unsigned_abs() > HISTOGRAM_BYTES_MAX as u64 => {
                return Err(HistogramError::Damaged);
            }
            Err(_) => {}
        }
    }
    Ok(())
}

/// Takes one number off the front: seven bits a byte, low ones first, the ninth byte whole; then zigzag.
fn take_zigzag(bytes: &mut &[u8]) -> Option<i64> {
    let mut value = 0u64;
    for index in 0..9 {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        if index == 8 {
            value |= u64::from(byte) << 56;
            break;
        }
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            break;
        }
    }
    Some((value >> 1) as i64 ^ -((value & 1) as i64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    #[test]
    fn percentiles_stay_within_a_thousandth_of_the_sorted_list() {
        let mut rng = Rng::new(4);
        let mut histogram = LatencyHistogram::new();
        let mut all: Vec<u64> = (0..20_000)
            .map(|_| {
                let magnitude = rng.range(7..37);
                100 + rng.below(1 << magnitude)
            })
            .map(|ns| ns.min(LATENCY_NS_MAX))
            .collect();
        all.iter().for_each(|&ns| histogram.record(ns));
        all.sort_unstable();
        let summary = histogram.summary();
        let near = |got: u64, want: u64| got.abs_diff(want) <= want / 1000;
        let at = |per_mille: usize| all[all.len() * per_mille / 1000 - 1];
        assert_eq!(summary.count, 20_000);
        assert!(near(summary.min_ns, all[0]) && near(summary.max_ns, all[all.len() - 1]), "{summary:?}");
        for (got, per_mille) in
            [(summary.p50_ns, 500), (summary.p90_ns, 900), (summary.p99_ns, 990), (summary.p99_9_ns, 999)]
        {
            assert!(near(got, at(per_mille)), "{per_mille}: {got} against {}", at(per_mille));
        }
        let mean = (all.iter().map(|&ns| u128::from(ns)).sum::<u128>() / 20_000) as u64;
        assert!(near(summary.mean_ns, mean), "{} {mean}", summary.mean_ns);
    }

    #[test]
    fn what_takes_longer_counts_as_the_longest() {
        let mut histogram = LatencyHistogram::new();
        histogram.record(0);
        histogram.record(u64::MAX);
        histogram.record(LATENCY_NS_MAX + 1);
        let summary = histogram.summary();
        assert_eq!((summary.count, summary.min_ns, summary.max_ns), (3, 0, LATENCY_NS_MAX));
        histogram.clear();
        assert_eq!(histogram.summary(), LatencySummary::default());
        assert_eq!(histogram.quantile(0.99), 0);
    }

    #[test]
    fn requests_that_were_held_back_are_counted() {
        let mut histogram = LatencyHistogram::new();
        histogram.record_with_interval(1000, 300);
        let mut plain = LatencyHistogram::new();
        [1000, 700, 400].iter().for_each(|&ns| plain.record(ns));
        assert_eq!(histogram, plain);
        histogram.record_with_interval(5, 0);
        assert_eq!(histogram.count(), 4);
        histogram.clear();
        histogram.record_with_interval(300_000_050, 100);
        assert_eq!(histogram.count(), 3_000_000);
        assert!(histogram.quantile(0.5).abs_diff(150_000_000) < 300_000);
    }

    fn random_histogram(rng: &mut Rng) -> LatencyHistogram {
        let mut histogram = LatencyHistogram::new();
        for _ in 0..rng.below(200) {
            let magnitude = rng.below(40);
            histogram.record(rng.below(1 << magnitude));
        }
        histogram
    }

    #[test]
    fn merging_is_recording_into_one() {
        let mut rng = Rng::new(5);
        let (mut a, b) = (random_histogram(&mut rng), random_histogram(&mut rng));
        let (before, added) = (a.count(), b.count());
        let longest = a.summary().max_ns.max(b.summary().max_ns);
        a.merge(&b);
        assert_eq!((a.count(), a.summary().max_ns), (before + added, longest));
    }

    #[test]
    fn a_saved_histogram_comes_back() {
        let mut rng = Rng::new(6);
        for _ in 0..100 {
            let histogram = random_histogram(&mut rng);
            let bytes = histogram.to_bytes().expect("few values");
            let back = LatencyHistogram::from_bytes(&bytes).expect("as written");
            assert_eq!(back.count(), histogram.count());
            assert_eq!(back.to_bytes(), Ok(bytes));
        }
    }

    #[test]
    fn a_full_histogram_fits_the_limit() {
        let mut histogram = LatencyHistogram::new();
        let mut ns = 0;
        while ns < LATENCY_NS_MAX {
            histogram.counts.saturating_record_n(ns, u64::MAX >> 16);
            ns = histogram.counts.next_non_equivalent(ns);
        }
        let bytes = histogram.to_bytes().expect("counters fit");
        assert!(bytes.len() <= HISTOGRAM_BYTES_MAX, "{}", bytes.len());
        assert!(LatencyHistogram::from_bytes(&bytes).is_ok());
    }

    /// Bytes from anywhere give a histogram or an error, never a panic or a great allocation.
    #[test]
    fn damaged_bytes_are_refused_or_harmless() {
        let mut rng = Rng::new(7);
        for _ in 0..3000 {
            let mut bytes = random_histogram(&mut rng).to_bytes().expect("few values");
            for _ in 0..=rng.below(3) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] = if rng.chance(32768) { 0xff } else { rng.next_u64() as u8 };
            }
            bytes.truncate(bytes.len() - rng.below(3) as usize);
            let _ = LatencyHistogram::from_bytes(&bytes);
        }
        let good = LatencyHistogram::new().to_bytes().expect("empty");
        let with_payload = |payload: &[u8]| {
            let mut bytes = good[..HEADER_BYTES].to_vec();
            bytes[4..8].copy_from_slice(&(payload.len() as u32).to_be_bytes());
            bytes.extend_from_slice(payload);
            LatencyHistogram::from_bytes(&bytes)
        };
        assert!(with_payload(&[0]).is_ok());
        // The most negative number, a counter sum past 64 bits, a number without its end, a counter past the table.
        assert_eq!(with_payload(&[0xff; 9]), Err(HistogramError::Damaged));
        let largest = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(with_payload(&[largest; 3].concat()), Err(HistogramError::Damaged));
        assert_eq!(with_payload(&[0x80]), Err(HistogramError::Damaged));
        assert_eq!(with_payload(&[0xff, 0xff, 0x07, 2]), Err(HistogramError::Damaged));
        assert_eq!(LatencyHistogram::from_bytes(&[]), Err(HistogramError::NotAHistogram));
        let mut huge = good.clone();
        huge[4..8].copy_from_slice(&[0xff; 4]);
        assert_eq!(LatencyHistogram::from_bytes(&huge), Err(HistogramError::Damaged));
        let mut wide = good;
        wide[15] = 5;
        assert!(matches!(
            LatencyHistogram::from_bytes(&wide),
            Err(HistogramError::OtherShape { digits: 5, .. })
        ));
    }

    #[test]
    fn a_summary_is_plain_json() {
        let mut histogram = LatencyHistogram::new();
        histogram.record(1500);
        let json = serde_json::to_string(&histogram.summary()).expect("plain numbers");
        assert_eq!(
            json,
            r#"{"count":1,"min-ns":1500,"p50-ns":1500,"p90-ns":1500,"p99-ns":1500,"p99-9-ns":1500,"max-ns":1500,"mean-ns":1500}"#
        );
    }
}
