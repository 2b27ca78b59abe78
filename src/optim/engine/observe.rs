//! The curvature of the coming step: from a model's outputs to the factors of a batch.

use super::NaturalGradient;
use super::exchange::Seen;
use super::under_way::{Observed, lock};
use crate::curvature::{FactorSums, Pass, wide};
use crate::ops::sample::DrawKey;
use crate::optim::numbers::sum;
use crate::optim::params::NonFinite;
use crate::optim::step::gradients::{Refusal, Staged};
use crate::optim::step::renew::Refresh;
use crate::stack::deep;
use crate::tape::{Cotangents, Fisher, Head, Likelihood, TermWeights, Terms};
use candle_core::{Result, Tensor, backprop::GradStore, bail};
use std::sync::{Arc, Mutex};

impl NaturalGradient {
    /// Whether the coming step needs [`observe`](Self::observe).
    pub fn curvature_due(&self) -> bool {
        self.core.curvature_due()
    }

    /// Shows the optimizer the outputs of the forward pass whose step comes next. No work unless curvature is due.
    ///
    /// `outputs` are what the likelihood takes, `[.., classes]`, with their graph. The passes for the curvature run here, unless the Fisher is
    /// empirical: then the backward pass of the step serves, whose loss must be the mean over loss terms. On a GPU, what its layers saw must
    /// not be overwritten in place before the step.
    ///
    /// Called several times before a step, as for the parts of a batch, it gives the Fisher of the *mean* of all terms that it was shown.
    /// Where the loss is the sum of those of several heads, see [`observe_heads`](Self::observe_heads); where terms have weights or some are
    /// ignored, [`observe_weighted`](Self::observe_weighted).
    ///
    /// # Errors
    /// When the batch is empty, the outputs hold no graph to a tapped layer although one has a block, or are not finite.
    pub fn observe(&mut self, outputs: &Tensor, likelihood: Likelihood) -> Result<()> {
        self.observe_heads(&[Head::new(outputs, likelihood)])
    }

    /// [`observe`](Self::observe) with given labels in place of drawn ones: one pass, whatever [`crate::optim::Params::fisher`] says.
    ///
    /// `labels`: class numbers `[..]` for a categorical likelihood, targets in the outputs' shape for the others.
    ///
    /// # Errors
    /// As [`observe`](Self::observe), and when the labels do not fit (see [`Likelihood::check_labels`]).
    pub fn observe_labels(
        &mut self,
        outputs: &Tensor,
        likelihood: Likelihood,
        labels: &Tensor,
    ) -> Result<()> {
        self.observe_heads(&[Head { labels: Some(labels), ..Head::new(outputs, likelihood) }])
    }

    /// [`observe`](Self::observe) where the loss is a weighted mean of its terms, `sum_n w_n l_n / sum_n w_n` or over a given total: the
    /// curvature is of that very loss, with terms of weight 0 ignored. For micro-batches see
    /// [`accumulate_weighted`](Self::accumulate_weighted).
    ///
    /// # Errors
    /// As [`observe`](Self::observe), and when the weights do not fit the outputs, or none is above 0 and no total is given.
    pub fn observe_weighted(
        &mut self,
        outputs: &Tensor,
        likelihood: Likelihood,
        terms: &Terms,
    ) -> Result<()> {
        self.observe_heads(&[Head { terms: terms.clone(), ..Head::new(outputs, likelihood) }])
    }

