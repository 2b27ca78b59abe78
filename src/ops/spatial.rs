//! The spatial entropy of a layer's weights and its gradient; see [`crate::penalty::Spatial`] for what it means.
//!
//! With `a = |W|` seen as `m x n` cells of `k` elements, `S = sum a`, the marginals `r`, `c` of the cells and the shares
//! `p = a / S` of the elements, the entropy and its largest possible value are
//!
//! `H = kappa (H(r) + H(c)) + (1 - kappa) H(p)`, `L = kappa ln(m n) + (1 - kappa) ln(m n k)`,
//!
//! the value is `R = 2 ln S + 2 gamma ln(H / L) - ln sum W^2`, and with
//! `T_ij = -kappa ln(r_i c_j) - (1 - kappa) ln p_ij` the gradient is `2 sign(W_ij) / S (1 + gamma (T_ij - H) / H)`, less
//! `2 W_ij / sum W^2` where the last term of `R` counts. The shares of rows and columns and `H / L` are at least 1e-9 in
//! logarithms, as is `p_ij` in that of `T_ij`.
//!
//! One pass takes the sums of rows and columns, `sum a ln a` and `sum W^2`, from which `H(p) = ln S - (sum a ln a) / S`; a second
//! makes the gradient, on the CPU of the logarithms of the first, which are kept where the gradient will be. The sums are in f64, where
//! nothing overflows or vanishes for weights between 1e-150 and 1e150, as if all were divided by the largest first.

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor, WithDType};
use rayon::prelude::*;

use super::element::{Element, Host, Real, float_dispatch};
use super::group::value_dtype;
use super::memory::keep_freed_blocks;
use super::simd::{Level, vectorized, with_level};
use super::{group_host, precomputed};
use crate::gpu::{Gpu, tensor_of};

const NAME: &str = "spatial";
const FLOOR: f64 = 1e-9;
/// `ln FLOOR`.
const LOG_FLOOR: f64 = -20.723_265_836_946_41;

/// The penalty of one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entropy {
    /// What value and gradient are times.
    pub factor: f64,
    pub kappa: f64,
    pub gamma: f64,
    pub exact: bool,
    /// The value where all weights are zero.
    pub empty: f64,
}

/// How weights `(m, n, ..)` are seen: one dimension is a column.
#[derive(Clone, Copy)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
}

impl Shape {
    fn of(w: &Tensor) -> Self {
        let dims = w.dims();
        let at = |i: usize| dims.get(i).copied().unwrap_or(1);
        Self { m: at(0), n: at(1), k: dims.get(2..).unwrap_or(&[]).iter().product() }
    }

    fn width(&self) -> usize {
        self.n * self.k
    }
}

/// What the first pass over contiguous weights found.
pub(crate) struct Pass {
    entropy: Entropy,
    weights: Tensor,
    /// `R`.
    value: Storage,
    seen: Seen,
    /// `ln a`, 0 of zero, in the accumulator's type; where the gradient is to be made at once, on the CPU.
    logs: Option<CpuStorage>,
}

impl Pass {
    /// The value with the gradient, times a scalar of the value's dtype.
    pub fn finish(self, scale: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let gradient = self.entropy.slope(&self.weights, &self.seen, self.logs, scale)?;
        Ok((tensor_of(self.value, ()), gradient))
    }

    /// The value.
    pub fn value(&self) -> Result<Tensor> {
        Ok(tensor_of(self.value.try_clone(&Layout::contiguous(()))?, ()))
    }
}

/// What the gradient needs of the first pass.
struct Seen {
    /// `ln r` and `ln c`, `[m + n]` in f64.
    marginals: Tensor,
    /// `ln S`, `2 / S` (0 of zero weights), `H` (0 where its logarithm is at the floor) and `sum W^2`, in f64.
    numbers: Tensor,
}

/// The sums of the first pass, with the rows' and columns' in one vector.
struct Sums {
    marginals: Vec<f64>,
    logs: f64,
    squares: f64,
}

fn log_share(share: f64) -> f64 {
    share.max(FLOOR).ln()
}

impl Entropy {
    /// `R` as a differentiable scalar.
    pub fn value(self, w: &Tensor) -> Result<Tensor> {
        let Pass { weights, value, seen, .. } = self.pass(w, false)?;
        precomputed::of_one(NAME, w, value, move |grad| self.slope(&weights, &seen, None, Some(grad)))
    }

    /// The first pass, for a gradient that is to be made at once.
    pub fn start(&self, w: &Tensor) -> Result<Pass> {
        self.pass(w, true)
    }

