//! The spatial entropy of weights.

use candle_core::{DType, Result, Tensor, bail};

use super::Penalty;
use crate::ops::group::check_factor;
use crate::ops::spatial::{Entropy, Pass};

/// A penalty of where a layer's large weights lie: low where few rows and columns hold them.
///
/// For a matrix `W`, with `a = |W|`, `S = sum a`, `p = a / S`, and `r`, `c` the sums of the rows and columns of `p`,
///
/// `R = 2 ln S + 2 gamma ln(H / L) - ln ||W||^2`, `H = kappa (H(r) + H(c)) + (1 - kappa) H(p)`,
///
/// where `L` is the largest `H` possible, `ln(m n)` for a matrix. `kappa` (1/2) is the spatial part: 0 makes the penalty one of
/// the weights' sizes alone. `gamma` (6) is the weight of the entropy against the ratio of the L1 to the L2 norm. Of a
/// convolution's weights `(m, n, kh, kw)` the rows are output and the columns input channels, and every element has its own `p`.
/// It was built to the properties that Bayandorian ("A spatial regularizer", arXiv 2301.07285, 2023) publishes of a
/// regularizer whose formula we do not have; this formula is ours.
///
/// The value does not change with the scale of `W`. By default its gradient treats `||W||` as a constant, and so shrinks the
/// weights: `<W, gradient> = 2`. Without that, weights that never see an input never become small. With
/// [`Spatial::exact`] the gradient is that of the value, and orthogonal to `W`.
///
/// Weights that are all zero have value 0; the gradient of a weight that is zero is zero. There is no closed form for the
/// proximal step.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kronwake::penalty::{Penalty, Spatial};
///
/// let spatial = Spatial::default();
/// let block = Tensor::ones((8, 8), DType::F64, &Device::Cpu)?.pad_with_zeros(0, 0, 32)?.pad_with_zeros(1, 0, 32)?;
/// assert!((spatial.value(&block)?.to_scalar::<f64>()? - -2.72).abs() < 0.005);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spatial {
    kappa: f64,
    gamma: f64,
    exact: bool,
}

impl Default for Spatial {
    fn default() -> Self {
        Self { kappa: 0.5, gamma: 6., exact: false }
    }
}

impl Spatial {
    /// # Errors
    /// If `kappa` is not between 0 and 1, or `gamma` is not finite and at least 0.
    pub fn new(kappa: f64, gamma: f64) -> Result<Self> {
        if !(0. ..=1.).contains(&kappa) {
            bail!("spatial: kappa is {kappa}, expected it between 0 and 1")
        }
        if !(0. ..f64::INFINITY).contains(&gamma) {
            bail!("spatial: gamma is {gamma}, expected it finite and at least 0")
        }
        Ok(Self { kappa, gamma, exact: false })
    }

    /// The same with the gradient of the value itself: it does not shrink the weights.
    pub fn exact(self) -> Self {
        Self { exact: true, ..self }
    }

    fn entropy(&self, factor: f64, empty: f64) -> Entropy {
        Entropy { factor, kappa: self.kappa, gamma: self.gamma, exact: self.exact, empty }
    }

    /// `ln sum_l exp(R_l)` over named layers on one device, as a scalar in f32 (f64 where all are), differentiable: the gradient of
    /// a layer is its own times `exp(R_l) / sum exp(R)`. Layers of zeros do not count, and without others the value is 0.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use kronwake::penalty::Spatial;
    ///
    /// let layers = [Var::randn(0f32, 1., (8, 4), &Device::Cpu)?, Var::randn(0f32, 1., (2, 8), &Device::Cpu)?];
    /// let named = [("fc1.weight", layers[0].as_tensor().clone()), ("fc2.weight", layers[1].as_tensor().clone())];
    /// let grads = Spatial::default().total(&named)?.backward()?;
    /// assert!(layers.iter().all(|w| grads.get(w).is_some()));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// If there are no layers, or, naming the layer, where [`Penalty::value`] fails.
    pub fn total(&self, layers: &[(&str, Tensor)]) -> Result<Tensor> {
        let entropy = self.entropy(1., NONE);
        log_sum_exp(&each(layers, |w| entropy.value(w))?)
    }

