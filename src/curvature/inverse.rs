//! Damped inverses of Kronecker products, in the form in which they multiply a gradient.

use super::damping::DampingKind;
use super::factor_shape::{
    Damped, curved, cut, fitted, from_left, from_right, is_diagonal, pi_damped, rotated, sandwich,
};
use super::rounding::{above_rounding, below_rounding, widened};
use super::split::{scaled, squares};
use super::standard;
use crate::gpu::Gpu;
use crate::linalg::cholesky::inverse_spd_all;
use crate::linalg::eigh::{Eigh, eigh_all};
use crate::linalg::kron::inverse_spectrum;
use crate::linalg::low_rank::{LowRank, low_rank_all};
use crate::linalg::newton::{NewtonJob, newton_all};
use crate::linalg::next;
use crate::linalg::sketch::is_sketch;
use crate::ops::dense::{mix, product};
use crate::parallel::Division;
use candle_core::{DType, Device, Result, Tensor, bail};

/// How the damped factors are inverted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Inverse {
    /// By eigendecomposition; works with every damping.
    #[default]
    Eigen,
    /// By Cholesky factorization, cheaper than an eigendecomposition; with [`DampingKind::Pi`] only.
    Cholesky,
    /// By Newton's iteration from the last inverse, matrix products alone; with [`DampingKind::Pi`] only.
    Newton,
}

/// A damped inverse of `A (x) G`, for gradients of shape `[groups, out, in]`; factors are full, in runs, or of low rank.
#[derive(Debug, Clone)]
pub(crate) enum Preconditioner {
    /// `V = G^-1 g A^-1`; those of low rank are [`LowRank::inverse`].
    Factors { inv_a: Tensor, inv_g: Tensor },
    /// `V = Kg [(Kg^T g Ka) * scale] Ka^T`; `K` are eigenvectors, orthogonal or of a generalized problem, and 1 where a factor is
    /// diagonal. The scale has the rows and columns that fill up runs, too.
    Basis { basis_a: Tensor, basis_g: Tensor, scale: Tensor },
    /// The same where one of the factors or both are of low rank: its eigenvectors are `[groups, k, d]`, a vector a row, and the scale has a
    /// last row or column for all directions that they leave. Before and after that, the exact solve of the quadratic wake multiplies with a
    /// root of such a factor's inverse.
    LowRank {
        basis_a: Tensor,
        basis_g: Tensor,
        scale: Tensor,
        root_a: Option<Tensor>,
        root_g: Option<Tensor>,
    },
}

impl Preconditioner {
    /// `V`, the gradient times the inverse.
    pub fn apply(&self, gradient: &Tensor) -> Result<Tensor> {
        match self {
            Self::Factors { inv_a, inv_g } => sandwich(inv_g, gradient, inv_a),
            Self::Basis { basis_a, basis_g, scale } => {
                let inside = Self::inside(basis_a, basis_g, scale, gradient)?;
                Self::outside(basis_a, basis_g, &(inside * scale)?, gradient)
            }
            Self::LowRank { basis_a, basis_g, scale, root_a, root_g } => {
                let rooted = |x: &Tensor| -> Result<Tensor> {
                    let x = root_g.as_ref().map_or(Ok(x.clone()), |root| from_left(root, x))?;
                    root_a.as_ref().map_or(Ok(x.clone()), |root| from_right(&x, root))
                };
                rooted(&scaled(basis_g, &rooted(gradient)?, basis_a, scale)?)
            }
        }
    }

    /// What it is the inverse of, times `x`, where factors of low rank have been decomposed for it: to decompose them again would take more time
    /// than the product.
    pub fn undone(&self, x: &Tensor) -> Result<Option<Tensor>> {
        match self {
            Self::LowRank { basis_a, basis_g, scale, root_a: None, root_g: None } => {
                scaled(basis_g, x, basis_a, &scale.recip()?).map(Some)
            }
            Self::LowRank { .. } | Self::Factors { .. } | Self::Basis { .. } => Ok(None),
        }
    }

    /// The inner product of `x` and [`Preconditioner::undone`], without that.
    pub fn length_undone(&self, x: &Tensor) -> Result<Option<f64>> {
        match self {
            Self::LowRank { basis_a, basis_g, scale, root_a: None, root_g: None } => {
                squares(basis_g, x, basis_a, &scale.recip()?).map(Some)
            }
            Self::LowRank { .. } | Self::Factors { .. } | Self::Basis { .. } => Ok(None),
        }
    }

