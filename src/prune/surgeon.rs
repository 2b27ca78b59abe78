//! The optimal brain surgeon with Kronecker factors.

use crate::curvature::Factors;
use crate::linalg::cholesky::{inverse_spd, lower_factor};
use candle_core::{DType, Device, Result, Tensor, bail};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::inverse::{inverse, inverse_scratch};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{MatMut, MatRef, Par};
use rayon::prelude::*;

/// What a layer's weights are worth, and how the others make up for some that are removed.
///
/// The loss near its minimum is about `1/2 <dW, G dW A>` above it, with `dW` the change of the weights `[out, in]` (the bias, whose input
/// is 1, as a last column) and `A`, `G` the damped [`Factors`]. In that model
///
/// * to remove the one weight `(o, i)` costs `w^2 / (2 [G^-1]_oo [A^-1]_ii)`, if all others of the layer move by
///   `-w / ([G^-1]_oo [A^-1]_ii) G^-1[:, o] A^-1[i, :]` (Hassibi & Stork, "Second order derivatives for network pruning: optimal brain
///   surgeon", 1993, equation 5, with `F^-1 = G^-1 (x) A^-1`): [`Surgeon::cost_of_one`], [`Surgeon::remove_one`];
/// * a set of weights is removed row by row, with the outputs taken as independent: the kept weights `K` of a row become
///   `[A_KK]^-1 A_K: w`, the constrained least squares solution, exact for a linear layer with a Gaussian loss: [`Surgeon::remove`]. There
///   to remove one more costs `G_oo w^2 / (2 [A_KK^-1]_ii)`, its [`Surgeon::saliency`].
///
/// For the sets that pruning removes the second is the one to compare weights by: the first trusts that other outputs make up for a weight,
/// which they do not for many at once.
///
/// Biases are kept and corrected with the rest. A convolution's weights `(out, in, kh, kw)` are the matrix `(out, in kh kw)`; of a
/// convolution in groups each has its own factors. All is computed in f64 on the host.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kronwake::curvature::Factors;
/// use kronwake::prune::Surgeon;
///
/// // Two inputs that are nearly the same: what one leaves, the other takes over.
/// let a = Tensor::new(&[[[1f64, 0.9], [0.9, 1.]]], &Device::Cpu)?;
/// let g = Tensor::new(&[[[1f64]]], &Device::Cpu)?;
/// let surgeon = Surgeon::new(&Factors { name: "fc".into(), a, g }, 0.)?;
/// let w = Tensor::new(&[[1f64, 2.]], &Device::Cpu)?;
/// let kept = Tensor::new(&[[0u8, 1]], &Device::Cpu)?;
/// let after = surgeon.remove(&w, None, &kept)?.weight.to_vec2::<f64>()?;
/// assert!(after[0][0] == 0. && (after[0][1] - 2.9).abs() < 1e-12);
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct Surgeon {
    name: String,
    /// Rows and columns of a group's factors.
    out: usize,
    columns: usize,
    groups: Vec<Group>,
}

/// Matrices by rows.
#[derive(Debug, Clone)]
struct Group {
    a: Vec<f64>,
    inverse_a: Vec<f64>,
    inverse_g: Vec<f64>,
    /// The diagonal of G.
    gains: Vec<f64>,
}

/// Weights without those that were removed.
#[derive(Debug, Clone)]
pub struct Operated {
    /// In the shape, dtype and device of the weights before.
    pub weight: Tensor,
    /// The bias, if there is one.
    pub bias: Option<Tensor>,
    /// What each of the weights that are left is worth, in their shape, f64 on the host; 0 for those that were removed.
    pub saliency: Tensor,
}

impl Surgeon {
    /// Each factor gets `damping` times its mean eigenvalue added to its diagonal; the example `sparse` has 1e-3.
    ///
    /// # Errors
    /// If `damping` is negative or not finite, or a factor is not square or, damped, not positive definite.
    pub fn new(factors: &Factors, damping: f64) -> Result<Self> {
        let name = &factors.name;
        if !(damping.is_finite() && damping >= 0.0) {
            bail!("layer {name}: expected a finite damping of zero or more, got {damping}")
        }
        let (a, columns) = damped(&factors.a, damping, &format!("factor A of layer {name}"))?;
        let (g, out) = damped(&factors.g, damping, &format!("factor G of layer {name}"))?;
        if a.len() != g.len() {
            bail!("layer {name}: {} factors A, but {} factors G", a.len(), g.len())
        }
        let group = |(a, g): (Damped, Damped)| {
            let gains = g.matrix.iter().step_by(out + 1).copied().collect();
            Group { a: a.matrix, inverse_a: a.inverse, inverse_g: g.inverse, gains }
        };
        let groups = a.into_iter().zip(g).map(group).collect();
        Ok(Self { name: name.clone(), out, columns, groups })
    }

