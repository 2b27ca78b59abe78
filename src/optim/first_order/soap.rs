//! SOAP: Adam in the eigenbases of Shampoo's factors.

use super::sides::{Made, Side, averaged, decomposed, state};
use super::update::{
    At, FallbackAdam, LEAST, State, Update, as_matrix, at_least_one, decay, in_range, mix, moved,
};
use crate::linalg::qr::orthonormal;
use crate::optim::ParamsAdamW;
use candle_core::{DType, Result, Tensor};

/// How SOAP renews its bases; the first one is an eigendecomposition either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SoapBasis {
    /// A step of the power iteration from the last basis, `Q <- QR(P Q)`, with its columns in the order of the eigenvalues as the last basis
    /// has them (Vyas et al. 2024, algorithm 4). The second moments are put in the same order. The default. The host does the QR
    /// decomposition, on GPUs too.
    #[default]
    PowerIteration,
    /// The eigenvectors, exactly, in the order of their eigenvalues. Takes several times as long.
    Eigenvectors,
}

/// Options of [`Soap`](super::Soap).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamsSoap {
    /// Learning rate; 0.003.
    pub lr: f64,
    /// Decay of the mean of gradients, in [0, 1); 0.95.
    pub beta1: f64,
    /// Decay of the mean of squares in the eigenbases, in [0, 1); 0.95.
    pub beta2: f64,
    /// Decay of the factors, in [0, 1). None, the default, is `beta2`.
    pub shampoo_beta: Option<f64>,
    /// What is added to the root of the mean of squares; 1e-8.
    pub eps: f64,
    /// Decoupled weight decay, times the learning rate; 0.01.
    pub weight_decay: f64,
    /// Steps from one renewal of the bases to the next; 10. 1 costs more and learns faster.
    pub period: usize,
    /// How bases are renewed.
    pub basis: SoapBasis,
    /// Sides that are longer are not rotated; 10,000.
    pub max_dim: usize,
    /// For what is no matrix; betas of 0.95 and 0.95.
    pub fallback_adam: FallbackAdam,
}

impl Default for ParamsSoap {
    fn default() -> Self {
        Self {
            lr: 0.003,
            beta1: 0.95,
            beta2: 0.95,
            shampoo_beta: None,
            eps: 1e-8,
            weight_decay: 0.01,
            period: 10,
            basis: SoapBasis::default(),
            max_dim: 10_000,
            fallback_adam: FallbackAdam::of(0.95, 0.95),
        }
    }
}

impl ParamsSoap {
    /// The new basis of a factor, and the places that its columns had in the last one.
    fn renewed(
        &self,
        factor: &Tensor,
        basis: &Tensor,
        at: &At,
        side: Side,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if self.basis == SoapBasis::Eigenvectors || at.taken == 1 {
            return Ok((descending(factor, at, side)?, None));
        }
        let image = factor.matmul(basis)?;
        let values = (basis * &image)?.sum(0)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let mut order: Vec<u32> = (0..values.len() as u32).collect();
        order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
        let order = Tensor::new(order, basis.device())?;
        let image = image.index_select(&order, 1)?.unsqueeze(0)?;
        let basis = orthonormal(&image, &format!("{} of {}", side.name(), at.name))?.squeeze(0)?;
        Ok((basis, Some(order)))
    }
}

/// All eigenvectors of a factor, that of the largest eigenvalue first.
fn descending(factor: &Tensor, at: &At, side: Side) -> Result<Tensor> {
    let vectors = decomposed(factor, at.name, side)?.vectors;
    let backwards: Vec<u32> = (0..vectors.dim(1)? as u32).rev().collect();
    vectors.index_select(&Tensor::new(backwards, factor.device())?, 1)
}

impl Update for ParamsSoap {
    const NAME: &'static str = "soap";

    fn lr(&mut self) -> &mut f64 {
        &mut self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn check(&self) -> Result<()> {
        let &Self { lr, beta1, beta2, shampoo_beta, eps, weight_decay, period, max_dim, .. } = self;
        in_range("lr", lr, lr >= 0.0, "of at least 0")?;
        decay("beta1", beta1)?;
        decay("beta2", beta2)?;
        decay("shampoo_beta", shampoo_beta.unwrap_or(beta2))?;
        in_range("eps", eps, eps > 0.0, "above 0")?;
        in_range("weight_decay", weight_decay, weight_decay >= 0.0, "of at least 0")?;
        at_least_one("period", period)?;
        at_least_one("max_dim", max_dim)?;
        self.fallback_adam.check()
    }

    fn adam(&self) -> Option<ParamsAdamW> {
        self.fallback_adam.options()
    }

    fn adam_lr(&self) -> Option<f64> {
        self.fallback_adam.lr
    }

    fn for_matrices(&self) -> bool {
        true
    }

    fn state(&self, value: &Tensor) -> Result<State> {
        let averages = vec![("average0", value.zeros_like()?), ("average1", value.zeros_like()?)];
        let sides = state(value, &Side::of(value, self.max_dim)?, Made::Basis)?;
        Ok([averages, sides].concat())
    }

    fn update(
        &self,
        at: &At,
        value: &Tensor,
        grad: &Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let &Self { beta1, beta2, eps, .. } = self;
        let sides = Side::of(value, self.max_dim)?;
        let held = || sides.iter().zip(state[2..].chunks_exact(2));
        let gradient = as_matrix(grad)?;
        let (mut moved_to, mut mean, mut squares) = (value.copy()?, state[0].clone(), as_matrix(&state[1])?);
        // The first gradient makes the bases alone.
        let updates = at.taken - 1;
        if updates > 0 {
            let turned =
                |m: &Tensor| held().try_fold(m.clone(), |m, (side, held)| side.into_basis(&held[1], &m));
            mean = mix(&mean, beta1, grad, 1.0 - beta1, LEAST)?;
            squares = mix(&squares, beta2, &turned(&gradient)?.sqr()?, 1.0 - beta2, LEAST * LEAST)?;
            let bias = |beta: f64| 1.0 - beta.powf(updates as f64);
            let scale = ((&squares / bias(beta2))?.sqrt()? + eps)?;
            let direction = (turned(&as_matrix(&mean)?)? / scale)?;
            let direction = held().try_fold(direction, |m, (side, held)| side.out_of_basis(&held[1], &m))?;
            moved_to = moved(at, value, &direction, at.lr / bias(beta1))?;
        }
        let kept = self.shampoo_beta.unwrap_or(beta2);
        let mut next = Vec::new();
        for (side, held) in held() {
            let factor = averaged(&held[0], kept, &side.outer(&gradient)?, 1.0 - kept)?;
            let mut basis = held[1].clone();
            if updates.is_multiple_of(self.period) {
                let (renewed, order) = self.renewed(&factor, &basis, at, *side)?;
                if let Some(order) = order {
                    squares = squares.index_select(&order, side.axis())?;
                }
                basis = renewed;
            }
            next.extend([factor, basis]);
        }
        let averages = vec![mean, squares.reshape(value.shape())?];
        Ok((moved_to, [averages, next].concat()))
    }
}
