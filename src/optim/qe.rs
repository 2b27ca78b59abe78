//! QE-KLD-WRM: Q's step, then steps on the exact symmetric divergence from earlier models.

use super::natural::{Natural, scalar};
use super::rule::{Defaults, Model, QSolve, WakeRule, check_quadratic, check_wake};
use super::step::{Proposal, sum};
use crate::curvature::{Damping, factor_product};
use crate::ops::dense::{dot, mix};
use crate::tape::{Fisher, Likelihood, Terms};
use candle_core::{Result, Tensor, bail};

/// The steps on the exact divergence.
#[derive(Debug, Clone, PartialEq)]
pub struct Inner {
    /// Momentum-SGD steps after Q's step; each costs a forward and a backward pass.
    pub steps: usize,
    /// Their rate, as a multiple of the learning rate.
    pub lr: f64,
    /// Their momentum, started anew at each outer step.
    pub momentum: f64,
    /// Models in the wake, the current one included, 2 or more; each other costs a copy of the parameters and a forward
    /// pass a step. The inner steps begin once as many have been seen.
    pub models: usize,
    /// Multiplies the divergences; 1 is the theory's.
    pub scale: f64,
    /// Whether the inner directions are preconditioned as Q's is. Plain SGD (the published form) is stable only while
    /// `lr` is below two over the largest eigenvalue of the Fisher matrix.
    pub preconditioned: bool,
}

impl Default for Inner {
    fn default() -> Self {
        Self { steps: 1, lr: 0.001, momentum: 0.5, models: 2, scale: 1.0, preconditioned: false }
    }
}

/// Q's step, then [`Inner::steps`] of momentum SGD on
/// `<g, s> + 1/2 s^T B s + lambda sum_j w_j D_j` with the exact symmetric KL divergences `D_j` on the current batch
/// (Puiu 2022, section 4.3). Inner steps that end higher than they began, at too high a rate, are dropped: Q's step holds.
#[derive(Debug, Clone, Default)]
pub struct Qe {
    /// `rho` of the wake, in [0, 1); `None` takes `stat_decay`, as the theory has it.
    pub wake_decay: Option<f64>,
    /// How `F_bar + lr F` is inverted in Q's step.
    pub solve: QSolve,
    /// The steps that follow.
    pub inner: Inner,
}

/// QE-KLD-WRM; step it with [`QeKldWrm::step_with`].
pub type QeKldWrm = Natural<Qe>;

/// Options of [`QeKldWrm`].
pub type ParamsQeKldWrm = super::Params<Qe>;

impl WakeRule for Qe {
    const NAME: &'static str = "qe-kld-wrm";

    fn model(&self) -> Model {
        Model::Quadratic(self.solve)
    }

    fn wake_decay(&self, stat_decay: f64) -> Option<f64> {
        Some(self.wake_decay.unwrap_or(stat_decay))
    }

    fn inner(&self) -> Option<&Inner> {
        Some(&self.inner)
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            lr: 0.076,
            damping: Damping::Eigenvalue(0.0013),
            kl_clip: Some(0.01),
            fisher: Fisher::Empirical,
            ..super::q::Q::default().defaults()
        }
    }

    fn check(&self, damping: Damping, ekfac: bool) -> Result<()> {
        check_wake(Self::NAME, self.wake_decay)?;
        check_quadratic(Self::NAME, self.solve, damping, ekfac)?;
        let Inner { lr, momentum, models, scale, .. } = self.inner;
        if !(lr.is_finite() && lr >= 0.0 && scale.is_finite() && scale >= 0.0) {
            bail!("{}: expected inner lr and scale to be zero or more, got {lr} and {scale}", Self::NAME)
        }
        if !(0.0..1.0).contains(&momentum) {
            bail!("{}: expected an inner momentum in [0, 1), got {momentum}", Self::NAME)
        }
        if models < 2 {
            bail!(
                "{}: expected 2 or more models in the wake, the current one included, got {models}",
                Self::NAME
            )
        }
        Ok(())
    }
}

