//! The factors of a model over a data set, for other uses than an optimizer's.

use super::{FactorShape, FactorSums, LayerFactors, Pass, Sharing, Want, WantWeight};
use crate::ops::sample::DrawKey;
use crate::tape::{Fisher, Head, Layer, Likelihood, Tape, Terms};
use candle_core::{Result, Tensor, bail};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The Kronecker factors of one layer: its Fisher matrix is about `A (x) G`, that of the mean loss.
#[derive(Debug, Clone)]
pub struct Factors {
    /// The layer's name on the tape.
    pub name: String,
    /// Second moment of the inputs, `[groups, in, in]`, or `[groups, in + 1, in + 1]` where the layer has a bias, whose input is 1 and
    /// comes last. In f32, or f64 for f64.
    pub a: Tensor,
    /// Second moment of the gradients of a loss term with respect to the outputs, `[groups, out / groups, out / groups]`.
    pub g: Tensor,
}

/// Sums up Kronecker factors over the batches of a data set.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kronwake::curvature::{Collect, Sharing};
/// use kronwake::nn::{self, Module, VarBuilder, VarMap};
/// use kronwake::tape::{Fisher, Likelihood, Tape};
///
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu);
/// let tape = Tape::new();
/// let layer = tape.build(|| nn::linear(3, 2, vb.pp("fc")))?;
/// let mut collect = Collect::new(&tape, Likelihood::Categorical, Fisher::Exact, Sharing::Expand)?;
/// for _ in 0..4 {
///     let x = Tensor::randn(0f64, 1., (8, 3), &Device::Cpu)?;
///     collect.add(&layer.forward(&x)?, None)?;
/// }
/// let factors = collect.finish()?;
/// assert_eq!((factors[0].name.as_str(), factors[0].a.dims(), factors[0].g.dims()), ("fc", &[1, 4, 4][..], &[1, 2, 2][..]));
/// # candle_core::Result::Ok(())
/// ```
pub struct Collect {
    tape: Tape,
    likelihood: Likelihood,
    fisher: Fisher,
    sums: Arc<Mutex<FactorSums>>,
}

impl std::fmt::Debug for Collect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collect").field("terms", &self.sums().counts().terms).finish_non_exhaustive()
    }
}

impl Collect {
    /// Of all linear and convolution layers of `tape`, biases folded in.
    ///
    /// # Errors
    /// If the tape has no such layer, or the Fisher matrix is to be sampled with no draws.
    pub fn new(tape: &Tape, likelihood: Likelihood, fisher: Fisher, sharing: Sharing) -> Result<Self> {
        let layers = tape.layers();
        if !layers.iter().any(|layer| layer.kind.is_linear()) {
            bail!(
                "factors: no linear or convolution layer is on the tape; build the model inside Tape::build from \
                 kronwake::nn layers"
            )
        }
        if matches!(fisher, Fisher::Sampled { draws: 0, .. }) {
            bail!("factors: expected at least one draw for a sampled Fisher matrix, got 0")
        }
        let want = |layer: &Arc<Layer>| {
            let (folded, groups) = (layer.bias.is_some(), layer.groups.max(1));
            let a = FactorShape::full(layer.in_features() + usize::from(folded));
            let weight = WantWeight { folded, a, g: FactorShape::full(layer.out_features() / groups) };
            let want = Want { weight: Some(weight), bias: None, of_bias: None, keep: false, optional: false };
            (layer.kind.is_linear()).then_some(want)
        };
        let wants = layers.iter().map(want).collect();
        let sums = Arc::new(Mutex::new(FactorSums::new(wants, sharing)));
        Ok(Self { tape: tape.clone(), likelihood, fisher, sums })
    }

    /// Adds a batch: `outputs` are the model's, `[.., classes]`, with their graph. `labels` are needed for [`Fisher::Empirical`] and
    /// not read otherwise: class numbers for a categorical likelihood, targets in the outputs' shape for others.
    ///
    /// # Errors
    /// If the batch is empty, its outputs are not finite or hold no graph to a tapped layer, or labels are missing or do not fit.
    pub fn add(&mut self, outputs: &Tensor, labels: Option<&Tensor>) -> Result<()> {
        self.add_weighted(outputs, labels, &Terms::equal())
    }

    /// [`Collect::add`] with weights of the loss terms: the factors are those of the weighted mean over all batches.
    ///
    /// # Errors
    /// As [`Collect::add`], and if the weights do not fit the outputs.
    pub fn add_weighted(&mut self, outputs: &Tensor, labels: Option<&Tensor>, terms: &Terms) -> Result<()> {
        let likelihood = self.likelihood;
        let labels = labels.filter(|_| self.fisher.reads_labels());
        let head = Head { labels, terms: terms.clone(), ..Head::new(outputs, likelihood) };
        let weights = Arc::new(head.weights(None)?);
        let sum = outputs.detach().to_dtype(candle_core::DType::F64)?.sum_all()?.to_scalar::<f64>()?;
        if !sum.is_finite() {
            bail!("factors: the outputs {:?} have NaN or infinite elements", outputs.dims())
        }
        let key = DrawKey { seed: 0, step: 0, draw: 0, first_row: self.sums().counts().terms as u64 };
        let (passes, scale) = likelihood.passes(self.fisher, outputs, labels, &weights, key)?;
        let passes = passes.collect::<Result<Vec<_>>>()?;
        for (index, cotangent) in passes.iter().enumerate() {
            let (weights, share) = (weights.clone(), weights.total);
            self.sums().begin(Pass { weights, share, scale, fresh: index == 0, of_loss: false });
            self.tape.reduce_into(outputs, cotangent, self.sums.clone())?;
            self.sums().end()?;
        }
        Ok(())
    }