    /// The layer's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `G_oo w^2 / (2 [A_KK^-1]_ii)`: what each weight is worth where those that `kept` has as 0 stay removed and the others of its row
    /// make up for it. In the weights' shape, f64 on the host; 0 for removed weights.
    ///
    /// # Errors
    /// If weights, bias or mask do not fit the factors, or weights are not finite.
    pub fn saliency(&self, weight: &Tensor, bias: Option<&Tensor>, kept: &Tensor) -> Result<Tensor> {
        let kept = self.kept(weight, kept)?;
        let rows = self.rows(weight, bias)?;
        let spreads = self.by_row(&rows, &kept, |group, row, kept| group.spread(row, kept))?;
        self.values(weight, &rows, &spreads)
    }

    /// Removes what `kept` has as 0, all at once, and corrects the rest row by row. Weights that are zero before may be among the removed.
    ///
    /// # Errors
    /// As for [`Surgeon::saliency`].
    pub fn remove(&self, weight: &Tensor, bias: Option<&Tensor>, kept: &Tensor) -> Result<Operated> {
        let kept = self.kept(weight, kept)?;
        let rows = self.rows(weight, bias)?;
        let found = self.by_row(&rows, &kept, |group, row, kept| {
            let mut row = row.to_vec();
            group.correct(&mut row, kept)?;
            let spread = group.spread(&row, kept)?;
            Ok((row, spread))
        })?;
        let (rows, spreads): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        let rows = rows.concat();
        let saliency = self.values(weight, &rows, &spreads)?;
        let (weight, bias) = self.tensors(weight, bias, &rows)?;
        Ok(Operated { weight, bias, saliency })
    }

    /// `w^2 / (2 [G^-1]_oo [A^-1]_ii)`: what each weight is worth where all others of the layer make up for it. In the weights' shape,
    /// f64 on the host.
    ///
    /// # Errors
    /// As for [`Surgeon::saliency`].
    pub fn cost_of_one(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (rows, d) = (self.rows(weight, bias)?, self.columns);
        let inputs = d - usize::from(bias.is_some());
        let mut values = Vec::with_capacity(weight.elem_count());
        for (o, row) in rows.chunks_exact(d).enumerate() {
            let (group, at) = (&self.groups[o / self.out], o % self.out);
            let g = group.inverse_g[at * self.out + at];
            let spread = group.inverse_a.iter().step_by(d + 1);
            values.extend(row.iter().zip(spread).take(inputs).map(|(w, a)| w * w / (2.0 * g * a)));
        }
        Tensor::from_vec(values, weight.shape(), &Device::Cpu)
    }

    /// Removes the one weight at `(row, column)` of the matrix and corrects all others of the layer (of its group).
    ///
    /// # Errors
    /// If weights or bias do not fit the factors, or there is no such weight.
    pub fn remove_one(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        (row, column): (usize, usize),
    ) -> Result<(Tensor, Option<Tensor>)> {
        let mut rows = self.rows(weight, bias)?;
        let (inputs, d) = (self.columns - usize::from(bias.is_some()), self.columns);
        let (group, o) = (row / self.out, row % self.out);
        let Some(Group { inverse_a, inverse_g, .. }) = self.groups.get(group).filter(|_| column < inputs)
        else {
            bail!("layer {}: no weight ({row}, {column}) in {:?}", self.name, weight.dims())
        };
        let share = rows[row * d + column] / (inverse_g[o * self.out + o] * inverse_a[column * d + column]);
        for other in 0..self.out {
            let factor = share * inverse_g[o * self.out + other];
            let target = &mut rows[(group * self.out + other) * d..][..d];
            let source = &inverse_a[column * d..][..d];
            target.iter_mut().zip(source).for_each(|(w, a)| *w -= factor * a);
        }
        rows[row * d + column] = 0.0;
        self.tensors(weight, bias, &rows)
    }