/// The model's outputs on the current batch at the current values of its Vars.
pub type Outputs<'a> = dyn FnMut() -> Result<Tensor> + 'a;

impl Natural<Qe> {
    /// A step. `loss` is the mean over loss terms; `outputs` returns the model's outputs (what `likelihood` takes) on the
    /// batch of `loss` at the Vars' values of the moment, with their graph, and draws nothing at random: no dropout.
    ///
    /// # Errors
    /// As for any step, and when two calls of `outputs` differ. Parameters and state are then unchanged.
    pub fn step_with(
        &mut self,
        loss: &Tensor,
        likelihood: Likelihood,
        outputs: &mut Outputs<'_>,
    ) -> Result<()> {
        self.step_with_weighted(loss, likelihood, &Terms::equal(), outputs)
    }

    /// [`Natural::step_with`] where the loss is a weighted mean of its terms, as `observe_weighted` was shown: the divergences from earlier
    /// models are then weighted means over terms too.
    ///
    /// # Errors
    /// As [`Natural::step_with`], and when the weights do not fit the outputs.
    pub fn step_with_weighted(
        &mut self,
        loss: &Tensor,
        likelihood: Likelihood,
        terms: &Terms,
        outputs: &mut Outputs<'_>,
    ) -> Result<()> {
        let (value, grads) = match self.backward(loss) {
            Ok(found) => found,
            Err(error) => {
                self.forget();
                return Err(error);
            }
        };
        let Some((proposal, predicted)) = self.proposed(grads, value)? else { return Ok(()) };
        let before: Vec<Tensor> = self.vars.iter().map(|p| p.snapshot()).collect::<Result<_>>()?;
        let mut values = self.proposed_values(&proposal)?;
        let mut taken = None;
        let mut models = self.models.clone();
        models.push(before.clone());
        if models.len() >= self.params.wake.inner.models && proposal.rate > 0.0 {
            let moved = self.inner_steps(&proposal, &models, &mut values, (likelihood, terms), outputs);
            // The Vars hold trial values now. Whatever happened, they go back first.
            for (param, value) in self.vars.iter().zip(&before) {
                param.show(value)?;
            }
            taken = Some(moved?);
        }
        if models.len() >= self.params.wake.inner.models {
            models.remove(0);
        }
        let carries = self.carries(&proposal, taken.as_deref())?;
        self.commit(proposal, carries, &values)?;
        self.models = models;
        self.predicted = predicted;
        Ok(())
    }

