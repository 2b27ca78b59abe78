//! Penalties that are sums of norms, all made by the same two passes over the weights.

use candle_core::{Result, Tensor};

use super::{GroupLasso, Lp, Penalty, ScaledProx, SparseGroupLasso, scaled};

/// `Penalty` and `ScaledProx` of a type that says its `title`, its `norms` and its `grouping`.
macro_rules! by_norms {
    ($type:ty) => {
        impl Penalty for $type {
            fn name(&self) -> String {
                self.title()
            }

            fn value(&self, w: &Tensor) -> Result<Tensor> {
                self.norms().value(w, self.grouping().tiles(w.dims())?)
            }

            fn gradient(&self, w: &Tensor) -> Result<Tensor> {
                self.norms().gradient(w, self.grouping().tiles(w.dims())?)
            }

            fn value_and_gradient(&self, w: &Tensor, factor: f64) -> Result<(Tensor, Tensor)> {
                self.norms().value_and_gradient(w, self.grouping().tiles(w.dims())?, factor)
            }

            fn prox(&self, w: &Tensor, step: f64) -> Result<Tensor> {
                self.norms().prox(w, self.grouping().tiles(w.dims())?, step)
            }
        }

        impl ScaledProx for $type {
            fn scaled_prox(&self, w: &Tensor, diag: &Tensor, step: f64) -> Result<Tensor> {
                scaled::run(&self.norms(), self.grouping().tiles(w.dims())?, w, diag, step)
            }
        }
    };
}

by_norms!(Lp);
by_norms!(GroupLasso);
by_norms!(SparseGroupLasso);