    fn pass(&self, w: &Tensor, keep: bool) -> Result<Pass> {
        let weights = w.detach().contiguous()?;
        let (shape, mut logs) = (Shape::of(w), None);
        let mut sums = if w.elem_count() == 0 {
            Sums { marginals: vec![0.; shape.m + shape.n], logs: 0., squares: 0. }
        } else if let Some(gpu) = Gpu::of(w.device()) {
            let (value, seen) = self.gpu_pass(&gpu, &weights, shape)?;
            return Ok(Pass { entropy: *self, weights, value, seen, logs });
        } else {
            float_dispatch!(NAME, w.dtype(), T => {
                type A = <T as Element>::Acc;
                keep_freed_blocks();
                let host = Host::of(&weights);
                let values = host.values::<T>()?;
                let mut kept = if keep { vec![A::ZERO; values.len()] } else { vec![] };
                let sums = sums(&values, shape, &mut kept);
                if !sums.squares.is_finite() {
                    group_host::check(NAME, w.dims(), &values)?;
                }
                logs = keep.then(|| A::to_cpu_storage_owned(kept));
                sums
            })
        };
        let sum: f64 = sums.marginals[..shape.m].iter().sum();
        let (mut value, mut numbers) = (self.empty, [0.; 4]);
        if sum > 0. {
            let mut marginal = 0.;
            for share in &mut sums.marginals {
                let log = log_share(*share / sum);
                marginal -= *share / sum * log;
                *share = log;
            }
            let cells = shape.m as f64 * shape.n as f64;
            let most = self.kappa * cells.ln() + (1. - self.kappa) * (cells * shape.k as f64).ln();
            let entropy = self.kappa * marginal + (1. - self.kappa) * (sum.ln() - sums.logs / sum);
            // A single weight has no arrangement.
            let share = if most > 0. { entropy / most } else { 1. };
            value = 2. * sum.ln() + 2. * self.gamma * log_share(share) - sums.squares.ln();
            let slope = if most > 0. && share > FLOOR { entropy } else { 0. };
            numbers = [sum.ln(), 2. / sum, slope, sums.squares];
        }
        let device = w.device();
        let seen = Seen {
            marginals: Tensor::from_vec(sums.marginals, shape.m + shape.n, device)?,
            numbers: Tensor::new(&numbers, device)?,
        };
        let value = Tensor::new(self.factor * value, device)?.to_dtype(value_dtype(w.dtype()))?;
        let (storage, layout) = value.storage_and_layout();
        Ok(Pass { entropy: *self, weights, value: storage.try_clone(layout)?, seen, logs })
    }

    /// The gradient, times a scalar, of the logarithms of the weights' sizes where they are known.
    fn slope(
        &self,
        w: &Tensor,
        seen: &Seen,
        logs: Option<CpuStorage>,
        scale: Option<&Tensor>,
    ) -> Result<Tensor> {
        let shape = Shape::of(w);
        if w.elem_count() == 0 {
            return w.zeros_like();
        }
        if let Some(gpu) = Gpu::of(w.device()) {
            return self.gpu_slope(&gpu, w, seen, scale);
        }
        let scale = self.factor * scale.map_or(Ok(1.), |scale| scale.to_dtype(DType::F64)?.to_scalar())?;
        let (marginals, numbers) = (Host::of(&seen.marginals), Host::of(&seen.numbers));
        let (marginals, numbers) = (marginals.values::<f64>()?, numbers.values::<f64>()?);
        let (rows, columns) = marginals.split_at(shape.m);
        let [log_sum, two_over_sum, entropy, squares] = [0, 1, 2, 3].map(|at| numbers[at]);
        let slope = if entropy > 0. { self.gamma / entropy } else { 0. };
        let unit = scale * two_over_sum;
        // What the row, the column and the element itself add, in the type of the accumulator.
        let row_part = move |row: f64| unit * (1. - slope * (entropy + self.kappa * row));
        let column_part = |column: &f64| -unit * slope * self.kappa * column;
        let columns = columns.iter().flat_map(|column| std::iter::repeat_n(column_part(column), shape.k));
        let own_factor = -unit * slope * (1. - self.kappa);
        // In two factors, which are in f32's range where the weights are.
        let one_over_norm = if self.exact && two_over_sum > 0. { 1. / squares.sqrt() } else { 0. };
        float_dispatch!(NAME, w.dtype(), T => {
            type A = <T as Element>::Acc;
            let host = Host::of(w);
            let values = host.values::<T>()?;
            let columns: Vec<A> = columns.map(A::rounded).collect();
            let constants = [log_sum, LOG_FLOOR, own_factor, one_over_norm, 2. * scale * one_over_norm].map(A::rounded);
            let logs = logs.and_then(A::from_storage).filter(|logs| logs.len() == values.len());
            let known = logs.is_some();
            let mut out = logs.unwrap_or_else(|| vec![A::ZERO; values.len()]);
            let lines = out.par_chunks_mut(shape.width()).zip(values.par_chunks(shape.width())).zip(rows.par_iter());
            lines.with_min_len((SHARE / shape.width()).max(1)).for_each(|((out, w), row)| {
                let [log_sum, floor, own_factor, one_over_norm, shrink] = constants;
                let row = A::rounded(row_part(*row));
                let slope = |log: A, w: A, column: A| {
                    let pull = row + column + own_factor * (log - log_sum).max(floor);
                    let slope = if w < A::ZERO { A::ZERO - pull } else { pull } - shrink * (one_over_norm * w);
                    if w == A::ZERO { A::ZERO } else { slope }
                };
                let line = out.iter_mut().zip(w).zip(&columns);
                with_level!(level => level.call(#[inline(always)] || {
                    if known {
                        line.for_each(|((out, w), column)| *out = slope(*out, w.widen(), *column));
                    } else {
                        line.for_each(|((out, w), column)| {
                            *out = slope(w.widen().abs().ln_positive(level), w.widen(), *column)
                        });
                    }
                }))
            });
            Tensor::from_vec(T::narrow_vec(out), w.shape(), &Device::Cpu)
        })
    }
}