    /// `factor` times [`Spatial::total`] and its gradients of the layers, of one evaluation and outside of candle's graph.
    ///
    /// # Errors
    /// As for [`Spatial::total`], and for a factor that is negative or not finite.
    pub fn total_and_gradients(
        &self,
        layers: &[(&str, Tensor)],
        factor: f64,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        check_factor("spatial", factor)?;
        let entropy = self.entropy(1., NONE);
        let passes = each(layers, |w| entropy.start(w))?;
        let values = passes.iter().map(|pass| pass.value()).collect::<Result<Vec<_>>>()?;
        let total = log_sum_exp(&values)?;
        let gradient = |(pass, value): (Pass, &Tensor)| {
            let share = (value - total.to_dtype(value.dtype())?)?.exp()?;
            Ok(pass.finish(Some(&(share * factor)?))?.1)
        };
        let gradients = passes.into_iter().zip(&values).map(gradient).collect::<Result<Vec<_>>>()?;
        Ok(((total * factor)?, gradients))
    }
}

/// `R` of a layer of zeros: its exponential is 0 whatever the others are, and no difference of two is NaN.
const NONE: f64 = -1e30;

/// What is made of each of at least one layer; an error names the layer.
fn each<R>(layers: &[(&str, Tensor)], f: impl Fn(&Tensor) -> Result<R>) -> Result<Vec<R>> {
    if layers.is_empty() {
        bail!("spatial: no layers, expected at least one")
    }
    let named = |(name, w): &(&str, Tensor)| f(w).map_err(|error| error.context(format!("layer {name}")));
    layers.iter().map(named).collect()
}