    /// Weights, with the bias as a last column, by rows.
    fn rows(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Vec<f64>> {
        let name = &self.name;
        let out = self.out * self.groups.len();
        let inputs = weight.elem_count() / out.max(1);
        if weight.dims().first() != Some(&out) || inputs + usize::from(bias.is_some()) != self.columns {
            bail!(
                "layer {name}: expected {out} rows and, with the bias, {} columns, got weights {:?} {} a bias",
                self.columns,
                weight.dims(),
                if bias.is_some() { "with" } else { "without" }
            )
        }
        if let Some(bias) = bias.filter(|bias| bias.dims() != [out]) {
            bail!("layer {name}: expected a bias [{out}], got {:?}", bias.dims())
        }
        let weights = host(weight)?;
        let bias = bias.map(host).transpose()?.unwrap_or_default();
        let mut rows = Vec::with_capacity(out * self.columns);
        for (o, row) in weights.chunks_exact(inputs.max(1)).enumerate() {
            rows.extend_from_slice(row);
            rows.extend(bias.get(o));
        }
        if rows.iter().any(|w| !w.is_finite()) {
            bail!("layer {name}: the weights have NaN or infinite elements")
        }
        Ok(rows)
    }

    /// The columns of each row that are kept, the bias among them.
    fn kept(&self, weight: &Tensor, mask: &Tensor) -> Result<Vec<Vec<usize>>> {
        if mask.dims() != weight.dims() || mask.dtype() != DType::U8 {
            bail!(
                "layer {}: expected a mask of U8 {:?}, got {:?} {:?}",
                self.name,
                weight.dims(),
                mask.dtype(),
                mask.dims()
            )
        }
        let out = self.out * self.groups.len();
        let inputs = weight.elem_count() / out.max(1);
        let mask = mask.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
        let columns =
            |row: &[u8]| (0..self.columns).filter(|&i| row.get(i).is_none_or(|&keep| keep != 0)).collect();
        Ok(mask.chunks_exact(inputs.max(1)).map(columns).collect())
    }

    fn by_row<T: Send>(
        &self,
        rows: &[f64],
        kept: &[Vec<usize>],
        f: impl Fn(&Group, &[f64], &[usize]) -> std::result::Result<T, String> + Sync,
    ) -> Result<Vec<T>> {
        let each = rows.par_chunks_exact(self.columns).zip(kept).enumerate();
        let found: std::result::Result<Vec<T>, (usize, String)> = each
            .map(|(o, (row, kept))| f(&self.groups[o / self.out], row, kept).map_err(|error| (o, error)))
            .collect();
        found.map_err(|(o, error)| {
            candle_core::Error::Msg(format!(
                "layer {}, row {o}: factor A of the kept weights: {error}",
                self.name
            ))
        })
    }

    /// Saliencies of weights whose inverses have these diagonals.
    fn values(&self, weight: &Tensor, rows: &[f64], spreads: &[Vec<f64>]) -> Result<Tensor> {
        let inputs = weight.elem_count() / (self.out * self.groups.len());
        let mut values = Vec::with_capacity(weight.elem_count());
        for (o, (row, spread)) in rows.chunks_exact(self.columns).zip(spreads).enumerate() {
            let (group, at) = (&self.groups[o / self.out], o % self.out);
            let g = group.gains[at];
            // Removed weights have no spread.
            let value = |(w, a): (&f64, &f64)| if *a > 0.0 { g * w * w / (2.0 * a) } else { 0.0 };
            values.extend(row.iter().zip(spread).take(inputs).map(value));
        }
        Tensor::from_vec(values, weight.shape(), &Device::Cpu)
    }

    fn tensors(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        rows: &[f64],
    ) -> Result<(Tensor, Option<Tensor>)> {
        let inputs = self.columns - usize::from(bias.is_some());
        let like = |values: Vec<f64>, like: &Tensor| {
            let t = Tensor::from_vec(values, like.shape(), &Device::Cpu)?;
            t.to_dtype(like.dtype())?.to_device(like.device())
        };
        let each = || rows.chunks_exact(self.columns);
        let weights = each().flat_map(|row| &row[..inputs]).copied().collect();
        let biases = || each().map(|row| row[inputs]).collect();
        Ok((like(weights, weight)?, bias.map(|bias| like(biases(), bias)).transpose()?))
    }
}

impl Group {
    /// The least squares solution for the row whose columns other than `kept` become zero.
    fn correct(&self, row: &mut [f64], kept: &[usize]) -> std::result::Result<(), String> {
        let d = row.len();
        let removed = others(kept, d);
        if removed.iter().all(|&i| row[i] == 0.0) {
            return Ok(());
        }
        if removed.len() < kept.len() {
            // w - A^-1[:, S] (A^-1[S, S])^-1 w_S
            let mut share: Vec<f64> = removed.iter().map(|&i| row[i]).collect();
            solve(&self.inverse_a, &removed, d, &mut share)?;
            for (&s, share) in removed.iter().zip(share) {
                let column = &self.inverse_a[s * d..][..d];
                row.iter_mut().zip(column).for_each(|(w, a)| *w -= share * a);
            }
        } else {
            // [A_KK]^-1 A_K: w
            let pull = |&k: &usize| self.a[k * d..][..d].iter().zip(&*row).map(|(a, w)| a * w).sum::<f64>();
            let mut solution: Vec<f64> = kept.iter().map(pull).collect();
            solve(&self.a, kept, d, &mut solution)?;
            kept.iter().zip(solution).for_each(|(&k, w)| row[k] = w);
        }
        removed.iter().for_each(|&i| row[i] = 0.0);
        Ok(())
    }

