//! The two sides of a matrix of parameters, and what Shampoo and SOAP keep of each.

use super::update::{LEAST, State, mix};
use crate::linalg::eigh::{Eigh, eigh};
use candle_core::{Result, Tensor};

/// A side of a matrix `[rows, columns]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Rows: what is applied from the left.
    Left,
    /// Columns.
    Right,
}

/// Averages of gradients below which elements of a factor are zero.
const LEAST_SQUARE: f32 = LEAST * LEAST;

impl Side {
    /// The sides of a parameter's matrix that have factors: those of at most `max_dim`.
    pub fn of(value: &Tensor, max_dim: usize) -> Result<Vec<Self>> {
        let sides = [Self::Left, Self::Right].into_iter();
        Ok(sides.zip(matrix_dims(value)).filter(|&(_, dim)| dim <= max_dim).map(|(side, _)| side).collect())
    }

    pub fn dim(self, value: &Tensor) -> usize {
        matrix_dims(value)[usize::from(self == Self::Right)]
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Left => "left factor",
            Self::Right => "right factor",
        }
    }

    /// `M M^T`, or `M^T M`.
    pub fn outer(self, m: &Tensor) -> Result<Tensor> {
        match self {
            Self::Left => m.matmul(&m.t()?),
            Self::Right => m.t()?.matmul(m),
        }
    }

    /// `B M`, or `M B`.
    pub fn times(self, b: &Tensor, m: &Tensor) -> Result<Tensor> {
        match self {
            Self::Left => b.matmul(m),
            Self::Right => m.matmul(b),
        }
    }

    /// `B^T M`, or `M B`: coordinates in the basis of the columns of `B`.
    pub fn into_basis(self, b: &Tensor, m: &Tensor) -> Result<Tensor> {
        match self {
            Self::Left => b.t()?.matmul(m),
            Self::Right => m.matmul(b),
        }
    }

    /// `B M`, or `M B^T`: back from there.
    pub fn out_of_basis(self, b: &Tensor, m: &Tensor) -> Result<Tensor> {
        match self {
            Self::Left => b.matmul(m),
            Self::Right => m.matmul(&b.t()?),
        }
    }

    /// The index of this side's dimension.
    pub fn axis(self) -> usize {
        usize::from(self == Self::Right)
    }

    /// The words for a file: one for the factor, one for what is made of it.
    fn keys(self, made: Made) -> [&'static str; 2] {
        match (self, made) {
            (Self::Left, Made::Basis) => ["left_factor", "left_basis"],
            (Self::Right, Made::Basis) => ["right_factor", "right_basis"],
            (Self::Left, Made::Root) => ["left_factor", "left_root"],
            (Self::Right, Made::Root) => ["right_factor", "right_root"],
        }
    }
}

/// What is made of a factor.
#[derive(Debug, Clone, Copy)]
pub(super) enum Made {
    Basis,
    Root,
}

fn matrix_dims(value: &Tensor) -> [usize; 2] {
    match value.dims() {
        [] => [1, 1],
        [rows, rest @ ..] => [*rows, rest.iter().product()],
    }
}

/// Factors of zero, and identities in the place of what is made of them.
pub(super) fn state(value: &Tensor, sides: &[Side], made: Made) -> Result<State> {
    let mut state = Vec::new();
    for side in sides {
        let (dim, dtype, device) = (side.dim(value), value.dtype(), value.device());
        let [factor, of_it] = side.keys(made);
        state.push((factor, Tensor::zeros((dim, dim), dtype, device)?));
        state.push((of_it, Tensor::eye(dim, dtype, device)?));
    }
    Ok(state)
}

/// The next average of a factor.
pub(super) fn averaged(factor: &Tensor, kept: f64, outer: &Tensor, share: f64) -> Result<Tensor> {
    mix(factor, kept, outer, share, LEAST_SQUARE)
}

/// The eigenvalues `[d]`, ascending, and eigenvectors of a factor of the parameter `name`, which is symmetric but for rounding.
pub(super) fn decomposed(factor: &Tensor, name: &str, side: Side) -> Result<Eigh> {
    let factor = ((factor + factor.t()?)? * 0.5)?.unsqueeze(0)?;
    let Eigh { values, vectors } = eigh(&factor, &format!("{} of {name}", side.name()))?;
    Ok(Eigh { values: values.squeeze(0)?, vectors: vectors.squeeze(0)? })
}
