//! Shampoo: inverse roots of the second moments of a gradient's rows and columns.

use super::sides::{Made, Side, averaged, decomposed, state};
use super::update::{
    At, FallbackAdam, LEAST, State, Update, as_matrix, at_least_one, decay, in_range, mix, moved,
};
use crate::optim::ParamsAdamW;
use candle_core::{Result, Tensor, bail};

/// Whose length [`Shampoo`](super::Shampoo)'s step of a tensor has (Anil et al. 2020, section 2; Agarwal et al. 2020).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Grafting {
    /// Shampoo's own.
    None,
    /// Adam's, of the same means: `m / (sqrt(v) + 1e-8)`. The default: rates are Adam's.
    #[default]
    Adam,
    /// That of gradient descent with the same mean of gradients.
    Sgd,
}

/// What [`Shampoo`](super::Shampoo)'s factors are averages of, for gradients `G` `[m, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ShampooFactors {
    /// `L` of `G G^T` and `R` of `G^T G` (Gupta, Koren and Singer 2018). The default.
    #[default]
    Gradient,
    /// `L` of `G R^-1 G^T / n` and `R` of `G^T L^-1 G / m`, each with the other's last inverse, `L` first: KL-Shampoo (Lin et al. 2025, arXiv
    /// 2509.03378), the factors of the Gaussian `N(0, L (x) R)` that is nearest to the gradients in KL divergence. The exponent is 1/2 then.
    KlDivergence,
}

/// Options of [`Shampoo`](super::Shampoo).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamsShampoo {
    /// Learning rate; 0.001.
    pub lr: f64,
    /// Decay of the mean of gradients, in [0, 1); 0.9.
    pub beta1: f64,
    /// Decay of the factors and of Adam's mean of squares, in (0, 1]; 0.99. At 1 both are sums, as in the paper of 2018, not means.
    pub beta2: f64,
    /// What is added to the eigenvalues of a factor, in units of the largest; 1e-6.
    pub eps: f64,
    /// The factors' inverse power. None, the default, is 1/4 where both sides have factors and 1/2 where one has, and 1/2 for
    /// [`ShampooFactors::KlDivergence`].
    pub exponent: Option<f64>,
    /// Whose length a step has.
    pub grafting: Grafting,
    /// What the factors are averages of.
    pub factors: ShampooFactors,
    /// Decoupled weight decay, times the learning rate; 0.01.
    pub weight_decay: f64,
    /// Steps from one renewal of the roots to the next; 10. The first so many steps each renew them: factors of a few gradients are of low rank, and
    /// a later gradient leaves their range.
    pub period: usize,
    /// Sides that are longer have no factor; 10,000.
    pub max_dim: usize,
    /// For what is no matrix; betas of 0.9 and 0.99.
    pub fallback_adam: FallbackAdam,
}

impl Default for ParamsShampoo {
    fn default() -> Self {
        Self {
            lr: 0.001,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-6,
            exponent: None,
            grafting: Grafting::default(),
            factors: ShampooFactors::default(),
            weight_decay: 0.01,
            period: 10,
            max_dim: 10_000,
            fallback_adam: FallbackAdam::of(0.9, 0.99),
        }
    }
}

/// Of Adam's grafting; and where all gradients were zero, in place of an eigenvalue or a norm.
const ADAM_EPS: f64 = 1e-8;
const TINY: f64 = 1e-30;

impl ParamsShampoo {
    fn kl(&self) -> bool {
        self.factors == ShampooFactors::KlDivergence
    }

    fn power(&self, sides: usize) -> f64 {
        self.exponent.unwrap_or(if self.kl() || sides < 2 { 0.5 } else { 0.25 })
    }

    /// The share of a new square in its average.
    fn share(&self) -> f64 {
        if self.beta2 < 1.0 { 1.0 - self.beta2 } else { 1.0 }
    }

    /// What averages from zero are divided by.
    fn bias(&self, taken: usize) -> f64 {
        if self.beta2 < 1.0 { 1.0 - self.beta2.powf(taken as f64) } else { 1.0 }
    }

    /// Whether a step renews the roots.
    fn due(&self, taken: usize) -> bool {
        taken <= self.period || (taken - 1).is_multiple_of(self.period)
    }

    /// What is averaged in the factor of the side `index` of those that have one.
    fn outer(&self, gradient: &Tensor, held: &[(Side, Vec<Tensor>)], index: usize) -> Result<Tensor> {
        let side = held[index].0;
        if !self.kl() {
            return side.outer(gradient);
        }
        let mut whitened = gradient.clone();
        for (other, its) in held.iter().filter(|(other, _)| *other != side) {
            whitened = other.times(&its[1], &whitened)?;
        }
        side.outer(&whitened)? / gradient.dim(1 - side.axis())? as f64
    }

