//! What may be said of a few measurements: medians, and intervals for the ratio of two contenders.
//!
//! Contenders run in turn, so each round gives one pair, and what disturbed a round disturbed both. The ratio is taken
//! pair by pair, and its interval comes from the sign test: of `n` ratios in order, the median of what they were drawn
//! from lies between the `k`-th and the `k`-th from the end with a probability that needs no assumption about the
//! distribution but that the pairs are independent. The interval shown is the narrowest that holds at least 95 %; with
//! five pairs and fewer even the whole span holds less, and the report says how much.

/// The least probability with which an interval is to hold, where there are pairs enough.
pub const COVERAGE: f64 = 0.95;

/// Median, smallest and largest value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub count: usize,
}

/// The spread of `values`, if there are any.
pub fn spread(values: &[f64]) -> Option<Spread> {
    let sorted = sorted(values);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    Some(Spread { median: median_of_sorted(&sorted)?, min, max, count: sorted.len() })
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn median_of_sorted(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some((sorted.get(sorted.len() / 2 - 1)? + upper) / 2.0)
}

/// A ratio with what is known about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Median of the ratios of the pairs.
    pub median: f64,
    /// The interval for it.
    pub low: f64,
    pub high: f64,
    /// Probability with which the interval holds the true median.
    pub coverage: f64,
    /// Pairs.
    pub pairs: usize,
}

impl Ratio {
    /// Whether nothing can be said about who is better.
    pub fn is_equal(&self) -> bool {
        self.low <= 1.0 && self.high >= 1.0
    }
}

/// `numerators[i] / denominators[i]`, pair by pair. Pairs of which one side is missing are left out.
pub fn ratio(pairs: impl IntoIterator<Item = (Option<f64>, Option<f64>)>) -> Option<Ratio> {
    let ratios: Vec<f64> =
        pairs.into_iter().filter_map(|(n, d)| Some(n? / d?)).filter(|ratio| ratio.is_finite()).collect();
    let ratios = sorted(&ratios);
    let median = median_of_sorted(&ratios)?;
    let (trim, coverage) = interval(ratios.len());
    let (low, high) = (*ratios.get(trim)?, *ratios.get(ratios.len() - 1 - trim)?);
    Some(Ratio { median, low, high, coverage, pairs: ratios.len() })
}

/// How many values to leave out at each end of `n`, and the coverage of what remains.
fn interval(n: usize) -> (usize, f64) {
    let mut best = (0, coverage(n, 0));
    for trim in 1..n.div_ceil(2) {
        let covered = coverage(n, trim);
        if covered < COVERAGE {
            break;
        }
        best = (trim, covered);
    }
    best
}

/// Probability that the true median lies between the values number `trim` and `n - 1 - trim` of `n` in order.
fn coverage(n: usize, trim: usize) -> f64 {
    let mut term = 0.5f64.powi(i32::try_from(n).unwrap_or(i32::MAX));
    let mut below = 0.0;
    for k in 0..=trim {
        below += term;
        term *= (n - k) as f64 / (k + 1) as f64;
    }
    (1.0 - 2.0 * below).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[f64::NAN]), None);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0, count: 3 }));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 9.0]).unwrap().median, 3.0);
    }

    /// Tables of the sign test: number of pairs, values left out at each end, coverage.
    #[test]
    fn intervals_of_the_sign_test() {
        for (n, trim, covered) in
            [(1, 0, 0.0), (3, 0, 0.75), (5, 0, 0.9375), (6, 0, 0.96875), (8, 0, 0.9921875), (9, 1, 0.9609375)]
        {
            assert_eq!(interval(n), (trim, covered), "{n} pairs");
        }
        let (trim, covered) = interval(10);
        assert_eq!(trim, 1);
        assert!((covered - 0.978_515_625).abs() < 1e-12);
        let (trim, covered) = interval(20);
        assert_eq!(trim, 5);
        assert!((covered - 0.9586).abs() < 1e-4);
    }

    #[test]
    fn ratios_go_pair_by_pair() {
        // A disturbance that hits both sides of a pair leaves the ratio alone.
        let ours = [1.0, 10.0, 1.0, 1.0, 1.0, 1.0];
        let peer = [1.5, 15.0, 1.4, 1.6, 1.5, 1.5];
        let pairs = peer.iter().zip(&ours).map(|(p, o)| (Some(*p), Some(*o)));
        let result = ratio(pairs.chain([(None, Some(1.0)), (Some(1.0), None)])).unwrap();
        assert_eq!((result.median, result.pairs), (1.5, 6));
        assert!(!result.is_equal() && (result.low - 1.4).abs() < 1e-12 && (result.high - 1.6).abs() < 1e-12);
        let even = ratio([(Some(0.9), Some(1.0)), (Some(1.2), Some(1.0)), (Some(1.1), Some(1.0))]).unwrap();
        assert!(even.is_equal());
        assert_eq!(ratio([(Some(1.0), Some(0.0))]), None);
        assert_eq!(ratio([]), None);
    }
}
