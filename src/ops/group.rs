//! Norms of groups of weights: their sums, the gradients and proximal steps made of them.
//!
//! With `u = |w|`, a penalty here is `sum_i (l1 u_i + l2 u_i^2) + sum_g c_g ||w_g||`, `c_g = group sqrt(n_g)` or `group`. The
//! sums `(sum w^2, sum |w|)` of each group are taken in one pass over the weights and kept in f64, in which no square of an f32
//! weight overflows or vanishes; a second pass makes the gradient or the proximal step. The latter is
//! `x = shrink (1 - step c_g / ||s_g||)_+ s`, where `s` is `w` softly thresholded at `step l1` and
//! `shrink = 1 / (1 + 2 step l2)`.

use candle_core::{DType, Device, Result, Storage, Tensor, WithDType, bail};

use super::element::{Host, float_dispatch};
use super::{group_host, precomputed};
use crate::gpu::{Gpu, tensor_of};

mod device;

/// Blocks of `rows` x `columns` elements of an `m` x `n` matrix, smaller at its right and lower edge. A group is one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tiles {
    pub m: usize,
    pub n: usize,
    pub rows: usize,
    pub columns: usize,
}

impl Tiles {
    /// Larger blocks than the matrix are cut to it.
    pub fn new([m, n]: [usize; 2], [rows, columns]: [usize; 2]) -> Self {
        Self { m, n, rows: rows.clamp(1, m.max(1)), columns: columns.clamp(1, n.max(1)) }
    }

    /// Blocks side by side.
    pub fn across(&self) -> usize {
        self.n.div_ceil(self.columns)
    }

    pub fn count(&self) -> usize {
        if self.n == 0 { 0 } else { self.m.div_ceil(self.rows) * self.across() }
    }

    /// Elements of a block.
    pub fn size(&self, group: usize) -> usize {
        let (i, j) = (group / self.across() * self.rows, group % self.across() * self.columns);
        self.rows.min(self.m - i) * self.columns.min(self.n - j)
    }

    /// Where the elements of a block lie.
    pub fn members(&self, group: usize) -> impl Iterator<Item = usize> + use<> {
        let (i, j) = (group / self.across() * self.rows, group % self.across() * self.columns);
        let (down, right, n) = ((i + self.rows).min(self.m), (j + self.columns).min(self.n), self.n);
        (i..down).flat_map(move |row| (j..right).map(move |column| row * n + column))
    }

    /// How many elements in a row are of one block: all of it where blocks are as wide as the matrix.
    pub fn run(&self) -> usize {
        if self.columns == self.n { self.rows * self.n } else { self.columns }
    }
}

/// A penalty made of norms; the factors are at least 0.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norms {
    pub name: &'static str,
    pub l1: f64,
    pub l2: f64,
    /// The factor of the groups' norms.
    pub group: f64,
    /// Whether it is times the root of a group's size.
    pub sized: bool,
}

/// What is made of each weight.
#[derive(Clone, Copy)]
pub(crate) enum Map<'a> {
    /// The gradient, times a scalar of the accumulator's dtype.
    Gradient(Option<&'a Tensor>),
    Prox {
        step: f64,
    },
}

/// Refuses what is no factor of a penalty.
pub(crate) fn check_factor(name: &str, factor: f64) -> Result<()> {
    if !(0. ..f64::INFINITY).contains(&factor) {
        bail!("{name}: a factor of {factor}, expected a finite number of at least 0")
    }
    Ok(())
}

/// The dtype of a penalty's value.
pub(crate) fn value_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { dtype } else { DType::F32 }
}

impl Norms {
    /// `c_g` of a group of `size` weights.
    pub fn factor(&self, size: usize) -> f64 {
        if self.sized { self.group * (size as f64).sqrt() } else { self.group }
    }