    /// The diagonal of `[A_KK]^-1` at `kept`, 0 elsewhere.
    fn spread(&self, row: &[f64], kept: &[usize]) -> std::result::Result<Vec<f64>, String> {
        let d = row.len();
        let removed = others(kept, d);
        let mut spread = vec![0.0; d];
        if removed.len() < kept.len() {
            kept.iter().for_each(|&k| spread[k] = self.inverse_a[k * d + k]);
            if !removed.is_empty() {
                // [A_KK]^-1 = A^-1[K, K] - A^-1[K, S] (A^-1[S, S])^-1 A^-1[S, K]
                let (s, n) = (removed.len(), kept.len());
                let factor = lower_factor(&sub(&self.inverse_a, &removed, d), s, Par::Seq)?;
                let mut half: Vec<f64> = Vec::with_capacity(s * n);
                kept.iter().for_each(|&k| half.extend(removed.iter().map(|&s| self.inverse_a[s * d + k])));
                let (l, columns) = (
                    MatRef::from_column_major_slice(&factor, s, s),
                    MatMut::from_column_major_slice_mut(&mut half, s, n),
                );
                solve_lower_triangular_in_place(l, columns, Par::Seq);
                for (column, &k) in half.chunks_exact(s).zip(kept) {
                    spread[k] -= column.iter().map(|v| v * v).sum::<f64>();
                }
            }
        } else if !kept.is_empty() {
            let n = kept.len();
            let factor = lower_factor(&sub(&self.a, kept, d), n, Par::Seq)?;
            let mut inverted = vec![0.0; n * n];
            inverse(
                MatMut::from_row_major_slice_mut(&mut inverted, n, n),
                MatRef::from_column_major_slice(&factor, n, n),
                Par::Seq,
                MemStack::new(&mut MemBuffer::new(inverse_scratch::<f64>(n, Par::Seq))),
            );
            kept.iter().enumerate().for_each(|(at, &k)| spread[k] = inverted[at * n + at]);
        }
        Ok(spread)
    }
}

/// `x <- m[at, at]^-1 x`.
fn solve(m: &[f64], at: &[usize], d: usize, x: &mut [f64]) -> std::result::Result<(), String> {
    let n = at.len();
    let factor = lower_factor(&sub(m, at, d), n, Par::Seq)?;
    let l = MatRef::from_column_major_slice(&factor, n, n);
    let mut x = MatMut::from_column_major_slice_mut(x, n, 1);
    solve_lower_triangular_in_place(l, x.as_mut(), Par::Seq);
    solve_upper_triangular_in_place(l.transpose(), x, Par::Seq);
    Ok(())
}

/// `m[at, at]` by rows.
fn sub(m: &[f64], at: &[usize], d: usize) -> Vec<f64> {
    at.iter().flat_map(|&i| at.iter().map(move |&j| m[i * d + j])).collect()
}

/// The numbers below `d` that are not in the increasing list `some`.
fn others(some: &[usize], d: usize) -> Vec<usize> {
    let mut next = some.iter().peekable();
    (0..d).filter(|i| next.next_if_eq(&i).is_none()).collect()
}

fn host(t: &Tensor) -> Result<Vec<f64>> {
    t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// A damped factor and its inverse, by rows.
struct Damped {
    matrix: Vec<f64>,
    inverse: Vec<f64>,
}

/// The factors of all groups, and their size.
fn damped(factor: &Tensor, damping: f64, name: &str) -> Result<(Vec<Damped>, usize)> {
    let (groups, d) = match *factor.dims() {
        [groups, d, columns] if d == columns && groups * d > 0 => (groups, d),
        _ => bail!("{name}: expected square matrices [groups, d, d], got {:?}", factor.dims()),
    };
    let mut values = host(factor)?;
    for m in values.chunks_exact_mut(d * d) {
        let mean = m.iter().step_by(d + 1).sum::<f64>() / d as f64;
        m.iter_mut().step_by(d + 1).for_each(|v| *v += damping * mean);
    }
    let tensor = Tensor::from_slice(&values, (groups, d, d), &Device::Cpu)?;
    let inverses = host(&inverse_spd(&tensor, name)?)?;
    let pairs = values.chunks_exact(d * d).zip(inverses.chunks_exact(d * d));
    Ok((pairs.map(|(m, i)| Damped { matrix: m.to_vec(), inverse: i.to_vec() }).collect(), d))
}

#[cfg(test)]
mod tests;