    /// The factors of these layers, in the tape's order: sums over the batches divided by their loss terms.
    ///
    /// # Errors
    /// If nothing was added, or a layer took part in no batch.
    pub fn finish(self) -> Result<Vec<Factors>> {
        let layers = self.tape.layers();
        let Some(sums) = Arc::into_inner(self.sums) else { bail!("factors: the sums are still in use") };
        let finished = sums.into_inner().unwrap_or_else(PoisonError::into_inner).finish(&layers)?;
        let one = |(factors, layer): (LayerFactors, &Arc<Layer>)| {
            let LayerFactors { a: Some(a), g: Some(g), .. } = factors else { return None };
            Some(Factors { name: layer.name.clone(), a, g })
        };
        Ok(finished.into_iter().zip(&layers).filter_map(one).collect())
    }

    fn sums(&self) -> MutexGuard<'_, FactorSums> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{self, Module, VarBuilder, VarMap};
    use crate::ops::testing::{assert_close, random, values};
    use candle_core::{DType, Device};

    #[test]
    fn factors_of_a_linear_layer_in_two_batches() -> Result<()> {
        let (varmap, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu);
        let layer = tape.build(|| {
            nn::layer_norm(3, 1e-5, vb.pp("norm"))?; // is on the tape too, and no matrix
            nn::linear(3, 4, vb.pp("fc"))
        })?;
        let (n, x) = (10, random(0, &[10, 3])?);
        let labels: Vec<u32> = (0..n as u32).map(|i| i % 4).collect();
        let logits = layer.forward(&x)?.detach();
        let p = candle_nn::ops::softmax(&logits, 1)?.to_vec2::<f64>()?;
        let rows = Tensor::cat(&[&x, &Tensor::ones((n, 1), DType::F64, &Device::Cpu)?], 1)?;
        let a = (rows.t()?.matmul(&rows)? / n as f64)?;
        for fisher in [Fisher::Exact, Fisher::Empirical, Fisher::Sampled { draws: 20_000, seed: 1 }] {
            let mut collect = Collect::new(&tape, Likelihood::Categorical, fisher, Sharing::Expand)?;
            for (from, count) in [(0, 7), (7, 3)] {
                let part = Tensor::new(&labels[from..from + count], &Device::Cpu)?;
                collect.add(&layer.forward(&x.narrow(0, from, count)?)?, Some(&part))?;
            }
            let factors = collect.finish()?;
            assert_eq!((factors.len(), factors[0].name.as_str()), (1, "fc"));
            assert_close(&factors[0].a, &values(&a)?, 1e-13);
            let mut g = [0.; 16];
            for (p, label) in p.iter().zip(&labels) {
                for i in 0..4 {
                    for j in 0..4 {
                        let hot = |k: usize| f64::from(*label as usize == k);
                        g[4 * i + j] += match fisher {
                            Fisher::Empirical => (p[i] - hot(i)) * (p[j] - hot(j)),
                            _ => p[i] * (f64::from(i == j) - p[j]),
                        } / n as f64;
                    }
                }
            }
            // 200,000 residuals of size below 1.
            let tolerance = if matches!(fisher, Fisher::Sampled { .. }) { 0.02 } else { 1e-13 };
            assert_close(&factors[0].g, &g, tolerance);
        }
        Ok(())
    }

    #[test]
    fn refusals() -> Result<()> {
        let (varmap, tape) = (VarMap::new(), Tape::new());
        let vb = VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu);
        let layer = tape.build(|| nn::linear(3, 4, vb.pp("fc")))?;
        let new = |tape: &Tape, fisher| Collect::new(tape, Likelihood::Categorical, fisher, Sharing::Expand);
        let outputs = layer.forward(&random(0, &[2, 3])?)?;
        let none = Fisher::Sampled { draws: 0, seed: 0 };
        let cases: Vec<(Result<()>, &str)> = vec![
            (new(&Tape::new(), Fisher::Exact).map(drop), "no linear or convolution layer is on the tape"),
            (new(&tape, none).map(drop), "at least one draw"),
            (new(&tape, Fisher::Empirical)?.add(&outputs, None), "needs labels"),
            (new(&tape, Fisher::Exact)?.add(&(&outputs / 0.)?, None), "NaN or infinite"),
            (new(&tape, Fisher::Exact)?.add(&outputs.detach(), None), "no tapped layer took part"),
            (new(&tape, Fisher::Exact)?.finish().map(drop), "layer fc made no record"),
        ];
        for (result, part) in cases {
            let message = result.err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
        Ok(())
    }
}