    /// A gradient in the coordinates of the eigenvectors.
    pub fn inside(basis_a: &Tensor, basis_g: &Tensor, scale: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let (_, rows, columns) = scale.dims3()?;
        rotated(&basis_g.t()?, &fitted(gradient, (rows, columns))?, basis_a)
    }

    /// The way back, to a matrix shaped as `gradient`.
    pub fn outside(basis_a: &Tensor, basis_g: &Tensor, inside: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let (_, rows, columns) = gradient.dims3()?;
        cut(&rotated(basis_g, inside, &basis_a.t()?)?, (rows, columns))
    }

    /// The same kind of inverse with every tensor replaced, in the order of [`Preconditioner::parts`].
    pub fn map(&self, mut change: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::Factors { inv_a, inv_g } => Self::Factors { inv_a: change(inv_a)?, inv_g: change(inv_g)? },
            Self::Basis { basis_a, basis_g, scale } => {
                Self::Basis { basis_a: change(basis_a)?, basis_g: change(basis_g)?, scale: change(scale)? }
            }
            Self::LowRank { basis_a, basis_g, scale, root_a, root_g } => Self::LowRank {
                basis_a: change(basis_a)?,
                basis_g: change(basis_g)?,
                scale: change(scale)?,
                root_a: root_a.as_ref().map(&mut change).transpose()?,
                root_g: root_g.as_ref().map(&mut change).transpose()?,
            },
        })
    }

    /// The inverse for gradients as they are, of one for gradients in the coordinates `inputs`.
    fn of_inputs(self, inputs: &Tensor) -> Result<Self> {
        Ok(match self {
            Self::Factors { inv_a, inv_g } => {
                let half = standard::outside(inputs, &inv_a)?;
                Self::Factors { inv_a: standard::basis_outside(inputs, &half)?, inv_g }
            }
            Self::Basis { basis_a, basis_g, scale } => {
                Self::Basis { basis_a: standard::basis_outside(inputs, &basis_a)?, basis_g, scale }
            }
            Self::LowRank { basis_a, basis_g, scale, root_a, root_g } => Self::LowRank {
                basis_a: standard::basis_outside(inputs, &basis_a)?,
                basis_g,
                scale,
                root_a,
                root_g,
            },
        })
    }

    /// Every tensor with its name, for saving and for counting bytes.
    pub fn parts(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Factors { inv_a, inv_g } => vec![("inv_a", inv_a), ("inv_g", inv_g)],
            Self::Basis { basis_a, basis_g, scale } => {
                vec![("basis_a", basis_a), ("basis_g", basis_g), ("scale", scale)]
            }
            Self::LowRank { basis_a, basis_g, scale, root_a, root_g } => {
                let roots = [("root_a", root_a), ("root_g", root_g)];
                let roots = roots.into_iter().filter_map(|(name, root)| Some((name, root.as_ref()?)));
                [("basis_a", basis_a), ("basis_g", basis_g), ("scale", scale)]
                    .into_iter()
                    .chain(roots)
                    .collect()
            }
        }
    }
}

/// What a damped inverse is made with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Recipe {
    pub kind: DampingKind,
    pub damping: f64,
    pub inverse: Inverse,
    pub floor: f64,
}

impl Recipe {
    /// The way to invert; eigenvalue damping has only one.
    pub fn method(&self) -> Inverse {
        if self.kind == DampingKind::Eigenvalue { Inverse::Eigen } else { self.inverse }
    }
}

/// A block to invert.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub a: Tensor,
    pub g: Tensor,
    /// Groups, rows and columns of its gradients.
    pub shape: [usize; 3],
    pub recipe: Recipe,
    /// The previous inverse of the same block, where Newton starts.
    pub last: Option<Preconditioner>,
    /// The coordinates of its inputs that `a` is of, where they are not those of its gradients ([`standard`]). The damping belongs to `a`; the
    /// inverse is for gradients as they are.
    pub inputs: Option<Tensor>,
    pub name: String,
}

/// `(A (x) G + damping)^-1` for every block. On a CUDA device all of them are queued before the host asks how they went. With a `division`
/// each process decomposes some of the factors and has the others' from those who do.
pub(crate) fn damped_inverses(tasks: &[Task], division: Option<&Division>) -> Vec<Result<Preconditioner>> {
    // On the host one after the other takes less memory, and each uses all threads.
    let on_device = tasks.first().is_some_and(|task| Gpu::of(task.a.device()).is_some());
    let at_once = if on_device || division.is_some() { tasks.len() } else { 1 };
    let made = tasks.chunks(at_once.max(1)).flat_map(|tasks| together(tasks, division));
    let seen = tasks.iter().zip(made).map(|(task, made)| match &task.inputs {
        None => made,
        Some(inputs) => made?.of_inputs(inputs),
    });
    seen.collect()
}