    /// The penalty as a differentiable scalar.
    pub fn value(self, w: &Tensor, tiles: Tiles) -> Result<Tensor> {
        let weights = w.detach().contiguous()?;
        let sums = sums(self.name, &weights, tiles, 0.)?;
        let value = self.value_of(&sums, tiles, 0, w.dtype())?;
        precomputed::of_one(self.name, w, value, move |grad| {
            self.map(&weights, tiles, Some((&sums, 0)), Map::Gradient(Some(grad)))
        })
    }

    /// The penalty and its gradient, times `factor`.
    pub fn value_and_gradient(self, w: &Tensor, tiles: Tiles, factor: f64) -> Result<(Tensor, Tensor)> {
        check_factor(self.name, factor)?;
        let norms = Self { l1: factor * self.l1, l2: factor * self.l2, group: factor * self.group, ..self };
        let w = w.detach().contiguous()?;
        let sums = sums(norms.name, &w, tiles, 0.)?;
        let value = norms.value_of(&sums, tiles, 0, w.dtype())?;
        Ok((tensor_of(value, ()), norms.map(&w, tiles, Some((&sums, 0)), Map::Gradient(None))?))
    }

    pub fn gradient(&self, w: &Tensor, tiles: Tiles) -> Result<Tensor> {
        let w = w.detach().contiguous()?;
        let sums = if self.group > 0. { Some(sums(self.name, &w, tiles, 0.)?) } else { None };
        self.map(&w, tiles, sums.as_ref().map(|sums| (sums, 0)), Map::Gradient(None))
    }

    pub fn prox(&self, w: &Tensor, tiles: Tiles, step: f64) -> Result<Tensor> {
        self.check_step(step)?;
        let w = w.detach().contiguous()?;
        let sums = if self.group > 0. { Some(sums(self.name, &w, tiles, step * self.l1)?) } else { None };
        self.map(&w, tiles, sums.as_ref().map(|sums| (sums, 0)), Map::Prox { step })
    }

    /// The proximal step in the metric of a diagonal, of contiguous weights in f64 on a GPU. NaN for a group with a weight or an element
    /// of the diagonal that is none.
    pub fn scaled_prox(
        &self,
        gpu: &Gpu,
        tiles: Tiles,
        [w, diagonal]: [&Tensor; 2],
        step: f64,
    ) -> Result<Tensor> {
        device::scaled_prox(self, gpu, tiles, [w, diagonal], step)
    }

    pub fn check_step(&self, step: f64) -> Result<()> {
        if !(0. ..f64::INFINITY).contains(&step) {
            bail!("{}: a proximal step of {step}, expected a finite number of at least 0", self.name)
        }
        Ok(())
    }

    /// The value, of groups that have `extra` more weights than `tiles` says.
    pub fn value_of(&self, sums: &Tensor, tiles: Tiles, extra: usize, dtype: DType) -> Result<Storage> {
        if let Some(gpu) = Gpu::of(sums.device()) {
            return device::value(self, &gpu, sums, tiles, extra, dtype);
        }
        let host = Host::of(sums);
        let values = host.values::<f64>()?;
        let (pairs, _) = values.as_chunks::<2>();
        let terms = pairs.iter().enumerate().map(|(group, [squares, sum])| {
            self.l1 * sum + self.l2 * squares + self.factor(tiles.size(group) + extra) * squares.sqrt()
        });
        let value: f64 = terms.sum();
        Ok(Storage::Cpu(match value_dtype(dtype) {
            DType::F64 => f64::to_cpu_storage_owned(vec![value]),
            _ => f32::to_cpu_storage_owned(vec![value as f32]),
        }))
    }