/// Elements that are worth a task of their own.
const SHARE: usize = 1 << 14;

/// The sums `[sum a, sum a ln a, sum a^2]` of a line of weights with the logarithms of their sizes; each weight is added to its column's.
#[inline(always)]
fn line_sums<T: Element>(w: &[T], logs: &[T::Acc], columns: &mut [f64]) -> [f64; 3] {
    /// Partial sums, so that the loop vectorizes.
    const PARTS: usize = 16;
    let (mut sizes, mut products, mut squares) = ([0.; PARTS], [0.; PARTS], [0.; PARTS]);
    let ((w, last_w), (logs, last_logs)) = (w.as_chunks::<PARTS>(), logs.as_chunks::<PARTS>());
    let (columns, last_columns) = columns.as_chunks_mut::<PARTS>();
    for ((w, logs), columns) in w.iter().zip(logs).zip(columns) {
        for at in 0..PARTS {
            let size = w[at].widen().to_f64().abs();
            columns[at] += size;
            sizes[at] += size;
            products[at] += size * logs[at].to_f64();
            squares[at] += size * size;
        }
    }
    let mut sums = [sizes, products, squares].map(|parts| parts.iter().sum::<f64>());
    for ((w, log), column) in last_w.iter().zip(last_logs).zip(last_columns) {
        let size = w.widen().to_f64().abs();
        *column += size;
        sums[0] += size;
        sums[1] += size * log.to_f64();
        sums[2] += size * size;
    }
    sums
}

/// The logarithms of the sizes of a line of weights, 0 of zero. In a loop of their own: they leave no registers for sums.
fn line_logs<T: Element>(w: &[T], logs: &mut [T::Acc]) {
    with_level!(level => level.call(#[inline(always)] || {
        for (log, w) in logs.iter_mut().zip(w) {
            let size = w.widen().abs();
            *log = if size > T::Acc::ZERO { size.ln_positive(level) } else { T::Acc::ZERO };
        }
    }))
}

/// The sums of at least one weight. The logarithms of their sizes are left in `kept`, which is empty or as long as `w`.
fn sums<T: Element>(w: &[T], shape: Shape, kept: &mut [T::Acc]) -> Sums {
    let Shape { m, n, k } = shape;
    // The rows are cut by their number alone, so that the sums do not depend on the number of threads.
    let band = (SHARE / shape.width()).max(m.div_ceil(64)).max(1);
    let width = shape.width();
    let mut kept: Vec<_> = kept.chunks_mut(band * width).collect();
    kept.resize_with(m.div_ceil(band), Default::default);
    let parts: Vec<_> = w
        .par_chunks(band * width)
        .zip(kept)
        .map(|(w, kept)| {
            let (mut rows, mut columns) = (Vec::with_capacity(band), vec![0.; width]);
            let mut passing = vec![T::Acc::ZERO; width];
            let mut totals = [0.; 2];
            for (i, line) in w.chunks_exact(width).enumerate() {
                let logs = kept.get_mut(i * width..(i + 1) * width).unwrap_or(&mut passing);
                line_logs(line, logs);
                let [row, of_logs, squares] = vectorized(
                    #[inline(always)]
                    || line_sums(line, logs, &mut columns),
                );
                rows.push(row);
                totals[0] += of_logs;
                totals[1] += squares;
            }
            (rows, columns, totals)
        })
        .collect();
    let mut sums = Sums { marginals: Vec::with_capacity(m + n), logs: 0., squares: 0. };
    let mut columns = vec![0.; width];
    for (rows, part, [logs, squares]) in parts {
        sums.marginals.extend(rows);
        columns.iter_mut().zip(part).for_each(|(column, part)| *column += part);
        sums.logs += logs;
        sums.squares += squares;
    }
    sums.marginals.extend(columns.chunks_exact(k).map(|cell| cell.iter().sum::<f64>()));
    sums
}

mod device;
