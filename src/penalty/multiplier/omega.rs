//! The functions of groups of weights that multipliers bound.

use super::super::ball::finite;
use super::super::groups::Grouping;
use super::{Multiplier, NAME};
use crate::gpu::Gpu;
use crate::ops::element::{Element, Host, float_dispatch};
use crate::ops::group::sums;
use candle_core::{Device, Result, Tensor, bail};

/// A function of each group of weights, `Omega_g(w)`, that a multiplier keeps at or below its bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Omega {
    /// `||w_g||_2`.
    Norm(Grouping),
    /// `sum w_i^2`: with this one a multiplier is a factor of the L2 penalty, twice it a weight decay.
    SquaredNorm(Grouping),
    /// `sum |w_i|`. With blocks of one element it bounds every weight, with a multiplier for each.
    L1(Grouping),
}

impl Omega {
    pub(super) fn grouping(self) -> Grouping {
        let (Self::Norm(grouping) | Self::SquaredNorm(grouping) | Self::L1(grouping)) = self;
        grouping
    }

    /// `Omega` of a group, of those of its parts in several tensors.
    fn join(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Norm(_) => a.hypot(b),
            Self::SquaredNorm(_) | Self::L1(_) => a + b,
        }
    }
}

impl Multiplier {
    /// `Omega_g`, `[groups]` in f64 on the weights' device.
    pub(super) fn omegas(&self, weights: &[&Tensor]) -> Result<Tensor> {
        self.check(weights)?;
        let device = weights.first().map_or(&Device::Cpu, |w| w.device());
        if Gpu::of(device).is_some() && self.count() > 0 {
            let mut total: Option<Tensor> = None;
            for (part, w) in self.parts.iter().zip(weights) {
                let sums = sums(NAME, &w.detach().contiguous()?, part.layout.tiles(), 0.0)?;
                total = Some(match total {
                    Some(total) => (total + sums)?,
                    None => sums,
                });
            }
            if let Some(total) = total {
                let column = |at: usize| total.narrow(1, at, 1)?.contiguous()?.flatten_all();
                return match self.omega {
                    Omega::Norm(_) => column(0)?.sqrt(),
                    Omega::SquaredNorm(_) => column(0),
                    Omega::L1(_) => column(1),
                };
            }
        }
        let mut total: Option<Vec<f64>> = None;
        for (part, w) in weights.iter().enumerate() {
            let values = float_dispatch!(NAME, w.dtype(), T => read(w, |x: &[T]| self.values(part, x)))?;
            total = Some(match total {
                Some(total) => total.iter().zip(&values).map(|(a, b)| self.omega.join(*a, *b)).collect(),
                None => values,
            });
        }
        let total = total.unwrap_or_default();
        if let Some(group) = total.iter().position(|v| !v.is_finite()) {
            bail!("multiplier: {:?} of group {group} is beyond f64", self.omega)
        }
        Tensor::from_vec(total, self.count(), device)
    }

    /// `Omega_g` of one of the tensors.
    pub(super) fn values<T: Element>(&self, part: usize, x: &[T]) -> Result<Vec<f64>> {
        let layout = &self.parts[part].layout;
        let values = match self.omega {
            Omega::Norm(_) => layout.norms(x),
            Omega::SquaredNorm(_) => layout.sums(x, |v| v * v),
            Omega::L1(_) => layout.sums(x, f64::abs),
        };
        if let Some(group) = values.iter().position(|v| !v.is_finite()) {
            bail!("multiplier: {:?} of group {group} is beyond f64", self.omega)
        }
        Ok(values)
    }
}

/// Gives `f` the elements of a tensor, which are to be finite.
pub(super) fn read<T: Element, R>(w: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let w = w.detach().to_device(&Device::Cpu)?;
    let host = Host::of(&w);
    let x = host.values::<T>()?;
    finite(&x)?;
    f(&x)
}
