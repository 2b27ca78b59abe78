//! From the log-determinants of batches to that of all examples, by a power law.
//!
//! Let `f(k)` be the expected log-determinant of `k` examples. It grows ever more slowly (its increments do not increase: Han's
//! inequality), and the stochastic bound `N/b f(b)` lies on the straight line through 0 and `f(b)`: hence its bias. Here the growth
//! from a quarter of the batch to a half and from a half to the whole tell by which factor `r` the increment of a doubling grows,
//!
//! ```text
//! d1 = f(b/2) - f(b/4),   d2 = f(b) - f(b/2),   r = d2 / d1   (1 <= r <= 2: 2 for a straight line, 1 for a logarithm)
//! ```
//!
//! and the increments of the doublings to come, `m = log2(N/b)` of them, go on by it: `f(N) = f(b) + d2 (r + r^2 + .. + r^m)`, for any
//! real `m` as `d2 r (r^m - 1) / (r - 1)`. That is exact where the increment of an example falls as a power of their number. The halves'
//! and quarters' matrices are blocks of the batch's: together they cost less than a third of it. Derivatives are those of the
//! extrapolated value, but for the shares of single tensors that would be below zero. It is not a bound.

use super::kernel::{NAME, half_of_inverse, precise};
use super::log_det::{Complexity, Effective, LogDet, Precision};
use super::rows::Rows;
use crate::linalg::cholesky::{Half, log_det_inverse};
use crate::ops::dense::mix;
use candle_core::{Result, Tensor, bail};

/// A batch that stands for all examples.
#[derive(Debug)]
pub(crate) struct Extrapolated {
    /// A batch whose size is a multiple of 4.
    rows: Rows,
    /// `N / b`.
    times: f64,
}

impl Extrapolated {
    /// `rows` of a batch, in random order, of `all` examples.
    pub fn new(rows: Rows, all: usize) -> Result<Self> {
        let size = rows.examples / 4 * 4;
        if size < 8 {
            bail!(
                "evidence: a batch of {} cannot be continued to more examples, expected 8 or more",
                rows.examples
            )
        }
        Ok(Self { times: all as f64 / size as f64, rows: rows.narrow(0, size)? })
    }
}

/// The mean log-determinant of the diagonal blocks of `m`, `into` of them, and of their inverses the `half`.
fn blocks(m: &Tensor, into: usize, half: Half) -> Result<(f64, Vec<Tensor>)> {
    let size = m.dim(0)? / into;
    let (mut mean, mut inverses) = (0.0, Vec::new());
    for part in 0..into {
        let block = m.narrow(0, part * size, size)?.narrow(1, part * size, size)?.contiguous()?;
        let (value, inverse) = log_det_inverse(&block, half, NAME)?;
        mean += value / into as f64;
        inverses.push(inverse);
    }
    Ok((mean, inverses))
}

/// `weight` times matrices, plus `half` times pairs of smaller ones on their diagonals.
fn with_blocks(matrices: Vec<Tensor>, weight: f64, smaller: &[Tensor], half: f64) -> Result<Vec<Tensor>> {
    let pair = |(matrix, pair): (Tensor, &[Tensor])| match pair {
        [a, b] => {
            let zeros = a.zeros_like()?;
            let rows = [Tensor::cat(&[a, &zeros], 1)?, Tensor::cat(&[&zeros, b], 1)?];
            mix(&matrix, weight, &Tensor::cat(&rows, 0)?, half)
        }
        _ => bail!("evidence: a batch in {} parts", pair.len()),
    };
    matrices.into_iter().zip(smaller.chunks(2)).map(pair).collect()
}

/// The extrapolated value for a quarter's, a half's and the whole batch's, and its derivatives by them.
fn extrapolated([quarter, half, whole]: [f64; 3], times: f64) -> (f64, [f64; 3]) {
    let (before, last) = (half - quarter, whole - half);
    if before <= 0.0 {
        return (whole, [0.0, 0.0, 1.0]);
    }
    let (m, ratio) = (times.log2(), last / before);
    let r = ratio.clamp(1.0, 2.0);
    // The sum of r^x over the doublings to come, and its derivative by r; at 1 by its series.
    let (sum, by_ratio) = match r - 1.0 {
        e if e < 1e-6 => (m, m * (m + 1.0) / 2.0),
        e => {
            let power = r.powf(m);
            let sum = r * (power - 1.0) / e;
            (sum, ((power - 1.0) + m * power - sum) / e)
        }
    };
    let moves = if ratio == r { last * by_ratio / before } else { 0.0 };
    (whole + last * sum, [moves * r, -sum - moves * (1.0 + r), 1.0 + sum + moves])
}