    /// Moves `values` from Q's step along the exact objective; the blocks' whole steps in the end.
    fn inner_steps(
        &mut self,
        proposal: &Proposal,
        models: &[Vec<Tensor>],
        values: &mut [Tensor],
        terms: (Likelihood, &Terms),
        outputs: &mut Outputs<'_>,
    ) -> Result<Vec<Tensor>> {
        let _span = tracing::info_span!("inner").entered();
        let inner = self.params.wake.inner.clone();
        let rho = self.params.wake.wake_decay(self.params.stat_decay).unwrap_or(0.0);
        let lr = proposal.rate;
        let mut wake = vec![];
        for (index, model) in models.iter().enumerate() {
            let age = models.len() - 1 - index;
            let weight = if index == 0 { rho.powi(age as i32) } else { (1.0 - rho) * rho.powi(age as i32) };
            self.show_all(model)?;
            wake.push((weight, outputs()?.detach()));
        }
        self.check_closure(&wake, outputs)?;

        let Some(start) = models.last() else { bail!("{}: an empty wake", Qe::NAME) };
        let mut steps: Vec<Tensor> = proposal.blocks.iter().map(|b| b.step.clone()).collect();
        let mut buffers: Vec<Option<Tensor>> = vec![None; steps.len()];
        let from_q = values.to_vec();
        let mut before = f64::INFINITY;
        for index in 0..inner.steps {
            self.show_all(values)?;
            let distance = (wake_distance(terms, &outputs()?, &wake)? * (inner.scale / lr))?;
            if index == 0 {
                before = scalar(&distance)? + self.modelled(proposal, &steps)?;
            }
            let store = distance.backward()?;
            let grads = self.gradients(&store)?;
            for (index, (block, proposed)) in self.blocks.iter().zip(&proposal.blocks).enumerate() {
                let (a, g) = &proposed.factors;
                let model = (&proposed.gradient + factor_product(a, g, &steps[index], &block.name)?)?;
                let direction = (block.matrix(|i| Ok(grads[i].clone()))? + model)?;
                let direction = match &proposed.state.preconditioner {
                    Some(preconditioner) if inner.preconditioned => preconditioner.apply(&direction)?,
                    _ => direction,
                };
                let direction = self.rms_clipped(direction)?;
                let buffer = match buffers[index].take() {
                    Some(buffer) => ((buffer * inner.momentum)? + direction)?,
                    None => direction,
                };
                let change = (&buffer * -(inner.lr * lr * block.lr_scale))?;
                buffers[index] = Some(buffer);
                let moved = (&steps[index] + change)?;
                for (param, part) in block.split(&moved, &self.vars)? {
                    values[param] = (&start[param] + part)?;
                }
                steps[index] = moved;
            }
        }
        if inner.steps == 0 {
            return Ok(steps);
        }
        self.show_all(values)?;
        let reached = scalar(&wake_distance(terms, &outputs()?, &wake)?)? * inner.scale / lr;
        let lower = reached + self.modelled(proposal, &steps)? <= before;
        if !lower {
            values.clone_from_slice(&from_q);
            steps = proposal.blocks.iter().map(|b| b.step.clone()).collect();
        }
        Ok(steps)
    }

    /// `<g, s> + 1/2 s^T B s`, summed over blocks.
    fn modelled(&self, proposal: &Proposal, steps: &[Tensor]) -> Result<f64> {
        let mut total = 0.0;
        for ((block, proposed), step) in self.blocks.iter().zip(&proposal.blocks).zip(steps) {
            let (a, g) = &proposed.factors;
            let slope = mix(&proposed.gradient, 1.0, &factor_product(a, g, step, &block.name)?, 0.5)?;
            total += dot(&slope, step)?;
        }
        Ok(total)
    }

    fn show_all(&self, values: &[Tensor]) -> Result<()> {
        self.vars.iter().zip(values).try_for_each(|(param, value)| param.show(value))
    }

    /// Calls the closure a second time at the newest model, once in the optimizer's life.
    fn check_closure(&mut self, wake: &[(f64, Tensor)], outputs: &mut Outputs<'_>) -> Result<()> {
        let (false, Some((_, first))) = (self.closure_checked, wake.last()) else { return Ok(()) };
        let again = outputs()?;
        if again.dims() != first.dims() || sum(&(first - again.detach())?.abs()?)? != 0.0 {
            bail!(
                "{}: two calls of the closure differ at the same parameters; dropout or sampling inside the closure?",
                Qe::NAME
            )
        }
        self.closure_checked = true;
        Ok(())
    }
}

/// `sum_j w_j D_j`, the mean over loss terms of symmetric divergences, weighted as the loss is. For an exponential family with natural
/// parameters `z` and means `p` half the sum of both divergences is `1/2 <p - q, z - z_j>`: the log-normalizers cancel.
fn wake_distance(
    (likelihood, terms): (Likelihood, &Terms),
    outputs: &Tensor,
    wake: &[(f64, Tensor)],
) -> Result<Tensor> {
    let terms = terms.of(likelihood, outputs)?;
    let mean = likelihood.mean(outputs)?;
    let mut total: Option<Tensor> = None;
    for (weight, old) in wake {
        let apart = ((&mean - likelihood.mean(old)?)? * (outputs - old)?)?;
        let part = (terms.times(&apart)?.sum_all()? * (0.5 * weight / terms.total))?;
        total = Some(match total {
            Some(total) => (total + part)?,
            None => part,
        });
    }
    total.ok_or_else(|| candle_core::Error::Msg("qe-kld-wrm: an empty wake".into()))
}