    /// `(P / bias + eps max I)^-power`, `max` the largest eigenvalue.
    fn root(&self, factor: &Tensor, at: &At, side: Side, power: f64) -> Result<Tensor> {
        let found = decomposed(&(factor / self.bias(at.taken))?, at.name, side)?;
        let values = found.values.relu()?;
        let ridge = ((values.max_keepdim(0)? * self.eps)? + TINY)?;
        let powers = values.broadcast_add(&ridge)?.powf(-power)?;
        found.vectors.broadcast_mul(&powers)?.matmul(&found.vectors.t()?)
    }
}

/// The Frobenius norm, a scalar.
fn norm(m: &Tensor) -> Result<Tensor> {
    m.sqr()?.sum_all()?.sqrt()
}

impl Update for ParamsShampoo {
    const NAME: &'static str = "shampoo";

    fn lr(&mut self) -> &mut f64 {
        &mut self.lr
    }

    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    fn check(&self) -> Result<()> {
        let &Self { lr, beta1, beta2, eps, exponent, weight_decay, period, max_dim, .. } = self;
        in_range("lr", lr, lr >= 0.0, "of at least 0")?;
        decay("beta1", beta1)?;
        in_range("beta2", beta2, beta2 > 0.0 && beta2 <= 1.0, "in (0, 1]")?;
        in_range("eps", eps, eps > 0.0, "above 0")?;
        if let Some(exponent) = exponent {
            in_range("exponent", exponent, exponent > 0.0 && exponent <= 1.0, "in (0, 1]")?;
            if self.kl() && exponent != 0.5 {
                bail!(
                    "first-order: expected no exponent or 0.5 with the factors of KL-Shampoo, got {exponent}"
                )
            }
        }
        if self.kl() && beta2 == 1.0 {
            bail!(
                "first-order: expected beta2 below 1 with the factors of KL-Shampoo, which are means, got 1"
            )
        }
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
        let mut all = vec![("average0", value.zeros_like()?)];
        if self.grafting == Grafting::Adam {
            all.push(("average1", value.zeros_like()?));
        }
        all.extend(state(value, &Side::of(value, self.max_dim)?, Made::Root)?);
        Ok(all)
    }

    fn update(
        &self,
        at: &At,
        value: &Tensor,
        grad: &Tensor,
        state: &[Tensor],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let &Self { beta1, beta2, .. } = self;
        let (sides, share, bias) = (Side::of(value, self.max_dim)?, self.share(), self.bias(at.taken));
        let (averages, held) = state.split_at(state.len() - 2 * sides.len());
        let gradient = as_matrix(grad)?;
        let power = self.power(sides.len());
        let due = self.due(at.taken);
        let mut held: Vec<_> =
            sides.iter().zip(held.chunks_exact(2)).map(|(&side, own)| (side, own.to_vec())).collect();
        for index in 0..held.len() {
            let (side, outer) = (held[index].0, self.outer(&gradient, &held, index)?);
            let own = &mut held[index].1;
            own[0] = averaged(&own[0], beta2, &outer, share)?;
            if due {
                own[1] = self.root(&own[0], at, side, power)?;
            }
        }
        let mean = mix(&averages[0], beta1, grad, 1.0 - beta1, LEAST)?;
        let unbiased = (as_matrix(&mean)? / (1.0 - beta1.powf(at.taken as f64)))?;
        let mut next = vec![mean];
        let grafted = match self.grafting {
            Grafting::None => None,
            Grafting::Sgd => Some(norm(&unbiased)?),
            Grafting::Adam => {
                let squares = mix(&averages[1], beta2, &grad.sqr()?, share, LEAST * LEAST)?;
                let scale = ((as_matrix(&squares)? / bias)?.sqrt()? + ADAM_EPS)?;
                next.push(squares);
                Some(norm(&(&unbiased / scale)?)?)
            }
        };
        let mut direction = unbiased;
        for (side, own) in &held {
            direction = side.times(&own[1], &direction)?;
        }
        if let Some(length) = grafted {
            direction = direction.broadcast_mul(&(length / (norm(&direction)? + TINY)?)?)?;
        }
        next.extend(held.into_iter().flat_map(|(_, own)| own));
        Ok((moved(at, value, &direction, at.lr)?, next))
    }
}