fn together(tasks: &[Task], division: Option<&Division>) -> Vec<Result<Preconditioner>> {
    let fine = match below_rounding(tasks) {
        Ok(fine) => fine,
        Err(error) => return tasks.iter().map(|task| bail!("{}: {error}", task.name)).collect(),
    };
    let damped: Vec<Result<(Damped, Damped)>> = tasks
        .iter()
        .zip(&fine)
        .map(|(task, fine)| match task.recipe.kind {
            DampingKind::Eigenvalue if *fine => {
                let wide =
                    |m: &Tensor| Ok::<_, candle_core::Error>(Damped::plain(&widened(m, task.shape[0])?));
                Ok((wide(&task.a)?, wide(&task.g)?))
            }
            DampingKind::Eigenvalue => Ok((Damped::plain(&task.a), Damped::plain(&task.g))),
            DampingKind::Pi => pi_damped(&task.a, &task.g, task.shape, task.recipe.damping, &task.name),
        })
        .collect();
    // The two factors of every block, one after the other; a diagonal one needs no method, and one of low rank has its own.
    let pairs = || tasks.iter().zip(&damped).filter_map(|(task, pair)| Some((task, pair.as_ref().ok()?)));
    let of = |inverse: Inverse| pairs().filter(move |(task, _)| task.recipe.method() == inverse);
    let diagonal = |task: &Task, m: &Tensor| is_diagonal(m, task.shape[0]);
    let dense = |task: &Task, m: &Tensor| !diagonal(task, m) && !is_sketch(m);
    let named = |inverse| -> Vec<(&Tensor, &str)> {
        let both = of(inverse).flat_map(|(task, (a, g))| [(task, &a.m), (task, &g.m)]);
        both.filter(|(task, m)| dense(task, m)).map(|(task, m)| (m, task.name.as_str())).collect()
    };
    let starts = of(Inverse::Newton).flat_map(|(task, (a, g))| {
        let (last_a, last_g) = match &task.last {
            Some(Preconditioner::Factors { inv_a, inv_g }) => (Some(inv_a), Some(inv_g)),
            _ => (None, None),
        };
        let both = [(&a.m, last_a), (&g.m, last_g)].into_iter().filter(|(m, _)| dense(task, m));
        both.map(|(m, start)| NewtonJob { m, start, name: &task.name })
    });
    let starts: Vec<_> = starts.collect();
    let sketches =
        pairs().flat_map(|(task, (a, g))| [(&a.m, task.name.as_str()), (&g.m, task.name.as_str())]);
    let sketches: Vec<_> = sketches.filter(|(m, _)| is_sketch(m)).collect();
    let device = tasks.first().map_or(Device::Cpu, |task| task.a.device().clone());
    let decomposed = |jobs: &[(&Tensor, &str)]| eigh_all(jobs);
    let parts = |Eigh { values, vectors }: &Eigh| vec![values.clone(), vectors.clone()];
    let whole = |tensors: Vec<Tensor>| match tensors.as_slice() {
        [values, vectors] => Ok(Eigh { values: values.clone(), vectors: vectors.clone() }),
        other => bail!("expected eigenvalues and eigenvectors, got {} tensors", other.len()),
    };
    let one = |mut tensors: Vec<Tensor>| match tensors.pop() {
        Some(tensor) => Ok(tensor),
        None => bail!("expected an inverse, got none"),
    };
    let order = |m: &Tensor| m.dim(1).unwrap_or(0);
    let by_name = |job: &(&Tensor, &str)| order(job.0);
    let mut eigen =
        divided((division, &device), &named(Inverse::Eigen), by_name, decomposed, parts, whole).into_iter();
    let inverted = |jobs: &[(&Tensor, &str)]| inverse_spd_all(jobs);
    let itself = |inverse: &Tensor| vec![inverse.clone()];
    let mut inverses =
        divided((division, &device), &named(Inverse::Cholesky), by_name, inverted, itself, one).into_iter();
    let iterated =
        |jobs: &[NewtonJob<'_>]| newton_all(jobs).into_iter().map(|found| Ok(found?.inverse)).collect();
    let mut newton =
        divided((division, &device), &starts, |job| order(job.m), iterated, itself, one).into_iter();
    let mut low = low_rank_all(&sketches).into_iter();
    let found = tasks.iter().zip(&damped).zip(&fine).map(|((task, pair), &fine)| {
        let (a, g) = match pair {
            Ok((a, g)) => (a, g),
            Err(error) => bail!("{error}"),
        };
        let Recipe { kind, damping, floor, .. } = task.recipe;
        let mut eigen = |m: &Tensor| match diagonal(task, m) {
            true => Ok(Eigh { values: m.flatten_all()?, vectors: m.ones_like()? }),
            false => next(&mut eigen),
        };
        if kind == DampingKind::Eigenvalue {
            let mut spectrum = |m: &Tensor| -> Result<(Tensor, Tensor)> {
                if is_sketch(m) {
                    let found: LowRank = next(&mut low)?;
                    return Ok((found.spectrum()?, found.vectors));
                }
                let found = eigen(m)?;
                let known = fine && !diagonal(task, m);
                let Eigh { values, vectors } = if known { above_rounding(found, m)? } else { found };
                Ok((joined(&values, task.shape)?, vectors))
            };
            let (found_a, found_g) = (spectrum(&a.m), spectrum(&g.m));
            let ((da, basis_a), (dg, basis_g)) = (found_a?, found_g?);
            let dtype = if fine { DType::F64 } else { da.dtype() };
            let (da, dg) = (da.to_dtype(dtype)?, dg.to_dtype(dtype)?);
            let narrow = |t: Tensor| t.to_dtype(task.a.dtype());
            let scale = narrow(inverse_spectrum((&da, &dg), floor, 1.0, damping)?)?;
            let (basis_a, basis_g) = (narrow(basis_a)?, narrow(basis_g)?);
            return Ok(match is_sketch(&a.m) || is_sketch(&g.m) {
                true => Preconditioner::LowRank { basis_a, basis_g, scale, root_a: None, root_g: None },
                false => Preconditioner::Basis { basis_a, basis_g, scale },
            });
        }
        let mut inverse = |Damped { m, shift }: &Damped| match (task.recipe.method(), shift) {
            (_, Some(shift)) => next(&mut low)?.inverse(shift),
            _ if diagonal(task, m) => m.recip(),
            (Inverse::Eigen, None) => {
                let Eigh { values, vectors } = eigen(m)?;
                product(&vectors.broadcast_mul(&values.recip()?.unsqueeze(1)?)?, &vectors.t()?)
            }
            (Inverse::Cholesky, None) => next(&mut inverses),
            (Inverse::Newton, None) => next(&mut newton),
        };
        let (inv_a, inv_g) = (inverse(a), inverse(g));
        Ok(Preconditioner::Factors { inv_a: inv_a?, inv_g: inv_g? })
    });
    found.collect()
}

/// What `compute` makes of the jobs, here or by all processes.
fn divided<J: Copy, T>(
    (division, device): (Option<&Division>, &Device),
    jobs: &[J],
    order: impl Fn(&J) -> usize,
    compute: impl Fn(&[J]) -> Vec<Result<T>>,
    parts: impl Fn(&T) -> Vec<Tensor>,
    whole: impl Fn(Vec<Tensor>) -> Result<T>,
) -> Vec<Result<T>> {
    match division {
        None => compute(jobs),
        Some(division) => {
            let orders: Vec<usize> = jobs.iter().map(order).collect();
            let own = |own: &[usize]| compute(&own.iter().map(|&job| jobs[job]).collect::<Vec<_>>());
            division.all(&orders, device, own, parts, whole)
        }
    }
}

/// The eigenvalues of all runs of a group, one behind the other.
pub(super) fn joined(values: &Tensor, [groups, ..]: [usize; 3]) -> Result<Tensor> {
    values.reshape((groups, ()))
}

/// `(A (x) G + damping) x` for `x` of shape `[groups, out, in]`.
pub(crate) fn damped_product(
    a: &Tensor,
    g: &Tensor,
    kind: DampingKind,
    damping: f64,
    x: &Tensor,
    name: &str,
) -> Result<Tensor> {
    match kind {
        DampingKind::Eigenvalue => mix(&factor_product(a, g, x, name)?, 1.0, x, damping),
        DampingKind::Pi => {
            let (a, g) = pi_damped(a, g, x.dims3()?.into(), damping, name)?;
            curved(&g, x, &a, name)
        }
    }
}

/// `(A (x) G) x` for `x` of shape `[groups, out, in]`: what the factors stand for, without damping.
pub(crate) fn factor_product(a: &Tensor, g: &Tensor, x: &Tensor, name: &str) -> Result<Tensor> {
    curved(&Damped::plain(g), x, &Damped::plain(a), name)
}

#[cfg(test)]
mod tests;