/// Shares with a positive number in place of those below zero, that of the batch divided by `times`; the others are scaled so that the sum
/// stays.
///
/// A tensor's share can fall as examples are added, which a power law of the sum continues to below zero. No share is, and a precision
/// that followed it would go to 0.
fn positive(
    mut shares: Vec<Option<Effective>>,
    batch: Vec<Option<Effective>>,
    times: f64,
) -> Vec<Option<Effective>> {
    let (mut above, mut added) = (0.0, 0.0);
    for (share, batch) in shares.iter_mut().zip(batch) {
        match (share, batch) {
            (Some(Effective::Total(share)), Some(Effective::Total(batch))) if *share <= 0.0 => {
                added += batch / times - *share;
                *share = batch / times;
                above += *share;
            }
            (Some(Effective::Total(share)), _) => above += *share,
            _ => {}
        }
    }
    let scale = (above - added) / above;
    if scale > 0.0 {
        for share in shares.iter_mut().flatten() {
            if let Effective::Total(share) = share {
                *share *= scale;
            }
        }
    }
    shares
}

impl Complexity for Extrapolated {
    fn log_det(&self, s: f64, precisions: &[Precision]) -> Result<LogDet> {
        let (m, products) = self.rows.shifted_kernel(s, precisions)?;
        let dtype = m.dtype();
        // Blocks of a matrix are no worse conditioned than it.
        let (m, condition) = precise(m)?;
        let read = half_of_inverse(precisions);
        let [(quarter, quarters), (half, halves), (whole, inverse)] =
            [blocks(&m, 4, read)?, blocks(&m, 2, read)?, blocks(&m, 1, read)?];
        drop(m);
        let (value, slopes) = extrapolated([quarter, half, whole], self.times);
        // The derivative of a sum of log-determinants of blocks is a trace against the sum of their inverses.
        let halves = with_blocks(halves, slopes[1] / 2.0, &quarters, slopes[0] / 4.0)?;
        let joined = with_blocks(inverse.clone(), slopes[2], &halves, 1.0)?;
        let (Some(joined), Some(whole)) = (joined.first(), inverse.first()) else {
            bail!("evidence: an empty batch")
        };
        let effective = |m: &Tensor| self.rows.effective(&m.to_dtype(dtype)?, s, precisions, &products);
        let mut shares = effective(joined)?;
        let negative = |share: &Option<Effective>| matches!(share, Some(Effective::Total(v)) if *v <= 0.0);
        if shares.iter().any(negative) {
            shares = positive(shares, effective(whole)?, self.times);
        }
        Ok(LogDet { value, effective: shares, condition })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_laws_are_continued_exactly() {
        for power in [0.05f64, 0.3, 0.7, 0.999] {
            let f = |k: f64| 3.0 * k.powf(power) + 1.0;
            for n in [100.0, 250.0, 1000.0, 60_000.0] {
                let (value, _) = extrapolated([f(25.0), f(50.0), f(100.0)], n / 100.0);
                assert!((value / f(n) - 1.0).abs() < 1e-9, "{power} {n}: {value} {}", f(n));
            }
        }
        // A logarithm doubles by equal steps, a straight line by doubled ones; beyond them it stays there.
        let (value, _) = extrapolated([1.0, 2.0, 3.0], 8.0);
        assert!((value - 6.0).abs() < 1e-9);
        let (value, _) = extrapolated([25.0, 50.0, 100.0], 10.0);
        assert!((value - 1000.0).abs() < 1e-9);
        assert_eq!(extrapolated([25.0, 50.0, 110.0], 1.0).0, 110.0);
        assert_eq!(extrapolated([0.0; 3], 10.0).0, 0.0);
    }

    #[test]
    fn shares_below_zero_become_positive_and_the_sum_stays() {
        let total = |values: &[f64]| values.iter().map(|&v| Some(Effective::Total(v))).collect::<Vec<_>>();
        let found = positive(total(&[30.0, -2.0, 0.0, 12.0]), total(&[9.0, 5.0, 1.0, 4.0]), 10.0);
        let found: Vec<f64> = found.iter().flatten().map(|share| share.total().expect("a number")).collect();
        assert!((found.iter().sum::<f64>() - 40.0).abs() < 1e-12 && found.iter().all(|share| *share > 0.0));
        assert!((found[0] / found[3] - 2.5).abs() < 1e-12 && (found[1] / found[2] - 5.0).abs() < 1e-12);
    }

    #[test]
    fn derivatives_agree_with_differences() {
        for at in [[25.0, 40.0, 60.0], [25.0, 40.0, 54.0], [25.0, 40.0, 80.0], [1.0, 2.0, 3.1]] {
            let (_, slopes) = extrapolated(at, 12.0);
            for i in 0..3 {
                let h = 1e-6;
                let moved = |h: f64| {
                    let mut at = at;
                    at[i] += h;
                    extrapolated(at, 12.0).0
                };
                let difference = (moved(h) - moved(-h)) / (2.0 * h);
                assert!(
                    (slopes[i] - difference).abs() < 1e-5 * difference.abs().max(1.0),
                    "{at:?} {i}: {} {difference}",
                    slopes[i]
                );
            }
        }
    }
}