    /// The gradient or the proximal step of contiguous weights, of their groups' sums where they are known, as they are to be where the
    /// penalty has a norm of groups. Without sums the weights are checked.
    pub fn map(
        &self,
        w: &Tensor,
        tiles: Tiles,
        sums: Option<(&Tensor, usize)>,
        map: Map<'_>,
    ) -> Result<Tensor> {
        if let Some(gpu) = Gpu::of(w.device()) {
            return device::map(self, &gpu, w, tiles, sums, map);
        }
        let scale = match map {
            Map::Gradient(Some(scale)) => scale.to_dtype(DType::F64)?.to_scalar()?,
            _ => 1.,
        };
        let checked = sums.is_some();
        let factors = match sums.filter(|_| self.group > 0.) {
            Some((sums, extra)) => {
                let host = Host::of(sums);
                let values = host.values::<f64>()?;
                let (pairs, _) = values.as_chunks::<2>();
                let factor = |(group, pair): (usize, &[f64; 2])| {
                    let (norm, c) = (pair[0].sqrt(), self.factor(tiles.size(group) + extra));
                    match map {
                        Map::Gradient(_) if norm > 0. => c / norm,
                        Map::Prox { step } if norm > step * c => 1. - step * c / norm,
                        _ => 0.,
                    }
                };
                Some(pairs.iter().enumerate().map(factor).collect::<Vec<f64>>())
            }
            None => None,
        };
        float_dispatch!(self.name, w.dtype(), T => {
            let host = Host::of(w);
            let values = host.values::<T>()?;
            if !checked {
                group_host::check(self.name, w.dims(), &values)?;
            }
            let factors = factors.as_deref();
            let out: Vec<T> = match map {
                Map::Gradient(_) => {
                    let (l1, l2) = (self.l1, 2. * self.l2);
                    group_host::map(&values, tiles, factors.unwrap_or(&[]), 0., move |w, factor| {
                        let sign = if w == 0. { w } else { 1f64.copysign(w) };
                        scale * (l1 * sign + (l2 + factor) * w)
                    })
                }
                Map::Prox { step } => {
                    let (threshold, shrink) = (step * self.l1, 1. / (1. + 2. * step * self.l2));
                    group_host::map(&values, tiles, factors.unwrap_or(&[]), 1., move |w, factor| {
                        group_host::soft(w, threshold) * (factor * shrink)
                    })
                }
            };
            Tensor::from_vec(out, w.shape(), &Device::Cpu)
        })
    }
}

/// Contiguous weights, each softly thresholded and then times its group's of the `factors`, `[groups]` in f64.
pub(crate) fn scaled(w: &Tensor, tiles: Tiles, threshold: f64, factors: &Tensor) -> Result<Tensor> {
    const NAME: &str = "group_map";
    if w.elem_count() == 0 {
        return Ok(w.clone());
    }
    if let Some(gpu) = Gpu::of(w.device()) {
        return device::scaled(&gpu, NAME, w, tiles, threshold, factors);
    }
    let factors = Host::of(factors);
    let factors = factors.values::<f64>()?;
    float_dispatch!(NAME, w.dtype(), T => {
        let host = Host::of(w);
        let out = group_host::map(&host.values::<T>()?, tiles, &factors, 1., move |w, factor| group_host::soft(w, threshold) * factor);
        Tensor::from_vec(out, w.shape(), &Device::Cpu)
    })
}

/// `(sum s^2, sum |s|)` of each group, `[groups, 2]` in f64, where `s` is `w` softly thresholded; `w` is contiguous.
///
/// # Errors
/// On the CPU, if a weight is NaN or infinite.
pub(crate) fn sums(name: &str, w: &Tensor, tiles: Tiles, threshold: f64) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(w.device()) {
        return device::sums(&gpu, w, tiles, threshold);
    }
    let sums = float_dispatch!(name, w.dtype(), T => {
        let host = Host::of(w);
        let values = host.values::<T>()?;
        let sums = group_host::sums(&values, tiles, threshold);
        // A square in f64 is finite where a weight of f32 is, so that this costs no pass of its own.
        if !sums.iter().flatten().sum::<f64>().is_finite() {
            group_host::check(name, w.dims(), &values)?;
        }
        sums
    });
    let flat = sums.into_iter().flatten().collect::<Vec<_>>();
    Tensor::from_vec(flat, (tiles.count(), 2), &Device::Cpu)
}
