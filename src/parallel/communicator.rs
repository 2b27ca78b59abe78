//! What the rest asks of an engine.

use candle_core::{Result, bail};
use std::fmt::Debug;
use std::time::Duration;

/// Processes (or threads) that wait for one another: the few verbs that all that is parallel here is made of.
///
/// All of them are collective: every rank makes the same calls in the same order, and each waits for the others, at most the time limit.
pub trait Communicator: Debug + Send + Sync {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn size(&self) -> usize;

    /// The `bytes` of all ranks, in their order.
    ///
    /// # Errors
    /// When a rank does not come within the time limit, or is gone. The message names it where the engine knows it.
    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Replaces `values` by the sums over all ranks, on each rank the same bits. All ranks have as many.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    fn sum_f64(&self, values: &mut [f64]) -> Result<()>;

    /// [`sum_f64`](Self::sum_f64) in single precision.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    fn sum_f32(&self, values: &mut [f32]) -> Result<()>;

    /// The sums over all ranks of this rank's part of `values`, a reduce-scatter: `values` are the parts of all ranks one after the other,
    /// of as many numbers as `parts` says. An engine that does not have it adds up all parts on all ranks, by [`sum_f64`](Self::sum_f64).
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    fn scatter_sum_f64(&self, mut values: Vec<f64>, parts: &[usize]) -> Result<Vec<f64>> {
        self.sum_f64(&mut values)?;
        Ok(part_of(values, parts, self.rank()))
    }

    /// [`scatter_sum_f64`](Self::scatter_sum_f64) in single precision.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    fn scatter_sum_f32(&self, mut values: Vec<f32>, parts: &[usize]) -> Result<Vec<f32>> {
        self.sum_f32(&mut values)?;
        Ok(part_of(values, parts, self.rank()))
    }

    /// How long a rank waits for the others; ten minutes at first.
    fn set_time_limit(&self, limit: Duration);

    /// Called when this rank cannot go on with the others, who may be waiting: ends them where the engine can.
    fn abort(&self, why: &str);
}

/// The time limit of an engine that was given none.
pub(super) const TIME_LIMIT: Duration = Duration::from_secs(600);

/// One process, which waits for nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }

    fn sum_f64(&self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn sum_f32(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn set_time_limit(&self, _: Duration) {}

    fn abort(&self, _: &str) {}
}

/// The part of a rank.
fn part_of<T>(mut values: Vec<T>, parts: &[usize], rank: usize) -> Vec<T> {
    let from = parts.iter().take(rank).sum::<usize>().min(values.len());
    let mut part = values.split_off(from);
    part.truncate(parts.get(rank).copied().unwrap_or(0));
    part
}

/// Adds the rows of a gathered message up, in the order of the ranks.
pub(super) fn add<T: Copy + std::ops::AddAssign>(values: &mut [T], rows: &[Vec<T>]) -> Result<()> {
    for (rank, row) in rows.iter().enumerate() {
        if row.len() != values.len() {
            bail!(
                "parallel: rank {rank} adds {} numbers and this rank {}; all ranks must have the same model",
                row.len(),
                values.len()
            )
        }
        match rank {
            0 => values.copy_from_slice(row),
            _ => values.iter_mut().zip(row).for_each(|(sum, value)| *sum += *value),
        }
    }
    Ok(())
}
