//! What the rest asks of an engine.

use super::bytes::{bytes_of, tensor_of};
use candle_core::{DType, Device, Result, Tensor, bail};
use half::bf16;
use std::fmt::Debug;
use std::time::{Duration, Instant};

/// What ranks do with a tensor that each of them has a copy of, of the same shape and element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// It becomes the sum over all ranks, on all of them the same bits.
    Sum,
    /// It becomes the sum over all ranks on this one; nobody reads it on the others after that.
    SumAt(usize),
    /// It becomes that of this rank.
    From(usize),
}

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

    /// [`sum_f64`](Self::sum_f64) in bfloat16, of which an engine may round each partial sum. An engine that does not have it gathers the values
    /// and adds them up in f32, in the order of the ranks, rounded once.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    fn sum_bf16(&self, values: &mut [bf16]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let rows = self.gather(&bytes)?;
        let rows: Vec<Vec<f32>> = rows.iter().map(|row| widened(row)).collect();
        let mut sums = vec![0f32; values.len()];
        add(&mut sums, &rows)?;
        values.iter_mut().zip(sums).for_each(|(value, sum)| *value = bf16::from_f32(sum));
        Ok(())
    }

    /// [`scatter_sum_f64`](Self::scatter_sum_f64) in bfloat16, by [`sum_bf16`](Self::sum_bf16) where an engine does not have it.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    fn scatter_sum_bf16(&self, mut values: Vec<bf16>, parts: &[usize]) -> Result<Vec<bf16>> {
        self.sum_bf16(&mut values)?;
        Ok(part_of(values, parts, self.rank()))
    }

    /// Whether tensors on this device are to go by [`transfer`](Self::transfer), because they stay there. Others go as numbers and bytes of the
    /// host. Not at first.
    fn takes(&self, _device: &Device) -> bool {
        false
    }

    /// Does what is said with each of these tensors, which all ranks give in the same order, and gives them back in it. Each is contiguous,
    /// and its memory is nobody else's unless it is the source of [`Transfer::From`]: an engine may work in place. One that does not
    /// have it goes by way of the host.
    ///
    /// # Errors
    /// As [`gather`](Self::gather); for an element type that the engine does not add up.
    fn transfer(&self, transfers: Vec<(Transfer, Tensor)>) -> Result<Vec<Tensor>> {
        by_host(self, &transfers)
    }

    /// What has become known of ranks that have left, where it can be known without waiting.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// How long a rank waits for the others.
    fn time_limit(&self) -> Duration {
        TIME_LIMIT
    }

    /// Sets how long a rank waits for the others; ten minutes at first.
    fn set_time_limit(&self, limit: Duration);

    /// Called when this rank cannot go on with the others, who may be waiting: ends them where the engine can.
    fn abort(&self, why: &str);
}

/// The time limit of an engine that was given none.
pub(super) const TIME_LIMIT: Duration = Duration::from_secs(600);

/// Times beyond this one could not be added to the present.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(1 << 30);

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

/// A tensor on the host, as it is sent.
enum Sent {
    Bytes(Vec<u8>),
    F64(Vec<f64>),
    F32(Vec<f32>),
    BF16(Vec<bf16>),
}

impl Sent {
    fn of(what: Transfer, tensor: &Tensor, rank: usize) -> Result<Self> {
        let flat = || tensor.flatten_all();
        Ok(match (what, tensor.dtype()) {
            (Transfer::From(source), _) if source == rank => Self::Bytes(bytes_of(tensor)?),
            (Transfer::From(_), _) => Self::Bytes(vec![]),
            (_, DType::F64) => Self::F64(flat()?.to_vec1()?),
            (_, DType::F32) => Self::F32(flat()?.to_vec1()?),
            (_, DType::BF16) => Self::BF16(flat()?.to_vec1()?),
            (_, other) => {
                bail!("parallel: expected a tensor of f64, f32 or bf16 to add up, got {other:?}")
            }
        })
    }
}

/// Transfers by way of the host.
fn by_host<C: Communicator + ?Sized>(engine: &C, transfers: &[(Transfer, Tensor)]) -> Result<Vec<Tensor>> {
    let sent = transfers.iter().map(|(what, tensor)| Sent::of(*what, tensor, engine.rank()));
    let sent = sent.collect::<Result<Vec<_>>>();
    // Nobody waits for a sum to which one has nothing to add.
    let said = sent.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let told = engine.gather(said.as_bytes())?;
    if let Some((rank, said)) = told.iter().enumerate().find(|(_, said)| !said.is_empty()) {
        bail!("rank {rank}: {}", String::from_utf8_lossy(said))
    }
    // All of them, before a device that has no room for one ends this.
    let arrived = |((what, _), sent): (&(Transfer, Tensor), Sent)| -> Result<Sent> {
        Ok(match sent {
            Sent::Bytes(own) => {
                let mut all = engine.gather(&own)?;
                match *what {
                    Transfer::From(rank) if rank < all.len() => Sent::Bytes(all.swap_remove(rank)),
                    Transfer::From(rank) => {
                        bail!("parallel: expected a rank below {}, got {rank}", engine.size())
                    }
                    Transfer::Sum | Transfer::SumAt(_) => Sent::Bytes(own),
                }
            }
            Sent::F64(mut values) => {
                engine.sum_f64(&mut values)?;
                Sent::F64(values)
            }
            Sent::F32(mut values) => {
                engine.sum_f32(&mut values)?;
                Sent::F32(values)
            }
            Sent::BF16(mut values) => {
                engine.sum_bf16(&mut values)?;
                Sent::BF16(values)
            }
        })
    };
    let arrived = transfers.iter().zip(sent?).map(arrived).collect::<Result<Vec<_>>>()?;
    let taken = |((what, tensor), arrived): (&(Transfer, Tensor), Sent)| {
        let (dims, dtype, device) = (tensor.dims(), tensor.dtype(), tensor.device());
        match *what {
            Transfer::SumAt(rank) if rank != engine.rank() => return Ok(tensor.clone()),
            Transfer::Sum | Transfer::SumAt(_) | Transfer::From(_) => {}
        }
        match arrived {
            Sent::Bytes(bytes) => tensor_of(&bytes, dims, dtype, device),
            Sent::F64(values) => Tensor::from_vec(values, dims, device),
            Sent::F32(values) => Tensor::from_vec(values, dims, device),
            Sent::BF16(values) => Tensor::from_vec(values, dims, device),
        }
    };
    transfers.iter().zip(arrived).map(taken).collect()
}

/// The values of bytes of bfloat16.
pub(super) fn widened(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|value| bf16::from_le_bytes([value[0], value[1]]).to_f32()).collect()
}

/// Polls until there is something, or the time is over.
#[cfg_attr(not(any(test, feature = "mpi", feature = "nccl")), allow(dead_code))]
pub(super) fn until<T>(end: Instant, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let mut polls = 0u32;
    loop {
        if let Some(found) = ready()? {
            return Ok(Some(found));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        polls = polls.saturating_add(1);
        // Others on this processor may be what is waited for.
        if polls < 5000 { std::thread::yield_now() } else { std::thread::sleep(Duration::from_micros(50)) }
    }
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