    /// [`observe`](Self::observe) of all heads of a model whose losses, each the weighted mean of its terms, are added with the heads'
    /// weights: `loss = sum_h weight_h loss_h`, and the Fisher is the same sum of theirs.
    ///
    /// Among micro-batches the call counts as the first head's total of terms. With the empirical Fisher several heads need labels: the
    /// backward pass of their sum does not tell their gradients apart.
    ///
    /// # Errors
    /// As [`observe`](Self::observe) and [`observe_weighted`](Self::observe_weighted) for each head, and when there is none. What was
    /// observed for the step before is then forgotten.
    pub fn observe_heads(&mut self, heads: &[Head<'_>]) -> Result<()> {
        match self.shared.is_some() {
            true => self.observe_with_others(heads),
            false => self.observe_here(heads, None),
        }
    }

    /// Takes note of the heads of this process. With `first_rows`, one a head, these are the rows of the whole batch that their first rows are.
    pub(super) fn observe_here(&mut self, heads: &[Head<'_>], first_rows: Option<&[u64]>) -> Result<()> {
        let name = self.core.name();
        if heads.is_empty() {
            bail!("{name}: expected at least one head to observe, got none")
        }
        if !self.curvature_due() {
            return heads.iter().try_for_each(|head| head.likelihood.terms(head.outputs).map(drop));
        }
        let mut passes = Vec::with_capacity(heads.len());
        let mut share = None;
        for head in heads {
            if heads.len() > 1 && head.labels.is_none() && self.core.params.fisher.reads_labels() {
                bail!("{name}: the empirical Fisher of several heads needs the labels of each")
            }
            let weights = head.weights(share)?;
            passes.push((head, if share.is_none() { weights.total } else { 0.0 }, Arc::new(weights)));
            share = share.or(passes.last().map(|(_, total, _)| *total));
        }
        for (index, (head, share, weights)) in passes.into_iter().enumerate() {
            let first_row = first_rows.and_then(|rows| rows.get(index).copied());
            if let Err(error) = self.observe_pass(head, share, weights, first_row) {
                if index > 0 {
                    self.forget();
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Shows a head whose terms add `share` to what sums over terms are divided by.
    fn observe_pass(
        &mut self,
        head: &Head<'_>,
        share: f64,
        weights: Arc<TermWeights>,
        first_row: Option<u64>,
    ) -> Result<()> {
        let Head { outputs, likelihood, labels, .. } = *head;
        let _span = tracing::info_span!("factors").entered();
        let sums = match &self.observed {
            Some(observed) if observed.armed => {
                bail!("{}: observe was called twice before a backward pass", self.core.name())
            }
            Some(observed) => observed.sums.clone(),
            None => Arc::new(Mutex::new(self.factor_sums())),
        };
        if !sum(&outputs.detach())?.is_finite() {
            let (core, dims) = (&self.core, outputs.dims());
            let what = format!("the observed outputs {dims:?} have NaN or infinite elements");
            if core.params.non_finite == NonFinite::Error {
                bail!("{}: step {}: {what}; parameters and state are unchanged", core.name(), core.steps)
            }
            self.observed = Some(Observed { sums, armed: false, drawn: vec![], unusable: Some(what) });
            return Ok(());
        }
        let tape = self.core.params.tape.clone();
        let untapped = self.wants.iter().all(Option::is_none);
        // Blocks without a layer: the gradients of labels that are drawn, or given, make their factors.
        let draws = labels.is_some() || self.core.params.fisher.draws();
        let drawing = draws && self.core.blocks.iter().any(|block| block.layer.is_none());
        let begin = |scale: f64, fresh: bool, of_loss: bool| {
            lock(&sums).begin(Pass { weights: weights.clone(), share, scale, fresh, of_loss });
        };
        let pass = |cotangent: &Tensor, scale: f64, fresh: bool| -> Result<GradStore> {
            begin(scale, fresh, false);
            let grads = match untapped {
                true => {
                    let root = (outputs * cotangent.detach())?.sum_all()?;
                    deep(|| root.backward())?
                }
                false => tape.reduce_with(outputs, cotangent, sums.clone(), drawing)?,
            };
            lock(&sums).end()?;
            Ok(grads)
        };
        let mut armed = false;
        let none = || Box::new(std::iter::empty()) as Cotangents<'_>;
        let (passes, scale) = match (labels, self.core.params.fisher) {
            // The step's gradients make the factors; it needs the number of their loss terms.
            _ if untapped && !drawing => {
                begin(1.0, true, true);
                (none(), 1.0)
            }
            (None, Fisher::Empirical) => {
                begin(weights.total, true, true);
                tape.arm(sums.clone(), true)?;
                armed = true;
                (none(), 1.0)
            }
            (labels, fisher) => {
                let first_row = first_row.unwrap_or_else(|| lock(&sums).counts().terms as u64);
                let key = DrawKey { seed: 0, step: self.core.steps as u64, draw: 0, first_row };
                likelihood.passes(fisher, outputs, labels, &weights, key)?
            }
        };
        let (mut drawn, unusable) =
            self.observed.take().map_or((vec![], None), |observed| (observed.drawn, observed.unusable));
        for (index, cotangent) in passes.enumerate() {
            let grads = pass(&cotangent?, scale, index == 0)?;
            if drawing {
                let grads = self.of_blocks_without_a_layer(&grads)?;
                match drawn.get_mut(index) {
                    Some(sums) => {
                        *sums = sums.iter().zip(&grads).map(|(a, b)| a + b).collect::<Result<_>>()?
                    }
                    None => drawn.push(grads),
                }
            }
        }
        self.observed = Some(Observed { sums, armed, drawn, unusable });
        Ok(())
    }

    /// Where nothing needs the factors of the batch alone, they join the averages as they are computed.
    fn factor_sums(&self) -> FactorSums {
        let (last, decay) = self.averages_to_join();
        FactorSums::new(self.wants.clone(), self.core.params.sharing).averaging(last, decay)
    }

    /// Matrices of gradients, one for each block without a layer.
    fn of_blocks_without_a_layer(&self, grads: &GradStore) -> Result<Vec<Tensor>> {
        let gradient = |index: usize| match grads.get(&self.core.vars[index].var) {
            Some(grad) => wide(grad),
            None => bail!(
                "{}: the observed outputs do not depend on {}",
                self.core.name(),
                self.core.vars[index].name
            ),
        };
        let blocks = self.core.blocks.iter().filter(|block| block.layer.is_none());
        blocks.map(|block| block.matrix(gradient)).collect()
    }

    /// Stops listening and closes the pass, if the tape was armed.
    pub(super) fn close_pass(&mut self) -> Result<()> {
        let Some(observed) = &mut self.observed else { return Ok(()) };
        if std::mem::take(&mut observed.armed) {
            self.core.params.tape.disarm()?;
            lock(&observed.sums).end()?;
        }
        Ok(())
    }

    /// Forgets what was observed; the state of a step that failed or is left out.
    pub(super) fn forget(&mut self) {
        if let Some(observed) = self.observed.take()
            && observed.armed
        {
            // A step that is left out has no use for the records, nor for what is wrong with them.
            let _ = self.core.params.tape.disarm();
        }
        self.accumulated = None;
    }

    /// The factors of the coming step with what their sums were divided by, when they are due.
    pub(super) fn take_factors(&mut self) -> Staged<Option<Refresh>> {
        let Some((sums, drawn)) = self.take_sums(true)? else { return Ok(None) };
        let (counts, averaged) = (sums.counts(), sums.averages());
        let drawn = drawn.into_iter().map(|pass| pass.into_iter().map(Some).collect()).collect();
        Ok(Some(Refresh { layers: sums.finish(&self.layers)?, averaged, counts, drawn }))
    }

    /// What was seen for the coming step's factors, when they are due and there were rows.
    pub(super) fn take_sums(&mut self, with_rows: bool) -> Staged<Option<Seen>> {
        self.close_pass()?;
        let observed = self.observed.take();
        if !(self.curvature_due() && with_rows) {
            return Ok(None);
        }
        let name = self.core.name();
        let failed = |what: String| Refusal::Failed(candle_core::Error::Msg(format!("{name}: {what}")));
        let Some(observed) = observed else {
            return Err(failed(format!(
                "step {} needs the curvature; call observe(&outputs, likelihood) between the forward pass and the step",
                self.core.steps
            )));
        };
        if let Some(what) = observed.unusable {
            return Err(Refusal::NonFinite(what));
        }
        let Ok(sums) =
            Arc::try_unwrap(observed.sums).map(|m| m.into_inner().unwrap_or_else(|p| p.into_inner()))
        else {
            return Err(failed("the observed curvature is still in use".into()));
        };
        Ok(Some((sums, observed.drawn)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::curvature::FactorLimit;
    use crate::gpu::emulate::emulate;
    use crate::nn::{self, Module, VarBuilder, VarMap};
    use crate::optim::{Every, Optimizer, Params};
    use crate::tape::Tape;
    use candle_core::{DType, Device};

    /// What a step says of an infinite input that does not show in the outputs.
    fn overflow(limit: FactorLimit) -> Result<String> {
        let (tape, vars) = (Tape::new(), VarMap::new());
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let (first, second) =
            tape.build(|| Ok((nn::linear(1, 3, vb.pp("fc1"))?, nn::linear(3, 2, vb.pp("fc2"))?)))?;
        let every = Every { factors: 1, inverses: 1 };
        let params = Params { every, factor_limit: limit, ..Params::k_fac(&tape) };
        let mut kfac = NaturalGradient::from_varmap(&vars, params)?;
        let y = Tensor::new(&[0u32, 1], &Device::Cpu)?;
        let mut step = |input: f32| {
            let x = Tensor::new(&[[1.], [input]], &Device::Cpu)?;
            let outputs = second.forward(&first.forward(&x)?.tanh()?)?;
            kfac.observe(&outputs, Likelihood::Categorical)?;
            kfac.backward_step(&nn::loss::cross_entropy(&outputs, &y)?)?;
            kfac.settle()
        };
        step(2.0)?;
        let message = step(f32::INFINITY).expect_err("must fail").to_string();
        step(2.0)?;
        Ok(message)
    }

    #[test]
    fn the_block_whose_factor_is_not_finite_is_named() -> Result<()> {
        for limit in [FactorLimit::NONE, FactorLimit::DIAGONAL] {
            for message in [overflow(limit)?, emulate(|| overflow(limit))?] {
                assert!(message.contains("factor A of block fc1 has NaN or infinite elements"), "{message}");
            }
        }
        Ok(())
    }
}