/// `ln sum exp(R)` in f32 (f64 where all are), 0 of layers of zeros alone.
fn log_sum_exp(values: &[Tensor]) -> Result<Tensor> {
    let all_wide = values.iter().all(|value| value.dtype() == DType::F64);
    let dtype = if all_wide { DType::F64 } else { DType::F32 };
    let values = values.iter().map(|value| value.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
    let values = Tensor::stack(&values, 0)?;
    let largest = values.detach().max(0)?;
    let total = (values.broadcast_sub(&largest)?.exp()?.sum_all()?.log()? + &largest)?;
    let none = largest.le(0.5 * NONE)?;
    none.where_cond(&total.zeros_like()?, &total)
}

impl Penalty for Spatial {
    fn name(&self) -> String {
        let exact = if self.exact { ", exact" } else { "" };
        format!("spatial (kappa {}, gamma {}{exact})", self.kappa, self.gamma)
    }

    fn value(&self, w: &Tensor) -> Result<Tensor> {
        self.entropy(1., 0.).value(w)
    }

    fn gradient(&self, w: &Tensor) -> Result<Tensor> {
        Ok(self.value_and_gradient(w, 1.)?.1)
    }

    fn value_and_gradient(&self, w: &Tensor, factor: f64) -> Result<(Tensor, Tensor)> {
        check_factor("spatial", factor)?;
        self.entropy(factor, 0.).start(w)?.finish(None)
    }

    fn prox(&self, _: &Tensor, _: f64) -> Result<Tensor> {
        bail!("{}: no closed form of a proximal step, expected it as a term of the loss", self.name())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::gpu::emulate::emulate;
    use crate::ops::testing::{assert_close, check_gradients, random, random_var, values};

    /// The value from its definition, element by element.
    fn reference(w: &Tensor, kappa: f64, gamma: f64) -> Result<f64> {
        let dims = w.dims().to_vec();
        let (m, n) = (dims[0], dims[1]);
        let w = values(w)?;
        let k = w.len() / (m * n);
        let sum: f64 = w.iter().map(|w| w.abs()).sum();
        let (mut r, mut c) = (vec![0.; m], vec![0.; n]);
        for (at, w) in w.iter().enumerate() {
            r[at / (n * k)] += w.abs() / sum;
            c[at / k % n] += w.abs() / sum;
        }
        let entropy = |p: &mut dyn Iterator<Item = f64>| -> f64 { p.map(|p| -p * p.ln()).sum() };
        let h = kappa * (entropy(&mut r.into_iter()) + entropy(&mut c.into_iter()))
            + (1. - kappa) * entropy(&mut w.iter().map(|w| w.abs() / sum));
        let l = kappa * ((m * n) as f64).ln() + (1. - kappa) * ((m * n * k) as f64).ln();
        let squares: f64 = w.iter().map(|w| w * w).sum();
        Ok(2. * sum.ln() + 2. * gamma * (h / l).ln() - squares.ln())
    }

    #[test]
    fn values_and_gradients() -> Result<()> {
        for dims in [vec![4, 6], vec![1, 7], vec![5, 2], vec![3, 2, 2, 3], vec![1, 1, 3, 3], vec![700, 40]] {
            for (kappa, gamma) in [(0.5, 6.), (0., 2.), (1., 1.), (0.3, 0.)] {
                let w = random_var(0, &dims)?;
                let spatial = Spatial::new(kappa, gamma)?;
                if kappa < 1. || dims[0] * dims[1] > 1 {
                    let expected = reference(&w, kappa, gamma)?;
                    assert_close(&spatial.value(&w)?, &[expected], 1e-12);
                    assert_close(&spatial.exact().value(&w)?, &[expected], 1e-12);
                }
                if dims[0] < 100 {
                    check_gradients(std::slice::from_ref(&w), |a| spatial.exact().value(&a[0]));
                }
                let (value, gradient) = spatial.value_and_gradient(&w, 0.3)?;
                assert_close(&value, &values(&(spatial.value(&w)? * 0.3)?)?, 1e-15);
                let backward = (spatial.value(&w)? * 0.3)?.backward()?;
                assert_close(&gradient, &values(backward.get(&w).unwrap())?, 1e-14);
                // The default gradient has the norm as a constant: it shrinks the weights.
                let (exact, default) = (spatial.exact().gradient(&w)?, spatial.gradient(&w)?);
                let norm = w.sqr()?.sum_all()?.to_scalar::<f64>()?;
                assert_close(&default, &values(&(exact + (w.as_tensor() * (2. / norm))?)?)?, 1e-12);
                // Up to what the floor takes from shares below 1e-9, which only the large one has.
                assert_close(
                    &(default * w.as_tensor())?.sum_all()?,
                    &[2.],
                    if dims[0] < 100 { 1e-12 } else { 1e-8 },
                );
            }
        }
        Ok(())
    }

    /// 64 equal weights of 1600 score -2.72 in a block and +0.42 at random places, where the standard deviation between draws is
    /// 0.10.
    #[test]
    fn a_block_is_lower_than_scattered_weights() -> Result<()> {
        let spatial = Spatial::default();
        let score = |places: &dyn Fn(usize) -> usize| -> Result<f64> {
            let mut w = vec![0f64; 1600];
            (0..64).for_each(|i| w[places(i)] = 0.3);
            spatial.value(&Tensor::from_vec(w, (40, 40), &Device::Cpu)?)?.to_scalar()
        };
        assert!((score(&|i| i / 8 * 40 + i % 8)? - -2.72).abs() < 0.005);
        let mut mean = 0.;
        for draw in 0..40 {
            let order = values(&random(draw, &[1600])?)?;
            let mut places: Vec<usize> = (0..1600).collect();
            places.sort_by(|a, b| order[*a].total_cmp(&order[*b]));
            mean += score(&|i| places[i])? / 40.;
        }
        assert!((mean - 0.42).abs() < 0.1, "{mean}");
        Ok(())
    }

    #[test]
    fn the_scale_does_not_matter() -> Result<()> {
        let w = random(0, &[6, 9])?;
        for spatial in [Spatial::default(), Spatial::default().exact()] {
            for scale in [1e-20, 1e-3, 1e20] {
                let scaled = (&w * scale)?;
                assert_close(&spatial.value(&scaled)?, &values(&spatial.value(&w)?)?, 1e-12);
                let back = (spatial.gradient(&scaled)? * scale)?;
                assert_close(&back, &values(&spatial.gradient(&w)?)?, 1e-12);
                let single = scaled.to_dtype(DType::F32)?;
                assert_close(&spatial.value(&single)?, &values(&spatial.value(&w)?)?, 1e-5);
            }
        }
        Ok(())
    }

    #[test]
    fn zeros_and_single_weights() -> Result<()> {
        let check = || -> Result<()> {
            for dtype in [DType::F64, DType::F32, DType::F16] {
                for spatial in [Spatial::default(), Spatial::default().exact()] {
                    let zero = Var::zeros((3, 4), dtype, &Device::Cpu)?;
                    let value = spatial.value(&zero)?;
                    assert_eq!(values(&value)?, [0.]);
                    let grads = value.backward()?;
                    assert_eq!(grads.get(&zero).map(values).transpose()?, Some(vec![0.; 12]));
                    let one = Var::from_tensor(
                        &Tensor::new(&[[0f32, 2.], [0., 0.]], &Device::Cpu)?.to_dtype(dtype)?,
                    )?;
                    let value = spatial.value(&one)?;
                    assert_close(&value, &[12. * 1e-9f64.ln()], 1e-5);
                    let exact = if spatial == Spatial::default() { 1. } else { 0. };
                    assert_close(&spatial.gradient(&one)?, &[0., exact, 0., 0.], 1e-3);
                    let cell = Tensor::new(&[[-3f32]], &Device::Cpu)?.to_dtype(dtype)?;
                    assert_close(&spatial.value(&cell)?, &[0.], 1e-6);
                }
            }
            let empty = Var::zeros((0, 4), DType::F32, &Device::Cpu)?;
            let grads = Spatial::default().value(&empty)?.backward()?;
            assert_eq!(grads.get(&empty).map(|g| g.dims().to_vec()), Some(vec![0, 4]));
            Ok(())
        };
        check()?;
        emulate(check)
    }

    #[test]
    fn layers_share_by_softmax() -> Result<()> {
        let layers = [random_var(0, &[4, 6])?, random_var(1, &[3, 2, 2, 2])?, random_var(2, &[9, 9])?];
        let zero = Tensor::zeros((2, 2), DType::F64, &Device::Cpu)?;
        for spatial in [Spatial::default(), Spatial::new(0.2, 1.)?.exact()] {
            let all = |w: &[Tensor]| -> Result<Tensor> {
                let mut named = vec![("zero", zero.clone())];
                named.extend(w.iter().map(|w| ("w", w.clone())));
                spatial.total(&named)
            };
            let own: Vec<f64> =
                layers.iter().map(|w| spatial.value(w)?.to_scalar()).collect::<Result<_>>()?;
            let sum: f64 = own.iter().map(|r| r.exp()).sum();
            let tensors: Vec<Tensor> = layers.iter().map(|w| w.as_tensor().clone()).collect();
            let total = all(&tensors)?;
            assert_close(&total, &[sum.ln()], 1e-12);
            let grads = total.backward()?;
            for (w, r) in layers.iter().zip(&own) {
                let expected = (spatial.gradient(w)? * (r.exp() / sum))?;
                assert_close(grads.get(w).unwrap_or(&zero), &values(&expected)?, 1e-12);
            }
            let mut named = vec![("zero", zero.clone())];
            named.extend(tensors.iter().map(|w| ("w", w.clone())));
            let (value, gradients) = spatial.total_and_gradients(&named, 0.7)?;
            assert_close(&value, &[0.7 * sum.ln()], 1e-12);
            assert_eq!(values(&gradients[0])?, [0.; 4]);
            for (w, gradient) in layers.iter().zip(&gradients[1..]) {
                let expected = (grads.get(w).unwrap() * 0.7)?;
                assert_close(gradient, &values(&expected)?, 1e-13);
            }
            if spatial.exact {
                check_gradients(&layers, all);
            }
        }
        let none = Var::zeros((2, 2), DType::F32, &Device::Cpu)?;
        let total =
            Spatial::default().total(&[("a", none.as_tensor().clone()), ("b", none.as_tensor().clone())])?;
        assert_eq!(values(&total)?, [0.]);
        assert_eq!(total.backward()?.get(&none).map(values).transpose()?, Some(vec![0.; 4]));
        let (total, gradients) =
            Spatial::default().total_and_gradients(&[("a", none.as_tensor().clone())], 1.)?;
        assert_eq!((values(&total)?, values(&gradients[0])?), (vec![0.], vec![0.; 4]));
        assert!(Spatial::default().total(&[]).is_err());
        Ok(())
    }

    #[test]
    fn refusals() -> Result<()> {
        for bad in [f64::NAN, -1., 2.] {
            assert!(Spatial::new(bad, 6.).is_err());
        }
        let w = random(0, &[2, 3])?;
        for bad in [f64::NAN, -1., f64::INFINITY] {
            assert!(Spatial::default().value_and_gradient(&w, bad).is_err());
            assert!(Spatial::default().total_and_gradients(&[("w", w.clone())], bad).is_err());
        }
        assert!(Spatial::new(0.5, f64::NAN).is_err() && Spatial::new(0.5, -1.).is_err());
        let broken = Tensor::new(&[[1f32, f32::NAN], [f32::INFINITY, 0.]], &Device::Cpu)?;
        let message = Spatial::default().total(&[("fc1", broken.clone())]).err().map(|e| e.to_string());
        let message = message.unwrap_or_default();
        assert!(message.contains("fc1") && message.contains("weight 1 of [2, 2]"), "{message}");
        assert!(
            Spatial::default().gradient(&broken).is_err() && Spatial::default().prox(&broken, 1.).is_err()
        );
        Ok(())
    }

    #[test]
    fn kernels_agree_with_the_cpu() -> Result<()> {
        for dims in [vec![1, 1], vec![5, 7], vec![3, 4, 3, 3], vec![130, 3], vec![20, 300], vec![2, 2100]] {
            let mut w = values(&random(0, &dims)?)?;
            w.iter_mut().skip(1).step_by(5).for_each(|w| *w = 0.);
            for (dtype, tolerance) in
                [(DType::F64, 1e-13), (DType::F32, 1e-6), (DType::F16, 1e-3), (DType::BF16, 1e-2)]
            {
                let w = Tensor::from_vec(w.clone(), &dims[..], &Device::Cpu)?.to_dtype(dtype)?;
                let w = Var::from_tensor(&w)?;
                for spatial in [Spatial::default(), Spatial::new(0.2, 2.)?.exact()] {
                    let run = || -> Result<Vec<Tensor>> {
                        let value = (spatial.value(&w.transpose(0, 1)?)? * 3.)?;
                        let grad = value.backward()?.get(&w).cloned();
                        let (one, gradient) = spatial.value_and_gradient(&w, 0.3)?;
                        let layers = [("a", w.as_tensor().clone()), ("b", w.t()?)];
                        let (total, mut gradients) = spatial.total_and_gradients(&layers, 0.7)?;
                        gradients.extend([value, one, gradient, total, spatial.gradient(&w)?]);
                        Ok(gradients.into_iter().chain(grad).collect())
                    };
                    let (found, expected) = (emulate(run)?, run()?);
                    assert_eq!((found.len(), expected.len()), (8, 8));
                    for (found, expected) in found.iter().zip(&expected) {
                        assert_eq!(found.dtype(), expected.dtype());
                        assert_close(found, &values(expected)?, tolerance);
                    }
                }
            }
        }
        Ok(())
    }
}
